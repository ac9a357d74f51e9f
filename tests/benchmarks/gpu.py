"""What only a GPU shows: images a second, use of the device, memory against P x K, several trials on one GPU.

Run: python tests/benchmarks/gpu.py [--model ViT-B/16] [--out gpu.json]

Random weights, drawn photos, the image stage. Without a GPU it takes the small model and small sizes: that shows that
the script works, not how fast a GPU is. What is measured in memory runs in a process of its own, which frees the device
when it ends; what fails is a row with the reason.

Prints one table as it goes and writes its rows: a list of {name, value, unit, note}; value is null where there is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipfh import batches, catalogue, cluster, config, demo, estimate, fit, model, runs, stream, train
from clipfh.catalogue import Catalogue
from clipfh.learner import Captions, Learner

MOST = 1024
"""images of the largest batch tried"""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    value: float | None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Size:
    """What is measured, so that it takes minutes on the device."""

    model: str
    gpu: bool
    items: int
    """P of the timed steps"""
    views: int
    """K of all batches"""
    chunk: int
    """images that go through the towers at a time, with gradient caching"""
    largest: int
    """images of the largest batch whose memory is measured"""
    matrix: int
    """side of the matrices that the device's peak is measured by"""
    seconds: float
    """of timed steps"""
    run: int
    """images of a run on the stream"""
    photos: int
    """items drawn for the stream"""
    side: int
    """of the drawn photos, pixels"""

    def experiment(self, **settings: Any) -> config.Experiment:
        """The image stage with these settings, dots written as double underscores."""
        usual = {"model.name": self.model, "model.pretrained": "none", "batch.items": self.items}
        changed = {name.replace("__", "."): value for name, value in settings.items()}
        return config.resolve("image", None, {**usual, "batch.views": self.views, **changed})


def size_of(name: str | None) -> Size:
    """Large sizes on a GPU, small ones on a CPU."""
    if torch.cuda.is_available():
        return Size(name or "ViT-B/16", True, 64, 4, 64, MOST, 8192, 5.0, 32_000, 300, 256)
    name = name or config.SMALL
    few = 8 if name == config.SMALL else 2
    return Size(name, False, few, 4, 32, 128, 1024, 1.0, 200 * few, 80, 96)


def rows(size: Size) -> Iterator[Row]:
    """All measurements."""
    with tempfile.TemporaryDirectory() as made:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{made}/compiled"  # a compiler that finds its work done shows nothing
        peak = yield from _peak_rows(size)
        for compiled in (False, True):
            for precision in ("float32", "bfloat16"):
                name = _step_name(precision, compiled)
                yield from _alone(name, _steps, size, precision, compiled, peak)
        for way in _ways(size):
            yield from _alone(f"memory, {way}", _memory, size, way)
        yield from _streamed(size, Path(made))


