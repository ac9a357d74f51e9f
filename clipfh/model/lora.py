"""Low-rank adaptation (LoRA; Hu et al., 2106.09685): frozen weights, each with a learned update of low rank.

An update belongs to a weight, not to a kind of module (`torch.nn.utils.parametrize`), so that attention with q, k and v
in one matrix, as open_clip's has, is adapted like any linear layer or convolution. The module computes with the sum of
both: a forward pass holds one such sum for each adapted weight, and no module is wrapped or replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipfh import UserError
from clipfh.config.experiment import ModelSettings
from clipfh.model.layers import Tower, split_towers

ALPHA = 32
"""Scale of an update times its rank. Divided by the rank, one learning rate suits all ranks, and it is about ten times
that of full training (Schulman et al., LoRA Without Regret, 2025)."""

_PARTS = {"attention": r"attn|attention", "mlp": r"mlp|ffn|\bintermediate\b|\boutput\.dense\b"}
_INSIDE = "parametrizations"


class LowRank(nn.Module):
    """The sum of a weight and its update. `up` is 0 at first, so the update is.

    Args:
        weight: (rows, ...) weight; the update is one of the matrix (rows, all else).
        rank: of the update.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        matrix = weight.flatten(1)
        self.up = nn.Parameter(matrix.new_zeros(len(matrix), rank))
        self.down = nn.Parameter(matrix.new_empty(rank, matrix.shape[1]))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = ALPHA / rank

    def forward(self, weight: Tensor) -> Tensor:
        # Not in the type of autocast, to which a small update of a large weight is lost
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight.flatten(1), self.up, self.down, alpha=self.scale).view(weight.shape)


class Target(NamedTuple):
    """A weight that is adapted."""

    name: str
    """open_clip's name of the weight"""
    module: nn.Module
    leaf: str
    """the weight's name within its module"""


def find_targets(clip: nn.Module, settings: ModelSettings) -> list[Target]:
    """The weights that LoRA adapts: the matrices and convolutions behind the stem that are not frozen.

    Embeddings of tokens and places are left out, and weights that are too small for the rank. `attention` and `mlp`
    take these parts of the blocks; `all` takes both, and what follows the blocks, such as the projection.

    Raises:
        UserError: the image tower has no such weight.
    """
    image, text, _ = split_towers(clip)
    in_image, in_text = (
        [target for target in _candidates(clip, tower, settings.lora_rank) if _holds(settings.lora_targets, target)]
        for tower in (image, text)
    )
    if not in_image:
        raise UserError(
            f"--model.lora_rank {settings.lora_rank}: the image tower of {settings.name} has no weight for it with "
            f"model.lora_targets {settings.lora_targets} and model.freeze_blocks {settings.freeze_blocks}: freeze "
            "less, take targets all or a smaller rank"
        )
    return [*in_image, *in_text]


def _candidates(clip: nn.Module, tower: Tower, rank: int) -> Iterator[Target]:
    for name, parameter in tower.parameters.items():
        path, _, leaf = name.rpartition(".")
        module = clip.get_submodule(path)
        is_matrix = parameter.ndim > 1 and min(parameter.flatten(1).shape) > rank
        is_weight = re.search(r"(weight|proj|projection)$", leaf) and not isinstance(module, nn.Embedding)
        if parameter.requires_grad and is_matrix and is_weight and tower.depth[name] > 0:
            yield Target(name, module, leaf)


def _holds(targets: str, target: Target) -> bool:
    return targets == "all" or re.search(_PARTS[targets], target.name) is not None


def adapt(clip: nn.Module, settings: ModelSettings) -> None:
    """Give the targets their updates, and freeze all else of the towers. The logit scale stays as it is.

    Raises:
        UserError: as `find_targets`.
    """
    targets, (image, text, _) = find_targets(clip, settings), split_towers(clip)
    for parameter in (*image.parameters.values(), *text.parameters.values()):
        parameter.requires_grad_(False)
    for target in targets:
        weight = clip.get_parameter(target.name)
        parametrize.register_parametrization(target.module, target.leaf, LowRank(weight, settings.lora_rank))


def count_trained(clip: nn.Module, settings: ModelSettings) -> int:
    """Number of parameters that `adapt` would leave to train, in a model that is frozen but not yet adapted."""
    shapes = [clip.get_parameter(target.name).flatten(1).shape for target in find_targets(clip, settings)]
    scale = sum(p.numel() for p in split_towers(clip)[2].values() if p.requires_grad)
    return settings.lora_rank * sum(rows + columns for rows, columns in shapes) + scale


def is_factor(name: str) -> bool:
    """Whether a parameter belongs to an update, by its name."""
    return _INSIDE in name.split(".")


def merged_state(clip: nn.Module, names: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights by open_clip's names, the updates added: the state of a plain model that computes the same.

    Args:
        clip: adapted or not.
        names: the parameters whose weights are wanted, by their names in the adapted model; all by default.
    """
    state = {name: tensor for name, tensor in clip.state_dict().items() if not is_factor(name)}
    for path, module in clip.named_modules():
        for leaf in getattr(module, _INSIDE, ()):
            state[f"{path}.{leaf}".lstrip(".")] = getattr(module, leaf).detach()
    return state if names is None else {name: state[name] for name in {_plain_name(each) for each in names}}


def _plain_name(name: str) -> str:
    """open_clip's name of the weight that a parameter of the adapted model belongs to."""
    path, separator, rest = name.rpartition(f"{_INSIDE}.")
    return path + rest.split(".")[0] if separator else name


def count_factors(clip: nn.Module) -> int:
    """Number of parameters that `adapt` has added."""
    return sum(p.numel() for m in clip.modules() if isinstance(m, LowRank) for p in m.parameters())


def factors(clip: nn.Module) -> dict[str, Tensor]:
    """The updates and the frozen weights under them, by their names in the adapted model: all that `merged_state`
    loses. Empty where the model is not adapted."""
    return {name: tensor for name, tensor in clip.state_dict().items() if is_factor(name)}
