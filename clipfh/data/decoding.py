"""The images of a batch for training: where they lie encoded, and how they are decoded.

Who decodes what, in a run of two workers with P x K = 4 x 2 and a catalogue of three shards of 512 rows:

    object store            shard 0: rows 0-511    shard 1: rows 512-1023    shard 2: rows 1024-1535     (encoded, once)
    step 7 of the sampler   rows 12 14 | 700 703 | 1500 1501 | 90 91                       a task works this out itself
    rank 0 of 2             rows 12 14   700 703            fetches shards 0 and 1, decodes 4 images at places 0 to 3
    rank 1 of 2             rows 1500 1501   90 91          fetches shards 2 and 0, decodes 4 images at places 4 to 7

Where the object store does not hold all shards, it has the shards of two windows (`windows`); all else is the same.
The crop of a row is drawn from (seed, step, place), so one worker with all eight rows would make the same pixels.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from clipfh.config.experiment import AugmentSettings, BatchSettings, Experiment
from clipfh.data import images
from clipfh.data.catalogue import Catalogue, read_columns
from clipfh.data.images import Preprocess
from clipfh.data.sampler import ItemIndex, PKSampler, build_index, make_sampler, worker_slice
from clipfh.data.windows import Window, WindowReader
from clipfh.storage import store


def fetch(handle: Any) -> Any:
    """The value of a handle: of a reference into Ray's object store, of a future, or else the handle itself."""
    if isinstance(handle, Future):
        return handle.result()
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
    """pa.Table with the columns `image` and `path`, each in one chunk; with windows the path of each shard's file."""
    decoded: list[Any]
    """DecodedShard of each shard, None for a shard that is not cached decoded; empty where no shard is."""
    window: int = 0
    """Number of images in a window, about; 0 where all shards are held."""


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
    """One worker's part of the steps from `first` to before `last`: rank r of W gets the r-th part of each batch. Some
    ranks get an image more where W does not divide the batch."""

    images: TrainImages
    spec: BatchSpec
    first: int
    last: int
    rank: int = 0
    world_size: int = 1
    tasks: int | None = None
    """Largest number of tasks that decode at a time; None leaves it to the feed."""
    nearest: Any = None
    """np.ndarray (I, k), or its handle: the items near to each item, for a batch's neighbours"""
    takes_cpus: bool = True
    """whether tasks take CPUs of the cluster; False where the worker has reserved CPUs for them"""


EVALUATION_SHARE = 0.15
"""Largest share of memory that decoded images for evaluation take."""

READ_AHEAD = 3
"""Shards that are decoded ahead for evaluation."""


class EvaluationImages:
    """Images decoded for evaluation: `images[start:stop]` is (n, size, size, 3) uint8.

    Args:
        ends: (S,) number of images up to the end of each shard.
        shards: handles of the shards' decoded images, where these are kept; else the paths of the shards' files.
        decode: begins to decode the shard at a path, and returns its handle; None where decoded images are kept.
    """

    def __init__(self, ends: np.ndarray, shards: list[Any], decode: Callable[[str], Any] | None = None) -> None:
        self.ends, self.shards, self.decode = ends, shards, decode
        self.ahead: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
        begins = self.ends[first - 1] if first else 0
        arrays = [self._pixels(shard) for shard in range(first, last + 1)]
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays))[start - begins : stop - begins]

    @classmethod
    def of(
        cls,
        catalogue: Catalogue,
        splits: tuple[str, ...],
        preprocess: Preprocess,
        memory: float,
        decode: Callable[..., Any],
    ) -> EvaluationImages:
        """The images of splits, kept where they take no more than EVALUATION_SHARE of `memory`, bytes.

        `decode` begins to decode the shard at a path by a `preprocess`, and returns its handle.
        """
        paths = [path for split in splits for path in catalogue.shards(split)]
        ends = np.cumsum([store.open_parquet(path).metadata.num_rows for path in paths])
        begin = functools.partial(decode, preprocess=preprocess)
        if ends[-1] * 3 * preprocess.size**2 <= EVALUATION_SHARE * memory:
            return cls(ends, [begin(path) for path in paths])
        return cls(ends, paths, begin)

    def _pixels(self, shard: int) -> np.ndarray:
        if not self.decode:
            return fetch(self.shards[shard])
        coming = range(shard, min(shard + 1 + READ_AHEAD, len(self.shards)))
        self.ahead = {
            each: self.ahead[each] if each in self.ahead else self.decode(self.shards[each]) for each in coming
        }
        return fetch(self.ahead[shard])


