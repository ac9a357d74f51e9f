"""What a person looks at: evaluations, runs and sweeps as one HTML page that needs no network and no script."""

from __future__ import annotations

import csv
import html
import json
import math
import re
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
COUNT = re.compile(rf"[\d,]+|{NONE}")
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
    own = [Path(path).resolve().name for path in paths]
    names = own if len(set(own)) == len(own) else [str(path) for path in paths]
    out = Path(out) if out else Path(paths[0]) / "report.html"
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file with --out")
    whole = out.with_name(f"{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(page(names, shown), encoding="utf-8")
        whole.replace(out)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): name another file with --out") from error
    return out


# --- Markup ----------------------------------------------------------------------------------------------------------


class Html(str):
    """Markup. Any other string is text, and is escaped where it is put into markup."""


def el(tag: str, *children: str, **attributes: str) -> Html:
    """An element. A trailing `_` of an attribute's name is dropped, the others become `-`; empty ones are left out."""
    named = "".join(f' {n.rstrip("_").replace("_", "-")}="{html.escape(v)}"' for n, v in attributes.items() if v)
    return Html(f"<{tag}{named}>{join(*children)}</{tag}>")


def join(*parts: str) -> Html:
    """Texts and elements one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: int = -1, tall: bool = False) -> Html:
    """A table in a box of its own, which scrolls where the page is narrow; nothing without rows.

    Args:
        head: of the columns; may be empty.
        rows: cells; the first names the row.
        marked: the row to emphasise.
        tall: keep the box within the screen.
    """
    if not rows:
        return Html()
    counts = [all(map(COUNT.fullmatch, column)) for column in zip(*rows, strict=True)]
    style = [{"class_": "num"} if numeric and i else {} for i, numeric in enumerate(counts)]
    heads = [el("th", cell, scope="col", **a) for cell, a in zip(head, style, strict=False)]
    body = []
    for i, row in enumerate(rows):
        cells = [el("td", cell, **a) for cell, a in zip(row[1:], style[1:], strict=True)]
        body.append(el("tr", el("th", row[0], scope="row"), *cells, class_="marked" if i == marked else ""))
    whole = el("table", el("thead", el("tr", *heads)) if heads else Html(), el("tbody", *body))
    return el("div", whole, class_="box tall" if tall else "box", tabindex="0")


def chapter(title: str, *parts: str) -> Html:
    """A heading and what stands below it; nothing where all of that is empty."""
    return el("section", el("h2", title), *parts) if any(parts) else Html()


# --- Numbers ---------------------------------------------------------------------------------------------------------


def known(value: Any) -> bool:  # noqa: ANN401
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def score(value: Any) -> str:  # noqa: ANN401
    """A figure from 0 to 1: three digits everywhere."""
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
    ends = at(figures, "intervals").get(key)
    return join(score(figures.get(key)), *([" ", el("small", f"[{score(ends[0])}, {score(ends[1])}]")] if ends else []))


def number_in(cell: str) -> float | None:
    """The finite number in a cell of a CSV file; None where there is none."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def at(figures: Figures, *path: str) -> Figures:
    """A part of the figures; empty where it is missing or null."""
    for name in path:
        figures = figures.get(name) or {}
    return figures


# --- Plots: curves stretch with the page, text and marks keep their size ---------------------------------------------


@dataclass(frozen=True)
class Series:
    """Points of a plot. Several series may share a name, which stands in the legend once."""

    name: str
    kind: str
    """main, quiet, dashed (lines), dots or crosses"""
    points: Sequence[tuple[float, float]]
    tip: str = ""
    """shown under the pointer, in place of the name"""

    @property
    def is_line(self) -> bool:
        """Whether the points are joined."""
        return self.kind in ("main", "quiet", "dashed")


