"""CLIP models by open_clip: built, loaded with weights; tokenizer, preprocessing and fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfh import UserError
from clipfh.config.experiment import ModelSettings
from clipfh.data.images import Preprocess
from clipfh.model import architecture as architectures
from clipfh.model import hub, state_dicts
from clipfh.model.architecture import Architecture, load_open_clip, load_text_towers
from clipfh.model.initial import initialise
from clipfh.storage import layout

MISSING_LIBRARY = "pip install 'clipfh[hub]', and let it reach the Hugging Face hub or its cache"


def build(architecture: Architecture, device: str = "cpu") -> nn.Module:
    """A model with random weights, float32, which knows its `architecture`.

    On the device "meta" it has no weights and takes no memory, and shows only its parts.

    Raises:
        UserError: open_clip can't build it here.
    """
    with _quiet(), tempfile.TemporaryDirectory() as folder, torch.device(device):
        Path(folder, layout.OPEN_CLIP_CONFIG).write_text(architecture.to_open_clip())
        options = {"pretrained_text": False, "load_weights": False, "device": device}
        if architecture.model_cfg["text_cfg"].get("hf_model_name"):
            load_text_towers()
        try:
            clip = load_open_clip().create_model(f"local-dir:{folder}", **options)
        except (ImportError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise _build_error(architecture, error) from error
    clip.architecture = architecture
    return clip


def _build_error(architecture: Architecture, error: Exception) -> UserError:
    reason, text = " ".join(str(error).split())[:160], architecture.model_cfg["text_cfg"].get("hf_model_name")
    if text:
        return UserError(f"the text tower {text} can't be built ({reason}): {MISSING_LIBRARY}")
    return UserError(f"open_clip {load_open_clip().__version__} can't build the model ({reason}): take another")


def build_initial(architecture: Architecture, seed: int) -> nn.Module:
    """A model as training starts it without weights; `seed` draws them. UserError: as `build`."""
    torch.manual_seed(seed)
    clip = build(architecture)
    initialise(clip)
    return clip


def build_model(settings: ModelSettings) -> nn.Module:
    """The model that the settings name, with random weights. UserError: as `architecture.find` and `build`."""
    return build(architectures.find(settings))


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
    weights = architectures.weights_name(settings)
    if not weights:
        return build_initial(architectures.find(settings), seed)
    torch.manual_seed(seed)
    native = build_model(replace(settings, image_size=0))
    try:
        with _quiet(), state_dicts.readable(_weights_file(settings, weights)) as file:
            load_open_clip().load_checkpoint(native, str(file))
    except UserError:
        raise
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise _weights_error(settings, weights, error) from error
    return resize(native, settings)


def _weights_file(settings: ModelSettings, weights: str) -> Path:
    """The file of weights of a tag (downloaded), of a folder or of a repository; or `weights` itself, if a file."""
    if weights == settings.name:
        folder = architectures.find_folder(settings, with_weights=True)
        files = [file for name in layout.OPEN_CLIP_WEIGHTS if folder and (file := folder / name).is_file()]
        if not files:
            raise UserError(f"--model.name {settings.name}: {folder} holds no {layout.EXPORTED_WEIGHTS} or the like")
        return files[0]
    if settings.name.startswith((hub.PREFIX, architectures.LOCAL)):
        return Path(weights)
    tag = load_open_clip().get_pretrained_cfg(architectures.architecture_name(settings), weights)
    if not tag:
        return Path(weights)
    hub.use_cache_without_network()
    with hub.plain_errors():
        return Path(load_open_clip().download_pretrained(tag))


def _weights_error(settings: ModelSettings, weights: str, error: Exception) -> UserError:
    name, reason = settings.name, " ".join(str(error).split())[:160]
    if weights == name:
        return UserError(f"--model.name {name}: its weights do not fit its {layout.OPEN_CLIP_CONFIG} ({reason})")
    if Path(weights).is_file():
        return UserError(f"--model.pretrained {weights} does not hold weights of {name} ({reason}): take its own file")
    if name.startswith((hub.PREFIX, architectures.LOCAL)):
        return UserError(f"--model.pretrained {weights}: no such file; leave it out for the weights of {name}")
    tags = load_open_clip().list_pretrained_tags_by_model(architectures.architecture_name(settings))
    if weights not in tags:
        return UserError(
            f"--model.pretrained {weights}: no such file, nor a tag of {name} (its tags: {', '.join(tags) or 'none'})"
        )
    return UserError(
        f"weights '{weights}' of {name} can't be downloaded ({reason}): "
        "give a local file by --model.pretrained FILE, or put them into the Hugging Face cache"
    )


def resize(clip: nn.Module, settings: ModelSettings) -> nn.Module:
    """The model for images of the settings' `image_size`, its position embeddings interpolated as open_clip does.

    Raises:
        UserError: its image tower is not made for that size.
    """
    native = get_architecture(clip)
    if settings.image_size in (0, native.size):
        return clip
    resized = build(architectures.resized(native, settings.image_size, settings.name))
    visual: Any = clip.visual
    if hasattr(visual, "trunk"):
        visual.set_input_size(settings.image_size)
    state = clip.state_dict()
    load_open_clip().model.resize_pos_embed(state, resized)
    resized.load_state_dict(state)
    return resized


def load_weights(architecture: Architecture, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """Build a model with these weights.

    Raises:
        UserError: the weights are of another architecture.
    """
    clip = build(architecture)
    try:
        clip.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the weights of {where} do not fit the model ({reason}): name their own by --model") from error
    return clip


def get_architecture(clip: nn.Module) -> Architecture:
    """The architecture that a model of `build` was built by."""
    architecture: Any = clip.architecture
    return architecture


def get_preprocess(model: nn.Module) -> Preprocess:
    """The model's preprocessing of images."""
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
    parts = [get_architecture(clip).to_open_clip(), settings.precision, asdict(get_preprocess(clip))]
    sha = hashlib.sha256(json.dumps(parts).encode())
    for name, tensor in sorted(clip.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def load_tokenizer(architecture: Architecture) -> Any:
    """The model's tokenizer: called with prompts it gives (N, context) int64; it has a `context_length`.

    Raises:
        UserError: it can't be had.
    """
    text, name = architecture.model_cfg["text_cfg"], architecture.tokenizer_name
    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    try:
        if not name:
            return load_open_clip().SimpleTokenizer(**options)
        if not Path(name).is_dir():
            hub.use_cache_without_network()
        with hub.plain_errors():
            return load_open_clip().tokenizer.HFTokenizer(name, tokenizer_mode=text.get("tokenizer_mode"), **options)
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:  # transformers or its files missing
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the tokenizer {name} can't be loaded ({reason}): {MISSING_LIBRARY}; or take a model with CLIP's own "
            "tokenizer, such as ViT-B/16"
        ) from error


def make_token_counter(tokenizer: Any) -> Callable[[str], int]:
    """How many tokens a prompt takes, start and end included."""
    if hasattr(tokenizer, "encode"):
        return lambda prompt: len(tokenizer.encode(prompt)) + 2
    # Hugging Face's add start and end
    return lambda prompt: len(tokenizer.tokenizer(tokenizer.clean_fn(prompt)).input_ids)
