"""What only a GPU shows, by the commands that people give: is it kept busy, and do two trials share it well?

Run: python tests/benchmarks/gpu.py [--out gpu.json]

Random weights and drawn photos: nothing is downloaded. Some five minutes on a GPU. Without one it takes the small model
and small sizes: that shows that the script works, not how fast a GPU is. A section that fails is a row with the reason,
all that it printed goes to standard error, and the next one goes on.

Prints a table as it goes, and writes it: a list of {name, value, unit, target, ok, note}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
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
from clipfh.config.experiment import SMALL_MODEL, Experiment, Stage
from clipfh.data.sampler import ItemIndex
from clipfh.demo.source import write_source
from clipfh.learn.learner import ItemCaptions, Learner
from clipfh.model.clip import get_preprocess, load_initial_model
from clipfh.model.transfer import images_to_device, prefetch
from clipfh.storage import run_folder

VIEWS = 4
"""K of all batches"""
LIMIT_S = 120
"""of a command, which takes much less"""


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


class Bench(NamedTuple):
    """What all sections share."""

    size: Size
    folder: Path
    rates: dict[str, float]
    """images a second, and the device's FLOP/s, for later sections to compare with"""


def rows(size: Size, folder: Path) -> Iterator[Row]:
    """All measurements, those that matter most first."""
    bench, over = Bench(size, folder, {}), False
    for name, measure in SECTIONS.items():
        begun = time.monotonic()
        try:
            assert not over, "no time is left"
            yield from measure(bench)
        except (Exception, KeyboardInterrupt) as error:
            over = over or isinstance(error, KeyboardInterrupt)
            traceback.print_exc()
            lines = ["", *filter(str.strip, str(error).splitlines())]
            yield Row(name, None, note=f"{type(error).__name__} {lines[-1].strip()[:160]}")
        print(f"  {name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


# --- Bare steps ------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Training steps on a batch that lies on the device."""

    rate: float
    """images per second"""
    first: float
    """seconds of the first one"""
    flops: float
    """of an image and its share of a caption, forward and backward"""
    memory: int
    """bytes at most"""
    precision: str
    waits: dict[str, float]
    """how often a step of the loop waits for the device, by the call that waits"""


def _peak(bench: Bench) -> Iterator[Row]:
    bench.rates["peak"] = _alone(partial(_products, bench.size))
    yield Row("peak: a product of matrices in bfloat16", bench.rates["peak"] / 1e12, "TFLOP/s")


def _products(size: Size) -> float:
    """FLOP/s of a large product of matrices."""
    matrix = torch.randn(size.matrix, size.matrix, device=_device(), dtype=torch.bfloat16)
    return 2 * size.matrix**3 * _rate(partial(torch.matmul, matrix, matrix), size.seconds)


def _bare(stage: Stage, bench: Bench) -> Iterator[Row]:
    size = bench.size
    steps = _alone(partial(_steps, size, stage, compile=False))
    bench.rates[stage] = steps.rate
    what = f"{size.model}, {steps.precision}, {size.items * VIEWS} images a step, on tensors in memory"
    yield Row(f"{stage}: bare steps", steps.rate, "images/s", note=what)
    yield Row(f"{stage}: bare steps, memory at most", steps.memory / 2**30, "GiB")
    calls = ", ".join(f"{name} {count:.3g}" for name, count in steps.waits.items() if count)
    meant = "one is meant, for the end of the step before"
    yield Row(f"{stage}: waits for the device, a step", sum(steps.waits.values()), note=f"{calls or 'none'}; {meant}")
    each = f"{steps.flops / 1e9:.0f} GFLOP an image"
    yield Row(f"{stage}: bare steps, share of the peak", steps.rate * steps.flops / bench.rates["peak"], "", 0.5, each)


def _compiled(bench: Bench) -> Iterator[Row]:
    steps = _alone(partial(_steps, bench.size, "image", compile=True))
    note = f"the first step takes {steps.first:.0f} s"
    yield Row("compiled: images/s, those of bare steps", steps.rate / bench.rates["image"], "times", 1.0, note)
    yield Row("compiled: share of the peak", steps.rate * steps.flops / bench.rates["peak"])


def _alone(work: Callable[[], Any]) -> Any:
    """In a process of its own, which frees the device when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work).result()


def _steps(size: Size, stage: Stage, compile: bool) -> Steps:
    experiment = presets.resolve(stage, None, {**size.settings, "model.name": size.model, "model.compile": compile})
    learner, rng = _learner(experiment), np.random.default_rng(0)
    side, rows = get_preprocess(learner.clip).size, np.arange(experiment.batch.images)
    images = rng.integers(0, 256, (len(rows), side, side, 3), np.uint8)
    step = partial(learner.train_step, rows, images_to_device(images, learner.device))
    first = _seconds(step)
    rate = len(rows) * _rate(step, size.seconds)
    precision = str(learner.precision).removeprefix("torch.")
    return Steps(rate, first, _flops_of(learner), _memory(), precision, {} if compile else _waits(learner, images))


def _learner(experiment: Experiment) -> Learner:
    """Of a catalogue that is one batch, each item with a prompt of its own."""
    clip, count = load_initial_model(experiment.model, 0), experiment.batch.items
    items = np.arange(count)
    index = ItemIndex(
        items.repeat(VIEWS), np.zeros(count, int), [str(number) for number in items], np.array([count * VIEWS])
    )
    tokens = np.random.default_rng(0).integers(1, clip.vocab_size, (count, clip.context_length), np.int32)
    return Learner(experiment, clip, index, ItemCaptions(tokens, items), _device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _memory() -> int:
    """Most bytes held so far: by tensors on a GPU, or else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _waits(learner: Learner, images: np.ndarray) -> dict[str, float]:
    """How often a step waits for the device, by the call that waits, with its batch on the way as in a run."""

    def calls(count: int) -> Counter[str]:
        batch = np.arange(len(images)), images
        with torch.profiler.profile(acc_events=True) as profile:
            for _, rows, pixels in prefetch(((number, *batch) for number in range(count)), learner.device):
                learner.train_step(rows, pixels)
        return Counter({event.key: event.count for event in profile.key_averages()})

    few, more = calls(2), calls(10)  # what the profiler itself waits for is in both
    assert learner.device.type == "cpu" or any("LaunchKernel" in name for name in more), "torch's profiler sees no GPU"
    return {name: (more[name] - few[name]) / 8 for name in more if "Synchronize" in name}


def _flops_of(learner: Learner) -> float:
    """Operations of an image in a step, with its share of a caption where the text tower is trained."""
    clip = learner.clip
    text = 3 * _blocks(clip.transformer, *clip.positional_embedding.shape) if learner.trains_text else 0
    return _flops(clip.visual) + text / VIEWS


def _flops(visual: Any) -> int:
    """Operations of an image in a step of a vision transformer: 105 billion for ViT-B/16 at 224 pixels.

    The backward pass takes twice the forward one. The patch embedding is frozen, so it has a forward pass alone.
    """
    N, D = visual.positional_embedding.shape
    return 3 * _blocks(visual.transformer, N, D) + 2 * (N - 1) * visual.conv1.weight.numel()


def _blocks(transformer: Any, N: int, D: int) -> int:
    """Operations of a forward pass through the blocks of a transformer.

    Of N tokens of width D, each block takes 24 N D^2 in its linear layers and 4 N^2 D in attention.
    """
    return len(transformer.resblocks) * (24 * N * D**2 + 4 * N**2 * D)


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


def _photos(bench: Bench) -> Iterator[Row]:
    begun = time.monotonic()
    write_source(bench.folder / "photos", items=bench.size.photos, seed=0, size=256)
    _clipfh("prepare", "--source", bench.folder / "photos", "--out", bench.folder / "catalogue")
    yield Row("photos: drawn and prepared", time.monotonic() - begun, "s")


def _loop(stage: Stage, bench: Bench) -> Iterator[Row]:
    yield from _against_bare(f"{stage}: run", stage, _run(bench, stage, stage, bench.size.model), bench)


def _kept(bench: Bench) -> Iterator[Row]:
    lines = _run(bench, "kept", "image", bench.size.model, "--keep-gib=4")
    bench.rates["one trial"] = _together([lines])
    yield from _against_bare("--keep-gib: run", "image", lines, bench)


def _against_bare(name: str, stage: Stage, lines: list[dict[str, Any]], bench: Bench) -> Iterator[Row]:
    yield Row(name, _speed(lines), "images/s")
    yield Row(f"{name}, share of the time waiting for images", mean(line["data_wait"] for line in lines))
    yield Row(f"{name}, images/s by those of bare steps", _speed(lines) / bench.rates[stage], "times", 0.95)


def _ingest(bench: Bench) -> Iterator[Row]:
    light = bench.size.light
    lines = _run(bench, "ingest", "image", light)
    wait = f"{os.cpu_count()} cores; {light} waits {mean(line['data_wait'] for line in lines):.0%} of the time"
    yield Row("ingest: images of 256 pixels", _speed(lines), "images/s", note=wait)
    yield Row("ingest, by the images/s of bare steps", _speed(lines) / bench.rates["image"], "times", 1.0)


def _two_trials(bench: Bench) -> Iterator[Row]:
    size, folder, out = bench.size, bench.folder, bench.folder / "sweep"
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
    begun = time.monotonic()
    _clipfh("sweep", folder / "sweep.yaml", folder / "catalogue", "--out", out)
    yield Row("sweep of two trials: from zero-shot to its report", time.monotonic() - begun, "s")
    rate = _together([run_folder.read_metrics(out / "trials" / number)[1:] for number in ("0001", "0002")])
    yield Row("two trials at once, images/s by those of one", rate / bench.rates["one trial"], "times", 1.0)


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "peak": _peak,
    "image: bare steps": partial(_bare, "image"),
    "joint: bare steps": partial(_bare, "joint"),
    "photos": _photos,
    "image: run": partial(_loop, "image"),
    "joint: run": partial(_loop, "joint"),
    "--keep-gib": _kept,
    "two trials": _two_trials,
    "ingest": _ingest,
    "compiled": _compiled,
}


