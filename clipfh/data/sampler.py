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
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipfh import UserError
from clipfh.config.experiment import BatchSettings


@dataclass(frozen=True, eq=False)  # compared by identity: arrays have no hash
class ItemIndex:
    """Items and categories of the train images, as the sampler and the losses need them.

    Rows are the rows of the catalogue's train split, in its order.
    """

    item: np.ndarray
    """(N,) int32 item code of each row."""
    category: np.ndarray
    """(I,) int32 category code of each item."""
    names: list[str]
    """(I,) item ids."""
    shard_ends: np.ndarray
    """(S,) number of rows up to the end of each shard."""

    @functools.cached_property
    def views(self) -> np.ndarray:
        """(I,) number of images of each item."""
        return np.bincount(self.item, minlength=len(self.names))

    @functools.cached_property
    def num_single(self) -> int:
        """Number of items with one image."""
        return int((self.views == 1).sum())


def build_index(rows: pa.Table, shard_ends: np.ndarray) -> ItemIndex:
    """Make the index of catalogue rows, which lie in shards that end at `shard_ends`."""
    items = rows["item_id"].combine_chunks().dictionary_encode()
    item = items.indices.to_numpy().astype(np.int32)
    first = np.unique(item, return_index=True)[1]
    category = rows["category"].combine_chunks().dictionary_encode().indices.to_numpy()[first].astype(np.int32)
    return ItemIndex(item, category, items.dictionary.to_pylist(), shard_ends)


class PKSampler:
    """The P x K batches of a run, each a pure function of (seed, step).

    Items come in endless shuffled passes without a pause between them: an item is drawn once in a pass, and the P items
    of a batch are distinct, also where a batch spans two passes. The views of an item are drawn in shuffled rounds:
    each view is drawn before any view repeats, across passes too. A batch repeats a view only where its item has fewer
    than K views.

    Args:
        item: (N,) item code of each image, 0 to I-1.
        items: P, at most I.
        views: K.
        seed: seed of all shuffling.
        category: (I,) category code of each item, for grouping.
        categories: approximate number of categories in a batch; 0 does not group items.
        singles: whether items with one view are drawn too.

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
    ) -> None:
        self.items, self.views, self.seed = items, views, seed
        self.category = category
        self.run_length = max(1, items // categories) if categories else 0
        self.rows = np.argsort(item, kind="stable")
        self.sizes = np.bincount(item)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.drawable = np.flatnonzero(self.sizes >= (1 if singles else 2))
        self._orders: dict[int, np.ndarray] = {}
        kind = "train items" if singles else "train items with two photos or more, which the losses need"
        if not len(self.drawable):
            raise UserError(
                f"there are no {kind}: give more photos of an item, or switch on loss.ce, loss.center or loss.infonce"
            )
        if self.num_items < items:
            raise UserError(
                f"--batch.items {items} is more than the {self.num_items} {kind}: take {self.num_items} or fewer"
            )

    @property
    def num_items(self) -> int:
        """I, the number of items that batches are drawn from."""
        return len(self.drawable)

    def batch(self, step: int) -> np.ndarray:
        """(P*K,) image rows of the step's batch, the K views of an item side by side."""
        # Step s takes the places s P to s P + P - 1 of the endless row of items
        position = step * self.items + np.arange(self.items)
        passes, index = position // self.num_items, position % self.num_items
        items = np.concatenate([self._pass_order(p)[index[passes == p]] for p in np.unique(passes)])
        return self._draw_views(items, passes).reshape(-1)  # an item is drawn once a pass: its n-th draw is in pass n

    def _pass_order(self, number: int) -> np.ndarray:
        """(I,) items in the order of a pass. The batch that spans this pass and the one before has distinct items."""
        if number not in self._orders:
            # Only the first P places depend on the pass before; where a pass holds two batches or more, its end
            # therefore does not, and one pass back is far enough. Else go back to a pass that starts a batch.
            cycle = self.items // math.gcd(self.num_items, self.items)
            first = max(0, number - (1 if self.num_items >= 2 * self.items else number % cycle))
            order = self._shuffle_items(first)
            for p in range(first + 1, number + 1):
                in_last_pass = p * self.num_items % self.items  # items of the spanning batch that the last pass gave
                tail, head = order[len(order) - in_last_pass :], self.items - in_last_pass if in_last_pass else 0
                order = _move_apart(self._shuffle_items(p), tail, head)
            self._orders = {**dict(list(self._orders.items())[-1:]), number: order}
        return self._orders[number]

    def _shuffle_items(self, number: int) -> np.ndarray:
        """(I,) items in the shuffled order of a pass; with grouping, in shuffled runs of one category."""
        rng = np.random.default_rng((self.seed, number))
        order = self.drawable[rng.permutation(self.num_items)]
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
        sizes = self.sizes[items]
        draws_a_ring = sizes // np.gcd(sizes, self.views)
        ring, offset = draws // draws_a_ring, draws % draws_a_ring * self.views
        owner = np.repeat(np.arange(len(items)), sizes)
        view = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        keys = _hash(self.seed, items[owner], ring[owner], view)
        shuffled = view[np.lexsort((keys, owner))]
        place = (offset[:, None] + np.arange(self.views)) % sizes[:, None]
        chosen = shuffled[(np.cumsum(sizes) - sizes)[:, None] + place]
        return self.rows[self.starts[items][:, None] + chosen]


def make_sampler(index: ItemIndex, batch: BatchSettings, seed: int, singles: bool) -> PKSampler:
    """The sampler of a run on these train images. `singles`: whether its losses take an item's only photo."""
    return PKSampler(index.item, batch.items, batch.views, seed, index.category, batch.categories, singles)


def digest(previous: str, step: int, rows: np.ndarray) -> str:
    """Fingerprint of the stream so far: `previous`, the fingerprint before this step, chained with the step's rows.

    Two runs have the same fingerprint only where all their steps had the same global batches.
    """
    return hashlib.sha256(f"{previous} {step} ".encode() + rows.astype(np.int64).tobytes()).hexdigest()[:16]


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
