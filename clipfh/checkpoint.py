"""What a run leaves behind and starts from: raw and averaged weights, experiment, metrics, place in the stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipfh import UserError, config

RAW, AVERAGE, STATE = "model.safetensors", "ema.safetensors", "training.pt"
EXPERIMENT, METRICS = "experiment.json", "metrics.json"
EXPORTED = "open_clip_model.safetensors"
SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class Weights:
    """Weights to evaluate, export or start from, and the experiment that made them."""

    state: dict[str, Tensor]
    """open_clip's names to tensors: the average where there is one, else the raw weights"""
    experiment: config.Experiment | None
    """None for a bare weights file"""
    metrics: dict[str, Any]
    path: str


def save(
    folder: str | Path,
    experiment: config.Experiment,
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
    (folder / EXPERIMENT).write_text(config.to_json(experiment))
    (folder / METRICS).write_text(json.dumps(metrics))


def load_training(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Raw weights, average, training state and metrics, to go on from."""
    folder = Path(folder)
    average = load_file(folder / AVERAGE) if (folder / AVERAGE).exists() else {}
    training = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return load_file(folder / RAW), average, training, json.loads((folder / METRICS).read_text())


def load(path: str | Path) -> Weights:
    """Weights from a sweep, a run (its best checkpoint), a checkpoint, an export, or a safetensors or .pt file.

    Raises:
        UserError: nothing there to load.
    """
    folder = find(path)
    if folder.is_file():
        return Weights(_load_file(folder), None, {}, str(folder))
    experiment = config.load(folder / EXPERIMENT)
    metrics = json.loads((folder / METRICS).read_text()) if (folder / METRICS).exists() else {}
    state = load_file(folder / (EXPORTED if (folder / EXPORTED).exists() else RAW))
    if (folder / AVERAGE).exists():
        state |= load_file(folder / AVERAGE)
    return Weights(state, experiment, metrics, str(folder))


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
        return folder / "checkpoints" / best_of(folder)
    raise UserError(f"{path} holds no weights: give a run, a checkpoint, an export or a weights file")


def best_of(run: str | Path) -> str:
    """Name of the run's checkpoint with the highest validation mAP, as Ray Train's own list has it.

    A folder that is not on that list may be half-written.
    """
    listed = _snapshot(Path(run))["checkpoint_results"]
    if not listed:
        raise UserError(f"{run} has no checkpoint yet: let it train further, or --resume it")
    return str(max(listed, key=lambda r: r["metrics"]["val_mAP"])["checkpoint_dir_name"])


def latest_step(run: str | Path) -> int:
    """The step at which the run's last checkpoint goes on; 0 without one."""
    file = Path(run) / "checkpoints" / SNAPSHOT
    latest = _snapshot(Path(run))["latest_checkpoint_result"] if file.exists() else None
    return int(latest["metrics"]["step"]) if latest else 0


def _snapshot(run: Path) -> dict[str, Any]:
    file = run / "checkpoints" / SNAPSHOT
    if not file.exists():
        raise UserError(f"{run} has no checkpoint yet: let it train further, or --resume it")
    return json.loads(file.read_text())


def _load_file(file: Path) -> dict[str, Tensor]:
    try:
        state: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(
            f"{file} can't be read as weights ({reason}): give a safetensors file or a plain state dict"
        ) from error
    state = state.get("state_dict", state.get("model_state_dict", state))
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
