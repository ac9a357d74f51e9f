"""The Ray cluster: connect to one or start one here, share its resources out, and free what a run held."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import ray
import yaml
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._raylet import PlacementGroupID
from ray.autoscaler.sdk import request_resources
from ray.core.generated import common_pb2, gcs_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.placement_group import PlacementGroup

from clipfh import LOST, UserError, mendable
from clipfh.config import cores
from clipfh.config.experiment import Placement

# Train asks its workers for reports at this interval; at its default of 2 s every report waits for it.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# What people should read, the commands say in words; the rest is in Ray's log files.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

HEAD = "node:__internal_head__"
"""A resource that every Ray head has: drivers of trials take a sliver of it, so they run there and take no CPU."""

PIPELINE_CPUS = 1
"""CPUs of a worker's data pipeline. Ray Data shares CPUs out whole: a pipeline with less than one stands still."""

TASKS_A_CORE = 2
"""Tasks wait for memory as well as computing; two to a core keep it busy."""

ROOM_S = 1800
"""How long an autoscaler may take to make room for a run. Clouds have a GPU in minutes, or have none for hours."""

KEPT_S = 3600
"""How long a process that was started beforehand waits for its actor."""

ENDLESS = 100
"""Nodes of a kind that an autoscaler may make without a limit, as far as we count."""

RAY_UP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves its file on the head."""

said = functools.partial(print, flush=True)


@dataclass(frozen=True)
class Resources:
    """What one run takes."""

    workers: int
    cpus: float
    gpus: float
    threads: int
    """torch threads of a worker"""
    shares_cores: bool = False
    """whether its threads follow the other runs that compute on its machine, and are its share of the cores"""
    decoding: int | None = None
    """tasks of its data pipeline at a time; None leaves them to Ray's count of CPUs"""

    @property
    def total(self) -> dict[str, float]:
        """CPUs and GPUs of all workers and their data pipelines."""
        return {"CPU": self.workers * (self.cpus + PIPELINE_CPUS), "GPU": self.workers * self.gpus}

    def __str__(self) -> str:
        on = f"{self.gpus:g} GPU" if self.gpus else f"CPU, {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.workers} worker{'s' * (self.workers > 1)} on {on}{' each' * (self.workers > 1)}"


def connect(address: str | None = None, placement: Placement | None = None, dashboard: bool = False) -> None:
    """Connect to the cluster at the address (or in RAY_ADDRESS), or start one on this machine.

    A cluster of our own declares more CPUs than there are cores: a slot here is a process that may run, and with
    two cores a trial's worker and its data pipeline, twice, would otherwise wait for each other for ever.

    Raises:
        UserError: nobody answers at the address, or it is one of Ray's client.
    """
    if ray.is_initialized():
        return
    _hush()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise UserError(
            f"--address {address} is that of Ray's client, which can't do all that is needed here: on a node of the "
            "cluster give HOST:6379 of its head; from elsewhere, clipfh submit --address http://HOST:8265"
        )
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process a run, for a machine that nobody takes away
        workers = placement.workers if placement else 1
        slots = max(2 * cores.available(), 4, 4 * workers)
        try:
            ray.init("local", num_cpus=slots, include_dashboard=dashboard, runtime_env=_environment(), **quiet)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            raise UserError(
                "Ray did not start within 30 s: the machine is too busy; try again when it is less so"
            ) from error
        return
    if address != "auto":
        _check_reachable(address)
    try:
        ray.init(address, runtime_env=_environment(), **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"no Ray cluster at --address {address} ({reason}): start one, or leave --address out"
        ) from error


