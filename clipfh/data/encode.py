"""One photo of a source: read, checked and shrunk to the bytes that a catalogue holds."""

import io
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps
from pyarrow import fs

from clipfh import UserError
from clipfh.data.sources import OUTSIDE

MAX_PIXELS, MAX_JPEG_PIXELS = 100_000_000, 250_000_000  # a JPEG decodes at a half, quarter or eighth of its sides
ALONE_PIXELS = 16_000_000  # larger images are decoded one at a time: a pixel takes 9 to 20 bytes, on each core

TOO_LARGE = f"more than {MAX_PIXELS:,} pixels, or {MAX_JPEG_PIXELS:,} of a JPEG"
NO_RANGE = "pixels without a known range"

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
ORIENTATION_TAG = 0x0112


class _Refused(Exception):
    """An image that is left out, for the reason given."""


_alone: AbstractContextManager[object] = nullcontext()
"""Lock of all processes, held while one of them decodes a large image."""


def start_encoding(alone: AbstractContextManager[object]) -> None:
    """Set this process up to encode photos. `alone` is the lock of all such processes for large images."""
    global _alone
    _alone = alone
    warnings.simplefilter("ignore")  # about odd metadata in images that decode all the same
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked here


def encode_file(store: fs.SubTreeFileSystem, file: str, image_size: int) -> bytes | str:
    """The photo as a catalogue holds it, or the reason for leaving it out."""
    try:
        return shrink(_read_inside(store, file), image_size)
    except _Refused as refused:
        return str(refused)
    except Exception as error:  # decoders fail on foreign bytes in every way there is
        return f"unreadable ({type(error).__name__})"


def _read_inside(store: fs.SubTreeFileSystem, file: str) -> bytes:
    if isinstance(store.base_fs, fs.LocalFileSystem):
        path, folder = store.base_path + file, file.rpartition("/")[0]  # a Path costs as much as the reading
        if not _is_inside(file if os.path.islink(path) else folder, store.base_path):  # noqa: PTH114
            raise _Refused(OUTSIDE)
        with open(path, "rb", buffering=0) as opened:  # noqa: PTH123
            return opened.read()
    with store.open_input_file(file) as stream:
        return stream.read()


def encode_photo(path: str | Path, image_size: int) -> bytes:
    """The photo as `prepare` would put it into a catalogue.

    Raises:
        UserError: the file can't be read as an image.
    """
    data = Path(path).read_bytes()
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked here
    try:
        return shrink(data, image_size)
    except Exception as error:  # decoders fail on foreign bytes in every way there is
        reason = str(error) if isinstance(error, _Refused) else type(error).__name__
        raise UserError(f"{path} can't be read as an image ({reason}): give a JPEG, PNG or WebP photo") from error


@lru_cache(maxsize=1 << 12)  # a folder is asked for with each of its images
def _is_inside(path: str, root: str) -> bool:
    return Path(root, path).resolve().is_relative_to(Path(root).resolve())


def shrink(data: bytes, image_size: int) -> bytes:
    """The image as JPEG with a short side of `image_size`; its own bytes if it is no larger, plain and upright.

    It is decoded to its end in both cases, so that a cut file is found here and not in training.
    """
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
        width, height = opened.size
        if width * height > (MAX_JPEG_PIXELS if opened.format == "JPEG" else MAX_PIXELS):
            raise _Refused(TOO_LARGE)
        is_turned = opened.getexif().get(ORIENTATION_TAG, 1) != 1
        excess = min(width, height) / image_size
        if excess <= 1 and not is_turned and _is_plain(opened):
            opened.draft("L", (1, 1))  # reads a JPEG to its end, but makes few pixels of it
            with _memory_lock(opened, width * height):
                opened.load()
            return data
        # A JPEG may decode to a half, quarter or eighth; from twice the wanted size that costs no visible quality
        opened.draft("RGB", (int(2 * width / excess), int(2 * height / excess)))
        with _memory_lock(opened, width * height):
            image = _as_rgb(ImageOps.exif_transpose(opened) if is_turned else opened)
            if excess > 1:
                long = round(max(width, height) / excess)
                size = (image_size, long) if image.width <= image.height else (long, image_size)
                image = image.resize(size, Image.Resampling.BICUBIC)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=95)
        return encoded.getvalue()


def _memory_lock(opened: Image.Image, pixels: int) -> AbstractContextManager[object]:
    """Lock to hold while decoding an image with this number of pixels in its file: one large image at a time."""
    if not opened.info.get("progressive"):  # all of such a JPEG is in memory, at whatever size it is decoded
        pixels = opened.width * opened.height
    return _alone if pixels > ALONE_PIXELS else nullcontext()


def _is_plain(image: Image.Image) -> bool:
    """Whether the image is one opaque picture of eight bits a channel, which all readers show alike."""
    deep = image.mode.startswith(("I", "F"))
    return not deep and not image.has_transparency_data and getattr(image, "n_frames", 1) == 1


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert to eight bits a channel: transparent parts on white, the first of several frames."""
    if image.mode in ("I", "F"):
        raise _Refused(NO_RANGE)
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 257).convert("L")  # Pillow would cut off all that is above 255
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
