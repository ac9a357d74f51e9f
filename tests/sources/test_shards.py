"""From sources to catalogues: images inside Parquet and tar files, links, boxes of In-Shop, what is left out."""

import io
import json
import os
import random
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shop import colored, rows_of, saved

from clipfh import UserError
from clipfh.data import encode
from clipfh.data.prepare import prepare
from clipfh.sources import parquet_tables
from clipfh.sources.listing import LINK
from clipfh.sources.read import read_source
from clipfh.sources.tar_shards import NO_IMAGE

PHOTOS = {f"sku{item}/{view}.jpg": saved(colored((40, 30), 4 * item + view)) for item in range(8) for view in range(4)}


def items(catalogue):
    """Item to the images that the catalogue holds of it."""
    found = {}
    for split in catalogue.manifest["shards"]:
        for row in catalogue.images(split).to_pylist():
            found.setdefault(row["item_id"], set()).add(row["image"])
    return found


def expected(name="sku{}".format):
    return {name(i): {data for path, data in PHOTOS.items() if path.startswith(f"sku{i}/")} for i in range(8)}


def hub_table(paths, **columns):
    images = pa.array([{"bytes": PHOTOS[path], "path": path.rpartition("/")[2]} for path in paths])
    return pa.table({"image": images, **columns})


@pytest.mark.parametrize("about", [{}, {"info": {"features": None}}])
def test_parquet_with_the_images_inside_is_read(tmp_path, quick, about):
    table = hub_table(PHOTOS, item_id=[path.partition("/")[0] for path in PHOTOS], text=["A hat."] * len(PHOTOS))
    table = table.add_column(0, "Image", pa.array([f"https://shop.example/{path}" for path in PHOTOS]))
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, tmp_path / "shop.parquet", row_group_size=5)
    catalogue = prepare(tmp_path / "shop.parquet", tmp_path / "out")
    assert items(catalogue) == expected()
    assert len({row["path"] for row in rows_of(catalogue)}) == len(PHOTOS), "names that repeat are told apart"
    assert {row["text"] for row in rows_of(catalogue)} == {"A hat."}


AS_COLUMNS = {
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
    "binary view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
    "numbers": pa.list_(pa.uint8()),
}


@pytest.mark.parametrize("kind", AS_COLUMNS)
def test_a_column_of_bytes_in_any_form_has_the_images(tmp_path, quick, kind):
    data = [list(each) if kind == "numbers" else each for each in PHOTOS.values()]
    images = (
        pa.array(data, pa.binary()).dictionary_encode() if kind == "dictionary" else pa.array(data, AS_COLUMNS[kind])
    )
    pq.write_table(pa.table({"image": images, "item_id": [path[:4] for path in PHOTOS]}), tmp_path / "shop.parquet")
    assert items(prepare(tmp_path / "shop.parquet", tmp_path / "out")) == expected()


@pytest.mark.parametrize("images", [["aGF0"], [["hat"]], [[b"hat"]]])
def test_a_column_image_that_holds_no_bytes_is_named_as_the_cause(tmp_path, images):
    pq.write_table(pa.table({"image": images, "item_id": ["hat"]}), tmp_path / "shop.parquet")
    with pytest.raises(UserError, match="column image holds .*: store the bytes of the files in it, as binary or as"):
        read_source(tmp_path / "shop.parquet")


def test_a_folder_of_shards_of_a_hub_has_its_splits_and_the_names_of_its_labels(tmp_path, quick):
    names = [f"boot {i}" for i in range(8)]
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
    shards = {
        "data/train-00000-of-00002": (0, 3),
        "data/train-00001-of-00002": (3, 6),
        "data/test-00000-of-00001": (6, 8),
    }
    for shard, (first, last) in shards.items():
        paths = [path for path in PHOTOS if first <= int(path[3]) < last]
        labels = [int(path[3]) for path in paths] + [-1]
        table = hub_table([*paths, "sku0/0.jpg"], label=pa.array(labels, pa.int64()))
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / f"hub/{shard}.parquet"
        )
    (tmp_path / "hub/data/._train-00000-of-00002.parquet").write_bytes(b"what a Macintosh leaves behind")
    catalogue = prepare(tmp_path / "hub", tmp_path / "out")
    assert items(catalogue) == expected("boot {}".format)
    assert {row["item_id"] for row in rows_of(catalogue, "query", "gallery")} == {"boot 6", "boot 7"}
    assert "there is no item_id: items are the values of label" in catalogue.manifest["notes"]
    assert "3 rows have the label -1, which is none, and were left out" in catalogue.manifest["notes"]


