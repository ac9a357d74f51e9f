"""What an optimizer step of ViT-B/16 costs in Python, by that of an optimizer with a group for each weight.

The weights are as many as the model's and of one number each, so that next to nothing is computed: on a GPU what is
left here is the time in which it gets nothing to do.
"""

import time

import torch

from clipfh.config.experiment import ModelSettings, OptimizerSettings
from clipfh.learn import optimizer
from clipfh.model.architecture import load_open_clip
from clipfh.model.layers import freeze

STAGES = ("image", "joint")
STEPS, TURNS = 20, 20


def rows() -> list[dict]:
    """All measurements, as {name, value, target, ok}."""
    torch.set_num_threads(1)
    return [
        row(f"optimizer, {stage} stage: Python's time, by that of a group for each weight", share(stage), 0.6)
        for stage in STAGES
    ]


def share(stage: str) -> float:
    """Time of a step with our groups by that with a group for each weight. The two take turns, the best of each counts:
    what else the machine does is not ours."""
    ours = optimizer.make_adamw(tiny(stage), torch.nn.Module(), OptimizerSettings(), torch.device("cpu"))
    each = [{**group, "params": [p]} for group in ours.param_groups for p in group["params"]]
    singly = torch.optim.AdamW(each, fused=True)
    turns = [(timed(ours), timed(singly)) for _ in range(TURNS)]
    return min(a for a, _ in turns) / min(b for _, b in turns)


def tiny(stage: str) -> torch.nn.Module:
    """ViT-B/16 as a stage trains it, each weight shrunk to one number and with a gradient."""
    with torch.device("meta"):
        clip = load_open_clip().CLIP(**load_open_clip().get_model_config("ViT-B-16"), quick_gelu=True)
    freeze(clip, stage, ModelSettings(), learn_scale=stage == "joint")
    for module in clip.modules():
        for name, weight in module.named_parameters(recurse=False):
            small = torch.nn.Parameter(torch.zeros([1] * weight.ndim), requires_grad=weight.requires_grad)
            small.grad = torch.zeros_like(small) if weight.requires_grad else None
            setattr(module, name, small)
    return clip


def timed(each: torch.optim.Optimizer) -> float:
    begun = time.perf_counter()
    for _ in range(STEPS):
        each.step()
    return (time.perf_counter() - begun) / STEPS


def row(name: str, value: float, at_most: float) -> dict:
    return {"name": name, "value": round(value, 2), "target": at_most, "ok": value <= at_most}


if __name__ == "__main__":
    for found in rows():
        print(f"{found['name']:75} {found['value']:6} (target {found['target']:4}) {'ok' if found['ok'] else 'MISSED'}")
