"""The resources of a Ray cluster: what one run takes, how many runs go at a time, what an autoscaler is asked for."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray.autoscaler.sdk import request_resources

from clipfh import UserError
from clipfh.cluster import connect, ray_private
from clipfh.config import cores
from clipfh.config.experiment import Placement

PIPELINE_CPUS = 1
"""CPUs of a worker's data pipeline. Ray Data shares CPUs out whole: a pipeline with less than one stands still."""

TASKS_A_CORE = 2
"""Tasks wait for memory as well as computing; two to a core keep it busy."""

ROOM_S = 1800
"""Seconds that an autoscaler may take to make room for a run. Clouds have a GPU in minutes, or none for hours."""

UNLIMITED_NODES = 100
"""Number of nodes that is counted for a kind that an autoscaler may make any number of."""

_LESS = "take fewer workers (--workers; in a sweep file, workers under placement), or less for each"

WISH = "clipfh:wish:"
"""Key of the head's store, followed by a job's id, for the room that the job wants from an autoscaler."""

RAY_UP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves its file on the head."""

print_now = functools.partial(print, flush=True)


@dataclass(frozen=True)
class Resources:
    """The resources that one run takes."""

    workers: int
    cpus: float
    """CPUs of a worker, without its data pipeline"""
    gpus: float
    """GPUs of a worker"""
    threads: int
    """torch threads of a worker"""
    shares_cores: bool = False
    """whether a worker's threads are its share of the cores, which the other runs on its machine change"""
    decoding: int | None = None
    """tasks of its data pipeline at a time; None leaves them to Ray's count of CPUs"""
    min_workers: int = 0
    """fewest workers of an elastic run, which has as many as there is room for, up to `workers`; 0 for other runs"""

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return 0 < self.min_workers < self.workers

    @property
    def per_worker(self) -> dict[str, float]:
        """What each worker reserves. An elastic run takes all nodes that come, so its workers reserve the CPUs of their
        pipelines too; else none might be left to decode."""
        cpus = self.cpus + PIPELINE_CPUS * self.is_elastic
        return {"CPU": cpus, **({"GPU": self.gpus} if self.gpus else {})}

    @property
    def total(self) -> dict[str, float]:
        """CPUs and GPUs of all workers and their data pipelines."""
        return {"CPU": self.workers * (self.cpus + PIPELINE_CPUS), "GPU": self.workers * self.gpus}

    def __str__(self) -> str:
        on = f"{self.gpus:g} GPU" if self.gpus else f"CPU, {self.threads} thread{'s' * (self.threads > 1)}"
        count = f"{self.min_workers} to {self.workers}" if self.is_elastic else f"{self.workers}"
        return f"{count} worker{'s' * (self.workers > 1)} on {on}{' each' * (self.workers > 1)}"


def compute_slots() -> int:
    """How many processes may compute at once: the cluster's CPUs, or this machine's cores where it was started here."""
    return cores.available() if connect.is_own() else max(1, int(ray.cluster_resources().get("CPU", 1)))


def is_this_machines_cpus() -> bool:
    """Whether this process started the cluster, and it has no GPU."""
    return connect.is_own() and not ray.cluster_resources().get("GPU")


