"""A run in this process: images in memory, decoded by threads, and checkpoints in the run's folder. Nothing of Ray.

For one worker on this machine's CPUs, which trains long before a cluster would be up. Its folder is as Ray Train leaves
one, so a run that began here can go on over a cluster, and the other way round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from clipfh.config import cores, memory
from clipfh.config.experiment import Experiment, Placement
from clipfh.data import decoding
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import BatchDecoder, EvaluationImages, StreamPart, TrainImages
from clipfh.data.images import Preprocess
from clipfh.data.windows import choose_window
from clipfh.storage import layout
from clipfh.storage.store import Folder
from clipfh.train import worker
from clipfh.train.run_inputs import Inputs, Job

SPARE_SHARE = 1 / 8
"""Share of memory that decoded images may take unasked."""


class InProcessFeed:
    """The `decoding.Feed` that holds what a run reads in this process's memory.

    A batch is decoded when it is asked for, by all threads that the steps have: threads that decoded beside a step
    would make torch's wait for each other.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(cores.available())

    def share(
        self, catalogue: Catalogue, *splits: str, window: int | Literal["auto"] = "auto", runs: int = 1
    ) -> TrainImages:
        paths = [path for split in splits for path in catalogue.shards(split)]
        images = choose_window(window, *catalogue.size(*splits), memory.available(), runs)
        shards = paths if images else list(self.pool.map(decoding.read_shard, paths))
        return TrainImages(decoding.read_index(catalogue, *splits), shards, [], images)

    def put(self, value: Any) -> Any:
        return value

    def spare_gib(self) -> float:
        return memory.available() * SPARE_SHARE / 2**30

    def cache_decoded(self, shared: TrainImages, gib: float, size: int, crop_min: float) -> TrainImages:
        room, futures = gib * 2**30, list[Any]()
        with ThreadPoolExecutor(cores.available()) as pool:
            sizes = list(pool.map(lambda shard: decoding.decoded_bytes(shard, size, crop_min), shared.shards))
            for shard, bytes_needed in zip(shared.shards, sizes, strict=True):
                fits = bytes_needed <= room
                futures.append(pool.submit(decoding.decode_shard, shard, size, crop_min) if fits else None)
                room -= bytes_needed if fits else 0
        return dataclasses.replace(shared, decoded=[future and future.result() for future in futures])

    def decode_for_evaluation(
        self, catalogue: Catalogue, splits: tuple[str, ...], preprocess: Preprocess
    ) -> EvaluationImages:
        return EvaluationImages.of(catalogue, splits, preprocess, memory.available(), self._begin_decoding)

    def _begin_decoding(self, path: str, preprocess: Preprocess) -> Future[np.ndarray]:
        return self.pool.submit(lambda: decoding.decode_shard_for_evaluation(decoding.read_shard(path), preprocess))

    def batches(self, part: StreamPart) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        windows = decoding.open_windows(part, self._begin_reading, ranks=1) if part.images.window else None
        decoder = BatchDecoder(part, windows.open if windows else None)
        with ThreadPoolExecutor(part.tasks or cores.available()) as pool:
            for step in range(part.first, part.last):
                rows, pixels = decoder(step, pool.map, torch.get_num_threads())
                if windows:
                    windows.move(part.rank, decoder.sampler.windows(step)[0])
                yield step, rows, pixels

    def _begin_reading(self, path: str) -> Future[pa.Table]:
        return self.pool.submit(decoding.read_shard, path)


