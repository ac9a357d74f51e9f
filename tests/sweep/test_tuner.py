"""The searcher without training: what it proposes, when, and what it keeps of other studies."""

import functools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import ray
import rich.console
import yaml
from ray import cloudpickle

from clipfh import UserError
from clipfh.cluster import resources as cluster
from clipfh.config import sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.sweep import tuner
from clipfh.sweep.trial import Trial

FILE = {
    "name": "x",
    "base": {"model.name": SMALL_MODEL},
    "search": {
        "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
        "loss.triplet": {"loguniform": [0.1, 2.0], "or": 0.0},
        "batch.views": {"choice": [2, 4]},
    },
    "trials": 30,
}
RESOURCES = cluster.Resources(1, 1.0, 0.0, 1)


def searcher(folder: Path, room: int = 100, **changes) -> tuner.Searcher:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**FILE, **changes}))
    made = tuner._searcher(sweep_file.load(folder / "sweep.yaml"), folder, RESOURCES)
    made.room = functools.partial(int, room)
    return made


def ask(made: tuner.Searcher, count: int, value: float = 0.5) -> list[dict]:
    """Settings of trials that end one after the other."""
    found = []
    for number in range(count):
        found.append(made.suggest(str(number)))
        made.on_trial_complete(str(number), {tuner.OBJECTIVE: value})
    return found


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="x", storage=tuner._storage(folder / tuner.STUDY))


def test_no_more_trials_are_proposed_than_there_is_room_for(tmp_path):
    made = searcher(tmp_path, room=2)
    first, second = made.suggest("a"), made.suggest("b")
    assert first and second and made.suggest("c") is None
    made.room = lambda: 3  # a node has come
    assert made.suggest("c") and made.suggest("d") is None
    made.on_trial_complete("a", {tuner.OBJECTIVE: 0.5})
    assert made.suggest("d")


def test_the_same_seed_draws_the_same_and_samplers_differ(tmp_path):
    drawn = {
        name: ask(searcher(tmp_path / name, **changes), 12)
        for name, changes in {
            "one": {"sampler": "random"},
            "two": {"sampler": "random"},
            "other": {"sampler": "random", "seed": 1},
            "tpe": {"sampler": "tpe"},
        }.items()
    }
    assert drawn["one"] == drawn["two"] != drawn["other"]
    assert drawn["tpe"] != drawn["one"]


def test_trials_that_run_at_once_are_no_near_copies(tmp_path):
    space_of_two = {"optimizer.lr": {"loguniform": [1e-5, 1e-1]}, "augment.erase": {"uniform": [0.0, 1.0]}}
    made = searcher(tmp_path, search=space_of_two)
    for number in range(16):
        point = made.suggest(f"before {number}")
        score = -((math.log10(point["optimizer.lr"]) + 3) ** 2) - (point["augment.erase"] - 0.3) ** 2
        made.on_trial_complete(f"before {number}", {tuner.OBJECTIVE: score})
    at_once = [made.suggest(f"at once {number}") for number in range(16)]
    places = [(math.log10(each["optimizer.lr"]) / 4, each["augment.erase"]) for each in at_once]
    nearest = [min(math.dist(place, other) for other in places if other is not place) for place in places]
    assert statistics.mean(nearest) > 0.13, "in shares of the sides of the space"


def test_a_search_knows_the_trials_of_an_earlier_one(tmp_path):
    ask(searcher(tmp_path / "first"), 10)
    made = searcher(tmp_path / "second", earlier=str(tmp_path / "first"))
    ask(made, 1)
    known = study(tmp_path / "second").trials
    assert len(known) == 11
    assert [t.params for t in known[:10]] == [t.params for t in study(tmp_path / "first").trials]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"earlier": "nowhere"}, "nowhere holds no study"),
        ({"search": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}}, "which is not searched here"),
        ({"search": {**FILE["search"], "batch.views": {"choice": [2, 8]}}}, "drew batch.views from"),
    ],
)
def test_an_earlier_search_that_does_not_fit_is_refused(tmp_path, changes, message):
    ask(searcher(tmp_path / "first"), 3)
    with pytest.raises(UserError, match=message):
        searcher(tmp_path / "second", **{"earlier": str(tmp_path / "first"), **changes})


def test_a_trial_that_began_just_before_a_kill_is_not_left_running(tmp_path):
    made = searcher(tmp_path)
    made.suggest("known")
    made.save(str(tmp_path / "state"))
    made.suggest("lost")
    again = searcher(tmp_path)
    again.known = {"known": False}
    again.restore(str(tmp_path / "state"))
    assert [trial.state.name for trial in study(tmp_path).trials] == ["RUNNING", "FAIL"]


