"""Rates by depth and tower, the schedule, and the average of the weights."""

import math
from dataclasses import replace

import pytest
import torch

from clipfh import UserError
from clipfh.config.experiment import SMALL_MODEL, LossSettings, ModelSettings, OptimizerSettings
from clipfh.learn import objective, optimizer
from clipfh.learn.optimizer import ExponentialMovingAverage
from clipfh.model import lora
from clipfh.model.architecture import load_open_clip
from clipfh.model.clip import build_model
from clipfh.model.layers import freeze

SMALL = ModelSettings(name=SMALL_MODEL, freeze_patch=False)
LOSS = LossSettings(ce=1.0)


def rates(optimizer_: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    """Rate and decay of each parameter, by its id."""
    return {id(p): (g["lr"], g["weight_decay"]) for g in optimizer_.param_groups for p in g["params"]}


def test_rates_by_depth_tower_and_head():
    clip, heads = build_model(SMALL), objective.Objective(LOSS, 128, 5, 2)
    freeze(clip, "joint", SMALL, learn_scale=True)
    settings = OptimizerSettings(lr=1.0, text_lr=0.1, head_lr=10.0, layer_decay=0.5, weight_decay=0.3)
    of = rates(optimizer.make_adamw(clip, heads, settings, torch.device("cpu")))
    found = {n: of[id(p)] for n, p in [*clip.named_parameters(), *heads.named_parameters()] if p.requires_grad}
    assert found["visual.proj"] == (1.0, 0.3)
    assert found["visual.transformer.resblocks.1.mlp.c_fc.weight"] == (0.5, 0.3)
    assert found["visual.transformer.resblocks.0.ln_1.weight"] == (0.5**2, 0.0)
    assert found["visual.conv1.weight"] == (0.5**3, 0.3)
    assert found["text_projection"] == (pytest.approx(0.1), 0.3)
    assert found["token_embedding.weight"] == (pytest.approx(0.1 * 0.5**3), 0.3)
    assert found["heads.ce.classifier"] == (10.0, 0.3) and found["heads.ce.neck.weight"] == (10.0, 0.0)
    assert len(found) == len(of)


def expected(name: str, ndim: int, settings: OptimizerSettings) -> tuple[float, float]:
    """Rate and decay of a weight of ViT-B/16, both of whose towers have twelve blocks, by its name."""
    parts = name.split(".")
    if "resblocks" in parts:
        below = 12 - int(parts[parts.index("resblocks") + 1])
    else:
        above = {"proj", "ln_post", "ln_final", "text_projection", "logit_scale"}
        below = 0 if above & set(parts) else 13
    tower = 1.0 if parts[0] == "visual" else settings.text_lr
    return settings.lr * tower * settings.layer_decay**below, settings.weight_decay if ndim > 1 else 0.0


@pytest.mark.parametrize("stage,most", [("image", 30), ("joint", 55)])
def test_weights_of_equal_rate_and_decay_are_one_group(stage: str, most: int):
    with torch.device("meta"):
        clip = load_open_clip().CLIP(**load_open_clip().get_model_config("ViT-B-16"), quick_gelu=True)
    freeze(clip, stage, ModelSettings(), learn_scale=stage == "joint")
    settings = OptimizerSettings(weight_decay=0.1)
    grouped = optimizer.make_adamw(clip, torch.nn.Module(), settings, torch.device("meta"))
    assert len(grouped.param_groups) <= most
    trained = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    of = rates(grouped)
    assert {name: of[id(p)] for name, p in trained.items()} == {
        name: pytest.approx(expected(name, p.ndim, settings)) for name, p in trained.items()
    }
    assert len(of) == len(trained)


def test_updates_of_low_rank_have_a_multiple_of_the_rate_of_their_weights():
    model = replace(SMALL, lora_rank=4)
    clip = build_model(model)
    freeze(clip, "joint", model, learn_scale=False)
    lora.adapt(clip, model)
    settings = OptimizerSettings(lr=1.0, text_lr=0.1, lora_lr=20.0, layer_decay=0.5, weight_decay=0.3)
    of = rates(optimizer.make_adamw(clip, torch.nn.Module(), settings, torch.device("cpu")))
    found = {name: of[id(p)] for name, p in clip.named_parameters() if p.requires_grad}
    assert found["visual.transformer.resblocks.1.attn.parametrizations.in_proj_weight.0.up"] == (10.0, 0.3)
    assert found["visual.parametrizations.proj.0.down"] == (20.0, 0.3)
    assert found["parametrizations.text_projection.0.up"] == (pytest.approx(2.0), 0.3)
    assert len(found) == len(of)


def test_the_state_of_an_optimizer_with_other_groups_is_refused_in_a_line():
    clip = build_model(SMALL)
    freeze(clip, "image", SMALL, learn_scale=False)
    grouped = optimizer.make_adamw(clip, torch.nn.Module(), OptimizerSettings(), torch.device("cpu"))
    singly = torch.optim.AdamW([{"params": [p]} for g in grouped.param_groups for p in g["params"]])
    with pytest.raises(UserError, match=r"--resume: .* groups of parameters.* --warm-start RUN$"):
        optimizer.load_state(grouped, singly.state_dict())
    optimizer.load_state(grouped, grouped.state_dict())


def test_warm_up_then_cosine_to_zero():
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=2.0)
    schedule = optimizer.cosine_schedule(sgd, steps=100, warmup=0.1)
    rates = []
    for _ in range(100):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(90)])
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.0)


def test_what_is_no_head_waits_and_then_has_a_schedule_of_its_own():
    alone = [optimizer.lr_factor(step, 80, 0.1) for step in range(80)]
    assert [optimizer.lr_factor(step, 100, 0.1, head_first=0.2) for step in range(100)] == [0.0] * 20 + alone
    head, rest = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    sgd = torch.optim.SGD([{"params": [head], "is_head": True}, {"params": [rest], "is_head": False}], lr=2.0)
    schedule = optimizer.cosine_schedule(sgd, 100, 0.1, 0.2)
    sgd.step()
    schedule.step()
    assert [group["lr"] for group in sgd.param_groups] == [pytest.approx(0.4), 0.0]


@pytest.mark.parametrize("steps,warmup,first", [(1, 0.0, 2.0), (1, 0.5, 2.0), (50, 0.0, 2.0), (50, 0.01, 2.0)])
def test_the_first_rate_is_never_nothing(steps: int, warmup: float, first: float):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    optimizer.cosine_schedule(sgd, steps, warmup)
    assert sgd.param_groups[0]["lr"] == pytest.approx(first)


def test_without_decay_the_average_is_the_model_and_no_copy_of_it():
    net = torch.nn.Linear(2, 1)
    average = ExponentialMovingAverage(net, decay=0.0)
    net.weight.data += 1.0
    average.update(0)
    with average.applied():
        assert all(average.weights[n].data_ptr() == p.data_ptr() for n, p in net.named_parameters())


def test_average_is_the_weighted_mean_and_applies_for_a_while():
    net = torch.nn.Linear(2, 1, bias=False)
    average = ExponentialMovingAverage(net, decay=0.5)
    values = [net.weight.detach().clone()]
    for step in range(12):
        net.weight.data += 1.0
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        values.append(decay * values[-1] + (1 - decay) * net.weight.detach())
    raw = net.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(net.weight.detach(), values[-1])
    torch.testing.assert_close(net.weight.detach(), raw)
