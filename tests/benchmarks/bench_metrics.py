"""Speed and memory of the metrics at the size of In-Shop: 14,218 queries x 12,612 gallery images x 512, 3,985 items."""

import ctypes
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from clipfh.retrieval import metrics, rerank
from clipfh.retrieval.metrics import Embeddings

NUM_QUERY, NUM_GALLERY, NUM_ITEMS, DIM = 14_218, 12_612, 3_985, 512


def rows() -> list[dict]:
    """All measurements, as {name, value, target, ok}. The original takes fewer queries and is compared per query."""
    query, gallery = in_shop()
    few = query.select(torch.arange(0, NUM_QUERY, NUM_QUERY // 64))
    images, (overall, _, _) = query.join(gallery), metrics.score(query, gallery)
    product, evaluation, learning, original, bootstrap = timed(
        lambda: product_alone(query, gallery),
        lambda: metrics.score(query, gallery),
        lambda: metric_learning(query, gallery),
        lambda: original_algorithm(few, gallery),
        lambda: metrics.summary(overall),
    )
    # Ten splits ask with some 18,800 of the images, each before all 26,830: 2.8 times the pairs of one evaluation.
    once, splits, apart = timed(
        lambda: metrics.score(query, gallery),
        lambda: metrics.random_splits(images),
        lambda: splits_apart(images),
        repeats=1,
    )
    ours = [metrics.mean_average_precision(part, gallery) for part in (query, few)]
    theirs = [metric_learning(query, gallery), original_algorithm(few, gallery)]
    per_query = evaluation / len(query)
    above = memory(lambda: metrics.score(query, gallery))
    reranking = memory(lambda: metrics.score(query, gallery, similarity=rerank.rerank(query, gallery)))
    return [
        row("metrics: Rank-k + mAP, time of the matrix product", evaluation / product, at_most=1.5),
        row("metrics: pytorch-metric-learning, our time", learning / evaluation, at_least=10),
        row("metrics: the original's algorithm, our time", original / len(few) / per_query, at_least=10),
        row("metrics: mAP, largest difference from these two", np.abs(np.subtract(ours, theirs)).max(), at_most=1e-6),
        row("metrics: ten random splits, time of one evaluation", splits / once, at_most=2),
        row("metrics: ten random splits, time of each apart", splits / apart, at_most=1),
        row("metrics: bootstrap of 1,000 resamples, time of Rank-k + mAP", bootstrap / evaluation, at_most=0.2),
        row("metrics: memory above the embeddings, MiB", above, at_most=1024),
        row("metrics: the same with re-ranking, MiB", reranking, at_most=1024),
    ]


def row(name: str, values: Any, at_most: float | None = None, at_least: float | None = None) -> dict:
    """A line of the table: the median where there is a value for each round, the largest of differences."""
    value = float(np.median(values)) if isinstance(values, np.ndarray) else float(np.max(values))
    ok = value <= at_most if at_least is None else value >= at_least
    return {"name": name, "value": float(f"{value:.3g}"), "target": at_most if at_least is None else at_least, "ok": ok}


def in_shop() -> tuple[Embeddings, Embeddings]:
    """Noisy views of random items, whose numbers of images have a long tail."""
    generator = torch.Generator().manual_seed(0)
    share = torch.exp(0.8 * torch.randn(NUM_ITEMS, generator=generator))

    def items(total: int) -> torch.Tensor:
        more = torch.multinomial(share, total - NUM_ITEMS, replacement=True, generator=generator)
        item = torch.cat([torch.arange(NUM_ITEMS), more])
        return item[torch.randperm(total, generator=generator)]

    centre = torch.nn.functional.normalize(torch.randn(NUM_ITEMS, DIM, generator=generator), dim=1)

    def images(item: torch.Tensor, first: int) -> Embeddings:
        embedding = centre[item] + 2.5 * torch.randn(len(item), DIM, generator=generator) / DIM**0.5
        variant = 4 * item + torch.randint(4, item.shape, generator=generator)
        embedding = torch.nn.functional.normalize(embedding, dim=1)
        return Embeddings(embedding, item, variant, first + torch.arange(len(item)))

    return images(items(NUM_QUERY), 0), images(items(NUM_GALLERY), NUM_QUERY)


def timed(*tasks: Callable, repeats: int = 3) -> np.ndarray:
    """Seconds of each task in each round, (tasks, rounds). Rounds go in turn: a busy spell falls on all of one."""
    seconds = np.empty((len(tasks), repeats))
    for turn in range(repeats):
        for number, task in enumerate(tasks):
            start = time.perf_counter()
            task()
            seconds[number, turn] = time.perf_counter() - start
    return seconds


def product_alone(query: Embeddings, gallery: Embeddings) -> None:
    height = metrics.BLOCK // len(gallery) // metrics.TILE * metrics.TILE
    similarity = torch.empty(height, len(gallery))
    for rows_ in query.embedding.split(height):
        torch.mm(rows_, gallery.embedding.T, out=similarity[: len(rows_)])


def metric_learning(query: Embeddings, gallery: Embeddings) -> float:
    names = ("mean_average_precision", "precision_at_1")
    """As its documentation has it without faiss."""
    knn = CustomKNN(CosineSimilarity())
    calculator = AccuracyCalculator(names, k=None, knn_func=knn, kmeans_func=lambda *_: None)
    return calculator.get_accuracy(query.embedding, query.item, gallery.embedding, gallery.item)[names[0]]


def original_algorithm(query: Embeddings, gallery: Embeddings) -> float:
    """Each query: sort the whole gallery, walk down the ranking, add up precisions."""
    found = []
    labels = gallery.item.numpy()
    for item, similarity in zip(query.item.tolist(), query.embedding @ gallery.embedding.T, strict=True):
        precisions, hits = [], 0
        for rank, row_ in enumerate(np.argsort(-similarity.numpy()), start=1):
            if labels[row_] == item:
                hits += 1
                precisions.append(hits / rank)
        found.append(np.mean(precisions))
    return float(np.mean(found))


def splits_apart(images: Embeddings) -> None:
    for drawn in metrics._draw(images.item, num_splits=10, seed=0):
        metrics.score(images.select(drawn), images.select(~drawn), skip_unmatched=True)


def memory(task: Callable) -> float:
    """MiB by which the peak rises above what is held before (Linux, glibc)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already would not be seen when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    task()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0])  # KiB
    return peak / 1024 - pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    for each in rows():
        print(f"{each['name']:55} {each['value']:8} (target {each['target']:5}) {'ok' if each['ok'] else 'MISSED'}")
