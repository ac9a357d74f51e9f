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

from clipfh import (
    UserError,
    batches,
    checkpoint,
    cluster,
    config,
    evaluate,
    export,
    files,
    final,
    keep,
    model,
    report,
    results,
    runs,
    stream,
    train,
)
from clipfh.catalogue import Catalogue
from clipfh.decoding import fetch
from clipfh.inputs import Inputs
from clipfh.space import Sweep, resolved
from clipfh.trials import ZERO_SHOT, Leaderboard, Watch, search


@dataclass(frozen=True)
class _Begun:
    """What the parts of a sweep share."""

    sweep: Sweep
    catalogue: Catalogue
    out: Path
    base: config.Experiment
    """of which the model, its weights and the prompts are those of all trials"""
    clip: nn.Module
    """before any tuning"""
    texts: dict[str, str]
    """item to prompt, of the items that are not trained on"""
    resources: cluster.Resources
    tell: Callable[[str], None]


@dataclass(frozen=True)
class _Winner:
    """What the search and what follows it came to."""

    trial: str
    val_mAP: float
    """of the trial, or the mean of its settings trained again"""
    run: Path | None
    """whose weights are taken; None for zero-shot"""
    again: dict[str, list[float]]
    """trial to validation mAPs of its settings with other seeds"""


def run(
    sweep: Sweep,
    catalogue: Catalogue,
    out: str | Path,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    tell: Callable[[str], None] = print,
    each_report: bool = True,
) -> dict[str, Any]:
    """Run a sweep to its end on the connected cluster; returns what `summary.json` holds.

    Args:
        sweep: what to do.
        catalogue: to train, select and test on.
        out: the sweep's folder.
        resume: go on with what the folder holds.
        retry_failed: train its failed trials again too.
        tell: takes a line for a person.
        each_report: tell of each report of each trial.

    Raises:
        UserError: a folder that holds another sweep, or nothing to resume; an empty split.
    """
    out, started = Path(out).absolute(), time.monotonic()
    catalogue.require("train", "val_query", "val_gallery", "query", "gallery")
    _begin(sweep, out, resume)
    base = sweep.experiment(sweep.first)
    resources = cluster.place(sweep.placement, alone=False, tell=tell)
    tell(f"{sweep.trials} trials, {cluster.at_once(sweep.placement, resources)} at once, each {resources}")
    texts = train.prompts_of(catalogue, base, *train.VALIDATION, "query", "gallery")
    begun = _Begun(sweep, catalogue, out, base, train.start_of(base), texts, resources, tell)
    zero_shot = _zero_shot(begun)
    inputs = _inputs(begun, zero_shot)
    board = Leaderboard(out / "leaderboard.csv", list(sweep.search), zero_shot)
    keeper = keep.Keeper(sweep, out)
    with cluster.asking(sweep.placement, resources) as ask:
        watch = Watch(board, tell, sweep.trials, each_report, keeper.trials, ask)
        rows = board.write(search(sweep, inputs, out, resources, watch, resume, retry_failed))
    keeper.trials(rows)
    winner = _winner(begun, inputs, rows)
    about = {"resources": dataclasses.asdict(resources), "notes": train.notes_on(inputs, base.loss)}
    summary = _finish(begun, winner, rows, {**about, "seconds": round(time.monotonic() - started, 1)})
    keeper.trials(rows)  # again: a trial that was just ended may have written a checkpoint meanwhile
    keeper.finals(winner.run)
    tell(str(keeper))
    return summary


