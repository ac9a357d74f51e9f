"""A small sweep, whole: every trial accounted for, the best exported and tested, everything free again."""

import csv
import dataclasses
import json
import time
from types import SimpleNamespace

import numpy as np
import open_clip
import optuna
import pytest
import ray
import torch
import yaml
from ray.util.placement_group import placement_group_table

from clipfh import UserError
from clipfh.config import presets, schema, sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.config.sweep_file import Finalists
from clipfh.data import catalogue, images
from clipfh.data.decoding import TrainImages, read_index
from clipfh.data.sampler import ItemIndex
from clipfh.model import checkpoint
from clipfh.model.clip import get_preprocess
from clipfh.model.prompts import notes_on_prompts
from clipfh.model.towers import Towers, embed_images
from clipfh.report import artifacts
from clipfh.storage import layout
from clipfh.storage.store import Folder
from clipfh.sweep import finalists, race, shared_inputs, sweep
from clipfh.sweep.race import Contender

TEXT = """
name: tiny
stage: image
base: {model.name: clipfh-small, batch.items: 8, augment.crop_min: 0.5}
search:
  optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}
  batch.views: {choice: [2, 4]}
  loss.triplet: {loguniform: [0.1, 2.0], or: 0.0}
  loss.triplet_margin: {uniform: [0.1, 0.4]}
points:
  - {optimizer.lr: 1.0e-3, batch.views: 2, loss.triplet: 0.0}
trials: 4
budget: {images: 256, first_rung: 64, reduction: 2}
placement: {concurrent: 2}
final: {top: 1, seeds: 2, refit: true}
"""


def test_a_space_whose_losses_may_leave_too_few_items_is_refused(tmp_path, monkeypatch):
    """Without cross-entropy nothing is learned from an item's only photo."""
    search = {"batch.items": {"choice": [2, 4]}, "loss.ce": {"loguniform": [0.1, 1.0], "or": 0.0}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "search": search}))
    loaded = sweep_file.load(tmp_path / "x.yaml")
    index = ItemIndex(np.array([0, 0, 1, 1, 2, 2, 3, 4]), np.zeros(5, int), list("abcde"), np.array([8]))
    inputs = SimpleNamespace(images=SimpleNamespace(index=index, window=0))
    monkeypatch.setattr(shared_inputs, "prepare_inputs", lambda *_: inputs)
    contender = Contender("ViT-B/16", "0000", 1, 64, 1.0)
    with pytest.raises(UserError, match="--batch.items 4 is more than the 3 train items with two photos or more"):
        shared_inputs.prepare(loaded, None, [contender], lambda start: None, shared_inputs.SharingFeed(None))


def test_images_are_shared_once_and_a_refit_adds_those_of_validation(small_catalogue):
    shared = []

    def share(catalogue, *splits, window, runs):
        shared.append((*splits, window))
        return TrainImages(read_index(catalogue, *splits), [f"shards of {split}" for split in splits], [])

    feed = shared_inputs.SharingFeed(SimpleNamespace(share=share, put=lambda value: value))
    first, again = (feed.share(small_catalogue, "train") for _ in range(2))
    refit = feed.share(small_catalogue, "train", "val_query", "val_gallery")
    assert again is first and shared == [("train", "auto"), ("val_query", "val_gallery", 0)]
    assert refit.shards == [f"shards of {split}" for split in ("train", "val_query", "val_gallery")]
    assert len(refit.index.item) == sum(map(small_catalogue.num_images, ("train", "val_query", "val_gallery")))


def test_a_sweep_says_how_far_its_prompts_fit(small_catalogue, tmp_path, monkeypatch):
    items = sorted(set(small_catalogue.rows("train")["item_id"].to_pylist()))
    (tmp_path / "prompts.json").write_text(json.dumps(dict.fromkeys(items[:1], "a hat")))
    start = presets.resolve("joint", None, {"text.file": str(tmp_path / "prompts.json")})
    monkeypatch.setattr(shared_inputs, "notes_on_singles", lambda *_: [])
    two = SimpleNamespace(contenders=["a", "b"], start=lambda label: start)
    (note,) = shared_inputs.notes(two, small_catalogue, {shared_inputs.model_key(start.model): None})
    assert note == f"note: {notes_on_prompts(small_catalogue, start)[0]}"


