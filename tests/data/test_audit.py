"""Copies in a catalogue: found whatever was done to them, and told apart from other photos."""

import io
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from clipfh import UserError
from clipfh.data import audit
from clipfh.data.audit import CopiedPhoto, CopyGroup
from clipfh.data.near_copies import find_near_copies, small_picture, thumbnails
from clipfh.data.prepare import prepare
from clipfh.data.splits import SPLITS
from clipfh.sources.listing import GALLERY_NOT_WANTED, NOT_WANTED


def photo(number: int, size=(150, 200)) -> Image.Image:
    """A picture of its own: coarse tiles, and finer ones on them."""
    rng = np.random.default_rng(number)
    coarse, fine = (Image.fromarray(rng.integers(0, 256, (n, n - 1, 3), dtype=np.uint8)) for n in (6, 11))
    return Image.blend(coarse.resize(size, Image.Resampling.BICUBIC), fine.resize(size, Image.Resampling.BICUBIC), 0.2)


def encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **{"format": "JPEG", "quality": 90, **options})
    return stream.getvalue()


def crop(image: Image.Image, left: float, top: float, share: float = 0.8) -> Image.Image:
    w, h = image.size
    return image.crop((int(left * w), int(top * h), int((left + share) * w), int((top + share) * h)))


CHANGES = {
    "mirrored": lambda image: encoded(ImageOps.mirror(image)),
    "cropped in the middle": lambda image: encoded(crop(image, 0.1, 0.1)),
    "cropped at a corner": lambda image: encoded(crop(image, 0.2, 0.0)),
    "encoded again": lambda image: encoded(image, quality=50),
    "half as large": lambda image: encoded(image.resize((image.width // 2, image.height // 2))),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.15)),
    "darker": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.85)),
    "framed": lambda image: encoded(ImageOps.expand(image, image.width // 10, "white")),
    "mirrored, cropped, of another shape": lambda image: encoded(
        crop(ImageOps.mirror(image), 0.05, 0.05, 0.9).resize((160, 160)), quality=60
    ),
}


def near(images: list[bytes]) -> set[tuple[int, int]]:
    pictures = np.stack([small_picture(image) for image in images])
    one, other, _ = find_near_copies(thumbnails(pictures), pictures.__getitem__)
    return set(zip(one.tolist(), other.tolist(), strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_near_copies_are_found_and_nothing_else(change):
    originals = [photo(number) for number in range(12)]
    copies = [CHANGES[change](original) for original in originals]
    assert near([encoded(original) for original in originals] + copies) == {(n, n + 12) for n in range(12)}


def test_photos_that_differ_in_one_part_are_no_copies():
    """Another print on the shirt, another colour of it, before the same wall."""
    image = photo(1)
    printed, dyed = image.copy(), image.copy()
    printed.paste(photo(2, (40, 40)), (55, 75))
    red, green, blue = image.crop((30, 40, 120, 160)).split()
    dyed.paste(Image.merge("RGB", (blue, red, green)), (30, 40))
    assert near([encoded(each) for each in (image, printed, dyed)]) == set()


def test_a_letter_or_an_emblem_tells_two_drawings_apart():
    """As with flags that differ in what is on their white: all else is equal to the pixel."""
    flag = Image.new("RGB", (160, 120), "white")
    for top, color in ((0, "#0048b0"), (80, "#0048b0")):
        flag.paste(color, (0, top, 160, top + 40))
    with_emblem = flag.copy()
    ImageDraw.Draw(with_emblem).ellipse((74, 54, 86, 66), fill="#307030")
    assert near([encoded(flag), encoded(with_emblem)]) == set()
    again = encoded(crop(with_emblem, 0.05, 0.05, 0.9), quality=60)
    assert near([encoded(flag), encoded(with_emblem), again]) == {(1, 2)}


def test_swatches_of_two_tones_are_no_copies_and_a_little_brighter_ones_are():
    def swatch(color: tuple[int, int, int]) -> bytes:
        image = Image.new("RGB", (80, 80), "white")
        ImageDraw.Draw(image).rounded_rectangle((8, 8, 72, 72), 8, color)
        return encoded(image)

    assert near([swatch((190, 140, 100)), swatch((151, 71, 7)), swatch((222, 197, 177))]) == set()
    assert near([swatch((190, 140, 100)), swatch((180, 123, 77))]) == {(0, 1)}


def test_a_plain_picture_is_a_near_copy_of_none():
    assert near([encoded(Image.new("RGB", (60, 80), color)) for color in ("white", "#fefefe", "black")]) == set()


def test_one_photo_has_no_near_copy():
    assert near([encoded(photo(0))]) == set() == near([encoded(photo(0)), encoded(photo(1))])


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12))))
def test_pairs_are_joined_as_by_following_them(pairs):
    groups = audit.join_pairs(pairs)
    for group in groups:
        reached, edge = {group[0]}, {group[0]}
        while edge:
            edge = {x for pair in pairs for x in pair if edge & set(pair)} - reached
            reached |= edge
        assert reached == set(group)
    assert sorted(member for group in groups for member in group) == sorted({x for pair in pairs for x in pair})


@given(st.lists(st.text(max_size=3)))
def test_codes_of_names_are_those_of_their_order(names):
    assert audit.name_codes(names).tolist() == [sorted(set(names)).index(name) for name in names]


def of(item: str, split: str, number: int = 0) -> CopiedPhoto:
    return CopiedPhoto(f"{item}/{number}.jpg", item, split)


def test_the_reach_of_a_copy_is_the_widest():
    assert CopyGroup("byte", [of("a", "train"), of("a", "train", 1)]).reach == "item"
    assert CopyGroup("byte", [of("a", "query"), of("b", "gallery")]).reach == "items"
    assert CopyGroup("near", [of("a", "train"), of("b", "val_query")]).reach == "splits"


def test_one_photo_of_each_picture_is_kept_and_none_of_a_placeholder():
    leak = CopyGroup("pixel", [of("a", "train"), of("b", "query")])
    joined = CopyGroup("near", [of("a", "train"), of("c", "train")])
    placeholder = CopyGroup("byte", [of(f"p{n}", "train") for n in range(audit.MANY_ITEMS)])
    colours = CopyGroup("near", [of(f"c{n}", "train") for n in range(audit.MANY_ITEMS)])
    left_out = audit.photos_to_leave_out([leak, joined, placeholder, colours], {})
    merely_alike = [f"c{n}/0.jpg" for n in range(1, audit.MANY_ITEMS)]
    assert sorted(left_out) == [
        *("a/0.jpg", "c/0.jpg", *merely_alike),
        *(f"p{n}/0.jpg" for n in range(audit.MANY_ITEMS)),
    ]
    other = CopyGroup("pixel", [of(f"q{n}", "train") for n in range(9)])
    notes = audit.describe_copies([leak, placeholder, colours, other])
    assert notes[0] == "2 pictures lie under 5 to 9 items each: placeholders?"


@pytest.mark.parametrize(
    ("others", "left_out"),
    [({}, ["q/0.jpg", "g/1.jpg"]), ({"query": 1}, ["q/0.jpg", "q/1.jpg"]), ({"gallery": 2}, ["g/0.jpg", "g/1.jpg"])],
)
def test_of_an_items_query_and_gallery_the_one_with_fewer_photos_is_kept(others, left_out):
    """Here both of its queries are copies of two of its gallery, beside photos that are none."""
    pairs = [[CopiedPhoto(f"{split[0]}/{n}.jpg", "a", split) for split in ("gallery", "query")] for n in range(2)]
    sizes = {("a", split): 2 + others.get(split, 0) for split in ("gallery", "query")}
    assert audit.photos_to_leave_out([CopyGroup("byte", pair) for pair in pairs], sizes) == left_out


@pytest.fixture
def source(tmp_path):
    """30 items of three photos, and among them: a placeholder, a byte copy, a pixel copy and a mirrored copy."""
    root = tmp_path / "source"
    for item in range(30):
        for view in range(3):
            file = root / f"sku{item:02}" / f"{view}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(photo(10 * item + view)))
    for item in range(8):
        (root / f"sku{item:02}" / "none.jpg").write_bytes(encoded(photo(999)))
    shutil.copy(root / "sku10/0.jpg", root / "sku10/0-large.jpg")
    data = (root / "sku11/0.jpg").read_bytes()
    (root / "sku12/borrowed.jpg").write_bytes(data[:2] + b"\xff\xfe\x00\x06note" + data[2:])
    (root / "sku14/mirrored.jpg").write_bytes(CHANGES["mirrored"](photo(130)))
    Image.open(root / "sku15/1.jpg").save(root / "sku15/1.png")
    return root


def test_prepare_says_what_its_photos_repeat(source, tmp_path, quick):
    made = prepare(source, tmp_path / "out")
    found = {(group.kind, tuple(sorted(photo.path for photo in group.photos))) for group in audit.read_copies(made)}
    assert found == {
        ("byte", tuple(f"sku{item:02}/none.jpg" for item in range(8))),
        ("byte", ("sku10/0-large.jpg", "sku10/0.jpg")),
        ("pixel", ("sku11/0.jpg", "sku12/borrowed.jpg")),
        ("pixel", ("sku15/1.jpg", "sku15/1.png")),
        ("near", ("sku13/0.jpg", "sku14/mirrored.jpg")),
    }
    assert "1 picture lies under 8 items: a placeholder?" in made.manifest["notes"]
    assert any(note.startswith("2 photos in 1 group are byte copies within an item") for note in made.manifest["notes"])
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".parquet", ".json"}, "nothing temporary is left"


