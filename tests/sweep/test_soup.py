"""Soup and mix: which runs are taken, on what the choice rests, and what a kill leaves. Without Ray and training."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clipfh.config import presets, schema, sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.config.sweep_file import Finalists
from clipfh.model import checkpoint
from clipfh.model.clip import get_architecture
from clipfh.report import artifacts, page, status
from clipfh.storage import layout
from clipfh.storage.store import Folder
from clipfh.sweep import finalists, race, soup, sweep
from clipfh.sweep.interpolation import average, interpolate
from clipfh.sweep.soup import SHARES, Blend, Step
from clipfh.train.inputs import load_start

ZERO = Step("zero-shot", None, 0.3)


def measure_by(scores: dict[tuple[str, ...], float], mixes: dict[float, float] | None = None):
    """Figures by the runs of an average, or by the share of a mix."""
    return lambda blend: {"mAP": scores.get(blend.runs, 0) if blend.share == 1 else (mixes or {}).get(blend.share, 0)}


def test_a_run_is_taken_where_the_average_does_not_fall():
    scores = {("a",): 0.5, ("a", "b"): 0.5, ("a", "b", "c"): 0.49, ("a", "b", "d"): 0.52}
    assert soup.greedy_soup(["a", "b", "c", "d"], measure_by(scores)) == Blend(("a", "b", "d"))


@given(st.dictionaries(st.frozensets(st.sampled_from("abcde"), min_size=1), st.floats(0, 1)))
def test_a_greedy_soup_is_the_slow_loops(scores):
    def figure(runs):
        return scores.get(frozenset(runs), 0.0)

    taken = ["a"]
    for run in "bcde":
        if figure([*taken, run]) >= figure(taken):
            taken.append(run)
    assert soup.greedy_soup(list("abcde"), lambda blend: {"mAP": figure(blend.runs)}).runs == tuple(taken)


@pytest.mark.parametrize(
    ("scores", "mixes", "name", "blend"),
    [
        ({("a",): 0.5, ("a", "b"): 0.6}, {0.7: 0.65}, "mix", Blend(("a", "b"), 0.7)),
        ({("a",): 0.5, ("a", "b"): 0.6}, {0.7: 0.6}, "soup", Blend(("a", "b"))),
        ({("a",): 0.5, ("a", "b"): 0.4}, {0.7: 0.4}, "best trial", Blend(("a",))),
        ({("a",): 0.5, ("a", "b"): 0.4}, {0.2: 0.6}, "mix", Blend(("a",), 0.2)),
        ({("a",): 0.2, ("a", "b"): 0.3}, {0.2: 0.3}, "zero-shot", None),
    ],
)
def test_the_best_on_validation_wins_and_of_equals_the_simplest(scores, mixes, name, blend):
    trial = Step("best trial", Blend(("a",)), 0.5)
    best = soup.choose(soup.steps(Finalists(), ZERO, trial, ["a", "b"], measure_by(scores, mixes)))
    assert (best.name, best.blend) == (name, blend)


def test_what_is_not_asked_for_is_not_measured():
    trial, measured = Step("best trial", Blend(("a",)), 0.5), []

    def measure(blend):
        measured.append(blend)
        return {"mAP": 0.5}

    names = [s.name for s in soup.steps(Finalists(soup="none"), ZERO, trial, ["a", "b"], measure)]
    assert names == ["zero-shot", "best trial", "mix"] and len(set(measured)) == 1 + len(SHARES)
    measured.clear()
    names = [s.name for s in soup.steps(Finalists(mix=False), ZERO, trial, ["a", "b"], measure)]
    assert names == ["zero-shot", "best trial", "soup"] and {m.share for m in measured} == {1.0}


def make_run(run: Folder, experiment, clip, val_mAP: float) -> Folder:
    """A run that is over, with a checkpoint, as Ray Train lists it."""
    folder = run.local_path()
    made = folder / layout.CHECKPOINTS / "checkpoint_4"
    made.mkdir(parents=True)
    line = {"step": 4, "images": 64, "val_mAP": val_mAP, "best_val_mAP": val_mAP, "finished": True}
    checkpoint.save(made, experiment, get_architecture(clip), clip.state_dict(), {}, {}, line)
    (folder / layout.EXPERIMENT).write_text(schema.to_json(experiment))
    (folder / layout.REPORTS).write_text(json.dumps(line) + "\n")
    listed = {"checkpoint_dir_name": "checkpoint_4", "metrics": line}
    snapshot = {"checkpoint_results": [listed], "latest_checkpoint_result": listed}
    (folder / layout.CHECKPOINTS / layout.SNAPSHOT).write_text(json.dumps(snapshot))
    return run


@pytest.fixture
def searched(tmp_path, small_catalogue, monkeypatch):
    """A sweep from given weights whose search is over, with three trials near each other: `finish` does the rest."""
    torch.manual_seed(0)
    start = load_start(presets.resolve("image", None, {"model.name": SMALL_MODEL}))
    torch.save(start.state_dict(), tmp_path / "start.pt")
    out, model = Folder(tmp_path / "out"), {"model.name": SMALL_MODEL, "model.pretrained": str(tmp_path / "start.pt")}
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"name": "s", "base": model, "search": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}})
    )
    loaded = sweep_file.load(tmp_path / "s.yaml")
    for number in (1, 2, 3):
        clip = load_start(loaded.experiment(loaded.first))
        for parameter in clip.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        experiment = loaded.experiment({"optimizer.lr": number * 1e-3})
        make_run(out / "trials" / f"000{number}", experiment, clip, 0.9 - number / 10)
    out.write(layout.SWEEP, sweep_file.to_yaml(loaded))
    rows = [
        {"trial": f"000{n}", "status": "done", "val_mAP": f"{0.9 - n / 10}", "images": 64, "seconds": 1}
        for n in (1, 2, 3)
    ]
    label = next(iter(loaded.contenders))
    contender = race.Contender(label, "0000", 1, 64, 1.0, val_mAP=0.01, kept=True)
    told: list[str] = []
    context = sweep._Context(
        loaded, small_catalogue, out, [contender], load_start, SimpleNamespace(window=None), None, told.append
    )

    def finish(**changes):
        again = dataclasses.replace(context, sweep=dataclasses.replace(loaded, **changes))
        winner = sweep._refitted(again, sweep._blended(again, sweep._lead(again, {}, rows), rows))
        return winner, sweep._finish(again, winner, rows, {"seconds": 1.0, "notes": []})

    return finish, context, told


@pytest.fixture
def embedded_splits(monkeypatch):
    """The splits that were embedded, in order."""
    splits, embed = [], race.embed

    def spy(catalogue, experiment, clip, split):
        splits.append(split)
        return embed(catalogue, experiment, clip, split)

    monkeypatch.setattr(race, "embed", spy)
    return splits


def test_a_sweep_ends_with_soup_and_mix_and_tells_what_each_gave(searched, embedded_splits):
    finish, context, told = searched
    winner, summary = finish()
    out = context.out
    steps = {step["name"]: step for step in summary["soup"]["steps"]}
    assert {"zero-shot", "best trial", "mix"} <= steps.keys()
    best = max(summary["soup"]["steps"], key=lambda step: step["val_mAP"])
    assert best["won"] and sum(step["won"] for step in steps.values()) == 1 and winner.step == best["name"]
    first_test = embedded_splits.index("test")
    assert set(embedded_splits[first_test:]) == {"test"}, "the test split is asked when the choice is made"
    assert len(embedded_splits) - first_test == len(steps), "once for each model that is reported"
    measured = {(tuple(each["runs"]), each["share"]) for each in artifacts.read(out).measured}
    assert len(measured) == embedded_splits.count("val")
    parts = [checkpoint.load(out / run).state for run in best["blend"]["runs"]]
    state = interpolate(context.load(context.sweep.start(winner.contender.model)).state_dict(), average(parts), 1.0)
    if best["blend"]["share"] < 1:
        state = interpolate(load_start(winner_experiment(out, best)).state_dict(), state, best["blend"]["share"])
    exported = checkpoint.load(out / "best").state
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items()), "the export is what won"
    assert summary["test"]["mAP"] == best["test"]["mAP"]
    card = out.read_text("best/README.md")
    report = page.page(["s"], [artifacts.read(out)])
    assert "Trial, soup and mix" in report and best["blend"]["label"] in report
    assert ("Its weights are" in card) == (best["name"] != "best trial")
    assert "soup and mix" in "\n".join(told) and best["name"] in sweep.outcome(summary, out)


def winner_experiment(out, step):
    return schema.load_experiment(out / step["blend"]["runs"][0] / layout.EXPERIMENT)


def made_up(mAP: float) -> dict:
    return {"mAP": mAP, "text_to_image": None}


def test_the_choice_stands_where_the_test_split_would_choose_otherwise(searched, monkeypatch):
    finish, context, _ = searched
    monkeypatch.setattr(sweep, "_validated", lambda context, blend: made_up(0.5 + 0.1 * len(blend.runs) * blend.share))
    tested = sweep._tested

    def worst_for_the_soup(context, name, experiment, clip):
        measured, scores = tested(context, name, experiment, clip)
        return {**measured, "mAP": 0.9 if name == "zero-shot" else 0.1}, scores

    monkeypatch.setattr(sweep, "_tested", worst_for_the_soup)
    winner, summary = finish()
    assert winner.step == "soup" and winner.blend == Blend(("trials/0001", "trials/0002", "trials/0003"))
    assert next(step for step in summary["soup"]["steps"] if step["won"])["test"]["mAP"] == 0.1
    assert summary["zero_shot"]["mAP"] == 0.9


def test_a_soup_is_reported_under_the_trial_whose_settings_it_has(searched, monkeypatch):
    """The lead has the best mean, and the soup begins with the best single run, which may be another trial's."""
    finish, context, _ = searched
    scores = {"0001": [0.9, 0.9], "0002": [0.1, 0.95]}

    def retrain(leading, sweep, inputs, folder, resources, log):
        for trial, each in scores.items():
            for number, score in enumerate(each, 1):
                run = finalists.run_path(folder, trial, number)
                make_run(run, leading[trial], load_start(leading[trial]), score)
        return scores

    monkeypatch.setattr(finalists, "retrain", retrain)
    monkeypatch.setattr(sweep, "_validated", lambda context, blend: made_up(0.5 + 0.1 * len(blend.runs) * blend.share))
    winner, summary = finish(final=Finalists(top=2, seeds=2))
    assert winner.blend.runs[0] == "final/0002-again-2" and winner.step == "soup"
    assert (summary["best_trial"], summary["experiment"]["optimizer.lr"]) == ("0002", 2e-3)


