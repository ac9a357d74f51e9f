"""A catalogue that is whole or not there, with the photos that can be read."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shop import CUT, SHOP, SameProcess, bad_source, colored, draw, rows_of, saved, shop, table

from clipfh import UserError
from clipfh.data import catalogue, encode, photo
from clipfh.data import prepare as prepare_module
from clipfh.data.catalogue import open_catalogue
from clipfh.data.prepare import prepare
from clipfh.data.splits import SPLITS
from clipfh.sources import listing
from clipfh.sources import read as read_module
from clipfh.sources.read import read_source


def test_rows_are_those_of_the_source(tmp_path, quick):
    source = shop(tmp_path / "source")
    made = prepare(source, tmp_path / "out")
    said = {photo.path: photo._asdict() for photo in read_source(source).photos}
    assert sorted(said) == sorted(row["path"] for row in rows_of(made))
    for split in SPLITS:
        for row in rows_of(made, split):
            assert row == {name: said[row["path"]][name] for name in catalogue.COLUMNS} | {"split": split}
    counts = {split: (made.num_images(split), made.num_items(split)) for split in SPLITS}
    assert counts["query"] == (2, 2)
    assert counts["gallery"] == (4, 2)
    assert sum(counts[split][1] for split in ("train", "val_query")) == 10
    assert counts["val_query"][1] == counts["val_gallery"][1] == 2, "a fifth of ten items"
    assert prepare(source.as_uri(), tmp_path / "uri").manifest["hash"] == made.manifest["hash"]


def test_oddities_are_noted(tmp_path, quick):
    notes = prepare(shop(tmp_path / "source"), tmp_path / "out").manifest["notes"]
    assert notes == [
        "1 train items have one image: terms that need a positive leave them out",
        "1 items lie in several categories",
        "2 items have several variants but one color",
        "10 items have no text: their prompts name what else is known of them",
    ]
    listed = [*SHOP, SHOP[0]]
    assert prepare(shop(tmp_path / "twice", listed), tmp_path / "out2").manifest["notes"] == [
        "1 rows repeat another one and were dropped",
        *notes,
    ], "those of the source come first"


def test_train_is_grouped_by_item_and_never_cut_within_one(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_IMAGES", 5)
    made = prepare(shop(tmp_path / "source"), tmp_path / "out")
    shards = [pq.ParquetFile(path).read(["item_id"])["item_id"].to_pylist() for path in made.shards("train")]
    assert len(shards) > 2
    assert all(len(items) <= 5 for items in shards)
    assert sum(len(set(items)) for items in shards) == made.num_items("train"), "an item is in one shard only"
    assert rows_of(made, "train") == made.images("train").drop("image").to_pylist()


def test_images_are_shrunk_turned_or_kept_as_they_are(tmp_path, quick):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "small.jpg": draw(tmp_path / "a/small.jpg", (40, 30), 1),
        "small.png": draw(tmp_path / "a/small.png", (30, 90), 2),
        "large.jpg": draw(tmp_path / "a/large.jpg", (400, 301), 3, quality=95),
        "large.png": draw(tmp_path / "b/large.png", (31, 50), 4),
        "turned.jpg": draw(tmp_path / "b/turned.jpg", (40, 26), 5, exif=turned, quality=95),
        "turned-large.jpg": draw(tmp_path / "b/turned-large.jpg", (400, 301), 6, exif=turned, quality=95),
    }
    Image.open(files["large.png"]).convert("P").save(files["large.png"])
    listed = [(path.relative_to(tmp_path), path.parent.name, "train") for path in files.values()]
    listed += [(draw(tmp_path / f"t/{split}.jpg").relative_to(tmp_path), "t", split) for split in ("query", "gallery")]
    made = prepare(table(tmp_path / "all.csv", listed), tmp_path / "out", image_size=30)
    images = {row["view"] + Path(row["path"]).suffix: row["image"] for row in made.images("train").to_pylist()}
    assert images["small.jpg"] == files["small.jpg"].read_bytes()
    assert images["small.png"] == files["small.png"].read_bytes()
    sizes = {"large.jpg": (40, 30), "large.png": (30, 48), "turned.jpg": (26, 40), "turned-large.jpg": (30, 40)}
    for name, size in sizes.items():
        stored, original = Image.open(io.BytesIO(images[name])), Image.open(files[name])
        upright = original.transpose(Image.Transpose.ROTATE_270) if "turned" in name else original
        plain = upright.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        assert (stored.format, stored.size, stored.getexif().get(0x0112)) == ("JPEG", size, None)
        assert np.abs(np.asarray(stored, float) - np.asarray(plain, float)).mean() < 12, name


def test_without_splits_items_are_drawn_for_test_and_validation(tmp_path, quick):
    for item in range(20):
        for view in range(4):
            draw(tmp_path / f"s/shoes/boot {item:02d}/view{view}.JPG", number=item)
    made = prepare(tmp_path / "s", tmp_path / "out")
    assert {split: made.num_images(split) for split in SPLITS} == {
        "train": 60, "val_gallery": 6, "val_query": 6, "gallery": 4, "query": 4
    }  # fmt: skip


def test_given_validation_and_test_items_are_halved(tmp_path, quick):
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    listed = [(f"{item}-{view}.jpg", item, split) for item, split in enumerate(splits) for view in range(4)]
    for number, (path, *_) in enumerate(listed):
        draw(tmp_path / path, number=number)
    made = prepare(table(tmp_path / "l.csv", listed), tmp_path / "out")
    assert {split: made.num_images(split) for split in SPLITS} == {
        "train": 16, "val_gallery": 4, "val_query": 4, "gallery": 4, "query": 4
    }  # fmt: skip
    assert {row["item_id"] for row in rows_of(made, "val_query")} == {"4", "5"}


def test_bad_images_are_left_out_listed_and_limited(tmp_path):
    source, bad = bad_source(tmp_path / "source")
    made = prepare(source, tmp_path / "out", max_bad=0.5, image_size=40)
    left_out = made.manifest["left_out"]
    assert left_out["count"] == 7
    assert dict(left_out["list"]) == {
        "good/cut.jpg": "unreadable (OSError)",
        "good/text.jpg": "unreadable (UnidentifiedImageError)",
        "good/link.jpg": listing.LINK,
        "good/huge.png": photo.TOO_LARGE,
        "good/gone.jpg": listing.MISSING,
        "../outside.jpg": listing.OUTSIDE,
        bad[-1]: listing.OUTSIDE,
    }
    assert left_out["reasons"][listing.OUTSIDE] == 2
    assert not {row["path"] for row in rows_of(made)} & set(bad)

    with pytest.raises(UserError, match=r"7 of 31 images .*--max-bad 0.15; first good/gone.jpg \(missing\), "):
        prepare(source, tmp_path / "strict", max_bad=0.15, image_size=40)
    assert not (tmp_path / "strict").exists()
    with pytest.raises(UserError, match="--max-bad 0.15"):
        prepare(source, tmp_path / "out", max_bad=0.15, image_size=40)  # up to date, and still too bad


def png_of(width, height):
    """The beginning of a PNG that claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 64)]
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


