"""`audit`: the copies in a catalogue, and views that look like another item's; as JSON, a list of paths, and a page."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jinja2 import Environment, PackageLoader
from torch import Tensor
from torch.nn.functional import normalize

from clipfh import UserError, __version__
from clipfh.config import schema
from clipfh.data import audit as copies_module
from clipfh.data import images
from clipfh.data.audit import MANY_ITEMS, CopyGroup
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.data.splits import SPLITS
from clipfh.model.checkpoint import load_model
from clipfh.retrieval import evaluate, metrics
from clipfh.retrieval.embed import OnProgress, connection
from clipfh.storage import layout
from clipfh.storage.store import Folder

SHOWN_GROUPS, SHOWN_PHOTOS = 60, 6
"""How many groups of a kind the page shows, and how many photos of each."""
THUMBNAIL = (200, 270)
RATIO, DEVIATIONS = 2.0, 3.0
"""Least ratio and deviation of a suspect. Of 2% wrong labels on real photos, nine in ten had both."""
SOFTENING = 0.25
"""Share of the typical distance of an item's own views that is added to distances before they are divided."""
FEW = 30
"""Number of views below which train or the other splits have no distribution of their own."""


@dataclass(frozen=True)
class Suspect:
    """A view that looks like another item's."""

    path: str
    item_id: str
    split: str
    like: str
    """The item that it looks like."""
    ratio: float
    """Distance (1 - cosine, softened) to its own item divided by the distance to that item: the geometric mean of the
    ratio for the means of the items' views and of the ratio for their nearest views. Lowe 2004 tells matches so."""
    deviation: float
    """By how many standard deviations the logarithm of the ratio is above the median of its group: the views of train,
    which a model has learned with their labels, or all others."""


@dataclass(frozen=True)
class Audit:
    """Findings of `audit`, and the page that it wrote."""

    copies: list[CopyGroup]
    suspects: list[Suspect] | None
    """Most suspicious first; None without a model."""
    without: list[str]
    """Paths in the list for `prepare --without`."""
    page: Folder
    """The page with pictures; the list and `audit.json` lie beside it."""


def audit(
    catalogue: Catalogue | str | Path,
    *,
    checkpoint: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    progress: OnProgress | None = None,
    compare_progress: OnProgress = lambda done, total: None,
) -> Audit:
    """Look through a catalogue for copies and, with a model, for wrong labels, as `clipfh audit` does.

    Writes `audit.json`, `audit.html` and `without.txt` into the catalogue's folder. The list has all but one photo of
    each picture, and suspects of train. Suspects of validation and test are left to a person: without them, metrics
    would be too good.

    Args:
        catalogue: its path, or the opened catalogue.
        checkpoint: a run, sweep, checkpoint, export or weights file; without one or a model in the settings, labels are
            not looked at.
        settings: dotted settings of the model.
        address: Ray cluster to embed over.
        dashboard: serve Ray's dashboard, where a cluster is started.
        progress: called with the number of images embedded and of all images.
        compare_progress: called likewise while images are compared, where `prepare` did not.

    Raises:
        UserError: the catalogue, the model or a setting does not fit, or the folder can't be written.
    """
    catalogue = open_catalogue(catalogue)
    try:
        copies = copies_module.load_copies(catalogue, compare_progress)
        suspects = None
        if checkpoint or settings:
            clip, experiment, _ = load_model(checkpoint, schema.with_absolute_paths(settings or {}))
            splits = [split for split in SPLITS if catalogue.num_images(split)]
            with connection(address, dashboard):
                embedding = evaluate.choose_encoder(clip, experiment.model).images(catalogue, splits, progress)
            rows = pa.concat_tables(catalogue.rows(split).select(["path", "item_id", "split"]) for split in splits)
            suspects = find_suspects(embedding, rows, RATIO, DEVIATIONS)
        without = copies_module.photos_to_leave_out(copies, copies_module.count_photos(catalogue))
        without += [each.path for each in suspects or [] if each.split == "train" and each.path not in set(without)]
        page = catalogue.path / layout.AUDIT_PAGE
        _write(catalogue, copies, suspects, without)
    except OSError as error:
        raise UserError(
            f"{catalogue.path}: can't be written ({error}): audit a copy of it in another folder"
        ) from error
    return Audit(copies, suspects, without, page)


