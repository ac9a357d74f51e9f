"""CSV as spreadsheets of every country write it, and every way in which a path can mean the file that is there."""

import json
import unicodedata
from urllib.parse import quote, quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipfh import UserError
from clipfh.sources.listing import ReadOptions
from clipfh.sources.read import read_source

FILES = ("Größe/Ärmel 1.jpg", "Größe/sku_2.jpg", "plain/100%25.jpg")


@pytest.fixture
def shop(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def lines(paths=FILES, separator=","):
    head = separator.join(("image_path", "item_id", "text"))
    return "\n".join([head, *(separator.join((path, f"item {n}", "schön")) for n, path in enumerate(paths))]) + "\n"


def files_of(listing):
    return sorted(photo.file for photo in listing.photos)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "latin-1", "mac_roman"])
@pytest.mark.parametrize("form", ["{}", "sep={sep}\n{}", "\n{sep}{sep}\n{}{sep}{sep}\n\n"])
def test_a_csv_is_read_in_whatever_form_a_spreadsheet_wrote_it(shop, separator, encoding, form):
    text = form.replace("{}", lines(separator=separator)).replace("{sep}", separator)
    (shop / "list.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    listing = read_source(shop / "list.csv")
    assert files_of(listing) == sorted(FILES) and listing.left_out == []
    assert {photo.text for photo in listing.photos} == {"schön"}
    assert bool(listing.notes) == (not encoding.startswith("utf-8"))


OLD = {"cp1254": "kağıt", "cp1255": "כובע", "cp1256": "قبعة", "cp874": "หมวก", "cp1258": "mưa", "cp1251": "шапка"}
OLD |= {"cp932": "表", "cp949": "모자", "gb18030": "帽子", "cp1253": "καπέλο", "cp1250": "ľan", "cp866": "шапка"}


@pytest.mark.parametrize("encoding", OLD)
def test_an_old_encoding_of_any_country_is_known_by_the_files(tmp_path, encoding):
    name = OLD[encoding]
    (tmp_path / f"{name}.jpg").write_text("")
    (tmp_path / "list.csv").write_bytes(f"image_path;item_id\r\n{name}.jpg;{name}\r\n".encode(encoding))
    assert [photo.item_id for photo in read_source(tmp_path / "list.csv").photos] == [name]


def test_a_stray_quote_in_an_old_encoding_is_told_by_its_line(shop):
    rows = "plain/100%25.jpg;sku\r\n" * 8000
    (shop / "list.csv").write_bytes(f'image_path;item_id\r\n{FILES[0]};a\r\n{FILES[1]};"sku\r\n{rows}'.encode("cp1252"))
    with pytest.raises(UserError, match="list.csv line .*: malformed .field larger than field limit"):
        read_source(shop / "list.csv")


@pytest.mark.parametrize(("name", "encoding"), [("list.txt", "utf-16"), ("LIST.TSV", "utf-8"), ("list.csv", "utf-32")])
def test_the_text_files_of_spreadsheets_are_tables(shop, name, encoding):
    (shop / name).write_bytes(lines(separator="\t").encode(encoding))
    assert files_of(read_source(shop / name)) == sorted(FILES)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_known_where_all_of_it_is_ascii(shop, encoding):
    (shop / "list.csv").write_bytes(f"image_path,item_id\n{FILES[2]},a\n".encode(encoding))
    assert files_of(read_source(shop / "list.csv")) == [FILES[2]]


@pytest.mark.parametrize("head", ["path,label", "plain/a.jpg,sku1", "Table 1,"])
def test_a_table_whose_first_line_names_no_columns_says_so(shop, head):
    (shop / "list.csv").write_text(f"{head}\n{FILES[0]},a\n")
    with pytest.raises(
        UserError, match=r"no column image_path or item_id \(found: .*\): call them so in its first line"
    ):
        read_source(shop / "list.csv")


def test_an_encoding_that_no_file_proves_is_asked_for(shop):
    (shop / "list.csv").write_bytes(lines(FILES[2:]).encode("cp1252"))
    with pytest.raises(UserError, match=r"list.csv: not UTF-8 .*: save it as UTF-8, or name its encoding, e.g. --enc"):
        read_source(shop / "list.csv")
    listing = read_source(shop / "list.csv", ReadOptions(encoding="cp1252"))
    assert [photo.text for photo in listing.photos] == ["schön"]
    for wrong in ("cp99", "ascii"):
        with pytest.raises(UserError, match=f"can't be read by --encoding {wrong}"):
            read_source(shop / "list.csv", ReadOptions(encoding=wrong))


SPELLINGS = {
    "as it is": lambda path, root: path,
    "dotted": lambda path, root: f"./{path}",
    "around": lambda path, root: f"plain/../{path}",
    "decomposed": lambda path, root: unicodedata.normalize("NFD", path),
    "another case": lambda path, root: path.upper(),
    "Windows": lambda path, root: path.replace("/", "\\"),
    "blanks": lambda path, root: f"  {path} ",
    "without its suffix": lambda path, root: path.rpartition(".")[0],
    "absolute": lambda path, root: f"{root}/{path}",
    "URL": lambda path, root: (root / path).as_uri(),
    "URL of localhost": lambda path, root: f"file://localhost{root}/{path}",
    "quoted": lambda path, root: quote(path),
    "quoted in decomposed": lambda path, root: quote(unicodedata.normalize("NFD", path)),
    "quoted twice": lambda path, root: quote(quote(path)),
    "as a web form": lambda path, root: quote_plus(path, safe="/"),
    "by its home": lambda path, root: f"~/{path}",
}


@given(st.lists(st.sampled_from(sorted(SPELLINGS)), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_spelling_of_a_path_finds_the_file_that_is_there(shop, monkeypatch, how):
    monkeypatch.setenv("HOME", str(shop))
    paths = [SPELLINGS[name](path, shop) for name, path in zip(how, FILES, strict=True)]
    (shop / "list.csv").write_text(lines(paths))
    listing = read_source(shop / "list.csv")
    assert {photo.item_id: photo.file for photo in listing.photos} == {f"item {n}": p for n, p in enumerate(FILES)}


def test_two_spellings_of_one_file_are_one_photo(shop):
    (shop / "list.csv").write_text(f"image_path,item_id\n{FILES[1]},a\n./{FILES[1]},a\n{FILES[1].upper()},b\n")
    listing = read_source(shop / "list.csv")
    assert [(photo.path, photo.item_id) for photo in listing.photos] == [(FILES[1], "a"), (FILES[1], "b")]
    assert listing.notes[1:3] == ["1 rows repeat another one and were dropped", "1 images are listed for several items"]


def test_a_name_that_could_mean_two_files_is_missing(shop):
    for name in ("Größe/A.jpg", "Größe/a.jpg"):
        (shop / name).write_text("")
    (shop / "list.csv").write_text("image_path,item_id\ngrösse/a.jpg,x\nplain/100%25.jpg,y\n")
    assert read_source(shop / "list.csv").left_out == [("grösse/a.jpg", "missing")]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("https://shop.example/a.jpg", "listed by URL .*: download them, and list the paths of the files"),
        ("/elsewhere/a.jpg", "/elsewhere/a.jpg is not inside it: give paths relative to it"),
        ("C:\\photos\\a.jpg", "C:/photos/a.jpg is not inside it: give paths relative to it"),
        ("\\\\nas\\photos\\a.jpg", "//nas/photos/a.jpg is not inside it: give paths relative to it"),
        ("~no-such-user/a.jpg", "put images there"),
        ("../a.jpg", "../a.jpg is not inside it: .* move it where they are"),
        ("sku/a.jpg", ", e.g. sku/a.jpg: put images there"),
    ],
)
def test_the_cause_is_named_where_no_file_is_there(shop, path, said):
    (shop / "list.csv").write_text(f"image_path,item_id\n{path},a\n")
    with pytest.raises(UserError, match=f"1 images are listed, none is there.*{said}"):
        read_source(shop / "list.csv")


BAD = f"image_path,item_id,split\n{FILES[0]},a,train\n{FILES[1]},,train\n{FILES[1]},b\n,c,test\n{FILES[2]},d,best\n"


def test_all_bad_lines_are_told_at_once_and_left_out_by_an_option(shop):
    (shop / "list.csv").write_text(BAD)
    with pytest.raises(UserError) as caught:
        read_source(shop / "list.csv")
    said = str(caught.value)
    for line in (
        "line 3: no item_id",
        "line 4: malformed (2 fields, not 3)",
        "line 5: no image_path",
        "line 6: split 'best'",
    ):
        assert line in said
    assert said.endswith("fix them, or leave them out by --skip-bad-lines") and "\n" not in said
    listing = read_source(shop / "list.csv", ReadOptions(skip_bad_lines=True))
    assert files_of(listing) == [FILES[0]]
    assert listing.left_out[0] == (f"{shop}/list.csv line 3", "bad line: no item_id") and len(listing.left_out) == 4


@pytest.mark.parametrize("name", ["file_name", "filepath", "Image_Path", ' "image_path" '])
def test_the_column_of_paths_is_known_by_the_names_of_hubs_too(shop, name):
    (shop / "list.csv").write_text(f"{name},ITEM_ID\n{FILES[0]},a\n")
    assert files_of(read_source(shop / "list.csv")) == [FILES[0]]


def test_ids_that_a_spreadsheet_spoiled_are_noted_and_blanks_stripped(shop):
    ids = ["4.00638E+12", "5,01E12", "nan", "#N/A", "SKU-1", "sku-1", "7", "7.0", " A ", "A", "plain"]
    rows = "".join(f'{FILES[0]},"{item}"\n' for item in ids)
    (shop / "list.csv").write_text(f"image_path,item_id\n{rows}")
    listing = read_source(shop / "list.csv")
    assert {photo.item_id for photo in listing.photos} == {item.strip() for item in ids}
    assert listing.notes[-3:] == [
        "2 item ids look rounded by a spreadsheet, so that one may be several items, e.g. 4.00638E+12, 5,01E12",
        "2 item ids look like a missing one, e.g. nan, #N/A",
        "2 item ids differ from another in nothing but case, blanks, quotes, zeros or how letters are written, e.g. "
        "'SKU-1' and 'sku-1', '7' and '7.0'",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Café", unicodedata.normalize("NFD", "Café")),  # of two computers
        ("A1", "A1\u00a0"),  # of a web page
        ("\u200bA1\ufeff", "A1"),
        ('="00123"', "00123"),  # how exports keep a spreadsheet from eating the zeros
    ],
)
def test_an_id_is_one_however_its_signs_are_encoded(shop, one, other):
    quoted = [item.replace('"', '""') for item in (one, other)]
    (shop / "list.csv").write_text(f'image_path,item_id\n{FILES[0]},"{quoted[0]}"\n{FILES[1]},"{quoted[1]}"\n')
    assert len({photo.item_id for photo in read_source(shop / "list.csv").photos}) == 1


