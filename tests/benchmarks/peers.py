"""clipfh's preset `scratch` beside losses of two metric learning libraries in a plain loop: same tower, images seen.

Run: python tests/benchmarks/peers.py CATALOGUE --out peers.jsonl [--images 60000] [--trials 12] [--seeds 3]

Each peer draws as many points from ranges of its own; its best is the one with the highest validation mAP. The best
peers of all (`--finalists`) and the preset, which searches nothing, are then trained with other seeds and scored on the
test split: mean, lowest and highest. A peer's loop is the usual one: M images per class, AdamW by one cycle, random
crops and mirroring, the last weights. Runs that the file holds are not repeated. `--search-images` searches by shorter
runs, with a cycle of their own.

open-metric-learning takes other versions than clipfh's, so it comes from a folder of its own, or not at all:
pip install --target FOLDER --no-deps open-metric-learning gdown beautifulsoup4 omegaconf validators
and PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

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
    "pml SupConLoss": {"temperature": between(0.05, 0.3)},
    "pml MultiSimilarityLoss": {"alpha": one_of(2.0, 4.0), "beta": one_of(20.0, 50.0), "base": one_of(0.5, 1.0)},
    "pml TripletMarginLoss": {"margin": between(0.05, 0.4)},
    "pml ProxyAnchorLoss": {"margin": one_of(0.1, 0.2), "alpha": one_of(16.0, 32.0)},
    "pml ArcFaceLoss": {"margin": between(5.0, 30.0), "scale": one_of(16.0, 32.0, 64.0)},
    "oml TripletLossWithMiner": {
        "margin": one_of(None, 0.1, 0.2),
        "miner": one_of("HardTripletsMiner", "AllTripletsMiner"),
    },
}
PLAIN = {
    **{"optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-4, "batch.items": 32, "batch.views": 4},
    **{"augment.crop_min": 0.4, "augment.flip": True},
}
FIRST: dict[str, dict[str, Any]] = {
    "pml SupConLoss": {**PLAIN, "temperature": 0.1},
    "oml TripletLossWithMiner": {**PLAIN, "margin": None, "miner": "HardTripletsMiner"},
}
"""A peer's first point, where it has a usual one"""
PRESET = "clipfh scratch"


def point(peer: str, trial: int) -> dict[str, Any]:
    """Settings of a trial: a function of peer and number."""
    if trial == 0 and peer in FIRST:
        return FIRST[peer]
    rng = np.random.default_rng([trial, *peer.encode()])
    return {name: draw(rng) for name, draw in {**LOOP, **OWN[peer]}.items()}


class Run(NamedTuple):
    """A training and where it is scored."""

    contender: str
    settings: dict[str, Any]
    """those with a dot are clipfh's, the others the loss's own"""
    seed: int
    images: int
    split: str
    """`val` or `test`"""


def train(catalogue: str, one: Run, always: dict[str, Any]) -> dict[str, Any]:
    """Train a contender and score it."""
    import torch

    from clipfh.config import presets
    from clipfh.config.experiment import SMALL_MODEL
    from clipfh.data.catalogue import open_catalogue

    torch.set_num_threads(1)
    opened = open_catalogue(catalogue)
    own = {name: value for name, value in one.settings.items() if "." not in name}
    given = {name: value for name, value in one.settings.items() if "." in name}
    objective = None if one.contender == PRESET else _Peer(one.contender, own)
    if objective:  # the loop is plain: no average of weights, no whitening
        given |= {"optimizer.ema": 0.0, "optimizer.whitening": 0.0}
    given |= {**always, "model.name": SMALL_MODEL, "budget.images": one.images, "seed": one.seed}
    learner = recipes.train(opened, presets.resolve("image", "scratch", given), objective)
    val_mAP = recipes.validate(opened, learner)
    return {**one._asdict(), **({"mAP": val_mAP} if one.split == "val" else recipes.score(opened, learner))}


