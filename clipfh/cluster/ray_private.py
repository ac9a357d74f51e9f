"""All that clipfh takes from Ray beyond its public API: the one module to look through when Ray's version moves.

`tests/cluster/test_ray_private.py` shows of each line below that the name is there and that Ray calls it.

What                         Names of Ray's, why the public way won't do, and what to try at the next release
---------------------------  ------------------------------------------------------------------------------------------
Head                         `node:__internal_head__`. A resource that every head has; a custom one would be missing on
                             a user's cluster. Next: a label of the head, once Tune takes label selectors.
Setup hook                   `WORKER_PROCESS_SETUP_HOOK_ENV_VAR`. `worker_process_setup_hook` is public, but `ray.init`
                             alone reads it: a job has one hook. Next: the public key on tasks and actors.
Environment                  `RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR`, `PL_DISABLE_FORK`. Train and Tune give them
                             to their processes; a process serves another's task only if its environment is the same.
Remarks                      `_private.worker.print_to_stdstream`, patched. `log_to_driver=False` silences workers, not
                             raylets. Next: whether `listen_error_messages` heeds that option.
Token                        `maybe_enable_token_auth_if_token_available`. `ray start` calls it, `ray.init(address)`
                             doesn't: a cluster that checks tokens is then "not there". Next: whether it does.
                             `/ray.rpc.NodeInfoGcsService/GetClusterId`, by which a cluster says that it checks them.
Autoscaler                   `_private.state.state.get_cluster_config`. `autoscaler.sdk` asks for nodes, but doesn't
                             say which could come. Next: `get_cluster_status` of `autoscaler.v2`.
Key-value store              `experimental.internal_kv`. A named actor would be a process more, and would lose its state
                             with its node; the head's store lives as long as the cluster. Next: a public store.
Jobs                         `_private.state.state.job_table`. `util.state.list_jobs` needs a dashboard. Next: whether
                             it still does.
Groups of an actor           `_private.state` accessor, `PlacementGroupTableData.creator_actor_id`. The public table has
                             neither creators nor names of Train's groups, and a dead actor leaves its groups behind
                             for as long as the job lives. Next: `placement_group_table` with the creator.
A call into an actor         `ActorHandle.__ray_call__`, documented in Ray's source alone. Tune makes a trial's class.
Process started beforehand   `PrestartWorkers` of `node_manager_pb2_grpc`, `_private.grpc_utils.init_grpc_channel`.
                             There is no public way. Next: `reuse` of Train's worker groups.
Statistics of Ray Data       `data._internal.stats.get_or_create_stats_actor`. The first pipeline starts that actor; in
                             a training worker the actor would load all that a worker loads. Next: a public switch.
Turns of Ray Data's loop     `ExecutionCallback`, by its methods, which `DataContext.custom_execution_callback_classes`
                             takes. While all tasks have outputs that wait for room, the loop waits for nothing. Next:
                             whether it does.
Train's controller           `TrainController`; `DataParallelTrainer._initialize_and_run_controller`, overridden. Train
                             starts an actor for each run, which loads for seconds; a trial's process has all loaded.
Train's trainer              `train.v2.api.data_parallel_trainer.DataParallelTrainer`: `train.torch` would load torch.
Train's callbacks            `_create_default_callbacks`, overridden; `DatasetsCallback` and
                             `PlacementGroupCleanerCallback`, left out. Each is a process for a run: one manages
                             datasets, of which runs here have none; the other frees groups as `release` does, but
                             needs a dashboard. Next: whether an option leaves them out.
Train's patience             `DefaultFailurePolicy.make_decision`, overridden; `FailureDecision`,
                             `WorkerGroupStartupTimeoutError`. `FailureConfig` counts all failures of a kind alike.
Train's list of checkpoints  The format of `checkpoint_manager_snapshot.json`, which `storage.run_folder` reads and
                             `train.in_process` writes: a run goes on here or over a cluster. Next: `Result.from_path`.

Other modules are imported where they are used: a process that only decodes loads no Ray Train.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipfh import UserError, fixable

SUPPORTED = (2, 60)
"""The release of Ray whose private parts these are."""

ASK_FOR_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A call that Ray's head answers at once, if the caller may make it."""