class Axis:
    """Two to seven round numbers around some values, `least` apart or more."""

    def __init__(self, values: Sequence[float], least: float = 0.0) -> None:
        low, high = min(values), max(values)
        rough = max((high - low) / 5, least, abs(low) * 0.02, 1e-6)
        power = 10 ** math.floor(math.log10(rough))
        self.step: float = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.9999)
        first, last = math.floor(low / self.step + 1e-9), math.ceil(high / self.step - 1e-9)
        self.ticks = [i * self.step for i in range(first, max(last, first + 1) + 1)]

    def place(self, value: float) -> str:
        """Per cent of the way along the axis."""
        return f"{100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]):.2f}"

    def label(self, tick: float) -> str:
        """0.25, 4, 20k or 1.5M."""
        size, letter = next(((n, a) for n, a in ((1e6, "M"), (1e3, "k")) if self.ticks[-1] >= n), (1, ""))
        digits = max(0, -math.floor(math.log10(self.step / size) + 1e-9))
        return f"{tick / size:.{digits}f}{letter}" if tick else "0"


def plot(title: str, x_title: str, y_title: str, series: Sequence[Series]) -> Html:
    """A figure of the series, from 0 on the x axis; nothing where they have no points."""
    series = [s for s in series if s.points]
    if not series:
        return Html()
    x = Axis([0.0, *(p for s in series for p, _ in s.points)], least=1.0)
    y = Axis([q for s in series for _, q in s.points])
    # Upside down, since y grows downwards on a screen
    lines = el("g", *(_line(s, x, y) for s in series if s.is_line), transform="matrix(1 0 0 -1 0 100)")
    stretched = el("svg", lines, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    marks = [_mark(s, x.place(p), y.place(q)) for s in series if not s.is_line for p, q in s.points]
    drawing = el("svg", *_grid(x, y), stretched, *marks, role="img", aria_label=f"{title}: {y_title} by {x_title}")
    legend = {s.name: s.kind for s in series}
    keys = [el("span", el("i", class_=kind), name) for name, kind in legend.items()]
    below = el("figcaption", *keys) if len(keys) > 1 else Html()
    ends = el("div", y_title), el("div", drawing, class_="plot"), el("div", x_title, class_="under")
    return el("figure", *ends, below)


def _grid(x: Axis, y: Axis) -> list[Html]:
    levels = [(y.label(tick), f"{100 - float(y.place(tick)):.2f}%") for tick in y.ticks]
    rules = [el("line", x1="0", x2="100%", y1=level, y2=level) for _, level in levels]
    left = [el("text", label, x="-8", y=level, dy=".35em", text_anchor="end") for label, level in levels]
    below = [el("text", x.label(t), x=f"{x.place(t)}%", y="100%", dy="1.6em", text_anchor="middle") for t in x.ticks]
    return rules + left + below


def _line(series: Series, x: Axis, y: Axis) -> Html:
    corners = " L".join(f"{x.place(p)} {y.place(q)}" for p, q in series.points)
    # The end of no length makes a dot of a line of one point
    return el("path", el("title", series.tip or series.name), class_=series.kind, d=f"M{corners} h0")


def _mark(series: Series, x: str, y: str) -> Html:
    tip, down = el("title", series.tip or series.name), f"{100 - float(y):.2f}%"
    if series.kind == "dots":
        return el("circle", tip, class_=series.kind, cx=f"{x}%", cy=down, r="3.5")
    return el("text", "×", tip, class_=series.kind, x=f"{x}%", y=down, dy=".35em", text_anchor="middle")


# --- Evidence: figures of one model, or of several side by side ------------------------------------------------------


def evidence(title: str, columns: Columns) -> Html:
    """All that the models' `metrics.json` hold, a chapter for each kind."""
    variants = {"same": "Same-variant", "cross": "Cross-variant"}
    texts = {"text_to_image": "Text to image", "image_to_text": "Image to text"}
    return join(
        chapter(title, figure_table(columns), counted(columns)),
        chapter("Same variant and other variants", _parts(columns, ("variant",), variants), _variants(columns)),
        chapter("Between text and image", _parts(columns, (), texts)),
        chapter("Random splits", _splits(columns)),
        chapter("By category", _groups(columns, "by_category", "Category")),
        chapter("By gender", _groups(columns, "by_gender", "Gender")),
    )


def figure_table(columns: Columns, *first: Sequence[str]) -> Html:
    """A row for each figure that any of the models has, after the first ones."""
    rows = [
        [label, *(with_interval(figures, key) for _, figures in columns)]
        for key, label in LABELS.items()
        if any(figures.get(key) is not None for _, figures in columns)
    ]
    return table(_heads(columns), [*first, *rows])


def _heads(columns: Columns) -> list[str]:
    """Names of the columns; none where there is but one model."""
    return ["", *(name for name, _ in columns)] if len(columns) > 1 else []


def counted(columns: Columns) -> Html:
    """How many images the figures are over, and how to read them."""
    sizes = [tuple(count(f.get(f"num_{key}")) for key in ("query", "gallery")) for _, f in columns if f]
    if not sizes:
        return Html()
    alone = f"{sizes[0][0]} queries, {sizes[0][1]} gallery images."
    said = (
        " In brackets the 95% interval, by bootstrap over items. Rank-k is the share of queries with a right image "
        "among the first k; mAP judges the place of every right image."
    )
    differing = "The columns do not rank the same images: compare them with care."
    names = [name or "the model" for name, figures in columns if figures.get("rerank")]
    reranked = f" Re-ranked by k-reciprocal neighbours, but for text and random splits: {', '.join(names)}."
    return el("p", alone if len(set(sizes)) == 1 else differing, said, reranked if names else "")


def _parts(columns: Columns, path: Sequence[str], names: Mapping[str, str]) -> Html:
    """mAP and Rank-1, 5 and 10 of parts of the figures."""
    rows = []
    for part, label in names.items():
        found = [at(figures, *path, part) for _, figures in columns]
        for key in ("mAP", "rank1", "rank5", "rank10"):
            if any(figures.get(key) is not None for figures in found):
                rows.append([f"{label} {LABELS[key]}", *(with_interval(figures, key) for figures in found)])
    return table(_heads(columns), rows)


def _variants(columns: Columns) -> Html:
    sizes = [count(at(columns[0][1], "variant", part).get("num_query")) for part in ("same", "cross")]
    if sizes == [NONE, NONE]:
        return Html()
    return el(
        "p",
        "Same-variant ignores the item's images of other variants: they are neither right nor wrong. Cross-variant ",
        f"ignores those of the query's own. Queries that have one to find: {sizes[0]} and {sizes[1]}.",
    )


def _splits(columns: Columns) -> Html:
    rows, number = [], 0
    for key, label in LABELS.items():
        found = [at(figures, "random_splits", key) for _, figures in columns]
        if any(known(each.get("mean")) for each in found):
            rows.append([label, *(f"{score(each.get('mean'))} ± {score(each.get('std'))}" for each in found)])
            number = max(number, *(len(each.get("values", ())) for each in found))
    if not rows:
        return Html()
    said = (
        f"Mean and standard deviation over {number} splits. In each, one random image of every item is the query, and "
        "all other images are the gallery."
    )
    return join(table(_heads(columns), rows), el("p", said))


def _groups(columns: Columns, key: str, title: str) -> Html:
    groups = [at(figures, key) for _, figures in columns]
    sizes = {name: group.get("num_query") or 0 for each in groups for name, group in each.items()}
    rows = [
        [name or NONE, count(size), *(with_interval(at(each, name), k) for each in groups for k in ("mAP", "rank1"))]
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]
    return table([title, "Queries", *(f"{n} {LABELS[k]}".strip() for n, _ in columns for k in ("mAP", "rank1"))], rows)


# --- An evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """`metrics.json`."""

    name: str
    figures: Figures
    kind = "Evaluation"
    val_mAP = None

    @property
    def verdict(self) -> Html:
        """One sentence."""
        return join("mAP ", with_interval(self.figures, "mAP"), ", Rank-1 ", with_interval(self.figures, "rank1"), ".")

    def body(self) -> Html:
        """What stands below the verdict."""
        return evidence("Figures", [("", self.figures)])


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
    "data_wait": ("Share of time waiting for images", score),
}


