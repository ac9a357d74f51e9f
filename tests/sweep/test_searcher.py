"""The study as the memory of a search: what it proposes, when, in which folder, and what a kill does not change."""

import math
import statistics
from pathlib import Path

import optuna
import pytest
import yaml

from clipfh import UserError
from clipfh.config import sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.storage.store import Folder
from clipfh.sweep.searcher import REPEATED, STUDY, StudySearcher, _storage, ask, open_study, own_trials

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
POINTS = [{"optimizer.lr": 0.001, "batch.views": 2}, {"optimizer.lr": 0.002}, {"optimizer.lr": 0.003}]


def open_searcher(folder: Path, room: int = 100, retry_failed: bool = False, **changes) -> StudySearcher:
    """The searcher of a sweep that starts in the folder, or of one that is resumed there."""
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**FILE, **changes}))
    sweep = sweep_file.load(folder / "sweep.yaml")
    return StudySearcher(sweep, open_study(sweep, folder, retry_failed), lambda: room)


def end(searcher: StudySearcher, trial_id: str, value: float | None = 0.5, status: str = "done") -> None:
    searcher.finish(trial_id, {"trial": trial_id, "status": status}, value)


def run(searcher: StudySearcher, count: int, value: float = 0.5) -> list[dict]:
    """Trials that end one after the other."""
    trials = []
    for number in range(count):
        trials.append(searcher.suggest(str(number)))
        end(searcher, str(number), value)
    return trials


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="x", storage=_storage(Folder(folder)))


def states(folder: Path) -> str:
    """The first letter of each trial's state: Complete, Fail, Running, Waiting."""
    return "".join(trial.state.name[0] for trial in study(folder).trials)


def test_no_more_trials_are_proposed_than_there_is_room_for(tmp_path):
    searcher = open_searcher(tmp_path, room=2)
    assert searcher.suggest("a") and searcher.suggest("b") and searcher.suggest("c") is None
    searcher.room = lambda: 3  # a node has come
    assert searcher.suggest("c") and searcher.suggest("d") is None
    end(searcher, "a")
    assert searcher.suggest("d")


def test_the_same_seed_draws_the_same_and_samplers_differ(tmp_path):
    drawn = {
        name: run(open_searcher(tmp_path / name, **changes), 12)
        for name, changes in {
            "one": {"sampler": "random"},
            "two": {"sampler": "random"},
            "other": {"sampler": "random", "seed": 1},
            "tpe": {"sampler": "tpe"},
        }.items()
    }
    assert drawn["one"] == drawn["two"] != drawn["other"]
    assert drawn["tpe"] != drawn["one"]
    assert len({str(trial["settings"]) for trial in drawn["one"]}) == 12, "no draw comes twice"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_killed_at_each_trial_draws_what_an_unbroken_one_does(tmp_path, sampler):
    def search(folder: Path, killed: bool) -> list[dict]:
        trials, searcher = [], open_searcher(folder, sampler=sampler, points=POINTS)
        for _ in range(14):  # more than the sampler draws blindly
            trials.append(searcher.suggest("before"))
            if killed:
                searcher = open_searcher(folder, sampler=sampler, points=POINTS)
                assert searcher.suggest("after") == trials[-1], "number and settings of the trial that was killed"
            end(searcher, "after" if killed else "before", math.log10(trials[-1]["settings"]["optimizer.lr"]))
        return trials

    unbroken = search(tmp_path / "unbroken", killed=False)
    assert [trial["number"] for trial in unbroken] == [f"{number:04d}" for number in range(1, 15)]
    assert search(tmp_path / "killed", killed=True) == unbroken


def test_trials_that_ran_come_first_then_the_points_left_then_new_ones(tmp_path):
    searcher = open_searcher(tmp_path, points=POINTS)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    end(searcher, "a")
    resumed = open_searcher(tmp_path, points=POINTS)
    assert states(tmp_path) == "CWW"
    assert resumed.suggest("c") == second
    assert [resumed.suggest(trial_id)["number"] for trial_id in "de"] == ["0003", "0004"]
    assert study(tmp_path).trials[2].params["optimizer.lr"] == 0.003
    assert first["settings"]["optimizer.lr"] == 0.001