@pytest.fixture(scope="module")
def finished(ray_cluster, small_catalogue, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(TEXT)
    summary = sweep.run(sweep_file.load(folder / "tiny.yaml"), small_catalogue, folder / "out", log=lambda line: None)
    return folder / "out", summary


# Ray Data's own, one of each for a cluster
RAYS = {"_StatsActor", "_AutoscalingCoordinatorActor", "_DatasetStateActor"}


def held() -> tuple[float, int, set[str]]:
    """CPUs that are not free, placement groups that are there, actors that are alive."""
    groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
    alive = [a["ActorClassName"] for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
    cpus = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
    return cpus, groups, set(alive) - RAYS


def rows(out):
    with (out / "leaderboard.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_trial_is_accounted_for(finished):
    out, summary = finished
    assert sorted(row["trial"] for row in rows(out)) == ["0000", "0001", "0002", "0003", "0004"]
    assert {row["status"] for row in rows(out)} <= {"zero-shot", "done", "stopped"}
    assert [int(row["rank"]) for row in rows(out)] == [1, 2, 3, 4, 5]
    for row in rows(out)[1:]:
        assert float(row["val_mAP"]) <= float(rows(out)[0]["val_mAP"])
    assert (summary["trials"], summary["failed"], summary["best_trial"]) == (4, 0, rows(out)[0]["trial"])


def test_what_it_held_is_free_again_within_seconds(finished):
    deadline = time.monotonic() + 10
    while held() != (0, 0, set()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert held() == (0, 0, set())


def test_the_study_holds_every_trial_and_a_margin_only_where_its_loss_is_on(finished):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{finished[0]}/study.journal"))
    trials = optuna.load_study(study_name="tiny", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    for trial in trials:
        assert (
            ("loss.triplet_margin" in trial.params) == trial.params["loss.triplet?"] == ("loss.triplet" in trial.params)
        )
    assert trials[0].params == {"optimizer.lr": 1e-3, "batch.views": 2, "loss.triplet?": False}


def test_the_export_embeds_photos_as_the_checkpoint_does(finished, small_catalogue):
    out, summary = finished
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out / 'best'}")
    winner = checkpoint.load(out / "final/refit")
    ours = checkpoint.build(winner, winner.experiment.model)
    preprocess = get_preprocess(loaded)
    photos = [photo.as_py() for photo in small_catalogue.images("query")["image"][:8]]
    pixels = torch.stack([torch.from_numpy(images.decode_for_evaluation(p, preprocess).copy()) for p in photos])
    theirs = embed_images(Towers(loaded), pixels.numpy(), torch.float32)
    expected = embed_images(Towers(ours), pixels.numpy(), torch.float32)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


def test_the_summary_has_both_models_on_the_test_split(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    for which in ("test", "zero_shot"):
        low, high = summary[which]["intervals"]["mAP"]
        assert low <= summary[which]["mAP"] <= high
    assert summary["test"]["num_query"] == summary["zero_shot"]["num_query"]
    assert "zero-shot" in sweep.outcome(summary, out) and artifacts.read(out).kind == "Sweep"


def test_the_leader_is_trained_again_and_the_winner_with_all_items(finished, small_catalogue):
    out, summary = finished
    leader = next(row["trial"] for row in rows(out) if row["trial"] != "0000")
    scores = summary["final"]["again"][leader]
    assert len(set(scores)) == 2 and list(summary["final"]["again"]) == [leader], "two seeds, two results"
    seeds = {schema.load_experiment(run / "experiment.json").seed for run in (out / "final").glob("*-again-*")}
    assert seeds == {1, 2}
    seen = [
        json.loads(line) for file in out.glob("final/*/metrics.jsonl") for line in file.read_text().splitlines()[-1:]
    ]
    assert summary["took"]["final"]["images"] == sum(line["images"] for line in seen) > 0
    assert summary["took"]["trials"]["images"] == sum(int(row["images"]) for row in rows(out))
    assert summary["took"]["final"]["seconds"] > 0
    assert summary["best_trial"] == leader
    assert summary["final"]["refit"] and summary["val_mAP"] == pytest.approx(sum(scores) / 2)
    lines = [json.loads(line) for line in (out / "final/refit/metrics.jsonl").read_text().splitlines()]
    assert not any("val_mAP" in line for line in lines), "a score on what is trained on means nothing"
    rowsseen = {
        row
        for line in (out / "final/refit/stream.jsonl").read_text().splitlines()
        for row in json.loads(line)["images"]
    }
    assert max(rowsseen) >= small_catalogue.num_images("train")


def test_only_what_can_still_be_used_is_left_on_disk(finished):
    out, summary = finished
    assert not list(out.rglob("training.pt"))
    leader = next(row["trial"] for row in rows(out) if row["trial"] != "0000")
    kept = {file.parts[-4] for file in out.glob("trials/*/checkpoints/*/model.safetensors")}
    assert kept == {leader} and checkpoint.load(out / "trials" / leader).state
    lost = next(row["trial"] for row in rows(out) if row["trial"] not in ("0000", leader))
    with pytest.raises(UserError, match="its weights were not kept"):
        checkpoint.load(out / "trials" / lost)


def test_a_finished_sweep_resumes_to_itself(finished, small_catalogue):
    out, summary = finished
    loaded = sweep_file.load(out / "sweep.yaml")
    before = {path: path.stat().st_mtime_ns for path in (out / "trials").glob("*/metrics.jsonl")}
    again = sweep.run(loaded, small_catalogue, out, resume=True, log=lambda line: None)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    assert {path: path.stat().st_mtime_ns for path in before} == before, "no trial ran twice"
    assert (finals := list(out.glob("final/*/metrics.jsonl"))) and not list(out.rglob("training.pt")), finals


def test_out_in_use_and_nothing_to_resume(finished, small_catalogue, tmp_path):
    loaded = sweep_file.load(finished[0] / "sweep.yaml")
    with pytest.raises(UserError, match="is not empty: --resume goes on with its sweep"):
        sweep.run(loaded, small_catalogue, finished[0])
    with pytest.raises(UserError, match="holds no sweep"):
        sweep.run(loaded, small_catalogue, tmp_path, resume=True)


def test_an_empty_split_is_found_before_anything_starts(small_catalogue, tmp_path):
    counts = {**small_catalogue.manifest["counts"], "query": {"images": 0, "items": 0}}
    empty = catalogue.Catalogue(small_catalogue.path, {**small_catalogue.manifest, "counts": counts})
    (tmp_path / "tiny.yaml").write_text(TEXT)
    with pytest.raises(UserError, match="no query images"):
        sweep.run(sweep_file.load(tmp_path / "tiny.yaml"), empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_resumed_only_on_its_own_catalogue_and_prompts(small_catalogue, tmp_path):
    (tmp_path / "prompts.json").write_text("{}")
    settings = {"model.name": SMALL_MODEL, "text.file": str(tmp_path / "prompts.json")}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "base": settings}))
    base, told = sweep_file.load(tmp_path / "x.yaml"), []
    sweep._require_same(small_catalogue, base, Folder(tmp_path), told.append)
    (tmp_path / "trials").mkdir()
    sweep._require_same(small_catalogue, base, Folder(tmp_path), told.append)
    other = dataclasses.replace(small_catalogue, manifest={**small_catalogue.manifest, "hash": "another"})
    with pytest.raises(UserError, match="was begun on another catalogue than"):
        sweep._require_same(other, base, Folder(tmp_path), told.append)
    (tmp_path / "prompts.json").write_text('{"a": "b"}')
    with pytest.raises(UserError, match="the file of --text.file has changed"):
        sweep._require_same(small_catalogue, base, Folder(tmp_path), told.append)
    assert told == []
    (tmp_path / layout.SWEEP_INPUTS).unlink()
    sweep._require_same(small_catalogue, base, Folder(tmp_path), told.append)
    assert "begun by an older version" in told[0]


def test_a_sweep_that_is_over_takes_more_trials_and_no_other_change(tmp_path, small_catalogue, monkeypatch):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "trials": 12}))
    twelve, out, told = sweep_file.load(tmp_path / "x.yaml"), Folder(tmp_path / "out"), []
    sweep._begin(twelve, out, False, told.append)
    monkeypatch.setattr(sweep, "earlier_trials", lambda _: pytest.fail("nothing speaks against it"))
    (out / layout.TRIALS).make()
    inputs = {"catalogue": "another", "hash": "another", "contents": {}}
    for hash_, error, trials in (
        ("another", UserError, 12),
        (small_catalogue.manifest["hash"], pytest.fail.Exception, 14),
    ):
        out.write(layout.SWEEP_INPUTS, json.dumps({**inputs, "hash": hash_}))
        with pytest.raises(error):
            sweep.run(dataclasses.replace(twelve, trials=14), small_catalogue, out, resume=True, log=told.append)
        assert sweep_file.load(tmp_path / "out" / layout.SWEEP).trials == trials
        assert told.pop() == "2 more trials than the sweep had"
    for change in ({"trials": 12}, {"trials": 16, "stage": "joint"}):
        with pytest.raises(UserError, match="--resume: the sweep file differs from .* resume with the same"):
            sweep._begin(dataclasses.replace(twelve, **change), out, True, told.append)


