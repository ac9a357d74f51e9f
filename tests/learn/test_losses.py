"""Each loss against an independent reference, in value and gradient, on batches of every shape."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning import losses as pml

from clipfh.learn import losses

torch.set_num_threads(1)
temperatures = st.floats(-4, 1).map(lambda exponent: 10**exponent)
margins = st.none() | st.floats(0, 1)


@dataclass
class Batch:
    """Leaves `image_BD` and `caption_CD` are float64, not normalised, and want gradients."""

    image_BD: torch.Tensor
    item_B: torch.Tensor
    caption_CD: torch.Tensor
    caption_B: torch.Tensor
    num_items: int
    seed: int

    def embeddings(self):
        return F.normalize(self.image_BD, dim=1), F.normalize(self.caption_CD, dim=1)

    def gradients(self, loss):
        wanted = (self.image_BD, self.caption_CD)
        return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)


@st.composite
def batches(draw, duplicates=False):
    """Items with 1 to 4 views each, in any order, perhaps only one item; captions by item, shared by items, or by view.
    With `duplicates`, some images are copies of others, of their own item or of another."""
    views_P = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    num_images, dimension = sum(views_P), draw(st.integers(2, 6))
    item_B = torch.repeat_interleave(torch.arange(len(views_P)), torch.tensor(views_P))
    item_B = item_B[torch.randperm(num_images, generator=generator)]
    by_view = torch.randint(0, num_images, (num_images,), generator=generator)
    caption_B = draw(st.sampled_from([item_B, item_B // 2, by_view])).unique(return_inverse=True)[1]
    image_BD = torch.randn(num_images, dimension, generator=generator, dtype=torch.float64)
    if duplicates:
        image_BD = image_BD[torch.randint(0, num_images, (num_images,), generator=generator)]
    caption_CD = torch.randn(int(caption_B.max()) + 1, dimension, generator=generator, dtype=torch.float64)
    return Batch(image_BD.requires_grad_(), item_B, caption_CD.requires_grad_(), caption_B, len(views_P), seed)


def assert_same(batch, ours, reference):
    """Equal in value and in gradient, to 1e-6 of the larger."""
    assert torch.isfinite(ours)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(batch.gradients(ours), batch.gradients(reference), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def contrastive_by_loops(anchors, others, positives, candidates, scale, zero):
    """Mean over anchors that have positives; `positives` and `candidates` take an anchor's and another's number."""
    terms = []
    for a, anchor in enumerate(anchors):
        logits = {n: scale * (anchor @ other) for n, other in enumerate(others) if candidates(a, n)}
        if mine := [logits[n] for n in logits if positives(a, n)]:
            normaliser = torch.stack(list(logits.values())).logsumexp(0)
            terms.append(sum(normaliser - logit for logit in mine) / len(mine))
    return sum(terms, start=zero) / max(len(terms), 1)


def carrying_items(batch, caption):
    return {int(i) for i, c in zip(batch.item_B, batch.caption_B, strict=True) if c == caption}


@settings(deadline=None)
@given(batches(), temperatures)
def test_supcon_of_images(batch, temperature):
    image_BD, _ = batch.embeddings()
    ours = losses.supcon(image_BD, batch.item_B, temperature)
    item = batch.item_B.tolist()
    reference = contrastive_by_loops(
        image_BD, image_BD, lambda a, n: item[a] == item[n], lambda a, n: a != n, 1 / temperature, 0 * image_BD.sum()
    )
    assert_same(batch, ours, reference)


@settings(deadline=None)
@given(batches(), st.floats(0.2, 1))
def test_supcon_of_images_agrees_with_pytorch_metric_learning(batch, temperature):
    image_BD, _ = batch.embeddings()
    if len(set(batch.item_B.tolist())) > 1:  # it takes the loss of one item alone as 0
        reference = pml.SupConLoss(temperature)(image_BD, batch.item_B)
        assert_same(batch, losses.supcon(image_BD, batch.item_B, temperature), reference)


@settings(deadline=None)
@given(batches(duplicates=True), temperatures)
def test_supcon_of_images_and_captions(batch, temperature):
    image_BD, caption_CD = batch.embeddings()
    ours = losses.supcon(image_BD, batch.item_B, temperature, caption_CD, batch.caption_B)
    node_ND = torch.cat([image_BD, caption_CD])
    items_N = [{i} for i in batch.item_B.tolist()] + [carrying_items(batch, c) for c in range(len(caption_CD))]
    is_caption = [n >= len(image_BD) for n in range(len(node_ND))]

    def candidates(a, n):
        return a != n and not (is_caption[a] and is_caption[n] and items_N[a] & items_N[n])

    reference = contrastive_by_loops(
        node_ND, node_ND, lambda a, n: items_N[a] & items_N[n], candidates, 1 / temperature, 0 * node_ND.sum()
    )
    assert_same(batch, ours, reference)


@settings(deadline=None)
@given(batches(duplicates=True), temperatures)
def test_infonce(batch, temperature):
    image_BD, caption_CD = batch.embeddings()
    log_scale = torch.tensor(-math.log(temperature), dtype=torch.float64, requires_grad=True)
    ours = losses.infonce(image_BD, batch.item_B, caption_CD, batch.caption_B, log_scale.exp())
    item = batch.item_B.tolist()
    carrying = [carrying_items(batch, c) for c in range(len(caption_CD))]
    to_caption = contrastive_by_loops(
        image_BD, caption_CD, lambda b, c: item[b] in carrying[c], lambda b, c: True, log_scale.exp(), 0.0
    )
    to_image = contrastive_by_loops(
        caption_CD, image_BD, lambda c, b: item[b] in carrying[c], lambda c, b: True, log_scale.exp(), 0.0
    )
    reference = (to_caption + to_image) / 2
    assert_same(batch, ours, reference)
    got, wanted = (torch.autograd.grad(loss, log_scale, retain_graph=True)[0] for loss in (ours, reference))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(batches(duplicates=True), temperatures, st.floats(-20, 5))
def test_sigmoid(batch, temperature, bias):
    image_BD, caption_CD = batch.embeddings()
    learned = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1 / temperature, bias)]
    ours = losses.sigmoid(image_BD, batch.item_B, caption_CD, batch.caption_B, *learned)
    reference = 0.0
    for image, item in zip(image_BD, batch.item_B.tolist(), strict=True):
        for c, caption in enumerate(caption_CD):
            belongs = item in carrying_items(batch, c)
            logit = learned[0] * (image @ caption) + learned[1]
            reference -= F.logsigmoid(logit if belongs else -logit) / len(image_BD)
    assert_same(batch, ours, reference)
    for got, wanted in zip(*(torch.autograd.grad(each, learned) for each in (ours, reference)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**32), st.floats(1, 200), st.floats(-20, 0))
def test_sigmoid_of_one_prompt_an_image_is_that_of_open_clip(count, seed, scale, bias):
    generator = torch.Generator().manual_seed(seed)
    image_BD, text_BD = (F.normalize(torch.randn(count, 5, generator=generator), dim=1) for _ in range(2))
    ours = losses.sigmoid(image_BD, torch.arange(count), text_BD, torch.arange(count), scale, bias)
    torch.testing.assert_close(ours, SigLipLoss()(image_BD, text_BD, scale, bias))


def test_captions_of_one_item_are_no_negatives_of_each_other_or_of_its_images():
    """Item 7 has two captions, one a view; item 9 has one. Whatever is not positive is at right angles."""
    item_B, caption_B = torch.tensor([7, 7, 9, 9]), torch.tensor([0, 1, 2, 2])
    image_BD, caption_CD = torch.eye(2)[[0, 0, 1, 1]], torch.eye(2)[[0, 0, 1]]
    joint = losses.supcon(image_BD, item_B, 1e-4, caption_CD, caption_B)
    assert joint.item() == pytest.approx((2 * math.log(3) + 2 * math.log(2) + 3 * math.log(2)) / 7)
    cross = losses.infonce(image_BD, item_B, caption_CD, caption_B, 1e4)
    assert cross.item() == pytest.approx(((2 * math.log(2) + 2 * math.log(1)) / 4 + math.log(2)) / 2)


@settings(deadline=None)
@given(batches(), margins)
def test_triplet_agrees_with_pytorch_metric_learning(batch, margin):
    image_BD, _ = batch.embeddings()
    distance = distances.LpDistance()
    triples = miners.BatchHardMiner(distance=distance)(image_BD, batch.item_B)
    loss = pml.TripletMarginLoss(
        margin or 0.0, smooth_loss=margin is None, distance=distance, reducer=reducers.MeanReducer()
    )
    assert_same(batch, losses.triplet(image_BD, batch.item_B, margin), loss(image_BD, batch.item_B, triples))


@settings(deadline=None)
@given(batches(duplicates=True), margins)
def test_triplet_with_duplicates(batch, margin):
    image_BD, _ = batch.embeddings()
    distance_BB = torch.cdist(image_BD, image_BD, compute_mode="donot_use_mm_for_euclid_dist").tolist()
    item, terms = batch.item_B.tolist(), []
    for a, distance_B in enumerate(distance_BB):
        positives = [distance for b, distance in enumerate(distance_B) if item[b] == item[a] and b != a]
        negatives = [distance for b, distance in enumerate(distance_B) if item[b] != item[a]]
        if positives and negatives:
            violation = max(positives) - min(negatives)
            terms.append(math.log1p(math.exp(violation)) if margin is None else max(violation + margin, 0.0))
    ours = losses.triplet(image_BD, batch.item_B, margin)
    assert ours.item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-6, abs=1e-6)
    assert all(gradient.isfinite().all() for gradient in batch.gradients(ours))


@settings(deadline=None)
@given(batches(duplicates=True), st.floats(1, 1e4), st.floats(0, 0.5), st.floats(0, 0.3))
def test_cross_entropy(batch, scale, margin, smoothing):
    generator = torch.Generator().manual_seed(batch.seed)
    weight_ID = torch.randn(batch.num_items, batch.image_BD.shape[1], generator=generator, dtype=torch.float64)
    image_BD, _ = batch.embeddings()
    cosine_BI = image_BD @ F.normalize(weight_ID, dim=1).T
    ours = losses.cross_entropy(cosine_BI, batch.item_B, scale, margin, smoothing)
    reference = 0.0
    for cosine_I, item in zip(cosine_BI, batch.item_B.tolist(), strict=True):
        logit_I = torch.stack([scale * (c - margin * (i == item)) for i, c in enumerate(cosine_I)])
        surprise_I = logit_I.logsumexp(0) - logit_I
        reference += ((1 - smoothing) * surprise_I[item] + smoothing * surprise_I.mean()) / len(cosine_BI)
    assert_same(batch, ours, reference)
    cosface = pml.CosFaceLoss(batch.num_items, image_BD.shape[1], margin=margin, scale=scale)
    cosface.W.data = weight_ID.T
    assert_same(
        batch, losses.cross_entropy(cosine_BI, batch.item_B, scale, margin, 0.0), cosface(image_BD, batch.item_B)
    )


@settings(deadline=None)
@given(batches(duplicates=True), st.floats(1e-3, 1e3))
def test_center_and_its_step(batch, norm):
    feature_BD = norm * batch.image_BD
    centers_ID = torch.randn(batch.num_items + 1, feature_BD.shape[1], dtype=torch.float64)
    rows = list(zip(feature_BD, batch.item_B.tolist(), strict=True))
    reference = sum(((feature - centers_ID[item]) ** 2).sum() / 2 for feature, item in rows) / len(rows)
    assert_same(batch, losses.center(feature_BD, batch.item_B, centers_ID), reference)

    moved_ID = centers_ID.clone()
    losses.move_centers(moved_ID, feature_BD, batch.item_B, batch.item_B.unique(), 0.5)
    for item, center in enumerate(centers_ID):
        pulls = [center - feature for feature, i in rows if i == item]
        expected = center - 0.5 * sum(pulls, start=torch.zeros_like(center)) / (1 + len(pulls))
        torch.testing.assert_close(moved_ID[item], expected.detach())


def all_terms(image_BD, item_B, caption_CD, caption_B):
    """Every loss at extreme scales. The embeddings' own coordinates serve as cosines and as centers."""
    cosine_BI = image_BD.repeat(1, int(item_B.max()) + 1)
    return {
        "supcon": losses.supcon(image_BD, item_B, 1e-3),
        "joint": losses.supcon(image_BD, item_B, 1e-3, caption_CD, caption_B),
        "infonce": losses.infonce(image_BD, item_B, caption_CD, caption_B, 1e3),
        "sigmoid": losses.sigmoid(image_BD, item_B, caption_CD, caption_B, 1e3, -10.0),
        "triplet": losses.triplet(image_BD, item_B, 0.2),
        "soft": losses.triplet(image_BD, item_B, None),
        "center": losses.center(image_BD, item_B, image_BD.flip(0)),
        "multi_positive": losses.multi_positive(64 * image_BD, image_BD > 0),
        "cross_entropy": losses.cross_entropy(cosine_BI, item_B, 64.0, 0.4, 0.1),
    }


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float16, False), (torch.bfloat16, True)])
@settings(deadline=None, max_examples=50)
@given(batch=batches(duplicates=True))
def test_half_precision_inputs_and_autocast_cost_no_precision(dtype, autocast, batch):
    image_BD, caption_CD = (embedding.to(dtype) for embedding in batch.embeddings())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = all_terms(image_BD, batch.item_B, caption_CD, batch.caption_B)
    wanted = all_terms(image_BD.double(), batch.item_B, caption_CD.double(), batch.caption_B)
    for name, value in got.items():
        torch.testing.assert_close(
            value, wanted[name].float(), rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert all(gradient.isfinite().all() for gradient in batch.gradients(value)), name


def test_no_valid_anchor_gives_zero_with_a_gradient():
    image_BD = F.normalize(torch.randn(4, 3), dim=1).requires_grad_()
    alone_B, one_item_B = torch.arange(4), torch.zeros(4, dtype=torch.long)
    no_candidate = torch.zeros(4, 4, dtype=torch.bool)
    for loss in (
        losses.supcon(image_BD, alone_B, 0.1),
        losses.triplet(image_BD, alone_B, 0.3),
        losses.triplet(image_BD, one_item_B, None),
        losses.multi_positive(image_BD @ image_BD.T, ~no_candidate, no_candidate),
    ):
        assert loss == 0
        assert torch.equal(*torch.autograd.grad(loss, image_BD), torch.zeros(4, 3))


P, K, I = 8, 4, 50
B = P * K
ITEM_B = torch.arange(P).repeat_interleave(K) * 5
CAPTION_B = torch.arange(P).repeat_interleave(K)


def test_bounds_of_image_losses():
    temperature, scale, margin = 0.5, 8.0, 0.25
    supcon = losses.bounds(lambda e: losses.supcon(e, ITEM_B, temperature), ITEM_B)
    assert supcon == pytest.approx((math.log(K - 1 + (B - K) * math.exp(-1 / temperature)), math.log(B - 1)))
    hinge = losses.bounds(lambda e: losses.triplet(e, ITEM_B, 0.3), ITEM_B)
    assert hinge == pytest.approx((0, 0.3))
    soft = losses.bounds(lambda e: losses.triplet(e, ITEM_B, None), ITEM_B)
    assert soft == pytest.approx((math.log1p(math.exp(-math.sqrt(2))), math.log(2)))
    margin_softmax = losses.bounds(lambda e: losses.cross_entropy(e, ITEM_B, scale, margin, 0.0), ITEM_B, num_items=I)
    floor = math.log1p((I - 1) * math.exp(-scale * (1 - margin)))
    assert margin_softmax == pytest.approx((floor, math.log1p((I - 1) * math.exp(scale * margin))))


def test_bounds_of_image_and_caption_losses():
    """Identical captions count once, so the floor is that of K positives, not of K images and K copies of a caption."""
    joint = losses.bounds(lambda e, c: losses.supcon(e, ITEM_B, 0.01, c, CAPTION_B), ITEM_B, CAPTION_B)
    assert joint == pytest.approx((math.log(K), math.log(B + P - 1)))
    cross = losses.bounds(lambda e, c: losses.infonce(e, ITEM_B, c, CAPTION_B, 100.0), ITEM_B, CAPTION_B)
    assert cross == pytest.approx((math.log(K) / 2, (math.log(P) + math.log(B)) / 2))


@pytest.mark.parametrize(("scale", "bias"), [(117.0, -16.5), (10.0, -10.0), (14.3, -10.0)])
def test_bounds_of_sigmoid_where_equal_embeddings_lie_best(scale, bias):
    """With SigLIP2's scale and bias, with those it starts from, and with the scale of random weights."""
    floor, collapse = losses.sigmoid_bounds(ITEM_B, CAPTION_B, *map(torch.tensor, (scale, bias)))
    assert floor == pytest.approx(math.log1p(math.exp(-scale - bias)) + (P - 1) * math.log1p(math.exp(bias)), rel=1e-4)
    found = []
    for cosine in torch.linspace(-1, 1, 4001):
        image_BD, caption_PD = torch.eye(2)[[0] * B], torch.stack([cosine, (1 - cosine**2).sqrt()]).repeat(P, 1)
        found.append(losses.sigmoid(image_BD, ITEM_B, caption_PD, CAPTION_B, scale, bias).item())
    assert collapse == pytest.approx(min(found), rel=1e-3) and floor < collapse


def test_a_caption_shared_by_items_is_midway_between_them():
    seen = []

    def loss(image_BD, caption_CD):
        seen.append((image_BD, caption_CD))
        return caption_CD.sum()

    losses.bounds(loss, torch.tensor([4, 4, 6, 8]), torch.tensor([0, 0, 0, 1]))
    (perfect_BD, perfect_CD), (equal_BD, equal_CD) = seen
    assert torch.equal(perfect_BD, torch.eye(3)[[0, 0, 1, 2]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(perfect_CD, torch.tensor([[half, half, 0], [0, 0, 1]]))
    torch.testing.assert_close(equal_BD @ equal_CD.T, torch.ones(4, 2))


@settings(deadline=None)
@given(batches())
def test_no_embeddings_are_below_the_floor_at_low_temperature(batch):
    def supcon(image_BD):
        return losses.supcon(image_BD, batch.item_B, 0.02)

    def infonce(image_BD, caption_CD):
        return losses.infonce(image_BD, batch.item_B, caption_CD, batch.item_B, 50.0)

    image_BD, _ = batch.embeddings()
    generator = torch.Generator().manual_seed(batch.seed)
    caption_PD = F.normalize(torch.randn(batch.num_items, image_BD.shape[1], generator=generator, dtype=torch.float64))
    assert supcon(image_BD) >= losses.bounds(supcon, batch.item_B).floor - 1e-6
    floor = losses.bounds(infonce, batch.item_B, batch.item_B).floor
    assert infonce(image_BD, caption_PD) >= floor - 1e-6
