"""How things stand is read from files: a run, a sweep under way, one that is over."""

import json

import pytest
import yaml

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.report import status

BOARD = """rank,trial,status,val_mAP,images,seconds,optimizer.lr,error
1,0001,done,0.510000,2000,20,0.001,
2,0000,zero-shot,0.230000,0,0,,
3,0002,stopped,0.200000,1000,10,0.1,
4,0003,running,,0,0,0.1,
5,0005,failed,,0,0,0.1,OSError
"""


def report(images: int, score: float, rate: float = 100.0) -> str:
    scores = {"val_mAP": score, "best_val_mAP": max(score, 0.4)}
    return (
        json.dumps({"images": images, "epoch": images / 500, **scores, "images_per_second": rate, "loss": 1.5}) + "\n"
    )


def write_sweep_file(folder, trials: int, **final: object) -> None:
    file = {"name": "tiny", "stage": "image", "search": {"optimizer.lr": {"loguniform": [0.001, 0.1]}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**file, "trials": trials, "final": final}))


def make_run(folder, lines: str, **budget) -> None:
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(schema.to_json(presets.resolve("image", None, budget)))
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "run.json").write_text("{}")


def test_a_run_under_way(tmp_path):
    make_run(tmp_path / "run", report(1000, 0.3), **{"budget.epochs": 4.0})
    found = status.describe(tmp_path / "run")
    assert "1,000 of 2,000 images, val mAP 0.3000 (best 0.4000)" in found
    assert "100 images/s, about 10 s left if it runs" in found


def test_a_run_that_is_over_and_one_that_has_just_begun(tmp_path):
    make_run(tmp_path / "over", report(2048, 0.3), **{"budget.images": 2000})
    make_run(tmp_path / "new", "", **{"budget.images": 2000})
    patient = report(500, 0.3).replace("}", ', "reports_since_best": 2}')
    make_run(tmp_path / "patient", patient, **{"budget.images": 2000, "budget.patience": 2})
    assert "finished; last report" in status.describe(tmp_path / "patient")
    assert "finished; last report" in status.describe(tmp_path / "over")
    assert "0 of 2,000 images" in status.describe(tmp_path / "new")


@pytest.fixture
def sweep(tmp_path):
    write_sweep_file(tmp_path, trials=8)
    (tmp_path / "leaderboard.csv").write_text(BOARD)
    for name in ("0000", "0001", "0002", "0005"):
        (tmp_path / "trials" / name).mkdir(parents=True)
    make_run(tmp_path / "trials" / "0003", report(1000, 0.55), **{"budget.images": 2000})
    make_run(tmp_path / "trials" / "0004", "", **{"budget.images": 2000})
    return tmp_path


def test_a_sweep_under_way(sweep):
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    lines = status.describe(sweep).splitlines()
    assert lines[0] == "sweep tiny, 8 trials: 1 done, 1 stopped, 1 failed, 2 running, 3 to come"
    assert lines[1] == "best so far: val mAP 0.5500, trial 0003 (zero-shot 0.2300)"
    assert "trial 0003: 1,000 of 2,000 images" in lines[2] and lines[3] == "trial 0004: no report yet"
    assert lines[4] == "100 images/s in all, about 40 s left if it runs"  # 3 x 1,000 to come, 1,000 of trial 0003
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("*")} == before


def test_the_live_table_has_those_that_run_first_and_the_settings_that_vary(sweep):
    shown = status.table(sweep, rows=6)
    assert [column.header for column in shown.columns][:3] == ["trial", "", "lr"]
    cells = list(zip(*(column.cells for column in shown.columns), strict=True))
    assert [row[0] for row in cells] == ["0003", "0004", "0001"], "no more rows than there is room for"
    assert cells[0][3:] == ("1,000", "2,000", "1.500", "0.550", "0.550", "10 s")
    assert cells[2][:4] == ("0001", "done", "0.001", "2,000")


def refit_report(images: int, rate: float) -> str:
    """A line of a run that trains on its validation items."""
    return json.dumps({"images": images, "epoch": images / 500, "images_per_second": rate, "loss": 1.5}) + "\n"


def test_runs_after_the_search_are_shown_and_those_to_come_counted(sweep):
    ended = BOARD.replace("4,0003,running,,0", "4,0003,done,,2000")
    (sweep / "leaderboard.csv").write_text(ended + "6,0004,done,,2000,0,0.1,\n")
    write_sweep_file(sweep, trials=5, top=2, seeds=2, refit=True)
    assert status.describe(sweep).splitlines()[-1].startswith("time left: not known")
    make_run(sweep / "final" / "0001-again-1", report(2000, 0.5), **{"budget.images": 2000})
    make_run(sweep / "final" / "0001-again-2", report(1500, 0.5), **{"budget.images": 2000})
    make_run(sweep / "final" / "0003-again-1", report(1000, 0.5), **{"budget.images": 2000})
    lines = status.describe(sweep).splitlines()
    assert lines[2] == "final runs: 1 over, 2 running, 2 to come"
    assert "0001-again-2: 1,500 of 2,000 images, val mAP 0.5000" in lines[3] and "0003-again-1: 1,000 of" in lines[4]
    # 500 + 1,000 are left and 2,000 to come at 200 images/s, then the refit's 2,000 at 100
    assert lines[5] == "200 images/s in all, about 38 s left if it runs"
    assert list(status.table(sweep, rows=9).columns[0].cells)[:2] == ["0001-again-2", "0003-again-1"]


def test_a_search_under_way_counts_the_final_runs_to_come(sweep):
    write_sweep_file(sweep, trials=8, top=1, seeds=1, refit=True)
    # 3 x 1,000 of trials to come, 1,000 of trial 0003; then 2,000, and 2,000 of the refit
    assert status.describe(sweep).splitlines()[-1] == "100 images/s in all, about 80 s left if it runs"


def test_a_refit_has_no_score_and_the_runs_before_it_are_over(sweep):
    (sweep / "leaderboard.csv").write_text(BOARD.replace("running", "done") + "6,0004,done,,2000,0,0.1,\n")
    write_sweep_file(sweep, trials=5, top=2, seeds=1, refit=True)
    diverged = json.dumps({"step": 9, "images": 999, "val_mAP": 0.0, "best_val_mAP": 0.0, "diverged": "nan"})
    make_run(sweep / "final" / "0001-again-1", report(500, 0.5) + diverged, **{"budget.images": 2000})
    patient = report(500, 0.5).replace("}", ', "reports_since_best": 2}')
    make_run(sweep / "final" / "0003-again-1", patient, **{"budget.images": 2000, "budget.patience": 2})
    make_run(sweep / "final" / "refit", refit_report(1000, 50.0), **{"budget.images": 2000})
    lines = status.describe(sweep).splitlines()
    assert lines[2] == "final runs: 2 over, 1 running"
    assert lines[3].startswith("refit: 1,000 of 2,000 images, 50 images/s, last report")
    assert lines[4] == "50 images/s in all, about 20 s left if it runs"


def test_a_sweep_that_is_over(sweep):
    (sweep / "summary.json").write_text("{}")
    assert status.describe(sweep).splitlines()[-1] == f"finished: {sweep / 'report.html'}"


def test_a_sweep_that_has_just_begun(tmp_path):
    write_sweep_file(tmp_path, trials=8)
    assert status.describe(tmp_path).splitlines()[:2] == [
        "sweep tiny, 8 trials: 8 to come",
        "best so far: no report yet",
    ]


def test_neither_run_nor_sweep(tmp_path):
    with pytest.raises(UserError, match="neither a run nor a sweep"):
        status.describe(tmp_path)
