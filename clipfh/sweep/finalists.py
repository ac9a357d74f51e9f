"""After the search: its leading settings again with other seeds, and the winner on train and validation together."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from statistics import mean
from typing import Any

from clipfh import mendable
from clipfh.cluster import ray_private
from clipfh.cluster.resources import Resources, autoscaler_request
from clipfh.cluster.run_queue import RunQueue
from clipfh.config import schema
from clipfh.config.experiment import Experiment
from clipfh.config.sweep_file import SweepFile
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep.run_thread import last_line
from clipfh.train import driver
from clipfh.train.run_inputs import Inputs, ModelKey, model_key

RETRIES = 3


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

    A run that `folder` has already goes on, or is left alone where it is over.
    """
    numbers = range(1, sweep.final.seeds + 1)
    seeded = {
        (trial, number): dataclasses.replace(experiment, seed=experiment.seed + number)
        for trial, experiment in leading.items()
        for number in numbers
    }
    jobs = {run_path(folder, *key): experiment for key, experiment in seeded.items()}
    _train_all(jobs, sweep, inputs, resources, log)
    return {trial: [score(run_path(folder, trial, number)) for number in numbers] for trial in leading}


def run_path(folder: Folder, trial: str, number: int) -> Folder:
    """The folder in which a trial's settings are trained for the n-th time again."""
    return folder / f"{trial}-again-{number}"


def score(run: Folder) -> float:
    """A run's best validation mAP; the worst there is where it diverged."""
    return float(run_folder.read_metrics(run)[-1]["best_val_mAP"])


def read_divergence(run: Folder) -> str:
    """Why a run ended before its time; empty where it did not. Its last checkpoint is of a model half trained."""
    return str(run_folder.read_metrics(run)[-1].get("diverged", ""))


def best_trial(scores: Mapping[str, Sequence[float]]) -> str:
    """The trial with the highest mean."""
    return max(scores, key=lambda trial: mean(scores[trial]))


def best_run(folder: Folder, trial: str, scores: Sequence[float]) -> Folder:
    """The folder of the best of a trial's runs."""
    return run_path(folder, trial, 1 + max(range(len(scores)), key=lambda number: scores[number]))


def refit(
    experiment: Experiment,
    sweep: SweepFile,
    inputs: Mapping[ModelKey, Inputs],
    folder: Folder,
    resources: Resources,
    log: Callable[[str], None],
) -> Folder:
    """Train on inputs that hold the validation items too, to the end of the budget; returns the run's folder."""
    whole = dataclasses.replace(experiment, budget=dataclasses.replace(experiment.budget, patience=0))
    out = folder / "refit"
    _train_all({out: whole}, sweep, inputs, resources, log)
    return out


def _train_all(
    jobs: Mapping[Folder, Experiment],
    sweep: SweepFile,
    inputs: Mapping[ModelKey, Inputs],
    resources: Resources,
    log: Callable[[str], None],
) -> None:
    """Train each experiment in its folder, as many at a time as trials run; an autoscaler is asked for their room."""
    over = threading.Event()
    pool = ThreadPoolExecutor(len(jobs) if sweep.placement.concurrent == "auto" else sweep.placement.concurrent)
    running = {
        pool.submit(_train, experiment, inputs[model_key(experiment.model)], out, resources, over): out
        for out, experiment in jobs.items()
    }
    try:
        with autoscaler_request(sweep.placement, resources) as ask:
            ask(len(jobs))
            for number, run in enumerate(as_completed(running), 1):
                log(_outcome(running[run], run))
                run.result()
                ask(len(jobs) - number)
    finally:  # also on Ctrl-C: the threads wait for runs, or for their turn, which end here
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for out in jobs:
            ray_private.release(out.address)


def _outcome(out: Folder, run: Future[None]) -> str:
    """What a run came to, for a person."""
    if error := run.exception():
        return f"{out.name} failed: {mendable(error) or last_line(str(error))}"
    if reason := read_divergence(out):
        return f"{out.name}: diverged: {reason}"
    last = run_folder.read_metrics(out)[-1]
    return f"{out.name}: val mAP {last['best_val_mAP']:.3f}" if "best_val_mAP" in last else f"{out.name} is done"


def _train(experiment: Experiment, inputs: Inputs, out: Folder, resources: Resources, over: threading.Event) -> None:
    """Train when it is this run's turn, as trials do: more runs at once than a cluster holds could all stand still."""
    lines = run_folder.read_metrics(out)
    is_saved = lines and ("diverged" in lines[-1] or run_folder.latest_step(out) >= lines[-1]["step"])
    if is_saved and driver.is_over(experiment, inputs, lines[-1]):
        return
    ray_private.release(out.address)  # what an attempt that was killed may have left
    run_folder.wait_for(out.parent.parent / layout.SWEEP)
    out.make()
    out.write(layout.EXPERIMENT, schema.to_json(experiment))
    queue = RunQueue()
    queue.join(out.address)
    try:
        while not queue.is_turn_of(out.address, resources):
            if over.wait(1):
                return
        driver.run_training(experiment, inputs, out, resources, retries=RETRIES)
    finally:
        queue.leave(out.address)
