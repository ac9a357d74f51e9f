"""The files that a run or a sweep is made of beside its catalogue, by their contents: what --resume must find again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from clipfh import UserError
from clipfh.config.experiment import Experiment
from clipfh.model import checkpoint
from clipfh.storage.store import Folder


def contents(experiment: Experiment, warm_start: str | None, has_weights: bool = False) -> dict[str, str]:
    """A hash of each file that is read, by the option that names it.

    Args:
        experiment: names prompts and weights.
        warm_start: weights to start from instead.
        has_weights: there is a checkpoint to go on from, so no other weights are read.
    """
    pretrained = [Folder(experiment.model.pretrained)] if experiment.model.pretrained else []
    weights = checkpoint.list_weight_files(warm_start) if warm_start and not has_weights else []
    by_option = {
        "--text.file": [Folder(experiment.text.file)] if experiment.text.file else [],
        "--model.pretrained": [] if has_weights or warm_start else [file for file in pretrained if file.is_file()],
        "--warm-start": weights,
    }
    return {option: _hash(files) for option, files in by_option.items() if files}


def _hash(files: Sequence[Folder]) -> str:
    """One hash of all files. A file that is not there is passed over: an error comes where it is read."""
    sha = hashlib.sha256()
    for each in files:
        if each.is_file():
            with each.filesystem.open_input_stream(each.path) as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


def require_same(before: Mapping[str, str], now: Mapping[str, str], out: Folder) -> None:
    """Raise UserError where a file is not what it was when `out` was begun. Folders of old versions have no hashes."""
    for option, digest in now.items():
        if before.get(option, digest) != digest:
            raise UserError(
                f"--resume: the file of {option} has changed since {out} was begun, or is away: put back what it was, "
                "or name another --out"
            )
