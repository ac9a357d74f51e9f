"""Photos to steps: the stream, a step, a trial's start, a sweep, each against the same without what we add.

Everything runs on the small model and drawn photos of 256 pixels, on a cluster of this machine alone.
"""

import dataclasses
import functools
import itertools
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray
import torch

from clipfh.cluster import connect
from clipfh.cluster.resources import Resources, max_concurrent_runs, resolve_placement
from clipfh.config import cores, presets, sweep_file
from clipfh.config.experiment import SMALL_MODEL, Experiment, Placement
from clipfh.data import decoding
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import BatchSpec, StreamPart
from clipfh.data.prepare import prepare
from clipfh.data.sampler import ItemIndex, make_sampler
from clipfh.demo.source import write_source
from clipfh.learn.learner import Learner
from clipfh.model.devices import choose_device
from clipfh.storage import run_folder
from clipfh.sweep import sweep
from clipfh.train import driver, stream, worker
from clipfh.train.inputs import load_start, open_run, prepare_inputs
from clipfh.train.run_inputs import Inputs

ITEMS, SIDE = 300, 256
SETTINGS = {"model.name": SMALL_MODEL, "batch.items": 16, "batch.views": 4}
IMAGES = 25_600  # of a measured stretch
STEPS = 200  # of 64 images, in the loop
TURN_S = 4.0
SWEEP = """
name: bench
stage: image
base: {model.name: clipfh-small, batch.items: 16, batch.views: 4}
search:
  optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
trials: 12
budget: {images: 10000, report_every: 2500}
"""


def rows() -> list[dict]:
    """All measurements, as {name, value, target, ok}."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_source(folder / "photos", items=ITEMS, seed=0, size=SIDE)
        opened = prepare(folder / "photos", folder / "catalogue")
        (folder / "sweep.yaml").write_text(SWEEP)
        connect.connect("local")
        try:
            return [*_stream_and_step(opened, folder), *_sweep(opened, folder), *_plan()]
        finally:
            connect.disconnect()


def row(name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> dict:
    ok = value >= at_least if at_least is not None else value <= (at_most or 0.0)
    return {"name": name, "value": round(value, 3), "target": at_most if at_least is None else at_least, "ok": bool(ok)}


def _stream_and_step(opened: Catalogue, folder: Path) -> list[dict]:
    experiment = presets.resolve("image", None, SETTINGS)
    resources = resolve_placement(Placement())
    inputs = prepare_inputs(opened, experiment, load_start(experiment), stream)
    images = stream.cache_decoded(inputs.images, 1.0, inputs.size, experiment.augment.crop_min)
    kept = dataclasses.replace(inputs, images=images)
    ingest, spared = [], []
    for number in range(3):
        loader = _loader(opened, inputs)
        ingest.append(_drained(experiment, inputs, folder / f"drained-{number}", resources) / loader)
        spared.append(_drained(experiment, kept, folder / f"kept-{number}", resources) / loader)
    speed, waiting = _steps(opened, inputs, resources, folder / "all")
    one = dataclasses.replace(resources, cpus=1, threads=1)
    speed_of_one, _ = _steps(opened, inputs, one, folder / "one")
    return [
        row("ingest: images/s at a worker, a torch DataLoader's", median(ingest), at_least=1.0),
        row("ingest: the same of images that are kept decoded", median(spared), at_least=2.0),
        row("step: images/s in the loop, those of tensors in memory", speed, at_least=0.97),
        row("step: the same with one thread, the other cores left to Ray", speed_of_one, at_least=0.97),
        row("step: share of the time between steps, waiting for images", waiting, at_most=0.03),
        row("evaluation: share of a trial's time, ten reports", _evaluation(inputs, resources), at_most=0.05),
    ]


def _drained(experiment: Experiment, inputs: Inputs, out: Path, resources: Resources) -> float:
    """Images per second that arrive at a worker which does nothing with them, the first left out."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
    usual, driver.loop = driver.loop, _drain
    try:
        driver.run_training(experiment, inputs, out, resources)
    finally:
        driver.loop = usual
    return float(json.loads((out / "drained.json").read_text()))


