"""Which layer a parameter is in, and what is frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from clipfh import UserError
from clipfh.config.experiment import ModelSettings

_LEAVES = ("weight", "bias")
_BLOCK = re.compile(r"\b(?:resblocks|blocks|layers|layer|block)\.(\d+)\.")  # of Transformers, Hugging Face's among them
_STAGE = re.compile(r"\blayer(\d)\.")  # of open_clip's ResNets
_TIMM_BLOCK = re.compile(r"\b(?:blocks|stages|layers)\.\d+\.")
_POSITIONS = (
    r"ln_pre|norm_pre|class_embedding|positional_embedding|cls_token|cls_emb|reg_token|pos_embed|embed_positions"
)
_PATCHES = r"conv\d|bn\d|patch_embed|stem"
_STEM = re.compile(rf"\b({_POSITIONS}|{_PATCHES}|token_embedding|embeddings|embed_tokens|shared)\b")


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Tower:
    """The parameters of a tower, and the layer of each."""

    parameters: dict[str, nn.Parameter]
    depth: dict[str, int]
    """layer of each parameter, by name: 0 is the stem, i + 1 block i, `blocks` + 1 what follows the blocks"""
    blocks: int
    """number of blocks: the layers of a Transformer, the blocks of all stages of a network of convolutions, the stages
    of open_clip's own ResNets"""

    def in_patches(self, name: str) -> bool:
        """Whether a parameter makes the first features of pixels, by patch embedding or convolutions."""
        return not self.depth[name] and not re.search(rf"\b({_POSITIONS})\b", name)


def split_towers(clip: Any) -> tuple[Tower, Tower, dict[str, nn.Parameter]]:
    """The image tower, the text tower, and logit scale and bias, by name."""
    parts: dict[str, dict[str, nn.Parameter]] = {"visual": {}, "logit": {}, "text": {}}
    for name, parameter in clip.named_parameters():
        part = re.match("visual|logit", name)
        parts[part[0] if part else "text"][name] = parameter
    trunk = getattr(clip.visual, "trunk", None)
    image = _plain_depths(parts["visual"]) if trunk is None else _timm_depths(parts["visual"], trunk)
    return Tower(parts["visual"], *image), Tower(parts["text"], *_plain_depths(parts["text"])), parts["logit"]


def _plain_depths(names: Iterable[str]) -> tuple[dict[str, int], int]:
    """Depth of each parameter of a tower of open_clip's or Hugging Face's, by its name, and the number of blocks."""
    block_of = {name: _block(name) for name in names}
    blocks = max((block for block in block_of.values() if block), default=0)
    after = {name: 0 if _STEM.search(name) and "attnpool" not in name else blocks + 1 for name in block_of}
    return {name: block or after[name] for name, block in block_of.items()}, blocks


def _block(name: str) -> int:
    """The block that a name is in, counted from 1; 0 for none."""
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    stage = _STAGE.search(name)
    return int(stage[1]) if stage else 0


def _timm_depths(names: Iterable[str], trunk: Any) -> tuple[dict[str, int], int]:
    """Depth of each parameter of a tower of timm's, which knows the order of its own layers, and the number of blocks.

    All that timm puts after its last block is one layer here, with the projection that open_clip adds.
    """
    from timm.models import group_parameters

    groups = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    blocks = max(number for name, number in groups.items() if _TIMM_BLOCK.search(name))
    return {name: min(groups.get(name.removeprefix("visual.trunk."), blocks + 1), blocks + 1) for name in names}, blocks


def require_blocks(clip: nn.Module, settings: ModelSettings) -> None:
    """Raise UserError where more blocks are to be frozen than the image tower has."""
    blocks = split_towers(clip)[0].blocks
    if settings.freeze_blocks > blocks:
        raise UserError(f"--model.freeze_blocks {settings.freeze_blocks}: {settings.name} has {blocks} blocks")


def freeze(clip: nn.Module, stage: str, settings: ModelSettings, learn_scale: bool) -> None:
    """Switch off the gradients of the parameters that stage and settings freeze.

    Raises:
        UserError: more blocks are to be frozen than the image tower has.
    """
    require_blocks(clip, settings)
    image, text, scale = split_towers(clip)
    norms = {f"{prefix}.{leaf}" for prefix, module in clip.named_modules() if is_batch_norm(module) for leaf in _LEAVES}
    for name, parameter in image.parameters.items():
        at = image.depth[name]
        frozen = (image.in_patches(name) and settings.freeze_patch) or (name in norms and settings.freeze_norm)
        parameter.requires_grad_(not (frozen or (settings.freeze_blocks and at <= settings.freeze_blocks)))
    for name, parameter in text.parameters.items():
        # CoCa's decoder writes captions, and has no part in embeddings
        parameter.requires_grad_(stage == "joint" and not name.startswith("text_decoder."))
    for parameter in scale.values():
        parameter.requires_grad_(stage == "joint" and learn_scale)