def _write(catalogue: Catalogue, copies: list[CopyGroup], suspects: list[Suspect] | None, without: list[str]) -> None:
    copies_module.save_copies(catalogue.path, copies, catalogue.manifest["hash"])
    if suspects is not None:
        findings = catalogue.path.read_json(layout.AUDIT) | {"suspects": [asdict(each) for each in suspects]}
        catalogue.path.write(layout.AUDIT, json.dumps(findings, indent=1) + "\n")
    catalogue.path.write(layout.WITHOUT, "".join(f"{path}\n" for path in without))
    catalogue.path.write(layout.AUDIT_PAGE, render_page(catalogue, copies, suspects, without))


def find_suspects(
    embedding: Tensor, rows: pa.Table, ratio: float = RATIO, deviations: float = DEVIATIONS
) -> list[Suspect]:
    """Views that are nearer to another item than to the other views of their own, the most suspicious first.

    A model that has learned wrong labels still puts these views nearer to their true item, if by less than views that
    it has not seen. So a view is compared with the views of train, or with the others.

    The view of an item with a single one is never a suspect, but others may look like it.

    Args:
        embedding: (N, D) unit vectors.
        rows: path, item_id and split of each.
        ratio: least ratio of a suspect.
        deviations: least deviation of a suspect.
    """
    encoded = rows["item_id"].combine_chunks().dictionary_encode()
    item = torch.from_numpy(encoded.indices.to_numpy().copy()).long()
    like, own, other = _compare(embedding, item)
    is_judged = item.bincount()[item] > 1
    is_train = torch.tensor([split == "train" for split in rows["split"].to_pylist()])
    log_ratio, deviation = torch.full((2, len(item)), -torch.inf)
    for group in _groups(is_train, is_judged):
        log_ratio[group], deviation[group] = _judge(own[:, group], other[:, group])
    order = deviation.argsort(descending=True, stable=True)
    order = order[((log_ratio > math.log(ratio)) & (deviation > deviations))[order]]
    columns = rows.take(order.numpy()).to_pylist()
    values = zip(like[order].tolist(), log_ratio[order].exp().tolist(), deviation[order].tolist(), strict=True)
    return [
        Suspect(row["path"], row["item_id"], row["split"], encoded.dictionary[which].as_py(), *amounts)
        for row, (which, *amounts) in zip(columns, values, strict=True)
    ]


def _groups(is_train: Tensor, is_judged: Tensor) -> list[Tensor]:
    """Groups of rows to judge together: train and the others; one group of all, where one of them has few rows."""
    groups = [(each & is_judged).nonzero().flatten() for each in (is_train, ~is_train)]
    return groups if min(map(len, groups)) >= FEW else [is_judged.nonzero().flatten()]


