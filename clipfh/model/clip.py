"""CLIP towers by open_clip, and what of them is frozen."""

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
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfh import UserError
from clipfh.config import experiment as config
from clipfh.data import transfer
from clipfh.data.images import Preprocess

CONFIG_FILE = "open_clip_config.json"
MAX_LOG_SCALE = math.log(100)


@functools.cache
def library() -> Any:
    """open_clip, with our architecture known to it. It takes seconds to import, and most processes need none of it."""
    with _absent("wandb"):  # timm would load it and never use it: half a second, and two folders left in /tmp
        import open_clip

    open_clip.add_model_config(Path(__file__).parent / f"{config.SMALL}.json")
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


def architecture(settings: config.Model) -> str:
    """open_clip's name of the architecture.

    OpenAI's weights want QuickGELU, which open_clip keeps in architectures of their own: the names that people
    write (ViT-B/16, RN50) mean those, unless the weights are a tag trained without it.

    Raises:
        UserError: open_clip has no such model.
    """
    name, tag = settings.name.replace("/", "-"), settings.pretrained
    known = library().list_models()
    if name not in known:
        raise UserError(f"--model.name {settings.name}: no such model{config.nearest(name, known)}")
    trained = library().get_pretrained_cfg(name, tag) if tag else {}
    quick = trained.get("quick_gelu", False) if trained else is_openai_name(settings.name)
    return f"{name}-quickgelu" if quick and f"{name}-quickgelu" in known else name


def plain_name(name: str) -> str:
    """A model's name without the ways of writing it: ViT-B/16, ViT-B-16 and ViT-B-16-quickgelu are one."""
    return name.replace("/", "-").removesuffix("-quickgelu")


def is_openai_name(name: str) -> bool:
    """Whether the name is one that OpenAI gave: ViT-B/16 and its like, RN50 and its like."""
    return "/" in name or re.fullmatch(r"RN\d+(x\d+)?", name) is not None


def weights_of(settings: config.Model) -> str:
    """The open_clip tag or file to start from, or '' for random weights."""
    usual = "openai" if is_openai_name(settings.name) else ""
    return "" if settings.pretrained == "none" else settings.pretrained or usual


def build(settings: config.Model) -> nn.Module:
    """The architecture with random weights, float32, on the CPU, and with the preprocessing of the settings' weights.

    So the models of `build`, `with_weights` and `initial` take the same pixels. A file's preprocessing is not known:
    with one, as with random weights, it is the architecture's.
    """
    pixels = pixels_of(settings)
    with _quiet():
        return library().create_model(architecture(settings), pretrained_text=False, force_preprocess_cfg=pixels)


def pixels_of(settings: config.Model) -> dict[str, Any]:
    """What open_clip does to images for the settings' weights, but for the size, which is the architecture's."""
    transform, tag = library().transform, library().get_pretrained_cfg(architecture(settings), weights_of(settings))
    merged = transform.merge_preprocess_dict(transform.PreprocessCfg(), tag)
    return {key: value for key, value in merged.items() if key != "size"}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's remarks on random weights, which are what we asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def initial(settings: config.Model, seed: int) -> nn.Module:
    """The model that training starts from and that zero-shot evaluates: pretrained, or random by the seed.

    Raises:
        UserError: weights that can't be had or don't fit.
    """
    torch.manual_seed(seed)
    weights = weights_of(settings)
    if not weights:
        return build(settings)
    _without_network_only_the_cache()
    try:
        with _quiet():
            return library().create_model(architecture(settings), pretrained=weights)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise _weights_error(settings, weights, error) from error


