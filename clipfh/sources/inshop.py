"""In-Shop as distributed, and as the original system's processed metadata."""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from pyarrow import fs

from clipfh import UserError
from clipfh.sources.files import (
    File,
    as_texts,
    first_file,
    has_any,
    locate_in_layouts,
    read_json,
    read_lines,
)
from clipfh.sources.listing import Box, Listing, Photo, require_photo

_OFFICIAL_COUNTS = {
    "images": 52_712,
    "train images": 25_882,
    "train items": 3_997,
    "query images": 14_218,
    "gallery images": 12_612,
    "test items": 3_985,
}


_TREES = ("img/", "Img/img/", "img_highres/", "Img/img_highres/", "Img/", "")


_PARTITIONS = ("Eval/list_eval_partition.txt", "list_eval_partition.txt")


def find_partition(store: fs.SubTreeFileSystem, folders: Sequence[str]) -> tuple[str, str] | None:
    """Where In-Shop's partition file is: one of `folders`, and the file's path below it. None where it is not."""
    places = list(product(folders, _PARTITIONS))
    infos = store.get_file_info([folder + partition for folder, partition in places])
    return next((place for place, info in zip(places, infos, strict=True) if info.is_file), None)


_OWN_IMAGE = re.compile(r"(.*/)?(img|img_highres)/[^/]+/[^/]+/id_\d{8}/[^/]+")
_OWN_FILE = re.compile(r"(.*/)?list_(description|item|bbox|landmarks|attr\w*|color_cloth)_inshop\w*\.(txt|json)")


def require_partition(store: fs.SubTreeFileSystem, files: Iterable[File]) -> None:
    """Refuse In-Shop without its partition file, which alone tells items and splits.

    Raises:
        UserError: the files are In-Shop's.
    """
    own = next((f.path for f in files if _OWN_FILE.fullmatch(f.path) or _OWN_IMAGE.fullmatch(f.path)), None)
    if own:
        raise UserError(
            f"{store.base_path}: this is DeepFashion In-Shop ({own}), and {_PARTITIONS[0]} is not there, which says "
            "what the items and the splits are: put it there, or give a single folder of photos as --source"
        )


def read_inshop(store: fs.SubTreeFileSystem, partition: str, with_boxes: bool) -> Listing:
    """DeepFashion In-Shop. Identity is what the partition file says: 99 items lie in two categories."""
    texts, notes = _inshop_texts(store)
    photos = []
    for where, path, item_id, split in _partition(store, partition):
        text, color = texts.get(item_id, ("", ""))
        row = {"image_path": path, "item_id": item_id, "split": split, "text": text, "color": color}
        photos.append(require_photo(row | _name_fields(path), where))
    if unlisted := len(texts.keys() - {photo.item_id for photo in photos}):
        notes.append(f"{unlisted:,} descriptions are of items that are not listed")
    tree = _inshop_tree(store, photos)
    notes += [_official_note(photos), *_tree_notes(store, tree)]
    if with_boxes:
        boxes = _inshop_boxes(store, tree)
        photos = [photo._replace(box=boxes.get(photo.path)) for photo in photos]
        without = sum(photo.box is None for photo in photos)
        notes.append(f"photos are cut to In-Shop's boxes, {without:,} have none and stay whole")
    return locate_in_layouts(store, photos, notes, [tree + "{inner}"])


def _inshop_boxes(store: fs.SubTreeFileSystem, tree: str) -> dict[str, Box]:
    """Path to the box of its garment, from lines of path, clothes type, pose type and two corners."""
    file = first_file(store, "Anno/list_bbox_inshop.txt", "list_bbox_inshop.txt")
    if not file or "highres" in tree:
        cause = "Anno/list_bbox_inshop.txt is not there" if not file else f"they fit the images of img/, not of {tree}"
        raise UserError(f"{store.base_path}: --inshop-boxes: {cause}: fix that, or leave the option out")
    lines = (line.rsplit(None, 6) for line in read_lines(store, file))
    corners = {
        line[0]: [int(n) for n in line[3:]] for line in lines if len(line) == 7 and "".join(line[3:]).isdecimal()
    }
    return {
        path: (x, y, right - x, bottom - y)
        for path, (x, y, right, bottom) in corners.items()
        if x < right and y < bottom
    }


