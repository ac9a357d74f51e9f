"""A source, in any of the forms that people have, becomes a listing: which photos there are, of which item, and where.

Sources are In-Shop as distributed, the original system's processed metadata, a folder of item folders, and a CSV or
Parquet file; on a disk or at any URI that Arrow opens. `read` looks at names and annotations, never into an image.
"""

import csv
import io
import json
import posixpath
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from clipfh import UserError

MISSING = "missing"
OUTSIDE = "path climbs out of the source"
LeftOut = tuple[str, str]  # path and why


class Photo(NamedTuple):
    """One listed image: what the source says of it, and where its file is. An unknown field is empty."""

    path: str
    """As the source writes it."""
    item_id: str
    split: str = ""
    """train, val, val_query, val_gallery, test, query, gallery or, where the source has none, empty."""
    variant: str = ""
    view: str = ""
    gender: str = ""
    category: str = ""
    text: str = ""
    """Description of the item as it stands; paragraphs that come one by one are joined to one a line."""
    color: str = ""
    file: str = ""
    """Path below the listing's store."""
    stamp: str = ""
    """Size in bytes and time of change."""


@dataclass(frozen=True)
class Listing:
    """The photos of a source. Images are read from the folder `store`, and from nowhere outside it."""

    store: fs.SubTreeFileSystem
    photos: list[Photo]
    """Photos whose file is there, without repeats, in no particular order."""
    left_out: list[LeftOut]
    """Photos whose file is not there, or would be outside."""
    notes: list[str]
    """What a person should know about the source."""


def read(source: str | Path) -> Listing:
    """List the photos of a source: a path or a URI.

    A CSV or Parquet file has the columns image_path (relative to the file) and item_id. It may have text, split,
    variant, view, gender, category and color.

    Raises:
        UserError: the source can't be read or contradicts its form, or none of its images is there.
    """
    try:
        store, file = _open(str(source))
        return _read_file(store, file) if file else _read_folder(store)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source}: can't be read ({' '.join(str(error).split())}): check --source") from error


_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z")


def _open(source: str) -> tuple[fs.SubTreeFileSystem, str]:
    """The source's folder and, where the source is a file, its name."""
    if "://" in source:
        base, path = fs.FileSystem.from_uri(source)
    else:
        base, path = fs.LocalFileSystem(), Path(source).absolute().as_posix()
    kind = base.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise UserError(f"{source}: no such file or folder: check --source")
    folder, name = (path, "") if kind == fs.FileType.Directory else posixpath.split(path)
    return fs.SubTreeFileSystem(folder, base), name


def _read_file(store: fs.SubTreeFileSystem, name: str) -> Listing:
    suffix = posixpath.splitext(name)[1].lower()
    if suffix == ".csv":
        return _read_csv(store, name)
    if suffix == ".parquet":
        return _read_parquet(store, name)
    remedy = "unpack it and give the folder" if suffix in _ARCHIVE_SUFFIXES else "give a .csv, a .parquet or a folder"
    raise UserError(f"{store.base_path}{name}: not a source that can be read: {remedy} as --source")


def _read_folder(store: fs.SubTreeFileSystem) -> Listing:
    """List a folder by its form. In-Shop may lie one folder deeper, as its archive unpacks."""
    inside = store.get_file_info(fs.FileSelector(""))
    folders = ["", *sorted(f"{info.path}/" for info in inside if info.type == fs.FileType.Directory)]
    places = list(product(folders, ("Eval/list_eval_partition.txt", "list_eval_partition.txt")))
    infos = store.get_file_info([folder + partition for folder, partition in places])
    for (folder, partition), info in zip(places, infos, strict=True):
        if info.is_file:
            return _read_inshop(fs.SubTreeFileSystem(store.base_path + folder, store.base_fs), partition)
    for folder in ("metadata/", ""):
        if _first_file(store, folder + "image_paths.json"):
            return _read_processed(store, folder)
    return _read_item_folders(store)


# A table

_COLUMNS = ("image_path", "item_id", "text", "split", "variant", "view", "gender", "category", "color")
_SPLITS = ("", "train", "val", "val_query", "val_gallery", "test", "query", "gallery")


