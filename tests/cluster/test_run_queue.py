"""As many runs train as the cluster holds, as nodes come and go."""

import pytest

from clipfh.cluster.resources import Resources
from clipfh.cluster.run_queue import RunQueue

TWO_CPUS = Resources(workers=1, cpus=1, gpus=0, threads=1)


@pytest.fixture
def queue(ray_cluster):
    queue = RunQueue()
    for run in "abc":
        queue.join(run)
    yield queue
    for run in "abc":
        queue.leave(run)


def turns(queue: RunQueue) -> str:
    return "".join(run for run in "abc" if queue.is_turn_of(run, TWO_CPUS))


def test_the_first_in_the_queue_train_as_many_as_the_cluster_holds(queue, monkeypatch):
    have = {"CPU": 5.0}
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": have}])
    assert turns(queue) == "ab"
    queue.leave("a")
    assert turns(queue) == "bc" and [queue.holds(run) for run in "abc"] == [False, True, True]
    have["CPU"] = 2.0
    assert turns(queue) == "b"
    queue.join("b")  # it starts again: behind the others
    assert turns(queue) == "c"
    have["CPU"] = 1.0
    assert turns(queue) == ""
