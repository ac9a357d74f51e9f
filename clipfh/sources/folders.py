"""Photos in folders: one an item, split folders around them, or names that begin with the item's id."""

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pyarrow import fs

from clipfh import UserError
from clipfh.sources.files import File, is_image, is_passed_over, locate, printable
from clipfh.sources.listing import Listing, Photo, make_photo, split_named

_PICTURES_NOT_READ = re.compile(
    r"\.(cr[23w]|nef|arw|dng|raf|orf|rw2|pef|srw|psd|psb|ai|eps|svgz?|tga|jp2|jxl|jxr|ico|icns|xcf|pcx|exr|hdr|dds"
    r"|mp4|mov|avi|webm|mkv|3gp|pdf)",
    re.IGNORECASE,
)
_PERSON = re.compile(r"(-?\d+)_c\d+")
"""Item and camera, with which names of Market-1501 and its like begin."""
_CAMERAS = (
    "names hold a camera: figures published for such data sets leave out photos of a query's item by its own camera, "
    "which evaluate counts, so these are not comparable"
)
_CAMERA_FOLDER = re.compile(r"cam(era)?[ _-]?\d+", re.IGNORECASE)
_LIST = re.compile(r"(^|/)metadata\.(csv|jsonl|parquet)$", re.IGNORECASE)
JUNK_ID = "-1"
"""Item that Market-1501 and its like give to boxes without a person."""


def read_folders(store: fs.SubTreeFileSystem, files: Sequence[File]) -> Listing:
    """List the photos of a folder, whose `files` are given.

    An item is a folder that holds images, called by its whole path; the folder around it is its category. Folders at
    the top with names of splits are splits, and items are called by the path below. Where images lie in no item's
    folder, an item is what their names begin with.
    """
    images, notes = pass_over(files)
    notes += tables_beside(files)
    base, splits = split_folders(images)
    images, more = _inside_splits(images, base, splits) if splits else _without_loose(images)
    rows = _without_collection([(file, below_split(file.path, base, splits)) for file in images])
    loose = [path for _, (_, path) in rows if "/" not in path]
    _refuse_lists(store.base_path, files, {posixpath.dirname(file.path) for file, (_, path) in rows if "/" not in path})
    ids = _ids_by_name(loose)
    if loose and not ids:
        raise UserError(
            f"{store.base_path}: {len(loose):,} photos lie in no item's folder, e.g. {printable(loose[0])}: put the "
            "photos of each item into a folder, or list them in a CSV with image_path and item_id"
        )
    if ids:
        name, item = next(iter(ids.items()))
        more.append(f"items are what the names of the photos begin with: {printable(name)} is of {item}")
    more += _camera_notes([path for _, (_, path) in rows])
    if inner := [path for _, (split, path) in rows if not split and _split_of_folder(path.split("/")[-2:][0])]:
        more.append(
            f"{len(inner):,} photos lie in folders called as splits are, within others, e.g. {printable(inner[0])}, "
            "which count as items: put the split folders around the others, or list the photos in a CSV with split"
        )
    photos = [_photo(file, split, path, ids) for file, (split, path) in rows]
    if num_junk := sum(photo.item_id == JUNK_ID for photo in photos) if _CAMERAS in more else 0:
        more.append(f"{num_junk:,} photos of {JUNK_ID}, which is no item in data sets like Market-1501, were left out")
        photos = [photo for photo in photos if photo.item_id != JUNK_ID]
    return locate(store, photos, [*notes, *more])


def _refuse_lists(where: str, files: Sequence[File], folders: set[str]) -> None:
    """Refuse photos in no item's folder where a file beside them, with a name that hubs give it, has their items."""
    lists = [file.path for file in files if posixpath.dirname(file.path) in folders and _LIST.search(file.path)]
    if lists:
        give = "give it as --source" if len(lists) == 1 else "give one that has all of their rows and a column split"
        raise UserError(
            f"{where}: {', '.join(map(printable, lists[:3]))} says what the photos beside it are: {give}, with the "
            "columns file_name and item_id"
        )


