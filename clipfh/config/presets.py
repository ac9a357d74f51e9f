"""Presets: whole recipes by name, and the experiment that a preset and settings make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipfh import UserError
from clipfh.config.experiment import LOSS_TERMS, SMALL_MODEL, Experiment, Stage
from clipfh.config.schema import check, one_budget, replace

# Term weights that `--loss a+b` switches on.
USUAL_WEIGHT = dict.fromkeys(LOSS_TERMS, 1.0) | {"ce": 0.25, "center": 5e-4}

# Shared by both stages of a preset: what pretrained CLIP wants, and what random weights want.
_PRETRAINED: dict[str, Any] = {
    "loss.supcon": 1.0,
    "loss.supcon_temperature": 0.07,
    "batch.items": 64,
    "batch.views": 4,
    "augment.crop_min": 0.7,
}
# Weights that were trained without decay lose by it (Zhai et al. 2023, 2303.15343, on pretrained towers)
_SIGLIP: dict[str, Any] = {**_PRETRAINED, "optimizer.weight_decay": 0.0}
# Over its 36 blocks what .8 is over twelve groups of them (Liu et al. 2022, 2201.03545, table 6)
_CONVNEXT: dict[str, Any] = {**_PRETRAINED, "optimizer.layer_decay": 0.93}
_SCRATCH: dict[str, Any] = {
    "loss.supcon": 1.0,
    "loss.supcon_temperature": 0.1,
    "optimizer.lr": 7e-4,
    "optimizer.text_lr": 1.0,
    "optimizer.head_lr": 1.0,
    "optimizer.weight_decay": 0.05,
    "optimizer.layer_decay": 1.0,
    "optimizer.warmup": 0.1,
    "optimizer.ema": 0.99,
    "optimizer.whitening": 0.2,
    "model.freeze_patch": False,
    "model.freeze_norm": False,
    "batch.items": 16,
    "batch.views": 4,
    "augment.crop_min": 0.7,
    "augment.flip": False,
    "budget.images": 60_000,
}
_ORIGINAL: dict[str, Any] = {
    "optimizer.lr": 5e-5,
    "optimizer.text_lr": 1.0,
    "optimizer.head_lr": 1.0,
    "optimizer.layer_decay": 1.0,
    "optimizer.ema": 0.0,
    "model.freeze_patch": False,
    "batch.items": 16,
    "batch.views": 2,
    "augment.crop_min": 1.0,
    "augment.flip": False,
    "text.strategy": "clean",
}

# Fine-tuning on In-Shop as deepglint/unicom does it (An et al. 2023, 2304.05884; unicom/retrieval.py and
# unicom/scripts/inshop_vit_b_16.sh: 4 x 16 images, 512 of 768 features, timm's augmentation, whose crops keep .08 or
# more and whose RandAugment leaves the colour jitter out). What differs: an epoch draws each item as often as any
# other, not each photo; the gradient passes through the margin, which theirs takes for a constant; the warm-up begins
# near 0, not at a 25th; validation chooses the weights, not the test split; AdamW has our betas, without a momentum
# that cycles; RandAugment's strength does not vary, and what is erased has one colour, not noise.
_UNICOM: dict[str, Any] = {
    "loss.supcon": 0.0,
    "loss.arcface": 1.0,
    "loss.arcface_scale": 32.0,
    "loss.arcface_margin": 0.25,
    "loss.arcface_dropout": 1 / 3,
    "optimizer.lr": 1e-5,
    "optimizer.head_lr": 10.0,
    "optimizer.layer_decay": 1.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup": 0.1,
    "optimizer.clip": 0.0,
    "optimizer.ema": 0.0,
    "model.freeze_patch": False,
    "model.freeze_norm": False,
    "batch.items": 64,
    "batch.views": 1,
    "augment.crop_min": 0.08,
    "augment.randaugment": 9.0,
    "augment.erase": 0.25,
    "budget.epochs": 128.0,
}
# In-Shop as OML-Team/open-metric-learning does it (pipelines/features_extraction/extractor_inshop/train_inshop.yaml): 5
# categories x 30 items x 4 views, hard triplets with the soft margin, AdamW with its usual decay, crops of .2 or more.
# What differs: embeddings are normalised before the loss; the rate falls by a cosine, where theirs is constant until
# one stops it; the budget is the usual one, as theirs has none; AdamW has our betas; categories come in passes and are
# about five, where theirs are drawn by their size, with exactly 30 items of each, repeated where there are fewer.
_OML: dict[str, Any] = {
    "loss.supcon": 0.0,
    "loss.triplet": 1.0,
    "loss.triplet_margin": -1.0,
    "optimizer.lr": 1e-5,
    "optimizer.layer_decay": 1.0,
    "optimizer.weight_decay": 0.01,
    "optimizer.warmup": 0.0,
    "optimizer.clip": 0.0,
    "optimizer.ema": 0.0,
    "model.freeze_patch": False,
    "model.freeze_norm": False,
    "batch.items": 150,
    "batch.views": 4,
    "batch.categories": 5,
    "augment.crop_min": 0.2,
}

# In-Shop as htdt/hyp_metric does it (Ermolov et al. 2022, 2203.10833; train.py with --ds Inshop --ep 400, whose epoch
# draws two photos of each item): 450 items x 2 views, the sum of both directions of a pair, patch embedding frozen,
# gradients clipped at 3, torch's AdamW decay, crops of .2 or more, the rate of DINO's weights.
# What differs: the projection is CLIP's own, not a new orthogonal one to 128 dimensions; the rate falls by a cosine,
# where theirs is constant; AdamW has our betas; biases and norms have no decay; what is exported is searched by cosine,
# which ranks as the distance does.
_HYP: dict[str, Any] = {
    "loss.supcon": 2.0,
    "loss.supcon_temperature": 0.2,
    "loss.supcon_curvature": 0.1,
    "optimizer.lr": 1e-5,
    "optimizer.layer_decay": 1.0,
    "optimizer.weight_decay": 0.01,
    "optimizer.warmup": 0.0,
    "optimizer.clip": 3.0,
    "optimizer.ema": 0.0,
    "model.freeze_norm": False,
    "batch.items": 450,
    "batch.views": 2,
    "augment.crop_min": 0.2,
    "budget.epochs": 111.0,
}

_WITH_CAPTIONS: dict[str, Any] = {"loss.supcon": 1.0, "loss.supcon_captions": True}

# Preset name -> stage -> settings that differ from the defaults. joint-v1 to joint-v4 keep the intent of the
# pipeline that clipfh replaces (losses, prompts, P x K) without its faults.
PRESETS: dict[str, dict[Stage, dict[str, Any]]] = {
    "recommended": {"image": _PRETRAINED, "joint": {**_PRETRAINED, "loss.infonce": 0.5}},
    "siglip": {"image": _SIGLIP, "joint": {**_SIGLIP, "loss.sigmoid": 0.5}},
    "convnext": {"image": _CONVNEXT, "joint": {**_CONVNEXT, "loss.infonce": 0.5}},
    "scratch": {"image": _SCRATCH, "joint": {**_SCRATCH, "loss.infonce": 0.1, "optimizer.whitening": 0.0}},
    "image": {"image": {"loss.triplet": 1.0, "loss.ce": 0.25, "loss.center": 5e-4, "loss.supcon": 0.0}},
    "unicom": {"image": _UNICOM},
    "oml": {"image": _OML},
    "hyp": {"image": _HYP},
    "joint-v1": {
        "joint": {**_ORIGINAL, "loss.infonce": 1.0, "loss.supcon": 0.0, "text.strategy": "raw", "batch.views": 1}
    },
    "joint-v2": {"joint": {**_ORIGINAL, **_WITH_CAPTIONS}},
    "joint-v3": {"joint": {**_ORIGINAL, **_WITH_CAPTIONS, "optimizer.lr": 1e-4}},
    "joint-v4": {
        "joint": {**_ORIGINAL, **_WITH_CAPTIONS, "text.strategy": "structured", "budget.epochs": 50.0},
    },
}


def loss_terms(shorthand: str) -> dict[str, float]:
    """Weights from 'triplet+center': the usual ones for the terms that it names, 0 for the others."""
    names = shorthand.split("+")
    for name in names:
        if name not in LOSS_TERMS:
            raise UserError(f"unknown loss {name!r} in --loss {shorthand}: the terms are {', '.join(LOSS_TERMS)}")
    return {f"loss.{t}": USUAL_WEIGHT[t] if t in names else 0.0 for t in LOSS_TERMS}


def resolve(stage: str, preset: str | None = None, settings: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a stage: defaults, then the preset's settings, then the ones given.

    Without a preset, it is the `usual_preset` of the model.

    Raises:
        UserError: unknown stage, preset or setting, or a value that does not fit.
    """
    settings = dict(settings or {})
    check("stage", stage)
    preset = preset or usual_preset(settings.get("model.name", ""))
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: the presets are {', '.join(PRESETS)}")
    if stage not in PRESETS[preset]:
        raise UserError(
            f"preset {preset} is not for the {stage} stage: its presets are {', '.join(presets_for(stage))}"
        )
    base = PRESETS[preset][stage]
    return replace(Experiment(stage=stage), {**one_budget(base), **one_budget(settings)})


def usual_preset(model: str) -> str:
    """Name of the preset that a model takes where none is named, by its name."""
    if model == SMALL_MODEL:
        return "scratch"
    name = Path(model).name.lower() if model.startswith("local-dir:") else model.lower()  # not the folders around it
    return next((family for family in ("siglip", "convnext") if family in name), "recommended")


def presets_for(stage: str) -> list[str]:
    """Names of a stage's presets."""
    return [name for name, stages in PRESETS.items() if stage in stages]
