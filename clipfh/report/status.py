"""How a run or a sweep stands, from the files it writes; nothing of it is touched."""

from __future__ import annotations

import csv
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from clipfh import UserError
from clipfh.config import schema
from clipfh.config.experiment import Budget

EXPERIMENT = "experiment.json"  # checkpoint's, which would load torch
ENDED = ("done", "stopped", "diverged", "failed")


@dataclass(frozen=True)
class Progress:
    """Of one run."""

    name: str
    images: int
    total: float
    """images of its budget; NaN before the first report of a budget in epochs"""
    val_mAP: float
    best: float
    rate: float
    """images per second"""
    reported: float
    """seconds since its last report"""
    loss: float
    is_over: bool

    @property
    def left(self) -> float:
        """Seconds to its end, at the rate it has."""
        return max(0.0, self.total - self.images) / self.rate if self.rate else math.nan


def of(path: str | Path) -> str:
    """How the run or sweep in a folder stands, for a person.

    Raises:
        UserError: neither is there.
    """
    folder = Path(path)
    if (folder / "sweep.yaml").exists():
        return _sweep(folder)
    if (folder / "run.json").exists():
        return _run(_progress(folder))
    raise UserError(f"{path} is neither a run nor a sweep: give the --out of clipfh train or clipfh sweep")


def _run(run: Progress) -> str:
    lines = [f"{run.images:,} of {run.total:,.0f} images, val mAP {run.val_mAP:.4f} (best {run.best:.4f})"]
    state = "finished" if run.is_over else f"{run.rate:.0f} images/s, about {_duration(run.left)} left if it runs"
    return "\n".join([*lines, f"{state}; last report {_duration(run.reported)} ago"])


def _sweep(folder: Path) -> str:
    wanted = yaml.safe_load((folder / "sweep.yaml").read_text())
    board = _board(folder)
    ended = [row for row in board if row["status"] in ENDED]
    over = {row["trial"] for row in ended} | {row["trial"] for row in board if row["status"] == "zero-shot"}
    under_way = [_progress(trial) for trial in sorted((folder / "trials").glob("*")) if trial.name not in over]
    running = [run for run in under_way if run.name != "0000"]
    to_come = max(0, wanted["trials"] - len(ended) - len(running))
    final = _final(folder, wanted, {float(row["images"] or 0) for row in ended} | {run.total for run in running})
    finished = (folder / "summary.json").exists()
    counts = Counter(row["status"] for row in ended) | Counter({"running": len(running), "to come": to_come})
    lines = [
        f"sweep {wanted['name']}, {wanted['trials']} trials: "
        + ", ".join(f"{counts[name]} {name}" for name in (*ENDED, "running", "to come") if counts[name]),
        _best(board, running),
    ]
    if not finished:
        lines += [_run_line(run) for run in running]
        lines += [str(final)] * bool(final.runs) + [_run_line(run) for run in final.running]
        lines.append(_outlook(ended, running, to_come, final))
    return "\n".join([*lines, f"finished: {folder / 'report.html'}"] if finished else lines)


@dataclass(frozen=True)
class _Final:
    """The runs behind the search: leading settings again, and the refit."""

    runs: list[Progress]
    again: int
    """of leading settings to come"""
    refits: int
    """to come: 0 or 1"""
    each: float
    """images of one"""

    @property
    def running(self) -> list[Progress]:
        """Those that are not over."""
        return [run for run in self.runs if not run.is_over]

    def __str__(self) -> str:
        counts = {"over": len(self.runs) - len(self.running), "running": len(self.running)}
        counts["to come"] = self.again + self.refits
        return "final runs: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _final(folder: Path, wanted: dict[str, Any], seen: set[float]) -> _Final:
    """What there is of them, and what a sweep file wants beside. `seen`: images of trials; the most are a budget."""
    asked = {"top": 0, "seeds": 3, "refit": False, **wanted.get("final", {})}
    runs = [_progress(run) for run in sorted((folder / "final").glob("*"))]
    refits = sum(run.name == "refit" for run in runs)
    again = min(asked["top"], wanted["trials"]) * asked["seeds"] - (len(runs) - refits)
    totals = {run.total for run in runs} | seen
    each = max((total for total in totals if total == total), default=math.nan)
    return _Final(runs, max(0, again) if not refits else 0, asked["refit"] - refits, each)


