"""Runs share a cluster out, as nodes come and go."""

import time

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from clipfh import UserError, cluster, config, cores

TWO_CPUS = cluster.Resources(workers=1, cpus=1, gpus=0, threads=1)


@pytest.fixture
def queue(ray_cluster):
    for run in "abc":
        cluster.queue(run)
    yield
    for run in "abc":
        cluster.leave(run)


def turns() -> str:
    return "".join(run for run in "abc" if cluster.is_turn_of(run, TWO_CPUS))


def test_the_first_in_the_queue_train_as_many_as_the_cluster_holds(queue, monkeypatch):
    have = {"CPU": 5.0}
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": have}])
    assert turns() == "ab"
    cluster.leave("a")
    assert turns() == "bc"
    have["CPU"] = 2.0
    assert turns() == "b"
    cluster.queue("b")  # it starts again: behind the others
    assert turns() == "c"
    have["CPU"] = 1.0
    assert turns() == ""


def test_work_is_done_again_where_a_node_went_away_under_it():
    of_a_task = RayTaskError("f", "Traceback: ray.exceptions.ActorDiedError: the node was preempted", None)
    left = [ActorDiedError(), of_a_task]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert cluster.through_losses(work) == "done"
    left += [ActorDiedError()] * 3
    with pytest.raises(ActorDiedError):
        cluster.through_losses(work)
    left[:] = [RayTaskError("f", "Traceback: ValueError: a bug", None)]
    with pytest.raises(RayTaskError):
        cluster.through_losses(work)


def test_a_worker_that_no_node_holds_is_refused(ray_cluster, monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(UserError, match="no node has room for a worker with 6 CPU"):
        cluster.place(config.Placement(cpus_per_worker=6.0))
    assert cluster.place(config.Placement(cpus_per_worker=4.0)).cpus == 4


def test_runs_at_once_share_the_decoding_of_this_machine(ray_cluster, monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: 4)
    four = config.Placement(concurrent=4, cpus_per_worker=1.0)
    assert cluster.place(four).decoding == 8, "alone"
    assert cluster.place(four, alone=False).decoding == 2
    assert cluster.place(config.Placement(workers=2, concurrent=2, cpus_per_worker=1.0), alone=False).decoding == 2
    monkeypatch.setattr(cluster, "_is_own", lambda: False)
    assert cluster.place(four, alone=False).decoding is None, "where Ray's CPUs are cores"


@ray.remote(num_cpus=0)
class Process:
    def worker(self) -> str:
        return ray.get_runtime_context().get_worker_id()

    def start_another(self) -> None:
        cluster.start_another()


def test_a_process_that_was_started_beforehand_is_the_next_actors(ray_cluster):
    ours = Process.options(runtime_env=cluster.first_calling("gc.collect"))
    first = ours.remote()
    ray.get(first.worker.remote())
    before = set(ray._private.state.workers())
    ray.get(first.start_another.remote())
    deadline = time.monotonic() + 60
    # Ready for an actor, that is: one that is asked for earlier starts a process of its own, and the first ready is its
    while not (new := set(ray._private.state.workers()) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    second = ours.remote()
    assert ray.get(second.worker.remote()) in new