@pytest.mark.parametrize(("one", "other"), [("00123", "123"), ("123", "１２３"), ("'00123", "00123")])
def test_ids_that_may_be_one_are_noted(shop, one, other):
    (shop / "list.csv").write_text(f"image_path,item_id\n{FILES[0]},{one}\n{FILES[1]},{other}\n")
    listing = read_source(shop / "list.csv")
    assert {photo.item_id for photo in listing.photos} == {one, other}
    assert listing.notes[-1].endswith(f"e.g. {one!r} and {other!r}")


def test_only_names_like_inshops_hold_a_variant(shop):
    names = ("20240110_101500_00.jpg", "02_1_front.jpg", "02_1_detail.jpg", "123_1_front.jpg")
    for name in names:
        (shop / name).write_text("")
    (shop / "list.csv").write_text("image_path,item_id\n" + "".join(f"{name},a\n" for name in names))
    assert [(photo.variant, photo.view) for photo in read_source(shop / "list.csv").photos] == [
        ("", "20240110_101500_00"),
        ("02", "front"),
        ("", "02_1_detail"),
        ("", "123_1_front"),
    ]


def test_boxes_are_read_and_each_box_of_a_file_is_a_photo(shop):
    (shop / "list.csv").write_text(
        f"image_path,item_id,x,y,width,height\n{FILES[0]},a,0,1,20,30\n{FILES[0]},b,5.4,1,20,30\n{FILES[1]},a,,,,\n"
    )
    listing = read_source(shop / "list.csv")
    assert [(photo.path, photo.box) for photo in listing.photos] == [
        (f"{FILES[0]}#xywh=0,1,20,30", (0, 1, 20, 30)),
        (f"{FILES[0]}#xywh=5,1,20,30", (5, 1, 20, 30)),
        (FILES[1], None),
    ]
    (shop / "list.csv").write_text(f"image_path,item_id,x,y,width,height\n{FILES[0]},a,0,1,0,30\n{FILES[0]},b,5,,2,3\n")
    with pytest.raises(UserError, match="line 2: box 0, 1, 0, 30 is empty; line 3: box 5, , 2, 3 is not x, y, width"):
        read_source(shop / "list.csv")


