"""The door to what lies below a command's `--out`: a folder's files are listed, read, and written whole or not at all.

After a kill or on a full disk, what was there before is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from clipfh import UserError


class Folder:
    """A folder in which commands leave files, on the local disk or at a URI.

    Names of its files and folders are relative to it. An error of a file system names the file.

    Args:
        path: of the folder, which need not be there.
    """

    def __init__(self, path: str | Path) -> None:
        self.given = str(path) if "://" in str(path) else str(Path(path))
        self.filesystem, self.path = locate(path)

    def __str__(self) -> str:
        """The path as it was given."""
        return self.given

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.given}/{name}")

    @property
    def name(self) -> str:
        """Last part of the whole path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """The folder above."""
        return Folder((self.given if "://" in self.given else self.path).rpartition("/")[0])

    def is_folder(self) -> bool:
        """Whether it is there, and not a file."""
        return bool(self._info("").type == pyarrow.fs.FileType.Directory)

    def is_empty(self) -> bool:
        """Whether nothing is in it, or it is not there."""
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

    def read_bytes(self, name: str) -> bytes:
        """Content of a file."""
        with _naming(self._path(name)), self.filesystem.open_input_stream(self._path(name)) as file:
            return bytes(file.read())

    def read_text(self, name: str) -> str:
        """Content of a text file."""
        return self.read_bytes(name).decode()

    def read_json(self, name: str) -> dict[str, Any]:
        """Object that a JSON file holds, empty where the file is not there. UserError: can't be read."""
        value = self._parse(name, self.read_text(name)) if self.exists(name) else {}
        return value if isinstance(value, dict) else {}

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Objects that a file holds, one in a line; none where the file is not there. UserError: can't be read."""
        text = self.read_text(name) if self.exists(name) else ""
        return [self._parse(name, line) for line in text.splitlines()]

    def read_table(self, name: str) -> pa.Table:
        """Content of a Parquet file."""
        with _naming(self._path(name)):
            return pq.read_table(self._path(name), filesystem=self.filesystem)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, as `write`."""
        write(self._path(name), content, self.filesystem)

    def write_table(self, name: str, table: pa.Table, **options: Any) -> None:  # noqa: ANN401
        """Write a Parquet file, with pyarrow's options."""
        with replacing(self._path(name), self.filesystem) as file:
            pq.write_table(table, file, **options)

    def make(self) -> None:
        """Make the folder, and those above it, where it is not there."""
        self.filesystem.create_dir(self.path, recursive=True)

    def remove(self, name: str) -> None:
        """Remove a folder of the folder, with all that is in it."""
        self.filesystem.delete_dir(self._path(name))

    def local_path(self, name: str = "") -> Path:
        """A path for libraries that read and write themselves. UserError: the folder is not on a local disk."""
        if not isinstance(self.filesystem, pyarrow.fs.LocalFileSystem):
            raise UserError(f"{self.given} is not on a local disk: copy the folder to one")
        return Path(self.given if "://" not in self.given else self.path) / name

    def _path(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _info(self, name: str) -> pyarrow.fs.FileInfo:
        return self.filesystem.get_file_info(self._path(name))

    def _parse(self, name: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.given}/{name} can't be read ({reason}): write it again") from error


def locate(path: str | Path) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system of a path or URI, and the absolute path there."""
    where = str(path) if "://" in str(path) else str(Path(path).resolve())
    filesystem, inside = pyarrow.fs.FileSystem.from_uri(where)
    return filesystem, inside


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
def replacing(path: str | Path, filesystem: pyarrow.fs.FileSystem | None = None) -> Iterator[IO[bytes]]:
    """A file to write, which takes its place at `path` when the block ends well; else what was there stays."""
    if filesystem is None or isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        new = Path(f"{path}.new")
        try:
            with new.open("wb") as local:
                yield local
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        return
    with filesystem.open_output_stream(f"{path}.new") as file:
        yield file
    filesystem.move(f"{path}.new", str(path))


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
