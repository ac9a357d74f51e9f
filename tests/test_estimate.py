"""What a sweep will take: the arithmetic by hand, and one real measurement."""

import dataclasses

import pytest
import yaml

from clipfh import config, estimate, space

GIB = 2.0**30
FILE = {
    "name": "x",
    "base": {"model.name": config.SMALL, "batch.items": 8},
    "search": {"batch.views": {"choice": [2, 4, 8]}},
    "trials": 9,
    "budget": {"images": 9000, "first_rung": 1000, "reduction": 3},
}


def sweep(tmp_path, **changes) -> space.Sweep:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**FILE, **changes}))
    return space.load(tmp_path / "sweep.yaml")


def test_images_of_a_trial(tmp_path):
    # All see 1,000 images, a third of them up to 3,000, a ninth up to 9,000
    assert estimate.images_of_a_trial(sweep(tmp_path), 9000) == pytest.approx(1000 + 2000 / 3 + 6000 / 9)
    assert estimate.images_of_a_trial(sweep(tmp_path, budget={"images": 9000}), 9000) == 9000


def test_what_is_told(tmp_path):
    measured = estimate.Measured("cpu", rate=100, image=GIB / 32, rest=GIB, memory=2 * GIB)
    told = estimate.told(sweep(tmp_path), measured, 1000)
    assert "9 trials of 9,000 images at most, 2,333 on average" in told
    assert "largest P x K that fits: 8 x 4, and not all of the space: take the larger out" in told
    assert "--batch.chunk 16" in told and "about 3 min" in told
    roomy = dataclasses.replace(measured, memory=3 * GIB)
    assert "largest P x K that fits: 8 x 8, the largest of the space (64 images would)" in estimate.told(
        sweep(tmp_path), roomy, 1000
    )
    again = estimate.told(sweep(tmp_path, final={"top": 2, "seeds": 2, "refit": True}), measured, 1000)
    assert "then 5 runs of 9,000 images: about 8 min" in again


def test_a_measurement_is_of_this_machine(small_catalogue, tiny):
    measured = estimate.measure(small_catalogue, tiny)
    assert measured.device in ("cpu", "cuda") and measured.rate > 0
    assert 0 < measured.image < measured.memory and measured.images > 100
