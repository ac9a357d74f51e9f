"""The leaderboard: each zero-shot model and every trial, best first, as the study and the run folders have them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from clipfh import UserError
from clipfh.config.sweep_file import SweepFile
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep.searcher import ROW, own_trials
from clipfh.sweep.trial import OBJECTIVE

ZERO_SHOT = "0000"
"""Number of the zero-shot model's line; with several models, what the number of each begins with."""

Row = Mapping[str, Any]
"""A line of the leaderboard: trial, status, val_mAP where there is one, images, seconds, searched settings, error."""


@dataclass(frozen=True)
class Leaderboard:
    """`leaderboard.csv` of a sweep."""

    out: Folder
    """the sweep's folder"""
    sweep: SweepFile
    study: optuna.Study
    zero_shot: Sequence[Row]
    """rows of the models before any tuning, best first"""

    def write(self) -> list[Row]:
        """Write the file anew and return its rows."""
        rows = self.rows()
        text = io.StringIO()
        columns = ["rank", "trial", "status", "val_mAP", "images", "seconds", *self.sweep.search, "error"]
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"rank": rank, **row} for rank, row in enumerate(rows, 1))
        self.out.write(layout.LEADERBOARD, text.getvalue())
        return rows

    def rows(self) -> list[Row]:
        """All rows, best first."""
        trials = own_trials(self.study).items()
        running = [self.row(n, self.sweep.suggest(t)) for n, t in trials if t.state == TrialState.RUNNING]
        rows = [*self.zero_shot, *self.over(), *running]
        return sorted(rows, key=lambda row: float(row.get("val_mAP", -1)), reverse=True)

    def over(self) -> list[Row]:
        """The rows of trials that are over, in order of their numbers, as the study has them."""
        return [trial.user_attrs[ROW] for trial in own_trials(self.study).values() if trial.state.is_finished()]

    def require_score(self) -> None:
        """See that a trial has a score: where none has, zero-shot would win without a rival.

        Raises:
            UserError: all trials failed before their first report.
        """
        trials = self.over()
        if trials and not any("val_mAP" in row for row in trials):
            last = trials[-1]
            raise UserError(
                f"all {len(trials)} trials failed before a report, trial {last['trial']} of: {last['error']}; "
                f"{self.out / layout.LEADERBOARD} has the others' reasons. With these removed, "
                "--resume --retry-failed trains them again"
            )

    def reports(self, number: str, until: float = math.inf) -> list[dict[str, Any]]:
        """What a trial has reported, up to a number of images."""
        lines = run_folder.read_metrics(self.out / layout.TRIALS / number)
        return [line for line in lines if line["images"] <= until]

    def row(self, number: str, settings: Mapping[str, Any], last: Any = None, error: str = "") -> Row:
        """The row of a trial: if it is over, by its last result and the error it crashed of; else by its reports."""
        reports = self.reports(number)
        images, seconds = run_folder.spent(reports)
        status = "running" if last is None else _status(last, error)
        last = (reports or [{}])[-1] if last is None else last
        has_score = last.get(OBJECTIVE) is not None and "failed" not in last
        return {
            "trial": number,
            "status": status,
            **({"val_mAP": _score(last[OBJECTIVE])} if has_score else {}),
            "images": last.get("images", images),
            "seconds": round(seconds, 1),
            **settings,
            "error": str(last.get("diverged") or last.get("failed") or error),
        }


def _score(val_mAP: float) -> str:
    return f"{val_mAP:.6f}"


def _status(last: Mapping[str, Any], error: str) -> str:
    if error or "failed" in last:
        return "failed"
    return "diverged" if "diverged" in last else "done" if last.get("finished") else "stopped"