@pytest.mark.parametrize(
    "nodes,resources,runs",
    [
        ([{"CPU": 4}], cluster.Resources(1, 1, 0, 1), 2),
        ([{"CPU": 3}, {"CPU": 3}], cluster.Resources(1, 2, 0, 1), 2),
        ([{"CPU": 3}, {"CPU": 3}], cluster.Resources(1, 3, 0, 1), 1),
        ([{"CPU": 1, "GPU": 2}, {"CPU": 15}], cluster.Resources(1, 1, 1, 1), 1),
        ([{"CPU": 8, "GPU": 1}], cluster.Resources(1, 1, 0.5, 1), 2),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], cluster.Resources(4, 1, 1, 1), 2),
        ([{}], cluster.Resources(1, 1, 0, 1), 0),
    ],
)
def test_how_many_runs_nodes_hold(nodes, resources, runs):
    assert cluster._room(nodes, resources) == runs


def test_the_last_trials_start_no_process_for_another(monkeypatch):
    monkeypatch.setattr(cluster, "at_once", lambda placement, resources: 2)
    sweep = SimpleNamespace(placement=None, trials=5)
    made = [SimpleNamespace(trial_name=f"{number:04d}", sweep=sweep, resources=RESOURCES) for number in range(1, 6)]
    assert [Trial._is_followed(each) for each in made] == [True, True, True, False, False]


def test_what_a_kill_leaves_at_odds_is_made_one(tmp_path):
    made = searcher(tmp_path, room=2)
    for trial in ("over to Tune alone", "lost to Tune"):
        made.suggest(trial)
    made.save(str(tmp_path / "state"))
    again = searcher(tmp_path)
    again.known = {"over to Tune alone": True, "lost to the searcher": False}
    again.restore(str(tmp_path / "state"))
    again.on_trial_complete("lost to the searcher", {tuner.OBJECTIVE: 0.5})
    again.room = lambda: 1  # the one that was saved came back too
    assert again.suggest("new"), "nobody waits for those before"


@pytest.mark.parametrize("written", [1, 7])
def test_tunes_count_is_that_of_its_trials(tmp_path, written):
    state = tmp_path / "search_gen_state-2026.json"
    state.write_bytes(cloudpickle.dumps({"counter": written, "finished": False}))
    tuner._count_anew(tmp_path, [SimpleNamespace(experiment_tag=f"{n}_x") for n in (1, 3)])
    assert cloudpickle.loads(state.read_bytes()) == {"counter": 3, "finished": False}


def test_a_point_whose_trial_is_lost_comes_again(tmp_path):
    points = [{"optimizer.lr": 0.001, "batch.views": 2}, {"optimizer.lr": 0.002, "batch.views": 4}]
    made = searcher(tmp_path, points=points)
    made.suggest("known")
    made.save(str(tmp_path / "state"))
    assert made.suggest("lost")["optimizer.lr"] == 0.002
    again = searcher(tmp_path)
    again.known = {"known": False}
    again.restore(str(tmp_path / "state"))
    assert again.suggest("new")["optimizer.lr"] == 0.002


def test_a_study_goes_on_after_half_a_line(tmp_path):
    ask(searcher(tmp_path), 2)
    with (tmp_path / tuner.STUDY).open("a") as journal:
        journal.write('{"op_code":4,"wor')
    tuner._cut_to_whole_lines(tmp_path / tuner.STUDY)
    ask(searcher(tmp_path), 1)
    assert len(study(tmp_path).trials) == 3


