"""The images of a batch for training: where they lie encoded, and how their pixels come about."""

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
from clipfh.data.sampler import ItemIndex, PKSampler, build_index, make_sampler


def fetch(handle: Any) -> Any:
    """What a handle stands for: an object in Ray's store, or else the handle itself."""
    ray = sys.modules.get("ray")
    return ray.get(handle) if ray and isinstance(handle, ray.ObjectRef) else handle


@dataclass(frozen=True)
class Images:
    """The train images: in Ray's object store, shared without copies by all tasks, workers and trials, or in memory.

    Each part is an object or Ray's reference to one, as `fetch` takes.
    """

    index: Any
    """Index"""
    shards: list[Any]
    """pa.Table with the columns `image` and `path`, each in one chunk"""
    kept: list[Any]
    """Decoded of each shard, None for those there was no room for"""


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


@dataclass(frozen=True)
class Recipe:
    """What makes the pixels of a batch, given its step."""

    batch: BatchSettings
    augment: AugmentSettings
    seed: int
    size: int
    """side of the model's input, pixels"""
    singles: bool
    """whether items of one photo take part"""

    @classmethod
    def of(cls, experiment: Experiment, size: int) -> Recipe:
        """The recipe of an experiment, for images of a size."""
        return cls(experiment.batch, experiment.augment, experiment.seed, size, experiment.loss.takes_singles)


class Feed(Protocol):
    """What holds the images that runs read, and gives each worker its batches: `stream` by Ray Data."""

    def share(self, catalogue: Catalogue, *splits: str) -> Images:
        """The encoded images of some splits, held once for all runs."""

    def put(self, value: Any) -> Any:
        """A handle of a value, as `fetch` takes."""

    def keep_decoded(self, shared: Images, gib: float, size: int, crop_min: float) -> Images:
        """The images with as many shards of them kept decoded as go into so much memory. It changes no pixel.

        Args:
            shared: what they are decoded from.
            gib: GiB that they may take.
            size: side of the model's input, pixels.
            crop_min: of the crops that are to be made of them.

        Raises:
            UserError: there is not so much.
        """

    def decoded(self, catalogue: Catalogue, splits: tuple[str, ...], preprocess: images.Preprocess) -> Any:
        """A handle of splits decoded for evaluation: (N, size, size, 3) uint8, in the order of the splits' rows."""

    def batches(
        self,
        shared: Images,
        recipe: Recipe,
        first: int,
        last: int,
        rank: int = 0,
        world_size: int = 1,
        tasks: int | None = None,
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """A worker's part of the steps from `first` to before `last`, in order: the step, the rows (W * B,) of its
        global batch, and the images of the worker's part of that.

        Rank r of W gets the r-th part of each global batch. Pixels, (B, size, size, 3) uint8, are drawn from (seed,
        step, place in the global batch), so they depend neither on the number of workers nor on who decodes. At most so
        many `tasks` decode at a time; None leaves it to the feed.
        """


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


@functools.lru_cache(maxsize=4)
def _plan(index: Any, batch: BatchSettings, seed: int, singles: bool) -> tuple[PKSampler, np.ndarray]:
    """The plan and the ends of the shards, made once a process."""
    fetched: ItemIndex = fetch(index)
    return make_sampler(fetched, batch, seed, singles), fetched.shard_ends


class BatchDecoder:
    """A rank's part of any step's batch, decoded. Shards are fetched when they are first asked for, and held."""

    def __init__(self, shared: Images, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        self.plan, shard_ends = _plan(shared.index, recipe.batch, recipe.seed, recipe.singles)
        self.encoded = _reader(shard_ends, shared.shards, _encoded)
        self.kept = _reader(shard_ends, shared.kept, operator.getitem)
        self.recipe, self.rank, self.world_size = recipe, rank, world_size

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (W * B,) of the global batch, and images (B, size, size, 3) uint8 of the rank's part of it."""
        rows = self.plan.batch(step)
        own = rows.reshape(self.world_size, -1)[self.rank]
        return rows, decode(self.recipe, self.encoded, step, self.rank * len(own), own, self.kept)


def paths(shared: Images, rows: np.ndarray) -> list[str]:
    """Where the images of some rows lay in the source."""
    read = _reader(fetch(shared.index).shard_ends, shared.shards, lambda shard, row: shard["path"][row].as_py())
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
            fetched[shard] = None if shards[shard] is None else fetch(shards[shard])
        start = shard_ends[shard - 1] if shard else 0
        return None if fetched[shard] is None else of(fetched[shard], row - int(start))

    return read


def index(catalogue: Catalogue, *splits: str) -> ItemIndex:
    """The index of some splits' images."""
    rows = pa.concat_tables([catalogue.rows(split) for split in splits])
    lengths = [pq.read_metadata(path).num_rows for split in splits for path in catalogue.shards(split)]
    return build_index(rows, np.cumsum(lengths))


def read_shard(path: str) -> pa.Table:
    """A shard's encoded images and where they lay in the source."""
    table = pq.ParquetFile(path).read(columns=["image", "path"])
    # int64 offsets: a column of 2 GiB and more stays one chunk
    return table.set_column(0, "image", table["image"].cast(pa.large_binary())).combine_chunks()


def _photos(shard: pa.Table, size: int, crop_min: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) width, height and most usual reduction of a shard's photos, and the bytes that each takes decoded."""
    photos = np.array([images.usual(encoded.as_py(), size, crop_min) for encoded in shard["image"]])
    return photos, 3 * np.prod(-(-photos[:, :2] // photos[:, 2:]), axis=1)


def room(shard: pa.Table, size: int, crop_min: float) -> int:
    """Bytes that a shard's images take decoded."""
    return int(_photos(shard, size, crop_min)[1].sum())


def keep_shard(shard: pa.Table, size: int, crop_min: float) -> Decoded:
    """A shard's images, decoded at the scale that most crops of them ask for."""
    photos, needed = _photos(shard, size, crop_min)
    ends = np.cumsum(needed)
    pixels, starts = np.empty(ends[-1], np.uint8), ends - needed
    for encoded, photo, start, end in zip(shard["image"], photos, starts, ends, strict=True):
        pixels[start:end] = images.decoded(encoded.as_py(), int(photo[2])).reshape(-1)
    return Decoded(pixels, starts, photos)


def for_evaluation(shard: pa.Table, preprocess: images.Preprocess) -> np.ndarray:
    """(n, size, size, 3) uint8: a shard's images as evaluation has them."""
    return np.stack([images.for_evaluation(encoded.as_py(), preprocess) for encoded in shard["image"]])