def with_weights(settings: config.Model, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """The architecture with these weights.

    Raises:
        UserError: they are those of another one.
    """
    clip = build(settings)
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


def _weights_error(settings: config.Model, weights: str, error: Exception) -> UserError:
    name, reason = settings.name, " ".join(str(error).split())[:160]
    if Path(weights).is_file():
        return UserError(f"--model.pretrained {weights} does not hold weights of {name} ({reason}): take its own file")
    tags = library().list_pretrained_tags_by_model(architecture(settings))
    if weights not in tags:
        return UserError(
            f"--model.pretrained {weights}: no such file, nor a tag of {name} (its tags: {', '.join(tags) or 'none'})"
        )
    return UserError(
        f"weights '{weights}' of {name} can't be downloaded ({reason}): "
        "give a local file by --model.pretrained FILE, or put them into the Hugging Face cache"
    )


def preprocess_of(model: nn.Module) -> Preprocess:
    """How the model wants its images."""
    cfg: dict[str, Any] = library().get_model_preprocess_cfg(model)
    size = cfg["size"]
    return Preprocess(
        size if isinstance(size, int) else size[0],
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        cfg["interpolation"],
        cfg["resize_mode"],
    )


def identity(clip: nn.Module, settings: config.Model) -> str:
    """A hash of all that an embedding depends on beside its image: architecture, weights, preprocessing, precision."""
    of = [architecture(settings), settings.precision, asdict(preprocess_of(clip))]
    sha = hashlib.sha256(json.dumps(of).encode())
    for name, tensor in sorted(clip.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def open_clip_config(settings: config.Model, preprocess: Preprocess) -> str:
    """The text of `open_clip_config.json`, from which open_clip builds the model of a folder."""
    model_cfg = library().get_model_config(architecture(settings))
    shown = {"mean": preprocess.mean, "std": preprocess.std, "interpolation": preprocess.interpolation}
    return json.dumps(
        {"model_cfg": model_cfg, "preprocess_cfg": {**shown, "resize_mode": preprocess.resize_mode}}, indent=2
    )


def tokenizer(settings: config.Model) -> Any:
    """The model's tokenizer: called with prompts it gives (N, context) int64; it has a `context_length`.

    Raises:
        UserError: it can't be had.
    """
    try:
        return library().get_tokenizer(architecture(settings))
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:  # transformers or its files missing
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the tokenizer of {settings.name} can't be loaded ({reason}): pip install transformers, and let it reach "
            "the Hugging Face hub or its cache; or take a model with CLIP's own tokenizer, such as ViT-B/16"
        ) from error


def token_counter(settings: config.Model) -> Callable[[str], int]:
    """How many tokens a prompt takes, start and end included."""
    tokens = tokenizer(settings)
    if hasattr(tokens, "encode"):
        return lambda prompt: len(tokens.encode(prompt)) + 2
    return lambda prompt: len(tokens.tokenizer(tokens.clean_fn(prompt)).input_ids)  # Hugging Face's add start and end


class Towers(nn.Module):
    """Both towers in one forward pass, which is what DistributedDataParallel wraps.

    Args:
        clip: open_clip's model.
        chunk: images, and prompts, that pass at a time where gradients are wanted; 0: all. Each chunk's activations
            are dropped and computed again when its gradient is due (gradient caching: Gao et al., 2021), so memory
            goes with the chunk and the gradient is that of the whole batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, chunk: int = 0) -> None:
        super().__init__()
        self.clip: Any = clip
        self.chunk = chunk
        if isinstance(clip.visual, library().modified_resnet.ModifiedResNet):
            clip.visual.to(memory_format=torch.channels_last)  # as the images are: else each pass turns every weight
        preprocess, dtype = preprocess_of(clip), next(clip.parameters()).dtype
        self.register_buffer("mean", torch.tensor(preprocess.mean, dtype=dtype).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std, dtype=dtype).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features of images and prompts, and the logit scale.

        Args:
            images: (B, 3, H, W) uint8.
            tokens: (C, context) int64, or None: the text tower is not run.

        Returns:
            (B, D) image features, (C, D) text features or None, scalar log of the logit scale.
        """
        text = None if tokens is None else self._by_chunks(self.clip.encode_text, tokens)
        return self._by_chunks(self._encode_image, images), text, self.clip.logit_scale

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std))

    def _by_chunks(self, encode: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        if not (0 < self.chunk < len(rows) and torch.is_grad_enabled()):
            return encode(rows)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in rows.split(self.chunk)])

    def train(self, mode: bool = True) -> Towers:
        """Batch norm stays in eval mode: its statistics are those of pretraining, not of a batch."""
        super().train(mode)
        for module in self.modules():
            if _is_batch_norm(module):
                module.eval()
        return self


_LEAVES = ("weight", "bias")


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def recompute_blocks(clip: Any, name: str) -> None:
    """Gradient checkpointing: drop the activations inside each block, and compute them again when they are due.

    open_clip does nothing for its own ResNets when asked, and only logs where a tower of timm's can't.

    Raises:
        UserError: the image tower can't.
    """
    if isinstance(clip.visual, library().modified_resnet.ModifiedResNet):
        for number in range(1, 5):
            stage = getattr(clip.visual, f"layer{number}")
            stage.forward = functools.partial(checkpoint, stage.forward, use_reentrant=False)
    elif trunk := getattr(clip.visual, "trunk", None):
        try:
            trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"--model.checkpointing: the image tower of {name} can't ({error}): --batch.chunk saves memory too"
            ) from error
    clip.set_grad_checkpointing(True)


@torch.no_grad()
def clamp_scale(clip: Any) -> None:
    """Keep the logit scale between 1 and 100, as CLIP was trained (Radford et al., 2021, 2.5)."""
    clip.logit_scale.clamp_(0, MAX_LOG_SCALE)


