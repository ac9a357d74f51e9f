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

from clipfh.learn import losses, pairs, proxies

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


def to_ball(feature_BD, c):
    """The exponential map at the centre of a Poincare ball, of features that are clipped to 2.3."""
    clipped_BD = feature_BD * (losses.CLIP_RADIUS / feature_BD.norm(dim=1, keepdim=True)).clamp(max=1)
    length_B1 = math.sqrt(c) * clipped_BD.norm(dim=1, keepdim=True)
    return length_B1.tanh() / length_B1 * clipped_BD


def distance_in_ball(x, y, c):
    """2 / sqrt(c) * artanh(sqrt(c) * norm of the Moebius sum of -x and y), as the paper has it."""
    xy, xx, yy = -(x @ y), x @ x, y @ y
    added = ((1 + 2 * c * xy + c * yy) * -x + (1 - c * xx) * y) / (1 + 2 * c * xy + c * c * xx * yy)
    return 2 / math.sqrt(c) * torch.atanh(math.sqrt(c) * added.norm())


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32), temperatures, st.floats(0.01, 1))
def test_supcon_with_a_curvature_is_the_pairwise_loss_of_hyperbolic_vision_transformers(items, seed, temperature, c):
    """Features as long as CLIP's. Of each pair, one asks for the other among all images, and the other way round."""
    feature_BD = 8 * F.normalize(torch.randn(2 * items, 5, generator=torch.Generator().manual_seed(seed)).double())
    feature_BD.requires_grad_()
    point_BD = to_ball(feature_BD, c)

    def cost(anchor, positive):
        others = [n for n in range(2 * items) if n != anchor]
        logits = torch.stack([-distance_in_ball(point_BD[anchor], point_BD[n], c) / temperature for n in others])
        return F.cross_entropy(logits, torch.tensor(others.index(positive)))

    slow = sum(cost(i, i + items) + cost(i + items, i) for i in range(items)) / items
    fast = 2 * losses.supcon(F.normalize(feature_BD), torch.arange(items).repeat(2), temperature, curvature=c)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    got, wanted = (torch.autograd.grad(value, feature_BD, retain_graph=True)[0] for value in (fast, slow))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


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
    ours = losses.supcon_with_captions(image_BD, batch.item_B, caption_CD, batch.caption_B, temperature)
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
    joint = losses.supcon_with_captions(image_BD, item_B, caption_CD, caption_B, 1e-4)
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
    assert_same(batch, pairs.triplet(image_BD, batch.item_B, margin), loss(image_BD, batch.item_B, triples))


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
    ours = pairs.triplet(image_BD, batch.item_B, margin)
    assert ours.item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-6, abs=1e-6)
    assert all(gradient.isfinite().all() for gradient in batch.gradients(ours))


@settings(deadline=None)
@given(batches(duplicates=True), st.floats(1, 1e4), st.floats(0, 0.5), st.floats(0, 0.3))
def test_cross_entropy(batch, scale, margin, smoothing):
    generator = torch.Generator().manual_seed(batch.seed)
    weight_ID = torch.randn(batch.num_items, batch.image_BD.shape[1], generator=generator, dtype=torch.float64)
    image_BD, _ = batch.embeddings()
    cosine_BI = image_BD @ F.normalize(weight_ID, dim=1).T
    ours = proxies.cross_entropy(cosine_BI, batch.item_B, scale, margin, smoothing)
    reference = 0.0
    for cosine_I, item in zip(cosine_BI, batch.item_B.tolist(), strict=True):
        logit_I = torch.stack([scale * (c - margin * (i == item)) for i, c in enumerate(cosine_I)])
        surprise_I = logit_I.logsumexp(0) - logit_I
        reference += ((1 - smoothing) * surprise_I[item] + smoothing * surprise_I.mean()) / len(cosine_BI)
    assert_same(batch, ours, reference)
    cosface = pml.CosFaceLoss(batch.num_items, image_BD.shape[1], margin=margin, scale=scale)
    cosface.W.data = weight_ID.T
    assert_same(
        batch, proxies.cross_entropy(cosine_BI, batch.item_B, scale, margin, 0.0), cosface(image_BD, batch.item_B)
    )


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(1, 100), st.floats(0, 0.5), st.integers(1, 3))
def test_arcface_and_its_sub_centers_agree_with_pytorch_metric_learning(batch, scale, margin, centers):
    image_BD, _ = batch.embeddings()
    rows, dim = batch.num_items * centers, image_BD.shape[1]
    degrees = {"margin": math.degrees(margin), "scale": scale}
    reference = pml.SubCenterArcFaceLoss(
        num_classes=batch.num_items, embedding_size=dim, sub_centers=centers, **degrees
    )
    generator = torch.Generator().manual_seed(batch.seed)
    weight = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    reference.W.data = weight.T
    cosine = image_BD @ F.normalize(weight, dim=1).T
    if cosine.abs().max() < 1 - 1e-9:  # the reference has no gradient there
        cosine_BI = cosine.unflatten(1, (batch.num_items, centers)).amax(2)
        ours = proxies.arcface(cosine_BI, batch.item_B, scale, margin)
        assert_same(batch, ours, reference(image_BD, batch.item_B))


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(1, 50), st.floats(0, 0.3))
def test_proxy_anchor(batch, scale, margin):
    image_BD, _ = batch.embeddings()
    generator, num_items = torch.Generator().manual_seed(batch.seed), batch.num_items + 2  # two are not in the batch
    weight_ID = torch.randn(num_items, image_BD.shape[1], generator=generator, dtype=torch.float64)
    cosine_BI = image_BD @ F.normalize(weight_ID, dim=1).T
    pull, push = 0.0, 0.0
    for proxy in range(num_items):
        own = batch.item_B == proxy
        if own.any():
            pull += torch.log1p((-scale * (cosine_BI[own, proxy] - margin)).exp().sum()) / batch.num_items
        push += torch.log1p((scale * (cosine_BI[~own, proxy] + margin)).exp().sum()) / num_items
    ours = proxies.proxy_anchor(cosine_BI, batch.item_B, scale, margin)
    assert_same(batch, ours, pull + push)
    reference = pml.ProxyAnchorLoss(num_items, image_BD.shape[1], margin=margin, alpha=scale)
    reference.proxies.data = weight_ID
    assert_same(batch, ours, reference(image_BD, batch.item_B))


