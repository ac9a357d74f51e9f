"""Weights files as people have them: plain, wrapped, with OpenAI's names; none that runs code."""

import pytest
import torch
from safetensors.torch import save_file

from clipfh import UserError
from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model import checkpoint
from clipfh.model.clip import load_initial_model
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
