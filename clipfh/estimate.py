"""What a sweep will take, from a few real steps on made-up images: time, memory, and the largest batch that fits."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from dataclasses import dataclass
from itertools import product

import numpy as np
import psutil
import torch

from clipfh import batches, config, embed, model, train
from clipfh.catalogue import Catalogue
from clipfh.learner import Learner
from clipfh.space import Sweep

SMALL, LARGE = 4, 16
"""Items of the two batches measured, of VIEWS views each; fewer where the catalogue has fewer."""
VIEWS = 2


@dataclass(frozen=True)
class Measured:
    """A training step on one device."""

    device: str
    rate: float
    """images per second"""
    image: float
    """bytes that each image of a batch takes at the peak"""
    rest: float
    """bytes that a step takes beside"""
    memory: float
    """bytes that there are"""

    @property
    def images(self) -> int:
        """Images of the largest batch that fits, or of the largest chunk."""
        return max(0, int((self.memory - self.rest) / self.image))


@embed.enough_memory
def measure(
    catalogue: Catalogue, experiment: config.Experiment, threads: int = 0, gpus: float | None = None
) -> Measured:
    """Train two steps each of a small and a larger batch, here. Peaks of memory only grow, so the small one is first.

    `gpus` is what this process was given, as `model.device` takes it.

    Raises:
        UserError: weights or prompts that do not fit.
    """
    if threads:
        torch.set_num_threads(threads)
    device = model.device(gpus)
    peaks, seconds = [], 0.0
    index = _index(catalogue)
    drawn = len(index.names) - (0 if experiment.loss.takes_singles else index.num_single)
    items = [max(2, min(count, drawn)) for count in (SMALL, LARGE)]  # of fewer than two the plan says what is wrong
    for count in items:
        learner = _learner(catalogue, experiment, index, count, device)
        for _ in range(2):
            seconds = _step(learner, device)
        peaks.append(_peak(device))
    first, last = (VIEWS * count for count in items)
    image = max(1.0, (peaks[1] - peaks[0]) / max(1, last - first))
    return Measured(str(device), last / seconds, image, peaks[0] - first * image, _memory(device))


def _index(catalogue: Catalogue) -> batches.Index:
    return batches.index_of(catalogue.rows("train"), np.array([catalogue.num_images("train")]))


def epoch(catalogue: Catalogue, experiment: config.Experiment) -> int:
    """Images in a pass over all that is trained on."""
    index = _index(catalogue)
    return batches.budget_of(experiment, len(index.item), index.num_single).epoch


def _learner(
    catalogue: Catalogue, experiment: config.Experiment, index: batches.Index, items: int, device: torch.device
) -> Learner:
    captions, _ = train.captions_of(catalogue, index.names, experiment, "train")
    batch = dataclasses.replace(experiment.batch, items=items, views=VIEWS, chunk=0)
    small = dataclasses.replace(experiment, batch=batch)
    return Learner(small, train.start_of(small), index, captions, device)


def _step(learner: Learner, device: torch.device) -> float:
    """Seconds of one step."""
    experiment = learner.experiment
    plan = batches.plan_of(learner.index, experiment.batch, 0, experiment.loss.takes_singles)
    rows = plan.batch(learner.step)
    size = model.preprocess_of(learner.clip).size
    pixels = np.random.default_rng(0).integers(0, 256, (len(rows), size, size, 3), np.uint8)
    start = time.perf_counter()
    learner.train_step(rows, pixels)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(device: torch.device) -> float:
    """Most bytes held so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _memory(device: torch.device) -> float:
    """Bytes for a run to take: of the GPU, or what is free of the machine's."""
    return float(torch.cuda.mem_get_info()[1] if device.type == "cuda" else psutil.virtual_memory().available)


def told(sweep: Sweep, measured: Measured, epoch: int) -> str:
    """The estimate for a person. `epoch`: images in a pass over all that is trained on."""
    budget = sweep.experiment(sweep.first).budget
    most = budget.images or int(budget.epochs * epoch)
    seen = images_of_a_trial(sweep, most)
    hours = sweep.trials * seen / measured.rate / 3600
    again = sweep.final.top * sweep.final.seeds + sweep.final.refit
    lines = [
        f"{sweep.trials} trials of {most:,} images at most" + (f", {seen:,.0f} on average" if seen < most else ""),
        f"measured on {measured.device}: {measured.rate:,.0f} images/s, {measured.image / 2**20:.1f} MiB an image and "
        f"{measured.rest / 2**30:.1f} GiB beside, of {measured.memory / 2**30:.0f} GiB",
        *_batches(sweep, measured),
        f"about {_time(hours)} of one worker like this one; several trials at once share it out",
    ]
    if again:
        lines.insert(3, f"then {again} runs of {most:,} images: about {_time(again * most / measured.rate / 3600)}")
    return "\n".join(lines)


def images_of_a_trial(sweep: Sweep, most: float) -> float:
    """Images that a trial sees on average: one in `reduction` goes on from each rung."""
    rung, share, seen, before = float(sweep.halving.first_rung), 1.0, 0.0, 0.0
    while rung and rung < most:
        seen, before = seen + share * (rung - before), rung
        rung, share = rung * sweep.halving.reduction, share / sweep.halving.reduction
    return seen + share * (most - before)


def _batches(sweep: Sweep, measured: Measured) -> list[str]:
    """Which of the P x K that may be drawn fit."""
    names = [name for name in ("batch.items", "batch.views") if name in sweep.search]
    ends = product(*(sweep.search[name].ends for name in names))
    drawn = {sweep.experiment({**sweep.first, **dict(zip(names, each, strict=True))}).batch for each in ends}
    on_one = {batch: (batch.chunk or batch.images) / sweep.placement.workers for batch in drawn}
    fit = [batch for batch in drawn if on_one[batch] <= measured.images]
    largest = max(fit, key=lambda batch: batch.images, default=None)
    found = f"largest P x K that fits: {largest.items} x {largest.views}" if largest else "no P x K of the space fits"
    if len(fit) == len(drawn):
        return [f"{found}, the largest of the space ({measured.images:,} images would)"]
    return [f"{found}, and not all of the space: take the larger out, or give --batch.chunk {measured.images // 2}"]


def _time(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 100 else f"{hours / 24:.0f} days"
