"""Which layer a parameter is in, and what is frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from clipfh import UserError
from clipfh.config.experiment import ModelSettings

_LEAVES = ("weight", "bias")


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def layer_depth(name: str, blocks: int) -> int:
    """Depth of a tower's parameter: 0 for the stem, i + 1 for block i, blocks + 1 for what follows the blocks."""
    block = re.search(r"\b(?:resblocks|blocks|layers)\.(\d+)\.|\blayer(\d)\.", name)
    if block:
        return int(block[1]) + 1 if block[1] else int(block[2])
    stem = (
        r"\b(conv\d|bn\d|class_embedding|positional_embedding|token_embedding|ln_pre|patch_embed|cls_token|pos_embed)\b"
    )
    return 0 if re.search(stem, name) and "attnpool" not in name else blocks + 1


def count_blocks(names: Mapping[str, Any] | list[str]) -> int:
    """Number of blocks of the tower with these parameter names."""
    return max((d for d in (layer_depth(n, -1) for n in names)), default=0)


def split_towers(clip: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by tower: image, text, and scale (the logit scale and bias)."""
    towers: dict[str, dict[str, nn.Parameter]] = {"image": {}, "text": {}, "scale": {}}
    for name, parameter in clip.named_parameters():
        tower = "image" if name.startswith("visual.") else "scale" if name.startswith("logit_") else "text"
        towers[tower][name] = parameter
    return towers


def require_blocks(clip: nn.Module, settings: ModelSettings) -> int:
    """Number of blocks of the image tower. UserError: more than those are to be frozen."""
    blocks = count_blocks(list(split_towers(clip)["image"]))
    if settings.freeze_blocks > blocks:
        raise UserError(f"--model.freeze_blocks {settings.freeze_blocks}: {settings.name} has {blocks} blocks")
    return blocks


def freeze(clip: nn.Module, stage: str, settings: ModelSettings, learn_scale: bool) -> None:
    """Switch off the gradients of the parameters that stage and settings freeze.

    Raises:
        UserError: more blocks are to be frozen than the image tower has.
    """
    towers, blocks = split_towers(clip), require_blocks(clip, settings)
    norms = {f"{prefix}.{leaf}" for prefix, module in clip.named_modules() if is_batch_norm(module) for leaf in _LEAVES}
    for name, parameter in towers["image"].items():
        at = layer_depth(name, blocks)
        in_patch = re.search(r"\b(conv\d|bn\d|patch_embed)\b", name) and at == 0
        frozen = (in_patch and settings.freeze_patch) or (name in norms and settings.freeze_norm)
        parameter.requires_grad_(not (frozen or (settings.freeze_blocks and at <= settings.freeze_blocks)))
    for parameter in towers["text"].values():
        parameter.requires_grad_(stage == "joint")
    for parameter in towers["scale"].values():
        parameter.requires_grad_(stage == "joint" and learn_scale)
