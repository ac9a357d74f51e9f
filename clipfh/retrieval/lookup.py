"""Find a photo or some words in a file of embeddings. Nothing of Ray: a search is one product with a matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader
from torch import Tensor, nn

from clipfh import UserError, __version__
from clipfh.config import schema
from clipfh.config.experiment import Experiment, ModelSettings, require
from clipfh.data import images
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.data.encode import encode_photo
from clipfh.data.splits import SPLITS
from clipfh.model import checkpoint as checkpoint_module
from clipfh.model.architecture import weights_name
from clipfh.model.checkpoint import load_model, notes_on_model
from clipfh.model.clip import (
    get_architecture,
    get_preprocess,
    load_tokenizer,
    model_fingerprint,
)
from clipfh.model.devices import choose_device, resolve_precision
from clipfh.model.prompts import load_prompts_for
from clipfh.model.towers import Towers, embed_images, embed_texts
from clipfh.retrieval import embedding_file, evaluate, metrics
from clipfh.retrieval.embed import OnProgress, connection
from clipfh.storage import store
from clipfh.storage.output import require_writable
from clipfh.storage.store import Folder

THUMBNAIL = (320, 440)
"""Pixels that a picture on the page fits into: about twice what a screen shows."""


@dataclass(frozen=True)
class SearchIndex:
    """An opened file of embeddings."""

    file: Folder
    rows: pa.Table
    """item_id, path, split and prompt of N images."""
    embedding: Tensor
    """(N, D) float32, of unit norm."""
    provenance: dict[str, Any]
    """The model and the catalogue, as `describe_provenance` writes them."""


@dataclass(frozen=True)
class SearchHit:
    """An image that a search returned."""

    similarity: float
    item_id: str
    path: str


def embed(
    catalogue: Catalogue | str | Path,
    out: str | Path | Folder,
    *,
    checkpoint: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    progress: OnProgress | None = None,
    log: Callable[[str], None] = print,
) -> SearchIndex:
    """Embed all images of a catalogue into a file, to `search` in them, as `clipfh embed` does.

    Args:
        catalogue: its path, or the opened catalogue.
        out: Parquet file to write; a file of embeddings that is there is replaced.
        checkpoint: a run, sweep, checkpoint, export or weights file; None for the pretrained model.
        settings: dotted settings of the model and the prompts.
        address: Ray cluster to embed over.
        dashboard: serve Ray's dashboard, where a cluster is started.
        progress: called with the number of images embedded and of all images.
        log: takes each line for a person.

    Raises:
        UserError: the catalogue, the file, the model or a setting does not fit.
    """
    require_writable(Folder(out).parent)
    catalogue, out = open_catalogue(catalogue), Folder(out)
    if out.is_folder() or (out.exists() and embedding_file.read_provenance(out) is None):
        raise UserError(f"--out {out} is there, and holds no embeddings to replace: name another file")
    clip, experiment, weights = load_model(checkpoint, schema.with_absolute_paths(settings or {}))
    for note in notes_on_model(clip, experiment.model, weights or weights_name(experiment.model), catalogue):
        log(note)
    splits = [split for split in SPLITS if catalogue.num_images(split)]
    prompts = load_prompts_for(catalogue, experiment, load_tokenizer(get_architecture(clip)), *splits)
    with connection(address, dashboard):
        embedding = evaluate.choose_encoder(clip, experiment.model).images(catalogue, splits, progress)
    provenance = describe_provenance(clip, experiment, weights, catalogue)
    rows = evaluate.prompted(catalogue, splits, prompts)
    embedding_file.write(out, rows, embedding, provenance)
    return SearchIndex(out, rows, embedding, json.loads(provenance))


def search(
    embeddings: str | Path,
    *,
    image: str | Path | None = None,
    text: str | None = None,
    top: int = 10,
    html: str | Path | None = None,
    checkpoint: str | None = None,
) -> list[SearchHit]:
    """Find the images that are nearest to a photo or to words, nearest first, as `clipfh search` does.

    Args:
        embeddings: file that `embed` wrote.
        image: photo to look for.
        text: words to look for, in place of a photo.
        top: number of images.
        html: page to write, with pictures of the photo and of the images.
        checkpoint: where the model lies, if no longer where it was.

    Raises:
        UserError: the file, the photo or the model can't be read, or is not what it was.
    """
    require(top >= 1, "top", "1 or more", top)
    if (image is None) == (text is None):
        raise UserError("give a photo (image) or words (text) to look for, one of them")
    index, photo = open_index(embeddings), Path(image) if image else None
    clip, settings = load_embedding_model(index, checkpoint)
    query = embed_photo(index, clip, settings, photo) if photo else embed_words(clip, settings, str(text))
    nearest_images = find_nearest(index, query, top)
    if html:
        write_page(html, index, photo.name if photo else str(text), photo, nearest_images)
    return nearest_images


def describe_provenance(clip: nn.Module, experiment: Experiment, weights: str, of: Catalogue) -> str:
    """The provenance that a file of embeddings holds, as JSON.

    Args:
        clip: the model.
        experiment: the model's experiment.
        weights: path of the model's weights; empty where they are the ones that the experiment itself starts from.
        of: the catalogue.
    """
    source = {"path": str(of.path), "hash": of.manifest["hash"], "image_size": of.manifest["settings"]["image_size"]}
    return json.dumps(
        {
            "clipfh": __version__,
            "model": model_fingerprint(clip, experiment.model),
            "weights": store.absolute(weights) if weights else "",
            "experiment": schema.to_json(experiment),
            "catalogue": source,
        }
    )


def open_index(file: str | Path | Folder) -> SearchIndex:
    """Open a file that `clipfh embed` wrote.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    file = Folder(file)
    if not file.is_file():
        raise UserError(f"--embeddings {file}: no such file: make one with clipfh embed CATALOGUE --out {file.name}")
    provenance = _parse_provenance(embedding_file.read_provenance(file))
    if provenance is None:
        raise UserError(f"{file} is no file of clipfh embed: make one with clipfh embed CATALOGUE --out {file.name}")
    return SearchIndex(file, *embedding_file.read(file), provenance)