def _camera_notes(paths: Sequence[str]) -> list[str]:
    """Notes on names or folders that hold cameras; `paths` begin below the splits."""
    notes = [_CAMERAS] if paths and all(_PERSON.match(posixpath.basename(path)) for path in paths) else []
    of_camera = [path for path in paths if any(map(_CAMERA_FOLDER.fullmatch, path.split("/")[:-1]))]
    if of_camera:
        notes.append(
            f"{len(of_camera):,} photos lie in folders called as cameras are, which count as items, "
            f"e.g. {printable(of_camera[0])}: where they are none, list the photos in a CSV with item_id"
        )
    return notes


def pass_over(files: Iterable[File]) -> tuple[list[File], list[str]]:
    """The images among files, and notes on the other files."""
    images = list[File]()
    hidden, dead, unread, others = 0, 0, Counter[str](), Counter[str]()
    for file in files:
        suffix = posixpath.splitext(file.path)[1].lower()
        if is_passed_over(file.path):
            hidden += 1
        elif file.is_dead:
            dead += 1
        elif is_image(file.path):
            images.append(file)
        else:
            (unread if _PICTURES_NOT_READ.fullmatch(suffix) else others)[printable(suffix)] += 1
    counts = {
        "files in hidden or thumbnail folders were passed over": hidden,
        "links lead nowhere and were passed over": dead,
        f"files are of kinds that are not read ({_kinds(unread)}): export them as JPEG": unread.total(),
        f"other files are no photos ({_kinds(others)})": others.total(),
    }
    return images, [f"{count:,} {what}" for what, count in counts.items() if count]


def _kinds(suffixes: Counter[str]) -> str:
    return ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in suffixes.most_common(5))


# Split folders


def split_folders(images: Sequence[File]) -> tuple[str, dict[str, str]]:
    """The folder that split folders lie in, "" or "data/", and the split of each; empty where there are none."""
    base = ""
    while True:
        inside = [file.path[len(base) :] for file in images]
        folders = {path.partition("/")[0] for path in inside if "/" in path}
        splits = _splits_of_folders(sorted(folders))
        if len(set(splits.values())) > 1:
            return base, _nested_splits(inside, _asked_splits(splits))
        if len(folders) != 1 or any("/" not in path for path in inside):
            return "", {}
        base += f"{folders.pop()}/"


def _splits_of_folders(names: Sequence[str]) -> dict[str, str]:
    """The split of each folder with a split's name; of all folders if their names differ only by it: `cars_train`."""
    splits = {name: split for name in names if (split := _split_of_folder(name))}
    parts = [re.fullmatch(r"(\d+[_ -])?(.*[_ -])?([^_ -]+?)(\d{4})?", name) for name in names]
    split_of = {match[0]: _split_of_folder(match[3]) for match in parts if match}
    is_shared = len({match[2] for match in parts if match}) == 1 and len({*split_of.values()}) == len(names)
    return splits if splits or not is_shared or not all(split_of.values()) else split_of


def _nested_splits(paths: Sequence[str], splits: dict[str, str]) -> dict[str, str]:
    """The splits, with `test/query` and `test/gallery` in place of a folder `test` that holds these alone."""
    nested = dict[str, str]()
    for folder, split in splits.items():
        inner = {path.split("/")[1] if path.count("/") > 1 else "" for path in paths if path.startswith(f"{folder}/")}
        its = {name: _split_of_folder(name) for name in sorted(inner)}
        is_asked = split in ("test", "val") and {*its.values()} == {"query", "gallery"}
        of = "val_" if split == "val" else ""
        nested |= {f"{folder}/{name}": f"{of}{which}" for name, which in its.items()} if is_asked else {folder: split}
    return nested


def _split_of_folder(name: str) -> str:
    """The split of a folder with this name: `Training`, `bounding_box_test`, `image_query`, `val-set`."""
    name = re.sub(r"^(bounding_box|images?|imgs?|data)[_ -]|[_ -]?(set|images?|imgs?|data)$", "", name.casefold())
    return split_named(name)


def _asked_splits(splits: dict[str, str]) -> dict[str, str]:
    """Where a folder has the queries and none the gallery, the test folder is the gallery."""
    if "query" in splits.values() and "gallery" not in splits.values():
        return {folder: "gallery" if split == "test" else split for folder, split in splits.items()}
    return splits