@dataclass(frozen=True)
class Run:
    """`experiment.json` and `metrics.jsonl`."""

    name: str
    settings: dict[str, Any]
    reports: list[dict[str, Any]]
    diverged: dict[str, Any]
    """the line that tells of it, or empty"""
    kind = "Run"

    @property
    def figures(self) -> Figures:
        """None: a run has its validation mAP only."""
        return {}

    @property
    def best(self) -> dict[str, Any]:
        """The report with the highest validation mAP, or empty."""
        return max((r for r in self.reports if known(r.get("val_mAP"))), key=lambda r: r["val_mAP"], default={})

    @property
    def val_mAP(self) -> float | None:
        """The highest."""
        return self.best.get("val_mAP")

    @property
    def verdict(self) -> Html:
        """One or two sentences."""
        end = ""
        if self.diverged:
            end = f" Diverged after {count(self.diverged.get('images'))} images: {self.diverged['diverged']}."
        if not self.best:
            return join("No validation figure yet.", end)
        images, epochs = (self.settings[f"budget.{unit}"] for unit in ("images", "epochs"))
        budget = f"{count(images)} images" if images else f"{short(epochs)} epochs"
        best = f"Best validation mAP {score(self.val_mAP)}, after {count(self.best.get('images'))} images"
        return join(f"{best}; {count(self.reports[-1].get('images'))} seen of a budget of {budget}.", end)

    def body(self) -> Html:
        """What stands below the verdict."""
        learning = [Series("validation mAP", "main", curve(self.reports))]
        last = self.reports[-1] if self.reports else {}
        meaning = {name: said for name, _, _, said in config.fields()}
        settings = [[n, short(v), el("span", meaning.get(n, ""), class_="words")] for n, v in self.settings.items()]
        return join(
            chapter("Learning curve", plot("Learning curve", "images seen", "validation mAP", learning)),
            chapter("Losses", self._losses()),
            chapter(
                "Last report", table([], [[label, form(last[k])] for k, (label, form) in LAST.items() if k in last])
            ),
            chapter("Settings", table(["Setting", "Value", ""], settings)),
        )

    def _losses(self) -> Html:
        terms = list(dict.fromkeys(k.removeprefix("loss_") for r in self.reports for k in r if k.startswith("loss_")))
        if not terms:
            return Html()
        heads = ["Term", "Last", "Floor", "Collapse", "From floor to collapse"]
        said = "Floor: the loss with perfect embeddings. Collapse: with equal ones, which tell no item from another."
        plots = el("div", *map(self._loss_plot, terms), class_="plots")
        return join(plots, table(heads, [self._loss_row(term) for term in terms]), el("p", said))

    def _loss_plot(self, term: str) -> Html:
        kinds = {"loss": "main", "floor": "dashed", "collapse": "quiet"}
        series = [Series(end, kind, curve(self.reports, f"{end}_{term}")) for end, kind in kinds.items()]
        return plot(f"Loss {term}", "images seen", term, series)

    def _loss_row(self, term: str) -> list[str]:
        values: list[Any] = [self.reports[-1].get(f"{end}_{term}") for end in ("loss", "floor", "collapse")]
        loss, floor, collapse = values
        way = all(map(known, values)) and collapse != floor
        return [term, *map(short, values), f"{(loss - floor) / (collapse - floor):.0%}" if way else NONE]


