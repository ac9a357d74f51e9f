"""How well a query finds its item: Rank-k, mAP, mAP@R and mINP from embeddings, exactly, without sorting the gallery.

Similarity is the cosine of unit embeddings. The rank of a positive is 1 + the gallery images with a strictly greater
similarity + those earlier in the gallery with an equal one. Among a query's positives that order is a short sort; what
remains is to count the images of *other* items ahead of each positive. A query has few positives, so counting what
passes each one's similarity, in a block of the similarity matrix that is still in the cache, costs a fraction of the
product that made the block. Same-variant, cross-variant and random-split figures follow from the same counts.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from clipfh import UserError

RANKS = (1, 5, 10, 20, 30, 40, 50)
KEYS = ("mAP", *(f"rank{k}" for k in RANKS), "mAP_at_R", "mINP")
BLOCK = 2**23  # similarities held at once: they bound the memory and change no figure
PART = 2**20  # similarities looked at again and again while they are in the cache
TILE = 64  # rows and columns of a product come in multiples of this


@dataclass(frozen=True)
class Embeddings:
    """Images that ask or answer: N unit vectors (float32 or float64, on any device) and codes of what they show.

    UserError: an embedding is not finite (it would lose, or win, every comparison).
    """

    embedding: Tensor  # (N, D)
    item: Tensor  # (N,)
    variant: Tensor  # (N,), a code of the pair (item, variant)
    image: Tensor  # (N,), a code of the path, at least 0: the same photo has the same code

    def __post_init__(self) -> None:
        assert len(self.embedding) == len(self.item) == len(self.variant) == len(self.image)
        _check_unit(self.embedding)

    def __len__(self) -> int:
        return len(self.item)

    def select(self, rows: Tensor) -> "Embeddings":
        """The rows named by an index or a mask, in that order."""
        codes = (code[rows.to(code.device)] for code in (self.item, self.variant, self.image))
        return Embeddings(self.embedding[rows.to(self.embedding.device)], *codes)


@dataclass(frozen=True)
class Captions:
    """C distinct captions (unit vectors) and the M pairs (item, caption) that say who carries which; pairs may repeat.

    Captions that read alike are one row here, however many items carry them. UserError: as `Embeddings`.
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
    """Rank the gallery for each query in one pass, judged three ways: overall, same-variant, cross-variant.

    *Same-variant* ignores the item's images of other variants, *cross-variant* those of the query's variant: they are
    neither right nor wrong. A gallery row with the query's own path is left out of all three.
    UserError: a query has no image of its item to find, unless `skip_unmatched` (it then scores NaN).
    """
    tables = _empty_table(3, len(query))
    own, theirs = query.variant.cpu(), gallery.variant.cpu()
    for block in _blocks(query, gallery, _Index.of(gallery.item)):
        found, ahead = block.column >= 0, block.ahead()
        same = theirs[block.column] == own[block.rows, None]
        for table, relevant in zip(tables, (found, found & same, found & ~same), strict=True):
            table[block.rows] = _values(relevant, ahead)
    unmatched = tables[0, :, 0].isnan().nonzero().flatten()
    if len(unmatched) and not skip_unmatched:
        raise UserError(
            f"{len(unmatched)} of {len(query)} queries (the first is query {int(unmatched[0])}) have no other image of "
            "their item in the gallery: correct the catalogue's splits, or ask for such queries to be left out"
        )
    overall, same_variant, cross_variant = (Scores(table, query.item.cpu(), len(gallery)) for table in tables)
    return overall, same_variant, cross_variant


def mean_average_precision(query: Embeddings, gallery: Embeddings) -> float:
    """The mAP alone, as validation during training wants it. UserError: as `score`."""
    overall, _, _ = score(query, gallery)
    return _means(overall.values)["mAP"]


