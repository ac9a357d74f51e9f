"""The plan's batches, decoded, to each training worker: Ray Data over images that the object store holds once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.data._internal.stats import get_or_create_stats_actor
from ray.data.block import BlockMetadata

from clipfh import UserError, images
from clipfh.batches import Index, Plan
from clipfh.catalogue import Catalogue
from clipfh.config import Augment, Batch

FIRST_TASKS, FIRST_IMAGES = 4, 256
"""The first tasks of a stream, and what each takes: few images, so that the first batch comes soon."""

TASK_IMAGES, TASK_MIB = 1024, 64
"""What each of the others takes at most: many, so that Ray's own work for a task counts little."""

TASK_CPUS = 0.5
"""As many to a core as `cluster.TASKS_A_CORE`, which isn't imported here: it would load Ray Train where we decode."""

TASK: dict[str, Any] = {
    "num_cpus": TASK_CPUS,
    "runtime_env": {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: ""}},
}
"""A task, asked for by the driver or by a training worker: its process loads none of what a worker's does before all
else, and serves both. Ray compares environments as text, and writes alike only those that it has merged: hence the
driver's tasks name theirs too, though the job's is the same."""


@dataclass(frozen=True)
class Images:
    """The train images in the object store, shared without copies by all tasks, workers and trials."""

    index: Any
    """ObjectRef[Index]"""
    shards: list[Any]
    """ObjectRef[pa.Table] with the columns `image` and `path`, each in one chunk"""
    kept: list[Any]
    """ObjectRef[Decoded] of each shard, None for those there was no room for"""


def share(catalogue: Catalogue, *splits: str) -> Images:
    """Put the encoded images of splits into the object store, one object a shard, read by tasks where there is room."""
    get_or_create_stats_actor()  # else the first worker's pipeline does, as a process with all that the worker's loads
    rows = pa.concat_tables([catalogue.rows(split) for split in splits])
    shards = [_read_shard.remote(str(path)) for split in splits for path in catalogue.shards(split)]
    lengths = ray.get([_length.remote(shard) for shard in shards])
    return Images(ray.put(index_of(rows, np.cumsum(lengths))), shards, [None] * len(shards))


def index_of(rows: pa.Table, shard_ends: np.ndarray) -> Index:
    """The index of some rows."""
    items = rows["item_id"].combine_chunks().dictionary_encode()
    item = items.indices.to_numpy().astype(np.int32)
    first = np.unique(item, return_index=True)[1]
    category = rows["category"].combine_chunks().dictionary_encode().indices.to_numpy()[first].astype(np.int32)
    return Index(item, category, items.dictionary.to_pylist(), shard_ends)


@ray.remote(**TASK)
def _read_shard(path: str) -> pa.Table:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read(columns=["image", "path"])
    # int64 offsets: a column of 2 GiB and more stays one chunk
    return table.set_column(0, "image", table["image"].cast(pa.large_binary())).combine_chunks()


@ray.remote(**TASK)
def _length(shard: pa.Table) -> int:
    return len(shard)


def keep_decoded(shared: Images, gib: float, size: int, crop_min: float) -> Images:
    """Keep images decoded as well, as many shards of them as go into so much memory. It changes no pixel.

    Args:
        shared: what they are decoded from.
        gib: GiB of the object store that they may take.
        size: side of the model's input, pixels.
        crop_min: of the crops that are to be made of them.

    Raises:
        UserError: the cluster's object store has not so much.
    """
    store = ray.cluster_resources().get("object_store_memory", 0) / 2**30
    if gib > store:
        raise UserError(
            f"--keep-gib {gib:g} is more than the cluster's object store has, {store:.1f} GiB: take less, or give Ray "
            "more by ray start --object-store-memory"
        )
    room, kept = gib * 2**30, list[Any]()
    for shard, needed in zip(
        shared.shards, ray.get([_room.remote(s, size, crop_min) for s in shared.shards]), strict=True
    ):
        kept.append(_decode_shard.remote(shard, size, crop_min) if needed <= room else None)
        room -= needed if kept[-1] else 0
    return dataclasses.replace(shared, kept=kept)


