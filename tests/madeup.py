"""Sweep folders as a sweep leaves them, made up without training."""

import csv
import json
import math
import random
from pathlib import Path

import optuna
import yaml
from optuna.storages.journal import JournalFileBackend, JournalStorage

from clipfh.config import presets, schema, sweep_file
from clipfh.config.sweep_file import SweepFile

FILE = {
    "name": "demo",
    "stage": "image",
    "base": {"preset": "scratch", "model.name": "clipfh-small"},
    "search": {
        "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
        "batch.views": {"choice": [2, 4, 8]},
        "loss.triplet": {"loguniform": [0.1, 2.0], "or": 0.0},
        "loss.triplet_margin": {"uniform": [0.1, 0.4], "or": -1.0},
    },
    "trials": 6,
    "budget": {"images": 60_000, "first_rung": 10_000, "reduction": 3},
}
KEYS = ("mAP", *(f"rank{k}" for k in (1, 5, 10, 20, 30, 40, 50)), "mAP_at_R", "mINP")


def write_sweep(folder: Path, endings: str, zero_shot: float = 0.23, sampler=None, **changes) -> SweepFile:
    """Everything up to the summary.

    Args:
        folder: to write.
        endings: how each trial ended, a letter each: done, stopped, failed, x for diverged, running.
        zero_shot: validation mAP.
        sampler: Optuna's; by default a random one.
        changes: of the sweep file.
    """
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**FILE, "trials": len(endings), **changes}, sort_keys=False))
    file = sweep_file.load(folder / "sweep.yaml")
    (folder / "sweep.yaml").write_text(sweep_file.to_yaml(file))
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    sampler = sampler or optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(study_name=file.name, storage=storage, sampler=sampler, direction="maximize")
    rows = [{"trial": "0000", "status": "zero-shot", "val_mAP": zero_shot, "images": 0, "seconds": 0}]
    for number, letter in enumerate(endings, 1):
        rows.append(_trial(folder / "trials" / f"{number:04d}", file, study, letter))
    write_board(folder, file, rows)
    return file


def write_board(folder: Path, file: SweepFile, rows: list[dict]) -> None:
    """`leaderboard.csv`, best first."""
    rows = sorted(rows, key=lambda row: float(row.get("val_mAP", -1)), reverse=True)
    with (folder / "leaderboard.csv").open("w", newline="") as opened:
        columns = ["rank", "trial", "status", "val_mAP", "images", "seconds", *file.search, "error"]
        writer = csv.DictWriter(opened, columns, restval="")
        writer.writeheader()
        writer.writerows({"rank": i, **row} for i, row in enumerate(rows, 1))


def _trial(folder: Path, file: SweepFile, study: optuna.Study, letter: str) -> dict:
    """Ask Optuna for a trial, write its folder, tell the study; returns its line of the leaderboard."""
    status = {"d": "done", "s": "stopped", "f": "failed", "x": "diverged", "r": "running"}[letter]
    asked = study.ask()
    sampled = file.suggest(asked)
    row = {"trial": folder.name, "status": status, "images": 0, "seconds": 0, **sampled}
    if status == "failed":
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return {**row, "error": "RuntimeError: out of memory"}
    experiment = file.experiment(sampled)
    lines = reports(quality(sampled), experiment.budget.images or 60_000)
    lines = lines[: {"stopped": 2, "diverged": 1, "running": 3}.get(status, len(lines))]
    if status == "diverged":
        lines.append({**lines[-1], "best_val_mAP": 0.0, "diverged": "loss is nan at step 9"})
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(schema.to_json(experiment))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    reached, images = lines[-1]["best_val_mAP"], lines[-1]["images"]
    if status != "running":
        study.tell(asked, reached)
    return {
        **row,
        "val_mAP": reached,
        "images": images,
        "seconds": images / 250,
        "error": lines[-1].get("diverged", ""),
    }


