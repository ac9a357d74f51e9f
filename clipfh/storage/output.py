"""The folder that a command writes to: whether it can be written, and leaving it as it was after a failure."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import uuid
from collections.abc import Iterator

from clipfh.storage import remote
from clipfh.storage.store import Folder

PATIENCE = 15.0
"""Seconds for which a store may leave the first question unanswered: an address may be wrong."""


def require_writable(out: str | os.PathLike[str]) -> None:
    """See that a store at a URI can be written, by a small file that is removed again.

    A local folder speaks for itself.

    Raises:
        UserError: it refuses, or does not answer.
    """
    folder = Folder(out)
    if folder.is_local:
        return
    store, probe = folder.filesystem.handler, f"{folder.path}/.clipfh-{uuid.uuid4().hex}"

    def write() -> None:
        with store.base.open_output_stream(probe) as file:
            file.write(b"clipfh looks whether it can write here")
        store.base.delete_file(probe)

    if store.has_folders:
        folder.make()
    remote.patiently(write, name=store.name, patience=PATIENCE)


@contextlib.contextmanager
def all_or_nothing(out: str | os.PathLike[str], *results: str) -> Iterator[None]:
    """Where the block fails before the folder holds any of the results (globs), leave the folder as it was.

    It was empty or absent, so the user can give the corrected command with the same --out.
    """
    folder = Folder(out)
    was_there, was_empty = folder.exists(), folder.is_empty()
    require_writable(folder)
    try:
        yield
    except BaseException:
        if was_empty and folder.is_folder() and not any(fnmatch.filter(folder.files(), f"{each}*") for each in results):
            folder.clear()
            if not was_there:
                folder.remove()
        raise
