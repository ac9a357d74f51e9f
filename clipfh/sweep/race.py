"""A race before the search: each model of a sweep zero-shot on the validation items, and which of them are searched.

`race.json` says how far it is. A model that is measured is not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from torch import nn

from clipfh import UserError
from clipfh.cluster import resources as cluster_resources
from clipfh.cluster.interruptions import repeat_interrupted
from clipfh.cluster.resources import Resources
from clipfh.config.experiment import Experiment, ModelSettings
from clipfh.config.sweep_file import SweepFile
from clipfh.data.catalogue import Catalogue
from clipfh.learn.learner import count_trained
from clipfh.model import architecture as architectures
from clipfh.model.architecture import load_open_clip
from clipfh.model.checkpoint import notes_on_model
from clipfh.model.clip import build, build_model, get_architecture, get_preprocess, load_tokenizer
from clipfh.model.devices import choose_device, resolve_precision
from clipfh.model.prompts import load_prompts_for
from clipfh.model.towers import Towers, embed_images
from clipfh.retrieval import evaluate
from clipfh.storage import layout
from clipfh.storage.store import Folder
from clipfh.sweep.leaderboard import ZERO_SHOT, Row
from clipfh.train.inputs import VALIDATION

TIMED = 8
"""Images that are embedded at a time to measure a model's speed."""
TIMES = 3
"""How often these images are embedded; the fastest time counts."""

PARTS = ("model.freeze_blocks", "model.lora_rank", "model.lora_targets", "optimizer.whitening")
"""Settings that work on parts of a model, which not every model has."""

Load = Callable[[Experiment], nn.Module]
"""Loads the model that an experiment starts from."""


@dataclass(frozen=True)
class Contender:
    """A model of a sweep before any tuning."""

    model: str
    """as `SweepFile.contenders` names it"""
    trial: str
    """number of its line of the leaderboard: 0000, and where there are several models 0000-1 and on"""
    parameters: int
    """number of parameters of both towers"""
    pixels: int
    """side of the model's input"""
    milliseconds: float
    """time of the image tower for an image, measured where trials compute; 0 where there is no other model"""
    val_mAP: float = -1.0
    """zero-shot on the validation items; below 0 before it is measured"""
    kept: bool = False
    """whether it goes into the search"""

    def __str__(self) -> str:
        size = f"{self.parameters / 1e6:,.1f} M parameters, {self.pixels} pixels, {self.milliseconds:,.1f} ms an image"
        return f"trial {self.trial}, {self.model} zero-shot: val mAP {self.val_mAP:.3f} ({size})"

    def row(self, sweep: SweepFile) -> Row:
        """Its line of the leaderboard."""
        score = {"val_mAP": f"{self.val_mAP:.6f}", "images": 0, "seconds": 0}
        return {"trial": self.trial, "status": "zero-shot", **score, **sweep.contenders[self.model]}


def require_models(sweep: SweepFile) -> None:
    """See that open_clip has each model of a sweep with its weights, and each model the parts that settings name.

    Raises:
        UserError: a model, its weights or a part of it is not there.
    """
    for label in sweep.contenders:
        one = sweep.only([label])
        start = sweep.start(label)
        settings = start.model
        architecture = architectures.find(settings)
        if sweep.final.image_size:
            architectures.find(dataclasses.replace(settings, image_size=sweep.final.image_size))
        _require_tag(settings)
        needs_parts = settings.freeze_blocks or settings.lora_rank or start.optimizer.whitening
        if needs_parts or set(PARTS) & set(sweep.search):
            clip = build(architecture, "meta")
            for point in one.combinations(PARTS):
                count_trained(clip, one.experiment({**one.first, **point}))


def _require_tag(settings: ModelSettings) -> None:
    """Refuse a tag of pretrained weights that open_clip does not have for the architecture."""
    name = settings.name if ":" in settings.name else architectures.architecture_name(settings)
    tag = settings.pretrained
    if tag in ("", "none") or Path(tag).exists() or load_open_clip().get_pretrained_cfg(name, tag):
        return
    tags = ", ".join(load_open_clip().list_pretrained_tags_by_model(name)) or "none"
    raise UserError(f"{settings.name} has no weights '{tag}': no such file, nor a tag of it (its tags: {tags})")


def run(
    sweep: SweepFile,
    catalogue: Catalogue,
    out: Folder,
    resources: Resources,
    load: Load,
    log: Callable[[str], None],
) -> list[Contender]:
    """Measure the models of a sweep, the cheapest first, and choose those to search; returns all, the best first.

    All of them are loaded before the first is measured, so that one that can't be had costs nothing.

    Raises:
        UserError: a model or its prompts can't be had.
    """
    contenders = read(out) or _enter_all(sweep, catalogue, resources, load, log)
    several = len(contenders) > 1
    for i in sorted(range(len(contenders)), key=lambda i: contenders[i].milliseconds):
        each = contenders[i]
        if each.val_mAP < 0:
            start = sweep.start(each.model)
            contenders[i] = each = dataclasses.replace(
                each, val_mAP=_measure(out / layout.TRIALS / each.trial, catalogue, start, load)
            )
            if several:
                _write(out, contenders)
        log(str(each) if several else f"trial {each.trial}, the zero-shot model: val mAP {each.val_mAP:.3f}")
    ranking = sorted(contenders, key=lambda each: (-each.val_mAP, each.milliseconds))
    leaders = ranking[: sweep.race.keep or None]
    ranking = [dataclasses.replace(each, kept=each in leaders) for each in ranking]
    if several:
        _write(out, ranking)
    return ranking