def _clipfh(*words: object) -> None:
    with tempfile.TemporaryFile("w+") as log:
        try:
            subprocess.run(_words(*words), stdout=log, stderr=log, check=True, timeout=LIMIT_S)
        except subprocess.SubprocessError as error:
            log.seek(0)
            raise RuntimeError(f"{error}\n{log.read()}") from error


def _words(*words: object) -> list[str]:
    return [sys.executable, "-m", "clipfh", *map(str, words)]


def _run(bench: Bench, name: str, stage: Stage, model: str, *options: str) -> list[dict[str, Any]]:
    """A run's reports but the first, which waits for the stream to fill."""
    out, settings = bench.folder / name, [f"--{key}={value}" for key, value in bench.size.settings.items()]
    _clipfh("train", stage, bench.folder / "catalogue", "--out", out, f"--model={model}", *settings, *options)
    return run_folder.read_metrics(out)[1:]


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
    device = torch.cuda.get_device_name() if size is ON_GPU else "no GPU: small sizes on the CPU"
    print(f"{device}; {os.cpu_count()} cores, torch {torch.__version__}")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{made}/compiled"  # a compiler that finds its work done shows nothing
        for row in rows(size, Path(made)):
            found.append(row)
            print(_line(row), flush=True)
            args.out.write_text(json.dumps([{**asdict(each), "ok": each.ok} for each in found], indent=2) + "\n")
    failed = [row.name for row in found if row.value is None]
    missed = [row.name for row in found if row.value is not None and not row.ok]
    for how, names in (("failed", failed), ("below target", missed)):
        if names:
            print(f"{how}: {'; '.join(names)}")
    return 0 if all(row.ok for row in found) else 1


def _line(row: Row) -> str:
    value = "-" if row.value is None else f"{row.value:,.0f}" if row.value >= 100 else f"{row.value:.3g}"
    against = "" if row.target is None else f"target {row.target:g} {'ok' if row.ok else 'MISSED'}"
    return f"{row.name:50} {value:>8} {row.unit:9} {against:18} {row.note}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
