"""What the trials of a sweep read: for each of its models, and what they read alike put into the object store once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from clipfh.config.experiment import Experiment
from clipfh.config.sweep_file import SweepFile
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import EvaluationImages, Feed, StreamPart, TrainImages, fetch
from clipfh.data.images import Preprocess
from clipfh.data.sampler import make_sampler
from clipfh.model.prompts import notes_on_prompts
from clipfh.sweep.race import Contender, Load
from clipfh.train.inputs import notes_on_singles, prepare_inputs
from clipfh.train.run_inputs import Inputs, ModelKey, model_key


def prepare(
    sweep: SweepFile,
    catalogue: Catalogue,
    contenders: Sequence[Contender],
    load: Load,
    feed: SharingFeed,
) -> dict[ModelKey, Inputs]:
    """What trials of each model read.

    Raises:
        UserError: the largest P that may be drawn is more than the items that some losses of the space leave.
    """
    kept = sweep.placement.keep_gib
    keep_gib: float | Literal["auto"] = "auto" if kept == "auto" else kept / len({each.pixels for each in contenders})
    inputs = {}
    for each in contenders:
        one, start = sweep.only([each.model]), sweep.start(each.model)
        inputs[model_key(start.model)] = _prepare_one(one, catalogue, load(start), feed, keep_gib, each.val_mAP)
    return inputs


def _prepare_one(
    one: SweepFile, catalogue: Catalogue, clip: Any, feed: Feed, keep_gib: float | Literal["auto"], zero_shot: float
) -> Inputs:
    """What all trials of a sweep with one model read. UserError: as `prepare`."""
    widest = max(one.corners("batch.items"), key=lambda point: one.experiment(point).batch.items)
    inputs = prepare_inputs(catalogue, one.experiment({**widest, **one.texted}), clip, feed, keep_gib)
    fewest = one.experiment({**widest, **one.paired})
    images, singles = inputs.images, fewest.loss.takes_singles
    make_sampler(fetch(images.index), fewest.batch, fewest.seed, singles, images.window)
    return dataclasses.replace(inputs, start_val_mAP=None if inputs.weights is None else zero_shot)


def prepare_larger(
    experiments: Iterable[Experiment], catalogue: Catalogue, load: Load, feed: SharingFeed
) -> dict[ModelKey, Inputs]:
    """What runs of these experiments read, whose images are larger than those of the search."""
    # Of the experiments of a model one that learns from prompts, if there is one, so that the others' inputs have them
    by_model = {model_key(each.model): each for each in sorted(experiments, key=lambda each: each.loss.takes_text)}
    return {key: prepare_inputs(catalogue, each, load(each), feed) for key, each in by_model.items()}


def notes(sweep: SweepFile, catalogue: Catalogue, inputs: Mapping[ModelKey, Inputs]) -> list[str]:
    """What to tell people of items and prompts that count for less, each line once."""
    starts = {label: sweep.start(label) for label in sweep.contenders}
    lines = [
        note + (f" ({label})" if len(inputs) > 1 else "")
        for label, start in starts.items()
        for note in notes_on_singles(inputs[model_key(start.model)], start.loss)
    ]
    prompts = {note: None for start in starts.values() for note in notes_on_prompts(catalogue, start)}
    return list(dict.fromkeys([*lines, *(f"note: {note}" for note in prompts)]))


class SharingFeed:
    """A feed of one catalogue that holds once what several models read alike: images, and those of a size decoded.

    Args:
        feed: what holds them.
        window: number of images in a window that the sweep began with; None where it begins now, as its settings ask.
        runs: number of trials at a time.
    """

    def __init__(self, feed: Feed, window: int | None = None, runs: int = 1) -> None:
        self.feed, self.window, self.runs = feed, window, runs
        self._held: dict[tuple[Any, ...], Any] = {}

    def _once(self, make: Callable[[], Any], *key: Any) -> Any:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def share(
        self, catalogue: Catalogue, *splits: str, window: int | Literal["auto"] = "auto", runs: int = 1
    ) -> TrainImages:
        asked = window if self.window is None else self.window
        share = functools.partial(self.feed.share, catalogue, *splits, window=asked, runs=max(runs, self.runs))
        shared: TrainImages = self._once(share, "share", splits, asked)
        self.window = shared.window
        return shared

    def put(self, value: Any) -> Any:
        return self.feed.put(value)

    def spare_gib(self) -> float:
        return self.feed.spare_gib()

    def cache_decoded(self, shared: TrainImages, gib: float, size: int, crop_min: float) -> TrainImages:
        key = ("decoded", gib, size, crop_min)
        cached: TrainImages = self._once(lambda: self.feed.cache_decoded(shared, gib, size, crop_min), *key)
        return cached

    def decode_for_evaluation(
        self, catalogue: Catalogue, splits: tuple[str, ...], preprocess: Preprocess
    ) -> EvaluationImages:
        geometry = (preprocess.size, preprocess.interpolation, preprocess.resize_mode)
        make = self.feed.decode_for_evaluation
        images: EvaluationImages = self._once(
            lambda: make(catalogue, splits, preprocess), "evaluation", splits, *geometry
        )
        return images

    def batches(self, part: StreamPart) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        return self.feed.batches(part)
