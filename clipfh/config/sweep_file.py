"""The sweep file, which says what is searched and how. Read, checked and written back with its defaults."""

from __future__ import annotations

import dataclasses
import math
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
    MODEL_IDENTITY,
    Budget,
    Experiment,
    LossSettings,
    Placement,
    Stage,
    require,
)
from clipfh.config.search_range import MANY as MANY_POINTS
from clipfh.config.search_range import SWITCH, Kind, SearchRange

if TYPE_CHECKING:
    import optuna

MODEL = "model"
"""Name of the searched setting whose choices are the entries of `models`."""

TOGETHER = (
    ("batch.items", "batch.categories"),
    ("batch.views", "batch.memory", *(f"loss.{term}" for term in LOSS_TERMS), "loss.supcon_captions"),
    ("budget.images", "budget.epochs"),
    ("optimizer.head_first", "model.lora_rank", "model.lora_targets", "loss.ce", "loss.arcface", "loss.proxy_anchor"),
)
"""Settings whose values must fit each other's."""


@dataclass(frozen=True)
class Halving:
    """Successive halving by images seen."""

    first_rung: int = 0
    """images after which the first trials are stopped; 0: none is"""
    reduction: int = 3
    """from a rung one trial in `reduction` goes on"""

    def __post_init__(self) -> None:
        require(self.first_rung >= 0, "first_rung", "0 or more", self.first_rung)
        require(self.reduction >= 2, "reduction", "2 or more", self.reduction)


@dataclass(frozen=True)
class Race:
    """The race between several models, after zero-shot and before the search."""

    keep: int = 0
    """models that go into the search, the best by zero-shot mAP on validation; 0: all"""

    def __post_init__(self) -> None:
        require(self.keep >= 0, "keep", "0 or more", self.keep)


@dataclass(frozen=True)
class Finalists:
    """The final runs, between the search and the test split."""

    top: int = 0
    """leading settings that are trained again; 0: the search's own best is the winner"""
    seeds: int = 3
    """how often each of them is, with seeds of its own; the best mean wins"""
    refit: bool = False
    """train the winner on train and validation items together"""
    image_size: int = 0
    """side of the images of all these runs, pixels, and so of the winner's model; 0: as in the search"""
    soup: Literal["greedy", "none"] = "greedy"
    """average the weights of leading runs while that does not lower validation mAP; of random weights none is made"""
    mix: bool = True
    """mix the soup's weights, or the best trial's, with those before tuning, in the best shares on validation items"""

    def __post_init__(self) -> None:
        require(self.top >= 0, "top", "0 or more", self.top)
        require(self.seeds >= 1, "seeds", "1 or more", self.seeds)
        require(self.image_size >= 0, "image_size", "0 or more", self.image_size)
        if self.image_size and not self.top and not self.refit:
            raise UserError("image_size is of the runs after the search: give top or refit too")

    @property
    def num_runs(self) -> int:
        """Number of these runs, with one refit; of a soup each run is refit."""
        return self.top * self.seeds + self.refit


MANY = 2**31  # trials of a grid where nobody said how many: all of it


