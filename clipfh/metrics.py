"""How well a query finds its item: Rank-k, mAP, mAP@R and mINP from embeddings, exactly, without sorting the gallery.

Similarity is the cosine of unit embeddings. The rank of a positive is 1 + the gallery images with a strictly greater
similarity + those earlier in the gallery with an equal one. Images of the query's own item never compete with each
other's judgement, so one pass counts, for each of them, the images of *other* items ahead of it; every figure follows
from these counts. A query has few positives: counting what passes each of their similarities, in a block of the
similarity matrix that is still in the cache, costs a fraction of the product that made the block.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from clipfh import UserError

RANKS = (1, 5, 10, 20, 30, 40, 50)
KEYS = ("mAP", *(f"rank{k}" for k in RANKS), "mAP_at_R", "mINP")
BLOCK = 2**22  # similarities held at once: it bounds the memory and changes no figure
TILE = 64  # rows and columns of a product come in multiples of this


@dataclass(frozen=True)
class Embeddings:
    """Images to rank by or to be ranked: N unit vectors (float32 or float64, on any device) and what they show.

    Codes are any integers. UserError: an embedding is not finite (it would win every comparison).
    """

    embedding: Tensor  # (N, D)
    item: Tensor  # (N,)
    variant: Tensor  # (N,), a code of the pair (item, variant)
    image: Tensor  # (N,), a code of the path: the same photo has the same code

    def __post_init__(self) -> None:
        assert len(self.embedding) == len(self.item) == len(self.variant) == len(self.image)
        _check_unit(self.embedding)

    def __len__(self) -> int:
        return len(self.item)

    def select(self, rows: Tensor) -> "Embeddings":
        """The rows named by an index or a mask, in that order."""
        there = rows.to(self.embedding.device)
        here = rows.to(self.item.device)
        return Embeddings(self.embedding[there], self.item[here], self.variant[here], self.image[here])


@dataclass(frozen=True)
class Captions:
    """C distinct captions (unit vectors) and the M pairs (item, caption) that say who carries which; pairs may repeat.

    Captions that read alike are one row here, however many items carry them.
    """

    embedding: Tensor  # (C, D)
    item: Tensor  # (M,)
    caption: Tensor  # (M,), rows of `embedding`

    def __post_init__(self) -> None:
        assert len(self.item) == len(self.caption)
        _check_unit(self.embedding)


@dataclass(frozen=True)
class Scores:
    """What each query scored on each of `KEYS`; a row of NaN is a query without a positive."""

    values: Tensor  # (Q, len(KEYS)), float64
    item: Tensor  # (Q,), what the bootstrap resamples
    num_gallery: int


def score(query: Embeddings, gallery: Embeddings, skip_unmatched: bool = False) -> tuple[Scores, Scores, Scores]:
    """Rank the gallery for each query in one pass, judged three ways: by item, by same variant, by other variants.

    *Same-variant* ignores the item's images of other variants, *cross-variant* those of the query's variant: they are
    neither right nor wrong. A gallery row with the query's own path is left out of all three.
    UserError: a query has no image of its item to find, unless `skip_unmatched` (it then scores NaN).
    """
    tables = torch.full((3, len(query), len(KEYS)), math.nan, dtype=torch.float64)
    own, theirs = query.variant.cpu(), gallery.variant.cpu()
    for rows, column, ahead in _scan(query, gallery, _Index.of(gallery.item)):
        found = column >= 0
        same = theirs[column] == own[rows, None]
        for table, relevant in zip(tables, (found, found & same, found & ~same), strict=True):
            table[rows] = _values(relevant, ahead)[:, 0]
    unmatched = tables[0, :, 0].isnan().nonzero().flatten()
    if len(unmatched) and not skip_unmatched:
        raise UserError(
            f"{len(unmatched)} of {len(query)} queries (the first is query {int(unmatched[0])}) have no other image of "
            "their item in the gallery: correct the catalogue's splits, or leave such queries out"
        )
    overall, same_variant, cross_variant = (Scores(table, query.item.cpu(), len(gallery)) for table in tables)
    return overall, same_variant, cross_variant


def mean_average_precision(query: Embeddings, gallery: Embeddings) -> float:
    """The mAP alone, as validation during training wants it. UserError: as `score`."""
    overall, _, _ = score(query, gallery)
    return _means(overall.values)["mAP"]


def summary(scores: Scores, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Means over the queries that have a positive, ready for JSON: `KEYS`, counts, `intervals` (key to [low, high]).

    An interval is the central 95% of a bootstrap over items: an item is drawn with all its queries. A figure over no
    query at all is null, and so is an interval over fewer than two items.
    """
    scored = ~scores.values[:, 0].isnan()
    return {
        **_means(scores.values[scored]),
        "num_query": int(scored.sum()),
        "num_gallery": scores.num_gallery,
        "num_unmatched": int((~scored).sum()),
        "intervals": _intervals(scores.values[scored].numpy(), scores.item[scored].numpy(), resamples, seed),
    }


