"""How many planted near copies are found among photos, how many pairs are found falsely, and how long it takes.

Usage: python tests/benchmarks/bench_audit.py FOLDER   of item folders with photos; without one, photos are made up.
A pair of photos of two items is false, unless it was planted. Beside FOLDER's photos as they are, upright cuts of them.
"""

import io
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import inshop
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from clipfh.data.near_copies import find_near_copies, small_picture, thumbnails


def crop(image: Image.Image, rng: random.Random) -> Image.Image:
    (w, h), left, top = image.size, rng.uniform(0, 0.2), rng.uniform(0, 0.2)
    return image.crop((round(left * w), round(top * h), round((left + 0.8) * w), round((top + 0.8) * h)))


def border(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.expand(image, image.width // 10, rng.choice(("white", "black", "gray")))


EACH = 220
"""Number of planted copies of each kind."""
KINDS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "mirror": lambda image, rng: ImageOps.mirror(image),
    "crop to 80%": crop,
    "JPEG 50": lambda image, rng: image,
    "half size": lambda image, rng: image.resize((image.width // 2, image.height // 2)),
    "brightness by 15%": lambda image, rng: ImageEnhance.Brightness(image).enhance(rng.choice((0.85, 1.15))),
    "10% border": border,
}


def encode(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def measure(images: list[bytes], items: list[str], seed: int = 0) -> None:
    """Plant copies of each kind, of photos that are drawn for it, and print what is found."""
    rng, planted = random.Random(seed), dict[tuple[int, int], str]()
    images, items = list(images), list(items)
    rows = [(kind, row) for kind in KINDS for row in rng.sample(range(len(items)), min(EACH, len(items)))]
    for kind, row in rows:
        changed = KINDS[kind](Image.open(io.BytesIO(images[row])), rng)
        planted[row, len(images)] = kind
        images.append(encode(changed, 50 if kind == "JPEG 50" else 90))
        items.append(items[row])
    start = time.process_time()
    pictures = np.stack([small_picture(image) for image in images])
    scanned = time.process_time()
    one, other, _ = find_near_copies(thumbnails(pictures), pictures.__getitem__)
    searched = time.process_time()
    found = set(zip(one.tolist(), other.tolist(), strict=True))
    false = [(a, b) for a, b in found if items[a] != items[b]]
    for kind in KINDS:
        pairs = [pair for pair, its in planted.items() if its == kind]
        print(f"  {kind:20} {len(found & {*pairs}):4} of {len(pairs)}")
    hits = len(found & planted.keys())
    print(f"  {'all':20} {hits:4} of {len(planted)}: {hits / len(planted):.1%}")
    print(f"  false pairs          {len(false):4} in {len(images):,} images {sorted(false)[:5]}")
    times = [1e3 * seconds / len(images) for seconds in (scanned - start, searched - scanned)]
    print(f"  milliseconds of one core, an image: {times[0]:.2f} to read it, {times[1]:.2f} to look for it")


def upright(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data))
    return encode(image.crop((image.width // 8, 0, image.width - image.width // 8, image.height)), 90)


def main() -> None:
    if len(sys.argv) > 1:
        files = sorted(
            file for file in Path(sys.argv[1]).rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        images, items = [file.read_bytes() for file in files], [file.parent.name for file in files]
    else:
        images = inshop.pictures(2_000, (256, 256))
        items = [str(number // 4) for number in range(len(images))]
    print(f"{len(images):,} photos")
    measure(images, items)
    print("upright cuts, 3 to 4")
    measure([upright(image) for image in images], items)
    print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
