"""How well a query finds its item: Rank-k, mAP, mAP@R and mINP from embeddings, exactly, without sorting the gallery.

Similarity is the cosine of unit embeddings. The rank of a positive is 1 + the gallery images with a strictly greater
similarity + those earlier in the gallery with an equal one. Among a query's positives that order is a short sort; what
remains is to count the images of *other* items ahead of each positive. A query has few positives, so counting what
passes each one's similarity, in a block of the similarity matrix that is still in the cache, costs a fraction of the
product that made the block. Same-variant, cross-variant and random-split metrics follow from the same counts.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from clipfh import UserError
from clipfh.report import bootstrap

RANKS = (1, 5, 10, 20, 30, 40, 50)
KEYS = ("mAP", *(f"rank{k}" for k in RANKS), "mAP_at_R", "mINP")
CURVE = 50  # length of the CMC curve
BLOCK = 2**23  # similarities held at once: they bound the memory and change no metric
PART = 2**20  # similarities looked at again and again while they are in the cache
TILE = 64  # rows and columns of a product come in multiples of this

Similarity = Callable[[Tensor], Tensor]
"""Function from query indices, (B,) on the CPU, to their rows of the similarity matrix, (B, G).

The caller owns the result and may overwrite it.
"""


@dataclass(frozen=True)
class Embeddings:
    """Queries or gallery: N unit vectors (float32 or float64, on any device) and codes of what the images show.

    UserError: an embedding is not finite (it would lose, or win, every comparison).
    """

    embedding: Tensor  # (N, D)
    item: Tensor  # (N,)
    variant: Tensor  # (N,), a code of the pair (item, variant)
    image: Tensor  # (N,), a code of the picture, at least 0: the same photo, and a copy of it, has the same code

    def __post_init__(self) -> None:
        assert len(self.embedding) == len(self.item) == len(self.variant) == len(self.image)
        _check_unit(self.embedding)

    def __len__(self) -> int:
        return len(self.item)

    def select(self, rows: Tensor) -> "Embeddings":
        """The rows named by an index or a mask, in that order."""
        codes = (code[rows.to(code.device)] for code in (self.item, self.variant, self.image))
        return Embeddings(self.embedding[rows.to(self.embedding.device)], *codes)

    def join(self, other: "Embeddings") -> "Embeddings":
        """These rows, then the other's."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Embeddings(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True)
class CaptionEmbeddings:
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
    first: Tensor  # (Q,), the rank of the nearest positive
    item: Tensor  # (Q,), what the bootstrap resamples
    num_gallery: int


def score(
    query: Embeddings, gallery: Embeddings, skip_unmatched: bool = False, similarity: Similarity | None = None
) -> tuple[Scores, Scores, Scores]:
    """Rank the gallery for each query in one pass, judged three ways: overall, same-variant, cross-variant.

    *Same-variant* ignores the item's images of other variants, *cross-variant* those of the query's variant: they are
    neither right nor wrong. A gallery row with the query's own picture is left out of all three. `similarity` takes the
    place of the cosine; for given similarities no digit depends on BLOCK, PART or the number of threads.
    UserError: a query has no image of its item to find, unless `skip_unmatched` (it then scores NaN).
    """
    tables = _empty_table(3, len(query))
    own, theirs = query.variant.cpu(), gallery.variant.cpu()
    for block in _blocks(query, gallery, _RowsByCode.of(gallery.item), similarity):
        positive, ahead = block.column >= 0, block.ahead()
        same = theirs[block.column] == own[block.rows, None]
        for table, relevant in zip(tables, (positive, positive & same, positive & ~same), strict=True):
            table[block.rows] = _values(relevant, ahead)
    unmatched = tables[0, :, 0].isnan().nonzero().flatten()
    if len(unmatched) and not skip_unmatched:
        raise UserError(
            f"{len(unmatched)} of {len(query)} queries (the first is query {int(unmatched[0])}) have no other image of "
            "their item in the gallery: correct the catalogue's splits, or ask for such queries to be left out"
        )
    overall, same_variant, cross_variant = (_as_scores(table, query, gallery) for table in tables)
    return overall, same_variant, cross_variant


