"""Models between models of one start: the average of their weights (soup), and the way from the start to it (mix).

Sources: Wortsman et al., Model soups (2203.05482); Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT,
2109.01903).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""open_clip's names to tensors: LoRA's updates are added to their weights"""

_STATISTICS = ("running_mean", "running_var")


def average(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of models' weights, each rounded once: it is summed in float64.

    Args:
        states: of one architecture, with the batch norms' statistics of one pretraining.

    Raises:
        ValueError: they are of different architectures, or differ in what has no mean: batch norms' statistics, and
            whole numbers.
    """
    _require_alike(states)
    first = states[0]
    return {name: _mean([state[name] for state in states]) for name in first}


def interpolate(start: State, tuned: State, share: float) -> dict[str, Tensor]:
    """`(1 - share) * start + share * tuned`, by weights.

    Args:
        start: the model before tuning.
        tuned: the model after it.
        share: weight of the tuned model, from 0 (the start itself) to 1 (the tuned model itself).

    Raises:
        ValueError: as `average`.
    """
    _require_alike([tuned, start])
    if share in (0, 1):
        return dict(tuned if share else start)
    return {
        name: _point_between(start[name], tensor, share) if _has_mean(name, tensor) else tensor
        for name, tensor in tuned.items()
    }


def _point_between(start: Tensor, end: Tensor, share: float) -> Tensor:
    return start.double().lerp(end.double(), share).to(end.dtype)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors; of equal ones the first itself."""
    first = tensors[0]
    if all(torch.equal(first, each) for each in tensors[1:]):
        return first
    return torch.stack([each.double() for each in tensors]).mean(0).to(first.dtype)


def _has_mean(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith(_STATISTICS)


def _require_alike(states: Sequence[State]) -> None:
    first = states[0]
    shapes = {name: tensor.shape for name, tensor in first.items()}
    for other in states[1:]:
        if {name: tensor.shape for name, tensor in other.items()} != shapes:
            raise ValueError("the weights are of different architectures")
        for name, tensor in first.items():
            if not _has_mean(name, tensor) and not torch.equal(tensor, other[name]):
                raise ValueError(f"{name} differs, and has no mean")
