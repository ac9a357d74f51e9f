"""After the search: its leading settings again with other seeds, and the winner on train and validation together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from clipfh import cluster, config, files, fit, runs
from clipfh.inputs import Inputs
from clipfh.space import Final

RETRIES = 3


def leaders(rows: Sequence[Mapping[str, Any]], out: Path, top: int) -> dict[str, config.Experiment]:
    """The first `top` trials of a leaderboard with settings of their own, and these settings."""
    found: dict[str, config.Experiment] = {}
    for row in rows:
        file = out / "trials" / str(row["trial"]) / runs.EXPERIMENT
        if row["status"] in ("done", "stopped") and row.get("val_mAP") and len(found) < top:
            experiment = config.load(file)
            if experiment not in found.values():
                found[str(row["trial"])] = experiment
    return found


def again(
    leading: Mapping[str, config.Experiment],
    final: Final,
    inputs: Inputs,
    folder: Path,
    resources: cluster.Resources,
    at_once: int,
    tell: Callable[[str], None],
) -> dict[str, list[float]]:
    """Train leading settings with several seeds; returns each trial's validation mAPs, seed by seed.

    Runs that `folder` has already are gone on with, or left alone when they are over.
    """
    seeded = {
        (trial, number): dataclasses.replace(experiment, seed=experiment.seed + number)
        for trial, experiment in leading.items()
        for number in range(1, final.seeds + 1)
    }
    jobs = {run_of(folder, *key): experiment for key, experiment in seeded.items()}

    def told(out: Path) -> None:
        tell(f"{out.name}: val mAP {score(out):.3f}")

    _train_all(jobs, inputs, resources, at_once, told)
    return {trial: [score(run_of(folder, trial, number)) for number in range(1, final.seeds + 1)] for trial in leading}


def run_of(folder: Path, trial: str, number: int) -> Path:
    """Where a trial's settings are trained for the n-th time again."""
    return folder / f"{trial}-again-{number}"


def score(run: Path) -> float:
    """A run's best validation mAP."""
    return float(runs.read_metrics(run)[-1]["best_val_mAP"])


def best(scores: Mapping[str, Sequence[float]]) -> str:
    """The trial with the highest mean."""
    return max(scores, key=lambda trial: mean(scores[trial]))


def best_run(folder: Path, trial: str, scores: Sequence[float]) -> Path:
    """The best of a trial's runs."""
    return run_of(folder, trial, 1 + max(range(len(scores)), key=lambda number: scores[number]))


def refit(experiment: config.Experiment, inputs: Inputs, folder: Path, resources: cluster.Resources) -> Path:
    """Train on inputs that hold the validation items too, to the end of the budget; returns the run's folder."""
    whole = dataclasses.replace(experiment, budget=dataclasses.replace(experiment.budget, patience=0))
    out = folder / "refit"
    _train_all({out: whole}, inputs, resources, 1, lambda run: None)
    return out


def _train_all(
    jobs: Mapping[Path, config.Experiment],
    inputs: Inputs,
    resources: cluster.Resources,
    at_once: int,
    told: Callable[[Path], None],
) -> None:
    """Train each of the experiments in its folder, some at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(_train, experiment, inputs, out, resources): out for out, experiment in jobs.items()}
        try:
            for run in as_completed(running):
                run.result()
                told(running[run])
        except BaseException:  # Ctrl-C among them: the threads wait for runs, which end here
            pool.shutdown(wait=False, cancel_futures=True)
            for out in jobs:
                cluster.end(str(out))
            raise


def _train(experiment: config.Experiment, inputs: Inputs, out: Path, resources: cluster.Resources) -> None:
    lines = runs.read_metrics(out)
    if lines and fit.is_over(experiment, inputs, lines[-1]) and runs.latest_step(out) >= lines[-1]["step"]:
        return
    cluster.end(str(out))  # what an attempt that was killed may have left
    runs.wait_for(out.parents[1] / runs.SWEEP)
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / runs.EXPERIMENT, config.to_json(experiment))
    fit.fit(experiment, inputs, out, resources, name=str(out), retries=RETRIES)
