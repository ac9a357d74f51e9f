"""What is kept of a sweep's checkpoints. Whatever is deleted of its runs is deleted here."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from clipfh.config.sweep_file import SweepFile
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep import finalists
from clipfh.sweep.leaderboard import Row

OVER = ("done", "stopped", "diverged")
"""Trials that train no further. One that failed may be tried again, from its checkpoint."""


@dataclass
class Keeper:
    """Frees the disk of what a sweep can no longer use, as its placement has it."""

    sweep: SweepFile
    out: Folder
    """the sweep's folder"""
    freed: int = 0
    """bytes that this object has freed"""
    seen: set[tuple[str, bool]] = field(default_factory=set)
    """runs that were freed, and whether with their best weights left: what is free is not looked at again"""

    def trials(self, rows: Sequence[Row]) -> None:
        """Free what ended trials hold.

        A trial that leads among those that have ended keeps its best weights; one that does not lead now never will.

        Args:
            rows: of the leaderboard, best first.
        """
        which = self.sweep.placement.keep_weights
        if which == "all":
            return
        top = finalists.num_leaders(self.sweep) if which == "leaders" else 1
        leading = finalists.leaders(rows, self.out, top)
        for row in rows:
            if row["status"] in OVER:
                self._free(self.out / layout.TRIALS / str(row["trial"]), row["trial"] in leading)

    def _free(self, run: Folder, weights: bool) -> None:
        if run.is_local or (run.name, weights) not in self.seen:
            self.freed += free(run, weights)
            self.seen.add((run.name, weights))

    def finals(self, winners: Collection[Folder]) -> None:
        """Free what the runs behind the search hold, which are all over. `winners`: whose weights were exported."""
        which = self.sweep.placement.keep_weights
        for run in () if which == "all" else self.out.folders(layout.FINAL):
            self.freed += free(run, which == "leaders" or run in winners)

    def __str__(self) -> str:
        kept = [sizes for part in (layout.TRIALS, layout.FINAL) for sizes in _sizes_by_run(self.out / part).values()]
        summary = f"kept the weights of {len(kept)} runs, {_gib(sum(map(sum, kept)))}"
        return f"{summary}; freed {_gib(self.freed)}" if self.freed else summary


def free(run: Folder, weights: bool) -> int:
    """Delete the checkpoints of a run that is over, but for its best weights where these are wanted.

    What will be left is written down first: what a kill leaves undone, the next call does.

    Returns:
        How many bytes that freed.
    """
    folder = run / layout.CHECKPOINTS
    if not (latest := run_folder.latest_step(run)):
        return 0
    files, freed = folder.files(), run_folder.read_freed(run)
    kept = (freed["kept"] if freed else run_folder.find_best_checkpoint(run)) if weights else ""
    run.write(layout.FREED, json.dumps({"step": latest, "kept": kept}))
    checkpoints = {name.partition("/")[0] for name in files if name.startswith("checkpoint_") and "/" in name}
    for each in checkpoints - {kept}:
        with contextlib.suppress(OSError):  # a run that was just ended may be deleting it too
            folder.remove(each)
    if kept and f"{kept}/{layout.TRAINING_STATE}" in files:
        (folder / kept).remove_file(layout.TRAINING_STATE)
    return sum(_sizes(files)) - sum(_sizes(folder.files()))


def _sizes(files: Mapping[str, int]) -> list[int]:
    """Bytes of each weights or state file of a run's checkpoints."""
    return [size for name, size in files.items() if "checkpoint_" in name and not name.endswith(".json")]


def _sizes_by_run(runs: Folder) -> dict[str, list[int]]:
    """`_sizes` of each of several runs that has any."""
    by_run: dict[str, dict[str, int]] = defaultdict(dict)
    for name, size in runs.files().items():
        by_run[name.partition("/")[0]][name] = size
    return {run: sizes for run, files in by_run.items() if (sizes := _sizes(files))}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