def past(batch):
    """Images of earlier steps, of the batch's items and of others, some of them equal to the batch's."""
    generator = torch.Generator().manual_seed(batch.seed + 1)
    item_M = torch.randint(0, batch.num_items + 1, (5,), generator=generator)
    own_M = torch.randint(0, len(batch.image_BD), (5,), generator=generator)
    embedding_MD = torch.randn(5, batch.image_BD.shape[1], generator=generator, dtype=torch.float64)
    embedding_MD[0] = batch.image_BD[own_M[0]].detach()
    return losses.Memory(F.normalize(embedding_MD, dim=1), item_M)


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(0.5, 5), st.floats(5, 60), st.floats(0, 1), st.floats(0, 0.3), st.booleans())
def test_multi_similarity(batch, positive_scale, negative_scale, base, margin, with_memory):
    image_BD, _ = batch.embeddings()
    memory = past(batch) if with_memory else losses.Memory(image_BD[:0], batch.item_B[:0])
    other_ND, other_N = torch.cat([image_BD, memory.embedding_MD]), torch.cat([batch.item_B, memory.item_M])
    terms = []
    for a, cosine_N in enumerate(image_BD @ other_ND.T):
        positives = [c for n, c in enumerate(cosine_N) if other_N[n] == batch.item_B[a] and n != a]
        negatives = [c for n, c in enumerate(cosine_N) if other_N[n] != batch.item_B[a]]
        if positives and negatives:
            hard = [c for c in positives if c - margin < max(negatives)]
            near = [c for c in negatives if c + margin > min(positives)]
            pull = torch.log1p(sum((torch.exp(-positive_scale * (c - base)) for c in hard), 0 * cosine_N[0]))
            push = torch.log1p(sum((torch.exp(negative_scale * (c - base)) for c in near), 0 * cosine_N[0]))
            terms.append(pull / positive_scale + push / negative_scale)
    options = positive_scale, negative_scale, base, margin
    ours = pairs.multi_similarity(image_BD, batch.item_B, *options, memory if with_memory else None)
    assert_same(batch, ours, sum(terms, 0 * image_BD.sum()) / max(len(terms), 1))
    mined = miners.MultiSimilarityMiner(margin)(image_BD, batch.item_B)
    if not with_memory and any(len(places) > 1 for places in mined):  # it takes a single pair for none
        loss = pml.MultiSimilarityLoss(positive_scale, negative_scale, base, reducer=reducers.MeanReducer())
        of_all_anchors = ours * len(terms) / len(image_BD)
        assert_same(batch, of_all_anchors, loss(image_BD, batch.item_B, mined))


