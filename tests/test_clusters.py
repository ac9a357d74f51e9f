"""Three nodes on one machine, each with its own Ray, behind a token: jobs from outside, and a lost node."""

import csv
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import clipfh

pytestmark = [pytest.mark.resilience, pytest.mark.slow]

# No rungs, and fewer trials than the sampler draws blindly: nothing that a trial does depends on when it does it.
SWEEP = """
name: nodes
stage: image
base: {model.name: clipfh-small, batch.items: 8, batch.views: 2, budget.report_every: 128, augment.crop_min: 0.5}
search:
  optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
  loss.triplet: {loguniform: [0.1, 2.0], or: 0.0}
trials: 4
budget: {images: 1024}
"""
HEAD, FIRST, SECOND, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"


def until(condition, seconds=600):
    """What the condition says, as soon as it says anything; the limit is for a machine that is busy."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Nodes:
    """The nodes by address. Ray takes a folder for each: they would delete each other's files in one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        self.token, self.started = folder / "token", {}
        self.token.write_text(secrets.token_hex(32))
        paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        without = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        self.env = {**without, "PATH": paths, "PYTHONPATH": str(Path(clipfh.__file__).parents[1])}
        self.env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, address: str, *options: str) -> None:
        log = self.folder / f"{address}.log"
        command = ["ray", "start", *options, f"--node-ip-address={address}", f"--temp-dir={self.folder / address}"]
        command += ["--block", f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=200000000"]
        with log.open("w") as out:
            self.started[address] = subprocess.Popen(
                command, stdout=out, stderr=out, env=self.env, start_new_session=True
            )
        until(lambda: "Ray runtime started" in log.read_text() or self.started[address].poll() is not None)
        assert self.started[address].poll() is None, log.read_text()

    def start_worker(self, address: str) -> None:
        self.start(address, f"--address=127.0.0.1:{self.port}", "--num-cpus=2")

    def kill(self, address: str) -> None:
        """All processes of a node at once."""
        os.killpg(self.started[address].pid, signal.SIGKILL)
        self.started.pop(address).wait()

    def submit(self, *words: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "clipfh", "submit", "--address", self.address, "--", *map(str, words)]
        return subprocess.Popen(
            command, env=self.env, cwd=self.folder / "work", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture(scope="module")
def nodes():
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))  # a socket's path has room for 100 letters
    (folder / "work").mkdir()
    (folder / "work" / "nodes.yaml").write_text(SWEEP)
    nodes = Nodes(folder)
    try:
        head = [
            f"--port={nodes.port}",
            f"--dashboard-port={nodes.dashboard}",
            f"--ray-client-server-port={free_port()}",
        ]
        nodes.start(HEAD, "--head", "--num-cpus=0", *head)
        nodes.start_worker(FIRST)
        nodes.start_worker(SECOND)
        yield nodes
    finally:
        for address in list(nodes.started):
            nodes.kill(address)
        shutil.rmtree(folder, ignore_errors=True)


def reports(out: Path) -> dict[str, list[dict]]:
    """The reports of each trial."""
    files = (out / "trials").glob("*/metrics.jsonl")
    return {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def leaderboard(out: Path) -> dict[str, dict]:
    with (out / "leaderboard.csv").open() as file:
        return {row["trial"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def undisturbed(nodes, small_catalogue, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "sweep"
    job = nodes.submit("sweep", "nodes.yaml", small_catalogue.path, "--out", out)
    log = job.communicate()[0]
    assert job.returncode == 0 and "winner: trial" in log, log
    return out


def test_the_exit_code_and_the_line_of_a_mistake_come_home(nodes, tmp_path):
    job = nodes.submit("sweep", "nodes.yaml", tmp_path / "none", "--out", tmp_path / "out")
    assert "none: not a catalogue" in job.communicate()[0] and job.returncode == 2


def test_the_token_is_asked_for(nodes, tmp_path):
    nodes.env["RAY_AUTH_TOKEN"] = "wrong"
    try:
        job = nodes.submit("report", tmp_path)
    finally:
        del nodes.env["RAY_AUTH_TOKEN"]
    assert "wants its token" in job.communicate()[0] and job.returncode == 2


def test_trials_train_on_both_workers(undisturbed):
    assert {line["node"] for lines in reports(undisturbed).values() for line in lines} == {FIRST, SECOND}


def test_a_lost_node_costs_no_trial(nodes, undisturbed, small_catalogue, tmp_path):
    job = nodes.submit("sweep", "nodes.yaml", small_catalogue.path, "--out", tmp_path / "sweep")
    hit = until(
        lambda: job.poll() or [t for t, r in reports(tmp_path / "sweep").items() if r and r[-1]["node"] == FIRST]
    )
    nodes.kill(FIRST)
    nodes.start_worker(THIRD)
    log = job.communicate()[0]
    assert job.returncode == 0, log

    assert f"trial {hit[0]} failed and starts again" in log
    assert reports(tmp_path / "sweep")[hit[0]][-1]["node"] in (SECOND, THIRD)
    expected, found = leaderboard(undisturbed), leaderboard(tmp_path / "sweep")
    assert found.keys() == expected.keys() and len(found) == 5
    for trial, row in found.items():
        assert row["status"] in ("done", "zero-shot")
        for setting in ("optimizer.lr", "loss.triplet", "images"):
            assert row[setting] == expected[trial][setting]
        assert float(row["val_mAP"]) == pytest.approx(float(expected[trial]["val_mAP"]), abs=1e-4)
    steps = {trial: [line["step"] for line in lines] for trial, lines in reports(tmp_path / "sweep").items()}
    assert steps == {trial: list(range(8, 65, 8)) for trial in ("0001", "0002", "0003", "0004")}
