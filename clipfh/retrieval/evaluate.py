"""Embed a query and a gallery split, rank them, and write the metrics and the predictions."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from clipfh import UserError, __version__
from clipfh.config import schema
from clipfh.config.experiment import Experiment, ModelSettings, require
from clipfh.data import audit
from clipfh.data.audit import CopyGroup
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.data.prompts import tell_apart
from clipfh.model.architecture import weights_name
from clipfh.model.checkpoint import load_model, load_tuned_from, notes_on_model
from clipfh.model.clip import get_architecture, load_tokenizer, model_fingerprint
from clipfh.model.prompts import load_prompts_for, notes_on_prompts
from clipfh.retrieval import embed, embedding_file, metrics
from clipfh.retrieval import rerank as reranking
from clipfh.storage import layout
from clipfh.storage.output import all_or_nothing, require_writable
from clipfh.storage.store import Folder

TOP = 50
"""Gallery images that `predictions.parquet` lists for each query."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured and wrote."""

    out: Folder
    metrics: dict[str, Any]
    """what `metrics.json` holds"""
    is_reused: bool
    """whether the folder held the embeddings of the same model, images and prompts"""
    notes: list[str]
    """what a person should know of the prompts"""

    @property
    def predictions(self) -> pa.Table:
        """The first TOP gallery images of each query: query, rank, gallery, similarity, match."""
        return self.out.read_table(layout.PREDICTIONS)