def test_where_no_leader_could_be_trained_again_the_best_of_the_search_takes_their_place(searched, monkeypatch):
    finish, context, told = searched
    monkeypatch.setattr(finalists, "retrain", lambda leading, *_: {trial: [0.0, 0.0] for trial in leading})
    monkeypatch.setattr(finalists, "refit", lambda experiments, *_: ([context.out / "final/refit"], "out of memory"))
    monkeypatch.setattr(sweep, "prepare_inputs", lambda *given, **options: None)
    monkeypatch.setattr(sweep.shared_inputs, "prepare_larger", lambda *_: {})
    final = Finalists(top=2, seeds=2, refit=True, image_size=96, soup="none", mix=False)
    winner, summary = finish(final=final)
    assert winner.blend == Blend(("trials/0001",)) and "trial 0001, the best of the search, takes" in "\n".join(told)
    assert not winner.refit and summary["final"]["refit_diverged"] == "out of memory"


def test_what_was_measured_before_a_kill_is_not_measured_again(searched, embedded_splits, monkeypatch):
    finish, context, _ = searched
    embed, left = race.embed, [3]

    def killed(*given):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return embed(*given)

    monkeypatch.setattr(race, "embed", killed)
    with pytest.raises(KeyboardInterrupt):
        finish()
    assert len(context.out.read_json(layout.SOUP)["measured"]) == 3
    assert "soup and mix: 3 measured, the best" in status.describe(context.out)
    monkeypatch.setattr(race, "embed", embed)
    _, summary = finish()
    measured = artifacts.read(context.out).measured
    assert embedded_splits.count("val") == len(measured) == len({each["label"] for each in measured})
    before = embedded_splits.copy()
    _, again = finish()
    assert again == summary and embedded_splits[len(before) :] == ["test", "test"], "zero-shot and the winner"