def test_a_split_of_blanks_is_none(shop):
    (shop / "list.csv").write_text(f"image_path,item_id,split\n{FILES[0]},a, \n")
    assert [photo.split for photo in read_source(shop / "list.csv").photos] == [""]


@pytest.mark.parametrize(
    ("option", "source"),
    [("encoding", "list.parquet"), ("encoding", "."), ("skip_bad_lines", "."), ("inshop_boxes", "list.csv")],
)
def test_an_option_for_another_form_of_source_is_refused(shop, option, source):
    (shop / "list.csv").write_text(lines())
    pq.write_table(pa.table({"image_path": FILES, "item_id": FILES}), shop / "list.parquet")
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} is for another form of source: leave it out"):
        read_source(shop / source, ReadOptions(**{option: "cp1252" if option == "encoding" else True}))


def test_width_and_height_alone_are_no_box(shop):
    """Hubs list the sizes of photos under these names."""
    (shop / "list.csv").write_text(f"image_path,item_id,width,height\n{FILES[0]},a,640,480\n")
    listing = read_source(shop / "list.csv")
    assert [photo.box for photo in listing.photos] == [None]
    assert listing.notes == ["columns that were not used: width, height"]


def test_json_lines_as_image_folders_have_them_are_read(shop):
    text = "a hat\u2028of wool\x85"  # signs that end lines elsewhere
    rows = [{"file_name": path, "item_id": n, "text": text, "caption": "hat"} for n, path in enumerate(FILES)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (shop / "metadata.jsonl").write_bytes("\r\n".join([*lines, "", ""]).encode())
    listing = read_source(shop / "metadata.jsonl")
    assert {photo.text for photo in listing.photos} == {text}
    assert {photo.file: photo.item_id for photo in listing.photos} == {f: str(n) for n, f in enumerate(FILES)}
    assert "columns that were not used: caption" in listing.notes


def test_bad_json_lines_are_told_all_at_once(shop):
    (shop / "a.jsonl").write_text(
        '{"image_path": "plain/100%25.jpg", "item_id": 1}\n{"image_path"\n[1]\n{"item_id": 2}\n'
    )
    with pytest.raises(
        UserError, match="line 2: not a JSON object.*; line 3: not a JSON object.*; line 4: no image_path"
    ):
        read_source(shop / "a.jsonl")
    listing = read_source(shop / "a.jsonl", ReadOptions(skip_bad_lines=True))
    assert (len(listing.photos), len(listing.left_out)) == (1, 3)
