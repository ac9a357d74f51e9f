"""A table of every architecture of open_clip's list: layers by tower, order of rates, what is frozen by default.

    python tests/model/architectures.py [NAME ...]

Models are built on the meta device: they have no weights. Text towers of Hugging Face's are built by configurations
written here, as the hub has them, without asking it.
"""

from __future__ import annotations

import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from clipfh import UserError
from clipfh.config.experiment import LossSettings, ModelSettings, OptimizerSettings
from clipfh.learn.objective import Objective
from clipfh.learn.optimizer import make_adamw
from clipfh.model import architecture as architectures
from clipfh.model.clip import build
from clipfh.model.layers import Tower, freeze, split_towers
from clipfh.model.towers import recompute_blocks


@dataclass(frozen=True)
class Row:
    """What the table tells of an architecture."""

    name: str
    image: Tower
    text: Tower
    millions: float
    """parameters"""
    frozen: list[str]
    """parts of the image tower that are frozen by default, by the beginnings of their names"""
    groups: int
    """of the optimizer, in the joint stage"""
    checkpoints: bool
    """whether the image tower can compute its activations again"""


LARGE = {"num_attention_heads": 16, "intermediate_size": 4096}
TEXT_TOWERS = {
    "roberta-base": ("roberta", {"vocab_size": 50265}),
    "xlm-roberta-base": ("xlm-roberta", {"vocab_size": 250002}),
    "xlm-roberta-large": ("xlm-roberta", {"vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 24, **LARGE}),
    "google/mt5-base": ("mt5", {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}),
    "google/mt5-xl": ("mt5", {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "facebook/nllb-200-distilled-600M": ("m2m_100", {"vocab_size": 256206}),
    "facebook/nllb-200-distilled-1.3B": ("m2m_100", {"vocab_size": 256206, "encoder_layers": 24}),
}
"""Type of each text tower of Hugging Face's in open_clip's list, and what of it is not the type's own"""


def build_without_weights(settings: ModelSettings) -> Any:
    """A model of open_clip's list on the meta device. UserError: it can't be built."""
    found = architectures.find(settings)
    if tower := found.model_cfg["text_cfg"].get("hf_model_name"):
        from transformers import AutoConfig

        kind, options = TEXT_TOWERS[tower]
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(kind, **options).save_pretrained(folder)
            cfg = deepcopy(found.model_cfg)
            cfg["text_cfg"]["hf_model_name"] = folder
            return build(replace(found, model_cfg=cfg), "meta")
    return build(found, "meta")


def look_at(name: str) -> Row:
    """Build an architecture of open_clip's list without weights, and look at it. UserError: it can't be built."""
    settings = ModelSettings(name=name, pretrained="none")
    clip = build_without_weights(settings)
    image, text, _ = split_towers(clip)
    freeze(clip, "joint", settings, learn_scale=True)
    heads = Objective(LossSettings(infonce=1.0), 1, 1, 1)
    groups = make_adamw(clip, heads, OptimizerSettings(layer_decay=0.75), torch.device("meta")).param_groups
    frozen = {_part(n) for n, p in image.parameters.items() if not p.requires_grad}
    try:
        recompute_blocks(clip, name)
        checkpoints = True
    except UserError:
        checkpoints = False
    millions = sum(p.numel() for p in clip.parameters()) / 1e6
    return Row(name, image, text, millions, sorted(frozen), len(groups), checkpoints)


def _part(name: str) -> str:
    """The first two words of a parameter's name below its tower."""
    return ".".join(name.removeprefix("visual.").removeprefix("trunk.").split(".")[:2])


def main(names: list[str]) -> None:
    print("| architecture | M parameters | image blocks | text blocks | optimizer groups | frozen | checkpointing |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        try:
            row = look_at(name)
        except UserError as error:
            print(f"| {name} | {error} |")
            continue
        counts = f"{row.millions:.0f} | {row.image.blocks} | {row.text.blocks} | {row.groups}"
        print(f"| {name} | {counts} | {', '.join(row.frozen)} | {'yes' if row.checkpoints else 'no'} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or architectures.load_open_clip().list_models())
