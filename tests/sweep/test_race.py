"""A race without Ray: who is measured when, who goes on, and what a kill or a model that can't be had costs."""

import json

import pytest
import yaml
from contenders import LABELS, write_weights

from clipfh import UserError
from clipfh.cluster.resources import Resources
from clipfh.config import sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.config.sweep_file import SweepFile
from clipfh.report import page, status
from clipfh.retrieval import evaluate
from clipfh.storage.store import Folder
from clipfh.sweep import race
from clipfh.train.inputs import load_start

RESOURCES = Resources(1, 1.0, 0.0, 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[dict[str, str]]:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(race.cluster_resources, "is_this_machines_cpus", lambda: True)


def load(folder, models, **changes) -> SweepFile:
    search = {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    (folder / "x.yaml").write_text(yaml.safe_dump({"name": "x", "models": models, "search": search, **changes}))
    return sweep_file.load(folder / "x.yaml")


def test_the_best_models_go_into_the_search_with_their_points(tmp_path, small_catalogue, models):
    points = [{"model": label, "optimizer.lr": 1e-3} for label in LABELS]
    sweep, lines = load(tmp_path, models, race={"keep": 2}, points=points), []
    contenders = race.run(sweep, small_catalogue, Folder(tmp_path), RESOURCES, load_start, lines.append)
    assert [each.model for each in contenders] == LABELS[::-1]
    assert [each.kept for each in contenders] == [True, True, False] and race.read(tmp_path) == contenders
    for each in contenders:
        measured = json.loads((tmp_path / "trials" / each.trial / "metrics.json").read_text())
        assert measured["mAP"] == each.val_mAP and each.milliseconds > 0 and each.pixels == 96
    small = race.narrow(sweep, contenders, lines.append)
    assert list(small.contenders) == [LABELS[2], LABELS[1]] and list(sweep.contenders) == LABELS
    assert [point["model"] for point in small.points] == LABELS[1:]
    assert lines[-1] == "note: 1 of 3 points are of models that do not, and are not tried"


def test_a_race_goes_on_where_it_was_killed_with_the_cheapest_first(tmp_path, small_catalogue, models, monkeypatch):
    cost, measured = iter([3.0, 1.0, 2.0]), []
    monkeypatch.setattr(race, "time_images", lambda *_: next(cost))

    def embed(catalogue, splits, clip, settings, prompts):
        measured.append(settings.pretrained)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return embed_splits(catalogue, splits, clip, settings, prompts)

    embed_splits = evaluate.embed_splits
    monkeypatch.setattr(evaluate, "embed_splits", embed)
    sweep = load(tmp_path, models, race={"keep": 1})
    with pytest.raises(KeyboardInterrupt):
        race.run(sweep, small_catalogue, Folder(tmp_path), RESOURCES, load_start, lambda line: None)
    (tmp_path / "sweep.yaml").write_text(sweep_file.to_yaml(sweep))
    assert f"race of 3 models: 1 of 3 measured (zero-shot val mAP: {LABELS[1]}" in status.describe(tmp_path)
    contenders = race.run(sweep, small_catalogue, Folder(tmp_path), RESOURCES, load_start, lambda line: None)
    assert [name.rpartition("/")[2] for name in measured] == ["dim.pt", "sharp.pt", "sharp.pt", "blind.pt"]
    assert contenders[0].model == LABELS[2]
    race.run(
        sweep,
        small_catalogue,
        Folder(tmp_path),
        RESOURCES,
        lambda start: pytest.fail("loaded again"),
        lambda line: None,
    )


def test_a_model_that_cant_be_had_costs_nothing(tmp_path, small_catalogue, models, monkeypatch):
    monkeypatch.setattr(race, "_measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    sweep = load(tmp_path, [*models, {"name": SMALL_MODEL, "pretrained": str(tmp_path / "bad.pt")}])
    with pytest.raises(UserError, match="bad.pt can't be read as weights"):
        race.run(sweep, small_catalogue, Folder(tmp_path), RESOURCES, load_start, lambda line: None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.pt", "x.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search": {"model.name": {"choice": ["ViT-B-16", "ViT-L-14"]}, "model.pretrained": {"choice": ["webli"]}}},
            "ViT-B-16 has no weights 'webli'",
        ),
        ({"search": {"model.name": {"choice": ["ViT-B-16", "ViT-B-17"]}}}, "ViT-B-17: no such model"),
        ({"models": ["ViT-B/16", {"name": "ViT-B-16", "pretrained": "laion"}]}, "has no weights 'laion'"),
        ({"models": [SMALL_MODEL, "RN50"], "base": {"model.freeze_blocks": 9}, "search": {}}, "freeze_blocks"),
        ({"models": [SMALL_MODEL, "ViT-B-16-SigLIP"], "base": {"optimizer.whitening": 0.2}}, "no last linear layer"),
    ],
)
def test_models_that_open_clip_has_not_are_refused_before_anything_starts(tmp_path, changes, message):
    sweep = load(tmp_path, changes.pop("models", []), **changes)
    with pytest.raises(UserError, match=message):
        race.require_models(sweep)


def test_the_report_shows_the_race(tmp_path, small_catalogue, models):
    sweep = load(tmp_path, models, race={"keep": 2})
    (tmp_path / "sweep.yaml").write_text(sweep_file.to_yaml(sweep))
    race.run(sweep, small_catalogue, Folder(tmp_path), RESOURCES, load_start, lambda line: None)
    text = page.write([tmp_path]).read_text()
    assert "2 of 3 went into the search" in text and all(text.count(label) >= 2 for label in LABELS)
    assert f"{LABELS[2]}, {LABELS[1]}" in text or f"{LABELS[1]}, {LABELS[2]}" in text, "the range of `model`"
