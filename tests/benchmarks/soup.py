"""What soup and mix give over the best trial: a small pretrained model, tuned on another catalogue by whole sweeps.

Run: python tests/benchmarks/soup.py FIRST CATALOGUE --out FOLDER [--sweeps 3] [--trials 8] [--images 6000]

FIRST is an export, or a catalogue, on which clipfh-small is trained from random weights (joint stage) and exported:
weights as a user has them, which the sweeps begin with. Each sweep has a seed of its own, for its search and its runs.
Prints mAP of zero-shot, best trial, soup and mix, on validation and test, and text to image on test: each sweep's, and
the means. Sweeps that the folder has go on, and are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

import clipfh
from clipfh.config.experiment import SMALL_MODEL
from clipfh.storage import layout

NAMES = ("zero-shot", "best trial", "soup", "mix")
SEARCH = {
    "optimizer.lr": {"loguniform": [2.0e-5, 1.0e-3]},
    "optimizer.layer_decay": {"uniform": [0.65, 1.0]},
    "optimizer.weight_decay": {"choice": [0.0, 1.0e-4, 0.05]},
    "loss.supcon_temperature": {"loguniform": [0.03, 0.2]},
    "augment.crop_min": {"uniform": [0.2, 0.9]},
}


def make_pretrained(first: Path, out: Path, images: int) -> Path:
    """An export: the one given, or that of a model trained on a catalogue."""
    if not (first / layout.CATALOGUE).exists():
        return first
    run, exported = out / "first", out / "pretrained"
    if not exported.exists():
        settings = {"model.name": SMALL_MODEL, "budget.images": images, "loss.infonce": 0.5}
        clipfh.train("joint", first, run, resume=(run / layout.RUN).exists(), settings=settings)
        clipfh.export(run, exported)
    return exported


def sweep(pretrained: Path, catalogue: Path, folder: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The summary of a sweep from the pretrained weights."""
    base = {"preset": "recommended", "model.name": f"local-dir:{pretrained.absolute()}", "seed": seed}
    base |= {"batch.items": 16, "batch.views": 4}
    budget = {"images": args.images, "first_rung": args.images // 6, "reduction": 2}
    final = {"top": args.top, "seeds": 2}
    file = folder.with_suffix(".yaml")
    tree = {"name": folder.name, "stage": args.stage, "base": base, "search": SEARCH, "trials": args.trials}
    file.write_text(yaml.safe_dump({**tree, "budget": budget, "final": final, "seed": seed}))
    return clipfh.sweep(file, catalogue, folder, resume=(folder / layout.SWEEP).exists(), each_report=False).summary


def figures(summary: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Validation mAP, test mAP and text to image of each step; a step that came to nothing new has the one before."""
    steps = {step["name"]: step for step in summary["soup"]["steps"]}
    rows, last = {}, steps["zero-shot"]
    for name in NAMES:
        last = steps.get(name, last)
        rows[name] = last["val_mAP"], last["test"]["mAP"], last["test"]["text_to_image"] or 0.0
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("image", "joint"), default="image")
    for name, default in (("sweeps", 3), ("trials", 8), ("images", 6000), ("first-images", 60000), ("top", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pretrained = make_pretrained(args.first, args.out, args.first_images)
    rows = []
    for seed in range(args.sweeps):
        rows.append(figures(sweep(pretrained, args.catalogue, args.out / f"sweep-{seed}", seed, args)))
    print(f"\n{'':12}{'val mAP':>9}{'test mAP':>10}{'text':>8}   each sweep's test mAP")
    for name in NAMES:
        means = [mean(row[name][i] for row in rows) for i in range(3)]
        each = ", ".join(f"{row[name][1]:.3f}" for row in rows)
        print(f"{name:12}{means[0]:9.3f}{means[1]:10.3f}{means[2]:8.3f}   {each}")


if __name__ == "__main__":
    main()
