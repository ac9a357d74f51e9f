"""Recipes at equal images seen: from random weights each term alone, combinations, presets, the original pipeline's.

Run: python tests/benchmarks/recipes.py CATALOGUE --out results.jsonl [--images 30000] [--seeds 3] [--only NAME ...]
With --pretrained EXPORT, a small model tuned on another catalogue (`soup.py` makes one): preset `recommended` from its
weights, and each part of it left out or changed.

Prints a table of test mAP: mean over the seeds, lowest and highest. Each run is one process with one thread, as many at
a time as there are cores; its batches, pixels and steps are those of `clipfh train`, its weights the average at the
end. Results are kept in a file, a line a run; a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from clipfh.data import catalogue as catalogues
from clipfh.data import images as images_module

ALONE = {f"loss.{term}": 0.0 for term in ("ce", "triplet", "center", "supcon", "infonce")}
SUPCON = {"loss.supcon": 1.0, "loss.supcon_temperature": 0.1}
PLAIN = {
    "optimizer.lr": 1e-3,
    "optimizer.ema": 0.0,
    "optimizer.weight_decay": 1e-4,
    "augment.crop_min": 1.0,
    "augment.flip": False,
    "batch.items": 16,
    "batch.views": 2,
    **ALONE,
    "loss.infonce": 1.0,
}
# name -> (stage, preset, settings beside the preset, the original's objective if it is one)
RECIPES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "ce": ("image", "scratch", {**ALONE, "loss.ce": 1.0}, ""),
    "triplet": ("image", "scratch", {**ALONE, "loss.triplet": 1.0}, ""),
    "soft triplet": ("image", "scratch", {**ALONE, "loss.triplet": 1.0, "loss.triplet_margin": -1.0}, ""),
    "center": ("image", "scratch", {**ALONE, "loss.center": 1.0}, ""),
    "supcon": ("image", "scratch", {**ALONE, **SUPCON}, ""),
    "infonce": ("joint", "scratch", {**ALONE, "loss.infonce": 1.0}, ""),
    "supcon + triplet": ("image", "scratch", {**ALONE, **SUPCON, "loss.triplet": 1.0}, ""),
    "supcon + ce": ("image", "scratch", {**ALONE, **SUPCON, "loss.ce": 0.25}, ""),
    "triplet + ce": ("image", "scratch", {**ALONE, "loss.triplet": 1.0, "loss.ce": 0.25}, ""),
    "supcon + infonce": ("joint", "scratch", {**ALONE, **SUPCON, "loss.infonce": 1.0}, ""),
    "supcon + 0.1 infonce": ("joint", "scratch", {**ALONE, **SUPCON, "loss.infonce": 0.1}, ""),
    "preset scratch, image": ("image", "scratch", {}, ""),
    "preset scratch, joint": ("joint", "scratch", {}, ""),
    "preset recommended, image": ("image", "recommended", {}, ""),
    "preset recommended, joint": ("joint", "recommended", {}, ""),
    "preset image": ("image", "image", {}, ""),
    "preset joint-v1": ("joint", "joint-v1", {}, ""),
    "preset joint-v2": ("joint", "joint-v2", {}, ""),
    "preset joint-v3": ("joint", "joint-v3", {}, ""),
    "preset joint-v4": ("joint", "joint-v4", {}, ""),
    # The original pipeline's as they were, but for the rate, which was meant for pretrained weights
    "original stage 2": ("image", "scratch", PLAIN, "stage 2"),
    "original v1": ("joint", "scratch", {**PLAIN, "text.strategy": "raw", "batch.items": 32, "batch.views": 1}, "v1"),
    "original v2": ("joint", "scratch", {**PLAIN, "text.strategy": "clean"}, "v2"),
}

# What `recommended` has for a small model and catalogue: a higher rate, smaller batches
TUNED = {"optimizer.lr": 3e-4, "batch.items": 16}
CHANGED: dict[str, dict[str, Any]] = {
    "recommended": {},
    "a third of the rate": {"optimizer.lr": 1e-4},
    "three times the rate": {"optimizer.lr": 1e-3},
    "no layer decay": {"optimizer.layer_decay": 1.0},
    "layer decay 0.5": {"optimizer.layer_decay": 0.5},
    "no EMA": {"optimizer.ema": 0.0},
    "EMA 0.99": {"optimizer.ema": 0.99},
    "patch embedding trained": {"model.freeze_patch": False},
    "LoRA of rank 8": {"model.lora_rank": 8},
    "temperature 0.1": {"loss.supcon_temperature": 0.1},
    "crops from 0.4": {"augment.crop_min": 0.4},
    "crops from 0.7": {"augment.crop_min": 0.7},
    "crops from 0.7, no mirroring": {"augment.crop_min": 0.7, "augment.flip": False},
    "whitening": {"optimizer.whitening": 0.2},
}
PRETRAINED = {name: ("image", "recommended", {**TUNED, **changed}, "") for name, changed in CHANGED.items()}


def run(catalogue: str, name: str, seed: int, images: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe and score it on the test split."""
    import torch

    from clipfh.config import presets, schema
    from clipfh.config.experiment import SMALL_MODEL

    torch.set_num_threads(1)
    stage, preset, settings, original = {**RECIPES, **PRETRAINED}[name]
    given = {**settings, "model.name": SMALL_MODEL, "budget.images": images, "seed": seed, **extra}
    experiment = presets.resolve(stage, preset, given)
    opened = catalogues.open_catalogue(catalogue)
    learner = train(opened, experiment, _Original(original) if original else None)
    validate(opened, learner)
    found = {"recipe": name, "seed": seed, "images": images, **score(opened, learner)}
    return {**found, "experiment": schema.flatten(experiment)}