def resolve_placement(
    placement: Placement, alone: bool = True, log: Callable[[str], None] = print_now, min_workers: int = 0
) -> Resources:
    """Work out what one run takes on this cluster, and wait where an autoscaler has yet to make room for it.

    Args:
        placement: what was asked for. `auto` CPUs are all the cores of a machine for a run alone, else one a worker.
        alone: whether it is the only run.
        log: takes a line for a person where the run has to wait.
        min_workers: fewest workers that an elastic run begins with; 0 for a run that is not elastic.

    Raises:
        UserError: the cluster can't hold one such run.
    """
    have, fewest = capacity(), min_workers or placement.workers
    gpus = _gpus(placement, fewest, have.get("GPU", 0))
    cpus = float(
        _share(placement, have, gpus, alone) if placement.cpus_per_worker == "auto" else placement.cpus_per_worker
    )
    resources = Resources(fewest, cpus, gpus, max(1, int(cpus)))
    for name, amount in resources.total.items():
        if amount > have.get(name, 0):
            raise UserError(
                f"a run with {fewest} worker(s) needs {amount:g} {name} (a CPU for each data pipeline "
                f"included), the cluster has {have.get(name, 0):g}: {_LESS}"
            )
    if not room_now(resources) and not _await_autoscaler(resources, log):
        raise UserError(
            f"no node has room for a worker with {cpus:g} CPU and {gpus:g} GPU, or not for all {fewest} at "
            f"once: {_LESS}"
        )
    if shortage := _held_by_others(resources):
        log(f"others use the cluster: waiting for {shortage} to be free")
    runs = 1 if alone else max_concurrent_runs(placement, resources)
    # Not a sweep's trials: a second thread beside one that is starting waits for its core more than it computes
    shares = placement.cpus_per_worker == "auto" and not gpus and alone
    decoding = TASKS_A_CORE * PIPELINE_CPUS if min_workers else _decoding_tasks(runs * resources.workers)
    workers = {"workers": placement.workers, "min_workers": min_workers}
    return dataclasses.replace(resources, decoding=decoding, shares_cores=shares, **workers)


def share_cores(resources: Resources, placement: Placement) -> Resources:
    """What a sweep's last runs take: on this machine's CPUs all its cores, which they share, as they may be few."""
    shares = placement.cpus_per_worker == "auto" and is_this_machines_cpus()
    return dataclasses.replace(resources, shares_cores=shares)


def capacity() -> dict[str, float]:
    """What the cluster has of each resource, or what its autoscaler may make of it where that is more."""
    have, plan = ray.cluster_resources(), collections.Counter[str]()
    for node in _planned_nodes():
        plan.update(node)
    return {name: max(have.get(name, 0), plan[name]) for name in {*have, *plan}}


def _planned_nodes() -> list[dict[str, float]]:
    """The resources of each node that an autoscaler may make; empty where no autoscaler shows itself.

    Some autoscalers tell Ray of their nodes. That of `ray up` leaves a file on the head, where jobs run. KubeRay's does
    neither.
    """
    kinds = ray_private.autoscaler_nodes() or _ray_up_nodes()
    return [resources for resources, count in kinds for _ in range(UNLIMITED_NODES if count < 0 else count)]


def _ray_up_nodes() -> list[tuple[dict[str, float], int]]:
    """The kinds of workers in the file of `ray up`: what such a node has, and how many there may be."""
    file = RAY_UP.expanduser()
    if connect.is_own() or not file.exists():
        return []
    config = yaml.safe_load(file.read_text())
    workers = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    return [(kind.get("resources", {}), kind.get("max_workers", config.get("max_workers", 0))) for kind in workers]


def _gpus(placement: Placement, workers: int, have: float) -> float:
    """GPUs of a worker. Where there are any, `auto` takes no CPU in their place: that would be slower by far."""
    if placement.gpus_per_worker != "auto":
        return float(placement.gpus_per_worker)
    if 0 < have < workers:
        raise UserError(
            f"{workers} workers take a GPU each, the cluster has {have:g}: take fewer, or the CPU by "
            "--gpus-per-worker 0 (in a sweep file: placement: {gpus_per_worker: 0})"
        )
    return 1.0 if have else 0.0


def _await_autoscaler(resources: Resources, log: Callable[[str], None]) -> bool:
    """Ask the autoscaler for room for a run, and wait for it; returns False where no autoscaler could make it.

    Raises:
        UserError: an autoscaler could, but did not within ROOM_S.
    """
    if not _room(_planned_nodes(), resources):
        return False
    log(f"waiting for the cluster's autoscaler to make room for {resources}")
    deadline = time.monotonic() + ROOM_S
    _request(resources, 1)
    try:
        while not room_now(resources):
            if time.monotonic() > deadline:
                raise UserError(
                    f"the cluster's autoscaler made no room for {resources} within {ROOM_S // 60} minutes: its log on "
                    "the head, monitor.log, says why; or take less"
                )
            time.sleep(1)
    finally:
        _request(resources, 0)
    return True


