"""What a run's checkpoints hold: raw and averaged weights, experiment, metrics, place in the stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.config.experiment import Experiment
from clipfh.model.clip import load_initial_model, load_weights
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder


@dataclass(frozen=True)
class Weights:
    """Weights to evaluate, export or start from, and the experiment that made them."""

    state: dict[str, Tensor]
    """open_clip's names to tensors: the average where there is one, else the raw weights"""
    experiment: Experiment | None
    """None for a bare weights file"""
    metrics: dict[str, Any]
    path: str
    model_name: str = ""
    """architecture that a bare weights file names; often it names none"""


def save(
    folder: Path,
    experiment: Experiment,
    raw: dict[str, Tensor],
    average: dict[str, Tensor],
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write a checkpoint into an empty local folder.

    Args:
        folder: to fill; whoever keeps checkpoints puts it in its place whole.
        experiment: settings of the run.
        raw: weights as they are trained, by open_clip's names.
        average: their average, only of those that are trained; empty where the run keeps none.
        training: state of the optimizer and of what else goes on.
        metrics: the run's last report.
    """
    save_file({n: t.detach().cpu().contiguous() for n, t in raw.items()}, folder / layout.RAW_WEIGHTS)
    if average:
        save_file({n: t.detach().cpu().contiguous() for n, t in average.items()}, folder / layout.AVERAGE_WEIGHTS)
    torch.save(training, folder / layout.TRAINING_STATE)
    (folder / layout.EXPERIMENT).write_text(schema.to_json(experiment))
    (folder / layout.METRICS).write_text(json.dumps(metrics))


def load_training(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Raw weights, average, training state and metrics, to go on from."""
    folder = Folder(path)
    training = torch.load(folder.local_path(layout.TRAINING_STATE), map_location="cpu", weights_only=True)
    average = _load_weights(folder, layout.AVERAGE_WEIGHTS) if folder.exists(layout.AVERAGE_WEIGHTS) else {}
    return _load_weights(folder, layout.RAW_WEIGHTS), average, training, folder.read_json(layout.METRICS)


def load(path: str | Path) -> Weights:
    """Weights from a sweep, a run (its best checkpoint), a checkpoint, an export, or a safetensors, .pt or .pth file.

    Raises:
        UserError: nothing there to load.
    """
    place = find(path)
    if place.is_file():
        return _load_file(place)
    folder = Folder(place)
    experiment = schema.from_json(folder.read_text(layout.EXPERIMENT), f"{folder}/{layout.EXPERIMENT}")
    state = _load_weights(
        folder, layout.EXPORTED_WEIGHTS if folder.exists(layout.EXPORTED_WEIGHTS) else layout.RAW_WEIGHTS
    )
    if folder.exists(layout.AVERAGE_WEIGHTS):
        state |= _load_weights(folder, layout.AVERAGE_WEIGHTS)
    return Weights(state, experiment, folder.read_json(layout.METRICS), str(folder))


def _load_weights(folder: Folder, name: str) -> dict[str, Tensor]:
    return load_file(folder.local_path(name))


def load_model(path: str | Path | None, settings: Mapping[str, Any]) -> tuple[nn.Module, Experiment, str]:
    """A model to embed with, its experiment, and the path of its weights.

    Models are measured in float32, as exports are, unless the settings name bfloat16: so a laptop's zero-shot model and
    a GPU's tuned one are comparable.

    Args:
        path: what `load` takes; None for the pretrained model, whose path is empty.
        settings: dotted settings, which override those of the weights' own experiment.

    Raises:
        UserError: no such weights, or a setting that does not fit them.
    """
    weights = load(path) if path else None
    experiment = (weights.experiment if weights else None) or presets.resolve("image", None, settings)
    precision = {} if settings.get("model.precision") == "bfloat16" else {"model.precision": "float32"}
    experiment = schema.replace(experiment, {**settings, **precision})
    if weights is None:
        return load_initial_model(experiment.model, experiment.seed), experiment, ""
    return load_weights(experiment.model, weights.state, str(path)), experiment, weights.path


def files_of(path: str | Path) -> list[Path]:
    """The files from which `load` has its weights. UserError: as `find`."""
    place = find(path)
    if place.is_file():
        return [place]
    names = (layout.EXPORTED_WEIGHTS, layout.RAW_WEIGHTS, layout.AVERAGE_WEIGHTS)
    return [Folder(place).local_path(name) for name in names if Folder(place).exists(name)]


def find(path: str | Path) -> Path:
    """The folder that holds the weights meant by a path: a sweep's export, a run's best checkpoint, or itself."""
    folder = Folder(path)
    if not folder.exists():
        raise UserError(f"{path}: no such file or folder; give a run, a checkpoint, an export or a weights file")
    if Path(path).is_file() or folder.exists(layout.EXPORTED_WEIGHTS) or folder.exists(layout.RAW_WEIGHTS):
        return folder.local_path()
    if folder.exists(f"{layout.BEST}/{layout.EXPORTED_WEIGHTS}"):
        return folder.local_path(layout.BEST)
    if folder.exists(layout.CHECKPOINTS):
        return (folder / layout.CHECKPOINTS).local_path(run_folder.best_of(path))
    raise UserError(f"{path} holds no weights: give a run, a checkpoint, an export or a weights file")


STATES = ("model_state_dict", "state_dict", "model")
"""Keys under which training scripts keep a state dict: the original pipeline's, open_clip's, and others'."""

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's state dicts hold beside weights."""


def _load_file(file: Path) -> Weights:
    """A bare weights file: a state dict with open_clip's or OpenAI's names, or a mapping with one in it."""
    tree = _read(file)
    state = next((tree[key] for key in STATES if isinstance(tree, dict) and isinstance(tree.get(key), dict)), tree)
    tensors = isinstance(state, dict) and {
        str(name).removeprefix("module."): tensor for name, tensor in state.items() if name not in NO_WEIGHTS
    }
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} holds no state dict (tensors by name): give a file with one, or under {STATES[0]}")
    name = tree.get("model_name", "")
    return Weights(tensors, None, {}, str(file), name if isinstance(name, str) else "")


def _read(file: Path) -> Any:
    """What the file holds, without running any code from it."""
    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        reason = str(error)
        if "TorchScript" in reason:
            raise UserError(_convert(file, "a TorchScript archive", "torch.jit.load({0}).state_dict()")) from error
        if "Unsupported global" in reason or "Unsupported class" in reason:
            pickled = "torch.load({0}, weights_only=False)['model'].state_dict()"
            raise UserError(_convert(file, "a pickled module, which could run any code", pickled)) from error
        first = " ".join(reason.split())[:160]
        raise UserError(
            f"{file} can't be read as weights ({first}): give a safetensors file or a state dict"
        ) from error


def _convert(file: Path, what: str, state: str) -> str:
    return (
        f"{file} holds {what}, and is not loaded: where you trust it, make a file of its weights with "
        f"torch.save({state.format(repr(str(file)))}, 'weights.pth') and give that"
    )
