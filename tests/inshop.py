"""A source tree in the shape of DeepFashion In-Shop, drawn from nothing: its counts, its layout and its oddities.

`FULL` has the benchmark's own numbers; `FULL.scaled(100)` a hundredth of them, for tests.
"""

import io
import json
import random
from collections import defaultdict
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

VIEWS = ("1_front", "2_side", "3_back", "4_full", "6_flat", "7_additional")
CATEGORIES = (
    *(f"WOMEN/{name}" for name in ("Dresses", "Tees_Tanks", "Blouses_Shirts", "Rompers_Jumpsuits", "Denim", "Skirts")),
    *(f"MEN/{name}" for name in ("Tees_Tanks", "Shirts_Polos", "Jackets_Vests", "Denim", "Suiting")),
)
Row = tuple[str, str, str]  # image path, item, split


@dataclass(frozen=True)
class Shape:
    """How many of what."""

    train_images: int
    train_items: int
    single: int
    """train items with one image"""
    query: int
    gallery: int
    test_items: int
    several: int
    """items with several variants"""
    orphans: int
    """queries without a gallery image of their variant"""
    two_categories: int
    empty: int
    """items with an empty description"""
    twins: int
    """pairs of items with one description"""
    broken: int
    """descriptions that were read in the wrong encoding"""
    spaced: int
    """descriptions with double spaces"""
    colors: int

    @property
    def images(self) -> int:
        return self.train_images + self.query + self.gallery

    def scaled(self, divisor: int) -> "Shape":
        return Shape(*(max(1, getattr(self, field.name) // divisor) for field in fields(self)))


FULL = Shape(25_882, 3_997, 12, 14_218, 12_612, 3_985, 2_598, 625, 99, 2, 7, 34, 200, 805)


def listing(shape: Shape = FULL, seed: int = 0) -> list[Row]:
    """The rows of the partition file."""
    rng = random.Random(seed)
    items = [f"id_{number:08d}" for number in range(1, shape.train_items + shape.test_items + 1)]
    rng.shuffle(items)
    train, test = items[: shape.train_items], items[shape.train_items :]
    share = shape.several * shape.train_items // len(items)
    pictures = _pictures(train, shape.train_images, shape.single, share, rng)
    rows = [(item, variant, view, "train") for item, variant, view in pictures]
    pictures = _pictures(test, shape.query + shape.gallery, 0, shape.several - share, rng)
    rows += _ask(pictures, shape.query, shape.orphans, rng)
    several = [item for item, variants in _variants(rows).items() if len(variants) > 1]
    elsewhere = set(rng.sample(several, shape.two_categories))
    listed = []
    for item, variant, view, split in sorted(rows):
        place = int(item[3:]) + (item in elsewhere and variant == 1)
        category = CATEGORIES[place % len(CATEGORIES)]
        listed.append((f"img/{category}/{item}/{variant:02d}_{VIEWS[view]}.jpg", item, split))
    return listed


def _pictures(
    items: list[str], images: int, single: int, several: int, rng: random.Random
) -> list[tuple[str, int, int]]:
    """(item, variant, view) of so many images: `single` items have one, `several` have more than one variant."""
    most = min(42, 2 + images // 60)
    variants = [1] * (len(items) - several) + [min(most, 2 + int(rng.expovariate(0.8))) for _ in range(several)]
    variants[-1] = most
    sizes = [1] * single + [rng.choice((2, 3, 4, 4, 4, 6)) for _ in variants[single:]]
    low = [size if number == 1 else number + 1 for size, number in zip(sizes, variants, strict=True)]
    high = [size if number == 1 else number * len(VIEWS) for size, number in zip(sizes, variants, strict=True)]
    low[-1] = high[-1] = min(162, images // 10)
    sizes = [max(bottom, min(top, 4 * number)) for bottom, top, number in zip(low, high, variants, strict=True)]
    _adjust(sizes, images, low, high, rng)
    return [
        (item, 1 + number % among, number // among)
        for item, size, among in zip(items, sizes, variants, strict=True)
        for number in range(size)
    ]


def _adjust(numbers: list[int], total: int, low: list[int], high: list[int], rng: random.Random) -> None:
    """Change some numbers by one at a time, within their bounds, until they add up."""
    missing = total - sum(numbers)
    step, bound = (1, high) if missing > 0 else (-1, low)
    while missing:
        at = rng.randrange(len(numbers))
        if numbers[at] != bound[at]:
            numbers[at] += step
            missing -= step


def _variants(rows: list) -> dict[str, dict[int, list[int]]]:
    """Item to variant to views."""
    found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for item, variant, view, *_ in rows:
        found[item][variant].append(view)
    return found


def _ask(
    pictures: list[tuple[str, int, int]], query: int, orphans: int, rng: random.Random
) -> list[tuple[str, int, int, str]]:
    """The images of test items as queries and gallery, with so many queries that no image of their variant answers."""
    parts = [(item, variant, views) for item, its in _variants(pictures).items() for variant, views in its.items()]
    rng.shuffle(parts)
    parts.sort(key=lambda part: (part[1] == 1, len(part[2]) > 2, -len(part[2])))  # a first variant always answers
    asking = []
    for _, variant, views in parts:
        alone = variant != 1 and len(views) <= orphans
        orphans -= len(views) * alone
        asking.append(len(views) if alone else min(1, len(views) - 1))
    sizes = [len(views) for *_, views in parts]
    low = [asks if asks == size or part[1] == 1 else 0 for asks, size, part in zip(asking, sizes, parts, strict=True)]
    high = [max(asks, size - 1) for asks, size in zip(asking, sizes, strict=True)]
    _adjust(asking, query, low, high, rng)
    return [
        (item, variant, view, "query" if number < asks else "gallery")
        for asks, (item, variant, views) in zip(asking, parts, strict=True)
        for number, view in enumerate(views)
    ]


# Texts

SENTENCES = (
    "Busy mornings and stacked calls are no match for this throw-on-and-go number!",
    "Its boxy silhouette and ultra-soft knit fabrication will have you taking on the day in breezy comfort, while a "
    "scoop back lends it some unexpected sartorial side-eye.",
    "Plus, you can just as easily take it from the desk to wherever the night is going to end.",
    "Cut from brushed cotton, this dress has a flared skirt, an elasticized waist and a concealed back zipper.",
    "A v-neckline and long sleeves finish the relaxed fit.",
    "We love it with distressed denim, ankle boots and a leather jacket, but you'll see.",
    "It's an off-the-shoulder piece that is made for weekends, festivals and nothing else",
)
DETAILS = (
    "Semi-sheer, lightweight",
    "95% rayon, 5% spandex",
    "Shell: 100% cotton; Lining: 100% polyester",
    '30.5" full length, 42" chest, 40" waist, 8" sleeve length',
    "Measured from Small",
    "Hand wash cold",
    "Imported, see care label",
)
TELLING = ("Caf\u00e9-ready appliqu\u00e9 on a stretch Lycra\u00ae base.", "Wash at 30\u00b0 or less.")
NAMES = ("Black", "Cream", "Navy", "Heather grey", "Rust", "Off-white", "Olive", "Light denim", "Blush", "Taupe")


def colors(number: int) -> list[str]:
    """Distinct colour strings, many of them compound."""
    compound = [f"{one}{sign}{other.lower()}" for sign in "-/" for one in NAMES for other in NAMES if one != other]
    numbered = [f"{name} {count}" for count in range(2, 2 + number) for name in NAMES]
    return [*NAMES, *compound, *numbered][:number]


def descriptions(items: list[str], shape: Shape = FULL, seed: int = 0) -> list[dict]:
    """The entries of the description file: one an item, with what is odd in them at the beginning of the list."""
    rng = random.Random(seed)
    palette = colors(shape.colors)
    entries = []
    for number, item in enumerate(items):
        told = " ".join(rng.sample(SENTENCES, rng.randrange(1, len(SENTENCES))))
        details = rng.sample(DETAILS, rng.randrange(2, len(DETAILS)))
        entries.append({"item": item, "color": palette[number % len(palette)], "description": [told, *details]})
    odd = iter(entries)
    for entry in islice(odd, shape.empty):
        entry["description"] = []
    for entry in islice(odd, shape.twins):
        next(odd)["description"] = entry["description"]
    for entry in islice(odd, shape.broken):
        entry["description"] = [text.encode().decode("gbk") for text in TELLING] + entry["description"]
    for entry in islice(odd, shape.spaced):
        entry["description"] = [text.replace(". ", ".  ") + "  Yes." for text in entry["description"]]
    next(odd)["description"] = [*SENTENCES, "with a line\r\nbreak", *DETAILS]  # the longest, 223 tokens
    return entries


# Files


def pictures(number: int, size: tuple[int, int], seed: int = 0) -> list[bytes]:
    """JPEGs of smooth shapes under a little noise, about as large as photos of their size."""
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=85)
        encoded.append(stream.getvalue())
    return encoded


def write(root: Path, shape: Shape = FULL, size: tuple[int, int] = (256, 256), tree: str = "Img/img") -> Path:
    """Write the source. No two files are equal: each carries its number in a comment."""
    rows = listing(shape)
    drawn = pictures(min(64, len(rows)), size)
    folders = {Path(path).parent for path, *_ in rows}
    for folder in folders:
        (root / tree / folder.relative_to("img")).mkdir(parents=True, exist_ok=True)
    for number, (path, *_) in enumerate(rows):
        data = drawn[number % len(drawn)]
        comment = b"\xff\xfe\x00\x06" + number.to_bytes(4, "big")
        (root / tree / path.removeprefix("img/")).write_bytes(data[:2] + comment + data[2:])
    for name in ("Eval", "Anno"):
        (root / name).mkdir(exist_ok=True)
    table = "".join(f"{path:70} {item} {split}\n" for path, item, split in rows)
    header = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    (root / "Eval/list_eval_partition.txt").write_text(header + table)
    items = sorted({item for _, item, _ in rows})
    (root / "Anno/list_item_inshop.txt").write_text("\n".join([str(len(items)), *items]) + "\n")
    described = json.dumps(descriptions(items, shape), indent=1)
    (root / "Anno/list_description_inshop.json").write_text(described)
    return root
