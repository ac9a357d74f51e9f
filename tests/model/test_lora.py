"""LoRA on each kind of tower: an update of nothing at first, the only thing that learns, and gone once it is merged."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipfh import UserError
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model import lora
from clipfh.model.clip import build_model, get_architecture, load_weights
from clipfh.model.layers import freeze

RANK = 4
TIMM = {
    "embed_dim": 192,  # the tower's own width: it has no projection
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def model(kind: str) -> torch.nn.Module:
    """A small model whose towers are of a kind."""
    torch.manual_seed(0)
    if kind == "fused":
        return build_model(ModelSettings(name=SMALL_MODEL))
    if kind == "timm":
        return open_clip.model.CustomTextCLIP(**TIMM)
    clip = open_clip.model.CLIP(**RESNET)
    for block in clip.visual.modules():
        if hasattr(block, "bn3"):
            torch.nn.init.ones_(block.bn3.weight)  # it begins as 0, so that no gradient comes through
    return clip


def settings(**changed) -> ModelSettings:
    return ModelSettings(name=SMALL_MODEL, **{"lora_rank": RANK, **changed})


def adapted(kind: str = "fused", stage: str = "joint", **changed) -> torch.nn.Module:
    clip = model(kind)
    freeze(clip, stage, settings(**changed), learn_scale=False)
    lora.adapt(clip, settings(**changed))
    return clip.eval()


def features(clip: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (64, 64) if isinstance(clip.visual.image_size, int) else clip.visual.image_size
    images = torch.randn(3, 3, *size, generator=generator)
    tokens = torch.randint(1, 40000, (3, 77), generator=generator)
    return clip.encode_image(images), clip.encode_text(tokens)


def moved(clip: torch.nn.Module) -> torch.nn.Module:
    """The model with updates as large as those of training."""
    for module in clip.modules():
        if isinstance(module, lora.LowRank):
            torch.nn.init.normal_(module.up, std=0.01)
    return clip


KINDS = ["fused", "timm", "resnet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_only_updates_learn_and_all_of_them_do(kind: str, targets: str):
    if (kind, targets) == ("resnet", "mlp"):
        pytest.skip("its image tower has none")
    clip = adapted(kind, lora_targets=targets).train()
    learned = {name for name, p in clip.named_parameters() if p.requires_grad}
    assert learned and all(lora.is_factor(name) and not name.endswith("original") for name in learned)
    assert any(name.startswith("visual.") for name in learned)
    for _ in range(2):  # at first `up` is 0, and `down` gets no gradient from it
        clip.zero_grad()
        sum(f.square().sum() for f in features(clip)).backward()
        assert {name for name, p in clip.named_parameters() if p.grad is not None} == learned
        moved(clip)
    assert all(p.grad.abs().sum() > 0 for name, p in clip.named_parameters() if name in learned)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_model_and_ends_as_a_plain_one(kind: str):
    plain, clip = model(kind).eval(), adapted(kind)
    with torch.no_grad():
        before = plain.state_dict()
        assert all(torch.equal(weight, before[name]) for name, weight in lora.merged_state(clip).items())
        for got, wanted in zip(features(clip), features(plain), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        expected = features(moved(clip))
        assert max((a - b).abs().max() for a, b in zip(expected, features(plain), strict=True)) > 1e-3
        state = lora.merged_state(clip)
        assert state.keys() == plain.state_dict().keys()
        plain.load_state_dict(state)
        for got, wanted in zip(features(plain), expected, strict=True):
            torch.testing.assert_close(F.normalize(got), F.normalize(wanted), rtol=0, atol=1e-5)


def test_an_update_is_that_of_the_paper():
    clip = moved(adapted(lora_targets="attention"))
    attention = clip.visual.transformer.resblocks[0].attn
    (update,) = attention.parametrizations.in_proj_weight
    before = model("fused").visual.transformer.resblocks[0].attn.in_proj_weight
    expected = before + lora.ALPHA / RANK * (update.up @ update.down)
    torch.testing.assert_close(attention.in_proj_weight, expected)
    assert update.up.shape == (3 * 160, RANK) and update.down.shape == (RANK, 160)


def test_targets_by_tower_stage_and_what_is_frozen():
    def names(stage: str, **changed) -> set[str]:
        clip = model("fused")
        freeze(clip, stage, settings(**changed), learn_scale=False)
        return {target.name for target in lora.find_targets(clip, settings(**changed))}

    image, both = names("image"), names("joint")
    assert all(name.startswith("visual.") for name in image) and image < both
    assert both - image >= {"text_projection", "transformer.resblocks.0.attn.in_proj_weight"}
    block = "visual.transformer.resblocks.{}."
    attention = {block.format(i) + leaf for i in range(2) for leaf in ("attn.in_proj_weight", "attn.out_proj.weight")}
    weights = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    pooler = {f"visual.attn_pool.attn.{leaf}" for leaf in weights}
    mlp = {block.format(i) + leaf for i in range(2) for leaf in ("mlp.c_fc.weight", "mlp.c_proj.weight")}
    assert names("image", lora_targets="attention") == attention | pooler and names("image", lora_targets="mlp") == mlp
    assert image == attention | pooler | mlp | {"visual.proj"}
    assert names("image", freeze_blocks=1) == {n for n in image if ".resblocks." not in n or ".resblocks.1." in n}


@pytest.mark.parametrize("changed", [{"freeze_blocks": 2, "lora_targets": "mlp"}, {"lora_rank": 640}])
def test_nothing_to_adapt_is_one_line_with_a_remedy(changed: dict):
    with pytest.raises(UserError, match=r"--model.lora_rank \d+: the image tower of clipfh-small .* smaller rank$"):
        adapted(**changed)


def test_the_number_of_trained_parameters_is_known_before_the_model_is_adapted():
    clip = model("fused")
    freeze(clip, "joint", settings(), learn_scale=True)
    before, total = lora.count_trained(clip, settings()), sum(p.numel() for p in clip.parameters())
    lora.adapt(clip, settings())
    assert before == sum(p.numel() for p in clip.parameters() if p.requires_grad)
    assert lora.count_factors(clip) == before - 1 == sum(p.numel() for p in clip.parameters()) - total


def test_merged_weights_are_loaded_as_those_of_any_model():
    clip = moved(adapted())
    with torch.no_grad():
        loaded = load_weights(get_architecture(clip), lora.merged_state(clip), "a run").eval()
        torch.testing.assert_close(features(loaded)[0], features(clip)[0])
