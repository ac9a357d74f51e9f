"""A photo file as one upright picture, as `clipfh prepare` and `clipfh search` read it.

It needs Pillow alone, and pillow-heif for HEIC: every export holds a copy of this file as `preprocess.py`.
"""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageChops, ImageCms

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
ORIENTATION_TAG = 0x0112
QUALITY = 95
UNSEEN = 2  # a difference in levels, of 255, that no one sees
IMAGE_SIZE = 256

MAX_PIXELS = 100_000_000
MAX_JPEG_PIXELS = 250_000_000  # a JPEG decodes at a half, quarter or eighth of its sides, unless it is progressive
MAX_LENGTH = 100  # in widths: a model's input is that of a square, and a longer photo would be enlarged beyond memory

TOO_LARGE = f"more than {MAX_PIXELS:,} pixels, or {MAX_JPEG_PIXELS:,} of a JPEG that is not progressive"
TOO_LONG = f"more than {MAX_LENGTH} times as long as wide"
NO_RANGE = "pixels without a known range"
NEEDS_HEIF = "HEIC photo: pip install pillow-heif reads it"
OUTSIDE_BOX = "its box is outside of the image"

Memory = Callable[[int], AbstractContextManager[object]]


def read_to_end(image: Image.Image) -> object:
    """Decode an opened image to its end, at as few pixels as its format allows."""
    image.draft("L", (1, 1))
    return image.load()


class RefusedPhotoError(Exception):
    """A photo that is not taken, for the reason given."""


def read_photo(file: str | Path, image_size: int = IMAGE_SIZE) -> Image.Image:
    """A photo file as the catalogue holds it, RGB: upright, on white, eight bits, sRGB, its short side shrunk."""
    return Image.open(io.BytesIO(shrink(Path(file).read_bytes(), image_size))).convert("RGB")


def shrink(
    data: bytes,
    image_size: int,
    box: tuple[int, int, int, int] | None = None,
    memory: Memory = lambda pixels: nullcontext(),
    decode: Callable[[Image.Image], object] = read_to_end,
) -> bytes:
    """The image as JPEG with a short side of `image_size`; its own bytes if it is no larger, plain and upright.

    It is decoded to its end in both cases, so that a cut file is found here and not in training.

    Args:
        data: the file.
        image_size: pixels of the short side.
        box: left, top, width and height, in pixels of the file, of the part that is cut out first.
        memory: makes a context to decode in, from the number of pixels that lie in memory meanwhile.
        decode: called with an opened image that keeps its bytes; must decode it to its end.
    """
    with _open(data) as source:
        _check_size(source)
        left, top, width, height = _clip(box, source) if box else (0, 0, *source.size)
        _check_length(width, height)
        excess = min(width, height) / image_size
        if excess <= 1 and not box and _is_plain(source):
            with memory(source.width * source.height):
                decode(source)
            return data
        full, pixels = source.size, source.width * source.height
        # A JPEG may decode to a half, quarter or eighth; from twice the wanted size that costs no visible quality
        source.draft("RGB", (int(2 * full[0] / excess), int(2 * full[1] / excess)))
        # All of a progressive JPEG is in memory, at whatever size it is decoded
        with memory(pixels if source.info.get("progressive") else source.width * source.height):
            source.load()  # a TIFF is turned upright as it loads, and its orientation says so only then
            image = _to_plain_mode(source)
            across, down = image.width / full[0], image.height / full[1]
            if box:
                image = image.crop(
                    (round(left * across), round(top * down), *_end(left + width, top + height, across, down))
                )
            if excess > 1:
                image = image.resize(_shrunk_size(width, height, image_size), Image.Resampling.BICUBIC)
        encoded = io.BytesIO()
        _finish(image, source).save(encoded, "JPEG", quality=QUALITY)
        return encoded.getvalue()


Image.MAX_IMAGE_PIXELS = None  # the limits are those above


