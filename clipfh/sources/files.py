"""The files of a source: listed, looked for, and found under the ways in which people write a path."""

import errno
import io
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_plus

from pyarrow import fs

from clipfh import UserError
from clipfh.sources.listing import IMAGE_SUFFIXES, MISSING, OUTSIDE, LeftOut, Listing, Photo, finish

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z")
# What operating systems, storage boxes, notebooks and file managers leave in folders of photos
_LEFT_BEHIND = re.compile(
    r"""\..* | ~.* | @.* | \#recycle | \#snapshot | \$recycle\.bin | recycle[rd] | system\ volume\ information
      | __macosx | lost\+found | __pycache__ | .*\.lrdata | [_@]*(thumb(nail)?|preview|cache)s?""",
    re.VERBOSE | re.IGNORECASE,
)
_LEFT_FILES = re.compile(r"\..*|~.*|thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r", re.IGNORECASE)


def is_left_behind(folder: str) -> bool:
    """Whether a folder is, or lies in, one that machines leave behind."""
    return any(map(_LEFT_BEHIND.fullmatch, folder.split("/")))


def is_passed_over(path: str) -> bool:
    """Whether a file is one that machines leave behind, or lies in a folder that is."""
    folder, name = posixpath.split(path)
    return is_left_behind(folder) or bool(_LEFT_FILES.fullmatch(name))


class File(NamedTuple):
    """A file below a store."""

    path: str
    """Bytes that are no UTF-8 stand in it as `os.fsdecode` has them."""
    stamp: str
    """Size in bytes and time of change."""
    is_dead: bool = False
    """Whether it is a link that leads nowhere."""

    @property
    def num_bytes(self) -> int:
        """Size; 0 where the store tells none."""
        size = self.stamp.partition(" ")[0]
        return int(size) if size.isdecimal() else 0


def is_local(store: fs.SubTreeFileSystem) -> bool:
    return isinstance(store.base_fs, fs.LocalFileSystem)


def walk(store: fs.SubTreeFileSystem) -> list[File]:
    """All files of a store, in folders that are links too, and links that lead nowhere.

    A link into a folder around it is not entered again.
    """
    if is_local(store):
        return list(_walk_local(store.base_path, "", frozenset()))
    infos = store.get_file_info(fs.FileSelector("", recursive=True))
    return [File(info.path, f"{info.size} {info.mtime_ns}") for info in infos if info.is_file]


def _walk_local(root: str, folder: str, around: frozenset[tuple[int, int]]) -> Iterator[File]:
    stat = Path(root, folder).stat()
    here = (stat.st_dev, stat.st_ino)
    if here in around:
        return
    try:
        with os.scandir(root + folder) as entries:
            listing = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        if not is_left_behind(folder):
            raise
        return
    for entry in listing:
        path = posixpath.join(folder, entry.name)
        if _is_dead(entry):
            yield File(path, "", is_dead=True)
        elif entry.is_dir():
            yield from _walk_local(root, path, around | {here})
        elif entry.is_file():
            yield File(path, _stamp(entry.stat()))


