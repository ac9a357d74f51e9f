"""What a sweep will take, by a few real steps on made-up images: time, memory, and the largest batch that fits."""

from __future__ import annotations

import dataclasses
import functools
import gc
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
import psutil
import torch

from clipfh.config.experiment import Experiment
from clipfh.config.schedule import make_schedule
from clipfh.config.sweep_file import SweepFile
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import read_index
from clipfh.data.sampler import ItemIndex, make_sampler
from clipfh.learn.learner import ItemCaptions, Learner
from clipfh.model.architecture import find as find_architecture
from clipfh.model.clip import get_preprocess
from clipfh.model.devices import choose_device
from clipfh.retrieval import embed
from clipfh.sweep import finalists
from clipfh.train.inputs import load_start, tokenize_captions

SMALL, LARGE = 8, 32
"""Images of the two batches by which memory is measured, VIEWS of each item."""
VIEWS = 2
STEPS = 2
"""Steps that are timed, after one that is not."""
MARGIN = 0.9
"""Share of the memory to count on: the rest goes to fragments, and to batches with more distinct prompts."""


@dataclass(frozen=True)
class StepCost:
    """What a training step takes on one device."""

    device: str
    images_per_second: float
    image: float
    """bytes that each image of a batch takes at the peak"""
    rest: float
    """bytes that a step takes besides"""
    memory: float
    """bytes that a worker may take"""
    weights: float = 0.0
    """bytes on disk of a model's weights, raw and averaged"""
    checkpoint: float = 0.0
    """bytes on disk of a checkpoint, which has the optimizer's state too"""

    @property
    def images(self) -> int:
        """Images of the largest batch that fits, or of the largest chunk."""
        return max(0, int((self.memory - self.rest) / self.image))


