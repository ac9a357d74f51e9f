"""Mirror a run's or a sweep's reports into MLflow or Weights & Biases, from a process of its own.

That process reads what training writes anyway. So training never waits for a server and never fails with one; what was
not sent while a server was away is sent when it answers, and a run that is resumed goes on as the same run there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from clipfh import UserError, __version__
from clipfh.report import artifacts
from clipfh.report.artifacts import RunRecord
from clipfh.storage import layout
from clipfh.storage.store import Folder

PROJECT = "clipfh"
LIBRARIES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
AWAY_SECONDS, LAST_SECONDS = 30.0, 60.0


def require(tracker: str | None) -> None:
    """Raise UserError where the tracker's library, its key or its experiment is missing."""
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(f"--track {tracker} needs {LIBRARIES[tracker]}: pip install {LIBRARIES[tracker]}")
    if tracker == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise UserError("--track wandb finds no API key: run wandb login, or set WANDB_MODE=offline")
    if tracker == "mlflow":
        _require_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))


def _require_experiment(name: str) -> None:
    """Raise UserError where the experiment was deleted: MLflow then takes neither its runs nor a new one of its name.

    A server that does not answer is no error: training goes on without it, and it is asked again.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    _ask_briefly()
    try:
        experiment = MlflowClient().get_experiment_by_name(name)
    except MlflowException:
        return
    if experiment and experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"--track mlflow: the experiment {name} is deleted: restore it (mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}), or name another by MLFLOW_EXPERIMENT_NAME"
        )


def _ask_briefly() -> None:
    """Have MLflow give up after two tries of some seconds, not after minutes, where nothing else is set."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


@contextlib.contextmanager
def following(tracker: str | None, out: Folder) -> Iterator[None]:
    """Send what grows in the folder of a run or a sweep for as long as the block runs, and the rest at its end."""
    if not tracker:
        yield
        return
    # Ctrl-C is for this process alone. The other winds up at the end of its input, also where this one is killed
    words = [sys.executable, "-m", "clipfh.train.track", tracker, str(out)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"warning: {tracker} did not take all reports in time; metrics.jsonl has them", flush=True)


class _MLflow:
    """A run in MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, name: str, tags: Mapping[str, str], settings: Mapping[str, Any], run_id: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if run_id:
            self.id = run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.id = self.client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id
        self.client.log_batch(self.id, params=[Param(key, str(value)) for key, value in settings.items()])

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self.client.create_experiment(name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def finish(self) -> None:
        self.client.set_terminated(self.id)


class _Wandb:
    """A run in Weights & Biases, in the project WANDB_PROJECT."""

    def __init__(self, name: str, tags: Mapping[str, str], settings: Mapping[str, Any], run_id: str) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id or None,
            name=name,
            group=tags.get("sweep"),
            config={**settings, **tags},
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.id = self.run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()


TRACKERS = {"mlflow": _MLflow, "wandb": _Wandb}


class Mirror:
    """What was sent of the runs in a folder, and what is still to be sent.

    A run's `track.json` holds by tracker the run's id there and the last step that was sent.
    """

    def __init__(self, tracker: str, out: Folder) -> None:
        self.tracker, self.out = tracker, out
        self.open: dict[str, Any] = {}

    def send(self) -> None:
        """Send all that is new. Raises whatever the tracker raises; what was not sent then is sent by the next call."""
        for run in artifacts.runs(self.out):
            name, state = str(run.folder), run.folder.read_json(layout.TRACK).get(self.tracker, {"id": "", "step": 0})
            new = [line for line in run.lines if line["step"] > state["step"]]
            if name not in self.open and (new or not state["id"]):
                self.open[name] = self._start(run, state["id"])
                self._save_state(run, {**state, "id": self.open[name].id})
            for line in new:
                self.open[name].log(line["step"], _numbers(line))
                self._save_state(run, {"id": self.open[name].id, "step": line["step"]})

    def finish(self) -> None:
        """End the runs that were sent to."""
        for run in self.open.values():
            run.finish()

    def _start(self, run: RunRecord, run_id: str) -> Any:  # noqa: ANN401
        tags, name, sweep = {"clipfh": __version__, "stage": run.settings["stage"]}, run.name, self.out
        if run.folder.path != sweep.path:
            tags |= {"sweep": sweep.name, "trial": run.name}
            name = f"{sweep.name}-{run.name}"
        return TRACKERS[self.tracker](name, tags, run.settings, run_id)

    def _save_state(self, run: RunRecord, state: dict[str, Any]) -> None:
        states = {**run.folder.read_json(layout.TRACK), self.tracker: state}
        run.folder.write(layout.TRACK, json.dumps(states) + "\n")


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in line.items()
        if isinstance(value, int | float) and key != "step" and math.isfinite(value)
    }


def main(tracker: str, out: Folder) -> None:
    """Send until the input ends, then once more."""
    _ask_briefly()
    logging.disable(logging.ERROR)  # what they tell of themselves is not for the command's output
    mirror, is_over, is_away = Mirror(tracker, out), False, False
    while not is_over:
        is_over = bool(select.select([sys.stdin], [], [], AWAY_SECONDS if is_away else out.seconds_between_looks)[0])
        try:
            mirror.send()
            if is_over:
                mirror.finish()
            is_away = False
        except Exception as error:  # whatever a library of others has, training goes on
            reason = " ".join(str(error).split())[:160]
            if is_over:
                print(f"warning: not all was sent to {tracker} ({reason}); --resume sends the rest", flush=True)
            elif not is_away:
                print(
                    f"warning: {tracker} does not answer ({reason}); training goes on, and it is asked again",
                    flush=True,
                )
            is_away = True


if __name__ == "__main__":
    main(sys.argv[1], Folder(sys.argv[2]))
