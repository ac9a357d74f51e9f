"""`fit`, the driver of a run by Ray Train. It loads no torch: only workers need that."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from clipfh import UserError, mendable
from clipfh.cluster import resources as cluster
from clipfh.config.experiment import Experiment
from clipfh.config.schedule import make_schedule
from clipfh.storage import store
from clipfh.train.run_inputs import Inputs

WORKER = "clipfh.train.ray_worker"
"""The module of a worker's `loop`, and of `load`, which its process calls before all else."""


class _WholeLists(ControllerCallback):
    """Make the controller write its list of checkpoints whole or not at all.

    Ray Train writes it in place. Whoever reads it meanwhile finds half of it, and so would a resumed run after a kill.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        CheckpointManager._write_state_to_storage = _write_list  # type: ignore[method-assign]


def _write_list(manager: Any) -> None:
    """CheckpointManager's method of that name, by way of a second file."""
    place = manager._storage_context
    store.write(place.checkpoint_manager_snapshot_path, manager._save_state(), place.storage_filesystem)


class _Patience(DefaultFailurePolicy):
    """Ray Train's, but what the user must mend is not tried again, and a cluster that others use is waited for."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if mendable(training_failed_error):
            return FailureDecision.RAISE
        if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class _Trainer(DataParallelTrainer):
    """Ray Train's trainer without three processes a run.

    In a trial's process, which is an actor and has all loaded, it keeps its controller there. The part of its
    placement-group cleaner is played by `cluster.Register` and `cluster.end`. Its manager of datasets would have none:
    the workers run their own pipelines.
    """

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = _Patience(parts["failure_policy"].failure_config)
        if ray.get_runtime_context().get_actor_id() is None:
            return super()._initialize_and_run_controller(**parts)
        run = next(each.run for each in parts["callbacks"] if isinstance(each, cluster.Register))
        return cluster.control(run, TrainController(**parts))

    def _create_default_callbacks(self) -> list:
        from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        usual = super()._create_default_callbacks()
        spared = DatasetsCallback, PlacementGroupCleanerCallback
        return [callback for callback in usual if not isinstance(callback, spared)]


def loop(job: dict[str, Any]) -> None:
    """What Ray Train runs on each worker, whose process has its module loaded."""
    importlib.import_module(WORKER).loop(job)


def _backend(resources: cluster.Resources) -> BackendConfig | None:
    """torch's process group. One worker needs none; and it would load torch here."""
    if resources.workers == 1:
        return None
    from ray.train.torch import TorchConfig

    return TorchConfig("nccl" if resources.gpus else "gloo")


def fit(
    experiment: Experiment,
    inputs: Inputs,
    out: str | Path,
    resources: cluster.Resources,
    *,
    name: str = "",
    retries: int = 0,
    followed: bool = False,
) -> None:
    """Train, or go on training what `out` holds. Blocks to the end; `metrics.jsonl` grows meanwhile.

    Args:
        experiment: what to compute.
        inputs: of this experiment's model, prompts and catalogue.
        out: the run's folder, which holds its `experiment.json`.
        resources: where to compute it.
        name: of the run on this cluster, for `cluster.end`; by default its folder, as others may train there too.
        retries: how often lost workers are replaced. 0 under Tune, which retries whole trials.
        followed: by a run with the same resources, whose processes are started while this one trains.

    Raises:
        ray.train.TrainingFailedError: workers failed more often than that.
        UserError: what a worker failed of is the user's to mend; no worker is replaced then.
    """
    if experiment.batch.items % resources.workers:
        raise UserError(
            f"--workers {resources.workers} does not divide --batch.items {experiment.batch.items}: "
            "each worker takes as many items"
        )
    out = str(out) if "://" in str(out) else str(Path(out).absolute())
    name = name or out
    trainer = _Trainer(
        loop,
        backend_config=_backend(resources),
        train_loop_config={
            "experiment": experiment,
            "inputs": inputs,
            "out": out,
            "gpus": resources.gpus,
            "threads": resources.threads,
            "shares_cores": resources.shares_cores,
            "decoding": resources.decoding,
            "followed": followed,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=out,
            worker_runtime_env=cluster.first_calling(f"{WORKER}.load"),
            callbacks=[cluster.Register(name), _WholeLists()],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(
                max_failures=retries, max_preemption_failures=-1, controller_failure_limit=3
            ),  # type: ignore[call-arg]
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute="step" if inputs.validation is None else "val_mAP",
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if line := mendable(error):
            raise UserError(line) from error
        raise
    finally:
        cluster.end(name)  # the handle kept for it holds the controller back from ending by itself


def is_over(experiment: Experiment, inputs: Inputs, last: dict[str, Any]) -> bool:
    """Whether a run's last report is the last that it will make."""
    patience = experiment.budget.patience
    stopped = patience and last.get("reports_since_best", 0) >= patience
    total = make_schedule(experiment, inputs.num_images, inputs.num_single).num_steps
    return bool("diverged" in last or stopped or last["step"] >= total)