def curve(lines: Sequence[Mapping[str, Any]], key: str = "val_mAP") -> list[tuple[float, float]]:
    """A quantity against the images seen, but for what a divergence left."""
    return [(line["images"], line[key]) for line in lines if known(line.get(key)) and "diverged" not in line]


# --- A sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """`sweep.yaml`, `leaderboard.csv`, the trials' `metrics.jsonl`, and at the end `summary.json`."""

    name: str
    planned: str
    """number of trials"""
    rows: list[dict[str, str]]
    curves: dict[str, list[tuple[float, float]]]
    """validation mAP of each trial by images seen"""
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
        return at(self.summary, "test")

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
            return join(self._so_far())
        before, after = at(self.summary, "zero_shot"), self.figures
        old, new = with_interval(before, "mAP"), with_interval(after, "mAP")
        if self.best == ZERO_SHOT:
            return join("Tuning made nothing better: zero-shot wins, with mAP ", old, " on the test split.")
        found = f"The winner, trial {self.best}, finds the same item with mAP "
        return join(found, new, " against ", old, " zero-shot on the test split.", _caution(before, after))

    def _so_far(self) -> str:
        ended = sum(row["status"] not in ("zero-shot", "running") for row in self.rows)
        state = f"Not finished: running or broken off, with {ended} of {self.planned} trials ended."
        if not self.best:
            return f"{state} The leaderboard has no figure yet."
        zero_shot = f"{score(self._val(ZERO_SHOT))} zero-shot"
        leads = f"trial {self.best} leads with validation mAP {score(self.val_mAP)} against {zero_shot}"
        leader = f"nothing beats the validation mAP of {zero_shot}" if self.best == ZERO_SHOT else leads
        return f"{state} So far {leader}. The test split is left for the end."

    def body(self) -> Html:
        """What stands below the verdict."""
        columns = [("Zero-shot", at(self.summary, "zero_shot")), ("Winner", self.figures)]
        history, curves = self._history(), self._curves()
        return join(
            evidence("On the test split", columns) if self.summary else Html(),
            chapter("Leaderboard", self._leaderboard()),
            chapter("Course of the search", plot("Course of the search", "trial", "validation mAP", history)),
            chapter("Learning curves", plot("Learning curves", "images seen", "validation mAP", curves)),
            chapter("The winner's settings", self._command()),
            chapter("What it took", table([], self._cost())),
        )

    def _leaderboard(self) -> Html:
        plain = ("rank", "trial", "status", "val_mAP", "images", "seconds", "error")
        searched = [name for name in next(iter(self.rows), {}) if name not in plain]
        heads = ["Trial", "Validation mAP", "Status", "Images", "Time", *map(_dotted, searched), "Error"]
        rows = []
        for row in self.rows:
            seen, seconds = count(number_in(row["images"])), duration(number_in(row["seconds"]))
            fixed = [row["trial"], score(number_in(row["val_mAP"])), row["status"], seen, seconds]
            error = el("span", row["error"], class_="words") if row["error"] else NONE
            rows.append([*fixed, *(_cell(row[n]) for n in searched), error])
        return table(heads, rows, marked=[*(row[0] for row in rows), self.best].index(self.best), tall=True)

    def _history(self) -> list[Series]:
        """Each trial's figure by its number, and the best so far."""
        status = {int(row["trial"]): row["status"] for row in self.rows}
        value = {int(row["trial"]): number_in(row["val_mAP"]) for row in self.rows}
        # A trial that diverged has a figure for the search's sake only; one that failed may have had a real one before
        found = sorted((n, v) for n, v in value.items() if v is not None and status[n] != "diverged")
        lost = [n for n, v in value.items() if status[n] == "diverged" or (v is None and status[n] == "failed")]
        if not found:
            return []
        best: list[tuple[float, float]] = [found[0]]
        for number, v in found:
            best += [(number, best[-1][1]), (number, max(best[-1][1], v))]
        low = min(v for _, v in found)
        dots = [Series("a trial", "dots", [(n, v)], f"trial {n:04d}: {score(v)}") for n, v in found]
        crosses = [Series("failed or diverged", "crosses", [(n, low)], f"trial {n:04d} {status[n]}") for n in lost]
        return [Series("best so far", "main", best), *dots, *crosses]

    def _curves(self) -> list[Series]:
        """All trials' curves, with zero-shot as a level and the best one's on top."""
        others = [Series("other trials", "quiet", c, f"trial {n}") for n, c in self.curves.items() if n != self.best]
        best = [Series(f"best, trial {self.best}", "main", c) for n, c in self.curves.items() if n == self.best]
        level, end = self._val(ZERO_SHOT), max((p for c in self.curves.values() for p, _ in c), default=0)
        zero_shot = [Series("zero-shot", "dashed", [(0, level), (end, level)])] if level is not None and end else []
        return [*others, *zero_shot, *best]

    def _command(self) -> Html:
        experiment = self.summary.get("experiment")
        if not experiment or self.best == ZERO_SHOT:
            return Html()
        return el("pre", command(experiment, self.summary.get("searched") or ()), tabindex="0")

    def _cost(self) -> list[list[str]]:
        statuses = Counter(row["status"] for row in self.rows)
        told = [f"{statuses[s]} {s}" for s in ("done", "stopped", "diverged", "failed", "running") if statuses[s]]
        images, seconds = (sum(number_in(row[key]) or 0 for row in self.rows) for key in ("images", "seconds"))
        rows = [["Trials", ", ".join(told) or NONE], ["Images seen by all trials", count(images)]]
        rows.append(["Time of all trials, added up", duration(seconds)])
        if self.summary:
            rows.append(["Time from start to end", duration(self.summary.get("seconds"))])
        catalogue = at(self.summary, "catalogue")
        rows += [[f"Catalogue, {key}", short(catalogue[key])] for key in ("path", "hash") if key in catalogue]
        for split, size in at(catalogue, "counts").items():
            contents = f"{count(size.get('images'))} images, {count(size.get('items'))} items"
            rows.append([f"Catalogue, {split}", contents])
        return rows