def by_group(scores: Scores, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """mAP and rank1, with their intervals, of the queries under each label (one label a query), by label in order."""
    assert len(labels) == len(scores.item)
    groups = {}
    for label in sorted(set(labels)):
        chosen = torch.tensor([each == label for each in labels])
        whole = summary(Scores(scores.values[chosen], scores.item[chosen], scores.num_gallery))
        groups[label] = {key: whole[key] for key in ("mAP", "rank1", "num_query")}
        groups[label]["intervals"] = {key: whole["intervals"][key] for key in ("mAP", "rank1")}
    return groups


def random_splits(images: Embeddings, num_splits: int = 10, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and values over random splits: one image of each item asks, all others answer.

    An image's similarities are computed once, however many splits it asks in: splits differ only in which images are
    missing from the gallery. Items with a single image find nothing and are left out of the means.
    """
    drawn = torch.stack(list(_draw(images.item.cpu(), num_splits, seed)), dim=1)  # (N, splits)
    asking = drawn.any(1).nonzero().flatten()
    values = torch.full((len(asking), num_splits, len(KEYS)), math.nan, dtype=torch.float64)
    for rows, column, ahead in _scan(images.select(asking), images, _Index.of(images.item), ~drawn):
        values[rows] = _values(column >= 0, ahead)
    values[~drawn[asking]] = math.nan
    splits = [_means(split[~split[:, 0].isnan()]) for split in values.unbind(1)]
    return {key: _spread([split[key] for split in splits]) for key in KEYS}


def text_to_image(captions: Captions, images: Embeddings) -> dict[str, Any]:
    """`summary` with each distinct caption as a query: right are the images of every item that carries it."""
    carried = _Index.of(captions.item, captions.caption).rows(images.item.cpu())
    image, slot = (carried >= 0).nonzero(as_tuple=True)
    query = _as_embeddings(captions)
    return summary(_score_text(query, images, _Index.of(carried[image, slot], image)))


def image_to_text(images: Embeddings, captions: Captions) -> dict[str, Any]:
    """`summary` with each image as a query, over the distinct captions: right are those that its item carries."""
    return summary(_score_text(images, _as_embeddings(captions), _Index.of(captions.item, captions.caption)))


def rank_block(similarity: Tensor, positives: Tensor, left_out: Tensor, galleries: Tensor) -> tuple[Tensor, Tensor]:
    """Order each row's positives and count the other columns that stand ahead of each: the exact core of all figures.

    similarity: (B, N), finite; overwritten with -inf at positives and at what is left out.
    positives, left_out: (B, P) and (B, any) columns, in ascending order, -1 where there is none.
    galleries: (N, S) of 0 and 1 in similarity's dtype: the columns that each of S galleries holds.
    Returns the positives by descending similarity, earlier columns first among equals, -1 last (B, P); and for each how
    many columns of each gallery are ahead of it: those more similar, and earlier ones as similar (B, P, S).
    """
    column, level = _descending(similarity, positives)
    for dropped in (positives, left_out):
        row, place = (dropped >= 0).nonzero(as_tuple=True)
        similarity[row, dropped[row, place]] = -math.inf
    ahead = similarity.new_zeros(column.shape[1], len(similarity), galleries.shape[1])
    flags, order = torch.empty_like(similarity), torch.arange(similarity.shape[1], device=similarity.device)
    number = torch.arange(1, len(column) + 1, device=column.device)[:, None]
    for slot, rows in enumerate(((column >= 0) * number).amax(0).tolist()):  # rows: up to the last with such a slot
        block, flag, threshold = similarity[:rows], flags[:rows], level[:rows, slot, None]
        # Comparisons written as floats and summed by a product are several times faster than booleans, and whole
        # numbers below 2**24 are exact. `out` saves the allocation, and keeps an autocast around us from rounding.
        torch.mm(torch.gt(block, threshold, out=flag), galleries, out=ahead[slot, :rows])
        tied = torch.eq(block, threshold, out=flag).sum(1).nonzero().flatten()
        if len(tied):
            earlier = flag[tied] * (order < column[tied, slot, None])
            ahead[slot, tied] += torch.mm(earlier, galleries, out=ahead.new_empty(len(tied), galleries.shape[1]))
    return column, ahead.transpose(0, 1)


def _descending(similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's positives and their similarities from the nearest down, and after them -1 and +inf."""
    level = similarity.gather(1, positives.clamp(min=0)).masked_fill_(positives < 0, -math.inf)
    level, order = level.sort(dim=1, descending=True, stable=True)
    column = positives.gather(1, order)
    return column, level.masked_fill_(column < 0, math.inf)


@dataclass(frozen=True)
class _Index:
    """Pairs of a code and a row that bears it, sorted, each once, on the CPU."""

    code: Tensor  # (M,)
    row: Tensor  # (M + 1,), -1 at the end

    @classmethod
    def of(cls, code: Tensor, row: Tensor | None = None) -> "_Index":
        pairs = code.cpu(), torch.arange(len(code)) if row is None else row.cpu()
        order = torch.from_numpy(np.lexsort((pairs[1].numpy(), pairs[0].numpy())))
        code, row = (each[order] for each in pairs)
        new = torch.ones(len(code), dtype=torch.bool)
        new[1:] = (code[1:] != code[:-1]) | (row[1:] != row[:-1])
        return cls(code[new], torch.cat([row[new], torch.tensor([-1])]))

    def count(self, wanted: Tensor) -> Tensor:
        """How many rows bear each wanted code."""
        return torch.searchsorted(self.code, wanted, right=True) - torch.searchsorted(self.code, wanted)

    def rows(self, wanted: Tensor) -> Tensor:
        """(len(wanted), most rows of a code): the rows bearing each wanted code, ascending, then -1."""
        count = self.count(wanted)[:, None]
        slot = torch.arange(max(1, int(count.max())))
        found = self.row[(torch.searchsorted(self.code, wanted)[:, None] + slot).clamp(max=len(self.code))]
        return found.masked_fill_(slot >= count, -1)


def _scan(
    query: Embeddings, gallery: Embeddings, kin: _Index, members: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of queries: their rows (B,), and of `rank_block` the positives (B, P) and counts (B, P, S), on the CPU.

    kin: the gallery rows of each query's item. members: (N, S), the rows that each of S galleries holds, or one of all.
    """
    asking, answering = query.embedding.detach(), gallery.embedding.detach()
    assert 0 < len(gallery) < 2**24  # what float32 counts exactly
    item, photo, photos, twins = query.item.cpu(), query.image.cpu(), gallery.image.cpu(), _Index.of(gallery.image)
    galleries = (torch.ones(len(gallery), 1) if members is None else members).to(answering)
    height = max(1, BLOCK // len(gallery) // TILE) * TILE
    buffer = answering.new_empty(height, len(gallery))
    # Queries with as many positives share a block, so that each slot of `rank_block` is about full or empty.
    for rows in kin.count(item).argsort(descending=True, stable=True).split(height):
        similarity = _product(asking[rows.to(asking.device)], answering, buffer)
        positives = kin.rows(item[rows])
        positives.masked_fill_(photos[positives] == photo[rows, None], -1)
        left_out = twins.rows(photo[rows])
        found, ahead = rank_block(similarity, positives.to(asking.device), left_out.to(asking.device), galleries)
        yield rows, found.cpu(), ahead.cpu()


def _product(query: Tensor, gallery: Tensor, buffer: Tensor) -> Tensor:
    """Similarities (B, N), written into the buffer, of whole tiles only.

    At a ragged edge a BLAS adds in another order: equal images would then differ in the last digit by where they stand,
    and results by the size of the block.
    """
    whole = len(gallery) // TILE * TILE
    rows = pad(query, (0, 0, 0, -len(query) % TILE))
    edge = pad(gallery[whole:], (0, 0, 0, whole + TILE - len(gallery)))
    similarity = buffer[: len(rows)]
    torch.mm(rows, gallery[:whole].T, out=similarity[:, :whole])
    corner = torch.mm(rows, edge.T, out=rows.new_empty(len(rows), TILE))
    similarity[:, whole:] = corner[:, : len(gallery) - whole]
    return similarity[: len(query)]


def _values(relevant: Tensor, ahead: Tensor) -> Tensor:
    """`KEYS` of each query in each gallery, (B, S, len(KEYS)), from its candidates in descending order of similarity.

    relevant: (B, P) bool, the candidates that count as positives; the others are ignored. ahead: (B, P, S).
    """
    relevant = relevant[..., None]
    position = relevant.cumsum(1).double()
    total = position[:, -1]
    rank = position + ahead
    precision = (position / rank).masked_fill(~relevant, 0)
    first = rank.masked_fill(~relevant, math.inf).amin(1)
    last = rank.masked_fill(~relevant, 0).amax(1)
    # A running sum adds in order, so that the width of the padding cannot change a digit.
    average = precision.cumsum(1)[:, -1] / total
    average_at_r = precision.masked_fill(rank > total[:, None], 0).cumsum(1)[:, -1] / total
    values = torch.stack([average, *((first <= k).double() for k in RANKS), average_at_r, total / last], dim=-1)
    return values.masked_fill(total[..., None] == 0, math.nan)


def _score_text(query: Embeddings, gallery: Embeddings, kin: _Index) -> Scores:
    values = torch.full((len(query), len(KEYS)), math.nan, dtype=torch.float64)
    for rows, column, ahead in _scan(query, gallery, kin):
        values[rows] = _values(column >= 0, ahead)[:, 0]
    return Scores(values, query.item.cpu(), len(gallery))


def _as_embeddings(captions: Captions) -> Embeddings:
    """Captions as items of their own, whose image is none of anyone's."""
    none = torch.full((len(captions.embedding),), -1)
    return Embeddings(captions.embedding, torch.arange(len(none)), none, none)


def _draw(item: Tensor, num_splits: int, seed: int) -> Iterator[Tensor]:
    """For each split a mask (N,) with one random row of each item."""
    generator = torch.Generator().manual_seed(seed)
    codes, index = item.unique(return_inverse=True)
    for _ in range(num_splits):
        lot = torch.randperm(len(item), generator=generator)
        winner = torch.zeros(len(codes), dtype=lot.dtype).scatter_reduce(0, index, lot, "amax")
        yield lot == winner[index]


def _means(values: Tensor) -> dict[str, Any]:
    """Mean of each key, null over no query; `fsum` rounds once, so that the order of the queries cannot matter."""
    return {
        key: math.fsum(column) / len(column) if column else None
        for key, column in zip(KEYS, values.T.tolist(), strict=True)
    }


def _spread(values: list[float]) -> dict[str, Any]:
    if None in values:
        return {"mean": None, "std": None, "values": values}
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def _intervals(values: np.ndarray, item: np.ndarray, resamples: int, seed: int) -> dict[str, list[float] | None]:
    """Percentile bootstrap over items of the mean over queries."""
    codes, index = np.unique(item, return_inverse=True)
    if len(codes) < 2:
        return dict.fromkeys(KEYS)
    sums = np.zeros((len(codes), len(KEYS) + 1))
    np.add.at(sums, index, np.column_stack([values, np.ones(len(values))]))
    generator = np.random.default_rng(seed)
    drawn = np.stack([sums[generator.integers(len(codes), size=len(codes))].sum(0) for _ in range(resamples)])
    low, high = np.quantile(drawn[:, :-1] / drawn[:, -1:], (0.025, 0.975), axis=0)
    return {key: [float(a), float(b)] for key, a, b in zip(KEYS, low, high, strict=True)}


def _check_unit(embedding: Tensor) -> None:
    norm = embedding.detach().norm(dim=1)
    wrong = (~norm.isfinite()).nonzero().flatten()
    if len(wrong):
        raise UserError(
            f"{len(wrong)} of {len(embedding)} embeddings are not finite (the first is row {int(wrong[0])}): the model "
            "has diverged; go back to an earlier checkpoint or lower optimizer.lr"
        )
    assert embedding.dtype in (torch.float32, torch.float64) and bool(((norm - 1).abs() < 1e-3).all())
