"""The driver of a run under Ray Train. It loads no torch for one worker: only workers need that."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import ray.train
from ray.train import TrainingFailedError

from clipfh import UserError, fixable
from clipfh.cluster import ray_private
from clipfh.cluster.resources import Resources
from clipfh.config import schema
from clipfh.config.experiment import Experiment
from clipfh.config.schedule import make_schedule
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder, WholeFiles
from clipfh.train.run_inputs import Inputs, Job

WORKER = "clipfh.train.ray_worker"
"""Module of a worker's `loop`, and of `load`, which a worker's process calls first."""


def loop(config: dict[str, Job]) -> None:
    """Run the loop of a worker. Its module is loaded in the worker's process alone."""
    importlib.import_module(WORKER).loop(config["job"])


def holds_another(experiment: Experiment, out: Folder) -> bool:
    """Whether a run's folder holds a run of another experiment."""
    file = out / layout.EXPERIMENT
    return file.exists() and file.read_text() != schema.to_json(experiment)


def open_folder(experiment: Experiment, out: Folder) -> None:
    """Make a run's folder, cleared of a run that can't go on as this one: of another experiment, or partly deleted."""
    if run_folder.read_freed(out) or holds_another(experiment, out):
        out.remove()
    out.make()
    out.write(layout.EXPERIMENT, schema.to_json(experiment))


def run_training(
    experiment: Experiment,
    inputs: Inputs,
    out: str | Path | Folder,
    resources: Resources,
    *,
    retries: int = 0,
    prestart_next: bool = False,
) -> None:
    """Train, or go on training what `out` holds. Blocks to the end; `metrics.jsonl` grows meanwhile.

    Args:
        experiment: what to compute.
        inputs: what its workers read, made for this experiment's model, prompts and catalogue.
        out: the run's folder, which holds its `experiment.json`. Its path is the run's name for `ray_private.release`.
        resources: what the run takes of the cluster.
        retries: how often lost workers are replaced. 0 under Tune, which retries whole trials.
        prestart_next: whether processes for a run with the same resources are started while this one trains.

    Raises:
        ray.train.TrainingFailedError: workers failed more than `retries` times.
        ray_private.Released: the run was released.
        UserError: a worker failed for a reason that the user can fix; no worker is replaced then.
    """
    if resources.workers > experiment.batch.images:
        raise UserError(
            f"--workers {resources.workers} is more than a batch has images, {experiment.batch.images}: take fewer, or "
            "a larger batch (--batch.items, --batch.views)"
        )
    run = Folder(out)
    job = Job(
        experiment,
        inputs,
        run.address,
        gpus=resources.gpus,
        threads=resources.threads,
        shares_cores=resources.shares_cores,
        decoding_tasks=resources.decoding,
        reserves_decoding=resources.is_elastic,
        prestart_next=prestart_next,
    )
    workers: Any = (resources.min_workers, resources.workers) if resources.is_elastic else resources.workers
    trainer = ray_private.make_trainer(
        run.address,
        loop,
        process_group=resources.workers > 1,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.per_worker,
        ),
        run_config=_run_config(run, retries, "step" if inputs.validation is None else "val_mAP"),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if line := fixable(error):
            raise UserError(line) from error
        raise


def _run_config(run: Folder, retries: int, score: str) -> ray.train.RunConfig:
    """Where a run's checkpoints lie, which are kept, and what is tried again.

    Ray Train writes its list of checkpoints in place: a reader meanwhile, or after a kill, would find half of it. So a
    local folder is written through `WholeFiles`. In a bucket an object is whole as soon as it is there.
    """
    return ray.train.RunConfig(
        name=layout.CHECKPOINTS,
        storage_path=run.path,
        storage_filesystem=WholeFiles() if run.is_local else run.filesystem,
        worker_runtime_env=ray_private.setup_hook_env(f"{WORKER}.load"),
        failure_config=ray.train.FailureConfig(
            max_failures=retries, max_preemption_failures=-1, controller_failure_limit=3
        ),  # type: ignore[call-arg]
        checkpoint_config=ray.train.CheckpointConfig(
            num_to_keep=1, checkpoint_score_attribute=score, checkpoint_score_order="max"
        ),
    )


def is_over(experiment: Experiment, inputs: Inputs, last: dict[str, Any]) -> bool:
    """Whether a run's last report is the last that it will make."""
    patience = experiment.budget.patience
    stopped = patience and last.get("reports_since_best", 0) >= patience
    total = make_schedule(experiment, inputs.num_images, inputs.num_single).num_steps
    return bool("diverged" in last or stopped or last["step"] >= total)
