"""Copies in a catalogue: byte copies, pixel copies and near copies, within an item, across items, across splits."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate, product
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from clipfh.config import cores
from clipfh.data.catalogue import Catalogue, read_columns
from clipfh.data.near_copies import SIDE, find_near_copies, small_picture, thumbnails
from clipfh.data.splits import SPLITS, join_pairs
from clipfh.storage import layout, store
from clipfh.storage.store import Folder

MANY_ITEMS = 5
"""Fewest items with the same picture for which it is taken for a placeholder."""
ALMOST = 0.1
"""Largest difference of near copies that are decoded to see whether they are equal to the pixel."""
BATCH = 32
"""Number of photos that a thread looks at in one go."""
PART_OF = {"train": "train", "val_gallery": "val", "val_query": "val", "gallery": "test", "query": "test"}
"""The part of a catalogue that each of its splits belongs to: a picture in two parts is a leak."""

Kind = Literal["byte", "pixel", "near"]
Reach = Literal["item", "items", "splits"]
_QUANTIZATION_TABLE = b"\xff\xdb"


@dataclass(frozen=True)
class CopiedPhoto:
    """A photo of the catalogue."""

    path: str
    item_id: str
    split: str


@dataclass(frozen=True)
class CopyGroup:
    """Photos that show one picture. A group of near copies has only the first of photos that are equal to the pixel."""

    kind: Kind
    photos: list[CopiedPhoto]

    @property
    def is_placeholder(self) -> bool:
        """Whether one picture stands for many items. Near copies, such as a drawing in many colours, are none."""
        return self.kind != "near" and self.num_items >= MANY_ITEMS

    @property
    def num_items(self) -> int:
        """Number of items that the picture lies under."""
        return len({photo.item_id for photo in self.photos})

    @property
    def reach(self) -> Reach:
        """Whether the photos are of one item, of several, or of several parts of the catalogue: a leak."""
        if len({PART_OF[photo.split] for photo in self.photos}) > 1:
            return "splits"
        return "items" if self.num_items > 1 else "item"


OnProgress = Callable[[int, int], None]


LOOK = np.dtype([("file", "S16"), ("content", "S16"), ("picture", np.uint8, (SIDE, SIDE, 3))])
"""A photo's look, by which photos are compared: digests of its file and of what makes its pixels; a small picture."""


def look_at(encoded: bytes, picture: np.ndarray | None = None) -> bytes:
    """The look of a photo of a catalogue. `picture`: its small picture, if at hand.

    The head of a JPEG, before its tables, makes no pixels.
    """
    start = max(0, encoded.find(_QUANTIZATION_TABLE))
    content = _digest(encoded[start:])
    picture = small_picture(encoded) if picture is None else picture
    return _digest(encoded[:start] + content) + content + picture.tobytes()


@dataclass(frozen=True)
class Looks:
    """The looks of a catalogue's photos, in a temporary file, where each shard has its place.

    `prepare` decodes every photo, and writes its look here from whichever process does so: no photo is decoded twice.
    `find_copies` reads the shards without looks.
    """

    path: str
    starts: Mapping[str, int]
    """The place of each shard, by its name, in photos."""
    filled: set[str] = field(default_factory=set)
    """Names of the shards whose looks are written."""

    def read(self, start: int, number: int) -> np.ndarray:
        return np.fromfile(self.path, LOOK, number, offset=start * LOOK.itemsize)

    def read_pictures(self, places: np.ndarray) -> np.ndarray:
        """The small pictures (n, SIDE, SIDE, 3) of photos at places (n,)."""
        offset = LOOK.fields["picture"][1]  # type: ignore[index]
        pictures = np.empty((len(places), SIDE, SIDE, 3), np.uint8)
        with open(self.path, "rb") as file:  # noqa: PTH123
            for picture, place in zip(pictures, places.tolist(), strict=True):
                os.preadv(file.fileno(), [picture.data], place * LOOK.itemsize + offset)
        return pictures


def write_looks(path: str, start: int, looks: Iterable[bytes]) -> None:
    """Write looks to their place in a file of looks."""
    with open(path, "r+b") as file:  # noqa: PTH123
        file.seek(start * LOOK.itemsize)
        file.writelines(looks)