def _caution(before: Figures, after: Figures) -> str:
    """What must be said where there is no gain, or none that is sure."""
    if not known(before.get("mAP")) or not known(after.get("mAP")):
        return ""
    if after["mAP"] <= before["mAP"]:
        return " It was better on the validation items only."
    old, new = (at(each, "intervals").get("mAP") for each in (before, after))
    return " The intervals overlap: the gain may be chance." if old and new and old[1] >= new[0] else ""


def _dotted(name: str) -> Html:
    """A setting's name on two lines."""
    group, _, leaf = name.rpartition(".")
    return join(el("small", group), Html("<br>"), leaf)


def _cell(value: str) -> str:
    """A setting from a CSV file."""
    number = number_in(value)
    return short(value if number is None or value.isdigit() else number)


def command(experiment: Mapping[str, Any], searched: Sequence[str]) -> str:
    """The command line that trains these settings: those searched, and those that are not the usual ones.

    Args:
        experiment: dotted settings.
        searched: names to show in any case.
    """
    stage = experiment["stage"]
    usual = config.flat(config.resolve(stage, None, {"model.name": experiment["model.name"]}))
    told = {"model.name", *searched, *(n for n, value in experiment.items() if value != usual.get(n))}
    given = {n: str(v).lower() if isinstance(v, bool) else str(v) for n, v in experiment.items() if n in told}
    options = (f"--{name} {shlex.quote(value)}" for name, value in given.items())
    return " \\\n  ".join([f"clipfh train {stage} CATALOGUE --out DIR", *options])


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
    name = folder.resolve().name
    if (folder / "experiment.json").is_file() and (folder / "metrics.jsonl").is_file():
        lines = _read_lines(folder / "metrics.jsonl")
        reports = [line for line in lines if "diverged" not in line]
        diverged = next((line for line in lines if "diverged" in line), {})
        return Run(name, config.flat(config.load(folder / "experiment.json")), reports, diverged)
    figures = _read_json(folder / "metrics.json")
    if "mAP" in figures:
        return Evaluation(name, figures)
    raise UserError(
        f"{path} holds nothing to report: name the folder of an evaluation (metrics.json), of a sweep (sweep.yaml) "
        "or of a run that has reported (experiment.json, metrics.jsonl)"
    )