def _alone(name: str, work: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """A section's rows, from a process of its own."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work, *args).result()
    except Exception as error:
        return [_failed(name, error)]


def _failed(name: str, error: BaseException) -> Row:
    return Row(name, None, note=" ".join(f"{type(error).__name__}: {error}".split())[:200])


# --- In memory -------------------------------------------------------------------------------------------------------


def _peak_rows(size: Size) -> Generator[Row, None, float]:
    """What the device computes at most; returns it in FLOP/s, 0 where it is not known."""
    found = _alone("peak", _peak, size)
    yield from found
    return max((1e12 * row.value for row in found if row.value), default=0.0)


def _peak(size: Size) -> list[Row]:
    """TFLOP/s of a large product of matrices."""
    device = model.device()
    on = torch.cuda.get_device_name() if size.gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(size.matrix, size.matrix, device=device, dtype=dtype)
        rate = 2 * size.matrix**3 * _rate(partial(torch.matmul, a, a), size)
        side = f"{size.matrix:,}"
        found.append(
            Row(f"peak: {str(dtype).removeprefix('torch.')} product, {side} x {side}", rate / 1e12, "TFLOP/s", on)
        )
    return found


def _rate(work: Callable[[], Any], size: Size) -> float:
    """How often a second some work is done; once before it counts."""
    work()
    _wait()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < size.seconds:
        work()
        count += 1
        if count % 4 == 0:
            _wait()
    _wait()
    return count / (time.perf_counter() - begun)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _learner(size: Size, items: int, **settings: Any) -> tuple[Learner, Callable[[], Any]]:
    """A learner, and its training step on a batch of so many made-up items in memory."""
    experiment = size.experiment(batch__items=items, **settings)
    count = experiment.batch.images
    names = [str(number) for number in range(items)]
    index = batches.Index(np.arange(items).repeat(size.views), np.zeros(items, int), names, np.array([count]))
    captions = Captions(np.zeros((1, 1), np.int32), np.full(items, -1))
    learner = Learner(experiment, train.start_of(experiment), index, captions, model.device())
    side = model.preprocess_of(learner.clip).size
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    return learner, lambda: learner.train_step(np.arange(count), pixels)


def _step_name(precision: str, compiled: bool) -> str:
    return f"step, {precision}{', compiled' * compiled}"


def _steps(size: Size, precision: str, compiled: bool, peak: float) -> list[Row]:
    """Images a second of the training step, and the share of the device's peak that it uses."""
    learner, step = _learner(size, size.items, model__precision=precision, model__compile=compiled)
    flops = _flops(learner, step)
    begun = time.perf_counter()
    step()
    _wait()
    first = time.perf_counter() - begun
    rate = _rate(step, size)
    name, batch = _step_name(precision, compiled), f"P {size.items} x K {size.views}"
    images = learner.experiment.batch.images
    found = [Row(f"{name}: images/s in memory", rate * images, "images/s", f"{size.model}, {batch}")]
    if peak:
        each = f"{flops / images / 1e9:.1f} GFLOP an image; of the largest of the peaks above"
        found.append(Row(f"{name}: use of the device", rate * flops / peak, "of peak", each))
    return [*found, Row(f"{name}: the first step, compiling", first, "s")] if compiled else found


def _flops(learner: Learner, step: Callable[[], Any]) -> int:
    """Floating point operations of a step, forward and backward, which the counter sees without the compiler."""
    usual, learner.forward = learner.forward, learner.towers
    with FlopCounterMode(display=False) as counter:
        step()
    learner.forward = usual
    return int(counter.get_total_flops())


def _ways(size: Size) -> dict[str, dict[str, Any]]:
    """Ways to save memory, and their settings."""
    chunked = {f"chunks of {size.chunk}": {"batch__chunk": size.chunk}}
    return {"plain": {}, "checkpointing": {"model__checkpointing": True}, **chunked}


def _memory(size: Size, way: str) -> list[Row]:
    """Most memory that a step takes, the batch doubled until it does not fit."""
    found, items = [], 32 // size.views
    while (count := items * size.views) <= size.largest:
        name = f"memory, {way}: P {items} x K {size.views}"
        try:
            found.append(_taken(size, items, name, way))
        except torch.OutOfMemoryError:
            return [*found, Row(name, None, note=f"{count} images do not fit")]
        gc.collect()
        torch.cuda.empty_cache()
        items *= 2
    return found


def _taken(size: Size, items: int, name: str, way: str) -> Row:
    """Peak memory of steps on a batch; of the whole process on a CPU, which only grows."""
    if size.gpu:
        torch.cuda.reset_peak_memory_stats()
    _, step = _learner(size, items, **_ways(size)[way])
    rate = items * size.views * _rate(step, dataclasses.replace(size, seconds=size.seconds / 4))
    return Row(name, estimate._peak(model.device()) / 2**30, "GiB", f"{rate:,.0f} images/s")


# --- On the stream ---------------------------------------------------------------------------------------------------


def _streamed(size: Size, folder: Path) -> Iterator[Row]:
    """Runs as `clipfh train` makes them, on a cluster of this machine: one, then several on one GPU."""
    try:
        demo.write_source(folder / "photos", items=size.photos, seed=0, size=size.side)
        opened = catalogue.prepare(folder / "photos", folder / "catalogue")
        cluster.connect("local")
    except Exception as error:
        yield _failed("stream", error)
        return
    try:
        alone = yield from _run_rows(size, opened, folder)
        for count in (2, 4):
            yield _several(size, opened, folder, count, alone)
    finally:
        cluster.disconnect()


def _run_rows(size: Size, opened: Catalogue, folder: Path) -> Generator[Row, None, float]:
    """One run; returns its images a second, 0 where it failed."""
    try:
        (lines,) = _fitted(size, opened, folder / "alone", 1)
    except Exception as error:
        yield _failed("stream", error)
        return 0.0
    usual = f"{size.model}, precision auto"
    loop, wait = (mean(line[key] for line in lines[1:]) for key in ("images_per_second", "data_wait"))
    yield Row("stream: images/s in the loop", loop, "images/s", usual)
    yield Row("stream: share of the time waiting for images", wait, "of time")
    rate = _together([lines])
    yield Row(_runs_name(1), rate, "images/s", "evaluations and checkpoints included, here and below")
    return rate


def _runs_name(count: int) -> str:
    return f"{count} trial{'s' * (count > 1)} at once: images/s of all"


def _several(size: Size, opened: Catalogue, folder: Path, count: int, alone: float) -> Row:
    """Runs that share a GPU."""
    name = _runs_name(count)
    if not size.gpu:
        return Row(name, None, note="skipped: there is no GPU to share")
    try:
        rate = _together(_fitted(size, opened, folder / f"shared-{count}", count))
    except Exception as error:
        return _failed(name, error)
    return Row(name, rate, "images/s", f"{rate / alone:.2f} times those of one" if alone else "")


def _fitted(size: Size, opened: Catalogue, folder: Path, count: int) -> list[list[dict[str, Any]]]:
    """Reports of runs, so many at once, each with its share of the GPU."""
    experiment = size.experiment(budget__images=size.run, budget__report_every=size.run // 8)
    resources = cluster.place(config.Placement(gpus_per_worker=1 / count if size.gpu else 0, cpus_per_worker=1))
    outs = [folder / str(number) for number in range(count)]
    clip, *_ = (train.begin(out, experiment, opened)[0] for out in outs)
    inputs = train.inputs_of(opened, experiment, clip, stream)
    with ThreadPoolExecutor(count) as pool:
        fitting = [pool.submit(fit.fit, experiment, inputs, out, resources, name=str(out)) for out in outs]
        for each in fitting:
            each.result()
    return [runs.read_metrics(out) for out in outs]


def _together(runs: Sequence[list[dict[str, Any]]]) -> float:
    """Images a second of all runs, while all of them train; each run's first report waits for the stream to fill."""
    first = max(lines[0]["time"] for lines in runs)
    last = min(lines[-1]["time"] for lines in runs)
    assert first < last, "they did not train at the same time"
    seen = 0.0
    for lines in runs:
        times, images = ([line[key] for line in lines] for key in ("time", "images"))
        seen += float(np.interp(last, times, images) - np.interp(first, times, images))
    return seen / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: ViT-B/16 on a GPU, clipfh-small on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the rows as JSON")
    args = parser.parse_args()
    size = size_of(args.model)
    if not size.gpu:
        print(f"no GPU here: {size.model} at small sizes on the CPU")
    found = []
    for row in rows(size):
        print(f"{row.name:50} {_shown(row.value):>8} {row.unit:8}  {row.note}".rstrip(), flush=True)
        found.append(dataclasses.asdict(row))
    args.out.write_text(json.dumps(found, indent=2) + "\n")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
