"""A worker of a run under Ray Train: what its process loads, and the session of its loop."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train

from clipfh.cluster import ray_private
from clipfh.model.architecture import load_open_clip
from clipfh.storage import layout
from clipfh.storage.store import Folder
from clipfh.train import stream, worker
from clipfh.train.run_inputs import Job


def load() -> None:
    """Import the libraries that take longest. A worker's process does so before it knows its run."""
    import tensorboardX  # noqa: F401

    load_open_clip()


def loop(job: Job) -> None:
    """Train under Ray Train, on each worker."""
    worker.train_loop(job, _RaySession(Folder(job.out)), stream)


class _RaySession:
    """The `worker.Session` of Ray Train, which keeps the checkpoints and their list.

    Args:
        out: the run's folder. To one in a bucket, a checkpoint is sent while training goes on.
    """

    def __init__(self, out: Folder) -> None:
        self.node, self.out = ray.util.get_node_ip_address(), out
        self.arrived = threading.Event()
        self.arrived.set()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[str | None]:
        start = ray.train.get_checkpoint()
        with start.as_directory() if start else contextlib.nullcontext() as folder:
            yield folder

    def report(self, metrics: dict[str, Any], save: worker.Save | None) -> None:
        if save is None:
            ray.train.report(metrics)
            return
        if not self.out.is_local:
            self._report_beside(metrics, save)
            return
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _report_beside(self, metrics: dict[str, Any], save: worker.Save) -> None:
        """Report with a checkpoint that a thread of Ray's sends, once the one before has arrived.

        Ray Train waits for that thread before a run is over.
        """
        self.arrived.wait()
        self.arrived.clear()
        folder = tempfile.mkdtemp(prefix="clipfh-")
        save(Path(folder))

        def send(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            place = self.out / layout.CHECKPOINTS / name
            try:
                place.send(Path(folder))
            finally:
                self.arrived.set()
            shutil.rmtree(folder, ignore_errors=True)
            return ray.train.Checkpoint(place.path, place.filesystem_holding_it())  # Ray Train deletes it in time

        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=send,
        )

    def is_ending(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def prepare_next(self) -> None:
        ray_private.prestart_worker()
