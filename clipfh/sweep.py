"""A sweep: zero-shot as trial 0, Optuna and ASHA over `fit`, the winner on the test split, its export and report."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch
from torch import nn

from clipfh import UserError, batches, checkpoint, cluster, config, evaluate, export, model, report, train
from clipfh.catalogue import Catalogue
from clipfh.space import Sweep, resolved

ZERO_SHOT = "0000"
OBJECTIVE = "best_val_mAP"
RETRIES = 2

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep; Tune would call it complete
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what a kill of the driver may cost of the search's state


# --- Trials ----------------------------------------------------------------------------------------------------------


class Trial(tune.Trainable):
    """One trial as Tune sees it: `fit` in a thread of its own, a result for each report in the run's metrics."""

    def setup(
        self,
        config: dict[str, Any],
        sweep: Sweep | None = None,
        inputs: train.Inputs | None = None,
        out: str = "",
        resources: cluster.Resources | None = None,
    ) -> None:
        """Start training, or go on from the trial's own checkpoint."""
        assert sweep is not None and inputs is not None and resources is not None
        cluster.end(self.trial_id)  # what an attempt that was killed may have left
        self.experiment = sweep.experiment(config)
        self.folder = Path(out) / "trials" / self.trial_name
        _clear_of_another(self.folder, self.experiment)
        self.total = batches.budget_of(self.experiment, inputs.num_images).total
        self.resources = resources
        self.reported, self.looked = 0, time.monotonic()
        self.error: Exception | None = None
        cluster.queue(self.trial_id)
        self.thread = threading.Thread(target=self._fit, args=(inputs,), daemon=True)
        self.thread.start()

    def _fit(self, inputs: train.Inputs) -> None:
        try:
            while not self._trained(inputs):
                pass
        except Exception as error:  # told to Tune by the step that waits for us
            self.error = error

    def _trained(self, inputs: train.Inputs) -> bool:
        """Train when it is our turn; False where the cluster has become too small meanwhile, so that we gave way."""
        while not self._is_our_turn():
            time.sleep(1)
        try:
            train.fit(self.experiment, inputs, self.folder, self.resources, name=self.trial_id)
        except Exception:
            if self._is_our_turn():
                raise
            return False
        return True

    def _is_our_turn(self) -> bool:
        return cluster.is_turn_of(self.trial_id, self.resources)

    def step(self) -> dict[str, Any]:
        """The next report; waits for it."""
        while True:
            running = self.thread.is_alive()
            if not running and self.error:
                raise self.error
            lines = train.read_metrics(self.folder)
            new = next((line for line in lines if line["step"] > self.reported and self._is_saved(line)), None)
            if new and not (running and self._is_last(new)):
                self.reported = new["step"]
                return _result(new, self._is_last(new))
            if not running:
                return _result(lines[-1], True)
            self._give_way()
            self.thread.join(0.1)

    def _give_way(self) -> None:
        """Stop training, for now, where the cluster no longer holds us. Looks once a second."""
        if time.monotonic() > self.looked + 1:
            self.looked = time.monotonic()
            if not self._is_our_turn():
                cluster.end(self.trial_id)

    def _is_saved(self, line: dict[str, Any]) -> bool:
        """Whether the report's checkpoint is on the list: a score without its weights must not win."""
        return "diverged" in line or line["step"] <= checkpoint.latest_step(self.folder)

    def _is_last(self, line: dict[str, Any]) -> bool:
        return "diverged" in line or line["step"] >= self.total

    def cleanup(self) -> None:
        """Called by Tune when the trial ends, also where the scheduler stops it in mid-training."""
        cluster.leave(self.trial_id)
        cluster.end(self.trial_id)


def _clear_of_another(folder: Path, experiment: config.Experiment) -> None:
    """Make the trial's folder. One of this number may have begun, with other settings, just before a kill."""
    file = folder / checkpoint.EXPERIMENT
    if file.exists() and file.read_text() != config.to_json(experiment):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(config.to_json(experiment))


class Searcher(OptunaSearch):
    """OptunaSearch that tells Optuna of ended trials only.

    No pruner listens to reports; and after a kill Optuna's journal may be ahead of Tune, which then reports anew.
    """

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Nothing."""


class Limiter(ConcurrencyLimiter):
    """As many trials at once as the cluster holds when the next is to be drawn."""

    def __init__(self, searcher: Searcher, placement: config.Placement, resources: cluster.Resources) -> None:
        super().__init__(searcher, cluster.at_once(placement, resources))
        self.placement, self.resources = placement, resources

    def suggest(self, trial_id: str) -> dict | None:
        """The next trial's settings; None where there is no room for it now."""
        self.max_concurrent = cluster.at_once(self.placement, self.resources)
        return super().suggest(trial_id)


def number_of(trial: Any) -> str:
    """'0001' for the first trial, also after a resume; 0000 is the zero-shot model."""
    return f"{int(trial.experiment_tag.split('_')[0]):04d}"