def _is_dead(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link to what is not there, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110  this asks as the rest does


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"


def printable(path: str) -> str:
    """A path as text that can be written as UTF-8: a byte that is none becomes `\\xe4`."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def look(store: fs.SubTreeFileSystem, paths: Iterable[str]) -> Iterator[File | None]:
    """The file at each path; None where there is none. Object storage is asked many times at once."""
    if is_local(store):
        yield from (_look_local(store.base_path, path) for path in paths)
        return
    paths = iter(paths)
    with ThreadPoolExecutor(16) as pool:
        while window := list(islice(paths, 1024)):
            parts = [window[start : start + 64] for start in range(0, len(window), 64)]
            for infos in pool.map(store.get_file_info, parts):
                yield from (File(i.path, f"{i.size} {i.mtime_ns}") if i.is_file else None for i in infos)


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _look_local(root: str, path: str) -> File | None:
    try:
        stat = os.stat(root + path)  # noqa: PTH116  a Path costs as much as the call
    except ValueError:  # a byte of zero
        return None
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    return File(path, _stamp(stat)) if (stat.st_mode & 0o170000) == 0o100000 else None


def read_stamp(store: fs.SubTreeFileSystem, path: str) -> str:
    """Size and time of change of a file that is there."""
    return next((file.stamp for file in look(store, [path]) if file), "")


# From listed paths to files


_DRIVE = re.compile(r"[A-Za-z]:/")


def below(path: str, root: str) -> str:
    """The path below the folder `root/`, which it may begin with; empty where it leads elsewhere."""
    roots = (root, f"{os.path.realpath(root)}/")
    path = next((path.removeprefix(each) for each in roots if path.startswith(each)), path)
    if path.startswith(("/", "~/")) or _DRIVE.match(path) or "://" in path or "\0" in path:
        return ""
    path = posixpath.normpath(path)
    return "" if path in (".", "..") or path.startswith("../") else path


def _as_url(path: str) -> str:
    """A `file:` URL, or a path with backslashes, quotes or blanks around it or ~ for the home, as a plain path."""
    path = os.path.expanduser(path.strip().strip("\"'").replace("\\", "/"))  # noqa: PTH111  a Path drops slashes
    return path.removeprefix("file://localhost").removeprefix("file://") if path.startswith("file:") else path


def _unquoted(path: str) -> str:
    return unquote(_as_url(path))


def _unquoted_twice(path: str) -> str:
    """A path quoted twice, or as web forms do it, with + for a blank."""
    return unquote(unquote_plus(_as_url(path)))


SPELLINGS: tuple[Callable[[str], str], ...] = (str, _as_url, _unquoted, _unquoted_twice)
"""What a listed path may stand for, the likeliest first."""


class _LikeNames:
    """Finds files by names that differ in case, in how letters are composed, or by a suffix, from what is listed."""

    def __init__(self, store: fs.SubTreeFileSystem) -> None:
        self.store = store
        self.folders: dict[str, dict[str, list[str]]] = {}

    def spelling(self, spelling: Callable[[str], str]) -> Callable[[str], str]:
        """The spelling, followed by what is there under a name that is nearly that."""
        return lambda path: self.find(below(spelling(path), self.store.base_path))

    def find(self, path: str) -> str:
        """The one file that a path can mean; empty where there is none, or several."""
        place = ""
        for part in path.split("/"):
            folder = self._names(place)
            names = folder.get(_fold(part)) or folder.get(f"{_fold(part)}/", [])
            if len(names) != 1:
                return ""
            place = posixpath.join(place, names[0])
        return place

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self.folders:
            names = self.folders[folder] = {}
            for name in self._list(folder):
                names.setdefault(_fold(name), []).append(name)
                if is_image(name):  # lists may name it without its suffix; no name has a slash in it
                    names.setdefault(f"{_fold(posixpath.splitext(name)[0])}/", []).append(name)
        return self.folders[folder]

    def _list(self, folder: str) -> list[str]:
        if is_local(self.store):
            path = Path(self.store.base_path, folder)
            return [entry.name for entry in path.iterdir()] if path.is_dir() else []
        infos = self.store.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return [info.base_name for info in infos]


def _fold(name: str) -> str:
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:  # bytes of an old encoding on the disk
            name = os.fsencode(name).decode("cp1252", "replace")
    return unicodedata.normalize("NFC", name.casefold())


def locate(
    store: fs.SubTreeFileSystem, photos: list[Photo], notes: Iterable[str] = (), left_out: Iterable[LeftOut] = ()
) -> Listing:
    """Locate the file of each photo, in whatever way its path is written. Photos without a file are left out."""
    present, missing = [photo for photo in photos if photo.file], [photo for photo in photos if not photo.file]
    respelled: list[Photo] = []
    like = _LikeNames(store)
    for number, spelling in enumerate((*SPELLINGS, like.spelling(_as_url), like.spelling(_unquoted))):
        paths = [below(spelling(photo.path), store.base_path) for photo in missing]
        files = look(store, paths)
        pairs = [(photo, file if path else None) for photo, path, file in zip(missing, paths, files, strict=True)]
        hits = [photo._replace(file=file.path, stamp=file.stamp) for photo, file in pairs if file]
        present += hits
        respelled += hits if number else []
        missing = [photo for photo, file in pairs if not file]
    if not present:
        raise UserError(_nothing_there(store, photos))
    if respelled:
        example = f"{respelled[0].path!r} for {printable(respelled[0].file)}"
        notes = [*notes, f"{len(respelled):,} paths are written otherwise than their files are called, e.g. {example}"]
    absent = [(photo.path, MISSING if _is_inside(photo.path, store) else OUTSIDE) for photo in missing]
    return finish(store, present, [*left_out, *absent], notes)


def _is_inside(path: str, store: fs.SubTreeFileSystem) -> bool:
    return bool(below(_as_url(path), store.base_path))


def locate_in_layouts(
    store: fs.SubTreeFileSystem, photos: list[Photo], notes: Iterable[str], layouts: Sequence[str]
) -> Listing:
    """Locate the file of each photo in the first of `layouts` that has it. Photos without a file are left out.

    In a layout, `inner` stands for a photo's path without a leading `img/`.
    """
    notes, present = list(notes), list[Photo]()
    missing = [photo for photo in photos if below(photo.path, store.base_path)]
    outside = [(photo.path, OUTSIDE) for photo in photos if not below(photo.path, store.base_path)]
    for layout in layouts:
        pairs = list(zip(missing, look(store, _placed(missing, layout)), strict=True))
        hits = [photo._replace(file=file.path, stamp=file.stamp) for photo, file in pairs if file]
        present += hits
        missing = [photo for photo, file in pairs if not file]
        if hits and len(layouts) > 1:
            notes.append(f"{len(hits):,} images were found as {layout.format(path='*', inner='*', split='*')}")
    if not present:
        raise UserError(_nothing_there(store, photos))
    return finish(store, present, [*outside, *((photo.path, MISSING) for photo in missing)], notes)


def _placed(photos: Iterable[Photo], layout: str) -> Iterator[str]:
    return (layout.format(path=p.path, inner=p.path.removeprefix("img/"), split=p.split) for p in photos)


def has_any(store: fs.SubTreeFileSystem, photos: list[Photo], layout: str) -> bool:
    """Whether any of the photos has its file in this layout."""
    inside = [photo for photo in photos if below(photo.path, store.base_path)]
    return any(look(store, _placed(inside, layout)))


def _nothing_there(store: fs.SubTreeFileSystem, photos: list[Photo]) -> str:
    """The error message where none of the listed photos is there: cause and remedy."""
    if not photos:
        return f"{store.base_path}: no images are found or listed: {_remedy(store)}, or check --source"
    path, where = _as_url(photos[0].path), f"{store.base_path}: {len(photos):,} images are listed, none is there"
    if "://" in path:
        return f"{where}: they are listed by URL ({path[:100]}): download them, and list the paths of the files"
    if not below(path, store.base_path):
        return (
            f"{where}: {path[:100]} is not inside it: give paths relative to it; a table lies beside or above its "
            "photos, so move it where they are"
        )
    return f"{where}, e.g. {path[:100]}: {_remedy(store)}, or check --source"


def _remedy(store: fs.SubTreeFileSystem) -> str:
    entries = walk(store)
    if dead := [file.path for file in entries if file.is_dead and is_image(file.path)]:
        return (
            f"{len(dead):,} links lead nowhere, e.g. {printable(dead[0])}: bring what they lead to (cp -rL copies it)"
        )
    files = [printable(file.path) for file in entries if file.path.count("/") < 2]
    archives = sorted(path for path in files if path.lower().endswith(ARCHIVE_SUFFIXES))
    more = f" and {len(archives) - 5} more" if len(archives) > 5 else ""
    return f"unpack {', '.join(archives[:5])}{more} there" if archives else "put images there"


def is_image(path: str) -> bool:
    """Whether a file has the name of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


# Files that say something about the photos


def first_file(store: fs.SubTreeFileSystem, *paths: str) -> str:
    """The first of these paths that is a file; empty where none is."""
    return next((path for path in paths if store.get_file_info(path).is_file), "")


def read_text(store: fs.SubTreeFileSystem, path: str) -> str:
    with store.open_input_file(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{store.base_path}{path}: not UTF-8 ({error}): save it as UTF-8") from error


def read_lines(store: fs.SubTreeFileSystem, path: str) -> list[str]:
    """Lines of a text file. Unlike `splitlines`, signs that end lines or pages within a text of JSON end none."""
    return [line.rstrip("\n") for line in io.StringIO(read_text(store, path), newline=None)]


def read_json(store: fs.SubTreeFileSystem, path: str, kind: type) -> Any:
    where = f"{store.base_path}{path}"
    try:
        value = json.loads(read_text(store, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {error.lineno}: not valid JSON ({error.msg}): fix it") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not valid JSON ({error}): fix it") from error
    if not isinstance(value, kind):
        raise UserError(f"{where}: holds a {type(value).__name__} where a {kind.__name__} belongs: fix it")
    return value


def as_texts(value: Any, where: str) -> list[str]:
    """A text, or a list of texts, as a list; nothing is an empty one."""
    texts = value if isinstance(value, list) else [value] if value else []
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"{where}: holds {wrong[0]!r:.80} where a text belongs: fix it")
    return texts
