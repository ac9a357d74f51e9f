"""A sweep from its file to its summary, and an estimate of what a sweep takes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfh import UserError
from clipfh.cluster import connect
from clipfh.cluster.connect import connected
from clipfh.cluster.resources import max_concurrent_runs, resolve_placement
from clipfh.config import sweep_file
from clipfh.config.sweep_file import SweepFile
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.model.devices import gpus_here
from clipfh.retrieval.evaluate import get_splits
from clipfh.storage import layout
from clipfh.storage.output import all_or_nothing
from clipfh.storage.store import Folder
from clipfh.sweep import estimate, race
from clipfh.sweep import sweep as sweep_module
from clipfh.train import track as tracking


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has come to its end. `str` of it is what the command prints."""

    out: Folder
    summary: dict[str, Any]
    """what `summary.json` holds"""

    @property
    def best(self) -> Folder:
        """Folder of the winner's export."""
        return self.out / layout.BEST

    def __str__(self) -> str:
        return sweep_module.outcome(self.summary, self.out)


def sweep(
    file: str | Path,
    catalogue: Catalogue | str | Path,
    out: str | Path | Folder,
    *,
    trials: int | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    track: str | None = None,
    settings: Mapping[str, Any] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    log: Callable[[str], None] = print,
    each_report: bool = True,
) -> SweepResult:
    """Search settings with Ray Tune and Optuna, and export the best model, as `clipfh sweep` does.

    Args:
        file: the sweep file (YAML).
        catalogue: its path, or the opened catalogue.
        out: folder of the sweep.
        trials: number of trials, in place of the file's.
        resume: go on with the sweep in `out`.
        retry_failed: with `resume`, train the failed trials again too.
        track: "mlflow" or "wandb", to send the reports there too.
        settings: dotted settings, in place of the file's `base`.
        address: Ray cluster to compute on.
        dashboard: serve Ray's dashboard, where a cluster is started.
        log: takes each line for a person.
        each_report: log each report of each trial.

    Raises:
        UserError: the file, a setting, the catalogue or the folder does not fit.
    """
    if retry_failed and not resume:
        raise UserError("--retry-failed trains failed trials of a sweep that is there: it goes with --resume")
    sweep = _load(file, settings, trials)
    catalogue, out = open_catalogue(catalogue), Folder(out)
    tracking.require(track)
    # Trials that all failed before a report are on the leaderboard alone, and may be tried again
    results = f"{layout.TRIALS}/*/{layout.METRICS}", layout.LEADERBOARD
    with all_or_nothing(out, *results), connected(address, sweep.placement, dashboard):
        log(f"Ray's logs: {connect.logs()}")
        with tracking.following(track, out):
            how = {"resume": resume, "retry_failed": retry_failed}
            return SweepResult(out, sweep_module.run(sweep, catalogue, out, **how, log=log, each_report=each_report))


def estimate_sweep(
    file: str | Path,
    catalogue: Catalogue | str | Path,
    *,
    trials: int | None = None,
    settings: Mapping[str, Any] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Log what `sweep` would do with the same arguments and what it would take, as `clipfh sweep --dry-run` does.

    Raises:
        UserError: the file, a setting or the catalogue does not fit.
    """
    sweep, catalogue = _load(file, settings, trials), open_catalogue(catalogue)
    log(sweep_file.to_yaml(sweep))
    several = len(sweep.contenders) > 1
    if several:
        log(_race_ahead(sweep, catalogue))
    on_a_cluster = bool(address or os.environ.get("RAY_ADDRESS"))
    with connected(address, sweep.placement, dashboard) if on_a_cluster else contextlib.nullcontext():
        for label in sweep.contenders:
            one = dataclasses.replace(sweep.only([label]), trials=sweep.trials)
            cost, at_once = (
                _measure_on_a_worker(one, catalogue) if on_a_cluster else (_measure_here(one, catalogue, several), 1)
            )
            if several:
                log(f"\n{label}, if all trials were of it:")
            log(estimate.describe(one, cost, estimate.epoch(catalogue, sweep.start(label)), at_once))


def _race_ahead(sweep: SweepFile, catalogue: Catalogue) -> str:
    """What comes before the search of several models, for a person."""
    images, number = sum(map(catalogue.num_images, get_splits("val"))), len(sweep.contenders)
    which = f"the best {sweep.race.keep} go" if sweep.race.keep else "all of them go"
    return f"{number} models are measured zero-shot on {images:,} validation images; {which} into the search"


def _load(file: str | Path, settings: Mapping[str, Any] | None, trials: int | None) -> SweepFile:
    """Read and check a sweep file, also against what open_clip has."""
    sweep = sweep_file.load(file, settings, trials)
    race.require_models(sweep)
    return sweep


def _measure_here(one: SweepFile, catalogue: Catalogue, in_a_process: bool) -> estimate.StepCost:
    """What steps take on this machine. Peaks of memory only grow, so each of several models has its own process."""
    gpus = one.placement.gpus_per_worker
    arguments = 0, gpus_here() if gpus == "auto" else gpus, one.placement.workers
    if not in_a_process:
        return estimate.measure(catalogue, one.experiment(one.first), *arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(estimate.measure, catalogue, one.experiment(one.first), *arguments).result()


def _measure_on_a_worker(sweep: SweepFile, catalogue: Catalogue) -> tuple[estimate.StepCost, int]:
    """What steps take on a worker of the connected cluster, and how many trials run there at once."""
    import ray

    resources = resolve_placement(sweep.placement, alone=False)
    once = ray.remote(max_calls=1)(estimate.measure)  # another process for another model: peaks of memory only grow
    task: Any = once.options(num_cpus=resources.cpus, num_gpus=resources.gpus)
    arguments = resources.threads, resources.gpus, resources.workers
    cost = ray.get(task.remote(catalogue, sweep.experiment(sweep.first), *arguments))
    return cost, max_concurrent_runs(sweep.placement, resources)
