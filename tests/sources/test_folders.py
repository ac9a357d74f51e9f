"""Folders of photos as people have them: splits, ids in names, what machines leave behind, links, odd names."""

import os

import pytest

from clipfh import UserError
from clipfh.sources import listing as listing_module
from clipfh.sources.read import read_source


def put(root, *paths, content=""):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content or path)
    return root


def rows(listing):
    return sorted((photo.path, photo.item_id, photo.split) for photo in listing.photos)


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "query", "gallery"), ("train", "query", "gallery")),
        (("Training", "Validation", "Testing"), ("train", "val", "test")),
        (("train_set", "valid", "test-images"), ("train", "val", "test")),
        (("bounding_box_train", "query", "bounding_box_test"), ("train", "query", "gallery")),
        (("image_train", "image_query", "image_test"), ("train", "query", "gallery")),
        (("train", "val_query", "val-gallery"), ("train", "val_query", "val_gallery")),
        (("trainval", "test_query", "test_gallery"), ("train", "query", "gallery")),
        (("train", "test/query", "test/gallery"), ("train", "query", "gallery")),
        (("train", "val/query", "val/gallery"), ("train", "val_query", "val_gallery")),
        (("cars_train", "cars_test"), ("train", "test")),
        (("1_train", "2_val", "3_test"), ("train", "val", "test")),
        (("train2017", "val2017"), ("train", "val")),
    ],
)
@pytest.mark.parametrize("above", ["", "Shop-v1.0/data/"])
def test_splits_are_taken_from_folders_called_so(tmp_path, folders, splits, above):
    put(tmp_path, *(f"{above}{folder}/shoes/boot{n}/{v}.jpg" for n, folder in enumerate(folders) for v in range(2)))
    listing = read_source(tmp_path)
    assert rows(listing) == sorted(
        (f"{above}{folder}/shoes/boot{n}/{v}.jpg", f"shoes/boot{n}", split)
        for n, (folder, split) in enumerate(zip(folders, splits, strict=True))
        for v in range(2)
    )
    assert {photo.category for photo in listing.photos} == {"shoes"}
    assert listing.notes[0].startswith("the splits are those of the folders: ")


def test_an_item_under_query_and_gallery_is_one_item(tmp_path):
    put(tmp_path, "train/a/0.jpg", "query/b/0.jpg", "gallery/b/1.jpg")
    assert {photo.item_id for photo in read_source(tmp_path).photos} == {"a", "b"}


def test_a_folder_that_only_sounds_like_a_split_is_a_category(tmp_path):
    put(tmp_path, "train/steam1/0.jpg", "train/steam2/0.jpg", "car/a/0.jpg")
    assert {photo.item_id for photo in read_source(tmp_path).photos} == {"train/steam1", "train/steam2", "car/a"}
    put(tmp_path / "toys", "steam_train/a/0.jpg", "wooden_train/a/0.jpg", "eye_test/a/0.jpg")
    assert {photo.split for photo in read_source(tmp_path / "toys").photos} == {""}


def test_split_folders_within_those_of_items_are_told(tmp_path):
    put(tmp_path, *(f"{item}/{split}/{v}.jpg" for item in "ab" for split in ("train", "test") for v in (1, 2)))
    assert (
        "8 photos lie in folders called as splits are, within others, e.g. a/test/1.jpg"
        in read_source(tmp_path).notes[0]
    )


@pytest.mark.parametrize("folder", ["images/", "data/JPEGImages/", "train/image/"])
def test_a_folder_called_images_is_no_item(tmp_path, folder):
    others = ("validation/image/0003_1.jpg", "validation/image/0003_2.jpg") if "train" in folder else ()
    put(tmp_path, *(f"{folder}000{n}_{v}.jpg" for n in (1, 2) for v in (1, 2)), *others)
    assert {photo.item_id for photo in read_source(tmp_path).photos} == {"0001", "0002", *(["0003"] if others else [])}
    put(tmp_path / "more", f"{folder}1.jpg", f"{folder}2.jpg", *(["validation/image/1.jpg"] if others else []))
    with pytest.raises(UserError, match="photos lie in no item's folder, e.g. "):
        read_source(tmp_path / "more")


def test_market_1501_is_read_as_distributed(tmp_path):
    put(tmp_path, "bounding_box_train/0002_c1s1_000451_03.jpg", "bounding_box_train/0002_c2s1_000451_03.jpg")
    put(tmp_path, "query/0003_c1s1_000551_00.jpg", "bounding_box_test/0003_c4s1_000551_00.jpg")
    put(tmp_path, "bounding_box_test/-1_c1s1_000401_03.jpg", "bounding_box_test/0000_c1s1_000151_01.jpg")
    put(tmp_path, "gt_bbox/0003_c1s1_000551_00.jpg", "readme.txt")
    listing = read_source(tmp_path)
    assert [(item, split) for _, item, split in rows(listing)] == [
        ("0000", "gallery"),
        ("0003", "gallery"),
        ("0002", "train"),
        ("0002", "train"),
        ("0003", "query"),
    ]
    assert "1 photos beside the split folders were left out (gt_bbox)" in listing.notes
    assert "1 photos of -1, which is no item in data sets like Market-1501, were left out" in listing.notes
    assert any(note.startswith("names hold a camera: ") for note in listing.notes)


