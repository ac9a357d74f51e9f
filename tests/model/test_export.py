"""An export by itself: its card's own lines give the checkpoint's embeddings, in open_clip and in onnxruntime."""

import ast
import importlib.util
import json
import re
import stat
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from shop import colored, saved

from clipfh import UserError
from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL
from clipfh.data import images
from clipfh.data.encode import encode_photo
from clipfh.model import export, onnx
from clipfh.model.architecture import find as find_architecture
from clipfh.model.clip import get_preprocess, load_initial_model, load_tokenizer
from clipfh.model.towers import Towers, embed_images, embed_texts
from clipfh.report import artifacts
from clipfh.retrieval import metrics

EXPERIMENT = presets.resolve("joint", None, {"model.name": SMALL_MODEL})


@pytest.fixture(scope="module")
def clip():
    return load_initial_model(EXPERIMENT.model, seed=5).eval()


@pytest.fixture(scope="module")
def photos(small_catalogue):
    return export.sample_photos(small_catalogue)


@pytest.fixture(scope="module")
def folder(clip, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    export.write_export(clip, EXPERIMENT, out, {}, photos, with_onnx=True)
    return out


def embedded(clip, *photos):
    pixels = np.stack([images.decode_for_evaluation(photo, get_preprocess(clip)) for photo in photos])
    return embed_images(Towers(clip), pixels, torch.float32)


def blocks(folder, photo):
    """The card's Python, as someone has it who puts in the two names."""
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return [block.replace("FOLDER", str(folder)).replace("photo.jpg", str(photo)) for block in found]


@pytest.fixture
def own_imports(monkeypatch):
    """What the card's lines import lies in a folder of the export, and is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "preprocess", raising=False)
    yield
    sys.modules.pop("preprocess", None)


def odd_photos():
    """One picture turned by its tag, cut out with black below, and of 16 bits."""
    picture = colored((300, 400))
    exif = Image.Exif()
    exif[0x0112] = 6
    cut = np.dstack([np.asarray(picture), np.full((400, 300), 255, np.uint8)])
    cut[:150] = 0
    deep = np.linspace(0, 65535, 400 * 300).reshape(400, 300).astype(np.uint16)
    return {
        "turned.jpg": saved(picture.transpose(Image.Transpose.ROTATE_90), quality=95, exif=exif),
        "cut.png": saved(Image.fromarray(cut), "PNG"),
        "deep.png": saved(Image.fromarray(deep), "PNG"),
    }


def test_the_lines_of_the_card_read_a_photo_as_prepare_does(folder, clip, tmp_path, own_imports):
    for name, data in odd_photos().items():
        (tmp_path / name).write_bytes(data)
        scope = {}
        exec(blocks(folder, tmp_path / name)[0], scope)
        expected = embedded(clip, encode_photo(tmp_path / name, 256))
        torch.testing.assert_close(scope["embedding"], expected, rtol=0, atol=1e-5)


def test_what_reads_a_photo_needs_pillow_alone(folder):
    tree = ast.parse((folder / "preprocess.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"PIL", "pillow_heif"}


def test_the_lines_of_the_card_give_the_checkpoints_embeddings(folder, clip, photos, tmp_path, own_imports):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(photos[3])
    expected, scope = embedded(clip, photos[3]), {}
    by_open_clip, words, by_onnx = blocks(folder, photo)
    assert len([line for line in by_open_clip.splitlines() if line]) == 8
    exec(by_open_clip, scope)
    torch.testing.assert_close(scope["embedding"], expected, rtol=0, atol=1e-5)
    exec(words, scope)
    tokens = load_tokenizer(find_architecture(EXPERIMENT.model))(["a red dress"])
    told = embed_texts(Towers(clip), tokens, torch.float32)
    torch.testing.assert_close(scope["words"], told, rtol=0, atol=1e-5)
    exec(by_onnx, scope)
    np.testing.assert_allclose(scope["embedding"], expected, rtol=0, atol=1e-4)
    by_text_tower = onnx.run_tower(folder / "onnx" / "text.onnx", tokens.numpy())
    np.testing.assert_allclose(by_text_tower, told, rtol=0, atol=1e-4)


def test_onnx_takes_batches_of_any_length(folder, clip, photos):
    many = photos * 3
    pixels, expected = onnx.pixel_values(many, get_preprocess(clip)), embedded(clip, *many)
    for length in (1, 2, 19):
        found = onnx.run_tower(folder / "onnx" / "image.onnx", pixels[:length].numpy())
        np.testing.assert_allclose(found, expected[:length], rtol=0, atol=1e-4)


def test_pixels_made_as_the_description_says_are_the_models(folder, clip, photos, tmp_path):
    how = json.loads((folder / "onnx" / "preprocessor_config.json").read_text())
    (tmp_path / "photo").write_bytes(photos[0])
    image = Image.open(tmp_path / "photo").convert("RGB")
    factor = how["size"]["shortest_edge"] / min(image.size)
    image = image.resize([int(side * factor) for side in image.size], how["resample"])
    width, height = how["crop_size"]["width"], how["crop_size"]["height"]
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height))) * how["rescale_factor"]
    values = ((pixels - how["image_mean"]) / how["image_std"]).transpose(2, 0, 1)
    ours = onnx.pixel_values(photos[:1], get_preprocess(clip))[0]
    np.testing.assert_allclose(values, ours, rtol=0, atol=1e-5)


def test_towers_that_differ_are_no_export(clip, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    monkeypatch.setattr(onnx, "run_tower", lambda file, batch: np.zeros((len(batch), 256), np.float32))
    with pytest.raises(RuntimeError, match="nothing was exported"):
        export.write_export(clip, EXPERIMENT, tmp_path / "model", {}, photos, with_onnx=True)
    assert not any(tmp_path.iterdir())


def test_without_the_libraries_one_line_says_how_to_get_them(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--onnx needs .*: pip install onnx onnxscript onnxruntime"):
        export.write_export(clip, EXPERIMENT, tmp_path / "model", with_onnx=True)


def test_others_may_read_it(folder):
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir() if file.is_file()} == {
        stat.S_IMODE((folder / "README.md").stat().st_mode)
    }


def figures(mAP):
    found = dict.fromkeys(metrics.KEYS, mAP)
    return {**found, "intervals": {key: [mAP - 0.1, mAP + 0.1] for key in found}, "num_query": 9, "num_gallery": 1234}


def test_the_card_tells_what_is_known(clip, small_catalogue):
    account = artifacts.catalogue_account(small_catalogue)
    known = {"catalogue": account, "test": figures(0.5), "zero_shot": figures(0.25)}
    text = export.card(EXPERIMENT, known, clip, with_onnx=False)
    assert "| mAP | 0.250 [0.150, 0.350] | 0.500 [0.400, 0.600] |" in text
    assert "9 queries and 1,234 gallery photos" in text
    assert f"Trained on {account['counts']['train']['images']:,} photos" in text
    assert "onnx" not in text
    whole = export.card(EXPERIMENT, {**known, "refit": True}, clip, with_onnx=False)
    assert "then trained on all of them" in whole and "none of" not in whole
    untuned = export.card(EXPERIMENT, {**known, "test": figures(0.25)}, clip, with_onnx=False)
    assert "the search made nothing better" in untuned and "Trained on" not in untuned
    bare = export.card(EXPERIMENT, {}, clip, with_onnx=False)
    assert "## Figures" not in bare and "## Data" not in bare and "## Limits" in bare


def test_no_value_on_the_card_is_taken_for_markup(clip):
    hostile = "a|b\n<script>alert(1)</script> `c` *d* [e](f).json"
    experiment = presets.resolve("joint", None, {"model.name": SMALL_MODEL, "text.file": hostile})
    counts = {name: {"images": 1, "items": 1} for name in ("train", "val_query", "val_gallery", "query", "gallery")}
    account = {"path": "/x/<img src=x onerror=alert(1)>`", "hash": "0" * 64, "counts": counts}
    text = export.card(experiment, {"catalogue": account, "warm_start": hostile}, clip, with_onnx=False)
    assert (
        "<script" not in text and "<img" not in text and "the catalogue &lt;img src=x onerror=alert(1)&gt;\\` (" in text
    )
    row = next(line for line in text.splitlines() if line.startswith("| `text.file` "))
    escaped = r"a\|b &lt;script&gt;alert(1)&lt;/script&gt; \`c\` \*d\* \[e\](f).json"
    assert row == f"| `text.file` | {escaped} |" and f"from the weights {escaped}, so" in text


def test_a_model_that_came_out_otherwise_is_no_export(clip, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing was exported"):
        export.write_export(clip, EXPERIMENT, tmp_path / "model", {}, photos)
    assert list(tmp_path.iterdir()) == []
