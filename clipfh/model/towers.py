"""The two towers of a CLIP model: features and embeddings from them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfh import UserError
from clipfh.model.architecture import load_open_clip
from clipfh.model.clip import get_preprocess
from clipfh.model.transfer import images_to_device


class Towers(nn.Module):
    """Both towers in one forward pass, which is what DistributedDataParallel wraps.

    Args:
        clip: open_clip's model.
        chunk: number of images, and of prompts, that pass at a time where gradients are wanted; 0 for all. A chunk's
            activations are dropped and computed again when its gradient is due (gradient caching: Gao et al., 2021):
            memory grows with the chunk, and the gradient is that of the whole batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, chunk: int = 0) -> None:
        super().__init__()
        self.clip: Any = clip
        self.chunk = chunk
        if isinstance(clip.visual, load_open_clip().modified_resnet.ModifiedResNet):
            clip.visual.to(memory_format=torch.channels_last)  # as the images are: else each pass turns every weight
        preprocess, dtype = get_preprocess(clip), next(clip.parameters()).dtype
        self.register_buffer("mean", torch.tensor(preprocess.mean, dtype=dtype).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std, dtype=dtype).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features of images and prompts, and the logit scale.

        Args:
            images: (B, 3, H, W) uint8.
            tokens: (C, context) int64, or None to leave the text tower out.

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
        """Set the mode. What the towers compute stays what they compute in evaluation.

        Batch norm keeps the statistics of pretraining. Dropout and stochastic depth would draw other masks for each
        number of workers, chunks and restarts, so that the gradient would no longer be that of the global batch.
        """
        super().train(mode)
        for module in self.modules():  # Hugging Face's layers drop activations (checkpointing) in training mode alone
            module.training = mode and (module is self or getattr(module, "gradient_checkpointing", False))
        return self


def recompute_blocks(clip: Any, name: str) -> None:
    """Gradient checkpointing: drop the activations inside each block, and compute them again when they are due.

    open_clip does nothing for its own ResNets when asked, and only logs where a tower of timm's can't.

    Raises:
        UserError: the image tower can't do it.
    """
    if isinstance(clip.visual, load_open_clip().modified_resnet.ModifiedResNet):
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


MAX_LOG_SCALE = math.log(100)


@torch.no_grad()
def clamp_logit_scale(clip: Any) -> None:
    """Keep the logit scale between 1 and 100, as CLIP was trained (Radford et al., 2021, 2.5).

    A model with a logit bias was trained as SigLIP, without such a limit: its scale stays as it is.
    """
    if clip.logit_bias is None:
        clip.logit_scale.clamp_(0, MAX_LOG_SCALE)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, without gradients, while the block lasts."""
    before = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(before)


def embed_images(towers: Towers, images: np.ndarray, dtype: torch.dtype, batch: int = 256) -> Tensor:
    """(N, D) float32 unit embeddings of (N, size, size, 3) uint8 images."""
    on = towers.mean.device
    parts = []
    with evaluating(towers), torch.autocast(on.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for start in range(0, len(images), batch):
            parts.append(towers(images_to_device(images[start : start + batch], on))[0].float())
    return F.normalize(torch.cat(parts))


def mapped_projection(weights: Mapping[str, Tensor], matrix_DD: Tensor | None) -> dict[str, Tensor]:
    """The weights, by name, of the image tower's last linear layer with a linear map of its features behind it.

    Args:
        weights: the model's weights.
        matrix_DD: symmetric map of the features; None leaves them as they are.

    Returns:
        Empty where the tower's last layer is another one, as in some of timm's.
    """
    if "visual.proj" in weights:  # open_clip's ViT: features @ proj
        mapped = {"visual.proj": weights["visual.proj"].T}
    else:
        layers = [name for name in ("visual.attnpool.c_proj", "visual.head.proj") if f"{name}.weight" in weights]
        names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
        mapped = {name: weights[name] for name in names if name in weights}
    if matrix_DD is not None:
        mapped = {name: (matrix_DD.double() @ tensor.double()).to(tensor.dtype) for name, tensor in mapped.items()}
    return {name: tensor.T.contiguous() if name == "visual.proj" else tensor for name, tensor in mapped.items()}


def embed_texts(towers: Towers, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, D) float32 unit embeddings of (C, context) tokens."""
    return F.normalize(text_features(towers, tokens, dtype).float())


def text_features(towers: Towers, tokens: Tensor, dtype: torch.dtype, batch: int = 256) -> Tensor:
    """(C, D) features of (C, context) tokens, computed in the type `dtype`."""
    on = towers.mean.device
    with evaluating(towers), torch.autocast(on.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return torch.cat([towers.clip.encode_text(part.to(on)) for part in tokens.split(batch)])