def _environment() -> dict[str, Any]:
    """The environment of all processes but those that train.

    Ray uses a process again only where the environment is the same, and one that decodes takes 400 MiB and seconds to
    start. So all have what Tune would give to trials and Train to controllers, and no setup hook, as `stream.TASK`.
    """
    train = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
    given = {"PL_DISABLE_FORK": "1", RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"}
    return {"env_vars": {**train, **given, WORKER_PROCESS_SETUP_HOOK_ENV_VAR: ""}}


def _hush() -> None:
    """Keep the chatter of Ray's Python side off the terminal; its log files have it."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told by the sweep, in a line
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # raylets' remarks, which no option turns off


def disconnect() -> None:
    """Leave the cluster; one of our own ends."""
    ray.shutdown()


def logs() -> str:
    """Where Ray's own logs of this session lie, on the head."""
    node = ray._private.worker.global_worker.node
    return f"{node.get_session_dir_path()}/logs" if node else "on the cluster's head"


def at_work() -> int:
    """Processes that may compute at once: as many as the cluster has CPUs, or cores where it is our own."""
    return cores.available() if _is_own() else max(1, int(ray.cluster_resources().get("CPU", 1)))


def is_this_machines_cpus() -> bool:
    """Whether the cluster is one of our own, on this machine, without a GPU."""
    return _is_own() and not ray.cluster_resources().get("GPU")


def _is_own() -> bool:
    """Whether the cluster was started by this process."""
    node = ray._private.worker.global_worker.node
    return bool(node and node.is_head())


def _check_reachable(address: str) -> None:
    """Ray retries for a minute and then ends the process: ask first."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at --address {address} ({error}): give HOST:6379 of its head, or leave it out"
        ) from error


def place(placement: Placement, alone: bool = True, tell: Callable[[str], None] = said) -> Resources:
    """What one run takes on this cluster: all the cores of a machine when alone, else one for each worker.

    Where an autoscaler has yet to make room for it, waits for that, and tells so.

    Raises:
        UserError: the cluster can't hold one such run.
    """
    have = most()
    gpus = _gpus(placement, have.get("GPU", 0))
    cpus = float(
        _share(placement, have, gpus, alone) if placement.cpus_per_worker == "auto" else placement.cpus_per_worker
    )
    resources = Resources(placement.workers, cpus, gpus, max(1, int(cpus)))
    for name, amount in resources.total.items():
        if amount > have.get(name, 0):
            raise UserError(
                f"a run with {placement.workers} worker(s) needs {amount:g} {name} (a CPU for each data pipeline "
                f"included), the cluster has {have.get(name, 0):g}: take fewer --workers, or less per worker"
            )
    if not _fits(resources) and not _made(resources, tell):
        raise UserError(
            f"no node has room for a worker with {cpus:g} CPU and {gpus:g} GPU, or not for all {placement.workers} at "
            "once: take fewer --workers, or less per worker"
        )
    if lacking := _lacking(resources):
        tell(f"others use the cluster: waiting for {lacking} to be free")
    runs = 1 if alone else at_once(placement, resources)
    # Not a sweep's trials: a second thread beside one that is starting waits for its core more than it computes
    shares = placement.cpus_per_worker == "auto" and not gpus and alone
    return dataclasses.replace(resources, decoding=_decoding(runs * resources.workers), shares_cores=shares)


def most() -> dict[str, float]:
    """What the cluster has, or what its autoscaler may make of it where that is more."""
    have, made = ray.cluster_resources(), collections.Counter[str]()
    for node in _nodes_to_be():
        made.update(node)
    return {name: max(have.get(name, 0), made[name]) for name in {*have, *made}}


def _nodes_to_be() -> list[dict[str, float]]:
    """What each node has that an autoscaler may make; none where there is no autoscaler that we know of.

    Some tell Ray of their nodes. That of `ray up` leaves a file on the head, where jobs run. KubeRay's does neither.
    """
    config = ray._private.state.state.get_cluster_config()
    kinds = (
        [(dict(group.resources), group.max_count) for group in config.node_group_configs] if config else _of_ray_up()
    )
    return [resources for resources, count in kinds for _ in range(ENDLESS if count < 0 else count)]


def _of_ray_up() -> list[tuple[dict[str, float], int]]:
    """The kinds of workers in the file of `ray up`: what a node has, and how many of them there may be."""
    file = RAY_UP.expanduser()
    if _is_own() or not file.exists():
        return []
    config = yaml.safe_load(file.read_text())
    workers = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    return [(kind.get("resources", {}), kind.get("max_workers", config.get("max_workers", 0))) for kind in workers]


def _gpus(placement: Placement, have: float) -> float:
    """GPUs of a worker. Where there are any, `auto` takes no CPU in their place: that would be slower by far."""
    if placement.gpus_per_worker != "auto":
        return float(placement.gpus_per_worker)
    if 0 < have < placement.workers:
        raise UserError(
            f"--workers {placement.workers} take a GPU each, the cluster has {have:g}: take fewer, or "
            "--gpus-per-worker 0 for the CPU"
        )
    return 1.0 if have else 0.0


def _made(resources: Resources, tell: Callable[[str], None]) -> bool:
    """Whether the cluster has an autoscaler that makes room for a run: asks for it, and waits.

    Raises:
        UserError: it could, but did not.
    """
    if not _room(_nodes_to_be(), resources):
        return False
    tell(f"waiting for the cluster's autoscaler to make room for {resources}")
    deadline = time.monotonic() + ROOM_S
    _request(resources, 1)
    try:
        while not _fits(resources):
            if time.monotonic() > deadline:
                raise UserError(
                    f"the cluster's autoscaler made no room for {resources} within {ROOM_S // 60} minutes: its log on "
                    "the head, monitor.log, says why; or take less"
                )
            time.sleep(1)
    finally:
        _request(resources, 0)
    return True


def _lacking(resources: Resources) -> str:
    """What a run would take that others hold, in words; Ray Train waits for it."""
    if _is_own():
        return ""
    free = ray.available_resources()
    amounts = {name: amount - free.get(name, 0) for name, amount in resources.total.items()}
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount > 0)


def _decoding(workers: int) -> int | None:
    """A cluster of our own declares more CPUs than it has cores, and each task at a time is a process of 400 MiB."""
    return max(1, TASKS_A_CORE * cores.available() // workers) if _is_own() else None


def _share(placement: Placement, have: dict[str, float], gpus: float, alone: bool) -> int:
    """CPUs of a worker when nobody said how many."""
    if gpus or not (alone or placement.concurrent != "auto"):
        return 1
    largest = max((node.get("CPU", 0) for node in (*_nodes(), *_nodes_to_be())), default=1)
    runs = placement.workers * (1 if alone or placement.concurrent == "auto" else placement.concurrent)
    at_hand = min(cores.available(), int(largest))
    return max(1, min(at_hand // runs, int(have.get("CPU", 0) // runs) - PIPELINE_CPUS))


def at_once(placement: Placement, resources: Resources) -> int:
    """How many such runs go at a time: as many as asked for, or as the cluster holds now."""
    fits = max(1, _fits(resources))
    return fits if placement.concurrent == "auto" else min(fits, placement.concurrent)


def _fits(resources: Resources) -> int:
    return _room(_nodes(), resources)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(nodes: Sequence[Mapping[str, float]], resources: Resources) -> int:
    """How many runs nodes hold: a worker takes its share of one node, a data pipeline's CPU may be anywhere."""
    worker = {"CPU": resources.cpus, "GPU": resources.gpus}
    workers = sum(min(int(node.get(k, 0) / v + 1e-9) for k, v in worker.items() if v) for node in nodes)
    cpus = sum(node.get("CPU", 0) for node in nodes)
    return min(workers // resources.workers, int(cpus / resources.total["CPU"] + 1e-9))


@contextlib.contextmanager
def asking(placement: Placement, resources: Resources) -> Iterator[Callable[[int], None]]:
    """What asks an autoscaler, where there is one, for room for the runs that are left, each time that it is called.

    It asks for as many of them at once as were asked for, or as the autoscaler may make; for none when the block ends.
    """
    most = _room(_nodes_to_be(), resources) if placement.concurrent == "auto" else placement.concurrent
    asked = 0

    def ask(left: int) -> None:
        nonlocal asked
        if (runs := min(most, left)) != asked:
            _request(resources, runs)
            asked = runs

    try:
        yield ask
    finally:
        ask(0)


def _request(resources: Resources, runs: int) -> None:
    """Ask the autoscaler for room for some runs, in place of what was asked for before."""
    bundle = {name: amount / resources.workers for name, amount in resources.total.items() if amount}
    request_resources(bundles=[bundle] * (runs * resources.workers))


T = TypeVar("T")


def through_losses(work: Callable[[], T], times: int = 3) -> T:
    """Do work that can be done anew, again where a node or a process of Ray's went away under it.

    Ray does so by itself for tasks, but not for the actors that Ray Data makes.
    """
    for _ in range(times - 1):
        try:
            return work()
        except RayError as error:
            # A task's error often holds what it came of as text alone
            if mendable(error) or not any(name in f"{type(error).__mro__} {error}" for name in LOST):
                raise
    return work()


def queue(run: str) -> None:
    """Put a run at the end of the queue of this job's runs, until it leaves."""
    leave(run)
    _internal_kv_put(f"{_queue()}{time.time_ns():020d}:{run}", "")


def is_turn_of(run: str, resources: Resources) -> bool:
    """Whether a queued run may train: the first ones may, as many as the cluster holds, as nodes come and go.

    More of them would be worse than slow. Their workers alone could fill a cluster that has lost a node, and would then
    wait for ever for images that no CPU is left to decode.
    """
    first = sorted(key.decode() for key in _internal_kv_list(_queue()))[: _fits(resources)]
    return any(key.endswith(f":{run}") for key in first)


def leave(run: str) -> None:
    """Take a run out of the queue, if it is in."""
    for key in _internal_kv_list(_queue()):
        if key.decode().endswith(f":{run}"):
            _internal_kv_del(key)


def _queue() -> str:
    return f"clipfh:queue:{ray.get_runtime_context().get_job_id()}:"


_HERE: dict[str, Callable[[], Any]] = {}
"""Runs whose controllers are threads of this process, and what cancels each."""


def control(run: str, controller: TrainController) -> Any:
    """Run a controller in this actor's process, where another would take seconds to load; returns its result.

    Raises:
        RuntimeError: `end` was called.
    """

    async def work() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task
        _HERE[run] = functools.partial(loop.call_soon_threadsafe, task.cancel)
        try:
            await controller.run()
        finally:
            del _HERE[run]
            if not controller.get_state().is_terminal() and (group := controller.get_worker_group()):
                group.abort()

    try:
        asyncio.run(work())
    except asyncio.CancelledError:
        raise RuntimeError(f"{run} was ended") from None
    return controller.get_result()


class Register(ControllerCallback):
    """Leave word of the actor that a run's controller is, or is a thread of, so that `end` finds it.

    It stands in for Ray Train's own cleaner: a detached process for each run, which needs a running dashboard.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def after_controller_start(self, train_run_context: Any) -> None:
        _put(self.run, ray.get_runtime_context().current_actor)


def end(run: str) -> None:
    """Free what a run still holds. The controller goes first: it would take the loss for a failure and start anew."""
    actor = _take(run)
    if cancel := _HERE.get(run):
        with contextlib.suppress(RuntimeError):  # it has just ended by itself
            cancel()
    elif actor is not None:
        if hasattr(actor, "end_run"):  # a trial's process, which has others to control after this
            actor.end_run.remote(run)
        else:
            ray.kill(actor)
        for group in _groups_of(actor._actor_id.binary()):
            ray.util.remove_placement_group(group)


def _groups_of(actor: bytes) -> list[PlacementGroup]:
    """The placement groups that an actor made, ready or still waited for. They outlive it."""
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    groups = [gcs_pb2.PlacementGroupTableData.FromString(row) for row in table]  # type: ignore[attr-defined]
    return [PlacementGroup(PlacementGroupID(g.placement_group_id)) for g in groups if g.creator_actor_id == actor]


def first_calling(function: str) -> dict[str, Any]:
    """A runtime environment whose processes call a function, given as "module.name", before all else; "" is none."""
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: function}}


def start_another() -> None:
    """Start a process like this worker's on its node, for an actor with the same runtime environment to come.

    Ray itself starts a process only when it is wanted, and an actor then waits for its imports. A process that no actor
    takes ends after KEPT_S seconds, or with the job.
    """
    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=common_pb2.Language.PYTHON,  # type: ignore[attr-defined]
        job_id=context.job_id.binary(),
        runtime_env_info={"serialized_runtime_env": context.get_runtime_env_string()},
        num_workers=1,
        keep_alive_duration_secs=KEPT_S,
    )
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        try:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=30)
        except grpc.RpcError as error:
            logging.getLogger(__name__).warning("no process was started beforehand: %s", error)


def _put(key: str, value: Any) -> None:
    _internal_kv_put(f"clipfh:{key}", ray.cloudpickle.dumps(value), overwrite=True)


def _take(key: str) -> Any:
    value = _internal_kv_get(f"clipfh:{key}")
    _internal_kv_del(f"clipfh:{key}")
    return None if value is None else pickle.loads(value)