@pytest.mark.parametrize("name", ["train-0.parquet", "train-0.tar"])
def test_a_picture_beside_shards_does_not_hide_them(tmp_path, name):
    pq.write_table(hub_table(PHOTOS, item_id=[path[:4] for path in PHOTOS]), tmp_path / "train-0.parquet")
    pack(tmp_path / "train-0.tar", PHOTOS)
    (tmp_path / "hub/assets").mkdir(parents=True)
    (tmp_path / name).rename(tmp_path / "hub" / name)
    (tmp_path / "hub/assets/preview.png").write_bytes(PHOTOS["sku0/0.jpg"])
    with pytest.raises(UserError, match=f"{name} and its like hold far more than .* assets/preview.png: move these"):
        read_source(tmp_path / "hub")
    (tmp_path / "hub/assets/preview.png").write_bytes(bytes(20_000))
    assert len(read_source(tmp_path / "hub").photos) == 1, "as where an archive lies beside what was in it"


def test_shuffled_rows_make_the_same_catalogue_and_each_row_group_is_read_once(tmp_path, quick, monkeypatch):
    reads, iterate = [], parquet_tables.iterate_images

    def counted(store, file, group):
        reads.append((file, group))
        return iterate(store, file, group)

    for module in (parquet_tables, encode):
        monkeypatch.setattr(module, "iterate_images", counted)
    table = hub_table(PHOTOS, item_id=[path.partition("/")[0] for path in PHOTOS])
    table = table.append_column("image_path", pa.array([*PHOTOS])).to_pylist()
    table[5]["image"] = None
    made = {}
    for name, rows in {"sorted": table, "shuffled": random.Random(0).sample(table, len(table))}.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=5)
        made[name] = prepare(tmp_path / f"{name}.parquet", tmp_path / name, max_bad=0.1)
    assert made["sorted"].manifest["hash"] == made["shuffled"].manifest["hash"]
    left_out = made["shuffled"].manifest["left_out"]["list"]
    assert left_out == made["sorted"].manifest["left_out"]["list"] == [["sku1/1.jpg", "a row without an image"]]
    shuffled = [read for read in reads if read[0] == "shuffled.parquet"]
    assert len(shuffled) == len(set(shuffled)) == 7
    assert not list(tmp_path.rglob("images-*"))


def test_a_row_without_an_image_is_left_out(tmp_path, quick):
    table = hub_table(PHOTOS, item_id=[path.partition("/")[0] for path in PHOTOS]).to_pylist()
    table[5]["image"] = {"bytes": None, "path": "elsewhere.jpg"}
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "shop.parquet")
    left_out = prepare(tmp_path / "shop.parquet", tmp_path / "out", max_bad=0.1).manifest["left_out"]
    assert left_out["list"] == [["elsewhere.jpg", "a row without an image"]]


def pack(path, files, links=()):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)


def test_tars_of_folders_and_of_samples_are_read(tmp_path, quick):
    pack(
        tmp_path / "folders.tar", {f"./{path}": data for path, data in PHOTOS.items()} | {"._x.jpg": b"", "a.txt": b""}
    )
    samples = {}
    for number, (path, data) in enumerate(PHOTOS.items()):
        fields = {"item_id": path.partition("/")[0], "text": "A hat.", "size": [40, 30]}
        samples[number] = {f"{number:06d}.jpg": data, f"{number:06d}.json": json.dumps(fields).encode()}
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        content = {name: data for n, files in samples.items() if n % 2 == shard for name, data in files.items()}
        pack(tmp_path / f"shards/shop-{shard:06d}.tar", content)
    by_class = {}
    for number, (path, data) in enumerate(PHOTOS.items()):
        by_class |= {f"{number}.jpg": data, f"{number}.cls": path[:4].encode(), f"{number}.txt": b"A hat."}
    pack(tmp_path / "classes.tar", by_class)
    for source, text in {"folders.tar": "", "shards": "A hat.", "classes.tar": "A hat."}.items():
        catalogue = prepare(tmp_path / source, tmp_path / f"out-{source}")
        assert items(catalogue) == expected(), source
        assert {row["text"] for row in rows_of(catalogue)} == {text}


