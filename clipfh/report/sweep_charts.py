"""Charts of a sweep: its course, the importance of its settings, and how they go together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from clipfh.config.search_range import SearchRange
from clipfh.report import charts
from clipfh.report.artifacts import SweepRecord, TrialRecord, short
from clipfh.report.charts import ACCENT, DOT, INK, PAPER, QUIET, RULE, SMALL_DOT, SOFT, styled
from clipfh.storage import layout

ENOUGH = 10
"""Fewest trials that can tell which setting matters."""
OFF = 0.14
"""Share of a setting's axis that is kept for the value that switches it off."""


@styled
def plot_optimization_history(sweep: SweepRecord) -> Markup:
    """Each trial's score by its number, and the best so far."""
    trials = [trial for trial in sweep.trials if trial.score is not None]
    if not trials:
        return Markup()
    axes = charts.make_axes("trial")
    top, steps = -math.inf, []
    for trial in trials:
        top = max(top, trial.score or 0)
        steps.append((trial.number, top))
    charts.draw_line(
        axes, [*steps, (sweep.trials[-1].number, top)], color=ACCENT, drawstyle="steps-post", label="best so far"
    )
    _scattered(axes, sweep, [(trial.number, trial, tip(trial, sweep.search)) for trial in trials])
    failures = [trial for trial in sweep.trials if trial.is_lost]
    scores = [trial.score or 0 for trial in trials] + ([] if sweep.zero_shot is None else [sweep.zero_shot])
    low = min(scores) - 0.1 * (max(scores) - min(scores))
    crosses = [(t.number, low, f"trial {t.name} {t.status}: {t.error}") for t in failures]
    charts.draw_marks(axes, crosses, "failed or diverged", marker="x", color=SOFT)
    charts.draw_level(axes, sweep.zero_shot)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    charts.draw_legend(axes, columns=3)
    return charts.to_svg(axes, "Validation mAP by trial")


def _scattered(axes: Axes, sweep: SweepRecord, points: Sequence[tuple[float, TrialRecord, str]]) -> None:
    """A mark for each trial, with its tip: hollow where it did not use its whole budget, large for the best."""
    size = DOT if len(points) <= 60 else SMALL_DOT
    marks = [(trial, (x, trial.score or 0, text)) for x, trial, text in points]
    others = [(trial.status == "done", mark) for trial, mark in marks if trial.name != sweep.best]
    hollow, full = ([mark for whole, mark in others if whole == kind] for kind in (False, True))
    charts.draw_marks(axes, hollow, "part of the budget", s=size, facecolors=PAPER, edgecolors=QUIET, zorder=2.5)
    charts.draw_marks(axes, full, "whole budget", s=size, facecolors=SOFT, edgecolors=PAPER, linewidth=0.5, zorder=2.5)
    best = [mark for trial, mark in marks if trial.name == sweep.best]
    charts.draw_marks(axes, best, "best", s=52, facecolors=ACCENT, edgecolors=PAPER, zorder=3)


def tip(trial: TrialRecord, names: Iterable[str]) -> str:
    """Name and score of a trial, and its settings of these names."""
    score = "no figure" if trial.score is None else f"{trial.score:.3f}"
    settings = [f"{name} {short(trial.settings[name])}" for name in names if name in trial.settings]
    return "; ".join([f"trial {trial.name}, {trial.status}: {score}", *settings])


@styled
def plot_intermediate_values(sweep: SweepRecord) -> Markup:
    """The learning curves of all trials, the best on top."""
    trials = [trial for trial in sweep.trials if trial.curve]
    if not trials:
        return Markup()
    axes = charts.make_axes("images seen")
    faint = max(0.25, min(0.8, 12 / len(trials)))
    for trial in sorted(trials, key=lambda t: t.name == sweep.best):
        best = trial.name == sweep.best
        look = {"color": ACCENT, "linewidth": 2.2} if best else {"color": SOFT, "alpha": faint, "linewidth": 1}
        charts.draw_line(axes, trial.curve, tip(trial, sweep.search), label="best" if best else "other trials", **look)
    charts.draw_level(axes, sweep.zero_shot)
    charts.label_images(axes)
    charts.draw_legend(axes)
    return charts.to_svg(axes, "Learning curves")


@styled
def plot_param_importances(sweep: SweepRecord) -> Markup:
    """The importance of each setting by Optuna: how much it tells the best trials from the others."""
    shares = compute_importances(sweep)
    if not shares:
        return Markup()
    names = list(shares)
    axes = charts.make_axes(height=26 + 34 * len(names))
    for i, (name, share) in enumerate(shares.items()):
        axes.hlines([-34 * i], 0, 1, color=RULE, linewidth=5)
        (bar,) = axes.plot([0, max(share, 0.001)], [-34 * i] * 2, color=ACCENT, linewidth=5, clip_on=False)
        bar.set_url(f"{name}: {share:.0%}")
        charts.draw_heading(axes, -34 * i + 14, name, f"{share:.0%}")
    axes.set_xlim(0, 1)
    axes.set_ylim(-34 * len(names) + 22, 26)
    axes.set_axis_off()
    return charts.to_svg(axes, "Importance of the settings")