def test_what_was_measured_of_a_run_before_it_was_trained_further_is_measured_again(searched, embedded_splits):
    finish, context, _ = searched
    finish(final=Finalists(soup="none"))
    run, splits = context.out / "trials/0001", embedded_splits.copy()
    further, snapshot = run / layout.CHECKPOINTS, f"{layout.CHECKPOINTS}/{layout.SNAPSHOT}"
    further.local_path("checkpoint_4").rename(further.local_path("checkpoint_8"))
    run.write(snapshot, run.read_text(snapshot).replace("checkpoint_4", "checkpoint_8"))
    embedded_splits.clear()
    finish(final=Finalists(soup="none"))
    assert embedded_splits == splits and len(artifacts.read(context.out).measured) == splits.count("val")


def test_runs_that_have_no_common_start_stay_out_and_it_is_said_why(searched):
    _, context, _ = searched
    out, rows = context.out, [{"trial": f"000{n}", "status": "done", "val_mAP": "0.5"} for n in range(1, 6)]
    other = schema.replace(context.sweep.experiment(context.sweep.first), {"model.image_size": 48})
    make_run(out / "trials/0004", other, load_start(other), 0.99)
    lost = schema.replace(context.sweep.experiment(context.sweep.first), {"optimizer.lr": 9e-3})
    make_run(out / "trials/0005", lost, load_start(lost), 0.98)
    out.write(f"trials/0005/{layout.FREED}", json.dumps({"step": 4, "kept": ""}))
    like = schema.load_experiment(out / "trials/0001" / layout.EXPERIMENT)
    runs, left_out = soup.candidates(rows, out, {}, like)
    assert runs == ["trials/0001", "trials/0002", "trials/0003"]
    assert left_out == {
        "trials/0004": "begins with another model, or another size of images",
        "trials/0005": "its weights were not kept",
    }


