"""Rates by depth and tower, the schedule, and the average of the weights."""

import math

import pytest
import torch

from clipfh import config, model, objective, optimizer

SMALL = config.Model(name=config.SMALL, freeze_patch=False)
LOSS = config.Loss(ce=1.0)


def test_rates_by_depth_tower_and_head():
    clip, heads = model.build(SMALL), objective.Objective(LOSS, 128, 5)
    model.freeze(clip, "joint", SMALL, learn_scale=True)
    settings = config.Optimizer(lr=1.0, text_lr=0.1, head_lr=10.0, layer_decay=0.5, weight_decay=0.3)
    groups = optimizer.adamw(clip, heads, settings, torch.device("cpu")).param_groups
    name_of = {id(p): n for n, p in [*clip.named_parameters(), *heads.named_parameters()]}
    found = {name_of[id(g["params"][0])]: (g["lr"], g["weight_decay"]) for g in groups}
    assert found["visual.proj"] == (1.0, 0.3)
    assert found["visual.transformer.resblocks.3.mlp.c_fc.weight"] == (0.5, 0.3)
    assert found["visual.transformer.resblocks.0.ln_1.weight"] == (0.5**4, 0.0)
    assert found["visual.conv1.weight"] == (0.5**5, 0.3)
    assert found["text_projection"] == (pytest.approx(0.1), 0.3)
    assert found["token_embedding.weight"] == (pytest.approx(0.1 * 0.5**3), 0.3)
    assert found["classifier"] == (10.0, 0.3) and found["neck.weight"] == (10.0, 0.0)
    assert len(found) == sum(p.requires_grad for p in [*clip.parameters(), *heads.parameters()])


def test_warm_up_then_cosine_to_zero():
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=2.0)
    schedule = optimizer.schedule(sgd, steps=100, warmup=0.1)
    rates = []
    for _ in range(100):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(90)])
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("steps,warmup,first", [(1, 0.0, 2.0), (1, 0.5, 2.0), (50, 0.0, 2.0), (50, 0.01, 2.0)])
def test_the_first_rate_is_never_nothing(steps: int, warmup: float, first: float):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    optimizer.schedule(sgd, steps, warmup)
    assert sgd.param_groups[0]["lr"] == pytest.approx(first)


def test_average_is_the_weighted_mean_and_applies_for_a_while():
    net = torch.nn.Linear(2, 1, bias=False)
    average = optimizer.Average(net, decay=0.5)
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
