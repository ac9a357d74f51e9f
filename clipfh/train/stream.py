"""The sampler's batches, decoded, for each training worker: Ray Data over images that the object store holds once.

Who does what for steps 0 to 99 of a run with two workers and 16 images a step (each worker decodes 8 of them):

    driver        share: one object a shard in the object store, the index beside them
    worker 0      batches(part with rank 0)  ->  tasks of rank 0: steps 0-31 | 32-63 | 64-95 | 96-99, in this order
    worker 1      batches(part with rank 1)  ->  tasks of rank 1: steps 0-31 | 32-63 | 64-95 | 96-99
    a task        counts its steps, draws their rows, fetches the shards that they need, decodes 8 images a step

Where the object store does not hold all shards, an actor of the run reads them by windows (`data.windows`):

    driver        share: the paths of the shards, the index
    actor         reads each shard once a pass, for both workers, and holds those of the window in use and of the next
    a task        asks the actor for the shards of its steps' windows, decodes, and tells it that its steps are decoded

Runs that go at the same time draw other windows, so each has its own actor.

No other process stands between a worker and its tasks. `decoding` shows how rows become images.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata

from clipfh import UserError
from clipfh.cluster import ray_private
from clipfh.data import decoding
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import BatchDecoder, StreamPart, TrainImages
from clipfh.data.images import Preprocess
from clipfh.data.windows import Window, choose_window

FIRST_TASKS, FIRST_IMAGES = 4, 256
"""Number of first tasks of a stream, and images that each decodes: few, so that the first batch comes soon."""

TASK_IMAGES, TASK_MIB = 1024, 64
"""Upper limits for every other task: many images, so that Ray's own work for a task counts little."""

WINDOW_THREADS = 4
"""Number of shards that the actor of a run's windows reads at a time."""

WAITING = 10_000
"""Tasks, of all workers of a run, that may wait for a window at a time."""

DECODED_SHARE = 0.2
"""Share of the object store for images that are decoded ahead, where windows fill most of it. Ray Data's own is .5."""

TASK_CPUS = 0.5
"""CPUs of a task: tasks wait for memory as well as computing, and two to a core keep it busy."""

TASK: dict[str, Any] = {"num_cpus": TASK_CPUS, "runtime_env": ray_private.setup_hook_env("")}
"""Options of a task, the same for the driver and the training workers, so that a process serves both and loads nothing
that only a training worker needs. The job's environment is the same; tasks of the driver name it all the same, since
Ray compares environments as text, and only environments that it has merged are written alike."""

_read_shard = ray.remote(**TASK)(decoding.read_shard)
_decoded_bytes = ray.remote(**TASK)(decoding.decoded_bytes)
_decode_shard = ray.remote(**TASK)(decoding.decode_shard)
_decode_for_evaluation = ray.remote(**TASK)(decoding.decode_shard_for_evaluation)


def share(catalogue: Catalogue, *splits: str, window: int | Literal["auto"] = "auto", runs: int = 1) -> TrainImages:
    """Put the encoded images of splits into the object store, one object a shard. Tasks read the shards.

    With windows only their paths are shared. `window` and `runs` are as `Feed.share` takes them.
    """
    ray_private.start_data_statistics()  # else a worker's pipeline does, in a process with all that the worker loads
    paths = [path for split in splits for path in catalogue.shards(split)]
    stores = object_stores()
    runs_a_store = max(1, runs * min(stores) / sum(stores))
    images = choose_window(window, *catalogue.size(*splits), min(stores), runs_a_store)
    shards = paths if images else [_read_shard.remote(path) for path in paths]
    return TrainImages(ray.put(decoding.read_index(catalogue, *splits)), shards, [], images)


