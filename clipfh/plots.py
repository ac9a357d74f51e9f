"""Figures as inline SVG, by matplotlib. Colours are the page's CSS variables, and text stays text.

All are 380 units wide: full size on a phone, two or three side by side on a screen.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from clipfh.results import Curve, Measured, Part, Run, Sweep, Trial, known
from clipfh.space import Range

WIDTH, HEIGHT = 380, 240
# Colours that no figure has, each for a variable of the page's style
INK, SOFT, RULE, QUIET, ACCENT, PAPER = COLOURS = tuple(f"#00000{i}" for i in range(1, 7))
VARIABLES = dict(zip(COLOURS, ("--ink", "--soft", "--rule", "--quiet", "--accent", "--paper"), strict=True))
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
}
LINK = "{http://www.w3.org/1999/xlink}href"
DOT, SMALL_DOT = 22, 14
"""areas of marks, in square points"""
MARKERS = "osD^vP"
DASHES = ("-", (0, (4, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (8, 3)), (0, (2, 4)))
ENOUGH = 10
"""Trials from which on it makes sense to ask which setting matters."""
OFF = 0.14
"""Share of a setting's axis that is kept for the value that switches it off."""


# --- Drawing ---------------------------------------------------------------------------------------------------------


def _axes(x_title: str = "", height: float = HEIGHT) -> Axes:
    """Axes of a figure of their own. What goes up is said by the page, in the figure's caption."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.06))
    axes = figure.subplots()
    axes.set_xlabel(x_title)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return axes


def _svg(axes: Axes, title: str) -> Markup:
    """The drawing as an element of the page."""
    file = io.BytesIO()
    axes.figure.savefig(file, format="svg", transparent=True)  # type: ignore[union-attr]
    root = ElementTree.fromstring(file.getvalue())
    own = hashlib.sha256(file.getvalue()).hexdigest()[:6]
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style", "}clipPath"))]:
            parent.remove(child)
    used = {value[1:] for element in root.iter() for name, value in element.attrib.items() if name == LINK}
    for element in root.iter():
        _simplify(element, used, own)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(re.sub(r"#00000\d", lambda colour: f"var({VARIABLES[colour[0]]})", text))


def _simplify(element: ElementTree.Element, used: set[str], own: str) -> None:
    """Make an element of matplotlib's fit for HTML: no namespaces, ids of the figure's own, a link's text as a tip."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {name: value for name, value in element.attrib.items() if name != "clip-path"}
    if attributes.get("id") not in used:
        attributes.pop("id", None)
    if element.tag == "a":
        element.tag, attributes = "g", {"class": "tip", "tip": attributes[LINK]}
    for name in ("d", "x", "y", "transform"):
        if name in attributes:
            attributes[name] = re.sub(r"(\.\d\d)\d+", r"\1", attributes[name]).replace("\n", "")
    if "id" in attributes:
        attributes["id"] = f"{own}{attributes['id']}"
    if LINK in attributes:
        attributes["href"] = f"#{own}{attributes.pop(LINK)[1:]}"
    if "style" in attributes:
        attributes["style"] = re.sub(r"font-family: [^;]*(; )?", "", attributes["style"])
    if "tip" in attributes:
        tip = ElementTree.Element("title")
        tip.text = attributes.pop("tip")
        element.insert(0, tip)
    element.attrib = attributes
    element.tail = None
    if element.text and not element.text.strip():
        element.text = None


Mark = tuple[float, float, str]
"""x, y and a tip"""


def _marks(axes: Axes, marks: Sequence[Mark], name: str = "", **look: Any) -> None:  # noqa: ANN401
    """Marks of one look."""
    if marks:
        xs, ys, tips = zip(*marks, strict=True)
        axes.scatter(xs, ys, label=name, clip_on=False, **{"s": DOT, **look}).set_urls(list(tips))


def _line(axes: Axes, points: Curve, tip: str = "", **look: Any) -> None:  # noqa: ANN401
    if len(points) == 1 and "marker" not in look:
        look |= {"marker": "o", "markersize": 3}
    (line,) = axes.plot(*zip(*points, strict=True), **{"clip_on": False, "linewidth": 1.2, **look})
    line.set_url(tip or None)


