"""One image: decode it, crop it for training, preprocess it for evaluation, show it. Pillow and numpy only."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images: the part of open_clip's preprocessing that this module reproduces."""

    size: int
    """side of the square input, pixels"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """shortest: short side to size, then the middle; squash: both sides to size"""


def for_training(encoded: bytes, size: int, crop_min: float, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """A random crop of the image, mirrored every other time.

    The crop is that of RandomResizedCrop: its area is uniform in [crop_min, 1] of the image's, the logarithm of its
    aspect ratio uniform between 3/4 and 4/3. A JPEG is decoded straight to the smallest scale that still has the
    crop's pixels.

    Returns:
        (size, size, 3) uint8.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        left, top, width, height = _random_crop(image.width, image.height, crop_min, rng)
        full_width = image.width
        image.draft("RGB", (math.ceil(image.width * size / width), math.ceil(image.height * size / height)))
        scale = image.width / full_width
        box = (left * scale, top * scale, (left + width) * scale, (top + height) * scale)
        pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box))
    return pixels[:, ::-1] if flip and rng.random() < 0.5 else pixels


def _random_crop(
    width: int, height: int, crop_min: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, width, height of the crop; the whole image when ten draws do not fit, or crop_min is 1."""
    for _ in range(10 if crop_min < 1 else 0):
        area = width * height * rng.uniform(crop_min, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            return rng.uniform(0, width - w), rng.uniform(0, height - h), w, h
    return 0, 0, width, height


def for_evaluation(encoded: bytes, preprocess: Preprocess) -> np.ndarray:
    """The image as open_clip's evaluation transform has it before normalisation, to the last bit.

    Returns:
        (size, size, 3) uint8.
    """
    size, resampling = preprocess.size, _RESAMPLING[preprocess.interpolation]
    with Image.open(io.BytesIO(encoded)) as image:
        if preprocess.resize_mode == "squash":
            return np.asarray(image.resize((size, size), resampling).convert("RGB"))
        short, long = sorted(image.size)
        if short != size:
            resized = (
                (size, int(size * long / short)) if image.width <= image.height else (int(size * long / short), size)
            )
            return _middle(image.resize(resized, resampling), size)
        return _middle(image, size)


def _middle(image: Image.Image, size: int) -> np.ndarray:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


def thumbnail(encoded: bytes, width: int, height: int, quality: int = 75) -> str:
    """The image, shrunk to fit into so many pixels, as a data URI for a page that is one file."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (width, height))
        small = image.convert("RGB")
    small.thumbnail((width, height))
    webp = io.BytesIO()
    small.save(webp, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(webp.getvalue()).decode()}"
