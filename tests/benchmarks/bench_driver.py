"""The driver of a sweep of 1,000 trials on 100 nodes: the events a second that it can take, and those that come.

What comes: a trial a node, a report of each every minute, trials of half an hour. So 1.7 reports a second, and every
18 s a trial ends and the next begins.

What it can take is measured with Ray Tune's own controller and our searcher, scheduler, callback and leaderboard. The
trials have no processes: 100 at a time report from here, until 1,000 are there. What processes cost the driver is taken
from a real sweep of a few trials that do nothing, and added to each event. Its reports pass through the controller too
and are so counted twice. Not counted: that 100 processes answer one driver, and that they and the files are elsewhere.

Costs are the best of a few: what else the machine does is not ours.

Run: python tests/benchmarks/bench_driver.py [--trials 1000]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import psutil
import ray
import yaml
from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import SearchGenerator

from clipfh.cluster import connect, resources
from clipfh.cluster.resources import Resources
from clipfh.cluster.run_queue import RunQueue
from clipfh.config import sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.config.sweep_file import SweepFile
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep import searcher, tuner
from clipfh.sweep import trial as trial_module
from clipfh.sweep.leaderboard import Leaderboard

TRIALS, NODES = 1000, 100
REPORT_S, TRIAL_S = 60.0, 1800.0
REPORTS = int(TRIAL_S / REPORT_S)
"""of a trial"""
NEEDED = NODES / REPORT_S
"""reports a second"""
PROBES, ENDS, REAL_TRIALS = 7, 4, 8
IMAGES = 2_000_000
RESOURCES = Resources(1, 1.0, 0.0, 1)
SEARCH: dict[str, Any] = {
    "optimizer.lr": {"loguniform": [2e-6, 5e-5]},
    "optimizer.layer_decay": {"uniform": [0.6, 1.0]},
    "batch.items": {"choice": [32, 64, 128]},
    "batch.views": {"choice": [2, 4, 8]},
    "loss.supcon_temperature": {"loguniform": [0.03, 0.2]},
    "loss.triplet": {"loguniform": [0.1, 2.0], "or": 0.0},
    "loss.triplet_margin": {"uniform": [0.1, 0.4], "or": -1.0},
    "augment.crop_min": {"uniform": [0.16, 0.6]},
}


@dataclass(frozen=True)
class Costs:
    """Seconds of the driver."""

    asking: float
    """whether the folder is there, and room for another trial: what comes before each event"""
    suggestion: float
    report: float
    callback: float
    """our part of a report"""
    end: float
    """a trial's last report, and what follows"""
    board: float
    """the leaderboard's part of an end"""

    def __str__(self) -> str:
        ms = {name: f"{1000 * seconds:.2f}" for name, seconds in vars(self).items()}
        return (
            f"asking {ms['asking']}, suggestion {ms['suggestion']}, report {ms['report']} (our callback "
            f"{ms['callback']}), end {ms['end']} (leaderboard {ms['board']}) ms"
        )

    def capacity(self, report: float) -> float:
        """Reports a second that keep the driver busy, the suggestions and ends that go with them included.

        Args:
            report: seconds that a trial's process adds to each.
        """
        return 1 / (self.asking + self.report + report + (self.suggestion + self.end) / REPORTS)