def _legend(axes: Axes, columns: int = 4) -> None:
    """Names of what has one, above the drawing; nothing where there is but one."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if len(named) > 1:
        where: dict[str, Any] = {"loc": "outside upper left", "ncols": columns, "fontsize": 10}
        axes.figure.legend(named.values(), named.keys(), **where)


def _level(axes: Axes, value: float | None, name: str = "zero-shot") -> None:
    if value is not None:
        line = axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=name)
        line.set_url(f"{name}: {value:.3f}")


# --- Figures of models ------------------------------------------------------------------------------------------------


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


@rc_context(STYLE)
def _whiskers(models: Sequence[Measured], rows: Sequence[Row], title: str, ends: tuple[float, float]) -> Markup:
    apart, step = 9, 30 + 9 * len(models)
    axes = _axes(height=26 + step * len(rows) + 16 * (len(models) > 1))
    best = strongest(models)
    for i, model in enumerate(models):
        found = [(-step * j - apart * i, label, each[i]) for j, (label, each) in enumerate(rows)]
        _model_whiskers(axes, model.name, MARKERS[i % 6], [(y, n, w) for y, n, w in found if w], i == best)
    for j, (label, each) in enumerate(rows):
        _heading(axes, -step * j + 13, label, " → ".join(f"{w[0]:.3f}" for w in each if w) if len(each) < 3 else "")
    axes.set_xlim(*ends)
    axes.set_ylim(-step * len(rows) + 16, 22)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend(axes)
    return _svg(axes, title)


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
    _marks(axes, marks, name, marker=marker, s=30, zorder=3, **look)


def _heading(axes: Axes, y: float, left: str, right: str = "") -> None:
    """The name of a row, above it, where a long one has room."""
    across = axes.get_yaxis_transform()
    left = left if len(left) <= 46 else f"{left[:45]}…"
    axes.text(0, y, left, transform=across, va="center", color=INK)
    axes.text(1, y, right, transform=across, va="center", ha="right", color=SOFT)


@rc_context(STYLE)
def cmc(models: Sequence[Measured]) -> Markup:
    """The share of queries with a right image among the first k."""
    curves = [(model, model.figures["cmc"]) for model in models if model.figures.get("cmc")]
    if not curves:
        return Markup()
    best = models[strongest(models)]
    axes = _axes("first k")
    for i, (model, shares) in enumerate(curves):
        main = model is best
        look = {"color": ACCENT, "linewidth": 2.2} if main else {"color": SOFT, "linestyle": DASHES[(i + 1) % 6]}
        tip = f"{model.name} {', '.join(f'{shares[k - 1]:.3f} at {k}' for k in (1, 5, 10, 20) if k <= len(shares))}"
        _line(axes, list(enumerate(shares, 1)), tip, label=model.name, **look)
    axes.set_xlim(1, max(len(shares) for _, shares in curves))
    axes.set_xticks([k for k in (1, 10, 20, 30, 40, 50) if k <= axes.get_xlim()[1]])
    axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    _legend(axes)
    return _svg(axes, "Cumulative match curve")


# --- Figures of a run -------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def run_curves(runs: Sequence[tuple[str, Run]]) -> Markup:
    """Validation mAP of runs by the images seen."""
    found = [(name, run.curve("val_mAP")) for name, run in runs if run.curve("val_mAP")]
    if not found:
        return Markup()
    best = max(range(len(found)), key=lambda i: max(value for _, value in found[i][1]))
    axes = _axes("images seen")
    for i, (name, points) in enumerate(found):
        look = {"color": ACCENT, "linewidth": 2.2} if i == best else {"color": SOFT, "linestyle": DASHES[i % 6]}
        _line(axes, points, name, label=name, **look)
    _by_images(axes)
    _legend(axes)
    return _svg(axes, "Validation mAP by images seen")


@rc_context(STYLE)
def loss(run: Run, term: str) -> Markup:
    """A loss term, between its floor and its collapse value."""
    kinds: dict[str, dict[str, Any]] = {
        "loss": {"color": ACCENT, "linewidth": 2.2},
        "floor": {"color": SOFT, "linestyle": DASHES[1]},
        "collapse": {"color": SOFT, "linestyle": DASHES[2]},
    }
    axes = _axes("images seen")
    for kind, look in kinds.items():
        if points := run.curve(f"{kind}_{term}"):
            _line(axes, points, f"{kind}, last {points[-1][1]:.3g}", label=kind, **look)
    _by_images(axes)
    _legend(axes)
    return _svg(axes, f"Loss {term} by images seen")


def _by_images(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


# --- Figures of a sweep -----------------------------------------------------------------------------------------------


@rc_context(STYLE)
def history(sweep: Sweep) -> Markup:
    """Each trial's figure by its number, and the best so far."""
    found = [trial for trial in sweep.trials if trial.score is not None]
    if not found:
        return Markup()
    axes = _axes("trial")
    top, steps = -math.inf, []
    for trial in found:
        top = max(top, trial.score or 0)
        steps.append((trial.number, top))
    _line(axes, [*steps, (sweep.trials[-1].number, top)], color=ACCENT, drawstyle="steps-post", label="best so far")
    _scattered(axes, sweep, [(trial.number, trial, tip(trial, sweep.search)) for trial in found])
    lost = [trial for trial in sweep.trials if trial.is_lost]
    scores = [trial.score or 0 for trial in found] + ([] if sweep.zero_shot is None else [sweep.zero_shot])
    low = min(scores) - 0.1 * (max(scores) - min(scores))
    crosses = [(t.number, low, f"trial {t.name} {t.status}: {t.error}") for t in lost]
    _marks(axes, crosses, "failed or diverged", marker="x", color=SOFT)
    _level(axes, sweep.zero_shot)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(axes, columns=3)
    return _svg(axes, "Validation mAP by trial")


