"""Settings by their dotted names: types, checks, JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from clipfh import UserError
from clipfh.config.experiment import Experiment


@functools.cache
def fields(cls: type = Experiment) -> tuple[tuple[str, Any, Any, str], ...]:
    """Dotted name, type, default and help of every setting, in order."""
    return tuple(_fields(cls, ""))


def _fields(cls: type, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hint, f.default, docs.get(f.name, "")


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field, read from the source (dataclasses do not keep it)."""
    import ast
    import inspect

    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    pairs = zip(body, body[1:], strict=False)
    return {
        a.target.id: b.value.value
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
        if isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant) and isinstance(b.value.value, str)
    }


def nearest(name: str, valid: list[str]) -> str:
    """', did you mean X?' for a misspelt name, or nothing."""
    tails = {v.split(".")[-1]: v for v in valid}
    close = difflib.get_close_matches(name, valid, 1) or [
        tails[t] for t in difflib.get_close_matches(name.split(".")[-1], list(tails), 1)
    ]
    return f", did you mean {close[0]}?" if close else ""


def check(name: str, value: Any, cls: type = Experiment) -> Any:
    """The value as the setting's type.

    Raises:
        UserError: no such setting, or a value of another type.
    """
    types_by_name = {n: hint for n, hint, _, _ in fields(cls)}
    if name not in types_by_name:
        raise UserError(f"unknown setting {name}{nearest(name, list(types_by_name))}")
    return _typed(name, value, types_by_name[name])


def _typed(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        number, literal = typing.get_args(hint)
        if value in typing.get_args(literal):
            return value
        if type(value) not in (int, float):
            raise UserError(f"{name} must be {_TYPE_NAMES[number]} or {typing.get_args(literal)[0]}, not {value!r}")
        return _typed(name, value, number)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        remedy = " (in YAML write 1.0e-5, not 1e-5)" if hint is float and _is_number(value) else ""
        raise UserError(f"{name} must be {_TYPE_NAMES[hint]}, not {value!r}{remedy}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def parse(name: str, text: str, cls: type = Experiment) -> Any:
    """A command-line text as the setting's value; same errors as `check`."""
    hint = {n: h for n, h, _, _ in fields(cls)}.get(name, str)
    numeric = hint in (int, float) or isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    value: Any = text
    if hint is bool:
        value = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}.get(text.lower(), text)
    elif numeric and _is_number(text):
        number = float(text)
        whole = math.isfinite(number) and number == int(number)
        value = int(number) if whole else number
    return check(name, value, cls)


def with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths of files, since they are read again from other working directories."""
    paths = dict(settings)
    if (file := paths.get("text.file")) and "://" not in file:
        paths["text.file"] = str(Path(file).absolute())
    if (file := paths.get("model.pretrained")) and Path(file).is_file():
        paths["model.pretrained"] = str(Path(file).absolute())
    if (name := str(paths.get("model.name", ""))).startswith("local-dir:"):
        paths["model.name"] = f"local-dir:{Path(name.removeprefix('local-dir:')).absolute()}"
    return paths


def one_budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A budget in epochs replaces one in images and the other way round; both at once are an error."""
    budgets = {k for k in ("budget.images", "budget.epochs") if settings.get(k)}
    if len(budgets) == 2:
        raise UserError("give --budget.images or --budget.epochs, not both")
    other: dict[str, dict[str, Any]] = {"budget.images": {"budget.epochs": 0.0}, "budget.epochs": {"budget.images": 0}}
    return {**other[budgets.pop()], **settings} if budgets else dict(settings)


def replace(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """The experiment with dotted settings changed; each is checked."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, leaf = name.rpartition(".")
        tree.setdefault(group, {})[leaf] = check(name, value)
    groups = {g: dataclasses.replace(getattr(experiment, g), **leaves) for g, leaves in tree.items() if g}
    return dataclasses.replace(experiment, **groups, **tree.get("", {}))


def flatten(experiment: Experiment) -> dict[str, Any]:
    """Dotted name to value, for all settings."""
    tree = dataclasses.asdict(experiment)
    return {name: _walk(tree, name) for name, *_ in fields()}


def _walk(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def to_json(experiment: Experiment) -> str:
    """The experiment as `experiment.json` holds it."""
    return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def from_json(text: str, where: str = "the text") -> Experiment:
    """The experiment from `to_json`'s text.

    Raises:
        UserError: not such a text, or a setting that this version does not know.
    """
    try:
        tree = json.loads(text)
        settings = {n: _walk(tree, n) for n, *_ in fields()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not an experiment of this version of clipfh ({error})") from None
    unknown = set(_leaves(tree)) - set(settings)
    if unknown:
        raise UserError(f"{where}: unknown setting {sorted(unknown)[0]}; it is from another version of clipfh")
    return replace(Experiment(), settings)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


class TextFile(Protocol):
    """A file on a disk or at a URI: a `Path`, or what stands for one."""

    def is_file(self) -> bool: ...
    def read_text(self) -> str: ...


def load_experiment(file: TextFile) -> Experiment:
    """Read `experiment.json`."""
    return from_json(file.read_text(), str(file))