class _Peer:
    """A library's loss where the learner has its objective. Its proxies have an AdamW of their own."""

    def __init__(self, contender: str, options: dict[str, Any]) -> None:
        self.library, self.name = contender.split()
        self.options, self.weights = options, {self.name: 1.0}
        self.loss: Any = None

    def attach(self, dim: int, num_items: int, lr: float) -> None:
        """Make the loss for so many dimensions and items."""
        import torch

        self.loss = (
            self._open_metric_learning() if self.library == "oml" else self._pytorch_metric_learning(dim, num_items)
        )
        parameters = list(self.loss.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=10 * lr) if parameters else None

    def _pytorch_metric_learning(self, dim: int, num_items: int) -> Any:
        from pytorch_metric_learning import losses

        proxies = {"ProxyAnchorLoss", "ArcFaceLoss"}
        sizes = {"num_classes": num_items, "embedding_size": dim} if self.name in proxies else {}
        return getattr(losses, self.name)(**sizes, **self.options)

    def _open_metric_learning(self) -> Any:
        from oml.losses.triplet import TripletLossWithMiner
        from oml.miners.inbatch_all_tri import AllTripletsMiner
        from oml.miners.inbatch_hard_tri import HardTripletsMiner

        miner = {"HardTripletsMiner": HardTripletsMiner, "AllTripletsMiner": AllTripletsMiner}[self.options["miner"]]
        return TripletLossWithMiner(self.options["margin"], miner())

    def __call__(self, feature_BD: Any, text_CD: Any, log_scale: Any, labels: Any, bias: Any = None) -> Any:
        import torch.nn.functional as F

        if self.optimizer:  # the gradients of the last step's backward pass
            self.optimizer.step()
            self.optimizer.zero_grad()
        value = self.loss(F.normalize(feature_BD), labels.item)
        return value, {self.name: value}

    def follow(self, *_: object) -> None:
        """Nothing of it follows the features."""


class Runs:
    """Runs in processes, each kept as a line of a file, so that one that is there is not repeated."""

    def __init__(self, catalogue: str, out: Path, always: dict[str, Any], pool: ProcessPoolExecutor) -> None:
        self.out, self.pool = out, pool
        self.train = functools.partial(train, catalogue, always=always)
        kept = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        self.mAP = {self._key(Run(*(line[name] for name in Run._fields))): line["mAP"] for line in kept}

    def __call__(self, runs: list[Run]) -> list[float]:
        """Return the mAP of each."""
        missing = [one for one in runs if self._key(one) not in self.mAP]
        for future in as_completed([self.pool.submit(self.train, one) for one in missing]):
            result = future.result()
            with self.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            self.mAP[self._key(Run(*(result[name] for name in Run._fields)))] = result["mAP"]
            print(f"{result['contender']}, {result['split']}: {result['mAP']:.4f} {result['settings']}", flush=True)
        return [self.mAP[self._key(one)] for one in runs]

    @staticmethod
    def _key(one: Run) -> str:
        return json.dumps(one)


def compete(args: argparse.Namespace, runs: Runs) -> dict[str, list[float]]:
    """Search the peers' settings by validation, then meet on the test split: mAP of each seed by contender."""
    trials = [Run(peer, point(peer, i), 0, args.search_images, "val") for peer in args.only for i in range(args.trials)]
    order = sorted(zip(runs(trials), trials, strict=True), key=lambda pair: -pair[0])
    best = {one.contender: one.settings for _, one in reversed(order)}
    finalists = list(dict.fromkeys(one.contender for _, one in order))[: args.finalists]
    settings = {PRESET: {}, **{peer: best[peer] for peer in finalists}}
    finals = [
        Run(name, settings[name], 1 + seed, args.images, "test") for seed in range(args.seeds) for name in settings
    ]
    scores = runs(finals)
    return {name: [s for s, one in zip(scores, finals, strict=True) if one.contender == name] for name in settings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalogue")
    parser.add_argument("--out", required=True, type=Path)
    for name, default in (("images", 60_000), ("trials", 12), ("seeds", 3), ("finalists", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--search-images", type=int, help="as many as --images without it")
    parser.add_argument("--only", nargs="*", default=list(OWN), choices=OWN)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all runs")
    args = parser.parse_args()
    args.search_images = args.search_images or args.images

    from clipfh.config import schema

    always = {name: schema.parse(name, value) for name, value in (pair.split("=") for pair in args.set)}
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = compete(args, Runs(args.catalogue, args.out, always, pool))
    print("| recipe | test mAP | lowest to highest |\n|---|---|---|")
    for name, maps in sorted(found.items(), key=lambda pair: -mean(pair[1])):
        print(f"| {name} | {mean(maps):.3f} | {min(maps):.3f} to {max(maps):.3f} |")


if __name__ == "__main__":
    main()
