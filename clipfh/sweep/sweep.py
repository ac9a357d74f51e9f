"""A sweep: zero-shot as trial 0, the search, the leading settings again, the winner on the test split, its export."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from clipfh import UserError
from clipfh.cluster.interruptions import repeat_interrupted
from clipfh.cluster.resources import Resources, autoscaler_request, max_concurrent_runs, resolve_placement
from clipfh.config import schema, sweep_file
from clipfh.config.experiment import Experiment
from clipfh.config.sweep_file import SweepFile
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import fetch
from clipfh.data.sampler import make_sampler
from clipfh.model import checkpoint, export
from clipfh.model.architecture import weights_name
from clipfh.model.checkpoint import notes_on_model
from clipfh.model.clip import architecture_of, load_tokenizer
from clipfh.model.prompts import load_prompts_for
from clipfh.report import artifacts, page
from clipfh.retrieval import evaluate, metrics
from clipfh.storage import layout, store
from clipfh.storage.store import Folder
from clipfh.sweep import finalists, retention
from clipfh.sweep.leaderboard import ZERO_SHOT, Leaderboard, Row
from clipfh.sweep.searcher import StudySearcher, open_study
from clipfh.sweep.tuner import Watch, run_trials
from clipfh.train import provenance, stream
from clipfh.train.inputs import VALIDATION, load_start, notes_on_singles, prepare_inputs
from clipfh.train.run_inputs import Inputs


@dataclass(frozen=True)
class _Context:
    """What the parts of a sweep share."""

    sweep: SweepFile
    catalogue: Catalogue
    out: Path
    base: Experiment
    """of which the model, its weights and the prompts are those of all trials"""
    clip: nn.Module
    """before any tuning"""
    texts: dict[str, str]
    """item to prompt, of the items that are not trained on"""
    resources: Resources
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
    refit: bool = False
    """whether the run is the one on train and validation items together"""
    diverged: str = ""
    """why the refit's model is not taken"""