def _read_sweep(folder: Path) -> Sweep:
    try:
        settings = yaml.safe_load((folder / "sweep.yaml").read_text()) or {}
    except yaml.YAMLError as error:
        raise _unreadable(folder / "sweep.yaml", error) from error
    rows = []
    if (folder / "leaderboard.csv").exists():
        with (folder / "leaderboard.csv").open(newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    curves = {f.parent.name: curve(_read_lines(f)) for f in sorted(folder.glob("trials/*/metrics.jsonl"))}
    name, planned = (str(settings.get(key, NONE)) for key in ("name", "trials"))
    return Sweep(name, planned, rows, curves, _read_json(folder / "summary.json"))


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
    return UserError(f"{file} can't be read ({' '.join(str(error).split())}): write it again")


# --- The page --------------------------------------------------------------------------------------------------------


def page(names: Sequence[str], shown: Sequence[Shown]) -> str:
    """The whole file.

    Args:
        names: of the columns of the comparison.
        shown: what to report, one or several.
    """
    articles = [
        el("article", _title(each), el("p", each.verdict, class_="verdict"), each.body(), id=f"part-{i}")
        for i, each in enumerate(shown, 1)
    ]
    several = len(shown) > 1
    foot = el("footer", f"clipfh {__version__}, {datetime.now():%Y-%m-%d %H:%M}")
    body = el("body", el("main", compare(names, shown) if several else Html(), *articles, foot))
    title = el("title", "Comparison" if several else f"{shown[0].kind} {shown[0].name}")
    head = el("head", Html(HEAD), title, el("style", Html(STYLE)))
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def _title(shown: Shown) -> Html:
    return el("h1", el("small", shown.kind), " ", shown.name)


def compare(names: Sequence[str], shown: Sequence[Shown]) -> Html:
    """A column for each, at a glance."""
    links = [el("a", name, href=f"#part-{i}") for i, name in enumerate(names, 1)]
    columns = [(link, each.figures) for link, each in zip(links, shown, strict=True)]
    rows = [["", *(each.kind for each in shown)]]
    if any(each.val_mAP is not None for each in shown):
        rows.append(["Validation mAP", *(score(each.val_mAP) for each in shown)])
    said = (
        "A sweep stands for its winner on the test split. A run has its validation mAP only: evaluate it for the rest."
    )
    return el("article", el("h1", "Comparison"), figure_table(columns, *rows), counted(columns), el("p", said))


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
h1 small { font-size: .6em; margin-right: .15em; }
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
.num { text-align: right; }
thead th { color: var(--soft); vertical-align: bottom; }
.tall thead th { position: sticky; top: 0; background: var(--paper); box-shadow: inset 0 -1px var(--rule); }
.marked > * { color: var(--main); font-weight: 600; }
.words { display: block; min-width: 14rem; max-width: 28rem; white-space: normal; overflow-wrap: anywhere; }
pre { font-family: var(--mono); line-height: 1.6; margin: .7rem 0; }
pre { padding: .9rem 1.1rem; border: 1px solid var(--rule); border-radius: 3px; }
figure { margin: 1rem 0; color: var(--soft); break-inside: avoid; }
.plot { height: 17rem; margin: .7rem 1.2rem 1.9rem 2.9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
.plots .plot { height: 12rem; }
.under { text-align: right; margin: -.4rem 1.2rem 0 0; }
svg { display: block; width: 100%; height: 100%; overflow: visible; font-size: 12px; }
svg text { fill: var(--soft); }
svg line { stroke: var(--rule); }
svg path { fill: none; stroke: var(--quiet); stroke-width: 1.2; vector-effect: non-scaling-stroke; }
svg path { stroke-linejoin: round; stroke-linecap: round; }
svg .quiet { opacity: .65; }
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
  :root { font-size: 10pt; --paper: #fff; }
  main { max-width: none; padding: 0; }
  .box, .box.tall, pre { overflow: visible; max-height: none; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .8rem; white-space: normal; }
  h2, thead { break-after: avoid; }
  tr { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""
