"""Windows: the shards of a catalogue that lie in memory at the same time, where memory does not hold all of them.

An example: six shards A to F of two items each, windows of two shards, P = 3 items in a batch:

    pass                0                        |  1
    shards, shuffled    C   A  |  F   B  |  E  D  |  B   C  |  ...
    window              0, 0   |  0, 1   |  0, 2  |  1, 0   |  ...
    items, shuffled     a C A c|  f B b F|  d D e E  c B b C|  ...        shuffled within their window
    batches             -----  ----  ----  ----  -----  ----              P x K; one may lie in two windows
    in memory           0, 0 and 0, 1  |  0, 1 and 0, 2  |  0, 2 and 1, 0     the window in use, and the next one

A shard is read once a pass. An item belongs to the shard of its first image, and so to one window: where an item lies
on two shards, both are read with that window.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Window = tuple[int, int]
"""Number of a pass, and place of a window in it."""

WHOLE, PART = 0.5, 0.15
"""Largest share of memory that a catalogue takes as one window, and share that each window of a larger one takes."""


def choose_window(setting: int | Literal["auto"], images: int, size: int, memory: float, runs: float = 1) -> int:
    """Number of images in a window; 0 where all images make one window.

    Args:
        setting: number of images in a window, as the settings have it.
        images: number of all images.
        size: bytes of all images.
        memory: bytes of memory for what runs read.
        runs: number of runs that share the memory at a time. Each has windows of its own.
    """
    fitting = 0 if size <= WHOLE * memory else max(1, int(images * PART * memory / runs / size))
    window = fitting if setting == "auto" else setting
    return window if window < images else 0


@dataclass(frozen=True)
class Pass:
    """The windows of a pass."""

    shards: np.ndarray
    """(S,) shards in the order of the pass."""
    shard_ends: np.ndarray
    """(W,) number of shards up to the end of each window."""
    item_ends: np.ndarray
    """(W,) number of items up to the end of each window."""

    def shards_of(self, window: int) -> np.ndarray:
        """The shards whose items make a window."""
        return self.shards[self.shard_ends[window - 1] if window else 0 : self.shard_ends[window]]


class WindowPlan:
    """The windows of each pass, a pure function of (seed, pass). The shards are shuffled and then cut.

    Args:
        images: (S,) number of images in each shard.
        items: (S,) number of items that begin in each shard.
        size: number of images in a window, about; 0 makes one window.
        fewest: smallest number of items in a window, where there are two or more.
        seed: seed of the shuffling.
    """

    def __init__(self, images: np.ndarray, items: np.ndarray, size: int, fewest: int, seed: int) -> None:
        self.images, self.items, self.fewest, self.seed = images, items, fewest, seed
        self.count = math.ceil(int(images.sum()) / size) if size else 1
        self._passes: dict[int, Pass] = {}

    def windows(self, number: int) -> Pass:
        """The windows of a pass."""
        if number not in self._passes:
            # Two are kept: a batch may lie in two passes
            self._passes = {**dict(list(self._passes.items())[-1:]), number: self._cut(number)}
        return self._passes[number]

    def _cut(self, number: int) -> Pass:
        """Shuffle the shards and cut them into windows of about equally many images, each with enough items.

        A cut that would leave too few items before or after it is left out.
        """
        order = np.random.default_rng((self.seed, number, 0, 1)).permutation(len(self.images))
        images, items = np.cumsum(self.images[order]), np.cumsum(self.items[order])
        cuts = np.searchsorted(images, images[-1] / self.count * np.arange(1, self.count)) if self.count > 1 else []
        places = [-1]
        for cut in cuts:
            before = items[places[-1]] if places[-1] >= 0 else 0
            if items[cut] - before >= self.fewest and items[-1] - items[cut] >= self.fewest:
                places.append(int(cut))
        ends = np.array([*places[1:], len(order) - 1])
        return Pass(order, ends + 1, items[ends])

    def following(self, window: Window) -> Window:
        """The window that comes after another."""
        number, place = window
        return (number, place + 1) if place + 1 < len(self.windows(number).item_ends) else (number + 1, 0)


class WindowReader:
    """Holds the shards of the windows that batches come from, and reads the next window meanwhile.

    A shard is read when a window with it is opened, and let go with its last window. Threads may call it.

    Args:
        shards: function from a window to the shards that hold its items.
        following: function from a window to the next one.
        read: begins to read a shard, and returns its handle.
        ranks: number of workers that take batches. A window is let go when all of them are past it.
    """

    def __init__(
        self,
        shards: Callable[[Window], np.ndarray],
        following: Callable[[Window], Window],
        read: Callable[[int], Any],
        ranks: int = 1,
    ) -> None:
        self.shards, self.following, self.read, self.ranks = shards, following, read, ranks
        self.handles: dict[Window, dict[int, Any]] = {}
        self.places: dict[int, Window] = {}
        self.lock = threading.Lock()

    def is_near(self, rank: int, window: Window) -> bool:
        """Whether a window is at most two after the one that a worker's batches have reached."""
        return rank in self.places and window <= self.following(self.following(self.places[rank]))

    def open(self, window: Window) -> Mapping[int, Any]:
        """Shard to handle of a window."""
        with self.lock:
            return self._open(window)

    def move(self, rank: int, window: Window) -> None:
        """Note that a worker's batches have reached a window: the worker needs no earlier one any more."""
        with self.lock:
            self.places[rank] = window
            first = min(self.places.values())
            if len(self.places) == self.ranks:
                last = self.following(self.following(first))  # those beyond are of a pass that began anew
                self.handles = {each: shards for each, shards in self.handles.items() if first <= each <= last}
                self._open(first)
                self._open(self.following(first))

    def _open(self, window: Window) -> dict[int, Any]:
        if window not in self.handles:
            handles = dict(itertools.chain.from_iterable(shards.items() for shards in self.handles.values()))
            numbers = self.shards(window).tolist()
            self.handles[window] = {each: handles[each] if each in handles else self.read(each) for each in numbers}
        return self.handles[window]
