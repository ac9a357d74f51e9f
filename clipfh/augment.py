"""RandAugment and random erasing of a batch, on whatever device it lies. Draws come from the caller's generator.

Random crops and mirroring are not here: they go with decoding (`clipfh.images`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

NUM_OPERATIONS = 2
"""Operations that RandAugment draws for an image."""

Operation = Callable[[Tensor, float], Tensor]


def randaugment(
    images: Tensor, magnitude: float, rng: np.random.Generator, batch: int, part: slice, fill: Sequence[int]
) -> Tensor:
    """Two random operations on each image, of equal strength (Cubuk et al., RandAugment, 2020).

    Args:
        images: (B, 3, H, W) uint8, this worker's part of the global batch.
        magnitude: strength of the operations, 0 to 10; 9 is usual.
        rng: draws for the whole global batch, so that an image gets the same on any number of workers.
        batch: images in the global batch.
        part: where in it these images stand.
        fill: colour of what comes in at the edges.

    Returns:
        (B, 3, H, W) uint8.
    """
    operations = _operations(fill)
    for _ in range(NUM_OPERATIONS):
        drawn = rng.integers(2 * len(operations), size=batch)[part]
        for code in np.unique(drawn):
            chosen = torch.from_numpy(np.flatnonzero(drawn == code)).to(images.device)
            strength = magnitude / 10 * (1 if code % 2 else -1)
            images = images.index_copy(0, chosen, operations[code // 2](images[chosen], strength))
    return images


def _operations(fill: Sequence[int]) -> list[Operation]:
    """Each takes (n, 3, H, W) uint8 and a strength from -1 to 1; what has no direction takes its size alone."""
    from torchvision.transforms.v2 import functional as T

    def affine(
        images: Tensor, angle: float = 0, x: float = 0, y: float = 0, shear: tuple[float, float] = (0, 0)
    ) -> Tensor:
        height, width = images.shape[-2:]
        shift = [round(0.45 * x * width), round(0.45 * y * height)]
        degrees = [math.degrees(math.atan(0.3 * s)) for s in shear]
        return T.affine(images, angle, shift, 1.0, degrees, T.InterpolationMode.BILINEAR, list(map(float, fill)))

    return [
        lambda images, s: images,
        lambda images, s: affine(images, shear=(s, 0)),
        lambda images, s: affine(images, shear=(0, s)),
        lambda images, s: affine(images, x=s),
        lambda images, s: affine(images, y=s),
        lambda images, s: affine(images, angle=30 * s),
        lambda images, s: T.adjust_brightness(images, 1 + 0.9 * s),
        lambda images, s: T.adjust_saturation(images, 1 + 0.9 * s),
        lambda images, s: T.adjust_contrast(images, 1 + 0.9 * s),
        lambda images, s: T.adjust_sharpness(images, 1 + 0.9 * s),
        lambda images, s: T.posterize(images, 8 - round(4 * abs(s))),
        lambda images, s: T.solarize(images, 255 * (1 - abs(s))),
        lambda images, s: T.autocontrast(images),
        lambda images, s: T.equalize(images),
    ]


def erase(
    images: Tensor, probability: float, rng: np.random.Generator, batch: int, part: slice, fill: Sequence[int]
) -> Tensor:
    """A rectangle of some images filled with one colour (Zhong et al., Random Erasing, 2020).

    Its area is uniform in 2% to 33% of the image's, the logarithm of its aspect ratio uniform between 0.3 and 1 / 0.3.

    Args:
        images: (B, 3, H, W) uint8, this worker's part of the global batch.
        probability: of each image to lose a rectangle.
        rng, batch, part, fill: as for `randaugment`; the colour here is that of the rectangle.

    Returns:
        (B, 3, H, W) uint8.
    """
    height, width = images.shape[-2:]
    hit, area, ratio, top, left = rng.random((batch, 5))[part].T
    aspect = np.exp((2 * ratio - 1) * math.log(1 / 0.3))
    area = (0.02 + 0.31 * area) * (hit < probability)
    high, wide = np.sqrt(area * aspect).clip(max=1), np.sqrt(area / aspect).clip(max=1)
    inside_BH = _between(height, top * (1 - high), high, images.device)
    inside_BW = _between(width, left * (1 - wide), wide, images.device)
    color = torch.tensor(fill, dtype=torch.uint8, device=images.device).view(1, 3, 1, 1)
    return torch.where((inside_BH[:, :, None] & inside_BW[:, None, :])[:, None], color, images)


def _between(size: int, start: np.ndarray, length: np.ndarray, on: torch.device) -> Tensor:
    """(B, size) bool: the pixels of each row whose middle lies in [start, start + length), in shares of the size."""
    middle = (np.arange(size) + 0.5) / size
    return torch.from_numpy((middle >= start[:, None]) & (middle < (start + length)[:, None])).to(on)