def run(
    sweep: SweepFile,
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
        UserError: a folder that holds another sweep, one of an older version, or nothing to resume; an empty split.
    """
    out, started = Path(out).absolute(), time.monotonic()
    catalogue.require("train", "val_query", "val_gallery", "query", "gallery")
    base = sweep.experiment(sweep.first)
    _begin(sweep, out, resume)
    _require_same(catalogue, base, out, tell)
    study = open_study(sweep, out, retry_failed)
    resources = resolve_placement(sweep.placement, alone=False, log=tell)
    tell(f"{sweep.trials} trials, {max_concurrent_runs(sweep.placement, resources)} at once, each {resources}")
    clip = load_start(base)
    for note in notes_on_model(clip, base.model, weights_name(base.model), catalogue):
        tell(note)
    texts = load_prompts_for(catalogue, base, load_tokenizer(architecture_of(clip)), *VALIDATION, "query", "gallery")
    context = _Context(sweep, catalogue, out, base, clip, texts, resources, tell)
    zero_shot = _zero_shot(context)
    inputs = _inputs(context, zero_shot)
    board, keeper = Leaderboard(out, sweep, study, zero_shot), retention.Keeper(sweep, out)
    searcher = StudySearcher(sweep, study, functools.partial(max_concurrent_runs, sweep.placement, resources))
    with autoscaler_request(sweep.placement, resources) as ask:
        run_trials(Watch(searcher, board, tell, each_report, keeper.trials, ask), inputs, resources)
    rows = board.write()
    keeper.trials(rows)
    winner = _winner(context, inputs, rows)
    about = {"resources": dataclasses.asdict(resources), "notes": notes_on_singles(inputs, base.loss)}
    summary = _finish(context, winner, rows, {**about, "seconds": round(time.monotonic() - started, 1)})
    keeper.trials(rows)  # again: a trial that was just ended may have written a checkpoint meanwhile
    keeper.finals(winner.run)
    tell(str(keeper))
    return summary


def _begin(sweep: SweepFile, out: Path, resume: bool) -> None:
    file = out / layout.SWEEP
    if resume and not file.exists():
        raise UserError(f"--resume: {out} holds no sweep; leave --resume out to start one")
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: --resume goes on with its sweep, or name another folder")
    if resume and (change := _change(file.read_text(), sweep_file.to_yaml(sweep))):
        raise UserError(
            f"--resume: the sweep file differs from {file} ({change}): resume with the same, or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    store.write(file, sweep_file.to_yaml(sweep))


def _change(before: str, now: str) -> str:
    """The first line of each that the other has not; empty for the same texts."""
    texts = before.splitlines(), now.splitlines()
    first = [next((line.strip() for line in a if line not in b), "nothing") for a, b in (texts, texts[::-1])]
    return "" if before == now else f"{first[0]} there, {first[1]} here"


def _require_same(catalogue: Catalogue, base: Experiment, out: Path, tell: Callable[[str], None]) -> None:
    """Keep beside the sweep what it is made of; where that is kept already, see that it still is the same.

    Raises:
        UserError: another catalogue, or a file that has changed.
    """
    file, resumed = out / layout.SWEEP_INPUTS, (out / layout.TRIALS).exists()
    contents = provenance.contents(base, None)
    now = {"catalogue": str(catalogue.path), "hash": catalogue.manifest["hash"], "contents": contents}
    before = json.loads(file.read_text()) if file.exists() else now
    if resumed and not file.exists():
        tell(
            f"note: {out} was begun by an older version: whether catalogue and prompts are still the same is not known"
        )
    if before["hash"] != now["hash"]:
        raise UserError(
            f"--resume: {out} was begun on another catalogue than {catalogue.path}, "
            f"{before['catalogue']} as it was then: give that one, or name another --out"
        )
    provenance.require_same(before["contents"], contents, out)
    store.write(file, json.dumps(before, indent=2) + "\n")


def _zero_shot(context: _Context) -> float:
    """Validation mAP of the model before any tuning; kept, so that a resumed sweep does not ask again."""
    folder = context.out / layout.TRIALS / ZERO_SHOT
    if not (folder / layout.METRICS).exists():
        embedded = _embedded(context, "val", context.clip)
        measured, scores = evaluate.judge(embedded, 0)
        evaluate.write(folder, measured, embedded, scores)
    val_mAP = float(json.loads((folder / layout.METRICS).read_text())["mAP"])
    context.tell(f"trial {ZERO_SHOT}, the zero-shot model: val mAP {val_mAP:.3f}")
    return val_mAP


def _inputs(context: _Context, zero_shot: float) -> Inputs:
    """What all trials read.

    Raises:
        UserError: the largest P that may be drawn is more than the items that some losses of the space leave.
    """
    corners = context.sweep.corners("batch.items")
    widest = max(corners, key=lambda point: context.sweep.experiment(point).batch.items)
    shared = context.sweep.experiment({**widest, **context.sweep.texted})
    inputs = prepare_inputs(context.catalogue, shared, context.clip, stream, context.sweep.placement.keep_gib)
    fewest = context.sweep.experiment({**widest, **context.sweep.paired})
    make_sampler(fetch(inputs.images.index), fewest.batch, fewest.seed, fewest.loss.takes_singles)
    for note in notes_on_singles(inputs, context.base.loss):
        context.tell(note)
    return dataclasses.replace(inputs, start_val_mAP=None if inputs.weights is None else zero_shot)


def _winner(context: _Context, inputs: Inputs, rows: list[Row]) -> _Winner:
    """Choose by validation mAP alone; train the leading settings again, and the winner on all items, where asked."""
    asked, out, folder = context.sweep.final, context.out, context.out / layout.FINAL
    trial, score = str(rows[0]["trial"]), float(rows[0]["val_mAP"])
    run, again = out / layout.TRIALS / trial, dict[str, list[float]]()
    if leading := finalists.leaders(rows, out, asked.top):
        context.tell(f"now trials {', '.join(leading)} again, each with {asked.seeds} other seeds")
        again = finalists.retrain(leading, context.sweep, inputs, folder, context.resources, context.tell)
        trial = finalists.best_trial(again)
        score, run = mean(again[trial]), finalists.best_run(folder, trial, again[trial])
        if score <= read_zero_shot(rows):
            trial, score = ZERO_SHOT, read_zero_shot(rows)
    if trial == ZERO_SHOT:
        return _Winner(trial, score, None, again)
    if asked.refit:
        context.tell(f"now trial {trial}'s settings on train and validation items together")
        experiment = schema.load_experiment(out / layout.TRIALS / trial / layout.EXPERIMENT)
        whole = prepare_inputs(context.catalogue, experiment, context.clip, stream, with_validation=True)
        whole_run = finalists.refit(experiment, context.sweep, whole, folder, context.resources, context.tell)
        if not (diverged := finalists.read_divergence(whole_run)):
            return _Winner(trial, score, whole_run, again, refit=True)
        context.tell(f"that diverged ({diverged}): the winner is {run.parent.name}/{run.name}, of train items alone")
        return _Winner(trial, score, run, again, diverged=diverged)
    return _Winner(trial, score, run, again)


def read_zero_shot(rows: list[Row]) -> float:
    """Validation mAP of the zero-shot model on a leaderboard."""
    return next(float(row["val_mAP"]) for row in rows if row["trial"] == ZERO_SHOT)


def _finish(context: _Context, winner: _Winner, rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    """The winner and the zero-shot model on the test split, the export, the summary, the report."""
    context.tell(f"winner: trial {winner.trial}, val mAP {winner.val_mAP:.3f}; now the test split")
    experiment, best, out = context.base, context.clip, context.out
    if winner.run:
        weights = checkpoint.load(winner.run)
        assert weights.experiment is not None
        experiment, best = weights.experiment, checkpoint.build(weights, weights.experiment.model)
    (before, old), (after, new) = _tested(context, "zero_shot", context.clip), _tested(context, "test", best)
    shutil.rmtree(out / layout.BEST, ignore_errors=True)
    evidence = {"zero_shot": before, "test": after, "catalogue": artifacts.catalogue_account(context.catalogue)}
    photos = export.sample_photos(context.catalogue)
    export.write_export(best, experiment, out / layout.BEST, {**evidence, "refit": winner.refit}, photos)
    summary = {
        "name": context.sweep.name,
        "best_trial": winner.trial,
        "val_mAP": winner.val_mAP,
        "zero_shot_val_mAP": read_zero_shot(rows),
        "final": {"again": winner.again, "refit": winner.refit, "refit_diverged": winner.diverged},
        **evidence,
        "gain": metrics.gain(old, new),
        "trials": len(rows) - 1,
        "failed": sum(row["status"] == "failed" for row in rows),
        "took": _took(rows, out),
        "experiment": schema.flatten(experiment),
        "searched": list(context.sweep.search),
        **about,
    }
    store.write(out / layout.SUMMARY, json.dumps(summary, indent=2) + "\n")
    page.write([out], None)
    return summary


def _took(rows: list[Row], out: Path) -> dict[str, dict[str, float]]:
    """Images seen and seconds, added up, of the trials and of the runs after them."""
    again = [run.spent for run in artifacts.final_runs(Folder(out))]
    counts = {
        "trials": [(row["images"], row["seconds"]) for row in rows],
        "final": again,
    }
    return {
        name: {"images": sum(images for images, _ in each), "seconds": round(sum(seconds for _, seconds in each), 1)}
        for name, each in counts.items()
    }


def _embedded(context: _Context, split: str, clip: nn.Module) -> evaluate.Embedded:
    splits, exact = (
        evaluate.splits_of(split),
        dataclasses.replace(context.base.model, precision="float32"),
    )  # as exported
    return repeat_interrupted(lambda: evaluate.embed_splits(context.catalogue, splits, clip, exact, context.texts))


def _tested(context: _Context, key: str, clip: nn.Module) -> tuple[dict[str, Any], metrics.Scores]:
    """Figures of a model on the test split, and what each query scored; also written."""
    embedded = _embedded(context, "test", clip)
    measured, scores = evaluate.judge(embedded, 10)
    evaluate.write(
        context.out / layout.TEST / {"zero_shot": "zero-shot", "test": "winner"}[key], measured, embedded, scores
    )
    return measured, scores


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
        f"{out}/{layout.LEADERBOARD}"
    )
    lines.append(f"export      {out}/{layout.BEST}")
    lines.append(f"report      {out}/{layout.REPORT}")
    return "\n".join(lines)


def _interval(figures: dict[str, Any], key: str) -> str:
    low, high = figures["intervals"][key]
    return f"{low:.3f}, {high:.3f}"
