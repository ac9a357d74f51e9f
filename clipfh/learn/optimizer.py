"""The optimizer with layer-wise learning rates, the rates' schedule by step, and the EMA of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clipfh import UserError
from clipfh.config.experiment import OptimizerSettings
from clipfh.model.layers import split_towers
from clipfh.model.lora import is_factor


def make_adamw(
    clip: nn.Module, heads: nn.Module, settings: OptimizerSettings, device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that are not frozen, with layer-wise learning rates in each tower.

    Parameters with equal learning rate and weight decay form one group, because the optimizer's time in Python grows
    with the number of groups. Where heads learn first, the groups of parameters that do so have `is_head` set.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter, lr, is_head in _learning_rates(clip, heads, settings):
        if parameter.requires_grad:
            # Norms, biases and single vectors are not decayed
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr, decay, is_head and settings.head_first > 0), []).append(parameter)
    options = [
        {"params": params, "lr": lr, "weight_decay": decay, "is_head": is_head}
        for (lr, decay, is_head), params in groups.items()
    ]
    return torch.optim.AdamW(options, betas=(0.9, 0.98), eps=1e-6, fused=device.type in ("cuda", "cpu"))


def _learning_rates(
    clip: nn.Module, heads: nn.Module, settings: OptimizerSettings
) -> Iterator[tuple[nn.Parameter, float, bool]]:
    """Yield each parameter, its learning rate, and whether it is of a head or after the image tower's last block."""
    image, text, scale = split_towers(clip)
    for tower, multiple in ((image, 1.0), (text, settings.text_lr)):
        for name, parameter in tower.parameters.items():
            above = tower.blocks + 1 - tower.depth[name]
            lr = settings.lr * multiple * settings.layer_decay**above * (settings.lora_lr if is_factor(name) else 1.0)
            yield parameter, lr, tower is image and above == 0
    for parameter in scale.values():
        yield parameter, settings.lr * settings.text_lr, False
    for parameter in heads.parameters():
        yield parameter, settings.lr * settings.head_lr, True


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the optimizer from a `state_dict`.

    Raises:
        UserError: the state has other groups of parameters.
    """
    old, new = ([len(g["params"]) for g in s["param_groups"]] for s in (state, optimizer.state_dict()))
    if old != new:
        raise UserError(
            f"--resume: the checkpoint's optimizer has {len(old)} groups of parameters, this version's {len(new)}: "
            "go on with the version of clipfh that began the run, or start another --out with --warm-start RUN"
        )
    optimizer.load_state_dict(state)


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, head_first: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule by `lr_factor`: heads start at once, all else after a share `head_first` of the steps.

    Gradients of all parameters are computed from the start, so workers wait for the same gradients at each step.
    """

    def heads(step: int) -> float:
        return lr_factor(step, steps, warmup)

    def others(step: int) -> float:
        return lr_factor(step, steps, warmup, head_first)

    groups = optimizer.param_groups
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [heads if g.get("is_head") else others for g in groups])


def lr_factor(step: int, steps: int, warmup: float, head_first: float = 0.0) -> float:
    """Return the factor on a learning rate at a step: 0 for a share `head_first` of the steps (LP-FT: Kumar et al.,
    2202.10054), a linear rise for a share `warmup` of the other steps, then a fall by half a cosine to 0."""
    begin = round(steps * head_first)
    if step < begin:
        return 0.0
    step, steps = step - begin, steps - begin
    rise = max(1, round(steps * warmup)) if warmup else 0
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


class ExponentialMovingAverage:
    """Exponential moving average (EMA) of a model's trained weights. The EMA is evaluated and exported.

    The decay at step t is at most (1 + t) / (10 + t), so that the start of a short run weighs little. A decay of 0
    means no EMA: its weights are then the model's own, not a copy.
    """

    def __init__(self, clip: nn.Module, decay: float) -> None:
        self.decay = decay
        self.source = {n: p for n, p in clip.named_parameters() if p.requires_grad}
        self.weights = {n: p.detach().clone() if decay else p.detach() for n, p in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the model's weights after a step (counted from 0) to the EMA."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(self.source.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the EMA weights inside the `with` block."""
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
            current = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(current)
