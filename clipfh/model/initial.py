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
"""Share of what attention brings of a patch's patterns that is taken away, as trained towers do at first"""
POSITION_SHARE = 0.4
"""Share of the width that holds positions, and nothing else"""
POSITION_BASE = 100.0
"""Ratio of the longest wave of the positions to the shortest: open_clip's 10,000 is for far longer sequences"""
OFFSETS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
"""Patches right and down to which the heads of attention look, in turn"""
COARSE = 3
"""Frequencies of a patch up to this sum of both axes count as coarse"""
NUM_COARSE, NUM_FINE = 3, 5
"""Directions whose energy the first block measures, of the coarse frequencies and of the others"""
ENERGY_GAIN = 5.0
"""How steeply energies are measured: the larger, the closer GELU(x) + GELU(-x) comes to the absolute value of x"""
POOL_SHARPNESS = 0.5
"""How closely a head of the pooler looks at its place: with 1 the small model learns less, and with 3 still less"""


@torch.no_grad()
def initialise(clip: Any) -> None:
    """Start a ViT whose pooler reads a grid of places from better weights than random ones; others stay as they are.

    A token holds its patch's lowest frequencies (a discrete cosine transform), the energies of eight directions, and
    its position, each in dimensions of their own. In attention, keys are orthogonal and queries are keys moved by the
    head's offset, so that a patch looks at those that are like its neighbour there, as a convolution does (Zheng et
    al., 2401.12511); output is the negative of values turned back, a simple form of mimetic initialisation (Trockman
    and Kolter, 2305.09828), without its noise. Mean colours, energies and positions are not in the values: they differ
    little from patch to patch, and each block would take some of them away. The first block measures the energies, a
    histogram of gradients (Dalal and Triggs, 2005). Each head of the pooler reads the lowest frequencies and the
    energies at its own place: a mean over all patches would not tell where something is.
    """
    visual = clip.visual
    if not _reads_places(visual):
        return
    side, width = visual.grid_size[0], visual.conv1.out_channels
    filters, energies, positions = _parts(width)
    frequency = lowest_frequencies(filters.stop, visual.patch_size[0])
    visual.conv1.weight.zero_()
    visual.conv1.weight[filters] = PATCH_GAIN * cosine_filters(filters.stop, visual.patch_size[0])
    visual.positional_embedding.zero_()
    visual.positional_embedding[1:, positions] = _positions(torch.arange(side), width)
    mean_colors = torch.nonzero(frequency[:, 1:].sum(1) == 0)[:, 0].tolist()
    patterns = [k for k in range(filters.stop) if k not in mean_colors]
    for block in visual.transformer.resblocks:
        _look_around(block.attn, patterns, positions)
    _measure_energies(visual.transformer.resblocks[0].mlp, frequency, energies)
    _read_places(visual.attn_pool, side, energies, positions)
    nn.init.eye_(visual.proj)


def _reads_places(visual: Any) -> bool:
    """Whether a tower is open_clip's ViT with fixed positions, torch's attention, and a pooler of one query, whose
    heads are a square number, with dimensions for all energies and as many frequencies."""
    pool = getattr(visual, "attn_pool", None)
    if pool is None or visual.positional_embedding.requires_grad or visual.conv1.out_channels % 4:
        return False
    attentions = [block.attn for block in visual.transformer.resblocks]
    if not all(isinstance(attention, nn.MultiheadAttention) for attention in [*attentions, pool.attn]):
        return False
    places, head = math.isqrt(pool.attn.num_heads) ** 2, pool.attn.head_dim
    roomy = head % 2 == 0 and 2 * (NUM_COARSE + NUM_FINE) <= head <= _parts(visual.conv1.out_channels)[0].stop
    return len(pool.query) == 1 and places == pool.attn.num_heads and roomy and pool.attn.in_proj_weight is None


def _parts(width: int) -> tuple[slice, slice, slice]:
    """Dimensions of a token that hold frequencies, energies and the position."""
    first_position = width - round(POSITION_SHARE * width / 4) * 4
    first_energy = first_position - NUM_COARSE - NUM_FINE
    return slice(0, first_energy), slice(first_energy, first_position), slice(first_position, width)


def _look_around(attention: nn.MultiheadAttention, patterns: list[int], positions: slice) -> None:
    """Queries, keys, values and output of a block's attention, which takes nothing away but from `patterns`."""
    width = attention.embed_dim
    query, key, value = attention.in_proj_weight.chunk(3)
    key.copy_(_orthogonal(width))
    heads = (part.chunk(attention.num_heads) for part in (query, key))
    for query_of_head, key_of_head, offset in zip(*heads, itertools.cycle(OFFSETS), strict=False):
        query_of_head.copy_(key_of_head)
        query_of_head[:, positions] = key_of_head[:, positions] @ _shift(positions.stop - positions.start, *offset)
    value.zero_()
    value[:, patterns] = math.sqrt(VALUE_GAIN) * _orthogonal(width)[:, patterns]
    attention.out_proj.weight.copy_(-value.T)


