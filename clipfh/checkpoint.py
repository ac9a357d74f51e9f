"""What a run leaves behind and starts from: raw and averaged weights, experiment, metrics, place in the stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipfh import UserError, config

RAW, AVERAGE, STATE = "model.safetensors", "ema.safetensors", "training.pt"
EXPERIMENT, METRICS = "experiment.json", "metrics.json"
SWEEP = "sweep.yaml"
EXPORTED = "open_clip_model.safetensors"
SNAPSHOT = "checkpoint_manager_snapshot.json"


AWAY = 600
"""Seconds that a run or a sweep waits for its folder, as a share that is not mounted comes back."""


@dataclass(frozen=True)
class Weights:
    """Weights to evaluate, export or start from, and the experiment that made them."""

    state: dict[str, Tensor]
    """open_clip's names to tensors: the average where there is one, else the raw weights"""
    experiment: config.Experiment | None
    """None for a bare weights file"""
    metrics: dict[str, Any]
    path: str
    model_name: str = ""
    """architecture that a bare weights file names; often it names none"""


def wait_for(file: str | Path, tell: Callable[[str], None] = lambda line: None) -> None:
    """Return when a file is there that was written at the start: else its folder is away, and writing makes another.

    Args:
        file: of a run (`EXPERIMENT`) or a sweep (`SWEEP`), absolute or a URI.
        tell: takes a line where it is away.

    Raises:
        UserError: it does not come back.
    """
    end = time.monotonic() + AWAY
    if _is_there(file):
        return
    tell(f"{file} is away: waits for it, for up to {AWAY // 60} minutes")
    while not _is_there(file):
        if time.monotonic() > end:
            raise UserError(f"{file} has been away for {AWAY // 60} minutes: bring its file system back, then --resume")
        time.sleep(1)
    tell(f"{file} is back")


def _is_there(file: str | Path) -> bool:
    store, path = pyarrow.fs.FileSystem.from_uri(str(file))
    try:
        return bool(store.get_file_info(path).type == pyarrow.fs.FileType.File)
    except OSError:  # a share whose server does not answer
        return False


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
    """Weights from a sweep, a run (its best checkpoint), a checkpoint, an export, or a safetensors, .pt or .pth file.

    Raises:
        UserError: nothing there to load.
    """
    folder = find(path)
    if folder.is_file():
        return _load_file(folder)
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
    """Name of the run's checkpoint with the highest validation mAP, or of the last of a run without validation.

    As Ray Train's own list has it: a folder that is not on that list may be half-written.
    """
    listed = _snapshot(Path(run))["checkpoint_results"]
    if not listed:
        raise UserError(f"{run} has no checkpoint yet: let it train further, or --resume it")
    return str(max(listed, key=lambda r: r["metrics"].get("val_mAP", r["metrics"]["step"]))["checkpoint_dir_name"])


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
