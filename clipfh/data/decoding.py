"""The images of a batch for training: where they lie encoded, and how they are decoded.

Who decodes what, in a run of two workers with P x K = 4 x 2 and a catalogue of three shards of 512 rows:

    object store            shard 0: rows 0-511    shard 1: rows 512-1023    shard 2: rows 1024-1535     (encoded, once)
    step 7 of the sampler   rows 12 14 | 700 703 | 1500 1501 | 90 91                       a task works this out itself
    rank 0 of 2             rows 12 14   700 703            fetches shards 0 and 1, decodes 4 images at places 0 to 3
    rank 1 of 2             rows 1500 1501   90 91          fetches shards 2 and 0, decodes 4 images at places 4 to 7

The crop of a row is drawn from (seed, step, place), so the pixels are those that one worker with all eight rows makes.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfh.config.experiment import AugmentSettings, BatchSettings, Experiment
from clipfh.data import images
from clipfh.data.catalogue import Catalogue
from clipfh.data.images import Preprocess
from clipfh.data.sampler import ItemIndex, PKSampler, build_index, make_sampler


def fetch(handle: Any) -> Any:
    """The value of a handle: of a reference into Ray's object store, or else the handle itself."""
    ray = sys.modules.get("ray")
    return ray.get(handle) if ray and isinstance(handle, ray.ObjectRef) else handle


@dataclass(frozen=True)
class TrainImages:
    """The train images: in Ray's object store, shared without copies by all tasks, workers and trials, or in memory.

    Each part is an object or Ray's reference to one, as `fetch` takes.
    """

    index: Any
    """ItemIndex."""
    shards: list[Any]
    """pa.Table with the columns `image` and `path`, each in one chunk."""
    decoded: list[Any]
    """DecodedShard of each shard, None for a shard that is not cached decoded."""


