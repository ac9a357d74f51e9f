"""A catalogue embedded, its figures, and what is kept of both."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from shop import draw

from clipfh import UserError
from clipfh.cli import console, main
from clipfh.cluster import connect, resources
from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.data import images as images_module
from clipfh.data.prepare import prepare
from clipfh.model import export
from clipfh.model.architecture import find as find_architecture
from clipfh.model.clip import build_model, get_preprocess, load_tokenizer
from clipfh.model.prompts import load_prompts_for
from clipfh.model.towers import Towers, embed_images, embed_texts
from clipfh.report import artifacts, page
from clipfh.retrieval import embed, embed_ray, evaluate, metrics
from clipfh.storage import layout
from clipfh.train.inputs import load_start

SPLITS = evaluate.get_splits("test")
SETTINGS = ModelSettings(name=SMALL_MODEL, precision="float32")
KEYS = {*metrics.KEYS, "num_query", "num_gallery", "num_unmatched", "intervals", "cmc", "random_splits", "variant"}
KEYS |= {"by_category", "by_gender", "text_to_image", "image_to_text", "rerank", "prompts_tell_apart"}
KEYS |= {"without_copies", "beside"}


@pytest.fixture(scope="module")
def experiment():
    return presets.resolve("image", None, {"model.name": SMALL_MODEL})


@pytest.fixture(scope="module")
def clip(experiment):
    return load_start(experiment)


@pytest.fixture(scope="module")
def prompts(small_catalogue, experiment):
    return load_prompts_for(small_catalogue, experiment, load_tokenizer(find_architecture(SETTINGS)), *SPLITS)


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def embedded(small_catalogue, clip, prompts, told, ray_cluster):
    def progress(done, total):
        told.append((done, total))

    return evaluate.embed_splits(small_catalogue, SPLITS, clip, SETTINGS, prompts, progress)


@pytest.fixture
def folder(tmp_path, small_catalogue, clip, prompts, embedded):
    """An evaluation's folder in which the embeddings are kept."""
    evaluate.cache_embeddings(
        tmp_path, evaluate.fingerprint(small_catalogue, SPLITS, clip, SETTINGS, prompts), embedded
    )
    return tmp_path


def test_a_cluster_embeds_as_this_process_does(small_catalogue, clip, prompts, embedded, told, ray_cluster):
    here = embed.InProcessEncoder(clip, SETTINGS)
    over = embed_ray.RayEncoder(clip, SETTINGS)
    counted = []
    images = over.images(small_catalogue, SPLITS, lambda *at: counted.append(at))
    torch.testing.assert_close(images, here.images(small_catalogue, SPLITS), rtol=0, atol=1e-5)
    torch.testing.assert_close(over.texts(["a hat", "a red dress"]), here.texts(["a hat", "a red dress"]))
    assert counted[-1] == told[-1]


def test_a_cluster_whose_gpus_are_yet_to_come_embeds_on_them(monkeypatch):
    """An autoscaler takes nodes away that had nothing to do."""
    asked = []
    embedded = SimpleNamespace(iter_batches=lambda batch_format: iter(()))
    rows = SimpleNamespace(context=SimpleNamespace(execution_options=SimpleNamespace()))
    rows.map_batches = lambda function, **how: asked.append((function, how)) or embedded
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(resources, "_planned_nodes", lambda: [{"CPU": 8.0, "GPU": 1.0}] * 2)
    over = embed_ray.RayEncoder.__new__(embed_ray.RayEncoder)
    over.clip, over.settings = None, SETTINGS
    assert not list(over._run(rows, at_once=4))
    [(function, how)] = asked
    assert function is embed_ray._Embedder and how["num_gpus"] == how["fn_constructor_kwargs"]["gpus"] == 1
    assert how["compute"].max_size == 2