def note_splits(base: str, splits: dict[str, str]) -> list[str]:
    """A note on where the splits are from, where there are any."""
    meanings = ", ".join(f"{base}{folder} is {split}" for folder, split in splits.items())
    return [f"the splits are those of the folders: {meanings}"] if splits else []


def _inside_splits(images: list[File], base: str, splits: dict[str, str]) -> tuple[list[File], list[str]]:
    inside = [file for file in images if below_split(file.path, base, splits)[0]]
    folders = {name.partition("/")[0] for name in splits}
    others = sorted({file.path[len(base) :].partition("/")[0] for file in images} - folders)
    notes = note_splits(base, splits)
    if num_others := len(images) - len(inside):
        examples = ", ".join(map(printable, others[:3]))
        notes.append(f"{num_others:,} photos beside the split folders were left out ({examples})")
    return inside, notes


def _without_loose(images: list[File]) -> tuple[list[File], list[str]]:
    """Images in folders, where there are any; else all, which lie at the top."""
    inside = [file for file in images if "/" in file.path]
    if not inside or len(inside) == len(images):
        return images, []
    num_loose = len(images) - len(inside)
    return inside, [f"{num_loose:,} photos in no item's folder were left out: put each into the folder of its item"]


_COLLECTION = re.compile(r"(all[ _-]?)?(images?|imgs?|photos?|pictures?|pics?|jpe?gs?|jpegimages)", re.IGNORECASE)


def _without_collection(rows: list[tuple[File, tuple[str, str]]]) -> list[tuple[File, tuple[str, str]]]:
    """The rows without a folder called `images` that holds all photos: this folder is no item."""
    folders = {posixpath.dirname(path) for _, (_, path) in rows}
    folder = folders.pop() if len(folders) == 1 else ""
    if not _COLLECTION.fullmatch(posixpath.basename(folder)):
        return rows
    return [(file, (split, posixpath.basename(path))) for file, (split, path) in rows]


def below_split(path: str, base: str, splits: dict[str, str]) -> tuple[str, str]:
    """Split of a file, empty where it is in none, and its path below the split's folder."""
    parts = path[len(base) :].split("/") if splits else []
    for depth in (1, 2):
        if split := splits.get("/".join(parts[:depth])) if len(parts) > depth else "":
            return split, "/".join(parts[depth:])
    return "", path


# Items


def _photo(file: File, split: str, path: str, ids: dict[str, str]) -> Photo:
    folder = posixpath.dirname(path)
    row = {
        "image_path": printable(file.path),
        "item_id": printable(folder) or ids[path],
        "category": printable(posixpath.basename(posixpath.dirname(folder))),
        "split": split,
    }
    return make_photo(row)._replace(file=file.path, stamp=file.stamp)


def _ids_by_name(names: Sequence[str]) -> dict[str, str]:
    """Name to the id that it begins with, as in `0001_c1s1_001051_00.jpg`; empty where names don't begin with ids.

    Names begin with ids if all have a sign after a number, or after a word with a digit that is no date, and if there
    are at least twice as many photos as ids.
    """
    stems = {name: name.rpartition(".")[0] for name in names}
    people = {name: match[1] for name, stem in stems.items() if (match := _PERSON.match(stem))}
    if names and len(people) == len(names):  # Market-1501 and its like: item, camera
        return people
    for sign in "_- .":
        ids = {name: _head(stem, sign) for name, stem in stems.items()}
        distinct = set(ids.values())
        if all(distinct) and 1 < len(distinct) <= len(names) / 2:
            return ids
    return {}


def _head(stem: str, sign: str) -> str:
    """The part of `stem` before the sign; empty where it can't be an id."""
    head = stem[:1] + stem[1:].partition(sign)[0] if sign in stem[1:] else ""
    is_date = re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])", head)
    return head if re.search(r"\d", head) and not is_date else ""


def tables_beside(files: Iterable[File]) -> list[str]:
    """Notes on tables at the top of a folder that is read as folders of photos."""
    names = [file.path for file in files if re.fullmatch(r"[^/]+\.(csv|tsv|parquet|jsonl)", file.path.lower())]
    return [f"{', '.join(map(printable, names[:3]))} is not read: give it as --source to use it"] if names else []
