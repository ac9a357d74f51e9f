"""Which checkpoints of a sweep are kept. All others are deleted here, and nowhere else."""

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
    """Deletes checkpoints that a sweep can no longer use, as `placement.keep_weights` says."""

    sweep: SweepFile
    out: Folder
    """the sweep's folder"""
    freed: int = 0
    """bytes that this object has freed"""
    visits: set[tuple[str, bool]] = field(default_factory=set)
    """runs that were freed, and whether their best weights were left: these are not looked at again"""

    def trials(self, rows: Sequence[Row]) -> None:
        """Delete checkpoints of ended trials.

        A trial that leads among the ended ones keeps its best weights; one that does not lead now never will.

        Args:
            rows: the leaderboard's rows, best first.
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
        if run.is_local or (run.name, weights) not in self.visits:
            self.freed += free(run, weights)
            self.visits.add((run.name, weights))

    def finals(self, winners: Collection[Folder]) -> None:
        """Delete checkpoints of the runs after the search, all of which are over. `winners`: the exported runs."""
        which = self.sweep.placement.keep_weights
        for run in () if which == "all" else self.out.folders(layout.FINAL):
            self.freed += free(run, which == "leaders" or run in winners)

    def __str__(self) -> str:
        runs = [sizes for part in (layout.TRIALS, layout.FINAL) for sizes in _sizes_by_run(self.out / part).values()]
        summary = f"kept the weights of {len(runs)} runs, {_gib(sum(map(sum, runs)))}"
        return f"{summary}; freed {_gib(self.freed)}" if self.freed else summary


def free(run: Folder, weights: bool) -> int:
    """Delete the checkpoints of a run that is over, except its best weights if `weights`.

    What will be left is written down first, so that after a kill the next call ends the work.

    Returns:
        Number of bytes freed.
    """
    folder = run / layout.CHECKPOINTS
    if not (latest := run_folder.latest_step(run)):
        return 0
    files, freed = folder.files(), run_folder.read_freed(run)
    best = (freed["kept"] if freed else run_folder.find_best_checkpoint(run)) if weights else ""
    run.write(layout.FREED, json.dumps({"step": latest, "kept": best}))
    checkpoints = {name.partition("/")[0] for name in files if name.startswith("checkpoint_") and "/" in name}
    for each in checkpoints - {best}:
        with contextlib.suppress(OSError):  # a run that was just ended may be deleting it too
            folder.remove(each)
    if best and f"{best}/{layout.TRAINING_STATE}" in files:
        (folder / best).remove_file(layout.TRAINING_STATE)
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