def _judge(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of ratios, and their deviations, (n,) each, from distances (2, n) to means and to nearest views.

    The standard deviation is estimated from the median deviation, in which wrong labels have no say.
    """
    if not own.numel():
        return torch.zeros(2, 0).unbind()  # type: ignore[return-value]
    soft = SOFTENING * own.median(1, keepdim=True).values.clamp(min=1e-6)
    logs = ((own + soft) / (other + soft)).log().mean(0)
    above = logs - logs.median()
    return logs, above / (1.4826 * above.abs().median()).clamp(min=1e-6)


def _compare(embedding: Tensor, item: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The other item that each view looks like, (N,), and the distances from its own item and from that one, (2, N).

    Distances, 1 - cosine, go to the mean of an item's views, without the view itself, and to the nearest of them.
    """
    sums = torch.zeros(int(item.max()) + 1, embedding.shape[1]).index_add_(0, item, embedding)
    own = (normalize(sums[item] - embedding) * embedding).sum(1)
    other, like = _nearest_others(embedding, item, normalize(sums))
    own, other = (
        torch.stack([to_mean, _nearest_views(embedding, item, which)])
        for to_mean, which in ((own, item), (other, like))
    )
    return like, (1 - own).clamp(min=0), (1 - other).clamp(min=0)


def _nearest_others(embedding: Tensor, item: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine (N,) with the nearest mean of another item, and which that is."""
    parts = []
    for rows in metrics.blocks_of_rows(len(embedding), len(means)):
        cosines = embedding[rows] @ means.T
        cosines[torch.arange(len(rows)), item[rows]] = -torch.inf
        parts.append(cosines.max(1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _nearest_views(embedding: Tensor, item: Tensor, which: Tensor) -> Tensor:
    """Cosine (N,) of each view with the nearest view, but itself, of the item `which` (N,)."""
    nearest = torch.full((len(item),), -torch.inf)
    for asking, views in zip(_rows_by(which, int(item.max()) + 1), _rows_by(item, int(item.max()) + 1), strict=True):
        for part in metrics.blocks_of_rows(len(asking), len(views)):
            rows = asking[part]
            cosines = embedding[rows] @ embedding[views].T
            nearest[rows] = cosines.masked_fill_(rows[:, None] == views, -torch.inf).amax(1)
    return nearest


def _rows_by(number: Tensor, count: int) -> Sequence[Tensor]:
    """The rows with each number below `count`."""
    return number.argsort(stable=True).split(number.bincount(minlength=count).tolist())


# The page


def render_page(
    catalogue: Catalogue, copies: Sequence[CopyGroup], suspects: Sequence[Suspect] | None, without: Sequence[str]
) -> str:
    """One HTML file, without network or script: copies and suspects, with their pictures side by side."""
    sections, top = _sections(copies), list(suspects or [])[:SHOWN_GROUPS]
    others = _some_views(catalogue, {name for each in top for name in (each.item_id, each.like)})
    entries = [
        (each, [path for path in others[each.item_id] if path != each.path][:2], others[each.like][:2]) for each in top
    ]
    paths = {photo.path for section in sections for group in section["groups"] for photo in group.photos[:SHOWN_PHOTOS]}
    paths |= {path for each, own, like in entries for path in (each.path, *own, *like)}
    encoded = catalogue.images_at(sorted(paths)) if paths else {}
    pages = Environment(loader=PackageLoader("clipfh.retrieval", ""), autoescape=True)
    return pages.get_template("audit.html").render(
        catalogue=catalogue,
        notes=copies_module.describe_copies(copies)[:-1],
        sections=sections,
        suspects=entries if suspects is not None else None,
        num_suspects=len(suspects or []),
        num_without=len(without),
        pictures={path: images.thumbnail(data, *THUMBNAIL) for path, data in encoded.items()},
        shown_photos=SHOWN_PHOTOS,
        version=__version__,
        list_name=layout.WITHOUT,
    )


def _sections(copies: Sequence[CopyGroup]) -> list[dict[str, Any]]:
    """Groups of copies under headings, the most harmful first, SHOWN_GROUPS of each."""
    headings = {
        "many": f"One picture under {MANY_ITEMS} items or more",
        "splits": "Across splits: leaks",
        "items": "Across items",
        "item": "Within an item",
    }
    groups = defaultdict[str, list[CopyGroup]](list)
    for group in copies:
        groups["many" if group.is_placeholder else group.reach].append(group)
    return [
        {"title": title, "count": len(groups[key]), "groups": groups[key][:SHOWN_GROUPS]}
        for key, title in headings.items()
        if groups[key]
    ]


def _some_views(catalogue: Catalogue, items: set[str], number: int = 3) -> dict[str, list[str]]:
    """The first paths of some items."""
    views = defaultdict[str, list[str]](list)
    for split in SPLITS:
        rows = catalogue.rows(split)
        for item, path in zip(rows["item_id"].to_pylist(), rows["path"].to_pylist(), strict=True):
            if item in items and len(views[item]) < number:
                views[item].append(path)
    return views