def object_stores() -> list[float]:
    """Bytes of the object store of each node that decodes: it has a copy of what its tasks read."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [each["object_store_memory"] for each in nodes if each.get("CPU") and "object_store_memory" in each]


def put(value: Any) -> Any:
    """Put a value into the object store; returns its reference."""
    return ray.put(value)


def spare_gib() -> float:
    """0, since all runs share the object store, and nodes come and go. See `Feed.spare_gib`."""
    return 0.0


def cache_decoded(shared: TrainImages, gib: float, size: int, crop_min: float) -> TrainImages:
    """Cache decoded images besides, as many shards as fit into `gib`. It changes no pixel.

    Args:
        shared: the encoded images.
        gib: memory of the object store for decoded images, GiB.
        size: side of the model's input, pixels.
        crop_min: smallest share of a photo's area that a crop takes.

    Raises:
        UserError: the cluster's object store is smaller than `gib`.
    """
    store = ray.cluster_resources().get("object_store_memory", 0) / 2**30
    if gib > store:
        raise UserError(
            f"--keep-gib {gib:g} is more than the cluster's object store has, {store:.1f} GiB: take less, or give Ray "
            "more by ray start --object-store-memory"
        )
    room, references = gib * 2**30, list[Any]()
    for shard, bytes_needed in zip(
        shared.shards, ray.get([_decoded_bytes.remote(s, size, crop_min) for s in shared.shards]), strict=True
    ):
        references.append(_decode_shard.remote(shard, size, crop_min) if bytes_needed <= room else None)
        room -= bytes_needed if references[-1] else 0
    return dataclasses.replace(shared, decoded=references)


def batches(part: StreamPart) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The steps of a part, in order: step, rows (N,) of the global batch, images of the worker's part of it.

    Images are (B, size, size, 3) uint8. Their crops are drawn from (seed, step, place in the global batch), so the
    pixels depend neither on the number of workers nor on the task that decodes them. The worker that reads the batches
    runs the pipeline itself, from the step of its checkpoint on; no process stands between. Without a limit on tasks,
    as many decode at a time as the cluster has CPUs for.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    ray_private.let_loop_rest(context)
    spec = part.spec
    window = part.images.window
    longest = max(1, window // spec.batch.images if window else part.last)  # a task fetches what its steps need
    steps = _Steps(part.first, part.last, max(1, spec.batch.images // part.world_size), spec.size, longest)
    # As many blocks as it has tasks: Ray Data would cut them further. And one kind of task, so that steps are counted
    # where they are decoded; processes of their own would hold CPUs to the end
    kind = {**TASK, **({} if part.takes_cpus else {"num_cpus": 0})}
    step_rows = ray.data.read_datasource(
        steps, override_num_blocks=max(1, len(steps.tasks)), concurrency=part.tasks, **kind
    )
    windows = _window_actor(part) if window else None
    if windows:
        windows.begin.remote(part.rank, part.first)
        # The actor alone has the paths: there may be millions, and each task would get them all
        part = dataclasses.replace(part, images=dataclasses.replace(part.images, shards=[]))
    work = functools.partial(_decode_steps, part=part, windows=windows)
    image_rows = step_rows.map_batches(work, batch_size=None, compute=ray.data.TaskPoolStrategy(part.tasks), **kind)
    image_rows.context.execution_options.preserve_order = True
    if window:
        image_rows.context.override_object_store_memory_limit_fraction = DECODED_SHARE
    for batch in image_rows.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=2):
        step = int(batch["step"][0])
        yield step, batch["row"][0], batch["image"][0]


class _Windows:
    """The actor that reads a run's shards by windows, for `ranks` workers.

    It reads them in threads of its own: tasks that read now and then would each be a process that Ray starts anew.
    """

    def __init__(self, part: StreamPart, ranks: int) -> None:
        self.threads = ThreadPoolExecutor(WINDOW_THREADS)
        self.reader = decoding.open_windows(part, self._begin_reading, ranks)
        self.sampler = decoding.open_sampler(part.images, part.spec)
        self.next: dict[int, int] = {}
        self.ends: dict[int, dict[int, int]] = {}
        self.moved = asyncio.Condition()

    def _begin_reading(self, path: str) -> Future[Any]:
        return self.threads.submit(lambda: ray.put(decoding.read_shard(path)))

    async def begin(self, rank: int, step: int) -> None:
        """Note that a worker's batches begin with a step."""
        self.next[rank], self.ends[rank] = step, {}
        await self._move(rank)

    async def open(self, rank: int, first: int, window: Window) -> dict[int, Any]:
        """The shards of a window, number to reference, for a task of worker `rank` whose first step is `first`.

        The task waits until the window is near: Ray Data starts tasks as far ahead as there is room for their output,
        and knows nothing of the room that windows take.
        """
        async with self.moved:
            await self.moved.wait_for(lambda: self.reader.is_near(rank, self.sampler.windows(first)[0]))
            shards = self.reader.open(window)
        return {shard: await asyncio.wrap_future(reading) for shard, reading in shards.items()}

    async def close(self, rank: int, first: int, last: int) -> None:
        """Note that a worker's steps from `first` to before `last` are decoded. Earlier ones may still be under way."""
        self.ends[rank][first] = last
        while self.next[rank] in self.ends[rank]:
            self.next[rank] = self.ends[rank].pop(self.next[rank])
        await self._move(rank)

    async def _move(self, rank: int) -> None:
        async with self.moved:
            self.reader.move(rank, self.sampler.windows(self.next[rank])[0])
            self.moved.notify_all()


