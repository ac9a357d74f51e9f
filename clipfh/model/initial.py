"""Weights that an image tower starts from where there are none: with what a trained one would first have to learn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

PATCH_GAIN = 0.3
"""Norm of each filter of a patch: small beside the positions, so that attention is local at the start"""
VALUE_GAIN = 0.4
"""Share of what attention brings that is taken away, as trained towers do at first"""


@torch.no_grad()
def initialise(clip: Any) -> None:
    """Start a ViT of open_clip's with sine positions from better weights than random ones; others stay as they are.

    Patches are told by their lowest frequencies (a discrete cosine transform). In attention, queries are keys and
    output is the negative of values turned back, head by head, so that a patch looks at those that are like it and near
    it: a simple form of mimetic initialisation (Trockman and Kolter, 2305.09828), without its noise.
    """
    visual = clip.visual
    if getattr(visual, "pool_type", "") != "avg" or not isinstance(getattr(visual, "conv1", None), nn.Conv2d):
        return
    visual.conv1.weight.copy_(PATCH_GAIN * cosine_filters(*visual.conv1.weight.shape[::2]))
    for block in visual.transformer.resblocks:
        query, key, value = block.attn.in_proj_weight.chunk(3)
        key.copy_(query.copy_(_orthogonal(len(query))))
        value.copy_(math.sqrt(VALUE_GAIN) * _orthogonal(len(value)))
        block.attn.out_proj.weight.copy_(-value.T)


def cosine_filters(num_filters: int, side: int) -> Tensor:
    """Filters of unit norm over RGB patches, the lowest frequencies first: (num_filters, 3, side, side).

    Colour, as red less blue and as green less both, counts as two frequencies more than brightness. Where more filters
    are wanted than there are, the rest are random.
    """
    place = torch.arange(side) + 0.5
    wave = torch.cos(math.pi * torch.arange(side)[:, None] * place / side)
    wave /= wave.norm(dim=1, keepdim=True)
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
    colors /= colors.norm(dim=1, keepdim=True)
    filters = torch.einsum("cr,iy,jx->cijryx", colors, wave, wave).reshape(-1, 3, side, side)
    frequency = torch.arange(side)[:, None] + torch.arange(side) + torch.tensor([0, 2, 2])[:, None, None]
    lowest = filters[frequency.flatten().argsort(stable=True)][:num_filters]
    more = torch.randn(num_filters - len(lowest), 3, side, side)
    return torch.cat([lowest, more / (3 * side * side) ** 0.5])


def _orthogonal(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0]
