"""Which images make the batch of a step: P x K as a pure function of (seed, step).

An example: five items 0 to 4 of three images each (item i has the images 3i, 3i + 1, 3i + 2), P = 2, K = 2, seed 0.
Items come in passes; a batch may span two of them:

    pass               0                  |  1                  |  2
    shuffled           2   4   3   0   1  |  1   4   3   0   2  |  4   2   1   0   3
    drawn              2   4   3   0   1  |  4   1   3   0   2  |  4   2   1   0   3     step 2 began with item 1
    step               0---0   1---1   2--|--2   3---3   4---4  |  5---5   6---6   7

The views of an item stand in a shuffled ring, and each draw takes the next K of it. For item 4 the ring is 13 14 12:

    step 0 (draw 0)    [13  14] 12                  P = 2 items at step 2: item 1 as its draw 0, item 4 as its draw 1,
    step 2 (draw 1)     13] 14 [12                  so its batch is 5 3 12 13
    step 5 (draw 2)     13 [14  12]                 each view was drawn twice: for draw 3 the ring is shuffled anew

Where memory does not hold all images, the items of a pass are shuffled within windows of shards; see `windows`.

With neighbours, only the first of the P items come in passes. The others are items that look like them, by a table of
nearest items that the run makes at its reports: P = 4, of which 2 are neighbours, and near to 2 are 3 and 0, to 4 is 3:

    from the pass      2   4                        as above, with P = 2
    beside them                3   1                3 is near to 2; for 4 nothing near is left, so one at random
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipfh import UserError
from clipfh.config.experiment import BatchSettings
from clipfh.data.windows import Window, WindowPlan


@dataclass(frozen=True, eq=False)
class ItemRows:
    """Where the images of each item are."""

    starts: np.ndarray
    """(I + 1,) place at which the images of each item begin, among images grouped by item."""
    rows: np.ndarray | None
    """(N,) row of the image at each place; None where each row is at its own place, as in a train split."""

    @classmethod
    def of(cls, item: np.ndarray) -> ItemRows:
        """Group rows (N,) by their item codes."""
        starts = np.concatenate([[0], np.cumsum(np.bincount(item))])
        return cls(starts, None if (item[1:] >= item[:-1]).all() else np.argsort(item, kind="stable"))

    def sizes(self, items: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Number of images of items."""
        return self.starts[1:][items] - self.starts[:-1][items]

    def at(self, places: np.ndarray) -> np.ndarray:
        """Rows of the images at places."""
        return places if self.rows is None else self.rows[places]

    def of_items(self, items: np.ndarray) -> np.ndarray:
        """Rows of all images of items."""
        return self.at(_ranges(self.starts[items], self.sizes(items)))


@dataclass(frozen=True, eq=False)  # compared by identity: arrays have no hash
class ItemIndex:
    """Items and categories of the train images, as the sampler and the losses need them.

    Rows are the rows of the catalogue's train split, in its order.
    """

    item: np.ndarray
    """(N,) int32 item code of each row."""
    category: np.ndarray
    """(I,) int32 category code of each item."""
    names: Any
    """(I,) item ids: pa.Array of strings, or any sequence of them."""
    shard_ends: np.ndarray
    """(S,) number of rows up to the end of each shard."""

    @functools.cached_property
    def rows(self) -> ItemRows:
        """Where the images of each item are."""
        return ItemRows.of(self.item)

    @property
    def views(self) -> np.ndarray:
        """(I,) number of images of each item."""
        return self.rows.sizes()

    @functools.cached_property
    def num_single(self) -> int:
        """Number of items with one image."""
        return int((self.views == 1).sum())


def build_index(rows: pa.Table, shard_ends: np.ndarray) -> ItemIndex:
    """Make the index of catalogue rows, which lie in shards that end at `shard_ends`.

    Items and categories are numbered in the order of their first rows.
    """
    item, names = _codes(rows["item_id"])
    category, _ = _codes(rows["category"])
    first = np.flatnonzero(np.diff(np.maximum.accumulate(item), prepend=-1))
    index = ItemIndex(item, category[first], names, shard_ends)
    index.rows  # noqa: B018  made now, it is shared with the rest and not made again in each process
    return index


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """int32 code of each value, and the values in the order of their codes, which is that of their first rows."""
    encoded = column.dictionary_encode().unify_dictionaries()
    codes = [chunk.indices.to_numpy() for chunk in encoded.chunks]
    names = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], pa.string())
    return np.concatenate([np.zeros(0, np.int32), *codes]).astype(np.int32, copy=False), names


