"""What only a GPU shows, by the commands that people give: is it kept busy, and do two trials share it well?

Run: python tests/benchmarks/gpu.py [--out gpu.json]

Random weights and drawn photos: nothing is downloaded. Some four minutes on a GPU. Without one it takes the small model
and small sizes: that shows that the script works, not how fast a GPU is. What fails is a row with the reason.

Prints a table as it goes, and writes it: a list of {name, value, unit, target, ok, note}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL
from clipfh.data import transfer
from clipfh.data.sampler import ItemIndex
from clipfh.demo.source import write_source
from clipfh.learn.learner import Captions, Learner
from clipfh.model.clip import get_preprocess, load_initial_model
from clipfh.storage import run_folder

VIEWS = 4
"""K of all batches"""


@dataclass(frozen=True)
class Size:
    """What is measured, so that it takes minutes."""

    model: str
    light: str
    """a model whose steps take less than the decoding of their images"""
    items: int
    """P of all batches"""
    images: int
    """of a run"""
    matrix: int
    """side of the matrices that the device's peak is measured by"""
    seconds: float
    """of timed steps"""
    photos: int
    """items drawn, of some five photos each"""
    share: float | str
    """of the GPU, for each of two trials"""

    @property
    def settings(self) -> dict[str, Any]:
        """Of all runs, in memory too."""
        budget = {"budget.images": self.images, "budget.report_every": self.images // 4}
        return {"model.pretrained": "none", "batch.items": self.items, "batch.views": VIEWS, **budget}


ON_GPU = Size("ViT-B/16", "ViT-B/32", 64, 25_600, 8192, 5.0, 300, 0.5)
ON_CPU = Size(SMALL_MODEL, SMALL_MODEL, 8, 640, 512, 0.5, 60, "auto")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    value: float | None
    unit: str = ""
    target: float | None = None
    """the least that will do"""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the target is reached, or there is none."""
        return self.value is not None and (self.target is None or self.value >= self.target)


def rows(size: Size, folder: Path) -> Iterator[Row]:
    """All measurements. Each notes its images a second for the next ones to compare with."""
    rates: dict[str, float] = {}
    for measure in (_in_memory, _loop, _kept, _ingest, _two_trials):
        try:
            yield from measure(size, folder, rates)
        except Exception as error:
            yield Row(
                measure.__name__.strip("_"), None, note=" ".join(f"{type(error).__name__}: {error}".split())[:200]
            )


# --- In memory -------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Training steps on a batch that lies on the device."""

    rate: float
    """images per second"""
    first: float
    """seconds of the first one"""
    flops: int
    """of an image, forward and backward"""
    peak: float
    """FLOP/s of a large product of matrices in bfloat16"""


def _in_memory(size: Size, folder: Path, rates: dict[str, float]) -> Iterator[Row]:
    plain, compiled = (_alone(partial(_steps, size, compile)) for compile in (False, True))
    rates["memory"] = plain.rate
    what = f"{size.model}, {size.items * VIEWS} images a step"
    yield Row("peak: a product of matrices in bfloat16", plain.peak / 1e12, "TFLOP/s")
    yield Row("step: images/s, on tensors in memory", plain.rate, "images/s", note=what)
    each = f"{plain.flops / 1e9:.0f} GFLOP an image"
    yield Row("step: share of the peak", plain.rate * plain.flops / plain.peak, "", 0.5, each)
    share = compiled.rate * compiled.flops / plain.peak
    yield Row("compiled: images/s, those of the plain step", compiled.rate / plain.rate, "times", 1.0)
    yield Row("compiled: share of the peak", share, note=f"the first step takes {compiled.first:.0f} s")


def _alone(work: Callable[[], Steps]) -> Steps:
    """In a process of its own, which frees the device when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work).result()


def _steps(size: Size, compile: bool) -> Steps:
    settings = {**size.settings, "model.name": size.model, "model.precision": "bfloat16", "model.compile": compile}
    experiment = presets.resolve("image", None, settings)
    clip, count = load_initial_model(experiment.model, 0), experiment.batch.images
    side, on = get_preprocess(clip).size, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    items = [str(number) for number in range(size.items)]
    index = ItemIndex(np.arange(size.items).repeat(VIEWS), np.zeros(size.items, int), items, np.array([count]))
    learner = Learner(experiment, clip, index, Captions(np.zeros((1, 1), np.int32), np.full(size.items, -1)), on)
    pixels = transfer.images(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8), on)
    step = partial(learner.train_step, np.arange(count), pixels)
    first = _seconds(step)
    matrix = torch.randn(size.matrix, size.matrix, device=on, dtype=torch.bfloat16)
    products = _rate(partial(torch.matmul, matrix, matrix), size.seconds)
    return Steps(count * _rate(step, size.seconds), first, _flops(clip.visual), 2 * size.matrix**3 * products)


def _flops(visual: Any) -> int:
    """Operations of an image in a step of a vision transformer: 105 billion for ViT-B/16 at 224 pixels.

    Of N tokens of width D, each block takes 24 N D^2 in its linear layers and 4 N^2 D in attention, and twice that in
    the backward pass. The patch embedding is frozen, so it has a forward pass alone.
    """
    N, D = visual.positional_embedding.shape
    blocks = len(visual.transformer.resblocks) * (24 * N * D**2 + 4 * N**2 * D)
    return 3 * blocks + 2 * (N - 1) * visual.conv1.weight.numel()


def _seconds(work: Callable[[], Any]) -> float:
    """How long some work takes, the device's part included."""
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _rate(work: Callable[[], Any], seconds: float) -> float:
    """How often a second some work is done, within about so many seconds."""
    times = max(1, round(seconds / min(_seconds(work) for _ in range(3))))
    return times / _seconds(lambda: [work() for _ in range(times)])


# --- Runs and a sweep ------------------------------------------------------------------------------------------------


def _loop(size: Size, folder: Path, rates: dict[str, float]) -> Iterator[Row]:
    write_source(folder / "photos", items=size.photos, seed=0, size=256)
    _clipfh("prepare", "--source", folder / "photos", "--out", folder / "catalogue")
    lines = _run(size, folder, "loop", size.model)
    yield Row("loop: images/s, those of tensors in memory", _speed(lines) / rates["memory"], "times", 0.95)
    yield Row("loop: share of the time waiting for images", mean(line["data_wait"] for line in lines))


def _kept(size: Size, folder: Path, rates: dict[str, float]) -> Iterator[Row]:
    lines = _run(size, folder, "kept", size.model, "--keep-gib=4")
    rates["one trial"] = _together([lines])
    yield Row("--keep-gib: images/s, those of tensors in memory", _speed(lines) / rates["memory"], "times", 0.95)
    yield Row("--keep-gib: share of the time waiting", mean(line["data_wait"] for line in lines))


def _ingest(size: Size, folder: Path, rates: dict[str, float]) -> Iterator[Row]:
    lines = _run(size, folder, "ingest", size.light)
    wait = f"{os.cpu_count()} cores; {size.light} waits {mean(line['data_wait'] for line in lines):.0%} of the time"
    yield Row("ingest: images/s of 256 pixels", _speed(lines), "images/s", note=wait)
    yield Row("ingest: those of steps in memory", _speed(lines) / rates["memory"], "times", 1.0)


def _two_trials(size: Size, folder: Path, rates: dict[str, float]) -> Iterator[Row]:
    base = {name: value for name, value in size.settings.items() if not name.startswith("budget.")}
    sweep = {
        "name": "two",
        "stage": "image",
        "base": {**base, "model.name": size.model},
        "search": {"optimizer.lr": {"loguniform": [1e-6, 1e-5]}},
        "trials": 2,
        "budget": {"images": size.images, "report_every": size.images // 4},
        "placement": {"gpus_per_worker": size.share, "concurrent": 2, "keep_gib": 4},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    trials = [folder / "sweep/trials" / number for number in ("0001", "0002")]
    with (folder / "sweep.log").open("w") as log:
        words = ("sweep", folder / "sweep.yaml", folder / "catalogue", "--out", folder / "sweep")
        process = subprocess.Popen(_words(*words), stdout=log, stderr=log)
        while not all(lines and lines[-1]["images"] >= size.images for lines in map(run_folder.read_metrics, trials)):
            assert process.poll() is None, (folder / "sweep.log").read_text()[-200:]
            time.sleep(0.2)
        process.terminate()  # what comes after the trials is not measured
        process.wait()
    rate = _together([run_folder.read_metrics(trial)[1:] for trial in trials])
    yield Row("two trials on a GPU: images/s, those of one", rate / rates["one trial"], "times", 1.0)


def _clipfh(*words: object) -> None:
    done = subprocess.run(_words(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout.strip().splitlines()[-1])


def _words(*words: object) -> list[str]:
    return [sys.executable, "-m", "clipfh", *map(str, words)]


def _run(size: Size, folder: Path, name: str, model: str, *options: str) -> list[dict[str, Any]]:
    """A run's reports but the first, which waits for the stream to fill."""
    settings = [f"--{key}={value}" for key, value in size.settings.items()]
    words = ("train", "image", folder / "catalogue", "--out", folder / name, f"--model={model}", *settings, *options)
    _clipfh(*words)
    return run_folder.read_metrics(folder / name)[1:]


def _speed(lines: list[dict[str, Any]]) -> float:
    return mean(line["images_per_second"] for line in lines)


def _together(runs: list[list[dict[str, Any]]]) -> float:
    """Images a second of some runs, evaluations and checkpoints included, while all of them train."""
    first = max(lines[0]["time"] for lines in runs)
    last = min(lines[-1]["time"] for lines in runs)
    assert first < last, "they did not train at the same time"
    seen = 0.0
    for lines in runs:
        times, images = ([line[key] for line in lines] for key in ("time", "images"))
        seen += float(np.interp(last, times, images) - np.interp(first, times, images))
    return seen / (last - first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the rows as JSON")
    args = parser.parse_args()
    size = ON_GPU if torch.cuda.is_available() else ON_CPU
    print(torch.cuda.get_device_name() if size is ON_GPU else "no GPU: small sizes on the CPU")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{made}/compiled"  # a compiler that finds its work done shows nothing
        for row in rows(size, Path(made)):
            found.append(row)
            print(_line(row), flush=True)
            args.out.write_text(json.dumps([{**asdict(each), "ok": each.ok} for each in found], indent=2) + "\n")
    return 0 if all(row.ok for row in found) else 1


def _line(row: Row) -> str:
    value = "-" if row.value is None else f"{row.value:,.0f}" if row.value >= 100 else f"{row.value:.3g}"
    against = "" if row.target is None else f"target {row.target:g} {'ok' if row.ok else 'MISSED'}"
    return f"{row.name:50} {value:>8} {row.unit:9} {against:18} {row.note}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