def quality(sampled: dict) -> float:
    """What validation mAP these settings come to: best at a middling lr, many views, with the triplet term."""
    lr = 0.6 * math.exp(-((math.log10(sampled.get("optimizer.lr", 1e-3)) + 3) ** 2))
    luck = random.Random(str(sampled)).gauss(0, 0.02)
    return 0.15 + lr + 0.01 * sampled.get("batch.views", 2) + 0.05 * (sampled.get("loss.triplet", 0) > 0) + luck


def reports(top: float, images: int = 60_000, count: int = 6) -> list[dict]:
    """Lines of `metrics.jsonl` that rise to a val mAP of `top`."""
    seen = [images * (i + 1) // count for i in range(count)]
    val = [top * (1 - math.exp(-4 * (i + 1) / count)) / (1 - math.exp(-4)) for i in range(count)]
    return [
        {
            "step": n // 128,
            "images": n,
            "epoch": n / 25882,
            "val_mAP": v,
            "loss": 4.5 - 3 * v,
            "loss_supcon": 4 - 3 * v,
            "floor_supcon": 1.1,
            "collapse_supcon": 4.844,
            "loss_center": 0.5 - 0.1 * v,
            "grad_norm": 3.2,
            "images_per_second": 251.0,
            "data_wait": 0.012,
            "image_text_cosine": 0.31,
            "lr": 1e-3 * (1 - n / images),
            "best_val_mAP": max(val[: i + 1]),
        }
        for i, (n, v) in enumerate(zip(seen, val, strict=True))
    ]


def finish(folder: Path, best: str, test: dict, zero_shot: dict, **changes) -> Path:
    """Write the summary of a sweep."""
    experiment = presets.resolve(
        "image", None, {"model.name": "clipfh-small", "optimizer.lr": 2e-3, "loss.triplet": 0.5}
    )
    summary = {
        "name": "demo",
        "best_trial": best,
        "val_mAP": 0.7,
        "zero_shot_val_mAP": 0.23,
        "test": test,
        "zero_shot": zero_shot,
        "final": {"again": {"0002": [0.7, 0.68], "0004": [0.6, 0.64]}, "refit": True},
        "trials": 3,
        "failed": 0,
        "seconds": 3725.0,
        "experiment": schema.flatten(experiment),
        "searched": list(FILE["search"]),
        "catalogue": {"path": "shop", "hash": "abc123", "counts": {"train": {"images": 25882, "items": 3997}}},
        "resources": {"workers": 2, "cpus": 1.0, "gpus": 0.5, "threads": 1},
        "notes": ["12 prompts of train items are longer than the model reads"],
    }
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}))
    return folder


def figures(mAP: float = 0.6, categories: tuple[str, ...] = ("Dresses",), half: float = 0.02) -> dict:
    """What `metrics.json` holds; the cross-variant figures of an evaluation without variants are null."""
    found = {key: min(1.0, mAP + 0.02 * i) for i, key in enumerate(KEYS)}
    found |= {"num_query": 14218, "num_gallery": 12612, "num_unmatched": 0}
    found["intervals"] = {key: [found[key] - half, found[key] + half] for key in KEYS}
    found["cmc"] = [1 - (1 - mAP) / k for k in range(1, 51)]
    nothing = {**dict.fromkeys(KEYS), "num_query": 0, "num_gallery": 12612, "intervals": dict.fromkeys(KEYS)}
    group = {k: found[k] for k in ("mAP", "rank1", "num_query", "intervals")}
    return {
        **found,
        "variant": {"same": {**found, "num_query": 13593}, "cross": nothing},
        "by_category": {
            **dict.fromkeys(categories, group),
            "Pants": {**group, "num_query": 12, "intervals": dict.fromkeys(KEYS)},
        },
        "by_gender": {"WOMEN": group},
        "random_splits": {key: {"mean": mAP, "std": 0.004, "values": [mAP] * 10} for key in KEYS},
        "text_to_image": found,
        "image_to_text": None,
    }