class _LocalSession:
    """The `worker.Session` of a run alone. It keeps the best checkpoint and the latest, and Ray Train's list of them.

    Args:
        out: the run's folder.
        score: the metric whose highest value is the best.
        on_report: takes each report.
    """

    node = socket.gethostname()

    def __init__(self, out: Folder, score: str, on_report: Callable[[dict[str, Any]], None]) -> None:
        self.folder, self.score, self.on_report = out / layout.CHECKPOINTS, score, on_report
        self.sender = ThreadPoolExecutor(1)
        self.sending: Future[None] | None = None
        self.snapshot = self.folder.read_json(layout.SNAPSHOT) or _empty_list()
        self._remove_all_but([result["checkpoint_dir_name"] for result in self.snapshot["checkpoint_results"]])

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[str | None]:
        latest = self.snapshot["latest_checkpoint_result"]
        yield str(self.folder / latest["checkpoint_dir_name"]) if latest else None

    def report(self, metrics: dict[str, Any], save: worker.Save | None) -> None:
        assert save is not None, "a run alone has one worker, which saves"
        name = f"checkpoint_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
        entry = {"version": 0, "checkpoint_dir_name": name, "metrics": metrics}
        self.finish()
        with contextlib.ExitStack() as filling:
            save(filling.enter_context((self.folder / name).filling()))
            placing = filling.pop_all()
        self.sending = self.sender.submit(self._place, placing, entry)
        if self.folder.is_local:
            self.finish()
        self.on_report(metrics)

    def finish(self) -> None:
        """Wait until the last checkpoint has arrived."""
        if self.sending:
            self.sending.result()

    def _place(self, placing: contextlib.ExitStack, entry: dict[str, Any]) -> None:
        """Put a checkpoint in its place, in a bucket while training goes on, and list it once it is whole."""
        placing.close()
        self._add(entry)

    def is_ending(self) -> bool:
        return False

    def prepare_next(self) -> None:
        """Do nothing: no run follows this one."""

    def _add(self, latest: dict[str, Any]) -> None:
        """List a checkpoint, and drop all but the best and the latest."""
        index = self.snapshot["current_report_index"]
        entries = zip(self.snapshot["checkpoint_results"], self.snapshot["checkpoint_report_indices"], strict=True)
        ranking = sorted([*entries, (latest, index)], key=lambda each: (each[0]["metrics"][self.score], each[1]))
        best_and_latest = [each for each in ranking if each is ranking[-1] or each[0] is latest]
        self.snapshot |= {
            "checkpoint_results": [result for result, _ in best_and_latest],
            "checkpoint_report_indices": [number for _, number in best_and_latest],
            "latest_checkpoint_result": latest,
            "current_report_index": index + 1,
        }
        self.folder.write(layout.SNAPSHOT, json.dumps(self.snapshot))
        self._remove_all_but([result["checkpoint_dir_name"] for result, _ in best_and_latest])

    def _remove_all_but(self, names: list[str]) -> None:
        """Remove all checkpoints but these: others are half-written, or no longer the best."""
        for folder in self.folder.folders():
            if folder.name.lstrip(".").startswith("checkpoint_") and folder.name not in names:
                self.folder.remove(folder.name)


def _empty_list() -> dict[str, Any]:
    """Ray Train's list of a run's checkpoints before the first, as its checkpoint manager reads it."""
    lists = ("checkpoint_results", "checkpoint_report_indices", "pending_training_results", "pending_validation_specs")
    outcomes = ("validated", "timed_out_validation", "failed_validation")
    return {
        "ray_version": importlib.metadata.version("ray"),
        **{name: [] for name in (*lists, *(f"{how}_checkpoint_dir_names" for how in outcomes))},
        "latest_checkpoint_result": None,
        "current_report_index": 0,
    }


def trains_here(placement: Placement, address: str | None) -> bool:
    """Whether a run trains in this process: one worker, on this machine's CPUs."""
    elsewhere = address or os.environ.get("RAY_ADDRESS")
    has_gpu = placement.gpus_per_worker if placement.gpus_per_worker != "auto" else torch.cuda.device_count()
    return not elsewhere and placement.workers == 1 and not has_gpu


def run_training(
    placement: Placement,
    experiment: Experiment,
    inputs: Inputs,
    out: Folder,
    on_report: Callable[[dict[str, Any]], None],
) -> None:
    """Train in this thread, or go on training what `out` holds; as `driver.run_training` does over a cluster.

    Args:
        placement: only its CPUs count.
        experiment: what to compute.
        inputs: what the run reads, of this experiment's model, prompts and catalogue, held by a `Feed`.
        out: the run's folder, which holds its `experiment.json`.
        on_report: takes each report.
    """
    session = _LocalSession(out, "step" if inputs.validation is None else "val_mAP", on_report)
    threads, shares_cores = choose_threads(placement)
    try:
        job = Job(experiment, inputs, out.address, 0, threads, shares_cores)
        worker.train_loop(job, session, InProcessFeed())
    finally:  # also on Ctrl-C: what was reported is not lost
        session.finish()


def choose_threads(placement: Placement) -> tuple[int, bool]:
    """Number of threads of a run alone, as asked for or its share of the cores; and whether it is a share."""
    if placement.cpus_per_worker == "auto":
        return cores.available(), True
    return max(1, int(placement.cpus_per_worker)), False