def _scattered(axes: Axes, sweep: Sweep, placed: Sequence[tuple[float, Trial, str]]) -> None:
    """A mark for each trial, with its tip: hollow where it did not use its whole budget, large for the best."""
    size = DOT if len(placed) <= 60 else SMALL_DOT
    marks = [(trial, (x, trial.score or 0, said)) for x, trial, said in placed]
    others = [(trial.status == "done", mark) for trial, mark in marks if trial.name != sweep.best]
    hollow, full = ([mark for whole, mark in others if whole == kind] for kind in (False, True))
    _marks(axes, hollow, "part of the budget", s=size, facecolors=PAPER, edgecolors=QUIET, zorder=2.5)
    _marks(axes, full, "whole budget", s=size, facecolors=SOFT, edgecolors=PAPER, linewidth=0.5, zorder=2.5)
    best = [mark for trial, mark in marks if trial.name == sweep.best]
    _marks(axes, best, "best", s=52, facecolors=ACCENT, edgecolors=PAPER, zorder=3)


def tip(trial: Trial, names: Iterable[str]) -> str:
    """Name and figure of a trial, and these of its settings."""
    score = "no figure" if trial.score is None else f"{trial.score:.3f}"
    settings = [f"{name} {short(trial.settings[name])}" for name in names if name in trial.settings]
    return "\n".join([f"trial {trial.name}, {trial.status}: {score}", *settings])


def short(value: object) -> str:
    """A setting to three digits; whole numbers and words as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


@rc_context(STYLE)
def learning(sweep: Sweep) -> Markup:
    """The learning curves of all trials, the best on top."""
    trials = [trial for trial in sweep.trials if trial.curve]
    if not trials:
        return Markup()
    axes = _axes("images seen")
    faint = max(0.25, min(0.8, 12 / len(trials)))
    for trial in sorted(trials, key=lambda t: t.name == sweep.best):
        best = trial.name == sweep.best
        look = {"color": ACCENT, "linewidth": 2.2} if best else {"color": SOFT, "alpha": faint, "linewidth": 1}
        _line(axes, trial.curve, tip(trial, sweep.search), label="best" if best else "other trials", **look)
    _level(axes, sweep.zero_shot)
    _by_images(axes)
    _legend(axes)
    return _svg(axes, "Learning curves")


@rc_context(STYLE)
def importance(sweep: Sweep) -> Markup:
    """How much each setting tells the best trials from the others, by Optuna."""
    shares = shares_of(sweep)
    if not shares:
        return Markup()
    names = list(shares)
    axes = _axes(height=26 + 34 * len(names))
    for i, (name, share) in enumerate(shares.items()):
        axes.hlines([-34 * i], 0, 1, color=RULE, linewidth=5)
        (bar,) = axes.plot([0, max(share, 0.001)], [-34 * i] * 2, color=ACCENT, linewidth=5, clip_on=False)
        bar.set_url(f"{name}: {share:.0%}")
        _heading(axes, -34 * i + 14, name, f"{share:.0%}")
    axes.set_xlim(0, 1)
    axes.set_ylim(-34 * len(names) + 22, 26)
    axes.set_axis_off()
    return _svg(axes, "Importance of the settings")


def shares_of(sweep: Sweep) -> dict[str, float]:
    """Importance of each searched setting, the highest first; empty before there are `ENOUGH` trials.

    By PED-ANOVA, which also judges a setting that only some of the trials have. One that can be off counts with its
    switch.
    """
    if not sweep.study.is_file() or len(sweep.search) < 2 or len(sweep.trials) < ENOUGH:
        return {}
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(sweep.study)))
    study = optuna.load_study(study_name=sweep.name, storage=storage)
    number = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
    if number < ENOUGH:
        return {}
    # Below five of the best it would say little
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / number))
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    shares = {name: found.get(name, 0.0) + found.get(f"{name}?", 0.0) for name in sweep.search}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Scale:
    """Where a setting's values lie on its axis, from 0 to 1."""

    range: Range

    @property
    def start(self) -> float:
        """Where the range begins."""
        return 0.0 if self.range.off is None else OFF

    def place(self, value: Any) -> float:  # noqa: ANN401
        """A value's place."""
        if self.range.off is not None and value == self.range.off:
            return 0.0
        if self.range.kind == "choice":
            return self.start + (1 - self.start) * self._of_choice(self.range.values.index(value))
        low, high, value = map(self._straight, (*self.range.values, value))
        return self.start + (1 - self.start) * (value - low) / (high - low)

    def _of_choice(self, i: int) -> float:
        return (i + 0.5) / len(self.range.values)

    def _straight(self, value: float) -> float:
        return math.log(value) if self.range.kind == "loguniform" else value

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """A few places with their labels."""
        off = [] if self.range.off is None else [(0.0, "off" if self.range.off == 0 else short(self.range.off))]
        return [*off, *((self.place(value), short(value)) for value in self._round())]

    def _round(self) -> list[Any]:
        """Round values within the range, few of them."""
        if self.range.kind == "choice":
            return list(self.range.values)
        low, high = self.range.values
        if self.range.kind == "loguniform":
            subs = (1, 2, 5) if high / low < 40 else (1, 3) if high / low < 200 else (1,)
            found = LogLocator(subs=subs, numticks=20).tick_values(low, high)
        else:
            found = MaxNLocator(4, integer=self.range.kind == "int").tick_values(low, high)
        return [float(f"{value:.6g}") for value in found if low * 0.999 <= value <= high * 1.001] or [low, high]