def test_a_list_of_photos_is_left_out_and_the_splits_stay(source, tmp_path, quick):
    whole = prepare(source, tmp_path / "whole")
    file = tmp_path / "without.txt"
    without = audit.photos_to_leave_out(audit.read_copies(whole), audit.count_photos(whole))
    item = max(row["item_id"] for row in whole.rows("query").to_pylist())
    gallery = [row["path"] for row in whole.rows("gallery").to_pylist() if row["item_id"] == item]
    file.write_text("\n".join([*without, *gallery]) + "\n", encoding="utf-8-sig")  # as some editors save it
    made = prepare(source, tmp_path / "out", without=file, max_bad=0)
    assert made.manifest["left_out"]["reasons"] == {NOT_WANTED: 12 + len(gallery), GALLERY_NOT_WANTED: 1}
    assert audit.read_copies(made) == []
    split_of = [{row["path"]: row["split"] for s in ("train", "query", "gallery") for row in each.rows(s).to_pylist()}
                for each in (whole, made)]  # fmt: skip
    assert split_of[1].items() <= split_of[0].items()
    assert prepare(source, tmp_path / "out", without=file).manifest == made.manifest, "up to date"


@pytest.mark.parametrize(("content", "reason"), [("sku99/7.jpg\n", "none of its 1 paths"), (None, "can't be read")])
def test_a_list_that_means_nothing_here_is_refused(source, tmp_path, content, reason, quick):
    file = tmp_path / "without.txt"
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match=reason):
        prepare(source, tmp_path / "out", without=file)
    assert not (tmp_path / "out").exists()


