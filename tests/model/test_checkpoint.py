"""Weights files as people have them: plain, wrapped, with OpenAI's names; none that runs code."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipfh import UserError
from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model import checkpoint
from clipfh.model.clip import get_architecture, load_initial_model
from clipfh.train.inputs import load_start

SMALL = ModelSettings(name=SMALL_MODEL)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_initial_model(SMALL, seed=5).state_dict()


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """A state dict in the ways that training scripts keep one."""
    by_module = {f"module.{name}": tensor for name, tensor in state.items()}
    openai = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(77), "vocab_size": torch.tensor(9)}
    return {
        "plain": state,
        "DataParallel": by_module,
        "open_clip": {"epoch": 3, "name": "a run", "state_dict": by_module, "optimizer": {"state": {}}},
        "original": {"model_state_dict": state, "model_name": "clipfh-small", "epoch": 7},
        "OpenAI": {**state, **openai},
        "model": {"model": state},
        "half": {name: tensor.half() for name, tensor in state.items()},
    }


@pytest.mark.parametrize("kind", ["plain", "DataParallel", "open_clip", "original", "OpenAI", "model", "half"])
def test_training_starts_from_weights_in_any_wrapping(kind, state, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(wrapped(state)[kind], file)
    experiment = presets.resolve("joint", None, {"model.name": SMALL_MODEL})
    tolerance = 1e-3 if kind == "half" else 0
    for name, tensor in load_start(experiment, str(file)).state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance)


def test_safetensors(state, tmp_path):
    save_file(state, tmp_path / "weights.safetensors")
    assert checkpoint.load(tmp_path / "weights.safetensors").state.keys() == state.keys()


def test_a_file_that_names_another_model_is_refused(state, tmp_path):
    file = tmp_path / "clip_joint_BEST.pth"
    torch.save({"model_state_dict": state, "model_name": "RN50"}, file)
    with pytest.raises(UserError, match="holds RN50, not clipfh-small: give --model RN50"):
        load_start(presets.resolve("joint", None, {"model.name": SMALL_MODEL}), str(file))


def refused(file) -> str:
    with pytest.raises(UserError) as error:
        checkpoint.load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    return str(error.value)


def test_a_pickled_module_is_refused_and_its_remedy_works(state, tmp_path, monkeypatch):
    file = tmp_path / "module.pth"
    torch.save({"model": torch.nn.Linear(2, 2)}, file)
    message = refused(file)
    assert "a pickled module, which could run any code" in message
    monkeypatch.chdir(tmp_path)
    exec(message[message.index("torch.save(") : message.index(" and give that")])
    assert set(checkpoint.load(tmp_path / "weights.pth").state) == {"weight", "bias"}


def test_a_torchscript_archive_is_refused_and_its_remedy_works(tmp_path, monkeypatch):
    file = tmp_path / "ViT-B-16.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    message = refused(file)
    assert "a TorchScript archive" in message
    monkeypatch.chdir(tmp_path)
    exec(message[message.index("torch.save(") : message.index(" and give that")])
    assert set(checkpoint.load(tmp_path / "weights.pth").state) == {"weight", "bias"}


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_what_is_no_weights_file(content, tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    assert "can't be read as weights" in refused(file)


@pytest.mark.parametrize("tree", [[1, 2], {"epoch": 3}, {"model_state_dict": {"a": 1}}, {}])
def test_a_file_without_a_state_dict(tree, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(tree, file)
    assert "holds no state dict" in refused(file)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module._orig_mod.", "model.", "module."])
@pytest.mark.parametrize("as_start", [True, False])
def test_names_that_wrappers_leave_are_read(state, tmp_path, wrapper, as_start):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {wrapper + name: tensor for name, tensor in state.items()}}, file)
    if as_start:
        loaded = load_initial_model(ModelSettings(name=SMALL_MODEL, pretrained=str(file)), 0).state_dict()
    else:
        loaded = checkpoint.load(file).state
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_model_of_transformers_is_named_as_the_cause(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(1), "logit_scale": torch.zeros(())}, file)
    for load in (checkpoint.load, lambda file: load_initial_model(ModelSettings(SMALL_MODEL, str(file)), 0)):
        with pytest.raises(UserError, match="bin holds a model with the names of Hugging Face's transformers"):
            load(file)


@pytest.fixture
def short_vit(monkeypatch):
    """ViT-B-32 and its twin with QuickGELU, with two narrow blocks."""
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        cfg = open_clip.get_model_config(name)
        cfg["vision_cfg"] |= {"layers": 2, "width": 64, "head_width": 32}
        cfg["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, cfg | {"embed_dim": 64})


def test_the_activation_of_weights_is_told_or_their_own(short_vit, small_catalogue, tmp_path):
    quick, plain = (ModelSettings(name=name, pretrained="none") for name in ("ViT-B/32", "ViT-B-32"))
    clip = load_initial_model(quick, 0)
    file = tmp_path / "weights.pt"
    torch.save(clip.state_dict(), file)
    for settings, taken, twin in ((plain, "GELU", "ViT-B-32-quickgelu"), (quick, "QuickGELU", "ViT-B-32")):
        loaded, _, _ = checkpoint.load_model(file, {"model.name": settings.name, "model.pretrained": "none"})
        note = checkpoint.notes_on_model(loaded, settings, str(file), small_catalogue)[-1]
        assert f"runs with {taken}, as --model {settings.name} says: write --model {twin} if" in note
    # A run knows its own
    run = tmp_path / "run"
    run.mkdir()
    experiment = presets.resolve("image", None, {"model.name": "ViT-B/32", "model.pretrained": "none"})
    checkpoint.save(run, experiment, get_architecture(clip), clip.state_dict(), {}, {}, {})
    other = presets.resolve("image", None, {"model.name": "ViT-B-32", "model.pretrained": "none"})
    with pytest.raises(UserError, match="holds ViT-B/32 with QuickGELU, .* ViT-B-32 with GELU: give --model ViT-B/32"):
        load_start(other, str(run))
    with pytest.raises(UserError, match=r"holds ViT-B/32 \(QuickGELU\), not ViT-B-32 \(GELU\): leave --model out"):
        checkpoint.load_model(run, {"model.name": "ViT-B-32"})
    assert get_architecture(load_start(experiment, str(run))).activation == "QuickGELU"


def test_more_pixels_than_the_catalogue_keeps_are_told(short_vit, small_catalogue):
    settings = ModelSettings(name="ViT-B-32", pretrained="none")
    clip = load_initial_model(settings, 0)
    expected = "ViT-B-32 takes images of 224 pixels, and the catalogue keeps 64, so they are enlarged: clipfh prepare "
    assert expected in checkpoint.notes_on_model(clip, settings, "", small_catalogue)[0]
    asked = ModelSettings(name="ViT-B-32", pretrained="none", image_size=96)
    with pytest.raises(UserError, match="image_size takes images of 96 pixels, .* prepare --image-size 96 keeps"):
        checkpoint.notes_on_model(load_initial_model(asked, 0), asked, "", small_catalogue)
