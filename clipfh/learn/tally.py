"""What the steps since the last report came to: means, speed, and whether loss and gradient stayed finite."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from clipfh.data.transfer import PendingValue


class Diverged(Exception):
    """Loss or gradient are no longer finite.

    Args:
        step: at which it happened.
        terms: the loss terms there.
        rows: (B,) images of the global batch.
    """

    def __init__(self, step: int, terms: dict[str, float], rows: np.ndarray) -> None:
        super().__init__(step, terms, rows)
        self.step, self.terms, self.rows = step, terms, rows


@dataclass(frozen=True)
class UncheckedStep:
    """A step that was made, of which it isn't known yet whether it was of any use."""

    step: int
    terms: dict[str, Tensor]
    rows: np.ndarray
    """(B,) images of the global batch"""
    lost: PendingValue
    """1 where loss or gradient were not finite, else 0"""

    def check(self) -> None:
        """Raise Diverged where loss or gradient were not finite."""
        if self.lost.read():
            raise Diverged(self.step, {name: value.item() for name, value in self.terms.items()}, self.rows)


@dataclass
class StepTally:
    """What happened since the last report."""

    start: float = field(default_factory=lambda: time.monotonic())
    images: int = 0
    waited: float = 0.0
    """seconds spent waiting for images"""
    losses: dict[str, float | Tensor] = field(default_factory=dict)
    """sums over the steps"""
    steps: int = 0

    def add(self, images: int, waited: float, values: dict[str, Tensor]) -> None:
        """Take in a step. Tensors are summed where they are: no step waits for the device."""
        self.images += images
        self.waited += waited
        self.steps += 1
        for name, value in values.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean losses, images per second, share of the time spent waiting for data, all of it until now."""
        means = {name: float(total) / self.steps for name, total in self.losses.items()}
        seconds = time.monotonic() - self.start  # once the losses are here, the device has made all steps
        return {**means, "images_per_second": self.images / seconds, "data_wait": self.waited / seconds}
