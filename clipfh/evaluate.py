"""Embed a catalogue's images and prompts with Ray Data, rank them, and write the figures and the predictions."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor, nn

from clipfh import UserError, __version__, cluster, config, embeddings, files, images, metrics, model
from clipfh import rerank as reranking
from clipfh.catalogue import Catalogue

IMAGES, TEXTS = "embeddings.parquet", "prompts.parquet"
EMBED_BATCH = 128
TOP = 50
"""Gallery images that `predictions.parquet` lists for each query."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a query and a gallery split, with their rows in the catalogue."""

    query: metrics.Embeddings
    gallery: metrics.Embeddings
    query_rows: pa.Table
    gallery_rows: pa.Table
    captions: metrics.Captions | None
    """of the items that have a prompt"""
    prompts: list[str]
    """the captions, in their order"""

    @property
    def both(self) -> metrics.Embeddings:
        """Query and gallery as one."""
        return self.query.join(self.gallery)


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
    catalogue: Catalogue,
    splits: tuple[str, str],
    clip: nn.Module,
    settings: config.Model,
    prompts: dict[str, str],
    progress: Progress | None = None,
) -> Embedded:
    """Embed a query and a gallery split, and the prompts of their items, over all GPUs or CPUs there are.

    Args:
        catalogue: to read.
        splits: names of the query and the gallery split.
        clip: the model.
        settings: of the model.
        prompts: item to prompt; items without one are left out of text retrieval.
        progress: called with the number of images done and of all images.

    Raises:
        UserError: an empty split.
    """
    encoder, distinct = Encoder(clip, settings), distinct_prompts(catalogue, splits, prompts)
    embedding = encoder.images(catalogue, splits, progress)
    return _assembled(catalogue, splits, prompts, embedding, encoder.texts(distinct) if distinct else None)