def test_re_identification_data_in_folders_of_people_are_the_same(tmp_path):
    """As people copy Market-1501 to train on it: a folder a person, and all of train again."""
    for split, person in (("train_all", "0002"), ("train", "0002"), ("query", "0003"), ("gallery", "0003")):
        put(tmp_path, f"{split}/{person}/{person}_c1s1_000451_03.jpg", f"{split}/{person}/{person}_c2s1_000451_03.jpg")
    put(tmp_path, "gallery/-1/-1_c1s1_000401_03.jpg", "multi-query/0003/0003_c1s1_000551_00.jpg")
    listing = read_source(tmp_path)
    assert {(item, split) for _, item, split in rows(listing)} == {
        ("0002", "train"),
        ("0003", "query"),
        ("0003", "gallery"),
    }
    assert "3 photos beside the split folders were left out (multi-query, train_all)" in listing.notes
    assert "1 photos of -1, which is no item in data sets like Market-1501, were left out" in listing.notes
    assert any(note.startswith("names hold a camera: ") for note in listing.notes)


def test_folders_called_as_cameras_are_told(tmp_path):
    listing = read_source(put(tmp_path, *(f"train/cam0{c}/person{p}/{c}.jpg" for c in (1, 2) for p in range(3))))
    assert any(note.startswith("6 photos lie in folders called as cameras are, which count") for note in listing.notes)
    plain = read_source(put(tmp_path / "plain", "camera bags/3/0.jpg", "camera bags/3/1.jpg"))
    assert not any("called as cameras" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        (["metadata.csv"], "metadata.csv says what the photos beside it are: give it as --source"),
        (["train/metadata.jsonl", "test/metadata.jsonl"], "has all of their rows and a column split"),
    ],
)
def test_a_list_beside_photos_in_no_items_folder_is_named(tmp_path, lists, said):
    """Ids in the names would be other items, and begin anew in each split's folder."""
    for file in lists:
        folder = tmp_path / file.rpartition("/")[0]
        put(folder, "0_a.jpg", "0_b.jpg", "1_a.jpg", "1_b.jpg")
        (folder / file.rpartition("/")[2]).write_text("")
    with pytest.raises(UserError, match=said):
        read_source(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("0001_c1s1_001051_00.jpg", "0001_c2s1_001051_00.jpg", "0002_c1s1_000451_03.jpg", "0002_c1s1_000451_04.jpg"),
        ("sku12-front.jpg", "sku12-back.jpg", "sku7-front.jpg", "sku7-back.jpg"),
    ],
)
def test_items_of_a_flat_folder_are_what_its_names_begin_with(tmp_path, names):
    listing = read_source(put(tmp_path, *names))
    assert {photo.item_id for photo in listing.photos} in ({"0001", "0002"}, {"sku12", "sku7"})
    assert any(note.startswith("items are what the names of the photos begin with: ") for note in listing.notes)
    assert any(note.startswith("names hold a camera: ") for note in listing.notes) == ("_c1s1_" in names[0])


@pytest.mark.parametrize(
    "names",
    [
        ("IMG_0001.jpg", "IMG_0002.jpg", "IMG_0003.jpg", "IMG_0004.jpg"),  # of one camera
        ("20240110_1.jpg", "20240110_2.jpg", "20240111_1.jpg", "20240111_2.jpg"),  # of a day
        ("a1_x.jpg", "b2_x.jpg", "c3_x.jpg"),  # one photo of each
    ],
)
def test_a_flat_folder_without_ids_is_named_as_the_cause(tmp_path, names):
    with pytest.raises(UserError, match="photos lie in no item's folder, e.g. .*: put the photos of each item into a"):
        read_source(put(tmp_path, *names))


LEFT = (
    *(".DS_Store", "._0.jpg", "Thumbs.db", "desktop.ini", ".0.jpg.swp", "~$list.jpg"),
    *(
        "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
        ".@__thumb/s1000.jpg",
        "#recycle/0.jpg",
        "#snapshot/0.jpg",
        "@Recycle/0.jpg",
    ),
    *(".ipynb_checkpoints/0-checkpoint.jpg", ".thumbnails/0.jpg", "thumbs/0.jpg", "_thumbnails/0.png"),
    *("$RECYCLE.BIN/0.jpg", "System Volume Information/0.jpg", "__MACOSX/._0.jpg", "lost+found/0.jpg"),
    *("cache/1/small_image/0.jpg", "_previews/0.jpg"),
    *(".Trash-1000/files/0.jpg", ".Trashes/0.jpg", "Previews.lrdata/0.jpg", ".git/0.jpg", ".picasaoriginals/0.jpg"),
)