HEAD = "node:__internal_head__"
"""A resource that every Ray head has. Trials take a sliver of it: so they are on the head, and take no CPU."""

PRESTARTED_S = 3600
"""Seconds for which a process that was started beforehand waits for its actor."""

logger = logging.getLogger(__name__)


def show_token() -> bool:
    """Let this process show the user's token, if there is one, to the clusters that it joins; others don't look at it.

    Returns:
        Whether it does, or RAY_AUTH_MODE settles that already.
    """
    from ray._private.authentication import authentication_token_setup as setup

    before = setup.logger.level
    setup.logger.setLevel(logging.ERROR)  # what it says is for those who start a cluster
    try:
        return "RAY_AUTH_MODE" in os.environ or setup.maybe_enable_token_auth_if_token_available(False)
    finally:
        setup.logger.setLevel(before)


def checks_tokens(address: str) -> bool:
    """Whether the head at HOST:PORT answers only to those who show a token."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(ASK_FOR_ID)(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


def require_supported_version() -> None:
    """Refuse every minor version of Ray but the one whose private parts are used here.

    Raises:
        UserError: another version is installed.
    """
    major, minor = SUPPORTED
    if ray.__version__.split(".")[:2] != [str(major), str(minor)]:
        requirement = f"ray>={major}.{minor},<{major}.{minor + 1}"
        raise UserError(f'clipfh needs Ray {major}.{minor}, here is {ray.__version__}: pip install "{requirement}"')


# --- Processes -------------------------------------------------------------------------------------------------------


def setup_hook_env(function: str) -> dict[str, Any]:
    """A runtime environment in which each new worker process first calls `function` ("module.name").

    An empty string switches the hook off, also where the parent has one.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: function}}


