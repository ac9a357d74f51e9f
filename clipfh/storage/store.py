"""Files written whole or not at all: after a kill or on a full disk, what was there before is still there."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem


def write(file: Path, content: str | bytes) -> None:
    """A small file, by way of a second one beside it."""
    whole = content.encode() if isinstance(content, str) else content
    with _Replacing(str(file)) as new:
        new.write(whole)


def local_store() -> pyarrow.fs.FileSystem:
    """The local file system, for Tune: where it copies its state to, the state before stays until the new one is whole.

    Not for checkpoints: Ray Train reads these in place only through pyarrow's own.
    """
    return pyarrow.fs.PyFileSystem(_Whole(LocalFileSystem()))


class _Whole(pyarrow.fs.FSSpecHandler):
    """The local file system, of whole files."""

    def open_output_stream(self, path: str, metadata: Any) -> pyarrow.PythonFile:
        return pyarrow.PythonFile(_Replacing(path), mode="w")


class _Replacing(io.BufferedWriter):
    """Takes a file's place when it is closed, but not after an error, and not where nobody closed it."""

    whole = False

    def __init__(self, path: str) -> None:
        self.path, self.new = Path(path), Path(f"{path}.new")
        super().__init__(io.FileIO(self.new, "w"))
        self.whole = True

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            self.discard()
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

    def discard(self) -> None:
        """Close, and leave what was there."""
        self.whole = False
        with contextlib.suppress(OSError):  # of what is still in the buffer
            self.close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.discard() if kind else self.close()

    def __del__(self) -> None:
        if self.whole:
            self.discard()
