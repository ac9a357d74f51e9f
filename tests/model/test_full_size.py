"""ViT-B/16 and RN50 as they are: one real step on a CPU, in either stage, and an export.

What moves moves, what is frozen stays; open_clip and onnxruntime embed photos as the checkpoint does.

`pytest -s` shows peak memory and how many weights moved.
"""

import multiprocessing
import resource
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from clipfh.config import presets
from clipfh.config.experiment import ModelSettings
from clipfh.data.sampler import ItemIndex
from clipfh.learn import learner
from clipfh.learn.learner import ItemCaptions
from clipfh.model import export
from clipfh.model.architecture import find as find_architecture
from clipfh.model.clip import get_preprocess, load_initial_model, load_tokenizer

P, K = 4, 2


def step(name: str, stage: str) -> tuple[Counter, Counter, float]:
    """Weights that moved and that stayed, by part of the model, and the peak of memory in GiB, of P 4 x K 2."""
    settings = {"model.name": name, "model.pretrained": "none", "batch.items": P, "batch.views": K}
    experiment = presets.resolve(stage, "recommended", {**settings, "budget.images": P * K, "optimizer.warmup": 0.0})
    clip = initial(experiment.model)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    index = ItemIndex(np.arange(P).repeat(K), np.zeros(P, int), list("abcd"), np.array([P * K]))
    tokens = load_tokenizer(find_architecture(experiment.model))([f"item {i}" for i in range(P)]).numpy()
    one = learner.Learner(experiment, clip, index, ItemCaptions(tokens, np.arange(P)), torch.device("cpu"))
    size = get_preprocess(clip).size
    images = np.random.default_rng(0).integers(0, 255, (P * K, size, size, 3), dtype=np.uint8)
    one.train_step(np.arange(P * K), images)
    moved, stayed = Counter(), Counter()
    for key, tensor in clip.state_dict().items():
        (stayed if torch.equal(tensor, before[key]) else moved)[part(key)] += tensor.numel()
    return moved, stayed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def initial(settings: ModelSettings) -> torch.nn.Module:
    """The model with random weights that reach its output."""
    clip = load_initial_model(settings, 0)
    for key, tensor in clip.state_dict().items():
        if ".bn3.weight" in key:
            tensor.fill_(1)  # random ones are 0: nothing would reach the blocks
    return clip


def exported(name: str, photos: list[bytes], out: Path) -> None:
    """An export with ONNX, which checks both with photos before it is done."""
    experiment = presets.resolve("joint", "recommended", {"model.name": name, "model.pretrained": "none"})
    export.write_export(initial(experiment.model), experiment, out, {}, photos, with_onnx=True)


def part(key: str) -> str:
    """The part of a model that a weight belongs to."""
    if key == "logit_scale":
        return key
    if not key.startswith("visual."):
        return "text tower"
    if "resblocks" not in key and ".layer" not in key and any(word in key for word in ("conv", "bn")):
        return "patch embedding"
    return "batch norm" if ".bn" in key or "downsample.1" in key else "image tower"


@pytest.mark.slow
@pytest.mark.parametrize("name,stage", [("ViT-B/16", "joint"), ("RN50", "image")])
def test_one_step(name: str, stage: str):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        moved, stayed, memory = alone.submit(step, name, stage).result()
    print(f"\n{name}, {stage} stage: {memory:.1f} GiB; moved {dict(moved)}; stayed {dict(stayed)}")
    assert set(moved) == {"image tower"} | ({"text tower", "logit_scale"} if stage == "joint" else set())
    assert set(stayed) >= {"patch embedding"} | ({"batch norm"} if name == "RN50" else set())
    assert "image tower" not in stayed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/16", "RN50"])
def test_export(name: str, source: Path, tmp_path: Path):
    photos = [file.read_bytes() for file in sorted(source.rglob("*.jpg"))[:3]]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        alone.submit(exported, name, photos, tmp_path / "model").result()
    assert {file.name for file in (tmp_path / "model/onnx").iterdir()} >= {"image.onnx", "text.onnx"}