def rows(count: int = TRIALS) -> list[dict]:
    """All measurements, as {name, value, target, ok}."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
    with tempfile.TemporaryDirectory() as made:
        connect.connect("local")
        try:
            *_, costs = _simulated(_sweep(Path(made) / "simulated", count), Path(made) / "simulated")
            begin, report = _real(Path(made) / "real")
            process = _best(_process, 3)
            polling = _polling(Path(made) / "polled")
        finally:
            connect.disconnect()
    can = costs.capacity(report)
    _note(f"needed: {NEEDED:.2f} reports/s, can take {can:.0f}")
    _note(
        f"a trial's process takes {process:.1f} s to begin, and {NODES}, one after the other, {NODES * process:.0f} s"
    )
    return [
        row(f"driver: events/s it can take, those of {count:,} trials on {NODES} nodes", can / NEEDED, at_least=10),
        row("driver: trials it can begin, those that end", TRIAL_S / NODES / begin, at_least=2),
        row(f"driver: seconds of a suggestion, {count:,} trials", costs.suggestion, at_most=1),
        row(f"head: cores that looking for reports takes, {NODES} trials", polling, at_most=1),
    ]


def row(name: str, value: float, at_least: float | None = None, at_most: float = 0.0) -> dict:
    ok = value <= at_most if at_least is None else value >= at_least
    return {"name": name, "value": round(value, 3), "target": at_most if at_least is None else at_least, "ok": bool(ok)}


def _note(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


def _sweep(out: Path, count: int, concurrent: int = NODES) -> SweepFile:
    """A sweep of so many trials, in a folder made for it."""
    tree = {
        "name": "driver",
        "base": {"model.name": SMALL_MODEL, "budget.images": IMAGES},
        "search": SEARCH,
        "trials": count,
        "placement": {"concurrent": concurrent},
    }
    out.mkdir()
    (out / "sweep.yaml").write_text(yaml.safe_dump(tree))
    return sweep_file.load(out / "sweep.yaml")


def _best(work: Callable[[], Any], times: int = PROBES) -> float:
    """Seconds of some work."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _line(number: int, value: float) -> dict[str, Any]:
    """What a trial tells Tune at its n-th report."""
    line = {"images": IMAGES * number // REPORTS, "val_mAP": value, "best_val_mAP": value, "loss": 1.0}
    return trial_module._result({**line, "images_per_second": 1000.0, "warnings": []}, number == REPORTS)


# --- Trials without processes ----------------------------------------------------------------------------------------


class Controller(TuneController):
    """Tune's own, whose trials run as soon as they are proposed, and report when they are told to."""

    def begin(self) -> None:
        """Ask for the next trial, as Tune does before each event."""
        self._maybe_update_trial_queue()
        self._maybe_add_actors()

    def report(self, trial: Any, number: int) -> None:
        """Take in a trial's n-th report."""
        value = random.Random(f"{trial.trial_id} {number}").random()
        usual = {"training_iteration": number, "time_total_s": REPORT_S * number, "pid": 1, "node_ip": "127.0.0.1"}
        self._on_training_result(trial, {**_line(number, value), **usual})
        self._callbacks.on_step_end(iteration=0, trials=self._trials)

    @property
    def running(self) -> list[Any]:
        """The trials that run, the oldest first."""
        return sorted(self._running_trials, key=tuner.read_number)

    def _schedule_trial_actor(self, trial: Any) -> None:
        trial.init_local_path()
        self._staged_trials.discard(trial)
        self._callbacks.on_trial_start(iteration=0, trials=self._trials, trial=trial)
        self._set_trial_status(trial_module, "RUNNING")
        self._mark_trial_to_checkpoint(trial)

    def _schedule_trial_train(self, trial: Any) -> None:
        """Nothing: `report` has what comes of it."""

    def _schedule_trial_export(self, trial: Any) -> None:
        """Nothing."""


def _room() -> int:
    """Trials that there is room for, by way of the cluster's nodes: this one, as often as there would be."""
    return min(NODES, resources._room([node["Resources"] for node in ray.nodes()] * NODES, RESOURCES))


def _simulated(sweep: SweepFile, out: Path) -> Iterator[Costs]:
    """Costs at 10, 100 and 1,000 trials."""
    watch = _watch(tuner.Watch, sweep, out, _room)
    controller = _controller(sweep, out, watch)
    for count in sorted({min(n, sweep.trials - ENDS) for n in (10, 100, sweep.trials)}):
        _pass(controller, count)
        costs = _costs(controller, watch)
        _note(f"{len(controller._trials)} trials: {costs}")
        yield costs


def _watch(kind: type[tuner.Watch], sweep: SweepFile, out: Path, room: Callable[[], int]) -> Any:
    study = searcher.open_study(sweep, out)
    zero_shot = {"trial": "0000", "status": "zero-shot", "val_mAP": "0.3", "images": 0, "seconds": 0}
    board = Leaderboard(Folder(out), sweep, study, [zero_shot])
    return kind(searcher.StudySearcher(sweep, study, room), board, lambda line: None)


def _controller(sweep: SweepFile, out: Path, watch: tuner.Watch) -> Controller:
    names = {"trial_name_creator": tuner.read_number, "trial_dirname_creator": tuner.read_number}
    experiment = Experiment("tune", Instant, num_samples=sweep.trials, storage_path=str(out), **names)  # type: ignore[arg-type]
    search = SearchGenerator(watch.searcher)
    search.add_configurations([experiment])
    scheduler = FIFOScheduler()
    return Controller(search_alg=search, scheduler=scheduler, callbacks=[watch], storage=experiment.storage)


def _pass(controller: Controller, count: int) -> None:
    """Let trials pass, their settings drawn at random, until so many are there."""
    usual, searcher._sampler = searcher._sampler, lambda sweep, place: optuna.samplers.RandomSampler(seed=place)
    while len(controller._trials) < count:
        controller.begin()
        controller.report(controller.running[-1], 1)
        if len(controller.running) == min(NODES, count // 2 + ENDS // 2):
            controller.report(controller.running[0], REPORTS)
    searcher._sampler = usual


def _costs(controller: Controller, watch: tuner.Watch) -> Costs:
    """Let some trials end and as many begin, and time it."""
    oldest, latest = iter(controller.running), controller.running[-1]
    end = _best(lambda: controller.report(next(oldest), REPORTS), ENDS)
    suggestion = _best(controller.begin, ENDS)
    for running in controller.running[-ENDS:]:
        controller.report(running, 1)
    return Costs(
        asking=_best(lambda: watch.on_step_begin(0, controller._trials)) + _best(_room),
        suggestion=suggestion,
        report=_best(lambda: controller.report(latest, 2)),
        callback=_best(lambda: watch.on_trial_result(0, controller._trials, latest, _line(2, 0.5))),
        end=end,
        board=_best(lambda: watch.board.write()),
    )


# --- Trials with processes -------------------------------------------------------------------------------------------


class Instant(tune.Trainable):
    """A trial that reports at once."""

    def setup(self, config: dict[str, Any], **_: object) -> None:
        """Wait for what a real one imports."""
        import clipfh.sweep.tuner  # noqa: F401

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial."""
        return True

    def step(self) -> dict[str, Any]:
        """The next report. With the first, the memory that is this process's alone."""
        number = self.iteration + 1
        memory = {} if number > 1 else {"memory": psutil.Process().memory_full_info().uss}
        return {**_line(number, 0.5), **memory}


class Clocked(tuner.Watch):
    """The sweep's callback, which notes when trials begin and report."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.began: list[float] = []
        self.reports: dict[str, list[float]] = defaultdict(list)
        self.memory: list[float] = []

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        super().on_trial_start(iteration, trials, trial, **info)
        self.began.append(time.perf_counter())

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        super().on_trial_result(iteration, trials, trial, result, **info)
        self.reports[trial.trial_id].append(time.perf_counter())
        self.memory.append(result.get("memory", 0.0))


def _real(out: Path) -> tuple[float, float]:
    """Seconds between two trials that begin, and between two reports of one, where trials do nothing; two at once.

    The first two wait for their processes, the others take these over.
    """
    sweep = _sweep(out, REAL_TRIALS, concurrent=2)
    watch = _watch(Clocked, sweep, out, lambda: 2)
    usual, tuner.Trial = tuner.Trial, Instant  # type: ignore[misc,assignment]
    try:
        tuner.run_trials(watch, None, RESOURCES)  # type: ignore[arg-type]
    finally:
        tuner.Trial = usual  # type: ignore[misc]
    assert watch.num_left == 0
    begin = median(later - earlier for earlier, later in pairwise(watch.began[1:]))
    report = min(median(later - earlier for earlier, later in pairwise(each)) for each in watch.reports.values())
    _note(
        f"{REAL_TRIALS} trials with processes: {begin:.2f} s from one that begins to the next, {1000 * report:.1f} ms "
        f"a report, {max(watch.memory) / 2**20:.0f} MiB a trial's own process on the head"
    )
    return begin, report


def _process() -> None:
    """Wait for the process of a trial."""
    actor: Any = ray.remote(num_cpus=0)(Instant).remote()
    ray.get(actor.__ray_ready__.remote())
    ray.kill(actor)


def _polling(out: Path) -> float:
    """Seconds a second that trials take on the head: each looks for reports ten times a second, for its turn once."""
    out.mkdir()
    keys = [f"loss_{number}" for number in range(20)]
    lines = [json.dumps({**_line(n, 0.5), "step": n, **dict.fromkeys(keys, 0.123456789)}) for n in range(REPORTS // 2)]
    (out / layout.REPORTS).write_text("\n".join(lines))
    for number in range(NODES):
        RunQueue().join(f"trial-{number}")
    read = _best(lambda: run_folder.read_metrics(out), 20)
    turn = _best(lambda: RunQueue().is_turn_of("trial-0", RESOURCES), 20)
    for number in range(NODES):
        RunQueue().leave(f"trial-{number}")
    _note(f"a look for reports {1000 * read:.2f} ms, for its turn {1000 * turn:.2f} ms")
    return NODES * (10 * read + turn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS, help="until the costs are taken")
    for each in rows(parser.parse_args().trials):
        print(f"{each['name']:75} {each['value']:8} (target {each['target']}) {'ok' if each['ok'] else 'MISSED'}")