def test_random_weights_have_neither_soup_nor_mix_and_it_is_said_why(searched, embedded_splits, monkeypatch):
    finish, context, told = searched
    monkeypatch.setattr(soup, "weights_name", lambda settings: "")
    winner, summary = finish()
    assert winner.off == soup.RANDOM == summary["soup"]["off"] and summary["soup"]["steps"] == []
    assert f"note: no soup and no mix: {soup.RANDOM}" in told and embedded_splits == ["test", "test"]
    assert not context.out.exists(layout.SOUP) and "No soup and no mix" in context.out.read_text(layout.REPORT)


def test_leaders_of_a_soup_keep_their_weights(searched, tmp_path):
    _, context, _ = searched
    assert finalists.num_leaders(context.sweep) == finalists.SOUP_TRIALS
    none = dataclasses.replace(context.sweep, final=Finalists(soup="none"))
    assert finalists.num_leaders(none) == 1
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "base": {"model.name": SMALL_MODEL}}))
    assert finalists.num_leaders(sweep_file.load(tmp_path / "x.yaml")) == 1, "random weights"


def test_a_soup_is_refit_run_by_run_in_the_same_shares(searched, monkeypatch):
    finish, context, _ = searched
    monkeypatch.setattr(sweep, "_validated", lambda context, blend: made_up(0.5 + 0.1 * len(blend.runs)))
    monkeypatch.setattr(sweep, "prepare_inputs", lambda *given, **options: None)
    trained = []

    def refit(experiments, sweep, inputs, folder, resources, tell):
        trained.extend(experiments)
        clip = load_start(experiments[0])
        return [make_run(folder / f"refit-{n}", each, clip, 0.5) for n, each in enumerate(experiments, 1)], ""

    monkeypatch.setattr(finalists, "refit", refit)
    winner, summary = finish(final=Finalists(refit=True))
    assert winner.refit and winner.blend == Blend(("final/refit-1", "final/refit-2", "final/refit-3"))
    assert [each.optimizer.lr for each in trained] == [1e-3, 2e-3, 3e-3]
    assert {step["name"] for step in summary["soup"]["steps"]} == {"zero-shot", "best trial", "soup", "mix"}