def train(opened: Any, experiment: Any, objective: Any = None) -> Any:
    """The learner after an experiment on a catalogue, in this process; its loss is the objective, if one is given."""
    import torch

    from clipfh.data import decoding
    from clipfh.data.decoding import BatchSpec
    from clipfh.data.sampler import build_index, make_sampler
    from clipfh.learn.learner import ItemCaptions, Learner
    from clipfh.model.architecture import find as find_architecture
    from clipfh.model.clip import get_preprocess, load_initial_model, load_tokenizer
    from clipfh.train.inputs import tokenize_captions

    table = opened.images("train").combine_chunks()
    index = build_index(table, np.array([len(table)]))
    architecture = find_architecture(experiment.model)
    captions, _ = tokenize_captions(opened, index.names, experiment, architecture, "train")
    kind = getattr(objective, "kind", "")
    if kind == "stage 2":  # one prompt for every image
        tokens = load_tokenizer(architecture)(["a photo of a clothing item"]).numpy().astype(np.int32)
        captions = ItemCaptions(tokens, np.zeros(len(index.names), np.int32))
    clip = load_initial_model(experiment.model, experiment.seed)
    learner = Learner(experiment, clip, index, captions, torch.device("cpu"))
    if objective:
        objective.attach(architecture.embed_dim, len(index.names), experiment.optimizer.lr)
        learner.objective = objective
    plan = make_sampler(index, experiment.batch, experiment.seed, experiment.loss.takes_singles)
    recipe = BatchSpec.of(experiment, get_preprocess(clip).size)
    column = table["image"].chunk(0)
    for step in range(learner.schedule.num_steps):
        rows = plan.batch(step)
        if kind == "v1":  # its loader did not shuffle
            rows = (step * len(rows) + np.arange(len(rows))) % len(index.item)
        pixels = decoding.decode_batch(recipe, lambda row: column[row].as_py(), step, 0, rows)
        learner.train_step(rows, pixels)
    return learner


def validate(opened: Any, learner: Any) -> float:
    """Validation mAP at the end, by the averaged weights. As in `clipfh train` it chooses whether to whiten."""
    from clipfh.learn.learner import Validation
    from clipfh.train.inputs import VALIDATION, validation_codes

    images = Validation(np.concatenate(_pixels(opened, learner, VALIDATION)), *validation_codes(opened))
    return learner.scores(images)["val_mAP"]


