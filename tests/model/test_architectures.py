"""Every family of towers that open_clip has: order of its layers, a real step of both stages, its export."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from loopback_hub import write_model, write_tokenizer
from model.architectures import look_at

from clipfh import UserError
from clipfh.config import presets
from clipfh.config.experiment import LOSS_TERMS, Experiment, ModelSettings
from clipfh.data.sampler import ItemIndex
from clipfh.learn.learner import ItemCaptions, Learner
from clipfh.model import architecture as architectures
from clipfh.model import checkpoint, export
from clipfh.model.architecture import Architecture
from clipfh.model.clip import build, get_architecture, load_initial_model, load_tokenizer
from clipfh.model.layers import split_towers
from clipfh.storage import layout

# Names of parameters whose order is known, from the input to the output; those in a group are of one layer
ORDERS = {
    "ViT-B-32": (
        ["class_embedding", "conv1.weight", "ln_pre.weight", "positional_embedding"],
        ["transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.ln_1.bias"],
        ["transformer.resblocks.11.mlp.c_proj.weight"],
        ["ln_post.weight", "proj"],
    ),
    "RN50": (
        ["conv1.weight", "bn3.bias"],
        ["layer1.0.conv1.weight", "layer1.2.bn3.weight"],
        ["layer4.2.conv3.weight"],
        ["attnpool.positional_embedding", "attnpool.c_proj.weight"],
    ),
    "ViT-B-16-SigLIP2": (
        ["trunk.patch_embed.proj.weight", "trunk.pos_embed"],
        ["trunk.blocks.0.attn.qkv.weight"],
        ["trunk.blocks.11.mlp.fc2.bias"],
        ["trunk.attn_pool.latent", "trunk.attn_pool.mlp.fc2.weight"],
    ),
    "EVA02-L-14-336": (
        ["trunk.cls_token", "trunk.patch_embed.proj.weight"],
        ["trunk.blocks.0.attn.q_proj.weight"],
        ["trunk.blocks.23.mlp.fc2.weight"],
        ["trunk.head.weight"],
    ),
    "convnext_base_w": (
        ["trunk.stem.0.weight", "trunk.stem.1.bias"],
        ["trunk.stages.0.blocks.0.conv_dw.weight"],
        ["trunk.stages.0.blocks.2.mlp.fc2.bias"],
        ["trunk.stages.1.downsample.1.weight", "trunk.stages.1.blocks.0.conv_dw.weight"],
        ["trunk.stages.3.blocks.2.gamma"],
        ["trunk.head.norm.weight", "head.proj.weight"],
    ),
    "MobileCLIP2-S0": (
        ["trunk.stem.0.conv_kxk.0.conv.weight"],
        ["trunk.stages.0.blocks.0.mlp.fc1.weight"],
        ["trunk.stages.3.blocks.1.mlp.fc2.weight"],
        ["trunk.final_conv.se.fc1.weight", "trunk.head.fc.weight"],
    ),
    "MobileCLIP-B": (
        ["trunk.patch_embed.backbone.0.conv.weight", "trunk.pos_embed"],
        ["trunk.blocks.0.attn.qkv.weight"],
        ["trunk.blocks.11.mlp.fc2.weight"],
        ["trunk.head.weight"],
    ),
    "PE-Core-B-16": (
        ["trunk.patch_embed.proj.weight", "trunk.norm_pre.weight"],
        ["trunk.blocks.0.attn.qkv.weight"],
        ["trunk.blocks.11.mlp.fc2.weight"],
        ["trunk.attn_pool.latent", "trunk.head.weight"],
    ),
    "ViTamin-L": (
        ["trunk.patch_embed.backbone.stem.conv1.weight", "trunk.patch_embed.backbone.stages.1.0.conv1_1x1.weight"],
        ["trunk.blocks.0.attn.qkv.weight"],
        ["head.proj.weight"],
    ),
    "swin_base_patch4_window7_224": (
        ["trunk.patch_embed.proj.weight"],
        ["trunk.layers.0.blocks.0.attn.qkv.weight"],
        ["trunk.layers.1.downsample.reduction.weight"],
        ["trunk.layers.3.blocks.1.mlp.fc2.weight"],
        ["head.proj.weight"],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_rates_rise_from_the_pixels_to_the_embedding(name):
    row = look_at(name)
    depths = [{row.image.depth[f"visual.{each}"] for each in layer} for layer in ORDERS[name]]
    assert all(len(depth) == 1 for depth in depths), "one layer has one rate"
    order = [min(depth) for depth in depths]
    assert order == sorted(set(order)) and order[0] == 0 and order[-1] == row.image.blocks + 1
    assert set(row.image.depth.values()) == set(range(row.image.blocks + 2)), "no layer is missing between"
    assert set(row.text.depth.values()) == set(range(row.text.blocks + 2))


# An architecture of each family, and what makes its image tower small
FAMILIES = {
    "ViT-B-32": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "RN50": {"layers": [1, 1, 1, 1], "width": 16},
    "ViT-B-16-SigLIP": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "EVA02-B-16": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "PE-Core-T-16-384": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "MobileCLIP-B": {"depth": 1},
    "MobileCLIP2-S0": {"layers": (1, 1, 1, 1)},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "ViTamin-S": {"depth": 1},
    "swin_base_patch4_window7_224": {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4)},
    "vit_relpos_medium_patch16_cls_224": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "vit_medium_patch16_gap_256": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "coca_ViT-B-32": {"layers": 2, "width": 64, "head_width": 32, "attn_pooler_heads": 2},
}


@pytest.fixture
def small_towers(monkeypatch):
    """timm's image towers as small as a family's entry says, wherever open_clip builds one."""
    whole = timm.create_model

    def small(name: str, **options):
        return whole(name, **options, **cuts.get(re.sub(r"_\d{3}$", "", name), {}))

    towers = {family: open_clip.get_model_config(family)["vision_cfg"] for family in FAMILIES}
    names = {family: tower.get("timm_model_name", "") for family, tower in towers.items()}
    cuts = {re.sub(r"_\d{3}$", "", name): FAMILIES[family] for family, name in names.items()}
    monkeypatch.setattr("open_clip.timm_model.timm.create_model", small)


def small_architecture(name: str) -> Architecture:
    """An architecture of open_clip's list, small."""
    full = architectures.find(ModelSettings(name=name, pretrained="none"))
    cfg = deepcopy(full.model_cfg) | {"embed_dim": 64}
    if "timm_model_name" not in cfg["vision_cfg"]:
        cfg["vision_cfg"] |= FAMILIES[name]
    cfg["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2, "vocab_size": 49408, "hf_tokenizer_name": None}
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"] |= {"layers": 1, "width": 64, "heads": 2, "attn_pooler_heads": 2}
    return Architecture(cfg, full.preprocess_cfg)


@pytest.fixture
def folder(small_towers, tmp_path, request):
    """A model's folder in open_clip's format, with random weights, and without a file of ours."""
    made = small_architecture(request.param)
    torch.manual_seed(0)
    torch.save(build(made).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / layout.OPEN_CLIP_CONFIG).write_text(made.to_open_clip())
    return tmp_path


def settings_of(folder: Path) -> dict[str, object]:
    """Settings of a model's folder with all terms on, and batches of two items."""
    terms = {f"loss.{term}": 0.1 for term in LOSS_TERMS}
    return {"model.name": f"local-dir:{folder}", "batch.items": 2, "batch.views": 2, **terms}


def train_steps(experiment: Experiment) -> Learner:
    """A learner after two steps. What is trained must have moved, and nothing else."""
    one = make_learner(experiment)
    before = {name: p.detach().clone() for name, p in one.clip.named_parameters()}
    size = get_architecture(one.clip).size
    images = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    for _ in range(2):
        one.train_step(np.arange(4), images)
    trained = {name: p for name, p in one.clip.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None], "workers would wait for these for ever"
    moved = {name for name, p in one.clip.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained.keys() and any(name.startswith("visual") for name in moved)
    assert (experiment.stage == "joint") == any(not name.startswith("visual") for name in moved)
    return one


WITH_ONNX = ("RN50", "ViT-B-16-SigLIP")  # the exporter takes long


@pytest.mark.parametrize("folder,with_onnx", [(name, name in WITH_ONNX) for name in FAMILIES], indirect=["folder"])
def test_a_family_trains_in_both_stages_and_its_export_is_the_model(folder, with_onnx, tmp_path):
    train_steps(presets.resolve("image", "recommended", settings_of(folder) | {"model.checkpointing": True}))
    one = train_steps(presets.resolve("joint", "recommended", settings_of(folder)))
    out = export.write_export(one.clip, one.experiment, tmp_path / "export", with_onnx=with_onnx)  # compares to 1e-5
    again = load_initial_model(ModelSettings(name=f"local-dir:{out}"), 0)
    size = get_architecture(again).size
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(again.eval().encode_image(pixels), one.clip.eval().encode_image(pixels))


def make_learner(experiment: Experiment) -> Learner:
    clip = load_initial_model(experiment.model, 0)
    index = ItemIndex(np.array([0, 0, 1, 1], np.int32), np.zeros(2, np.int32), ["a", "b"], np.array([4]))
    tokens = load_tokenizer(get_architecture(clip))(["a red dress", "a coat"]).numpy().astype(np.int32)
    return Learner(experiment, clip, index, ItemCaptions(tokens, np.arange(2, dtype=np.int32)), torch.device("cpu"))


@pytest.mark.parametrize(
    "folder,size", [("ViT-B-32", 96), ("ViT-B-16-SigLIP", 384), ("convnext_tiny", 96)], indirect=["folder"]
)
def test_other_sizes_of_images_are_those_of_open_clip(folder, size, tmp_path):
    settings = ModelSettings(name=f"local-dir:{folder}", image_size=size)
    clip = load_initial_model(settings, 0).eval()
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    if hasattr(theirs.visual, "trunk"):
        theirs.visual.set_input_size(size)
    else:  # as it reads a file for a model of another size
        theirs = open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(pixels), theirs.encode_image(pixels))
    experiment = presets.resolve("image", None, {"model.name": settings.name, "model.image_size": size})
    out = export.write_export(clip, experiment, tmp_path / "export")
    assert architectures.read_folder(out).size == size == checkpoint.load_model(out, {})[0].visual.image_size[0]
    back, _, _ = checkpoint.load_model(out, {"model.image_size": architectures.read_folder(folder).size})
    assert get_architecture(back).size != size


@pytest.mark.parametrize(
    "name,size,reason",
    [
        ("ViT-B-32", 100, "cuts images into patches of 32 pixels: take 96 or 128"),
        ("RN50", 336, "takes 224 alone"),
        ("convnext_tiny", 250, "halves images five times: take 224 or 256"),
        ("ViT-B-16-SigLIP2", 300, "is there for 224, 256, 384, 512 alone"),
        ("swin_base_patch4_window7_224", 384, "is there for 224 alone"),
    ],
)
def test_a_size_that_a_tower_is_not_made_for_is_refused(name, size, reason):
    with pytest.raises(UserError, match=f"--model.image_size {size}: the image tower of {name} {reason}"):
        architectures.find(ModelSettings(name=name, pretrained="none", image_size=size))


# Text towers of Hugging Face's that open_clip's list has: small configurations, and pooler and projection of the list
TEXT_TOWERS = {
    "roberta-ViT-B-32": {
        "model_type": "roberta",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 90,
    },
    "xlm-roberta-base-ViT-B-32": {
        "model_type": "xlm-roberta",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 90,
    },
    "mt5-base-ViT-B-32": {
        "model_type": "mt5",
        "num_layers": 2,
        "d_model": 32,
        "num_heads": 2,
        "d_kv": 16,
        "d_ff": 64,
        "vocab_size": 64,
    },
    "nllb-clip-base": {
        "model_type": "m2m_100",
        "encoder_layers": 2,
        "decoder_layers": 1,
        "d_model": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 64,
        "max_position_embeddings": 90,
    },
}


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_a_text_tower_of_hugging_faces_trains_by_layers_and_its_export_is_the_model(name, tmp_path):
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(TEXT_TOWERS[name]))
    write_tokenizer(tmp_path / "words")
    cfg = open_clip.get_model_config(name)
    cfg["vision_cfg"] |= FAMILIES["ViT-B-32"] | {"image_size": 64}
    files = {"hf_model_name": str(tmp_path / "tower"), "hf_tokenizer_name": str(tmp_path / "words")}
    cfg["text_cfg"] |= files | {"context_length": 16}
    folder = write_model(tmp_path / "model", cfg | {"embed_dim": 32}, {})
    one = train_steps(presets.resolve("joint", "recommended", settings_of(folder) | {"model.checkpointing": True}))
    _, text, _ = split_towers(one.clip)
    depths = {depth: [n for n, at in text.depth.items() if at == depth] for depth in range(4)}
    assert text.blocks == 2 and all(depths.values())
    assert any("embed" in n or "shared" in n for n in depths[0]) and any("proj" in n for n in depths[3])
    export.write_export(one.clip, one.experiment, tmp_path / "export")