class Feed(Protocol):
    """Holds the images that runs read, and gives each worker its batches. The module `stream` does it by Ray Data."""

    def share(
        self, catalogue: Catalogue, *splits: str, window: int | Literal["auto"] = "auto", runs: int = 1
    ) -> TrainImages:
        """Hold the encoded images of splits, once for all runs; with windows, hold their paths.

        Args:
            catalogue: the catalogue to read.
            splits: names of the splits.
            window: number of images in a window; 0 for all in one, "auto" for what memory allows.
            runs: number of runs that read them at a time.
        """

    def put(self, value: Any) -> Any:
        """Hold a value; returns its handle, as `fetch` takes."""

    def spare_gib(self) -> float:
        """GiB of memory that decoded images may take where the settings do not say."""

    def cache_decoded(self, shared: TrainImages, gib: float, size: int, crop_min: float) -> TrainImages:
        """Cache decoded images besides, as many shards as fit into `gib`. It changes no pixel.

        Args:
            shared: the encoded images.
            gib: memory for decoded images, GiB.
            size: side of the model's input, pixels.
            crop_min: smallest share of a photo's area that a crop takes.

        Raises:
            UserError: there is less memory than `gib`.
        """

    def decode_for_evaluation(
        self, catalogue: Catalogue, splits: tuple[str, ...], preprocess: Preprocess
    ) -> EvaluationImages:
        """The images of splits for evaluation, in the order of the splits' rows.

        They are decoded once and kept, where that takes no more than EVALUATION_SHARE of memory; else they are decoded
        anew whenever they are read.
        """

    def batches(self, part: StreamPart) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The steps of a part, in order: step, rows (N,) of the global batch, images of the worker's part of it.

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
    """Decode rows that have the places from `first` on in a step's global batch: (B, size, size, 3) uint8.

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
    # A place's random numbers do not depend on the number of places after it
    draws = np.random.Generator(np.random.SFC64((spec.seed, step))).random((first + len(rows), images.NUM_DRAWS))
    for i, row in enumerate(rows):
        draw, cached = draws[first + i], decoded(int(row))
        out[i] = images.decode_for_training(read(int(row)), spec.size, crop, flip, draw, cached)
    return out


def open_sampler(images: TrainImages, spec: BatchSpec) -> PKSampler:
    """The sampler of a run's batches, made once in a process."""
    return _cached_sampler(images.index, spec.batch, spec.seed, spec.singles, images.window)


@functools.lru_cache(maxsize=4)
def _cached_sampler(index: Any, batch: BatchSettings, seed: int, singles: bool, window: int) -> PKSampler:
    return make_sampler(fetch(index), batch, seed, singles, window)


def open_windows(part: StreamPart, read: Callable[[Any], Any], ranks: int) -> WindowReader:
    """A reader of the windows of a stream, for its workers. `read` begins to read a shard, and returns its handle.

    Args:
        part: a worker's part of the stream.
        read: function that takes the path of a shard.
        ranks: number of workers that take batches by this reader.
    """
    sampler, shards = open_sampler(part.images, part.spec), part.images.shards
    return WindowReader(sampler.shards, sampler.following, lambda shard: read(shards[shard]), ranks)