@pytest.mark.parametrize(
    ("earlier", "wins", "said"),
    [
        ({"val_mAP": 0.7}, True, "is better than all of this sweep: val mAP 0.700"),
        ({"val_mAP": 0.7, "model": {"model.image_size": 336}}, True, "is better than all of this sweep: val mAP 0.700"),
        ({"val_mAP": 0.5}, False, ""),
        ({"val_mAP": 0.7, "hash": "another"}, False, "can't win: it was selected on another catalogue"),
        ({"val_mAP": 0.7, "export": ""}, False, "can't win: its export is not there"),
        (
            {"val_mAP": 0.7, "model": {"model.name": "RN50"}},
            False,
            "can't win: its model, or the size of its images, is not searched here",
        ),
    ],
)
def test_the_best_of_an_earlier_sweep_competes_at_the_end(tmp_path, small_catalogue, earlier, wins, said):
    before, start = Folder(tmp_path / "before"), presets.resolve("image")
    (before / layout.BEST).make()
    made_of = {"runs": ["final/refit", "/runs/old/best"], "share": 0.7, "label": "two runs"}
    final = {"refit": True, "blend": made_of}
    before.write(layout.SUMMARY, json.dumps({"val_mAP": earlier["val_mAP"], "best_trial": "0003", "final": final}))
    before.write(layout.SWEEP_INPUTS, json.dumps({"hash": earlier.get("hash", small_catalogue.manifest["hash"])}))
    (before / layout.BEST).write(layout.EXPERIMENT, schema.to_json(schema.replace(start, earlier.get("model", {}))))
    if earlier.get("export", "there"):
        before.write(f"{layout.BEST}/{layout.EXPORTED_WEIGHTS}", "")
    told, asked = [], Finalists(top=0, refit=True, image_size=336)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x"}))
    loaded = dataclasses.replace(sweep_file.load(tmp_path / "x.yaml"), final=asked, earlier=before.address)
    losing, fitting = (Contender(name, "0000", 1, 64, 1.0, kept=keep) for name, keep in (("RN50", False), ("", True)))
    fitting = dataclasses.replace(fitting, model=next(iter(loaded.contenders)))
    context = sweep._Context(
        loaded, small_catalogue, Folder(tmp_path), [losing, fitting], None, None, None, told.append
    )
    winner = sweep._Winner("0001", losing, 0.6, None, {})
    best = sweep._with_earlier(context, winner)
    assert told == ([f"{'' if wins else 'note: '}the best of {before} {said}"] if said else [])
    if not wins:
        assert best is winner
        return
    assert (best.trial, best.val_mAP, best.contender) == ("before-0003", 0.7, fitting)
    assert best.blend.runs == ((before / layout.BEST).address,)
    runs = [(before / "final/refit").address, "/runs/old/best"]
    assert best.origin == {"refit": True, "blend": {**made_of, "runs": runs}}, "as that sweep's card has it"
    assert sweep._refitted(context, best) is best, "it was refit there, if anywhere"


