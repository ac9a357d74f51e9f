"""Parameter groups with layer-wise decay, warm-up and cosine per step, and the average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clipfh import UserError
from clipfh.config.experiment import OptimizerSettings
from clipfh.model.layers import count_blocks, layer_depth, split_towers


def adamw(clip: nn.Module, heads: nn.Module, settings: OptimizerSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW over what is not frozen: each tower with layer-wise rates, the heads with their own.

    Parameters of equal rate and decay are one group: the optimizer's time in Python goes with the number of groups.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, rate in _rates(clip, heads, settings):
        if parameter.requires_grad:
            # Norms, biases and single vectors are not decayed
            groups.setdefault((rate, settings.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    of = [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    return torch.optim.AdamW(of, betas=(0.9, 0.98), eps=1e-6, fused=device.type in ("cuda", "cpu"))


def _rates(clip: nn.Module, heads: nn.Module, settings: OptimizerSettings) -> Iterator[tuple[nn.Parameter, float]]:
    towers = split_towers(clip)
    for tower, multiple in (("image", 1.0), ("text", settings.text_lr)):
        blocks = count_blocks(list(towers[tower]))
        for name, parameter in towers[tower].items():
            yield parameter, settings.lr * multiple * settings.layer_decay ** (blocks + 1 - layer_depth(name, blocks))
    for parameter in towers["scale"].values():
        yield parameter, settings.lr * settings.text_lr
    for parameter in heads.parameters():
        yield parameter, settings.lr * settings.head_lr


def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from a state that `optimizer.state_dict()` gave.

    Raises:
        UserError: its parameters are in other groups.
    """
    theirs, ours = ([len(g["params"]) for g in s["param_groups"]] for s in (state, optimizer.state_dict()))
    if theirs != ours:
        raise UserError(
            f"--resume: the checkpoint's optimizer has {len(theirs)} groups of parameters, this version's {len(ours)}: "
            "go on with the version of clipfh that began the run, or start another --out with --warm-start RUN"
        )
    optimizer.load_state_dict(state)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a share of the steps, then half a cosine to 0 at the last."""
    rise = max(1, round(steps * warmup)) if warmup else 0

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class ExponentialMovingAverage:
    """Exponential moving average of a model's trained weights, which is what is evaluated and exported.

    The decay rises as (1 + t) / (10 + t) to its value, so that a short run is not an average of its start.
    """

    def __init__(self, clip: nn.Module, decay: float) -> None:
        self.decay = decay
        self.source = {n: p for n, p in clip.named_parameters() if p.requires_grad}
        self.weights = {n: p.detach().clone() for n, p in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(self.source.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the average for its weights; without an average, as it is."""
        if self.decay:
            self._swap()
        try:
            yield
        finally:
            if self.decay:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.source.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)
