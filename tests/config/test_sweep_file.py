"""Sweep files: the shipped ones fit, and every mistake is one clear line before anything starts."""

from pathlib import Path

import optuna
import pytest
import yaml

from clipfh import UserError
from clipfh.config import presets, sweep_file
from clipfh.config.experiment import SMALL_MODEL, Budget

SWEEPS = Path(__file__).parents[2] / "sweeps"
GOOD = {
    "name": "x",
    "stage": "image",
    "base": {"model.name": SMALL_MODEL, "loss.supcon": 1.0},
    "search": {
        "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
        "loss.triplet": {"loguniform": [0.1, 2.0], "or": 0.0},
        "loss.triplet_margin": {"uniform": [0.1, 0.4]},
        "batch.views": {"choice": [2, 4]},
    },
    "points": [{"optimizer.lr": 1e-3, "loss.triplet": 0.0}],
    "trials": 3,
    "budget": {"images": 1000, "first_rung": 100},
}


def write(tmp_path, **changes):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **changes}))
    return file


@pytest.mark.parametrize("name", ["demo", "scratch", "image", "joint"])
def test_shipped_sweeps_fit_and_survive_being_resolved(name, tmp_path):
    loaded = sweep_file.load(SWEEPS / f"{name}.yaml")
    (tmp_path / "resolved.yaml").write_text(sweep_file.to_yaml(loaded))
    again = sweep_file.load(tmp_path / "resolved.yaml")
    assert sweep_file.to_yaml(again) == sweep_file.to_yaml(loaded)
    assert again.experiment(again.first) == loaded.experiment(loaded.first)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"serach": {}}, "unknown key serach, did you mean search?"),
        ({"base": {"loss.tripet": 1.0}}, "unknown setting loss.tripet, did you mean loss.triplet?"),
        ({"base": {"optimizer.clip": "1e-5"}}, "optimizer.clip must be a number, not '1e-5' (in YAML write 1.0e-5"),
        ({"base": {"preset": "bset"}}, "unknown preset 'bset'"),
        ({"stage": "text"}, "stage must be one of image, joint"),
        ({"search": {"optimizer.lr": {"loguniform": [1.0, 0.1]}}}, "wants [low, high] with low below high"),
        ({"search": {"optimizer.lr": {"loguniform": [0.0, 0.1]}}}, "wants values above 0"),
        ({"search": {"optimizer.lr": {"normal": [0, 1]}}}, "unknown key normal"),
        ({"search": {"optimizer.lr": {}}}, "needs one of loguniform, uniform, int, choice"),
        ({"search": {"batch.views": {"choice": []}}}, "choice wants a list"),
        ({"search": {"batch.views": {"choice": [2, 2.5]}}}, "batch.views must be a whole number, not 2.5"),
        ({"search": {"optimizer.lr": 1e-3}}, "search: optimizer.lr must be a mapping"),
        ({"search": {"optimizer.ema": {"uniform": [0.5, 1.5]}}}, "--optimizer.ema must be from 0 to below 1"),
        ({"points": [{"optimizer.lr": 1.0}]}, "points: optimizer.lr 1.0 lies outside its range"),
        ({"points": [{"optimizer.clip": 1.0}]}, "points: optimizer.clip is not searched"),
        ({"search": {"text.strategy": {"choice": ["raw", "clean"]}}}, "text.strategy can't be searched"),
        ({"race": {"keep": 1}}, "race: keep says how many of `models` go into the search"),
        ({"models": ["RN50"]}, "models names the models of the sweep, and so does model.name"),
        ({"base": {}, "models": ["RN50"], "race": {"keep": 2}}, "at most the number of models, 1, not 2"),
        ({"base": {}, "models": ["RN50", {"name": "RN50"}]}, "models: RN50 is there twice"),
        ({"base": {}, "models": ["RN50", {"nmae": "RN50"}]}, "unknown key models: nmae, did you mean name?"),
        ({"base": {}, "models": [{"pretrained": "x"}]}, "needs a name"),
        ({"search": {"model.image_size": {"int": [224, 336]}}, "points": []}, "int does not suit it: take choice"),
        ({"base": {}, "models": ["RN50"], "points": [{"model": "RN5"}]}, "lies outside its range: take one of RN50"),
        (
            {
                "base": {"model.name": "clipfh-small", "loss.triplet": 0.0},
                "search": {"loss.supcon": {"uniform": [0.1, 1.0], "or": 0.0}},
                "points": [],
            },
            "at least one term above 0",
        ),
        ({"base": {"stage": "joint"}}, "base: stage is a key of its own: write it beside base"),
        (
            {"base": {"batch.views": 2}},
            "batch.views is searched, and base or budget gives it too: take one of them out",
        ),
        ({"search": {"budget.images": {"int": [1, 9]}}, "points": []}, "budget.images is searched, and base or budget"),
        ({"trials": 0}, "trials must be a whole number above 0, not 0"),
        ({"trials": "many"}, "trials must be a whole number, not 'many'"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, not -1"),
        ({"name": ["x"]}, "name must be a text, not ['x']"),
        ({"points": ["x"]}, "a point must be a mapping"),
        ({"budget": {"first_rnug": 5}}, "unknown key budget.first_rnug, did you mean first_rung?"),
        ({"placement": {"worker": 2}}, "placement: unknown setting worker, did you mean workers?"),
        (
            {
                "search": {"batch.items": {"choice": [64, 4]}, "batch.categories": {"choice": [0, 8]}},
                "points": [],
            },
            "batch.items 4, batch.categories 8 may be drawn together, and do not fit together",
        ),
        (
            {
                "base": {"model.name": "clipfh-small", "loss.supcon": 0.0, "optimizer.whitening": 0.0},
                "search": {
                    "batch.views": {"choice": [2, 1]},
                    "loss.ce": {"choice": [1.0]},
                    "loss.triplet": {"choice": [0.0, 1.0]},
                },
                "points": [],
            },
            "batch.views 1, loss.ce 1.0, loss.triplet 1.0 may be drawn together",
        ),
        ({"sampler": "bayes"}, "sampler must be one of tpe, random, grid, not 'bayes'"),
        ({"sampler": "grid"}, "sampler: grid tries choices, and loss.triplet has a loguniform range"),
        ({"final": {"tops": 3}}, "final: unknown setting tops, did you mean top?"),
        ({"final": {"seeds": 0}}, "final: --seeds must be 1 or more"),
        ({"final": {"image_size": 336}}, "final: image_size is of the runs after the search: give top or refit too"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        sweep_file.load(write(tmp_path, **changes))
    assert message in str(error.value) and "sweep.yaml" in str(error.value) and "\n" not in str(error.value)


def test_no_file_no_yaml_no_mapping(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- a")
    for name, message in [("none.yaml", "no such sweep file"), ("bad.yaml", "is not YAML"), ("list.yaml", "mapping")]:
        with pytest.raises(UserError, match=message):
            sweep_file.load(tmp_path / name)


def test_options_are_drawn_only_where_their_term_is_on(tmp_path):
    loaded = sweep_file.load(write(tmp_path))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [loaded.suggest(study.ask()) for _ in range(40)]
    assert {("loss.triplet_margin" in d) == (d["loss.triplet"] > 0) for d in drawn} == {True}
    assert any(d["loss.triplet"] for d in drawn) and not all(d["loss.triplet"] for d in drawn)
    for settings in drawn:
        loaded.experiment(settings)


def test_a_grid_is_every_combination_and_no_option_of_a_term_that_is_off(tmp_path):
    search = {
        "loss.triplet": {"choice": [1.0], "or": 0.0},
        "loss.triplet_margin": {"choice": [0.1, 0.2, 0.3]},
        "batch.views": {"choice": [2, 4]},
    }
    loaded = sweep_file.load(write(tmp_path, sampler="grid", search=search, points=[], trials=100))
    combinations = {tuple(sorted(point.items())) for point in loaded.points}
    assert len(loaded.points) == len(combinations) == loaded.trials == 2 * (3 + 1)
    assert all(("loss.triplet_margin" in point) == (point["loss.triplet"] > 0) for point in loaded.points)
    for point in loaded.points:
        loaded.experiment(point)


def test_the_points_of_a_grid_are_tried_first(tmp_path):
    search = {"optimizer.lr": {"choice": [1.0e-4, 1.0e-3]}, "batch.views": {"choice": [2, 4, 8]}}
    points = [{"optimizer.lr": 1.0e-3, "batch.views": 4}, {"batch.views": 8}]
    loaded = sweep_file.load(write(tmp_path, sampler="grid", search=search, points=points, trials=4))
    order = [(1e-3, 4), (1e-4, 8), (1e-3, 8), (1e-4, 2), (1e-3, 2), (1e-4, 4)]
    assert [(p["optimizer.lr"], p["batch.views"]) for p in loaded.points] == order and loaded.trials == 4
    (tmp_path / "sweep.yaml").write_text(sweep_file.to_yaml(loaded))
    assert sweep_file.load(tmp_path / "sweep.yaml").points == loaded.points, "resolved, it stays as it is"


def test_overrides_and_rungs(tmp_path):
    loaded = sweep_file.load(write(tmp_path), {"seed": 7}, trials=9)
    assert loaded.trials == 9 and loaded.experiment(loaded.first).seed == 7
    assert loaded.experiment(loaded.first).budget == Budget(images=1000, report_every=100)
    with pytest.raises(UserError, match="optimizer.lr is searched"):
        sweep_file.load(write(tmp_path), {"optimizer.lr": 1.0})


def test_a_sweep_knows_whether_any_trial_learns_from_prompts(tmp_path):
    off = {"loss.supcon": {"uniform": [0.5, 1.0]}, "loss.triplet": {"choice": [0.0, 1.0]}}
    small = {"model.name": SMALL_MODEL}
    assert sweep_file.load(write(tmp_path, search=off, points=[], base=small)).texted == {}
    on = {"loss.supcon": {"choice": [0.0, 1.0]}, "loss.supcon_captions": {"choice": [False, True]}}
    loaded = sweep_file.load(write(tmp_path, search=on, points=[], base={**small, "loss.ce": 1.0}))
    assert loaded.texted == {"loss.supcon": 1.0, "loss.supcon_captions": True}


def test_a_sweep_knows_whether_any_trial_takes_pairs_alone(tmp_path):
    """Items with a single photo are then not trained on, which may leave fewer than a batch wants."""
    both = {"loss.supcon_captions": {"choice": [True, False]}, "loss.ce": {"uniform": [0.1, 1.0], "or": 0.0}}
    loaded = sweep_file.load(write(tmp_path, search=both, points=[]))
    assert loaded.paired == {"loss.supcon_captions": False, "loss.ce": 0.0}
    captions = {"loss.supcon_captions": {"choice": [True]}}
    assert sweep_file.load(write(tmp_path, search=captions, points=[])).paired == {}


def test_a_resolved_file_has_every_key_of_its_class_in_order(tmp_path):
    loaded = sweep_file.load(write(tmp_path))
    assert list(yaml.safe_load(sweep_file.to_yaml(loaded))) == sweep_file.KEYS


def test_files_are_named_from_the_root_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").touch()
    base = {"model.name": "clipfh-small", "text.file": "prompts.json", "model.pretrained": "weights.pt"}
    found = sweep_file.load(write(tmp_path, base=base)).base
    assert (found["text.file"], found["model.pretrained"]) == (f"{tmp_path}/prompts.json", f"{tmp_path}/weights.pt")
    search = {"model.pretrained": {"choice": ["weights.pt", "none"]}}
    found = sweep_file.load(write(tmp_path, base={}, search=search, points=[{"model.pretrained": "weights.pt"}]))
    assert found.points == [{"model.pretrained": f"{tmp_path}/weights.pt"}]


TAGS = [{"name": "ViT-B-16", "pretrained": tag} for tag in ("laion2b_s34b_b88k", "datacomp_xl_s13b_b90k")]


def test_models_are_a_choice_that_sets_name_and_weights_with_the_usual_preset_of_each(tmp_path):
    models = [SMALL_MODEL, *TAGS]
    loaded = sweep_file.load(write(tmp_path, base={"loss.ce": 0.5}, models=models, race={"keep": 2}))
    labels = [SMALL_MODEL, "ViT-B-16 laion2b_s34b_b88k", "ViT-B-16 datacomp_xl_s13b_b90k"]
    assert list(loaded.contenders) == labels and loaded.search["model"].values == tuple(labels)
    starts = [loaded.start(label) for label in labels]
    assert [(s.model.name, s.model.pretrained) for s in starts[1:]] == [tuple(each.values()) for each in TAGS]
    assert [s.batch.items for s in starts] == [16, 64, 64] and {s.loss.ce for s in starts} == {0.5}
    (tmp_path / "again.yaml").write_text(sweep_file.to_yaml(loaded))
    again = sweep_file.load(tmp_path / "again.yaml")
    assert again.models == loaded.models and sweep_file.to_yaml(again) == sweep_file.to_yaml(loaded)
    assert [again.start(label) for label in labels] == starts, "nothing of the first model is the others'"
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert {loaded.only(labels[:2]).suggest(study.ask())["model"] for _ in range(20)} == set(labels[:2])


def test_name_and_weights_searched_apart_are_every_combination(tmp_path):
    search = {
        "model.name": {"choice": ["ViT-B-16", "ViT-B-32"]},
        "model.pretrained": {"choice": ["laion400m_e32", "none"]},
    }
    loaded = sweep_file.load(write(tmp_path, base={}, search=search, points=[]))
    assert list(loaded.contenders) == [f"{n} {p}" for n in ("ViT-B-16", "ViT-B-32") for p in ("laion400m_e32", "none")]
    assert loaded.start("ViT-B-32 none").model.pretrained == "none"


def test_weights_files_are_told_by_their_names_and_by_their_folders_only_where_they_must(tmp_path):
    def labels(*files):
        return sweep_file.label_models([{"name": "RN50", "pretrained": file} for file in files])

    assert labels("/a/x.pt", "/a/y.pt") == ["RN50 x.pt", "RN50 y.pt"]
    assert labels("/a/x.pt", "/b/x.pt") == ["RN50 /a/x.pt", "RN50 /b/x.pt"]


def test_a_grid_of_some_of_its_models_is_made_anew(tmp_path):
    search = {"batch.views": {"choice": [2, 4]}}
    changes = {"base": {}, "models": TAGS, "search": search, "points": [], "sampler": "grid", "trials": 100}
    loaded = sweep_file.load(write(tmp_path, **changes))
    small = loaded.only(list(loaded.contenders)[:1])
    assert (loaded.trials, small.trials) == (4, 2) and len(small.points) == 2


def test_the_sweep_from_random_weights_begins_with_the_preset():
    sweep = sweep_file.load(SWEEPS / "scratch.yaml")
    first = sweep.experiment(sweep.points[0])
    assert first == presets.resolve("image", "scratch", {"model.name": "clipfh-small", "budget.report_every": 20_000})
