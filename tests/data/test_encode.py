"""Images as they should be: one picture of eight bits, shrunk, and cut ones found."""

import io
import multiprocessing
import warnings
from contextlib import contextmanager
from itertools import product
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from shop import CUT, colored, draw, saved

from clipfh.data import photo
from clipfh.data.encode import DecodingMemory, encode_photo
from clipfh.data.photo import shrink

GRAY16 = Image.fromarray(np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16))


FRAMES = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]


# Kind -> the bytes of a file of that kind, for a size and a number
TAKEN = {
    "an ordinary one": lambda size, n: saved(colored(size, n)),
    "progressive": lambda size, n: saved(colored(size, n), progressive=True),
    "gray": lambda size, n: saved(colored(size, n).convert("L")),
    "CMYK": lambda size, n: saved(colored(size, n).convert("CMYK")),
    "palette": lambda size, n: saved(colored(size, n).convert("P"), "PNG"),
    "1 bit": lambda size, n: saved(colored(size, n).convert("1"), "PNG"),
    "16 bit": lambda size, n: saved(GRAY16.resize(size, 0), "PNG"),
    "16 bit TIFF": lambda size, n: saved(GRAY16.resize(size, 0), "TIFF"),
    "16 bit TIFF of another order of bytes": lambda size, n: saved(
        Image.frombytes("I;16B", size, np.asarray(GRAY16.resize(size, 0)).astype(">u2").tobytes()), "TIFF"
    ),
    "transparent": lambda size, n: saved(Image.new("RGBA", size, (0, 0, 0, 0)), "PNG"),
    "gray and transparent": lambda size, n: saved(Image.new("LA", size, (0, 0)), "WEBP"),
    "animated GIF": lambda size, n: saved(FRAMES[0].resize(size), "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated WebP": lambda size, n: saved(
        FRAMES[0].resize(size), "WEBP", save_all=True, append_images=[colored(size)]
    ),
    "several pictures": lambda size, n: saved(colored(size), "MPO", save_all=True, append_images=[colored(size, 1)]),
    "wrong suffix": lambda size, n: saved(colored(size, n), CUT[1 + n % 6]),
    "something behind": lambda size, n: saved(colored(size, n)) + b"trailer" * n,
    "odd metadata": lambda size, n: saved(colored(size, n), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(n)),
    "a long one": lambda size, n: saved(colored((8, 780 + n)), "PNG"),
    "one pixel": lambda size, n: saved(colored((1, 1))),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_odd_images_are_taken_as_one_picture_of_eight_bits(kind):
    for number, (size, image_size) in enumerate(product([(40, 30), (30, 64), (400, 300)], [30, 256])):
        data = TAKEN[kind](size, number)
        with warnings.catch_warnings(action="ignore"):
            kept = shrink(data, image_size)
            image = Image.open(io.BytesIO(kept))
            first = Image.open(io.BytesIO(data))
            expected = np.asarray(first.convert("RGB").resize(image.size), float)
        assert min(image.size) <= image_size or kept == data and image.size == first.size
        assert image.mode in ("RGB", "L", "CMYK", "P", "1") and getattr(image, "n_frames", 1) == 1
        seen = np.asarray(image.convert("RGB"), float)
        if "16" in kind:
            assert abs(seen.mean() - 127) < 3, "scaled, not cut off"
        elif "transparent" in kind:
            assert seen.min() > 250, "on white"
        else:
            assert np.abs(seen - expected).mean() < 12


@pytest.mark.parametrize("more", [{}, {"format": "MPO", "save_all": True, "append_images": [Image.new("L", (9, 9))]}])
def test_a_phones_108_megapixels_are_read(tmp_path, more):
    """Alone, or with a second picture behind, such as the map of its bright parts."""
    Image.new("L", (12_000, 9_000), 127).save(tmp_path / "phone.jpg", quality=20, **more)
    assert Image.open(io.BytesIO(encode_photo(tmp_path / "phone.jpg", 256))).size == (341, 256)


@pytest.mark.parametrize(
    ("size", "options", "megapixels"),
    [
        ((2000, 1500), {"format": "PNG"}, 3),
        ((900, 900), {"format": "PNG"}, 0),
        ((200, 15_000), {"format": "PNG"}, 3),  # no larger than is kept, but long
        ((2000, 1500), {"format": "JPEG"}, 0),  # decodes at an eighth
        ((2000, 1500), {"format": "JPEG", "progressive": True}, 3),
    ],
)
def test_large_images_share_the_memory_of_one(size, options, megapixels):
    held = []

    @contextmanager
    def memory(pixels):
        held.append(pixels // 1_000_000)
        yield

    shrink(saved(Image.new("RGB", size), options.pop("format"), **options), 250, memory=memory)
    assert held == [megapixels]


def test_no_more_is_decoded_at_a_time_in_all_processes_than_the_largest_image():
    memory, most = DecodingMemory(multiprocessing), photo.MAX_PIXELS
    in_use, peaks = [0], []

    def decode(pixels):
        with memory.hold(pixels):
            in_use[0] += pixels
            peaks.append(in_use[0])
            in_use[0] -= pixels

    sizes = [most, most // 3, most // 2, 10, most // 4] * 8
    threads = [Thread(target=decode, args=(pixels,)) for pixels in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(peaks) == len(sizes) and max(peaks) <= most + 1_000_000 * len(sizes)
    with memory.hold(most):
        assert not memory._megapixels.acquire(block=False), "the largest holds all of it"


def test_a_truncated_jpeg_is_found_wherever_it_ends(tmp_path):
    whole = draw(tmp_path / "a.jpg", (200, 150), quality=90).read_bytes()
    progressive = draw(tmp_path / "b.jpg", (200, 150), quality=90, progressive=True).read_bytes()
    for data in (whole, progressive):
        for size in (400, 100):
            assert shrink(data, size)
            for end in range(2, len(data) - 2, 97):
                with pytest.raises(OSError, match="truncated|cannot identify|broken|Truncated"):
                    shrink(data[:end], size)
