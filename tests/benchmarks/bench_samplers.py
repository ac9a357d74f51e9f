"""Optuna's sampler against random search, on a recorded surface of real trials.

The surface is a grid of settings of the demo's sweep, each trained once from random weights on the demo's catalogue:
`python tests/benchmarks/bench_samplers.py record CATALOGUE` writes surface.json, and goes on where it stopped. A
sampler asks for any point within the ranges and is told the score of the nearest one of the grid. What counts is how
many trials it takes until one is among the best tenth of the grid.
"""

import itertools
import json
import math
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import optuna

from clipfh.config import presets, sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.config.sweep_file import SweepFile
from clipfh.data import catalogue as catalogues
from clipfh.sweep.searcher import ask

HERE = Path(__file__).parent
SURFACE = HERE / "surface.json"
IMAGES = 1000
GRID = {
    "optimizer.lr": np.geomspace(1e-4, 3e-2, 6).tolist(),
    "loss.supcon_temperature": np.geomspace(0.03, 0.3, 4).tolist(),
    "loss.triplet": [0.0, 0.3, 2.0],
    "augment.crop_min": [0.2, 0.6],
}
SEARCH: dict[str, Any] = {
    "optimizer.lr": {"loguniform": [1e-4, 3e-2]},
    "loss.supcon_temperature": {"loguniform": [0.03, 0.3]},
    "loss.triplet": {"loguniform": [0.1, 2.0], "or": 0.0},
    "augment.crop_min": {"uniform": [0.2, 0.6]},
}
TRIALS, SEEDS = 64, 10


def rows() -> list[dict]:
    """Trials of random search for each of Optuna's, as {name, value, target, ok}: means of ten seeds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    taken = {sampler: [first_good(sampler, seed) for seed in range(SEEDS)] for sampler in ("tpe", "random")}
    for sampler, counts in taken.items():
        low, high = interval(counts)
        print(f"  {sampler}: {mean(counts):.1f} trials [{low:.1f}, {high:.1f}] to the best tenth", file=sys.stderr)
    ratio = mean(taken["random"]) / mean(taken["tpe"])
    return [{"name": "search: random's trials to the best tenth, TPE's", "value": ratio, "target": 1, "ok": ratio >= 1}]


def first_good(sampler: str, seed: int) -> int:
    """Trials until one is in the best tenth of the surface; as many as there are where none is."""
    surface = json.loads(SURFACE.read_text())
    good = float(np.quantile(list(surface.values()), 0.9))
    ranges = {name: sweep_file._range(name, spec) for name, spec in SEARCH.items()}
    sweep = SweepFile(base={"preset": "scratch"}, search=ranges, trials=TRIALS, seed=seed, sampler=sampler)
    study = optuna.create_study(direction="maximize")
    for number in range(1, TRIALS + 1):
        trial = ask(study, sweep)
        score = surface[nearest({name: found.suggest(trial, name) for name, found in ranges.items()})]
        study.tell(trial, score)
        if score >= good:
            return number
    return TRIALS


def nearest(drawn: dict[str, float]) -> str:
    """The grid's point, rates and temperatures by their ratio; a term that is off is off."""
    found = []
    for name, value in drawn.items():
        levels = [level for level in GRID[name] if bool(level) == bool(value)]
        scale = math.log if "loguniform" in SEARCH[name] and value else float
        found.append(min(levels, key=lambda level: abs(scale(level) - scale(value))))
    return key(found)


def key(point: Any) -> str:
    return " ".join(f"{value:.4g}" for value in point)


def interval(counts: list[int]) -> tuple[float, float]:
    """Central 95% of the mean by bootstrap over seeds."""
    drawn = np.random.default_rng(0).choice(counts, (10_000, len(counts))).mean(1)
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def record(catalogue: str, processes: int) -> None:
    """Train what the surface lacks."""
    surface = json.loads(SURFACE.read_text()) if SURFACE.exists() else {}
    missing = [point for point in itertools.product(*GRID.values()) if key(point) not in surface]
    with ProcessPoolExecutor(processes) as pool:
        for point, score in zip(missing, pool.map(train_one, itertools.repeat(catalogue), missing), strict=True):
            surface[key(point)] = score
            SURFACE.write_text(json.dumps(surface, indent=0) + "\n")
            print(len(surface), key(point), f"{score:.3f}", flush=True)


def train_one(catalogue: str, point: tuple[float, ...]) -> float:
    """Validation mAP of the averaged weights at the end."""
    import recipes
    import torch

    torch.set_num_threads(1)
    opened = catalogues.open_catalogue(catalogue)
    settings = {
        **dict(zip(GRID, point, strict=True)),
        "model.name": SMALL_MODEL,
        "model.precision": "bfloat16",
        "budget.images": IMAGES,
    }
    return recipes.validate(opened, recipes.train(opened, presets.resolve("image", "scratch", settings)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2)
    else:
        for each in rows():
            print(f"{each['name']:55} {each['value']:.2f} (target {each['target']})")