@pytest.mark.parametrize("retry", [False, True])
def test_failed_trials_are_trained_again_only_where_that_is_asked_for(tmp_path, monkeypatch, retry):
    made = searcher(tmp_path)
    (tmp_path / "tune").mkdir()
    for name in ("experiment_state-1.json", "search_gen_state-1.json", "searcher-state-1.pkl"):
        (tmp_path / "tune" / name).write_bytes(b"{}" if name.startswith("exp") else cloudpickle.dumps({}))
    ended = [("0001", "ERROR"), ("0002", "TERMINATED"), ("0003", "ERROR")]
    known = [
        SimpleNamespace(trial_id=n, experiment_tag=f"{int(n)}_x", status=status, is_finished=lambda: True)
        for n, status in ended
    ]
    asked, told = {}, []
    parts = SimpleNamespace(_tune_config=SimpleNamespace(search_alg=made), _run_config=SimpleNamespace())
    monkeypatch.setattr(tuner.tune, "ExperimentAnalysis", lambda folder: SimpleNamespace(trials=known))
    restored = SimpleNamespace(_local_tuner=parts)
    monkeypatch.setattr(tuner.tune.Tuner, "restore", lambda *_, **options: asked.update(options) or restored)
    sweep = sweep_file.load(tmp_path / "sweep.yaml")
    tuner._as_left(sweep, tmp_path, Trial, SimpleNamespace(tell=told.append), retry)
    assert (asked["resume_errored"], asked["resume_unfinished"]) == (retry, True)
    stay = ["failed trials stay failed (0001, 0003): --resume --retry-failed trains them again"]
    assert told == ([] if retry else stay)


@pytest.mark.parametrize("broken", ["experiment_state-1.json", "search_gen_state-1.json", "searcher-state-1.pkl"])
def test_a_state_that_cant_be_read_is_refused(tmp_path, broken):
    (tmp_path / "tune").mkdir()
    for name in ("experiment_state-1.json", "search_gen_state-1.json", "searcher-state-1.pkl"):
        whole = b"{}" if name.startswith("experiment") else cloudpickle.dumps({})
        (tmp_path / "tune" / name).write_bytes(whole[:-1] if name == broken else whole)
    with pytest.raises(UserError, match=f"{broken[:8]}.*can't be read .*whose file has `earlier: {tmp_path}`"):
        tuner._require_whole(tmp_path)


def ended(folder: Path, error: Exception) -> Trial:
    """A trial whose training has just failed."""
    made = Trial.__new__(Trial)
    made.thread, made.error, made.folder = SimpleNamespace(is_alive=lambda: False), error, folder
    return made


def test_settings_that_cant_be_trained_fail_at_once_and_the_sampler_hears_of_it(tmp_path, monkeypatch):
    no_memory = UserError("the GPU's memory is too small: give --batch.chunk")
    last = ended(tmp_path, no_memory).step()
    assert last["done"], "Tune starts no such trial again"

    asked = searcher(tmp_path)
    asked.suggest("a")
    asked.on_trial_complete("a", last)
    assert study(tmp_path).trials[0].value == 0.0

    lines = []
    watch = tuner.Watch(tuner.Leaderboard(tmp_path / "leaderboard.csv", [], 0.1), lines.append, count=1)
    tunes = SimpleNamespace(trial_id="a", experiment_tag="1_x", status="TERMINATED", last_result=last, config={})
    watch.on_trial_result(1, [tunes], tunes, last)
    assert lines == [f"trial 0001 can't be trained: {no_memory}"]
    row = watch.board.row(tunes, over=True)
    assert (row["status"], row["error"], row.get("val_mAP")) == ("failed", str(no_memory), None)


def test_a_trial_looks_for_reports_once_a_second(tmp_path, monkeypatch):
    """They lie on a file system that other machines share, and each look reads them all."""
    monkeypatch.setattr(cluster, "is_turn_of", lambda run, resources: True)
    made, waits, alive = ended(tmp_path, UserError("over")), [], [True] * 3
    made.run, made.resources = "a", RESOURCES
    made.thread = SimpleNamespace(is_alive=lambda: bool(alive) and alive.pop(), join=waits.append)
    made.step()
    assert waits == [1, 1, 1]


def test_a_watch_tells_how_many_trials_are_left(tmp_path):
    (tmp_path / "sweep.yaml").touch()
    left = []
    board = tuner.Leaderboard(tmp_path / "leaderboard.csv", [], 0.1)
    watch = tuner.Watch(board, lambda line: None, count=3, ask=left.append)
    for over in (False, True):
        watch.on_step_begin(1, [SimpleNamespace(is_finished=lambda over=over: over)])
    assert left == [3, 2]


def test_a_trial_that_fails_of_anything_else_is_tunes_to_start_again(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        ended(tmp_path, RuntimeError("a bug")).step()


def test_a_watch_that_tells_a_terminal_can_be_kept(tmp_path):
    """Tune keeps its callbacks with the search, and a console holds a lock."""
    console = rich.console.Console()
    watch = tuner.Watch(tuner.Leaderboard(tmp_path / "leaderboard.csv", [], 0.1), console.print, count=1)
    with pytest.raises(TypeError):
        ray.cloudpickle.dumps(console.print)
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(watch)).board == watch.board