def test_a_small_job_starts_no_cluster(small_catalogue, tmp_path):
    """`evaluate` and `embed` on one machine work in the command's own process, which does not even load Ray."""
    code = """
import sys
from clipfh.cli import main as cli
assert cli.main(["evaluate", sys.argv[1], "--out", sys.argv[2] + "/eval", "--model", "clipfh-small"]) == 0
assert cli.main(["embed", sys.argv[1], "--out", sys.argv[2] + "/all.parquet", "--model", "clipfh-small"]) == 0
print("ray loaded:", "ray" in sys.modules)
"""
    words = [sys.executable, "-c", code, str(small_catalogue.path), str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "ray loaded: False"


def test_embeddings_are_those_of_each_image_and_prompt_alone(small_catalogue, clip, prompts, embedded, told):
    towers, preprocess = Towers(clip), get_preprocess(clip)
    for split, part in zip(SPLITS, (embedded.query, embedded.gallery), strict=True):
        encoded = small_catalogue.images(split)["image"].to_pylist()
        pixels = np.stack([images_module.decode_for_evaluation(image, preprocess) for image in encoded])
        torch.testing.assert_close(part.embedding, embed_images(towers, pixels, torch.float32), rtol=0, atol=1e-5)
    first = embedded.query_rows["item_id"][0].as_py()
    code, row = embedded.query.item[0], embedded.prompts.index(prompts[first])
    assert ((embedded.captions.item == code) & (embedded.captions.caption == row)).sum() == 1
    tokens = load_tokenizer(find_architecture(SETTINGS))([prompts[first]])
    alone = embed_texts(towers, tokens, torch.float32)[0]
    torch.testing.assert_close(embedded.captions.embedding[row], alone, rtol=0, atol=1e-5)
    total = len(embedded.query) + len(embedded.gallery)
    assert told[-1] == (total, total)


def test_kept_embeddings_come_back_and_nothing_else_does(small_catalogue, clip, prompts, embedded, folder):
    def kept(weights=clip, settings=SETTINGS, splits=SPLITS, prompts=prompts, catalogue=small_catalogue):
        mark = evaluate.fingerprint(catalogue, splits, weights, settings, prompts)
        return evaluate.read_cached_embeddings(folder, mark, catalogue, splits, prompts)

    again = kept()
    assert torch.equal(again.both.embedding, embedded.both.embedding)
    assert torch.equal(again.captions.embedding, embedded.captions.embedding)
    assert evaluate.compute_metrics(again, 2) == evaluate.compute_metrics(embedded, 2)
    changed = build_model(SETTINGS)
    changed.load_state_dict(clip.state_dict())
    changed.logit_scale.data += 1e-6
    item = embedded.query_rows["item_id"][0].as_py()
    manifest = {**small_catalogue.manifest, "hash": "another"}
    assert kept(weights=changed) is None
    assert kept(settings=dataclasses.replace(SETTINGS, precision="bfloat16")) is None
    assert kept(splits=evaluate.get_splits("val")) is None
    assert kept(prompts={**prompts, item: "a red shirt"}) is None
    assert kept(catalogue=dataclasses.replace(small_catalogue, manifest=manifest)) is None
    (folder / layout.EMBEDDINGS).write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="delete it"):
        kept()


@pytest.mark.parametrize("options", [[], ["--rerank"]])
def test_a_second_evaluation_embeds_nothing(small_catalogue, folder, options, capsys, monkeypatch):
    """It does not even start Ray. The predictions are in the order of the figures, re-ranked or not."""
    monkeypatch.setattr(connect, "connect", lambda *_: pytest.fail("Ray is started"))
    command = ["evaluate", str(small_catalogue.path), "--out", str(folder), "--model", SMALL_MODEL]
    assert main.main([*command, "--random-splits", "3", *options]) == 0
    said = capsys.readouterr().out
    assert "used again" in said and ("re-ranked" in said) == bool(options)
    found = json.loads((folder / "metrics.json").read_text())
    assert set(found) == KEYS
    assert found["rerank"] == ({"k1": 20, "k2": 6, "lambda": 0.3} if options else None)
    assert [found["cmc"][k - 1] for k in metrics.RANKS] == [found[f"rank{k}"] for k in metrics.RANKS]
    listed = pq.read_table(folder / "predictions.parquet").to_pandas()
    nearest = listed[listed["rank"] == 1]
    assert len(nearest) == found["num_query"]
    assert nearest["match"].mean() == pytest.approx(found["rank1"])
    assert listed[listed["rank"] <= 5].groupby("query")["match"].any().mean() == pytest.approx(found["rank5"])


def test_a_query_without_a_match_is_named_or_left_out(embedded, tmp_path):
    item = embedded.query.item[3]
    alone = (embedded.query.item == item).nonzero().flatten()
    others = embedded.gallery.item != item
    rows = embedded.gallery_rows.filter(others.numpy())
    lacking = dataclasses.replace(embedded, gallery=embedded.gallery.select(others), gallery_rows=rows)
    path = embedded.query_rows["path"][int(alone[0])].as_py()
    with pytest.raises(UserError, match=rf"^{len(alone)} of \d+ queries .*{path}.*--skip-unmatched"):
        evaluate.compute_metrics(lacking, 0)
    found = evaluate.compute_metrics(lacking, 0, skip_unmatched=True)
    assert (found["num_unmatched"], found["num_query"]) == (len(alone), len(embedded.query) - len(alone))


