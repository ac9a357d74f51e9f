"""Decoding equals open_clip's for evaluation, and is a sane random crop for training."""

import io

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfh.data import images
from clipfh.data.images import Preprocess


def photo(width, height, mode="RGB", format="JPEG", seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def draws(seed):
    return np.random.default_rng(seed).random(images.NUM_DRAWS)


@given(
    st.integers(30, 400), st.integers(30, 400), st.sampled_from([32, 64, 224]), st.sampled_from(["shortest", "squash"])
)
@settings(max_examples=40, deadline=None)
def test_evaluation_equals_open_clip(width, height, size, resize_mode):
    preprocess = Preprocess(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), resize_mode=resize_mode)
    encoded = photo(width, height)
    transform = open_clip.image_transform(
        size, False, mean=preprocess.mean, std=preprocess.std, resize_mode=resize_mode, interpolation="bicubic"
    )
    expected = transform(Image.open(io.BytesIO(encoded)))
    pixels = torch.from_numpy(images.decode_for_evaluation(encoded, preprocess).copy()).permute(2, 0, 1).float() / 255
    ours = (pixels - torch.tensor(preprocess.mean)[:, None, None]) / torch.tensor(preprocess.std)[:, None, None]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode,format", [("L", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG")])
def test_any_mode_becomes_rgb(mode, format):
    encoded = photo(90, 120, mode, format)
    assert images.decode_for_evaluation(encoded, Preprocess(64, (0,) * 3, (1,) * 3)).shape == (64, 64, 3)
    assert images.decode_for_training(encoded, 64, 0.3, True, draws(0)).shape == (64, 64, 3)


def test_training_crop_repeats_by_seed_and_covers_the_image():
    encoded = photo(256, 200)
    crops = [images.decode_for_training(encoded, 64, 0.2, True, draws(s)) for s in range(30)]
    again = [images.decode_for_training(encoded, 64, 0.2, True, draws(s)) for s in range(30)]
    np.testing.assert_array_equal(crops, again)
    assert len({c.tobytes() for c in crops}) == 30


@given(
    st.integers(20, 400), st.integers(20, 400), st.sampled_from(["JPEG", "PNG"]), st.floats(0.1, 1), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_a_kept_photo_gives_the_same_crop(width, height, format, crop_min, seed):
    encoded = photo(width, height, format=format)
    *shape, reduction = images.usual_reduction(encoded, 32, crop_min)
    assert shape == [width, height] and (reduction == 1 or format == "JPEG")
    kept = images.DecodedPhoto(width, height, reduction, images.decode(encoded, reduction))
    assert kept.pixels.shape == (-(-height // reduction), -(-width // reduction), 3)
    plain, same = (images.decode_for_training(encoded, 32, crop_min, True, draws(seed), each) for each in (None, kept))
    np.testing.assert_array_equal(plain, same)


def test_whole_image_without_augmentation():
    encoded = photo(128, 128)
    crop = images.decode_for_training(encoded, 64, 1.0, False, draws(0)).astype(float)
    whole = np.asarray(Image.open(io.BytesIO(encoded)).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(crop - whole).mean() < 3, "a decoding short cut may round, not move"
    assert np.abs(crop[:, ::-1] - whole).mean() > 3
