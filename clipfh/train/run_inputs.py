"""The inputs of a run and the job of its workers. This module loads neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipfh.config.experiment import MODEL_IDENTITY, Experiment, ModelSettings
from clipfh.data.decoding import EvaluationImages, TrainImages
from clipfh.model.architecture import Architecture

ModelKey = tuple[Any, ...]


def model_key(model: ModelSettings) -> ModelKey:
    """Runs whose models have equal keys read the same inputs."""
    return tuple(getattr(model, name) for name in MODEL_IDENTITY)


@dataclass(frozen=True)
class Inputs:
    """All that a run reads. Each part is an object or Ray's reference to one, as `decoding.fetch` takes."""

    architecture: Architecture
    images: TrainImages
    captions: Any
    """Captions"""
    weights: Any
    """dict[str, np.ndarray]; None where they are random, and each run draws its own by its seed"""
    validation: EvaluationImages | None
    """val_query, then val_gallery; None where those are trained on"""
    items: Any
    """tuple[np.ndarray, np.ndarray, int]: item and path code of each validation image, number of queries"""
    size: int
    """side of the model's input, pixels"""
    num_images: int
    num_single: int
    """train items with a single view"""
    num_cut: int
    """prompts of train items that are longer than the model reads"""
    num_untold: int
    """items without a prompt, where a term learns from prompts"""
    start_val_mAP: float | None = None
    """validation mAP of the weights, where it is known; else each run measures it"""


@dataclass(frozen=True)
class Job:
    """What each worker of a run does, and with what."""

    experiment: Experiment
    inputs: Inputs
    out: str
    """the run's folder, absolute or a URI"""
    gpus: float
    """GPUs of the worker"""
    threads: int
    """torch threads of the worker"""
    shares_cores: bool
    """whether its threads are its share of the cores, and follow the other runs on its machine"""
    decoding_tasks: int | None = None
    """how many tasks decode for it at a time; None for as many as there are CPUs for"""
    reserves_decoding: bool = False
    """whether the worker holds the CPUs of these tasks with its own"""
    prestart_next: bool = False
    """whether processes for a next run are to be started while it trains"""
