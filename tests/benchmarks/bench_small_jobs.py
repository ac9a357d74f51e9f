"""Small jobs as whole commands, each against a plain script of one process that does the same; and two runs at once.

The plain scripts are what a user of open_clip would write: photos from files, one process, no catalogue. Peak memory is
that of the largest process of a command. Commands and scripts take turns, and the median of each counts.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
from nodes import HEAD, Nodes, free_port

from clipfh.config import cores
from clipfh.config.experiment import SMALL_MODEL
from clipfh.data.catalogue import Catalogue
from clipfh.data.prepare import prepare
from clipfh.data.splits import SPLITS
from clipfh.demo.source import write_source
from clipfh.model import clip
from clipfh.storage import run_folder

TURNS = 3
RUN_IMAGES, AT_ONCE_IMAGES = 30_000, 12_000
SMALL = ["--model", SMALL_MODEL]

# Both plain scripts: photos and items of a CSV file, embedded by the small model of open_clip.
EMBED = """
import csv, sys
from pathlib import Path
import numpy as np, open_clip, torch, torch.nn.functional as F
from PIL import Image

open_clip.add_model_config(sys.argv[1])
model, _, preprocess = open_clip.create_model_and_transforms("clipfh-small")
tokenizer = open_clip.get_tokenizer("clipfh-small")
model.eval()
rows = list(csv.DictReader(open(sys.argv[2])))

@torch.no_grad()
def embedded(paths):
    parts = []
    for start in range(0, len(paths), 128):
        batch = [preprocess(Image.open(path)) for path in paths[start : start + 128]]
        parts.append(F.normalize(model.encode_image(torch.stack(batch))))
    return torch.cat(parts)
"""
EVALUATE = (
    EMBED
    + """
query, gallery = ([row for row in rows if row["split"] == split] for split in ("query", "gallery"))
q, g = (embedded([row["path"] for row in part]) for part in (query, gallery))
texts = sorted({row["text"] for row in rows})
with torch.no_grad():
    t = F.normalize(model.encode_text(tokenizer(texts)))
items = np.array([row["item"] for row in gallery])
precisions = []
for row, similarity in zip(query, q @ g.T):
    right = items[similarity.argsort(descending=True).numpy()] == row["item"]
    ranks = np.flatnonzero(right) + 1
    precisions.append((np.arange(1, len(ranks) + 1) / ranks).mean())
print("mAP", np.mean(precisions))
"""
)
EMBED_ALL = (
    EMBED
    + """
np.save(sys.argv[3], embedded([row["path"] for row in rows]).numpy())
"""
)

# The steps of a run on images that lie decoded in memory, with nothing beside them.
TRAIN = """
import sys
import numpy as np, torch
from clipfh.config import presets
from clipfh.data import catalogue, decoding
from clipfh.data.decoding import StreamPart
from clipfh.learn.learner import Learner
from clipfh.model.clip import get_preprocess, load_initial_model
from clipfh.train import in_process
from clipfh.model.architecture import find as find_architecture
from clipfh.train.inputs import tokenize_captions

experiment = presets.resolve("image", None, {"model.name": "clipfh-small", "budget.images": int(sys.argv[2])})
opened = catalogue.open_catalogue(sys.argv[1])
clip = load_initial_model(experiment.model, 0)
index = decoding.read_index(opened, "train")
captions, _ = tokenize_captions(opened, index.names, experiment, find_architecture(experiment.model), "train")
learner = Learner(experiment, clip, index, captions, torch.device("cpu"))
feed, recipe = in_process.InProcessFeed(), decoding.BatchSpec.of(experiment, get_preprocess(clip).size)
some = [(rows, images) for _, rows, images in feed.batches(StreamPart(feed.share(opened, "train"), recipe, 0, 8))]
while learner.step < learner.schedule.num_steps:
    rows, images = some[learner.step % len(some)]
    learner.train_step(rows, torch.from_numpy(images).permute(0, 3, 1, 2))
"""


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    mib: float
    """of memory at the peak"""


def rows() -> list[dict]:
    """All measurements, as {name, value, target, ok}."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        hundred, thousand, shop = _catalogue(folder, 100), _catalogue(folder, 1000), _catalogue(folder, 2000)
        return [
            *_against("evaluate of 100 photos", *_evaluate(folder, hundred)),
            *_against("embed of 1,000 photos", *_embed(folder, thousand)),
            _train(folder, shop),
            _two_at_once(folder, shop, "machine"),
            _two_over_a_cluster(folder, shop),
        ]


