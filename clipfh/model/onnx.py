"""Both towers as ONNX files, each checked in onnxruntime against the model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfh import UserError
from clipfh.data import images
from clipfh.data.images import Preprocess
from clipfh.model.clip import get_architecture, get_preprocess, load_tokenizer
from clipfh.storage import layout

TOLERANCE = 1e-4
NEEDED = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2**31 - 2**24
"""Bytes of weights that fit into one protobuf file, with room for the graph; more lie beside it."""


@dataclass(frozen=True)
class OnnxTower:
    """A tower's ONNX file. Its input and output have the names that Hugging Face's models use."""

    file: str
    encode: str
    takes: str
    gives: str


TOWERS = (
    OnnxTower(layout.IMAGE_ONNX, "encode_image", "pixel_values", "image_embeds"),
    OnnxTower(layout.TEXT_ONNX, "encode_text", "input_ids", "text_embeds"),
)


def require_libraries() -> None:
    """Check that the libraries for ONNX are installed.

    Raises:
        UserError: a library is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write_towers(clip: nn.Module, folder: Path, photos: Sequence[bytes], texts: Sequence[str]) -> None:
    """Write `image.onnx`, `text.onnx` and `preprocessor_config.json`; both batches may have any length.

    Args:
        clip: the model, on the CPU.
        settings: settings of the model.
        folder: folder to make and write into.
        photos: two or more encoded images, which ONNX file and model must embed alike.
        texts: two or more texts, which ONNX file and model must embed alike.

    Raises:
        UserError: a library is missing.
        RuntimeError: an ONNX file embeds otherwise than the model.
    """
    require_libraries()
    folder.mkdir(parents=True)
    preprocess = get_preprocess(clip)
    (folder / layout.PREPROCESSOR).write_text(json.dumps(describe_preprocessing(preprocess), indent=2) + "\n")
    samples = (pixel_values(photos, preprocess), load_tokenizer(get_architecture(clip))(list(texts)))
    for tower, sample in zip(TOWERS, samples, strict=True):
        _write_tower(_NormalizedTower(clip, tower.encode).eval(), tower, folder / tower.file, sample)


class _NormalizedTower(nn.Module):
    """One tower with its output normalised to unit embeddings."""

    def __init__(self, clip: nn.Module, encode: str) -> None:
        super().__init__()
        self.clip, self.encode = clip, encode

    def forward(self, batch: Tensor) -> Tensor:
        return F.normalize(getattr(self.clip, self.encode)(batch), dim=-1)


@torch.no_grad()
def _write_tower(encoder: _NormalizedTower, tower: OnnxTower, file: Path, sample: Tensor) -> None:
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    with _quiet():
        torch.onnx.export(
            encoder,
            (sample[:2],),  # of a batch of one the exporter would make a constant
            file,
            dynamo=True,
            input_names=[tower.takes],
            output_names=[tower.gives],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=size > LARGEST,
            verbose=False,
        )
    for batch in (sample, sample[:1]):
        worst = np.abs(run_tower(file, batch.numpy()) - encoder(batch).numpy()).max()
        if not worst <= TOLERANCE:  # NaN too
            raise RuntimeError(f"nothing was exported: {file.name}'s embeddings would differ by {worst:g}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on its own workings."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def run_tower(file: Path, batch: np.ndarray) -> np.ndarray:
    """Unit embeddings (N, D) of a batch, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def pixel_values(photos: Sequence[bytes], preprocess: Preprocess) -> Tensor:
    """(N, 3, size, size) float32, normalised: what the image tower takes."""
    pixels = np.stack([images.decode_for_evaluation(photo, preprocess) for photo in photos])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def describe_preprocessing(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing, as Hugging Face's CLIPImageProcessor has it in `preprocessor_config.json`."""
    side, squash = {"height": preprocess.size, "width": preprocess.size}, preprocess.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side if squash else {"shortest_edge": preprocess.size},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],  # Pillow's numbers
        "do_center_crop": not squash,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
