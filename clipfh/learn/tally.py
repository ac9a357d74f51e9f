"""The steps since the last report: mean losses, speed, and the check that loss and gradient are finite."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from clipfh.model.transfer import PendingValue


class Diverged(Exception):
    """The loss or the gradient is not finite.

    Args:
        step: the step whose loss or gradient is not finite.
        terms: values of the loss terms at this step.
        rows: (B,) images of the global batch.
    """

    def __init__(self, step: int, terms: dict[str, float], rows: np.ndarray) -> None:
        super().__init__(step, terms, rows)
        self.step, self.terms, self.rows = step, terms, rows


@dataclass(frozen=True)
class UncheckedStep:
    """A step whose loss and gradient have not been checked yet, because the device may still compute them."""

    step: int
    terms: dict[str, Tensor]
    rows: np.ndarray
    """(B,) images of the global batch"""
    not_finite: PendingValue
    """1 where the loss or the gradient is not finite, else 0"""

    def check(self) -> None:
        """Raise Diverged where the loss or the gradient is not finite."""
        if self.not_finite.read():
            raise Diverged(self.step, {name: value.item() for name, value in self.terms.items()}, self.rows)


@dataclass
class StepTally:
    """Sums over the steps since the last report."""

    start: float = field(default_factory=lambda: time.monotonic())
    images: int = 0
    waited: float = 0.0
    """seconds spent waiting for images"""
    losses: dict[str, float | Tensor] = field(default_factory=dict)
    """sums over the steps"""
    steps: int = 0

    def add(self, images: int, waited: float, values: dict[str, Tensor]) -> None:
        """Add a step. Its losses are summed on their device, so that no step waits for the device."""
        self.images += images
        self.waited += waited
        self.steps += 1
        for name, value in values.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return mean losses, images per second, and the share of the time that was spent waiting for images."""
        means = {name: float(total) / self.steps for name, total in self.losses.items()}
        seconds = time.monotonic() - self.start  # after the losses are read, so after all steps on the device
        return {**means, "images_per_second": self.images / seconds, "data_wait": self.waited / seconds}
