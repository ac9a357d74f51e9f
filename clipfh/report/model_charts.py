"""Figures of models and runs: their measures with intervals, and their curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from clipfh.report import charts
from clipfh.report.artifacts import Measured, Part, Run, known
from clipfh.report.charts import ACCENT, DASHES, PAPER, SOFT, styled

MARKERS = "osD^vP"


def strongest(models: Sequence[Measured]) -> int:
    """The place of the model with the highest mAP; of several the last."""
    return max(range(len(models)), key=lambda i: (models[i].figures.get("mAP") or 0, i), default=0)


def intervals(models: Sequence[Measured], parts: Sequence[Part], key: str) -> list[Markup]:
    """A line for each part (one or more), by model with interval; many parts in up to three figures of one scale."""
    rows = [(part.label, [_whisker(figures, key) for figures in part.figures]) for part in parts]
    rows = [(label, each) for label, each in rows if any(each)]
    number = min(3, math.ceil(len(rows) / 8))
    step, ends = math.ceil(len(rows) / number), _ends(rows)
    return [_whiskers(models, rows[i : i + step], f"{key} with intervals", ends) for i in range(0, len(rows), step)]


def measures(models: Sequence[Measured], labels: Mapping[str, str]) -> Markup:
    """A line for each measure, with each model's figure and interval."""
    rows = [(label, [_whisker(model.figures, key) for model in models]) for key, label in labels.items()]
    rows = [(label, each) for label, each in rows if any(each)]
    return _whiskers(models, rows, "Figures with intervals", _ends(rows)) if rows else Markup()


Whisker = tuple[float, float, float]
"""a figure, and the ends of its interval"""


def _whisker(figures: Mapping[str, Any], key: str) -> Whisker | None:
    if not known(figures.get(key)):
        return None
    value = figures[key]
    low, high = (figures.get("intervals") or {}).get(key) or (value, value)
    return value, low, high


Row = tuple[str, Sequence[Whisker | None]]
"""a label, and each model's"""


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """Ends of an axis of shares, with room around the values."""
    values = [end for _, each in rows for whisker in each if whisker for end in whisker]
    low, high = min(values, default=0), max(values, default=1)
    room = max(0.08 * (high - low), 0.01)
    return max(0.0, low - room), min(1.0, high + room)


@styled
def _whiskers(models: Sequence[Measured], rows: Sequence[Row], title: str, ends: tuple[float, float]) -> Markup:
    apart, step = 9, 30 + 9 * len(models)
    axes = charts.axes_of(height=26 + step * len(rows) + 16 * (len(models) > 1))
    best = strongest(models)
    for i, model in enumerate(models):
        found = [(-step * j - apart * i, label, each[i]) for j, (label, each) in enumerate(rows)]
        _model_whiskers(axes, model.name, MARKERS[i % 6], [(y, n, w) for y, n, w in found if w], i == best)
    for j, (label, each) in enumerate(rows):
        charts.heading(
            axes, -step * j + 13, label, " → ".join(f"{w[0]:.3f}" for w in each if w) if len(each) < 3 else ""
        )
    axes.set_xlim(*ends)
    axes.set_ylim(-step * len(rows) + 16, 22)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    charts.legend(axes)
    return charts.svg(axes, title)


def _model_whiskers(
    axes: Axes, name: str, marker: str, placed: Sequence[tuple[float, str, Whisker]], main: bool
) -> None:
    """One model's figures and intervals: y, label of the row, figure and ends."""
    color = ACCENT if main else SOFT
    for y, _, (_, low, high) in placed:
        axes.hlines(y, low, high, color=color, linewidth=2.4 if main else 1.4)
    marks = [
        (value, y, f"{name} {label}: {value:.3f} [{low:.3f}, {high:.3f}]".strip())
        for y, label, (value, low, high) in placed
    ]
    look = {"facecolors": ACCENT if main else PAPER, "edgecolors": color}
    charts.marks(axes, marks, name, marker=marker, s=30, zorder=3, **look)


@styled
def cmc(models: Sequence[Measured]) -> Markup:
    """The share of queries with a right image among the first k."""
    curves = [(model, model.figures["cmc"]) for model in models if model.figures.get("cmc")]
    if not curves:
        return Markup()
    best = models[strongest(models)]
    axes = charts.axes_of("first k")
    for i, (model, shares) in enumerate(curves):
        main = model is best
        look = {"color": ACCENT, "linewidth": 2.2} if main else {"color": SOFT, "linestyle": DASHES[(i + 1) % 6]}
        tip = f"{model.name} {', '.join(f'{shares[k - 1]:.3f} at {k}' for k in (1, 5, 10, 20) if k <= len(shares))}"
        charts.line(axes, list(enumerate(shares, 1)), tip, label=model.name, **look)
    axes.set_xlim(1, max(len(shares) for _, shares in curves))
    axes.set_xticks([k for k in (1, 10, 20, 30, 40, 50) if k <= axes.get_xlim()[1]])
    axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    charts.legend(axes)
    return charts.svg(axes, "Cumulative match curve")


# --- Figures of a run -------------------------------------------------------------------------------------------------


@styled
def run_curves(runs: Sequence[tuple[str, Run]]) -> Markup:
    """Validation mAP of runs by the images seen."""
    found = [(name, run.curve("val_mAP")) for name, run in runs if run.curve("val_mAP")]
    if not found:
        return Markup()
    best = max(range(len(found)), key=lambda i: max(value for _, value in found[i][1]))
    axes = charts.axes_of("images seen")
    for i, (name, points) in enumerate(found):
        look = {"color": ACCENT, "linewidth": 2.2} if i == best else {"color": SOFT, "linestyle": DASHES[i % 6]}
        charts.line(axes, points, name, label=name, **look)
    charts.by_images(axes)
    charts.legend(axes)
    return charts.svg(axes, "Validation mAP by images seen")


@styled
def loss(run: Run, term: str) -> Markup:
    """A loss term, between its floor and its collapse value."""
    kinds: dict[str, dict[str, Any]] = {
        "loss": {"color": ACCENT, "linewidth": 2.2},
        "floor": {"color": SOFT, "linestyle": DASHES[1]},
        "collapse": {"color": SOFT, "linestyle": DASHES[2]},
    }
    axes = charts.axes_of("images seen")
    for kind, look in kinds.items():
        if points := run.curve(f"{kind}_{term}"):
            charts.line(axes, points, f"{kind}, last {points[-1][1]:.3g}", label=kind, **look)
    charts.by_images(axes)
    charts.legend(axes)
    return charts.svg(axes, f"Loss {term} by images seen")
