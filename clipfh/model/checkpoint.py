"""What a run's checkpoints hold: raw and averaged weights, experiment, metrics, place in the stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipfh import UserError
from clipfh.config import schema
from clipfh.config.experiment import Experiment
from clipfh.storage import run_folder
from clipfh.storage.run_folder import EXPERIMENT

RAW, AVERAGE, STATE = "model.safetensors", "ema.safetensors", "training.pt"
METRICS = "metrics.json"
EXPORTED = "open_clip_model.safetensors"


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
    folder: str | Path,
    experiment: Experiment,
    raw: dict[str, Tensor],
    average: dict[str, Tensor],
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write a checkpoint into an empty folder. `average` holds only the weights that are trained, or nothing."""
    folder = Path(folder)
    save_file({n: t.detach().cpu().contiguous() for n, t in raw.items()}, folder / RAW)
    if average:
        save_file({n: t.detach().cpu().contiguous() for n, t in average.items()}, folder / AVERAGE)
    torch.save(training, folder / STATE)
    (folder / EXPERIMENT).write_text(schema.to_json(experiment))
    (folder / METRICS).write_text(json.dumps(metrics))


def load_training(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Raw weights, average, training state and metrics, to go on from."""
    folder = Path(folder)
    average = load_file(folder / AVERAGE) if (folder / AVERAGE).exists() else {}
    training = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return load_file(folder / RAW), average, training, json.loads((folder / METRICS).read_text())


def load(path: str | Path) -> Weights:
    """Weights from a sweep, a run (its best checkpoint), a checkpoint, an export, or a safetensors, .pt or .pth file.

    Raises:
        UserError: nothing there to load.
    """
    folder = find(path)
    if folder.is_file():
        return _load_file(folder)
    experiment = schema.load_experiment(folder / EXPERIMENT)
    metrics = json.loads((folder / METRICS).read_text()) if (folder / METRICS).exists() else {}
    state = load_file(folder / (EXPORTED if (folder / EXPORTED).exists() else RAW))
    if (folder / AVERAGE).exists():
        state |= load_file(folder / AVERAGE)
    return Weights(state, experiment, metrics, str(folder))


def files_of(path: str | Path) -> list[Path]:
    """The files from which `load` has its weights. UserError: as `find`."""
    folder = find(path)
    if folder.is_file():
        return [folder]
    return [file for file in (folder / EXPORTED, folder / RAW, folder / AVERAGE) if file.exists()]


def find(path: str | Path) -> Path:
    """The folder that holds the weights meant by a path: a sweep's export, a run's best checkpoint, or itself."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{path}: no such file or folder; give a run, a checkpoint, an export or a weights file")
    if folder.is_file() or (folder / EXPORTED).exists() or (folder / RAW).exists():
        return folder
    if (folder / "best" / EXPORTED).exists():
        return folder / "best"
    if (folder / "checkpoints").is_dir():
        return folder / "checkpoints" / run_folder.best_of(folder)
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
