"""Charts of models and runs: their metrics with intervals, and their curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from clipfh.report import charts
from clipfh.report.artifacts import Metrics, ModelRecord, RunRecord, is_number
from clipfh.report.charts import ACCENT, DASHES, PAPER, SOFT, styled

MARKERS = "osD^vP"


@dataclass(frozen=True)
class Subset:
    """Metrics of models on a part of the queries, or in another task."""

    label: str
    metrics: list[Metrics]
    """metrics of each model"""

    @property
    def num_query(self) -> int:
        """Number of its queries."""
        return max(each.get("num_query") or 0 for each in self.metrics)


def strongest(models: Sequence[ModelRecord]) -> int:
    """The place of the model with the highest mAP; of equals the last."""
    return max(range(len(models)), key=lambda i: (models[i].metrics.get("mAP") or 0, i), default=0)


def plot_intervals(models: Sequence[ModelRecord], subsets: Sequence[Subset], key: str) -> list[Markup]:
    """A line for each subset (one or more), with models' values and intervals; many subsets in up to three charts."""
    rows = [(subset.label, [_whisker(metrics, key) for metrics in subset.metrics]) for subset in subsets]
    rows = [(label, each) for label, each in rows if any(each)]
    number = min(3, math.ceil(len(rows) / 8))
    step, ends = math.ceil(len(rows) / number), _ends(rows)
    return [_whiskers(models, rows[i : i + step], f"{key} with intervals", ends) for i in range(0, len(rows), step)]


def plot_metrics(models: Sequence[ModelRecord], labels: Mapping[str, str]) -> Markup:
    """A line for each metric, with each model's value and interval."""
    rows = [(label, [_whisker(model.metrics, key) for model in models]) for key, label in labels.items()]
    rows = [(label, each) for label, each in rows if any(each)]
    return _whiskers(models, rows, "Figures with intervals", _ends(rows)) if rows else Markup()


Whisker = tuple[float, float, float]
"""a value, and the ends of its interval"""


def _whisker(metrics: Mapping[str, Any], key: str) -> Whisker | None:
    if not is_number(metrics.get(key)):
        return None
    value = metrics[key]
    low, high = (metrics.get("intervals") or {}).get(key) or (value, value)
    return value, low, high


Row = tuple[str, Sequence[Whisker | None]]
"""a label, and a whisker for each model"""


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """Ends of an axis of shares, with room around the values."""
    values = [end for _, each in rows for whisker in each if whisker for end in whisker]
    low, high = min(values, default=0), max(values, default=1)
    room = max(0.08 * (high - low), 0.01)
    return max(0.0, low - room), min(1.0, high + room)


@styled
def _whiskers(models: Sequence[ModelRecord], rows: Sequence[Row], title: str, ends: tuple[float, float]) -> Markup:
    apart, step = 9, 30 + 9 * len(models)
    axes = charts.make_axes(height=26 + step * len(rows) + 16 * (len(models) > 1))
    best = strongest(models)
    for i, model in enumerate(models):
        whiskers = [(-step * j - apart * i, label, each[i]) for j, (label, each) in enumerate(rows)]
        _model_whiskers(axes, model.name, MARKERS[i % 6], [(y, n, w) for y, n, w in whiskers if w], i == best)
    for j, (label, each) in enumerate(rows):
        charts.draw_heading(
            axes, -step * j + 13, label, " → ".join(f"{w[0]:.3f}" for w in each if w) if len(each) < 3 else ""
        )
    axes.set_xlim(*ends)
    axes.set_ylim(-step * len(rows) + 16, 22)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    charts.draw_legend(axes)
    return charts.to_svg(axes, title)


def _model_whiskers(
    axes: Axes, name: str, marker: str, whiskers: Sequence[tuple[float, str, Whisker]], main: bool
) -> None:
    """One model's values and intervals: y, label of the row, value and ends."""
    color = ACCENT if main else SOFT
    for y, _, (_, low, high) in whiskers:
        axes.hlines(y, low, high, color=color, linewidth=2.4 if main else 1.4)
    marks = [
        (value, y, f"{name} {label}: {value:.3f} [{low:.3f}, {high:.3f}]".strip())
        for y, label, (value, low, high) in whiskers
    ]
    look = {"facecolors": ACCENT if main else PAPER, "edgecolors": color}
    charts.draw_marks(axes, marks, name, marker=marker, s=30, zorder=3, **look)


@styled
def plot_cmc(models: Sequence[ModelRecord]) -> Markup:
    """The share of queries with a right image among the first k."""
    curves = [(model, model.metrics["cmc"]) for model in models if model.metrics.get("cmc")]
    if not curves:
        return Markup()
    best = models[strongest(models)]
    axes = charts.make_axes("first k")
    for i, (model, shares) in enumerate(curves):
        main = model is best
        look = {"color": ACCENT, "linewidth": 2.2} if main else {"color": SOFT, "linestyle": DASHES[(i + 1) % 6]}
        tip = f"{model.name} {', '.join(f'{shares[k - 1]:.3f} at {k}' for k in (1, 5, 10, 20) if k <= len(shares))}"
        charts.draw_line(axes, list(enumerate(shares, 1)), tip, label=model.name, **look)
    axes.set_xlim(1, max(len(shares) for _, shares in curves))
    axes.set_xticks([k for k in (1, 10, 20, 30, 40, 50) if k <= axes.get_xlim()[1]])
    axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    charts.draw_legend(axes)
    return charts.to_svg(axes, "Cumulative match curve")


# --- Charts of a run --------------------------------------------------------------------------------------------------


@styled
def plot_learning_curves(runs: Sequence[tuple[str, RunRecord]]) -> Markup:
    """Validation mAP of runs by the images seen."""
    curves = [(name, run.curve("val_mAP")) for name, run in runs if run.curve("val_mAP")]
    if not curves:
        return Markup()
    best = max(range(len(curves)), key=lambda i: max(value for _, value in curves[i][1]))
    axes = charts.make_axes("images seen")
    for i, (name, points) in enumerate(curves):
        look = {"color": ACCENT, "linewidth": 2.2} if i == best else {"color": SOFT, "linestyle": DASHES[i % 6]}
        charts.draw_line(axes, points, name, label=name, **look)
    charts.label_images(axes)
    charts.draw_legend(axes)
    return charts.to_svg(axes, "Validation mAP by images seen")


@styled
def plot_loss(run: RunRecord, term: str) -> Markup:
    """A loss term, between its floor and its collapse value."""
    kinds: dict[str, dict[str, Any]] = {
        "loss": {"color": ACCENT, "linewidth": 2.2},
        "floor": {"color": SOFT, "linestyle": DASHES[1]},
        "collapse": {"color": SOFT, "linestyle": DASHES[2]},
    }
    axes = charts.make_axes("images seen")
    for kind, look in kinds.items():
        if points := run.curve(f"{kind}_{term}"):
            charts.draw_line(axes, points, f"{kind}, last {points[-1][1]:.3g}", label=kind, **look)
    charts.label_images(axes)
    charts.draw_legend(axes)
    return charts.to_svg(axes, f"Loss {term} by images seen")
