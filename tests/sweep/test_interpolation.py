"""Averages and mixes of weights, against torch's own and a slow loop."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model import lora
from clipfh.model.clip import build_model, get_architecture, load_weights
from clipfh.sweep.interpolation import average, interpolate


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    return build_model(ModelSettings(name=SMALL_MODEL))


def moved(model: nn.Module, seed: int) -> nn.Module:
    """The model, each parameter a little elsewhere."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return other


def test_an_average_is_torchs_own_and_that_of_a_slow_loop(start):
    models = [moved(start, seed) for seed in range(5)]
    ours = average([model.state_dict() for model in models])
    theirs = AveragedModel(models[0])
    for model in models:
        theirs.update_parameters(model)
    for name, tensor in theirs.module.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    name = "visual.proj"
    for place in range(0, ours[name].numel(), 997):
        values = [model.state_dict()[name].flatten()[place].item() for model in models]
        assert ours[name].flatten()[place].item() == torch.tensor(sum(values) / 5, dtype=torch.float32).item()


def test_an_average_does_not_depend_on_the_order_and_of_equal_models_is_that_model(start):
    states = [moved(start, seed).state_dict() for seed in range(3)]
    forth, back = average(states), average(states[::-1])
    assert all(torch.equal(forth[name], back[name]) for name in forth)
    same = average([states[0]] * 3)
    assert all(torch.equal(same[name], states[0][name]) for name in same)


def test_a_mix_goes_straight_from_the_start_to_the_tuned_model(start):
    before, after = start.state_dict(), moved(start, 1).state_dict()
    for share in (0.0, 0.3, 1.0):
        mixed = interpolate(before, after, share)
        for name, tensor in mixed.items():
            expected = (1 - share) * before[name].double() + share * after[name].double()
            assert torch.equal(tensor, expected.to(tensor.dtype)) or (tensor - expected).abs().max() < 1e-7
    assert all(torch.equal(tensor, before[name]) for name, tensor in interpolate(before, after, 0.0).items())


def test_lora_runs_are_averaged_by_the_weights_that_they_come_to(start):
    """The mean of merged weights, which is not the weight of mean factors."""
    merged = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        clip = copy.deepcopy(start)
        settings = ModelSettings(name=SMALL_MODEL, lora_rank=4, lora_targets="mlp")
        lora.adapt(clip, settings)
        for module in clip.modules():
            if isinstance(module, lora.LowRank):
                module.up.data.normal_()
        merged.append(lora.merged_state(clip))
    soup = average([*merged, start.state_dict()])
    name = next(name for name in soup if "mlp.c_fc.weight" in name)
    updates = [state[name] - start.state_dict()[name] for state in merged]
    assert updates[0].abs().max() > 0
    torch.testing.assert_close(soup[name], start.state_dict()[name] + (updates[0] + updates[1]) / 3)
    assert load_weights(get_architecture(start), soup, "a soup")


def test_what_has_no_mean_is_refused():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    other = moved(first, 1)
    assert average([first.state_dict(), other.state_dict()])["1.num_batches_tracked"] == 0
    other(torch.randn(8, 3))
    with pytest.raises(ValueError, match="1.running_mean differs, and has no mean"):
        average([first.state_dict(), other.state_dict()])
    with pytest.raises(ValueError, match="different architectures"):
        interpolate(nn.Linear(3, 3).state_dict(), nn.Linear(3, 4).state_dict(), 0.5)