def test_figures_of_one_item_without_prompts_are_null_where_there_is_nothing(embedded, capsys):
    one = embedded.query.item == embedded.query.item[0]
    of = {"query": embedded.query.select(one), "query_rows": embedded.query_rows.filter(one.numpy())}
    lone = dataclasses.replace(embedded, **of, captions=None)
    found = {**evaluate.compute_metrics(lone, 0), "rerank": None, "beside": []}
    assert set(found) == KEYS
    assert (
        found["intervals"]["mAP"] is found["text_to_image"] is found["image_to_text"] is found["random_splits"] is None
    )
    assert "none" in console.format_metrics(found)


def texts_told(tmp_path, capsys, layout_of):
    """What `clipfh evaluate` prints and measures of photos in folders, without a text."""
    for item in range(30):
        for view in range(2):
            draw(tmp_path / "photos" / layout_of(item) / f"{view}.jpg", number=2 * item + view)
    prepare(tmp_path / "photos", tmp_path / "catalogue")
    words = ["evaluate", str(tmp_path / "catalogue"), "--out", str(tmp_path / "out"), "--model", SMALL_MODEL]
    assert main.main([*words, "--split", "val"]) == 0
    return capsys.readouterr().out, json.loads((tmp_path / "out" / layout.METRICS).read_text())


def test_there_are_no_text_figures_where_all_items_have_one_prompt(tmp_path, quick, capsys):
    said, figures = texts_told(tmp_path, capsys, lambda item: f"item{item}")
    assert "no text figures: all items have the same prompt" in said and "text to image" not in said
    assert figures["text_to_image"] is figures["image_to_text"] is None


def test_text_figures_of_prompts_that_name_categories_say_so(tmp_path, quick, capsys):
    said, figures = texts_told(tmp_path, capsys, lambda item: f"{'hats' if item % 2 else 'shoes'}/item{item}")
    assert "prompts name no more than category and gender" in said
    assert figures["prompts_tell_apart"] == "kinds" and figures["text_to_image"]["mAP"] > 0


def test_other_catalogues_are_measured_before_and_after_tuning(
    small_catalogue, clip, experiment, tmp_path, capsys, monkeypatch
):
    tuned = copy.deepcopy(clip)
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    export.write_export(tuned, experiment, tmp_path / "model")
    export.write_export(clip, experiment, tmp_path / "again", {"warm_start": str(tmp_path / "model")})
    found = {}
    for name, weights in (("zero", None), ("model", tmp_path / "model"), ("again", tmp_path / "again")):
        beside, settings = [small_catalogue.path] if weights else [], None if weights else {"model.name": SMALL_MODEL}
        options = {"checkpoint": weights, "beside": beside, "random_splits": 0, "settings": settings}
        found[name] = evaluate.evaluate(small_catalogue, tmp_path / name / "e", **options).metrics
    assert found["zero"]["beside"] == []
    (model,), (again,) = found["model"]["beside"], found["again"]["beside"]
    for key in ("mAP", "rank1", "num_query", "intervals", "text_to_image"):
        assert model["before"][key] == again["after"][key] == found["zero"][key]
        assert model["after"][key] == again["before"][key] == found["model"][key], "a warm start is what came before"
    assert model["gain"]["mAP"] == pytest.approx(found["model"]["mAP"] - found["zero"]["mAP"]) != 0
    monkeypatch.setattr(evaluate, "embed_splits", lambda *_: pytest.fail("is embedded again"))
    command = ["evaluate", str(small_catalogue.path), "--out", str(tmp_path / "model/e"), "--random-splits", "0"]
    command += ["--checkpoint", str(tmp_path / "model"), "--beside", str(small_catalogue.path)]
    assert main.main(command) == 0
    said = capsys.readouterr().out
    assert f"{model['gain']['mAP']:+.4f}" in said and "mAP before" in said
    assert "On other catalogues" in page.page(["e"], [artifacts.read(tmp_path / "model/e")])


def test_what_has_no_start_can_not_be_compared_beside(small_catalogue, clip, experiment, tmp_path):
    with pytest.raises(UserError, match="name it by --checkpoint"):
        evaluate.evaluate(small_catalogue, tmp_path / "e", beside=[small_catalogue])
    export.write_export(clip, experiment, tmp_path / "model", {"warm_start": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="gone, which is no longer there: put it back"):
        evaluate.evaluate(small_catalogue, tmp_path / "e", checkpoint=tmp_path / "model", beside=[small_catalogue])
    assert not (tmp_path / "e").exists()
