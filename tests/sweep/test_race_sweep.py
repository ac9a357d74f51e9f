"""A sweep of several models, whole: it ends on the right one, also where it was killed in the race."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from contenders import LABELS, write_weights

import clipfh
from clipfh.sweep import race

SWEEP = {
    "name": "models",
    "base": {"batch.items": 8, "batch.views": 2, "augment.crop_min": 0.5},
    "race": {"keep": 2},
    "search": {"optimizer.lr": {"loguniform": [1e-6, 1e-5]}},
    "points": [{"model": label} for label in LABELS[1:]],
    "trials": 2,
    "budget": {"images": 128, "report_every": 64},
    "placement": {"concurrent": 2},
}


def command(folder: Path, catalogue: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "clipfh", "sweep", str(folder / "models.yaml"), str(catalogue)),
        *("--out", str(folder / "out"), *options),
    ]


def write(folder: Path, **changes) -> None:
    (folder / "models.yaml").write_text(yaml.safe_dump({**SWEEP, "models": write_weights(folder), **changes}))


def assert_right(out: Path) -> None:
    """The winner's model is the one that is whole; each zero-shot model has its line; the other two were searched."""
    with (out / "leaderboard.csv").open() as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert {trial: row["model"] for trial, row in rows.items()} == {
        **{f"0000-{number}": label for number, label in enumerate(LABELS, 1)},
        **dict(zip(("0001", "0002"), LABELS[1:], strict=True)),
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"] == LABELS[2] and summary["trials"] == 2 and summary["failed"] == 0
    assert summary["zero_shot_val_mAP"] == pytest.approx(float(rows["0000-3"]["val_mAP"]), abs=1e-6)
    assert {each["model"] for each in summary["race"] if each["kept"]} == set(LABELS[1:])
    for trial, label in zip(("0001", "0002"), LABELS[1:], strict=True):
        first = json.loads((out / "trials" / trial / "metrics.jsonl").read_text().splitlines()[0])
        start = next(each["val_mAP"] for each in summary["race"] if each["model"] == label)
        assert first["start_val_mAP"] == start, "a trial starts from its own model"
    page = (out / "report.html").read_text()
    assert "The race" in page and all(label in page for label in LABELS)


def assert_final_run_is_larger_and_mixed(out: Path) -> None:
    """The leader was trained again at other pixels, and the mix is of that run alone; the best step of all won."""
    (final,) = out.glob("final/*/experiment.json")
    searched = json.loads((out / "trials" / final.parent.name[:4] / "experiment.json").read_text())["model"]
    assert json.loads(final.read_text())["model"] == {**searched, "image_size": 48}
    summary = json.loads((out / "summary.json").read_text())
    steps = {step["name"]: step for step in summary["soup"]["steps"]}
    assert {"zero-shot", "mix"} <= steps.keys() <= {"zero-shot", "best trial", "mix"}, "one run makes no soup"
    assert steps["mix"]["blend"]["runs"] == [final.parent.relative_to(out).as_posix()]
    assert set(summary["soup"]["left_out"].values()) == {"begins with another model, or another size of images"}
    (won,) = (step for step in steps.values() if step["won"])
    assert won["val_mAP"] == max(step["val_mAP"] for step in steps.values())
    assert won["test"]["mAP"] == summary["test"]["mAP"]


@pytest.mark.slow
@pytest.mark.resilience
def test_a_sweep_killed_in_its_race_of_three_models_ends_on_the_right_one(small_catalogue, tmp_path):
    write(tmp_path, final={"top": 1, "seeds": 1, "image_size": 48})
    out, env = tmp_path / "out", {**os.environ, "PYTHONPATH": str(Path(clipfh.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    process = subprocess.Popen(command(tmp_path, small_catalogue.path), start_new_session=True, **pipes)
    while not any(each.val_mAP >= 0 for each in race.read(out)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    measured = {each.model: each.milliseconds for each in race.read(out) if each.val_mAP >= 0}
    before = {file: file.stat().st_mtime_ns for file in out.glob("trials/*/metrics.json")}
    assert measured and not (out / "summary.json").exists()
    resumed = subprocess.run(command(tmp_path, small_catalogue.path, "--resume"), check=False, **pipes)
    assert resumed.returncode == 0, resumed.stdout
    assert {file: file.stat().st_mtime_ns for file in before} == before, "measured once"
    assert measured.items() <= {each.model: each.milliseconds for each in race.read(out)}.items()
    assert_right(out)
    assert_final_run_is_larger_and_mixed(out)
