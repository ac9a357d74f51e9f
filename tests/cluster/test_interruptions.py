"""Work that can be done anew is done anew where a node went away under it."""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from clipfh import fixable
from clipfh.cluster.interruptions import repeat_interrupted


def test_work_is_done_again_where_a_node_went_away_under_it():
    of_a_task = RayTaskError("f", "Traceback: ray.exceptions.ActorDiedError: the node was preempted", None)
    left = [ActorDiedError(), of_a_task]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert repeat_interrupted(work) == "done"
    left += [ActorDiedError()] * 3
    with pytest.raises(ActorDiedError):
        repeat_interrupted(work)
    left[:] = [RayTaskError("f", "Traceback: ValueError: a bug", None)]
    with pytest.raises(RayTaskError):
        repeat_interrupted(work)


def test_what_the_user_must_mend_is_not_done_again():
    text = "Traceback ...\n  raise UserError(\nclipfh.UserError: the driver is too old: update it"
    died = ActorDiedError(RayTaskError("__init__", text, None))
    left = [died, died]

    def work() -> None:
        raise left.pop()

    with pytest.raises(ActorDiedError):
        repeat_interrupted(work)
    assert left == [died]
    assert fixable(died) == "the driver is too old: update it"
