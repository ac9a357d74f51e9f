"""Arrays to a device: by pinned memory, without waiting, whole, one batch ahead."""

import contextlib
import threading

import numpy as np
import pytest
import torch

from clipfh.model.transfer import images_to_device, integers_to_device, prefetch

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def asked(monkeypatch) -> list:
    """What was asked of tensors, in order."""
    found = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: found.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, on, non_blocking=False: found.append(non_blocking) or self)
    return found


@pytest.mark.parametrize("on,expected", [(GPU, ["pinned", True]), (CPU, [])])
def test_arrays_go_to_a_gpu_by_pinned_memory(asked, on, expected):
    images_to_device(np.zeros((1, 2, 2, 3), np.uint8), on)
    assert asked == expected
    integers_to_device({"a": np.arange(3), "b": np.arange(4)}, on)
    assert asked == 2 * expected, "both in one"


def test_whole_numbers_arrive_together_as_they_were():
    arrays = {"some": np.arange(6, dtype=np.int32).reshape(2, 3), "none": np.zeros(0, np.int64), "one": np.array([-1])}
    found = integers_to_device(arrays, CPU)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == torch.int64 and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name].numpy(), array)


def steps(asked: list[threading.Event], end: Exception | None = None):
    """Three steps; tells which one is asked for."""
    for number, event in enumerate(asked):
        event.set()
        yield number, np.arange(number), np.full((1, 2, 2, 3), number, np.uint8)
    if end:
        raise end


def test_on_the_cpu_a_batch_is_fetched_when_it_is_asked_for():
    asked = [threading.Event() for _ in range(3)]
    for number, rows, pixels in prefetch(steps(asked), CPU):
        assert len(rows) == number and pixels.shape == (1, 3, 2, 2) and (pixels == number).all()
        assert [event.is_set() for event in asked] == [place <= number for place in range(3)]
    assert number == 2


def test_for_a_gpu_a_batch_is_fetched_while_the_one_before_is_computed(streams):
    asked = [threading.Event() for _ in range(3)]
    for number, rows, pixels in prefetch(steps(asked), GPU):
        assert len(rows) == number and pixels.shape == (1, 3, 2, 2) and (pixels == number).all()
        assert all(event.wait(10) for event in asked[: number + 2]), "already asked for"
    assert number == 2


@pytest.mark.parametrize("on", [CPU, GPU])
def test_what_goes_wrong_with_a_batch_is_raised_where_it_is_taken(on, streams):
    found = prefetch(steps([threading.Event()], OSError("no such photo")), on)
    next(found)
    with pytest.raises(OSError, match="no such photo"):
        next(found)


@pytest.fixture
def streams(asked, monkeypatch):
    """Streams of CUDA that note what is asked of them."""

    class Stream:
        def __init__(self, on):
            pass

        def record_event(self):
            return asked.append("sent") or "event"

        def wait_event(self, event):
            asked.append(f"wait for {event}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: asked.append("kept"))
    return asked


def test_a_gpu_computes_on_images_that_have_come_and_stay(streams):
    assert len(list(prefetch(steps([threading.Event()]), GPU))) == 1
    assert streams == ["pinned", True, "sent", "wait for event", "kept"]
