"""What a person looks at: evaluations, runs and sweeps as one HTML page that needs no network and no script."""

from __future__ import annotations

import csv
import html
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from clipfh import UserError, __version__, config

ZERO_SHOT = "0000"
NONE = "–"
RANKS = {f"rank{k}": f"Rank-{k}" for k in (1, 5, 10, 20, 30, 40, 50)}
LABELS = {"mAP": "mAP", **RANKS, "mAP_at_R": "mAP@R", "mINP": "mINP"}

Figures = Mapping[str, Any]
"""what a `metrics.json` holds, or a part of it"""
Columns = Sequence[tuple[str, Figures]]
"""the models shown side by side: name and figures"""


def write(paths: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page and return where it is.

    Args:
        paths: folders of evaluations, runs and sweeps; several are compared.
        out: the file; by default `report.html` in the first folder.

    Raises:
        UserError: a folder that is none of these or can't be read, or a file that can't be written.
    """
    shown = [read(path) for path in paths]
    out = Path(out) if out else Path(paths[0]) / "report.html"
    whole = out.with_name(f"{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(page(shown), encoding="utf-8")
        whole.replace(out)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): name another file with --out") from error
    return out


# --- Markup ----------------------------------------------------------------------------------------------------------


class Html(str):
    """Markup. Any other string is text, and is escaped where it is put into markup."""


def el(tag: str, *children: str, **attributes: str) -> Html:
    """An element. A trailing `_` of an attribute's name is dropped; the others become `-`."""
    named = "".join(f' {n.rstrip("_").replace("_", "-")}="{html.escape(v)}"' for n, v in attributes.items())
    return Html(f"<{tag}{named}>{join(*children)}</{tag}>")


def join(*parts: str) -> Html:
    """Texts and elements one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: int = -1, tall: bool = False) -> Html:
    """A table in a box of its own, which scrolls where the page is narrow.

    Args:
        head: of the columns.
        rows: cells; the first names the row.
        marked: the row to emphasise.
        tall: keep the box within the screen.
    """
    heads = el("tr", *(el("th", cell, scope="col") for cell in head))
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            *(el("td", cell) for cell in row[1:]),
            **({"class_": "marked"} if i == marked else {}),
        )
        for i, row in enumerate(rows)
    ]
    whole = el("table", el("thead", heads), el("tbody", *body))
    return el("div", whole, class_="box tall" if tall else "box", tabindex="0")


def chapter(title: str, *parts: str) -> Html:
    """A heading and what stands below it; nothing where all of that is empty."""
    return el("section", el("h2", title), *parts) if any(parts) else Html()


def text(*parts: str) -> Html:
    """A paragraph."""
    return el("p", *parts)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def known(value: Any) -> bool:  # noqa: ANN401
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def score(value: Any) -> str:  # noqa: ANN401
    """A figure from 0 to 1 with three digits, as everywhere."""
    return f"{value:.3f}" if known(value) else NONE


def count(value: Any) -> str:  # noqa: ANN401
    """12,612."""
    return f"{value:,.0f}" if known(value) else NONE


def short(value: Any) -> str:  # noqa: ANN401
    """A setting or a measurement, to three digits; whole numbers and words as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else NONE
    return str(value) if value not in (None, "") else NONE


def duration(seconds: Any) -> str:  # noqa: ANN401
    """42 s, 3 min 20 s, 2 h 05 min."""
    if not known(seconds):
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, part = divmod(minutes, 60)
    return f"{hours:,} h {part:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def with_interval(figures: Figures, key: str) -> Html:
    """A figure and its 95% interval."""
    ends = (figures.get("intervals") or {}).get(key)
    return join(score(figures.get(key)), *([" ", el("small", f"[{score(ends[0])}, {score(ends[1])}]")] if ends else []))


def number_in(cell: str | None) -> float | None:
    """The number in a cell of a CSV file; None where there is none."""
    try:
        return float(cell or "")
    except ValueError:
        return None


# --- Plots: curves stretch with the page, text and marks keep their size ----------------------------------------------


@dataclass(frozen=True)
class Series:
    """Points of a plot. Those of several series may share a name, which stands in the legend once."""

    name: str
    kind: str
    """main, quiet, dashed (lines), dots or crosses"""
    points: Sequence[tuple[float, float]]
    tip: str = ""
    """shown under the pointer, in place of the name"""


@dataclass(frozen=True)
class Axis:
    """Round numbers around some values."""

    ticks: list[float]
    step: float

    @classmethod
    def around(cls, values: Sequence[float], least: float = 0.0) -> Axis:
        """Four to nine ticks, `least` apart or more, from below the lowest value to above the highest."""
        low, high = min(values), max(values)
        span = max(high - low, 4 * least) or abs(low) or 1.0
        rough = span / 4
        power = 10 ** math.floor(math.log10(rough))
        step = max(least, power * max(m for m in (1, 2, 5) if m * power <= rough * 1.0001))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls([i * step for i in range(first, max(last, first + 1) + 1)], step)

    def place(self, value: float) -> float:
        """Per cent of the way along the axis."""
        return 100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def label(self, tick: float) -> str:
        """0.25, 4, 20k or 1.5M."""
        for size, letter in ((1e6, "M"), (1e3, "k")):
            if self.ticks[-1] >= 10 * size or (size == 1e6 and self.ticks[-1] >= size):
                return f"{tick / size:g}{letter}" if tick else "0"
        return f"{tick:.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}"


def plot(title: str, x_title: str, y_title: str, series: Sequence[Series]) -> Html:
    """A figure of the series; nothing where they have no points."""
    series = [Series(s.name, s.kind, [p for p in s.points if known(p[1])], s.tip) for s in series]
    points = [point for s in series for point in s.points]
    if not points:
        return Html()
    x, y = Axis.around([p[0] for p in points], least=1.0), Axis.around([p[1] for p in points])
    lines = [_line(s, x, y) for s in series if s.kind not in ("dots", "crosses") and s.points]
    marks = [
        _mark(s, x.place(p), 100 - y.place(q)) for s in series if s.kind in ("dots", "crosses") for p, q in s.points
    ]
    stretched = el("svg", *lines, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    drawing = el("svg", *_grid(x, y), stretched, *marks, role="img", aria_label=f"{title}: {y_title} by {x_title}")
    legend = {s.name: s.kind for s in series if s.points}
    keys = [el("span", el("i", class_=kind), name) for name, kind in legend.items()]
    return el(
        "figure",
        el("div", y_title, class_="axis"),
        el("div", drawing, class_="plot"),
        el("div", x_title, class_="axis under"),
        el("figcaption", *keys) if len(keys) > 1 else Html(),
    )


def _grid(x: Axis, y: Axis) -> list[Html]:
    levels = [(y.label(tick), f"{100 - y.place(tick):.2f}%") for tick in y.ticks]
    places = [(x.label(tick), f"{x.place(tick):.2f}%") for tick in x.ticks]
    rules = [el("line", x1="0", x2="100%", y1=at, y2=at) for _, at in levels]
    left = [el("text", label, x="-8", y=at, dy=".35em", text_anchor="end") for label, at in levels]
    below = [el("text", label, x=at, y="100%", dy="1.6em", text_anchor="middle") for label, at in places]
    return rules + left + below


def _line(series: Series, x: Axis, y: Axis) -> Html:
    corners = " L".join(f"{x.place(p):.2f} {100 - y.place(q):.2f}" for p, q in series.points)
    # The zero-length end makes a dot of a line of one point
    return el("path", el("title", series.tip or series.name), class_=series.kind, d=f"M{corners} h0")


def _mark(series: Series, x: float, y: float) -> Html:
    tip = el("title", series.tip or series.name)
    if series.kind == "dots":
        return el("circle", tip, class_=series.kind, cx=f"{x:.2f}%", cy=f"{y:.2f}%", r="3.5")
    return el("text", "×", tip, class_=series.kind, x=f"{x:.2f}%", y=f"{y:.2f}%", dy=".35em", text_anchor="middle")


# --- Evidence: figures of one model, or of several side by side -------------------------------------------------------


def evidence(columns: Columns) -> Html:
    """All that the models' `metrics.json` hold, a chapter for each kind."""
    return join(
        chapter("Figures", figure_table(columns), _counted(columns)),
        chapter(
            "Same and other variants",
            _parts(columns, ("variant",), {"same": "Same", "cross": "Other"}),
            _variants(columns),
        ),
        chapter(
            "Between text and image",
            _parts(columns, (), {"text_to_image": "Text to image", "image_to_text": "Image to text"}),
        ),
        chapter("Random splits", _splits(columns)),
        chapter("By category", _groups(columns, "by_category", "Category")),
        chapter("By gender", _groups(columns, "by_gender", "Gender")),
    )


def figure_table(columns: Columns) -> Html:
    """A row for each figure that any of the models has."""
    rows = [
        [label, *(with_interval(figures, key) for _, figures in columns)]
        for key, label in LABELS.items()
        if any(figures.get(key) is not None for _, figures in columns)
    ]
    return table(["", *(name for name, _ in columns)], rows) if rows else Html()


def _counted(columns: Columns) -> Html:
    sizes = {(count(f.get("num_query")), count(f.get("num_gallery"))) for _, f in columns if f}
    said = (
        " In brackets the 95% interval, by bootstrap over items. Rank-k is the share of queries with a right image "
        "among the first k; mAP judges the place of every right image."
    )
    if len(sizes) != 1:
        return text("The columns do not rank the same images: compare them with care.", said)
    query, gallery = sizes.pop()
    return text(f"{query} queries, {gallery} gallery images.", said)


def _parts(columns: Columns, path: Sequence[str], names: Mapping[str, str]) -> Html:
    """mAP and Rank-1, 5 and 10 of parts of the figures."""
    rows = []
    for part, label in names.items():
        found = [_at(figures, *path, part) for _, figures in columns]
        for key in ("mAP", "rank1", "rank5", "rank10"):
            if any(figures.get(key) is not None for figures in found):
                rows.append([f"{label}: {LABELS[key]}", *(with_interval(figures, key) for figures in found)])
    return table(["", *(name for name, _ in columns)], rows) if rows else Html()


def _variants(columns: Columns) -> Html:
    same, cross = (_at(columns[0][1], "variant", part) for part in ("same", "cross"))
    if not same and not cross:
        return Html()
    sizes = f"{count(same.get('num_query'))} and {count(cross.get('num_query'))}"
    return text(
        "Same: only the item's images of the query's own variant are to be found, and its others are ignored. Other: "
        f"the reverse. Queries that have any to find: {sizes}."
    )


def _splits(columns: Columns) -> Html:
    rows, number = [], 0
    for key, label in LABELS.items():
        found = [_at(figures, "random_splits", key) for _, figures in columns]
        if any(known(each.get("mean")) for each in found):
            rows.append([label, *(f"{score(each.get('mean'))} ± {score(each.get('std'))}" for each in found)])
            number = max(number, *(len(each.get("values", ())) for each in found))
    if not rows:
        return Html()
    said = (
        f"Mean and standard deviation over {number} splits. In each, one random image of every item is the query, and "
        "all other images are the gallery."
    )
    return join(table(["", *(name for name, _ in columns)], rows), text(said))


def _groups(columns: Columns, key: str, title: str) -> Html:
    groups = [_at(figures, key) for _, figures in columns]
    sizes = {name: group.get("num_query") or 0 for each in groups for name, group in each.items()}
    rows = [
        [name or NONE, count(size), *(with_interval(_at(each, name), k) for each in groups for k in ("mAP", "rank1"))]
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]
    heads = [f"{name} {LABELS[k]}" for name, _ in columns for k in ("mAP", "rank1")]
    return table([title, "Queries", *heads], rows) if rows else Html()


def _at(figures: Figures, *path: str) -> Figures:
    """A part of the figures; empty where it is missing or null."""
    for name in path:
        figures = figures.get(name) or {}
    return figures


# --- An evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """`metrics.json`."""

    path: Path
    figures: Figures
    kind = "Evaluation"
    val_mAP = None

    @property
    def verdict(self) -> Html:
        """One sentence."""
        return join("mAP ", with_interval(self.figures, "mAP"), ", Rank-1 ", with_interval(self.figures, "rank1"), ".")

    def body(self) -> Html:
        """What stands below the verdict."""
        return evidence([("", self.figures)])


# --- A run -----------------------------------------------------------------------------------------------------------


LAST = {
    "step": ("Step", count),
    "images": ("Images seen", count),
    "epoch": ("Passes over the train images", short),
    "val_mAP": ("Validation mAP", score),
    "loss": ("Loss", short),
    "grad_norm": ("Gradient norm", short),
    "image_text_cosine": ("Cosine of image and text", score),
    "lr": ("Learning rate", short),
    "images_per_second": ("Images a second", short),
    "data_wait": ("Share of the time spent waiting for images", score),
}


@dataclass(frozen=True)
class Run:
    """`experiment.json` and `metrics.jsonl`."""

    path: Path
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    kind = "Run"

    @property
    def figures(self) -> Figures:
        """None: a run has only its validation mAP."""
        return {}

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The lines without the one that tells of a divergence."""
        return [line for line in self.lines if "diverged" not in line]

    @property
    def best(self) -> dict[str, Any] | None:
        """The report with the highest validation mAP."""
        return max((r for r in self.reports if known(r.get("val_mAP"))), key=lambda r: r["val_mAP"], default=None)

    @property
    def val_mAP(self) -> float | None:
        """The highest."""
        return self.best["val_mAP"] if self.best else None

    @property
    def verdict(self) -> Html:
        """One or two sentences."""
        said = []
        if self.lines and "diverged" in self.lines[-1]:
            said.append(f"Diverged after {count(self.lines[-1].get('images'))} images: {self.lines[-1]['diverged']}. ")
        if self.best is None:
            return join(*said, "No validation figure yet.")
        seen, total = self.reports[-1].get("images"), self.settings["budget.images"]
        budget = f"{count(total)} images" if total else f"{short(self.settings['budget.epochs'])} epochs"
        said.append(f"Best validation mAP {score(self.val_mAP)}, after {count(self.best.get('images'))} images. ")
        return join(*said, f"{count(seen)} images seen, of a budget of {budget}.")

    def body(self) -> Html:
        """What stands below the verdict."""
        learning = [Series("validation mAP", "main", curve(self.reports))]
        last = self.reports[-1] if self.reports else {}
        rows = [[label, form(last[key])] for key, (label, form) in LAST.items() if key in last]
        return join(
            chapter("Learning curve", plot("Learning curve", "images seen", "validation mAP", learning)),
            chapter("Losses", self._losses()),
            chapter("Last report", table(["", ""], rows) if rows else Html()),
            chapter("Settings", self._settings()),
        )

    def _losses(self) -> Html:
        terms = list(dict.fromkeys(k.removeprefix("loss_") for r in self.reports for k in r if k.startswith("loss_")))
        if not terms:
            return Html()
        heads = ["Term", "Last", "Floor", "Collapse", "Way from floor to collapse"]
        said = (
            "Floor: the loss with perfect embeddings. Collapse: with all embeddings equal, where nothing is told apart."
        )
        plots = [self._loss_plot(term) for term in terms]
        return join(el("div", *plots, class_="plots"), table(heads, [self._loss_row(t) for t in terms]), text(said))

    def _loss_plot(self, term: str) -> Html:
        kinds = (("loss", "main"), ("floor", "dashed"), ("collapse", "quiet"))
        series = [Series(f"{term} {key}", kind, curve(self.reports, f"{key}_{term}")) for key, kind in kinds]
        return plot(f"Loss {term}", "images seen", "loss", series)

    def _loss_row(self, term: str) -> list[str]:
        loss, floor, collapse = (self.reports[-1].get(f"{key}_{term}") for key in ("loss", "floor", "collapse"))
        way = (loss - floor) / (collapse - floor) if known(loss) and floor is not None and collapse != floor else None
        return [term, short(loss), short(floor), short(collapse), f"{way:.0%}" if known(way) else NONE]

    def _settings(self) -> Html:
        meaning = {name: said for name, _, _, said in config.fields()}
        return table(["Setting", "Value", ""], [[n, short(v), meaning.get(n, "")] for n, v in self.settings.items()])


def curve(lines: Sequence[Mapping[str, Any]], key: str = "val_mAP") -> list[tuple[float, float]]:
    """A quantity against the images seen."""
    return [(line["images"], line[key]) for line in lines if key in line and "diverged" not in line]


# --- A sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """`sweep.yaml`, `leaderboard.csv`, the trials' `metrics.jsonl`, and at the end `summary.json`."""

    path: Path
    file: Mapping[str, Any]
    rows: list[dict[str, str]]
    trials: dict[str, list[dict[str, Any]]]
    """reports of each trial"""
    summary: Figures
    """empty while there is none"""
    kind = "Sweep"

    @property
    def best(self) -> str:
        """The winner, or the leading trial so far; empty without any figure."""
        leading = (row["trial"] for row in self.rows if number_in(row["val_mAP"]) is not None)
        return str(self.summary.get("best_trial") or next(leading, ""))

    @property
    def figures(self) -> Figures:
        """The winner's on the test split."""
        return _at(self.summary, "test")

    @property
    def val_mAP(self) -> float | None:
        """The winner's, or the best so far."""
        return self._val(self.best)

    def _val(self, trial: str) -> float | None:
        return next((number_in(row["val_mAP"]) for row in self.rows if row["trial"] == trial), None)

    @property
    def verdict(self) -> Html:
        """What came of it, in plain words."""
        if not self.summary:
            return self._so_far()
        before, after = _at(self.summary, "zero_shot"), self.figures
        figures = [with_interval(each, "mAP") for each in (after, before)]
        if self.best == ZERO_SHOT:
            return join(
                "Tuning made nothing better: the zero-shot model wins, with mAP ", figures[1], " on the test split."
            )
        told = join(
            f"The winner, trial {self.best}, finds the same item with mAP ",
            figures[0],
            " against ",
            figures[1],
            " zero-shot on the test split.",
        )
        return join(told, _caution(before, after))

    def _so_far(self) -> Html:
        ended = sum(row["status"] not in ("zero-shot", "running") for row in self.rows)
        of = f"{ended} of {self.file.get('trials', NONE)} trials over"
        said = f"Not finished: this sweep is still running or was broken off, with {of}. "
        if not self.best:
            return join(said, "There is no validation figure yet.")
        leader = "The zero-shot model" if self.best == ZERO_SHOT else f"Trial {self.best}"
        against = "" if self.best == ZERO_SHOT else f" against {score(self._val(ZERO_SHOT))} zero-shot"
        leads = f"{leader} leads with validation mAP {score(self.val_mAP)}{against}. "
        return join(said, leads, "The test split is untouched until the end.")

    def body(self) -> Html:
        """What stands below the verdict."""
        columns = [("zero-shot", _at(self.summary, "zero_shot")), ("winner", self.figures)]
        curves = plot("Learning curves", "images seen", "validation mAP", self._curves())
        history = plot("History", "trial", "validation mAP", self._history())
        return join(
            evidence(columns) if self.summary else Html(),
            chapter("Leaderboard", self._leaderboard()),
            chapter("Course of the search", history),
            chapter("Learning curves", curves),
            chapter("The winner's settings", self._command()),
            chapter("What it took", self._cost()),
        )

    def _leaderboard(self) -> Html:
        if not self.rows:
            return Html()
        plain = ("rank", "trial", "status", "val_mAP", "images", "seconds", "error")
        searched = [name for name in self.rows[0] if name not in plain]
        heads = ["Trial", "Validation mAP", "Status", "Images", "Time", *(_dotted(name) for name in searched), "Error"]
        rows = [
            [
                row["trial"],
                score(number_in(row["val_mAP"])),
                row["status"],
                count(number_in(row["images"])),
                duration(number_in(row["seconds"])),
                *(_cell(row[name]) for name in searched),
                el("span", row["error"] or NONE, class_="words"),
            ]
            for row in self.rows
        ]
        place = [row["trial"] for row in self.rows].index(self.best) if self._val(self.best) is not None else -1
        return table(heads, rows, marked=place, tall=True)

    def _history(self) -> list[Series]:
        """Each trial's figure by its number, and the best so far."""
        rows = sorted((row for row in self.rows if row["trial"].isdigit()), key=lambda row: int(row["trial"]))
        value = {
            int(row["trial"]): number_in(row["val_mAP"]) for row in rows if row["status"] not in ("failed", "diverged")
        }
        found = {number: v for number, v in value.items() if v is not None}
        low, top, best = min(found.values(), default=0.0), -math.inf, []
        for number, v in found.items():
            best += [(number, max(top, v))] if top == -math.inf else [(number, top), (number, max(top, v))]
            top = max(top, v)
        dots = [Series("a trial", "dots", [(n, v)], f"trial {n:04d}: {score(v)}") for n, v in found.items()]
        lost = [row for row in rows if row["status"] in ("failed", "diverged")]
        crosses = [
            Series("failed or diverged", "crosses", [(int(r["trial"]), low)], f"trial {r['trial']} {r['status']}")
            for r in lost
        ]
        return [Series("best so far", "main", best), *dots, *crosses]

    def _curves(self) -> list[Series]:
        """All trials' curves, the best one's last and so on top, and zero-shot as a level."""
        curves = {trial: curve(lines) for trial, lines in self.trials.items()}
        others = [
            Series("other trials", "quiet", points, f"trial {trial}")
            for trial, points in curves.items()
            if trial != self.best
        ]
        level, end = self._val(ZERO_SHOT), max((p[0] for points in curves.values() for p in points), default=0)
        zero_shot = [Series("zero-shot", "dashed", [(0, level), (end, level)])] if level is not None and end else []
        best = [Series(f"best, trial {self.best}", "main", curves[self.best])] if self.best in curves else []
        return [*others, *zero_shot, *best]

    def _command(self) -> Html:
        experiment = self.summary.get("experiment")
        if not experiment or self.best == ZERO_SHOT:
            return Html()
        return join(
            el("pre", command(experiment, self.summary.get("searched") or ()), tabindex="0"),
            text("Trains the winner again."),
        )

    def _cost(self) -> Html:
        statuses = Counter(row["status"] for row in self.rows)
        told = ", ".join(
            f"{statuses[s]} {s}" for s in ("done", "stopped", "diverged", "failed", "running") if statuses[s]
        )
        total = {key: sum(number_in(row[key]) or 0 for row in self.rows) for key in ("images", "seconds")}
        rows = [
            ["Trials", told or NONE],
            ["Images seen, all trials", count(total["images"])],
            ["Time of the trials, added up", duration(total["seconds"])],
        ]
        if self.summary:
            rows.append(["Time from start to end", duration(self.summary.get("seconds"))])
        catalogue = _at(self.summary, "catalogue")
        rows += [[f"Catalogue: {key}", short(catalogue[key])] for key in ("path", "hash") if key in catalogue]
        for split, size in _at(catalogue, "counts").items():
            rows.append(
                [f"Catalogue: {split}", f"{count(size.get('images'))} images, {count(size.get('items'))} items"]
            )
        return table(["", ""], rows)


def _caution(before: Figures, after: Figures) -> str:
    """What must be said where the gain is none, or not sure."""
    if not known(before.get("mAP")) or not known(after.get("mAP")):
        return ""
    if after["mAP"] <= before["mAP"]:
        return " It led on the validation items only: on the test split it is not better."
    ends = [_at(each, "intervals").get("mAP") for each in (before, after)]
    return " The 95% intervals overlap: the gain may be chance." if all(ends) and ends[0][1] >= ends[1][0] else ""


def _dotted(name: str) -> Html:
    """A setting's name on two lines."""
    group, _, leaf = name.rpartition(".")
    return join(el("small", group), Html("<br>"), leaf) if group else join(leaf)


def _cell(value: str | None) -> str:
    number = number_in(value)
    return short(number if number is not None and not str(value).isdigit() else value)


def command(experiment: Mapping[str, Any], searched: Sequence[str]) -> str:
    """The command line that trains these settings: those searched, and those that are not the usual ones.

    Args:
        experiment: dotted settings.
        searched: names to show in any case.
    """
    stage, name = experiment["stage"], experiment["model.name"]
    usual = config.flat(config.resolve(stage, None, {"model.name": name}))
    told = {"model.name", *searched, *(n for n, value in experiment.items() if value != usual.get(n))} - {"stage"}
    words = (
        f"--{n} {shlex.quote(str(v).lower() if isinstance(v, bool) else str(v))}"
        for n, v in experiment.items()
        if n in told
    )
    return " \\\n  ".join([f"clipfh train {stage} CATALOGUE --out DIR", *words])


# --- Folders ---------------------------------------------------------------------------------------------------------


Shown = Evaluation | Run | Sweep


def read(path: str | Path) -> Shown:
    """What a folder holds.

    Raises:
        UserError: nothing to report, or a file that can't be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; name an evaluation, a run or a sweep")
    if (folder / "sweep.yaml").is_file():
        return _read_sweep(folder)
    if (folder / "experiment.json").is_file() and (folder / "metrics.jsonl").is_file():
        settings = config.flat(config.load(folder / "experiment.json"))
        return Run(folder, settings, _read_lines(folder / "metrics.jsonl"))
    figures = _read_json(folder / "metrics.json")
    if "mAP" in figures:
        return Evaluation(folder, figures)
    raise UserError(
        f"{path} holds nothing to report: name the folder of an evaluation (metrics.json), of a sweep (sweep.yaml) "
        "or of a run that has reported (experiment.json, metrics.jsonl)"
    )


def _read_sweep(folder: Path) -> Sweep:
    try:
        file = yaml.safe_load((folder / "sweep.yaml").read_text())
    except yaml.YAMLError as error:
        raise _unreadable(folder / "sweep.yaml", error) from error
    rows = []
    if (folder / "leaderboard.csv").exists():
        with (folder / "leaderboard.csv").open(newline="") as table_:
            rows = list(csv.DictReader(table_, restval=""))
    trials = {path.parent.name: _read_lines(path) for path in sorted(folder.glob("trials/*/metrics.jsonl"))}
    return Sweep(folder, file if isinstance(file, dict) else {}, rows, trials, _read_json(folder / "summary.json"))


def _read_json(file: Path) -> dict[str, Any]:
    """An object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise _unreadable(file, error) from error
    return found if isinstance(found, dict) else {}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} can't be read ({' '.join(str(error).split())}): is it whole?")


# --- The page --------------------------------------------------------------------------------------------------------


def page(shown: Sequence[Shown]) -> str:
    """The whole file."""
    names = _names([each.path for each in shown])
    several = len(shown) > 1
    title = "Comparison" if several else f"{shown[0].kind} {names[0]}"
    articles = [
        el(
            "article",
            el("h1", f"{each.kind} {name}"),
            el("p", each.verdict, class_="verdict"),
            each.body(),
            id=f"part-{i}",
        )
        for i, (name, each) in enumerate(zip(names, shown, strict=True), 1)
    ]
    foot = el("footer", f"clipfh {__version__}, {datetime.now():%Y-%m-%d %H:%M}")
    body = el("body", el("main", compare(names, shown) if several else Html(), *articles, foot))
    head = join(Html(HEAD), el("title", title), el("style", Html(STYLE)))
    return f"<!DOCTYPE html>\n{el('html', el('head', head), body, lang='en')}\n"


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or as they were given where two are alike."""
    own = [path.resolve().name for path in paths]
    return own if len(set(own)) == len(own) else [str(path) for path in paths]


def compare(names: Sequence[str], shown: Sequence[Shown]) -> Html:
    """A column for each, at a glance."""
    columns = [(name, each.figures) for name, each in zip(names, shown, strict=True)]
    rows: list[list[str]] = [["Kind", *(each.kind for each in shown)]]
    if any(each.val_mAP is not None for each in shown):
        rows.append(["Validation mAP", *(score(each.val_mAP) for each in shown)])
    for key, label in LABELS.items():
        if any(figures for _, figures in columns):
            rows.append([label, *(with_interval(figures, key) for _, figures in columns)])
    links = [el("a", name, href=f"#part-{i}") for i, name in enumerate(names, 1)]
    said = "A sweep stands for its winner on the test split. A run has its validation mAP only: evaluate it for the rest."
    return el("article", el("h1", "Comparison"), table(["", *links], rows), _counted(columns), text(said))


HEAD = (
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
)

STYLE = """
:root {
  --serif: Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --paper: #fdfcf9; --ink: #24211c; --soft: #6d675c; --rule: #e2ddd1; --main: #a5431d; --quiet: #a79f90;
}
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #191816; --ink: #e9e4d9; --soft: #a09888; --rule: #37342e; --main: #ec9a70; --quiet: #6f695e; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--serif); }
main { max-width: 58rem; margin: 0 auto; padding: clamp(1.25rem, 5vw, 4rem) clamp(1rem, 4vw, 2rem); }
h1 { font-size: 1.9rem; font-weight: 400; line-height: 1.2; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.8rem 0 .7rem; }
p { max-width: 40rem; margin: .7rem 0; color: var(--soft); font-size: .92rem; overflow-wrap: anywhere; }
p.verdict { color: var(--ink); font-size: 1.2rem; line-height: 1.5; }
small { color: var(--soft); font-size: .82em; font-weight: 400; white-space: nowrap; }
article + article { margin-top: 4.5rem; padding-top: 3rem; border-top: 1px solid var(--rule); }
footer { margin-top: 4rem; color: var(--soft); font-size: .8rem; }
a { color: inherit; text-decoration-color: var(--quiet); text-underline-offset: .2em; }
.box, pre { overflow-x: auto; }
.box.tall { max-height: 36rem; overflow-y: auto; }
table, figure, pre { font-family: var(--sans); font-size: .84rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; line-height: 1.35; }
th, td { padding: .38rem 1.6rem .38rem 0; border-bottom: 1px solid var(--rule); }
th, td { text-align: left; vertical-align: baseline; white-space: nowrap; font-weight: 400; }
thead th { color: var(--soft); vertical-align: bottom; }
thead tr:not(:has(:not(:empty))) { display: none; }
.tall thead th { position: sticky; top: 0; background: var(--paper); box-shadow: inset 0 -1px var(--rule); }
.marked > * { color: var(--main); font-weight: 600; }
.words { display: block; min-width: 14rem; max-width: 28rem; white-space: normal; overflow-wrap: anywhere; }
pre { font-family: var(--mono); line-height: 1.6; margin: .7rem 0; }
pre { padding: .9rem 1.1rem; border: 1px solid var(--rule); border-radius: 3px; }
figure { margin: 1rem 0; color: var(--soft); break-inside: avoid; }
.plot { height: 17rem; margin: .7rem 1.2rem 1.9rem 2.9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
.plots .plot { height: 12rem; }
.axis { font-size: .92em; }
.axis.under { text-align: right; margin: -.4rem 1.2rem 0 0; }
svg { display: block; width: 100%; height: 100%; overflow: visible; font-size: 12px; }
svg text { fill: var(--soft); }
svg line { stroke: var(--rule); }
svg path { fill: none; stroke: var(--quiet); stroke-width: 1.2; vector-effect: non-scaling-stroke; }
svg path { stroke-linejoin: round; stroke-linecap: round; }
svg .quiet { opacity: .75; }
svg .main { stroke: var(--main); stroke-width: 2.2; }
svg .dashed { stroke: var(--ink); stroke-dasharray: 2 5; stroke-width: 1.5; }
svg .dots { fill: var(--paper); stroke: var(--soft); stroke-width: 1.3; }
svg .crosses { fill: var(--soft); font-size: 15px; }
figcaption { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin-top: .5rem; }
figcaption i { display: inline-block; width: 1.5rem; margin-right: .5rem; vertical-align: .25em; }
figcaption i { border-top: 1.5px solid var(--quiet); }
figcaption i.main { border-top: 2.5px solid var(--main); }
figcaption i.dashed { border-top: 2px dotted var(--ink); }
figcaption i.dots { width: 8px; height: 8px; vertical-align: 0; border: 1.3px solid var(--soft); border-radius: 50%; }
figcaption i.crosses { width: auto; border: 0; vertical-align: 0; }
figcaption i.crosses::before { content: "×"; font-style: normal; }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .box, .box.tall, pre { overflow: visible; max-height: none; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .8rem; white-space: normal; }
  h2, thead { break-after: avoid; }
  tr { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""
