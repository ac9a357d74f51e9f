"""Files written whole or not at all: after a kill or on a full disk, what was there before is still there."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem


def write(file: Path, text: str) -> None:
    """A text file, by way of a second one beside it."""
    with replacing(file) as whole:
        whole.write(text.encode())


def replacing(file: Path) -> io.BufferedWriter:
    """Open to write bytes."""
    return _Replacing(str(file))


def store(place: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of an absolute path or a URI, and the path there. Object stores write whole files anyway."""
    found, path = pyarrow.fs.FileSystem.from_uri(place)
    whole = pyarrow.fs.PyFileSystem(_Whole(LocalFileSystem()))
    return (whole if isinstance(found, pyarrow.fs.LocalFileSystem) else found), path


class _Whole(pyarrow.fs.FSSpecHandler):
    """The local file system, of whole files."""

    def open_output_stream(self, path: str, metadata: Any) -> pyarrow.PythonFile:
        return pyarrow.PythonFile(_Replacing(path), mode="w")


class _Replacing(io.BufferedWriter):
    """Takes a file's place when it is closed, unless a write has failed."""

    def __init__(self, path: str) -> None:
        self.path, self.new, self.whole = Path(path), Path(f"{path}.new"), True
        super().__init__(io.FileIO(self.new, "w"))

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            self.whole = False
            with contextlib.suppress(OSError):  # the same again, of what is still in the buffer
                self.close()
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
        except OSError:
            self.whole = False
            raise
        finally:
            if self.whole:
                self.new.replace(self.path)
            else:
                self.new.unlink()
