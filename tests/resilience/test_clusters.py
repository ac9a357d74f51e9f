"""Three nodes on one machine, each with its own Ray, behind a token: jobs from outside, a lost node, a killed sweep."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import object_store
import pytest
from nodes import HEAD, THIRD, Nodes, leaderboard, reports, until

import clipfh
from clipfh.config import schema
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder

pytestmark = [pytest.mark.resilience, pytest.mark.slow]

# No rungs, and fewer trials than the sampler draws blindly: nothing that a trial does depends on when it does it. Small
# learning rates, with which rounding stays small: other processes have another number of threads.
SWEEP = """
name: nodes
stage: image
base: {model.name: clipfh-small, batch.items: 8, batch.views: 2, budget.report_every: 128, augment.crop_min: 0.5}
search:
  optimizer.lr: {loguniform: [1.0e-4, 5.0e-4]}
  loss.triplet: {loguniform: [0.1, 2.0], or: 0.0}
trials: 2
budget: {images: 1536}
"""
REPORTED_STEPS = list(range(8, 97, 8))


@pytest.fixture(scope="module")
def apart(source):
    """Nodes that share nothing but a bucket, and its store, which has a catalogue."""
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))  # a socket's path has room for 100 letters
    (folder / "work").mkdir()
    with object_store.serve() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in {**store.env, "AWS_ENDPOINT_URL": store.direct}.items():
            patch.setenv(name, value)
        clipfh.prepare(source, store.uri("catalogue"), image_size=64)
        nodes = Nodes(folder, apart=True, env=store.env)
        try:
            nodes.start_all()
            for place in ("work", HEAD):
                (folder / place / "nodes.yaml").write_text(SWEEP)
            yield nodes, store
        finally:
            nodes.kill_all()
            shutil.rmtree(folder, ignore_errors=True)


def test_two_jobs_from_outside_both_end_well(apart):
    """The first to end frees nothing that the other holds."""
    nodes, store = apart
    settings = ["--model", "clipfh-small", "--batch.items", "8", "--batch.views", "2", "--cpus-per-worker", "1"]
    jobs = [
        nodes.submit(
            *("train", "image", store.uri("catalogue"), "--out", store.uri(images), "--budget.images", images),
            *settings,
        )
        for images in ("256", "1024")
    ]
    logs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], logs


def test_the_exit_code_and_the_line_of_a_mistake_come_home(apart):
    nodes, store = apart
    job = nodes.submit("sweep", "nodes.yaml", store.uri("none"), "--out", store.uri("out"))
    assert "none: not a catalogue" in job.communicate()[0] and job.returncode == 2


def test_the_token_is_asked_for(apart, monkeypatch):
    nodes, store = apart
    monkeypatch.setitem(nodes.env, "RAY_AUTH_TOKEN", "wrong")
    job = nodes.submit("report", store.uri("run"))
    assert "wants its token" in job.communicate()[0] and job.returncode == 2


def test_a_sweep_in_a_bucket_loses_a_node_then_is_killed_and_goes_on_from_the_bucket_alone(
    apart, small_catalogue, tmp_path
):
    nodes, store = apart
    out, at = Folder(store.uri("sweep")), f"127.0.0.1:{nodes.port}"
    words = ["-m", "clipfh", "sweep", "nodes.yaml", store.uri("catalogue"), "--out", out, "--address", at]
    log = tmp_path / "log"

    def start(*more: str) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(**nodes.on_head(*words, *more), stdout=file, stderr=file, start_new_session=True)

    sweep = start()

    def is_over() -> bool:
        return sweep.poll() is not None

    def at_work() -> dict[str, str]:
        """Node of each trial that has a report."""
        return {trial: lines[-1]["node"] for trial, lines in reports(out).items()}

    def saved_step(trial: str) -> int:
        return run_folder.latest_step(out / layout.TRIALS / trial)

    # The first trial with a checkpoint, which has most of its steps to go
    hit = until(lambda: next(filter(saved_step, at_work()), "over" if is_over() else ""), pause=0.5)
    lost = at_work()[hit]
    nodes.kill(lost)
    nodes.start_worker(THIRD)
    until(lambda: is_over() or at_work()[hit] != lost, pause=0.5)
    assert not is_over() and "starts again" not in log.read_text(), log.read_text()  # no failure of the trial
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert saved_step(hit) < REPORTED_STEPS[-1]
    store.requests[:], began = [], time.monotonic()

    sweep = start("--resume")
    assert sweep.wait() == 0 and "winner: trial" in log.read_text(), log.read_text()
    assert_sparing(list(store.requests), 2 * (time.monotonic() - began) / 60)
    assert {row["status"] for row in leaderboard(out).values()} == {"done", "zero-shot"}
    assert out.read_json(layout.SUMMARY)["trials"] == 2 and out.exists(f"{layout.BEST}/{layout.EXPORTED_WEIGHTS}")
    steps = {trial: [line["step"] for line in lines] for trial, lines in reports(out).items()}
    assert steps == dict.fromkeys(("0001", "0002"), REPORTED_STEPS), log.read_text()
    assert not {"sweep", "catalogue", "s3:"} & {path.name for path in (nodes.folder / HEAD).iterdir()}
    secret = object_store.CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    assert [name for name, content in store.objects("sweep").items() if secret.encode() in content] == []
    assert secret not in log.read_text()

    # The same settings in this process, undisturbed
    settings = schema.flatten(schema.load_experiment(out / layout.TRIALS / hit / layout.EXPERIMENT))
    alone = clipfh.train("image", small_catalogue, tmp_path / "alone", settings=settings)
    losses = [[line["loss"] for line in lines] for lines in (reports(out)[hit], alone.reports)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def assert_sparing(requests: list[object_store.Request], trial_minutes: float) -> None:
    """Nothing is renamed, and no folder is listed again and again."""
    assert [each for each in requests if each.kind == "copy"] == []
    listed: dict[str, list[float]] = {}
    for each in requests:
        if each.kind == "list":
            listed.setdefault("".join(each.query.get("prefix", [])), []).append(each.time)
    often = {prefix: times for prefix, times in listed.items() if len(times) > 20}
    assert {p for p, times in often.items() if sum(b - a < 1 for a, b in pairwise(times)) > len(times) / 2} == set()
    print(f"{len(requests) / trial_minutes:.0f} requests a trial-minute, {sum(map(len, listed.values()))} lists in all")
