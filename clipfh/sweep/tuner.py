"""The trials of a sweep under Ray Tune: started as there is room, stopped early, watched."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from clipfh.cluster import ray_private
from clipfh.cluster.resources import Resources
from clipfh.cluster.run_queue import RunQueue
from clipfh.storage import layout, run_folder
from clipfh.sweep.leaderboard import Leaderboard, Row
from clipfh.sweep.run_thread import last_line
from clipfh.sweep.searcher import StudySearcher, own_trials
from clipfh.sweep.trial import OBJECTIVE, Trial
from clipfh.train.run_inputs import Inputs, ModelKey

RETRIES = 2

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep; Tune would call it complete
# Nobody reads what Tune writes: its own state, and each trial's results once more
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


class Watch(tune.Callback):
    """Enters ended trials in the study and the leaderboard, logs progress, and frees what ended trials leave."""

    def __init__(
        self,
        searcher: StudySearcher,
        board: Leaderboard,
        log: Callable[[str], None],
        each_report: bool = True,
        free: Callable[[Sequence[Row]], None] = lambda rows: None,
        ask: Callable[[int], None] = lambda num_left: None,
    ) -> None:
        """`free`: called with the leaderboard's rows when a trial has ended. `ask`: with how many trials are left."""
        self.searcher, self.board, self.log, self.each_report = searcher, board, log, each_report
        self.free, self.ask = free, ask
        self.over, self.best = len(board.over()), float(board.rows()[0]["val_mAP"])
        self.endings: list[tuple[Any, str]] = []
        """trials that have ended in this step, each with the error that it crashed of, or ''"""
        self.has_failure = False
        """whether a trial has crashed in this step"""

    @property
    def num_left(self) -> int:
        """Number of trials that are not over."""
        return self.board.sweep.trials - self.over

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Wait, before anything is written, while the sweep's folder is away."""
        run_folder.wait_for(self.board.out / layout.SWEEP, self.log)
        self.ask(self.num_left)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        settings = ", ".join(f"{name} {_short(value)}" for name, value in trial.config["settings"].items())
        self.log(f"trial {trial.config['number']} starts: {settings}")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        number = trial.config["number"]
        if "failed" in result:
            self.log(f"trial {number} can't be trained: {result['failed']}")
        elif self.each_report:
            self.best = max(self.best, result[OBJECTIVE])
            self.log(
                f"trial {number}: {result['images']:,} images, val mAP {result['val_mAP']:.3f}, "
                f"best so far {self.best:.3f}"
            )
        for warning in result.get("warnings", []):
            self.log(f"trial {number}: warning: {warning}")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.has_failure = True
        self.log(f"trial {trial.config['number']} failed and starts again: {_last_error(trial)}")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.endings.append((trial, ""))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.has_failure = True
        self.endings.append((trial, _last_error(trial)))

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Enter the trials that have ended. A write that fails ends the sweep: before, Tune would catch the error."""
        if self.has_failure:
            self.board.write()  # first of all: of a full disk the sweep ends, and not one trial after the other
            self.has_failure = False
        while self.endings:
            self._enter(*self.endings.pop(0))

    def _enter(self, trial: Any, error: str) -> None:
        number, last = trial.config["number"], trial.last_result
        row = self.board.row(number, trial.config["settings"], last, error)
        self.searcher.finish(trial.trial_id, row, None if error else last.get(OBJECTIVE))
        run = (self.board.out / layout.TRIALS / number).address
        RunQueue().leave(run)
        ray_private.release(run)
        self.over = len(self.board.over())
        self.free(self.board.write())
        self.log(f"trial {number} {row['status']} ({self.over} of {self.board.sweep.trials} trials over)")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _last_error(trial: Any) -> str:
    """The error that a trial crashed of last. Ray Tune writes it to a local file, and reads a later copy of it."""
    file = Path(trial.error_file or "")
    return last_line(file.read_text() if file.is_file() else str(trial.get_error() or "unknown"))


class ResumedHalving(AsyncHyperBandScheduler):
    """Successive halving by images seen. Its rungs also have what trials reported before a kill.

    A trial that has passed a rung is not stopped there again. A report that a run makes between being stopped and
    ending is on no rung.
    """

    def __init__(self, board: Leaderboard) -> None:
        first, factor = board.sweep.budget.first_rung, board.sweep.budget.reduction
        endless = 10**12  # trials end by their own budget
        super().__init__("images", OBJECTIVE, "max", max_t=endless, grace_period=first, reduction_factor=factor)
        until = {row["trial"]: row["images"] for row in board.over()}
        self.reports = {
            number: board.reports(number, until.get(number, math.inf)) for number in own_trials(board.study)
        }
        for number in until:
            self.on_trial_add(None, SimpleNamespace(trial_id=number, config={"number": number}))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial with its earlier reports to the rungs. These reports come again, and count once."""
        super().on_trial_add(tune_controller, trial)
        for report in self.reports.pop(trial.config["number"], ()):
            super().on_trial_result(tune_controller, trial, report)


def run_trials(watch: Watch, inputs: Mapping[ModelKey, Inputs], resources: Resources) -> None:
    """Run the trials that are left of a sweep: first the ones that wait in its study, then new ones."""
    board = watch.board
    if failed := [row["trial"] for row in board.over() if row["status"] == "failed"]:
        watch.log(f"failed trials stay failed ({', '.join(failed)}): --resume --retry-failed trains them again")
    if watch.num_left <= 0:
        return
    trainable = tune.with_resources(
        tune.with_parameters(Trial, sweep=board.sweep, inputs=inputs, out=board.out.address, resources=resources),
        {ray_private.HEAD: 0.001},
    )
    with tempfile.TemporaryDirectory(prefix="clipfh-tune-", ignore_cleanup_errors=True) as folder:
        # Not tune.Tuner, which would pickle the callback and the searcher
        tune.run(
            trainable,
            name="tune",
            storage_path=folder,
            num_samples=watch.num_left,
            search_alg=watch.searcher,
            scheduler=ResumedHalving(board) if board.sweep.budget.first_rung else FIFOScheduler(),
            callbacks=[watch],
            max_failures=RETRIES,
            reuse_actors=True,
            trial_name_creator=read_number,
            trial_dirname_creator=read_number,
            raise_on_failed_trial=False,
            verbose=0,
        )


def read_number(trial: Any) -> str:
    """The number of a trial of Tune's: '0001' for the first."""
    return str(trial.config["number"])
