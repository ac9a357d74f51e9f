"""What is kept of a sweep's checkpoints. Whatever is deleted of its runs is deleted here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipfh.config.sweep_file import SweepFile
from clipfh.storage import layout, run_folder, store
from clipfh.sweep import finalists
from clipfh.sweep.leaderboard import Row

OVER = ("done", "stopped", "diverged")
"""Trials that train no further. One that failed may be tried again, from its checkpoint."""


@dataclass
class Keeper:
    """Frees the disk of what a sweep can no longer use, as its placement has it."""

    sweep: SweepFile
    out: Path
    """the sweep's folder"""
    freed: int = 0
    """bytes that this object has freed"""

    def trials(self, rows: Sequence[Row]) -> None:
        """Free what ended trials hold.

        A trial that leads among those that have ended keeps its best weights; one that does not lead now never will.

        Args:
            rows: of the leaderboard, best first.
        """
        which = self.sweep.placement.keep_weights
        if which == "all":
            return
        top = max(1, self.sweep.final.top) if which == "leaders" else 1
        leading = finalists.leaders(rows, self.out, top)
        for row in rows:
            if row["status"] in OVER:
                self.freed += free(self.out / layout.TRIALS / str(row["trial"]), row["trial"] in leading)

    def finals(self, winner: Path | None) -> None:
        """Free what the runs behind the search hold, which are all over. `winner`: whose weights were exported."""
        which = self.sweep.placement.keep_weights
        for run in () if which == "all" else sorted((self.out / layout.FINAL).glob("*")):
            self.freed += free(run, which == "leaders" or run == winner)

    def __str__(self) -> str:
        kept = [size for size in map(_size, self.out.glob(f"*/*/{layout.CHECKPOINTS}")) if size]
        summary = f"kept the weights of {len(kept)} runs, {_gib(sum(map(sum, kept)))}"
        return f"{summary}; freed {_gib(self.freed)}" if self.freed else summary


def free(run: Path, weights: bool) -> int:
    """Delete the checkpoints of a run that is over, but for its best weights where these are wanted.

    What will be left is written down first: what a kill leaves undone, the next call does.

    Returns:
        How many bytes that freed.
    """
    folder = run / layout.CHECKPOINTS
    if not (latest := run_folder.latest_step(run)):
        return 0
    before, freed = sum(_size(folder)), run_folder.read_freed(run)
    kept = (freed["kept"] if freed else run_folder.find_best_checkpoint(run)) if weights else ""
    store.write(run / layout.FREED, json.dumps({"step": latest, "kept": kept}))
    for each in folder.glob("checkpoint_*/"):
        if each.name != kept:
            shutil.rmtree(each, ignore_errors=True)  # a run that was just ended may be deleting it too
    if kept:
        (folder / kept / layout.TRAINING_STATE).unlink(missing_ok=True)
    return before - sum(_size(folder))


def _size(folder: Path) -> list[int]:
    """Bytes of each weights or state file of a run."""
    return [file.stat().st_size for file in folder.glob("checkpoint_*/*") if file.suffix != ".json"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
