"""The inputs of a sweep's trials, model by model. What several models read alike is in the object store once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from clipfh.config.experiment import Experiment
from clipfh.config.sweep_file import SweepFile
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import EvaluationImages, Feed, StreamPart, TrainImages, fetch, read_index
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
    """Put the inputs of each model's trials into the feed.

    Raises:
        UserError: the largest P of the space is more than the number of items that some loss of the space can use.
    """
    gib = sweep.placement.keep_gib
    keep_gib: float | Literal["auto"] = "auto" if gib == "auto" else gib / len({each.pixels for each in contenders})
    inputs = {}
    for each in contenders:
        one, start = sweep.only([each.model]), sweep.start(each.model)
        inputs[model_key(start.model)] = _prepare_one(one, catalogue, load(start), feed, keep_gib, each.val_mAP)
    return inputs


def _prepare_one(
    one: SweepFile, catalogue: Catalogue, clip: Any, feed: Feed, keep_gib: float | Literal["auto"], zero_shot: float
) -> Inputs:
    """Put the inputs of one model's trials into the feed. UserError: as `prepare`."""
    widest = max(one.corners("batch.items"), key=lambda point: one.experiment(point).batch.items)
    inputs = prepare_inputs(catalogue, one.experiment({**widest, **one.texted}), clip, feed, keep_gib)
    fewest = one.experiment({**widest, **one.paired})
    images, singles = inputs.images, fewest.loss.takes_singles
    make_sampler(fetch(images.index), fewest.batch, fewest.seed, singles, images.window)
    return dataclasses.replace(inputs, start_val_mAP=None if inputs.weights is None else zero_shot)


def prepare_larger(
    experiments: Iterable[Experiment], catalogue: Catalogue, load: Load, feed: SharingFeed
) -> dict[ModelKey, Inputs]:
    """Put the inputs of experiments whose images are larger than the search's into the feed."""
    # For each model an experiment that learns from prompts, if there is one, so that the others' inputs have them
    by_model = {model_key(each.model): each for each in sorted(experiments, key=lambda each: each.loss.takes_text)}
    return {key: prepare_inputs(catalogue, each, load(each), feed) for key, each in by_model.items()}


def notes(sweep: SweepFile, catalogue: Catalogue, inputs: Mapping[ModelKey, Inputs]) -> list[str]:
    """Notes for people on items and prompts that are not used in full, each line once."""
    starts = {label: sweep.start(label) for label in sweep.contenders}
    lines = [
        note + (f" ({label})" if len(inputs) > 1 else "")
        for label, start in starts.items()
        for note in notes_on_singles(inputs[model_key(start.model)], start.loss)
    ]
    prompts = {note: None for start in starts.values() for note in notes_on_prompts(catalogue, start)}
    return list(dict.fromkeys([*lines, *(f"note: {note}" for note in prompts)]))


class SharingFeed:
    """A feed of one catalogue that holds once what several models read alike: encoded, and decoded to one size.

    Args:
        feed: holds the images.
        window: number of images in a window, as the sweep began; None for a new sweep, where its settings say it.
        runs: number of trials at a time.
    """

    def __init__(self, feed: Feed, window: int | None = None, runs: int = 1) -> None:
        self.feed, self.window, self.runs = feed, window, runs
        self._cache: dict[tuple[Any, ...], Any] = {}

    def _once(self, make: Callable[[], Any], *key: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def share(
        self, catalogue: Catalogue, *splits: str, window: int | Literal["auto"] = "auto", runs: int = 1
    ) -> TrainImages:
        window = window if self.window is None else self.window
        share = functools.partial(self.feed.share, catalogue, window=window, runs=max(runs, self.runs))
        held: TrainImages | None = self._cache.get(("share", splits[:1]))

        def add() -> TrainImages:
            if held is None or held.window:
                return share(*splits)
            others = share(*splits[1:])  # the shards of the first split are there
            return TrainImages(self.feed.put(read_index(catalogue, *splits)), [*held.shards, *others.shards], [])

        shared: TrainImages = self._once(add, "share", splits)
        self.window = shared.window
        return shared

    def put(self, value: Any) -> Any:
        return self.feed.put(value)

    def spare_gib(self) -> float:
        return self.feed.spare_gib()

    def cache_decoded(self, shared: TrainImages, gib: float, size: int, crop_min: float) -> TrainImages:
        key = ("decoded", gib, size, crop_min)
        images: TrainImages = self._once(lambda: self.feed.cache_decoded(shared, gib, size, crop_min), *key)
        return images

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
