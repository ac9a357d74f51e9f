"""The door to what lies below a command's `--out`: a folder's files are listed, read, and written whole or not at all.

After a kill or on a full disk, what was there before is still there. In a bucket an object is whole once it is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from clipfh import UserError
from clipfh.storage import remote

LOCAL = pyarrow.fs.LocalFileSystem()
AT_ONCE = 8
"""Files that are sent or fetched at a time."""


class Folder(os.PathLike[str]):
    """A folder in which commands leave files, on the local disk or at a URI.

    It may also stand for a file, as `folder / name` does: methods for files then need no name. Other names are relative
    to it. An error of a file system names the file. Other libraries take a local one as a path.

    Args:
        path: of the folder, which need not be there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = as_text(path)
        self.filesystem, self.path = locate(text)
        self.text = text.rstrip("/") if "://" in text else str(Path(text))

    def __str__(self) -> str:
        """The path as it was given."""
        return self.text

    def __repr__(self) -> str:
        return f"Folder({self.text!r})"

    def __fspath__(self) -> str:
        return str(self.local_path())

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Folder, (self.address,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.text}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk of this machine, or one that is mounted."""
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    @property
    def address(self) -> str:
        """What it is on every machine: its whole path, or its URI."""
        return self.path if self.is_local else self.text

    @property
    def seconds_between_looks(self) -> float:
        """Seconds between two looks at a file that grows: each costs something at a URI."""
        return 1.0 if self.is_local else 5.0

    @property
    def name(self) -> str:
        """Last part of the whole path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """The folder above."""
        return Folder((self.text if "://" in self.text else self.path).rpartition("/")[0] or "/")

    def filesystem_holding_it(self) -> pyarrow.fs.FileSystem:
        """The file system; at a URI one that knows that this folder is there, and need not list it to delete it."""
        store = self.filesystem.handler
        return pyarrow.fs.PyFileSystem(remote.Holding(store.base, store.name, self.path))

    def is_folder(self) -> bool:
        """Whether it is there, and not a file."""
        return bool(self._info("").type == pyarrow.fs.FileType.Directory)

    def is_file(self, name: str = "") -> bool:
        """Whether a file is there."""
        return bool(self._info(name).type == pyarrow.fs.FileType.File)

    def is_empty(self) -> bool:
        """Whether nothing is in it, or it is not there. A file is in use, since nothing can be put into it."""
        if self.is_local and self._info("").type == pyarrow.fs.FileType.File:
            return False
        with _naming(self.path):
            return not self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True))

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder is there."""
        return bool(self._info(name).type != pyarrow.fs.FileType.NotFound)

    def modified(self, name: str) -> float:
        """Time of a file's last change, in seconds since 1970."""
        return float(self._info(name).mtime_ns / 1e9)

    def folders(self, name: str = "") -> list[Folder]:
        """Folders within one of the folder's, sorted by name; none where it is not there."""
        within = pyarrow.fs.FileSelector(self._path(name), allow_not_found=True)
        infos = self.filesystem.get_file_info(within)
        names = sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.Directory)
        return [(self / name if name else self) / each for each in names]

    def files(self) -> dict[str, int]:
        """All files within, by their names from here, which may hold slashes, and the bytes of each."""
        within = pyarrow.fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        try:
            infos = self.filesystem.get_file_info(within)
        except FileNotFoundError:  # some of it was deleted meanwhile
            return self.files()
        files = (info for info in infos if info.type == pyarrow.fs.FileType.File)
        return {info.path.removeprefix(f"{self.path}/"): info.size for info in files}

    def read_bytes(self, name: str = "") -> bytes:
        """Content of a file."""
        with _naming(self._path(name)):
            if not self.is_local:
                return self.filesystem.handler.read_whole(self._path(name))
            with self.filesystem.open_input_file(self._path(name)) as file:
                return bytes(file.read())

    def read_text(self, name: str = "") -> str:
        """Content of a text file."""
        return self.read_bytes(name).decode()

    def read_json(self, name: str = "") -> dict[str, Any]:
        """Object that a JSON file holds, empty where the file is not there. UserError: can't be read."""
        value = self._parse(name, self.read_if_there(name) or "{}")
        return value if isinstance(value, dict) else {}

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Objects that a file holds, one in a line; none where the file is not there. UserError: can't be read."""
        return [self._parse(name, line) for line in self.read_if_there(name).splitlines()]

    def read_table(self, name: str) -> pa.Table:
        """Content of a Parquet file."""
        with _naming(self._path(name)):
            return pq.read_table(self._path(name), filesystem=self.filesystem)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, as `write`."""
        write(self._path(name), content, self.filesystem)

    def replacing(self, name: str, is_kept: bool = False) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file to write, as `replacing`."""
        return replacing(self._path(name), self.filesystem, is_kept)

    def write_table(self, name: str, table: pa.Table, **options: Any) -> None:  # noqa: ANN401
        """Write a Parquet file, with pyarrow's options."""
        with replacing(self._path(name), self.filesystem) as file:
            pq.write_table(table, file, **options)

    def make(self) -> None:
        """Make the folder, and those above it, where it is not there. In a bucket folders are what objects are in."""
        self.filesystem.create_dir(self.path, recursive=True)

    def remove(self, name: str = "") -> None:
        """Remove a folder of the folder, with all that is in it."""
        self.filesystem.delete_dir(self._path(name))

    def remove_file(self, name: str = "") -> None:
        """Remove a file."""
        self.filesystem.delete_file(self._path(name))

    def clear(self) -> None:
        """Remove all that is in it."""
        self.filesystem.delete_dir_contents(self.path, missing_dir_ok=True)

    @contextlib.contextmanager
    def filling(self, last: str = "") -> Iterator[Path]:
        """A local folder to fill, which takes this one's place when the block ends well, whole.

        What is there must be an empty folder or nothing. In a bucket the file `last`, by which others know that the
        rest is there, is sent behind all others.
        """
        if self.is_local:
            with whole_folder(self.local_path()) as new:
                yield new
            return
        with tempfile.TemporaryDirectory(prefix="clipfh-") as folder:
            yield Path(folder)
            self.send(Path(folder), last)

    @contextlib.contextmanager
    def adding(self) -> Iterator[Path]:
        """A local folder whose files are here when the block ends: this one, where it is local."""
        if self.is_local:
            yield self.local_path()
            return
        with tempfile.TemporaryDirectory(prefix="clipfh-") as folder:
            yield Path(folder)
            self.send(Path(folder))

    def send(self, folder: Path, last: str = "") -> None:
        """Send what is in a local folder to here, at a URI: several files at a time, `last` behind all others."""
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            first = [name for name in names if name != last]
            list(pool.map(lambda name: self.filesystem.handler.send(folder / name, self._path(name)), first))
        if last in names:
            self.filesystem.handler.send(folder / last, self._path(last))

    @contextlib.contextmanager
    def fetched(self, *names: str) -> Iterator[Path]:
        """A local folder that holds the files of these names, as far as they are there: this one, where it is local."""
        if self.is_local:
            yield self.local_path()
            return
        with tempfile.TemporaryDirectory(prefix="clipfh-") as folder:
            there = [name for name in names if self.exists(name)]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda name: self.filesystem.handler.fetch(self._path(name), Path(folder, name)), there))
            yield Path(folder)

    def local_path(self, name: str = "") -> Path:
        """A path for libraries that read and write themselves. UserError: the folder is not on a local disk."""
        if not self.is_local:
            raise UserError(f"{self.text} is not on a local disk: copy the folder to one")
        return Path(self.text if "://" not in self.text else self.path) / name

    def _path(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _info(self, name: str) -> pyarrow.fs.FileInfo:
        return self.filesystem.get_file_info(self._path(name))

    def read_if_there(self, name: str) -> str:
        """Content of a text file, empty where it is not there. One request at a URI, and no list of what is."""
        try:
            return self.read_text(name)
        except FileNotFoundError:
            return ""

    def _parse(self, name: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.text}/{name} can't be read ({reason}): write it again") from error


def as_text(path: str | os.PathLike[str]) -> str:
    """A path or URI as a text. A `Path` of a URI has lost one of its slashes, which comes back.

    `local-dir:/FOLDER` is the name of a model, not a URI."""
    return re.sub(r"^(?!local-dir:)([A-Za-z][\w+.-]+):/(?!/)", r"\1://", str(path))


def locate(path: str | os.PathLike[str]) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system of a path or URI, and the absolute path there. UserError: no file system takes it."""
    text = as_text(path)
    if "://" not in text:
        return LOCAL, str(Path(text).resolve())
    if text.startswith("file://"):
        filesystem, inside = pyarrow.fs.FileSystem.from_uri(text)
        return filesystem, inside
    return remote.locate(text)


def absolute(path: str | os.PathLike[str]) -> str:
    """A path from the root on, for other working directories; a URI as it is."""
    text = as_text(path)
    return text if "://" in text else str(Path(text).absolute())


def open_parquet(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """A Parquet file, to read parts of it."""
    # Not `pq.read_table`, which takes a folder called `a=b` above the file for a column of its own
    filesystem, inside = locate(path)
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return pq.ParquetFile(inside)
    return pq.ParquetFile(filesystem.open_input_file(inside), pre_buffer=True)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let the errors of Arrow's file systems name the file, as Python's own do."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, os.strerror(error.errno), path) from error


def write(path: str | Path, content: str | bytes, filesystem: pyarrow.fs.FileSystem | None = None) -> None:
    """Write a small file whole or not at all, on the local disk or in another file system."""
    whole = content.encode() if isinstance(content, str) else content
    with replacing(path, filesystem) as file:
        file.write(whole)


@contextlib.contextmanager
def replacing(
    path: str | Path, filesystem: pyarrow.fs.FileSystem | None = None, is_kept: bool = False
) -> Iterator[IO[bytes]]:
    """A file to write, which takes its place at `path` when the block ends well; else what was there stays.

    With `is_kept` it is on the disk then, also where the machine loses its power.
    """
    if filesystem is None or isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        new = Path(f"{path}.new")
        try:
            with new.open("wb") as local:
                yield local
                if is_kept:
                    local.flush()
                    os.fsync(local.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        return
    with tempfile.NamedTemporaryFile(prefix="clipfh-") as content:
        yield content
        content.flush()
        filesystem.handler.send(Path(content.name), str(path))


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A local folder to fill, which takes its place at `path` when the block ends well.

    What is at `path` must be an empty folder or nothing. What a kill left of an earlier attempt is removed.
    """
    path = path.absolute()
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        new.replace(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


class WholeFiles(pyarrow.fs.LocalFileSystem):
    """The local file system, where a file that Python writes takes its place only once it is whole.

    To Ray Train it is pyarrow's own: checkpoints are read in place, and copied by pyarrow.
    """

    def __reduce__(self) -> tuple[type, tuple]:
        return WholeFiles, ()

    def open_output_stream(self, path: str, *_: Any, **__: Any) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a file to write in a `with` block."""
        return replacing(path)