def _read_csv(store: fs.SubTreeFileSystem, name: str) -> Listing:
    where = f"{store.base_path}{name}"
    reader = csv.DictReader(io.StringIO(_text(store, name), newline=""), strict=True)
    photos = []
    try:
        notes = _check_columns(reader.fieldnames or [], where)
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"not {len(reader.fieldnames or [])} fields")
            photos.append(_photo(row, f"{where} line {reader.line_num}"))
    except csv.Error as error:
        raise UserError(f"{where} line {reader.reader.line_num}: malformed ({error}): mend the line") from error
    return _locate_files(store, photos, notes)


def _read_parquet(store: fs.SubTreeFileSystem, name: str) -> Listing:
    where = f"{store.base_path}{name}"
    with store.open_input_file(name) as file:
        table = pq.ParquetFile(file)
        notes = _check_columns(table.schema_arrow.names, where)
        columns = [field.name for field in table.schema_arrow if _is_used(field, where)]
        rows = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
        photos = [_photo(row, f"{where} row {number}") for number, row in enumerate(rows, start=1)]
    return _locate_files(store, photos, notes)


def _check_columns(names: Sequence[str], where: str) -> list[str]:
    """Notes on columns that are not used.

    Raises:
        UserError: a column that must be there is not, or a column is there twice.
    """
    if twice := [name for name in _COLUMNS if names.count(name) > 1]:
        raise UserError(f"{where}: several columns are called {twice[0]}: keep one of them")
    if missing := {"image_path", "item_id"} - set(names):
        shown = ", ".join(names)[:200]
        raise UserError(f"{where}: no column {' or '.join(sorted(missing))} (found: {shown}): rename it")
    unused = [name for name in names if name not in _COLUMNS]
    return [f"columns that were not used: {', '.join(unused)}"] if unused else []


def _is_used(field: pa.Field, where: str) -> bool:
    """Whether a column is used. A used column must hold text or numbers."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    is_plain = any(is_a(kind) for is_a in (*text, pa.types.is_integer, pa.types.is_floating, pa.types.is_null))
    if field.name in _COLUMNS and not is_plain:
        raise UserError(f"{where}: column {field.name} holds {kind}: store it as text")
    return field.name in _COLUMNS


# Item folders

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


def _read_item_folders(store: fs.SubTreeFileSystem) -> Listing:
    """An item is a folder that holds images, called by its whole path; the folder around it is its category."""
    photos = []
    for info in store.get_file_info(fs.FileSelector("", recursive=True)):
        folder, name = posixpath.split(info.path)
        if (
            info.type != fs.FileType.Directory
            and folder
            and name.lower().endswith(_IMAGE_SUFFIXES)
            and not name.startswith(".")
        ):
            category = posixpath.basename(posixpath.dirname(folder))
            photos.append(_photo({"image_path": info.path, "item_id": folder, "category": category}, info.path))
    return _locate_files(store, photos)


# In-Shop

_OFFICIAL_COUNTS = {
    "images": 52_712,
    "train images": 25_882,
    "train items": 3_997,
    "query images": 14_218,
    "gallery images": 12_612,
    "test items": 3_985,
}


_TREES = ("img/", "Img/img/", "img_highres/", "Img/img_highres/", "Img/", "")


def _read_inshop(store: fs.SubTreeFileSystem, partition: str) -> Listing:
    """DeepFashion In-Shop. Identity is what the partition file says: 99 items lie in two categories."""
    texts, notes = _inshop_texts(store)
    photos = []
    for where, path, item_id, split in _partition(store, partition):
        text, color = texts.get(item_id, ("", ""))
        row = {"image_path": path, "item_id": item_id, "split": split, "text": text, "color": color}
        photos.append(_photo(row | _inshop_folders(path), where))
    if unlisted := len(texts.keys() - {photo.item_id for photo in photos}):
        notes.append(f"{unlisted:,} descriptions are of items that are not listed")
    tree = _inshop_tree(store, photos)
    return _locate_files(store, photos, [*notes, _official_note(photos), *_tree_notes(store, tree)], [tree + "{inner}"])


def _partition(store: fs.SubTreeFileSystem, file: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows as (where it stands, path, item, status). A first line with a number counts them."""
    stated, rows = None, 0
    for number, line in enumerate(io.StringIO(_text(store, file), newline=None), start=1):
        columns = line.rsplit(None, 2)
        if number == 1 and len(columns) == 1 and columns[0].isdecimal():
            stated = int(columns[0])
        elif columns and (rows or columns[0] != "image_name"):
            where, rows = f"{store.base_path}{file} line {number}", rows + 1
            if len(columns) != 3:
                shown = f"{line.strip()[:80]!r}"
                raise UserError(f"{where}: {shown} is not 'image_name item_id evaluation_status': mend it")
            path, item, status = columns
            yield where, path, item, status
    if stated not in (None, rows):
        raise UserError(
            f"{store.base_path}{file}: line 1 says {stated:,} images and {rows:,} are listed: "
            "get the whole file, or correct line 1"
        )


