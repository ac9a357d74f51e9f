"""Final runs without training: they take turns, ask for what is left, and say what failed."""

import contextlib
import json
import threading
from types import SimpleNamespace

import pytest

from clipfh import UserError
from clipfh.cluster import ray_private
from clipfh.cluster.resources import Resources
from clipfh.config import schema
from clipfh.config.experiment import Placement
from clipfh.storage.store import Folder
from clipfh.sweep import finalists
from clipfh.sweep.run_thread import RunThread
from clipfh.train.run_inputs import model_key


class Queue:
    """Runs in the order in which they came, the first of which has room."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def join(self, run):
        self.runs.append(run)

    def leave(self, run):
        self.runs = [each for each in self.runs if each != run]

    def holds(self, run):
        return run in self.runs

    def is_turn_of(self, run, resources):
        return self.runs[:1] == [run]


@pytest.fixture
def trained(monkeypatch, tmp_path, tiny):
    """Train three runs on a cluster with room for one; fit is a stand-in. What was told, asked for and run at once."""
    (tmp_path / "sweep.yaml").touch()
    queue, lock, seen = Queue(), threading.Lock(), SimpleNamespace(told=[], asked=[], at_once=0, most=0, ended=[])
    monkeypatch.setattr(finalists, "RunQueue", lambda: queue)
    monkeypatch.setattr(RunThread, "POLL_S", 0.01)
    monkeypatch.setattr(ray_private, "release", seen.ended.append)
    request = contextlib.nullcontext(lambda left: seen.asked.append(left))
    monkeypatch.setattr(finalists, "autoscaler_request", lambda placement, resources: request)

    def run(fails: str = "", error: Exception | None = None) -> SimpleNamespace:
        def fit(experiment, inputs, out, resources, **how):
            with lock:
                seen.at_once += 1
                seen.most = max(seen.most, seen.at_once)
            if out.name == fails:
                seen.at_once -= 1
                raise error
            out.write("metrics.jsonl", json.dumps({"best_val_mAP": 0.5, "step": 1, "images": 1}) + "\n")
            with lock:
                seen.at_once -= 1

        monkeypatch.setattr(finalists.driver, "run_training", fit)
        jobs = {Folder(tmp_path / "final" / name): tiny for name in ("a", "b", "c")}
        sweep = SimpleNamespace(placement=Placement())
        inputs = {model_key(tiny.model): None}
        seen.errors = finalists._train_all(jobs, sweep, inputs, Resources(1, 1, 0, 1), seen.told.append)
        return seen

    return SimpleNamespace(run=run, seen=seen, queue=queue)


def test_final_runs_take_turns_as_trials_do(trained):
    seen = trained.run()
    assert seen.most == 1, "the cluster has room for no more"
    assert sorted(seen.told) == [f"{name}: val mAP 0.500" for name in "abc"]
    assert seen.asked == [3, 2, 1, 0] and trained.queue.runs == []


def test_the_run_of_another_winner_is_not_taken_for_this_ones(trained, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(finalists.driver, "is_over", lambda *_: True)
    run = Folder(tmp_path / "final/a")
    (run / "checkpoints").make()
    run.write("experiment.json", schema.to_json(schema.replace(tiny, {"seed": 7})))
    run.write("metrics.jsonl", json.dumps({"best_val_mAP": 0.9, "step": 0, "images": 0}) + "\n")
    run.write("checkpoints/weights", "its weights")
    seen = trained.run()
    assert seen.asked[0] == 3 and "a: val mAP 0.500" in seen.told
    assert schema.load_experiment(run / "experiment.json") == tiny and not run.exists("checkpoints/weights")


def test_a_final_run_that_cant_be_trained_is_named_and_the_others_go_on(trained, tmp_path):
    seen = trained.run(fails="a", error=UserError("the GPU's memory is too small"))
    assert seen.told == ["a failed: the GPU's memory is too small", "b: val mAP 0.500", "c: val mAP 0.500"]
    assert seen.errors == {Folder(tmp_path / "final/a"): "the GPU's memory is too small"}
    assert finalists.score(Folder(tmp_path / "final/a")) == 0.0


def test_what_no_one_can_fix_is_named_and_no_other_is_left(trained, tmp_path):
    with pytest.raises(OSError, match="no space left"):
        trained.run(fails="a", error=OSError("no space left"))
    assert "a failed: no space left" in trained.seen.told
    assert {path[-1] for path in trained.seen.ended} == {"a", "b", "c"}, "nothing of the others is left"
    names = {str(tmp_path / "final" / name) for name in "abc"}
    assert not names & {thread.name for thread in threading.enumerate()} and trained.queue.runs == []