@dataclass(frozen=True)
class DecodedShard:
    """The decoded images of a shard, one after the other."""

    pixels: np.ndarray
    """uint8, the pixels of all images."""
    starts: np.ndarray
    """(n,) index in `pixels` at which each image begins."""
    photos: np.ndarray
    """(n, 3) width and height of each photo, and the reduction at which it is decoded."""

    def __getitem__(self, row: int) -> images.DecodedPhoto:
        width, height, reduction = map(int, self.photos[row])
        h, w, start = -(-height // reduction), -(-width // reduction), int(self.starts[row])
        return images.DecodedPhoto(width, height, reduction, self.pixels[start : start + 3 * h * w].reshape(h, w, 3))


@dataclass(frozen=True)
class BatchSpec:
    """The settings that a batch's rows and pixels depend on, besides its step."""

    batch: BatchSettings
    augment: AugmentSettings
    seed: int
    size: int
    """Side of the model's input, pixels."""
    singles: bool
    """Whether items with one photo take part."""

    @classmethod
    def of(cls, experiment: Experiment, size: int) -> BatchSpec:
        """The settings of an experiment, for images of this size."""
        return cls(experiment.batch, experiment.augment, experiment.seed, size, experiment.loss.takes_singles)


@dataclass(frozen=True)
class StreamPart:
    """One worker's part of the steps from `first` to before `last`: rank r of W gets the r-th part of each batch."""

    images: TrainImages
    spec: BatchSpec
    first: int
    last: int
    rank: int = 0
    world_size: int = 1
    tasks: int | None = None
    """Largest number of tasks that decode at a time; None leaves it to the feed."""


class Feed(Protocol):
    """Holds the images that runs read, and gives each worker its batches. The module `stream` does it by Ray Data."""

    def share(self, catalogue: Catalogue, *splits: str) -> TrainImages:
        """Hold the encoded images of splits, once for all runs."""

    def put(self, value: Any) -> Any:
        """Hold a value; returns its handle, as `fetch` takes."""

    def cache_decoded(self, shared: TrainImages, gib: float, size: int, crop_min: float) -> TrainImages:
        """Cache images decoded too, as many shards of them as fit into the memory given. It changes no pixel.

        Args:
            shared: the encoded images.
            gib: memory for decoded images, GiB.
            size: side of the model's input, pixels.
            crop_min: smallest share of a photo's area that a crop takes.

        Raises:
            UserError: there is less memory than that.
        """

    def decode_for_evaluation(self, catalogue: Catalogue, splits: tuple[str, ...], preprocess: Preprocess) -> Any:
        """Decode splits for evaluation: a handle of (N, size, size, 3) uint8, in the order of the splits' rows."""

    def batches(self, part: StreamPart) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The steps of a part, in order: step, rows (W * B,) of the global batch, images of the worker's part of it.

        Images are (B, size, size, 3) uint8. Their crops are drawn from (seed, step, place in the global batch), so the
        pixels depend neither on the number of workers nor on the task that decodes them.
        """


def decode_batch(
    spec: BatchSpec,
    read: Callable[[int], bytes],
    step: int,
    first: int,
    rows: np.ndarray,
    decoded: Callable[[int], images.DecodedPhoto | None] = lambda row: None,
) -> np.ndarray:
    """Decode rows that stand in a step's global batch from place `first` on: (B, size, size, 3) uint8.

    Args:
        spec: settings of the batch.
        read: function from a row to its encoded image.
        step: number of the batch.
        first: place of the first row in the global batch.
        rows: (B,) image rows.
        decoded: function from a row to its cached decoded image, or None.
    """
    crop, flip = spec.augment.crop_min, spec.augment.flip
    out = np.empty((len(rows), spec.size, spec.size, 3), np.uint8)
    for i, row in enumerate(rows):
        rng = np.random.Generator(np.random.SFC64((spec.seed, step, first + i)))
        out[i] = images.decode_for_training(read(int(row)), spec.size, crop, flip, rng, decoded(int(row)))
    return out


@functools.lru_cache(maxsize=4)
def _cached_sampler(index: Any, batch: BatchSettings, seed: int, singles: bool) -> tuple[PKSampler, np.ndarray]:
    """The sampler and the ends of the shards, made once in a process."""
    fetched: ItemIndex = fetch(index)
    return make_sampler(fetched, batch, seed, singles), fetched.shard_ends


class BatchDecoder:
    """Decodes a worker's part of any step's batch. A shard is fetched at its first use, and held."""

    def __init__(self, part: StreamPart) -> None:
        spec, shared = part.spec, part.images
        self.sampler, shard_ends = _cached_sampler(shared.index, spec.batch, spec.seed, spec.singles)
        self.read_encoded = _row_reader(shard_ends, shared.shards, _read_encoded)
        self.read_decoded = _row_reader(shard_ends, shared.decoded, operator.getitem)
        self.part = part

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (W * B,) of the global batch, and images (B, size, size, 3) uint8 of the worker's part of it."""
        rows = self.sampler.batch(step)
        own = rows.reshape(self.part.world_size, -1)[self.part.rank]
        first = self.part.rank * len(own)
        return rows, decode_batch(self.part.spec, self.read_encoded, step, first, own, self.read_decoded)


def read_paths(shared: TrainImages, rows: np.ndarray) -> list[str]:
    """The paths in the source of the images of these rows."""
    read = _row_reader(fetch(shared.index).shard_ends, shared.shards, lambda shard, row: shard["path"][row].as_py())
    return [read(int(row)) for row in rows]


def _read_encoded(shard: pa.Table, row: int) -> bytes:
    encoded: bytes = shard["image"].chunk(0)[row].as_py()
    return encoded


def _row_reader(shard_ends: np.ndarray, shards: list[Any], get: Callable[[Any, int], Any]) -> Callable[[int], Any]:
    """Function from a row of the split to `get(shard, row in the shard)`, or to None where its shard is None.

    A shard is fetched at its first use.
    """
    fetched: dict[int, Any] = {}

    def read(row: int) -> Any:
        shard = int(np.searchsorted(shard_ends, row, side="right"))
        if shard not in fetched:
            fetched[shard] = None if shards[shard] is None else fetch(shards[shard])
        start = shard_ends[shard - 1] if shard else 0
        return None if fetched[shard] is None else get(fetched[shard], row - int(start))

    return read


def read_index(catalogue: Catalogue, *splits: str) -> ItemIndex:
    """Read the index of the images of splits."""
    rows = pa.concat_tables([catalogue.rows(split) for split in splits])
    lengths = [pq.read_metadata(path).num_rows for split in splits for path in catalogue.shards(split)]
    return build_index(rows, np.cumsum(lengths))


def read_shard(path: str) -> pa.Table:
    """Read a shard's encoded images and their paths in the source."""
    table = pq.ParquetFile(path).read(columns=["image", "path"])
    # int64 offsets: a column of 2 GiB and more stays one chunk
    return table.set_column(0, "image", table["image"].cast(pa.large_binary())).combine_chunks()


def _plan_decoding(shard: pa.Table, size: int, crop_min: float) -> tuple[np.ndarray, np.ndarray]:
    """Width, height and usual reduction of a shard's photos (n, 3), and the bytes (n,) that each takes decoded."""
    photos = np.array([images.usual_reduction(encoded.as_py(), size, crop_min) for encoded in shard["image"]])
    return photos, 3 * np.prod(-(-photos[:, :2] // photos[:, 2:]), axis=1)


def decoded_bytes(shard: pa.Table, size: int, crop_min: float) -> int:
    """Number of bytes that a shard's images take decoded."""
    return int(_plan_decoding(shard, size, crop_min)[1].sum())


def decode_shard(shard: pa.Table, size: int, crop_min: float) -> DecodedShard:
    """Decode a shard's images, each at the scale that most of its crops need."""
    photos, needed = _plan_decoding(shard, size, crop_min)
    ends = np.cumsum(needed)
    pixels, starts = np.empty(ends[-1], np.uint8), ends - needed
    for encoded, photo, start, end in zip(shard["image"], photos, starts, ends, strict=True):
        pixels[start:end] = images.decode(encoded.as_py(), int(photo[2])).reshape(-1)
    return DecodedShard(pixels, starts, photos)


def decode_shard_for_evaluation(shard: pa.Table, preprocess: Preprocess) -> np.ndarray:
    """Decode a shard's images for evaluation: (n, size, size, 3) uint8."""
    return np.stack([images.decode_for_evaluation(encoded.as_py(), preprocess) for encoded in shard["image"]])
