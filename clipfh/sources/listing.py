"""The listing that a source becomes: its photos, photos left out, and notes for people. From rows to photos."""

import importlib.util
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyarrow import fs

from clipfh import UserError

MISSING = "missing"
OUTSIDE = "path leads out of the source"
LINK = "link that leads out of the source: --follow-links takes it"
NEEDS_HEIF = "HEIC photo: pip install pillow-heif reads it"
BAD_LINE = "bad line"
NOT_WANTED = "listed in the file of --without"
GALLERY_NOT_WANTED = "query of an item whose gallery is listed in the file of --without"
UNBLAMED = (NEEDS_HEIF, BAD_LINE, NOT_WANTED, GALLERY_NOT_WANTED)
"""Beginnings of reasons that don't count against `--max-bad`."""

LeftOut = tuple[str, str]  # path and why
Box = tuple[int, int, int, int]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif"),
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")


def reads_heif() -> bool:
    """Whether HEIC can be read here."""
    return importlib.util.find_spec("pillow_heif") is not None


def lacks_heif(reasons: Iterable[str]) -> bool:
    """Whether photos were left out, for these reasons, as HEIC that can be read by now."""
    return NEEDS_HEIF in reasons and reads_heif()


class Photo(NamedTuple):
    """One listed image: its fields from the source, and its file. An unknown field is empty."""

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
    part: tuple[int, int] | None = None
    """Where in the file the image stands: offset and size in a tar, row group and row in a Parquet file."""
    box: Box | None = None
    """Left, top, width and height, in pixels of the file, of the part that is cut out first."""


@dataclass(frozen=True)
class Listing:
    """The photos of a source. Images are read from the folder `store`, and from nowhere outside it."""

    store: fs.SubTreeFileSystem
    photos: list[Photo]
    """Photos whose file is there, without repeats, in no particular order."""
    left_out: list[LeftOut]
    """Photos whose file is not there, or would be outside, or that can't be read here."""
    notes: list[str]
    """What a person should know about the source."""


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a source."""

    follow_links: bool = False
    """Take links that lead out of the source."""
    skip_bad_lines: bool = False
    """Leave out lines of a table that can't be used, in place of an error."""
    encoding: str = ""
    """Encoding of a CSV file, such as cp1252; empty finds it out."""
    inshop_boxes: bool = False
    """Cut In-Shop's photos to the boxes of its own file."""


COLUMNS = ("image_path", "item_id", "text", "split", "variant", "view", "gender", "category", "color")
BOX_COLUMNS = ("x", "y", "width", "height")
SPLITS = ("train", "val", "val_query", "val_gallery", "test", "query", "gallery")
_SPLIT_NAMES = {name: name for name in SPLITS}
_SPLIT_NAMES |= dict.fromkeys(("training", "trn"), "train") | dict.fromkeys(("testing", "tst"), "test")
_SPLIT_NAMES |= dict.fromkeys(("valid", "validation", "dev"), "val")
_SPLIT_NAMES |= dict.fromkeys(("queries", "probe", "test_query"), "query")
_SPLIT_NAMES |= dict.fromkeys(("galleries", "test_gallery"), "gallery")
_SPLIT_NAMES |= dict.fromkeys(("trainval", "train_val"), "train")


class BadRow(ValueError):
    """A row that can't be used, for the reason given."""


def split_named(name: str) -> str:
    """The split that people call by this name ("Validation" is val); empty where it is none."""
    return _SPLIT_NAMES.get(name.strip().casefold().replace("-", "_"), "")


def make_photo(row: Mapping[str, Any]) -> Photo:
    """A listed row as a Photo; view and variant, where not given, come from a name like In-Shop's `02_1_front.jpg`.

    Raises:
        BadRow: a field that must be there is not, or a field holds what it can't.
    """
    fields = {name: text for name, value in row.items() if name in COLUMNS and (text := _plain(value))}
    path, item_id = fields.pop("image_path", ""), _clean_id(fields.pop("item_id", ""))
    if not path or not item_id:
        raise BadRow(f"no {'item_id' if path else 'image_path'}")
    split = fields.pop("split", "").strip()
    if split and not split_named(split):
        raise BadRow(f"split {split!r} is none of {', '.join(SPLITS)}")
    variant, view = variant_and_view(path)
    fields = {"split": split_named(split), "variant": sys.intern(variant), "view": sys.intern(view)} | fields
    return Photo(path, sys.intern(item_id), **fields)._replace(box=_box(row))  # type: ignore[arg-type]


_FORMULA = re.compile(r'="(.*)"')


def _clean_id(text: str) -> str:
    """An id without blanks around it, seen or not, in composed letters; `="007"`, which guards zeros, is 007."""
    text = text.strip()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).strip(_UNSEEN)
    guarded = _FORMULA.fullmatch(text)
    return guarded[1].strip() if guarded else text


_UNSEEN = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060 \u00a0\u3000\t"


def require_photo(row: Mapping[str, Any], where: str) -> Photo:
    """As `make_photo`, but raises a UserError that names the place of the row."""
    try:
        return make_photo(row)
    except BadRow as error:
        raise UserError(f"{where}: {error}: fix it") from error


