"""What is taken from Ray beyond its public API is there, and Ray calls it: a new name there fails a test here."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.train
from ray.core.generated import autoscaler_pb2
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.tune.execution.class_cache import DEFAULT_ENV_VARS
from ray.util.placement_group import placement_group_table

from clipfh import UserError, fixable
from clipfh.cluster import ray_private
from clipfh.cluster.ray_private import Released

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers don't have this module


def until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def actors() -> list[str]:
    """Classes of the actors that live."""
    return [each["ActorClassName"] for each in ray._private.state.actors().values() if each["State"] != "DEAD"]


def groups() -> int:
    """How many placement groups there are."""
    return sum(each["state"] != "REMOVED" for each in placement_group_table().values())


# --- Processes -------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
def is_tracing() -> bool:
    import tracemalloc

    return tracemalloc.is_tracing()


@ray.remote(num_cpus=0, runtime_env=ray_private.setup_hook_env("tracemalloc.start"))
def are_tracing() -> tuple[bool, bool, bool]:
    """Whether a process with the hook traces, one that it starts, and one for which it is switched off."""
    import tracemalloc

    without = is_tracing.options(runtime_env=ray_private.setup_hook_env(""))
    return tracemalloc.is_tracing(), *ray.get([is_tracing.remote(), without.remote()])


def test_a_setup_hook_runs_in_new_processes_until_it_is_switched_off(ray_cluster):
    assert ray.get(are_tracing.remote()) == (True, True, False)


def test_all_processes_have_the_environment_that_tune_and_train_give(ray_cluster):
    given = ray.get_runtime_context().runtime_env["env_vars"]
    assert DEFAULT_ENV_VARS.items() <= given.items() and given["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"


def test_the_head_has_the_resource_that_keeps_trials_on_it(ray_cluster):
    assert ray.cluster_resources()[ray_private.HEAD] == 1.0


@ray.remote(num_cpus=0)
class Process:
    def worker(self) -> str:
        return ray.get_runtime_context().get_worker_id()

    def prestart(self) -> None:
        ray_private.prestart_worker()


def test_a_process_that_was_started_beforehand_is_the_next_actors(ray_cluster):
    ours = Process.options(runtime_env=ray_private.setup_hook_env("gc.collect"))
    first = ours.remote()
    ray.get(first.worker.remote())
    before = set(ray._private.state.workers())
    ray.get(first.prestart.remote())
    # Ready for an actor, that is: one that is asked for earlier starts a process of its own, and the first ready is its
    until(lambda: set(ray._private.state.workers()) - before)
    second = ours.remote()
    assert ray.get(second.worker.remote()) in set(ray._private.state.workers()) - before


def test_ray_data_uses_the_actor_for_statistics_that_was_started(ray_cluster):
    ray_private.start_data_statistics()
    assert actors().count("_StatsActor") == 1
    ray.data.range(1).materialize()
    assert actors().count("_StatsActor") == 1


def test_ray_datas_loop_rests_while_all_outputs_wait_for_a_reader(ray_cluster):
    turns = []

    class Counting(ray_private.LoopRest):
        def on_execution_step(self, executor):
            turns.append(executor)
            super().on_execution_step(executor)

    def make_image(row):
        return {"image": np.zeros(1 << 20, np.uint8)}

    def turns_in_a_second():
        before = len(turns)
        time.sleep(1)
        return len(turns) - before

    rows = ray.data.range(200, override_num_blocks=2).map(make_image)
    rows.context.custom_execution_callback_classes = [Counting]
    rows.context.override_object_store_memory_limit_fraction = 0.001
    rows.context.target_max_block_size = 1 << 20
    batches = iter(rows.iter_batches(batch_size=1, prefetch_batches=1))
    next(batches)
    until(lambda: 0 < turns_in_a_second() < 100)  # two thousand without a rest
    assert sum(1 for _ in batches) == 199


# --- Cluster ---------------------------------------------------------------------------------------------------------


def test_what_raylets_remark_on_is_logged_and_not_printed(ray_cluster, capfd):
    remarks, is_logged = [], threading.Event()

    class Handler(logging.Handler):
        def emit(self, record):
            remarks.append(record.getMessage())
            is_logged.set()

    handler = Handler()
    ray_private.logger.addHandler(handler)
    ray_private.logger.setLevel(logging.DEBUG)
    try:
        worker = ray._private.worker.global_worker
        ray._private.utils.publish_error_to_driver("test", "the disk is almost full", worker.gcs_client)
        assert is_logged.wait(30)
    finally:
        ray_private.logger.removeHandler(handler)
        ray_private.logger.setLevel(logging.NOTSET)
    assert remarks == ["Ray remarks: the disk is almost full"]
    assert "almost full" not in "".join(capfd.readouterr())


def test_an_autoscaler_tells_of_the_nodes_that_it_may_make(ray_cluster):
    def report(*groups: autoscaler_pb2.NodeGroupConfig) -> None:
        config = autoscaler_pb2.ClusterConfig(node_group_configs=groups)
        ray._private.worker.global_worker.gcs_client.report_cluster_config(config.SerializeToString())

    report(autoscaler_pb2.NodeGroupConfig(resources={"CPU": 8, "GPU": 1}, max_count=4))
    try:
        assert ray_private.autoscaler_nodes() == [({"CPU": 8, "GPU": 1}, 4)]
    finally:
        report()
    assert ray_private.autoscaler_nodes() == []


def test_a_cluster_tells_which_jobs_run(ray_cluster):
    assert ray.get_runtime_context().get_job_id() in ray_private.running_jobs()


def test_the_heads_store_keeps_keys_in_order_until_they_are_taken(ray_cluster):
    for key in ("b", "a"):
        ray_private.write_key(f"test:{key}", key.encode())
    assert ray_private.keys("test:") == ["test:a", "test:b"]
    assert [ray_private.read_key(f"test:{key}") for key in ("a", "b", "c")] == [b"a", b"b", None]
    assert [ray_private.take_key(f"test:{key}") for key in ("a", "b", "a")] == [b"a", b"b", None]
    assert ray_private.keys("test:") == []


# --- Train's controllers ---------------------------------------------------------------------------------------------


def train(run: str, loop: Callable[[dict], None], out: Path, workers: int = 1) -> None:
    """A run without a model."""
    trainer = ray_private.make_trainer(
        run,
        loop,
        process_group=workers > 1,
        train_loop_config={"out": str(out)},
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(
            name="checkpoints", storage_path=str(out), failure_config=FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()


@ray.remote(num_cpus=0, max_concurrency=2)
class Trial:
    """An actor that has runs to train, and can be called meanwhile."""

    def train(self, *job) -> None:
        train(*job)


def in_an_actor(*job) -> None:
    ray.get(Trial.remote().train.remote(*job))


def wait_for_ever(config: dict) -> None:
    (Path(config["out"]) / "trains").touch()
    threading.Event().wait()


def fail(config: dict) -> None:
    with (Path(config["out"]) / "starts").open("a") as file:
        file.write("once ")
    raise UserError("the driver is too old: update it")


@pytest.mark.parametrize("start", [train, in_an_actor])
def test_a_run_takes_no_processes_but_its_workers_and_all_are_free_when_it_is_released(ray_cluster, tmp_path, start):
    others, errors = actors(), []

    def work() -> None:
        try:
            start("test", wait_for_ever, tmp_path)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    until((tmp_path / "trains").exists)
    ours = actors()
    for each in others:
        ours.remove(each)
    assert sorted(ours) == sorted(["RayTrainWorker", "SynchronizationActor", "_Host" if start is train else "Trial"])
    assert groups() == 1
    ray_private.release("test")
    until(lambda: groups() == 0, 10)
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1
    assert isinstance(errors[0], ActorDiedError if start is train else RayTaskError)
    assert start is train or isinstance(errors[0].cause, Released)
    until(lambda: sorted(actors()) == sorted(others), 10)
    assert ray_private.keys(ray_private._Controller.key("")) == []


def test_what_a_killed_process_held_is_free_when_its_run_is_released(ray_cluster, tmp_path):
    trial = Trial.remote()
    training = trial.train.remote("test", wait_for_ever, tmp_path)
    until((tmp_path / "trains").exists)
    ray.kill(trial)
    with pytest.raises(ActorDiedError):
        ray.get(training)
    assert groups() == 1, "an actor's groups outlive it"
    ray_private.release("test")
    until(lambda: groups() == 0, 10)


LEAVES_A_CONTROLLER = """
import sys, ray
from clipfh.cluster import ray_private
ray.init(sys.argv[1], log_to_driver=False)
actor = ray.remote(num_cpus=0)(ray_private._Host).remote()
entry = ray_private._Controller(actor, actor._actor_id.hex(), True)
ray_private.write_key(ray_private._Controller.key("test"), ray.cloudpickle.dumps(entry))
"""


def test_what_another_job_left_keeps_no_run_from_its_start(ray_cluster):
    """A sweep that goes on after a kill releases its runs first, and can't read the handles of the job before."""
    words = [sys.executable, "-c", LEAVES_A_CONTROLLER, ray.get_runtime_context().gcs_address]
    subprocess.run(words, check=True)
    ray_private.release("test")