def row(name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> dict:
    ok = value >= at_least if at_least is not None else value <= (at_most or 0.0)
    return {"name": name, "value": round(value, 3), "target": at_most if at_least is None else at_least, "ok": bool(ok)}


def _catalogue(folder: Path, photos: int) -> Catalogue:
    """A catalogue of about so many drawn photos, and a CSV file of its test photos for the plain scripts."""
    source = folder / f"photos-{photos}"
    write_source(source, items=photos // 5, seed=0, size=256, train_share=0.75 if photos == 2000 else 0.2)
    made = prepare(str(source), folder / f"catalogue-{photos}")
    parts = [made.rows(split) for split in SPLITS]
    table = pa.concat_tables(parts)
    paths = [str(source / path) for path in table["path"].to_pylist()]
    shown = {"path": paths, "item": table["item_id"], "split": table["split"], "text": table["text"]}
    pyarrow.csv.write_csv(pa.table(shown), folder / f"catalogue-{photos}.csv")
    return made


def _clipfh(*words: object) -> list[str]:
    return [sys.executable, "-m", "clipfh", *map(str, words)]


def _plain(code: str, *words: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, words)]


def _evaluate(folder: Path, opened: Catalogue) -> tuple[list[str], list[str]]:
    ours = _clipfh("evaluate", opened.path, "--out", folder / "evaluated", *SMALL)
    return ours, _plain(EVALUATE, _architecture(), f"{opened.path}.csv")


def _embed(folder: Path, opened: Catalogue) -> tuple[list[str], list[str]]:
    ours = _clipfh("embed", opened.path, "--out", folder / "embedded.parquet", *SMALL)
    return ours, _plain(EMBED_ALL, _architecture(), f"{opened.path}.csv", folder / "embedded.npy")


def _architecture() -> Path:
    return Path(clip.__file__).parent / f"{SMALL_MODEL}.json"


def _against(name: str, ours: Sequence[str], plain: Sequence[str]) -> list[dict]:
    turns = [(_cost(ours), _cost(plain)) for _ in range(TURNS)]
    seconds, mib = ([median(cost[part] for cost in each) for each in zip(*turns, strict=True)] for part in (0, 1))
    print(
        f"{name}: {seconds[0]:.1f} s and {mib[0]:.0f} MiB; plain {seconds[1]:.1f} s and {mib[1]:.0f} MiB",
        file=sys.stderr,
    )
    return [
        row(f"{name}: wall time, a plain script's", seconds[0] / seconds[1], at_most=1.5),
        row(f"{name}: peak memory, a plain script's", mib[0] / mib[1], at_most=2.0),
    ]


def _cost(words: Sequence[str], **environment: str) -> Cost:
    """Run a command to its end. An evaluation that is there already is made anew."""
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**_environment(), **environment})
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, words
    return Cost(time.monotonic() - start, used.ru_maxrss / 1024)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def _train(folder: Path, opened: Catalogue) -> dict:
    """A run of the small model, from the command to its end, against the bare steps on images in memory."""
    ours = _cost(_train_words(opened, folder / "run", RUN_IMAGES))
    plain = _cost(_plain(TRAIN, opened.path, RUN_IMAGES))
    print(f"train: {ours.seconds:.1f} s and {ours.mib:.0f} MiB; steps {plain.seconds:.1f} s", file=sys.stderr)
    name = f"train of {RUN_IMAGES:,} images: wall time, that of the bare steps on images in memory"
    return row(name, ours.seconds / plain.seconds, at_most=1.15)


def _train_words(opened: Catalogue, out: Path, images: int, *more: str) -> list[str]:
    return _clipfh("train", "image", opened.path, "--out", out, *SMALL, "--budget.images", images, *more)


def _two_over_a_cluster(folder: Path, opened: Catalogue) -> dict:
    """Two runs at once over a cluster of one node, which declares four CPUs for each of its cores."""
    nodes = Nodes(folder)
    head = f"--port={nodes.port}", f"--dashboard-port={nodes.dashboard}", f"--ray-client-server-port={free_port()}"
    nodes.start(HEAD, "--head", f"--num-cpus={4 * cores.available()}", *head)
    try:
        return _two_at_once(folder, opened, "cluster", ["--address", f"{HEAD}:{nodes.port}"], nodes.env)
    finally:
        nodes.kill_all()


def _two_at_once(
    folder: Path,
    opened: Catalogue,
    where: str,
    more: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict:
    """Images per second of two runs while both train, by those of one alone."""
    alone, *both = (folder / f"{where}-{name}" for name in ("alone", "one", "other"))
    _cost(_train_words(opened, alone, AT_ONCE_IMAGES, *more), **environment)
    words = [_train_words(opened, out, AT_ONCE_IMAGES, *more) for out in both]
    how: Any = {"stdout": subprocess.DEVNULL, "env": {**_environment(), **environment}}
    processes = [subprocess.Popen(each, **how) for each in words]
    assert [process.wait() for process in processes] == [0, 0]
    print(f"two runs at once on one {where}: {_speed(*both):.0f} images/s, one {_speed(alone):.0f}", file=sys.stderr)
    together = _speed(*both) / _speed(alone)
    return row(f"two runs at once on one {where}: images/s together, those of one alone", together, at_least=0.9)


def _speed(*out: Path) -> float:
    """Images per second of runs, from the last of their first reports to the first of their last ones."""
    reports = [run_folder.read_metrics(run) for run in out]
    begin, end = max(lines[0]["time"] for lines in reports), min(lines[-1]["time"] for lines in reports)
    return sum(_images_at(lines, end) - _images_at(lines, begin) for lines in reports) / (end - begin)


def _images_at(lines: Sequence[dict], moment: float) -> float:
    """Images that a run had seen at a moment, between two reports in proportion."""
    for before, after in zip(lines, lines[1:], strict=False):
        if before["time"] <= moment <= after["time"]:
            share = (moment - before["time"]) / (after["time"] - before["time"])
            return before["images"] + share * (after["images"] - before["images"])
    raise ValueError(json.dumps([moment, *lines]))