def _drain(job: dict[str, Any]) -> None:
    experiment, inputs = job["experiment"], job["inputs"]
    recipe = BatchSpec.of(experiment, inputs.size)
    arriving = stream.batches(StreamPart(inputs.images, recipe, 0, IMAGES // experiment.batch.images))
    begun, count = _after_the_first(arriving), 0
    for _, rows, _ in arriving:
        count += len(rows)
    (Path(job["out"]) / "drained.json").write_text(str(count / (time.perf_counter() - begun)))


def _after_the_first(arriving: Iterator[Any]) -> float:
    """The time once so many batches are taken that those decoded before any came no longer count."""
    for _ in itertools.islice(arriving, 64):
        pass
    return time.perf_counter()


class _Photos(torch.utils.data.Dataset):
    """What the stream decodes, for torch's own loader."""

    def __init__(self, column: Any, recipe: BatchSpec) -> None:
        self.column, self.recipe = column, recipe

    def __getitem__(self, place: tuple[int, int, int]) -> torch.Tensor:
        step, position, image = place
        pixels = decoding.decode_batch(
            self.recipe, lambda at: self.column[at].as_py(), step, position, np.array([image])
        )
        return torch.from_numpy(pixels[0])


def _loader(opened: Catalogue, inputs: Inputs) -> float:
    """Images per second of torch's DataLoader with a process a core, the first left out."""
    experiment = presets.resolve("image", None, SETTINGS)
    recipe = BatchSpec.of(experiment, inputs.size)
    plan = make_sampler(ray.get(inputs.images.index), experiment.batch, 0, singles=False)
    column = opened.images("train")["image"].combine_chunks()
    count = IMAGES // experiment.batch.images
    sampler = [[(s, i, int(row)) for i, row in enumerate(plan.batch(s))] for s in range(count)]
    loader = torch.utils.data.DataLoader(
        _Photos(column, recipe), batch_sampler=sampler, num_workers=cores.available(), multiprocessing_context="spawn"
    )
    arriving = iter(loader)
    begun, images = _after_the_first(arriving), 0
    for pixels in arriving:
        images += len(pixels)
    return images / (time.perf_counter() - begun)


def _steps(opened: Catalogue, inputs: Inputs, resources: Resources, folder: Path) -> tuple[float, float]:
    """Images per second in the loop by those of the same steps on tensors in memory, and the loop's time between steps.

    The two run beside each other and take turns: the machine itself may be a tenth faster in one minute than in the
    next. While one has its turn all processes of the other are stopped, Ray's own among them.
    """
    budget = {"budget.images": STEPS * 64, "budget.report_every": STEPS * 64}
    experiment = presets.resolve("image", None, {**SETTINGS, **budget})
    index: ItemIndex = ray.get(inputs.images.index)
    plan = make_sampler(index, experiment.batch, 0, singles=False)
    recipe = BatchSpec.of(experiment, inputs.size)
    column = opened.images("train")["image"].combine_chunks()
    some = [decoding.decode_batch(recipe, lambda at: column[at].as_py(), s, 0, plan.batch(s)) for s in range(8)]
    state = experiment, index, ray.get(inputs.captions), some, resources.threads
    folder.mkdir()
    (folder / "plain.pickle").write_bytes(pickle.dumps(state))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
    plain = psutil.Popen([sys.executable, __file__, str(folder)])
    turns: list[tuple[float, float, float]] = []
    usual, driver.loop = driver.loop, functools.partial(_timed, driver.loop)
    try:
        taking = threading.Thread(target=_take_turns, args=(plain, folder / "run", turns), daemon=True)
        taking.start()
        open_run(folder / "run", experiment, opened)
        driver.run_training(experiment, inputs, folder / "run", resources)
        taking.join()
    finally:
        driver.loop = usual
        plain.kill()
        plain.wait()
    ours, between = _pace(_times(folder / "run"), [(begun, swapped) for begun, swapped, _ in turns])
    theirs, _ = _pace(_times(folder), [(swapped, end) for _, swapped, end in turns])
    print(
        f"  {64 * ours:.0f} images/s in the loop, {64 * theirs:.0f} in memory, in {len(turns)} turns", file=sys.stderr
    )
    return ours / theirs, between


def _take_turns(plain: psutil.Process, run: Path, turns: list[tuple[float, float, float]]) -> None:
    """Let our steps and the plain ones have turns till ours end; when each turn began, was swapped and ended."""
    while len(_times(run.parent)) < 2:  # it has begun
        time.sleep(0.1)
    plain.suspend()
    while len(_times(run)) < STEPS // 4:  # the stream has filled
        time.sleep(0.1)
    while len(_times(run)) < STEPS - 1:
        begun = time.monotonic()
        time.sleep(TURN_S)
        ours = [each for each in psutil.Process().children(recursive=True) if each != plain]
        for each in ours:
            each.suspend()
        plain.resume()
        swapped = time.monotonic()
        time.sleep(TURN_S)
        plain.suspend()
        turns.append((begun, swapped, time.monotonic()))
        for each in ours:
            each.resume()


def _timed(loop: Callable[[dict[str, Any]], None], job: dict[str, Any]) -> None:
    """The training loop, with a line for each step: when it began and ended."""
    Learner.train_step = _writing_times(Learner.train_step, Path(job["out"]))  # type: ignore[method-assign]
    loop(job)


def _writing_times(step: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    log = (folder / "steps.txt").open("w", buffering=1)

    def timed(*args: Any) -> Any:
        begun = time.monotonic()
        found = step(*args)
        log.write(f"{begun} {time.monotonic()}\n")
        return found

    return timed


def _times(folder: Path) -> list[tuple[float, float]]:
    """When each step began and ended, as far as the lines are whole."""
    file = folder / "steps.txt"
    whole = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(float(begun), float(ended)) for begun, ended in map(str.split, whole)]


def _pace(steps: list[tuple[float, float]], turns: list[tuple[float, float]]) -> tuple[float, float]:
    """Steps per second in some turns, and the share of the time between steps. Those cut by a turn's ends are left."""
    count = seconds = between = 0.0
    for start, end in turns:
        inside = [(begun, ended) for begun, ended in steps if start < ended < end]
        for (_, before), (begun, ended) in itertools.pairwise(inside):
            count, seconds, between = count + 1, seconds + ended - before, between + begun - before
    return count / seconds, between / seconds


def _plain(folder: Path) -> None:
    """Steps on tensors in memory, until somebody ends it."""
    experiment, index, captions, some, threads = pickle.loads((folder / "plain.pickle").read_bytes())
    torch.set_num_threads(threads)
    learner = Learner(experiment, load_start(experiment), index, captions, choose_device())
    plan = make_sampler(index, experiment.batch, 0, singles=False)
    step = _writing_times(learner.train_step, folder)
    for number in itertools.count():
        learner.step = number % STEPS
        step(plan.batch(number % STEPS), some[number % 8])


def _evaluation(inputs: Inputs, resources: Resources) -> float:
    """Share of a trial's time that scoring takes, with the preset's budget and a report each tenth of it."""
    torch.set_num_threads(resources.threads)
    experiment = presets.resolve("image", None, SETTINGS)
    learner, validation = worker.make_learner(experiment, inputs, choose_device()), worker.fetch_validation(inputs)
    assert validation is not None
    learner.validate(validation)
    begun = time.perf_counter()
    learner.validate(validation)
    scoring = time.perf_counter() - begun
    plan, size = make_sampler(ray.get(inputs.images.index), experiment.batch, 0, singles=False), inputs.size
    pixels = np.random.default_rng(0).integers(0, 255, (experiment.batch.images, size, size, 3), dtype=np.uint8)
    learner.train_step(plan.batch(0), pixels)
    begun, count = time.perf_counter(), 16
    for step in range(count):
        learner.train_step(plan.batch(step), pixels)
    training = (time.perf_counter() - begun) / count * learner.schedule.num_steps / 10
    return scoring / (scoring + training)


def _sweep(opened: Catalogue, folder: Path) -> list[dict]:
    """A sweep's trials: how long each takes to begin, and how much of the time they train."""
    starts: list[float] = []

    def tell(line: str) -> None:
        if " starts: " in line:
            starts.append(time.time())
        elif line.startswith("winner"):
            starts.append(time.time())  # the end of the search

    sweep.run(sweep_file.load(folder / "sweep.yaml"), opened, folder / "sweep", log=tell)
    *starts, end = starts
    trials = [run_folder.read_metrics(run) for run in sorted((folder / "sweep/trials").glob("*")) if run.name != "0000"]
    waits = [lines[0]["began"] - start for lines, start in zip(trials, starts, strict=True)]
    trained = sum(lines[-1]["time"] - lines[0]["began"] for lines in trials)
    at_once = max_concurrent_runs(Placement(), resolve_placement(Placement(), alone=False))
    wall = end - starts[0]
    idle = wall * at_once - trained
    print(
        f"  {len(trials)} trials, {at_once} at once, {trained / len(trials):.0f} s of training each. Of {idle:.0f} s "
        f"without training, {sum(waits[:at_once]):.0f} were the first trials' starts, {sum(waits[at_once:]):.0f} the "
        f"others' ({', '.join(f'{wait:.1f}' for wait in waits)}), {_alone(trials):.0f} went by while the last trained "
        "alone; the rest is between one trial's last report and the next one's suggestion",
        file=sys.stderr,
    )
    first_step = median(waits[at_once:])
    return [
        row("trial start: to the first step, a bare process with imports", first_step / _bare_start(), at_most=2),
        row("sweep: wall time, training time shared out", wall / (trained / at_once), at_most=1.15),
        row("sweep: share of the workers' time spent training", trained / (wall * at_once), at_least=0.9),
    ]


def _alone(trials: list[list[dict]]) -> float:
    """Seconds between the ends of the last two trials."""
    first, last = sorted(lines[-1]["time"] for lines in trials)[-2:]
    return float(last - first)


def _bare_start() -> float:
    """Seconds until a process has torch and open_clip; the median of three."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, open_clip"], check=True)
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


def _plan() -> list[dict]:
    """Memory of the plan beside its index, and time of a batch, at ten million items and at ten thousand."""
    code = """
import resource, sys, time
import numpy as np
from clipfh.data import sampler as batches
items, views = int(sys.argv[1]), 10
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
item = np.repeat(np.arange(items, dtype=np.int32), views)
before = peak()
plan = batches.Plan(item, 64, 4)
plan.batch(0)
begun = time.perf_counter()
for step in range(1, 21): plan.batch(step)
print((peak() - before) / len(item), (time.perf_counter() - begun) / 20)
"""
    run = [
        subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True)
        for n in (10**4, 10**7)
    ]
    (_, small), (per_image, large) = (map(float, one.stdout.split()) for one in run)
    print(f"  a batch of the plan: {1000 * small:.2f} ms of 10^4 items, {1000 * large:.2f} ms of 10^7", file=sys.stderr)
    return [row("plan: bytes an image at 10^8 images, index apart", per_image, at_most=16)]


if __name__ == "__main__" and len(sys.argv) > 1:
    _plain(Path(sys.argv[1]))
elif __name__ == "__main__":
    for each in rows():
        print(f"{each['name']:60} {each['value']:8} (target {each['target']}) {'ok' if each['ok'] else 'MISSED'}")
