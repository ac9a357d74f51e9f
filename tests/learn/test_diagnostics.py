"""Figures to words: what is wrong is said, what is well is not."""

import pytest

from clipfh.learn import diagnostics

WELL = {
    "step": 2000,
    "loss_supcon": 3.0,
    "floor_supcon": 1.1,
    "collapse_supcon": 4.8,
    "image_cosine": 0.3,
    "val_mAP": 0.5,
    "start_val_mAP": 0.4,
}


@pytest.mark.parametrize(
    "change,words",
    [
        ({}, []),
        ({"image_cosine": 0.999, "loss_supcon": 4.8}, ["supcon has collapsed: all embeddings alike"]),
        ({"loss_supcon": 4.79}, ["no better than with equal embeddings (4.800)"]),
        ({"loss_supcon": 1.12}, ["at its floor (1.100)"]),
        ({"val_mAP": 0.4}, ["val mAP 0.400 is not above the 0.400 that training started from, after 2,000 steps"]),
        ({"val_mAP": 0.3, "step": 999}, []),
        ({"loss_supcon": 5.5}, []),
    ],
)
def test_warnings(change: dict, words: list[str]):
    found = diagnostics.find_warnings({**WELL, **change}, ["supcon"])
    assert len(found) == len(words) and all(word in warning for word, warning in zip(words, found, strict=True))


def test_a_term_without_ends_collapses_too():
    figures = {"step": 10, "loss_center": 0.0, "image_cosine": 1.0, "val_mAP": 0.1, "start_val_mAP": 0.4}
    assert diagnostics.find_warnings(figures, ["center"])[0].startswith("center has collapsed: all embeddings alike")