@dataclass(frozen=True)
class Decoded:
    """The decoded images of a shard, one after the other."""

    pixels: np.ndarray
    """uint8, of all"""
    starts: np.ndarray
    """(n,) where each begins"""
    photos: np.ndarray
    """(n, 3) width and height of each photo, and the reduction at which it is decoded"""

    def __getitem__(self, row: int) -> images.Kept:
        width, height, reduction = map(int, self.photos[row])
        h, w, start = -(-height // reduction), -(-width // reduction), int(self.starts[row])
        return images.Kept(width, height, reduction, self.pixels[start : start + 3 * h * w].reshape(h, w, 3))


def _photos(shard: pa.Table, size: int, crop_min: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) width, height and most usual reduction of a shard's photos, and the bytes that each takes decoded."""
    photos = np.array([images.usual(encoded.as_py(), size, crop_min) for encoded in shard["image"]])
    return photos, 3 * np.prod(-(-photos[:, :2] // photos[:, 2:]), axis=1)


@ray.remote(**TASK)
def _room(shard: pa.Table, size: int, crop_min: float) -> int:
    """Bytes that a shard takes decoded."""
    return int(_photos(shard, size, crop_min)[1].sum())


@ray.remote(**TASK)
def _decode_shard(shard: pa.Table, size: int, crop_min: float) -> Decoded:
    photos, needed = _photos(shard, size, crop_min)
    ends = np.cumsum(needed)
    pixels, starts = np.empty(ends[-1], np.uint8), ends - needed
    for encoded, photo, start, end in zip(shard["image"], photos, starts, ends, strict=True):
        pixels[start:end] = images.decoded(encoded.as_py(), int(photo[2])).reshape(-1)
    return Decoded(pixels, starts, photos)


@dataclass(frozen=True)
class Recipe:
    """What makes the pixels of a batch, given its step."""

    batch: Batch
    augment: Augment
    seed: int
    size: int
    """side of the model's input, pixels"""


@functools.lru_cache(maxsize=4)
def _plan(index: Any, batch: Batch, seed: int) -> tuple[Plan, np.ndarray]:
    """The plan and the ends of the shards, got once a process."""
    found: Index = ray.get(index)
    return plan_of(found, batch, seed), found.shard_ends


def plan_of(index: Index, batch: Batch, seed: int) -> Plan:
    """The plan of a run on these train images."""
    return Plan(index.item, batch.items, batch.views, seed, index.category, batch.categories)


def batches(
    shared: Images,
    recipe: Recipe,
    first: int,
    last: int,
    rank: int = 0,
    world_size: int = 1,
    tasks: int | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """A worker's part of the steps from `first` to before `last`, in order: step, rows (B,), images (B, size, size, 3).

    Rank r gets the r-th part of each global batch. Pixels, uint8, are drawn from (seed, step, place in the global
    batch), so they depend neither on the number of workers nor on which task decodes. The pipeline runs from the worker
    that reads it: it begins where that one's checkpoint ends, and no process stands between. At most so many `tasks`
    decode at a time, None for as many as the cluster has CPUs for.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    load = functools.partial(_load, shared=shared, recipe=recipe, rank=rank, world_size=world_size)
    steps = _Steps(first, last, recipe.batch.images // world_size, recipe.size)
    # As many blocks as it has tasks: Ray Data would cut them further. And one kind of task, so that steps are counted
    # where they are decoded; processes of their own would hold CPUs to the end
    kind = {"concurrency": tasks, **TASK}
    counted = ray.data.read_datasource(steps, override_num_blocks=max(1, len(steps.tasks)), **kind)
    decoded = counted.map_batches(load, batch_size=None, **kind)
    decoded.context.execution_options.preserve_order = True
    for batch in decoded.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=2):
        yield int(batch["step"][0]), batch["row"][0], batch["image"][0]


class _Steps(ray.data.Datasource):
    """Some steps, in order, as rows with the column `step`, cut into the tasks that are to decode them."""

    def __init__(self, first: int, last: int, images: int, size: int) -> None:
        """Of so many images each, whose side has so many pixels."""
        small = max(1, FIRST_IMAGES // images)
        large = max(1, min(TASK_IMAGES, TASK_MIB * 2**20 // (3 * size**2)) // images)
        then = min(first + FIRST_TASKS * small, last)
        cuts = [*range(first, then, small), *range(then, last, large), last]
        self.tasks = list(itertools.pairwise(cuts))

    def estimate_inmemory_data_size(self) -> int:
        return sum(8 * (end - start) for start, end in self.tasks)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        return [
            ray.data.ReadTask(functools.partial(_counted, start, end), BlockMetadata(end - start, None, None, None))
            for start, end in self.tasks
        ]


def _counted(start: int, end: int) -> list[pa.Table]:
    return [pa.table({"step": np.arange(start, end)})]


def _load(block: dict[str, np.ndarray], shared: Images, recipe: Recipe, rank: int, world_size: int) -> dict[str, Any]:
    """Decode a rank's part of some steps: step (S,), row (S, B), image (S, B, size, size, 3)."""
    plan, shard_ends = _plan(shared.index, recipe.batch, recipe.seed)
    read, kept = _reader(shard_ends, shared.shards, _encoded), _reader(shard_ends, shared.kept, operator.getitem)
    step = block["step"]
    rows = np.stack([plan.batch(int(each)).reshape(world_size, -1)[rank] for each in step])
    place = rank * rows.shape[1]
    pixels = np.empty((*rows.shape, recipe.size, recipe.size, 3), np.uint8)
    for i, part in enumerate(rows):
        pixels[i] = decode(recipe, read, int(step[i]), place, part, kept)
    return {"step": step, "row": rows, "image": pixels}


def decode(
    recipe: Recipe,
    read: Callable[[int], bytes],
    step: int,
    first: int,
    rows: np.ndarray,
    kept: Callable[[int], images.Kept | None] = lambda row: None,
) -> np.ndarray:
    """(B, size, size, 3) uint8 images of rows that stand from `first` on in the step's global batch.

    Args:
        recipe: of the pixels.
        read: row to the encoded image.
        step: of the batch.
        first: place of the first row in it.
        rows: (B,) image rows.
        kept: row to the image as it is kept decoded, or None.
    """
    crop, flip = recipe.augment.crop_min, recipe.augment.flip
    out = np.empty((len(rows), recipe.size, recipe.size, 3), np.uint8)
    for i, row in enumerate(rows):
        rng = np.random.Generator(np.random.SFC64((recipe.seed, step, first + i)))
        out[i] = images.for_training(read(int(row)), recipe.size, crop, flip, rng, kept(int(row)))
    return out


def paths(shared: Images, rows: np.ndarray) -> list[str]:
    """Where the images of some rows lay in the source."""
    read = _reader(ray.get(shared.index).shard_ends, shared.shards, lambda shard, row: shard["path"][row].as_py())
    return [read(int(row)) for row in rows]


def _encoded(shard: pa.Table, row: int) -> bytes:
    encoded: bytes = shard["image"].chunk(0)[row].as_py()
    return encoded


def _reader(shard_ends: np.ndarray, shards: list[Any], of: Callable[[Any, int], Any]) -> Callable[[int], Any]:
    """Row to what a shard has of it; None where there is no shard. A shard is fetched when it is first asked for."""
    fetched: dict[int, Any] = {}

    def read(row: int) -> Any:
        shard = int(np.searchsorted(shard_ends, row, side="right"))
        if shard not in fetched:
            fetched[shard] = None if shards[shard] is None else ray.get(shards[shard])
        start = shard_ends[shard - 1] if shard else 0
        return None if fetched[shard] is None else of(fetched[shard], row - int(start))

    return read


def digest(previous: str, step: int, rows: np.ndarray) -> str:
    """Fingerprint of a stream: chained over (step, rows of the global batch), so equal only for equal streams."""
    return hashlib.sha256(f"{previous} {step} ".encode() + rows.astype(np.int64).tobytes()).hexdigest()[:16]


@ray.remote(**TASK)
def _decode_for_evaluation(shard: pa.Table, preprocess: images.Preprocess) -> np.ndarray:
    return np.stack([images.for_evaluation(encoded.as_py(), preprocess) for encoded in shard["image"]])


@ray.remote(**TASK)
def _joined(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


def decoded(catalogue: Catalogue, splits: tuple[str, ...], preprocess: images.Preprocess) -> Any:
    """Splits decoded for evaluation, once for all workers and trials.

    Returns:
        ObjectRef of (N, size, size, 3) uint8, in the order of the splits' rows.
    """
    paths = [path for split in splits for path in catalogue.shards(split)]
    return _joined.remote(*[_decode_for_evaluation.remote(_read_shard.remote(str(p)), preprocess) for p in paths])
