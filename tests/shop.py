"""A drawn shop with some oddities, and damaged photos, as sources of small catalogues."""

import csv
import io
from concurrent.futures import Future

import numpy as np
from PIL import Image

from clipfh.data.splits import SPLITS


class SameProcess:
    """Stands in for the pool where a test is not about it: starting processes is most of a small catalogue's time."""

    def __init__(self, *args, **kwargs):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **kwargs):
        pass


def draw(path, size=(24, 32), number=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


SHOP = [  # path, item, split
    *((f"dresses/{i}/0{v}_1_front.jpg", f"item{i}", "train") for i in range(9) for v in (1, 2)),
    ("tees/0/03_7_additional.jpg", "item0", "train"),  # an item in two categories
    ("denim/90/01_3_back.jpg", "item90", "train"),  # one image
    *((f"hats/{i}/01_{v}_side.jpg", f"item{i}", split) for i in (100, 101)
      for v, split in ((1, "query"), (2, "gallery"), (4, "gallery"))),
]  # fmt: skip


DESCRIBED = {"item0": ("Black-cream", "Warm.\nLong."), "item1": ("Red", ""), "item100": ("", "A \u7ea2 hat")}


def table(path, rows, columns=("image_path", "item_id", "split")):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def shop(root, rows=SHOP):
    """A source of a few items with some oddities; `rows` as in SHOP."""
    for number, (path, *_) in enumerate(rows):
        draw(root / path, number=number)
    full = [(*row, row[0].split("/")[0], "KIDS", *DESCRIBED.get(row[1], ("", ""))) for row in rows]
    return table(root / "shop.csv", full, ("image_path", "item_id", "split", "category", "gender", "color", "text"))


def rows_of(made, *splits):
    return [row for split in splits or SPLITS for row in made.rows(split).to_pylist()]


def bad_source(root):
    """18 good train images, test images, and five that must not get in."""
    listed = [(f"good/{i}.jpg", f"item{i // 3}", "train") for i in range(18)]
    listed += [(f"test/{i}.jpg", f"test{i // 3}", "test") for i in range(6)]
    for number, (path, *_) in enumerate(listed):
        draw(root / path, (60, 50), number=number)
    draw(root.parent / "outside.jpg")
    draw(root / "good/cut.jpg").write_bytes((root / "good/0.jpg").read_bytes()[:-40])
    (root / "good/text.jpg").write_text("no image")
    (root / "good/link.jpg").symlink_to(root.parent / "outside.jpg")
    Image.new("1", (11_000, 10_000)).save(root / "good/huge.png")
    absolute = str((root.parent / "outside.jpg").absolute())
    bad = [
        "good/cut.jpg",
        "good/text.jpg",
        "good/link.jpg",
        "good/huge.png",
        "good/gone.jpg",
        "../outside.jpg",
        absolute,
    ]
    return table(root / "list.csv", listed + [(path, "item0", "train") for path in bad]), bad


def saved(image, format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def colored(size, number=0):
    coarse = np.random.default_rng(number).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


CUT = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