def _held_by_others(resources: Resources) -> str:
    """The resources of a run that others hold, in words; empty where all are free. Ray Train waits for them."""
    if connect.is_own():
        return ""
    free = ray.available_resources()
    amounts = {name: amount - free.get(name, 0) for name, amount in resources.total.items()}
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount > 0)


def _decoding_tasks(workers: int) -> int | None:
    """How many tasks decode for each of some workers at a time; None where the cluster's CPUs are a fit limit.

    A cluster that was started here declares more CPUs than it has cores, and each task is a process of 400 MiB.
    """
    return max(1, TASKS_A_CORE * cores.available() // workers) if connect.is_own() else None


def _share(placement: Placement, have: dict[str, float], gpus: float, alone: bool) -> int:
    """CPUs of a worker where they are `auto`."""
    if gpus or not (alone or placement.concurrent != "auto"):
        return 1
    largest = max((node.get("CPU", 0) for node in (*_nodes(), *_planned_nodes())), default=1)
    runs = placement.workers * (1 if alone or placement.concurrent == "auto" else placement.concurrent)
    on_a_machine = min(cores.available(), int(largest))
    return max(1, min(on_a_machine // runs, int(have.get("CPU", 0) // runs) - PIPELINE_CPUS))


def max_concurrent_runs(placement: Placement, resources: Resources) -> int:
    """How many such runs go at a time: as many as were asked for, or as the cluster holds now; at least one."""
    room = max(1, room_now(resources))
    return room if placement.concurrent == "auto" else min(room, placement.concurrent)


def room_now(resources: Resources) -> int:
    """How many such runs fit on the nodes that the cluster has now, busy or not."""
    return _room(_nodes(), resources)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(nodes: Sequence[Mapping[str, float]], resources: Resources) -> int:
    """How many runs some nodes hold: a worker is on one node, while the CPU of its data pipeline may be anywhere."""
    worker = {"CPU": resources.cpus, "GPU": resources.gpus}
    workers = sum(min(int(node.get(k, 0) / v + 1e-9) for k, v in worker.items() if v) for node in nodes)
    cpus = sum(node.get("CPU", 0) for node in nodes)
    return min(workers // resources.workers, int(cpus / resources.total["CPU"] + 1e-9))


@contextlib.contextmanager
def autoscaler_request(placement: Placement, resources: Resources) -> Iterator[Callable[[int], None]]:
    """A request to the autoscaler for as long as the block lasts. Without an autoscaler it has no effect.

    Yields:
        A function that takes the number of runs that are left, and asks for room for them: for as many at a time as
        `placement` allows, or as the autoscaler may make.
    """
    most = _room(_planned_nodes(), resources) if placement.concurrent == "auto" else placement.concurrent
    current = 0

    def ask(number: int) -> None:
        nonlocal current
        if (runs := min(most, number)) != current:
            _request(resources, runs)
            current = runs

    try:
        yield ask
    finally:
        ask(0)


def _request(resources: Resources, runs: int) -> None:
    """Ask the autoscaler for room for some runs, in place of what this job asked for before.

    A request replaces all earlier ones on the cluster, also those of other jobs. So the head's store has the wish of
    each job, and the request is the sum of the wishes of all jobs that still run.
    """
    bundle = {name: amount / resources.workers for name, amount in resources.total.items() if amount}
    wish = json.dumps([bundle] * (runs * resources.workers))
    ray_private.write_key(f"{WISH}{ray.get_runtime_context().get_job_id()}", wish.encode())
    wishes, jobs = ray_private.keys(WISH), ray_private.running_jobs()
    bundles = [
        bundle
        for key in wishes
        if key.removeprefix(WISH) in jobs
        for bundle in json.loads(ray_private.read_key(key) or b"[]")
    ]
    request_resources(bundles=bundles)
