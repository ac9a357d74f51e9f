"""How a run or a sweep stands, read from its files, none of which is changed."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from clipfh import UserError
from clipfh.config.experiment import Budget
from clipfh.report import artifacts
from clipfh.report.artifacts import RunRecord, SweepRecord, TrialRecord
from clipfh.storage import layout
from clipfh.storage.store import Folder

ENDED = ("done", "stopped", "diverged", "failed")


@dataclass(frozen=True)
class RunProgress:
    """How far one run has come."""

    name: str
    images: int
    total: float
    """images of its budget; NaN before the first report of a budget in epochs"""
    val_mAP: float
    best: float
    images_per_second: float
    since_report: float
    """seconds since its last report"""
    loss: float
    is_over: bool

    @property
    def left(self) -> float:
        """Seconds to its end, at its present speed."""
        return max(0.0, self.total - self.images) / self.images_per_second if self.images_per_second else math.nan


def describe(path: str | Path) -> str:
    """How the run or sweep in a folder stands, for a person.

    Raises:
        UserError: neither is there.
    """
    folder = Folder(path)
    if folder.exists(layout.SWEEP):
        return _describe_sweep(artifacts.read_sweep(folder))
    if folder.exists(layout.RUN):
        return _describe_run(_progress(artifacts.read_run(folder)))
    raise UserError(f"{path} is neither a run nor a sweep: give the --out of clipfh train or clipfh sweep")


def _describe_run(run: RunProgress) -> str:
    lines = [f"{run.images:,} of {run.total:,.0f} images, val mAP {run.val_mAP:.4f} (best {run.best:.4f})"]
    speed = f"{run.images_per_second:.0f} images/s, about {_duration(run.left)} left if it runs"
    return "\n".join([*lines, f"{'finished' if run.is_over else speed}; last report {_duration(run.since_report)} ago"])


def _describe_sweep(sweep: SweepRecord) -> str:
    ended = [trial for trial in sweep.board if trial.status in ENDED]
    running = [_progress(run) for run in sweep.running()]
    to_come = max(0, sweep.planned - len(ended) - len(running))
    final = _final_progress(sweep, {trial.images for trial in ended} | {run.total for run in running})
    counts = Counter(trial.status for trial in ended) | Counter({"running": len(running), "to come": to_come})
    lines = [
        f"sweep {sweep.name}, {sweep.planned} trials: "
        + ", ".join(f"{counts[name]} {name}" for name in (*ENDED, "running", "to come") if counts[name]),
        *_race_lines(sweep),
        _leader_line(sweep, running),
    ]
    if sweep.folder.exists(layout.SUMMARY):
        return "\n".join([*lines, f"finished: {sweep.folder}/{layout.REPORT}"])
    lines += [_run_line(run) for run in running]
    lines += [str(final)] * bool(final.runs) + [_run_line(run) for run in final.running] + _soup_lines(sweep)
    return "\n".join([*lines, _outlook(ended, running, to_come, final)])


@dataclass(frozen=True)
class _FinalProgress:
    """The runs after the search: leading settings again, and the refit."""

    runs: list[RunProgress]
    seeds: int
    """number of runs of leading settings to come"""
    refits: int
    """refits to come: 0 or 1"""
    images: float
    """budget of one run"""

    @property
    def running(self) -> list[RunProgress]:
        """Runs that are not over."""
        return [run for run in self.runs if not run.is_over]

    def __str__(self) -> str:
        counts = {"over": len(self.runs) - len(self.running), "running": len(self.running)}
        counts["to come"] = self.seeds + self.refits
        return "final runs: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _final_progress(sweep: SweepRecord, budgets: set[float]) -> _FinalProgress:
    """Progress of the final runs, with the ones that the sweep file still asks for.

    Args:
        sweep: the sweep.
        budgets: numbers of images that trials have seen; the largest is a run's budget.
    """
    final, runs = sweep.file.final, [_progress(run) for run in sweep.final]
    refits = sum(artifacts.is_refit(run.name) for run in runs)
    seeds = min(final.top, sweep.planned) * final.seeds - (len(runs) - refits)
    totals = {run.total for run in runs} | budgets
    images = max((total for total in totals if total == total), default=math.nan)
    return _FinalProgress(runs, max(0, seeds) if not refits else 0, max(0, final.refit - refits), images)


def table(path: str | Path, rows: int) -> Table:
    """A sweep's trials: running ones, then the best of the others, as many as `rows` allows."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    if not Folder(path).exists(layout.SWEEP):
        return table
    sweep = artifacts.read_sweep(Folder(path))
    running = [(run, _progress(run)) for run in sweep.running()]
    running += [(run, progress) for run in sweep.final if not (progress := _progress(run)).is_over]
    for title in ("trial", "", *(name.rpartition(".")[2] for name in sweep.search), *COLUMNS):
        table.add_column(title, justify="left" if title in ("trial", "") else "right", no_wrap=True)
    for run, progress in running:
        settings = (_short(str(run.settings.get(name, ""))) for name in sweep.search)
        table.add_row(run.name, "running", *settings, *_cells(progress), style="bold")
    over = [trial for trial in sweep.board if trial.status in (*ENDED, "zero-shot")]
    for trial in over[: max(1, rows - len(running) - 3)]:
        settings = (_short(str(trial.settings.get(name, ""))) for name in sweep.search)
        score = "" if trial.val_mAP is None else _short(str(trial.val_mAP))
        cells = [f"{trial.images:,.0f}", "", "", "", score, ""]
        table.add_row(trial.name, trial.status, *settings, *cells, style="red" if trial.error else "")
    return table