def test_names_in_a_tar_that_are_no_utf8_stay_apart(tmp_path):
    pack(tmp_path / "shop.tar", {os.fsdecode(name): b"x" for name in (b"Gr\xfcn/1.jpg", b"Gr\xf6n/1.jpg")})
    photos = read_source(tmp_path / "shop.tar").photos
    assert [photo.item_id for photo in photos] == ["Gr\\xfcn", "Gr\\xf6n"]
    assert [photo.path for photo in photos] == ["shop.tar/Gr\\xfcn/1.jpg", "shop.tar/Gr\\xf6n/1.jpg"]


def test_a_hard_link_in_a_tar_is_its_file_and_other_links_are_counted(tmp_path):
    """tar packs a file of two names once."""
    links = [("./b/1.jpg", tarfile.LNKTYPE, "./a/1.jpg"), ("c/1.jpg", tarfile.LNKTYPE, "gone.jpg")]
    links.append(("d/1.jpg", tarfile.SYMTYPE, "../a/1.jpg"))
    pack(tmp_path / "shop.tar", {"./a/1.jpg": b"x"}, links)
    listing = read_source(tmp_path / "shop.tar")
    assert {(photo.item_id, photo.path) for photo in listing.photos} == {(i, "shop.tar/a/1.jpg") for i in "ab"}
    assert "shop.tar: 2 links were passed over: pack the files themselves" in listing.notes


