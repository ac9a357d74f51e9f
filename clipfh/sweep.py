"""A sweep: zero-shot as trial 0, the search, the leading settings again, the winner on the test split, its export."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from clipfh import UserError, checkpoint, cluster, config, evaluate, export, final, model, report, train
from clipfh.catalogue import Catalogue
from clipfh.space import Sweep, resolved
from clipfh.trials import ZERO_SHOT, Leaderboard, Watch, search


def run(
    sweep: Sweep,
    catalogue: Catalogue,
    out: str | Path,
    *,
    resume: bool = False,
    tell: Callable[[str], None] = print,
    each_report: bool = True,
) -> dict[str, Any]:
    """Run a sweep to its end on the connected cluster; returns what `summary.json` holds.

    Args:
        sweep: what to do.
        catalogue: to train, select and test on.
        out: the sweep's folder.
        resume: go on with what the folder holds.
        tell: takes a line for a person.
        each_report: tell of each report of each trial.

    Raises:
        UserError: a folder that holds another sweep, or nothing to resume; an empty split.
    """
    out, started = Path(out).absolute(), time.monotonic()
    catalogue.require("train", "val_query", "val_gallery", "query", "gallery")
    _begin(sweep, out, resume)
    base = sweep.experiment(sweep.first)
    resources = cluster.place(sweep.placement, alone=False)
    tell(f"{sweep.trials} trials, {cluster.at_once(sweep.placement, resources)} at once, each {resources}")
    clip = train.start_of(base)
    texts = train.prompts_of(catalogue, base, "val_query", "val_gallery", "query", "gallery")
    zero_shot = _zero_shot(catalogue, clip, base, texts, out / "trials" / ZERO_SHOT)
    tell(f"trial {ZERO_SHOT}, the zero-shot model: val mAP {zero_shot:.3f}")
    board = Leaderboard(out / "leaderboard.csv", list(sweep.search), zero_shot)
    widest = max((sweep.experiment(each) for each in sweep.corners("batch.items")), key=lambda e: e.batch.items)
    inputs = train.inputs_of(catalogue, widest, clip)  # raises where the largest P is more than the items
    inputs = dataclasses.replace(inputs, start_val_mAP=zero_shot)
    for note in train.notes_on(inputs):
        tell(note)
    trials = search(sweep, inputs, out, resources, Watch(board, tell, sweep.trials, each_report), resume)
    rows = board.write(trials)
    about = {"resources": dataclasses.asdict(resources), "notes": train.notes_on(inputs)}
    winner = _winner(sweep, catalogue, clip, inputs, out, rows, resources, tell)
    return _finish(sweep, catalogue, clip, base, texts, out, rows, winner, about, time.monotonic() - started, tell)


@dataclass(frozen=True)
class Winner:
    """What the search and what follows it came to."""

    trial: str
    val_mAP: float
    """of the trial, or the mean of its settings trained again"""
    run: Path | None
    """whose weights are taken; None for zero-shot"""
    again: dict[str, list[float]]
    """trial to validation mAPs of its settings with other seeds"""


def _winner(
    sweep: Sweep,
    catalogue: Catalogue,
    clip: nn.Module,
    inputs: train.Inputs,
    out: Path,
    rows: list[dict[str, Any]],
    resources: cluster.Resources,
    tell: Callable[[str], None],
) -> Winner:
    """Choose by validation mAP alone; train the leading settings again, and the winner with all items, where asked."""
    trial, score = rows[0]["trial"], float(rows[0]["val_mAP"])
    run, again = out / "trials" / trial, dict[str, list[float]]()
    leading = final.leaders(rows, out, sweep.final.top)
    if leading:
        tell(f"now trials {', '.join(leading)} again, each with {sweep.final.seeds} other seeds")
        at_once = cluster.at_once(sweep.placement, resources)
        again = final.again(leading, sweep.final, inputs, out / "final", resources, at_once, tell)
        trial = final.best(again)
        score, run = mean(again[trial]), final.best_run(out / "final", trial, again[trial])
        if score <= float(zero_shot_of(rows)["val_mAP"]):
            trial, score = ZERO_SHOT, float(zero_shot_of(rows)["val_mAP"])
    if trial == ZERO_SHOT:
        return Winner(trial, score, None, again)
    if sweep.final.refit:
        tell(f"now trial {trial}'s settings on train and validation items together")
        experiment = config.load(out / "trials" / trial / checkpoint.EXPERIMENT)
        whole = train.inputs_of(catalogue, experiment, clip, with_validation=True)
        run = final.refit(experiment, whole, out / "final", resources)
    return Winner(trial, score, run, again)


def zero_shot_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The zero-shot model's row of a leaderboard."""
    return next(row for row in rows if row["trial"] == ZERO_SHOT)