def test_a_trial_that_was_half_drawn_is_drawn_to_its_end(tmp_path):
    searcher = open_searcher(tmp_path, points=POINTS)
    ask(searcher.study, searcher.sweep).suggest_categorical("batch.views", [2, 4])
    trial = open_searcher(tmp_path, points=POINTS).suggest("a")
    assert trial["number"] == "0001" and trial["settings"].keys() == FILE["search"].keys()
    assert trial["settings"]["optimizer.lr"] == 0.001


def test_a_repeated_draw_that_was_killed_is_not_trained(tmp_path):
    searcher = open_searcher(tmp_path)
    run(searcher, 1)
    draw = ask(searcher.study, searcher.sweep)
    searcher.sweep.suggest(draw)
    draw.set_user_attr(REPEATED, True)
    resumed = open_searcher(tmp_path)
    assert states(tmp_path) == "CF" and resumed.suggest("b")["number"] == "0002"


@pytest.mark.parametrize("value", [None, 0.0])
def test_failed_trials_come_again_only_where_that_is_asked_for(tmp_path, value):
    """With a value those that the user can fix, of which the sampler hears; without one those that crashed."""
    searcher = open_searcher(tmp_path)
    before = [searcher.suggest(trial_id) for trial_id in "abc"]
    end(searcher, "a")
    end(searcher, "b", value, "failed")
    end(searcher, "c")
    assert open_searcher(tmp_path).suggest("d")["number"] == "0004"
    assert open_searcher(tmp_path, retry_failed=True).suggest("b") == before[1]
    assert states(tmp_path) == "CRCW", "and it counts for the sampler only by what it comes to now"


def test_trials_that_run_at_once_are_no_near_copies(tmp_path):
    space_of_two = {"optimizer.lr": {"loguniform": [1e-5, 1e-1]}, "augment.erase": {"uniform": [0.0, 1.0]}}
    searcher = open_searcher(tmp_path, search=space_of_two, seed=1)
    for number in range(16):
        point = searcher.suggest(f"before {number}")["settings"]
        score = -((math.log10(point["optimizer.lr"]) + 3) ** 2) - (point["augment.erase"] - 0.3) ** 2
        end(searcher, f"before {number}", score)
    at_once = [searcher.suggest(f"at once {number}")["settings"] for number in range(16)]
    places = [(math.log10(each["optimizer.lr"]) / 4, each["augment.erase"]) for each in at_once]
    nearest = [min(math.dist(place, other) for other in places if other is not place) for place in places]
    assert statistics.mean(nearest) > 0.13, "in shares of the sides of the space"


def test_a_search_knows_the_trials_of_an_earlier_one_and_numbers_its_own(tmp_path):
    run(open_searcher(tmp_path / "first"), 10)
    earlier = str(tmp_path / "first")
    assert run(open_searcher(tmp_path / "second", earlier=earlier), 1)[0]["number"] == "0001"
    assert open_searcher(tmp_path / "second", earlier=earlier).suggest("next")["number"] == "0002"
    trials = study(tmp_path / "second").trials
    assert [t.params for t in trials[:10]] == [t.params for t in study(tmp_path / "first").trials]
    assert len(trials) == 12 and len(own_trials(study(tmp_path / "second"))) == 2