def variant_and_view(path: str) -> tuple[str, str]:
    """Variant and view from a name like In-Shop's `02_1_front`; any other name as a whole is the view."""
    stem = path.rpartition("/")[2].rpartition("\\")[2]
    stem = stem.rpartition(".")[0] or stem
    match = re.fullmatch(r"(\d\d)_\d_(front|side|back|full|flat|additional)", stem)
    return (match[1], match[2]) if match else ("", stem)


def _plain(value: Any) -> str:
    """A field as text, of which there is one copy. An id that a table holds as 6.0 is 6, and NaN is nothing."""
    if type(value) is str and value.isascii():  # nearly all of them
        return sys.intern(value)
    if isinstance(value, float):
        value = "" if value != value else int(value) if value.is_integer() else value
    if not isinstance(value, str | int | float | None):
        raise BadRow(f"holds {value!r:.80} where a text belongs")
    text = "" if value is None else str(value)
    # A string that can't be written as UTF-8 (half of a surrogate pair in JSON) must not stop a catalogue
    return sys.intern(text if text.isascii() else text.encode("utf-8", "replace").decode())


def _box(row: Mapping[str, Any]) -> Box | None:
    """The box of a row; None where the row names none. Width and height alone, as hubs write them, are the photo's."""
    if not {*BOX_COLUMNS} <= row.keys():
        return None
    sides = [_plain(row.get(name)).strip() for name in BOX_COLUMNS]
    if not any(sides):
        return None
    try:
        left, top, width, height = (round(float(side.replace(",", "."))) for side in sides)
    except (ValueError, OverflowError) as error:
        raise BadRow(f"box {', '.join(sides)} is not x, y, width, height in pixels") from error
    if width < 1 or height < 1:
        raise BadRow(f"box {', '.join(sides)} is empty")
    return left, top, width, height


def finish(
    store: fs.SubTreeFileSystem, photos: list[Photo], left_out: Iterable[LeftOut], notes: Iterable[str]
) -> Listing:
    """A listing of photos whose files are there: without repeats, each file under one path, with notes on their ids."""
    first_path = {(photo.file, photo.part): photo.path for photo in reversed(photos)}
    photos = [photo._replace(path=first_path[photo.file, photo.part]) for photo in photos]
    unique = list({(photo.path, photo.item_id, photo.split, photo.box): photo for photo in photos}.values())
    items = Counter(path for path, _ in {((photo.path, photo.box), photo.item_id) for photo in unique})
    counts = {
        "rows repeat another one and were dropped": len(photos) - len(unique),
        "images are listed for several items": sum(number > 1 for number in items.values()),
    }
    notes = [*notes, *(f"{count:,} {what}" for what, count in counts.items() if count), *note_ids(unique)]
    missing_heif = [] if reads_heif() else [p for p in unique if _is_heif(p)]
    left_out = [*left_out, *((photo.path, NEEDS_HEIF) for photo in missing_heif)]
    readable = [photo for photo in unique if not _is_heif(photo)] if missing_heif else unique
    if not readable:
        raise UserError(f"{store.base_path}: all of its photos are HEIC: pip install pillow-heif reads them")
    return Listing(store, _name_boxes(readable), left_out, notes)


def _is_heif(photo: Photo) -> bool:
    return photo.part is None and photo.file.lower().endswith(HEIF_SUFFIXES)


def _name_boxes(photos: list[Photo]) -> list[Photo]:
    """Give each of several boxes of one file a path of its own, as Media Fragments write it: `a.jpg#xywh=0,0,9,9`."""
    boxes: dict[str, set[Box | None]] = {}
    for photo in photos:
        boxes.setdefault(photo.path, set()).add(photo.box)
    several = {path for path, its in boxes.items() if len(its) > 1}
    return [
        photo._replace(path=f"{photo.path}#xywh={','.join(map(str, photo.box))}")
        if photo.box and photo.path in several
        else photo
        for photo in photos
    ]


def _core(item: str) -> str:
    """An id without the parts that spreadsheets and people change."""
    core = "".join(unicodedata.normalize("NFKC", item).split()).casefold().strip("'\"")
    return core.removesuffix(".0").lstrip("0") or core


_ROUNDED = re.compile(r"\d(?:[.,]\d+)?E\+?\d+", re.IGNORECASE)
_NO_ID = {"nan", "none", "null", "na", "n/a", "#n/a", "#na", "<na>", "nat", "-", "?", "undefined", "unknown"}
_NO_ID |= {"#ref!", "#value!", "#name?", "#null!", "#div/0!", "#num!"}


def note_ids(photos: Iterable[Photo]) -> list[str]:
    """Notes on item ids that a spreadsheet or a program has spoiled, or that may mean one item twice."""
    ids = dict.fromkeys(photo.item_id for photo in photos)
    rounded = [item for item in ids if _ROUNDED.fullmatch(item)]
    no_id = [item for item in ids if item.casefold() in _NO_ID]
    alike: dict[str, list[str]] = {}
    for item in ids:
        alike.setdefault(_core(item), []).append(item)
    twins = [" and ".join(map(repr, its[:2])) for its in alike.values() if len(its) > 1]
    kinds = {
        "item ids look rounded by a spreadsheet, so that one may be several items": rounded,
        "item ids look like a missing one": no_id,
        "item ids differ from another in nothing but case, blanks, quotes, zeros or how letters are written": twins,
    }
    return [f"{len(its):,} {what}, e.g. {', '.join(its[:3])}" for what, its in kinds.items() if its]
