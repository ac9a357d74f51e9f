"""A table of every architecture of open_clip's list: layers by tower, order of rates, what is frozen by default.

    python tests/model/architectures.py [NAME ...]

Models are built on the meta device: they have no weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

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


def look_at(name: str) -> Row:
    """Build an architecture of open_clip's list without weights, and look at it. UserError: it can't be built."""
    settings = ModelSettings(name=name, pretrained="none")
    clip = build(architectures.find(settings), "meta")
    image, text, _ = split_towers(clip)
    freeze(clip, "joint", settings, learn_scale=True)
    heads = Objective(LossSettings(infonce=1.0), 1, 1)
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