def _begin(sweep: Sweep, out: Path, resume: bool) -> None:
    file = out / runs.SWEEP
    if resume and not file.exists():
        raise UserError(f"--resume: {out} holds no sweep; leave --resume out to start one")
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: --resume goes on with its sweep, or name another folder")
    if resume and file.read_text() != resolved(sweep):
        raise UserError(f"--resume: the sweep file differs from {file}: resume with the same, or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    files.write(file, resolved(sweep))


def _zero_shot(begun: _Begun) -> float:
    """Validation mAP of the model before any tuning; kept, so that a resumed sweep does not ask again."""
    folder = begun.out / "trials" / ZERO_SHOT
    if not (folder / "metrics.json").exists():
        embedded = _embedded(begun, "val", begun.clip)
        evaluate.write(folder, evaluate.figures(embedded, 0), embedded)
    found = float(json.loads((folder / "metrics.json").read_text())["mAP"])
    begun.tell(f"trial {ZERO_SHOT}, the zero-shot model: val mAP {found:.3f}")
    return found


def _inputs(begun: _Begun, zero_shot: float) -> Inputs:
    """What all trials read.

    Raises:
        UserError: the largest P that may be drawn is more than the items that some losses of the space leave.
    """
    corners = begun.sweep.corners("batch.items")
    widest = max(corners, key=lambda point: begun.sweep.experiment(point).batch.items)
    inputs = train.inputs_of(
        begun.catalogue, begun.sweep.experiment(widest), begun.clip, stream, begun.sweep.placement.keep_gib
    )
    fewest = begun.sweep.experiment({**widest, **begun.sweep.off})  # without the terms that take single photos
    batches.plan_of(fetch(inputs.images.index), fewest.batch, fewest.seed, fewest.loss.takes_singles)
    for note in train.notes_on(inputs, begun.base.loss):
        begun.tell(note)
    return dataclasses.replace(inputs, start_val_mAP=zero_shot)


def _winner(begun: _Begun, inputs: Inputs, rows: list[dict[str, Any]]) -> _Winner:
    """Choose by validation mAP alone; train the leading settings again, and the winner on all items, where asked."""
    asked, out, folder = begun.sweep.final, begun.out, begun.out / "final"
    trial, score = str(rows[0]["trial"]), float(rows[0]["val_mAP"])
    run, again = out / "trials" / trial, dict[str, list[float]]()
    if leading := final.leaders(rows, out, asked.top):
        begun.tell(f"now trials {', '.join(leading)} again, each with {asked.seeds} other seeds")
        again = final.again(leading, begun.sweep, inputs, folder, begun.resources, begun.tell)
        trial = final.best(again)
        score, run = mean(again[trial]), final.best_run(folder, trial, again[trial])
        if score <= zero_shot_of(rows):
            trial, score = ZERO_SHOT, zero_shot_of(rows)
    if trial == ZERO_SHOT:
        return _Winner(trial, score, None, again)
    if asked.refit:
        begun.tell(f"now trial {trial}'s settings on train and validation items together")
        experiment = config.load(out / "trials" / trial / runs.EXPERIMENT)
        whole = train.inputs_of(begun.catalogue, experiment, begun.clip, stream, with_validation=True)
        run = final.refit(experiment, begun.sweep, whole, folder, begun.resources, begun.tell)
    return _Winner(trial, score, run, again)


def zero_shot_of(rows: list[dict[str, Any]]) -> float:
    """Validation mAP of the zero-shot model on a leaderboard."""
    return next(float(row["val_mAP"]) for row in rows if row["trial"] == ZERO_SHOT)


def _finish(begun: _Begun, winner: _Winner, rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """The winner and the zero-shot model on the test split, the export, the summary, the report."""
    begun.tell(f"winner: trial {winner.trial}, val mAP {winner.val_mAP:.3f}; now the test split")
    experiment, best, out = begun.base, begun.clip, begun.out
    if winner.run:
        weights = checkpoint.load(winner.run)
        assert weights.experiment is not None
        experiment, best = weights.experiment, model.with_weights(weights.experiment.model, weights.state, weights.path)
    tested = {key: _tested(begun, key, each) for key, each in (("zero_shot", begun.clip), ("test", best))}
    shutil.rmtree(out / "best", ignore_errors=True)
    known = {**tested, "catalogue": export.account(begun.catalogue)}
    refit = bool(winner.run and begun.sweep.final.refit)
    export.export(best, experiment, out / "best", {**known, "refit": refit}, export.photos_of(begun.catalogue))
    summary = {
        "name": begun.sweep.name,
        "best_trial": winner.trial,
        "val_mAP": winner.val_mAP,
        "zero_shot_val_mAP": zero_shot_of(rows),
        "final": {"again": winner.again, "refit": refit},
        **known,
        "trials": len(rows) - 1,
        "failed": sum(row["status"] == "failed" for row in rows),
        "took": _took(rows, out),
        "experiment": config.flat(experiment),
        "searched": list(begun.sweep.search),
        **about,
    }
    files.write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report.write([out], None)
    return summary


def _took(rows: list[dict[str, Any]], out: Path) -> dict[str, dict[str, float]]:
    """Images seen and seconds, added up, of the trials and of the runs after them."""
    again = results.final_runs(out).values()
    counts = {
        "trials": [(row["images"], row["seconds"]) for row in rows],
        "final": list(again),
    }
    return {
        name: {"images": sum(images for images, _ in each), "seconds": round(sum(seconds for _, seconds in each), 1)}
        for name, each in counts.items()
    }


def _embedded(begun: _Begun, split: str, clip: nn.Module) -> evaluate.Embedded:
    splits = evaluate.splits_of(split)
    return cluster.through_losses(
        lambda: evaluate.embed_splits(begun.catalogue, splits, clip, begun.base.model, begun.texts)
    )


def _tested(begun: _Begun, key: str, clip: nn.Module) -> dict[str, Any]:
    """Figures of a model on the test split; also written."""
    embedded = _embedded(begun, "test", clip)
    found = evaluate.figures(embedded, 10)
    evaluate.write(begun.out / "test" / {"zero_shot": "zero-shot", "test": "winner"}[key], found, embedded)
    return found


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
