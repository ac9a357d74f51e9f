"""clipfh's recipe beside pytorch-metric-learning's losses in a plain loop: same tower, images seen and search.

Run: python tests/benchmarks/peers.py CATALOGUE --out peers.jsonl [--images 60000] [--trials 12] [--seeds 3]

Each contender draws as many points from ranges of its own; the best by validation mAP is trained again with other
seeds, and these are scored on the test split: mean, lowest and highest. A peer's loop is the usual one: M images per
class, AdamW by one cycle, random crops and mirroring, the last weights. Runs that the file holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import recipes

Ranges = dict[str, Callable[[np.random.Generator], Any]]


def between(low: float, high: float) -> Callable[[np.random.Generator], float]:
    """Log-uniform."""
    return lambda rng: float(math.exp(rng.uniform(math.log(low), math.log(high))))


def one_of(*values: Any) -> Callable[[np.random.Generator], Any]:
    return lambda rng: values[rng.integers(len(values))]


LOOP: Ranges = {
    "optimizer.lr": between(3e-4, 4e-3),
    "optimizer.weight_decay": one_of(1e-4, 0.05),
    "batch.items": one_of(16, 32, 64),
    "batch.views": one_of(2, 4),
    "augment.crop_min": one_of(0.2, 0.4, 0.7, 1.0),
    "augment.flip": one_of(True, False),
}
OWN: dict[str, Ranges] = {
    "clipfh": {"loss.supcon_temperature": between(0.015, 0.15), "loss.ce": one_of(0.0, 0.25, 1.0)},
    "pml SupConLoss": {"temperature": between(0.05, 0.3)},
    "pml MultiSimilarityLoss": {"alpha": one_of(2.0, 4.0), "beta": one_of(20.0, 50.0), "base": one_of(0.5, 1.0)},
    "pml TripletMarginLoss": {"margin": between(0.05, 0.4)},
    "pml ProxyAnchorLoss": {"margin": one_of(0.1, 0.2), "alpha": one_of(16.0, 32.0)},
    "pml ArcFaceLoss": {"margin": between(5.0, 30.0), "scale": one_of(16.0, 32.0, 64.0)},
}
FIRST: dict[str, dict[str, Any]] = {
    "clipfh": {},
    "pml SupConLoss": {
        **{"optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-4, "batch.items": 32, "batch.views": 4},
        **{"augment.crop_min": 0.4, "augment.flip": True, "temperature": 0.1},
    },
}
"""A contender's first point, where it has a usual one: the preset, and the plain loop."""


def point(contender: str, trial: int) -> dict[str, Any]:
    """Settings of a trial: a function of contender and number."""
    if trial == 0 and contender in FIRST:
        return FIRST[contender]
    rng = np.random.default_rng([trial, *contender.encode()])
    return {name: draw(rng) for name, draw in {**LOOP, **OWN[contender]}.items()}


def run(catalogue: str, contender: str, settings: dict[str, Any], seed: int, images: int, split: str) -> dict[str, Any]:
    """Train a contender with these settings and score it on `val` or `test`."""
    import torch

    from clipfh.config import presets
    from clipfh.config.experiment import SMALL_MODEL
    from clipfh.data.catalogue import open_catalogue

    torch.set_num_threads(1)
    opened = open_catalogue(catalogue)
    own = {name: value for name, value in settings.items() if "." not in name}
    given = {name: value for name, value in settings.items() if "." in name}
    peer = contender.startswith("pml ")
    if peer:  # the loop is plain: no average of weights
        given |= {"optimizer.ema": 0.0}
    always = {"model.name": SMALL_MODEL, "budget.images": images, "seed": seed}
    experiment = presets.resolve("image", "scratch", {**given, **always})
    objective = _Peer(contender.removeprefix("pml "), own) if peer else None
    learner = recipes.train(opened, experiment, objective)
    scores = recipes.score(opened, learner, split)
    return {"contender": contender, "settings": settings, "seed": seed, "images": images, "split": split, **scores}


class _Peer:
    """A loss of pytorch-metric-learning where the learner has its objective. Its proxies have an AdamW of their own."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options, self.weights = name, options, {name: 1.0}
        self.loss: Any = None

    def attach(self, dim: int, num_items: int, lr: float) -> None:
        """Make the loss for so many dimensions and items."""
        import torch
        from pytorch_metric_learning import losses

        proxies = {"ProxyAnchorLoss", "ArcFaceLoss"}
        sizes = {"num_classes": num_items, "embedding_size": dim} if self.name in proxies else {}
        self.loss = getattr(losses, self.name)(**sizes, **self.options)
        parameters = list(self.loss.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=10 * lr) if parameters else None

    def __call__(self, feature_BD: Any, text_CD: Any, log_scale: Any, labels: Any, bias: Any = None) -> Any:
        if self.optimizer:  # the gradients of the last step's backward pass
            self.optimizer.step()
            self.optimizer.zero_grad()
        value = self.loss(feature_BD, labels.item)
        return value, {self.name: value}

    def follow(self, *_: object) -> None:
        """Nothing of it follows the features."""


def compete(args: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, list[float]]:
    """Search by validation, then other seeds on the test split. Returns test mAP of each seed by contender."""
    kept = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {json.dumps([r["contender"], r["settings"], r["seed"], r["images"], r["split"]]): r["mAP"] for r in kept}

    def scores(runs: list[tuple[str, dict[str, Any], int, str]]) -> list[float]:
        keys = [json.dumps([name, settings, seed, args.images, split]) for name, settings, seed, split in runs]
        new = {
            key: pool.submit(run, args.catalogue, name, settings, seed, args.images, split)
            for key, (name, settings, seed, split) in zip(keys, runs, strict=True)
            if key not in known
        }
        for key, future in new.items():
            result = future.result()
            known[key] = result["mAP"]
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{result['contender']}, {result['split']}: {result['mAP']:.4f} {result['settings']}", flush=True)
        return [known[key] for key in keys]

    points = {name: [point(name, trial) for trial in range(args.trials)] for name in args.only}
    trials = [(name, settings, 0, "val") for name in points for settings in points[name]]
    of_val = iter(scores(trials))
    best = {name: max((next(of_val), i) for i in range(args.trials))[1] for name in points}
    finals = [(name, points[name][best[name]], 1 + seed, "test") for name in points for seed in range(args.seeds)]
    of_test = iter(scores(finals))
    return {name: [next(of_test) for _ in range(args.seeds)] for name in points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalogue")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(OWN), choices=OWN)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = compete(args, pool)
    print("| recipe | test mAP | lowest to highest |\n|---|---|---|")
    for name, maps in sorted(found.items(), key=lambda pair: -mean(pair[1])):
        print(f"| {name} | {mean(maps):.3f} | {min(maps):.3f} to {max(maps):.3f} |")


if __name__ == "__main__":
    main()
