"""K-reciprocal re-ranking (Zhong et al. 2017, arXiv 1701.08398): images are near whose neighbourhoods are alike.

Neighbours are sought among all images, queries and gallery; each image is its own first neighbour, as in the authors'
code. Sets, weights and distances are the paper's. Memory holds the sparse neighbourhoods and a block of similarities:
it grows with the number of images (some KiB each), not with its square.

An example with K1 = 2, for the image 0 (the names are those of the functions below):

    _find_neighbours    0: 0 1 2      1: 1 0 3      2: 2 4 5        each image and its two nearest
    _keep_reciprocal    0: 0 1 -      1 has 0 among its own, so it stays; 2 has not, so it goes: R(0, 2) = {0, 1}
    _extend             0: 0 1 -      a member's half-size set R(q, 1) joins if two thirds of it are in R(0, 2)
    _weigh_...          0: 1.0 at 0, exp(-d(0, 1)) at 1, and 0 elsewhere, with d the squared distance
    _expand_queries     each row becomes the mean of the rows of its K2 nearest images

The Jaccard distance of two images compares their rows: 1 - (sum of minima) / (sum of maxima). For the rows (1, .5, 0)
and (.5, 1, 0) that is 1 - (.5 + .5) / (1 + 1) = .5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfh.retrieval import metrics
from clipfh.retrieval.metrics import Embeddings, Similarity

K1, K2, LAMBDA = 20, 6, 0.3  # as in the paper; K2 is at most K1 + 1
ROWS = 64  # images looked at together


def rerank(query: Embeddings, gallery: Embeddings) -> Similarity:
    """The similarity - ((1 - LAMBDA) Jaccard distance of the neighbourhoods + LAMBDA squared Euclidean distance).

    It depends on all queries together. A photo that is both query and gallery is one image among the neighbours.
    """
    images, place = _distinct(query, gallery)
    neighbours = _find_neighbours(images)
    weights = _expand_queries(_weigh_neighbourhoods(images, neighbours), neighbours[:, :K2])
    query_weights, gallery_weights = (weights.select(rows) for rows in place.split([len(query), len(gallery)]))
    by_member, cosine = gallery_weights.transposed(len(images)), metrics.cosine(query, gallery)
    sums = gallery_weights.sums()

    def similarity(rows: Tensor) -> Tensor:
        squared = cosine(rows).mul_(-2).add_(2)
        for few, part in zip(rows.split(ROWS), squared.split(ROWS), strict=True):
            part.mul_(-LAMBDA).sub_(_jaccard(query_weights.select(few), by_member, sums).to(part), alpha=1 - LAMBDA)
        return squared

    return similarity


def _distinct(query: Embeddings, gallery: Embeddings) -> tuple[Embeddings, Tensor]:
    """Each photo once; and the place of each query, then of each gallery row, among these photos."""
    both = query.join(gallery)
    codes, place = both.image.cpu().unique(return_inverse=True)
    number = torch.arange(len(place))
    first = torch.full((len(codes),), len(place)).scatter_reduce(0, place, number, "amin")
    return both.select(first), place


def _find_neighbours(images: Embeddings) -> Tensor:
    """Each image and its K1 nearest, (N, K1 + 1 or N)."""
    similarity, nearest = metrics.cosine(images, images), []
    for rows in metrics.blocks_of_rows(len(images), len(images)):
        block = similarity(rows)
        block[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(metrics.largest(block, K1 + 1)[0].cpu())
    return torch.cat(nearest)


def _keep_reciprocal(neighbours: Tensor) -> Tensor:
    """R(p, k): the neighbours that have the image p among their own neighbours, the others -1; (N, k + 1)."""
    parts = []
    for rows in torch.arange(len(neighbours)).split(ROWS):
        theirs = neighbours[neighbours[rows]]
        mutual = (theirs == rows[:, None, None]).any(2)
        parts.append(neighbours[rows].masked_fill(~mutual, -1))
    return torch.cat(parts)


def _weigh_neighbourhoods(images: Embeddings, neighbours: Tensor) -> "_Sparse":
    """V before expansion, (N, N): exp(-squared distance) at the members of R*(p, K1)."""
    full, half = _keep_reciprocal(neighbours), _keep_reciprocal(neighbours[:, : K1 // 2 + 1])
    size, vectors, parts = len(neighbours), images.embedding.detach(), []
    for rows in torch.arange(size).split(ROWS):
        members = _extend(full[rows], half)
        pair = (rows[:, None] * size + members)[members >= 0].unique()
        row, column = ((vectors.index_select(0, each.to(vectors.device))) for each in (pair // size, pair % size))
        parts.append((pair, (2 * (row * column).double().sum(1) - 2).exp().cpu()))
    pair, weight = (torch.cat(each) for each in zip(*parts, strict=True))
    return _Sparse.of(pair // size, pair % size, weight, size)


def _extend(own: Tensor, half: Tensor) -> Tensor:
    """R*(p, k): R(p, k) joined by R(q, k / 2) of each member q that has two thirds or more in R(p, k); -1 is none."""
    theirs = half[own].masked_fill(own[:, :, None] < 0, -1)
    there = theirs >= 0
    shared = ((theirs[..., None] == own[:, None, None]).any(3) & there).sum(2)
    akin = 3 * shared >= 2 * there.sum(2)
    return torch.cat([own, theirs.masked_fill(~akin[:, :, None], -1).flatten(1)], dim=1)


def _expand_queries(weights: "_Sparse", neighbours: Tensor) -> "_Sparse":
    """Local query expansion: the mean of the weights of each image's neighbours, which include the image itself."""
    (size, number), parts = neighbours.shape, []
    for rows in torch.arange(size).split(ROWS):
        slot, column, weight = weights.entries(neighbours[rows].flatten())
        pair, place = (rows[slot // number] * size + column).unique(return_inverse=True)
        parts.append((pair, place.bincount(weight) / number))
    pair, weight = (torch.cat(each) for each in zip(*parts, strict=True))
    return _Sparse.of(pair // size, pair % size, weight, size)


def _jaccard(query_weights: "_Sparse", by_member: "_Sparse", sums: Tensor) -> Tensor:
    """1 - sum of minima / sum of maxima of the weights of Q queries and G gallery images, (Q, G), float64.

    Args:
        query_weights: (Q, N) weights of the queries.
        by_member: (N, G) weights of the gallery, transposed.
        sums: (G,) sum of the weights of each gallery image.
    """
    num_query, num_gallery = len(query_weights.count), len(sums)
    slot, member, weight = query_weights.entries(torch.arange(num_query))
    entry, gallery, other = by_member.entries(member)
    pair = slot[entry] * num_gallery + gallery
    minima = pair.bincount(torch.minimum(weight[entry], other), minlength=num_query * num_gallery)
    minima = minima.view(num_query, num_gallery)
    return 1 - minima / (query_weights.sums()[:, None] + sums - minima)


@dataclass(frozen=True)
class _Sparse:
    """A sparse matrix by rows, on the CPU. (torch's own has no minimum, and warns that it is in beta.)"""

    start: Tensor  # (R,), where a row begins
    count: Tensor  # (R,)
    column: Tensor  # (E,)
    weight: Tensor  # (E,), float64

    @classmethod
    def of(cls, row: Tensor, column: Tensor, weight: Tensor, rows: int) -> "_Sparse":
        """Make the matrix from entries in the order of their rows."""
        count = row.bincount(minlength=rows)
        return cls(count.cumsum(0) - count, count, column, weight)

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All entries of these rows: the place of the row in `rows`, the column, the weight."""
        count = self.count[rows]
        slot = torch.arange(len(rows)).repeat_interleave(count)
        entry = torch.arange(len(slot)) + (self.start[rows] - count.cumsum(0) + count)[slot]
        return slot, self.column[entry], self.weight[entry]

    def select(self, rows: Tensor) -> "_Sparse":
        return _Sparse.of(*self.entries(rows), len(rows))

    def transposed(self, columns: int) -> "_Sparse":
        row, column, weight = self.entries(torch.arange(len(self.count)))
        order = column.argsort(stable=True)
        return _Sparse.of(column[order], row[order], weight[order], columns)

    def sums(self) -> Tensor:
        """Sum of each row, (R,)."""
        slot, _, weight = self.entries(torch.arange(len(self.count)))
        return slot.bincount(weight, minlength=len(self.count))