def _partition(store: fs.SubTreeFileSystem, file: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows as (where it stands, path, item, status). A first line with a number counts them."""
    count, rows = None, 0
    for number, line in enumerate(read_lines(store, file), start=1):
        columns = line.rsplit(None, 2)
        if number == 1 and len(columns) == 1 and columns[0].isdecimal():
            count = int(columns[0])
        elif columns and (rows or columns[0] != "image_name"):
            where, rows = f"{store.base_path}{file} line {number}", rows + 1
            if len(columns) != 3:
                quote = f"{line.strip()[:80]!r}"
                raise UserError(f"{where}: {quote} is not 'image_name item_id evaluation_status': fix it")
            path, item, status = columns
            yield where, path, item, status
    if count not in (None, rows):
        raise UserError(
            f"{store.base_path}{file}: line 1 says {count:,} images and {rows:,} are listed: "
            "get the whole file, or correct line 1"
        )


def _inshop_tree(store: fs.SubTreeFileSystem, photos: list[Photo]) -> str:
    """The first of the trees that has any of the photos. All are taken from it, so that they have one resolution."""
    folders = store.get_file_info([tree.rstrip("/") for tree in _TREES])
    there = [tree for tree, info in zip(_TREES, folders, strict=True) if info.type == fs.FileType.Directory]
    return next((tree for tree in there if has_any(store, photos, tree + "{inner}")), "")


def _tree_notes(store: fs.SubTreeFileSystem, folder: str) -> list[str]:
    infos = store.get_file_info([tree.rstrip("/") for tree in _TREES[:4] if tree != folder])
    others = [f"{info.path}/" for info in infos if info.type == fs.FileType.Directory]
    notes = [f"the images are those in {folder or 'the folder of the source'}"]
    return [*notes, f"{', '.join(others)} is not used: to use it, move {folder} away"] if others and folder else notes


def _name_fields(path: str) -> dict[str, str]:
    """Gender, category, variant and view from `img/WOMEN/Dresses/id_00000002/02_1_front.jpg`; any names will do."""
    *_, gender, category = ["", "", *path.removeprefix("img/").split("/")[:-2]]
    stem = posixpath.splitext(posixpath.basename(path))[0]
    match = re.fullmatch(r"(\d+)_\d+_(.+)", stem)
    variant, view = match.groups() if match else ("", stem)
    return {"gender": gender, "category": category, "variant": variant, "view": view}


def _inshop_texts(store: fs.SubTreeFileSystem) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Item to (text, color), and notes. A paragraph is a line and otherwise left as it is."""
    names = ("Anno/list_description_inshop.json", "list_description_inshop.json")
    file = first_file(store, *names)
    if not file:
        return {}, [f"{names[0]} is not there: the items have no text"]
    descriptions: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for number, entry in enumerate(read_json(store, file, list)):
        where = f"{store.base_path}{file}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("item"), str):
            raise UserError(f"{where} has no 'item': fix the file or take it away")
        paragraphs = [text for text in as_texts(entry.get("description"), where) if text.strip()]
        descriptions[entry["item"]]["\n".join(paragraphs), " ".join(as_texts(entry.get("color"), where))] = None
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


def read_processed(store: fs.SubTreeFileSystem, folder: str) -> Listing:
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
    for key, entry in read_json(store, f"{folder}image_paths.json", dict).items():
        where = f"{store.base_path}{folder}image_paths.json, {key!r}"
        fields = entry if isinstance(entry, dict) else {}
        for path in [key] if isinstance(entry, dict) else as_texts(entry, where):
            item_id = fields.get("item_id") or next(iter(re.findall(r"id_\d{8}", path)), "")
            split = fields.get("split") or splits.get(path) or splits.get(key)
            text, color = prompts.get(str(item_id)) or prompts.get(path) or ("", "")
            row = {"image_path": path, "item_id": item_id, "text": text, "color": color}
            row |= {"split": "train" if split == "val" else split, **_name_fields(path)}
            photos.append(require_photo(row, where))
    return locate_in_layouts(store, photos, [], ("splits/{split}/{path}", "splits/val/{path}", "{path}"))


def _processed_splits(store: fs.SubTreeFileSystem, folder: str) -> dict[str, str]:
    """Path or key to split, from {path: split} or {split: [path, ...]}."""
    file = first_file(store, f"{folder}image_splits.json")
    by_path: dict[str, str] = {}
    for key, value in (read_json(store, file, dict) if file else {}).items():
        paths = as_texts(value, f"{store.base_path}{file}, {key!r}")
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
    file = first_file(store, *(folder + name for name in _PROMPT_FILES))
    parts = {}
    for key, value in (read_json(store, file, dict) if file else {}).items():
        prompt = "\n".join(as_texts(value, f"{store.base_path}{file}, {key!r}"))
        match = re.fullmatch(r"A clothing item(?: in (.*?))?\. ?(.*)", prompt, re.DOTALL)
        text, color = (match[2], match[1] or "") if match else (prompt, "")
        # The original gives this to an item without a description
        parts[key] = ("" if text == f"A photo of {key.replace('_', ' ')}" else text, color)
    return parts