def shared_env(train: dict[str, str]) -> dict[str, Any]:
    """The runtime environment of all processes except training workers.

    Ray uses a process again only where the environment is the same, and a process that decodes takes 400 MiB and
    seconds to start. So all of them get what Tune gives to trials and Train to controllers, and no setup hook.

    Args:
        train: environment variables for Ray Train.
    """
    from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR

    tune = {"PL_DISABLE_FORK": "1", RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"}
    return {"env_vars": {**train, **tune, **setup_hook_env("")["env_vars"]}}


def prestart_worker() -> None:
    """Start a process like this worker's on its node, for a later actor with the same runtime environment.

    Ray itself starts a process only when it is wanted, and an actor then waits for its imports. A process that no actor
    takes ends after PRESTARTED_S seconds, or with the job.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=common_pb2.Language.PYTHON,  # type: ignore[attr-defined]
        job_id=context.job_id.binary(),
        runtime_env_info={"serialized_runtime_env": context.get_runtime_env_string()},
        num_workers=1,
        keep_alive_duration_secs=PRESTARTED_S,
    )
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        try:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=30)
        except grpc.RpcError as error:
            logger.warning("no process was started beforehand: %s", error)


def start_data_statistics() -> None:
    """Start Ray Data's actor for statistics, which otherwise the first pipeline starts."""
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_stats_actor()


def let_loop_rest(context: Any) -> None:
    """Let the scheduling loops of Ray Data's pipelines with this `DataContext` rest while all outputs wait."""
    context.custom_execution_callback_classes = [LoopRest]


class LoopRest:
    """A callback of Ray Data's that lets its scheduling loop rest between turns which follow each other at once.

    Where the reader is slower than decoding, the outputs of all tasks wait for room in the object store, and the loop
    turns 800 times a second. In a training worker that took half of its time, and Python's lock. The rest grows with
    each such turn, and ends with one that waited for something:

        ms of a turn     0.5  0.5  0.5 ...  0.5   40  0.5
        ms of rest         1    2    3 ...   20    0    1
    """

    SHORT_S, STEP_S, LONGEST_S = 0.005, 0.001, 0.02

    def before_execution_starts(self, executor: Any) -> None:
        """Begin to count turns."""
        self.num_short, self.turn_began = 0, time.perf_counter()

    def on_execution_step(self, executor: Any) -> None:
        """Rest after a turn of the loop, if it was short."""
        is_short = time.perf_counter() - self.turn_began < self.SHORT_S
        self.num_short = self.num_short + 1 if is_short else 0
        time.sleep(min(self.num_short * self.STEP_S, self.LONGEST_S))
        self.turn_began = time.perf_counter()

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing is left."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing is left."""


# --- Cluster ---------------------------------------------------------------------------------------------------------


def log_remarks() -> None:
    """Send remarks of raylets to this module's log, at level debug, and not to the terminal."""
    assert hasattr(ray._private.worker, "print_to_stdstream")
    ray._private.worker.print_to_stdstream = _log_remark


def _log_remark(data: dict[str, Any], ignore_prefix: bool) -> None:
    logger.debug("Ray remarks: %s", " ".join(data["lines"]))


def autoscaler_nodes() -> list[tuple[dict[str, float], int]]:
    """The kinds of nodes that an autoscaler has told Ray of: a node's resources, and how many there may be, -1: any."""
    config = ray._private.state.state.get_cluster_config()
    return [(dict(group.resources), group.max_count) for group in config.node_group_configs] if config else []


def write_key(key: str, value: bytes = b"") -> None:
    """Write a key of the head's store, which all processes of the cluster see."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=True)


def take_key(key: str) -> bytes | None:
    """Remove a key from the head's store; returns its value, None where there is no such key."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

    value = _internal_kv_get(key)
    _internal_kv_del(key)
    return value


def read_key(key: str) -> bytes | None:
    """Value of a key of the head's store, None where there is no such key."""
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(key)
    return value


def keys(prefix: str) -> list[str]:
    """The keys of the head's store that begin with the prefix, sorted."""
    from ray.experimental.internal_kv import _internal_kv_list

    return sorted(key.decode() for key in _internal_kv_list(prefix))


def running_jobs() -> set[str]:
    """The ids of the cluster's jobs that are not over."""
    return {job["JobID"] for job in ray._private.state.state.job_table() if not job["IsDead"]}


def _remove_groups(actor_id: str) -> None:
    """Remove the placement groups that an actor made, also pending ones. They outlive the actor."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    for group in map(PlacementGroupTableData.FromString, table):
        if group.creator_actor_id.hex() == actor_id:
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


# --- Train's controllers ---------------------------------------------------------------------------------------------
#
# A run has a controller, which starts its workers and waits for their reports. Who runs it, and who frees what:
#
#   sweep's driver --Tune--> trial's process (an actor)     controller: a thread of it, run after run
#   train's driver --------> _Host (an actor)               controller: all that it does; it is killed after the run
#                                  '--> workers, in a placement group that the actor made
#
#   release(run) in the controller's process cancels the thread, which then shuts its workers down.
#   release(run) elsewhere finds the actor in the head's store, has it do the same (a _Host is killed), and removes the
#   actor's groups: also those of a process that was killed.


class Released(Exception):
    """A run was released, for now or for good, while its controller ran."""


@dataclass(frozen=True)
class _Controller:
    """Entry of the head's store that says which actor runs a run's controller."""

    actor: Any
    """handle of the actor that runs the controller"""
    actor_id: str
    is_host: bool
    """whether the actor does nothing but run this controller"""

    @staticmethod
    def key(run: str) -> str:
        """The key of a run, with this job's id: an entry of another job holds nothing, and can't be read here."""
        return f"clipfh:controller:{ray.get_runtime_context().get_job_id()}:{run}"


_CANCEL: dict[str, Callable[[], Any]] = {}
"""Each run whose controller is a thread of this process, to the function that cancels the controller."""


class _Host:
    """Actor that runs a driver's controller: Train doesn't allow for one in the driver itself."""

    def run(self, run: str, parts: dict[str, Any]) -> Any:
        return run_controller_here(run, parts, is_host=True)


def run_controller_here(run: str, parts: dict[str, Any], is_host: bool = False) -> Any:
    """Make a controller of Ray's arguments `parts`, and run it in this actor's process; returns its result.

    Raises:
        Released: `release` was called.
    """
    from ray.train.v2._internal.execution.controller import TrainController

    controller, context = TrainController(**parts), ray.get_runtime_context()
    entry = _Controller(context.current_actor, context.get_actor_id() or "", is_host)

    async def work() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task
        _CANCEL[run] = functools.partial(loop.call_soon_threadsafe, task.cancel)
        write_key(_Controller.key(run), ray.cloudpickle.dumps(entry))
        try:
            await controller.run()
        finally:
            del _CANCEL[run]
            if not controller.get_state().is_terminal() and (group := controller.get_worker_group()):
                group.abort()

    try:
        asyncio.run(work())
    except asyncio.CancelledError:
        raise Released(run) from None
    finally:
        take_key(_Controller.key(run))
        _remove_groups(entry.actor_id)
    return controller.get_result()


def release(run: str) -> None:
    """Free what a run holds, wherever its controller is. Does nothing where it holds nothing.

    The controller ends before its workers: it would take their loss for a failure, and start new ones.
    """
    if cancel := _CANCEL.get(run):
        with contextlib.suppress(RuntimeError):  # it has just ended by itself
            cancel()
    elif entry := take_key(_Controller.key(run)):
        controller: _Controller = pickle.loads(entry)
        if controller.is_host:
            ray.kill(controller.actor)
        else:
            controller.actor.__ray_call__.remote(_release_there, run)
        _remove_groups(controller.actor_id)


def _release_there(actor: Any, run: str) -> None:
    """Release a run in the process of the actor that runs its controller, if it still does."""
    if run in _CANCEL:
        release(run)


def make_trainer(run: str, loop: Callable[[dict], None], process_group: bool, **options: Any) -> Any:
    """Make a trainer of Ray Train's whose runs `release` can free. In an actor it starts no process but workers.

    Args:
        run: name of the run on this cluster.
        loop: what each worker runs.
        process_group: whether workers exchange tensors. With it the trainer is a TorchTrainer; without it, for one
            worker, it is TorchTrainer's base class, as a group of one is of no use and loads torch in this process.
        options: the trainer's other arguments.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    base: Any
    if process_group:
        from ray.train.torch import TorchTrainer as base
    else:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as base

    class Trainer(base):
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            parts["failure_policy"] = make_failure_policy(parts["failure_policy"].failure_config)
            return _run_controller(run, parts)

        def _create_default_callbacks(self) -> list[Any]:
            spared = DatasetsCallback, PlacementGroupCleanerCallback
            return [each for each in super()._create_default_callbacks() if not isinstance(each, spared)]

    return Trainer(loop, **options)


def _run_controller(run: str, parts: dict[str, Any]) -> Any:
    """Run a controller in this process where it is an actor, else in an actor beside it; returns its result."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:
        return run_controller_here(run, parts)
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    host: Any = ray.remote(num_cpus=0)(_Host).options(scheduling_strategy=here).remote()
    try:
        return ray.get(host.run.remote(run, parts))
    finally:
        release(run)  # what is left where the wait for it was interrupted
        ray.kill(host)


def make_failure_policy(config: Any) -> Any:
    """Make Ray Train's failure policy, with two changes.

    An error that the user must fix is not tried again, and a cluster that others use is waited for.
    """
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

    class Patience(DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> FailureDecision:
            if fixable(training_failed_error):
                return FailureDecision.RAISE
            if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                return FailureDecision.RETRY
            return super().make_decision(training_failed_error)

    return Patience(config)