def _parse_provenance(text: str | None) -> dict[str, Any] | None:
    """The provenance as JSON; None for another command's, such as the fingerprint that an evaluation leaves."""
    return json.loads(text) if text and text.startswith("{") else None


def load_embedding_model(index: SearchIndex, path: str | None = None) -> tuple[nn.Module, ModelSettings]:
    """The model that made the embeddings, and its settings.

    Args:
        index: the embeddings.
        path: where the model's weights lie, if no longer where they were.

    Raises:
        UserError: the model is gone, or is not the same any more.
    """
    experiment = schema.from_json(index.provenance["experiment"], str(index.file))
    where = path or index.provenance["weights"]
    if where and not Folder(where).exists():
        raise UserError(f"the model of {index.file} is no longer at {where}: say where by --checkpoint, or embed again")
    clip, _, _ = checkpoint_module.load_model(where or None, schema.flatten(experiment))
    if model_fingerprint(clip, experiment.model) != index.provenance["model"]:
        raise UserError(
            f"{index.file} was embedded with another model than {where or experiment.model.name}: give that one by "
            "--checkpoint, or embed again"
        )
    return clip, experiment.model


def embed_photo(index: SearchIndex, clip: nn.Module, settings: ModelSettings, file: str | Path) -> Tensor:
    """Unit embedding (D,) of a photo, encoded as the catalogue's photos were. UserError: it can't be read."""
    photo = encode_photo(file, index.provenance["catalogue"]["image_size"])
    pixels = images.decode_for_evaluation(photo, get_preprocess(clip))
    return embed_images(
        _towers_on_device(clip), np.stack([pixels]), resolve_precision(settings.precision, choose_device())
    )[0].cpu()


def embed_words(clip: nn.Module, settings: ModelSettings, words: str) -> Tensor:
    """Unit embedding (D,) of some words."""
    tokens = load_tokenizer(get_architecture(clip))([words])
    return embed_texts(_towers_on_device(clip), tokens, resolve_precision(settings.precision, choose_device()))[0].cpu()


def _towers_on_device(clip: nn.Module) -> Towers:
    return Towers(clip).to(choose_device()).eval()


def find_nearest(index: SearchIndex, query: Tensor, top: int) -> list[SearchHit]:
    """The `top` images of greatest cosine with the query (D,), nearest first; of equal ones the earlier first."""
    row, similarity = (part[0].tolist() for part in metrics.largest((index.embedding @ query)[None], top))
    rows = index.rows.take(row)
    return [
        SearchHit(*each) for each in zip(similarity, rows["item_id"].to_pylist(), rows["path"].to_pylist(), strict=True)
    ]


def write_page(
    out: str | Path | Folder, index: SearchIndex, title: str, photo: Path | None, hits: Sequence[SearchHit]
) -> None:
    """Write one HTML file, without network or script: the query, and pictures of its hits.

    Args:
        out: the file.
        index: the embeddings.
        title: the words, or the photo's name.
        photo: the photo that asks; None for words.
        hits: images, nearest first.

    Raises:
        UserError: the catalogue is gone or has changed.
    """
    source = index.provenance["catalogue"]
    pictures = _open_source(index).images_at([hit.path for hit in hits])
    entries = [(hit, images.thumbnail(pictures[hit.path], *THUMBNAIL)) for hit in hits]
    query = images.thumbnail(encode_photo(photo, source["image_size"]), *THUMBNAIL) if photo else None
    pages = Environment(loader=PackageLoader("clipfh.retrieval", ""), autoescape=True)
    text = pages.get_template("search.html").render(
        title=title,
        query=query,
        entries=entries,
        count=len(index.embedding),
        catalogue=source["path"],
        version=__version__,
    )
    out = Folder(out)
    out.parent.make()
    out.write("", text)


def _open_source(index: SearchIndex) -> Catalogue:
    """The catalogue that was embedded. UserError: it is gone or has changed."""
    source = index.provenance["catalogue"]
    if not Folder(source["path"]).is_folder():
        raise UserError(
            f"the pictures are in the catalogue {source['path']}, which is gone: put it back, or embed it where it is "
            "now; without --html the search works as it is"
        )
    catalogue = open_catalogue(source["path"])
    if catalogue.manifest["hash"] != source["hash"]:
        raise UserError(f"{catalogue.path} has changed since {index.file} was made: run clipfh embed again")
    return catalogue
