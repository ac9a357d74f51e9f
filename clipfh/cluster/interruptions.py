"""Interruptions: Ray loses a node or a process during work that can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ray.exceptions import RayError

from clipfh import LOST, fixable

T = TypeVar("T")


def repeat_interrupted(work: Callable[[], T], times: int = 3) -> T:
    """Do work, and repeat it where Ray lost a node or a process meanwhile; returns what the work returns.

    Ray itself repeats tasks, but not the actors that Ray Data makes.

    Args:
        work: what to do; it may be done more than once.
        times: how often at most.
    """
    for _ in range(times - 1):
        try:
            return work()
        except RayError as error:
            # The error of a task often holds its cause as text alone
            if fixable(error) or not any(name in f"{type(error).__mro__} {error}" for name in LOST):
                raise
    return work()