def test_prepare_tells_how_far_the_comparison_is(source, tmp_path, quick):
    calls = list[tuple[int, int]]()
    made = prepare(source, tmp_path / "out", compare_progress=lambda *call: calls.append(call))
    total = sum(counts["images"] for counts in made.manifest["counts"].values())
    assert calls == sorted(calls) and calls[-1] == (total, total) and 0 < calls[0][0] < total


def test_the_looks_that_prepare_takes_are_those_of_its_shards(source, tmp_path, quick, monkeypatch):
    """Also of photos that are shrunk, turned or laid on white; none is decoded a second time."""
    Image.open(source / "sku20/0.jpg").resize((400, 300)).save(source / "sku20/large.png")
    looks_of, spied = list[np.ndarray](), audit.find_copies

    def spy(shards, progress, looks):
        monkeypatch.setattr(audit, "_batches", None)
        groups = spied(shards, progress, looks)
        monkeypatch.undo()
        looks_of.extend(looks.read(looks.starts[audit._name(shard)], audit._num_rows(shard)) for shard in shards)
        return groups

    monkeypatch.setattr("clipfh.data.prepare.find_copies", spy)
    made = prepare(source, tmp_path / "out")
    shards = [path for split in SPLITS for path in made.shards(split)]
    encoded = [image for split in SPLITS for image in made.images(split)["image"].to_pylist()]
    assert b"".join(each.tobytes() for each in looks_of) == b"".join(map(audit.look_at, encoded))
    assert audit.find_copies(shards) == audit.read_copies(made)
