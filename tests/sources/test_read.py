"""Every form of a source, with the oddities of real ones, and what is said of those that can't be read."""

import csv
import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfh import UserError
from clipfh.sources import listing as listing_module
from clipfh.sources.listing import Photo
from clipfh.sources.read import read_source

INSHOP = [  # path, item, split
    *((f"img/WOMEN/Dresses/id_{i:08d}/0{v}_1_front.jpg", f"id_{i:08d}", "train") for i in range(3) for v in (1, 2)),
    ("img/WOMEN/Tees/id_00000000/03_7_additional.jpg", "id_00000000", "train"),  # an item in two categories
    ("img/UNISEX/Some Hats/id_00000100/01_1_side.jpg", "id_00000100", "query"),
    ("img/UNISEX/Some Hats/id_00000100/01_2_side.jpg", "id_00000100", "gallery"),
]
TEXTS = [
    {"item": "id_00000000", "color": "Black-cream", "description": ["Caf\u8305  twice", "line\r\nbreak", " ", ""]},
    {"item": "id_00000001", "color": "Red", "description": []},
    {"item": "id_00000002", "color": "Red", "description": "One paragraph."},
    {"item": "id_00000100", "color": None, "description": ["A hat.", "half a pair \ud83d"]},
]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())


def inshop(root, partition="Eval/list_eval_partition.txt", images="img", texts="Anno"):
    """In-Shop as it is distributed, but each image holds its own path."""
    for path, *_ in INSHOP:
        put(root / images / path.removeprefix("img/"), path)
    listed = "".join(f"{path:70} {item}   {split}\r\n" for path, item, split in INSHOP)
    put(root / partition, f"{len(INSHOP)}\nimage_name item_id evaluation_status\n{listed}\n")
    if texts:
        put(root / texts / "list_description_inshop.json", json.dumps(TEXTS))
    return root


def rows_of(listing):
    """What the source says of its photos, less where they lie."""
    return [photo._replace(file="", stamp="") for photo in listing.photos]


def content(listing, photo):
    return listing.store.open_input_file(photo.file).read().decode()