class PKSampler:
    """The P x K batches of a run, each a pure function of (seed, step).

    Items come in endless shuffled passes without a pause between them: an item is drawn once in a pass, and the P items
    of a batch are distinct, also where a batch spans two passes. The views of an item are drawn in shuffled rounds:
    each view is drawn before any view repeats, across passes too. A batch repeats a view only where its item has fewer
    than K views.

    Args:
        item: (N,) item code of each image, 0 to I-1. For windows, items are numbered in the order of their first rows.
        items: P, at most I.
        views: K.
        seed: seed of all shuffling.
        category: (I,) category code of each item, for grouping.
        categories: approximate number of categories in a batch; 0 does not group items.
        singles: whether items with one view are drawn too.
        window: number of images in a window, about; 0 makes all shards one window.
        shard_ends: (S,) number of images up to the end of each shard; only windows need it.
        rows: where the images of each item are, if at hand.
        neighbours: number of the P items that are neighbours of the others, and do not come from the passes.

    Raises:
        UserError: there are fewer than P items to draw from.
    """

    def __init__(
        self,
        item: np.ndarray,
        items: int,
        views: int,
        seed: int = 0,
        category: np.ndarray | None = None,
        categories: int = 0,
        singles: bool = True,
        window: int = 0,
        shard_ends: np.ndarray | None = None,
        rows: ItemRows | None = None,
        neighbours: int = 0,
    ) -> None:
        self.items, self.views, self.seed, self.neighbours = items - neighbours, views, seed, neighbours
        self.category = category
        self.run_length = max(1, items // categories) if categories else 0
        self.rows, self.fewest_views = rows or ItemRows.of(item), 1 if singles else 2
        self.shard_ends = np.array([len(item)]) if shard_ends is None else shard_ends
        # The items of shard s begin there: numbers item_ends[s] to item_ends[s + 1]
        self.item_ends = _item_ends(self.rows, self.shard_ends) if window else np.array([0, len(self.rows.starts) - 1])
        drawable = _count_in(self.rows.sizes() >= self.fewest_views, self.item_ends)
        images = np.diff(self.shard_ends, prepend=0) if window else np.array([len(item)])
        self.num_items = int(drawable.sum())
        """I, the number of items that batches are drawn from."""
        self.plan = WindowPlan(images, drawable, window, 2 * items, seed)
        self._orders: dict[Window, np.ndarray] = {}
        kind = "train items" if singles else "train items with two photos or more, which the losses need"
        if self.num_items < 2:
            raise UserError(
                f"there are {self.num_items or 'no'} {kind}, and a batch holds two or more: give more photos of an "
                "item, or switch on loss.ce, loss.center or loss.infonce"
            )
        if self.num_items < items:
            raise UserError(
                f"--batch.items {items} is more than the {self.num_items} {kind}: take {self.num_items} or fewer"
            )
        if neighbours and window:
            raise UserError(
                "--batch.neighbours takes items from anywhere, and this catalogue is read in windows of "
                f"{window:,} images: leave it out, or give --batch.window 0"
            )

    def batch(self, step: int, nearest: np.ndarray | None = None) -> np.ndarray:
        """(P*K,) image rows of the step's batch, the K views of an item side by side.

        Args:
            step: number of the step.
            nearest: (I, k) numbers of the items near to each item, the nearest first, -1 for none; only neighbours
                need it. Without it, random items take their places.
        """
        parts, passes = zip(*(self._draw_items(*part) for part in self._parts(step)), strict=True)
        items = np.concatenate(parts)
        # An item is drawn once a pass: its n-th draw is in pass n
        rows = self._draw_views(items, np.concatenate(passes)).reshape(-1)
        if not self.neighbours:
            return rows
        beside = self._draw_neighbours(step, items, nearest)
        return np.concatenate([rows, self._draw_views(beside, np.full(len(beside), step)).reshape(-1)])

    def _draw_neighbours(self, step: int, items: np.ndarray, nearest: np.ndarray | None) -> np.ndarray:
        """More items for the batch: for each of its items in turn the nearest that it lacks, else a random one."""
        rng, batch, beside = np.random.default_rng((self.seed, step, 0, 3)), set(items.tolist()), list[int]()
        for item in itertools.islice(itertools.cycle(items.tolist()), self.neighbours):
            near = nearest[item] if nearest is not None else np.zeros(0, np.int64)
            near = near[(near >= 0) & (self.rows.sizes(near) >= self.fewest_views)].tolist()
            at_random = (int(rng.choice(self._all_drawable)) for _ in itertools.count())
            beside.append(next(other for other in itertools.chain(near, at_random) if other not in batch))
            batch.add(beside[-1])
        return np.array(beside)

    @functools.cached_property
    def _all_drawable(self) -> np.ndarray:
        return np.flatnonzero(self.rows.sizes() >= self.fewest_views)

    def windows(self, step: int) -> list[Window]:
        """The windows that the step's batch lies in, in order."""
        return [window for window, _ in self._parts(step)]

    def shards(self, window: Window) -> np.ndarray:
        """The shards that hold the images of a window's items."""
        return np.unique(np.searchsorted(self.shard_ends, self.rows.of_items(self._drawable(window)), side="right"))

    def following(self, window: Window) -> Window:
        """The window that comes after another."""
        return self.plan.following(window)

    def _parts(self, step: int) -> list[tuple[Window, np.ndarray]]:
        """The windows of the step's batch, and the places in each that it takes.

        Step s takes the places s P to s P + P - 1 of the endless row of items.
        """
        parts, position = [], step * self.items + np.arange(self.items)
        passes, index = position // self.num_items, position % self.num_items
        for number in np.unique(passes).tolist():
            ends = self.plan.windows(number).item_ends
            place = index[passes == number]
            window = np.searchsorted(ends, place, side="right")
            for w in np.unique(window).tolist():
                parts.append(((number, w), place[window == w] - (ends[w - 1] if w else 0)))
        return parts

    def _draw_items(self, window: Window, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items at places of a window, and for each the number of the pass."""
        return self._order(window)[places], np.full(len(places), window[0])

    def _order(self, window: Window) -> np.ndarray:
        """The items of a window in their order. A batch that spans this pass and the one before has distinct items."""
        if window not in self._orders:
            order = self._shuffle_items(window) if window[1] else self._first_order(window[0])
            self._orders = {**dict(list(self._orders.items())[-1:]), window: order}
        return self._orders[window]

    def _first_order(self, number: int) -> np.ndarray:
        """The items of a pass's first window in their order, which depends on the end of the pass before."""
        # Only the first P places depend on the pass before; where a pass holds two batches or more, its end
        # therefore does not, and one pass back is far enough. Else go back to a pass that starts a batch.
        cycle = self.items // math.gcd(self.num_items, self.items)
        first = max(0, number - (1 if self.num_items >= 2 * self.items else number % cycle))
        order = self._shuffle_items((first, 0))
        for p in range(first + 1, number + 1):
            in_last_pass = p * self.num_items % self.items  # items of the spanning batch that the last pass gave
            place = len(self.plan.windows(p - 1).item_ends) - 1
            last = self._shuffle_items((p - 1, place)) if place else order
            tail, head = last[len(last) - in_last_pass :], self.items - in_last_pass if in_last_pass else 0
            order = _move_apart(self._shuffle_items((p, 0)), tail, head)
        return order

    def _drawable(self, window: Window) -> np.ndarray:
        """The items of a window, in the order of their numbers."""
        shards = np.sort(self.plan.windows(window[0]).shards_of(window[1]))
        items = _ranges(self.item_ends[shards], self.item_ends[shards + 1] - self.item_ends[shards])
        return items[self.rows.sizes(items) >= self.fewest_views]

    def _shuffle_items(self, window: Window) -> np.ndarray:
        """The items of a window in shuffled order; with grouping, in shuffled runs of one category."""
        rng = np.random.default_rng((self.seed, *window))  # window 0 of a pass draws as (seed, pass) alone does
        drawable = self._drawable(window)
        order = drawable[rng.permutation(len(drawable))]
        if not self.run_length or self.category is None:
            return order
        order = order[np.argsort(self.category[order], kind="stable")]
        category = self.category[order]
        place = np.arange(len(order)) - np.searchsorted(category, category)
        run = np.cumsum(place % self.run_length == 0) - 1
        return order[np.argsort(rng.permutation(run[-1] + 1)[run], kind="stable")]

    def _draw_views(self, items: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """(P, K) image rows: the views of items at their n-th draws, n given by `draws` (P,).

        The views of an item stand in a ring. It is shuffled anew after V / gcd(V, K) draws of an item with V views,
        when a draw ends at the ring's end: then all views were drawn equally often. So K neighbours are distinct, and
        a draw follows from its number, without a memory of earlier draws.
        """
        sizes = self.rows.sizes(items)
        draws_a_ring = sizes // np.gcd(sizes, self.views)
        ring, offset = draws // draws_a_ring, draws % draws_a_ring * self.views
        owner = np.repeat(np.arange(len(items)), sizes)
        view = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        keys = _hash(self.seed, items[owner], ring[owner], view)
        shuffled = view[np.lexsort((keys, owner))]
        place = (offset[:, None] + np.arange(self.views)) % sizes[:, None]
        views = shuffled[(np.cumsum(sizes) - sizes)[:, None] + place]
        return self.rows.at(self.rows.starts[items][:, None] + views)


def make_sampler(index: ItemIndex, batch: BatchSettings, seed: int, singles: bool, window: int = 0) -> PKSampler:
    """The sampler of a run on these train images.

    Args:
        index: items of the train images.
        batch: P, K and the grouping.
        seed: seed of all shuffling.
        singles: whether the run's losses take an item's only photo.
        window: number of images in a window, about; 0 makes one window.
    """
    arguments = batch.items, batch.views, seed, index.category, batch.categories, singles
    return PKSampler(index.item, *arguments, window, index.shard_ends, index.rows, batch.num_neighbours)


def worker_slice(images: int, rank: int, world_size: int) -> slice:
    """The places of worker `rank` in a batch of `images` images. Workers' parts differ by one image at most."""
    return slice(rank * images // world_size, (rank + 1) * images // world_size)


def digest(previous: str, step: int, rows: np.ndarray) -> str:
    """Fingerprint of the stream so far: `previous`, the fingerprint before this step, chained with the step's rows.

    Two runs have the same fingerprint only where all their steps had the same global batches.
    """
    return hashlib.sha256(f"{previous} {step} ".encode() + rows.astype(np.int64).tobytes()).hexdigest()[:16]


def _item_ends(rows: ItemRows, shard_ends: np.ndarray) -> np.ndarray:
    """(S + 1,) number of items that begin before each shard, and of all: an item begins with its first image."""
    return np.concatenate([[0], np.searchsorted(rows.at(rows.starts[:-1]), shard_ends)])


def _count_in(mask: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(S,) number of true values in each of the S stretches between `ends` (S + 1,)."""
    counts = np.add.reduceat(np.append(mask, False), ends[:-1], dtype=np.int64)  # a stretch of nothing gets a value too
    return np.where(np.diff(ends) > 0, counts, 0)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whole numbers of several ranges, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _move_apart(order: np.ndarray, tail: np.ndarray, head: int) -> np.ndarray:
    """The order with its first `head` items that are not in `tail` moved to the front."""
    if not head:
        return order
    free = np.flatnonzero(~np.isin(order, tail))[:head]
    return np.concatenate([order[free], np.delete(order, free)])


def _hash(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 hash of integers, elementwise: the finaliser of SplitMix64 (Steele et al., 2014) over each part."""
    value = np.zeros(1, np.uint64)
    for part in parts:
        value = value + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return value
