"""A connection to a Ray cluster for as long as a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray

from clipfh.cluster import resources
from clipfh.config.experiment import Placement


@contextlib.contextmanager
def connected(
    address: str | None = None, placement: Placement | None = None, dashboard: bool = False
) -> Iterator[None]:
    """Connect to the cluster at the address, or start one that ends with the block.

    Where this process is connected already, the block uses that cluster and leaves it as it is.

    Raises:
        UserError: as `connect`.
    """
    was_connected = ray.is_initialized()
    resources.connect(address, placement, dashboard)
    try:
        yield
    finally:
        if not was_connected:
            resources.disconnect()