def test_what_the_user_must_mend_ends_a_run_at_once_and_leaves_nothing(ray_cluster, tmp_path):
    with pytest.raises(ray.train.TrainingFailedError) as caught:
        train("test", fail, tmp_path)
    assert fixable(caught.value) == "the driver is too old: update it"
    assert (tmp_path / "starts").read_text() == "once "
    until(lambda: groups() == 0, 10)
    assert ray_private.keys(ray_private._Controller.key("")) == []


@pytest.mark.parametrize(
    "error,decisions",
    [
        (ControllerError(WorkerGroupStartupTimeoutError(1)), ["RETRY"] * 4),  # others use the cluster: it waits
        (ControllerError(WorkerGroupStartupFailedError()), ["RETRY", "RAISE"]),
        (WorkerGroupError("", {0: RuntimeError("a bug")}), ["RETRY", "RAISE"]),
        (WorkerGroupError("", {0: RuntimeError(), 1: UserError("no memory")}), ["RAISE"]),
    ],
)
def test_what_is_tried_again(error, decisions):
    policy = ray_private.make_failure_policy(FailureConfig(max_failures=1, controller_failure_limit=1))
    assert [policy.make_decision(error).value for _ in decisions] == decisions


def test_workers_that_exchange_tensors_are_trained_by_rays_torch_trainer():
    from ray.train.torch import TorchTrainer

    trainers = [ray_private.make_trainer("test", fail, process_group=group) for group in (True, False)]
    assert [isinstance(each, TorchTrainer) for each in trainers] == [True, False]
    assert all(isinstance(each, TorchTrainer.__mro__[1]) for each in trainers)
