"""A trial in a process of its own, as Tune sees it: a run of `fit`, and a result for each of its reports."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

from ray import tune

from clipfh import UserError
from clipfh.cluster import resources as cluster
from clipfh.config import schema
from clipfh.config.experiment import Experiment
from clipfh.config.schedule import make_schedule
from clipfh.config.sweep_file import SweepFile
from clipfh.storage import run_folder, store
from clipfh.train import driver
from clipfh.train.run_inputs import Inputs

OBJECTIVE = "best_val_mAP"


class Trial(tune.Trainable):
    """One trial as Tune sees it: `fit` in a thread of its own, a result for each report in the run's metrics.

    Its process, which has Ray loaded but no torch, is used again for a later trial.
    """

    def setup(
        self,
        config: dict[str, Any],
        sweep: SweepFile | None = None,
        inputs: Inputs | None = None,
        out: str = "",
        resources: cluster.Resources | None = None,
    ) -> None:
        """Start training, or go on from the trial's own checkpoint."""
        assert sweep is not None and inputs is not None and resources is not None
        self.sweep, self.inputs, self.out, self.resources = sweep, inputs, Path(out), resources
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial, once nothing is left of the one before."""
        self.cleanup()
        while self.thread.is_alive():
            cluster.end(self.run)  # again: it may just have been about to start
            self.thread.join(1)
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.folder = self.out / "trials" / config["number"]
        self.run = str(self.folder)
        cluster.end(self.run)  # what an attempt that was killed may have left
        run_folder.wait_for(self.out / run_folder.SWEEP)
        self.experiment = self.sweep.experiment(config["settings"])
        _clear_of_another(self.folder, self.experiment)
        self.total = make_schedule(self.experiment, self.inputs.num_images, self.inputs.num_single).num_steps
        self.reported = 0
        self.error: Exception | None = None
        self.losses: list[str] = []
        self.over = threading.Event()
        cluster.queue(self.run)
        self.thread = threading.Thread(target=self._fit, daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            while not self._trained():
                pass
        except Exception as error:  # told to Tune by the step that waits for us
            self.error = error

    def _trained(self) -> bool:
        """Train when it is our turn; False to go on: we gave way on a cluster that became too small, or were lost.

        A loss counts as a failure, of which there may be few, only where no checkpoint was made since the one before:
        spot machines are lost as often as it happens.
        """
        while not self._is_our_turn():
            if self.over.wait(1):
                return True
        begun = run_folder.latest_step(self.folder)
        try:
            followed = self._is_followed()
            driver.fit(self.experiment, self.inputs, self.folder, self.resources, name=self.run, followed=followed)
        except UserError:
            raise
        except Exception as error:
            run_folder.wait_for(self.folder / run_folder.EXPERIMENT)
            step = run_folder.latest_step(self.folder)
            if self._is_our_turn():
                if step <= begun:
                    raise
                self.losses.append(f"workers were lost, goes on from step {step}: {last_line(str(error))}")
            return False
        return True

    def _is_followed(self) -> bool:
        """Whether another trial begins where this one ends: the last of a sweep leave no process behind for one."""
        at_once = cluster.at_once(self.sweep.placement, self.resources)
        return int(self.trial_name) + at_once <= self.sweep.trials

    def _is_our_turn(self) -> bool:
        return cluster.is_turn_of(self.run, self.resources)

    def step(self) -> dict[str, Any]:
        """The next report; waits for it."""
        while True:
            running = self.thread.is_alive()
            if not running and self.error:
                return self._failed(self.error)
            lines = run_folder.read_metrics(self.folder)
            new = next((line for line in lines if line["step"] > self.reported and self._is_saved(line)), None)
            if new and not (running and self._is_last(new)):
                self.reported = new["step"]
                told, self.losses = self.losses, []
                return _result({**new, "warnings": [*told, *new.get("warnings", [])]}, self._is_last(new))
            if not running:
                run_folder.wait_for(self.folder / run_folder.EXPERIMENT)
                return _result(run_folder.read_metrics(self.folder)[-1], True)
            self._give_way()
            self.thread.join(1)  # the file system is one that others share

    def _failed(self, error: Exception) -> dict[str, Any]:
        """A last result, of the worst score there is, where these settings can't be trained: no other start would help.

        Raises:
            Exception: the error, where one might.
        """
        if not isinstance(error, UserError):
            raise error
        images = next((line["images"] for line in reversed(run_folder.read_metrics(self.folder))), 0)
        return _result({"images": images, "val_mAP": 0.0, OBJECTIVE: 0.0, "failed": str(error)}, True)

    def _give_way(self) -> None:
        """Stop training, for now, where the cluster no longer holds us."""
        if not self._is_our_turn():
            cluster.end(self.run)

    def _is_saved(self, line: dict[str, Any]) -> bool:
        """Whether the report's checkpoint is on the list: a score without its weights must not win."""
        return "diverged" in line or line["step"] <= run_folder.latest_step(self.folder)

    def _is_last(self, line: dict[str, Any]) -> bool:
        return "diverged" in line or line["step"] >= self.total

    def end_run(self, run: str) -> None:
        """Called by the sweep's driver, through `cluster.end`: a trial that was stopped trains no further."""
        if run == self.run:
            self.over.set()
        cluster.end(run)

    def cleanup(self) -> None:
        """Called by Tune when the process ends, also where the scheduler stops a trial in mid-training."""
        self.over.set()
        cluster.leave(self.run)
        cluster.end(self.run)


def _clear_of_another(folder: Path, experiment: Experiment) -> None:
    """Make the trial's folder. One of this number may have begun, with other settings, just before a kill."""
    file = folder / run_folder.EXPERIMENT
    if run_folder.read_freed(folder) or (file.exists() and file.read_text() != schema.to_json(experiment)):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    store.write(file, schema.to_json(experiment))


def _result(line: dict[str, Any], done: bool) -> dict[str, Any]:
    shown = ("images", "val_mAP", OBJECTIVE, "loss", "images_per_second", "diverged", "failed", "warnings")
    kept = {name: line[name] for name in shown if name in line}
    return {**kept, "done": done, "finished": done}


def last_line(text: str) -> str:
    return next((line[:300] for line in reversed(text.splitlines()) if line.strip()), "unknown")
