"""A trial between Tune and its run, without Ray: what each step returns, how it ends, how its process is used again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipfh import UserError
from clipfh.cluster.resources import Resources
from clipfh.config import schema
from clipfh.storage import layout
from clipfh.storage.store import Folder
from clipfh.sweep import trial
from clipfh.sweep.trial import OBJECTIVE, Trial
from clipfh.train.run_inputs import model_key

RESOURCES = Resources(1, 1.0, 0.0, 1)


class Thread:
    """The thread of a run that ends after some looks at it, and leaves what the test says."""

    def __init__(self, *_, looks: int = 0, error: Exception | None = None, interruptions: tuple[str, ...] = ()) -> None:
        self.looks, self.error, self.interruptions, self.calls = looks, error, interruptions, []

    def is_alive(self):
        self.looks -= 1
        return self.looks >= 0

    def take_interruptions(self):
        lines, self.interruptions = self.interruptions, ()
        return lines

    def __getattr__(self, name):
        return lambda *seconds: self.calls.append((name, *seconds))


def make_trial(out: Path, thread: Thread, lines: list[dict] = (), saved: int = 10**6, total: int = 32) -> Trial:
    """A trial whose run has left these reports, with checkpoints up to the step `saved`."""
    made = Trial.__new__(Trial)
    made.thread, made.folder, made.total, made.reported_step = thread, Folder(out), total, 0
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / layout.EXPERIMENT).touch()
    (out / layout.REPORTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    snapshot = {"latest_checkpoint_result": {"metrics": {"step": saved}}}
    (out / "checkpoints" / layout.SNAPSHOT).write_text(json.dumps(snapshot))
    return made


def line(step: int, **more) -> dict:
    return {"step": step, "images": 16 * step, "val_mAP": 0.3, OBJECTIVE: 0.4, **more}


def test_each_step_returns_the_next_report_and_the_last_one_only_when_the_run_is_over(tmp_path):
    thread = Thread(looks=4, interruptions=("workers were lost",))
    made = make_trial(tmp_path, thread, [line(16, warnings=["slow"]), line(32)])
    first, second = made.step(), made.step()
    assert (first["images"], first["done"], first["warnings"]) == (256, False, ["workers were lost", "slow"])
    assert (second["images"], second["done"], second["warnings"]) == (512, True, [])
    assert thread.calls == [("give_way",), ("wait", 1)] * 3, "it waits for what the run has yet to free"


def test_a_report_counts_once_its_checkpoint_is_saved(tmp_path):
    thread = Thread(looks=2)
    made = make_trial(tmp_path, thread, [line(16)], saved=0)
    result = made.step()
    assert result["done"] and thread.calls == [("give_way",), ("wait", 1)] * 2


def test_a_trial_looks_for_reports_once_a_second(tmp_path):
    """They lie on a file system that other machines share, and each look reads them all."""
    thread = Thread(looks=3, error=UserError("over"))
    make_trial(tmp_path, thread).step()
    assert [call for call in thread.calls if call[0] == "wait"] == [("wait", 1)] * 3


def test_settings_that_cant_be_trained_end_with_the_worst_score(tmp_path):
    last = make_trial(tmp_path, Thread(error=UserError("the GPU's memory is too small")), [line(16)]).step()
    assert last["failed"] == "the GPU's memory is too small"
    assert (last["done"], last[OBJECTIVE], last["images"]) == (True, 0.0, 256)


def test_a_trial_that_fails_of_anything_else_is_tunes_to_start_again(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        make_trial(tmp_path, Thread(error=RuntimeError("a bug"))).step()


def test_a_trial_that_is_cleaned_up_releases_its_run(tmp_path):
    thread = Thread()
    make_trial(tmp_path, thread).cleanup()
    assert thread.calls == [("release",)]


def test_a_process_begins_another_trial_once_nothing_is_left_of_the_one_before(tmp_path, tiny, monkeypatch):
    begun, before = [], Thread()
    monkeypatch.setattr(trial, "RunQueue", SimpleNamespace)
    monkeypatch.setattr(trial, "RunThread", lambda *parts: begun.append(parts) or Thread())
    made = make_trial(tmp_path, before)
    made.out, made.sweep, made.resources = (
        Folder(tmp_path),
        SimpleNamespace(experiment=lambda settings: tiny),
        RESOURCES,
    )
    made.inputs = {model_key(tiny.model): SimpleNamespace(num_images=100, num_single=0)}
    (tmp_path / layout.SWEEP).touch()
    assert made.reset_config({"number": "0002", "settings": {}})
    assert before.calls == [("release",), ("join",)] and made.thread.calls == [("start",)]
    assert begun[0][:2] == (str(tmp_path / "trials" / "0002"), RESOURCES)
    assert (tmp_path / "trials" / "0002" / layout.EXPERIMENT).read_text() == schema.to_json(tiny)


def test_the_last_trials_start_no_process_for_another(monkeypatch):
    monkeypatch.setattr(trial, "max_concurrent_runs", lambda placement, resources: 2)
    sweep = SimpleNamespace(placement=None, trials=5)
    trials = [SimpleNamespace(number=f"{number:04d}", sweep=sweep, resources=RESOURCES) for number in range(1, 6)]
    assert [Trial._is_followed(each) for each in trials] == [True, True, True, False, False]
