"""Arrays to the device and values back from it, with nobody waiting: by pinned memory, and a batch ahead."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, on: torch.device) -> Tensor:
    """An array on the device: from pinned memory without waiting on a GPU, without a copy on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only pages of the object store, which we only read
        tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(on, non_blocking=True) if on.type == "cuda" else tensor


def images_to_device(array: np.ndarray, on: torch.device) -> Tensor:
    """The one way of images to the device: (B, H, W, 3) uint8 to (B, 3, H, W), channels last in memory."""
    return to_device(array, on).permute(0, 3, 1, 2)


def integers_to_device(arrays: Mapping[str, np.ndarray], on: torch.device) -> dict[str, Tensor]:
    """Arrays of whole numbers on the device, each as int64, in one transfer."""
    whole = np.concatenate([array.ravel() for array in arrays.values()]).astype(np.int64)
    parts = to_device(whole, on).split([math.prod(array.shape) for array in arrays.values()])
    return {name: part.view(arrays[name].shape) for name, part in zip(arrays, parts, strict=True)}


class PendingValue:
    """A number of the device, sent here at once and read later, when the device has long come so far."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.arrived = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read(self) -> float:
        """The number; waits for the device where it hasn't come so far."""
        if self.arrived:
            self.arrived.synchronize()
        return self.value.item()


Step = tuple[int, np.ndarray, np.ndarray]
"""Number, rows of the global batch, images of this worker's part of it (B, H, W, 3) uint8."""


def prefetch(steps: Iterator[Step], on: torch.device) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """The steps with their `images` on the device. A thread fetches and sends each while the one before is computed.

    On a GPU they are copied on a stream of their own, beside the work in hand. On the CPU the thread only fetches.
    """
    beside = torch.cuda.Stream(on) if on.type == "cuda" else None

    def fetch() -> tuple[int, np.ndarray, Tensor, torch.cuda.Event | None] | None:
        step = next(steps, None)
        if step is None:
            return None
        with torch.cuda.stream(beside) if beside else contextlib.nullcontext():  # of the device too, in this thread
            return *step[:2], images_to_device(step[2], on), beside.record_event() if beside else None

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(fetch)
        while found := coming.result():
            coming = thread.submit(fetch)
            number, rows, pixels, sent_off = found
            if sent_off:
                torch.cuda.current_stream(on).wait_event(sent_off)
                pixels.record_stream(torch.cuda.current_stream(on))  # not to be overwritten before that one has read it
            yield number, rows, pixels
