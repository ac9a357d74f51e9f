"""Embed a catalogue's images and prompts with Ray Data, rank them, and write the figures and the predictions."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor, nn

from clipfh import UserError, config, images, metrics, model
from clipfh.catalogue import Catalogue

EMBED_BATCH = 128
TOP = 50
"""Gallery images that `predictions.parquet` lists for each query."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a query and a gallery split, with their rows in the catalogue."""

    query: metrics.Embeddings
    gallery: metrics.Embeddings
    query_rows: pa.Table
    gallery_rows: pa.Table
    captions: metrics.Captions | None
    """of the items that have a prompt"""

    @property
    def both(self) -> metrics.Embeddings:
        """Query and gallery as one."""
        pairs = [(getattr(self.query, f), getattr(self.gallery, f)) for f in ("embedding", "item", "variant", "image")]
        return metrics.Embeddings(*(torch.cat(pair) for pair in pairs))


class _Embedder:
    """A copy of the model, fed with batches of images or of tokens by Ray Data."""

    def __init__(self, clip: Any, precision: str) -> None:
        device = model.device()
        self.towers = model.Towers(ray.get(clip)).to(device).eval()
        self.precision = model.precision(precision, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "image" in batch:
            embedding = model.embed(self.towers, batch["image"], self.precision)
        else:
            embedding = model.embed_text(self.towers, torch.from_numpy(batch["tokens"]).long(), self.precision)
        return {"embedding": embedding.cpu().numpy()}


_embedder = functools.lru_cache(maxsize=1)(_Embedder)


def _embed_on_cpu(batch: Any, clip: Any, precision: str) -> Any:
    """The same in a task: processes that have torch loaded serve one dataset after another."""
    return _embedder(clip, precision)(batch)


def embed(
    catalogue: Catalogue, splits: tuple[str, str], clip: nn.Module, settings: config.Model, prompts: dict[str, str]
) -> Embedded:
    """Embed a query and a gallery split, and the prompts of their items, over all GPUs or CPUs there are.

    Args:
        catalogue: to read.
        splits: names of the query and the gallery split.
        clip: the model.
        settings: of the model.
        prompts: item to prompt; items without one are left out of text retrieval.

    Raises:
        UserError: an empty split.
    """
    catalogue.require(*splits)
    tables = [catalogue.rows(split) for split in splits]
    paths = [str(path) for split in splits for path in catalogue.shards(split)]
    # Ray copies what it holds: the caller's model stays as it is
    held = ray.put(clip)
    decode = {"preprocess": model.preprocess_of(clip)}
    encoded = ray.data.read_parquet(paths, columns=["image"], partitioning=None)
    decoded = encoded.map_batches(_decode, batch_size=EMBED_BATCH, num_cpus=0.5, fn_kwargs=decode)  # type: ignore[arg-type]
    embedding = _run(decoded, held, settings.precision)
    codes = _codes(tables)
    rows = metrics.Embeddings(embedding, *(torch.from_numpy(c) for c in codes))
    query = torch.arange(len(tables[0]))
    gallery = torch.arange(len(tables[0]), len(embedding))
    captions = _captions(tables, codes[0], prompts, held, settings)
    return Embedded(rows.select(query), rows.select(gallery), tables[0], tables[1], captions)


def _decode(batch: Any, preprocess: images.Preprocess) -> Any:
    return {"image": np.stack([images.for_evaluation(encoded, preprocess) for encoded in batch["image"]])}


def _run(rows: ray.data.Dataset, clip: Any, precision: str) -> Tensor:
    """Embeddings of the dataset's rows, in its order."""
    rows.context.execution_options.preserve_order = True
    rows.context.enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=gpus)
        how: dict[str, Any] = {"fn_constructor_args": (clip, precision), "compute": pool, "num_gpus": 1}
        embedded = rows.map_batches(_Embedder, batch_size=EMBED_BATCH, **how)
    else:
        how = {"num_cpus": 1, "fn_kwargs": {"clip": clip, "precision": precision}}
        embedded = rows.map_batches(_embed_on_cpu, batch_size=EMBED_BATCH, **how)  # type: ignore[arg-type]
    return torch.from_numpy(
        np.concatenate([b["embedding"] for b in embedded.iter_batches(batch_format="numpy")]).copy()
    )