def narrow(sweep: SweepFile, contenders: Sequence[Contender], log: Callable[[str], None]) -> SweepFile:
    """The sweep of the models that go into the search."""
    if not sweep.race.keep:
        return sweep
    names = [each.model for each in contenders if each.kept]
    small = sweep.only(names)
    log(f"the race is over: {', '.join(names)} of {len(contenders)} models go into the search")
    if sweep.sampler != "grid" and (num_dropped := len(sweep.points) - len(small.points)):
        log(f"note: {num_dropped} of {len(sweep.points)} points are of models that do not, and are not tried")
    return small


def read(out: str | Path | Folder) -> list[Contender]:
    """The models of a sweep, also those not yet measured; empty where there is no race, or it has not begun."""
    return [Contender(**each) for each in Folder(out).read_json(layout.RACE).get("models", [])]


def _write(out: Folder, contenders: Sequence[Contender]) -> None:
    models = [dataclasses.asdict(each) for each in contenders]
    out.write(layout.RACE, json.dumps({"models": models}, indent=2) + "\n")


def _enter_all(
    sweep: SweepFile, catalogue: Catalogue, resources: Resources, load: Load, log: Callable[[str], None]
) -> list[Contender]:
    """Load each model, with its prompts. UserError: one line on all that can't be had."""
    labels, entered, errors = list(sweep.contenders), [], []
    for number, label in enumerate(labels, 1):
        try:
            clip = _load_whole(sweep, sweep.start(label), catalogue, load, log)
        except UserError as error:
            errors.append(str(error))
            continue
        several = len(labels) > 1
        trial = f"{ZERO_SHOT}-{number}" if several else ZERO_SHOT
        milliseconds = _time_where_trials_compute(clip, sweep.start(label).model, resources) if several else 0.0
        parameters, pixels = sum(p.numel() for p in clip.parameters()), get_preprocess(clip).size
        entered.append(Contender(label, trial, parameters, pixels, milliseconds))
    if errors:
        raise UserError("; ".join(dict.fromkeys(errors)))
    return entered


def _load_whole(
    sweep: SweepFile, start: Experiment, catalogue: Catalogue, load: Load, log: Callable[[str], None]
) -> nn.Module:
    """Load a model and its prompts, and log notes on the two with this catalogue. UserError: it can't be had."""
    clip = load(start)
    for note in notes_on_model(clip, start.model, architectures.weights_name(start.model), catalogue):
        log(note)
    if sweep.final.image_size:
        larger = dataclasses.replace(start.model, image_size=sweep.final.image_size)
        notes_on_model(build(architectures.find(larger), "meta"), larger, "", catalogue)
    load_prompts_for(catalogue, start, load_tokenizer(get_architecture(clip)), *VALIDATION)
    return clip


def _time_where_trials_compute(clip: nn.Module, settings: ModelSettings, resources: Resources) -> float:
    """Milliseconds an image: in this process where the cluster is this machine's CPUs, else on one of its workers."""
    if cluster_resources.is_this_machines_cpus():
        return time_images(clip, settings, 0)
    task: Any = ray.remote(_build_and_time).options(num_cpus=resources.cpus, num_gpus=resources.gpus)
    return float(repeat_interrupted(lambda: ray.get(task.remote(settings, resources.gpus))))


def _build_and_time(settings: ModelSettings, gpus: float) -> float:
    return time_images(build_model(settings), settings, gpus)


def time_images(clip: nn.Module, settings: ModelSettings, gpus: float) -> float:
    """Milliseconds that the image tower takes for each of `TIMED` images, with pixels already decoded.

    Args:
        clip: the model.
        settings: the model's settings.
        gpus: number of GPUs that this process was given.
    """
    device = choose_device(gpus)
    towers, size = Towers(clip).to(device), get_preprocess(clip).size
    pixels, seconds = np.random.default_rng(0).integers(0, 256, (TIMED, size, size, 3), np.uint8), []
    for _ in range(TIMES):
        began = time.perf_counter()
        embed_images(towers, pixels, resolve_precision(settings.precision, device)).cpu()
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds) / TIMED


def _measure(folder: Folder, catalogue: Catalogue, start: Experiment, load: Load) -> float:
    """Validation mAP of a model before any tuning; written, so that a resumed sweep does not measure it again."""
    if not folder.exists(layout.METRICS):
        embeddings = embed(catalogue, start, load(start), "val")
        results, scores = evaluate.judge(embeddings, 0)
        evaluate.write(folder, results, embeddings, scores)
    return float(folder.read_json(layout.METRICS)["mAP"])


def embed(catalogue: Catalogue, experiment: Experiment, clip: nn.Module, split: str) -> evaluate.EmbeddedSplits:
    """Embeddings of "val" or "test" by a model in float32, as models are exported."""
    splits, exact = evaluate.get_splits(split), dataclasses.replace(experiment.model, precision="float32")
    prompts = load_prompts_for(catalogue, experiment, load_tokenizer(get_architecture(clip)), *splits)
    return repeat_interrupted(lambda: evaluate.embed_splits(catalogue, splits, clip, exact, prompts))