def score(opened: Any, learner: Any) -> dict[str, float]:
    """mAP and Rank-1 on the test split, by the averaged weights, whitened where `validate` said so."""
    import torch
    import torch.nn.functional as F

    from clipfh.model.towers import embed_images
    from clipfh.retrieval import metrics

    splits = ("query", "gallery")
    with learner.average.applied():
        embeddings = [embed_images(learner.towers, p, learner.precision) for p in _pixels(opened, learner, splits)]
    if learner.whitening is not None:
        embeddings = [F.normalize(e @ learner.whitening.to(e.dtype)) for e in embeddings]
    names = [opened.columns(split, ["item_id"])["item_id"].to_pylist() for split in splits]
    codes = np.unique(names[0] + names[1], return_inverse=True)[1]
    parts = torch.from_numpy(codes).split([len(names[0]), len(names[1])])
    starts = (0, len(names[0]))
    rows = [
        metrics.Embeddings(e, item=c, variant=c, image=torch.arange(len(c)) + start)
        for e, c, start in zip(embeddings, parts, starts, strict=True)
    ]
    overall, _, _ = metrics.score(*rows)
    summary = metrics.summary(overall)
    return {key: summary[key] for key in ("mAP", "rank1")}


def _pixels(opened: Any, learner: Any, splits: Sequence[str]) -> list[np.ndarray]:
    from clipfh.model.clip import get_preprocess

    size = get_preprocess(learner.clip)
    tables = [opened.images(split) for split in splits]
    return [np.stack([images_module.decode_for_evaluation(e.as_py(), size) for e in t["image"]]) for t in tables]


class _Original:
    """The losses of the original pipeline: identical prompts are negatives of each other, or count as often as images.

    Stage 2: contrast of images and prompts with a label an image. v1: CLIP's loss with a label an image. v2: SupCon on
    images and as many prompts, with a label an item.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.weights = {"original": 1.0}

    def attach(self, *_: object) -> None:
        """It has no weights."""

    def __call__(
        self, feature_BD: Any, text_CD: Any, log_scale: Any, labels: Any, bias: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        import torch
        import torch.nn.functional as F

        from clipfh.learn import losses

        image_BD = F.normalize(feature_BD)
        text_BD = F.normalize(text_CD)[labels.caption]
        label_B = torch.arange(len(image_BD))
        if self.kind == "v1":
            logits = log_scale.exp() * image_BD @ text_BD.T
            total = (F.cross_entropy(logits, label_B) + F.cross_entropy(logits.T, label_B)) / 2
        else:
            item_B = labels.item if self.kind == "v2" else label_B
            total = losses.supcon(torch.cat([image_BD, text_BD]), torch.cat([item_B, item_B]), 0.07)
        return total, {"original": total}

    def follow(self, *_: object) -> None:
        """Nothing of it follows the features."""


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, best first."""
    found = defaultdict(list)
    for result in results:
        found[result["recipe"]].append((result["mAP"], result["rank1"]))
    lines = ["| recipe | test mAP | lowest to highest | Rank-1 |", "|---|---|---|---|"]
    for name, scores in sorted(found.items(), key=lambda pair: -mean(s for s, _ in pair[1])):
        low, high = min(scores)[0], max(scores)[0]
        maps, ranks = zip(*scores, strict=True)
        lines.append(f"| {name} | {mean(maps):.3f} | {low:.3f} to {high:.3f} | {mean(ranks):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalogue")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[*RECIPES, *PRETRAINED])
    parser.add_argument("--pretrained", type=Path)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all runs")
    args = parser.parse_args()

    from clipfh.config import schema

    extra = {name: schema.parse(name, value) for name, value in (pair.split("=") for pair in args.set)}
    if args.pretrained:
        extra["model.name"] = f"local-dir:{args.pretrained.absolute()}"
    names = args.only or list(PRETRAINED if args.pretrained else RECIPES)
    kept = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    results = [result for result in kept if result["images"] == args.images]
    done = {(r["recipe"], r["seed"]) for r in results}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool, args.out.open("a") as file:
        runs = [(name, seed) for seed in range(args.seeds) for name in names if (name, seed) not in done]
        for future in as_completed([pool.submit(run, args.catalogue, *one, args.images, extra) for one in runs]):
            result = future.result()
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{result['recipe']}, seed {result['seed']}: mAP {result['mAP']:.4f}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
