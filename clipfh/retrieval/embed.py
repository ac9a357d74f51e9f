"""Embed a catalogue's images, and texts: in this process, or by Ray Data where a cluster has more to offer."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from clipfh.config import cores
from clipfh.config.experiment import ModelSettings
from clipfh.data import images as images_module
from clipfh.data.catalogue import Catalogue
from clipfh.data.images import Preprocess
from clipfh.model.clip import get_architecture, get_preprocess, load_tokenizer
from clipfh.model.devices import choose_device, explain_out_of_memory, gpus_here, resolve_precision
from clipfh.model.towers import Towers, embed_images, embed_texts
from clipfh.storage import store

BATCH = 128
OnProgress = Callable[[int, int], None]

explains_out_of_memory = explain_out_of_memory("see by nvidia-smi what else computes on it, or take a smaller --model")


class Encoder(Protocol):
    """A model to embed with."""

    def images(self, catalogue: Catalogue, splits: Sequence[str], progress: OnProgress | None = None) -> Tensor:
        """Unit embeddings of all images of some splits, (N, D) float32, in the order of `catalogue.rows`.

        Args:
            catalogue: the catalogue to read. Its images stream through memory.
            splits: names of the splits.
            progress: called with the number of images done and the number of all images.

        Raises:
            UserError: a split is empty.
        """

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of texts, (C, D) float32."""


def connection(address: str | None, dashboard: bool = False) -> AbstractContextManager[None]:
    """Connect to a cluster to embed over, where one is named or this machine has several GPUs; else do nothing.

    Other work ends in this process before a cluster is up: it decodes and computes on all cores, and feeds a GPU.
    """
    if not address and not os.environ.get("RAY_ADDRESS") and torch.cuda.device_count() <= 1:
        return contextlib.nullcontext()
    from clipfh.cluster.connect import connected

    return connected(address, dashboard=dashboard)


class InProcessEncoder:
    """The encoder that embeds in this process. Threads decode the next images while the model embeds."""

    def __init__(self, clip: nn.Module, settings: ModelSettings) -> None:
        device = choose_device(gpus_here())
        self.settings, self.preprocess = settings, get_preprocess(clip)
        self.architecture = get_architecture(clip)
        self.towers = Towers(clip).to(device)
        self.precision = resolve_precision(settings.precision, device)

    @explains_out_of_memory
    def images(self, catalogue: Catalogue, splits: Sequence[str], progress: OnProgress | None = None) -> Tensor:
        catalogue.require(*splits)
        total, done, parts = sum(map(catalogue.num_images, splits)), 0, []
        encoded = (batch for split in splits for path in catalogue.shards(split) for batch in read_batches(path))
        with _with_share_of_cores(), ThreadPoolExecutor(cores.available()) as pool:
            for pixels in _decode_ahead(pool, encoded, self.preprocess):
                parts.append(embed_images(self.towers, pixels, self.precision).cpu())
                done += len(pixels)
                if progress:
                    progress(done, total)
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        tokens = load_tokenizer(self.architecture)(list(texts))
        with _with_share_of_cores():
            return torch.cat([embed_texts(self.towers, part, self.precision).cpu() for part in tokens.split(BATCH)])


@contextlib.contextmanager
def _with_share_of_cores() -> Iterator[None]:
    """Let torch compute with this process's share of the cores during the block."""
    before = torch.get_num_threads()
    with cores.Share() as share:
        torch.set_num_threads(min(share.threads(), before))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def read_batches(shard: str) -> Iterator[pa.Array]:
    """The encoded images of a shard, BATCH at a time."""
    for part in store.open_parquet(shard).iter_batches(BATCH, columns=["image"]):
        yield part["image"]


def _decode_ahead(
    pool: ThreadPoolExecutor, encoded: Iterable[pa.Array], preprocess: Preprocess
) -> Iterator[np.ndarray]:
    """(n, size, size, 3) uint8 images of each batch, in order; one batch more is decoded while the caller works."""
    waiting: deque[list[Future[np.ndarray]]] = deque()
    for batch in encoded:
        waiting.append([pool.submit(images_module.decode_for_evaluation, each.as_py(), preprocess) for each in batch])
        if len(waiting) > 1:
            yield np.stack([future.result() for future in waiting.popleft()])
    for last in waiting:
        yield np.stack([future.result() for future in last])