def _inshop_tree(store: fs.SubTreeFileSystem, photos: list[Photo]) -> str:
    """The first of the trees that has any of the photos: all are taken from this one, for one resolution."""
    inside = [photo for photo in photos if not _climbs(photo)]
    folders = store.get_file_info([tree.rstrip("/") for tree in _TREES])
    there = [tree for tree, info in zip(_TREES, folders, strict=True) if info.type == fs.FileType.Directory]
    for tree in there:
        if any(info.is_file for info in _look(store, inside, tree + "{inner}")):
            return tree
    return ""


def _tree_notes(store: fs.SubTreeFileSystem, used: str) -> list[str]:
    infos = store.get_file_info([tree.rstrip("/") for tree in _TREES[:4] if tree != used])
    others = [f"{info.path}/" for info in infos if info.type == fs.FileType.Directory]
    notes = [f"the images are those in {used or 'the folder of the source'}"]
    return [*notes, f"{', '.join(others)} is not used: to use it, move {used} away"] if others and used else notes


def _inshop_folders(path: str) -> dict[str, str]:
    """Gender and category from `img/WOMEN/Dresses/id_00000002/02_1_front.jpg`; any names will do."""
    *_, gender, category = ["", "", *path.removeprefix("img/").split("/")[:-2]]
    return {"gender": gender, "category": category}


