"""The device of a process, and the precision that it computes in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from clipfh import UserError


def gpus_here() -> int:
    """Number of GPUs, 0 or 1, for a process that computes alone on this machine. A broken GPU counts, as in Ray."""
    return min(1, torch.cuda.device_count())


def choose_device(gpus: float | None = None) -> torch.device:
    """The device that a process computes on. Its share of GPUs decides, not what torch sees, because Ray hides no GPU
    from a process that was given none.

    From then on float32 means float32: no TF32, neither in matrix products nor in convolutions, where torch takes it by
    default. The setting for speed is bfloat16.

    Args:
        gpus: number of GPUs that the process was given, or its share of one. None takes the machine's GPU if it works,
            else the CPU.

    Raises:
        UserError: torch can't compute on the GPU that the process was given.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    trouble = _gpu_trouble() if gpus is None or gpus else ""
    if gpus and trouble:
        raise UserError(
            f"a GPU was given to this process, but torch {torch.__version__} can't compute on it ({trouble[:200]}): a "
            "torch for CUDA 13 needs NVIDIA's driver 580 or newer and a GPU from Turing on; update the driver, or "
            "install a torch for the CUDA that the driver has, or hide the GPU by CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cpu") if gpus == 0 or trouble else torch.device("cuda", torch.cuda.current_device())


def _gpu_trouble() -> str:
    """The reason why torch can't compute on the GPU, in torch's words; empty where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say the same, at length
            torch.ones(1, device="cuda").add(1).item()
    except torch.OutOfMemoryError:
        return ""  # it works, and is full
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        return " ".join(str(error).split())
    return ""


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn torch's error of a GPU out of memory into a UserError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the GPU's memory is too small ({reason}): {remedy}") from error


def resolve_precision(setting: str, on: torch.device) -> torch.dtype:
    """The type that the towers compute in: `auto` is bfloat16 on GPUs that have it, else float32.

    Older GPUs, such as the T4, would only emulate it, slower than float32.
    """
    if setting == "auto":
        return torch.bfloat16 if on.type == "cuda" and _has_bfloat16() else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def _has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def precision_notes(setting: str, on: torch.device) -> list[str]:
    """Notes for people on the precision: a GPU on which `auto` can't take bfloat16."""
    if setting == "auto" and on.type == "cuda" and not _has_bfloat16():
        return [f"{torch.cuda.get_device_name(on)} has no bfloat16, so --model.precision auto computes in float32"]
    return []
