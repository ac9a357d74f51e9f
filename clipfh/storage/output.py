"""The folder that a command writes to: whether something is there, and leaving it as it was after a failure."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from clipfh import UserError


def require_folder(out: str | Path) -> None:
    """Raise UserError where a result should be written to object storage, such as s3://shop/runs, which can't be yet.

    A `Path` of such an address has lost one of its slashes.
    """
    if re.match(r"(?!file:)[A-Za-z][\w+.-]+:/", str(out)):
        raise UserError(
            f"--out {out}: results can't be written to object storage: give a folder (on a disk that all nodes share, "
            "with a cluster), and copy it there"
        )


def is_in_use(out: Path) -> bool:
    """Whether the folder holds something. A file counts too, because nothing can be put into it."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


@contextlib.contextmanager
def all_or_nothing(out: Path, result: str) -> Iterator[None]:
    """Where the block fails before the folder holds a result (a glob), leave the folder as it was: empty or absent.

    The user can then give the corrected command with the same --out.
    """
    require_folder(out)
    was_there, was_in_use = out.exists(), is_in_use(out)
    try:
        yield
    except BaseException:
        if not was_in_use and out.is_dir() and not any(out.glob(result)):
            for each in out.iterdir():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
            if not was_there:
                out.rmdir()
        raise
