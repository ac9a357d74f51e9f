"""One image: decode it, crop it for training, preprocess it for evaluation, show it."""

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
    """A model's preprocessing of images: the part of open_clip's that this module reproduces."""

    size: int
    """Side of the square input, pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """shortest: short side to size, then the middle; squash: both sides to size."""


@dataclass(frozen=True)
class DecodedPhoto:
    """A photo decoded at one of the scales of a JPEG decoder."""

    width: int
    """Width of the photo, pixels."""
    height: int
    reduction: int
    """1, 2, 4 or 8: by this the sides of the photo are divided to give the sides of `pixels`."""
    pixels: np.ndarray
    """(h, w, 3) uint8."""


CROP_TRIES = 10
"""Crops that are drawn for an image until one fits."""

NUM_DRAWS = 1 + 4 * CROP_TRIES
"""Random numbers that an image takes: whether it is mirrored, and area, aspect ratio, left and top of each try."""


def decode_for_training(
    encoded: bytes, size: int, crop_min: float, flip: bool, draws: np.ndarray, cached: DecodedPhoto | None = None
) -> np.ndarray:
    """Decode a random crop of the image, mirrored with probability 1/2.

    The crop is RandomResizedCrop's: its share of the image's area is uniform in [crop_min, 1], the logarithm of its
    aspect ratio uniform in [log(3/4), log(4/3)]. A JPEG is decoded straight to the smallest scale that still has the
    crop's pixels. `cached`, the photo decoded before, spares the decoding and changes no pixel.

    Args:
        encoded: the image's file.
        size: side of the model's input, pixels.
        crop_min: smallest share of the image's area that a crop takes; 1 takes the whole image.
        flip: whether images are mirrored.
        draws: (NUM_DRAWS,) random numbers, uniform in [0, 1).
        cached: the photo decoded before.

    Returns:
        (size, size, 3) uint8.
    """
    photo = cached or Image.open(io.BytesIO(encoded))
    width, height = photo.width, photo.height
    left, top, w, h = _random_crop(width, height, crop_min, draws[1:])
    reduction = _strongest_reduction(width, height, size, w, h)
    if cached and cached.reduction != reduction:
        photo = Image.open(io.BytesIO(encoded))
    pixels = photo.pixels if isinstance(photo, DecodedPhoto) else _decode(photo, reduction)
    across, down = pixels.shape[1] / width, pixels.shape[0] / height
    columns, rows = _whole_pixels(left, w, across, pixels.shape[1]), _whole_pixels(top, h, down, pixels.shape[0])
    crop = _resize(pixels[rows, columns].copy(), size)
    return crop[:, ::-1] if flip and draws[0] < 0.5 else crop


def decode(encoded: bytes, reduction: int) -> np.ndarray:
    """Decode to (h, w, 3) uint8 pixels: a JPEG at a reduction of 1, 2, 4 or 8, other formats in full."""
    return _decode(Image.open(io.BytesIO(encoded)), reduction)


def _decode(image: Image.Image, reduction: int) -> np.ndarray:
    image.draft("RGB", (image.width // reduction, image.height // reduction))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # convert would copy


def usual_reduction(encoded: bytes, size: int, crop_min: float) -> tuple[int, int, int]:
    """Width and height of a photo, and the reduction that most of its crops need: a square crop of mean area does."""
    image = Image.open(io.BytesIO(encoded))  # reads the head alone
    width, height = image.size
    side = math.sqrt(width * height * (1 + crop_min) / 2)
    reduction = _strongest_reduction(width, height, size, min(side, width), min(side, height))
    return width, height, reduction if image.format == "JPEG" else 1


def _strongest_reduction(width: int, height: int, size: int, crop_width: float, crop_height: float) -> int:
    """The strongest JPEG reduction at which a crop still has `size` pixels a side."""
    most = min(width // math.ceil(width * size / crop_width), height // math.ceil(height * size / crop_height))
    return next(reduction for reduction in (8, 4, 2, 1) if most >= reduction or reduction == 1)


def _whole_pixels(start: float, length: float, scale: float, limit: int) -> slice:
    """The whole pixels of a stretch of a side, at a scale, within `limit` pixels."""
    count = min(max(1, round(length * scale)), limit)
    first = min(round(start * scale), limit - count)
    return slice(first, first + count)


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize bicubically with antialias, as Pillow does, in a quarter of its time by torch's byte kernel."""
    import torch  # here: preparing a catalogue needs this module, and not torch

    # Channels-last, as it lies in memory, it comes out channels-last too; [None] at the end would hide that
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _random_crop(width: int, height: int, crop_min: float, draws: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, width and height of a random crop: the whole image if no try fits, or if crop_min is 1."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area, ratio, left, top in draws.reshape(CROP_TRIES, 4).tolist() if crop_min < 1 else ():
        pixels = width * height * (crop_min + (1 - crop_min) * area)
        root = math.exp((low + (high - low) * ratio) / 2)
        w, h = math.sqrt(pixels) * root, math.sqrt(pixels) / root
        if w <= width and h <= height:
            return left * (width - w), top * (height - h), w, h
    return 0, 0, width, height


def decode_for_evaluation(encoded: bytes, preprocess: Preprocess) -> np.ndarray:
    """Decode an image as open_clip's evaluation transform does before normalisation, to the last bit.

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
            return _crop_middle(image.resize(resized, resampling), size)
        return _crop_middle(image, size)


def _crop_middle(image: Image.Image, size: int) -> np.ndarray:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


def thumbnail(encoded: bytes, width: int, height: int, quality: int = 75) -> str:
    """The image shrunk to fit into `width` x `height` pixels, as a data URI for a page that is one file."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (width, height))
        small = image.convert("RGB")
    small.thumbnail((width, height))
    webp = io.BytesIO()
    small.save(webp, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(webp.getvalue()).decode()}"
