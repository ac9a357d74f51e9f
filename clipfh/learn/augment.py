"""RandAugment and random erasing of a batch, on the device of its images. Draws come from the caller's generator.

Random crops and mirroring are not here, because they are part of decoding (`clipfh.data.images`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfh.model.transfer import integers_to_device, to_device

NUM_OPERATIONS = 2
"""Number of operations that RandAugment draws for an image."""

NAMES = (
    "identity",
    *("shear x", "shear y", "shift x", "shift y", "rotate"),
    *("brightness", "saturation", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
"""Operations, each with a strength from -1 to 1. The five of shape are one map; the last four ignore the sign."""

FIRST_SHAPE, FIRST_COLOR, FIRST_PLAIN = 1, 6, 10  # places in NAMES; plain operations ignore the sign


def step_generator(seed: int, step: int) -> np.random.Generator:
    """Return the generator of a step. Its draws differ from the crops' draws, whose generator is for (seed, step)."""
    return np.random.Generator(np.random.SFC64((seed, step, 0, 1)))  # the 1, because numpy ignores zeros at the end


def randaugment(
    images: Tensor, magnitude: float, rng: np.random.Generator, batch: int, part: slice, fill: Tensor
) -> Tensor:
    """Apply two random operations of equal strength to each image (Cubuk et al., RandAugment, 2020).

    Images of one operation are put side by side, so that a GPU gets few and large pieces of work.

    Args:
        images: (B, 3, H, W) uint8, this worker's part of the global batch.
        magnitude: strength of the operations, 0 to 10; 9 is usual.
        rng: generator. It draws for the whole global batch, so an image's draws don't depend on the number of workers.
        batch: number of images in the global batch.
        part: places of these images in the global batch.
        fill: (3,) uint8 colour that operations of shape bring in at the edges, on the images' device.

    Returns:
        (B, 3, H, W) uint8.
    """
    strength, shape = magnitude / 10, images.shape[-2:]
    codes = np.stack([rng.integers(2 * len(NAMES), size=batch)[part] for _ in range(NUM_OPERATIONS)])
    orders = np.argsort(_groups(codes), axis=1, kind="stable")
    codes = np.take_along_axis(codes, orders, axis=1)
    # Permutations from each order to the next, and finally back to the batch's own order
    moves = [orders[0], *(np.argsort(a)[b] for a, b in zip(orders, orders[1:], strict=False)), np.argsort(orders[-1])]
    places = integers_to_device({"moves": np.stack(moves)}, images.device)["moves"]
    grids = to_device(np.stack([_affine_matrix(int(code), strength, *shape) for code in codes.ravel()]), images.device)
    for move, codes_B, theta in zip(places, codes, grids.view(*codes.shape, 3, 2), strict=False):
        images = _apply(images[move], codes_B, strength, theta, fill)
    return images[places[-1]]


def _groups(codes: np.ndarray) -> np.ndarray:
    """Return codes that are equal for operations that run as one. A code is 2 * operation + direction."""
    kind = codes // 2
    shape, plain = (kind >= FIRST_SHAPE) & (kind < FIRST_COLOR), (kind == 0) | (kind >= FIRST_PLAIN)
    return np.where(shape, 2 * FIRST_SHAPE, np.where(plain, 2 * kind, codes))


def _apply(images: Tensor, codes: np.ndarray, strength: float, theta: Tensor, fill: Tensor) -> Tensor:
    """Apply to each image the operation of its code, (n,). Images of one group stand side by side."""
    ends = [*(np.flatnonzero(np.diff(_groups(codes))) + 1).tolist(), len(codes)]
    parts, start = [], 0
    for end in ends:
        kind, signed_strength = codes[start] // 2, strength if codes[start] % 2 else -strength
        part = images[start:end]
        if FIRST_SHAPE <= kind < FIRST_COLOR:
            parts.append(_affine(part, theta[start:end], fill))
        else:
            parts.append(_color(NAMES[kind])(part, signed_strength))
        start = end
    return torch.cat(parts)