def test_what_machines_leave_behind_is_passed_over_and_counted(tmp_path):
    put(tmp_path, "sku1/0.jpg", "sku1/1.JPEG", *(f"sku1/{path}" for path in LEFT), *LEFT)
    listing = read_source(tmp_path)
    assert [photo.item_id for photo in listing.photos] == ["sku1", "sku1"]
    assert listing.notes == [f"{2 * len(LEFT)} files in hidden or thumbnail folders were passed over"]


def test_a_folder_that_may_not_be_read_is_named_unless_it_is_one_that_is_passed_over(tmp_path, monkeypatch):
    put(tmp_path, "sku1/0.jpg", "lost+found/0.jpg", "sku2/0.jpg")
    scandir, locked = os.scandir, {f"{tmp_path}/lost+found"}

    def scan(folder):
        if folder in locked:
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    assert [photo.item_id for photo in read_source(tmp_path).photos] == ["sku1", "sku2"]
    locked.add(f"{tmp_path}/sku2")
    with pytest.raises(UserError, match="Permission denied: '.*/sku2'"):
        read_source(tmp_path)


def test_suffixes_in_any_case_are_read_and_others_counted(tmp_path, monkeypatch):
    put(
        tmp_path,
        "a/0.jfif",
        "a/1.JPE",
        "a/2.AVIF",
        "a/3.HEIC",
        "a/4.CR2",
        "a/5.mp4",
        "a/notes.txt",
        "list.csv",
        "l.jpg",
    )
    listing = read_source(tmp_path)
    assert [photo.path for photo in listing.photos] == ["a/0.jfif", "a/1.JPE", "a/2.AVIF", "a/3.HEIC"]
    assert listing.notes == [
        "2 files are of kinds that are not read (.cr2 1, .mp4 1): export them as JPEG",
        "2 other files are no photos (.txt 1, .csv 1)",
        "list.csv is not read: give it as --source to use it",
        "1 photos in no item's folder were left out: put each into the folder of its item",
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert read_source(tmp_path).left_out == [("a/3.HEIC", listing_module.NEEDS_HEIF)]
    with pytest.raises(UserError, match="all of its photos are HEIC: pip install pillow-heif"):
        read_source(put(tmp_path / "phone", "a/0.heic"))


def test_names_that_are_no_utf8_are_taken(tmp_path):
    put(tmp_path, "sku3/0.jpg")
    for name in (b"J\xe4ger.jpg", "Jäger.jpg".encode()):
        with open(os.path.join(os.fsencode(tmp_path / "sku3"), name), "wb"):  # noqa: PTH118, PTH123
            pass
    assert [photo.path for photo in read_source(tmp_path).photos] == [
        "sku3/0.jpg",
        "sku3/Jäger.jpg",
        "sku3/J\\xe4ger.jpg",
    ]


def test_names_that_are_no_utf8_of_what_is_opened_are_told(tmp_path):
    put(tmp_path, os.fsdecode(b"J\xe4ger/0.jpg"), os.fsdecode(b"shards/J\xe4ger.parquet"), content="x")
    for source in (os.fsdecode(b"J\xe4ger"), "shards"):
        with pytest.raises(UserError, match=r"J\\xe4ger(.parquet)?: has a name that is not UTF-8: rename it"):
            read_source(tmp_path / source)


def test_a_circle_of_links_ends(tmp_path):
    put(tmp_path, "sku/0.jpg")
    (tmp_path / "sku/again").symlink_to(tmp_path)
    assert [photo.path for photo in read_source(tmp_path).photos] == ["sku/0.jpg"]


def test_links_that_lead_nowhere_are_counted_and_named_where_there_is_nothing_else(tmp_path):
    put(tmp_path, "a/0.jpg")
    (tmp_path / "a/1.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "a/2.jpg").symlink_to("2.jpg")
    (tmp_path / "b").symlink_to("gone")
    listing = read_source(tmp_path)
    assert [photo.path for photo in listing.photos] == ["a/0.jpg"]
    assert listing.notes == ["3 links lead nowhere and were passed over"]
    (tmp_path / "a/0.jpg").unlink()
    with pytest.raises(UserError, match=r"no images are found or listed: 2 links lead nowhere, e.g. a/1.jpg: bring"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    "trace", ["Img/img/WOMEN/Dresses/id_00000001/01_1_front.jpg", "img_highres/MEN/Tees/id_00000007/01_1_front.jpg"]
)
def test_inshop_without_its_partition_file_is_known(tmp_path, trace):
    put(tmp_path / "images", trace)
    put(tmp_path / "texts", "Anno/list_item_inshop.txt", "photos/a/0.jpg")
    for source in (tmp_path / "images", tmp_path / "texts"):
        with pytest.raises(UserError, match=r"this is DeepFashion In-Shop .*Eval/list_eval_partition.txt is not there"):
            read_source(source)


def test_a_catalogue_is_not_a_source(tmp_path):
    with pytest.raises(UserError, match="is a catalogue already: give it to evaluate"):
        read_source(put(tmp_path, "catalogue.json", "train-00000.parquet"))
