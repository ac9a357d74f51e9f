"""Arrays to the device and values back from it without waiting: by pinned memory, and one batch ahead."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, on: torch.device) -> Tensor:
    """Send an array to the device: to a GPU from pinned memory without waiting, to the CPU without a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the object store's pages are read-only, and so is this use
        tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(on, non_blocking=True) if on.type == "cuda" else tensor


def images_to_device(array: np.ndarray, on: torch.device) -> Tensor:
    """Send images (B, H, W, 3) uint8 to the device, as (B, 3, H, W) with channels last in memory."""
    return to_device(array, on).permute(0, 3, 1, 2)


def integers_to_device(arrays: Mapping[str, np.ndarray], on: torch.device) -> dict[str, Tensor]:
    """Send arrays of whole numbers to the device, each as int64, in one transfer."""
    whole = np.concatenate([array.ravel() for array in arrays.values()]).astype(np.int64)
    parts = to_device(whole, on).split([math.prod(array.shape) for array in arrays.values()])
    return {name: part.view(arrays[name].shape) for name, part in zip(arrays, parts, strict=True)}


class PendingValue:
    """A number on the device whose copy to the host starts at once and is read later, without waiting."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.arrived = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read(self) -> float:
        """The number. Waits for the device only where the copy has not arrived yet."""
        if self.arrived:
            self.arrived.synchronize()
        return self.value.item()


Step = tuple[int, np.ndarray, np.ndarray]
"""Number, rows of the global batch, images (B, H, W, 3) uint8 of this worker's part of it."""


def prefetch(steps: Iterator[Step], on: torch.device) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """The steps with their images on the device.

    For a GPU a thread fetches and sends each step during the step before it, on a stream of its own. On the CPU a step
    is fetched when it is asked for: what would be done beside the computation would take its cores.
    """
    if on.type != "cuda":
        yield from ((number, rows, images_to_device(images, on)) for number, rows, images in steps)
        return
    beside = torch.cuda.Stream(on)

    def fetch() -> tuple[int, np.ndarray, Tensor, torch.cuda.Event] | None:
        step = next(steps, None)
        if step is None:
            return None
        with torch.cuda.stream(beside):  # of the device too, in this thread
            return *step[:2], images_to_device(step[2], on), beside.record_event()

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(fetch)
        while fetched := coming.result():
            coming = thread.submit(fetch)
            number, rows, pixels, sent_off = fetched
            torch.cuda.current_stream(on).wait_event(sent_off)
            pixels.record_stream(torch.cuda.current_stream(on))  # not to be overwritten before that one has read it
            yield number, rows, pixels
