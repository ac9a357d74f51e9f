"""After the search: its leading settings again with other seeds, and the winner on train and validation together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from clipfh import UserError, fixable
from clipfh.cluster import ray_private
from clipfh.cluster.resources import Resources, autoscaler_request, share_cores
from clipfh.cluster.run_queue import RunQueue
from clipfh.config import schema
from clipfh.config.experiment import Experiment
from clipfh.config.sweep_file import SweepFile
from clipfh.model.architecture import weights_name
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep.run_thread import RunThread, last_line
from clipfh.train import driver
from clipfh.train.run_inputs import Inputs, ModelKey, model_key

RETRIES = 3
REFIT = "refit"
"""Name of the folder of the run on train and validation items; with several runs, what their names begin with."""

SOUP_TRIALS = 5
"""Leading trials whose weights may go into a soup."""


def may_have_soup(sweep: SweepFile) -> bool:
    """Whether a soup is asked for, and a model begins with weights that it can be made from."""
    return sweep.final.soup == "greedy" and any(weights_name(sweep.start(each).model) for each in sweep.contenders)


def num_leaders(sweep: SweepFile) -> int:
    """Number of leading trials that may be used after the search."""
    return max(1, sweep.final.top, SOUP_TRIALS if may_have_soup(sweep) else 0)


def leaders(rows: Sequence[Mapping[str, Any]], out: Folder, top: int) -> dict[str, Experiment]:
    """The first `top` trials of a leaderboard, equal settings counted once, and their experiments."""
    leading: dict[str, Experiment] = {}
    for row in rows:
        file = out / layout.TRIALS / str(row["trial"]) / layout.EXPERIMENT
        if row["status"] in ("done", "stopped") and row.get("val_mAP") and len(leading) < top:
            experiment = schema.load_experiment(file)
            if experiment not in leading.values():
                leading[str(row["trial"])] = experiment
    return leading


def retrain(
    leading: Mapping[str, Experiment],
    sweep: SweepFile,
    inputs: Mapping[ModelKey, Inputs],
    folder: Folder,
    resources: Resources,
    log: Callable[[str], None],
) -> dict[str, list[float]]:
    """Train leading settings with several seeds each; returns each trial's validation mAPs, seed by seed.

    A run that can't be trained counts as the worst possible, as one that diverged. A run that `folder` has already goes
    on, or is left alone where it is over.
    """
    numbers = range(1, sweep.final.seeds + 1)
    seeded = {
        (trial, number): dataclasses.replace(experiment, seed=experiment.seed + number)
        for trial, experiment in leading.items()
        for number in numbers
    }
    jobs = {run_path(folder, *key): experiment for key, experiment in seeded.items()}
    errors = _train_all(jobs, sweep, inputs, resources, log)
    runs = {trial: [run_path(folder, trial, number) for number in numbers] for trial in leading}
    return {trial: [0.0 if run in errors else score(run) for run in each] for trial, each in runs.items()}


def run_path(folder: Folder, trial: str, number: int) -> Folder:
    """The folder of the n-th run that trains a trial's settings again."""
    return folder / f"{trial}-again-{number}"


def score(run: Folder) -> float:
    """A run's best validation mAP; the worst possible where it diverged, or has no report."""
    lines = run_folder.read_metrics(run)
    return float(lines[-1]["best_val_mAP"]) if lines else 0.0


def read_divergence(run: Folder) -> str:
    """Why a run ended before its time, with a half-trained model as its last checkpoint; empty for other runs."""
    return str(run_folder.read_metrics(run)[-1].get("diverged", ""))


def best_trial(scores: Mapping[str, Sequence[float]]) -> str:
    """The trial with the highest mean."""
    return max(scores, key=lambda trial: mean(scores[trial]))


def best_run(folder: Folder, trial: str, scores: Sequence[float]) -> Folder:
    """The folder of the best of a trial's runs."""
    return run_path(folder, trial, 1 + max(range(len(scores)), key=lambda number: scores[number]))


def as_selected(run: Folder) -> Experiment:
    """The experiment of a run, with whitening only where validation took it: a refit has no validation to ask.

    A run that was stopped before the end of its budget did not ask.
    """
    experiment, lines = schema.load_experiment(run / layout.EXPERIMENT), run_folder.read_metrics(run)[-1:]
    is_taken = any(line.get("val_mAP_whitened", 0.0) > line.get("val_mAP_not_whitened", 1.0) for line in lines)
    return experiment if is_taken else schema.replace(experiment, {"optimizer.whitening": 0.0})


