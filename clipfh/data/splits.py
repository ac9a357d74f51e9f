"""Every photo of a source gets its split: a pure function of the listed photos and a seed, disjoint by item."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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


OTHER_KINDS = 0.95
"""Share of test items in categories that train has not, from which on validation has categories of its own too"""


def assign_splits(photos: list[Photo], val_fraction: float, seed: int) -> tuple[list[Photo], list[str]]:
    """Give every photo one of SPLITS. No item is in two of train, validation and test.

    If the source has no splits, a tenth of the items is test. If it has no validation items, items are held out of
    train for it: whole categories where the test's are none of train's, since what tells items of known kinds apart
    may harm with others. Items that share a photo stay together.

    Returns:
        The photos, and what a person should know of their splits.

    Raises:
        UserError: some photos have a split and others none, or an item or a photo is in two splits.
    """
    given = {photo.split for photo in photos}
    notes: list[str] = []
    if "" in given and len(given) > 1:
        first = next(photo.path for photo in photos if not photo.split)
        raise UserError(f"{first}: has no split while others have one: give all of them a split, or none")
    if given == {""}:
        photos = [photo._replace(split="train") for photo in photos]
        photos = _move(photos, "test", _draw(photos, "test", lambda items: max(1, round(items / 10)), seed)[0])
    if not given & {"val", "val_query", "val_gallery"}:
        photos, notes = _hold_out_validation(photos, val_fraction, seed)
    photos = _halve(photos, "test", "query", "gallery", seed)
    photos = _halve(photos, "val", "val_query", "val_gallery", seed)
    _check_disjoint(photos)
    return photos, notes


def _hold_out_validation(photos: list[Photo], val_fraction: float, seed: int) -> tuple[list[Photo], list[str]]:
    """Move items from train to validation, and note it if they are whole categories."""
    drawn, rest = _draw(photos, "val", lambda items: max(round(val_fraction * items), min(50, items // 5)), seed)
    category_of = _categories(photos)
    kind_of = _join_categories(photos, category_of)
    sizes = Counter(kind_of[item] for item in drawn + rest)
    taken = _draw_categories(sizes, len(drawn), seed) if _asks_other_kinds(photos, category_of) else set()
    if not taken:
        return _move(photos, "val", drawn), []
    moved = [item for item, kind in kind_of.items() if kind in taken]
    note = (
        f"validation has {len({category_of[item] for item in moved})} whole categories, which train lacks as it lacks "
        "the test's: what is selected is what does best on other kinds of items"
    )
    return _move(photos, "val", moved), [note]


def _draw(photos: list[Photo], name: str, count: Callable[[int], int], seed: int) -> tuple[list[str], list[str]]:
    """Draw `count(number of train items)` train items with two images or more; the others of them, in order, come next.

    At most half of these items are drawn, so that train keeps some where there are few. Items that share photos are
    drawn together, also those with one image, or not at all where they are more than are still wanted.
    """
    images = Counter(photo.item_id for photo in photos if photo.split == "train")
    paired = _shuffled((item for item, number in images.items() if number > 1), f"{seed} {name}")
    number, drawn = min(count(len(images)), len(paired) // 2), dict[str, None]()
    group_of = {item: group for group in join_pairs(_sharing(photos)) for item in group}
    for item in paired:
        group = group_of.get(item, [item])
        if item not in drawn and len(drawn) + len(group) <= number:
            drawn |= dict.fromkeys(group)
    return [*drawn], [item for item in paired if item not in drawn]


def _sharing(photos: list[Photo]) -> list[tuple[str, str]]:
    """Pairs of train items that share a photo, such as one of an outfit."""
    first_of: dict[str, str] = {}
    pairs = ((first_of.setdefault(p.path, p.item_id), p.item_id) for p in photos if p.split == "train")
    return [(one, other) for one, other in pairs if one != other]


def _join_categories(photos: list[Photo], category_of: Mapping[str, str]) -> dict[str, str]:
    """The category of each item; one for all whose items share photos, unknown where one of these is."""
    groups = join_pairs((category_of[one], category_of[other]) for one, other in _sharing(photos))
    joined = {category: group[0] for group in groups for category in group}
    return {item: joined.get(category, category) for item, category in category_of.items()}


def _move(photos: list[Photo], name: str, items: Iterable[str]) -> list[Photo]:
    """Move items of train to the split `name`."""
    moved = set(items)
    return [p._replace(split=name) if p.split == "train" and p.item_id in moved else p for p in photos]


def _categories(photos: list[Photo]) -> dict[str, str]:
    """The category of each item; of several the first by name."""
    category_of: dict[str, str] = {}
    for photo in photos:
        category_of[photo.item_id] = min(photo.category, category_of.get(photo.item_id, photo.category))
    return category_of


def _asks_other_kinds(photos: list[Photo], category_of: dict[str, str]) -> bool:
    """Whether (nearly) all test items are of known categories that train does not have."""
    train = {photo.item_id for photo in photos if photo.split == "train"}
    test = category_of.keys() - train
    of_train = {category_of[item] for item in train} | {""}
    others = sum(category_of[item] not in of_train for item in test)
    return bool(test) and others >= OTHER_KINDS * len(test)


def _draw_categories(sizes: Mapping[str, int], wanted: int, seed: int) -> set[str]:
    """Draw categories that have `wanted` items or more together; none where that can't be.

    Args:
        sizes: number of items with two images or more of each category. Half of all are drawn at most.
        wanted: number of items. No category with more than half of them is drawn: one kind says little of others.
    """
    taken: set[str] = set()
    held_out, most = 0, sum(sizes.values()) // 2
    for category in _shuffled(sizes.keys() - {""}, f"{seed} val"):
        if held_out < wanted and sizes[category] <= wanted / 2 and held_out + sizes[category] <= most:
            taken.add(category)
            held_out += sizes[category]
    return taken if held_out >= wanted else set()


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


def join_pairs(pairs: Iterable[tuple[Any, Any]]) -> list[list[Any]]:
    """Members that are joined by pairs, directly or through others: groups in the order of their first members."""
    parent: dict[Any, Any] = {}

    def root(member: Any) -> Any:
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = member = parent[parent[member]]
        return member

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    groups = defaultdict[Any, list[Any]](list)
    for member in list(parent):
        groups[root(member)].append(member)
    return [sorted(its) for _, its in sorted(groups.items())]


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
