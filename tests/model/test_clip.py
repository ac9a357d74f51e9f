"""Towers: names, weights, freezing, depth; the real loading code on small files in the real formats."""

import json
from dataclasses import asdict

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipfh import UserError
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model import devices, hub, onnx
from clipfh.model.architecture import architecture_name, find
from clipfh.model.clip import (
    build_model,
    get_architecture,
    get_preprocess,
    load_initial_model,
    load_tokenizer,
    load_weights,
)
from clipfh.model.devices import choose_device, precision_notes, resolve_precision
from clipfh.model.layers import freeze, split_towers
from clipfh.model.towers import Towers, embed_images, embed_texts

SMALL = ModelSettings(name=SMALL_MODEL, freeze_patch=False)


@pytest.mark.parametrize(
    "settings,name",
    [
        (ModelSettings(name="ViT-B/16"), "ViT-B-16-quickgelu"),
        (ModelSettings(name="RN50"), "RN50-quickgelu"),
        (ModelSettings(name="ViT-B/16", pretrained="laion2b_s34b_b88k"), "ViT-B-16"),
        (ModelSettings(name="ViT-B-16", pretrained="openai"), "ViT-B-16-quickgelu"),
        (ModelSettings(name="ViT-B-16"), "ViT-B-16"),
        (SMALL, "clipfh-small"),
    ],
)
def test_openai_names_mean_quickgelu(settings, name):
    assert architecture_name(settings) == name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_local_file_gives_its_weights(tmp_path, suffix):
    state = load_initial_model(SMALL, seed=1).state_dict()
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    loaded = load_initial_model(ModelSettings(name=SMALL_MODEL, pretrained=str(file)), seed=2)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings,message",
    [
        (ModelSettings(name="ViT-B/17"), "--model.name ViT-B/17: no such model, did you mean ViT-B-16"),
        (
            ModelSettings(name="ViT-B/16", pretrained="no.pt"),
            "--model.pretrained no.pt: no such file, nor a tag of ViT-B/16",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_line(settings, message):
    with pytest.raises(UserError) as error:
        load_initial_model(settings, 0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_model_is_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"visual.proj": torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match="does not hold weights of clipfh-small"):
        load_initial_model(ModelSettings(name=SMALL_MODEL, pretrained=str(file)), 0)


def test_weights_that_cannot_be_downloaded_name_the_remedy(monkeypatch):
    monkeypatch.setattr("socket.create_connection", lambda *a, **k: (_ for _ in ()).throw(OSError("unreachable")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"weights 'openai' of RN50 can't be downloaded .* --model.pretrained FILE"):
        load_initial_model(ModelSettings(name="RN50"), 0)


@pytest.mark.parametrize(
    "direct,environment",
    [
        (False, {"HTTPS_PROXY": "http://proxy:1"}),
        (True, {}),
        (True, {"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": "huggingface.co"}),
        (False, {"ALL_PROXY": "http://proxy:1"}),
    ],
)
def test_behind_a_proxy_the_hub_is_not_looked_for_directly(monkeypatch, direct, environment):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("socket.create_connection", lambda *a, **k: (_ for _ in ()).throw(OSError("unreachable")))
    hub.use_cache_without_network()
    from huggingface_hub import constants

    assert direct == constants.HF_HUB_OFFLINE


def test_random_weights_follow_the_seed():
    first, again, other = (
        load_initial_model(SMALL, seed).visual.transformer.resblocks[0].attn.in_proj_weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


class Stub(torch.nn.Module):
    """Stands for every architecture: next to no weights, and the size of its input."""

    def __init__(self, **parts) -> None:
        super().__init__()
        self.visual = torch.nn.Linear(1, 1)
        self.visual.image_size = parts["vision_cfg"].get("image_size", 224)


@pytest.fixture
def nothing_is_large(monkeypatch):
    """open_clip's own factory, all of it, but for the download and the weights."""
    for name in ("CLIP", "CustomTextCLIP", "CoCa"):
        monkeypatch.setattr(f"open_clip.factory.{name}", Stub)
    monkeypatch.setattr("open_clip.download_pretrained", lambda *args, **kwargs: "downloaded")
    monkeypatch.setattr("open_clip.load_checkpoint", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "use_cache_without_network", lambda: None)


def preprocessings(settings) -> list[dict]:
    """As zero-shot, training, a checkpoint, the export's two files and the pixels of training have it."""
    zero_shot, built = load_initial_model(settings, 0), build_model(settings)
    loaded = load_weights(get_architecture(built), zero_shot.state_dict(), "a checkpoint")
    found = [asdict(get_preprocess(each)) for each in (zero_shot, built, loaded)]
    exported = json.loads(get_architecture(loaded).to_open_clip())
    size = exported["model_cfg"]["vision_cfg"].get("image_size", 224)
    processor = onnx.describe_preprocessing(get_preprocess(loaded))
    towers = {key: tuple(getattr(Towers(built), key).double().flatten().tolist()) for key in ("mean", "std")}
    return [
        *found,
        {"size": size, **exported["preprocess_cfg"]},
        found[0] | {"mean": processor["image_mean"], "std": processor["image_std"]},
        found[0] | towers,
    ]


def test_every_tag_has_one_preprocessing_from_zero_shot_to_export(nothing_is_large):
    different, pairs = [], open_clip.list_pretrained()
    for name, tag in pairs:
        cfg = asdict(open_clip.transform.PreprocessCfg()) | open_clip.get_pretrained_cfg(name, tag)
        words = {key: cfg[key] for key in ("interpolation", "resize_mode")}
        for found in preprocessings(ModelSettings(name=name, pretrained=tag)):
            same = all(found[key] == pytest.approx(cfg[key], abs=1e-6) for key in ("mean", "std"))
            size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
            if not same or found["size"] != size or found != found | words:
                different.append(f"{name} {tag}")
    assert len(pairs) >= 196 and not different, f"{len({*different})} of {len(pairs)} tags differ: {different}"


def test_towers_see_what_open_clip_sees():
    clip = load_initial_model(SMALL, 0)
    images = torch.randint(0, 255, (4, 96, 96, 3), dtype=torch.uint8)
    preprocess = get_preprocess(clip)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    expected = clip.encode_image(pixels, normalize=True)
    ours = embed_images(Towers(clip), images.numpy(), torch.float32, batch=3)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "RN50-quickgelu", "clipfh-small"])
def test_depth_rises_from_stem_to_head(name):
    with torch.device("meta"):
        clip = open_clip.create_model(name, device="meta")
    image, _, _ = split_towers(clip)
    blocks, depths = image.blocks, image.depth.values()
    assert blocks == {"ViT-B-32-quickgelu": 12, "RN50-quickgelu": 4, "clipfh-small": 2}[name]
    assert set(depths) == set(range(blocks + 2))


def test_freezing_by_stage_and_setting():
    clip = build_model(SMALL)
    freeze(clip, "image", ModelSettings(name=SMALL_MODEL, freeze_patch=True, freeze_blocks=1), learn_scale=True)
    trained = {name for name, p in clip.named_parameters() if p.requires_grad}
    assert all(name.startswith("visual.") for name in trained), "the image stage leaves text tower and scale alone"
    assert not any("resblocks.0." in n or "conv1" in n for n in trained)
    assert any("resblocks.1." in n for n in trained)
    freeze(clip, "joint", SMALL, learn_scale=True)
    assert all(p.requires_grad for p in clip.parameters())
    with pytest.raises(UserError, match="freeze_blocks 9: clipfh-small has 2 blocks"):
        freeze(clip, "image", ModelSettings(name=SMALL_MODEL, freeze_blocks=9), learn_scale=True)


def test_batch_norm_stays_in_eval_mode():
    clip = open_clip.create_model("RN50-quickgelu", device="meta")
    towers = Towers.__new__(Towers)
    torch.nn.Module.__init__(towers)
    towers.clip = clip
    towers.train()
    norms = [m for m in towers.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and towers.training


def test_a_resnets_weights_lie_as_its_images_do():
    """Else a GPU turns each of them in every pass."""
    clip = open_clip.create_model("RN50-quickgelu", device="meta")
    Towers(clip)
    kernels = [p for p in clip.visual.parameters() if p.ndim == 4]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@pytest.mark.parametrize(
    "setting,device,expected",
    [("auto", "cpu", torch.float32), ("float32", "cuda", torch.float32), ("bfloat16", "cpu", torch.bfloat16)],
)
def test_precision(setting, device, expected):
    assert resolve_precision(setting, torch.device(device)) == expected


def test_auto_precision_asks_the_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda on: "Tesla T4")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        # A T4 has no bfloat16, but emulates it several times slower than it computes in float32
        monkeypatch.setattr(
            "torch.cuda.is_bf16_supported", lambda including_emulation=True, h=has: h or including_emulation
        )
        assert resolve_precision("auto", gpu) == expected
        assert bool(precision_notes("auto", gpu)) == (not has), "and people are told"
    assert "Tesla T4" in precision_notes("auto", gpu)[0]
    assert not precision_notes("float32", gpu) and not precision_notes("auto", torch.device("cpu"))


def test_who_was_given_no_gpu_computes_on_the_cpu_whatever_torch_sees(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(devices, "_gpu_trouble", lambda: "")
    assert choose_device(0) == torch.device("cpu")
    assert choose_device(0.5) == choose_device(None) == torch.device("cuda", 0)


def test_a_gpu_that_torch_cant_compute_on_is_refused_with_torchs_reason(monkeypatch):
    old = "The NVIDIA driver on your system is too old (found version 12040)."

    def ones(*size, device):
        raise RuntimeError(old)

    monkeypatch.setattr("torch.ones", ones)
    with pytest.raises(UserError, match=r"too old \(found version 12040\).*driver 580"):
        choose_device(1)
    assert choose_device(None) == torch.device("cpu"), "nobody gave one: the CPU will do"


def test_float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    choose_device(0)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("training", [True, False])
def test_no_pass_has_dropout_and_embedding_leaves_the_mode_as_it_was(training: bool):
    """Text towers of Hugging Face's have dropout. Masks would differ between workers, chunks and restarts."""
    clip = load_initial_model(ModelSettings(name=SMALL_MODEL), 0)
    for block in clip.transformer.resblocks:
        block.mlp.append(torch.nn.Dropout(0.5))
    towers = Towers(clip).train(training)
    tokens = load_tokenizer(find(ModelSettings(name=SMALL_MODEL)))(["a red dress"])
    first, again = (embed_texts(towers, tokens, torch.float32) for _ in range(2))
    embed_images(towers, torch.zeros(1, 96, 96, 3, dtype=torch.uint8).numpy(), torch.float32)
    assert torch.equal(first, again) and towers.training == training
    passes = [towers(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), tokens)[1] for _ in range(2)]
    assert torch.equal(*passes) and passes[0].requires_grad
