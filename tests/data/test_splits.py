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
    split = {photo.path: photo for photo in assign_splits(photos, val_fraction, seed)}
    assert sorted(split) == sorted(photo.path for photo in photos)
    again = assign_splits(sorted(photos, key=lambda photo: photo.path), val_fraction, seed)
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
        {photo.path for photo in assign_splits(photos, 0.1, seed) if photo.split == "val_query"} for seed in (0, 1)
    ]
    assert len(drawn[0]) == len(drawn[1]) == 40
    assert drawn[0] != drawn[1]