_actors: dict[str, Any] = {}
"""Placement group of workers to its window actor, which ends when the process that started it drops this handle."""


def _window_actor(part: StreamPart) -> Any:
    """The window actor of this worker's run, started by the first worker; outside a placement group, a new one."""
    group = ray.get_runtime_context().get_placement_group_id()
    if not group:
        return _start_actor(part, 1)
    if group not in _actors:
        name = f"clipfh-windows-{group}"
        _actors[group] = _start_actor(part, part.world_size, name=name, get_if_exists=True)
    return _actors[group]


def _start_actor(part: StreamPart, ranks: int, **options: Any) -> Any:
    outside = {"num_cpus": 0, "scheduling_strategy": "DEFAULT", "runtime_env": TASK["runtime_env"]}
    actor = ray.remote(_Windows).options(max_concurrency=WAITING, **outside, **options)
    return actor.remote(part, ranks)


class _Steps(ray.data.Datasource):
    """Steps in order, as rows with the column `step`, cut into the tasks that decode them.

    Args:
        first: first step.
        last: step after the last.
        images: number of images in a step.
        size: side of an image, pixels.
        longest: largest number of steps in a task.
    """

    def __init__(self, first: int, last: int, images: int, size: int, longest: int) -> None:
        small = min(longest, max(1, FIRST_IMAGES // images))
        large = min(longest, max(1, min(TASK_IMAGES, TASK_MIB * 2**20 // (3 * size**2)) // images))
        then = min(first + FIRST_TASKS * small, last)
        cuts = [*range(first, then, small), *range(then, last, large), last]
        self.tasks = list(itertools.pairwise(cuts))

    def estimate_inmemory_data_size(self) -> int:
        return sum(8 * (end - start) for start, end in self.tasks)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        return [
            ray.data.ReadTask(functools.partial(_step_table, start, end), BlockMetadata(end - start, None, None, None))
            for start, end in self.tasks
        ]


def _step_table(start: int, end: int) -> list[pa.Table]:
    return [pa.table({"step": np.arange(start, end)})]


def _decode_steps(block: dict[str, np.ndarray], part: StreamPart, windows: Any) -> dict[str, Any]:
    """Decode a worker's part of some steps: step (S,), row (S, N), image (S, B, size, size, 3)."""
    first, last = int(block["step"][0]), int(block["step"][-1]) + 1
    opening = (lambda window: ray.get(windows.open.remote(part.rank, first, window))) if windows else None
    rows, pixels = zip(*map(BatchDecoder(part, opening), range(first, last)), strict=True)
    if windows:
        windows.close.remote(part.rank, first, last)
    return {"step": block["step"], "row": np.stack(rows), "image": np.stack(pixels)}


def decode_for_evaluation(
    catalogue: Catalogue, splits: tuple[str, ...], preprocess: Preprocess
) -> decoding.EvaluationImages:
    """The images of splits for evaluation, for all workers and trials; tasks decode them. See `Feed`."""
    return decoding.EvaluationImages.of(catalogue, splits, preprocess, min(object_stores()), _begin_decoding)


def _begin_decoding(path: str, preprocess: Preprocess) -> Any:
    return _decode_for_evaluation.remote(_read_shard.remote(path), preprocess)