def test_splits_of_tars_are_those_of_their_folders_or_of_the_names_of_shards(tmp_path):
    (tmp_path / "shards").mkdir()
    pack(
        tmp_path / "folders.tar", {f"shop/{split}/{split}1/{v}.jpg": b"x" for split in ("train", "test") for v in "01"}
    )
    for split in ("train", "test"):
        samples = {f"{v}.jpg": b"x" for v in "01"} | {f"{v}.cls": f"{split}1".encode() for v in "01"}
        pack(tmp_path / f"shards/{split}-000000.tar", samples)
    for source in ("folders.tar", "shards"):
        photos = read_source(tmp_path / source).photos
        assert {(photo.item_id, photo.split) for photo in photos} == {("train1", "train"), ("test1", "test")}, source


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"0.jpg": b"x"},
            "shop.tar, 0.jpg: no item_id: a sample needs an item_id in its .json, or a .cls, or a folder",
        ),
        ({"0.jpg": b"x", "0.json": b"{"}, "shop.tar, 0.json: not valid JSON"),
        ({"0.txt": b"x"}, "no images are found or listed"),
    ],
)
def test_what_is_wrong_in_a_tar_is_told(tmp_path, files, said):
    pack(tmp_path / "shop.tar", files)
    with pytest.raises(UserError, match=said):
        read_source(tmp_path / "shop.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "shop.tar").read_bytes()[:300])
    with pytest.raises(UserError, match="cut.tar: not a whole, uncompressed tar file"):
        read_source(tmp_path / "cut.tar")


def test_links_that_lead_out_are_named_with_the_option_that_takes_them(tmp_path, quick):
    for path, data in PHOTOS.items():
        (tmp_path / "blobs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "blobs" / path).write_bytes(data)
        (tmp_path / "snapshot" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshot" / path).symlink_to(tmp_path / "blobs" / path)
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders/shop").symlink_to(tmp_path / "blobs")
    for source in ("snapshot", "folders"):
        with pytest.raises(UserError, match=LINK):
            prepare(tmp_path / source, tmp_path / "strict")
    assert items(prepare(tmp_path / "snapshot", tmp_path / "out", follow_links=True)) == expected()
    assert items(prepare(tmp_path / "folders", tmp_path / "out2", follow_links=True)) == expected("shop/sku{}".format)
    (tmp_path / "blobs/sku0/5.jpg").symlink_to("0.jpg")
    assert len(items(prepare(tmp_path / "blobs", tmp_path / "out3"))) == 8, "links that stay inside are taken"


def test_one_photo_an_item_makes_a_catalogue_that_says_what_it_lacks(tmp_path, quick):
    for item in range(4):
        path = tmp_path / f"photos/sku{item}/0.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(PHOTOS[f"sku{item}/0.jpg"])
    catalogue = prepare(tmp_path / "photos", tmp_path / "out")
    assert catalogue.num_images("train") == 4
    assert [note.partition(",")[0] for note in catalogue.manifest["notes"][-2:]] == [
        "no validation items",
        "no test items",
    ]
    with pytest.raises(UserError, match="no query images .*items of two photos or more.*embed and search work without"):
        catalogue.require("query", "gallery")


def test_bad_lines_and_heic_do_not_count_against_max_bad(tmp_path, quick, monkeypatch):
    for path, data in PHOTOS.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (tmp_path / "sku0/phone.HEIC").write_bytes(b"")
    lines = [*(f"{path},{path[:4]}" for path in PHOTOS), "sku0/phone.HEIC,sku0", "sku0/0.jpg,", ",sku1"]
    (tmp_path / "list.csv").write_text("image_path,item_id\n" + "\n".join(lines))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = prepare(tmp_path / "list.csv", tmp_path / "out", max_bad=0, skip_bad_lines=True)
    reasons = {
        "HEIC photo: pip install pillow-heif reads it": 1,
        "bad line: no image_path": 1,
        "bad line: no item_id": 1,
    }
    assert made.manifest["left_out"]["reasons"] == reasons
    assert items(made) == expected()


def test_inshops_own_boxes_are_cut_by_an_option(tmp_path, quick):
    def half(left):
        return Image.fromarray(np.full((60, 30, 3), 250 if left else 5, np.uint8))

    lines, boxes = (
        ["12", "image_name item_id evaluation_status"],
        ["12", "image_name clothes_type pose_type x_1 y_1 x_2 y_2"],
    )
    for item in range(1, 4):
        for view in range(4):
            path = f"img/WOMEN/Tees/id_{item:08d}/0{view}_1_front.jpg"
            picture = Image.new("RGB", (60, 60), (5, 5, 5))
            picture.paste(half(True), (0, 0))
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / path, quality=95)
            lines.append(f"{path} id_{item:08d} {'train' if item == 1 else ('query', 'gallery')[view % 2]}")
            boxes.append(f"{path}  1 1 030 000 060 060")
    (tmp_path / "Eval").mkdir()
    (tmp_path / "Eval/list_eval_partition.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match="--inshop-boxes: Anno/list_bbox_inshop.txt is not there"):
        prepare(tmp_path, tmp_path / "out", inshop_boxes=True)
    (tmp_path / "Anno").mkdir()
    (tmp_path / "Anno/list_bbox_inshop.txt").write_text("\n".join(boxes))
    made = prepare(tmp_path, tmp_path / "out", inshop_boxes=True)
    images = [Image.open(io.BytesIO(data)) for its in items(made).values() for data in its]
    assert {image.size for image in images} == {(30, 60)}
    assert max(np.asarray(image).mean() for image in images) < 20, "the bright half is cut away"
    assert "photos are cut to In-Shop's boxes, 0 have none and stay whole" in made.manifest["notes"]


def test_samples_without_an_image_are_counted(tmp_path):
    pack(
        tmp_path / "shop.tar",
        {"0.jpg": b"x", "0.cls": b"hat", "1.cls": b"hat", "1.txt": b"A hat.", "2.json": b'{"item_id": 7}'},
    )
    listing = read_source(tmp_path / "shop.tar")
    assert [photo.path for photo in listing.photos] == ["shop.tar/0.jpg"]
    assert listing.left_out == [("shop.tar/1", NO_IMAGE), ("shop.tar/2", NO_IMAGE)]
