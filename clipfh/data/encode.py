"""One photo of a source, read from its place and shrunk to the bytes that a catalogue holds."""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
from PIL import Image
from pyarrow import fs

from clipfh import UserError
from clipfh.data import photo as photo_module
from clipfh.data.audit import look_at
from clipfh.data.near_copies import reduce_picture
from clipfh.data.photo import RefusedPhotoError, shrink
from clipfh.sources.files import is_local
from clipfh.sources.listing import LINK, Photo
from clipfh.sources.parquet_tables import NOWHERE, iterate_images, stands_in_table

MAX_FILE_BYTES = 1 << 30
NO_IMAGE = "a row without an image"
TOO_LONG_FILE = "a file of more than a gigabyte"


class DecodingMemory:
    """Memory for images that are decoded, shared by all processes that encode photos.

    What all of them decode at one time is no more than the largest image alone: a pixel takes 4 to 9 bytes. Images
    below a million pixels are free.
    """

    def __init__(self, context: BaseContext) -> None:
        self._turn = context.Lock()
        self._megapixels = context.Semaphore(photo_module.MAX_PIXELS // 1_000_000)

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Hold memory of this number of pixels while the block lasts; waits until there is enough."""
        megapixels = min(math.floor(pixels / 1_000_000), photo_module.MAX_PIXELS // 1_000_000)
        if megapixels:
            with self._turn:  # two processes that each hold a part would wait for each other
                for _ in range(megapixels):
                    self._megapixels.acquire()
        try:
            yield
        finally:
            for _ in range(megapixels):
                self._megapixels.release()


_memory: DecodingMemory | None = None


def start_encoding(memory: DecodingMemory) -> None:
    """Set this process up to encode photos within a memory that all such processes share."""
    global _memory
    _memory = memory
    warnings.simplefilter("ignore")  # about odd metadata in images that decode all the same


def _hold(pixels: int) -> AbstractContextManager[object]:
    return _memory.hold(pixels) if _memory else nullcontext()


def encode_listed(
    store: fs.SubTreeFileSystem, photo: Photo, image_size: int, follow_links: bool
) -> tuple[bytes, bytes] | str:
    """The photo as a catalogue holds it and its look, or the reason for leaving it out.

    Raises:
        UserError: its file can't be read, which says nothing about the photo.
    """
    pictures = list[np.ndarray]()

    def reduce(image: Image.Image) -> None:
        pictures.append(reduce_picture(image))

    try:
        data = _read(store, photo, follow_links)
    except RefusedPhotoError as refused:
        return str(refused)
    except OSError as error:
        raise UserError(
            f"{photo.path}: can't be read ({error.strerror or error}): make it readable, or leave it out by --without, "
            "then run the same command again"
        ) from error
    try:
        encoded = shrink(data, image_size, photo.box, _hold, reduce)
        return encoded, look_at(encoded, *pictures)
    except RefusedPhotoError as refused:
        return str(refused)
    except Exception as error:  # decoders fail on foreign bytes in every way there is
        return f"unreadable ({type(error).__name__})"


def _read(store: fs.SubTreeFileSystem, photo: Photo, follow_links: bool) -> bytes:
    if is_local(store) and not follow_links and leads_out(store.base_path, photo.file):
        raise RefusedPhotoError(LINK)
    if photo.part is None:
        return _read_bytes(store, photo.file)
    if stands_in_table(photo):
        group, row = photo.part
        image = _read_images(store, photo.file, group)[row]
        if image is not None:
            return image
    elif photo.part != NOWHERE:
        return _read_bytes(store, photo.file, *photo.part)
    raise RefusedPhotoError(NO_IMAGE)


def _read_bytes(store: fs.SubTreeFileSystem, file: str, offset: int = 0, size: int | None = None) -> bytes:
    if is_local(store):
        with open(store.base_path + file, "rb", buffering=0) as stream:  # noqa: PTH123  a Path costs as much as reading
            if (size or os.fstat(stream.fileno()).st_size) > MAX_FILE_BYTES:
                raise RefusedPhotoError(TOO_LONG_FILE)
            stream.seek(offset)
            return stream.read() if size is None else stream.read(size)
    with store.open_input_file(file) as stream:
        if (size or stream.size()) > MAX_FILE_BYTES:
            raise RefusedPhotoError(TOO_LONG_FILE)
        return stream.read_at(stream.size() - offset if size is None else size, offset)


_row_groups: dict[tuple[str, int], list[bytes | None]] = {}
"""The images of the row group that was read last."""


def _read_images(store: fs.SubTreeFileSystem, file: str, group: int) -> list[bytes | None]:
    key = (store.base_path + file, group)
    if key not in _row_groups:
        _row_groups.clear()
        _row_groups[key] = list(iterate_images(store, file, group))
    return _row_groups[key]


def leads_out(root: str, file: str) -> bool:
    """Whether this file is a link that leads out of the source `root`."""
    is_link = os.path.islink(root + file)  # noqa: PTH114
    return not _is_inside(file if is_link else file.rpartition("/")[0], root)


@lru_cache(maxsize=1 << 12)  # a folder is asked for with each of its images
def _is_inside(path: str, root: str) -> bool:
    return Path(root, path).resolve().is_relative_to(Path(root).resolve())


def encode_photo(path: str | Path, image_size: int) -> bytes:
    """The photo as `prepare` would put it into a catalogue.

    Raises:
        UserError: the file can't be read as an image.
    """
    data = Path(path).read_bytes()
    try:
        return shrink(data, image_size)
    except Exception as error:  # decoders fail on foreign bytes in every way there is
        reason = str(error) if isinstance(error, RefusedPhotoError) else type(error).__name__
        raise UserError(f"{path} can't be read as an image ({reason}): give a JPEG, PNG or WebP photo") from error
