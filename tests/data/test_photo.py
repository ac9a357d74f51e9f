"""A photo file as one upright picture: boxes, HEIC, colour profiles, and files that would cost too much."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from shop import colored, saved

from clipfh.data import photo
from clipfh.data.photo import RefusedPhotoError, read_photo, shrink


def opened(data):
    return Image.open(io.BytesIO(data))


def pixels(image):
    return np.asarray(image.convert("RGB"), float)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(40, 30), (400, 300)])
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_every_orientation_is_turned_upright(orientation, size, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(colored(size), form, exif=exif, quality=95)
    image, upright = opened(shrink(data, 100)), ImageOps.exif_transpose(opened(data))
    assert image.getexif().get(0x0112, 1) == 1
    assert (image.width < image.height) == (upright.width < upright.height)
    assert np.abs(pixels(image) - pixels(upright.resize(image.size))).mean() < 6


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
@pytest.mark.parametrize("box", [(100, 50, 200, 100), (-10, -10, 110, 60), (380, 250, 900, 900), (0, 0, 400, 300)])
def test_a_box_is_cut_out_before_all_else(form, options, box):
    picture = colored((400, 300))
    left, top = max(box[0], 0), max(box[1], 0)
    part = picture.crop((left, top, min(box[0] + box[2], 400), min(box[1] + box[3], 300)))
    cut = opened(shrink(saved(picture, form, **options), 40, box))
    assert min(cut.size) == min(40, *part.size)
    assert np.abs(pixels(cut) - pixels(part.resize(cut.size, Image.Resampling.BICUBIC))).mean() < 4


def test_a_box_outside_of_the_image_is_refused():
    with pytest.raises(RefusedPhotoError, match="its box is outside of the image"):
        shrink(saved(colored((40, 30))), 100, (40, 0, 5, 5))


def test_heic_and_avif_are_read(monkeypatch, tmp_path):
    import pillow_heif

    picture = colored((60, 80))
    heic = io.BytesIO()
    pillow_heif.from_pillow(picture).save(heic, quality=95)
    for data in (heic.getvalue(), saved(picture, "AVIF", quality=95)):
        assert np.abs(pixels(opened(shrink(data, 100))) - pixels(picture)).mean() < 4
    assert opened(shrink(heic.getvalue(), 100)).format == "JPEG"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(RefusedPhotoError, match="HEIC photo: pip install pillow-heif reads it"):
        shrink(heic.getvalue(), 100)


def wide_gamut_profile():
    """Profile of RGB with red and green exchanged: no eye would mistake it for sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = [struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i]) for i in range(profile[131])]
    place = {tag: 132 + 12 * i for i, (tag, *_) in enumerate(entries)}
    red, green = (bytes(profile[place[tag] + 4 : place[tag] + 12]) for tag in (b"rXYZ", b"gXYZ"))
    profile[place[b"rXYZ"] + 4 : place[b"rXYZ"] + 12] = green
    profile[place[b"gXYZ"] + 4 : place[b"gXYZ"] + 12] = red
    return bytes(profile)


@pytest.mark.parametrize("image_size", [20, 100])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colour_profiles_are_converted_to_srgb(image_size, form):
    data = saved(Image.new("RGB", (40, 30), (200, 40, 40)), form, icc_profile=wide_gamut_profile())
    seen = pixels(opened(shrink(data, image_size))).mean((0, 1))
    assert np.abs(seen - (40, 200, 40)).max() < 12, "red and green are exchanged"
    assert "icc_profile" not in opened(shrink(data, image_size)).info


def test_a_profile_that_changes_nothing_or_is_broken_leaves_the_bytes_alone():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", wide_gamut_profile()[:200]):
        data = saved(colored((40, 30)), icc_profile=profile)
        assert shrink(data, 100) == data


def test_what_lies_on_white_does_so_with_its_edges():
    """Shrunk and laid on white is laid on white and shrunk: the black under transparent parts does not show."""
    alpha = Image.fromarray((np.indices((400, 300)).sum(0) % 97 < 50).astype(np.uint8) * 255)
    cut = colored((300, 400))
    cut.putalpha(alpha)
    black = np.array(cut)
    black[black[..., 3] == 0, :3] = 0
    on_white = Image.alpha_composite(Image.new("RGBA", cut.size, "white"), cut).convert("RGB")
    seen = pixels(opened(shrink(saved(Image.fromarray(black), "PNG"), 60)))
    expected = opened(saved(on_white.resize((60, 80), Image.Resampling.BICUBIC), quality=photo.QUALITY))
    assert np.abs(seen - pixels(expected)).mean() < 3


def test_a_photo_is_read_as_prepare_does(tmp_path):
    picture = colored((300, 400))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = read_photo(tmp_path / "turned.jpg", 100)
    assert (image.mode, image.size) == ("RGB", (100, 133))
    assert np.abs(pixels(image) - pixels(picture.resize((100, 133), Image.Resampling.BICUBIC))).mean() < 4


# Files that would cost too much


def flat_png(width, height, mode=2):
    """A PNG of one colour of this size, whole, of some kilobytes."""
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[mode])
    packer, body = zlib.compressobj(9), b""
    for _ in range(height):
        body += packer.compress(row)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)]
    chunks += [b"IDAT" + body + packer.flush(), b"IEND"]
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("size", [(1, 90_000), (90_000, 1), (3, 3000)])
def test_a_photo_that_a_model_would_enlarge_beyond_memory_is_refused(size):
    with pytest.raises(RefusedPhotoError, match="more than 100 times as long as wide"):
        shrink(flat_png(*size), 256)


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "TIFF", "progressive"])
def test_more_pixels_than_memory_has_room_for_are_refused_before_they_are_decoded(form, monkeypatch):
    monkeypatch.setattr(photo, "MAX_PIXELS", 500_000)
    options = {"format": "JPEG", "progressive": True} if form == "progressive" else {"format": form}
    data = saved(Image.new("RGB", (1000, 501)), options.pop("format"), **options)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RefusedPhotoError, match="more than 100,000,000 pixels"):
        shrink(data, 100)


PEAK = """
import sys
from pathlib import Path
from clipfh.data.photo import shrink
shrink(Path(sys.argv[1]).read_bytes(), 256)
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0, 2, 6])
def test_the_largest_photo_of_some_kilobytes_takes_less_than_a_gigabyte(mode, tmp_path):
    (tmp_path / "flat.png").write_bytes(flat_png(10_000, 10_000, mode))
    assert (tmp_path / "flat.png").stat().st_size < 1_000_000
    command = [sys.executable, "-c", PEAK, str(tmp_path / "flat.png")]
    peak = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(photo.__file__).parents[2])
    assert int(peak.stdout) < 1_000_000, "KiB"