@pytest.mark.parametrize("reason", ["", "loss or gradient are not finite at step 9"])
def test_a_refit_that_diverged_is_not_the_winner(tmp_path, monkeypatch, reason):
    for trial, line in (("trials/0001", {}), ("final/refit", {"diverged": reason} if reason else {})):
        folder = tmp_path / trial
        folder.mkdir(parents=True)
        (folder / "experiment.json").write_text(schema.to_json(presets.resolve("image")))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "images": 4, "best_val_mAP": 0.0, **line}))
    monkeypatch.setattr(sweep, "prepare_inputs", lambda *args, **kwargs: None)
    monkeypatch.setattr(sweep.finalists, "refit", lambda *args: ([Folder(tmp_path) / "final/refit"], reason))
    told, asked = [], Finalists(top=0, refit=True)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x"}))
    loaded = dataclasses.replace(sweep_file.load(tmp_path / "x.yaml"), final=asked)
    contender = Contender("ViT-B/16", "0000", 1, 64, 1.0, val_mAP=0.2, kept=True)
    feed, out = SimpleNamespace(window=None), Folder(tmp_path)
    context = sweep._Context(loaded, None, out, [contender], lambda start: None, feed, None, told.append)
    rows = [{"trial": "0001", "status": "done", "val_mAP": 0.5}, {"trial": "0000", "status": "z", "val_mAP": 0.2}]
    winner = sweep._refitted(context, sweep._lead(context, None, rows))
    assert winner.runs(out) == {out / ("trials/0001" if reason else "final/refit")}
    assert (winner.refit, winner.diverged) == (not reason, reason) and (reason in told[-1])