def _measure_energies(mlp: Any, frequency: Tensor, energies: slice) -> None:
    """Pairs of hidden units, GELU(x) and GELU(-x), whose sum is nearly the absolute value of a pattern x of brightness.

    Each direction's energy is their sum over the patterns of that direction. The other hidden units stay random.
    """
    color, down, right = frequency.T
    pattern = torch.nonzero((color == 0) & (down + right > 0))[: mlp.c_fc.out_features // 2, 0]
    color, down, right = frequency[pattern].T
    angle = torch.atan2(down.float(), right.float()) / (math.pi / 2)
    coarse, fine = (angle * (NUM_COARSE - 1)).round(), (angle * (NUM_FINE - 1)).round()
    energy = energies.start + torch.where(down + right <= COARSE, coarse, NUM_COARSE + fine).long()
    for sign, unit in zip((1, -1), torch.arange(2 * len(pattern)).chunk(2), strict=True):
        mlp.c_fc.weight[unit], mlp.c_fc.bias[unit] = 0.0, 0.0
        mlp.c_fc.weight[unit, pattern] = sign * ENERGY_GAIN
        mlp.c_proj.weight[:, unit] = 0.0
        mlp.c_proj.weight[energy, unit] = 1 / ENERGY_GAIN


def _read_places(pool: Any, side: int, energies: slice, positions: slice) -> None:
    """A pooler whose heads each read one place of a grid: the energies there, and the lowest frequencies."""
    attention = pool.attn
    heads, dims, width = attention.num_heads, attention.head_dim, attention.kdim
    signs = torch.tensor([1.0, -1.0]).repeat(heads * dims // 2)  # layer norm leaves them as they are
    pool.query.copy_(signs)
    nn.init.eye_(attention.q_proj_weight)
    middle = (torch.arange(math.isqrt(heads)) + 0.5) * side / math.isqrt(heads) - 0.5
    places = _positions(middle, width) - _positions(torch.arange(side), width).mean(0)
    attention.k_proj_weight.zero_()
    attention.k_proj_weight[:, positions] = signs[:, None] * (POOL_SHARPNESS / dims * places).repeat_interleave(dims, 0)
    read = [*range(dims - NUM_COARSE - NUM_FINE), *range(energies.start, energies.stop)]
    attention.v_proj_weight.copy_(torch.eye(width)[read].repeat(heads, 1))
    nn.init.eye_(attention.out_proj.weight)


def _positions(along: Tensor, width: int) -> Tensor:
    """Positions of a square grid's places, as strong in their share of the width as over all of it."""
    places = torch.cartesian_prod(along, along).flip(1)
    part = _parts(width)[2]
    dims = part.stop - part.start
    return math.sqrt(width / dims) * sine_positions(places, dims)


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


def lowest_frequencies(num_filters: int, side: int) -> Tensor:
    """Colour, and waves down and right, of the cosine transform's lowest frequencies: (num_filters, 3), fewer where a
    patch has fewer.

    Colour 0 is brightness. The others, red less blue and green less both, count as two frequencies more.
    """
    wave = torch.arange(side)
    frequency = torch.cartesian_prod(torch.arange(3), wave, wave)
    order = (frequency[:, 1:].sum(1) + 2 * (frequency[:, 0] > 0)).argsort(stable=True)
    return frequency[order[:num_filters]]


def cosine_filters(num_filters: int, side: int) -> Tensor:
    """Filters of unit norm over RGB patches, the lowest frequencies first: (num_filters, 3, side, side).

    Where more filters are wanted than there are, the rest are random.
    """
    place = torch.arange(side) + 0.5
    wave = torch.cos(math.pi * torch.arange(side)[:, None] * place / side)
    wave /= wave.norm(dim=1, keepdim=True)
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
    colors /= colors.norm(dim=1, keepdim=True)
    color, down, right = lowest_frequencies(num_filters, side).T
    lowest = torch.einsum("nr,ny,nx->nryx", colors[color], wave[down], wave[right])
    more = torch.randn(num_filters - len(lowest), 3, side, side)
    return torch.cat([lowest, more / (3 * side * side) ** 0.5])


def _orthogonal(width: int) -> Tensor:
    # In double, of which rounding leaves the same for any number of threads
    return torch.linalg.qr(torch.randn(width, width).double())[0].float()