def summary(scores: Scores, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Means over the queries that have a positive, ready for JSON: `KEYS`, counts, `intervals` (key to [low, high]).

    `num_query` counts those queries, `num_unmatched` the others. An interval is the central 95% of a bootstrap over
    items: an item is drawn with all its queries. A figure over no query is null, an interval over one item as well.
    """
    scored = ~scores.values[:, 0].isnan()
    values, item = scores.values[scored], scores.item[scored]
    return {
        **_means(values),
        "num_query": len(values),
        "num_gallery": scores.num_gallery,
        "num_unmatched": len(scored) - len(values),
        "intervals": _intervals(values.numpy(), item.numpy(), resamples, seed),
    }


def by_group(scores: Scores, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """mAP and rank1, with `num_query` and `intervals`, of the queries under each label; one label a query."""
    names, group = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    assert len(group) == len(scores.item)
    groups = {}
    for number, name in enumerate(names.tolist()):
        chosen = torch.from_numpy(group == number)
        whole = summary(Scores(scores.values[chosen], scores.item[chosen], scores.num_gallery))
        intervals = {key: whole["intervals"][key] for key in ("mAP", "rank1")}
        groups[name] = {key: whole[key] for key in ("mAP", "rank1", "num_query")} | {"intervals": intervals}
    return groups


def random_splits(images: Embeddings, num_splits: int = 10, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and values over random splits: one image of each item asks, all others answer.

    An image ranks all others once, however many splits it asks in: a split only takes away the other images that ask
    in it, so their share of each count is taken off. Items with a single image are left out of the means.
    """
    splits = list(_draw(images.item.cpu(), num_splits, seed))
    asking = torch.stack(splits).any(0).nonzero().flatten()
    tables = _empty_table(num_splits, len(asking))
    for block in _blocks(images.select(asking), images, _Index.of(images.item)):
        ahead = block.ahead()
        for drawn, table in zip(splits, tables, strict=True):
            mine = drawn[asking[block.rows]].nonzero().flatten()
            gone = block.ahead_among(mine, drawn.nonzero().flatten())
            table[block.rows[mine]] = _values(block.column[mine] >= 0, ahead[mine] - gone)
    means = [_means(table[~table[:, 0].isnan()]) for table in tables]
    return {key: _spread([mean[key] for mean in means]) for key in KEYS}


def text_to_image(captions: Captions, images: Embeddings) -> dict[str, Any]:
    """`summary` with each distinct caption as a query: right are the images of every item that carries it."""
    carried = _Index.of(captions.item, captions.caption).rows(images.item.cpu())
    image, slot = (carried >= 0).nonzero(as_tuple=True)
    return summary(_score_text(_as_embeddings(captions), images, _Index.of(carried[image, slot], image)))


def image_to_text(images: Embeddings, captions: Captions) -> dict[str, Any]:
    """`summary` with each image as a query, over the distinct captions: right are those that its item carries."""
    return summary(_score_text(images, _as_embeddings(captions), _Index.of(captions.item, captions.caption)))


def count_ahead(similarity: Tensor, order: Tensor, column: Tensor, level: Tensor) -> Tensor:
    """How many entries of a row stand ahead of each of its thresholds, (B, P): the core of every figure.

    Ahead are entries greater than the threshold, and those equal to it in an earlier column.
    similarity: (B, N). order: (N,), the numbers of its columns. column, level: (B, P), the column and the height of
    each threshold; +inf after the last of a row. Rows with most thresholds are best put first.
    """
    few = max(1, PART // similarity.shape[1])
    parts = zip(similarity.split(few), column.split(few), level.split(few), strict=True)
    return torch.cat([_count_part(part, order, *thresholds) for part, *thresholds in parts])


def _count_part(similarity: Tensor, order: Tensor, column: Tensor, level: Tensor) -> Tensor:
    ahead, equal = level.new_zeros(2, level.shape[1], len(level))
    flags = torch.empty_like(similarity)
    number = torch.arange(len(level) + 1, device=level.device)[:, None]
    last = (pad(level < math.inf, (0, 0, 1, 0)) * number).amax(0).tolist()  # for each slot, the last row that has it
    for slot, rows in enumerate(takewhile(bool, last)):
        block, flag, threshold = similarity[:rows], flags[:rows], level[:rows, slot, None]
        # Comparisons written as floats are summed several times faster than booleans; below 2**24 they are exact.
        torch.sum(torch.gt(block, threshold, out=flag), 1, out=ahead[slot, :rows])
        torch.sum(torch.eq(block, threshold, out=flag), 1, out=equal[slot, :rows])
    for slot in equal.any(1).nonzero().flatten().tolist():
        tied = equal[slot].nonzero().flatten()
        same = similarity.index_select(0, tied) == level[tied, slot, None]
        ahead[slot, tied] += (same & (order < column[tied, slot, None])).sum(1)
    return ahead.T


@dataclass(frozen=True)
class _Index:
    """Pairs of a code and a row that bears it, sorted, each once, on the CPU."""

    code: Tensor  # (M,)
    row: Tensor  # (M + 1,), -1 at the end

    @classmethod
    def of(cls, code: Tensor, row: Tensor | None = None) -> "_Index":
        code, row = code.cpu(), torch.arange(len(code)) if row is None else row.cpu()
        order = torch.from_numpy(np.lexsort((row.numpy(), code.numpy())))
        code, row = code[order], row[order]
        new = torch.ones(len(code), dtype=torch.bool)
        new[1:] = (code[1:] != code[:-1]) | (row[1:] != row[:-1])
        return cls(code[new], pad(row[new], (0, 1), value=-1))

    def count(self, wanted: Tensor) -> Tensor:
        """How many rows bear each wanted code."""
        return torch.searchsorted(self.code, wanted, right=True) - torch.searchsorted(self.code, wanted)

    def rows(self, wanted: Tensor) -> Tensor:
        """The rows that bear each wanted code, ascending, then -1: (len(wanted), most rows of one, at least 1)."""
        count = self.count(wanted)[:, None]
        slot = torch.arange(max(1, int(count.max())))
        place = torch.searchsorted(self.code, wanted)[:, None] + slot
        return self.row[place.clamp(max=len(self.code))].masked_fill_(slot >= count, -1)


@dataclass(frozen=True)
class _Block:
    """Some queries before the whole gallery."""

    rows: Tensor  # (B,), which queries, on the CPU
    column: Tensor  # (B, P), their positives from the nearest down, in gallery order if equal, then -1; on the CPU
    level: Tensor  # (B, P), the similarities of the positives, then +inf
    similarity: Tensor  # (B, N), -inf at the positives and at the query's own image: here they compete with nobody

    def ahead(self) -> Tensor:
        """How many images of other items are ahead of each positive, (B, P), on the CPU."""
        order = torch.arange(self.similarity.shape[1], device=self.level.device)
        return count_ahead(self.similarity, order, self.column.to(self.level.device), self.level).cpu()

    def ahead_among(self, mine: Tensor, columns: Tensor) -> Tensor:
        """The same for some rows of the block, counting only some columns of the gallery, (len(mine), P)."""
        device = self.level.device
        here, among = mine.to(device), columns.to(device)
        part = self.similarity.index_select(0, here).index_select(1, among)
        return count_ahead(part, among, self.column[mine].to(device), self.level[here]).cpu()


def _blocks(query: Embeddings, gallery: Embeddings, kin: _Index) -> Iterator[_Block]:
    """The similarity matrix block by block, each in the memory of the last. kin: the gallery rows of each item."""
    asking, answering = query.embedding.detach(), gallery.embedding.detach()
    assert len(query) and 0 < len(gallery) < 2**24
    item, photo, photos, twins = query.item.cpu(), query.image.cpu(), gallery.image.cpu(), _Index.of(gallery.image)
    height = max(1, BLOCK // len(gallery) // TILE) * TILE
    buffer = answering.new_empty(min(height, len(query) + TILE), len(gallery))
    # Queries with as many positives stand together, so that each slot of `count_ahead` is about full or empty.
    for rows in kin.count(item).argsort(descending=True, stable=True).split(height):
        similarity = _product(asking.index_select(0, rows.to(asking.device)), answering, buffer)
        positives = kin.rows(item[rows])
        positives.masked_fill_(photos[positives] == photo[rows, None], -1)
        column, level = _descending(similarity, positives.to(asking.device))
        for dropped in (column, twins.rows(photo[rows]).to(asking.device)):
            row, slot = (dropped >= 0).nonzero(as_tuple=True)
            similarity[row, dropped[row, slot]] = -math.inf
        yield _Block(rows, column.cpu(), level, similarity)


def _product(query: Tensor, gallery: Tensor, buffer: Tensor) -> Tensor:
    """Similarities (B, N), written into the buffer, from products of whole tiles.

    At a ragged edge a BLAS adds in another order: equal images would then differ in the last digit by where they stand,
    and all results by the size of the block. (`out` also keeps an autocast around us from rounding.)
    """
    whole = len(gallery) // TILE * TILE
    rows = pad(query, (0, 0, 0, -len(query) % TILE))
    edge = pad(gallery[whole:], (0, 0, 0, whole + TILE - len(gallery)))
    similarity = buffer[: len(rows)]
    torch.mm(rows, gallery[:whole].T, out=similarity[:, :whole])
    corner = torch.mm(rows, edge.T, out=rows.new_empty(len(rows), TILE))
    similarity[:, whole:] = corner[:, : len(gallery) - whole]
    return similarity[: len(query)]


def _descending(similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """The columns and similarities of each row's positives from the nearest down, and after them -1 and +inf."""
    level = similarity.gather(1, positives.clamp(min=0)).masked_fill_(positives < 0, -math.inf)
    level, order = level.sort(dim=1, descending=True, stable=True)
    column = positives.gather(1, order)
    return column, level.masked_fill_(column < 0, math.inf)


def _values(relevant: Tensor, ahead: Tensor) -> Tensor:
    """`KEYS` of each query, (B, len(KEYS)), from its item's images in descending order of similarity.

    relevant: (B, P) bool, those that count as positives, the others being ignored. ahead: (B, P), how many images of
    other items precede each. mAP@R is of Musgrave et al. (arXiv 2003.08505), mINP of Ye et al. (arXiv 2001.04193).
    """
    position = relevant.cumsum(1)
    total = position[:, -1]
    rank = (position + ahead).double()
    precision = (position / rank).masked_fill(~relevant, 0)
    first = rank.masked_fill(~relevant, math.inf).amin(1)
    last = rank.masked_fill(~relevant, 0).amax(1)
    # A running sum adds in order, so that the width of the padding cannot change a digit.
    average = precision.cumsum(1)[:, -1] / total
    average_at_r = precision.masked_fill(rank > total[:, None], 0).cumsum(1)[:, -1] / total
    values = torch.stack([average, *((first <= k).double() for k in RANKS), average_at_r, total / last], dim=1)
    return values.masked_fill(total[:, None] == 0, math.nan)


def _empty_table(*shape: int) -> Tensor:
    return torch.full((*shape, len(KEYS)), math.nan, dtype=torch.float64)


def _score_text(query: Embeddings, gallery: Embeddings, kin: _Index) -> Scores:
    table = _empty_table(len(query))
    for block in _blocks(query, gallery, kin):
        table[block.rows] = _values(block.column >= 0, block.ahead())
    return Scores(table, query.item.cpu(), len(gallery))


def _as_embeddings(captions: Captions) -> Embeddings:
    """Each caption as an item of its own, and no photo."""
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
    columns = zip(KEYS, values.T.tolist(), strict=True)
    return {key: math.fsum(column) / len(column) if column else None for key, column in columns}


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return {"mean": mean, "std": statistics.stdev(known) if len(known) > 1 else None, "values": values}


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