@rc_context(STYLE)
def cut(sweep: Sweep, name: str) -> Markup:
    """The trials' figures by one setting."""
    scale = Scale(sweep.search[name])
    found = [t for t in sweep.trials if t.score is not None and name in t.settings]
    if not found:
        return Markup()
    axes = _axes(height=190)
    if scale.range.off is not None:
        axes.axvline(OFF / 2, color=RULE)
    places = [scale.place(t.settings[name]) + _aside(scale, t, name) for t in found]
    _scattered(axes, sweep, [(x, t, tip(t, [name])) for x, t in zip(places, found, strict=True)])
    _level(axes, sweep.zero_shot)
    axes.set_xlim(-0.04, 1.04)
    axes.margins(y=0.1)
    axes.set_xticks(*zip(*scale.ticks, strict=True))
    return _svg(axes, f"Validation mAP by {name}")


def _aside(scale: Scale, trial: Trial, name: str) -> float:
    """A little to the side, by the trial's number, where many share one value."""
    if scale.range.kind != "choice" and trial.settings[name] != scale.range.off:
        return 0.0
    return 0.05 * (trial.number * 0.618 % 1 - 0.5)


@rc_context(STYLE)
def parallel(sweep: Sweep) -> Markup:
    """A line a trial through its settings, one axis below the other, down to what it reached."""
    trials = sorted((t for t in sweep.trials if t.score is not None), key=lambda t: t.score or 0)
    if len(trials) < 2:
        return Markup()
    scales = {name: Scale(found) for name, found in sweep.search.items()}
    low, high = trials[0].score or 0, trials[-1].score or 0
    reached = Scale(Range("uniform", (low, high if high > low else low + 1e-3)))
    top = max(1, len(trials) // 10)
    step = 54
    axes = _axes(height=step * (len(scales) + 1) + 6)
    for i, trial in enumerate(trials):
        places = [scales[n].place(trial.settings[n]) if n in trial.settings else math.nan for n in scales]
        ys = [-step * j for j in range(len(scales) + 1)]
        look = _parallel_look(trial.name == sweep.best, i >= len(trials) - top, len(trials))
        _line(axes, list(zip([*places, reached.place(trial.score)], ys, strict=True)), tip(trial, sweep.search), **look)
    for j, (name, scale) in enumerate([*scales.items(), ("validation mAP", reached)]):
        _parallel_axis(axes, -step * j, name, scale)
    axes.set_xlim(0, 1)
    axes.set_ylim(-step * len(scales) - 22, 30)
    axes.set_axis_off()
    return _svg(axes, "Settings of all trials and what they reached")


def _parallel_look(best: bool, leading: bool, number: int) -> dict[str, Any]:
    if best:
        return {"color": ACCENT, "linewidth": 2.4, "zorder": 3}
    if leading:
        return {"color": ACCENT, "linewidth": 1, "alpha": 0.55, "zorder": 2.5}
    return {"color": SOFT, "linewidth": 0.8, "alpha": max(0.18, min(0.7, 10 / number))}


def _parallel_axis(axes: Axes, y: float, name: str, scale: Scale) -> None:
    axes.hlines(y, scale.start if scale.range.kind != "choice" else 0, 1, color=INK, linewidth=0.8, zorder=2)
    halo = {"facecolor": PAPER, "alpha": 0.8, "edgecolor": "none", "pad": 1}
    axes.text(0, y + 15, name, color=INK, va="center", bbox=halo, zorder=4)
    for place, label in scale.ticks:
        axes.vlines(place, y - 3, y, color=INK, linewidth=0.8, zorder=2)
        axes.text(place, y - 10, label, color=SOFT, fontsize=9.5, ha="center", va="center", zorder=4, bbox=halo)
