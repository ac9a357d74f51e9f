"""The leaderboard without training: what it says of trials that are over, that run, and of those before a kill."""

import csv
import json
from pathlib import Path

import pytest
from test_searcher import open_searcher

from clipfh import UserError
from clipfh.storage.store import Folder
from clipfh.sweep.leaderboard import Leaderboard
from clipfh.sweep.searcher import StudySearcher

REPORTS = [
    {"step": step, "images": 64 * step, "best_val_mAP": 0.1 * step, "began": 10.0, "time": 10.0 + 2 * step}
    for step in (1, 2, 3)
]
ZERO_SHOT_ROW = {"trial": "0000", "status": "zero-shot", "val_mAP": "0.250000", "images": 0, "seconds": 0}
DONE = {"images": 192, "best_val_mAP": 0.3, "finished": True}


def write_reports(out: Path, number: str, count: int) -> None:
    folder = out / "trials" / number
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in REPORTS[:count]))


def make_board(searcher: StudySearcher, out: Path) -> Leaderboard:
    return Leaderboard(Folder(out), searcher.sweep, searcher.study, zero_shot=[ZERO_SHOT_ROW])


def end(searcher: StudySearcher, board: Leaderboard, trial: dict, last: dict, error: str = "") -> None:
    row = board.row(trial["number"], trial["settings"], last, error)
    searcher.finish(trial["number"], row, None if error else last["best_val_mAP"])


@pytest.mark.parametrize(
    "last,error,expected",
    [
        (DONE, "", ("done", "0.300000", "")),
        ({**DONE, "finished": False}, "", ("stopped", "0.300000", "")),
        ({**DONE, "best_val_mAP": 0.0, "diverged": "loss is nan"}, "", ("diverged", "0.000000", "loss is nan")),
        ({"images": 64, "best_val_mAP": 0.0, "failed": "no memory"}, "", ("failed", None, "no memory")),
        ({"images": 64, "best_val_mAP": 0.1}, "RuntimeError: a bug", ("failed", "0.100000", "RuntimeError: a bug")),
        ({}, "OutOfMemoryError", ("failed", None, "OutOfMemoryError")),
    ],
)
def test_how_a_trial_ended(tmp_path, last, error, expected):
    row = make_board(open_searcher(tmp_path), tmp_path).row("0001", {}, last, error)
    assert (row["status"], row.get("val_mAP"), row["error"]) == expected


def test_the_leaderboard_of_a_resumed_sweep_has_the_trials_of_before(tmp_path):
    searcher = open_searcher(tmp_path)
    board = make_board(searcher, tmp_path)
    trials = [searcher.suggest(number) for number in ("0001", "0002", "0003")]
    write_reports(tmp_path, "0001", 3)
    write_reports(tmp_path, "0003", 2)
    end(searcher, board, trials[0], DONE)
    end(searcher, board, trials[1], {}, "it crashed")
    before = board.write()
    assert [(row["trial"], row["status"]) for row in before] == [
        ("0001", "done"), ("0000", "zero-shot"), ("0003", "running"), ("0002", "failed")
    ]  # fmt: skip
    assert before[2] == {
        "trial": "0003", "status": "running", "val_mAP": "0.200000", "images": 128, "seconds": 4.0, "error": "",
        **trials[2]["settings"],
    }  # fmt: skip

    resumed = open_searcher(tmp_path)
    assert resumed.suggest("again") == trials[2]
    text = (tmp_path / "leaderboard.csv").read_text()
    assert make_board(resumed, tmp_path).write() == before and (tmp_path / "leaderboard.csv").read_text() == text
    assert [row["rank"] for row in csv.DictReader(text.splitlines())] == ["1", "2", "3", "4"]


def test_a_stopped_trial_has_the_images_it_was_stopped_at(tmp_path):
    """Its run may report once more before it ends."""
    write_reports(tmp_path, "0001", 3)
    row = make_board(open_searcher(tmp_path), tmp_path).row("0001", {}, {"images": 128, "best_val_mAP": 0.2})
    assert (row["status"], row["images"], row["val_mAP"]) == ("stopped", 128, "0.200000")


def test_a_sweep_whose_trials_all_failed_has_no_winner(tmp_path):
    searcher = open_searcher(tmp_path)
    board = make_board(searcher, tmp_path)
    trials = [searcher.suggest(number) for number in ("0001", "0002")]
    for trial in trials:
        end(searcher, board, trial, {}, "no memory")
    with pytest.raises(UserError, match="all 2 trials failed .* trial 0002 of: no memory; .* --resume --retry-failed"):
        board.require_score()
    end(searcher, board, searcher.suggest("0003"), DONE)
    board.require_score()