def test_an_earlier_search_of_other_models_tells_of_those_that_are_searched_here(tmp_path):
    raced = {"base": {}, "sampler": "random", "models": ["RN50", "ViT-B/16", "ViT-B/32"]}
    drawn = [trial["settings"]["model"] for trial in run(open_searcher(tmp_path / "first", **raced), 10)]
    both = {**raced, "earlier": str(tmp_path / "first"), "models": ["ViT-B/32", "ViT-B/16", "ViT-L/14"]}
    (tmp_path / "second").mkdir()
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**FILE, **both}))
    lines = []
    second = open_study(sweep_file.load(tmp_path / "x.yaml"), tmp_path / "second", log=lines.append)
    assert [trial.params["model"] for trial in second.trials] == [model for model in drawn if model != "RN50"]
    lost = drawn.count("RN50")
    assert lost and lines == [f"note: {lost} of 10 trials of {tmp_path}/first are of models that are not searched here"]
    assert len(run(open_searcher(tmp_path / "second", **both), 1)) == 1


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"earlier": "nowhere"}, "nowhere holds no study"),
        ({"search": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}}, "which is not searched here"),
        ({"search": {**FILE["search"], "batch.views": {"choice": [2, 8]}}}, "drew batch.views from"),
    ],
)
def test_an_earlier_search_that_does_not_fit_is_refused(tmp_path, changes, message):
    run(open_searcher(tmp_path / "first"), 3)
    with pytest.raises(UserError, match=message):
        open_searcher(tmp_path / "second", **{"earlier": str(tmp_path / "first"), **changes})
    assert not (tmp_path / "second" / STUDY).exists()


def test_a_study_of_an_older_version_is_refused_but_can_be_learned_from(tmp_path):
    searcher = open_searcher(tmp_path / "old")
    searcher.suggest("a")
    searcher.study.tell(0, 0.5)
    with pytest.raises(UserError, match=f"older version.*whose file has `earlier: {tmp_path}/old`"):
        open_searcher(tmp_path / "old")
    assert run(open_searcher(tmp_path / "new", earlier=str(tmp_path / "old")), 1)


def test_a_study_goes_on_after_half_a_line(tmp_path):
    run(open_searcher(tmp_path), 2)
    with (tmp_path / STUDY).open("a") as journal:
        journal.write('{"op_code":4,"wor')
    run(open_searcher(tmp_path), 1)
    assert states(tmp_path) == "CCC"


def test_a_study_that_cant_be_read_is_refused(tmp_path):
    run(open_searcher(tmp_path), 2)
    journal = tmp_path / STUDY
    journal.write_bytes(journal.read_bytes().replace(b'"op_code"', b'"op_co', 1))
    with pytest.raises(UserError, match="study.journal can't be read"):
        open_searcher(tmp_path)


SMALL_SPACE = {"search": {"batch.views": {"choice": [2, 4]}, "batch.items": {"choice": [8, 16]}}, "points": []}


def test_a_space_of_four_points_has_four_trials_and_none_twice(tmp_path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**FILE, **SMALL_SPACE}))
    assert sweep_file.load(tmp_path / "x.yaml").within_space().trials == 4
    searcher = open_searcher(tmp_path, **SMALL_SPACE)
    settings = [trial["settings"] for trial in run(searcher, 2)]
    searcher = open_searcher(tmp_path, **SMALL_SPACE)  # a resumed one knows them
    both = [searcher.suggest(name) for name in ("c", "d")]  # and so do trials that run at once
    settings += [trial["settings"] for trial in both]
    assert len({tuple(sorted(each.items())) for each in settings}) == 4
    assert [trial["number"] for trial in both] == ["0003", "0004"]


@pytest.mark.parametrize(
    "ranges,points",
    [
        ({"batch.views": {"int": [2, 4]}, "loss.triplet": {"choice": [0.0, 1.0]}}, 6),
        ({"batch.views": {"int": [2, 4]}, "optimizer.lr": {"loguniform": [1e-4, 1e-2]}}, 0),
        ({"loss.triplet": {"choice": [0.0, 1.0]}, "loss.triplet_margin": {"choice": [0.1, 0.2]}}, 3),
    ],
)
def test_points_of_a_space_are_counted_where_there_are_few(tmp_path, ranges, points):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**FILE, "search": ranges}))
    assert len(sweep_file.load(tmp_path / "x.yaml").space()) == points