@dataclass(frozen=True)
class SweepFile:
    """A sweep file, resolved and checked. Its fields are the file's keys, with their types and defaults."""

    name: str = "sweep"
    stage: Stage = "image"
    base: dict[str, Any] = field(default_factory=dict)
    """settings that all trials share, dotted, and their preset; without one each model has its usual one"""
    models: list[dict[str, Any]] = field(default_factory=list)
    """settings of each model of a race, by their names within `model`; in the file also a name alone"""
    race: Race = field(default_factory=Race)
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

    def experiment(self, values: Mapping[str, Any]) -> Experiment:
        """The experiment of a trial."""
        settings = {name: value for name, value in {**self.base, **values}.items() if not name.endswith(SWITCH)}
        if MODEL in settings:
            entry = dict(zip(label_models(self.models), self.models, strict=True))[settings.pop(MODEL)]
            settings |= {f"model.{name}": value for name, value in entry.items()}
        return presets.resolve(self.stage, settings.pop("preset", None), settings)

    @property
    def contenders(self) -> dict[str, dict[str, Any]]:
        """The models that trials may have: label to the searched settings that choose the model.

        Where no model is searched there is one, without such settings.
        """
        if MODEL in self.search:
            return {label: {MODEL: label} for label in self.search[MODEL].values}
        names = [name for name in (f"model.{each}" for each in MODEL_IDENTITY) if name in self.search]
        points = [
            dict(zip(names, values, strict=True)) for values in product(*(self.search[name].ends for name in names))
        ]
        models = [self.experiment({**self.first, **point}).model for point in points]
        labels = label_models([{name: getattr(model, name) for name in MODEL_IDENTITY} for model in models])
        return dict(zip(labels, points, strict=True))

    def start(self, label: str) -> Experiment:
        """The experiment at one point of the space of a contender."""
        return self.experiment({**self.first, **self.contenders[label]})

    def only(self, labels: Sequence[str]) -> SweepFile:
        """The sweep with only these contenders. Points of the others are left out, and a grid is made anew."""
        contenders = self.contenders
        models = [contenders[label] for label in labels]
        ranges = {name: SearchRange("choice", tuple(dict.fromkeys(p[name] for p in models))) for name in models[0]}
        search = {**self.search, **ranges}
        points = [p for p in self.points if all(ranges[name].holds(p[name]) for name in ranges.keys() & p.keys())]
        narrow = dataclasses.replace(self, search=search, points=points)
        return _with_grid(narrow) if self.sampler == "grid" else narrow

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """A trial's settings. An option of a loss term is drawn only where the term is on."""
        values: dict[str, Any] = {}
        for name in sorted(self.search, key=_parse_term):
            if self._is_on(name, values):
                values[name] = self.search[name].suggest(trial, name)
        return values

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of ends and choices, an option of a loss term only where the term is on."""
        return self._points({name: range_.ends for name, range_ in self.search.items()})

    def space(self) -> list[dict[str, Any]]:
        """Every point of the space, if they are few enough to try them all; else none."""
        values = {name: range_.all_values for name, range_ in self.search.items()}
        few = values and 0 < math.prod(map(len, values.values())) <= MANY_POINTS
        return self._points(values) if few else []

    def _points(self, values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        points: list[dict[str, Any]] = [{}]
        for name in sorted(values, key=_parse_term):
            each = [{name: value} for value in values[name]]
            points = [{**point, **one} for point in points for one in (each if self._is_on(name, point) else [{}])]
        return points

    def within_space(self) -> SweepFile:
        """The sweep with no more trials than its space has points."""
        points = self.space()
        return dataclasses.replace(self, trials=min(self.trials, len(points))) if points else self

    def _is_on(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether a setting counts, given `values` drawn before it: not if it is an option of a term that is off."""
        term = _parse_term(name)
        return not term or bool(values.get(f"loss.{term}", self._weight(term)))

    def _weight(self, term: str) -> float:
        """A term's weight where it is not searched."""
        return float(schema.flatten(self.experiment(self.first))[f"loss.{term}"])

    def corners(self, name: str) -> list[dict[str, Any]]:
        """Points of the space that differ in one setting: its ends or choices; one point where it is not searched."""
        range_ = self.search.get(name)
        return [{**self.first, name: value} for value in range_.ends] if range_ else [self.first]

    def combinations(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """All combinations of the ends of these settings, if searched; of a term's ends one on and one off."""
        own = [name for name in names if name in self.search]
        ends = [self.search[name].ends for name in own]
        telling = [
            {bool(end): end for end in each}.values() if name.startswith("loss.") else each
            for name, each in zip(own, ends, strict=True)
        ]
        return [dict(zip(own, values, strict=True)) for values in product(*telling)]

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


def label_models(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name of each model, which no other has: its settings, and of a file only its name if that will do.

    Args:
        models: settings of each by their names within `model`, `name` among them.
    """
    whole = [" ".join(str(value) for value in each.values() if value) for each in models]
    brief = [
        " ".join(Path(str(v)).name if k == "pretrained" else str(v) for k, v in each.items() if v) for each in models
    ]
    return brief if len(set(brief)) == len(brief) else whole


def _parse_term(name: str) -> str:
    """'triplet' for loss.triplet_margin; '' for what is no option of a term (those sort first)."""
    return next((term for term in LOSS_TERMS if name.startswith(f"loss.{term}_")), "")


KEYS = [f.name for f in dataclasses.fields(SweepFile)]
BUDGET_KEYS = [f.name for cls in (Budget, Halving) for f in dataclasses.fields(cls)]


def load(
    path: str | schema.TextFile, overrides: Mapping[str, Any] | None = None, trials: int | None = None
) -> SweepFile:
    """Read and check a sweep file.

    Args:
        path: YAML.
        overrides: settings in place of the file's `base`.
        trials: in place of the file's.

    Raises:
        UserError: unreadable, or a key, setting or value that does not fit; nothing has started then.
    """
    path = Path(path) if isinstance(path, str) else path
    if not path.is_file():
        raise UserError(f"{path}: no such sweep file; sweeps/ has some to start from")
    try:
        tree = yaml.safe_load(path.read_text())
        return _check_tree(tree, dict(overrides or {}), trials)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_tree(tree: Any, overrides: dict[str, Any], trials: int | None) -> SweepFile:
    tree = _mapping(tree, "the sweep file")
    _require_known(tree, KEYS)
    budget = _mapping(tree.get("budget", {}), "budget")
    _require_known(budget, BUDGET_KEYS, "budget.")
    rungs = {name: budget[name] for name in budget if name not in {f.name for f in dataclasses.fields(Budget)}}
    values = {name: _value(name, value) for name, value in {**tree, "budget": rungs}.items()}
    values["search"] = {name: _range(name, spec) for name, spec in values.get("search", {}).items()}
    if labels := label_models(values.get("models", [])):
        values["search"] = {MODEL: SearchRange("choice", tuple(labels)), **values["search"]}
    values["points"] = [_point(each, values["search"]) for each in values.get("points", [])]
    if clash := set(values["search"]) & set(overrides):
        raise UserError(f"{sorted(clash)[0]} is searched: give another value in the file, not beside it")
    budgets = {f"budget.{name}": value for name, value in budget.items() if name not in rungs}
    if clash := set(values["search"]) & {*budgets, *values.get("base", {})}:
        raise UserError(f"{sorted(clash)[0]} is searched, and base or budget gives it too: take one of them out")
    if values["budget"].first_rung:
        budgets = {"budget.report_every": values["budget"].first_rung, **budgets}
    values["base"] = _base({**budgets, **values.get("base", {}), **overrides}, values["search"])
    if trials is not None or (values.get("sampler") == "grid" and "trials" not in values):
        values["trials"] = MANY if trials is None else trials
    sweep = SweepFile(**values)
    _check_models(sweep)
    for label in sweep.contenders:
        _check_values(sweep.only([label]))
    _check_points(sweep)
    return _with_grid(sweep) if sweep.sampler == "grid" else sweep


def _value(key: str, value: Any) -> Any:
    """The value of a key of the file, checked as the type of SweepFile's field wants it."""
    hint = typing.get_type_hints(SweepFile)[key]
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, _mapping(value, key), key)
    if key == "models":
        return [_model(each) for each in _list(value, key)]
    if typing.get_origin(hint) is list:
        return [_mapping(each, "a point") for each in _list(value, key)]
    return _mapping(value, key) if typing.get_origin(hint) is dict else schema.check(key, value, SweepFile)


def _model(entry: Any) -> dict[str, Any]:
    """Checked settings of a model of a race, from its name or a mapping."""
    settings = {"name": entry} if isinstance(entry, str) else _mapping(entry, "a model")
    _require_known(settings, MODEL_IDENTITY, "models: ")
    if "name" not in settings:
        raise UserError(f"models: {settings} needs a name")
    values = {
        f"model.{name}": schema.check(f"model.{name}", settings[name]) for name in MODEL_IDENTITY & settings.keys()
    }
    absolute = schema.with_absolute_paths(values)
    return {name: absolute[f"model.{name}"] for name in MODEL_IDENTITY if name in settings}


def _base(settings: dict[str, Any], search: Mapping[str, SearchRange]) -> dict[str, Any]:
    """Checked settings, and their preset: the usual one for the model where none is named and there is one model."""
    if "stage" in settings:
        raise UserError("base: stage is a key of its own: write it beside base, which then has that stage's preset")
    usual = presets.usual_preset(settings.get("model.name", ""))
    preset = settings.pop("preset", None) or ("" if {MODEL, "model.name"} & search.keys() else usual)
    values = {name: schema.check(name, value) for name, value in settings.items()}
    return {**({"preset": str(preset)} if preset else {}), **schema.with_absolute_paths(values)}


def _with_grid(sweep: SweepFile) -> SweepFile:
    """The sweep with its grid as points, what the file's points name first, and no more trials than points."""
    for name, range_ in sweep.search.items():
        if range_.kind != "choice":
            raise UserError(f"sampler: grid tries choices, and {name} has a {range_.kind} range: give it a choice")

    def place(combination: dict[str, Any]) -> int:
        fits = (all(combination.get(n, value) == value for n, value in point.items()) for point in sweep.points)
        return next((i for i, is_fit in enumerate(fits) if is_fit), len(sweep.points))

    points = sorted(sweep.grid(), key=place)
    return dataclasses.replace(sweep, points=points, trials=min(sweep.trials, len(points)))


def _check_models(sweep: SweepFile) -> None:
    """Whether the models of a race are several, named once and in one place."""
    labels, names = label_models(sweep.models), {*sweep.search, *(sweep.base.keys() - {"model.image_size"})}
    if not labels and sweep.race.keep:
        raise UserError("race: keep says how many of `models` go into the search: name them under models")
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"models: {sorted(twice)[0]} is there twice: take one out")
    if sweep.race.keep > len(labels):
        raise UserError(f"race: --keep must be at most the number of models, {len(labels)}, not {sweep.race.keep}")
    if labels and (clash := [name for each in MODEL_IDENTITY if (name := f"model.{each}") in names]):
        raise UserError(f"models names the models of the sweep, and so does {clash[0]}: take one of them out")