LEFT_OUT = {
    "empty": lambda size, n: b"",
    "zeros": lambda size, n: bytes(100 + n),
    "text": lambda size, n: b"not an image " * (n + 1),
    "a web page": lambda size, n: b"<!DOCTYPE html><html>Not found</html>",
    "SVG": lambda size, n: b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"></svg>',
    "cut": lambda size, n: (whole := saved(colored(size, n), CUT[n % 7]))[: len(whole) * (n + 1) // 12],
    "only a header": lambda size, n: saved(colored(size, n), CUT[n % 7])[: 4 + n],
    "a bomb": lambda size, n: png_of(20_000 + n, 20_000),
    "a hole in it": lambda size, n: png_of(*size),
    "floats": lambda size, n: saved(Image.new("F", size), "TIFF"),
    "32 bit": lambda size, n: saved(Image.new("I", size), "TIFF"),
    "another format": lambda size, n: saved(colored(size), "PPM"),
    "turned inside out": lambda size, n: saved(colored(size, n))[::-1],
}


def damaged(root):
    """More than a hundred damaged images of twenty kinds, beside good ones: a source, and the paths of the damaged."""
    sizes = [(40, 30), (30, 64), (400, 300)] * 3
    files = {f"{kind}/{n}.jpg": make(size, n) for kind, make in LEFT_OUT.items() for n, size in enumerate(sizes)}
    good = [(f"good/{n}.jpg", f"item{n // 4}", "train" if n < 40 else "test") for n in range(48)]
    files |= {path: saved(colored((40, 30), n)) for n, (path, *_) in enumerate(good)}
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (root / "folder.jpg").mkdir()
    (root / "dangling.jpg").symlink_to("gone")
    (root / "circle.jpg").symlink_to("circle.jpg")
    (root / "outside.jpg").symlink_to("/etc/hostname")
    (root / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.jpg")
    others = [
        "folder.jpg",
        "dangling.jpg",
        "circle.jpg",
        "outside.jpg",
        "device.jpg",
        "pipe.jpg",
        "gone.jpg",
        "../up.jpg",
    ]
    bad = [path for path in files if not path.startswith("good")] + others
    return table(root / "list.csv", good + [(path, "item0", "train") for path in bad]), bad


@pytest.mark.filterwarnings("ignore")
def test_more_than_a_hundred_damaged_images_are_left_out_with_a_reason(tmp_path, quick, capfd):
    source, bad = damaged(tmp_path / "source")
    made = prepare(source, tmp_path / "out", max_bad=0.9, image_size=30)
    left_out = dict(made.manifest["left_out"]["list"])
    assert len(bad) > 100 and sorted(left_out) == sorted(bad)
    known = {listing.LINK, photo.TOO_LARGE, photo.NO_RANGE, listing.MISSING, listing.OUTSIDE}
    assert all(why in known or re.fullmatch(r"unreadable \(\w+\)", why) for why in left_out.values())
    assert sum(made.num_images(split) for split in SPLITS) == 48
    assert capfd.readouterr().err == "", "decoders don't talk"
    with pytest.raises(UserError, match="more than --max-bad 0.01; first .*: fix them or raise") as caught:
        prepare(source, tmp_path / "strict", image_size=30)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), UserError("s3://shop refuses (EXPIRED): check the credentials")]
)
def test_a_photo_that_can_not_be_read_stops_the_work_and_is_taken_once_it_can(tmp_path, quick, monkeypatch, error):
    source, read = shop(tmp_path / "source"), encode._read_bytes

    def fail(store, file, *part):
        if file == SHOP[3][0]:
            raise error
        return read(store, file, *part)

    said = f"^s3://shop refuses|^{SHOP[3][0]}: can't be read .Permission denied.: make it"
    with monkeypatch.context() as failing, pytest.raises(UserError, match=said):
        failing.setattr(encode, "_read_bytes", fail)
        prepare(source, tmp_path / "out", max_bad=0.5)
    assert prepare(source, tmp_path / "out").manifest["left_out"]["count"] == 0


