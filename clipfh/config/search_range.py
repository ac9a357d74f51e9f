"""The range in which one setting is searched, and Optuna's parameters for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import optuna

SWITCH = "?"
"""End of the name of the parameter by which Optuna switches a setting between its range and its `or`."""

MANY = 1000
"""Number of values of a range, or of points of a space, that is too large to try all"""

Kind = Literal["loguniform", "uniform", "int", "choice"]


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
    def all_values(self) -> tuple[Any, ...]:
        """Every value that may be drawn; none where there are too many to count."""
        if self.kind == "choice":
            return self.ends
        if self.kind != "int" or self.values[1] - self.values[0] >= MANY:
            return ()
        numbers = range(self.values[0], self.values[1] + 1)
        return tuple(numbers) if self.off is None else (*numbers, self.off)

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """Optuna's distribution of the range, without the value of `or`."""
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
