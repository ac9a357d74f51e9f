import json
import math
import statistics
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

from clipfh import UserError
from clipfh.retrieval import metrics
from clipfh.retrieval.metrics import KEYS, RANKS, Embeddings, Scores

# Unit vectors with exact products: equal similarities abound, and are equal however they are computed.
AXES = torch.cat([torch.eye(4), -torch.eye(4)])
CORNERS = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 4)
EXACT = torch.cat([AXES, CORNERS]).double()


def slow_values(similarity, relevant, competes):
    """KEYS of each query, from whole sorted rows: `competes` says what is ranked, `relevant` what is right."""
    table = []
    for row, right, ranked in zip(similarity.tolist(), relevant.tolist(), competes.tolist(), strict=True):
        order = sorted((column for column, there in enumerate(ranked) if there), key=lambda c: (-row[c], c))
        ranks = [rank for rank, column in enumerate(order, start=1) if right[column]]
        precision = {rank: found / rank for found, rank in enumerate(ranks, start=1)}
        if not ranks:
            table.append([math.nan] * len(KEYS))
            continue
        hits = [float(ranks[0] <= k) for k in RANKS]
        at_r = sum(value for rank, value in precision.items() if rank <= len(ranks)) / len(ranks)
        table.append([sum(precision.values()) / len(ranks), *hits, at_r, len(ranks) / ranks[-1]])
    return torch.tensor(table, dtype=torch.float64)


def slow_score(query, gallery, present=None, similarity=None):
    """`score` by the definitions, one query at a time; `present` masks the gallery."""
    if similarity is None:
        similarity = query.embedding.double() @ gallery.embedding.double().T
    item = query.item[:, None] == gallery.item
    variant = query.variant[:, None] == gallery.variant
    competes = query.image[:, None] != gallery.image
    if present is not None:
        competes = competes & present
    ignoring = {"overall": item & False, "same": item & ~variant, "cross": variant}
    return [slow_values(similarity, item, competes & ~ignored) for ignored in ignoring.values()]


def assert_same(values, expected):
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-9, equal_nan=True)


@st.composite
def catalogues(draw, max_images=24):
    """Images with many equal similarities, few or many items, photos listed twice; masks of queries and gallery."""
    size = draw(st.integers(2, max_images))

    def each(strategy):
        return draw(st.lists(strategy, min_size=size, max_size=size))

    item = torch.tensor(each(st.integers(0, draw(st.integers(0, 6)))))
    image = torch.arange(size)
    if draw(st.booleans()):
        image[-1] = image[0]
        item[-1] = item[0]
    vectors = EXACT.to(draw(st.sampled_from([torch.float32, torch.float64])))
    embedding = vectors[each(st.integers(0, draw(st.integers(0, len(vectors) - 1))))]
    images = Embeddings(embedding, item, 10 * item + torch.tensor(each(st.integers(0, 1))), image)
    masks = [torch.tensor(each(st.booleans())) for _ in range(2)]
    for mask in masks:
        mask[0] = True
    return images, *masks


def small_blocks(draw):
    sizes = {"BLOCK": st.integers(1, 200), "PART": st.integers(1, 200), "TILE": st.sampled_from([1, 2, 4])}
    return mock.patch.multiple(metrics, **{name: draw(size) for name, size in sizes.items()})


@settings(max_examples=200, deadline=None)
@given(catalogues(), st.data())
def test_score_equals_a_loop_over_sorted_rows(catalogue, data):
    images, asks, answers = catalogue
    query, gallery = images.select(asks), images.select(answers)
    with small_blocks(data.draw):
        scores = metrics.score(query, gallery, skip_unmatched=True)
    for found, expected in zip(scores, slow_score(query, gallery), strict=True):
        assert_same(found.values, expected)