@pytest.mark.parametrize("is_finished", [False, True])
def test_heic_by_another_name_is_taken_once_it_can_be_read(tmp_path, quick, monkeypatch, is_finished):
    import pillow_heif

    source, out = shop(tmp_path / "source"), tmp_path / "out"
    pillow_heif.from_pillow(colored((40, 30))).save(source.parent / SHOP[3][0])
    with monkeypatch.context() as without_heif:
        without_heif.setitem(sys.modules, "pillow_heif", None)
        without_heif.setattr("importlib.util.find_spec", lambda name: None)
        made = prepare(source, out)
        assert made.manifest["left_out"]["reasons"] == {listing.NEEDS_HEIF: 1} and prepare(source, out) == made
    if is_finished:
        with pytest.raises(UserError, match="was made without pillow-heif and lacks HEIC photos: delete it"):
            prepare(source, out)
        return
    (out / "plan.json").write_text(json.dumps({"plan": made.manifest["plan"]}))
    out.rename(tmp_path / "out.partial")
    assert prepare(source, out).manifest["left_out"]["count"] == 0


def test_queries_need_a_gallery_image_that_is_left(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_IMAGES", 1)  # so that nothing is left of some shards
    listed = [(f"{i}.jpg", f"item{i // 2}", "train") for i in range(10)]
    listed += [(f"{i}.jpg", f"test{i // 2}", ("query", "gallery")[i % 2]) for i in range(10, 16)]
    for number, (path, *_) in enumerate(listed):
        draw(tmp_path / path, number=number)
    (tmp_path / "11.jpg").write_bytes(b"")
    draw(tmp_path / "16.jpg", number=16)
    listed.append(("16.jpg", "lonely", "query"))
    made = prepare(table(tmp_path / "l.csv", listed), tmp_path / "out", max_bad=0.2)
    assert {row["item_id"] for row in rows_of(made, "query")} == {"test6", "test7"}
    whys = {path: why for path, why in made.manifest["left_out"]["list"] if path != "11.jpg"}
    assert whys == {"10.jpg": prepare_module.NO_GALLERY, "16.jpg": prepare_module.NO_GALLERY}


def test_the_number_of_processes_does_not_matter(tmp_path, monkeypatch):
    source, _ = bad_source(tmp_path / "source")
    monkeypatch.setattr(prepare_module, "SHARD_IMAGES", 4)
    hashes, seen = [], []
    for cores in ({0}, {0, 1, 2}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        made = prepare(source, tmp_path / f"{cores}", max_bad=0.5, image_size=40, progress=lambda *at: seen.append(at))
        hashes.append(made.manifest["hash"])
        assert seen[-1] == (31, 31)
    assert hashes[0] == hashes[1]
    assert all(done == sorted(done) for done in (seen[: len(seen) // 2], seen[len(seen) // 2 :])), "it only grows"


def test_kept_where_up_to_date_and_never_overwritten(tmp_path, quick):
    source = shop(tmp_path / "source")
    first = prepare(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(source, tmp_path / "out") == first == open_catalogue(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="another source or settings"):
        prepare(source, tmp_path / "out", seed=1)
    draw(source.parent / SHOP[0][0], number=999)
    with pytest.raises(UserError, match="another source or settings"):
        prepare(source, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    for out in (tmp_path / "mine", tmp_path / "mine/thesis.txt"):
        with pytest.raises(UserError, match="no whole catalogue"):
            prepare(source, out)
    (tmp_path / "mine").rename(tmp_path / "next.partial")
    with pytest.raises(UserError, match="holds something else"):
        prepare(source, tmp_path / "next")
    assert (tmp_path / "next.partial/thesis.txt").exists()


def test_the_order_in_which_a_folder_is_listed_does_not_matter(tmp_path, quick, monkeypatch):
    for item in range(20):
        for view in range(4):
            draw(tmp_path / f"s/boots/{item}/{view}.jpg", number=item)
    made = prepare(tmp_path / "s", tmp_path / "out")

    def read_backwards(*how):
        listing = read_source(*how)
        return replace(listing, photos=listing.photos[::-1])

    monkeypatch.setattr(read_module, "read_source", read_backwards)
    assert prepare(tmp_path / "s", tmp_path / "out") == made
    assert prepare(tmp_path / "s", tmp_path / "again").manifest["hash"] == made.manifest["hash"]


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([("a.jpg", "i", "train"), ("a.jpg", "j", "")], "a.jpg: has no split"),
        ([("a.jpg", "i", "train"), ("a.jpg", "i", "query")], "item i is in test and train"),
        (
            [("a.jpg", "i", "train"), ("a.jpg", "j", "query"), ("a.jpg", "j", "gallery")],
            "photo a.jpg is in test and train .1 photos are in two.",
        ),
        ([("gone.jpg", "i", "train")], "1 images are listed, none is there"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_line(tmp_path, listed, said):
    draw(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=said) as caught:
        prepare(table(tmp_path / "s.csv", listed), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.jpg", "s.csv"]


def test_a_full_disk_is_named_and_leaves_work_to_go_on_with(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_IMAGES", 5)
    source = shop(tmp_path / "source")
    whole = prepare(source, tmp_path / "whole")
    second = "train-00001.parquet"

    class FullDisk(SameProcess):
        def submit(self, function, *args):
            if second in args:
                args[0].local_path(f"{second}.new").symlink_to("/dev/full")
            return super().submit(function, *args)

    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", FullDisk)
    with pytest.raises(UserError, match=r"out.partial: can't be written \(.*No space left on device"):
        prepare(source, tmp_path / "out")
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", SameProcess)
    assert [path.name for path in sorted((tmp_path / "out.partial").iterdir())] == ["plan.json", "train-00000.parquet"]
    with pytest.raises(UserError, match="half-written"):
        open_catalogue(tmp_path / "out")
    steps = []
    made = prepare(source, tmp_path / "out", progress=lambda done, total: steps.append(done))
    assert made.manifest["hash"] == whole.manifest["hash"]
    assert steps[1] == 5, "the finished shard was not encoded again"


def test_a_partial_of_other_settings_is_cleared(tmp_path, quick):
    source = shop(tmp_path / "source")
    prepare(source, tmp_path / "out", seed=1)
    (tmp_path / "out/plan.json").write_text("{}")
    (tmp_path / "out").rename(tmp_path / "out.partial")
    made = prepare(source, tmp_path / "out")
    assert made.manifest["hash"] == prepare(source, tmp_path / "fresh").manifest["hash"]


PREPARE_SLOWLY = """# a script without a main guard
import sys
from clipfh.data import prepare
prepare.SHARD_IMAGES = 8
prepare.prepare(sys.argv[1], sys.argv[2], max_bad=0.1, progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.resilience
def test_killed_in_the_middle_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_IMAGES", 8)
    listed = [(f"{i}.jpg", f"item{i // 4}", "train" if i < 64 else "test") for i in range(80)]
    for number, (path, *_) in enumerate(listed):
        draw(tmp_path / path, (2000, 1500), number)
    (tmp_path / "0.jpg").write_bytes(b"cut")
    source, out = table(tmp_path / "l.csv", listed), tmp_path / "out"
    (tmp_path / "script.py").write_text(PREPARE_SLOWLY)
    script = [sys.executable, tmp_path / "script.py", source, out]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < 24:
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(UserError, match="half-written"):
        open_catalogue(out)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.parquet")}
    assert 2 < len(kept) < 10
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.05)

    made = prepare(source, out, max_bad=0.1)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".parquet") == [
        "audit.json",
        "catalogue.json",
    ]
    assert not (tmp_path / "out.partial").exists()
    at_once = prepare(source, tmp_path / "at once", max_bad=0.1)
    assert at_once.manifest["left_out"]["count"] == 1
    for fact in ("hash", "counts", "left_out", "shards"):
        assert made.manifest[fact] == at_once.manifest[fact]


@pytest.mark.resilience
def test_a_killed_worker_is_said(tmp_path, monkeypatch):
    source, _ = bad_source(tmp_path / "source")
    monkeypatch.setattr(prepare_module, "SHARD_IMAGES", 3)

    def kill(done, total):
        for worker in active_children():
            worker.kill()

    with pytest.raises(UserError, match="a process that reads images was killed"):
        prepare(source, tmp_path / "out", max_bad=0.5, progress=kill)
