"""Trials under Ray Tune without training: what is told, freed and stopped, and what a resumed search goes on with."""

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import tune
from test_searcher import open_searcher

from clipfh import UserError
from clipfh.cluster import ray_private
from clipfh.cluster.resources import Resources
from clipfh.storage import run_folder, store
from clipfh.storage.store import Folder
from clipfh.sweep import tuner
from clipfh.sweep.leaderboard import Leaderboard

RESOURCES = Resources(1, 1.0, 0.0, 1)
ZERO_SHOT = [{"trial": "0000", "status": "zero-shot", "val_mAP": "0.1", "images": 0, "seconds": 0}]


def make_watch(folder: Path, log=print, ask=lambda left: None, **changes) -> tuner.Watch:
    """The watch of a sweep of three trials that starts in the folder or is resumed there."""
    searcher = open_searcher(folder, room=1, **{"trials": 3, **changes})
    board = Leaderboard(Folder(folder), searcher.sweep, searcher.study, zero_shot=ZERO_SHOT)
    return tuner.Watch(searcher, board, log, ask=ask)


def start(watch: tuner.Watch, trial_id: str, **last) -> SimpleNamespace:
    """A trial as Tune has it."""
    config = watch.searcher.suggest(trial_id)
    failed = {"error_file": None, "get_error": lambda: "Traceback\nboom"}
    return SimpleNamespace(trial_id=trial_id, config=config, last_result=last, **failed)


@pytest.fixture
def freed(monkeypatch) -> list[str]:
    """Runs whose leftovers on the cluster were freed."""
    runs: list[str] = []
    monkeypatch.setattr(tuner, "RunQueue", lambda: SimpleNamespace(leave=lambda run: None))
    monkeypatch.setattr(ray_private, "release", runs.append)
    return runs


def test_what_ends_a_trial_is_in_the_study_before_anything_of_it_is_freed(tmp_path, freed):
    lines, seen = [], []
    watch = make_watch(tmp_path, log=lines.append)
    watch.free = lambda rows: seen.append((rows[0], [trial.state.name for trial in watch.searcher.study.trials]))
    watch.on_trial_complete(1, [], start(watch, "a", images=64, best_val_mAP=0.7, finished=True))
    watch.on_step_end(1, [])
    watch.on_trial_error(1, [], start(watch, "b", images=64, best_val_mAP=0.2))
    watch.on_step_end(1, [])
    assert [(row["trial"], row["status"], states) for row, states in seen] == [
        ("0001", "done", ["COMPLETE"]),
        ("0001", "done", ["COMPLETE", "FAIL"]),
    ]
    assert freed == [str(tmp_path / "trials" / number) for number in ("0001", "0002")]
    assert lines == ["trial 0001 done (1 of 3 trials over)", "trial 0002 failed (2 of 3 trials over)"]
    assert Leaderboard(Folder(tmp_path), watch.board.sweep, watch.board.study, ZERO_SHOT).rows()[1]["error"] == "boom"


def test_what_a_trial_crashed_of_is_read_where_tune_wrote_it(tmp_path):
    (tmp_path / "error.txt").write_text("Failure # 1\nTraceback\nmemory was nearly full\n\n")
    trial = SimpleNamespace(error_file=str(tmp_path / "error.txt"), get_error=lambda: None)
    assert tuner._last_error(trial) == "memory was nearly full"


def test_settings_that_cant_be_trained_fail_at_once_and_the_sampler_hears_of_it(tmp_path, freed):
    no_memory = UserError("the GPU's memory is too small: give --batch.chunk")
    last = {"images": 0, "val_mAP": 0.0, tuner.OBJECTIVE: 0.0, "failed": str(no_memory), "done": True}

    lines = []
    watch = make_watch(tmp_path, log=lines.append)
    trial = start(watch, "a", **last)
    watch.on_trial_result(1, [trial], trial, last)
    watch.on_trial_complete(1, [trial], trial)
    watch.on_step_end(1, [trial])
    assert lines[0] == f"trial 0001 can't be trained: {no_memory}"
    assert watch.searcher.study.trials[0].value == 0.0


def test_a_resumed_watch_counts_the_trials_of_before_and_their_best(tmp_path, freed):
    (tmp_path / "sweep.yaml").touch()
    lines, left = [], []
    watch = make_watch(tmp_path)
    watch.on_trial_complete(1, [], start(watch, "a", images=64, best_val_mAP=0.7, finished=True))
    watch.on_step_end(1, [])
    resumed = make_watch(tmp_path, log=lines.append, ask=left.append)
    resumed.on_step_begin(1, [])
    trial, report = start(resumed, "b"), {"images": 64, "val_mAP": 0.5, "best_val_mAP": 0.5}
    resumed.on_trial_result(1, [trial], trial, report)
    assert left == [2] and lines == ["trial 0002: 64 images, val mAP 0.500, best so far 0.700"]