def refit(
    experiments: Sequence[Experiment],
    sweep: SweepFile,
    inputs: Mapping[ModelKey, Inputs],
    folder: Folder,
    resources: Resources,
    log: Callable[[str], None],
) -> tuple[list[Folder], str]:
    """Train on inputs that hold the validation items too, to the end of the budget.

    Returns:
        Each run's folder, and why one of them has no model to take; empty where all have.
    """
    jobs = {
        folder / (f"{REFIT}-{number}" if number > 1 else REFIT): dataclasses.replace(
            experiment, budget=dataclasses.replace(experiment.budget, patience=0)
        )
        for number, experiment in enumerate(experiments, 1)
    }
    errors = _train_all(jobs, sweep, inputs, resources, log)
    reasons = [errors.get(run) or read_divergence(run) for run in jobs]
    return list(jobs), next(filter(None, reasons), "")


def _train_all(
    jobs: Mapping[Folder, Experiment],
    sweep: SweepFile,
    inputs: Mapping[ModelKey, Inputs],
    resources: Resources,
    log: Callable[[str], None],
) -> dict[Folder, str]:
    """Train each experiment in its folder, as many at a time as trials run; an autoscaler is asked for their room.

    Returns:
        Why a run can't be trained, of those that can't. They are tried again when the sweep is resumed.
    """
    resources = share_cores(resources, sweep.placement)
    most = len(jobs) if sweep.placement.concurrent == "auto" else sweep.placement.concurrent
    waiting: list[RunThread] = []
    running: list[RunThread] = []
    errors: dict[Folder, str] = {}
    for out, experiment in jobs.items():
        of_run = inputs[model_key(experiment.model)]
        if _is_over(experiment, of_run, out):
            log(_outcome(out))
        else:
            waiting.append(_make_thread(experiment, of_run, out, resources))
    try:
        with autoscaler_request(sweep.placement, resources) as ask:
            ask(len(waiting))
            while waiting or running:
                while waiting and len(running) < most:
                    running.append(waiting.pop(0))
                    running[-1].start()
                for thread in [each for each in running if not each.is_alive()]:
                    log(_outcome(Folder(thread.run), thread.error))
                    if isinstance(thread.error, UserError):
                        errors[Folder(thread.run)] = str(thread.error)
                    elif thread.error:
                        raise thread.error
                    thread.release()
                    running.remove(thread)
                    ask(len(waiting) + len(running))
                for thread in running:
                    _look_after(thread, log)
                for thread in running[:1]:
                    thread.wait(RunThread.POLL_S)
    finally:  # also on Ctrl-C: threads wait for runs, or for their turn, which end here
        for thread in running:
            thread.release()
        for thread in running:
            thread.join()
    return errors


def _make_thread(experiment: Experiment, inputs: Inputs, out: Folder, resources: Resources) -> RunThread:
    """A thread that trains a run when it is its turn, as trials do: too many runs at once could all stand still."""
    run_folder.wait_for(out.parent.parent / layout.SWEEP)
    driver.open_folder(experiment, out)
    train = functools.partial(driver.run_training, experiment, inputs, out, resources, retries=RETRIES)
    latest_step = functools.partial(run_folder.latest_step, out)
    return RunThread(out.address, resources, RunQueue(), train, latest_step, ray_private.release)


def _look_after(thread: RunThread, log: Callable[[str], None]) -> None:
    """Stop a run for now where the cluster has no room for it, and tell of its interruptions."""
    thread.give_way()
    for line in thread.take_interruptions():
        log(f"{Folder(thread.run).name}: {line}")


def _is_over(experiment: Experiment, inputs: Inputs, out: Folder) -> bool:
    """Whether a run has come to its end, with its last checkpoint on the list.

    A refit is named by its place among the refits: its folder may hold the run of another winner.
    """
    if driver.holds_another(experiment, out):
        return False
    lines = run_folder.read_metrics(out)
    is_saved = lines and ("diverged" in lines[-1] or run_folder.latest_step(out) >= lines[-1]["step"])
    return bool(is_saved and driver.is_over(experiment, inputs, lines[-1]))


def _outcome(out: Folder, error: Exception | None = None) -> str:
    """How a run ended, for a person."""
    if error:
        return f"{out.name} failed: {fixable(error) or last_line(str(error))}"
    if reason := read_divergence(out):
        return f"{out.name}: diverged: {reason}"
    last = run_folder.read_metrics(out)[-1]
    return f"{out.name}: val mAP {last['best_val_mAP']:.3f}" if "best_val_mAP" in last else f"{out.name} is done"
