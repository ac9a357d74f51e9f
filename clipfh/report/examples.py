"""Example queries and what models found for them, with pictures: which gained, which lost, which stay hard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clipfh import UserError
from clipfh.data import images
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.data.splits import GALLERY_OF
from clipfh.report.artifacts import ModelRecord
from clipfh.storage import layout

TOP = 10
SIZE = (112, 150)
"""Pictures fit into this: about twice what a screen shows."""
QUALITY = 55


@dataclass(frozen=True)
class RetrievedImage:
    """A gallery image that a query found."""

    path: str
    is_right: bool
    """whether it shows the query's item"""
    similarity: float


@dataclass(frozen=True)
class Ranking:
    """The images that one model ranks first for a query."""

    model: str
    precision: float
    """average precision over the images that are listed: a right image further down counts as not found"""
    first: int | None
    """place of the first right image; None where none is listed"""
    listed: int
    """number of images that are listed"""
    retrieved: list[RetrievedImage]
    """the first of the listed images"""


@dataclass(frozen=True)
class Query:
    """A query's photo, and what each model found."""

    path: str
    rankings: list[Ranking]


@dataclass(frozen=True)
class QueryGroup:
    """Queries of one kind."""

    title: str
    meaning: str
    queries: list[Query]


def pick_examples(models: Sequence[ModelRecord]) -> tuple[list[QueryGroup], dict[str, str]]:
    """Telling queries, and the pictures of all photos in them: path to data URI.

    For two models the queries that gained and lost most, and in any case the hardest queries.

    Raises:
        UserError: predictions or a catalogue that are no longer there, or not the same for all models.
    """
    catalogue = _open_catalogue(models)
    predictions = [_Predictions(model) for model in models]
    if any(each.paths != predictions[0].paths for each in predictions):
        raise UserError("the models were asked different queries")
    paths = set(predictions[0].paths)
    split = next(name for name in GALLERY_OF if paths & set(catalogue.rows(name)["path"].to_pylist()))
    items, answers = _items_and_answers(catalogue, split, predictions[0].paths)
    precision = [each.precision(answers) for each in predictions]
    measure = f"AP@{max(each.rank.max() for each in predictions)}"
    choice = _choose_queries([model.name for model in models], precision[0], precision[-1], items, measure)
    groups = []
    for words, own in choice:
        pairs = list(zip(predictions, precision, strict=True))
        queries = [Query(predictions[0].paths[i], [p.ranking(i, float(ap[i])) for p, ap in pairs]) for i in own]
        groups += [QueryGroup(*words, queries)] if queries else []
    queries = [query for group in groups for query in group.queries]
    retrieved = [image.path for query in queries for ranking in query.rankings for image in ranking.retrieved]
    return groups, _pictures(catalogue, [*(query.path for query in queries), *retrieved])


def _open_catalogue(models: Sequence[ModelRecord]) -> Catalogue:
    """The catalogue that all models were measured on, if it is still what it was."""
    for model in models:
        if not model.folder.exists(layout.PREDICTIONS):
            raise UserError(f"{model.folder}/{layout.PREDICTIONS} is not there")
        if not model.catalogue or model.catalogue["hash"] != models[0].catalogue["hash"]:
            raise UserError("it is not known that the figures are of one and the same catalogue")
    catalogue = open_catalogue(models[0].catalogue["path"])
    if catalogue.manifest["hash"] != models[0].catalogue["hash"]:
        raise UserError(f"{catalogue.path} has changed since the figures were made")
    return catalogue


class _Predictions:
    """`predictions.parquet`: queries one after the other, and the images found for each by rank."""

    def __init__(self, model: ModelRecord) -> None:
        table = model.folder.read_table(layout.PREDICTIONS)
        self.model = model.name
        self.gallery, self.similarity, self.match = (
            table[name].to_numpy() for name in ("gallery", "similarity", "match")
        )
        self.rank = table["rank"].to_numpy()
        self.starts = np.flatnonzero(self.rank == 1)
        self.paths: list[str] = table["query"].take(self.starts).to_pylist()

    def precision(self, answers: np.ndarray) -> np.ndarray:
        """Average precision of each query, (Q,), over its listed images; `answers`: number of right images."""
        right = np.cumsum(self.match)
        before = np.repeat((right - self.match)[self.starts], np.diff([*self.starts, len(right)]))
        return np.add.reduceat(self.match * (right - before) / self.rank, self.starts) / np.maximum(answers, 1)

    def ranking(self, i: int, precision: float) -> Ranking:
        """What the model found for query `i`."""
        start, end = [*self.starts, len(self.rank)][i : i + 2]
        right = np.flatnonzero(self.match[start:end])
        first = int(right[0]) + 1 if len(right) else None
        return Ranking(
            self.model, precision, first, int(end - start), self._retrieved(range(start, min(start + TOP, end)))
        )

    def _retrieved(self, rows: Iterable[int]) -> list[RetrievedImage]:
        return [RetrievedImage(self.gallery[r], bool(self.match[r]), float(self.similarity[r])) for r in rows]


Words = tuple[str, str]
"""title and meaning"""


def _choose_queries(
    names: Sequence[str], before: np.ndarray, after: np.ndarray, items: Sequence[str], measure: str
) -> list[tuple[Words, list[int]]]:
    """Numbers of queries of each kind, no item twice."""
    two, first, last = len(names) > 1, names[0], names[-1] or "all queries"
    middle = abs(after - np.median(after))
    kinds = [
        (
            ("Gained most", f"The largest gains in {measure} from {first} to {last}."),
            before - after,
            after > before,
            5 * two,
        ),
        (
            ("Lost most", f"The largest losses in {measure} from {first} to {last}."),
            after - before,
            after < before,
            3 * two,
        ),
        (("Hardest", f"The lowest {measure} of {last}."), after, after < 1, 5),
        (("Typical", "From the middle of the field."), middle, after >= 0, 4 * (not two)),
    ]
    used_items: set[str] = set()
    choice = []
    for words, order, fits, number in kinds:
        rows = [i for i in np.argsort(order, kind="stable").tolist() if fits[i]]
        choice.append((words, _of_different_items(rows, number, items, used_items)))
    return choice


def _of_different_items(rows: Iterable[int], number: int, items: Sequence[str], used_items: set[str]) -> list[int]:
    """The first queries of `rows`, none of whose items is used already."""
    own: list[int] = []
    for i in rows:
        if len(own) < number and items[i] not in used_items:
            used_items.add(items[i])
            own.append(i)
    return own


def _items_and_answers(catalogue: Catalogue, split: str, paths: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The item of each query, and how many gallery images answer it."""
    rows, gallery = catalogue.rows(split), catalogue.rows(GALLERY_OF[split])
    item_of = dict(zip(rows["path"].to_pylist(), rows["item_id"].to_pylist(), strict=True))
    number, also = Counter(gallery["item_id"].to_pylist()), set(gallery["path"].to_pylist())
    # A query's own photo is no answer
    return [item_of[path] for path in paths], np.array([number[item_of[path]] - (path in also) for path in paths])


def _pictures(catalogue: Catalogue, paths: Iterable[str]) -> dict[str, str]:
    """Small pictures of some images, as data URIs."""
    photos = catalogue.images_at(list(set(paths)))
    return {path: images.thumbnail(encoded, *SIZE, QUALITY) for path, encoded in photos.items()}