def table(folder: str | Path, rows: int) -> Table:
    """A sweep's trials: those that run, then the best of the others, as many as there is room for."""
    folder = Path(folder)
    table = Table(box=None, pad_edge=False, header_style="dim")
    if not (folder / "sweep.yaml").exists():
        return table
    searched = list(yaml.safe_load((folder / "sweep.yaml").read_text()).get("search") or {})
    board = _board(folder)
    over = {row["trial"] for row in board if row["status"] in (*ENDED, "zero-shot")}
    running = [trial for trial in sorted((folder / "trials").glob("*")) if trial.name not in over]
    running += [run for run in sorted((folder / "final").glob("*")) if not _progress(run).is_over]
    for title in ("trial", "", *(name.rpartition(".")[2] for name in searched), *COLUMNS):
        table.add_column(title, justify="left" if title in ("trial", "") else "right", no_wrap=True)
    for trial in running:
        table.add_row(trial.name, "running", *_settings(trial, searched), *_cells(_progress(trial)), style="bold")
    for row in [row for row in board if row["trial"] in over][: max(1, rows - len(running) - 3)]:
        settings = [_short(row.get(name) or "") for name in searched]
        scores = [f"{int(row['images'] or 0):,}", "", "", "", _short(row.get("val_mAP") or ""), ""]
        table.add_row(row["trial"], row["status"], *settings, *scores, style="red" if row["error"] else "")
    return table


COLUMNS = ("images", "of", "loss", "val mAP", "best", "left")


def _cells(run: Progress) -> list[str]:
    total = "" if run.total != run.total else f"{run.total:,.0f}"
    if not run.images:
        return ["", total, "", "", "", ""]
    scores = ("" if value != value else f"{value:.3f}" for value in (run.loss, run.val_mAP, run.best))
    return [f"{run.images:,}", total, *scores, _duration(run.left)]


def _settings(trial: Path, names: list[str]) -> list[str]:
    file = trial / EXPERIMENT
    found = schema.flatten(schema.load_experiment(file)) if file.exists() else {}
    return [_short(str(found.get(name, ""))) for name in names]


def _short(text: str) -> str:
    """A figure with three digits that count; other text as it is."""
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text


def _board(folder: Path) -> list[dict[str, str]]:
    file = folder / "leaderboard.csv"
    if not file.exists():
        return []
    with file.open() as opened:
        return list(csv.DictReader(opened))


def _best(board: list[dict[str, str]], running: list[Progress]) -> str:
    scores = {row["trial"]: float(row["val_mAP"]) for row in board if row.get("val_mAP")}
    scores |= {run.name: run.best for run in running if run.best > scores.get(run.name, 0.0)}
    if not scores:
        return "best so far: no report yet"
    name = max(scores, key=lambda trial: scores[trial])
    zero_shot = f" (zero-shot {scores['0000']:.4f})" if "0000" in scores else ""
    return f"best so far: val mAP {scores[name]:.4f}, trial {name}{zero_shot}"


def _run_line(run: Progress) -> str:
    name = f"trial {run.name}" if run.name.isdigit() else run.name
    if not run.images:
        return f"{name}: no report yet"
    scores = "" if run.val_mAP != run.val_mAP else f"val mAP {run.val_mAP:.4f} (best {run.best:.4f}), "
    ago = _duration(run.reported)
    return f"{name}: {run.images:,} of {run.total:,.0f} images, {scores}{run.rate:.0f} images/s, last report {ago} ago"


def _outlook(ended: list[dict[str, str]], running: list[Progress], to_come: int, final: _Final) -> str:
    """Speed, and the time left if trials to come see as many images as those that have ended."""
    now = [run for run in (*running, *final.running) if run.rate]
    rate = sum(run.rate for run in now)
    if not rate:
        return "time left: not known before a running trial's or final run's first report"
    seen = [float(row["images"]) for row in ended] or [run.total for run in running if run.total == run.total]
    images = to_come * sum(seen) / max(1, len(seen)) + sum(run.left * run.rate for run in now)
    seconds = (images + (final.again and final.again * final.each)) / rate
    seconds += (final.refits and final.refits * final.each) / (rate / len(now))  # by itself
    return f"{rate:.0f} images/s in all, about {_duration(seconds)} left if it runs"


def _progress(folder: Path) -> Progress:
    file = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    reports = [line for line in lines if "diverged" not in line]
    last: dict[str, Any] = reports[-1] if reports else {"images": 0, "val_mAP": 0.0, "best_val_mAP": 0.0}
    budget = schema.load_experiment(folder / EXPERIMENT).budget if (folder / EXPERIMENT).exists() else Budget()
    epoch = last["images"] / last["epoch"] if last.get("epoch") else math.nan
    total = budget.images or budget.epochs * epoch if (folder / EXPERIMENT).exists() else math.nan
    stopped = budget.patience and last.get("reports_since_best", 0) >= budget.patience
    return Progress(
        name=folder.name,
        images=last["images"],
        total=total,
        val_mAP=last.get("val_mAP", math.nan),  # a refit has none
        best=last.get("best_val_mAP", math.nan),
        rate=last.get("images_per_second", 0.0),
        reported=time.time() - file.stat().st_mtime if file.exists() else math.nan,
        loss=last.get("loss", math.nan),
        is_over=bool(len(reports) < len(lines) or stopped or last["images"] >= total),
    )


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
