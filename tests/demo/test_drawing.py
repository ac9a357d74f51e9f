"""Drawn garments: photos and texts are functions of their arguments, and show the same item."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfh.demo import drawing, garments
from clipfh.demo.garments import make_garment


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 10**6), st.sampled_from(drawing.VIEWS))
def test_every_garment_can_be_photographed_and_described(seed, index, view):
    item = make_garment(seed, index)
    for variant in range(len(item.colors)):
        photo = drawing.draw(item, variant, view, seed, 48)
        assert photo.size == (48, 48) and photo.mode == "RGB"
        assert np.asarray(photo).std() > 5
    text = " ".join(garments.describe(item))
    words = [item.colors[0].name, item.kind, item.material, *(garments.WORDS[name] for name in item.details)]
    words += [] if item.pattern == "plain" else [item.pattern, item.accent.name]
    words += [garments.WORDS[item.neckline]] if garments.KINDS[item.kind].torso else []
    assert [word for word in words if word.lower() not in text.lower()] == []


def test_a_photo_is_a_function_of_its_arguments():
    item = replace(make_garment(0, 1), colors=make_garment(0, 1).colors * 2)
    base = drawing.draw(item, 0, "1_front", 0, 48).tobytes()
    assert make_garment(0, 1) == make_garment(0, 1) != make_garment(1, 1)
    assert base == drawing.draw(item, 0, "1_front", 0, 48).tobytes()
    others = [drawing.draw(item, 1, "1_front", 0, 48), drawing.draw(item, 0, "2_side", 0, 48)]
    others += [
        drawing.draw(item, 0, "1_front", 1, 48),
        drawing.draw(replace(item, hem=item.hem + 0.2), 0, "1_front", 0, 48),
    ]
    assert base not in [other.tobytes() for other in others]


@pytest.mark.parametrize("detail", ["logo", "zip", "buttons", "chest pocket", "pouch", "side pockets"])
def test_the_back_shows_nothing_of_the_front(detail):
    item = next(g for g in (make_garment(0, i) for i in range(1, 99)) if g.kind == "hoodie")
    with_it, without = replace(item, details=(detail,)), replace(item, details=())
    front, back = (
        [drawing.draw(g, 0, view, 0, 64).tobytes() for g in (with_it, without)] for view in ("1_front", "3_back")
    )
    assert front[0] != front[1]
    assert back[0] == back[1]


def test_colours_find_the_same_item_far_better_than_chance_and_not_always():
    """Otherwise the views would not show one garment, or there would be nothing to learn."""
    shots = [(i, view) for i in range(1, 41) for view in drawing.VIEWS]
    photos = [np.asarray(drawing.draw(make_garment(0, i), 0, view, 0, 48))[12:36, 15:33] for i, view in shots]
    histograms = np.stack([np.bincount((photo // 43 @ [36, 6, 1]).ravel(), minlength=216) for photo in photos])
    overlap = np.minimum(histograms[:, None], histograms[None]).sum(-1)
    np.fill_diagonal(overlap, -1)
    item = np.array([i for i, _ in shots])
    others = len(drawing.VIEWS) - 1
    found = (item[np.argsort(-overlap, 1)[:, :others]] == item[:, None]).mean()
    assert 0.4 < found < 0.9, "share of the nearest photos that show the same item; chance is .02"
