"""A run's folder without its weights: whether it is there, its reports, Ray Train's list of its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from clipfh import UserError
from clipfh.storage import layout
from clipfh.storage.store import Folder

AWAY = 600
"""Seconds that a run or a sweep waits for its folder, as a share that is not mounted comes back."""


def wait_for(file: Folder, log: Callable[[str], None] = lambda line: None) -> None:
    """Wait until a file that was written at the start is there: else its folder is away, and a write makes another.

    At a URI there is nothing to wait for: a store that is away is waited for by each read and write.

    Args:
        file: of a run (`layout.EXPERIMENT`) or a sweep (`layout.SWEEP`), absolute or a URI.
        log: takes a line where it is away.

    Raises:
        UserError: it does not come back.
    """
    end = time.monotonic() + AWAY
    if not file.is_local or _is_there(file):
        return
    log(f"{file} is away: waits for it, for up to {AWAY // 60} minutes")
    while not _is_there(file):
        if time.monotonic() > end:
            raise UserError(f"{file} has been away for {AWAY // 60} minutes: bring its file system back, then --resume")
        time.sleep(1)
    log(f"{file} is back")


def _is_there(file: Folder) -> bool:
    try:
        return file.exists()
    except OSError:  # a share whose server does not answer
        return False


def read_metrics(out: str | Path | Folder) -> list[dict[str, Any]]:
    """The reports of a run so far."""
    return Folder(out).read_lines(layout.REPORTS)


def spent(lines: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """Images that a run has seen by its reports, and the seconds it took, of all its starts, from their first steps."""
    images, until = 0, dict[float, float]()
    for line in lines:
        images = line["images"]
        if "began" in line:
            until[line["began"]] = line["time"]
    return images, sum(end - began for began, end in until.items())


class History:
    """A run's `metrics.jsonl` and `stream.jsonl`, which a restart cuts back to the checkpoint it goes on from."""

    def __init__(self, out: str, step: int) -> None:
        self.folder = Folder(out)
        self.metrics = [line for line in self._read(layout.REPORTS) if json.loads(line)["step"] <= step]
        self.stream = [line for line in self._read(layout.STREAM) if json.loads(line)["step"] < step]

    def _read(self, name: str) -> list[str]:
        return self.folder.read_if_there(name).splitlines()

    def write(self) -> None:
        """Both files, each whole or not at all."""
        wait_for(self.folder / layout.EXPERIMENT)
        for name, lines in ((layout.REPORTS, self.metrics), (layout.STREAM, self.stream)):
            self.folder.write(name, "".join(f"{line}\n" for line in lines))


def find_best_checkpoint(run: str | Path | Folder) -> str:
    """Name of the run's checkpoint with the highest validation mAP, or of the last of a run without validation.

    Ray Train's own list says so: a folder that is not on that list may be half-written.
    """
    if freed := read_freed(run):
        if not freed["kept"]:
            raise UserError(
                f"{run}: its weights were not kept: `placement: {{keep_weights: all}}` in the sweep's file keeps those "
                "of all trials"
            )
        return str(freed["kept"])
    results = _read_snapshot(run).get("checkpoint_results")
    if not results:
        raise UserError(f"{run} has no checkpoint yet: let it train further, or --resume it")
    return str(max(results, key=lambda r: r["metrics"].get("val_mAP", r["metrics"]["step"]))["checkpoint_dir_name"])


def latest_step(run: str | Path | Folder) -> int:
    """Step of the run's last checkpoint, also where that was freed; 0 without one."""
    if freed := read_freed(run):
        return int(freed["step"])
    latest = _read_snapshot(run).get("latest_checkpoint_result")
    return int(latest["metrics"]["step"]) if latest else 0


def read_freed(run: str | Path | Folder) -> dict[str, Any]:
    """What `FREED` says of a run that can't go on, since its checkpoints were not all kept; empty for other runs."""
    return Folder(run).read_json(layout.FREED)


def _read_snapshot(run: str | Path | Folder) -> dict[str, Any]:
    """Ray Train's list of the run's checkpoints; empty where there is none yet."""
    return (Folder(run) / layout.CHECKPOINTS).read_json(layout.SNAPSHOT)
