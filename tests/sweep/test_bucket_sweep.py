"""A sweep whose catalogue and results lie in a bucket alone, killed in the middle and gone on with."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import object_store
import pytest
import yaml

import clipfh
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder

SWEEP = {
    "name": "bucket",
    "stage": "image",
    "base": {"model.name": "clipfh-small", "batch.items": 8, "augment.crop_min": 0.5},
    "search": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
    "trials": 2,
    "budget": {"images": 192, "report_every": 64, "first_rung": 64, "reduction": 2},
    "placement": {"concurrent": 2},
    "final": {"top": 1, "seeds": 1},
}


@pytest.mark.slow
@pytest.mark.resilience
def test_a_killed_sweep_goes_on_from_the_bucket(bucket, source, tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    uri, out = bucket.uri("catalogue"), Folder(bucket.uri("sweep"))
    clipfh.prepare(source, uri, image_size=64)
    words = [sys.executable, "-m", "clipfh", "sweep", str(tmp_path / "sweep.yaml"), uri, "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(Path(clipfh.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env, "cwd": tmp_path}
    process = subprocess.Popen(words, start_new_session=True, **pipes)
    while not (out / layout.TRIALS / "0001" / layout.CHECKPOINTS).exists(layout.SNAPSHOT):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved, bucket.requests[:] = run_folder.latest_step(out / layout.TRIALS / "0001"), []
    began = time.monotonic()
    resumed = subprocess.run([*words, "--resume"], check=False, **pipes)
    assert resumed.returncode == 0, resumed.stdout
    minutes = (time.monotonic() - began) / 60
    requests = list(bucket.requests)
    rows = list(csv.DictReader(io.StringIO(out.read_text(layout.LEADERBOARD))))
    assert {row["trial"] for row in rows} == {"0000", "0001", "0002"}
    assert {row["status"] for row in rows} <= {"zero-shot", "done", "stopped"}
    steps = [line["step"] for line in run_folder.read_metrics(out / layout.TRIALS / "0001")]
    assert saved > 0 and steps == sorted(set(steps)), "nothing is run twice"
    assert out.read_json(layout.SUMMARY)["trials"] == 2 and out.exists(f"{layout.BEST}/{layout.EXPORTED_WEIGHTS}")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"], "all of it is in the bucket"
    assert_sparing(requests, 2 * minutes)
    assert object_store.CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in resumed.stdout
    secret = object_store.CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode()
    assert [name for name, content in bucket.objects("sweep").items() if secret in content] == []


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