def compute_importances(sweep: SweepRecord) -> dict[str, float]:
    """Importance of each searched setting, the highest first; empty before there are `ENOUGH` trials.

    By PED-ANOVA, which also judges a setting that only some trials have. A setting that can be off counts with its
    switch.
    """
    if not sweep.folder.exists(layout.STUDY) or len(sweep.search) < 2 or len(sweep.trials) < ENOUGH:
        return {}
    import optuna
    from optuna.storages.journal import JournalFileBackend

    with sweep.folder.fetched(layout.STUDY) as folder:
        journal = optuna.storages.JournalStorage(JournalFileBackend(str(folder / layout.STUDY)))
        study = optuna.load_study(study_name=sweep.name, storage=journal)
        number = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
        if number < ENOUGH:
            return {}
        # Below five of the best it would say little
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / number))
        importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    shares = {name: importances.get(name, 0.0) + importances.get(f"{name}?", 0.0) for name in sweep.search}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


@styled
def plot_mix(sweep: SweepRecord) -> Markup:
    """Validation mAP, and mAP of text to image, by the share of the tuned model."""
    runs = next((step["blend"]["runs"] for step in sweep.steps if step["name"] == "mix"), None)
    mixes = sorted((each for each in sweep.measured if each["runs"] == runs), key=lambda each: each["share"])
    if not mixes:
        return Markup()
    axes = charts.make_axes("share of the tuned model")
    for key, label, look in (("mAP", "image to image", ACCENT), ("text_to_image", "text to image", SOFT)):
        points = [(each["share"], each["figures"][key]) for each in mixes if each["figures"][key] is not None]
        if points:
            charts.draw_line(axes, points, label, label=label, color=look, marker="o", markersize=3)
    charts.draw_level(axes, sweep.summary.get("zero_shot_val_mAP"))
    charts.draw_legend(axes)
    return charts.to_svg(axes, "Validation mAP by share of the tuned model")


@dataclass(frozen=True)
class Scale:
    """Where a setting's values lie on its axis, from 0 to 1."""

    range: SearchRange

    @property
    def start(self) -> float:
        """Where the range begins."""
        return 0.0 if self.range.off is None else OFF

    def place(self, value: Any) -> float:  # noqa: ANN401
        """The place of a value."""
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
            ticks = LogLocator(subs=subs, numticks=20).tick_values(low, high)
        else:
            ticks = MaxNLocator(4, integer=self.range.kind == "int").tick_values(low, high)
        return [float(f"{value:.6g}") for value in ticks if low * 0.999 <= value <= high * 1.001] or [low, high]


@styled
def plot_slice(sweep: SweepRecord, name: str) -> Markup:
    """The trials' scores by one setting."""
    scale = Scale(sweep.search[name])
    trials = [t for t in sweep.trials if t.score is not None and name in t.settings]
    if not trials:
        return Markup()
    axes = charts.make_axes(height=190)
    if scale.range.off is not None:
        axes.axvline(OFF / 2, color=RULE)
    places = [scale.place(t.settings[name]) + _aside(scale, t, name) for t in trials]
    _scattered(axes, sweep, [(x, t, tip(t, [name])) for x, t in zip(places, trials, strict=True)])
    charts.draw_level(axes, sweep.zero_shot)
    axes.set_xlim(-0.04, 1.04)
    axes.margins(y=0.1)
    axes.set_xticks(*zip(*scale.ticks, strict=True))
    return charts.to_svg(axes, f"Validation mAP by {name}")


def _aside(scale: Scale, trial: TrialRecord, name: str) -> float:
    """A small shift to the side, by the trial's number, where many trials share a value."""
    if scale.range.kind != "choice" and trial.settings[name] != scale.range.off:
        return 0.0
    return 0.05 * (trial.number * 0.618 % 1 - 0.5)


@styled
def plot_parallel_coordinate(sweep: SweepRecord) -> Markup:
    """A line for each trial through its settings, one axis below the other, down to its score."""
    trials = sorted((t for t in sweep.trials if t.score is not None), key=lambda t: t.score or 0)
    if len(trials) < 2:
        return Markup()
    scales = {name: Scale(range_) for name, range_ in sweep.search.items()}
    low, high = trials[0].score or 0, trials[-1].score or 0
    reached = Scale(SearchRange("uniform", (low, high if high > low else low + 1e-3)))
    top = max(1, len(trials) // 10)
    step = 54
    axes = charts.make_axes(height=step * (len(scales) + 1) + 6)
    for i, trial in enumerate(trials):
        places = [scales[n].place(trial.settings[n]) if n in trial.settings else math.nan for n in scales]
        ys = [-step * j for j in range(len(scales) + 1)]
        look = _parallel_look(trial.name == sweep.best, i >= len(trials) - top, len(trials))
        charts.draw_line(
            axes, list(zip([*places, reached.place(trial.score)], ys, strict=True)), tip(trial, sweep.search), **look
        )
    for j, (name, scale) in enumerate([*scales.items(), ("validation mAP", reached)]):
        _parallel_axis(axes, -step * j, name, scale)
    axes.set_xlim(0, 1)
    axes.set_ylim(-step * len(scales) - 22, 30)
    axes.set_axis_off()
    return charts.to_svg(axes, "Settings of all trials and what they reached")


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
