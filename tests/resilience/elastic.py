"""An elastic run while nodes come and go: its batches and its end against those of one worker that nothing disturbs.

Run: python tests/resilience/elastic.py. Prints the number of workers at each report, and how far the weights are apart;
exits with 1 where the batches differ, or the weights by more than rounding.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from nodes import FIRST, SECOND, THIRD, Nodes, until
from safetensors.torch import load_file

from clipfh.data.prepare import prepare
from clipfh.demo.source import write_source
from clipfh.model import checkpoint
from clipfh.storage import run_folder

IMAGES, REPORT_EVERY = 4_800, 240
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


def train(nodes: Nodes, catalogue: Path, out: Path, *options: str) -> subprocess.Popen:
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "clipfh", "train", "image", str(catalogue), "--out", str(out), *settings, *options]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, env=nodes.env, stdout=log, stderr=log)


def workers(out: Path) -> list[int]:
    """Number of workers at each report."""
    return [line["workers"] for line in run_folder.read_metrics(out)]


def await_workers(process: subprocess.Popen, out: Path, are_there: Callable[[list[int]], bool]) -> None:
    until(lambda: process.poll() is not None or (workers(out) and are_there(workers(out))), 900)
    assert process.poll() is None, out.with_suffix(".log").read_text()


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))
    write_source(folder / "photos", items=40, seed=1, size=64)
    made = prepare(str(folder / "photos"), folder / "catalogue", image_size=64)
    nodes = Nodes(folder)
    alone, elastic = folder / "alone", folder / "elastic"
    assert train(nodes, made.path, alone, "--cpus-per-worker=1").wait() == 0, alone.with_suffix(".log").read_text()
    process = None
    try:
        nodes.start_all()
        where = "--address", f"127.0.0.1:{nodes.port}"
        process = train(nodes, made.path, elastic, "--workers=1-3", "--cpus-per-worker=1", *where)
        await_workers(process, elastic, lambda seen: seen[-1] == 2)
        nodes.start_worker(THIRD)
        await_workers(process, elastic, lambda seen: seen[-1] == 3)
        nodes.kill(FIRST)
        await_workers(process, elastic, lambda seen: seen[-1] == 2)
        nodes.kill(SECOND)
        await_workers(process, elastic, lambda seen: seen[-1] == 1)
        code = process.wait()
    finally:
        nodes.kill_all()
        if process:
            process.kill()
    print("workers at each report:", *workers(elastic))
    same = (alone / "stream.jsonl").read_text() == (elastic / "stream.jsonl").read_text()
    weights = [load_file(run_folder_weights(run)) for run in (alone, elastic)]
    apart = max((one - weights[1][name]).abs().max().item() for name, one in weights[0].items())
    print(f"exit code {code}; batches {'the same' if same else 'DIFFER'}; weights apart by {apart:.1e} at most")
    good = code == 0 and same and apart < TOLERANCE
    if good:
        shutil.rmtree(folder)
    return 0 if good else 1


def run_folder_weights(run: Path) -> Path:
    """The raw weights of a run's last checkpoint."""
    latest = max((run / "checkpoints").glob("checkpoint_*-*"))
    return next(file for file in checkpoint.list_weight_files(latest) if file.name == "model.safetensors")


if __name__ == "__main__":
    sys.exit(main())