def _check_points(sweep: SweepFile) -> None:
    """Whether the points lie within the ranges, and fit what else is given for each model."""
    for point in sweep.points:
        for name, value in point.items():
            if name not in sweep.search:
                raise UserError(f"points: {name} is not searched{schema.nearest(name, list(sweep.search))}")
            if not sweep.search[name].holds(value):
                choices = f": take one of {', '.join(sweep.search[name].values)}" if name == MODEL else ""
                raise UserError(f"points: {name} {value} lies outside its range{choices}")
        for model in sweep.contenders.values():
            sweep.experiment({**sweep.first, **model, **point})


def _check_values(sweep: SweepFile) -> None:
    """Build the experiments at the ends of every range."""
    for name in sweep.search:
        for corner in sweep.corners(name):
            sweep.experiment(corner)
    off = {name: range_.off for name, range_ in sweep.search.items() if range_.off is not None}
    sweep.experiment({**sweep.first, **off})
    for names in TOGETHER:
        _check_together(sweep, names)


def _check_together(sweep: SweepFile, names: Sequence[str]) -> None:
    """Build the experiments at all combinations of the ends of some settings."""
    for point in sweep.combinations(names):
        try:
            sweep.experiment({**sweep.first, **point})
        except UserError as error:
            values = ", ".join(f"{name} {value}" for name, value in point.items())
            raise UserError(f"search: {values} may be drawn together, and do not fit together ({error})") from None


