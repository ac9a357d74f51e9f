"""One run in a thread: its states, without Ray and without training."""

import queue
import threading

import pytest

from clipfh import UserError
from clipfh.cluster.ray_private import Released
from clipfh.cluster.resources import Resources
from clipfh.sweep.run_thread import RunThread, State


class Queue:
    """A queue of one run, whose turn the test decides on."""

    def __init__(self) -> None:
        self.members, self.has_room = set[str](), True

    def join(self, run):
        self.members.add(run)

    def leave(self, run):
        self.members.discard(run)

    def holds(self, run):
        return run in self.members

    def is_turn_of(self, run, needs):
        return self.has_room and run in self.members


class Bench:
    """A run whose training goes as the test says: each start takes its end from `ends`, and tells of itself."""

    def __init__(self) -> None:
        self.queue, self.step, self.freed = Queue(), 0, []
        self.ends, self.starts = queue.Queue(), queue.Queue()
        self.thread = RunThread("a", Resources(1, 1, 0, 1), self.queue, self.train, lambda: self.step, self.free)
        self.thread.POLL_S = 0.01

    def train(self) -> None:
        self.starts.put("start")
        end = self.ends.get(timeout=30)
        if isinstance(end, Exception):
            raise end

    def free(self, run: str) -> None:
        self.freed.append(run)
        if self.thread.state is State.TRAINING:
            self.ends.put(Released(run))

    def end(self) -> State:
        self.thread.wait(30)
        assert not self.thread.is_alive()
        return self.thread.state

    def await_state(self, state: State) -> None:
        deadline = threading.Event()
        while self.thread.state is not state:
            assert not deadline.wait(0.001) and self.thread.is_alive()


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.thread.release()
    bench.thread.join()


def test_a_run_waits_for_its_turn_and_trains_to_its_end(bench):
    bench.queue.has_room = False
    bench.thread.start()
    assert bench.freed == ["a"], "what an attempt that was killed has left"
    assert bench.thread.state is State.QUEUED and bench.starts.empty()
    bench.queue.has_room = True
    bench.starts.get(timeout=30)
    assert bench.thread.state is State.TRAINING
    bench.ends.put("end")
    assert bench.end() is State.FINISHED and bench.thread.error is None


def test_a_run_gives_way_and_goes_on_when_there_is_room_again(bench):
    bench.thread.start()
    bench.starts.get(timeout=30)
    bench.thread.give_way()
    assert bench.freed == ["a"], "there is room for it"
    bench.queue.has_room = False
    bench.thread.give_way()
    bench.await_state(State.GAVE_WAY)
    bench.queue.has_room = True
    bench.starts.get(timeout=30)
    bench.ends.put("end")
    assert bench.end() is State.FINISHED
    assert bench.thread.take_interruptions() == [], "to give way is no interruption"


def test_a_run_that_gave_way_is_no_failure_where_there_is_room_again_at_once(bench):
    bench.thread.start()
    bench.starts.get(timeout=30)
    bench.ends.put(Released("a"))  # no checkpoint since the start, and it is its turn
    bench.starts.get(timeout=30)
    bench.ends.put("end")
    assert bench.end() is State.FINISHED


def test_an_interruption_after_a_checkpoint_is_told_and_the_run_goes_on(bench):
    bench.thread.start()
    for step in (16, 32, 48):
        bench.starts.get(timeout=30)
        bench.step = step
        bench.ends.put(RuntimeError("Traceback ...\nthe node was preempted\n"))
    bench.starts.get(timeout=30)
    bench.ends.put("end")
    assert bench.end() is State.FINISHED
    assert bench.thread.take_interruptions() == [
        f"workers were lost, goes on from step {step}: the node was preempted" for step in (16, 32, 48)
    ]


def test_an_interruption_without_a_checkpoint_since_the_one_before_is_a_failure(bench):
    bench.thread.start()
    bench.starts.get(timeout=30)
    bench.step = 16
    bench.ends.put(RuntimeError("the first"))
    bench.starts.get(timeout=30)
    bench.ends.put(RuntimeError("the second"))
    assert bench.end() is State.FAILED and str(bench.thread.error) == "the second"


def test_workers_lost_with_a_node_that_the_run_needs_are_no_failure(bench):
    bench.thread.start()
    bench.starts.get(timeout=30)
    bench.queue.has_room = False
    bench.ends.put(RuntimeError("the node was preempted"))
    bench.await_state(State.GAVE_WAY)
    assert bench.thread.take_interruptions() == []


def test_what_the_user_must_mend_is_a_failure_at_once(bench):
    bench.thread.start()
    bench.starts.get(timeout=30)
    bench.step = 16
    bench.ends.put(UserError("the GPU's memory is too small"))
    assert bench.end() is State.FAILED and isinstance(bench.thread.error, UserError)


@pytest.mark.parametrize("state", [State.QUEUED, State.TRAINING, State.GAVE_WAY])
def test_a_run_that_is_released_ends_in_whatever_state_it_is(bench, state):
    bench.queue.has_room = state is not State.QUEUED
    bench.thread.start()
    if bench.queue.has_room:
        bench.starts.get(timeout=30)
    bench.queue.has_room = state is State.TRAINING
    if state is State.GAVE_WAY:
        bench.thread.give_way()
    bench.await_state(state)
    bench.thread.release()
    bench.thread.join()
    assert bench.end() is State.RELEASED and bench.thread.error is None


def test_a_run_that_another_process_takes_out_of_the_queue_trains_no_further(bench):
    bench.thread.start()
    bench.starts.get(timeout=30)
    bench.queue.leave("a")
    bench.ends.put(Released("a"))
    assert bench.end() is State.RELEASED