def _begin(sweep: Sweep, out: Path, resume: bool) -> None:
    file = out / "sweep.yaml"
    if resume and not file.exists():
        raise UserError(f"--resume: {out} holds no sweep; leave --resume out to start one")
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: --resume goes on with its sweep, or name another folder")
    if resume and file.read_text() != resolved(sweep):
        raise UserError(f"--resume: the sweep file differs from {file}: resume with the same, or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(resolved(sweep))


def _zero_shot(
    catalogue: Catalogue, clip: nn.Module, experiment: config.Experiment, texts: dict[str, str], folder: Path
) -> float:
    """Validation mAP of the model before any tuning; kept, so that a resumed sweep does not ask again."""
    if not (folder / "metrics.json").exists():
        embedded = evaluate.embed(catalogue, evaluate.splits_of("val"), clip, experiment.model, texts)
        evaluate.write(folder, evaluate.figures(embedded, 0), embedded)
    return float(json.loads((folder / "metrics.json").read_text())["mAP"])


def _finish(
    sweep: Sweep,
    catalogue: Catalogue,
    clip: nn.Module,
    base: config.Experiment,
    texts: dict[str, str],
    out: Path,
    rows: list[dict[str, Any]],
    winner: Winner,
    about: dict[str, Any],
    seconds: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The winner and the zero-shot model on the test split, the export, the summary, the report."""
    tell(f"winner: trial {winner.trial}, val mAP {winner.val_mAP:.3f}; now the test split")
    experiment, best = base, clip
    if winner.run:
        weights = checkpoint.load(winner.run)
        assert weights.experiment is not None
        experiment, best = weights.experiment, model.with_weights(weights.experiment.model, weights.state, weights.path)
    tested = {}
    for name, each in (("zero_shot", clip), ("test", best)):
        embedded = evaluate.embed(catalogue, evaluate.splits_of("test"), each, base.model, texts)
        tested[name] = evaluate.figures(embedded, 10)
        evaluate.write(out / "test" / ("zero-shot" if name == "zero_shot" else "winner"), tested[name], embedded)
    shutil.rmtree(out / "best", ignore_errors=True)
    known = {**tested, "catalogue": export.account(catalogue)}
    export.export(best, experiment, out / "best", known, export.photos_of(catalogue))
    summary = {
        "name": sweep.name,
        "best_trial": winner.trial,
        "val_mAP": winner.val_mAP,
        "zero_shot_val_mAP": float(zero_shot_of(rows)["val_mAP"]),
        "final": {"again": winner.again, "refit": bool(winner.run and winner.run.name == "refit")},
        **tested,
        "trials": len(rows) - 1,
        "failed": sum(row["status"] == "failed" for row in rows),
        "seconds": round(seconds, 1),
        "experiment": config.flat(experiment),
        "searched": list(sweep.search),
        "catalogue": known["catalogue"],
        **about,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.write([out], None)
    return summary


def outcome(summary: dict[str, Any], out: str | Path) -> str:
    """What a sweep came to, for a person."""
    lines = [f"{'':12}{'mAP':>22}{'Rank-1':>22}   (test split, 95% interval)"]
    for label, key in (("zero-shot", "zero_shot"), ("winner", "test")):
        cells = [f"{summary[key][k]:.3f} [{_interval(summary[key], k)}]" for k in ("mAP", "rank1")]
        lines.append(f"{label:12}{cells[0]:>22}{cells[1]:>22}")
    if summary["best_trial"] == ZERO_SHOT:
        lines.append("Tuning made nothing better: the zero-shot model is the winner.")
    lines.append(
        f"trials      {summary['trials']} ({summary['failed']} failed), winner {summary['best_trial']}: "
        f"{out}/leaderboard.csv"
    )
    lines.append(f"export      {out}/best")
    lines.append(f"report      {out}/report.html")
    return "\n".join(lines)


def _interval(figures: dict[str, Any], key: str) -> str:
    low, high = figures["intervals"][key]
    return f"{low:.3f}, {high:.3f}"