def _codes(tables: Sequence[pa.Table]) -> list[np.ndarray]:
    """Codes of item, (item, variant) and path over the rows of all tables; no variant known is a variant of its own."""
    item, variant, path = (_column(tables, name) for name in ("item_id", "variant", "path"))
    pair = [f"{i} {v}" for i, v in zip(item, variant, strict=True)]
    return [np.unique(names, return_inverse=True)[1] for names in (item, pair, path)]


def _column(tables: Sequence[pa.Table], name: str) -> list[str]:
    return [value for table in tables for value in table[name].to_pylist()]


def _captions(
    tables: Sequence[pa.Table], item_codes: np.ndarray, prompts: dict[str, str], clip: Any, settings: config.Model
) -> metrics.Captions | None:
    items = _column(tables, "item_id")
    code_of = {name: code for name, code in zip(items, item_codes.tolist(), strict=True) if name in prompts}
    if not code_of:
        return None
    distinct = {text: i for i, text in enumerate(sorted({prompts[name] for name in code_of}))}
    tokens = model.tokenizer(settings)(list(distinct)).numpy().astype(np.int32)
    embedding = _run(ray.data.from_numpy(tokens).rename_columns({"data": "tokens"}), clip, settings.precision)
    caption = [distinct[prompts[name]] for name in code_of]
    return metrics.Captions(embedding, torch.tensor(list(code_of.values())), torch.tensor(caption))


def figures(embedded: Embedded, random_splits: int) -> dict[str, Any]:
    """All that `metrics.json` holds.

    Args:
        embedded: query and gallery.
        random_splits: how many; 0 leaves them out.
    """
    overall, same, cross = metrics.score(embedded.query, embedded.gallery)
    found = metrics.summary(overall)
    found["variant"] = {"same": metrics.summary(same), "cross": metrics.summary(cross)}
    for group in ("category", "gender"):
        found[f"by_{group}"] = metrics.by_group(overall, embedded.query_rows[group].to_pylist())
    if random_splits:
        found["random_splits"] = metrics.random_splits(embedded.both, random_splits)
    if embedded.captions is not None:
        found["text_to_image"] = metrics.text_to_image(embedded.captions, embedded.gallery)
        captioned = torch.isin(embedded.query.item, embedded.captions.item)
        found["image_to_text"] = metrics.image_to_text(embedded.query.select(captioned), embedded.captions)
    return found


def write(out: str | Path, found: dict[str, Any], embedded: Embedded) -> None:
    """`metrics.json` and `predictions.parquet` (query, rank, gallery, similarity, match: the TOP of each query)."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(predictions(embedded), folder / "predictions.parquet", compression="zstd")
    whole = folder / "metrics.json.new"
    whole.write_text(json.dumps(found, indent=2) + "\n")
    whole.rename(folder / "metrics.json")


def predictions(embedded: Embedded, top: int = TOP) -> pa.Table:
    """The first `top` gallery images of each query, without its own photo, in the order that metrics rank by."""
    query, gallery = embedded.query, embedded.gallery
    columns: list[Tensor] = []
    values: list[Tensor] = []
    for rows in torch.arange(len(query)).split(1024):
        similarity = query.embedding[rows] @ gallery.embedding.T
        similarity.masked_fill_(query.image[rows, None] == gallery.image, -torch.inf)
        # A stable sort keeps gallery order among equals; topk does not
        value, column = similarity.sort(dim=1, descending=True, stable=True)
        columns.append(column[:, :top])
        values.append(value[:, :top])
    column, value = torch.cat(columns), torch.cat(values)
    listed = value > -torch.inf
    row = torch.arange(len(query))[:, None].expand_as(column)
    rank = torch.arange(1, column.shape[1] + 1).expand_as(column)
    return pa.table(
        {
            "query": embedded.query_rows["path"].take(pa.array(row[listed].numpy())),
            "rank": rank[listed].int().numpy(),
            "gallery": embedded.gallery_rows["path"].take(pa.array(column[listed].numpy())),
            "similarity": value[listed].numpy(),
            "match": (query.item[row[listed]] == gallery.item[column[listed]]).numpy(),
        }
    )


def splits_of(name: str) -> tuple[str, str]:
    """Query and gallery split of `test` or `val`."""
    pairs = {"test": ("query", "gallery"), "val": ("val_query", "val_gallery")}
    if name not in pairs:
        raise UserError(f"--split must be test or val, not {name}")
    return pairs[name]