def mean_average_precision(query: Embeddings, gallery: Embeddings) -> float:
    """The mAP alone, as validation during training wants it.

    Queries whose item has nothing else than copies of them in the gallery do not count. UserError: all are such.
    """
    overall, _, _ = score(query, gallery, skip_unmatched=True)
    values = overall.values[~overall.values[:, 0].isnan()]
    if not len(values):
        raise UserError(
            f"none of {len(query)} validation queries has another image of its item in the gallery that is no copy of "
            "it: add photos, or prepare without copies (clipfh audit lists them)"
        )
    return _means(values)["mAP"]


def cosine(query: Embeddings, gallery: Embeddings) -> Similarity:
    """The cosines of queries and gallery, each block in the memory of the last."""
    asking, answering = query.embedding.detach(), gallery.embedding.detach()
    buffer = answering.new_empty(0, len(gallery))

    def similarity(rows: Tensor) -> Tensor:
        nonlocal buffer
        if len(buffer) < len(rows) + TILE:
            buffer = answering.new_empty(len(rows) + TILE, len(gallery))
        return _product(asking.index_select(0, rows.to(asking.device)), answering, buffer)

    return similarity


def nearest(
    query: Embeddings, gallery: Embeddings, top: int, similarity: Similarity | None = None
) -> tuple[Tensor, Tensor]:
    """The first `top` gallery rows of each query as the metrics rank them, and their similarities.

    Both (Q, top at most), on the CPU. A query's own photo is left out: places without a row are -1 and -inf.
    """
    similarity, twins, parts = similarity or cosine(query, gallery), _RowsByCode.of(gallery.image), []
    for rows in blocks_of_rows(len(query), len(gallery)):
        block = similarity(rows)
        _drop(block, twins.rows(query.image.cpu()[rows]))
        parts.append([part.cpu() for part in largest(block, top)])
    column, level = (torch.cat(each) for each in zip(*parts, strict=True))
    return column.masked_fill_(level == -math.inf, -1), level


def blocks_of_rows(rows: int, columns: int) -> Iterator[Tensor]:
    """Numbers of rows, cut into blocks that have as many rows as a block of the similarity matrix."""
    yield from torch.arange(rows).split(_height(columns))


