"""Runs share a cluster out, as nodes come and go."""

import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from ray.exceptions import ActorDiedError, RayTaskError

from clipfh import UserError, mendable
from clipfh.cluster import resources as cluster
from clipfh.config import cores
from clipfh.config.experiment import Placement

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
        cluster.place(Placement(cpus_per_worker=6.0))
    assert cluster.place(Placement(cpus_per_worker=4.0)).cpus == 4


def test_runs_at_once_share_the_decoding_of_this_machine(ray_cluster, monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: 4)
    four = Placement(concurrent=4, cpus_per_worker=1.0)
    assert cluster.place(four).decoding == 8, "alone"
    assert cluster.place(four, alone=False).decoding == 2
    assert cluster.place(Placement(workers=2, concurrent=2, cpus_per_worker=1.0), alone=False).decoding == 2
    monkeypatch.setattr(cluster, "_is_own", lambda: False)
    assert cluster.place(four, alone=False).decoding is None, "where Ray's CPUs are cores"


@pytest.fixture
def nodes(monkeypatch):
    """Nodes of a cluster that is not there: what each has. An autoscaler may make those of `to_be`."""
    monkeypatch.setattr(cluster, "RAY_UP", Path("/none"), raising=False)
    monkeypatch.setattr(cluster, "_is_own", lambda: False)
    alive, to_be = [], []
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in alive])
    monkeypatch.setattr("ray.cluster_resources", lambda: dict(sum(map(Counter, alive), Counter())))
    monkeypatch.setattr("ray.available_resources", lambda: ray.cluster_resources())
    config = SimpleNamespace(node_group_configs=to_be)
    monkeypatch.setattr("ray._private.state.state.get_cluster_config", lambda: config if to_be else None)
    return SimpleNamespace(alive=alive, to_be=to_be)


def test_a_worker_takes_a_gpu_where_there_are_any(nodes):
    nodes.alive[:] = [{"CPU": 16.0, "GPU": 2.0}]
    assert str(cluster.place(Placement(workers=2))) == "2 workers on 1 GPU each"
    with pytest.raises(UserError, match="--workers 4 take a GPU each, the cluster has 2: .*--gpus-per-worker 0"):
        cluster.place(Placement(workers=4))
    assert cluster.place(Placement(workers=4, gpus_per_worker=0.0)).gpus == 0
    nodes.alive[:] = [{"CPU": 16.0}]
    assert cluster.place(Placement(workers=4)).gpus == 0


def test_a_cluster_that_others_use_is_waited_for_and_that_is_told(nodes, monkeypatch):
    nodes.alive[:], told = [{"CPU": 16.0, "GPU": 2.0}], []
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 12.0, "GPU": 0.5})
    cluster.place(Placement(workers=2), tell=told.append)
    assert told == ["others use the cluster: waiting for 1.5 GPU to be free"]


GPU_NODES = SimpleNamespace(resources={"CPU": 8.0, "GPU": 1.0}, max_count=4)


def test_a_gpu_that_an_autoscaler_may_make_is_waited_for(nodes, monkeypatch):
    nodes.alive[:], nodes.to_be[:] = [{"CPU": 4.0}], [GPU_NODES]
    asked, told = [], []

    def request(bundles):
        asked.append(bundles)
        nodes.alive.extend(GPU_NODES.resources for _ in bundles)

    monkeypatch.setattr(cluster, "request_resources", request)
    assert cluster.place(Placement(workers=2), tell=told.append).gpus == 1
    assert asked == [[{"CPU": 2.0, "GPU": 1.0}] * 2, []], "asked for, and no longer than needed"
    assert told == ["waiting for the cluster's autoscaler to make room for 2 workers on 1 GPU each"]
    with pytest.raises(UserError, match="--workers 8 take a GPU each, the cluster has 4"):
        cluster.place(Placement(workers=8))


def test_an_autoscaler_that_makes_no_room_is_not_waited_for_without_end(nodes, monkeypatch):
    nodes.alive[:], nodes.to_be[:] = [{"CPU": 4.0}], [GPU_NODES]
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: None)
    monkeypatch.setattr(cluster, "ROOM_S", 0)
    with pytest.raises(UserError, match="made no room for 1 worker on 1 GPU within 0 minutes"):
        cluster.place(Placement(), tell=lambda line: None)


def test_the_file_of_ray_up_tells_of_nodes_to_be(nodes, monkeypatch, tmp_path):
    kinds = {"head": {"resources": {"CPU": 0}}, "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2}}
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump({"max_workers": 9, "head_node_type": "head", "available_node_types": kinds}))
    monkeypatch.setattr(cluster, "RAY_UP", file)
    assert cluster.most() == {"CPU": 16, "GPU": 2}
    monkeypatch.setattr(cluster, "_is_own", lambda: True)
    assert cluster.most() == {}, "a cluster of our own on such a head is another one"


@pytest.mark.parametrize("concurrent,asked", [("auto", [4, 3, 1, 0]), (2, [2, 1, 0]), (8, [5, 4, 3, 1, 0])])
def test_an_autoscaler_is_asked_for_no_more_runs_than_are_left(nodes, monkeypatch, concurrent, asked):
    nodes.to_be[:], seen = [GPU_NODES], []
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: seen.append(len(bundles)))
    with cluster.asking(Placement(concurrent=concurrent), cluster.Resources(1, 1, 1, 1)) as ask:
        for left in (5, 4, 4, 3, 1):
            ask(left)
    assert seen == asked


def test_an_address_of_rays_client_is_refused(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match="ray://head:10001 is that of Ray's client.*HOST:6379.*clipfh submit"):
        cluster.connect("ray://head:10001")


def test_what_the_user_must_mend_is_not_done_again():
    text = "Traceback ...\n  raise UserError(\nclipfh.UserError: the driver is too old: update it"
    died = ActorDiedError(RayTaskError("__init__", text, None))
    left = [died, died]

    def work() -> None:
        raise left.pop()

    with pytest.raises(ActorDiedError):
        cluster.through_losses(work)
    assert left == [died]
    assert mendable(died) == "the driver is too old: update it"


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