def _result(line: dict[str, Any], done: bool) -> dict[str, Any]:
    shown = ("images", "val_mAP", OBJECTIVE, "loss", "images_per_second", "diverged", "warnings")
    kept = {name: line[name] for name in shown if name in line}
    return {**kept, "done": done, "finished": done}


class Watch(tune.Callback):
    """Keep the leaderboard up to date, tell how it goes, and free what ended trials leave."""

    def __init__(self, board: Leaderboard, tell: Callable[[str], None], count: int) -> None:
        self.board, self.tell, self.count = board, tell, count
        self.ended: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        shown = ", ".join(
            f"{name} {_short(value)}" for name, value in trial.config.items() if name in self.board.searched
        )
        self.tell(f"trial {number_of(trial)} starts: {shown}")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        best = max(result[OBJECTIVE], *((t.last_result or {}).get(OBJECTIVE, 0.0) for t in trials))
        self.tell(
            f"trial {number_of(trial)}: {result['images']:,} images, val mAP {result['val_mAP']:.3f}, "
            f"best so far {max(best, self.board.zero_shot):.3f}"
        )
        for warning in result.get("warnings", []):
            self.tell(f"trial {number_of(trial)}: warning: {warning}")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.tell(f"trial {number_of(trial)} failed and starts again: {_last_line(trial)}")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trials, trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trials, trial)

    def _ended(self, trials: list, trial: Any) -> None:
        cluster.leave(trial.trial_id)
        cluster.end(trial.trial_id)
        self.ended.add(trial.trial_id)
        row = next(row for row in self.board.write(trials, self.ended) if row["trial"] == number_of(trial))
        self.tell(f"trial {row['trial']} {row['status']} ({len(self.ended)} of {self.count} trials over)")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Leaderboard:
    """`leaderboard.csv`: zero-shot and every trial, best first."""

    file: Path
    searched: list[str]
    zero_shot: float
    """validation mAP"""

    def row(self, trial: Any, over: bool) -> dict[str, Any]:
        """A trial's line. Tune says that a trial is over before it changes the trial's status."""
        last = trial.last_result or {}
        found = {"val_mAP": f"{last[OBJECTIVE]:.6f}"} if last.get(OBJECTIVE) is not None else {}
        return {
            "trial": number_of(trial),
            "status": _status(trial.status, last, over),
            **found,
            "images": last.get("images", 0),
            "seconds": round(last.get("time_total_s", 0.0), 1),
            **{name: trial.config[name] for name in self.searched if name in trial.config},
            "error": _why(trial, last),
        }

    def write(self, trials: Sequence[Any], over: Container[str] = ()) -> list[dict[str, Any]]:
        """Write the file anew and return its rows. `over`: ids of trials that have ended."""
        first = {
            "trial": ZERO_SHOT,
            "status": "zero-shot",
            "val_mAP": f"{self.zero_shot:.6f}",
            "images": 0,
            "seconds": 0,
        }
        rows = [first, *(self.row(trial, trial.trial_id in over) for trial in trials)]
        rows.sort(key=lambda row: float(row.get("val_mAP", -1)), reverse=True)
        text = io.StringIO()
        columns = ["rank", "trial", "status", "val_mAP", "images", "seconds", *self.searched, "error"]
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"rank": i, **row} for i, row in enumerate(rows, 1))
        whole = self.file.with_suffix(".new")
        whole.write_text(text.getvalue())
        whole.rename(self.file)
        return rows


def _status(tunes: str, last: Mapping[str, Any], over: bool) -> str:
    if tunes == "ERROR":
        return "failed"
    if tunes != "TERMINATED" and not over:
        return "running"
    return "diverged" if "diverged" in last else "done" if last.get("finished") else "stopped"


def _why(trial: Any, last: Mapping[str, Any]) -> str:
    if "diverged" in last:
        return str(last["diverged"])
    if trial.status != "ERROR":
        return ""
    return _last_line(trial)


