"""What one run takes, how many go at a time, and what an autoscaler is asked for."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml

from clipfh import UserError
from clipfh.cluster import connect, ray_private, resources
from clipfh.cluster.resources import Resources, resolve_placement
from clipfh.config import cores
from clipfh.config.experiment import Placement


def test_a_worker_that_no_node_holds_is_refused(ray_cluster, monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(UserError, match="no node has room for a worker with 6 CPU"):
        resolve_placement(Placement(cpus_per_worker=6.0))
    assert resolve_placement(Placement(cpus_per_worker=4.0)).cpus == 4


def test_runs_at_once_share_the_decoding_of_this_machine(ray_cluster, monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: 4)
    four = Placement(concurrent=4, cpus_per_worker=1.0)
    assert resolve_placement(four).decoding == 8, "alone"
    assert resolve_placement(four, alone=False).decoding == 2
    assert resolve_placement(Placement(workers=2, concurrent=2, cpus_per_worker=1.0), alone=False).decoding == 2
    monkeypatch.setattr(connect, "is_own", lambda: False)
    assert resolve_placement(four, alone=False).decoding is None, "where Ray's CPUs are cores"


@pytest.fixture
def nodes(monkeypatch):
    """Nodes of a cluster that is not there: what each has. An autoscaler may make those of `planned`."""
    monkeypatch.setattr(resources, "RAY_UP", Path("/none"))
    monkeypatch.setattr(connect, "is_own", lambda: False)
    alive, planned = [], []
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in alive])
    monkeypatch.setattr("ray.cluster_resources", lambda: dict(sum(map(Counter, alive), Counter())))
    monkeypatch.setattr("ray.available_resources", lambda: ray.cluster_resources())
    monkeypatch.setattr(ray_private, "autoscaler_nodes", lambda: planned)
    job, stored = SimpleNamespace(get_job_id=lambda: "01"), {}
    monkeypatch.setattr("ray.get_runtime_context", lambda: job)
    monkeypatch.setattr(ray_private, "write_key", stored.__setitem__)
    monkeypatch.setattr(ray_private, "read_key", stored.get)
    monkeypatch.setattr(ray_private, "keys", lambda prefix: sorted(stored))
    monkeypatch.setattr(ray_private, "running_jobs", lambda: {"01"})
    return SimpleNamespace(alive=alive, planned=planned, job=job)


def test_a_worker_takes_a_gpu_where_there_are_any(nodes):
    nodes.alive[:] = [{"CPU": 16.0, "GPU": 2.0}]
    assert str(resolve_placement(Placement(workers=2))) == "2 workers on 1 GPU each"
    with pytest.raises(UserError, match="4 workers take a GPU each, the cluster has 2: .*--gpus-per-worker 0"):
        resolve_placement(Placement(workers=4))
    assert resolve_placement(Placement(workers=4, gpus_per_worker=0.0)).gpus == 0
    nodes.alive[:] = [{"CPU": 16.0}]
    assert resolve_placement(Placement(workers=4)).gpus == 0


def test_a_cluster_that_others_use_is_waited_for_and_that_is_told(nodes, monkeypatch):
    nodes.alive[:], lines = [{"CPU": 16.0, "GPU": 2.0}], []
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 12.0, "GPU": 0.5})
    resolve_placement(Placement(workers=2), log=lines.append)
    assert lines == ["others use the cluster: waiting for 1.5 GPU to be free"]


GPU_NODE = {"CPU": 8.0, "GPU": 1.0}


def test_a_gpu_that_an_autoscaler_may_make_is_waited_for(nodes, monkeypatch):
    nodes.alive[:], nodes.planned[:] = [{"CPU": 4.0}], [(GPU_NODE, 4)]
    asked, lines = [], []

    def request(bundles):
        asked.append(bundles)
        nodes.alive.extend(GPU_NODE for _ in bundles)

    monkeypatch.setattr(resources, "request_resources", request)
    assert resolve_placement(Placement(workers=2), log=lines.append).gpus == 1
    assert asked == [[{"CPU": 2.0, "GPU": 1.0}] * 2, []], "asked for, and no longer than needed"
    assert lines == ["waiting for the cluster's autoscaler to make room for 2 workers on 1 GPU each"]
    with pytest.raises(UserError, match="8 workers take a GPU each, the cluster has 4"):
        resolve_placement(Placement(workers=8))


def test_an_autoscaler_that_makes_no_room_is_not_waited_for_without_end(nodes, monkeypatch):
    nodes.alive[:], nodes.planned[:] = [{"CPU": 4.0}], [(GPU_NODE, 4)]
    monkeypatch.setattr(resources, "request_resources", lambda bundles: None)
    monkeypatch.setattr(resources, "ROOM_S", 0)
    with pytest.raises(UserError, match="made no room for 1 worker on 1 GPU within 0 minutes"):
        resolve_placement(Placement(), log=lambda line: None)


def test_the_file_of_ray_up_tells_of_planned_nodes(nodes, monkeypatch, tmp_path):
    kinds = {"head": {"resources": {"CPU": 0}}, "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2}}
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump({"max_workers": 9, "head_node_type": "head", "available_node_types": kinds}))
    monkeypatch.setattr(resources, "RAY_UP", file)
    assert resources.capacity() == {"CPU": 16, "GPU": 2}
    monkeypatch.setattr(connect, "is_own", lambda: True)
    assert resources.capacity() == {}, "a cluster of our own on such a head is another one"


@pytest.mark.parametrize("concurrent,asked", [("auto", [4, 3, 1, 0]), (2, [2, 1, 0]), (8, [5, 4, 3, 1, 0])])
def test_an_autoscaler_is_asked_for_no_more_runs_than_are_left(nodes, monkeypatch, concurrent, asked):
    nodes.planned[:], seen = [(GPU_NODE, 4)], []
    monkeypatch.setattr(resources, "request_resources", lambda bundles: seen.append(len(bundles)))
    with resources.autoscaler_request(Placement(concurrent=concurrent), Resources(1, 1, 1, 1)) as ask:
        for left in (5, 4, 4, 3, 1):
            ask(left)
    assert seen == asked


def test_the_end_of_a_sweep_leaves_the_wishes_of_others_but_not_those_of_killed_ones(nodes, monkeypatch):
    nodes.planned[:], seen, jobs = [(GPU_NODE, 8)], [], {"01", "02"}
    monkeypatch.setattr(resources, "request_resources", lambda bundles: seen.append(len(bundles)))
    monkeypatch.setattr(ray_private, "running_jobs", lambda: jobs)
    for number in (1, 2):
        nodes.job.get_job_id = f"{number:02}".format
        resources._request(Resources(number, 1, 1, 1), 1)
    assert seen == [1, 3], "the second asks for both"
    resources._request(Resources(2, 1, 1, 1), 0)
    assert seen[-1] == 1, "its end leaves what the first wishes for"
    jobs.discard("01")
    resources._request(Resources(2, 1, 1, 1), 1)
    assert seen[-1] == 2, "the first was killed"


@pytest.mark.parametrize(
    "nodes,needs,runs",
    [
        ([{"CPU": 4}], Resources(1, 1, 0, 1), 2),
        ([{"CPU": 3}, {"CPU": 3}], Resources(1, 2, 0, 1), 2),
        ([{"CPU": 3}, {"CPU": 3}], Resources(1, 3, 0, 1), 1),
        ([{"CPU": 1, "GPU": 2}, {"CPU": 15}], Resources(1, 1, 1, 1), 1),
        ([{"CPU": 8, "GPU": 1}], Resources(1, 1, 0.5, 1), 2),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], Resources(4, 1, 1, 1), 2),
        ([{}], Resources(1, 1, 0, 1), 0),
    ],
)
def test_how_many_runs_nodes_hold(nodes, needs, runs):
    assert resources._room(nodes, needs) == runs