@contextmanager
def temporary_looks(folder: Folder, sizes: Mapping[str, int]) -> Iterator[Looks]:
    """Looks of shards in `folder`, by `sizes`: name to most photos. On this machine where the folder is in a bucket."""
    where = folder.local_path() if folder.is_local else None
    with tempfile.NamedTemporaryFile(dir=where, prefix="looks-", suffix=".new") as file:
        yield Looks(file.name, dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False)))


def find_copies(
    shards: Sequence[str], progress: OnProgress = lambda done, total: None, looks: Looks | None = None
) -> list[CopyGroup]:
    """All copies among the photos of a catalogue's shards, on all cores.

    12 KiB a photo are written to a temporary file, beside the shards where these are on a disk; about 1.5 KiB a photo
    are held in memory.

    Args:
        shards: files of the catalogue.
        progress: called with the number of photos done and of all photos; a photo that is only read counts half.
        looks: the looks that `prepare` took; without them, all photos are read.
    """
    if not shards:
        return []
    if not looks:
        with temporary_looks(Folder(shards[0]).parent, {_name(shard): _num_rows(shard) for shard in shards}) as looks:
            return find_copies(shards, progress, looks)
    rows = pa.concat_tables(read_columns(shard, ["path", "item_id", "split"]) for shard in shards)
    count = len(rows)
    place, whole, content, thumbs = _scan(shards, looks, lambda done: progress(done // 2, count))
    picture = _number_pictures(shards, content, thumbs)
    first = np.unique(picture, return_index=True)[1]
    one, other, difference = find_near_copies(
        thumbs[first],
        lambda rows: looks.read_pictures(place[first[rows]]),
        lambda share: progress(int((1 + share) * count / 2), count),
    )
    near = np.stack([first[one], first[other]], axis=1)
    picture, near = _join_equal(shards, picture, near, difference <= ALMOST)
    exact = [members for members in _group(range(count), picture.tolist()).values() if len(members) > 1]
    kinds: list[Kind] = ["byte" if len({whole[row] for row in its}) == 1 else "pixel" for its in exact]
    groups = [*zip(kinds, exact, strict=True)]
    groups += [("near", its) for its in join_pairs(near.tolist())]
    return [CopyGroup(kind, [CopiedPhoto(**row) for row in rows.take(its).to_pylist()]) for kind, its in groups]


def _name(shard: str) -> str:
    return shard.rpartition("/")[2]


def _num_rows(shard: str) -> int:
    return store.open_parquet(shard).metadata.num_rows


def _scan(
    shards: Sequence[str], looks: Looks, progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The place of each photo among the looks, digests of its file and of its content, and its thumbnail."""
    parts, done = [], 0
    with ThreadPoolExecutor(cores.available()) as pool:
        for shard in shards:
            start = looks.starts[_name(shard)]
            if _name(shard) not in looks.filled:
                write_looks(
                    looks.path, start, [look for batch in pool.map(_look_at, _batches(shard)) for look in batch]
                )
            number = _num_rows(shard)
            its = looks.read(start, number)
            parts.append((np.arange(start, start + number), its["file"], its["content"], thumbnails(its["picture"])))
            progress(done := done + number)
    place, file, content, thumbs = map(np.concatenate, zip(*parts, strict=True))
    return place, file, content, thumbs


def _batches(shard: str) -> Iterator[list[bytes]]:
    return (rows["image"].to_pylist() for rows in store.open_parquet(shard).iter_batches(BATCH, columns=["image"]))


def _look_at(batch: Sequence[bytes]) -> list[bytes]:
    return [look_at(encoded) for encoded in batch]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _number_pictures(shards: Sequence[str], content: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """(N,) number of the picture of each photo: photos that are equal to the pixel have the same.

    Only photos with equal thumbnails and different contents are decoded to find out.
    """
    keys = content.tolist()
    groups = _group(range(len(keys)), (_digest(thumb.tobytes()) for thumb in thumbs)).values()
    firsts = [{keys[row]: row for row in reversed(rows)} for rows in groups]
    pixels = _digest_rows(shards, {row for first_of in firsts if len(first_of) > 1 for row in first_of.values()})
    for rows, first_of in zip(groups, firsts, strict=True):
        for row in rows if len(first_of) > 1 else []:
            keys[row] = pixels[first_of[keys[row]]]
    return np.unique(np.array(keys, dtype="S16"), return_inverse=True)[1]


def _join_equal(
    shards: Sequence[str], picture: np.ndarray, near: np.ndarray, is_almost_equal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the near pairs (n, 2) that are equal to the pixel, in files of two formats.

    Returns the pictures with these pairs joined, and the other pairs.
    """
    pixels = _digest_rows(shards, set(near[is_almost_equal].ravel().tolist()))
    is_equal = np.array([one in pixels and pixels[one] == pixels.get(other) for one, other in near.tolist()], bool)
    number_of = dict[int, int]()
    for numbers in join_pairs(picture[near[is_equal]].tolist()):
        number_of |= dict.fromkeys(numbers, numbers[0])
    return np.array([number_of.get(number, number) for number in picture.tolist()]), near[~is_equal]


def _digest_rows(shards: Sequence[str], rows: set[int]) -> dict[int, bytes]:
    """Digests of the decoded pixels of some rows of all shards."""
    digests, start = dict[int, bytes](), 0
    with ThreadPoolExecutor(cores.available()) as pool:
        for shard in shards:
            count = store.open_parquet(shard).metadata.num_rows
            if here := [row for row in range(start, start + count) if row in rows]:
                images = read_columns(shard, ["image"])["image"].take([row - start for row in here]).to_pylist()
                digests |= dict(zip(here, pool.map(_digest_pixels, images), strict=True))
            start += count
    return digests


def _digest_pixels(encoded: bytes) -> bytes:
    with Image.open(io.BytesIO(encoded)) as image:
        return _digest(repr(image.size).encode() + image.convert("RGB").tobytes())


def _group(members: Iterable[Any], keys: Iterable[Any]) -> dict[Any, list[Any]]:
    groups = defaultdict(list)
    for member, key in zip(members, keys, strict=True):
        groups[key].append(member)
    return groups


# Words on copies

_KINDS: dict[Kind, str] = {
    "byte": "byte copies",
    "pixel": "equal to the pixel",
    "near": "near copies (mirrored, cropped, framed, re-encoded, rescaled or brighter)",
}
_REACHES: dict[Reach, str] = {"item": "within an item", "items": "across items", "splits": "across splits: a leak"}


def describe_copies(groups: Sequence[CopyGroup]) -> list[str]:
    """Notes on the copies of a catalogue, a line each."""
    most = sorted(group.num_items for group in groups if group.is_placeholder)
    notes = [f"1 picture lies under {most[0]:,} items: a placeholder?"] if len(most) == 1 else []
    if len(most) > 1:
        notes = [f"{len(most):,} pictures lie under {most[0]:,} to {most[-1]:,} items each: placeholders?"]
    images, count = Counter[tuple[Kind, Reach]](), Counter[tuple[Kind, Reach]]()
    for group in groups:
        images[group.kind, group.reach] += len(group.photos)
        count[group.kind, group.reach] += 1
    for kind, reach in product(_KINDS, _REACHES):
        if number := count[kind, reach]:
            among = f"{images[kind, reach]:,} photos in {number:,} group{'s' * (number > 1)}"
            notes.append(f"{among} are {_KINDS[kind]} {_REACHES[reach]}")
    advice = "clipfh audit shows them, and lists what prepare --without would leave out; evaluate gives figures without"
    return [*notes, f"{advice} them"] if notes else []


def photos_to_leave_out(groups: Sequence[CopyGroup], sizes: Mapping[tuple[str, str], int]) -> list[str]:
    """Paths of photos without which no picture is there twice.

    One photo of each picture is kept: one of test before one of validation before one of train, so that models stay
    comparable, then the first by its path. Of an item's query and gallery, the one of which fewer are kept so far is,
    so that neither is without the other. No photo of a placeholder is kept.

    Args:
        groups: copies in a catalogue.
        sizes: item and split to the number of its photos.
    """
    photos = {photo.path: photo for group in groups for photo in group.photos}
    kept = Counter(sizes) - Counter((photo.item_id, photo.split) for photo in photos.values())
    placeholders = {photo.path for group in groups if group.is_placeholder for photo in group.photos}
    pictures = join_pairs((group.photos[0].path, photo.path) for group in groups for photo in group.photos)
    left_out = []
    for paths in pictures:
        ordered = sorted(paths, key=lambda path: (-SPLITS.index(photos[path].split), path))
        if placeholders.isdisjoint(paths):
            best = _choose([photos[path] for path in ordered], kept)
            kept[best.item_id, best.split] += 1
            ordered.remove(best.path)
        left_out += ordered
    return left_out


def _choose(photos: Sequence[CopiedPhoto], kept: Mapping[tuple[str, str], int]) -> CopiedPhoto:
    """The first photo, or one that is its item's other side (query, gallery), if fewer of that side are kept."""
    of = (photos[0].item_id, PART_OF[photos[0].split])
    own = [photo for photo in photos if (photo.item_id, PART_OF[photo.split]) == of]
    return min(own, key=lambda photo: (kept[photo.item_id, photo.split], SPLITS.index(photo.split)))


def count_photos(catalogue: Catalogue) -> Counter[tuple[str, str]]:
    """Item and split to the number of its photos in a catalogue."""
    items = {split: catalogue.columns(split, ["item_id"])["item_id"].to_pylist() for split in SPLITS}
    return Counter((item, split) for split, its in items.items() for item in its)


# In the catalogue's folder


def save_copies(folder: Folder, groups: Sequence[CopyGroup], content: str) -> None:
    """Write `audit.json` into the folder of a catalogue whose manifest has the hash `content`."""
    copies = [
        {"kind": group.kind, "reach": group.reach, "photos": [asdict(photo) for photo in group.photos]}
        for group in groups
    ]
    folder.write(layout.AUDIT, json.dumps({"catalogue": content, "copies": copies}, indent=1) + "\n")


def read_copies(catalogue: Catalogue) -> list[CopyGroup]:
    """The copies that `prepare` found in a catalogue; none where it did not look for them."""
    findings = catalogue.path.read_json(layout.AUDIT)
    return [
        CopyGroup(each["kind"], [CopiedPhoto(**photo) for photo in each["photos"]])
        for each in findings.get("copies", [])
    ]


def load_copies(catalogue: Catalogue, progress: OnProgress = lambda done, total: None) -> list[CopyGroup]:
    """The copies in a catalogue; they are looked for now if `prepare` did not."""
    if catalogue.path.exists(layout.AUDIT):
        return read_copies(catalogue)
    return find_copies([path for split in SPLITS for path in catalogue.shards(split)], progress)


def picture_codes(paths: Sequence[str], groups: Iterable[CopyGroup], near: bool = False) -> np.ndarray:
    """(N,) code of each path's picture, one for photos that are equal to the pixel, and with `near` for near copies."""
    relevant = [group for group in groups if near or group.kind != "near"]
    pictures = join_pairs((group.photos[0].path, photo.path) for group in relevant for photo in group.photos)
    first_of = {path: its[0] for its in pictures for path in its}
    return name_codes([first_of.get(path, path) for path in paths])


def name_codes(names: Sequence[str]) -> np.ndarray:
    """(N,) code of each name, in the order of the names. `np.unique` would give each the room of the longest."""
    encoded = pa.array(names, pa.large_string()).dictionary_encode()
    return (pc.rank(encoded.dictionary).to_numpy().astype(np.int64) - 1)[encoded.indices.to_numpy()]


def leaked_paths(groups: Sequence[CopyGroup]) -> set[str]:
    """Paths of photos whose picture is also in another part (train, validation or test) of the catalogue."""
    part = {photo.path: PART_OF[photo.split] for group in groups for photo in group.photos}
    pictures = join_pairs((group.photos[0].path, photo.path) for group in groups for photo in group.photos)
    return {path for its in pictures if len({part[path] for path in its}) > 1 for path in its}
