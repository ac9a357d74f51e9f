"""The sweep file: what is searched, from where, how long. Read, checked and written back with its defaults."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.config.experiment import (
    LOSS_TERMS,
    SMALL_MODEL,
    Budget,
    Experiment,
    LossSettings,
    Placement,
    Stage,
    require,
)

if TYPE_CHECKING:
    import optuna

SHARED = ("stage", "model.name", "model.pretrained")
"""What all trials of a sweep have in common, beside the prompts."""

SWITCH = "?"
"""Ends the name of the parameter by which Optuna switches a setting between its range and its `or`."""

Kind = Literal["loguniform", "uniform", "int", "choice"]

TOGETHER = (
    ("batch.items", "batch.categories"),
    ("batch.views", *(f"loss.{term}" for term in LOSS_TERMS), "loss.supcon_captions"),
    ("budget.images", "budget.epochs"),
    ("optimizer.head_first", "model.lora_rank", "model.lora_targets", "loss.ce"),
)
"""Settings whose values must fit each other's."""


@dataclass(frozen=True)
class SearchRange:
    """How one setting is searched."""

    kind: Kind
    values: tuple[Any, ...]
    """low and high, or the choices"""
    off: Any = None
    """the value of `or`: tried beside the range, as a switch of its own"""

    @property
    def ends(self) -> tuple[Any, ...]:
        """Low, high or the choices, and the value of `or`."""
        return self.values if self.off is None else (*self.values, self.off)

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """Optuna's word for it, the value of `or` left out."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(list(self.values))
        low, high = self.values
        return (
            IntDistribution(low, high)
            if self.kind == "int"
            else FloatDistribution(low, high, log=self.kind == "loguniform")
        )

    def suggest(self, trial: optuna.trial.BaseTrial, name: str) -> Any:
        """Ask Optuna for a value."""
        if self.off is not None and not trial.suggest_categorical(name + SWITCH, [True, False]):
            return self.off
        if self.kind == "choice":
            return trial.suggest_categorical(name, list(self.values))
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(name, low, high)
        return trial.suggest_float(name, low, high, log=self.kind == "loguniform")

    def holds(self, value: Any) -> bool:
        """Whether the value can be suggested."""
        inside = value in self.values if self.kind == "choice" else self.values[0] <= value <= self.values[1]
        return inside or (self.off is not None and value == self.off)

    @property
    def spec(self) -> dict[str, Any]:
        """The range as a sweep file has it."""
        return {self.kind: list(self.values)} | ({"or": self.off} if self.off is not None else {})

    def point(self, name: str, value: Any) -> dict[str, Any]:
        """Optuna's parameters that give the value."""
        if self.off is None:
            return {name: value}
        return {name + SWITCH: False} if value == self.off else {name + SWITCH: True, name: value}


@dataclass(frozen=True)
class Halving:
    """Successive halving by images seen."""

    first_rung: int = 0
    """images after which the first trials are stopped; 0: none is"""
    reduction: int = 3
    """one trial in so many goes on from a rung"""

    def __post_init__(self) -> None:
        require(self.first_rung >= 0, "first_rung", "0 or more", self.first_rung)
        require(self.reduction >= 2, "reduction", "2 or more", self.reduction)


@dataclass(frozen=True)
class Finalists:
    """What comes between the search and the test split."""

    top: int = 0
    """leading settings that are trained again; 0: the search's own best is the winner"""
    seeds: int = 3
    """how often each of them is, with seeds of its own; the best mean wins"""
    refit: bool = False
    """train the winner on train and validation items together"""

    def __post_init__(self) -> None:
        require(self.top >= 0, "top", "0 or more", self.top)
        require(self.seeds >= 1, "seeds", "1 or more", self.seeds)


MANY = 2**31  # trials of a grid where nobody said how many: all of it


