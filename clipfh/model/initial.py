"""Weights that an image tower starts from where there are none: with what a trained one would first have to learn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

PATCH_GAIN = 0.3
"""Norm of each filter of a patch: small beside the positions, so that attention is local at the start"""
VALUE_GAIN = 0.4
"""Share of what attention brings that is taken away, as trained towers do at first"""
POSITION_BASE = 100.0
"""Ratio of the longest wave of the positions to the shortest: open_clip's 10,000 is for far longer sequences"""
OFFSETS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
"""Patches right and down to which the heads of attention look, in turn"""
POOL_SHARPNESS = 0.5
"""How closely a head of the pooler looks at its place: with 1 the small model learns less, and with 3 still less"""


@torch.no_grad()
def initialise(clip: Any) -> None:
    """Start a ViT whose pooler reads a grid of places from better weights than random ones; others stay as they are.

    Patches are told by their lowest frequencies (a discrete cosine transform), positions by sines. In attention, keys
    are orthogonal and queries are keys moved by the head's offset, so that a patch looks at those that are like its
    neighbour there, as a convolution does (Zheng et al., 2401.12511); output is the negative of values turned back, a
    simple form of mimetic initialisation (Trockman and Kolter, 2305.09828), without its noise. Each head of the pooler
    reads its own place: a mean over all patches would not tell where something is.
    """
    visual = clip.visual
    if not _reads_places(visual):
        return
    side, width = visual.grid_size[0], visual.conv1.out_channels
    visual.conv1.weight.copy_(PATCH_GAIN * cosine_filters(width, visual.patch_size[0]))
    visual.positional_embedding[1:] = sine_positions(_grid(torch.arange(side)), width)
    for block in visual.transformer.resblocks:
        _look_around(block.attn)
    _read_places(visual.attn_pool, side)
    nn.init.eye_(visual.proj)


def _reads_places(visual: Any) -> bool:
    """Whether a tower is open_clip's ViT with fixed positions, torch's attention, and a pooler of one query, whose
    heads are a square number."""
    pool = getattr(visual, "attn_pool", None)
    if pool is None or visual.positional_embedding.requires_grad or visual.conv1.out_channels % 4:
        return False
    attentions = [block.attn for block in visual.transformer.resblocks]
    if not all(isinstance(attention, nn.MultiheadAttention) for attention in [*attentions, pool.attn]):
        return False
    places, head = math.isqrt(pool.attn.num_heads) ** 2, pool.attn.head_dim
    return len(pool.query) == 1 and places == pool.attn.num_heads and head % 2 == 0 and pool.attn.in_proj_weight is None


def _look_around(attention: nn.MultiheadAttention) -> None:
    """Queries, keys, values and output of a block's attention."""
    width = attention.embed_dim
    query, key, value = attention.in_proj_weight.chunk(3)
    key.copy_(_orthogonal(width))
    heads = (part.chunk(attention.num_heads) for part in (query, key))
    for query_of_head, key_of_head, offset in zip(*heads, itertools.cycle(OFFSETS), strict=False):
        query_of_head.copy_(key_of_head @ _shift(width, *offset))
    value.copy_(math.sqrt(VALUE_GAIN) * _orthogonal(width))
    attention.out_proj.weight.copy_(-value.T)


def _read_places(pool: Any, side: int) -> None:
    """A pooler whose heads each read one place of a grid, by their own share of the features."""
    attention = pool.attn
    heads, dims, width = attention.num_heads, attention.head_dim, attention.kdim
    signs = torch.tensor([1.0, -1.0]).repeat(heads * dims // 2)  # layer norm leaves them as they are
    pool.query.copy_(signs)
    nn.init.eye_(attention.q_proj_weight)
    middle = (torch.arange(math.isqrt(heads)) + 0.5) * side / math.isqrt(heads) - 0.5
    places = sine_positions(_grid(middle), width) - sine_positions(_grid(torch.arange(side)), width).mean(0)
    attention.k_proj_weight.copy_(signs[:, None] * (POOL_SHARPNESS / dims * places).repeat_interleave(dims, 0))
    attention.v_proj_weight.copy_(torch.cat([_orthogonal(width)[:dims] for _ in range(heads)]))
    nn.init.eye_(attention.out_proj.weight)


def sine_positions(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of places (N, 2), x and y in patches: (N, width), in open_clip's order, with shorter waves."""
    angle = places[:, :, None] * _rates(width)
    return torch.cat([angle.sin(), angle.cos()], 2).flatten(1)


def _rates(width: int) -> Tensor:
    quarter = width // 4
    return POSITION_BASE ** -(torch.arange(quarter) / quarter)


def _shift(width: int, right: float, down: float) -> Tensor:
    """The turn (width, width) that takes the position of each place to that of the place so far right and down."""
    turns = []
    for offset in (right, down):
        sine, cosine = (offset * _rates(width)).sin().diag(), (offset * _rates(width)).cos().diag()
        turns.append(torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)]))
    return torch.block_diag(*turns)


def _grid(along: Tensor) -> Tensor:
    """Places (N * N, 2) of a square grid, x and y, line by line."""
    return torch.cartesian_prod(along, along).flip(1)


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
