"""A trial in a process of its own, as Tune sees it: one run in a thread, and a result for each of its reports."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ray import tune

from clipfh import UserError
from clipfh.cluster.resources import Resources, max_concurrent_runs
from clipfh.cluster.run_queue import RunQueue
from clipfh.config.experiment import Experiment
from clipfh.config.schedule import make_schedule
from clipfh.config.sweep_file import SweepFile
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep.run_thread import RunThread
from clipfh.train import driver
from clipfh.train.run_inputs import Inputs, ModelKey, model_key

OBJECTIVE = "best_val_mAP"


class Trial(tune.Trainable):
    """One trial as Tune sees it: a result for each report in the metrics of its run, which trains in a thread.

    Its process, which has Ray loaded but no torch, is used again for a later trial.
    """

    def setup(
        self,
        config: dict[str, Any],
        sweep: SweepFile | None = None,
        inputs: Mapping[ModelKey, Inputs] | None = None,
        out: str = "",
        resources: Resources | None = None,
    ) -> None:
        """Start training, or go on from the trial's own checkpoint."""
        assert sweep is not None and inputs is not None and resources is not None
        self.sweep, self.inputs, self.out, self.resources = sweep, inputs, Folder(out), resources
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial, once nothing is left of the one before."""
        self.thread.release()
        self.thread.join()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.number: str = config["number"]
        self.folder = self.out / layout.TRIALS / self.number
        run_folder.wait_for(self.out / layout.SWEEP)
        experiment = self.sweep.experiment(config["settings"])
        driver.open_folder(experiment, self.folder)  # one with other settings may have begun just before a kill
        inputs = self.inputs[model_key(experiment.model)]
        self.total = make_schedule(experiment, inputs.num_images, inputs.num_single).num_steps
        self.reported_step = 0
        train = functools.partial(self._train, experiment, inputs)
        self.thread = RunThread(self.folder.address, self.resources, RunQueue(), train, self._latest_step)
        self.thread.start()

    def _train(self, experiment: Experiment, inputs: Inputs) -> None:
        followed = self._is_followed()
        driver.run_training(experiment, inputs, self.folder, self.resources, prestart_next=followed)

    def _latest_step(self) -> int:
        run_folder.wait_for(self.folder / layout.EXPERIMENT)
        return run_folder.latest_step(self.folder)

    def _is_followed(self) -> bool:
        """Whether another trial will follow in this process: after the last ones of a sweep none does."""
        at_once = max_concurrent_runs(self.sweep.placement, self.resources)
        return int(self.number) + at_once <= self.sweep.trials

    def step(self) -> dict[str, Any]:
        """Wait for the next report, and return it."""
        while True:
            is_alive = self.thread.is_alive()
            if not is_alive and self.thread.error:
                return self._failure(self.thread.error)
            lines = run_folder.read_metrics(self.folder)
            new = next((line for line in lines if line["step"] > self.reported_step and self._is_saved(line)), None)
            if new and not (is_alive and self._is_last(new)):
                self.reported_step = new["step"]
                warnings = [*self.thread.take_interruptions(), *new.get("warnings", [])]
                return _result({**new, "warnings": warnings}, self._is_last(new))
            if not is_alive:
                run_folder.wait_for(self.folder / layout.EXPERIMENT)
                return _result(run_folder.read_metrics(self.folder)[-1], True)
            self.thread.give_way()
            self.thread.wait(self.folder.seconds_between_looks)  # the file system is one that others share

    def _failure(self, error: Exception) -> dict[str, Any]:
        """A last result with the worst score possible, where these settings can't be trained: no retry would help.

        Raises:
            Exception: the error, where a retry might help.
        """
        if not isinstance(error, UserError):
            raise error
        images = next((line["images"] for line in reversed(run_folder.read_metrics(self.folder))), 0)
        return _result({"images": images, "val_mAP": 0.0, OBJECTIVE: 0.0, "failed": str(error)}, True)

    def _is_saved(self, line: dict[str, Any]) -> bool:
        """Whether the report's checkpoint is on the list: a score without its weights must not win."""
        return "diverged" in line or line["step"] <= run_folder.latest_step(self.folder)

    def _is_last(self, line: dict[str, Any]) -> bool:
        return "diverged" in line or line["step"] >= self.total

    def cleanup(self) -> None:
        """Free what the run holds: Tune calls it when the process ends, also in mid-training."""
        self.thread.release()


def _result(line: dict[str, Any], done: bool) -> dict[str, Any]:
    names = ("images", "val_mAP", OBJECTIVE, "loss", "images_per_second", "diverged", "failed", "warnings")
    return {**{name: line[name] for name in names if name in line}, "done": done, "finished": done}
