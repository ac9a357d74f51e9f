"""Which images make the batch of a step: P x K as a pure function of (seed, step)."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipfh import UserError
from clipfh.config.experiment import BatchSettings


@dataclass(frozen=True, eq=False)  # told apart by identity: arrays have no hash
class ItemIndex:
    """What a plan and the losses need to know of the train images. Rows are those of the catalogue's train split."""

    item: np.ndarray
    """(N,) int32 item code of each row"""
    category: np.ndarray
    """(I,) int32 category code of each item"""
    names: list[str]
    """(I,) item ids"""
    shard_ends: np.ndarray
    """(S,) rows up to the end of each shard"""

    @functools.cached_property
    def views(self) -> np.ndarray:
        """(I,) images of each item."""
        return np.bincount(self.item, minlength=len(self.names))

    @functools.cached_property
    def num_single(self) -> int:
        """Items of one image."""
        return int((self.views == 1).sum())


def build_index(rows: pa.Table, shard_ends: np.ndarray) -> ItemIndex:
    """The index of some rows."""
    items = rows["item_id"].combine_chunks().dictionary_encode()
    item = items.indices.to_numpy().astype(np.int32)
    first = np.unique(item, return_index=True)[1]
    category = rows["category"].combine_chunks().dictionary_encode().indices.to_numpy()[first].astype(np.int32)
    return ItemIndex(item, category, items.dictionary.to_pylist(), shard_ends)


class PKSampler:
    """The P x K batches of a run, each a pure function of (seed, step).

    Items come in endless shuffled passes without a pause between them: an item is drawn once a pass, and the P items
    of a batch are distinct, also where a batch spans two passes. The views of an item are drawn in shuffled rounds:
    each is drawn before any repeats, across passes too, and a batch repeats a view only where the item has fewer
    than K.

    Args:
        item: (N,) item code of each image, 0 to I-1.
        items: P, at most I.
        views: K.
        seed: another seed, other batches.
        category: (I,) category code of each item, for grouping.
        categories: about how many categories share a batch; 0 draws items from all.
        singles: draw items of one view too.

    Raises:
        UserError: fewer than P items to draw from.
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
        self.run = max(1, items // categories) if categories else 0
        self.rows = np.argsort(item, kind="stable")
        self.sizes = np.bincount(item)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.drawn = np.flatnonzero(self.sizes >= (1 if singles else 2))
        self._orders: dict[int, np.ndarray] = {}
        which = "train items" if singles else "train items with two photos or more, which the losses need"
        if not len(self.drawn):
            raise UserError(
                f"there are no {which}: give more photos of an item, or switch on loss.ce, loss.center or loss.infonce"
            )
        if self.num_items < items:
            raise UserError(
                f"--batch.items {items} is more than the {self.num_items} {which}: take {self.num_items} or fewer"
            )

    @property
    def num_items(self) -> int:
        """I, the items that batches are drawn from."""
        return len(self.drawn)

    def batch(self, step: int) -> np.ndarray:
        """(P*K,) image rows of the step's batch, the K views of an item side by side."""
        position = step * self.items + np.arange(self.items)
        passes, index = position // self.num_items, position % self.num_items
        items = np.concatenate([self._order(p)[index[passes == p]] for p in np.unique(passes)])
        return self._views(items, passes).reshape(-1)

    def _order(self, number: int) -> np.ndarray:
        """(I,) items in the order of a pass. A batch that began in the pass before repeats none of its items."""
        if number not in self._orders:
            # Only the first P places depend on the pass before; where a pass holds two batches or more, its end
            # therefore does not, and one pass back is far enough. Else go back to a pass that starts a batch.
            back = (
                1 if self.num_items >= 2 * self.items else number % (self.items // math.gcd(self.num_items, self.items))
            )
            order = self._shuffled(max(0, number - back))
            for p in range(max(0, number - back) + 1, number + 1):
                begun = p * self.num_items % self.items
                order = _apart(self._shuffled(p), order[len(order) - begun :], self.items - begun if begun else 0)
            self._orders = {**dict(list(self._orders.items())[-1:]), number: order}
        return self._orders[number]

    def _shuffled(self, number: int) -> np.ndarray:
        """(I,) items shuffled; when grouped, in shuffled runs of one category."""
        rng = np.random.default_rng((self.seed, number))
        order = self.drawn[rng.permutation(self.num_items)]
        if not self.run or self.category is None:
            return order
        order = order[np.argsort(self.category[order], kind="stable")]
        category = self.category[order]
        place = np.arange(len(order)) - np.searchsorted(category, category)
        run = np.cumsum(place % self.run == 0) - 1
        return order[np.argsort(rng.permutation(run[-1] + 1)[run], kind="stable")]

    def _views(self, items: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """(P, K) image rows: of each item the views of its n-th draw.

        The views stand in a ring, shuffled anew once every view was drawn equally often at the end of a draw. So
        K neighbours are distinct, and the order of the rings needs no memory of earlier draws.
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
    """The plan of a run on these train images. `singles`: whether its losses take an item's only photo."""
    return PKSampler(index.item, batch.items, batch.views, seed, index.category, batch.categories, singles)


def digest(previous: str, step: int, rows: np.ndarray) -> str:
    """Fingerprint of a stream: chained over (step, rows of the global batch), so equal only for equal streams."""
    return hashlib.sha256(f"{previous} {step} ".encode() + rows.astype(np.int64).tobytes()).hexdigest()[:16]


def _apart(order: np.ndarray, begun: np.ndarray, head: int) -> np.ndarray:
    """The order with its first items that are not in `begun` moved to the front, `head` of them."""
    if not head:
        return order
    free = np.flatnonzero(~np.isin(order, begun))[:head]
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
