"""Changes of a batch: the same on any number of workers, image by image what the library does, no more than asked."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as T

from clipfh import augment

FILL = (122, 116, 104)
BATCH = torch.randint(0, 255, (24, 3, 32, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def whole_and_parts(change, strength):
    """The batch changed at once, and by three workers."""
    parts = [slice(start, start + 8) for start in (0, 8, 16)]
    whole = change(BATCH, strength, np.random.default_rng(1), 24, slice(0, 24), FILL)
    return whole, torch.cat([change(BATCH[p], strength, np.random.default_rng(1), 24, p, FILL) for p in parts])


@pytest.mark.parametrize("change,strength", [(augment.randaugment, 9.0), (augment.erase, 0.5)])
def test_workers_change_their_part_as_one_changes_the_whole(change, strength):
    whole, parts = whole_and_parts(change, strength)
    assert torch.equal(whole, parts) and whole.dtype == torch.uint8
    assert not torch.equal(whole, BATCH)


@pytest.mark.parametrize("change", [augment.randaugment, augment.erase])
def test_another_draw_is_another_change(change):
    one, other = (change(BATCH, 1.0, np.random.default_rng(seed), 24, slice(0, 24), FILL) for seed in (1, 2))
    assert not torch.equal(one, other)


def test_every_operation_is_drawn_and_changes_what_it_says():
    operations = augment._operations(FILL)
    unchanged = [i for i, operation in enumerate(operations) if torch.equal(operation(BATCH, 0.9), BATCH)]
    assert unchanged == [0], "only the first leaves images as they are"
    for operation in operations:
        one_by_one = torch.cat([operation(image[None], -0.9) for image in BATCH])
        assert torch.equal(operation(BATCH, -0.9), one_by_one), "an image does not depend on its neighbours"
    assert torch.equal(operations[5](BATCH, 1.0), T.rotate(BATCH, -30.0, T.InterpolationMode.BILINEAR, fill=list(FILL)))


def test_erasing_fills_one_rectangle_of_the_size_asked_for():
    erased = augment.erase(BATCH, 1.0, np.random.default_rng(3), 24, slice(0, 24), FILL)
    shares = []
    for before, after in zip(BATCH, erased, strict=True):
        hit = (after != before).any(0)
        rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
        box = after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == torch.tensor(FILL, dtype=torch.uint8)[:, None, None]).all(), "all of the rectangle"
        shares.append(box[0].numel() / hit.numel())
    assert min(shares) > 0.005 and max(shares) < 0.4 and np.std(shares) > 0.05


def test_a_probability_is_a_share_of_the_images():
    many = BATCH.repeat(40, 1, 1, 1)
    erased = augment.erase(many, 0.25, np.random.default_rng(0), len(many), slice(0, len(many)), FILL)
    assert (erased != many).flatten(1).any(1).float().mean().item() == pytest.approx(0.25, abs=0.05)