def smooth_ap_by_loops(image_BD, item_B, temperature, with_itself=False):
    """Mean of 1 - AP over images with a positive; with itself among its positives as in the paper's code, if asked."""
    terms = []
    for a, cosine_N in enumerate(image_BD @ image_BD.T):
        ranking = [n for n in range(len(item_B)) if n != a or with_itself]
        positives = [n for n in ranking if item_B[n] == item_B[a]]

        def rank(of, among, cosine_N=cosine_N):
            return 1 + sum(torch.sigmoid((cosine_N[n] - cosine_N[of]) / temperature) for n in among if n != of)

        if positives:
            terms.append(1 - sum(rank(p, positives) / rank(p, ranking) for p in positives) / len(positives))
    return sum(terms, 0 * image_BD.sum()) / max(len(terms), 1)


@settings(deadline=None, max_examples=30)
@given(batches(duplicates=True), st.floats(0.01, 1))
def test_smooth_ap(batch, temperature):
    image_BD, _ = batch.embeddings()
    ours = pairs.smooth_ap(image_BD, batch.item_B, 4, temperature)
    assert_same(batch, ours, smooth_ap_by_loops(image_BD, batch.item_B, temperature))


def test_the_slow_smooth_ap_is_that_of_pytorch_metric_learning_where_an_anchor_is_its_own_positive():
    """It wants as many images of every item, side by side, and is right only where there are as many items."""
    generator = torch.Generator().manual_seed(0)
    image_BD = F.normalize(torch.randn(9, 4, generator=generator, dtype=torch.float64), dim=1)
    item_B = torch.arange(3).repeat_interleave(3)
    slow = smooth_ap_by_loops(image_BD, item_B, 0.1, with_itself=True)
    torch.testing.assert_close(slow.float(), pml.SmoothAPLoss(0.1)(image_BD, item_B))  # it counts in float32


@settings(deadline=None, max_examples=30)
@given(batches(), temperatures, margins)
def test_images_of_the_memory_are_positives_and_negatives_but_no_anchors(batch, temperature, margin):
    image_BD, _ = batch.embeddings()
    memory = past(batch)
    other_ND, other_N = torch.cat([image_BD, memory.embedding_MD]), torch.cat([batch.item_B, memory.item_M]).tolist()
    item = batch.item_B.tolist()
    reference = contrastive_by_loops(
        image_BD, other_ND, lambda a, n: item[a] == other_N[n], lambda a, n: a != n, 1 / temperature, 0 * image_BD.sum()
    )
    assert_same(batch, losses.supcon(image_BD, batch.item_B, temperature, memory), reference)
    terms = []
    for a, anchor in enumerate(image_BD):
        distance_N = [(anchor - other).norm() for other in other_ND]
        positives = [d for n, d in enumerate(distance_N) if other_N[n] == item[a] and n != a]
        negatives = [d for n, d in enumerate(distance_N) if other_N[n] != item[a]]
        if positives and negatives:
            violation = max(positives) - min(negatives)
            terms.append((F.softplus(violation) if margin is None else F.relu(violation + margin)).item())
    ours = pairs.triplet(image_BD, batch.item_B, margin, memory)
    assert ours.item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(batches(duplicates=True), st.floats(1e-3, 1e3))
def test_center_and_its_step(batch, norm):
    feature_BD = norm * batch.image_BD
    centers_ID = torch.randn(batch.num_items + 1, feature_BD.shape[1], dtype=torch.float64)
    rows = list(zip(feature_BD, batch.item_B.tolist(), strict=True))
    reference = sum(((feature - centers_ID[item]) ** 2).sum() / 2 for feature, item in rows) / len(rows)
    assert_same(batch, proxies.center(feature_BD, batch.item_B, centers_ID), reference)

    moved_ID = centers_ID.clone()
    proxies.move_centers(moved_ID, feature_BD, batch.item_B, batch.item_B.unique(), 0.5)
    for item, center in enumerate(centers_ID):
        pulls = [center - feature for feature, i in rows if i == item]
        expected = center - 0.5 * sum(pulls, start=torch.zeros_like(center)) / (1 + len(pulls))
        torch.testing.assert_close(moved_ID[item], expected.detach())


