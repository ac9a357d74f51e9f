"""Changes of a batch: the same on any number of workers, image by image what the library does, no more than asked."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as T

from clipfh.learn import augment

FILL = torch.tensor([122, 116, 104], dtype=torch.uint8)
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


def test_a_steps_draws_are_not_those_of_its_images():
    drawn = {int(augment.step_generator(3, step).integers(2**62)) for step in range(9)}
    images = {int(np.random.Generator(np.random.SFC64((3, s, i))).integers(2**62)) for s in range(9) for i in range(9)}
    assert len(drawn) == 9 and not drawn & images


@pytest.mark.parametrize("change", [augment.randaugment, augment.erase])
def test_another_draw_is_another_change(change):
    one, other = (change(BATCH, 1.0, np.random.default_rng(seed), 24, slice(0, 24), FILL) for seed in (1, 2))
    assert not torch.equal(one, other)


def slow(images: torch.Tensor, codes: np.ndarray, magnitude: float) -> torch.Tensor:
    """An operation on each image, one after the other, as torchvision has them."""

    def affine(image, angle=0.0, x=0.0, y=0.0, shear=(0.0, 0.0)):
        height, width = image.shape[-2:]
        shift = [round(0.45 * x * width), round(0.45 * y * height)]
        degrees = [math.degrees(math.atan(0.3 * s)) for s in shear]
        return T.affine(image, angle, shift, 1.0, degrees, T.InterpolationMode.BILINEAR, FILL.tolist())

    operations = [
        lambda image, s: image,
        lambda image, s: affine(image, shear=(s, 0)),
        lambda image, s: affine(image, shear=(0, s)),
        lambda image, s: affine(image, x=s),
        lambda image, s: affine(image, y=s),
        lambda image, s: affine(image, angle=30 * s),
        lambda image, s: T.adjust_brightness(image, 1 + 0.9 * s),
        lambda image, s: T.adjust_saturation(image, 1 + 0.9 * s),
        lambda image, s: T.adjust_contrast(image, 1 + 0.9 * s),
        lambda image, s: T.adjust_sharpness(image, 1 + 0.9 * s),
        lambda image, s: T.posterize(image, 8 - round(4 * abs(s))),
        lambda image, s: T.solarize(image, 255 * (1 - abs(s))),
        lambda image, s: T.autocontrast(image),
        lambda image, s: T.equalize(image),
    ]
    strengths = magnitude / 10 * np.where(codes % 2, 1, -1)
    each = zip(images, codes, strengths.tolist(), strict=True)
    return torch.cat([operations[code // 2](image[None], strength) for image, code, strength in each])


@pytest.mark.parametrize("magnitude", [2.0, 5.0, 9.0, 10.0])
def test_randaugment_of_a_batch_is_that_of_each_image(magnitude):
    many = torch.randint(40, 250, (160, 3, 32, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    many[:8] = many[:8, :, :1, :1]  # of one colour each
    found = augment.randaugment(many, magnitude, np.random.default_rng(3), 160, slice(0, 160), FILL)
    rng = np.random.default_rng(3)
    first, second = (rng.integers(28, size=160) for _ in range(2))
    assert set(first) == set(range(28)), "each operation in each direction"
    once = slow(many, first, magnitude)
    assert torch.equal(found, slow(once, second, magnitude))
    for code in range(2, 28):
        assert not torch.equal(once[first == code], many[first == code]), augment.NAMES[code // 2]


def test_randaugment_is_done_in_few_pieces():
    """A GPU takes some 10 microseconds for each, however few images it is of."""

    class Count(TorchDispatchMode):
        pieces = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.pieces += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        augment.randaugment(BATCH.repeat(10, 1, 1, 1), 9.0, np.random.default_rng(0), 240, slice(0, 240), FILL)
    assert count.pieces < 400


def test_erasing_fills_one_rectangle_of_the_size_asked_for():
    erased = augment.erase(BATCH, 1.0, np.random.default_rng(3), 24, slice(0, 24), FILL)
    shares = []
    for before, after in zip(BATCH, erased, strict=True):
        hit = (after != before).any(0)
        rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
        box = after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == FILL[:, None, None]).all(), "all of the rectangle"
        shares.append(box[0].numel() / hit.numel())
    assert min(shares) > 0.005 and max(shares) < 0.4 and np.std(shares) > 0.05


def test_a_probability_is_a_share_of_the_images():
    many = BATCH.repeat(40, 1, 1, 1)
    erased = augment.erase(many, 0.25, np.random.default_rng(0), len(many), slice(0, len(many)), FILL)
    assert (erased != many).flatten(1).any(1).float().mean().item() == pytest.approx(0.25, abs=0.05)