COLUMNS = ("images", "of", "loss", "val mAP", "best", "left")


def _cells(run: RunProgress) -> list[str]:
    total = "" if run.total != run.total else f"{run.total:,.0f}"
    if not run.images:
        return ["", total, "", "", "", ""]
    scores = ("" if value != value else f"{value:.3f}" for value in (run.loss, run.val_mAP, run.best))
    return [f"{run.images:,}", total, *scores, _duration(run.left)]


def _short(text: str) -> str:
    """A number with three significant digits; other text as it is."""
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text


def _race_lines(sweep: SweepRecord) -> list[str]:
    """How the race of several models stands; none where there is no race, or none has begun."""
    if not sweep.race:
        return []
    models = sorted((each for each in sweep.race if each["val_mAP"] >= 0), key=lambda each: -each["val_mAP"])
    scores = ", ".join(f"{each['model']} {each['val_mAP']:.4f}" for each in models)
    survivors = [each["model"] for each in sweep.race if each["kept"]]
    state = f"{', '.join(survivors)} searched" if survivors else f"{len(models)} of {len(sweep.race)} measured"
    return [f"race of {len(sweep.race)} models: {state}" + (f" (zero-shot val mAP: {scores})" if scores else "")]


def _soup_lines(sweep: SweepRecord) -> list[str]:
    """How far soup and mix are; none before the first is measured."""
    scores = {each["label"]: each["figures"]["mAP"] for each in sweep.measured}
    if not scores:
        return []
    best = max(scores, key=lambda label: scores[label])
    return [f"soup and mix: {len(scores)} measured, the best {best}: val mAP {scores[best]:.4f}"]


def _leader_line(sweep: SweepRecord, running: list[RunProgress]) -> str:
    scores = {trial.name: trial.val_mAP for trial in sweep.board if trial.val_mAP is not None}
    scores |= {run.name: run.best for run in running if run.best > scores.get(run.name, 0.0)}
    if not scores:
        return "best so far: no report yet"
    name = max(scores, key=lambda trial: scores[trial])
    zero_shot = "" if sweep.zero_shot is None else f" (zero-shot {sweep.zero_shot:.4f})"
    return f"best so far: val mAP {scores[name]:.4f}, trial {name}{zero_shot}"


def _run_line(run: RunProgress) -> str:
    name = f"trial {run.name}" if run.name.isdigit() else run.name
    if not run.images:
        return f"{name}: no report yet"
    scores = "" if run.val_mAP != run.val_mAP else f"val mAP {run.val_mAP:.4f} (best {run.best:.4f}), "
    speed, ago = f"{run.images_per_second:.0f} images/s", _duration(run.since_report)
    return f"{name}: {run.images:,} of {run.total:,.0f} images, {scores}{speed}, last report {ago} ago"


def _outlook(ended: list[TrialRecord], running: list[RunProgress], to_come: int, final: _FinalProgress) -> str:
    """Speed, and the time left if trials to come see as many images as ended ones did."""
    now = [run for run in (*running, *final.running) if run.images_per_second]
    speed = sum(run.images_per_second for run in now)
    if not speed:
        return "time left: not known before a running trial's or final run's first report"
    counts = [trial.images for trial in ended] or [run.total for run in running if run.total == run.total]
    images = to_come * sum(counts) / max(1, len(counts)) + sum(run.left * run.images_per_second for run in now)
    seconds = (images + (final.seeds and final.seeds * final.images)) / speed
    seconds += (final.refits and final.refits * final.images) / (speed / len(now))  # by itself
    return f"{speed:.0f} images/s in all, about {_duration(seconds)} left if it runs"


def _progress(run: RunRecord) -> RunProgress:
    reports, settings = run.reports, run.settings
    last: dict[str, Any] = reports[-1] if reports else {"images": 0, "val_mAP": 0.0, "best_val_mAP": 0.0}
    epoch = last["images"] / last["epoch"] if last.get("epoch") else math.nan
    total = (settings["budget.images"] or settings["budget.epochs"] * epoch) if settings else math.nan
    patience = settings.get("budget.patience", Budget().patience)
    is_out_of_patience = patience and last.get("reports_since_best", 0) >= patience
    has_reports = run.folder.exists(layout.REPORTS)
    return RunProgress(
        name=run.name,
        images=last["images"],
        total=total,
        val_mAP=last.get("val_mAP", math.nan),  # a refit has none
        best=last.get("best_val_mAP", math.nan),
        images_per_second=last.get("images_per_second", 0.0),
        since_report=time.time() - run.folder.modified(layout.REPORTS) if has_reports else math.nan,
        loss=last.get("loss", math.nan),
        is_over=bool(run.divergence or is_out_of_patience or last["images"] >= total),
    )


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
