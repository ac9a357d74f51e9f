"""Honest splits: disjoint by item, seeded, halved."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from clipfh.data.splits import assign_splits
from clipfh.sources.listing import Photo


@st.composite
def listings(draw):
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=80))
    split = draw(st.sampled_from(["", "train"]))
    photos = [Photo(f"{i}/{view}", str(i), split) for i, size in enumerate(sizes) for view in range(size)]
    return draw(st.permutations(photos)), draw(st.sampled_from([0, 0.1, 0.5])), draw(st.integers(0, 3))


@given(listings())
def test_splits_are_identity_disjoint_seeded_and_halved(case):
    photos, val_fraction, seed = case
    split = {photo.path: photo for photo in assign_splits(photos, val_fraction, seed)[0]}
    assert sorted(split) == sorted(photo.path for photo in photos)
    again, _ = assign_splits(sorted(photos, key=lambda photo: photo.path), val_fraction, seed)
    assert {photo.path: photo for photo in again} == split, "the order of listing does not matter"

    views = defaultdict(lambda: defaultdict(int))
    for photo in split.values():
        views[photo.item_id][photo.split] += 1
    kinds = {frozenset(its) for its in views.values()}
    whole = {frozenset({"train"}), frozenset({"val_query", "val_gallery"}), frozenset({"query", "gallery"})}
    assert kinds <= whole, "an item is in train, validation or test, and held-out ones have queries and gallery"
    for its in views.values():
        if "train" not in its:
            queries, gallery = its.get("val_query", its.get("query")), its.get("val_gallery", its.get("gallery"))
            assert queries == (queries + gallery) // 2

    held_out = sum("val_query" in its for its in views.values())
    left = sum(its.get("train", 0) > 1 for its in views.values())
    items = held_out + sum("train" in its for its in views.values())
    asked = max(round(val_fraction * items), min(50, items // 5))
    assert held_out == min(asked, (held_out + left) // 2), "as many as asked, and half of those with a pair at most"


def test_another_seed_draws_other_validation_items():
    photos = [Photo(f"{i}/{view}", str(i), "train") for i in range(100) for view in range(4)]
    drawn = [
        {photo.path for photo in assign_splits(photos, 0.1, seed)[0] if photo.split == "val_query"} for seed in (0, 1)
    ]
    assert len(drawn[0]) == len(drawn[1]) == 40
    assert drawn[0] != drawn[1]


def catalogue_of_kinds(sizes: list[int], test: str) -> list[Photo]:
    """Items of three photos in train, so many of each category, and twenty of one category in the test."""
    items = [(f"{kind}-{i}", "train", kind) for kind, size in enumerate(sizes) for i in range(size)]
    items += [(f"test-{i}", "test", test) for i in range(20)]
    return [
        Photo(f"{item}/{view}", item, split, category=f"{kind}") for item, split, kind in items for view in range(3)
    ]


def kinds_of(photos: list[Photo], split: str) -> dict[str, set[str]]:
    """Category to the items of it that a split has."""
    items = defaultdict(set)
    for photo in photos:
        if photo.split == split:
            items[photo.category].add(photo.item_id)
    return items


def test_validation_has_categories_of_its_own_where_the_test_has():
    sizes = [200, 60, 40, 30, 30, 20, 20, 10, 10, 5, 5]
    for seed in range(20):
        photos, notes = assign_splits(catalogue_of_kinds(sizes, test="new"), 0.1, seed)
        train, val = kinds_of(photos, "train"), kinds_of(photos, "val_query")
        assert not train.keys() & val.keys() and len(train) + len(val) == len(sizes)
        assert 50 <= sum(map(len, val.values())) < 75, "as many as asked, and less than one category more"
        assert max(map(len, val.values())) <= 25, "none alone is most of validation"
        assert notes and f"{len(val)} whole categories" in notes[0]


def test_validation_is_of_all_kinds_where_the_test_is_or_where_categories_are_few():
    for sizes, test in (([60, 40, 30, 30, 20, 20], "3"), ([200, 60, 60], "new"), ([300], "new"), ([200, 100], "")):
        photos, notes = assign_splits(catalogue_of_kinds(sizes, test), 0.1, seed=0)
        assert sum(map(len, kinds_of(photos, "val_query").values())) == min(50, sum(sizes) // 5)
        assert not notes


def test_items_that_share_a_photo_stay_together():
    """As where a photo of an outfit shows several items, of several categories."""
    kinds = catalogue_of_kinds([200, 60, 40, 30, 30, 20, 20, 10, 10, 5, 5], test="new")
    kinds += [Photo("9-0/0", "10-0", "train", category="10")]
    is_held_out = set()
    for seed in range(20):
        for split in ("", "train"):
            photos = [Photo(f"{i}/{view}", f"{i}", split) for i in range(100) for view in range(3)]
            photos += [Photo(f"{i}/0", f"{i + 1}", split) for i in range(0, 100, 4)]
            items = {photo.item_id for photo in assign_splits(photos, 0.1, seed)[0] if photo.split == "val_query"}
            assert 17 <= len(items) <= 20, "a fifth of the items, or a little less"
        drawn, notes = assign_splits(kinds, 0.1, seed)
        val = kinds_of(drawn, "val_query")
        assert notes[0].startswith(f"validation has {len(val)} whole categories") and ("9" in val) == ("10" in val)
        is_held_out.add("9" in val)
    assert is_held_out == {True, False}
