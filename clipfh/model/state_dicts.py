"""Bare files of weights, as training scripts leave them: read without running code, with open_clip's names."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipfh import UserError

STATES = ("model_state_dict", "state_dict", "model")
"""Keys under which training scripts keep a state dict: the original pipeline's, open_clip's, and others'."""

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Entries of OpenAI's state dicts that are no weights."""

WRAPPERS = ("module.", "_orig_mod.", "model.", "clip.")
"""Prefixes of names that DistributedDataParallel, torch.compile and modules around a model add."""


def read_state(file: Path) -> tuple[dict[str, Tensor], str]:
    """The weights of a file by open_clip's or OpenAI's names, and the architecture that it names; often it names none.

    Raises:
        UserError: it can't be read, or holds no weights under such names.
    """
    return _find_state(read_file(file), file)


def _find_state(tree: Any, file: Path) -> tuple[dict[str, Tensor], str]:
    """The weights within a file's content, as `read_state` returns them."""
    state = next((tree[key] for key in STATES if isinstance(tree, dict) and isinstance(tree.get(key), dict)), tree)
    tensors = isinstance(state, dict) and {str(name): each for name, each in state.items() if name not in NO_WEIGHTS}
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} holds no state dict (tensors by name): give a file with one, or under {STATES[0]}")
    tensors = _unwrapped(tensors)
    if any(name.startswith("vision_model.") for name in tensors):
        raise UserError(
            f"{file} holds a model with the names of Hugging Face's transformers, not open_clip's: take the same model "
            "from open_clip's list (clipfh's --model and --model.pretrained TAG) or from a repository for open_clip "
            "(hf-hub:ORG/NAME)"
        )
    name = tree.get("model_name", "")
    return tensors, name if isinstance(name, str) else ""


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by names without a prefix that all of them have, if it is one of WRAPPERS."""
    for wrapper in WRAPPERS * 2:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


@contextlib.contextmanager
def readable(file: Path) -> Iterator[Path]:
    """The file as open_clip reads it: itself, or while the block lasts another with its weights under plain names.

    Raises:
        UserError: as `read_state`.
    """
    if not file.is_file() or file.suffix in (".npz", ".npy"):  # open_clip reads big_vision's itself
        yield file
        return
    tree = read_file(file)
    state, _ = _find_state(tree, file)
    is_plain = set(tree) - set(NO_WEIGHTS) == set(state)
    del tree
    if is_plain:
        del state  # open_clip reads them anew
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "weights.safetensors")
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, plain)
        yield plain


def read_file(file: Path) -> Any:
    """What the file holds, without running any code from it."""
    try:
        return load_file(file) if file.suffix == ".safetensors" else _load_pickled(file)
    except Exception as error:
        reason = str(error)
        if "TorchScript" in reason:
            raise UserError(_convert(file, "a TorchScript archive", "torch.jit.load({0}).state_dict()")) from error
        if "Unsupported global" in reason or "Unsupported class" in reason:
            pickled = "torch.load({0}, weights_only=False)['model'].state_dict()"
            raise UserError(_convert(file, "a pickled module, which could run any code", pickled)) from error
        first = " ".join(reason.split())[:160]
        raise UserError(
            f"{file} can't be read as weights ({first}): give a safetensors file or a state dict"
        ) from error


def _load_pickled(file: Path) -> Any:
    try:
        return torch.load(file, "cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch 1.5 and older can't be mapped
        return torch.load(file, "cpu", weights_only=True)


def _convert(file: Path, what: str, state: str) -> str:
    return (
        f"{file} holds {what}, and is not loaded: where you trust it, make a file of its weights with "
        f"torch.save({state.format(repr(str(file)))}, 'weights.pth') and give that"
    )