def _last_line(trial: Any) -> str:
    """What a trial failed of."""
    lines = [line for line in str(trial.get_error() or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "unknown"


# --- The whole -------------------------------------------------------------------------------------------------------


def run(
    sweep: Sweep, catalogue: Catalogue, out: str | Path, *, resume: bool = False, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run a sweep to its end on the connected cluster; returns what `summary.json` holds.

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
    with cluster.room(sweep.placement, resources):
        trials = _search(sweep, inputs, out, resources, Watch(board, tell, sweep.trials), resume)
    rows = board.write(trials)
    return _finish(sweep, catalogue, clip, base, texts, out, rows, time.monotonic() - started, tell)


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


def _search(
    sweep: Sweep,
    inputs: train.Inputs,
    out: Path,
    resources: cluster.Resources,
    watch: Watch,
    resume: bool,
) -> list[Any]:
    """Run the trials; returns them as Tune has them."""
    trainable = tune.with_resources(
        tune.with_parameters(Trial, sweep=sweep, inputs=inputs, out=str(out), resources=resources),
        {cluster.HEAD: 0.001},
    )
    run_config = tune.RunConfig(
        name="tune",
        storage_path=str(out),
        callbacks=[watch],
        verbose=0,
        failure_config=tune.FailureConfig(max_failures=RETRIES),
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep their own
    )
    if resume and list((out / "tune").glob("experiment_state-*.json")):
        tuner = tune.Tuner.restore(str(out / "tune"), trainable, resume_unfinished=True, resume_errored=True)
        assert tuner._local_tuner is not None
        # Tune keeps neither of these
        tuner._local_tuner._run_config.callbacks = [watch]
        tuner._local_tuner._tune_config.scheduler = _scheduler_as_left(sweep, out)
    else:
        shutil.rmtree(out / "tune", ignore_errors=True)
        (out / "study.journal").unlink(missing_ok=True)
        tune_config = tune.TuneConfig(
            search_alg=Limiter(_searcher(sweep, out), sweep.placement, resources),
            scheduler=_scheduler(sweep),
            num_samples=sweep.trials,
            trial_name_creator=number_of,
            trial_dirname_creator=number_of,
        )
        tuner = tune.Tuner(trainable, tune_config=tune_config, run_config=run_config)
    return list(tuner.fit()._experiment_analysis.trials)


def _searcher(sweep: Sweep, out: Path) -> Searcher:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter(
        "ignore", optuna.exceptions.ExperimentalWarning
    )  # of `group`, which conditional settings need
    journal = JournalFileBackend(str(out / "study.journal"))
    points = [
        {k: v for n, value in p.items() for k, v in sweep.search[n].point(n, value).items()} for p in sweep.points
    ]
    return Searcher(
        functools.partial(_sampled, sweep),
        metric=OBJECTIVE,
        mode="max",
        points_to_evaluate=points,
        sampler=optuna.samplers.TPESampler(multivariate=True, group=True, seed=sweep.seed, n_startup_trials=8),
        study_name=sweep.name,
        storage=optuna.storages.JournalStorage(journal),
    )


def _sampled(sweep: Sweep, trial: optuna.Trial) -> dict[str, Any]:
    """Optuna's view of the space, by its define-by-run interface."""
    return sweep.sampled(trial)


def _scheduler(sweep: Sweep) -> TrialScheduler:
    if not sweep.halving.first_rung:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="images",
        metric=OBJECTIVE,
        mode="max",
        grace_period=sweep.halving.first_rung,
        reduction_factor=sweep.halving.reduction,
        max_t=10**12,  # trials end by their own budget
    )


def _scheduler_as_left(sweep: Sweep, out: Path) -> TrialScheduler:
    """The scheduler with its rungs as the trials' own metrics have them."""
    scheduler = _scheduler(sweep)
    if isinstance(scheduler, AsyncHyperBandScheduler):
        for trial in tune.ExperimentAnalysis(str(out / "tune")).trials or []:
            lines = train.read_metrics(out / "trials" / number_of(trial))
            for milestone, recorded in scheduler._brackets[0]._rungs:
                reached = next((line[OBJECTIVE] for line in lines if line["images"] >= milestone), None)
                if reached is not None:
                    recorded[trial.trial_id] = reached
    return scheduler


def _finish(
    sweep: Sweep,
    catalogue: Catalogue,
    clip: nn.Module,
    base: config.Experiment,
    texts: dict[str, str],
    out: Path,
    rows: list[dict[str, Any]],
    seconds: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The winner and the zero-shot model on the test split, the export, the summary, the report."""
    winner = rows[0]["trial"]
    tell(f"winner: trial {winner}, val mAP {float(rows[0]['val_mAP']):.3f}; now the test split")
    experiment, best = base, clip
    if winner != ZERO_SHOT:
        weights = checkpoint.load(out / "trials" / winner)
        assert weights.experiment is not None
        experiment, best = weights.experiment, model.with_weights(weights.experiment.model, weights.state, weights.path)
    tested = {}
    for name, each in (("zero_shot", clip), ("test", best)):
        embedded = evaluate.embed(catalogue, evaluate.splits_of("test"), each, base.model, texts)
        tested[name] = evaluate.figures(embedded, 10)
        evaluate.write(out / "test" / ("zero-shot" if name == "zero_shot" else "winner"), tested[name], embedded)
    shutil.rmtree(out / "best", ignore_errors=True)
    export.export(best, experiment, out / "best", tested)
    summary = {
        "name": sweep.name,
        "best_trial": winner,
        "val_mAP": float(rows[0]["val_mAP"]),
        "zero_shot_val_mAP": next(float(r["val_mAP"]) for r in rows if r["trial"] == ZERO_SHOT),
        **tested,
        "trials": len(rows) - 1,
        "failed": sum(row["status"] == "failed" for row in rows),
        "seconds": round(seconds, 1),
        "experiment": config.flat(experiment),
        "searched": list(sweep.search),
        "catalogue": {"path": str(catalogue.path), **{k: catalogue.manifest[k] for k in ("hash", "counts")}},
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
