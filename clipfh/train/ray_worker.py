"""A worker of a run under Ray Train: what its process loads, and the session of its loop."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train

from clipfh.cluster import ray_private
from clipfh.model.architecture import load_open_clip
from clipfh.train import stream, worker
from clipfh.train.run_inputs import Job


def load() -> None:
    """Import the libraries that take longest. A worker's process does so before it knows its run."""
    import tensorboardX  # noqa: F401

    load_open_clip()


def loop(job: Job) -> None:
    """Train under Ray Train, on each worker."""
    worker.train_loop(job, _RaySession(), stream)


class _RaySession:
    """The `worker.Session` of Ray Train, which keeps the checkpoints and their list."""

    def __init__(self) -> None:
        self.node = ray.util.get_node_ip_address()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[str | None]:
        start = ray.train.get_checkpoint()
        with start.as_directory() if start else contextlib.nullcontext() as folder:
            yield folder

    def report(self, metrics: dict[str, Any], save: worker.Save | None) -> None:
        if save is None:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def is_ending(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def prepare_next(self) -> None:
        ray_private.prestart_worker()
