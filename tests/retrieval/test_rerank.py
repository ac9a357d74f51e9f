"""Re-ranking against the paper's definitions, one pair of images at a time."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfh.retrieval import metrics, rerank
from clipfh.retrieval.metrics import Embeddings


def slow_similarity(query, gallery):
    """-d*(p, g), from sets of neighbours and vectors of weights."""
    images, place = rerank._distinct(query, gallery)
    photo = images.image.tolist()
    assert sorted(photo) == sorted({*query.image.tolist(), *gallery.image.tolist()})
    matrix = metrics.cosine(images, images)(
        torch.arange(len(images))
    ).tolist()  # with its rounding: equal ones are equal
    cosine = {(p, g): value for p, row in zip(photo, matrix, strict=True) for g, value in zip(photo, row, strict=True)}
    ranking = {p: sorted(photo, key=lambda g, p=p: (g != p, -cosine[p, g], g)) for p in photo}

    def near(p, k):  # N(p, k)
        return set(ranking[p][: k + 1])

    def reciprocal(p, k):  # R(p, k)
        return {g for g in near(p, k) if p in near(g, k)}

    def extended(p):  # R*(p, k1)
        own = reciprocal(p, rerank.K1)
        halves = [reciprocal(q, rerank.K1 // 2) for q in own]
        return own.union(*(half for half in halves if 3 * len(own & half) >= 2 * len(half)))

    def squared(p, g):
        return 2 - 2 * cosine[p, g]

    sets = {p: extended(p) for p in photo}
    weight = {p: [math.exp(-squared(p, g)) if g in sets[p] else 0.0 for g in photo] for p in photo}
    mean = {p: torch.tensor([weight[n] for n in ranking[p][: rerank.K2]], dtype=torch.float64).mean(0) for p in photo}

    def final(p, g):
        jaccard = 1 - torch.minimum(mean[p], mean[g]).sum() / torch.maximum(mean[p], mean[g]).sum()
        return (1 - rerank.LAMBDA) * jaccard + rerank.LAMBDA * squared(p, g)

    return -torch.tensor(
        [[final(p, g) for g in gallery.image.tolist()] for p in query.image.tolist()], dtype=torch.float64
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reranked_equals_the_papers_definitions(data):
    """Few images and many, clustered; equal ones; photos that both ask and answer."""
    size, seed = data.draw(st.integers(2, 40)), data.draw(st.integers(0, 2**30))
    generator = torch.Generator().manual_seed(seed)
    item = torch.randint(max(1, size // 5), (size,), generator=generator)
    centre = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    noise = data.draw(st.sampled_from([0.0, 0.5, 2.0]))
    vectors = centre[item] + noise * torch.randn(size, 6, generator=generator, dtype=torch.float64)
    images = Embeddings(torch.nn.functional.normalize(vectors), item, item, torch.arange(size))
    asks, answers = (torch.rand(size, generator=generator) < 0.6 for _ in range(2))
    asks[0] = answers[-1] = True
    query, gallery = images.select(asks), images.select(answers)
    sizes = {"K1": data.draw(st.sampled_from([5, 6, 20])), "K2": data.draw(st.integers(1, 6))}
    with mock.patch.multiple(rerank, ROWS=data.draw(st.integers(1, 50)), **sizes):
        similarity = rerank.rerank(query, gallery)
        found = torch.cat([similarity(rows).clone() for rows in torch.arange(len(query)).split(7)])
        torch.testing.assert_close(found, slow_similarity(query, gallery), rtol=0, atol=1e-9)


def test_reranking_finds_more_where_items_are_clusters():
    generator = torch.Generator().manual_seed(0)
    item = torch.arange(60).repeat(12)
    vectors = torch.randn(60, 64, generator=generator)[item] + 1.6 * torch.randn(720, 64, generator=generator)
    images = Embeddings(torch.nn.functional.normalize(vectors), item, item, torch.arange(720))
    query, gallery = images.select(torch.arange(240)), images.select(torch.arange(240, 720))
    similarity = rerank.rerank(query, gallery)
    found = metrics.summary(metrics.score(query, gallery, similarity=similarity)[0])
    assert found["mAP"] > metrics.mean_average_precision(query, gallery) + 0.03
    column, _ = metrics.nearest(query, gallery, 3, similarity)
    assert (gallery.item[column[:, 0]] == query.item).double().mean().item() == pytest.approx(found["rank1"])
