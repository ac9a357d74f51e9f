"""Real catalogues from what the package registries ship, as sources that `clipfh prepare` reads.

Run: python tests/benchmarks/catalogues.py FOLDER [--only emoji icons glyphs] && for each of them
`clipfh prepare --source FOLDER/emoji/photos.csv --out CATALOGUE --image-size 64`

- emoji: one emoji as four vendors draw it, which npm's emoji-datasource-* hold; subcategories are in train or in test
- icons: one name in many icon sets, which npm's @iconify-json/* hold; needs `pip install resvg-py`
- glyphs: one Chinese character in many fonts, which Debian packages hold; train is of other radicals than test

Needs npm, apt-get and dpkg. What is downloaded stays in FOLDER/packages and is not downloaded again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

VENDORS = ("apple", "google", "twitter", "facebook")
ICON_SETS = ("tabler", "lucide", "mdi", "ph", "ri", "bi", "carbon", "ion", "solar", "material-symbols", "fa6-solid")
ICON_SETS += ("heroicons", "mingcute", "iconoir", "uil")
STYLE = re.compile(
    r"-(outline|filled|fill|line|linear|bold|thin|light|duotone|sharp|rounded|solid|broken|16|20|24|32)\b"
)
FONTS = ("fonts-wqy-zenhei", "fonts-wqy-microhei", "fonts-arphic-uming", "fonts-arphic-ukai", "fonts-noto-cjk")
FACES = ("wqy-zenhei.ttc", "uming.ttc", "ukai.ttc", "NotoSansCJK-Bold.ttc", "NotoSerifCJK-Regular.ttc")
GLYPHS_APART = 7
"""Every seventh of the characters is taken, so that neighbours under a radical are not all of them"""
SIDE = 64


class Picture(NamedTuple):
    """One image of an item."""

    item: str
    group: str
    """all items of a group are in train, or all in test"""
    style: str
    image: Image.Image


def emoji(packages: Path) -> Iterator[Picture]:
    """3,786 emoji by up to four vendors."""
    for vendor in VENDORS:
        with tarfile.open(_npm(packages, f"emoji-datasource-{vendor}")) as tar:
            listed = json.load(_member(tar, "package/emoji.json"))
            of_file = {
                shown["image"]: one["subcategory"] or "none"
                for one in listed
                for shown in (one, *one.get("skin_variations", {}).values())
            }
            for member in tar:
                file = Path(member.name)
                if file.name in of_file and f"/img/{vendor}/64/" in member.name:
                    image = Image.open(_member(tar, member.name)).convert("RGBA")
                    yield Picture(file.stem, of_file[file.name], vendor, image)


def icons(packages: Path) -> Iterator[Picture]:
    """Names that four sets or more have, one style a set."""
    import resvg_py

    of_name: dict[str, dict[str, str]] = defaultdict(dict)
    for name in ICON_SETS:
        with tarfile.open(_npm(packages, f"@iconify-json/{name}")) as tar:
            whole = json.load(_member(tar, "package/icons.json"))
        for icon, drawn in whole["icons"].items():
            wide, high = (drawn.get(side, whole.get(side, 16)) for side in ("width", "height"))
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}">{drawn["body"]}</svg>'
            of_name[STYLE.sub("", icon)].setdefault(name, svg)
    for icon, of_set in of_name.items():
        if len(of_set) >= 4:
            for name, svg in of_set.items():
                png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
                yield Picture(icon, icon[:2], name, Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def glyphs(packages: Path) -> Iterator[Picture]:
    """About three thousand Chinese characters in five fonts. Unicode has them in the order of their radicals."""
    for package in FONTS:
        if not (packages / package).is_dir():
            subprocess.run(["apt-get", "download", package], cwd=packages, check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["dpkg", "-x", next(packages.glob(f"{package}_*.deb")), packages / package], check=True)
    for face in FACES:
        font = ImageFont.truetype(str(next(packages.rglob(face))), 54)
        for code in range(0x4E00, 0x9FA0, GLYPHS_APART):
            image = Image.new("RGBA", (SIDE, SIDE), "white")
            ImageDraw.Draw(image).text((SIDE // 2, SIDE // 2), chr(code), "black", font, anchor="mm")
            yield Picture(f"u{code:04x}", f"{code // 256}", face.partition(".")[0], image)


def _npm(packages: Path, package: str) -> Path:
    stem = package.removeprefix("@").replace("/", "-")
    if not any(packages.glob(f"{stem}-[0-9]*.tgz")):
        subprocess.run(["npm", "pack", package, "--silent"], cwd=packages, check=True, stdout=subprocess.DEVNULL)
    return next(packages.glob(f"{stem}-[0-9]*.tgz"))


def _member(tar: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = tar.extractfile(name)
    assert file, f"{tar.name} has no {name}"
    return io.BufferedReader(file)  # type: ignore[type-var]


def write(pictures: Iterable[Picture], folder: Path) -> None:
    """Write the photos and `photos.csv`. Two groups of five are for the test, where half of an item's photos ask."""
    seen: dict[str, int] = defaultdict(int)
    with _csv(folder) as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "item_id", "category", "split"])
        for item, group, style, image in pictures:
            path = Path("photos", item.replace("/", "_"), f"{style}.png")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            on_white.convert("RGB").save(folder / path)
            test = zlib.crc32(group.encode()) % 5 < 2
            split = ("gallery", "query")[(seen[item] + zlib.crc32(item.encode())) % 2] if test else "train"
            seen[item] += 1
            rows.writerow([path, item, group, split])


def _csv(folder: Path) -> io.TextIOWrapper:
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "photos.csv").open("w", newline="")


CATALOGUES = {"emoji": emoji, "icons": icons, "glyphs": glyphs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CATALOGUES), choices=CATALOGUES)
    args = parser.parse_args()
    packages = args.folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        write(CATALOGUES[name](packages), args.folder / name)
        table = args.folder / name / "photos.csv"
        print(f"clipfh prepare --source {table} --out ... --image-size {SIDE}")


if __name__ == "__main__":
    main()