def evaluate(
    catalogue: Catalogue | str | Path,
    out: str | Path | Folder,
    *,
    checkpoint: str | Path | None = None,
    split: str = "test",
    random_splits: int = 10,
    rerank: bool = False,
    skip_unmatched: bool = False,
    beside: Sequence[Catalogue | str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    progress: embed.OnProgress | None = None,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Measure a model, or the pretrained one (zero-shot), as `clipfh evaluate` does.

    Args:
        catalogue: its path, or the opened catalogue.
        out: folder to write; one that holds an evaluation is replaced.
        checkpoint: a run, checkpoint, export or weights file; None for the pretrained model.
        split: "test" or "val".
        random_splits: how often a random image of each item is drawn as its query.
        rerank: re-rank the gallery for each query (k-reciprocal).
        skip_unmatched: leave out, and count, queries without another image of their item in the gallery.
        beside: other catalogues, to tell what was forgotten: there the checkpoint is measured too, and the model that
            it was tuned from.
        settings: dotted settings of the model and the prompts, such as {"model.name": "clipfh-small"}.
        address: Ray cluster to embed over.
        dashboard: serve Ray's dashboard, where a cluster is started.
        progress: called with the number of images embedded and of all images.
        log: takes each line for a person.

    Raises:
        UserError: the catalogue, the folder, the model or a setting does not fit.
    """
    require_writable(out)
    catalogue, out, others = open_catalogue(catalogue), Folder(out), [open_catalogue(each) for each in beside]
    if others and checkpoint is None:
        raise UserError("--beside compares a tuned model with what it was tuned from: name it by --checkpoint")
    require(random_splits >= 0, "random-splits", "0 or more", random_splits)
    if not out.is_empty() and not any(out.exists(file) for file in (layout.PREDICTIONS, layout.EMBEDDINGS)):
        raise UserError(f"--out {out} is not empty, and holds no evaluation to replace: name another folder")
    splits = get_splits(split)
    for each in (catalogue, *others):
        each.require(*splits)
    clip, experiment, weights = load_model(checkpoint, schema.with_absolute_paths(settings or {}))
    for note in notes_on_model(clip, experiment.model, weights or weights_name(experiment.model), catalogue):
        log(note)
    prompts = load_prompts_for(catalogue, experiment, load_tokenizer(get_architecture(clip)), *splits)
    notes = notes_on_prompts(catalogue, experiment)
    work = _Work(splits, experiment, skip_unmatched, progress, functools.partial(embed.connection, address, dashboard))
    before, name = load_tuned_from(checkpoint, experiment) if others and checkpoint else (clip, "")
    embeddings, is_reused = work.embed_or_reuse(out, catalogue, clip, prompts)
    if others:
        log(f"on {len(others)} other catalogues, before tuning ({name}) and after")
    compared = [work.compare(out, other, before, clip) for other in others]
    results = measure(out, embeddings, random_splits, skip_unmatched, rerank, compared)
    source = {"path": str(catalogue.path), "hash": catalogue.manifest["hash"]}
    about = {"catalogue": source, "split": split, "model": experiment.model.name, "checkpoint": checkpoint}
    out.write(layout.EVALUATION, json.dumps(about, indent=2, default=str) + "\n")
    return Evaluation(out, results, is_reused, notes)


@dataclass(frozen=True)
class _Work:
    """What the evaluations of one command have in common."""

    splits: tuple[str, str]
    experiment: Experiment
    skip_unmatched: bool
    progress: embed.OnProgress | None
    connect: Callable[[], AbstractContextManager[None]]
    """connects to the cluster that embeds, if there is one"""

    def embed_or_reuse(
        self, folder: Folder, catalogue: Catalogue, clip: nn.Module, prompts: dict[str, str]
    ) -> tuple[EmbeddedSplits, bool]:
        """Embeddings of a catalogue, which are left in the folder; and whether they were there already."""
        settings = self.experiment.model
        provenance = fingerprint(catalogue, self.splits, clip, settings, prompts)
        if (embeddings := read_cached_embeddings(folder, provenance, catalogue, self.splits, prompts)) is not None:
            return embeddings, True
        with all_or_nothing(folder, layout.EMBEDDINGS), self.connect():
            embeddings = embed_splits(catalogue, self.splits, clip, settings, prompts, self.progress)
            folder.make()
            cache_embeddings(folder, provenance, embeddings)
        return embeddings, False

    def compare(self, out: Folder, other: Catalogue, before: nn.Module, after: nn.Module) -> dict[str, Any]:
        """Metrics on another catalogue before and after tuning, and the gain; both evaluations are left below `out`."""
        own = schema.replace(self.experiment, {"text.file": ""})  # a file of prompts is of the first catalogue's items
        prompts = load_prompts_for(other, own, load_tokenizer(get_architecture(after)), *self.splits)
        folder = out / layout.BESIDE / f"{other.path.name}-{other.manifest['hash'][:8]}"
        results, scores = {}, []
        for name, clip in ((layout.BEFORE, before), (layout.AFTER, after)):
            embeddings, _ = self.embed_or_reuse(folder / name, other, clip, prompts)
            values, overall = judge(embeddings, 0, self.skip_unmatched)
            write(folder / name, values, embeddings, overall)
            results[name] = {**metrics.summary(overall), "text_to_image": values["text_to_image"]}
            scores.append(overall)
        return {
            "catalogue": str(other.path),
            "hash": other.manifest["hash"],
            **results,
            "gain": metrics.gain(scores[0], scores[1]),
        }


@dataclass(frozen=True)
class EmbeddedSplits:
    """Embeddings of a query and a gallery split, with their rows in the catalogue."""

    query: metrics.Embeddings
    gallery: metrics.Embeddings
    query_rows: pa.Table
    gallery_rows: pa.Table
    captions: metrics.CaptionEmbeddings | None
    """captions of the items that have a prompt"""
    prompts: list[str]
    """the captions' texts, in the same order"""
    copies: list[CopyGroup] = field(default_factory=list)
    """copies in the whole catalogue"""

    @property
    def both(self) -> metrics.Embeddings:
        """Query and gallery as one."""
        return self.query.join(self.gallery)


def embed_splits(
    catalogue: Catalogue,
    splits: tuple[str, str],
    clip: nn.Module,
    settings: ModelSettings,
    prompts: dict[str, str],
    progress: embed.OnProgress | None = None,
) -> EmbeddedSplits:
    """Embed a query and a gallery split, and the prompts of their items, by the encoder of `choose_encoder`.

    Args:
        catalogue: to read.
        splits: names of the query and the gallery split.
        clip: the model.
        settings: the model's settings.
        prompts: item to prompt; items without one are left out of text retrieval.
        progress: called with the number of images done and of all images.

    Raises:
        UserError: an empty split.
    """
    encode, distinct = choose_encoder(clip, settings), distinct_prompts(catalogue, splits, prompts)
    embedding = encode.images(catalogue, splits, progress)
    return _assembled(catalogue, splits, prompts, embedding, encode.texts(distinct) if distinct else None)


def choose_encoder(clip: nn.Module, settings: ModelSettings) -> embed.Encoder:
    """An encoder of this process, or over the cluster that it is connected to, unless that is this machine's CPUs."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        from clipfh.cluster import resources
        from clipfh.retrieval import embed_ray

        if not resources.is_this_machines_cpus():
            return embed_ray.RayEncoder(clip, settings)
    return embed.InProcessEncoder(clip, settings)


def _assembled(
    catalogue: Catalogue, splits: tuple[str, str], prompts: dict[str, str], images: Tensor, texts: Tensor | None
) -> EmbeddedSplits:
    """Join the embeddings of the splits' images and of their distinct prompts with their rows in the catalogue."""
    tables = [catalogue.rows(split) for split in splits]
    copies = audit.read_copies(catalogue)
    codes = _codes(tables, copies)
    rows = metrics.Embeddings(images, *(torch.from_numpy(c) for c in codes))
    query, gallery = torch.arange(len(images)).split([table.num_rows for table in tables])
    captions, distinct = None, distinct_prompts(catalogue, splits, prompts)
    if texts is not None:
        code_of = dict(zip(_column(tables, "item_id"), codes[0].tolist(), strict=True))
        row_of = {text: row for row, text in enumerate(distinct)}
        pairs = [(code, row_of[prompts[name]]) for name, code in code_of.items() if name in prompts]
        captions = metrics.CaptionEmbeddings(texts, *torch.tensor(pairs).T)
    return EmbeddedSplits(rows.select(query), rows.select(gallery), tables[0], tables[1], captions, distinct, copies)


def distinct_prompts(catalogue: Catalogue, splits: Sequence[str], prompts: dict[str, str]) -> list[str]:
    """Each prompt of the splits' items once, sorted: the rows of the embedded captions."""
    items = _column([catalogue.rows(split) for split in splits], "item_id")
    return sorted({prompts[name] for name in items if name in prompts})


def prompted(catalogue: Catalogue, splits: Sequence[str], prompts: dict[str, str]) -> pa.Table:
    """item_id, path, split and prompt of each image of some splits, in the order of `embed.Encoder.images`."""
    rows = pa.concat_tables(catalogue.rows(split).select(["item_id", "path", "split"]) for split in splits)
    return rows.append_column("prompt", pa.array(map(prompts.get, rows["item_id"].to_pylist()), pa.string()))


def _codes(tables: Sequence[pa.Table], copies: Sequence[CopyGroup]) -> list[np.ndarray]:
    """Codes of item, (item, variant) and picture over the rows of all tables.

    An unknown variant is a variant of its own; photos that are equal to the pixel are one picture.
    """
    item, variant, path = (_column(tables, name) for name in ("item_id", "variant", "path"))
    pair = [f"{i} {v}" for i, v in zip(item, variant, strict=True)]
    return [audit.name_codes(item), audit.name_codes(pair), audit.picture_codes(path, copies)]


def _column(tables: Sequence[pa.Table], name: str) -> list[str]:
    return [value for table in tables for value in table[name].to_pylist()]


def fingerprint(
    catalogue: Catalogue, splits: Sequence[str], clip: nn.Module, settings: ModelSettings, prompts: dict[str, str]
) -> str:
    """A hash of all that embeddings depend on: the model, the images of the splits, prompts."""
    texts = distinct_prompts(catalogue, splits, prompts)
    of = [__version__, catalogue.manifest["hash"], list(splits), texts, model_fingerprint(clip, settings)]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def cache_embeddings(out: str | Path | Folder, provenance: str, embeddings: EmbeddedSplits) -> None:
    """Leave the embeddings in a folder, with the `fingerprint` of what they were made of."""
    folder = Folder(out)
    rows = pa.concat_tables([embeddings.query_rows, embeddings.gallery_rows]).select(["path", "item_id", "split"])
    if embeddings.captions is not None:
        texts = pa.table({"prompt": embeddings.prompts})
        embedding_file.write(folder / layout.PROMPTS, texts, embeddings.captions.embedding, provenance)
    embedding_file.write(folder / layout.EMBEDDINGS, rows, embeddings.both.embedding, provenance)


def read_cached_embeddings(
    out: str | Path | Folder, provenance: str, catalogue: Catalogue, splits: tuple[str, str], prompts: dict[str, str]
) -> EmbeddedSplits | None:
    """What `cache_embeddings` left in a folder; None where it left nothing, or what was made of anything else."""
    images, texts = (_read(Folder(out), name, provenance) for name in (layout.EMBEDDINGS, layout.PROMPTS))
    lacking = texts is None and distinct_prompts(catalogue, splits, prompts)
    return None if images is None or lacking else _assembled(catalogue, splits, prompts, images, texts)


def _read(folder: Folder, name: str, provenance: str) -> Tensor | None:
    """The embeddings in a file; None where there is no file, or one of another provenance."""
    file = folder / name
    is_same = file.exists() and embedding_file.read_provenance(file) == provenance
    return embedding_file.read(file)[1] if is_same else None


def measure(
    out: str | Path | Folder,
    embeddings: EmbeddedSplits,
    random_splits: int,
    skip_unmatched: bool = False,
    rerank: bool = False,
    beside: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Compute the metrics, re-ranked if asked, and `write` them with the ones `beside`; returns them.

    Raises:
        UserError: as `judge`.
    """
    similarity = reranking.rerank(embeddings.query, embeddings.gallery) if rerank else None
    results, scores = judge(embeddings, random_splits, skip_unmatched, similarity)
    results["rerank"] = {"k1": reranking.K1, "k2": reranking.K2, "lambda": reranking.LAMBDA} if rerank else None
    results["beside"] = list(beside)
    write(out, results, embeddings, scores, similarity)
    return results


def compute_metrics(embeddings: EmbeddedSplits, random_splits: int, skip_unmatched: bool = False) -> dict[str, Any]:
    """All that `metrics.json` holds, by the cosine. UserError: as `judge`."""
    return judge(embeddings, random_splits, skip_unmatched)[0]


def judge(
    embeddings: EmbeddedSplits,
    random_splits: int,
    skip_unmatched: bool = False,
    similarity: metrics.Similarity | None = None,
) -> tuple[dict[str, Any], metrics.Scores]:
    """All that `metrics.json` holds, null where there is nothing to score; and what each query scored.

    Args:
        embeddings: query and gallery.
        random_splits: number of random splits; 0 leaves them out.
        skip_unmatched: leave out, and count, queries without another image of their item in the gallery.
        similarity: replaces the cosine of queries and gallery. Random splits and texts keep the cosine.

    Raises:
        UserError: a query has no other image of its item in the gallery, unless `skip_unmatched`.
    """
    query, gallery = embeddings.query, embeddings.gallery
    scores = metrics.score(query, gallery, skip_unmatched=True, similarity=similarity)
    overall = scores[0]
    if not skip_unmatched:
        _require_matched(overall, embeddings)
    results = {**metrics.summary(overall), "cmc": metrics.cmc(overall)}
    results["variant"] = {"same": metrics.summary(scores[1]), "cross": metrics.summary(scores[2])}
    for group in ("category", "gender"):
        results[f"by_{group}"] = metrics.by_group(overall, embeddings.query_rows[group].to_pylist())
    results["random_splits"] = metrics.random_splits(embeddings.both, random_splits) if random_splits else None
    results["without_copies"] = _summary_without_copies(embeddings, similarity)
    return {**results, **_text_metrics(embeddings)}, overall


def _summary_without_copies(embeddings: EmbeddedSplits, similarity: metrics.Similarity | None) -> dict[str, Any] | None:
    """`summary` without the photos that show a picture of another part of the catalogue (leaks).

    Near copies of a query do not count as found. None where there are no copies among the photos.
    """
    rows = (embeddings.query_rows, embeddings.gallery_rows)
    query_paths, gallery_paths = (table["path"].to_pylist() for table in rows)
    copies = {photo.path for group in embeddings.copies for photo in group.photos}
    if copies.isdisjoint(query_paths) and copies.isdisjoint(gallery_paths):
        return None
    leaked = audit.leaked_paths(embeddings.copies)
    own = torch.tensor([path not in leaked for path in query_paths])
    theirs = torch.tensor([path not in leaked for path in gallery_paths])
    picture = torch.from_numpy(audit.picture_codes(query_paths + gallery_paths, embeddings.copies, near=True))
    query = replace(embeddings.query, image=picture[: len(own)]).select(own)
    gallery = replace(embeddings.gallery, image=picture[len(own) :]).select(theirs)
    if not len(query) or not len(gallery):
        return None
    numbers = own.nonzero().flatten()
    among = (lambda queries: similarity(numbers[queries])[:, theirs]) if similarity else None
    scores = metrics.score(query, gallery, skip_unmatched=True, similarity=among)
    return metrics.summary(scores[0])


def _require_matched(scores: metrics.Scores, embeddings: EmbeddedSplits) -> None:
    """Raise UserError for queries whose item has no other photo in the gallery; a copy of the query would do."""
    rows, gallery = embeddings.query_rows, embeddings.gallery_rows
    paths = defaultdict(set)
    for item, path in zip(gallery["item_id"].to_pylist(), gallery["path"].to_pylist(), strict=True):
        paths[item].add(path)
    item, path = (rows[name].to_pylist() for name in ("item_id", "path"))
    unmatched = scores.first.isnan().nonzero().flatten().tolist()
    lonely = [row for row in unmatched if not paths[item[row]] - {path[row]}]
    if lonely:
        raise UserError(
            f"{len(lonely):,} of {rows.num_rows:,} queries have no other image of their item in the gallery (the first "
            f"is {rows['path'][lonely[0]].as_py()}): fix the source's splits, or leave them out with --skip-unmatched"
        )


def _text_metrics(embeddings: EmbeddedSplits) -> dict[str, Any]:
    """Metrics of text retrieval, unless prompts tell nothing apart, and what prompts tell apart."""
    if embeddings.captions is None:
        return {"prompts_tell_apart": None, "text_to_image": None, "image_to_text": None}
    prompt_of = dict(zip(embeddings.captions.item.tolist(), embeddings.captions.caption.tolist(), strict=True))
    rows = pa.concat_tables([embeddings.query_rows, embeddings.gallery_rows])
    kinds = zip(rows["category"].to_pylist(), rows["gender"].to_pylist(), strict=True)
    difference = tell_apart(prompt_of, dict(zip(embeddings.both.item.tolist(), kinds, strict=True)))
    if difference == "nothing":
        return {"prompts_tell_apart": difference, "text_to_image": None, "image_to_text": None}
    captioned = embeddings.query.select(torch.isin(embeddings.query.item, embeddings.captions.item))
    return {
        "prompts_tell_apart": difference,
        "text_to_image": metrics.text_to_image(embeddings.captions, embeddings.gallery),
        "image_to_text": metrics.image_to_text(captioned, embeddings.captions) if len(captioned) else None,
    }


def write(
    out: str | Path | Folder,
    results: dict[str, Any],
    embeddings: EmbeddedSplits,
    scores: metrics.Scores,
    similarity: metrics.Similarity | None = None,
) -> None:
    """Write `metrics.json`, `predictions.parquet` (query, rank, gallery, similarity, match: the TOP of each query) and
    `queries.parquet` (query, item_id, AP over the whole gallery)."""
    folder = Folder(out)
    folder.make()
    folder.write_table(layout.PREDICTIONS, predictions(embeddings, similarity=similarity), compression="zstd")
    queries = embeddings.query_rows.select(["path", "item_id"]).rename_columns(["query", "item_id"])
    folder.write_table(layout.QUERIES, queries.append_column("AP", pa.array(scores.values[:, 0].numpy())))
    folder.write(layout.METRICS, json.dumps(results, indent=2) + "\n")


def predictions(embeddings: EmbeddedSplits, top: int = TOP, similarity: metrics.Similarity | None = None) -> pa.Table:
    """The first `top` gallery images of each query, without its own photo, in the order that metrics rank by."""
    query, gallery = embeddings.query, embeddings.gallery
    column, value = metrics.nearest(query, gallery, top, similarity)
    is_photo = column >= 0
    row = torch.arange(len(query))[:, None].expand_as(column)
    rank = torch.arange(1, column.shape[1] + 1).expand_as(column)
    return pa.table(
        {
            "query": embeddings.query_rows["path"].take(pa.array(row[is_photo].numpy())),
            "rank": rank[is_photo].int().numpy(),
            "gallery": embeddings.gallery_rows["path"].take(pa.array(column[is_photo].numpy())),
            "similarity": value[is_photo].numpy(),
            "match": (query.item[row[is_photo]] == gallery.item[column[is_photo]]).numpy(),
        }
    )


def get_splits(name: str) -> tuple[str, str]:
    """Query and gallery split of `test` or `val`."""
    pairs = {"test": ("query", "gallery"), "val": ("val_query", "val_gallery")}
    if name not in pairs:
        raise UserError(f"--split must be test or val, not {name}")
    return pairs[name]
