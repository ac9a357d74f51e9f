"""Intervals of a mean over queries: percentile bootstrap over items, since the queries of an item go together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DRAWS = 2**20
"""Items drawn at once, which bounds the memory and changes no digit."""


def interval(values: np.ndarray, item: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray | None:
    """Central 95% interval of the mean of each column.

    Args:
        values: (Q, K), a row for each query.
        item: (Q,), code of the query's item; an item is drawn with all its queries.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        Low and high ends, (2, K); None over fewer than two items.
    """
    codes, index = np.unique(item, return_inverse=True)
    if len(codes) < 2:
        return None
    sums = np.zeros((len(codes), values.shape[1] + 1))
    np.add.at(sums, index, np.column_stack([values, np.ones(len(values))]))
    generator, few = np.random.default_rng(seed), max(1, DRAWS // len(codes))
    parts = [_resample(sums, min(few, resamples - done), generator) for done in range(0, resamples, few)]
    totals = np.concatenate(parts)
    return np.quantile(totals[:, :-1] / totals[:, -1:], (0.025, 0.975), axis=0)


def gain(
    before: np.ndarray, after: np.ndarray, item: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Gain in mAP from one model to another over the same queries, and the 95% `interval` of the gain.

    The bootstrap draws items with both models' precisions. Each model's own interval is wider, as queries differ in
    difficulty: two intervals that overlap do not mean that the gain is chance.

    Args:
        before: (Q,), average precision of each query; NaN where the query has no positive.
        after: (Q,), the same for the other model.
        item: (Q,), code of the query's item.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        `mAP`, null over no query, and `interval`, null over fewer than two items.
    """
    has_positive = ~np.isnan(after - before)
    difference = (after - before)[has_positive]
    ends = interval(difference[:, None], item[has_positive], resamples, seed)
    mean = math.fsum(difference) / len(difference) if len(difference) else None
    return {"mAP": mean, "interval": None if ends is None else [float(end) for end in ends[:, 0]]}


def _resample(sums: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Sums over I items drawn with repetition, (resamples, K), from the sums of each item, (I, K)."""
    number = len(sums)
    places = generator.integers(number, size=(resamples, number)) + number * np.arange(resamples)[:, None]
    times = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape).astype(float)
    return np.einsum("ri,ik->rk", times, sums)  # unlike a BLAS, it adds in one order for any number of threads
