"""What a run's checkpoints hold: raw and averaged weights, experiment, metrics, place in the stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.config.experiment import Experiment, ModelSettings
from clipfh.data.catalogue import Catalogue
from clipfh.model import architecture as architectures
from clipfh.model.architecture import Architecture
from clipfh.model.clip import get_architecture, load_initial_model, load_weights, resize
from clipfh.model.state_dicts import read_state
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
    own_architecture: Architecture | None = None
    """None for a bare weights file, and for checkpoints of old versions"""

    def architecture(self, settings: ModelSettings) -> Architecture:
        """The weights' own architecture, else that of the settings, with its own size of images."""
        return self.own_architecture or architectures.find(replace(settings, image_size=0))


def save(
    folder: Path,
    experiment: Experiment,
    architecture: Architecture,
    raw: dict[str, Tensor],
    average: dict[str, Tensor],
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write a checkpoint into an empty local folder.

    Args:
        folder: to fill; whoever keeps checkpoints puts it in its place whole.
        experiment: settings of the run.
        architecture: architecture of the run's model.
        raw: weights as they are trained, by open_clip's names.
        average: average of the trained weights; empty where the run keeps none.
        training: state of the optimizer and of all else that a resumed run needs.
        metrics: the run's last report.
    """
    save_file({n: t.detach().cpu().contiguous() for n, t in raw.items()}, folder / layout.RAW_WEIGHTS)
    if average:
        save_file({n: t.detach().cpu().contiguous() for n, t in average.items()}, folder / layout.AVERAGE_WEIGHTS)
    torch.save(training, folder / layout.TRAINING_STATE)
    (folder / layout.EXPERIMENT).write_text(schema.to_json(experiment))
    (folder / layout.ARCHITECTURE).write_text(architecture.to_json())
    (folder / layout.METRICS).write_text(json.dumps(metrics))


def load_training(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Raw weights, average, training state and metrics of a checkpoint, to resume a run."""
    folder = Folder(path)
    with folder.fetched(layout.TRAINING_STATE) as local:
        training = torch.load(local / layout.TRAINING_STATE, map_location="cpu", weights_only=True)
    average = _load_weights(folder, layout.AVERAGE_WEIGHTS) if folder.exists(layout.AVERAGE_WEIGHTS) else {}
    return _load_weights(folder, layout.RAW_WEIGHTS), average, training, folder.read_json(layout.METRICS)


def load(path: str | Path | Folder) -> Weights:
    """Weights from a sweep, a run (its best checkpoint), a checkpoint, an export, or a safetensors, .pt or .pth file.

    Raises:
        UserError: nothing there to load.
    """
    place = find(path)
    if place.is_file():
        with place.parent.fetched(place.name) as local:
            state, name = read_state(local / place.name)
        return Weights(state, None, {}, str(place), name)
    folder = place
    experiment = schema.from_json(folder.read_text(layout.EXPERIMENT), f"{folder}/{layout.EXPERIMENT}")
    state = _load_weights(
        folder, layout.EXPORTED_WEIGHTS if folder.exists(layout.EXPORTED_WEIGHTS) else layout.RAW_WEIGHTS
    )
    if folder.exists(layout.AVERAGE_WEIGHTS):
        state |= _load_weights(folder, layout.AVERAGE_WEIGHTS)
    metrics = folder.read_json(layout.METRICS)
    return Weights(state, experiment, metrics, str(folder), own_architecture=read_architecture(place))


def read_architecture(path: str | Path | Folder) -> Architecture | None:
    """The architecture that a run, a checkpoint or an export holds; None for one of an old version."""
    folder = Folder(path)
    if folder.exists(layout.ARCHITECTURE):
        return architectures.parse(folder.read_text(layout.ARCHITECTURE), f"{folder}/{layout.ARCHITECTURE}")
    return architectures.read_folder(folder) if folder.exists(layout.OPEN_CLIP_CONFIG) else None


def build(weights: Weights, settings: ModelSettings) -> nn.Module:
    """A model with the weights, for images of the settings' size. UserError: they do not fit."""
    return resize(load_weights(weights.architecture(settings), weights.state, weights.path), settings)


def _load_weights(folder: Folder, name: str) -> dict[str, Tensor]:
    with folder.fetched(name) as local:
        return load_file(local / name)


def load_model(path: str | Path | None, settings: Mapping[str, Any]) -> tuple[nn.Module, Experiment, str]:
    """A model to embed with, its experiment, and the path of its weights.

    Models are measured in float32, as exports are, unless the settings name bfloat16: so a laptop's zero-shot model and
    a GPU's tuned one are comparable.

    Args:
        path: what `load` takes; None for the pretrained model, whose path is empty.
        settings: dotted settings, which override the weights' own experiment.

    Raises:
        UserError: no such weights, or a setting that does not fit them.
    """
    weights = load(path) if path else None
    if weights:
        _require_model(weights, settings)
    experiment = (weights.experiment if weights else None) or presets.resolve("image", None, settings)
    precision = {} if settings.get("model.precision") == "bfloat16" else {"model.precision": "float32"}
    experiment = schema.replace(experiment, {**settings, **precision})
    if weights is None:
        return load_initial_model(experiment.model, experiment.seed), experiment, ""
    return build(weights, experiment.model), experiment, weights.path


def load_tuned_from(path: str | Path, experiment: Experiment) -> tuple[nn.Module, str]:
    """The model that weights were tuned from, and what it is: the pretrained one, or what they were warm-started with.

    Args:
        path: what `load` takes.
        experiment: the weights' experiment.

    Raises:
        UserError: it can't be had.
    """
    export = find(path)
    run = export.parent.parent
    account = export.read_json(layout.START) if export.exists(layout.START) else run.read_json(layout.RUN)
    if not (start := account.get("warm_start")):
        name = architectures.weights_name(experiment.model) or "random weights"
        return load_initial_model(experiment.model, experiment.seed), f"{experiment.model.name}, {name}"
    if not Folder(start).exists():
        raise UserError(f"{path} was tuned from {start}, which is no longer there: put it back")
    return build(load(start), experiment.model), str(start)


def notes_on_model(clip: nn.Module, settings: ModelSettings, weights: str, catalogue: Catalogue) -> list[str]:
    """Notes for people on a model with their catalogue and their file of weights.

    Args:
        clip: the model.
        settings: the settings that name it.
        weights: file, folder or tag that its weights are from; empty for random ones.
        catalogue: the catalogue whose images it takes.

    Raises:
        UserError: `image_size` asks for more pixels than the catalogue keeps.
    """
    architecture, notes, size = get_architecture(clip), [], catalogue.manifest["settings"]["image_size"]
    if size < architecture.size:
        few = f"takes images of {architecture.size} pixels, and the catalogue keeps {size}"
        remedy = f"clipfh prepare --image-size {architecture.size} keeps enough"
        if settings.image_size:
            raise UserError(f"--model.image_size {few}: {remedy}")
        notes.append(f"note: {settings.name} {few}, so they are enlarged: {remedy}")
    if weights and Folder(weights).is_file() and (twin := architectures.twin_name(settings)):
        notes.append(
            f"note: {weights} does not tell its activation; it runs with {architecture.activation}, as --model "
            f"{settings.name} says: write --model {twin} if it was trained with the other"
        )
    return notes


def _require_model(weights: Weights, settings: Mapping[str, Any]) -> None:
    """Raise UserError where the settings name a model that can't take the weights."""
    name = settings.get("model.name")
    if not weights.experiment or name in (None, own := weights.experiment.model.name):
        return
    theirs = weights.architecture(weights.experiment.model)
    target = architectures.find(ModelSettings(name=name, pretrained=settings.get("model.pretrained", "")))
    if not target.takes_weights_of(theirs):
        raise UserError(
            f"{weights.path} holds {own} ({theirs.activation}), not {name} ({target.activation}): leave --model out"
        )


def list_weight_files(path: str | Path) -> list[Folder]:
    """The files from which `load` has its weights. UserError: as `find`."""
    place = find(path)
    if place.is_file():
        return [place]
    names = (layout.EXPORTED_WEIGHTS, layout.RAW_WEIGHTS, layout.AVERAGE_WEIGHTS)
    return [place / name for name in names if place.exists(name)]


def find(path: str | Path | Folder) -> Folder:
    """The folder that holds the weights meant by a path: a sweep's export, a run's best checkpoint, or itself."""
    folder = Folder(path)
    if not folder.exists():
        raise UserError(
            f"{path}: no such file or folder; give a run, a sweep, a checkpoint, an export or a weights file"
        )
    if folder.is_file() or folder.exists(layout.EXPORTED_WEIGHTS) or folder.exists(layout.RAW_WEIGHTS):
        return folder
    if folder.exists(f"{layout.BEST}/{layout.EXPORTED_WEIGHTS}"):
        return folder / layout.BEST
    if folder.exists(layout.CHECKPOINTS):
        return folder / layout.CHECKPOINTS / run_folder.find_best_checkpoint(path)
    raise UserError(f"{path} holds no weights: give a run, a sweep, a checkpoint, an export or a weights file")
