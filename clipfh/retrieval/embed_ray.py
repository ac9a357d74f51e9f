"""Embed a catalogue's images, and texts, over all GPUs or CPUs of a Ray cluster, by Ray Data."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import Tensor, nn

from clipfh.cluster import ray_private, resources
from clipfh.config.experiment import ModelSettings
from clipfh.data import images as images_module
from clipfh.data.catalogue import Catalogue
from clipfh.data.images import Preprocess
from clipfh.model.clip import get_architecture, get_preprocess, load_tokenizer
from clipfh.model.devices import choose_device, resolve_precision
from clipfh.model.towers import Towers, embed_images, embed_texts
from clipfh.retrieval import embed

IMAGES_A_PROCESS = 512
"""Fewest images that are worth one more process: fewer are embedded before it has loaded torch and the model."""


class _Embedder:
    """A copy of the model, fed with batches of images or of tokens by Ray Data."""

    @embed.explains_out_of_memory
    def __init__(self, clip: Any, precision: str, gpus: int = 0) -> None:
        device = choose_device(gpus)
        self.towers = Towers(ray.get(clip)).to(device).eval()
        self.precision = resolve_precision(precision, device)

    @embed.explains_out_of_memory
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "image" in batch:
            embedding = embed_images(self.towers, batch["image"], self.precision)
        else:
            embedding = embed_texts(self.towers, torch.from_numpy(batch["tokens"]).long(), self.precision)
        return {"embedding": embedding.cpu().numpy()}


_embedder = functools.lru_cache(maxsize=1)(_Embedder)


def _embed_on_cpu(batch: Any, clip: Any, precision: str) -> Any:
    """Embed a batch in a task, whose process, with torch loaded, serves one dataset after another."""
    return _embedder(clip, precision)(batch)


class RayEncoder:
    """The `embed.Encoder` that keeps its model in Ray's object store, for all processes that embed."""

    def __init__(self, clip: nn.Module, settings: ModelSettings) -> None:
        self.settings, self.preprocess = settings, get_preprocess(clip)
        self.architecture = get_architecture(clip)
        self.clip = ray.put(clip)  # Ray copies what it holds: the caller's model stays as it is

    def images(self, catalogue: Catalogue, splits: Sequence[str], progress: embed.OnProgress | None = None) -> Tensor:
        catalogue.require(*splits)
        paths = [path for split in splits for path in catalogue.shards(split)]
        total = sum(map(catalogue.num_images, splits))
        at_once = min(len(paths), resources.compute_slots(), math.ceil(total / IMAGES_A_PROCESS))
        # Not `read_parquet`, which starts some ten processes more to look into a handful of files
        shards = ray.data.from_items([{"shard": path} for path in paths], override_num_blocks=len(paths))
        pixels = _map_in_tasks(shards, _decode, None, 0.5, at_once, preprocess=self.preprocess)
        done, parts = 0, []
        for part in self._run(pixels, at_once):
            parts.append(part)
            done += len(part)
            if progress:
                progress(done, total)
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        tokens = load_tokenizer(self.architecture)(list(texts)).numpy().astype(np.int32)
        return torch.cat(list(self._run(ray.data.from_numpy(tokens).rename_columns({"data": "tokens"}), at_once=1)))

    def _run(self, rows: ray.data.Dataset, at_once: int) -> Iterator[Tensor]:
        """Yield the embeddings of the dataset's rows, in its order. On CPUs `at_once` processes take part."""
        rows.context.execution_options.preserve_order = True
        rows.context.enable_progress_bars = False
        arguments = {"clip": self.clip, "precision": self.settings.precision}
        gpus = int(resources.capacity().get("GPU", 0))
        if gpus:
            pool = ray.data.ActorPoolStrategy(min_size=1, max_size=gpus)
            how: dict[str, Any] = {"fn_constructor_kwargs": {**arguments, "gpus": 1}, "compute": pool, "num_gpus": 1}
            embeddings = rows.map_batches(_Embedder, batch_size=embed.BATCH, **how)
        else:
            embeddings = _map_in_tasks(rows, _embed_on_cpu, embed.BATCH, 1, at_once, **arguments)
        for batch in embeddings.iter_batches(batch_format="numpy"):
            yield torch.from_numpy(batch["embedding"].copy())


def _map_in_tasks(
    rows: ray.data.Dataset, function: Any, size: int | None, cpus: float, at_once: int, **arguments: Any
) -> ray.data.Dataset:
    """Map batches of `size` rows (None for whole blocks) by tasks, `at_once` at a time, in processes for any task."""
    how: dict[str, Any] = {"num_cpus": cpus, "runtime_env": ray_private.setup_hook_env("")}
    tasks = ray.data.TaskPoolStrategy(at_once)
    return rows.map_batches(function, batch_size=size, fn_kwargs=arguments, compute=tasks, **how)


def _decode(batch: Any, preprocess: Preprocess) -> Any:
    """Yield the images of some shards, decoded, a part at a time."""
    for shard in batch["shard"]:
        for encoded in embed.read_batches(shard):
            yield {
                "image": np.stack([images_module.decode_for_evaluation(each.as_py(), preprocess) for each in encoded])
            }