def device(gpus: float | None = None) -> torch.device:
    """Where a process computes. What it was given decides, not what torch sees: Ray hides no GPU from those given none.

    From here on float32 means float32: no TF32, neither in products of matrices nor in convolutions, where torch's own
    default would take it. Who wants speed has bfloat16.

    Args:
        gpus: how many the process was given, or which share of one. None where nobody shares them out: the GPU of this
            machine if it works, else the CPU.

    Raises:
        UserError: it was given a GPU that torch can't compute on.
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
    """Why torch can't compute on the GPU, in its own words: no driver or an old one, no kernels; empty where it can."""
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
def enough_memory(remedy: str) -> Iterator[None]:
    """Say what to do where a GPU has no memory for what the block computes; UserError in place of torch's error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the GPU's memory is too small ({reason}): {remedy}") from error


def precision(setting: str, on: torch.device) -> torch.dtype:
    """The type that the towers compute in: `auto` is bfloat16 on GPUs that have it, else float32.

    Older GPUs, such as the T4, would only emulate it, slower than float32.
    """
    if setting == "auto":
        return torch.bfloat16 if on.type == "cuda" and _has_bfloat16() else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def _has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def notes_on(setting: str, on: torch.device) -> list[str]:
    """What to tell people of the precision: a GPU that `auto` can't take bfloat16 on."""
    if setting == "auto" and on.type == "cuda" and not _has_bfloat16():
        return [f"{torch.cuda.get_device_name(on)} has no bfloat16, so --model.precision auto computes in float32"]
    return []


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode and without gradients; afterwards in the mode it was in."""
    before = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(before)


def embed(towers: Towers, images: np.ndarray, dtype: torch.dtype, batch: int = 256) -> Tensor:
    """(N, D) float32 unit embeddings of (N, size, size, 3) uint8 images."""
    on = towers.mean.device
    parts = []
    with evaluating(towers), torch.autocast(on.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for start in range(0, len(images), batch):
            parts.append(towers(transfer.images(images[start : start + batch], on))[0].float())
    return F.normalize(torch.cat(parts))


def embed_text(towers: Towers, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, D) float32 unit embeddings of (C, context) tokens."""
    return F.normalize(text_features(towers, tokens, dtype).float())


def text_features(towers: Towers, tokens: Tensor, dtype: torch.dtype, batch: int = 256) -> Tensor:
    """(C, D) features of (C, context) tokens, as the towers that compute in a type give them."""
    on = towers.mean.device
    with evaluating(towers), torch.autocast(on.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return torch.cat([towers.clip.encode_text(part.to(on)) for part in tokens.split(batch)])


def depth(name: str, blocks: int) -> int:
    """How deep a parameter of a tower lies: 0 for the stem, i + 1 for block i, blocks + 1 for what follows."""
    block = re.search(r"\b(?:resblocks|blocks|layers)\.(\d+)\.|\blayer(\d)\.", name)
    if block:
        return int(block[1]) + 1 if block[1] else int(block[2])
    stem = (
        r"\b(conv\d|bn\d|class_embedding|positional_embedding|token_embedding|ln_pre|patch_embed|cls_token|pos_embed)\b"
    )
    return 0 if re.search(stem, name) and "attnpool" not in name else blocks + 1


def num_blocks(names: Mapping[str, Any] | list[str]) -> int:
    """Blocks of the tower whose parameters these are."""
    return max((d for d in (depth(n, -1) for n in names)), default=0)


def split_towers(clip: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by tower: image, text, and scale (the logit scale and bias)."""
    towers: dict[str, dict[str, nn.Parameter]] = {"image": {}, "text": {}, "scale": {}}
    for name, parameter in clip.named_parameters():
        tower = "image" if name.startswith("visual.") else "scale" if name.startswith("logit_") else "text"
        towers[tower][name] = parameter
    return towers


def freeze(clip: nn.Module, stage: str, settings: config.Model, learn_scale: bool) -> None:
    """Switch off the gradient of what the stage and the settings keep as it is."""
    towers = split_towers(clip)
    blocks = num_blocks(list(towers["image"]))
    if settings.freeze_blocks > blocks:
        raise UserError(f"--model.freeze_blocks {settings.freeze_blocks}: {settings.name} has {blocks} blocks")
    norms = {
        f"{prefix}.{leaf}" for prefix, module in clip.named_modules() if _is_batch_norm(module) for leaf in _LEAVES
    }
    for name, parameter in towers["image"].items():
        at = depth(name, blocks)
        in_patch = re.search(r"\b(conv\d|bn\d|patch_embed)\b", name) and at == 0
        frozen = (in_patch and settings.freeze_patch) or (name in norms and settings.freeze_norm)
        parameter.requires_grad_(not (frozen or (settings.freeze_blocks and at <= settings.freeze_blocks)))
    for parameter in towers["text"].values():
        parameter.requires_grad_(stage == "joint")
    for parameter in towers["scale"].values():
        parameter.requires_grad_(stage == "joint" and learn_scale)