def write_csv(path, columns, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_inshop_in_every_layout_gives_the_same_photos(tmp_path):
    layouts = {
        "plain": {},
        "distributed": {"images": "Img/img"},
        "highres": {"images": "Img/img_highres", "partition": "list_eval_partition.txt"},
        "bare": {"images": "img_highres", "partition": "list_eval_partition.txt", "texts": "."},
    }
    listings = [read_source(inshop(tmp_path / name, **how)) for name, how in layouts.items()]
    inshop(tmp_path / "nested" / "In-shop Clothes Retrieval Benchmark", images="Img/img")
    listings += [read_source(str(tmp_path / "nested")), read_source((tmp_path / "plain").as_uri())]
    for listing in listings:
        assert rows_of(listing) == rows_of(listings[0])
        assert [content(listing, photo) for photo in listing.photos] == [path for path, *_ in INSHOP]
        assert listing.left_out == []
    said = [listing.notes[-1] for listing in listings[:2]]
    assert said == ["the images are those in img/", "the images are those in Img/img/"]


def test_all_images_are_of_one_tree_and_it_is_said_which(tmp_path):
    source = inshop(tmp_path, images="Img/img")
    inshop(tmp_path, images="Img/img_highres")
    (tmp_path / "Img" / INSHOP[0][0]).unlink()
    listing = read_source(tmp_path)
    assert listing.left_out == [(INSHOP[0][0], listing_module.MISSING)], "it is not taken from the other tree"
    assert listing.notes[-2:] == [
        "the images are those in Img/img/",
        "Img/img_highres/ is not used: to use it, move Img/img/ away",
    ]
    (source / "Img/img").rename(source / "away")
    assert read_source(tmp_path).notes[-1] == "the images are those in Img/img_highres/"


def test_other_storage_is_read_by_uri(tmp_path):
    inshop(tmp_path, images="Img/img")
    listing = read_source(f"fsspec+file://{tmp_path}")
    assert "fsspec" in listing.store.base_fs.type_name
    assert [content(listing, photo) for photo in listing.photos] == [path for path, *_ in INSHOP]
    with pytest.raises(UserError, match="fsspec.file://.*/gone: no such file or folder"):
        read_source(f"fsspec+file://{tmp_path}/gone")


def test_inshop_photos_and_notes(tmp_path):
    listing = read_source(inshop(tmp_path / "source"))
    photos = {photo.path: photo for photo in rows_of(listing)}
    assert [(photo.path, photo.item_id, photo.split) for photo in listing.photos] == INSHOP
    assert photos["img/WOMEN/Tees/id_00000000/03_7_additional.jpg"] == Photo(
        path="img/WOMEN/Tees/id_00000000/03_7_additional.jpg", item_id="id_00000000", split="train", variant="03",
        view="additional", gender="WOMEN", category="Tees", color="Black-cream",
        text="Caf\u8305  twice\nline\r\nbreak",  # a paragraph a line; repair is not done here
    )  # fmt: skip
    hat = photos["img/UNISEX/Some Hats/id_00000100/01_1_side.jpg"]
    assert (hat.gender, hat.category, hat.color) == ("UNISEX", "Some Hats", "")
    assert hat.text == "A hat.\nhalf a pair ?"
    assert {photo.text for photo in photos.values() if photo.color == "Red"} == {"", "One paragraph."}
    assert "9 images (52,712), 7 train images (25,882), 3 train items (3,997)" in listing.notes[0]
    assert "1 query images (14,218), 1 gallery images (12,612), 1 test items (3,985)" in listing.notes[0]
    bare = read_source(inshop(tmp_path / "bare", texts=""))
    assert bare.notes[0] == "Anno/list_description_inshop.json is not there: the items have no text"
    assert {photo.text for photo in bare.photos} == {""}


def test_inshops_rule_for_names_holds_for_any_view_of_an_inshop_source(tmp_path):
    path = "img/WOMEN/Tees/id_00000001/01_2_viewb.jpg"
    put(tmp_path / path, path)
    put(tmp_path / "Eval/list_eval_partition.txt", f"image_name item_id evaluation_status\n{path} id_00000001 train\n")
    assert [(photo.variant, photo.view) for photo in read_source(tmp_path).photos] == [("01", "viewb")]


def test_csv_and_parquet_with_all_columns(tmp_path):
    columns = ("image_path", "item_id", "split", "text", "view", "variant", "gender", "category", "color", "price")
    rows = [
        (f"./photos/0{i}_{i}_back.jpg", i, "test", "red, \u00e9\nand warm", "front", "2", "KIDS", "Hats", "red", "9")
        for i in range(3)
    ]
    for path, *_ in rows:
        put(tmp_path / path, path)
    listing = read_source(write_csv(tmp_path / "all.csv", columns, [*rows, rows[0]]))
    assert listing.notes == ["columns that were not used: price", "1 rows repeat another one and were dropped"]
    assert rows_of(listing) == [
        Photo(
            path=f"./photos/0{i}_{i}_back.jpg", item_id=str(i), split="test", variant="2", view="front",
            gender="KIDS", category="Hats", text="red, \u00e9\nand warm", color="red",
        )
        for i in range(3)
    ]  # fmt: skip
    assert [content(listing, photo) for photo in listing.photos] == [path for path, *_ in rows]

    pq.write_table(pa.table(list(map(pa.array, zip(*rows, strict=True))), list(columns)), tmp_path / "all.parquet")
    assert read_source(tmp_path / "all.parquet").photos == listing.photos


def test_numbers_of_a_table_are_ids_as_people_write_them(tmp_path):
    put(tmp_path / "a.jpg", "")
    columns = {"image_path": ["a.jpg"] * 2, "item_id": [6.0, 7.0], "variant": [float("nan"), 2.5], "color": [None, "x"]}
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    listing = read_source(tmp_path / "s.parquet")
    assert [(p.item_id, p.variant, p.color) for p in listing.photos] == [("6", "", ""), ("7", "2.5", "x")]
    assert listing.notes == ["1 images are listed for several items"]
    for name, value in {"item_id": [["a"]], "text": [b"x"], "split": [True]}.items():
        pq.write_table(pa.table({"image_path": ["a.jpg"], "item_id": ["i"]} | {name: value}), tmp_path / "s.parquet")
        with pytest.raises(UserError, match=f"s.parquet: column {name} holds .*: store it as text"):
            read_source(tmp_path / "s.parquet")


def test_a_folder_of_item_folders(tmp_path):
    for name in ("shoes/boot 00/view0.JPG", "shoes/boot 00/02_1_side.png", "hat/a.webp"):
        put(tmp_path / name, name)
    for other in ("shoes/boot 00/.hidden.jpg", "shoes/boot 00/notes.txt", "loose.jpg"):
        put(tmp_path / other, "")
    listing = read_source(tmp_path)
    assert sorted(rows_of(listing), key=lambda photo: photo.path) == [
        Photo("hat/a.webp", "hat", view="a"),
        Photo("shoes/boot 00/02_1_side.png", "shoes/boot 00", variant="02", view="side", category="shoes"),
        Photo("shoes/boot 00/view0.JPG", "shoes/boot 00", view="view0", category="shoes"),
    ]


def test_the_original_systems_metadata_in_every_form(tmp_path):
    split = {path: "val" if path == INSHOP[2][0] else split for path, _, split in INSHOP}
    known = {path: {"item_id": item, "split": split[path]} for path, item, _ in INSHOP}
    by_split = {name: [path for path in split if split[path] == name] for name in split.values()}
    forms = [(known, None), ({str(i): path for i, path in enumerate(split)}, split), ({"all": list(split)}, by_split)]
    prompts = {
        "id_00000000": "A clothing item in Black-cream. Warm.\nLong. ",
        "id_00000001": "A hat",
        "id_00000002": "A photo of id 00000002",  # what it gives an item without a description
    }
    for number, (paths, splits) in enumerate(forms):
        root = tmp_path / str(number)
        for path in split:
            put(root / "splits" / split[path] / path, path)
        put(root / "metadata/image_paths.json", json.dumps(paths))
        put(root / "metadata/image_prompts_per_identity.json", json.dumps(prompts))
        if splits:
            put(root / "metadata/image_splits.json", json.dumps(splits))
        for source in (root, root / "metadata"):
            listing = read_source(source)
            photos = {photo.path: photo for photo in listing.photos}
            assert sorted((photo.path, photo.item_id, photo.split) for photo in listing.photos) == sorted(INSHOP), (
                "its validation images are of training items"
            )
            assert {path: content(listing, photo) for path, photo in photos.items()} == {path: path for path in split}
            texts = {photo.item_id: (photo.text, photo.color) for photo in listing.photos}
            assert texts["id_00000000"] == ("Warm.\nLong. ", "Black-cream")
            assert texts["id_00000001"] == ("A hat", "")
            assert texts["id_00000002"] == ("", "")


def test_what_is_not_there_or_outside_is_left_out(tmp_path):
    put(tmp_path / "source/here.jpg", "")
    put(tmp_path / "outside.jpg", "")
    outside = ("../outside.jpg", str(tmp_path / "outside.jpg"), "a\0b.jpg", "s3://bucket/a.jpg")
    gone = ("gone.jpg", "..gone.jpg", "x" * 300 + ".jpg", str(tmp_path / "source/gone.jpg"))
    rows = [(path, "a") for path in ("here.jpg", *gone, *outside)]
    pq.write_table(pa.table(list(zip(*rows, strict=True)), ["image_path", "item_id"]), tmp_path / "source/s.parquet")
    listing = read_source(tmp_path / "source/s.parquet")
    assert [photo.path for photo in listing.photos] == ["here.jpg"]
    assert sorted(listing.left_out) == sorted(
        [*((path, listing_module.MISSING) for path in gone), *((path, listing_module.OUTSIDE) for path in outside)]
    )


def test_the_stamp_tells_a_changed_file(tmp_path):
    put(tmp_path / "item/a.jpg", "x")
    before = read_source(tmp_path).photos
    assert read_source(tmp_path).photos == before
    put(tmp_path / "item/a.jpg", "longer")
    assert read_source(tmp_path).photos != before


HEADER = "image_path,item_id,split\n"
PARTITION = "s/Eval/list_eval_partition.txt"
INSHOP_HEADER = "1\nimage_name item_id evaluation_status\n"


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ({}, "gone", "gone: no such file or folder"),
        ({}, "nowhere://bucket", "nowhere://bucket: no file system for it"),
        ({}, "abfs://photos:secret@shop.dfs.core.windows.net/a", "credentials in an address end up in logs"),
        ({"a/b.txt": ""}, "a", "no images are found or listed: put images there"),
        ({"img.zip": ""}, "img.zip", "unpack it"),
        ({"s/Img/img.zip": ""}, "s", "unpack Img/img.zip"),
        ({"s/Img/img.zip": "", PARTITION: "1\n\nimg/a/b.jpg i train"}, "s", "unpack Img/img.zip"),
        ({"s/deep/Img.zip": "", "s/deep/Eval.zip": ""}, "s", "unpack deep/Eval.zip, deep/Img.zip there"),
        ({PARTITION: INSHOP_HEADER + "a/b.jpg i train"}, "s", "1 images are listed, none"),
        ({"s.csv": "image,item\n"}, "s.csv", "no column image_path or item_id .found: image, item"),
        ({"s.csv": ""}, "s.csv", "no column image_path or item_id"),
        ({"s.csv": HEADER}, "s.csv", "no images are found or listed"),
        ({"s.csv": '"image_path" ,"item_id"\n'}, "s.csv", "line 1: malformed"),
        ({"s.csv": "image_path,item_id,item_id\n"}, "s.csv", "several columns are called item_id"),
        ({"s.csv": HEADER + "/a.jpg,i,train\n"}, "s.csv", "not inside it: give paths relative to it"),
        ({"s.csv": HEADER + "a.jpg,i,train\nb.jpg,i\n"}, "s.csv", "line 3: malformed"),
        ({"s.csv": HEADER + "a.jpg,i,train,extra\n"}, "s.csv", "line 2: malformed"),
        ({"s.csv": HEADER + 'a.jpg,i,"train\n'}, "s.csv", "line 2: malformed"),
        ({"s.csv": HEADER + "a.jpg,,train\n"}, "s.csv", "line 2: no item_id"),
        ({"s.csv": HEADER + "a.jpg,i,best\n"}, "s.csv", "line 2: split 'best' is none of train"),
        ({"s.parquet": "no parquet"}, "s.parquet", "can't be read"),
        ({"s.json": ""}, "s.json", "give a .csv"),
        ({"s/image_paths.json": '{"0": "a.jpg"}'}, "s", "no item_id"),
        ({"s/image_paths.json": '{"0": ["id_00000001.jpg", 7]}'}, "s", "image_paths.json, '0': holds 7 where a text"),
        ({"s/image_paths.json": '{"0": 7}'}, "s", "holds 7 where a text"),
        ({"s/image_paths.json": '{"a.jpg": {"item_id": ["x"]}}'}, "s", "holds .'x'. where a text"),
        ({"s/image_paths.json": '{"a.jpg": {"item_id": "x", "split": {}}}'}, "s", "none is there"),
        ({"s/image_paths.json": '{"a.jpg": {"item_id": "x", "split": 1}}'}, "s", "split '1' is none of"),
        ({"s/image_paths.json": '["a.jpg"]'}, "s", "holds a list where a dict belongs"),
        ({"s/image_paths.json": "{}", "s/image_splits.json": '{"train": {"a": 1}}'}, "s", "image_splits.json, 'train'"),
        ({"s/image_paths.json": "{}", "s/image_splits.json": '{"train": [[1]]}'}, "s", "holds .1. where a text"),
        ({"s/image_paths.json": "{}", "s/image_prompts.json": '{"i": {"text": ""}}'}, "s", "image_prompts.json, 'i'"),
        ({"s/image_paths.json": "{}", "s/image_prompts_clean.json": "[]"}, "s", "holds a list where a dict belongs"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_said_in_one_line(tmp_path, files, source, said):
    put(tmp_path / "a.jpg", "")
    for name, text in files.items():
        put(tmp_path / name, text)
    with pytest.raises(UserError, match=said) as caught:
        read_source(source if "://" in source else tmp_path / source)
    assert "\n" not in str(caught.value)


ROWS = [f"{path} {item} {split}" for path, item, split in INSHOP]
HEAD = ["9", "image_name item_id evaluation_status"]
PAGE = "<!DOCTYPE html>\n<html><body>Sorry, too many downloads of this file</body></html>\n"


def entry(**fields):
    return json.dumps([{"item": "id_00000000", "color": "Red", "description": ["Warm."]} | fields])


# A damaged file, and what is said of it: in a note where it is taken all the same, as a UserError otherwise
PARTITIONS = {
    "empty": ("", "no images are found or listed"),
    "only the count": ("9\n", "line 1 says 9 images and 0 are listed"),
    "only the header": ("\n".join(HEAD), "line 1 says 9 images and 0 are listed"),
    "cut in a line": ("\n".join(HEAD + ROWS)[:-12], "line 11: "),
    "cut behind a line": ("\n".join(HEAD + ROWS[:5]), "line 1 says 9 images and 5 are listed: get the whole file"),
    "a row too many": ("\n".join(HEAD + ROWS + ["img/a.jpg i train"]), "says 9 images and 10 are listed"),
    "a row without an item": ("\n".join([*HEAD[1:], ROWS[0], "img/a.jpg train"]), "line 3: 'img/a.jpg train' is not"),
    "another status": ("\n".join([*HEAD, "img/a.jpg i best"]), "line 3: split 'best' is none of train, val"),
    "a status in capitals": ("\n".join([*HEAD, *ROWS]).replace(" train", " Train"), None),
    "two headers": ("\n".join([*HEAD, *HEAD]), "line 3: '9' is not"),
    "columns swapped": ("\n".join(f"{i} {p} train" for p, i, _ in INSHOP), "9 images are listed, none is there"),
    "zeros": ("\0" * 99, "line 1: .* is not"),
    "a web page": (PAGE, "line 1: '<!DOCTYPE html>' is not"),
    "another encoding": ("\n".join(HEAD + ROWS).encode("utf-16"), "not UTF-8"),
    "still packed": (gzip.compress(b"9"), "not UTF-8"),
    "no header": ("\n".join(ROWS), None),
    "no count": ("\n".join(HEAD[1:] + ROWS), None),
    "lines of Windows": ("\r\n".join(HEAD + ROWS), None),
    "lines of an old Macintosh": ("\r".join(HEAD + ROWS), None),
    "tabs and empty lines": ("\n\n".join(HEAD + ROWS).replace(" id_", "\tid_"), None),
    "a mark at the beginning": ("\ufeff" + "\n".join(HEAD + ROWS), None),
    "a row twice": ("\n".join([*HEAD[1:], *ROWS, ROWS[0]]), "1 rows repeat another one and were dropped"),
}
DESCRIPTIONS = {
    "empty": ("", "line 1: not valid JSON"),
    "cut": (entry()[:-9], "line 1: not valid JSON"),
    "cut and closed": ("[\n{", "line 2: not valid JSON"),
    "a mapping": ("{}", "holds a dict where a list belongs"),
    "no number": ("NaN", "holds a float where a list belongs"),
    "texts alone": ('["Warm."]', "entry 0 has no 'item'"),
    "another key": ('[{"item_id": "id_00000000"}]', "entry 0 has no 'item'"),
    "an item that is a list": (entry(item=["a"]), "entry 0 has no 'item'"),
    "an item that is a number": (entry(item=7), "entry 0 has no 'item'"),
    "a description that is a number": (entry(description=7), "entry 0: holds 7 where a text belongs"),
    "a description that is a mapping": (entry(description={"a": 1}), "entry 0: holds {'a': 1} where a text belongs"),
    "paragraphs of paragraphs": (entry(description=[["Warm."]]), r"entry 0: holds \['Warm.'\] where a text belongs"),
    "a colour that is a number": (entry(color=7), "entry 0: holds 7 where a text belongs"),
    "brackets without end": ("[" * 200_000, "not valid JSON"),
    "a number without end": (f"[{'9' * 5000}]", "not valid JSON"),
    "a raw line break": ('[{"item": "a\nb"}]', "line 1: not valid JSON"),
    "two files in one": ("[][]", "not valid JSON .Extra data"),
    "a web page": (PAGE, "line 1: not valid JSON"),
    "another encoding": (entry().encode("utf-16"), "not UTF-8"),
    "GBK": (entry(color="\u7ea2").encode().decode("unicode_escape").encode("gbk"), "not UTF-8"),
    "a description twice": (
        entry()[:-1] + "," + entry(description="Long.")[1:],
        "1 items are described more than once",
    ),
    "an item that is not listed": (entry(item="id_99999999"), "1 descriptions are of items that are not listed"),
    "nothing said": (entry(color=None, description=None), None),
    "a colour in a list": (entry(color=["Red"]), None),
    "a mark at the beginning": ("\ufeff" + entry(), None),
    "half a pair": (entry(color="\ud83d"), None),
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [("Eval/list_eval_partition.txt", name) for name in PARTITIONS]
    + [("Anno/list_description_inshop.json", name) for name in DESCRIPTIONS],
)
def test_a_damaged_file_is_taken_rightly_or_refused_in_one_line(tmp_path, file, damage):
    data, said = (PARTITIONS if "Eval" in file else DESCRIPTIONS)[damage]
    source = inshop(tmp_path / "s")
    (source / file).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    try:
        listing = read_source(source)
    except UserError as error:
        assert said and re.search(said, str(error)) and str(source) in str(error)
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert [(photo.path, photo.item_id, photo.split) for photo in listing.photos] == INSHOP
        assert said is None or any(note.startswith(said) for note in listing.notes)


def test_text_that_is_not_utf_8_is_said(tmp_path):
    (tmp_path / "s.csv").write_bytes(HEADER.encode() + b"caf\xe9.jpg,i,train\n")
    with pytest.raises(UserError, match="s.csv: not UTF-8 .*: save it as UTF-8"):
        read_source(tmp_path / "s.csv")
