"""The queue of a job's runs: as many train as the cluster holds, the others wait for their turn."""

from __future__ import annotations

import time

import ray

from clipfh.cluster import ray_private, resources
from clipfh.cluster.resources import Resources


class RunQueue:
    """The runs of this job in the order in which they train, the same for all processes of the job."""

    def __init__(self) -> None:
        self._prefix = f"clipfh:queue:{ray.get_runtime_context().get_job_id()}:"

    def join(self, run: str) -> None:
        """Put a run at the end of the queue, until it leaves."""
        self.leave(run)
        ray_private.write_key(f"{self._prefix}{time.time_ns():020d}:{run}")

    def leave(self, run: str) -> None:
        """Take a run out of the queue, if it is in. A run that has left is over."""
        for key in self._keys():
            if self._run(key) == run:
                ray_private.take_key(key)

    def holds(self, run: str) -> bool:
        """Whether a run is in the queue."""
        return run in map(self._run, self._keys())

    def is_turn_of(self, run: str, needs: Resources) -> bool:
        """Whether a run may train: the first ones may, as many as the cluster holds, as nodes come and go.

        More of them would be worse than slow. Their workers alone could fill a cluster that has lost a node, and would
        then wait for ever for images that no CPU is left to decode.
        """
        return run in map(self._run, self._keys()[: resources.room_now(needs)])

    def _keys(self) -> list[str]:
        return ray_private.keys(self._prefix)

    def _run(self, key: str) -> str:
        return key.removeprefix(self._prefix).partition(":")[2]
