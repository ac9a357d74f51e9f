"""Terms and weights: the sum is what its parts say, single views stay out, a term that is off costs nothing."""

import pytest
import torch
import torch.nn.functional as F

from clipfh.config.experiment import LOSS_TERMS, LossSettings
from clipfh.learn import losses, pairs
from clipfh.learn.objective import Objective
from clipfh.learn.terms import Labels

ITEM = torch.tensor([0, 0, 1, 1, 2, 2])
LABELS = Labels(
    item=ITEM,
    items=torch.tensor([0, 1, 2]),
    paired=torch.tensor([0, 1, 2, 3]),
    captioned=torch.tensor([0, 1, 2, 3]),
    caption=torch.tensor([0, 0, 1, 1]),
    captions=torch.tensor([4, 7]),
)
FEATURES = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
SCALE, BIAS = torch.tensor(2.0), torch.tensor([-5.0])


def test_total_is_the_weighted_sum_of_all_terms():
    loss = LossSettings(**{term: 0.5 + 0.1 * i for i, term in enumerate(LOSS_TERMS)})
    total, terms = Objective(loss, 16, 3, 2)(FEATURES, TEXT, SCALE, LABELS)
    assert list(terms) == list(LOSS_TERMS)
    assert total.item() == pytest.approx(sum(getattr(loss, name) * value.item() for name, value in terms.items()))


def test_single_views_and_items_without_prompt_stay_out():
    loss = LossSettings(supcon=1.0, supcon_curvature=0.1, triplet=1.0, infonce=1.0)
    _, terms = Objective(loss, 16, 3, 2)(FEATURES, TEXT, SCALE, LABELS)
    embedding, item = F.normalize(FEATURES[:4]), ITEM[:4]
    assert terms["supcon"] == losses.supcon(embedding, item, loss.supcon_temperature, curvature=0.1)
    assert terms["triplet"] == pairs.triplet(embedding, item, loss.triplet_margin)
    caption = torch.tensor([0, 0, 1, 1])
    assert terms["infonce"] == losses.infonce(embedding, item, F.normalize(TEXT), caption, SCALE.exp())


def test_a_batch_that_concerns_no_term_costs_nothing_and_does_not_stop():
    none = torch.zeros(0, dtype=torch.long)
    empty = Labels(ITEM, LABELS.items, none, none, none, none)
    objective = Objective(
        LossSettings(triplet=1.0, supcon=1.0, infonce=1.0, sigmoid=1.0), 16, 3, 2, model_has_bias=True
    )
    learned = [tensor.clone().requires_grad_() for tensor in (FEATURES, SCALE, BIAS)]
    total, _ = objective(learned[0], TEXT[:0], learned[1], empty, learned[2])
    total.backward()
    assert total.item() == 0 and objective.bounds(empty, SCALE, BIAS) == {}
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in learned)


def test_a_term_that_is_off_has_no_head_and_is_not_computed(monkeypatch):
    monkeypatch.setattr(pairs, "triplet", lambda *a: pytest.fail("triplet is off"))
    only = Objective(LossSettings(supcon=1.0), 16, 3, 2)
    assert list(only(FEATURES, None, SCALE, LABELS)[1]) == ["supcon"]
    assert not list(only.parameters()) and not list(only.buffers())


def test_bounds_are_the_loss_of_perfect_and_of_equal_embeddings():
    loss = LossSettings(ce=1.0, supcon=1.0, triplet=1.0, infonce=1.0, sigmoid=1.0, center=1.0)
    objective = Objective(loss, 16, 3, 2)
    bounds = objective.bounds(LABELS, SCALE)
    assert set(bounds) == {"ce", "triplet", "supcon", "infonce", "sigmoid"}
    assert bounds["triplet"] == (0.0, pytest.approx(0.15))
    assert bounds["supcon"].collapse == pytest.approx(torch.tensor(3.0).log().item())
    for floor, collapse in bounds.values():
        assert floor < collapse


@pytest.mark.parametrize("learn", [True, False])
def test_sigmoid_takes_the_models_scale_and_bias_or_begins_as_siglip_did(learn: bool):
    loss = LossSettings(sigmoid=1.0, learn_scale=learn)
    own, models = Objective(loss, 16, 3, 2), Objective(loss, 16, 3, 2, model_has_bias=True)
    embedding, item, caption = F.normalize(FEATURES[:4]), ITEM[:4], torch.tensor([0, 0, 1, 1])
    expected = [
        losses.sigmoid(embedding, item, F.normalize(TEXT), caption, scale, bias)
        for scale, bias in ((10.0, -10.0), (SCALE.exp(), BIAS))
    ]
    torch.testing.assert_close(own(FEATURES, TEXT, SCALE, LABELS)[0], expected[0])
    torch.testing.assert_close(models(FEATURES, TEXT, SCALE, LABELS, BIAS)[0], expected[1])
    assert [p.requires_grad for p in own.parameters()] == [learn, learn] and not list(models.parameters())


def test_centers_move_only_where_the_term_is_on():
    on, off = (Objective(LossSettings(supcon=1.0, center=weight), 16, 3, 2) for weight in (1e-3, 0.0))
    on.follow(FEATURES, LABELS, 0.5)
    off.follow(FEATURES, LABELS, 0.5)
    assert on.heads["center"].centers[:3].abs().sum() > 0 and not list(off.buffers())