def _range(name: str, spec: Any) -> SearchRange:
    if name in ("stage", "batch.window") or name.startswith("text."):
        raise UserError(f"search: {name} can't be searched: all trials share it; make a sweep for each")
    spec = _mapping(spec, f"search: {name}")
    all_kinds = typing.get_args(Kind)
    _require_known(spec, (*all_kinds, "or"))
    kinds = [kind for kind in all_kinds if kind in spec]
    if len(kinds) != 1:
        raise UserError(f"search: {name} needs one of {', '.join(all_kinds)}")
    kind = kinds[0]
    values = tuple(_setting(name, value) for value in _list(spec[kind], f"search: {name}: {kind}"))
    if not values:
        raise UserError(f"search: {name}: {kind} wants a list of one value or more, not []")
    fitting = {int: ("int",), float: ("uniform", "loguniform")}.get(type(values[0]), ())
    if name.removeprefix("model.") in MODEL_IDENTITY:
        fitting = ()
    if kind not in (*fitting, "choice"):
        raise UserError(f"search: {name}: {kind} does not suit it: take {' or '.join((*fitting, 'choice'))}")
    if kind != "choice" and (len(values) != 2 or not values[0] < values[1]):
        raise UserError(f"search: {name}: {kind} wants [low, high] with low below high, not {list(values)}")
    if kind == "loguniform" and values[0] <= 0:
        raise UserError(f"search: {name}: loguniform wants values above 0, not {values[0]}")
    return SearchRange(kind, values, _setting(name, spec["or"]) if "or" in spec else None)


def _point(point: Mapping[str, Any], search: Mapping[str, SearchRange]) -> dict[str, Any]:
    """A point with its values as a range has them. What is not searched is refused once all else is read."""
    return {n: _setting(n, v) if n in search and n != MODEL else v for n, v in point.items()}


def _setting(name: str, value: Any) -> Any:
    """A checked value of a setting, a file named from the root on."""
    return schema.with_absolute_paths({name: schema.check(name, value)})[name]


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise UserError(f"{where} must be a mapping of names to values, not {tree!r}")
    return tree


def _list(tree: Any, where: str) -> list[Any]:
    if not isinstance(tree, list):
        raise UserError(f"{where} wants a list, not {tree!r}")
    return tree


def _require_known(tree: Mapping[str, Any], names: Sequence[str], where: str = "") -> None:
    for name in tree:
        if name not in names:
            raise UserError(f"unknown key {where}{name}{schema.nearest(name, list(names))}")


def _dataclass(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**{name: schema.check(name, value, cls) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_yaml(sweep: SweepFile) -> str:
    """The sweep as YAML, all defaults filled in; of models with several presets, only defaults that they share."""
    every = [schema.flatten(sweep.start(label)) for label in sweep.contenders]
    left_out = {"stage", *sweep.search, *(("model.name", "model.pretrained") if sweep.models else ())}
    shared = {
        name: value
        for name, value in every[0].items()
        if name not in left_out and all(each[name] == value for each in every)
    }
    parts = (Halving, Placement, Finalists, Race)
    tree = {key: dataclasses.asdict(v) if isinstance(v, parts) else v for key, v in vars(sweep).items()}
    tree["base"] = {**{name: sweep.base[name] for name in ("preset",) if name in sweep.base}, **shared}
    tree["search"] = {name: range_.spec for name, range_ in sweep.search.items() if name != MODEL}
    return yaml.safe_dump(tree, sort_keys=False)