def _open(data: bytes) -> Image.Image:
    if data[4:8] == b"ftyp" and b"avif" not in data[8:40]:
        try:
            import pillow_heif
        except ImportError as error:
            raise RefusedPhotoError(NEEDS_HEIF) from error
        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data), formats=("HEIF",))
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check_size(image: Image.Image) -> None:
    most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") and not image.info.get("progressive") else MAX_PIXELS
    if image.width * image.height > most:
        raise RefusedPhotoError(TOO_LARGE)


def _check_length(width: int, height: int) -> None:
    if max(width, height) > MAX_LENGTH * min(width, height):
        raise RefusedPhotoError(TOO_LONG)


def _clip(box: tuple[int, int, int, int], image: Image.Image) -> tuple[int, int, int, int]:
    """The part of a box that is inside of the image."""
    left, top = max(box[0], 0), max(box[1], 0)
    width, height = min(box[0] + box[2], image.width) - left, min(box[1] + box[3], image.height) - top
    if width < 1 or height < 1:
        raise RefusedPhotoError(OUTSIDE_BOX)
    return left, top, width, height


def _end(right: int, bottom: int, across: float, down: float) -> tuple[int, int]:
    return max(1, round(right * across)), max(1, round(bottom * down))


def _shrunk_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    long = round(max(width, height) / min(width, height) * image_size)
    return (image_size, long) if width <= height else (long, image_size)


def _is_plain(image: Image.Image) -> bool:
    """Whether the image is one opaque upright picture of eight bits a channel, which all readers show alike."""
    deep = image.mode.startswith(("I", "F"))
    odd = deep or image.has_transparency_data or getattr(image, "n_frames", 1) != 1 or image.format == "HEIF"
    return (
        not odd and image.getexif().get(ORIENTATION_TAG, 1) == 1 and not _profile_transform(image, _plain_mode(image))
    )


def _plain_mode(image: Image.Image) -> str:
    """The mode of eight bits a channel, and without a palette, in which an image can be resized."""
    if image.mode in ("I", "F"):
        raise RefusedPhotoError(NO_RANGE)
    if image.has_transparency_data:
        return "RGBA"
    return {"1": "L", "P": "RGB"}.get(image.mode, "L" if image.mode.startswith("I;16") else image.mode)


def _to_plain_mode(image: Image.Image) -> Image.Image:
    """The first frame of an image in its plain mode."""
    mode = _plain_mode(image)
    if image.mode.startswith("I;16"):
        image = image if image.mode == "I;16" else image.convert("I")  # of another order of bytes
        image = image.point(lambda value: value / 257)  # Pillow would cut off all that is above 255
    return image if image.mode == mode else image.convert(mode)  # convert would copy


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What an orientation of EXIF wants done."""


def _finish(image: Image.Image, source: Image.Image) -> Image.Image:
    """An image of a plain mode as RGB: upright, transparent parts on white, colours of its profile as sRGB."""
    turn = _TURNS.get(source.getexif().get(ORIENTATION_TAG, 1))
    image = image if turn is None else image.transpose(turn)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if transform := _profile_transform(source, image.mode):
        return ImageCms.applyTransform(image, transform) or image
    return image if image.mode == "RGB" else image.convert("RGB")


def _profile_transform(image: Image.Image, mode: str) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    return _transform_to_srgb(profile, mode) if profile else None


@lru_cache(maxsize=64)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform of a colour profile to sRGB; None where it changes nothing, or is not of images of this mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, ValueError, OSError):
        return None
    ramp = Image.linear_gradient("L")
    sample = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))) if mode == "RGB" else ramp.convert(mode)
    changed = ImageCms.applyTransform(sample, transform)
    assert changed is not None  # it is not done in place
    difference = ImageChops.difference(sample.convert("RGB"), changed).histogram()
    is_seen = any(sum(difference[band + UNSEEN + 1 : band + 256]) for band in (0, 256, 512))
    return transform if is_seen else None
