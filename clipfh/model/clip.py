"""CLIP models by open_clip: named, built, loaded with weights; tokenizer, preprocessing and fingerprint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfh import UserError
from clipfh.config import schema
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.data.images import Preprocess

MAX_LOG_SCALE = math.log(100)


@functools.cache
def load_open_clip() -> Any:
    """open_clip, with our architecture known to it. It takes seconds to import, and most processes need none of it."""
    with _absent("wandb"):  # timm would load it and never use it: half a second, and two folders left in /tmp
        import open_clip

    open_clip.add_model_config(Path(__file__).parent / f"{SMALL_MODEL}.json")
    return open_clip


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Let an import of a module fail, as where it isn't installed, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def architecture_name(settings: ModelSettings) -> str:
    """open_clip's name of the architecture.

    OpenAI's weights want QuickGELU, which open_clip keeps in architectures of their own: the names that people
    write (ViT-B/16, RN50) mean those, unless the weights are a tag trained without it.

    Raises:
        UserError: open_clip has no such model.
    """
    name, tag = settings.name.replace("/", "-"), settings.pretrained
    models = load_open_clip().list_models()
    if name not in models:
        raise UserError(f"--model.name {settings.name}: no such model{schema.nearest(name, models)}")
    trained = load_open_clip().get_pretrained_cfg(name, tag) if tag else {}
    quick = trained.get("quick_gelu", False) if trained else is_openai_name(settings.name)
    return f"{name}-quickgelu" if quick and f"{name}-quickgelu" in models else name


def plain_name(name: str) -> str:
    """A model's name without the ways of writing it: ViT-B/16, ViT-B-16 and ViT-B-16-quickgelu are one."""
    return name.replace("/", "-").removesuffix("-quickgelu")


def is_openai_name(name: str) -> bool:
    """Whether the name is one that OpenAI gave: ViT-B/16 and its like, RN50 and its like."""
    return "/" in name or re.fullmatch(r"RN\d+(x\d+)?", name) is not None


def weights_name(settings: ModelSettings) -> str:
    """The open_clip tag or file to start from, or '' for random weights."""
    usual = "openai" if is_openai_name(settings.name) else ""
    return "" if settings.pretrained == "none" else settings.pretrained or usual


def build_model(settings: ModelSettings) -> nn.Module:
    """The architecture with random weights, float32, on the CPU, and with the preprocessing of the settings' weights.

    So the models of `build`, `with_weights` and `initial` take the same pixels. A file's preprocessing is not known:
    with one, as with random weights, it is the architecture's.
    """
    pixels = input_pixels(settings)
    with _quiet():
        return load_open_clip().create_model(
            architecture_name(settings), pretrained_text=False, force_preprocess_cfg=pixels
        )


def input_pixels(settings: ModelSettings) -> dict[str, Any]:
    """What open_clip does to images for the settings' weights, but for the size, which is the architecture's."""
    transform, tag = (
        load_open_clip().transform,
        load_open_clip().get_pretrained_cfg(architecture_name(settings), weights_name(settings)),
    )
    merged = transform.merge_preprocess_dict(transform.PreprocessCfg(), tag)
    return {key: value for key, value in merged.items() if key != "size"}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's remarks on random weights, which are wanted here."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def load_initial_model(settings: ModelSettings, seed: int) -> nn.Module:
    """The model that training starts from and that zero-shot evaluates: pretrained, or random by the seed.

    Raises:
        UserError: weights that can't be had or don't fit.
    """
    torch.manual_seed(seed)
    weights = weights_name(settings)
    if not weights:
        return build_model(settings)
    _without_network_only_the_cache()
    try:
        with _quiet():
            return load_open_clip().create_model(architecture_name(settings), pretrained=weights)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise _weights_error(settings, weights, error) from error


def load_weights(settings: ModelSettings, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """Build the architecture with these weights.

    Raises:
        UserError: the weights are those of another architecture.
    """
    clip = build_model(settings)
    try:
        clip.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the weights of {where} do not fit {settings.name} ({reason}): name their --model") from error
    return clip


def _without_network_only_the_cache() -> None:
    """Where the hub does not answer, use what was downloaded before: the hub's client would retry for a minute."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT)
    if _goes_by_proxy(host.scheme, host.hostname or ""):
        return
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _goes_by_proxy(scheme: str, host: str) -> bool:
    """Whether the environment has a proxy for the host: then there need be no direct way to it."""
    return bool({scheme, "all"} & set(urllib.request.getproxies())) and not urllib.request.proxy_bypass(host)


def _weights_error(settings: ModelSettings, weights: str, error: Exception) -> UserError:
    name, reason = settings.name, " ".join(str(error).split())[:160]
    if Path(weights).is_file():
        return UserError(f"--model.pretrained {weights} does not hold weights of {name} ({reason}): take its own file")
    tags = load_open_clip().list_pretrained_tags_by_model(architecture_name(settings))
    if weights not in tags:
        return UserError(
            f"--model.pretrained {weights}: no such file, nor a tag of {name} (its tags: {', '.join(tags) or 'none'})"
        )
    return UserError(
        f"weights '{weights}' of {name} can't be downloaded ({reason}): "
        "give a local file by --model.pretrained FILE, or put them into the Hugging Face cache"
    )


def get_preprocess(model: nn.Module) -> Preprocess:
    """How the model wants its images."""
    cfg: dict[str, Any] = load_open_clip().get_model_preprocess_cfg(model)
    size = cfg["size"]
    return Preprocess(
        size if isinstance(size, int) else size[0],
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        cfg["interpolation"],
        cfg["resize_mode"],
    )


def model_fingerprint(clip: nn.Module, settings: ModelSettings) -> str:
    """A hash of all that an embedding depends on besides its image: architecture, weights, preprocessing, precision."""
    parts = [architecture_name(settings), settings.precision, asdict(get_preprocess(clip))]
    sha = hashlib.sha256(json.dumps(parts).encode())
    for name, tensor in sorted(clip.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def open_clip_config(settings: ModelSettings, preprocess: Preprocess) -> str:
    """The text of `open_clip_config.json`, from which open_clip builds the model of a folder."""
    model_cfg = load_open_clip().get_model_config(architecture_name(settings))
    shown = {"mean": preprocess.mean, "std": preprocess.std, "interpolation": preprocess.interpolation}
    return json.dumps(
        {"model_cfg": model_cfg, "preprocess_cfg": {**shown, "resize_mode": preprocess.resize_mode}}, indent=2
    )


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer: called with prompts it gives (N, context) int64; it has a `context_length`.

    Raises:
        UserError: it can't be had.
    """
    try:
        return load_open_clip().get_tokenizer(architecture_name(settings))
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:  # transformers or its files missing
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the tokenizer of {settings.name} can't be loaded ({reason}): pip install transformers, and let it reach "
            "the Hugging Face hub or its cache; or take a model with CLIP's own tokenizer, such as ViT-B/16"
        ) from error


def make_token_counter(settings: ModelSettings) -> Callable[[str], int]:
    """How many tokens a prompt takes, start and end included."""
    tokens = load_tokenizer(settings)
    if hasattr(tokens, "encode"):
        return lambda prompt: len(tokens.encode(prompt)) + 2
    return lambda prompt: len(tokens.tokenizer(tokens.clean_fn(prompt)).input_ids)  # Hugging Face's add start and end