@pytest.mark.parametrize("failure", ["on_trial_recover", "on_trial_error"])
def test_a_full_disk_ends_the_sweep_before_it_fails_its_trials(tmp_path, freed, monkeypatch, failure):
    """A journal may still have room for a line where nothing else can be written."""
    watch = make_watch(tmp_path)
    trial = start(watch, "a", images=64, best_val_mAP=0.2)

    def write(path: Path, content: str, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write", write)
    getattr(watch, failure)(1, [trial], trial)
    with pytest.raises(OSError, match="No space left"):
        watch.on_step_end(1, [trial])
    assert [each.state.name for each in watch.searcher.study.trials] == ["RUNNING"]


def report(images: int, score: float) -> dict:
    return {"images": images, "best_val_mAP": score}


HALVED = {"budget": {"images": 192, "first_rung": 64, "reduction": 2}}


def write_reports(out: Path, number: str, *reports: dict) -> None:
    folder = out / "trials" / number
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in reports))


def test_rungs_are_as_before_a_kill(tmp_path, freed):
    """Of three trials at a rung the lowest is stopped; one that has passed it is not stopped there again."""
    watch, reports = make_watch(tmp_path, **HALVED), [report(64, 0.2), report(128, 0.6)]
    watch.searcher.room = lambda: 2
    first = start(watch, "a", **report(64, 0.5))
    assert watch.searcher.suggest("b")
    write_reports(tmp_path, "0001", report(64, 0.5))
    write_reports(tmp_path, "0002", *reports)
    watch.on_trial_complete(1, [], first)
    watch.on_step_end(1, [])
    scheduler = tuner.ResumedHalving(make_watch(tmp_path, **HALVED).board)
    second, third, fourth = (SimpleNamespace(trial_id=n, config={"number": n}) for n in ("0002", "0003", "0004"))
    for trial in (second, third, fourth):
        scheduler.on_trial_add(None, trial)
    assert [scheduler.on_trial_result(None, second, each) for each in reports] == ["CONTINUE"] * 2
    assert scheduler.on_trial_result(None, third, report(64, 0.4)) == "CONTINUE", "above the median of 0.5 and 0.2"
    assert scheduler.on_trial_result(None, third, report(128, 0.4)) == "STOP", "below 0.6"
    assert scheduler.on_trial_result(None, fourth, report(64, 0.35)) == "STOP", "below the median of 0.5, 0.2 and 0.4"


def test_what_a_run_reported_after_it_was_stopped_is_on_no_rung(tmp_path, freed):
    watch = make_watch(tmp_path, **HALVED)
    write_reports(tmp_path, "0001", report(64, 0.9), report(128, 0.9))
    watch.on_trial_complete(1, [], start(watch, "a", **report(64, 0.3)))
    watch.on_step_end(1, [])
    resumed = make_watch(tmp_path, **HALVED)
    scheduler, second = tuner.ResumedHalving(resumed.board), start(resumed, "b")
    scheduler.on_trial_add(None, second)
    assert scheduler.on_trial_result(None, second, report(128, 0.1)) == "CONTINUE"
    assert scheduler.on_trial_result(None, second, report(192, 0.1)) == "STOP", "the first rung has its report"


class Instant(tune.Trainable):
    """A trial without training: a report of 64 images a step, three in all."""

    def setup(self, config, sweep=None, inputs=None, out="", resources=None):
        self.out = Path(out)
        self.reset_config(config)

    def reset_config(self, new_config):
        self.folder = self.out / "trials" / new_config["number"]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "starts").open("a") as file:
            file.write(f"{json.dumps(new_config['settings'])}\n")
        self.reports = 0
        return True

    def step(self):
        self.reports += 1
        line = {"step": self.reports, "val_mAP": 0.5, **report(64 * self.reports, 0.5)}
        lines = run_folder.read_metrics(self.folder)
        if len(lines) < self.reports:
            (self.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in (*lines, line)))
        return {**line, "done": self.reports == 3, "finished": self.reports == 3}


def test_a_search_that_breaks_off_goes_on_with_what_is_left(tmp_path, ray_cluster, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
    monkeypatch.setattr(tuner, "Trial", Instant)
    (tmp_path / "sweep.yaml").touch()

    def begun() -> dict[str, list[str]]:
        return {file.parent.name: file.read_text().splitlines() for file in tmp_path.glob("trials/*/starts")}

    def search(break_at: int) -> list[str]:
        def ask(left: int) -> None:
            if left == break_at and run_folder.read_metrics(tmp_path / "trials" / f"{4 - left:04d}"):
                raise KeyError("broken off")

        lines = []
        watch = make_watch(tmp_path, log=lines.append, ask=ask)
        tuner.run_trials(watch, None, RESOURCES)
        return lines

    with pytest.raises(KeyError, match="broken off"):
        search(break_at=2)  # the first trial of three is over, the second has reported
    before = begun()
    assert [trial.state.name for trial in make_watch(tmp_path).searcher.study.trials][:2] == ["COMPLETE", "WAITING"]
    assert search(break_at=-1)[-1].endswith("(3 of 3 trials over)")
    after = begun()
    assert after["0001"] == before["0001"], "it was over"
    assert after["0002"] == before["0002"] * 2, "with the settings it had"
    assert sorted(after) == ["0001", "0002", "0003"] and search(break_at=-1) == []
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.yaml", "study.journal", "leaderboard.csv", "trials"}
