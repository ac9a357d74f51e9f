"""What evaluations, runs and sweeps left behind, read from their folders."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from clipfh import UserError
from clipfh.config import presets, schema, sweep_file
from clipfh.config.sweep_file import SearchRange
from clipfh.report import bootstrap
from clipfh.storage import run_folder

ZERO_SHOT = "0000"

Figures = Mapping[str, Any]
"""what a `metrics.json` holds, or a part of it"""
Curve = list[tuple[float, float]]
"""images seen, and a quantity"""


@dataclass(frozen=True)
class Measured:
    """A model's figures over a split."""

    name: str
    figures: Figures
    predictions: Path
    """the file, which need not be there"""
    catalogue: Mapping[str, Any]
    """`path` and `hash`; empty where they are not known"""


def gain(before: Measured, after: Measured) -> Figures:
    """`bootstrap.gain` by the queries' files; empty where one is not there, or they are not of the same queries."""
    files = [model.predictions.with_name("queries.parquet") for model in (before, after)]
    if not all(file.is_file() for file in files):
        return {}
    old, new = map(pq.read_table, files)
    if old.drop_columns("AP") != new.drop_columns("AP"):
        return {}
    item = old["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return bootstrap.gain(old["AP"].to_numpy(), new["AP"].to_numpy(), item)


@dataclass(frozen=True)
class Part:
    """What the models reach on a part of the queries, or in another task."""

    label: str
    figures: list[Figures]

    @property
    def num_query(self) -> int:
        """How many queries it has."""
        return max(each.get("num_query") or 0 for each in self.figures)


@dataclass(frozen=True)
class Evaluation:
    """`metrics.json`, and `evaluation.json`, which tells of what."""

    name: str
    models: list[Measured]
    """one"""
    told: Mapping[str, Any]
    """`catalogue`, `split`, `model` and `checkpoint`; empty where they are not known"""
    kind = "Evaluation"
    val_mAP = None

    @property
    def figures(self) -> Figures:
        """Its only model's."""
        return self.models[0].figures


@dataclass(frozen=True)
class Run:
    """`experiment.json` and `metrics.jsonl`."""

    name: str
    settings: dict[str, Any]
    reports: list[dict[str, Any]]
    diverged: dict[str, Any]
    """the line that tells of it, or empty"""
    kind = "Run"
    models: list[Measured] = field(default_factory=list)
    """none: a run has its validation mAP only"""

    @property
    def figures(self) -> Figures:
        """None."""
        return {}

    @property
    def best(self) -> dict[str, Any]:
        """The report with the highest validation mAP, or empty."""
        return max((r for r in self.reports if known(r.get("val_mAP"))), key=lambda r: r["val_mAP"], default={})

    @property
    def val_mAP(self) -> float | None:
        """The highest."""
        return self.best.get("val_mAP")

    @property
    def terms(self) -> list[str]:
        """Of the loss, those that are on."""
        found = (key.removeprefix("loss_") for line in self.reports for key in line if key.startswith("loss_"))
        return list(dict.fromkeys(found))

    @property
    def usual(self) -> dict[str, Any]:
        """The settings of its preset by default."""
        return usual(self.settings)

    def curve(self, key: str) -> Curve:
        """A quantity against the images seen."""
        return curve(self.reports, key)


@dataclass(frozen=True)
class Trial:
    """A line of `leaderboard.csv` with the trial's learning curve."""

    name: str
    status: str
    val_mAP: float | None
    images: float
    seconds: float
    settings: Mapping[str, Any]
    """the searched ones that it has"""
    error: str
    curve: Curve

    @property
    def number(self) -> int:
        """3 for trial 0003."""
        return int(self.name)

    @property
    def score(self) -> float | None:
        """What it reached. A trial that diverged has a figure for the search's sake only."""
        return None if self.status == "diverged" else self.val_mAP

    @property
    def is_lost(self) -> bool:
        """Whether it diverged, or failed before it had a figure."""
        return self.score is None and self.status in ("failed", "diverged")


@dataclass(frozen=True)
class Sweep:
    """`sweep.yaml`, `leaderboard.csv`, the trials' `metrics.jsonl`, and at the end `summary.json`."""

    name: str
    planned: int
    """number of trials"""
    search: Mapping[str, SearchRange]
    board: list[Trial]
    """best first, with the zero-shot model"""
    summary: Figures
    """empty while there is none"""
    models: list[Measured]
    """zero-shot and the winner on the test split, at the end"""
    study: Path
    """Optuna's journal, which need not be there"""
    final: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """images and seconds of each run after the search"""
    kind = "Sweep"

    @property
    def trials(self) -> list[Trial]:
        """All but zero-shot, in the order they began."""
        return sorted((t for t in self.board if t.name != ZERO_SHOT), key=lambda t: t.number)

    @property
    def best(self) -> str:
        """The winner, or the leading trial so far; empty without any figure."""
        leading = (trial.name for trial in self.board if trial.score is not None)
        return str(self.summary.get("best_trial") or next(leading, ""))

    @property
    def winner(self) -> Trial | None:
        """The best trial; None where zero-shot leads, or nothing."""
        return next((trial for trial in self.trials if trial.name == self.best), None)

    @property
    def figures(self) -> Figures:
        """The winner's on the test split."""
        return self.models[-1].figures if self.models else {}

    @property
    def val_mAP(self) -> float | None:
        """The winner's, or the best so far."""
        return next((trial.val_mAP for trial in self.board if trial.name == self.best), None)

    @property
    def zero_shot(self) -> float | None:
        """Validation mAP of the zero-shot model."""
        return next((trial.val_mAP for trial in self.board if trial.name == ZERO_SHOT), None)

    @property
    def statuses(self) -> Counter[str]:
        """How many trials are done, stopped, diverged, failed or running."""
        return Counter(trial.status for trial in self.trials)

    @property
    def num_ended(self) -> int:
        """Trials that are over."""
        return sum(trial.status != "running" for trial in self.trials)


Shown = Evaluation | Run | Sweep


def read(path: str | Path) -> Shown:
    """What a folder holds.

    Raises:
        UserError: nothing to report, or a file that can't be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; name an evaluation, a run or a sweep")
    if (folder / "sweep.yaml").is_file():
        return _read_sweep(folder)
    if (folder / "experiment.json").is_file() and (folder / "metrics.jsonl").is_file():
        return _read_run(folder)
    figures = _read_json(folder / "metrics.json")
    if "mAP" in figures:
        told = _read_json(folder / "evaluation.json")
        model = Measured("", figures, folder / "predictions.parquet", told.get("catalogue", {}))
        return Evaluation(folder.resolve().name, [model], told)
    raise UserError(
        f"{path} holds nothing to report: name the folder of an evaluation (metrics.json), of a sweep (sweep.yaml) "
        "or of a run that has reported (experiment.json, metrics.jsonl)"
    )


def _read_run(folder: Path) -> Run:
    lines = _read_lines(folder / "metrics.jsonl")
    reports = [line for line in lines if "diverged" not in line]
    diverged = next((line for line in lines if "diverged" in line), {})
    return Run(
        folder.resolve().name, schema.flatten(schema.load_experiment(folder / "experiment.json")), reports, diverged
    )


def _read_sweep(folder: Path) -> Sweep:
    file, summary = sweep_file.load(folder / "sweep.yaml"), _read_json(folder / "summary.json")
    rows: list[dict[str, str]] = []
    if (folder / "leaderboard.csv").exists():
        with (folder / "leaderboard.csv").open(newline="") as opened:
            rows = list(csv.DictReader(opened, restval=""))
    board = [_trial(row, folder / "trials" / row["trial"] / "metrics.jsonl", file.search) for row in rows]
    models = [
        Measured(name, summary[key], folder / "test" / name.lower() / "predictions.parquet", summary["catalogue"])
        for name, key in (("Zero-shot", "zero_shot"), ("Winner", "test"))
        if summary
    ]
    final = final_runs(folder)
    return Sweep(file.name, file.trials, file.search, board, summary, models, folder / "study.journal", final)


def final_runs(folder: Path) -> dict[str, tuple[int, float]]:
    """Images and seconds of each run that a sweep has made after its search, the refit included."""
    return {
        file.parent.name: run_folder.spent(_read_lines(file)) for file in sorted(folder.glob("final/*/metrics.jsonl"))
    }


def _trial(row: Mapping[str, str], file: Path, searched: Iterable[str]) -> Trial:
    lines = _read_lines(file) if file.exists() else []
    return Trial(
        name=row["trial"],
        status=row["status"],
        val_mAP=float(row["val_mAP"]) if row["val_mAP"] else None,
        images=float(row["images"] or 0),
        seconds=float(row["seconds"] or 0),
        settings={name: schema.parse(name, row[name]) for name in searched if row.get(name)},
        error=row["error"],
        curve=curve(lines),
    )


def curve(lines: Iterable[Mapping[str, Any]], key: str = "val_mAP") -> Curve:
    """A quantity against the images seen, but for what a divergence left."""
    return [(line["images"], line[key]) for line in lines if known(line.get(key)) and "diverged" not in line]


def known(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def short(value: object) -> str:
    """A setting to three digits; whole numbers and words as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def usual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of this stage and model are by default."""
    return schema.flatten(presets.resolve(settings["stage"], None, {"model.name": settings["model.name"]}))


def _read_json(file: Path) -> dict[str, Any]:
    """An object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise _unreadable(file, error) from error
    return found if isinstance(found, dict) else {}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} can't be read ({' '.join(str(error).split())}): write it again")