@embed.explains_out_of_memory
def measure(
    catalogue: Catalogue,
    experiment: Experiment,
    threads: int = 0,
    gpus: float | None = None,
    workers: int = 1,
) -> StepCost:
    """Train some steps here. Peaks of memory only grow, so the small batch comes first.

    The speed of a GPU is that of a batch like the experiment's, or of the largest that fits: a small one would only
    show how fast its work is handed over.

    Args:
        catalogue: to train on.
        experiment: its model, prompts and loss count; on a GPU its batch too.
        threads: torch threads; 0 leaves their number as it is.
        gpus: what this process was given, as `choose_device` takes it.
        workers: number of workers of a run.

    Raises:
        UserError: weights or prompts that do not fit.
    """
    if threads:
        torch.set_num_threads(threads)
    device, index = choose_device(gpus), read_index(catalogue, "train")
    make_sampler(index, experiment.batch, experiment.seed, experiment.loss.takes_singles)  # says what does not fit
    captions, _ = tokenize_captions(catalogue, index.names, experiment, find_architecture(experiment.model), "train")
    make = functools.partial(_learner, experiment, index, captions, device)
    memory, peaks, seconds = _memory(device, gpus), [], 0.0
    for images in (SMALL, LARGE):
        gc.collect()  # the learner before would count as this one's
        seconds, sizes = _timed(make(images, 0), images)
        peaks.append(_peak(device))
    image = max(1.0, (peaks[1] - peaks[0]) / (LARGE - SMALL))
    if device.type == "cuda":
        memory = _memory(device, gpus)  # now that all of the context is there
    cost = StepCost(str(device), LARGE / seconds, image, peaks[0] - SMALL * image, memory, *sizes)
    if device.type != "cuda":
        return cost
    chunk, own = experiment.batch.chunk, experiment.batch.images // workers
    images = max(LARGE, (own if chunk else min(own, cost.images)) // VIEWS * VIEWS)
    return dataclasses.replace(cost, images_per_second=images / _timed(make(images, chunk), images)[0])


def epoch(catalogue: Catalogue, experiment: Experiment) -> int:
    """Images in a pass over the train items."""
    index = read_index(catalogue, "train")
    return make_schedule(experiment, len(index.item), index.num_single).epoch_images


def _learner(
    experiment: Experiment,
    index: ItemIndex,
    captions: ItemCaptions,
    device: torch.device,
    images: int,
    chunk: int,
) -> Learner:
    """A learner of `images` images a step, however many the catalogue has."""
    batch = dataclasses.replace(experiment.batch, items=images // VIEWS, views=VIEWS, chunk=chunk, categories=0)
    small = dataclasses.replace(experiment, batch=batch)
    return Learner(small, load_start(small), index, captions, device)


def _timed(learner: Learner, images: int) -> tuple[float, tuple[float, float]]:
    """Seconds of a steady step, and bytes on disk of the learner's weights and of its checkpoints."""
    size = get_preprocess(learner.clip).size
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    rows = np.resize(np.argsort(learner.index.item, kind="stable"), images)  # photos of an item side by side
    learner.train_step(rows, pixels)
    _wait(learner.device)
    start = time.perf_counter()
    for _ in range(STEPS):
        learner.train_step(rows, pixels)
    _wait(learner.device)
    return (time.perf_counter() - start) / STEPS, on_disk(learner)


def on_disk(learner: Learner) -> tuple[float, float]:
    """Bytes of a learner's weights, raw and averaged, and of a checkpoint, which also has AdamW's two moments and
    LoRA's state."""

    def size(tensors: Iterable[torch.Tensor]) -> float:
        return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    raw, averaged = learner.weights()
    weights = size(raw.values()) + size(averaged.values())
    trainable = size(p for group in learner.optimizer.param_groups for p in group["params"] if p.requires_grad)
    adapted = sum(size(part.values()) for part in learner.lora_state().values())
    return weights, weights + 2 * trainable + size(learner.objective.state_dict().values()) + adapted


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device) -> float:
    """Most bytes that were in use so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _memory(device: torch.device, gpus: float | None) -> float:
    """Bytes for a worker to count on: its share of the GPU without what CUDA itself takes, or what the machine has."""
    if device.type != "cuda":
        return MARGIN * psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info()
    overhead = total - free - torch.cuda.memory_reserved()  # by the context, and by others
    return MARGIN * (total * min(1.0, gpus or 1.0) - overhead)


def describe(sweep: SweepFile, cost: StepCost, epoch: int, at_once: int = 1) -> str:
    """The estimate for a person. `epoch`: images in a pass over the train items; `at_once`: trials at a time."""
    budget = sweep.experiment(sweep.first).budget
    most = budget.images or int(budget.epochs * epoch)
    mean = estimate_images(sweep, most)
    hours = sweep.trials * mean / cost.images_per_second / 3600
    again = sweep.final.num_runs
    lines = [
        f"{sweep.trials} trials of {most:,} images at most" + (f", {mean:,.0f} on average" if mean < most else ""),
        f"measured on {cost.device}: {cost.images_per_second:,.0f} images/s, {cost.image / 2**20:.1f} MiB an image and "
        f"{cost.rest / 2**30:.1f} GiB beside, of {cost.memory / 2**30:.1f} GiB to count on",
        *_batches(sweep, cost),
        f"about {_time(hours)} of one worker like this one, which trials at once share out; starts, validations and "
        "checkpoints come on top",
        _disk(sweep, cost, at_once),
    ]
    if again:
        hours, size = again * most / cost.images_per_second / 3600, sweep.final.image_size
        larger = f" at the search's size of images; they have {size} pixels" if size else ""
        lines.insert(3, f"then {again} runs of {most:,} images: about {_time(hours)}{larger}{_more_refits(sweep)}")
    return "\n".join(lines)


def _more_refits(sweep: SweepFile) -> str:
    """Words on the further runs of a refit: a soup is refit run by run."""
    is_more = sweep.final.refit and finalists.may_have_soup(sweep)
    return ", and more where a soup wins, of which each run is refit" if is_more else ""


def estimate_images(sweep: SweepFile, most: float) -> float:
    """Images that a trial sees on average: one in `reduction` goes on from each rung."""
    rung, share, images, before = float(sweep.budget.first_rung), 1.0, 0.0, 0.0
    while rung and rung < most:
        images, before = images + share * (rung - before), rung
        rung, share = rung * sweep.budget.reduction, share / sweep.budget.reduction
    return images + share * (most - before)


def _batches(sweep: SweepFile, cost: StepCost) -> list[str]:
    """Which P x K of the search space fit."""
    names = [name for name in ("batch.items", "batch.views") if name in sweep.search]
    ends = product(*(sweep.search[name].ends for name in names))
    batches = {sweep.experiment({**sweep.first, **dict(zip(names, each, strict=True))}).batch for each in ends}
    workers = sweep.placement.workers
    at_a_time = {batch: min(batch.chunk or batch.images, batch.images / workers) for batch in batches}
    fit = [batch for batch in batches if at_a_time[batch] <= cost.images]
    largest = max(fit, key=lambda batch: batch.images, default=None)
    verdict = f"largest P x K that fits: {largest.items} x {largest.views}" if largest else "no P x K of the space fits"
    if len(fit) == len(batches):
        where = " a worker" if workers > 1 else ""
        return [f"{verdict}, the largest of the space ({cost.images:,} images{where} would)"]
    if cost.images < 2:
        return [f"{verdict}: take model.checkpointing, or a smaller model"]
    return [f"{verdict}, and not all of the space: take the larger out, or give --batch.chunk {cost.images // 2}"]


def _disk(sweep: SweepFile, cost: StepCost, at_once: int) -> str:
    """What the checkpoints take: best and latest of each run, and one more while it is written."""
    final, which = sweep.final, sweep.placement.keep_weights
    again, num_running = final.num_runs, min(at_once, sweep.trials)
    all_of_it = (2 * (sweep.trials + again) + num_running) * cost.checkpoint
    each = f"a checkpoint takes {_gib(cost.checkpoint)}"
    if which == "all":
        return f"{each}; all of them at most {_gib(all_of_it)} (placement.keep_weights all)"
    leaders = max(final.top, min(finalists.num_leaders(sweep), sweep.trials))
    weights = (leaders if which == "leaders" else 1) * cost.weights
    most = weights + max(3 * num_running, 2 * again) * cost.checkpoint
    end = weights + (again if which == "leaders" else min(1, again)) * cost.weights
    return (
        f"{each}; with {num_running} trial{'s' * (num_running > 1)} at once some {_gib(most)} at most, and {_gib(end)} "
        f"at the end (placement.keep_weights {which}; {_gib(all_of_it)} with all)"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"


def _time(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 100 else f"{hours / 24:.0f} days"