@pytest.mark.parametrize(("whitened", "whitening"), [(0.6, 0.2), (0.4, 0.0), (None, 0.0)])
def test_a_refit_is_whitened_only_where_validation_took_it(tmp_path, whitened, whitening):
    experiment = presets.resolve("image", "scratch", {"model.name": SMALL_MODEL})
    (tmp_path / layout.EXPERIMENT).write_text(schema.to_json(experiment))
    asked = {"val_mAP_whitened": whitened, "val_mAP_not_whitened": 0.5} if whitened else {}
    line = {"step": 9, "val_mAP": 0.6, **asked}
    (tmp_path / layout.REPORTS).write_text(json.dumps(line) + "\n")
    assert finalists.as_selected(Folder(tmp_path)).optimizer.whitening == whitening


def test_a_final_run_that_diverged_is_over_and_counts_as_the_worst(tmp_path):
    run = tmp_path / "final/0001-again-1"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(
        '{"step": 4, "images": 4, "val_mAP": 0.9, "best_val_mAP": 0.9}\n'
        '{"step": 6, "images": 6, "val_mAP": 0.0, "best_val_mAP": 0.0, "diverged": "loss is nan"}\n'
    )
    inputs = SimpleNamespace(num_images=100, num_single=0)
    assert finalists._is_over(presets.resolve("image"), inputs, Folder(run))
    assert (
        finalists.score(Folder(run)) == 0.0 and finalists._outcome(Folder(run)) == "0001-again-1: diverged: loss is nan"
    )


def test_models_are_tested_in_the_precision_that_is_exported(monkeypatch):
    asked = []
    monkeypatch.setattr(race.evaluate, "embed_splits", lambda *args: asked.append(args[3].precision))
    for name in ("load_prompts_for", "load_tokenizer", "get_architecture"):
        monkeypatch.setattr(race, name, lambda *args: {})
    race.embed(None, presets.resolve("image"), None, "test")
    assert asked == ["float32"]