@dataclass(frozen=True)
class SweepFile:
    """A sweep file, resolved and checked. Its fields are the file's keys, with their types and defaults."""

    name: str = "sweep"
    stage: Stage = "image"
    base: dict[str, Any] = field(default_factory=dict)
    """settings that all trials share, dotted, and their preset"""
    search: dict[str, SearchRange] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    """settings to try first"""
    trials: int = 16
    budget: Halving = field(default_factory=Halving)
    """in the file, beside the settings of `Budget`"""
    placement: Placement = field(default_factory=Placement)
    seed: int = 0
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """grid tries every combination of choices"""
    final: Finalists = field(default_factory=Finalists)
    earlier: str = ""
    """folder of another sweep, whose trials the search knows from the start"""

    def __post_init__(self) -> None:
        require(self.trials >= 1, "trials", "a whole number above 0", self.trials)
        require(self.seed >= 0, "seed", "a whole number, 0 or more", self.seed)

    def experiment(self, sampled: Mapping[str, Any]) -> Experiment:
        """The experiment of a trial."""
        settings = {name: value for name, value in {**self.base, **sampled}.items() if not name.endswith(SWITCH)}
        return presets.resolve(self.stage, settings.pop("preset"), settings)

    def sampled(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """A trial's settings. An option of a loss term is drawn only where the term is on."""
        drawn: dict[str, Any] = {}
        for name in sorted(self.search, key=_term_of):
            if self._is_on(name, drawn):
                drawn[name] = self.search[name].suggest(trial, name)
        return drawn

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of ends and choices, an option of a loss term only where the term is on."""
        points: list[dict[str, Any]] = [{}]
        for name in sorted(self.search, key=_term_of):
            ends = [{name: end} for end in self.search[name].ends]
            points = [{**point, **end} for point in points for end in (ends if self._is_on(name, point) else [{}])]
        return points

    def _is_on(self, name: str, drawn: Mapping[str, Any]) -> bool:
        """Whether a setting counts, given those drawn before it: all but the options of a term that is off."""
        term = _term_of(name)
        return not term or bool(drawn.get(f"loss.{term}", self._weight(term)))

    def _weight(self, term: str) -> float:
        """A term's weight where it is not searched."""
        return float(schema.flatten(self.experiment(self.first))[f"loss.{term}"])

    def corners(self, name: str) -> list[dict[str, Any]]:
        """Points of the space that differ in one setting: its ends or choices; one point where it is not searched."""
        found = self.search.get(name)
        return [{**self.first, name: value} for value in found.ends] if found else [self.first]

    def combinations(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """All combinations of the ends of those of these that are searched; of a term's ends one on and one off."""
        searched = [name for name in names if name in self.search]
        ends = [self.search[name].ends for name in searched]
        telling = [
            {bool(end): end for end in each}.values() if name.startswith("loss.") else each
            for name, each in zip(searched, ends, strict=True)
        ]
        return [dict(zip(searched, values, strict=True)) for values in product(*telling)]

    @property
    def first(self) -> dict[str, Any]:
        """The first value of every range: one point of the space."""
        return {name: r.values[0] for name, r in self.search.items()}

    @property
    def texted(self) -> dict[str, Any]:
        """Values by which a term learns from prompts; none where no trial has such a term."""
        return self._terms_where(lambda loss: loss.takes_text)

    @property
    def paired(self) -> dict[str, Any]:
        """Values by which no term learns from an item's only photo; none where every trial has such a term."""
        return self._terms_where(lambda loss: not loss.takes_singles)

    def _terms_where(self, holds: Callable[[LossSettings], bool]) -> dict[str, Any]:
        points = self.combinations((*(f"loss.{term}" for term in LOSS_TERMS), "loss.supcon_captions"))
        return next((p for p in points if holds(self.experiment({**self.first, **p}).loss)), {})


def _term_of(name: str) -> str:
    """'triplet' for loss.triplet_margin; '' for what is no option of a term (those sort first)."""
    term, _, option = name.removeprefix("loss.").partition("_")
    return term if name.startswith("loss.") and option and term in LOSS_TERMS else ""


KEYS = [f.name for f in dataclasses.fields(SweepFile)]
BUDGET_KEYS = [f.name for cls in (Budget, Halving) for f in dataclasses.fields(cls)]


def load(path: str | Path, overrides: Mapping[str, Any] | None = None, trials: int | None = None) -> SweepFile:
    """Read and check a sweep file.

    Args:
        path: YAML.
        overrides: settings in place of the file's `base`.
        trials: in place of the file's.

    Raises:
        UserError: unreadable, or a key, setting or value that does not fit; nothing has started then.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such sweep file; sweeps/ has some to start from")
    try:
        tree = yaml.safe_load(path.read_text())
        return _checked(tree, dict(overrides or {}), trials)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _checked(tree: Any, overrides: dict[str, Any], trials: int | None) -> SweepFile:
    tree = _mapping(tree, "the sweep file")
    _known(tree, KEYS)
    budget = _mapping(tree.get("budget", {}), "budget")
    _known(budget, BUDGET_KEYS, "budget.")
    rungs = {name: budget[name] for name in budget if name not in {f.name for f in dataclasses.fields(Budget)}}
    values = {name: _value(name, value) for name, value in {**tree, "budget": rungs}.items()}
    values["search"] = {name: _range(name, spec) for name, spec in values.get("search", {}).items()}
    if clash := set(values["search"]) & set(overrides):
        raise UserError(f"{sorted(clash)[0]} is searched: give another value in the file, not beside it")
    given = {f"budget.{name}": value for name, value in budget.items() if name not in rungs}
    if values["budget"].first_rung:
        given = {"budget.report_every": values["budget"].first_rung, **given}
    values["base"] = _base({**given, **values.get("base", {}), **overrides})
    if trials is not None or (values.get("sampler") == "grid" and "trials" not in values):
        values["trials"] = MANY if trials is None else trials
    sweep = SweepFile(**values)
    _check_values(sweep)
    return _with_grid(sweep) if sweep.sampler == "grid" else sweep


def _value(key: str, value: Any) -> Any:
    """The value of a key of the file, checked as the type of SweepFile's field wants it."""
    hint = typing.get_type_hints(SweepFile)[key]
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, _mapping(value, key), key)
    if typing.get_origin(hint) is list:
        return [_mapping(each, "a point") for each in _list(value, key)]
    return _mapping(value, key) if typing.get_origin(hint) is dict else schema.check(key, value, SweepFile)


def _base(settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings, and their preset: the usual one for the model where none is named."""
    usual = "scratch" if settings.get("model.name") == SMALL_MODEL else "recommended"
    preset = str(settings.pop("preset", None) or usual)
    checked = {name: schema.check(name, value) for name, value in settings.items()}
    return {"preset": preset, **schema.with_absolute_paths(checked)}


def _with_grid(sweep: SweepFile) -> SweepFile:
    """Its grid as points; no more trials than those."""
    for name, found in sweep.search.items():
        if found.kind != "choice":
            raise UserError(f"sampler: grid tries choices, and {name} has a {found.kind} range: give it a choice")
    points = sweep.grid()
    return dataclasses.replace(sweep, points=points, trials=min(sweep.trials, len(points)))


def _check_values(sweep: SweepFile) -> None:
    """Build the experiments at the ends of every range and at every point."""
    for name in sweep.search:
        for corner in sweep.corners(name):
            sweep.experiment(corner)
    off = {name: searched.off for name, searched in sweep.search.items() if searched.off is not None}
    sweep.experiment({**sweep.first, **off})
    _check_workers(sweep)
    for names in TOGETHER:
        _check_together(sweep, names)
    for point in sweep.points:
        for name, value in point.items():
            if name not in sweep.search:
                raise UserError(f"points: {name} is not searched{schema.nearest(name, list(sweep.search))}")
            if not sweep.search[name].holds(schema.check(name, value)):
                raise UserError(f"points: {name} {value} lies outside its range")
        sweep.experiment({**sweep.first, **point})


def _check_workers(sweep: SweepFile) -> None:
    """Whether the workers can share every P that may be drawn."""
    workers, items = sweep.placement.workers, sweep.search.get("batch.items")
    if items and items.kind == "int" and workers > 1:
        raise UserError(
            f"search: batch.items: {workers} workers can't share all of {list(items.values)}: give a choice"
        )
    for corner in sweep.corners("batch.items"):
        count = sweep.experiment(corner).batch.items
        if count % workers:
            raise UserError(f"batch.items {count} can't be shared by {workers} workers")


def _check_together(sweep: SweepFile, names: Sequence[str]) -> None:
    """Build the experiments at all combinations of the ends of some settings."""
    for drawn in sweep.combinations(names):
        try:
            sweep.experiment({**sweep.first, **drawn})
        except UserError as error:
            shown = ", ".join(f"{name} {value}" for name, value in drawn.items())
            raise UserError(f"search: {shown} may be drawn together, and do not fit together ({error})") from None


def _range(name: str, spec: Any) -> SearchRange:
    if name in SHARED or name.startswith("text."):
        raise UserError(
            f"search: {name} can't be searched: all trials share weights and prompts; make a sweep for each"
        )
    spec = _mapping(spec, f"search: {name}")
    all_kinds = typing.get_args(Kind)
    _known(spec, (*all_kinds, "or"))
    kinds = [kind for kind in all_kinds if kind in spec]
    if len(kinds) != 1:
        raise UserError(f"search: {name} needs one of {', '.join(all_kinds)}")
    kind = kinds[0]
    values = tuple(schema.check(name, value) for value in _list(spec[kind], f"search: {name}: {kind}"))
    if not values:
        raise UserError(f"search: {name}: {kind} wants a list of one value or more, not []")
    fitting = {int: ("int",), float: ("uniform", "loguniform")}.get(type(values[0]), ())
    if kind not in (*fitting, "choice"):
        raise UserError(f"search: {name}: {kind} does not suit it: take {' or '.join((*fitting, 'choice'))}")
    if kind != "choice" and (len(values) != 2 or not values[0] < values[1]):
        raise UserError(f"search: {name}: {kind} wants [low, high] with low below high, not {list(values)}")
    if kind == "loguniform" and values[0] <= 0:
        raise UserError(f"search: {name}: loguniform wants values above 0, not {values[0]}")
    return SearchRange(kind, values, schema.check(name, spec["or"]) if "or" in spec else None)


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise UserError(f"{where} must be a mapping of names to values, not {tree!r}")
    return tree


def _list(tree: Any, where: str) -> list[Any]:
    if not isinstance(tree, list):
        raise UserError(f"{where} wants a list, not {tree!r}")
    return tree


def _known(tree: Mapping[str, Any], names: Sequence[str], where: str = "") -> None:
    for name in tree:
        if name not in names:
            raise UserError(f"unknown key {where}{name}{schema.nearest(name, list(names))}")


def _dataclass(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**{name: schema.check(name, value, cls) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_yaml(sweep: SweepFile) -> str:
    """The sweep as YAML, all defaults filled in."""
    everything = schema.flatten(sweep.experiment(sweep.first))
    shared = {name: value for name, value in everything.items() if name not in sweep.search and name != "stage"}
    parts = (Halving, Placement, Finalists)
    tree = {key: dataclasses.asdict(v) if isinstance(v, parts) else v for key, v in vars(sweep).items()}
    tree["base"] = {"preset": sweep.base["preset"], **shared}
    tree["search"] = {name: searched.spec for name, searched in sweep.search.items()}
    return yaml.safe_dump(tree, sort_keys=False)
