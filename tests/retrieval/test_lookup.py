"""A catalogue embedded into a file, and photos and words looked up in it, as the commands do it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from clipfh import UserError
from clipfh.cli import main
from clipfh.cluster import connect
from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.data import images
from clipfh.data.encode import encode_photo
from clipfh.data.splits import SPLITS
from clipfh.model import checkpoint
from clipfh.model.architecture import find as find_architecture
from clipfh.model.clip import get_preprocess, load_initial_model, load_tokenizer
from clipfh.model.towers import Towers, embed_texts
from clipfh.retrieval import lookup

SMALL = ModelSettings(name=SMALL_MODEL)


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A folder with weights and their experiment, as a checkpoint is one."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    folder.mkdir()
    experiment = presets.resolve("joint", None, {"model.name": SMALL_MODEL})
    checkpoint.save(
        folder, experiment, find_architecture(SMALL), load_initial_model(SMALL, seed=3).state_dict(), {}, {}, {}
    )
    return folder


@pytest.fixture(scope="module")
def file(export, small_catalogue, ray_cluster, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("embeddings") / "all.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connect, "disconnect", lambda: None)  # the suite's cluster stays
        words = ["embed", str(small_catalogue.path), "--checkpoint", str(export), "--out", str(out)]
        assert main.main(words) == 0
    return out


def searched(capsys, *words) -> list[list[str]]:
    """The lines of the command's table, each by its words."""
    assert main.main(["search", *map(str, words)]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"\d", line)]


def refused(capsys, *words) -> str:
    assert main.main(["search", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_every_image_has_its_row(file, small_catalogue):
    table = pq.read_table(file)
    assert table.column_names == ["item_id", "path", "split", "prompt", "embedding"]
    expected = [path for split in SPLITS for path in small_catalogue.rows(split)["path"].to_pylist()]
    assert table["path"].to_pylist() == expected
    lengths = np.linalg.norm(np.stack(table["embedding"].to_numpy()), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    assert all(table["prompt"].to_pylist())


def test_a_photo_finds_itself_and_then_what_is_nearest(file, source, capsys):
    table = pq.read_table(file)
    embedding, paths = np.stack(table["embedding"].to_numpy()), table["path"].to_pylist()
    row = 17
    lines = searched(capsys, "--embeddings", file, "--image", source / "img" / paths[row].removeprefix("img/"))
    similarity = embedding @ embedding[row]
    assert lines[0] == ["1", "1.0000", table["item_id"][row].as_py(), paths[row]]
    assert [float(line[1]) for line in lines] == pytest.approx(np.sort(similarity)[::-1][:10], abs=2e-4)
    for line in lines:
        assert float(line[1]) == pytest.approx(similarity[paths.index(line[3])], abs=2e-4)


def test_words_find_what_the_text_tower_says(file, export, capsys):
    clip = checkpoint.build(checkpoint.load(export), SMALL)
    words = embed_texts(Towers(clip), load_tokenizer(find_architecture(SMALL))(["a red dress"]), torch.float32)[0]
    table = pq.read_table(file)
    similarity = np.stack(table["embedding"].to_numpy()) @ words.numpy()
    lines = searched(capsys, "--embeddings", file, "--text", "a red dress", "--top", 3)
    assert [float(line[1]) for line in lines] == pytest.approx(np.sort(similarity)[::-1][:3], abs=2e-4)


def test_the_page_is_one_file_with_a_picture_for_each_find(file, small_catalogue, tmp_path, capsys):
    path = pq.read_table(file)["path"][0].as_py()
    photo = tmp_path / "<mine>.jpg"
    photo.write_bytes(small_catalogue.images_at([path])[path])
    page = tmp_path / "page.html"
    searched(capsys, "--embeddings", file, "--image", photo, "--top", 5, "--html", page)
    text = page.read_text()
    assert text.count('<img src="data:image/webp;base64,') == 6
    assert "&lt;mine&gt;.jpg" in text and path in text
    assert not re.search(r"https?://|<script|url\(", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_a_catalogue_that_is_gone_is_missed_by_the_page_alone(file, small_catalogue, tmp_path, capsys):
    there = Path(small_catalogue.path)
    away = there.rename(there.with_name("away"))
    try:
        assert searched(capsys, "--embeddings", file, "--text", "a dress")
        line = refused(capsys, "--embeddings", file, "--text", "a dress", "--html", tmp_path / "page.html")
    finally:
        away.rename(there)
    assert str(small_catalogue.path) in line and "gone" in line


def test_another_model_is_refused_and_one_that_was_moved_is_taken(file, export, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(export, moved)
    assert searched(capsys, "--embeddings", file, "--text", "a dress", "--checkpoint", moved)
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.save(
        other,
        checkpoint.load(export).experiment,
        find_architecture(SMALL),
        load_initial_model(SMALL, seed=4).state_dict(),
        {},
        {},
        {},
    )
    line = refused(capsys, "--embeddings", file, "--text", "a dress", "--checkpoint", other)
    assert "another model" in line and "embed again" in line
    gone = lookup.open_index(file)
    gone.provenance["weights"] = str(tmp_path / "gone")
    with pytest.raises(UserError, match="--checkpoint"):
        lookup.load_embedding_model(gone)


def test_what_is_no_file_of_embeddings_or_no_photo(file, tmp_path, capsys):
    assert "clipfh embed" in refused(capsys, "--embeddings", tmp_path / "none", "--text", "a dress")
    other = tmp_path / "predictions.parquet"
    pq.write_table(pq.read_table(file).replace_schema_metadata(), other)
    assert "clipfh embed" in refused(capsys, "--embeddings", other, "--text", "a dress")
    assert "image" in refused(capsys, "--embeddings", file, "--image", other)
    assert main.main(["embed", str(tmp_path), "--out", str(other)]) == 2


def test_a_photo_is_taken_in_as_prepare_does(file, tmp_path):
    """A phone's photo lies on its side, and says so."""
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8))
    upright, turned, exif = tmp_path / "upright.png", tmp_path / "turned.png", Image.Exif()
    exif[274] = 6
    noise.save(upright)
    noise.rotate(90, expand=True).save(turned, exif=exif)
    index = lookup.open_index(file)
    clip, settings = lookup.load_embedding_model(index)
    one, other = (lookup.embed_photo(index, clip, settings, photo) for photo in (upright, turned))
    assert one @ other > 0.99
    assert images.decode_for_evaluation(encode_photo(turned, 256), get_preprocess(clip)).shape == (96, 96, 3)


def test_a_search_starts_no_ray():
    code = "import sys, clipfh.retrieval.lookup; print([m for m in ('ray', 'optuna') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
