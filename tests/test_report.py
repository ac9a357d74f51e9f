import csv
import json
import math
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfh import UserError, config, report

HOSTILE = "<script>alert('a & \"b\"')</script>"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page's text, ids, links and table rows; unclosed or crossed elements are an error."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.source = file.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)

    def values(self, name: str) -> list[str | None]:
        return [value for key, value in self.attributes if key == name]


def figures(mAP: float = 0.6, category: str = "Dresses", half: float = 0.02) -> dict:
    """What `metrics.json` holds; the same-variant figures of an evaluation without variants are null."""
    keys = ("mAP", *(f"rank{k}" for k in (1, 5, 10, 20, 30, 40, 50)), "mAP_at_R", "mINP")
    found = {key: min(1.0, mAP + 0.02 * i) for i, key in enumerate(keys)}
    found |= {"num_query": 14218, "num_gallery": 12612, "num_unmatched": 0}
    found["intervals"] = {key: [found[key] - half, found[key] + half] for key in keys}
    nothing = {**dict.fromkeys(keys), "num_query": 0, "num_gallery": 12612, "intervals": dict.fromkeys(keys)}
    group = {k: found[k] for k in ("mAP", "rank1", "num_query", "intervals")}
    return {
        **found,
        "variant": {"same": {**found, "num_query": 13593}, "cross": nothing},
        "by_category": {category: group, "Pants": {**group, "num_query": 12, "intervals": dict.fromkeys(keys)}},
        "by_gender": {"WOMEN": group},
        "random_splits": {key: {"mean": mAP, "std": 0.004, "values": [mAP] * 10} for key in keys},
        "text_to_image": found,
        "image_to_text": None,
    }


def make_evaluation(folder: Path, mAP: float = 0.6, category: str = "Dresses") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(figures(mAP, category)))
    return folder


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


def make_run(folder: Path, lines: list[dict], settings: Mapping | None = None) -> Path:
    folder.mkdir(parents=True)
    experiment = config.resolve("image", None, {"model.name": "clipfh-small", **(settings or {})})
    (folder / "experiment.json").write_text(config.to_json(experiment))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


SEARCHED = ["optimizer.lr", "batch.views", "loss.triplet"]


def make_sweep(folder: Path, trials: list[dict], zero_shot: float | None = 0.23, name: str = "demo") -> Path:
    """A sweep folder without its summary. trials: status, and val_mAP or error."""
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(json.dumps({"name": name, "stage": "image", "trials": len(trials) + 3}))
    rows = [] if zero_shot is None else [{"trial": "0000", "status": "zero-shot", "val_mAP": zero_shot, "images": 0}]
    for i, trial in enumerate(trials, 1):
        settings = {"optimizer.lr": 1.23456e-4 * i, "batch.views": 4}
        rows.append({"trial": f"{i:04d}", "images": 60_000, "seconds": 75.5, **settings, **trial})
        if "val_mAP" in trial:
            make_run(folder / "trials" / f"{i:04d}", reports(trial["val_mAP"]))
    rows.sort(key=lambda row: float(row.get("val_mAP", -1)), reverse=True)
    with (folder / "leaderboard.csv").open("w", newline="") as file:
        columns = ["rank", "trial", "status", "val_mAP", "images", "seconds", *SEARCHED, "error"]
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({"rank": i, **row} for i, row in enumerate(rows, 1))
    return folder


def finish(folder: Path, best: str, test: dict, zero_shot: dict) -> Path:
    """Write the summary of a sweep."""
    experiment = config.resolve("image", None, {"model.name": "clipfh-small", "optimizer.lr": 2e-3, "loss.triplet": 0.5})
    summary = {
        "name": "demo",
        "best_trial": best,
        "val_mAP": 0.7,
        "zero_shot_val_mAP": 0.23,
        "test": test,
        "zero_shot": zero_shot,
        "trials": 3,
        "failed": 0,
        "seconds": 3725.0,
        "experiment": config.flat(experiment),
        "searched": SEARCHED,
        "catalogue": {"path": "shop", "hash": "abc123", "counts": {"train": {"images": 25882, "items": 3997}}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


DONE = [{"status": "stopped", "val_mAP": 0.31}, {"status": "done", "val_mAP": 0.7}, {"status": "diverged", "val_mAP": 0.0}]
