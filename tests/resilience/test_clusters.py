"""Three nodes on one machine, each with its own Ray, behind a token: jobs from outside, and a lost node."""

import shutil
import tempfile
from pathlib import Path

import object_store
import pytest
from nodes import FIRST, SECOND, THIRD, Nodes, leaderboard, reports, until

import clipfh
from clipfh.config import schema
from clipfh.storage.store import Folder

pytestmark = [pytest.mark.resilience, pytest.mark.slow]

# No rungs, and fewer trials than the sampler draws blindly: nothing that a trial does depends on when it does it.
SWEEP = """
name: nodes
stage: image
base: {model.name: clipfh-small, batch.items: 8, batch.views: 2, budget.report_every: 128, augment.crop_min: 0.5}
search:
  optimizer.lr: {loguniform: [1.0e-4, 2.0e-3]}
  loss.triplet: {loguniform: [0.1, 2.0], or: 0.0}
trials: 2
budget: {images: 1024}
"""


@pytest.fixture(scope="module")
def nodes():
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))  # a socket's path has room for 100 letters
    (folder / "work").mkdir()
    (folder / "work" / "nodes.yaml").write_text(SWEEP)
    nodes = Nodes(folder)
    try:
        nodes.start_all()
        yield nodes
    finally:
        nodes.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def apart(monkeypatch):
    """Nodes that share nothing but a bucket, and its store."""
    folder = Path(tempfile.mkdtemp(prefix="clipfh-", dir="/tmp"))
    (folder / "work").mkdir()
    (folder / "work" / "nodes.yaml").write_text(SWEEP)
    with object_store.serve() as store:
        for name, value in {**store.env, "AWS_ENDPOINT_URL": store.direct}.items():
            monkeypatch.setenv(name, value)
        nodes = Nodes(folder, apart=True, env=store.env)
        try:
            nodes.start_all()
            yield nodes, store
        finally:
            nodes.kill_all()
            shutil.rmtree(folder, ignore_errors=True)


def test_nodes_that_share_a_bucket_alone_lose_one_and_end_a_sweep_from_outside(apart, source):
    nodes, store = apart
    clipfh.prepare(source, store.uri("catalogue"), image_size=64)
    out = Folder(store.uri("sweep"))
    job = nodes.submit("sweep", "nodes.yaml", store.uri("catalogue"), "--out", out)
    on = set[str]()

    def are_both_at_work() -> bool:
        on.update(lines[-1]["node"] for lines in reports(out).values())
        return job.poll() is not None or on == {FIRST, SECOND}

    until(are_both_at_work, pause=1.0)
    nodes.kill(FIRST)
    nodes.start_worker(THIRD)
    log = job.communicate()[0]
    assert job.returncode == 0 and on == {FIRST, SECOND}, log
    assert {row["status"] for row in leaderboard(out).values()} == {"done", "zero-shot"}
    steps = {trial: [line["step"] for line in lines] for trial, lines in reports(out).items()}
    assert steps == {trial: list(range(8, 65, 8)) for trial in ("0001", "0002")}


def test_the_exit_code_and_the_line_of_a_mistake_come_home(nodes, tmp_path):
    job = nodes.submit("sweep", "nodes.yaml", tmp_path / "none", "--out", tmp_path / "out")
    assert "none: not a catalogue" in job.communicate()[0] and job.returncode == 2


def test_the_token_is_asked_for(nodes, tmp_path, monkeypatch):
    monkeypatch.setitem(nodes.env, "RAY_AUTH_TOKEN", "wrong")
    job = nodes.submit("report", tmp_path)
    assert "wants its token" in job.communicate()[0] and job.returncode == 2


@pytest.mark.slow
def test_two_runs_at_once_both_end_well(nodes, small_catalogue, tmp_path):
    settings = ["--model", "clipfh-small", "--batch.items", "8", "--batch.views", "2", "--cpus-per-worker", "1"]
    jobs = [
        nodes.submit(
            "train", "image", small_catalogue.path, "--out", tmp_path / images, "--budget.images", images, *settings
        )
        for images in ("512", "1024")
    ]
    logs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], logs


def test_a_lost_node_costs_no_trial(nodes, small_catalogue, tmp_path):
    """Nor does it change one: the same settings in this process, undisturbed, come to the same losses."""
    out = tmp_path / "sweep"
    job = nodes.submit("sweep", "nodes.yaml", small_catalogue.path, "--out", out)
    hit = until(lambda: job.poll() or [t for t, r in reports(out).items() if r and r[-1]["node"] == FIRST])
    nodes.kill(FIRST)
    nodes.start_worker(THIRD)
    log = job.communicate()[0]
    assert job.returncode == 0 and "winner: trial" in log, log

    assert f"trial {hit[0]}: warning: workers were lost, goes on from step" in log
    assert "starts again" not in log, "a lost node is no failure of the trial"
    assert reports(out)[hit[0]][-1]["node"] in (SECOND, THIRD)
    rows = leaderboard(out)
    assert {trial: row["status"] for trial, row in rows.items()} == {
        "0000": "zero-shot",
        "0001": "done",
        "0002": "done",
    }
    steps = {trial: [line["step"] for line in lines] for trial, lines in reports(out).items()}
    assert steps == {trial: list(range(8, 65, 8)) for trial in ("0001", "0002")}
    settings = schema.flatten(schema.load_experiment(out / "trials" / hit[0] / "experiment.json"))
    alone = clipfh.train("image", small_catalogue, tmp_path / "alone", settings=settings)
    losses = [[line["loss"] for line in lines] for lines in (reports(out)[hit[0]], alone.reports)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
