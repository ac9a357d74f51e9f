"""An elastic run while nodes come and go: its batches and its end against those of one worker that nothing disturbs.

Run: python tests/resilience/elastic.py. The nodes share a bucket and nothing else. Prints the number of workers at each
report, and how far the weights are apart; exits with 1 where the batches differ, or the weights by more than rounding.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from nodes import FIRST, SECOND, THIRD, Nodes, until

from clipfh.data.prepare import prepare
from clipfh.demo.source import write_source
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder

sys.path.append(str(Path(__file__).parents[1]))
import object_store

IMAGES, REPORT_EVERY = 12_000, 240
SETTINGS = {
    "model": "clipfh-small",
    "batch.items": 8,
    "batch.views": 2,
    "budget.images": IMAGES,
    "budget.report_every": REPORT_EVERY,
    "optimizer.lr": 1e-5,
}
TOLERANCE = 1e-4
"""The rates are small, so that AdamW does not make steps of rounding."""


def train(nodes: Nodes, catalogue: Folder, out: Folder, *options: str) -> subprocess.Popen:
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    words = ["-m", "clipfh", "train", "image", catalogue, "--out", out, *settings, *options]
    with log_file(nodes, out).open("w") as log:
        return subprocess.Popen(**nodes.on_head(*words), stdout=log, stderr=log)


def log_file(nodes: Nodes, out: Folder) -> Path:
    return nodes.folder / f"{out.name}.log"


def workers(out: Folder) -> list[int]:
    """Number of workers at each report."""
    return [line["workers"] for line in run_folder.read_metrics(out)]


def main(store: object_store.ObjectStore) -> int:
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))
    place = Folder(store.uri(folder.name))
    write_source(folder / "photos", items=40, seed=1, size=64)
    prepare(str(folder / "photos"), place / "catalogue", image_size=64)
    nodes, alone, elastic = Nodes(folder, apart=True, env=store.env), place / "alone", place / "elastic"
    try:
        nodes.start_all()
        code = train(nodes, place / "catalogue", alone, "--cpus-per-worker=1").wait()
        assert code == 0, log_file(nodes, alone).read_text()
        code = come_and_go(nodes, place / "catalogue", elastic)
    finally:
        nodes.kill_all()
    print("workers at each report:", *workers(elastic))
    same = alone.read_text(layout.STREAM) == elastic.read_text(layout.STREAM)
    one, other = raw_weights(alone), raw_weights(elastic)
    apart = max((weight - other[name]).abs().max().item() for name, weight in one.items())
    print(f"exit code {code}; batches {'the same' if same else 'DIFFER'}; weights apart by {apart:.1e} at most")
    good = code == 0 and same and apart < TOLERANCE
    if good:
        shutil.rmtree(folder)
    return 0 if good else 1


def come_and_go(nodes: Nodes, catalogue: Folder, out: Folder) -> int:
    """Train with one to three workers while a node comes and two are killed.

    Returns:
        The exit code.
    """
    address = f"--address=127.0.0.1:{nodes.port}"
    process = train(nodes, catalogue, out, "--workers=1-3", "--cpus-per-worker=1", address)

    def await_workers(count: int) -> None:
        until(lambda: process.poll() is not None or workers(out)[-1:] == [count], 900, pause=1.0)
        assert process.poll() is None, log_file(nodes, out).read_text()

    try:
        await_workers(2)
        nodes.start_worker(THIRD)
        await_workers(3)
        nodes.kill(FIRST)
        await_workers(2)
        nodes.kill(SECOND)
        await_workers(1)
        return process.wait()
    finally:
        process.kill()


def raw_weights(run: Folder) -> dict[str, torch.Tensor]:
    """Those of a run's last checkpoint."""
    folder = run / layout.CHECKPOINTS
    return safetensors.torch.load(
        folder.read_bytes(max(name for name in folder.files() if name.endswith(layout.RAW_WEIGHTS)))
    )


if __name__ == "__main__":
    with object_store.serve_to_nodes() as store:
        sys.exit(main(store))