@functools.lru_cache(maxsize=1024)
def _affine_matrix(code: int, strength: float, height: int, width: int) -> np.ndarray:
    """Return the (3, 2) float32 matrix from a place in the new image, in pixels from the middle, to the old image.

    As in torchvision's `affine`, the matrix inverts two shears, then a rotation, then a shift. The place in the old
    image is in halves of the image's size.
    """
    name, s = NAMES[code // 2], strength if code % 2 else -strength
    x, y = (math.atan(0.3 * s) if name == f"shear {axis}" else 0.0 for axis in "xy")
    turn = math.radians(30 * s) if name == "rotate" else 0.0
    right = round(0.45 * s * width) if name == "shift x" else 0
    down = round(0.45 * s * height) if name == "shift y" else 0
    a, c = math.cos(turn - y) / math.cos(y), math.sin(turn - y) / math.cos(y)
    b, d = -(a * math.tan(x) + math.sin(turn)), math.cos(turn) - c * math.tan(x)
    inverse = np.array([[d, -b, b * down - d * right], [-c, a, c * right - a * down]], np.float32)
    return inverse.T / np.array([0.5 * width, 0.5 * height], np.float32)


def _affine(images: Tensor, theta: Tensor, fill: Tensor) -> Tensor:
    """Warp each image by its own `_affine_matrix`, theta (n, 3, 2), bilinear, in front of colour `fill`."""
    (height, width), on = images.shape[-2:], images.device
    x = torch.linspace((1.0 - width) * 0.5, (width - 1.0) * 0.5, width, device=on).expand(height, -1)
    y = torch.linspace((1.0 - height) * 0.5, (height - 1.0) * 0.5, height, device=on)[:, None].expand(-1, width)
    places = torch.stack([x, y, torch.ones_like(x)], 2).view(1, -1, 3).expand(len(images), -1, -1)
    grid = places.bmm(theta).view(-1, height, width, 2)
    channels = F.pad(images.float(), (0, 0, 0, 0, 0, 1), value=1.0)  # a fourth channel: 1 where the image is
    warp = F.grid_sample(channels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    color = fill.float().view(1, 3, 1, 1)
    return warp[:, :3].sub(color).mul_(warp[:, 3:]).add_(color).round_().to(torch.uint8)


def _color(name: str) -> Callable[[Tensor, float], Tensor]:
    """Return the operation of a name: a function of (n, 3, H, W) uint8 images and a strength from -1 to 1."""
    from torchvision.transforms.v2 import functional as T

    operations: dict[str, Callable[[Tensor, float], Tensor]] = {
        "identity": lambda images, s: images,
        "brightness": lambda images, s: T.adjust_brightness(images, 1 + 0.9 * s),
        "saturation": lambda images, s: T.adjust_saturation(images, 1 + 0.9 * s),
        "contrast": lambda images, s: T.adjust_contrast(images, 1 + 0.9 * s),
        "sharpness": lambda images, s: _sharpness(images, 1 + 0.9 * s),
        "posterize": lambda images, s: T.posterize(images, 8 - round(4 * abs(s))),
        "solarize": lambda images, s: T.solarize(images, 255 * (1 - abs(s))),
        "autocontrast": lambda images, s: _autocontrast(images),
        "equalize": lambda images, s: T.equalize(images),
    }
    return operations[name]


def _sharpness(images: Tensor, factor: float) -> Tensor:
    """Apply torchvision's adjust_sharpness without its copy of a kernel from the host, which would wait for the GPU."""
    whole = images.float()
    kernel = whole.new_full((3, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1].fill_(5 / 13)
    inner = whole[..., 1:-1, 1:-1]
    inner.add_(F.conv2d(whole, kernel, groups=3).round_().sub_(inner), alpha=1 - factor)
    return whole.clamp_(0, 255).to(torch.uint8)


def _autocontrast(images: Tensor) -> Tensor:
    """Apply torchvision's autocontrast without its choice of channels by a mask."""
    low, high = images.float().flatten(2).aminmax(dim=2, keepdim=True)
    flat = high == low
    low, scale = low.masked_fill(flat, 0.0), (high - low).mul_(1 / 255).masked_fill_(flat, 1.0)
    return images.float().sub_(low[..., None]).div_(scale[..., None]).clamp_(0, 255).to(torch.uint8)


def erase(
    images: Tensor, probability: float, rng: np.random.Generator, batch: int, part: slice, fill: Tensor
) -> Tensor:
    """Fill a rectangle of some images with one colour (Zhong et al., Random Erasing, 2020).

    The rectangle's area is uniform between 2% and 33% of the image's area. The logarithm of the rectangle's aspect
    ratio is uniform between log 0.3 and log (1 / 0.3).

    Args:
        images: (B, 3, H, W) uint8, this worker's part of the global batch.
        probability: probability that an image loses a rectangle.
        rng, batch, part: as for `randaugment`.
        fill: (3,) uint8 colour of the rectangle.

    Returns:
        (B, 3, H, W) uint8.
    """
    height, width = images.shape[-2:]
    chance, area, ratio, top, left = rng.random((batch, 5))[part].T
    aspect = np.exp((2 * ratio - 1) * math.log(1 / 0.3))
    area = (0.02 + 0.31 * area) * (chance < probability)
    high, wide = np.sqrt(area * aspect).clip(max=1), np.sqrt(area / aspect).clip(max=1)
    inside = np.concatenate([_inside(height, top * (1 - high), high), _inside(width, left * (1 - wide), wide)], 1)
    inside_BH, inside_BW = to_device(inside, images.device).split([height, width], 1)
    inside_BHW = inside_BH[:, :, None] & inside_BW[:, None, :]
    return torch.where(inside_BHW[:, None], fill.view(1, 3, 1, 1), images)


def _inside(size: int, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return (B, size) bool: whether a pixel's middle lies in [start, start + length), both (B,) shares of `size`."""
    middle = (np.arange(size) + 0.5) / size
    inside: np.ndarray = (middle >= start[:, None]) & (middle < (start + length)[:, None])
    return inside