@settings(max_examples=100, deadline=None)
@given(catalogues(), st.data())
def test_a_given_similarity_matrix_has_one_result(catalogue, data):
    """To the last digit, for any block, number of threads, and share-out of the queries among workers."""
    images, asks, answers = catalogue
    query, gallery = images.select(asks), images.select(answers)
    few = st.sampled_from([-3.0, -0.0, 0.0, 1e-45, 0.3, 0.3000001, 7.0])
    entries = few if data.draw(st.booleans()) else st.floats(-1, 1, width=32)
    size = len(query) * len(gallery)
    matrix = torch.tensor(data.draw(st.lists(entries, min_size=size, max_size=size))).view(len(query), -1)

    def score(rows):
        return metrics.score(query.select(rows), gallery, True, similarity=lambda asked: matrix[rows[asked]])

    everyone = torch.arange(len(query))
    once = score(everyone)
    for found, expected in zip(once, slow_score(query, gallery, similarity=matrix), strict=True):
        assert_same(found.values, expected)
    workers = everyone.tensor_split(data.draw(st.integers(1, len(query))))
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    with small_blocks(data.draw):
        parts = [score(rows) for rows in workers]
        column, level = metrics.nearest(query, gallery, 5, lambda rows: matrix[rows])
    torch.set_num_threads(threads)
    for number, whole in enumerate(once):
        for name in ("values", "first"):
            joined = torch.cat([getattr(part[number], name) for part in parts])
            assert torch.equal(joined.nan_to_num(-1), getattr(whole, name).nan_to_num(-1))
    competes = matrix.masked_fill(query.image[:, None] == gallery.image, -math.inf)
    expected, order = competes.sort(dim=1, descending=True, stable=True)
    assert torch.equal(level, expected[:, :5])
    assert torch.equal(column, order[:, :5].masked_fill(level == -math.inf, -1))


def test_cmc_is_rank_k_for_every_k(halves):
    overall, _, _ = metrics.score(*halves)
    curve, found = metrics.cmc(overall), metrics.summary(overall)
    assert len(curve) == 50 and curve == sorted(curve)
    assert [curve[k - 1] for k in RANKS] == [found[f"rank{k}"] for k in RANKS]


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.integers(1, 4), st.data())
def test_random_splits_equal_a_loop_over_splits(catalogue, num_splits, data):
    images, _, _ = catalogue
    with small_blocks(data.draw):
        splits = metrics.random_splits(images, num_splits, seed=3)
    for number, drawn in enumerate(metrics._draw(images.item, num_splits, 3)):
        assert torch.equal(images.item[drawn].sort().values, images.item.unique())
        expected, _, _ = slow_score(images.select(drawn), images, present=~drawn)
        expected = expected[~expected[:, 0].isnan()]
        for column, key in enumerate(KEYS):
            found = splits[key]["values"][number]
            assert found == (pytest.approx(float(expected[:, column].mean()), abs=1e-9) if len(expected) else None)
    values = splits["mAP"]["values"]
    if num_splits > 1 and None not in values:
        assert splits["mAP"]["mean"] == pytest.approx(statistics.mean(values))
        assert splits["mAP"]["std"] == pytest.approx(statistics.stdev(values))


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.data())
def test_text_and_image_rank_each_other_by_the_captions_that_items_carry(catalogue, data):
    images, _, _ = catalogue
    items = st.sampled_from(images.item.unique().tolist())
    pairs = data.draw(st.lists(st.tuples(items, st.integers(0, 4)), min_size=1, max_size=12))
    carried = set(pairs)
    captions = metrics.CaptionEmbeddings(EXACT[[8, 3, 17, 3, 21]].to(images.embedding), *torch.tensor(pairs).T)
    right = torch.tensor([[(item, caption) in carried for item in images.item.tolist()] for caption in range(5)])
    similarity = captions.embedding @ images.embedding.T
    with small_blocks(data.draw):
        for found, expected in (
            (metrics.text_to_image(captions, images), slow_values(similarity, right, right | True)),
            (metrics.image_to_text(images, captions), slow_values(similarity.T, right.T, right.T | True)),
        ):
            scored = expected[~expected[:, 0].isnan()]
            assert [found[key] for key in KEYS] == pytest.approx(scored.mean(0).tolist(), abs=1e-9)
            assert (found["num_query"], found["num_unmatched"]) == (len(scored), len(expected) - len(scored))