def _inshop_texts(store: fs.SubTreeFileSystem) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Item to (text, color), and notes. A paragraph is a line and otherwise left as it is."""
    names = ("Anno/list_description_inshop.json", "list_description_inshop.json")
    file = _first_file(store, *names)
    if not file:
        return {}, [f"{names[0]} is not there: the items have no text"]
    descriptions: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for number, entry in enumerate(_json(store, file, list)):
        where = f"{store.base_path}{file}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("item"), str):
            raise UserError(f"{where} has no 'item': mend the file or take it away")
        paragraphs = [text for text in _texts(entry.get("description"), where) if text.strip()]
        descriptions[entry["item"]]["\n".join(paragraphs), " ".join(_texts(entry.get("color"), where))] = None
    texts = {
        item: next((own for own in described if own[0]), next(iter(described)))
        for item, described in descriptions.items()
    }
    several = sum(len(described) > 1 for described in descriptions.values())
    return texts, [f"{several:,} items are described more than once: the first text is used"] if several else []


def _official_note(photos: list[Photo]) -> str:
    images = Counter(photo.split for photo in photos)
    train = {photo.item_id for photo in photos if photo.split == "train"}
    test = {photo.item_id for photo in photos if photo.split in ("query", "gallery")}
    counts = (len(photos), images["train"], len(train), images["query"], images["gallery"], len(test))
    pairs = zip(_OFFICIAL_COUNTS.items(), counts, strict=True)
    differing = [f"{number:,} {what} ({official:,})" for (what, official), number in pairs if number != official]
    if not differing:
        return "the counts are those of the official In-Shop split"
    return f"the counts differ from the official In-Shop split (in brackets): {', '.join(differing)}"


# The original system's metadata


def _read_processed(store: fs.SubTreeFileSystem, folder: str) -> Listing:
    """The original system's metadata in `folder`: `image_paths.json` maps a path to {"item_id", "split"}.

    It may also map keys to paths or lists of paths, with the identity in the path and the split (of a path or key) in
    `image_splits.json`. The original validates on images of training items; those are training images here.
    """
    if not folder:
        parent, name = posixpath.split(store.base_path.rstrip("/"))
        around = fs.SubTreeFileSystem(parent, store.base_fs)
        if around.get_file_info("splits").type == fs.FileType.Directory:
            store, folder = around, f"{name}/"  # the original keeps its images beside its metadata
    splits = _processed_splits(store, folder)
    prompts = _processed_prompts(store, folder)
    photos = []
    for key, entry in _json(store, f"{folder}image_paths.json", dict).items():
        where = f"{store.base_path}{folder}image_paths.json, {key!r}"
        fields = entry if isinstance(entry, dict) else {}
        for path in [key] if isinstance(entry, dict) else _texts(entry, where):
            item_id = fields.get("item_id") or next(iter(re.findall(r"id_\d{8}", path)), "")
            split = fields.get("split") or splits.get(path) or splits.get(key)
            text, color = prompts.get(str(item_id)) or prompts.get(path) or ("", "")
            row = {"image_path": path, "item_id": item_id, "text": text, "color": color}
            row |= {"split": "train" if split == "val" else split, **_inshop_folders(path)}
            photos.append(_photo(row, where))
    return _locate_files(store, photos, layouts=("splits/{split}/{path}", "splits/val/{path}", "{path}"))


def _processed_splits(store: fs.SubTreeFileSystem, folder: str) -> dict[str, str]:
    """Path or key to split, from {path: split} or {split: [path, ...]}."""
    file = _first_file(store, f"{folder}image_splits.json")
    by_path: dict[str, str] = {}
    for key, value in (_json(store, file, dict) if file else {}).items():
        paths = _texts(value, f"{store.base_path}{file}, {key!r}")
        by_path |= {key: value} if isinstance(value, str) else dict.fromkeys(paths, key)
    return by_path


_PROMPT_FILES = (  # the least changed text first
    "image_prompts_per_identity.json",
    "image_prompts_clean.json",
    "image_prompts_cleaned_for_v4.json",
    "image_prompts.json",
)


def _processed_prompts(store: fs.SubTreeFileSystem, folder: str) -> dict[str, tuple[str, str]]:
    """Item or path to (text, color), from prompts of the form "A clothing item in {color}. {description}"."""
    file = _first_file(store, *(folder + name for name in _PROMPT_FILES))
    parts = {}
    for key, value in (_json(store, file, dict) if file else {}).items():
        prompt = "\n".join(_texts(value, f"{store.base_path}{file}, {key!r}"))
        match = re.fullmatch(r"A clothing item(?: in (.*?))?\. ?(.*)", prompt, re.DOTALL)
        text, color = (match[2], match[1] or "") if match else (prompt, "")
        # The original gives this to an item without a description
        parts[key] = ("" if text == f"A photo of {key.replace('_', ' ')}" else text, color)
    return parts


# From rows to photos, and from photos to their files


def _photo(row: Mapping[str, Any], where: str) -> Photo:
    """A listed row as a Photo; view and variant, where not given, come from a name like `02_1_front.jpg`."""
    given = {name: text for name, value in row.items() if name in _COLUMNS and (text := _plain(value, where))}
    path = given.pop("image_path", "")
    if not path or "item_id" not in given:
        raise UserError(f"{where}: no {'item_id' if path else 'image_path'}: mend it or take it out")
    if given.get("split", "") not in _SPLITS:
        raise UserError(f"{where}: split {given['split']!r} is none of {', '.join(_SPLITS[1:])}: mend it")
    stem = posixpath.splitext(posixpath.basename(path))[0]
    match = re.fullmatch(r"(\d+)_\d+_(.+)", stem)
    variant, view = match.groups() if match else ("", stem)
    return Photo(path, **{"variant": sys.intern(variant), "view": sys.intern(view)} | given)


def _plain(value: Any, where: str) -> str:
    """A field as text, of which there is one copy. An id that a table holds as 6.0 is 6, and NaN is nothing."""
    if type(value) is str and value.isascii():  # nearly all of them
        return sys.intern(value)
    if isinstance(value, float):
        value = "" if value != value else int(value) if value.is_integer() else value
    if not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: holds {value!r:.80} where a text belongs: mend it")
    text = "" if value is None else str(value)
    # A string that can't be written as UTF-8 (half of a surrogate pair in JSON) must not stop a catalogue
    return sys.intern(text if text.isascii() else text.encode("utf-8", "replace").decode())


def _locate_files(
    store: fs.SubTreeFileSystem, photos: list[Photo], notes: Iterable[str] = (), layouts: Sequence[str] = ("{path}",)
) -> Listing:
    """Locate the file of each photo in the first of `layouts` that has it. Photos without a file are left out.

    In a layout, `inner` stands for a photo's path without a leading `img/`.
    """
    unique = list({(photo.path, photo.item_id, photo.split): photo for photo in photos}.values())
    notes = [*notes, *_repeats(photos, unique)]
    missing = [photo for photo in unique if not _climbs(photo)]
    outside = [(photo.path, OUTSIDE) for photo in unique if _climbs(photo)]
    present: list[Photo] = []
    for layout in layouts:
        num_before, absent = len(present), list[Photo]()
        for photo, at in zip(missing, _look(store, missing, layout), strict=True):
            if at.is_file:
                present.append(photo._replace(file=at.path, stamp=f"{at.size} {at.mtime_ns}"))
            else:
                absent.append(photo)
        missing, hits = absent, len(present) - num_before
        if hits and len(layouts) > 1:
            notes.append(f"{hits:,} images were found as {layout.format(path='*', inner='*', split='*')}")
    if not present:
        raise UserError(_nothing_found(store, len(unique), len(outside)))
    return Listing(store, present, outside + [(photo.path, MISSING) for photo in missing], notes)


def _repeats(photos: list[Photo], unique: list[Photo]) -> list[str]:
    """Notes on rows that say the same again, and on images that are said to show several items."""
    items = Counter(path for path, _ in {(photo.path, photo.item_id) for photo in unique})
    counts = {
        "rows repeat another one and were dropped": len(photos) - len(unique),
        "images are listed for several items": sum(number > 1 for number in items.values()),
    }
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def _look(store: fs.SubTreeFileSystem, photos: Iterable[Photo], layout: str) -> Iterator[fs.FileInfo]:
    """What is where the photos are in this layout. Object storage is asked many times at once."""
    files = (layout.format(path=p.path, inner=p.path.removeprefix("img/"), split=p.split) for p in photos)
    with ThreadPoolExecutor(16) as pool:
        while window := list(islice(files, 1024)):
            parts = [window[start : start + 64] for start in range(0, len(window), 64)]
            for infos in pool.map(store.get_file_info, parts):
                yield from infos


def _climbs(photo: Photo) -> bool:
    path = photo.path
    return path.startswith("/") or "://" in path or "\0" in path or ".." in path.split("/")


def _nothing_found(store: fs.SubTreeFileSystem, listed: int, outside: int) -> str:
    if outside:
        return f"{store.base_path}: the images listed are not inside it: give paths relative to it"
    inside = store.get_file_info(fs.FileSelector(""))
    folders = [info.path for info in inside if info.type == fs.FileType.Directory]
    infos = inside + [info for folder in folders for info in store.get_file_info(fs.FileSelector(folder))]
    archives = sorted(info.path for info in infos if info.is_file and info.path.lower().endswith(_ARCHIVE_SUFFIXES))
    more = f" and {len(archives) - 5} more" if len(archives) > 5 else ""
    remedy = f"unpack {', '.join(archives[:5])}{more} there" if archives else "put images there"
    count = f"{listed:,} images are listed, none is there" if listed else "no images are found or listed"
    return f"{store.base_path}: {count}: {remedy}, or check --source"


# Files of a source


def _first_file(store: fs.SubTreeFileSystem, *paths: str) -> str:
    """The first of these paths that is a file; empty where none is."""
    return next((path for path in paths if store.get_file_info(path).is_file), "")


def _text(store: fs.SubTreeFileSystem, path: str) -> str:
    with store.open_input_file(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{store.base_path}{path}: not UTF-8 ({error}): save it as UTF-8") from error


def _json(store: fs.SubTreeFileSystem, path: str, kind: type) -> Any:
    where = f"{store.base_path}{path}"
    try:
        value = json.loads(_text(store, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {error.lineno}: not valid JSON ({error.msg}): mend it") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise UserError(f"{where}: not valid JSON ({error}): mend it") from error
    if not isinstance(value, kind):
        raise UserError(f"{where}: holds a {type(value).__name__} where a {kind.__name__} belongs: mend it")
    return value


def _texts(value: Any, where: str) -> list[str]:
    """A text, or a list of texts, as a list; nothing is an empty one."""
    texts = value if isinstance(value, list) else [value] if value else []
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"{where}: holds {wrong[0]!r:.80} where a text belongs: mend it")
    return texts