class Encoder:
    """A model in Ray's object store, to embed with over all GPUs or CPUs there are."""

    def __init__(self, clip: nn.Module, settings: config.Model) -> None:
        self.settings, self.preprocess = settings, model.preprocess_of(clip)
        self.clip = ray.put(clip)  # Ray copies what it holds: the caller's model stays as it is

    def images(self, catalogue: Catalogue, splits: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Unit embeddings of all images of some splits, (N, D) float32, in the order of `catalogue.rows`.

        Images stream through Ray's object store; this process holds the embeddings alone. UserError: an empty split.
        """
        catalogue.require(*splits)
        paths = [str(path) for split in splits for path in catalogue.shards(split)]
        at_once = min(len(paths), cluster.at_work())
        # Not `read_parquet`, which starts some ten processes more to look into a handful of files
        shards = ray.data.from_items([{"shard": path} for path in paths], override_num_blocks=len(paths))
        decoded = _in_tasks(shards, _decode, None, 0.5, at_once, preprocess=self.preprocess)
        total, done, parts = sum(map(catalogue.num_images, splits)), 0, []
        for part in self._run(decoded, at_once):
            parts.append(part)
            done += len(part)
            if progress:
                progress(done, total)
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of texts, (C, D) float32."""
        tokens = model.tokenizer(self.settings)(list(texts)).numpy().astype(np.int32)
        return torch.cat(list(self._run(ray.data.from_numpy(tokens).rename_columns({"data": "tokens"}), at_once=1)))

    def _run(self, rows: ray.data.Dataset, at_once: int) -> Iterator[Tensor]:
        """Embeddings of the dataset's rows, in its order. On CPUs so many processes take part."""
        rows.context.execution_options.preserve_order = True
        rows.context.enable_progress_bars = False
        arguments = {"clip": self.clip, "precision": self.settings.precision}
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus:
            pool = ray.data.ActorPoolStrategy(min_size=1, max_size=gpus)
            how: dict[str, Any] = {"fn_constructor_kwargs": arguments, "compute": pool, "num_gpus": 1}
            embedded = rows.map_batches(_Embedder, batch_size=EMBED_BATCH, **how)
        else:
            embedded = _in_tasks(rows, _embed_on_cpu, EMBED_BATCH, 1, at_once, **arguments)
        for batch in embedded.iter_batches(batch_format="numpy"):
            yield torch.from_numpy(batch["embedding"].copy())


def _in_tasks(
    rows: ray.data.Dataset, function: Any, size: int | None, cpus: float, at_once: int, **arguments: Any
) -> ray.data.Dataset:
    """Batches of so many rows, or blocks, mapped by tasks, so many at once, whose processes serve other tasks too."""
    how: dict[str, Any] = {"num_cpus": cpus, "runtime_env": cluster.first_calling("")}
    return rows.map_batches(function, batch_size=size, fn_kwargs=arguments, concurrency=at_once, **how)


def _decode(batch: Any, preprocess: images.Preprocess) -> Any:
    """The images of some shards, a part at a time."""
    for shard in batch["shard"]:
        for part in pq.ParquetFile(shard).iter_batches(EMBED_BATCH, columns=["image"]):
            yield {"image": np.stack([images.for_evaluation(each.as_py(), preprocess) for each in part["image"]])}


def _assembled(
    catalogue: Catalogue, splits: tuple[str, str], prompts: dict[str, str], images: Tensor, texts: Tensor | None
) -> Embedded:
    """The embeddings of the splits' images and of their distinct prompts, with what they are of."""
    tables = [catalogue.rows(split) for split in splits]
    codes = _codes(tables)
    rows = metrics.Embeddings(images, *(torch.from_numpy(c) for c in codes))
    query, gallery = torch.arange(len(images)).split([table.num_rows for table in tables])
    captions, distinct = None, distinct_prompts(catalogue, splits, prompts)
    if texts is not None:
        code_of = dict(zip(_column(tables, "item_id"), codes[0].tolist(), strict=True))
        row_of = {text: row for row, text in enumerate(distinct)}
        pairs = [(code, row_of[prompts[name]]) for name, code in code_of.items() if name in prompts]
        captions = metrics.Captions(texts, *torch.tensor(pairs).T)
    return Embedded(rows.select(query), rows.select(gallery), tables[0], tables[1], captions, distinct)


def distinct_prompts(catalogue: Catalogue, splits: Sequence[str], prompts: dict[str, str]) -> list[str]:
    """Each prompt of the splits' items once, sorted: the rows of the embedded captions."""
    items = _column([catalogue.rows(split) for split in splits], "item_id")
    return sorted({prompts[name] for name in items if name in prompts})


def prompted(catalogue: Catalogue, splits: Sequence[str], prompts: dict[str, str]) -> pa.Table:
    """item_id, path, split and prompt of each image of some splits, in the order that `Encoder.images` has."""
    rows = pa.concat_tables(catalogue.rows(split).select(["item_id", "path", "split"]) for split in splits)
    return rows.append_column("prompt", pa.array(map(prompts.get, rows["item_id"].to_pylist()), pa.string()))


def _codes(tables: Sequence[pa.Table]) -> list[np.ndarray]:
    """Codes of item, (item, variant) and path over the rows of all tables; no variant known is a variant of its own."""
    item, variant, path = (_column(tables, name) for name in ("item_id", "variant", "path"))
    pair = [f"{i} {v}" for i, v in zip(item, variant, strict=True)]
    return [np.unique(names, return_inverse=True)[1] for names in (item, pair, path)]


def _column(tables: Sequence[pa.Table], name: str) -> list[str]:
    return [value for table in tables for value in table[name].to_pylist()]


def fingerprint(
    catalogue: Catalogue, splits: Sequence[str], clip: nn.Module, settings: config.Model, prompts: dict[str, str]
) -> str:
    """A hash of all that embeddings depend on: the model, the images of the splits, prompts."""
    texts = distinct_prompts(catalogue, splits, prompts)
    of = [__version__, catalogue.manifest["hash"], list(splits), texts, model.identity(clip, settings)]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def keep(folder: str | Path, mark: str, embedded: Embedded) -> None:
    """Leave the embeddings in a folder, with the fingerprint of what they were made of."""
    rows = pa.concat_tables([embedded.query_rows, embedded.gallery_rows]).select(["path", "item_id", "split"])
    if embedded.captions is not None:
        texts = pa.table({"prompt": embedded.prompts})
        embeddings.write(Path(folder) / TEXTS, texts, embedded.captions.embedding, mark)
    embeddings.write(Path(folder) / IMAGES, rows, embedded.both.embedding, mark)


def kept(
    folder: str | Path, mark: str, catalogue: Catalogue, splits: tuple[str, str], prompts: dict[str, str]
) -> Embedded | None:
    """What `keep` left in a folder; None where that is nothing, or was made of anything else."""
    images, texts = (_read(Path(folder) / name, mark) for name in (IMAGES, TEXTS))
    lacking = texts is None and distinct_prompts(catalogue, splits, prompts)
    return None if images is None or lacking else _assembled(catalogue, splits, prompts, images, texts)


def _read(file: Path, mark: str) -> Tensor | None:
    """The embeddings in a file; None where there is none or its mark is another."""
    return embeddings.read(file)[1] if file.exists() and embeddings.mark_of(file) == mark else None


def measure(
    out: str | Path, embedded: Embedded, random_splits: int, skip_unmatched: bool = False, rerank: bool = False
) -> dict[str, Any]:
    """Work out the `figures`, re-ranked if asked, and `write` them; returns them. UserError: as `figures`."""
    similarity = reranking.reranked(embedded.query, embedded.gallery) if rerank else None
    found = figures(embedded, random_splits, skip_unmatched, similarity)
    found["rerank"] = {"k1": reranking.K1, "k2": reranking.K2, "lambda": reranking.LAMBDA} if rerank else None
    write(out, found, embedded, similarity)
    return found


def figures(
    embedded: Embedded, random_splits: int, skip_unmatched: bool = False, similarity: metrics.Similarity | None = None
) -> dict[str, Any]:
    """All that `metrics.json` holds; null where there is nothing to score.

    Args:
        embedded: query and gallery.
        random_splits: how many; 0 leaves them out.
        skip_unmatched: leave out, and count, queries without another image of their item in the gallery.
        similarity: of queries and gallery, in place of the cosine. Random splits and texts keep the cosine.

    Raises:
        UserError: a query without such an image, unless skipped.
    """
    query, gallery = embedded.query, embedded.gallery
    scores = metrics.score(query, gallery, skip_unmatched=True, similarity=similarity)
    overall = scores[0]
    if not skip_unmatched:
        _require_matched(overall, embedded.query_rows)
    found = {**metrics.summary(overall), "cmc": metrics.cmc(overall)}
    found["variant"] = {"same": metrics.summary(scores[1]), "cross": metrics.summary(scores[2])}
    for group in ("category", "gender"):
        found[f"by_{group}"] = metrics.by_group(overall, embedded.query_rows[group].to_pylist())
    found["random_splits"] = metrics.random_splits(embedded.both, random_splits) if random_splits else None
    return {**found, **_text_figures(embedded)}


def _require_matched(scores: metrics.Scores, rows: pa.Table) -> None:
    lonely = scores.first.isnan().nonzero().flatten().tolist()
    if lonely:
        raise UserError(
            f"{len(lonely):,} of {rows.num_rows:,} queries have no other image of their item in the gallery (the first "
            f"is {rows['path'][lonely[0]].as_py()}): mend the source's splits, or leave them out with --skip-unmatched"
        )


def _text_figures(embedded: Embedded) -> dict[str, Any]:
    if embedded.captions is None:
        return {"text_to_image": None, "image_to_text": None}
    captioned = embedded.query.select(torch.isin(embedded.query.item, embedded.captions.item))
    return {
        "text_to_image": metrics.text_to_image(embedded.captions, embedded.gallery),
        "image_to_text": metrics.image_to_text(captioned, embedded.captions) if len(captioned) else None,
    }


def write(
    out: str | Path, found: dict[str, Any], embedded: Embedded, similarity: metrics.Similarity | None = None
) -> None:
    """`metrics.json` and `predictions.parquet` (query, rank, gallery, similarity, match: the TOP of each query)."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    listed = predictions(embedded, similarity=similarity)
    pq.write_table(listed, folder / "predictions.parquet", compression="zstd")
    files.write(folder / "metrics.json", json.dumps(found, indent=2) + "\n")


def predictions(embedded: Embedded, top: int = TOP, similarity: metrics.Similarity | None = None) -> pa.Table:
    """The first `top` gallery images of each query, without its own photo, in the order that metrics rank by."""
    query, gallery = embedded.query, embedded.gallery
    column, value = metrics.nearest(query, gallery, top, similarity)
    listed = column >= 0
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
