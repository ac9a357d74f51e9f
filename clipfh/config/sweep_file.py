"""The sweep file: what is searched, from where, how long. Read, checked and written back with its defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.config.experiment import LOSS_TERMS, SMALL_MODEL, Budget, Experiment, Placement, require

if TYPE_CHECKING:
    import optuna

SHARED = ("stage", "model.name", "model.pretrained")
"""What all trials of a sweep have in common, beside the prompts."""

SWITCH = "?"
"""Ends the name of the parameter by which Optuna switches a setting between its range and its `or`."""

KINDS = ("loguniform", "uniform", "int", "choice")

TOGETHER = (
    ("batch.items", "batch.categories"),
    ("batch.views", *(f"loss.{term}" for term in LOSS_TERMS), "loss.supcon_captions"),
    ("budget.images", "budget.epochs"),
)
"""Settings whose values must fit each other's."""


@dataclass(frozen=True)
class SearchRange:
    """How one setting is searched."""

    kind: str
    """one of KINDS"""
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


SAMPLERS = ("tpe", "random", "grid")
MANY = 2**31  # trials of a grid where nobody said how many: all of it


@dataclass(frozen=True)
class SweepFile:
    """A sweep file, resolved and checked."""

    name: str
    stage: str
    preset: str
    base: dict[str, Any]
    """settings that all trials share, dotted"""
    search: dict[str, SearchRange]
    points: list[dict[str, Any]]
    trials: int
    halving: Halving
    placement: Placement = field(default_factory=Placement)
    seed: int = 0
    sampler: str = "tpe"
    """one of SAMPLERS; grid tries every combination of choices"""
    final: Finalists = field(default_factory=Finalists)
    earlier: str = ""
    """folder of another sweep, whose trials the search knows from the start"""

    def experiment(self, sampled: Mapping[str, Any]) -> Experiment:
        """The experiment of a trial."""
        drawn = {name: value for name, value in sampled.items() if not name.endswith(SWITCH)}
        return presets.resolve(self.stage, self.preset, {**self.base, **drawn})

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
        points = self.combinations(("loss.infonce", "loss.supcon", "loss.supcon_captions"))
        return next((p for p in points if self.experiment({**self.first, **p}).loss.takes_text), {})

    @property
    def off(self) -> dict[str, Any]:
        """What may be off, switched off."""
        return {name: r.off for name, r in self.search.items() if r.off is not None}


def _term_of(name: str) -> str:
    """'triplet' for loss.triplet_margin; '' for what is no option of a term (those sort first)."""
    term, _, option = name.removeprefix("loss.").partition("_")
    return term if name.startswith("loss.") and option and term in LOSS_TERMS else ""


KEYS = (
    "name", "stage", "base", "search", "points", "trials", "budget", "placement", "seed", "sampler", "final", "earlier"
)  # fmt: skip


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
    base = {**_mapping(tree.get("base", {}), "base"), **overrides}
    preset = base.pop("preset", None)
    search = {name: _range(name, spec) for name, spec in _mapping(tree.get("search", {}), "search").items()}
    if clash := set(search) & set(overrides):
        raise UserError(f"{sorted(clash)[0]} is searched: give another value in the file, not beside it")
    budget = dict(_mapping(tree.get("budget", {}), "budget"))
    _known(budget, [f.name for cls in (Budget, Halving) for f in dataclasses.fields(cls)], "budget.")
    halving = _dataclass(Halving, {k: budget.pop(k) for k in ("first_rung", "reduction") if k in budget}, "budget")
    for name, value in budget.items():
        base.setdefault(f"budget.{name}", value)
    if halving.first_rung:
        base.setdefault("budget.report_every", halving.first_rung)
    sweep = SweepFile(
        name=str(tree.get("name", "sweep")),
        stage=tree.get("stage", "image"),
        preset=str(preset or ("scratch" if base.get("model.name") == SMALL_MODEL else "recommended")),
        base=schema.with_absolute_paths({name: schema.check(name, value) for name, value in base.items()}),
        search=search,
        points=[dict(_mapping(point, "a point")) for point in _list(tree.get("points", []), "points")],
        trials=trials if trials is not None else tree.get("trials", MANY if tree.get("sampler") == "grid" else 16),
        halving=halving,
        placement=_dataclass(Placement, _mapping(tree.get("placement", {}), "placement"), "placement"),
        seed=tree.get("seed", 0),
        sampler=str(tree.get("sampler", "tpe")),
        final=_dataclass(Finalists, _mapping(tree.get("final", {}), "final"), "final"),
        earlier=str(tree.get("earlier") or ""),
    )
    _check_values(sweep)
    return _with_grid(sweep) if sweep.sampler == "grid" else sweep


def _with_grid(sweep: SweepFile) -> SweepFile:
    """Its grid as points; no more trials than those."""
    for name, found in sweep.search.items():
        if found.kind != "choice":
            raise UserError(f"sampler: grid tries choices, and {name} has a {found.kind} range: give it a choice")
    points = sweep.grid()
    return dataclasses.replace(sweep, points=points, trials=min(sweep.trials, len(points)))


def _check_values(sweep: SweepFile) -> None:
    """Build the experiments at the ends of every range and at every point."""
    if type(sweep.trials) is not int or sweep.trials < 1:
        raise UserError(f"trials must be a whole number above 0, not {sweep.trials!r}")
    if sweep.sampler not in SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sweep.sampler!r}")
    if type(sweep.seed) is not int or sweep.seed < 0:
        raise UserError(f"seed must be a whole number, 0 or more, not {sweep.seed!r}")
    for name in sweep.search:
        for corner in sweep.corners(name):
            sweep.experiment(corner)
    sweep.experiment({**sweep.first, **sweep.off})
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
    _known(spec, (*KINDS, "or"))
    kinds = [kind for kind in KINDS if kind in spec]
    if len(kinds) != 1:
        raise UserError(f"search: {name} needs one of {', '.join(KINDS)}")
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
    base = {n: v for n, v in everything.items() if n not in sweep.search and n != "stage"}
    search: dict[str, Any] = {
        n: {r.kind: list(r.values)} | ({"or": r.off} if r.off is not None else {}) for n, r in sweep.search.items()
    }
    tree: dict[str, Any] = {
        "name": sweep.name,
        "stage": sweep.stage,
        "base": {"preset": sweep.preset, **base},
        "search": search,
    }
    tree |= {"points": sweep.points, "trials": sweep.trials, "budget": dataclasses.asdict(sweep.halving)}
    tree |= {"placement": dataclasses.asdict(sweep.placement), "seed": sweep.seed, "sampler": sweep.sampler}
    tree |= {"final": dataclasses.asdict(sweep.final), "earlier": sweep.earlier}
    return yaml.safe_dump(tree, sort_keys=False)
