"""A run in a thread of this process: it waits for its turn, trains, gives way, goes on. It starts no Ray."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from clipfh import UserError
from clipfh.cluster import ray_private
from clipfh.cluster.ray_private import Released
from clipfh.cluster.resources import Resources
from clipfh.cluster.run_queue import RunQueue


class State(enum.Enum):
    """Where a run stands. The thread alone changes it.

    QUEUED --its turn--> TRAINING --the end of its budget--> FINISHED
      ^                   | |  '----an error---------------> FAILED    a UserError, or no checkpoint since its start
      '---interruption----' '-------no room any more-------> GAVE_WAY --its turn--> TRAINING
    QUEUED, TRAINING, GAVE_WAY ------out of the queue------> RELEASED
    """

    QUEUED = "waits for its turn"
    TRAINING = "trains"
    GAVE_WAY = "waits for the cluster to have room for it again"
    FINISHED = "has trained to its end"
    FAILED = "failed"
    RELEASED = "was told to end"


WAITING = State.QUEUED, State.GAVE_WAY


class RunThread:
    """Trains one run, as often as it is interrupted, whenever the cluster has room for it.

    Args:
        run: name of the run on this cluster.
        needs: resources that the run takes.
        queue: the queue of the job's runs.
        train: trains the run, or goes on with it, and returns at its end; stopped by `free`, it raises Released.
        latest_step: returns the step of the run's latest checkpoint, 0 without one.
        free: frees what the run holds; any thread may call it.
    """

    POLL_S = 1.0
    """Seconds between two looks at the queue."""

    def __init__(
        self,
        run: str,
        needs: Resources,
        queue: RunQueue,
        train: Callable[[], None],
        latest_step: Callable[[], int],
        free: Callable[[str], None] = ray_private.release,
    ) -> None:
        self.run, self.needs, self.queue, self.train, self.latest_step = run, needs, queue, train, latest_step
        self.free = free
        self.state = State.QUEUED
        self.error: Exception | None = None
        """why the run failed"""
        self._interruptions: list[str] = []
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=run, daemon=True)

    def start(self) -> None:
        """Free what an attempt that was killed may have left, and begin."""
        self.free(self.run)
        self.queue.join(self.run)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the run may still train."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the run to be over, but no longer than some seconds."""
        self._thread.join(seconds)

    def take_interruptions(self) -> list[str]:
        """Return a line, for a person, for each interruption since the last call."""
        lines, self._interruptions = self._interruptions, []
        return lines

    def give_way(self) -> None:
        """Stop training, for now, where the cluster no longer has room for this run."""
        if self.state is State.TRAINING and not self.queue.is_turn_of(self.run, self.needs):
            self.free(self.run)

    def release(self) -> None:
        """Tell the run to end. Returns at once; what it holds is free within seconds."""
        self._released.set()
        self.queue.leave(self.run)
        self.free(self.run)

    def join(self) -> None:
        """Wait for a run that was told to end."""
        while self.is_alive():
            self.free(self.run)  # again: it may just have been about to start
            self.wait(self.POLL_S)

    def _follow(self) -> None:
        try:
            while self.state in WAITING:
                self.state = self._attempt() if self._is_its_turn() else self._wait_for_turn()
        except Exception as error:
            self.error, self.state = error, State.FAILED

    def _wait_for_turn(self) -> State:
        self._released.wait(self.POLL_S)
        return self.state if self.queue.holds(self.run) else State.RELEASED

    def _is_its_turn(self) -> bool:
        return not self._released.is_set() and self.queue.is_turn_of(self.run, self.needs)

    def _attempt(self) -> State:
        """Train, and say where the run stands then."""
        before, self.state = self.latest_step(), State.TRAINING
        try:
            self.train()
        except UserError:
            raise
        except Exception as error:
            return self._after_error(error, before)
        return State.FINISHED

    def _after_error(self, error: Exception, before: int) -> State:
        """Say where the run stands after an error. It was started from the checkpoint of step `before`.

        An interruption counts as a failure, of which there may be few, only where no checkpoint was made since the
        interruption before it: spot machines are lost as often as it happens.
        """
        if isinstance(error, Released) or not self.queue.is_turn_of(self.run, self.needs):
            return State.GAVE_WAY
        step = self.latest_step()
        if step <= before:
            raise error
        self._interruptions.append(f"workers were lost, goes on from step {step}: {last_line(str(error))}")
        return State.QUEUED


def last_line(text: str) -> str:
    """The last line that isn't empty, for a person."""
    return next((line[:300] for line in reversed(text.splitlines()) if line.strip()), "unknown")