def all_terms(image_BD, item_B, caption_CD, caption_B):
    """Every loss at extreme scales. The embeddings' own coordinates serve as cosines and as centers."""
    cosine_BI = image_BD.repeat(1, int(item_B.max()) + 1)
    return {
        "supcon": losses.supcon(image_BD, item_B, 1e-3),
        "hyperbolic": losses.supcon(image_BD, item_B, 0.2, curvature=0.1),
        "joint": losses.supcon_with_captions(image_BD, item_B, caption_CD, caption_B, 1e-3),
        "infonce": losses.infonce(image_BD, item_B, caption_CD, caption_B, 1e3),
        "sigmoid": losses.sigmoid(image_BD, item_B, caption_CD, caption_B, 1e3, -10.0),
        "triplet": pairs.triplet(image_BD, item_B, 0.2),
        "soft": pairs.triplet(image_BD, item_B, None),
        "multi_similarity": pairs.multi_similarity(image_BD, item_B, 2.0, 200.0, 0.5, 2.0),
        "smooth_ap": pairs.smooth_ap(image_BD, item_B, 4, 0.1),
        "center": proxies.center(image_BD, item_B, image_BD.flip(0)),
        "multi_positive": losses.multi_positive(64 * image_BD, image_BD > 0),
        "cross_entropy": proxies.cross_entropy(cosine_BI, item_B, 64.0, 0.4, 0.1),
        "arcface": proxies.arcface(cosine_BI, item_B, 64.0, 0.4),
        "proxy_anchor": proxies.proxy_anchor(cosine_BI, item_B, 100.0, 0.1),
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
        pairs.triplet(image_BD, alone_B, 0.3),
        pairs.triplet(image_BD, one_item_B, None),
        pairs.multi_similarity(image_BD, alone_B, 2.0, 50.0, 0.5, 0.1),
        pairs.multi_similarity(image_BD, one_item_B, 2.0, 50.0, 0.5, 0.1),
        pairs.smooth_ap(image_BD, alone_B, 4, 0.01),
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
    curved = losses.bounds(lambda e: losses.supcon(e, ITEM_B, temperature, curvature=1.0), ITEM_B)
    far, near = (math.acosh(1 + math.sinh(2 * losses.CLIP_RADIUS) ** 2 * d) for d in (1, 1e-5))
    floor = math.log(K - 1 + (B - K) * math.exp((near - far) / temperature))
    assert curved == pytest.approx((floor, math.log(B - 1)), rel=1e-3)
    hinge = losses.bounds(lambda e: pairs.triplet(e, ITEM_B, 0.3), ITEM_B)
    assert hinge == pytest.approx((0, 0.3))
    soft = losses.bounds(lambda e: pairs.triplet(e, ITEM_B, None), ITEM_B)
    assert soft == pytest.approx((math.log1p(math.exp(-math.sqrt(2))), math.log(2)))
    margin_softmax = proxies.bounds(lambda c, item: proxies.cross_entropy(c, item, scale, margin, 0.0), ITEM_B, I)
    floor = math.log1p((I - 1) * math.exp(-scale * (1 - margin)))
    assert margin_softmax == pytest.approx((floor, math.log1p((I - 1) * math.exp(scale * margin))))
    angular = proxies.bounds(lambda c, item: proxies.arcface(c, item, scale, margin), ITEM_B, I)
    floor, gap = math.log1p((I - 1) * math.exp(-scale * math.cos(margin))), 1 - math.cos(margin)
    assert angular == pytest.approx((floor, math.log1p((I - 1) * math.exp(scale * gap))), rel=1e-3)
    ranking = losses.bounds(lambda e: pairs.smooth_ap(e, ITEM_B, K, 0.01), ITEM_B)
    assert ranking == pytest.approx((0, 1 - K / B), abs=1e-6)
    mined = losses.bounds(lambda e: pairs.multi_similarity(e, ITEM_B, 2.0, 50.0, 0.5, 0.1), ITEM_B)
    pull, push = math.log1p((K - 1) * math.exp(-1)) / 2, math.log1p((B - K) * math.exp(25)) / 50
    assert mined == pytest.approx((0, pull + push))


def test_the_collapse_of_proxy_anchor_is_where_equal_cosines_lie_best():
    def value(cosine):
        return (
            math.log1p(K * math.exp(-8 * (cosine - 0.1)))
            + (
                P * math.log1p((B - K) * math.exp(8 * (cosine + 0.1)))
                + (I - P) * math.log1p(B * math.exp(8 * (cosine + 0.1)))
            )
            / I
        )

    floor, collapse = proxies.bounds(lambda c, item: proxies.proxy_anchor(c, item, 8.0, 0.1), ITEM_B, I)
    assert collapse == pytest.approx(min(value(c / 1000) for c in range(-1000, 1001)), rel=1e-2) and floor < collapse


def test_bounds_of_image_and_caption_losses():
    """Identical captions count once, so the floor is that of K positives, not of K images and K copies of a caption."""
    joint = losses.bounds(lambda e, c: losses.supcon_with_captions(e, ITEM_B, c, CAPTION_B, 0.01), ITEM_B, CAPTION_B)
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
