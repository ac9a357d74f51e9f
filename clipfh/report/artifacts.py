"""The one reader of what evaluations, runs and sweeps leave behind, for reports, status, tracking and model cards."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipfh import UserError
from clipfh.config import presets, schema, sweep_file
from clipfh.config.search_range import SearchRange
from clipfh.config.sweep_file import MODEL, SweepFile
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.report import bootstrap
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder

ZERO_SHOT = "0000"
"""Number of the zero-shot model's line; with several models, what the number of each begins with."""

Metrics = Mapping[str, Any]
"""what a `metrics.json` holds, or a part of it"""
Curve = list[tuple[float, float]]
"""images seen, and a quantity"""


@dataclass(frozen=True)
class ModelRecord:
    """A model's metrics over a split."""

    name: str
    metrics: Metrics
    folder: Folder
    """folder of the evaluation, which need not be there"""
    catalogue: Mapping[str, Any]
    """`path` and `hash`; empty where the evaluation does not say"""


def gain(before: ModelRecord, after: ModelRecord) -> Metrics:
    """`bootstrap.gain` from the models' files of queries; empty where one is missing or their queries differ."""
    if not all(model.folder.exists(layout.QUERIES) for model in (before, after)):
        return {}
    old, new = (model.folder.read_table(layout.QUERIES) for model in (before, after))
    if old.drop_columns("AP") != new.drop_columns("AP"):
        return {}
    item = old["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return bootstrap.gain(old["AP"].to_numpy(), new["AP"].to_numpy(), item)


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation: `metrics.json`, and `evaluation.json`, which says what was measured."""

    folder: Folder
    models: list[ModelRecord]
    """one model"""
    subject: Mapping[str, Any]
    """`catalogue`, `split`, `model` and `checkpoint`; empty where there is no `evaluation.json`"""
    kind = "Evaluation"
    val_mAP = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def metrics(self) -> Metrics:
        """Metrics of its only model."""
        return self.models[0].metrics


@dataclass(frozen=True)
class RunRecord:
    """A run: `experiment.json` and `metrics.jsonl`, either of which need not be there yet."""

    folder: Folder
    lines: list[dict[str, Any]]
    """reports, and after them, where the run diverged, a line that says so"""
    kind = "Run"
    models: tuple[ModelRecord, ...] = ()
    """empty: a run has its validation mAP only"""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def metrics(self) -> Metrics:
        """Empty."""
        return {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted settings; empty before there is an `experiment.json`."""
        if not self.folder.exists(layout.EXPERIMENT):
            return {}
        text, where = self.folder.read_text(layout.EXPERIMENT), f"{self.folder}/{layout.EXPERIMENT}"
        return schema.flatten(schema.from_json(text, where))

    @property
    def reports(self) -> list[dict[str, Any]]:
        """All lines without the one about a divergence."""
        return [line for line in self.lines if "diverged" not in line]

    @property
    def divergence(self) -> dict[str, Any]:
        """The line about a divergence, or empty."""
        return next((line for line in self.lines if "diverged" in line), {})

    @property
    def best(self) -> dict[str, Any]:
        """The report with the highest validation mAP, or empty."""
        return max((r for r in self.reports if is_number(r.get("val_mAP"))), key=lambda r: r["val_mAP"], default={})

    @property
    def val_mAP(self) -> float | None:
        """The highest validation mAP."""
        return self.best.get("val_mAP")

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms that are on."""
        names = (key.removeprefix("loss_") for line in self.reports for key in line if key.startswith("loss_"))
        return list(dict.fromkeys(names))

    @property
    def spent(self) -> tuple[int, float]:
        """Images seen and seconds taken."""
        return run_folder.spent(self.lines)

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings of the run's stage and model by default."""
        return default_settings(self.settings)

    def curve(self, key: str) -> Curve:
        """A quantity against the images seen."""
        return [(line["images"], line[key]) for line in self.reports if is_number(line.get(key))]


@dataclass(frozen=True)
class TrialRecord:
    """A line of `leaderboard.csv` with the trial's learning curve."""

    name: str
    status: str
    val_mAP: float | None
    images: float
    seconds: float
    settings: Mapping[str, Any]
    """the searched settings that it has"""
    error: str
    curve: Curve

    @property
    def is_zero_shot(self) -> bool:
        """Whether it is a model before any tuning."""
        return is_zero_shot(self.name)

    @property
    def number(self) -> int:
        """3 for trial 0003."""
        return int(self.name)

    @property
    def score(self) -> float | None:
        """Validation mAP that it reached; None for a diverged trial, whose mAP only serves the search."""
        return None if self.status == "diverged" else self.val_mAP

    @property
    def is_lost(self) -> bool:
        """Whether it diverged, or failed before it had a score."""
        return self.score is None and self.status in ("failed", "diverged")


@dataclass(frozen=True)
class SweepRecord:
    """A sweep: `sweep.yaml`, `leaderboard.csv`, the runs in `trials/` and `final/`, and at the end `summary.json`."""

    folder: Folder
    file: SweepFile
    board: list[TrialRecord]
    """best first, with the zero-shot model"""
    final: list[RunRecord]
    """runs after the search, the refit included"""
    summary: Metrics
    """empty while there is none"""
    race: list[dict[str, Any]]
    """what `race.json` has of each of several models: `model`, `trial`, `parameters`, `pixels`, `milliseconds`,
    `val_mAP` (below 0 before it is measured) and `kept`"""
    kind = "Sweep"

    @property
    def name(self) -> str:
        """Name that the sweep file gives."""
        return self.file.name

    @property
    def planned(self) -> int:
        """Number of trials."""
        return self.file.trials

    @property
    def search(self) -> Mapping[str, SearchRange]:
        """Range of each searched setting."""
        return self.file.search

    @cached_property
    def models(self) -> list[ModelRecord]:
        """Zero-shot and the winner on the test split; none before the end."""
        keys = {"Zero-shot": "zero_shot", "Winner": "test"} if self.summary else {}
        test, catalogue = self.folder / layout.TEST, self.summary.get("catalogue", {})
        return [ModelRecord(name, self.summary[key], test / name.lower(), catalogue) for name, key in keys.items()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The models that soup and mix were chosen among, with their metrics; empty where there was neither."""
        return list(self.summary.get("soup", {}).get("steps", []))

    @property
    def blend(self) -> str:
        """What the winner's weights are made of, where that is more than one run."""
        blend = self.summary.get("final", {}).get("blend") or {}
        return str(blend["label"]) if blend and (len(blend["runs"]) > 1 or blend["share"] < 1) else ""

    @cached_property
    def measured(self) -> list[dict[str, Any]]:
        """What `soup.json` has: `runs`, `share` and `figures` on the validation items of each average and mix."""
        return list(self.folder.read_json(layout.SOUP).get("measured", []))

    @property
    def trials(self) -> list[TrialRecord]:
        """All but zero-shot, in the order they began."""
        return sorted((t for t in self.board if not t.is_zero_shot), key=lambda t: t.number)

    @property
    def best(self) -> str:
        """The winner, or the leading trial so far; empty where no trial has a score."""
        leading = (trial.name for trial in self.board if trial.score is not None)
        return str(self.summary.get("best_trial") or next(leading, ""))

    @property
    def winner(self) -> TrialRecord | None:
        """The best trial; None where zero-shot leads, or nothing."""
        return next((trial for trial in self.trials if trial.name == self.best), None)

    @property
    def metrics(self) -> Metrics:
        """The winner's metrics on the test split."""
        return self.models[-1].metrics if self.models else {}

    @property
    def val_mAP(self) -> float | None:
        """Validation mAP of the winner, which may be a mean, a soup's or an earlier sweep's, or the best so far."""
        return self.summary.get("val_mAP") or next((t.val_mAP for t in self.board if t.name == self.best), None)

    @property
    def zero_shot(self) -> float | None:
        """Validation mAP of the zero-shot model, the best where there are several."""
        return next((trial.val_mAP for trial in self.board if trial.is_zero_shot), None)

    @property
    def statuses(self) -> Counter[str]:
        """Number of trials that are done, stopped, diverged, failed or running."""
        return Counter(trial.status for trial in self.trials)

    @property
    def num_ended(self) -> int:
        """Number of trials that are over."""
        return sum(trial.status != "running" for trial in self.trials)

    def running(self) -> list[RunRecord]:
        """Runs of the trials that are not over by the leaderboard; some are not on it yet."""
        over = {trial.name for trial in self.board if trial.status != "running"}
        trials = [run for run in self.folder.folders(layout.TRIALS) if not is_zero_shot(run.name)]
        return [read_run(run) for run in trials if run.name not in over]


def is_zero_shot(trial: str) -> bool:
    """Whether a leaderboard's line or a trial's folder is of a model before any tuning."""
    return trial.partition("-")[0] == ZERO_SHOT


def is_refit(run: str) -> bool:
    """Whether a final run's folder is of a run on train and validation items together."""
    return run.partition("-")[0] == "refit"


Record = EvaluationRecord | RunRecord | SweepRecord


def read(path: str | Path | Folder) -> Record:
    """What a folder holds.

    Raises:
        UserError: nothing to report, or a file that can't be read.
    """
    folder = Folder(path)
    if not folder.is_folder():
        raise UserError(f"{path}: no such folder; name an evaluation, a run or a sweep")
    if folder.exists(layout.SWEEP):
        return read_sweep(folder)
    if folder.exists(layout.EXPERIMENT) and folder.exists(layout.REPORTS):
        return read_run(folder)
    metrics = folder.read_json(layout.METRICS)
    if "mAP" in metrics:
        subject = folder.read_json(layout.EVALUATION)
        return EvaluationRecord(folder, [ModelRecord("", metrics, folder, subject.get("catalogue", {}))], subject)
    raise UserError(
        f"{path} holds nothing to report: name the folder of an evaluation (metrics.json), of a sweep (sweep.yaml) "
        "or of a run that has reported (experiment.json, metrics.jsonl)"
    )


def read_run(folder: Folder) -> RunRecord:
    """A run as it stands. UserError: a file that can't be read."""
    return RunRecord(folder, folder.read_lines(layout.REPORTS))


def read_sweep(folder: Folder) -> SweepRecord:
    """A sweep as it stands. UserError: a file that can't be read."""
    file = sweep_file.load(folder / layout.SWEEP)
    board = folder.read_text(layout.LEADERBOARD) if folder.exists(layout.LEADERBOARD) else ""
    rows = csv.DictReader(io.StringIO(board, newline=""), restval="")
    trials = [_read_trial(row, folder / layout.TRIALS / row["trial"], file.search) for row in rows]
    race = folder.read_json(layout.RACE).get("models", [])
    if models := [each["model"] for each in race if each["kept"]]:
        file = file.only(models)
    return SweepRecord(folder, file, trials, final_runs(folder), folder.read_json(layout.SUMMARY), race)


def final_runs(sweep: Folder) -> list[RunRecord]:
    """Runs that a sweep has made after its search, the refit included."""
    return [read_run(run) for run in sweep.folders(layout.FINAL)]


def runs(path: str | Path | Folder) -> list[RunRecord]:
    """The run in a folder, or the trials and final runs of a sweep that have begun."""
    folder = Folder(path)
    within = [folder] if folder.exists(layout.RUN) else [*folder.folders(layout.TRIALS), *folder.folders(layout.FINAL)]
    return [read_run(run) for run in within if run.exists(layout.EXPERIMENT)]


def _read_trial(row: Mapping[str, str], folder: Folder, names: Iterable[str]) -> TrialRecord:
    return TrialRecord(
        name=row["trial"],
        status=row["status"],
        val_mAP=float(row["val_mAP"]) if row["val_mAP"] else None,
        images=float(row["images"] or 0),
        seconds=float(row["seconds"] or 0),
        settings={n: row[n] if n == MODEL else schema.parse(n, row[n]) for n in names if row.get(n)},
        error=row["error"],
        curve=read_run(folder).curve("val_mAP"),
    )


def read_evidence(weights: str | Path, metrics: Metrics) -> dict[str, Any]:
    """What a model card tells besides the settings, from the folders around some weights.

    Args:
        weights: the folder of the weights: a sweep's export, or a checkpoint.
        metrics: the checkpoint's metrics.

    Returns:
        As `export.Evidence`; empty where there is neither a sweep's summary nor a run's own file.
    """
    folder = Folder(weights)
    sweep, run = folder.parent, folder.parent.parent
    if folder.name == layout.BEST and (summary := sweep.read_json(layout.SUMMARY)):
        return {**{key: summary[key] for key in ("catalogue", "test", "zero_shot")}, **summary.get("final", {})}
    if not (start := run.read_json(layout.RUN)):
        return {}
    catalogue = open_catalogue_again({"path": start["catalogue"], "hash": start["hash"]})
    scores = {key: metrics[key] for key in ("val_mAP", "start_val_mAP") if key in metrics}
    account = catalogue_account(catalogue) if catalogue else {}
    return {"warm_start": start["warm_start"], "catalogue": account, **scores}


def open_catalogue_again(account: Mapping[str, Any]) -> Catalogue | None:
    """The catalogue of an account (`path` and `hash`, or empty); None where it is not there, or not the same."""
    if not account or not Folder(account["path"]).exists(layout.CATALOGUE):
        return None
    catalogue = open_catalogue(account["path"])
    return catalogue if catalogue.manifest["hash"] == account["hash"] else None


def catalogue_account(catalogue: Catalogue) -> dict[str, Any]:
    """The facts on a catalogue that a summary and a model card have."""
    image_size = catalogue.manifest["settings"]["image_size"]
    facts = {key: catalogue.manifest[key] for key in ("hash", "counts")}
    return {"path": str(catalogue.path), "image_size": image_size, **facts}


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def short(value: object) -> str:
    """A setting to three digits; whole numbers and words as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the same stage and model by default."""
    return schema.flatten(presets.resolve(settings["stage"], None, {"model.name": settings["model.name"]}))