def largest(similarity: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Columns and values of the `top` greatest entries of each row (B, N), in order; of equal ones the earlier first.

    `topk` takes any of equal ones: where more of them are at the end than it has room for, the row is sorted whole.
    """
    level, column = similarity.topk(min(top, similarity.shape[1]))
    tied = ((similarity >= level[:, -1:]).sum(1) > level.shape[1]).nonzero().flatten()
    if len(tied):
        whole = similarity[tied].sort(dim=1, descending=True, stable=True)
        level[tied], column[tied] = (part[:, : level.shape[1]] for part in whole)
    column, order = column.sort(dim=1)
    level, order = level.gather(1, order).sort(dim=1, descending=True, stable=True)
    return column.gather(1, order), level


def summary(scores: Scores, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Means over the queries that have a positive, ready for JSON: `KEYS`, counts, `intervals` (key to [low, high]).

    `num_query` counts those queries, `num_unmatched` the others. An interval is the central 95% of a bootstrap over
    items: an item is drawn with all its queries. A mean over no query is null, as is an interval over one item.
    """
    has_positive = ~scores.values[:, 0].isnan()
    values, item = scores.values[has_positive], scores.item[has_positive]
    return {
        **_means(values),
        "num_query": len(values),
        "num_gallery": scores.num_gallery,
        "num_unmatched": len(has_positive) - len(values),
        "intervals": _intervals(values.numpy(), item.numpy(), resamples, seed),
    }


def gain(before: Scores, after: Scores, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`bootstrap.gain` from one model to another that was given the same queries."""
    old, new = (scores.values[:, 0].numpy() for scores in (before, after))
    return bootstrap.gain(old, new, before.item.numpy(), resamples, seed)


def cmc(scores: Scores, length: int = CURVE) -> list[float] | None:
    """The share of queries with a positive among the first 1, 2, ... `length`; null over no query, as in `summary`."""
    first = scores.first[~scores.first.isnan()]
    return [int((first <= k).sum()) / len(first) for k in range(1, length + 1)] if len(first) else None


def by_group(scores: Scores, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """mAP and rank1, with `num_query` and `intervals`, of the queries under each label; one label a query."""
    names, group = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    assert len(group) == len(scores.item)
    groups = {}
    for number, name in enumerate(names.tolist()):
        members = torch.from_numpy(group == number)
        whole = summary(replace(scores, values=scores.values[members], item=scores.item[members]))
        intervals = {key: whole["intervals"][key] for key in ("mAP", "rank1")}
        groups[name] = {key: whole[key] for key in ("mAP", "rank1", "num_query")} | {"intervals": intervals}
    return groups


def random_splits(images: Embeddings, num_splits: int = 10, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and values over random splits: one image of each item is a query, all others are
    the gallery.

    An image ranks all others once, in however many splits it is a query. A split only removes the other queries from
    the gallery, so their share of each count is subtracted. Items with a single image are left out of the means.
    """
    splits = list(_draw(images.item.cpu(), num_splits, seed))
    asking = torch.stack(splits).any(0).nonzero().flatten()
    tables = _empty_table(num_splits, len(asking))
    for block in _blocks(images.select(asking), images, _RowsByCode.of(images.item)):
        ahead = block.ahead()
        for is_query, table in zip(splits, tables, strict=True):
            mine = is_query[asking[block.rows]].nonzero().flatten()
            queries_ahead = block.ahead_among(mine, is_query.nonzero().flatten())
            table[block.rows[mine]] = _values(block.column[mine] >= 0, ahead[mine] - queries_ahead)
    means = [_means(table[~table[:, 0].isnan(), :-1]) for table in tables]
    return {key: _spread([mean[key] for mean in means]) for key in KEYS}


def text_to_image(captions: CaptionEmbeddings, images: Embeddings) -> dict[str, Any]:
    """`summary` with each distinct caption as a query: the images of every item that carries it are right."""
    carried = _RowsByCode.of(captions.item, captions.caption).rows(images.item.cpu())
    image, slot = (carried >= 0).nonzero(as_tuple=True)
    return summary(_score_text(_as_embeddings(captions), images, _RowsByCode.of(carried[image, slot], image)))


def image_to_text(images: Embeddings, captions: CaptionEmbeddings) -> dict[str, Any]:
    """`summary` with each image as a query, over the distinct captions: the ones that its item carries are right."""
    return summary(_score_text(images, _as_embeddings(captions), _RowsByCode.of(captions.item, captions.caption)))


def count_ahead(similarity: Tensor, order: Tensor, column: Tensor, level: Tensor) -> Tensor:
    """Number of entries of a row ahead of each of its thresholds, (B, P): the core of every metric.

    An entry is ahead where it is greater than the threshold, or equal to it in an earlier column. An example: query q
    has its item's images in the columns 1 and 4 of a gallery of six. They are the thresholds, and are -inf in the row:

        column            0    1    2    3    4    5
        similarity of q  .9   .8   .5   .8   .5   .1    threshold .8 in column 1: ahead is .9; .8 in column 3 is later
        as given         .9  -inf  .5   .8  -inf  .1    threshold .5 in column 4: ahead are .9, .8 and .5 in column 2
        ahead                 1              3          ranks: 1 + 0 positives + 1 = 2, and 1 + 1 positive + 3 = 5

    Args:
        similarity: (B, N), with -inf where an entry does not compete.
        order: (N,) numbers of its columns.
        column: (B, P) column of each threshold.
        level: (B, P) value of each threshold; +inf after the last of a row. Rows with most thresholds come first, which
            is not required, but saves time.
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
class _RowsByCode:
    """For each code the rows that bear it: pairs (code, row), sorted, without repeats, on the CPU."""

    code: Tensor  # (M,)
    row: Tensor  # (M + 1,), -1 at the end

    @classmethod
    def of(cls, code: Tensor, row: Tensor | None = None) -> "_RowsByCode":
        code, row = code.cpu(), torch.arange(len(code)) if row is None else row.cpu()
        order = torch.from_numpy(np.lexsort((row.numpy(), code.numpy())))
        code, row = code[order], row[order]
        new = torch.ones(len(code), dtype=torch.bool)
        new[1:] = (code[1:] != code[:-1]) | (row[1:] != row[:-1])
        return cls(code[new], pad(row[new], (0, 1), value=-1))

    def count(self, codes: Tensor) -> Tensor:
        """Number of rows that bear each code."""
        return torch.searchsorted(self.code, codes, right=True) - torch.searchsorted(self.code, codes)

    def rows(self, codes: Tensor) -> Tensor:
        """The rows that bear each code, ascending, then -1: (len(codes), most rows of a code, at least 1)."""
        count = self.count(codes)[:, None]
        slot = torch.arange(max(1, int(count.max())))
        place = torch.searchsorted(self.code, codes)[:, None] + slot
        return self.row[place.clamp(max=len(self.code))].masked_fill_(slot >= count, -1)


@dataclass(frozen=True)
class _Block:
    """A block of queries with the whole gallery."""

    rows: Tensor  # (B,), which queries, on the CPU
    column: Tensor  # (B, P), their positives from the nearest down, in gallery order if equal, then -1; on the CPU
    level: Tensor  # (B, P), the similarities of the positives, then +inf
    similarity: Tensor  # (B, N), -inf at the positives and at the query's own image: here they compete with nobody

    def ahead(self) -> Tensor:
        """Number of images of other items ahead of each positive, (B, P), on the CPU."""
        order = torch.arange(self.similarity.shape[1], device=self.level.device)
        return count_ahead(self.similarity, order, self.column.to(self.level.device), self.level).cpu()

    def ahead_among(self, mine: Tensor, columns: Tensor) -> Tensor:
        """`ahead` for the rows `mine` of the block, with only the gallery's `columns` counted: (len(mine), P)."""
        device = self.level.device
        here, among = mine.to(device), columns.to(device)
        part = self.similarity.index_select(0, here).index_select(1, among)
        return count_ahead(part, among, self.column[mine].to(device), self.level[here]).cpu()


def _blocks(
    query: Embeddings, gallery: Embeddings, kin: _RowsByCode, similarity: Similarity | None = None
) -> Iterator[_Block]:
    """The similarity matrix block by block. `kin`: the gallery rows of each item."""
    assert len(query) and 0 < len(gallery) < 2**24
    similarity = similarity or cosine(query, gallery)
    item, photo, photos, twins = query.item.cpu(), query.image.cpu(), gallery.image.cpu(), _RowsByCode.of(gallery.image)
    # Queries with equally many positives stand together, so that each slot of `count_ahead` is about full or empty.
    for rows in kin.count(item).argsort(descending=True, stable=True).split(_height(len(gallery))):
        block = similarity(rows)
        positives = kin.rows(item[rows])
        positives.masked_fill_(photos[positives] == photo[rows, None], -1)
        column, level = _descending(block, positives.to(block.device))
        for dropped in (column, twins.rows(photo[rows])):
            _drop(block, dropped)
        yield _Block(rows, column.cpu(), level, block)


def _height(columns: int) -> int:
    """How many rows a block of `columns` columns has."""
    return max(1, BLOCK // columns // TILE) * TILE


def _drop(similarity: Tensor, columns: Tensor) -> None:
    """Take each row's columns, (B, P) with -1 for none, out of the ranking."""
    row, slot = (columns >= 0).nonzero(as_tuple=True)
    column = columns[row, slot].to(similarity.device)
    similarity[row.to(similarity.device), column] = -math.inf


def _product(query: Tensor, gallery: Tensor, buffer: Tensor) -> Tensor:
    """Similarities (B, N), written into the buffer, from products of whole tiles.

    At a ragged edge a BLAS adds in another order: equal images would then differ in the last digit by where they stand,
    and all results by the size of the block. In float64 whole tiles don't suffice: by processor and threads MKL adds
    in another order within a product too. (`out` also keeps a caller's autocast from rounding.)
    """
    whole = len(gallery) // TILE * TILE
    rows = pad(query, (0, 0, 0, -len(query) % TILE))
    edge = pad(gallery[whole:], (0, 0, 0, whole + TILE - len(gallery)))
    similarity = buffer[: len(rows)]
    _multiply(rows, gallery[:whole].T, similarity[:, :whole])
    corner = rows.new_empty(len(rows), TILE)
    _multiply(rows, edge.T, corner)
    similarity[:, whole:] = corner[:, : len(gallery) - whole]
    return similarity[: len(query)]


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Multiply; on a CPU by oneDNN, which comes with torch: MKL takes half as long again on processors not by Intel.

    torch has no public name for it that leaves float32 as precise as it is and copies nothing.
    """
    one_dnn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if one_dnn and left.device.type == "cpu" and left.dtype == torch.float32:
        out.copy_(torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], ""))
    else:
        torch.mm(left, right, out=out)


def _descending(similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """The columns and similarities of each row's positives from the nearest down, and after them -1 and +inf."""
    level = similarity.gather(1, positives.clamp(min=0)).masked_fill_(positives < 0, -math.inf)
    level, order = level.sort(dim=1, descending=True, stable=True)
    column = positives.gather(1, order)
    return column, level.masked_fill_(column < 0, math.inf)


def _values(relevant: Tensor, ahead: Tensor) -> Tensor:
    """`KEYS` of each query and the rank of its nearest positive, (B, len(KEYS) + 1).

    `relevant`, (B, P) bool: which images of the query's item, in descending order of similarity, count as positives;
    the others are ignored. `ahead`, (B, P): number of images of other items before each. mAP@R: Musgrave et al. (arXiv
    2003.08505). mINP: Ye et al. (arXiv 2001.04193).
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
    hits = [(first <= k).double() for k in RANKS]
    values = torch.stack([average, *hits, average_at_r, total / last, first], dim=1)
    return values.masked_fill(total[:, None] == 0, math.nan)


def _empty_table(*shape: int) -> Tensor:
    """A table of NaN for the results of `_values`."""
    return torch.full((*shape, len(KEYS) + 1), math.nan, dtype=torch.float64)


def _as_scores(table: Tensor, query: Embeddings, gallery: Embeddings) -> Scores:
    return Scores(table[:, :-1], table[:, -1], query.item.cpu(), len(gallery))


def _score_text(query: Embeddings, gallery: Embeddings, kin: _RowsByCode) -> Scores:
    table = _empty_table(len(query))
    for block in _blocks(query, gallery, kin):
        table[block.rows] = _values(block.column >= 0, block.ahead())
    return _as_scores(table, query, gallery)


def _as_embeddings(captions: CaptionEmbeddings) -> Embeddings:
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
    numbers = [value for value in values if value is not None]
    mean = statistics.fmean(numbers) if numbers else None
    return {"mean": mean, "std": statistics.stdev(numbers) if len(numbers) > 1 else None, "values": values}


def _intervals(values: np.ndarray, item: np.ndarray, resamples: int, seed: int) -> dict[str, list[float] | None]:
    """Ends of each key's interval; null over one item."""
    ends = bootstrap.interval(values, item, resamples, seed)
    return dict.fromkeys(KEYS) if ends is None else dict(zip(KEYS, ends.T.tolist(), strict=True))


def _check_unit(embedding: Tensor) -> None:
    norm = embedding.detach().norm(dim=1)
    wrong = (~norm.isfinite()).nonzero().flatten()
    if len(wrong):
        raise UserError(
            f"{len(wrong)} of {len(embedding)} embeddings are not finite (the first is row {int(wrong[0])}): the model "
            "has diverged; go back to an earlier checkpoint or lower optimizer.lr"
        )
    assert embedding.dtype in (torch.float32, torch.float64) and bool(((norm - 1).abs() < 1e-3).all())