class BatchDecoder:
    """Decodes a worker's part of any step's batch. A shard is fetched at its first use, and held.

    Args:
        part: the worker's part.
        open_window: function from a window to its shards' handles, by number; None where all shards are held.
    """

    def __init__(self, part: StreamPart, open_window: Callable[[Window], Mapping[int, Any]] | None = None) -> None:
        self.part, self.sampler, self.nearest = part, open_sampler(part.images, part.spec), fetch(part.nearest)
        decoded = part.images.decoded or [None] * len(self.sampler.shard_ends)
        self.read_decoded = _row_reader(self.sampler.shard_ends, decoded, operator.getitem)
        self.open_window = open_window
        self.windows: tuple[Window, ...] | None = None

    def __call__(
        self, step: int, share_out: Callable[..., Iterable[np.ndarray]] = map, parts: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (N,) of the global batch, and images (B, size, size, 3) uint8 of the worker's part of it.

        `share_out` applies a function to each of `parts` parts of these images, as `map` does.
        """
        rows = self.sampler.batch(step, self.nearest)
        own = worker_slice(len(rows), self.part.rank, self.part.world_size)
        self._open(*(self.sampler.windows(step) if self.open_window else ()))

        def decode(places: np.ndarray) -> np.ndarray:
            return decode_batch(self.part.spec, self.read, step, places[0], rows[places], self.read_decoded)

        places = [part for part in np.array_split(np.arange(own.start, own.stop), parts) if len(part)]
        return rows, np.concatenate(list(share_out(decode, places)))

    def _open(self, *windows: Window) -> None:
        """Let `read` read rows of these windows. Steps of the same windows share the shards that it fetched.

        Earlier windows are let go at once: a cache of functions would hold them until Python collects its garbage.
        """
        if windows != self.windows:
            shards: Any = self.part.images.shards
            if self.open_window:
                shards = dict(itertools.chain.from_iterable(self.open_window(window).items() for window in windows))
            self.windows, self.read = windows, _row_reader(self.sampler.shard_ends, shards, _read_encoded)


def read_paths(shared: TrainImages, rows: np.ndarray) -> list[str]:
    """The paths in the source of the images of these rows."""

    def path(shard: pa.Table | str, row: int) -> str:
        table = read_columns(shard, ["path"]) if isinstance(shard, str) else shard
        return str(table["path"][row].as_py())

    read = _row_reader(fetch(shared.index).shard_ends, shared.shards, path)
    return [read(int(row)) for row in rows]


def _read_encoded(shard: pa.Table, row: int) -> bytes:
    encoded: bytes = shard["image"].chunk(0)[row].as_py()
    return encoded


def _row_reader(shard_ends: np.ndarray, shards: Any, get: Callable[[Any, int], Any]) -> Callable[[int], Any]:
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
    """Read the index of the images of splits. Ids and categories become codes shard by shard."""
    names = ["item_id", "category"]
    tables = [read_columns(path, names) for split in splits for path in catalogue.shards(split)]
    coded = [pa.table({name: table[name].dictionary_encode() for name in names}) for table in tables]
    return build_index(pa.concat_tables(coded), np.cumsum([table.num_rows for table in tables]))


def read_shard(path: str) -> pa.Table:
    """Read a shard's encoded images and their paths in the source."""
    table = store.open_parquet(path).read(columns=["image", "path"])
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
    photos, sizes = _plan_decoding(shard, size, crop_min)
    ends = np.cumsum(sizes)
    pixels, starts = np.empty(ends[-1], np.uint8), ends - sizes
    for encoded, photo, start, end in zip(shard["image"], photos, starts, ends, strict=True):
        pixels[start:end] = images.decode(encoded.as_py(), int(photo[2])).reshape(-1)
    return DecodedShard(pixels, starts, photos)


def decode_shard_for_evaluation(shard: pa.Table, preprocess: Preprocess) -> np.ndarray:
    """Decode a shard's images for evaluation: (n, size, size, 3) uint8."""
    return np.stack([images.decode_for_evaluation(encoded.as_py(), preprocess) for encoded in shard["image"]])