def random_images(num_items, views, noise, seed=0, dim=64):
    """Noisy views of random items, all apart, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    item = torch.arange(num_items).repeat_interleave(views)[torch.randperm(num_items * views, generator=generator)]
    centre = torch.nn.functional.normalize(torch.randn(num_items, dim, generator=generator), dim=1)
    embedding = centre[item] + noise * torch.randn(len(item), dim, generator=generator) / dim**0.5
    variant = 2 * item + torch.randint(2, item.shape, generator=generator)
    return Embeddings(torch.nn.functional.normalize(embedding, dim=1), item, variant, torch.arange(len(item)))


@pytest.fixture(scope="module")
def halves():
    images = random_images(num_items=60, views=8, noise=1.8)
    return images.select(torch.arange(0, 240)), images.select(torch.arange(240, 480))


def test_agrees_with_pytorch_metric_learning(halves):
    query, gallery = halves
    names = {"mAP": "mean_average_precision", "mAP_at_R": "mean_average_precision_at_r", "rank1": "precision_at_1"}
    calculator = AccuracyCalculator(
        include=tuple(names.values()), k=None, knn_func=CustomKNN(CosineSimilarity()), kmeans_func=lambda *_: None
    )
    expected = calculator.get_accuracy(query.embedding, query.item, gallery.embedding, gallery.item)
    found = metrics.summary(metrics.score(query, gallery)[0])
    assert 0.2 < found["mAP"] < 0.8
    assert {key: found[key] for key in names} == pytest.approx({key: expected[name] for key, name in names.items()})


def test_agrees_with_torchmetrics(halves):
    query, gallery = halves
    values = metrics.score(query, gallery)[0].values
    shifted = 2 + (query.embedding @ gallery.embedding.T).double()  # it ignores what scores 0 or less
    for row, similarity in enumerate(shifted):
        target = gallery.item == query.item[row]
        assert values[row, 0].item() == pytest.approx(retrieval_average_precision(similarity, target).item(), abs=1e-6)
        assert values[row, 2] == retrieval_hit_rate(similarity, target, top_k=5)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_count_ahead_for_a_given_similarity_matrix(data):
    """Any finite entries, thresholds that need not be entries, any numbering of the columns."""
    rows, columns, slots = (data.draw(st.integers(1, 6)) for _ in range(3))
    entries = st.sampled_from([-2.0, -0.0, 0.0, 1e-45, 0.3, 0.3000001, 7.0])
    similarity = torch.tensor(data.draw(st.lists(entries, min_size=rows * columns, max_size=rows * columns)))
    level = torch.tensor(data.draw(st.lists(entries | st.just(math.inf), min_size=rows * slots, max_size=rows * slots)))
    similarity, level = similarity.view(rows, columns), level.view(rows, slots).sort(dim=1).values
    order = torch.arange(columns) * 3 + 1
    column = torch.arange(rows * slots).view(rows, slots) % (3 * columns)
    with small_blocks(data.draw):
        found = metrics.count_ahead(similarity, order, column, level)
    for row in range(rows):
        for slot in range(slots):
            if level[row, slot] < math.inf:
                better = similarity[row] > level[row, slot]
                earlier = (similarity[row] == level[row, slot]) & (order < column[row, slot])
                assert found[row, slot] == (better | earlier).sum()


def test_no_digit_depends_on_block_or_threads(halves):
    query, gallery = halves
    threads = torch.get_num_threads()
    expected = metrics.score(query, gallery)[0].values
    for block, part, num_threads in ((1, 1, 1), (100 * len(gallery), 2000, 2), (130 * len(gallery), 9999, 1)):
        torch.set_num_threads(num_threads)
        with mock.patch.multiple(metrics, BLOCK=block, PART=part):
            assert torch.equal(metrics.score(query, gallery)[0].values, expected)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [7, 33, 1001])
def test_equal_images_have_equal_similarities_wherever_they_stand(size):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(size, 512, generator=generator) / 512**0.5
    embedding[-(size // 2) :] = embedding[: size // 2]
    query = torch.randn(70, 512, generator=generator) / 512**0.5
    for rows in (70, 1, 5):
        found = metrics._product(query[:rows], embedding, torch.empty(128, size))
        assert torch.equal(found[:, -(size // 2) :], found[:, : size // 2])
        torch.testing.assert_close(found, query[:rows] @ embedding.T)


def test_equal_embeddings_rank_by_gallery_order():
    """A collapsed model finds what stands first: chance, not perfection."""
    item = torch.arange(50).repeat(2)
    images = Embeddings(torch.full((100, 4), 0.5), item, item, torch.arange(100))
    query, gallery = images.select(torch.arange(50)), images.select(torch.arange(50, 100))
    assert metrics.mean_average_precision(query, gallery) == pytest.approx(sum(1 / rank for rank in range(1, 51)) / 50)


def test_queries_without_a_match_are_an_error_or_counted(halves):
    query, gallery = halves
    lacking = gallery.select(gallery.item != query.item[7])
    count = int((query.item == query.item[7]).sum())
    with pytest.raises(UserError, match=rf"^{count} of 240 queries \(the first is query \d\) have no other image"):
        metrics.score(query, lacking)
    overall, same, cross = metrics.score(query, lacking, skip_unmatched=True)
    whole = metrics.summary(overall)
    assert (whole["num_query"], whole["num_unmatched"], whole["num_gallery"]) == (240 - count, count, len(lacking))
    assert whole["mAP"] == pytest.approx(overall.values[query.item != query.item[7], 0].mean().item())
    assert metrics.summary(same)["num_unmatched"] > count


def test_nothing_to_score_is_null():
    images = Embeddings(EXACT[:4], torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 2, 2]), torch.arange(4))
    overall, _, cross = metrics.score(images, images)
    nothing = metrics.summary(cross)
    assert {nothing[key] for key in KEYS} == {None} == {metrics.cmc(cross)}
    assert nothing["num_unmatched"] == 4
    assert json.loads(json.dumps(nothing, allow_nan=False)) == nothing
    lone = Embeddings(EXACT[:4], torch.arange(4), torch.arange(4), torch.arange(4))
    assert metrics.random_splits(lone)["mAP"] == {"mean": None, "std": None, "values": [None] * 10}
    assert metrics.summary(Scores(overall.values, overall.first, torch.zeros(4), 4))["intervals"]["mAP"] is None


def test_groups_are_means_over_their_queries(halves):
    query, gallery = halves
    overall, _, _ = metrics.score(query, gallery)
    labels = ["Hat" if item < 20 else "Dress" for item in query.item.tolist()]
    groups = metrics.by_group(overall, labels)
    assert list(groups) == ["Dress", "Hat"]
    hats = query.item < 20
    assert groups["Hat"]["num_query"] == int(hats.sum())
    assert groups["Hat"]["rank1"] == pytest.approx(overall.values[hats, KEYS.index("rank1")].mean().item())
    low, high = groups["Hat"]["intervals"]["mAP"]
    assert low < groups["Hat"]["mAP"] < high


def test_intervals_have_the_spread_of_a_mean_over_items():
    """Items agree with themselves entirely, so that queries of an item count as one observation."""
    generator = np.random.default_rng(0)
    hit = generator.random(400) < 0.3
    values = torch.tensor(np.repeat(hit, 9), dtype=torch.float64)[:, None].expand(-1, len(KEYS))
    scores = Scores(values, values[:, 0], torch.arange(400).repeat_interleave(9), num_gallery=1)
    low, high = metrics.summary(scores)["intervals"]["rank1"]
    assert low < hit.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * hit.std() / 400**0.5, rel=0.1)
    assert metrics.summary(scores) == metrics.summary(scores)
    assert metrics.summary(scores, seed=1)["intervals"] != metrics.summary(scores)["intervals"]


def test_intervals_weigh_items_by_their_queries():
    """Two items of 1 and 3 queries: a resample of them averages 0, 3/4 or 1."""
    values = torch.tensor([0.0, 1.0, 1.0, 1.0]).double()[:, None].expand(-1, len(KEYS))
    figures = metrics.summary(Scores(values, values[:, 0], torch.tensor([5, 8, 8, 8]), num_gallery=1))
    assert (figures["mAP"], figures["intervals"]["mAP"]) == (0.75, [0.0, 1.0])


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_embeddings_of_a_diverged_model_are_refused(worst):
    embedding = EXACT.clone()
    embedding[5, 2] = worst
    codes = torch.arange(len(EXACT))
    with pytest.raises(UserError, match=r"^1 of 24 embeddings .* row 5\)"):
        Embeddings(embedding, codes, codes, codes)


def test_autocast_around_does_not_round(halves):
    query, gallery = halves
    expected = metrics.score(query, gallery)[0].values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metrics.score(query, gallery)[0].values, expected)


def test_many_positives_stay_within_the_memory_of_a_block():
    """All of the gallery is right for all queries: no tensor holds more than the places of a block's entries."""
    images = random_images(num_items=1, views=600, noise=5.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with mock.patch.object(metrics, "BLOCK", 64 * 600), Watch():
        overall, _, _ = metrics.score(images, images)
    assert (overall.values[:, :1] == 1).all()
    assert largest <= 2 * 64 * 600 < 600 * 600


@pytest.mark.parametrize("size", [97, 333, 12612])
def test_equal_images_are_equally_similar_wherever_they_stand(size):
    generator = torch.Generator().manual_seed(size)
    gallery, query = (torch.randn(rows, 128, generator=generator) for rows in (size, 70))
    gallery[torch.randperm(size, generator=generator)[: size // 2]] = gallery[0].clone()
    query[5:] = query[0].clone()
    similarity = metrics._product(query, gallery, torch.empty(70 + metrics.TILE, size))
    alike = similarity[:, (gallery == gallery[0]).all(1)]
    assert torch.equal(alike, alike[:, :1].expand_as(alike)), "columns"
    assert torch.equal(similarity[5:], similarity[:1].expand(65, -1)), "rows"
    torch.testing.assert_close(similarity.double(), query.double() @ gallery.double().T, rtol=0, atol=1e-4)
