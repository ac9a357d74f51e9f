"""Every photo of a source gets its split: a pure function of the listed photos and a seed, disjoint by item."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from clipfh import UserError
from clipfh.sources.listing import Photo

SPLITS = (
    "train",
    "val_gallery",
    "val_query",
    "gallery",
    "query",
)  # in the order of writing: a gallery before its queries
GALLERY_OF = {"val_query": "val_gallery", "query": "gallery"}


def assign_splits(photos: list[Photo], val_fraction: float, seed: int) -> list[Photo]:
    """Give every photo one of SPLITS. No item is in two of train, validation and test.

    If the source has no splits, a tenth of the items is test. If it has no validation items, items are held out of
    train for it.

    Raises:
        UserError: some photos have a split and others none, or an item or a photo is in two splits.
    """
    given = {photo.split for photo in photos}
    if "" in given and len(given) > 1:
        first = next(photo.path for photo in photos if not photo.split)
        raise UserError(f"{first}: has no split while others have one: give all of them a split, or none")
    if given == {""}:
        photos = [photo._replace(split="train") for photo in photos]
        photos = _hold_out(photos, "test", lambda items: max(1, round(items / 10)), seed)
    if not given & {"val", "val_query", "val_gallery"}:
        photos = _hold_out(photos, "val", lambda items: max(round(val_fraction * items), min(50, items // 5)), seed)
    photos = _halve(photos, "test", "query", "gallery", seed)
    photos = _halve(photos, "val", "val_query", "val_gallery", seed)
    _check_disjoint(photos)
    return photos


def _hold_out(photos: list[Photo], name: str, count: Callable[[int], int], seed: int) -> list[Photo]:
    """Move `count(number of train items)` items with two images or more from train to the split `name`.

    At most half of these items move, so that train keeps some where there are few.
    """
    images = Counter(photo.item_id for photo in photos if photo.split == "train")
    paired = _shuffled((item for item, number in images.items() if number > 1), f"{seed} {name}")
    taken = set(paired[: min(count(len(images)), len(paired) // 2)])
    return [p._replace(split=name) if p.split == "train" and p.item_id in taken else p for p in photos]


def _halve(photos: list[Photo], split: str, query: str, gallery: str, seed: int) -> list[Photo]:
    """Make half of each item's images in `split` (rounded down) queries, and the others gallery."""
    paths = defaultdict(list)
    for photo in photos:
        if photo.split == split:
            paths[photo.item_id].append(photo.path)
    drawn = {item: set(_shuffled(its, f"{seed} {item}")[: len(its) // 2]) for item, its in paths.items()}
    return [
        p._replace(split=query if p.path in drawn[p.item_id] else gallery) if p.split == split else p for p in photos
    ]


def _shuffled(names: Iterable[str], seed: str) -> list[str]:
    """Names in an order that depends on the seed and on each name, but not on the order in which they were listed."""
    return sorted(names, key=lambda name: digest(seed, name))


def _check_disjoint(photos: list[Photo]) -> None:
    parts = defaultdict(set)
    for photo in photos:
        part = {"train": "train", "query": "test", "gallery": "test"}.get(photo.split, "validation")
        parts["item", photo.item_id].add(part)
        parts["photo", photo.path].add(part)
    remedies = {
        "item": "give all images of an item to one of them, or, where ids begin anew in each, items ids of their own",
        "photo": "list it in one of them",
    }
    for kind, remedy in remedies.items():
        shared = [name for (of, name), its in parts.items() if of == kind and len(its) > 1]
        if shared:
            names = " and ".join(sorted(parts[kind, shared[0]]))
            raise UserError(
                f"{kind} {shared[0]} is in {names} ({len(shared)} {kind}s are in two): figures would be too good: "
                f"{remedy}"
            )


def digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts, each with its length, so that different lists of parts have different digests."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()
