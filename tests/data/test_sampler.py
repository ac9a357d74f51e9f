"""The P x K plan: every stated property, on random catalogues."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfh import UserError
from clipfh.config.experiment import BatchSettings, Experiment, LossSettings
from clipfh.config.schedule import make_schedule
from clipfh.data.sampler import ItemIndex, PKSampler, make_sampler


@st.composite
def plans(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=40))
    singles = draw(st.booleans()) or sum(size > 1 for size in sizes) < 2
    items = draw(st.integers(2, sum(singles or size > 1 for size in sizes)))
    categories = draw(st.integers(0, items))
    item = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    rng.shuffle(item)  # rows need not be grouped by item
    category = rng.integers(0, 4, len(sizes))
    views, seed = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    return item, PKSampler(item, items, views, seed, category, categories, singles), singles


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_stated_property(case):
    item, plan, singles = case
    drawn = {i for i in set(item) if singles or (item == i).sum() > 1}
    assert plan.num_items == len(drawn)
    steps = 3 * plan.num_items // plan.items + 12
    drawn_views: dict[int, list[int]] = {i: [] for i in drawn}
    drawn_items: list[int] = []
    for step in range(steps):
        rows = plan.batch(step).reshape(plan.items, plan.views)
        items = item[rows]
        assert (items == items[:, :1]).all(), "the views of a row are of one item"
        assert len(set(items[:, 0])) == plan.items, "P distinct items"
        for views, i in zip(rows, items[:, 0], strict=True):
            size = (item == i).sum()
            assert len(set(views)) == min(plan.views, size), "views repeat only where the item has fewer than K"
            drawn_views[i].extend(views)
        drawn_items.extend(items[:, 0])
    for start in range(0, len(drawn_items) - plan.num_items + 1, plan.num_items):
        assert len(set(drawn_items[start : start + plan.num_items])) == plan.num_items, "each item once a pass"
    for views in drawn_views.values():
        counts, size = Counter(), len(set(np.flatnonzero(item == item[views[0]]))) if views else 0
        for view in views:
            counts[view] += 1
            seen = [counts[v] for v in counts] + [0] * (size - len(counts))
            assert max(seen) - min(seen) <= 1, "every view before any repeats"


@given(plans(), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_batch_is_a_pure_function_of_seed_and_step(case, step):
    item, plan, singles = case
    fresh = PKSampler(item, plan.items, plan.views, plan.seed, plan.category, 0, singles)
    fresh.run_length = plan.run_length
    for earlier in range(step):
        plan.batch(earlier)
    np.testing.assert_array_equal(plan.batch(step), fresh.batch(step))


def test_seeds_and_passes_differ():
    item = np.repeat(np.arange(64), 4)
    plan = PKSampler(item, 64, 2, seed=0)
    assert not np.array_equal(item[plan.batch(0)], item[plan.batch(1)]), "another pass is another shuffle"
    assert not np.array_equal(plan.batch(0), PKSampler(item, 64, 2, seed=1).batch(0))


def test_views_meet_in_different_company():
    """Pairs are not fixed for ever: over many draws every pair of an item's four views meets."""
    plan = PKSampler(np.repeat(np.arange(4), 4), 4, 2)
    pairs = {tuple(sorted(p)) for s in range(40) for p in plan.batch(s).reshape(-1, 2) if p[0] < 4}
    assert len(pairs) == 6


def test_grouping_puts_few_categories_in_a_batch():
    category = np.arange(400) % 20
    item = np.repeat(np.arange(400), 2)
    grouped, mixed = (PKSampler(item, 40, 2, 0, category, c) for c in (4, 0))
    count = [np.mean([len(set(category[item[p.batch(s)]])) for s in range(10)]) for p in (grouped, mixed)]
    assert count[0] <= 6 < 15 < count[1]


def test_too_few_items():
    with pytest.raises(UserError, match=r"--batch.items 5 is more than the 3 train items"):
        PKSampler(np.array([0, 1, 2]), 5, 2)


def test_too_few_items_of_two_photos():
    item = np.array([0, 1, 2, 0, 1])
    with pytest.raises(UserError, match=r"--batch.items 3 is more than the 2 train items with two photos.*: take 2 or"):
        PKSampler(item, 3, 2, singles=False)
    with pytest.raises(UserError, match=r"^there are no train items with two photos or more, .*switch on loss\.ce"):
        PKSampler(np.arange(9), 3, 2, singles=False)
    with pytest.raises(UserError, match="^there are 1 train items with two photos or more.*a batch holds two or more"):
        PKSampler(np.array([0, 0, 1]), 2, 2, singles=False)


@pytest.mark.parametrize(
    "terms,takes",
    [
        ({"supcon": 1.0, "triplet": 1.0}, False),
        ({"supcon": 1.0, "ce": 0.1}, True),
        ({"multi_similarity": 1.0, "smooth_ap": 1.0}, False),
        ({"arcface": 1.0}, True),
        ({"triplet": 1.0, "proxy_anchor": 1.0}, True),
        ({"triplet": 1.0, "center": 0.1}, True),
        ({"infonce": 1.0}, True),
        ({"supcon": 1.0, "supcon_captions": True}, True),
        ({"triplet": 1.0, "supcon_captions": True}, False),
    ],
)
def test_items_of_one_photo_are_drawn_where_a_term_takes_them(terms, takes):
    loss = LossSettings(**terms)
    assert loss.takes_singles == takes
    index = ItemIndex(np.array([0, 0, 1, 2, 2, 3]), np.zeros(4, int), list("abcd"), np.array([6]))
    plan = make_sampler(index, BatchSettings(items=2, views=2), 0, loss.takes_singles)
    drawn = {int(index.item[row]) for step in range(9) for row in plan.batch(step)}
    assert drawn == ({0, 1, 2, 3} if takes else {0, 2})
    schedule = make_schedule(Experiment(loss=loss), len(index.item), index.num_single)
    assert schedule.epoch_images == (6 if takes else 4), "an epoch is of what is drawn"


@given(plans(), st.integers(0, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_neighbours_are_the_nearest_that_the_batch_lacks(case, step, data):
    item, plan, singles = case
    both = data.draw(st.integers(2, plan.num_items))
    count = data.draw(st.integers(1, both - 1))
    drawn = PKSampler(item, both, plan.views, plan.seed, singles=singles, neighbours=count)
    alone = PKSampler(item, both - count, plan.views, plan.seed, singles=singles)
    rng = np.random.default_rng(0)
    nearest = np.stack([rng.permutation(item.max() + 1)[:4] for _ in range(item.max() + 1)]) - (step % 2)  # some are -1
    rows = drawn.batch(step, nearest).reshape(both, plan.views)
    np.testing.assert_array_equal(rows[: both - count].reshape(-1), alone.batch(step))
    np.testing.assert_array_equal(rows.reshape(-1), drawn.batch(step, nearest))
    items = item[rows[:, 0]].tolist()
    assert (item[rows] == item[rows[:, :1]]).all() and len(set(items)) == both
    takes_part = np.bincount(item) >= (1 if singles else 2)
    for place in range(both - count, both):
        near = nearest[items[(place - both + count) % (both - count)]]
        left = [i for i in near.tolist() if i >= 0 and takes_part[i] and i not in items[:place]]
        assert items[place] == left[0] if left else takes_part[items[place]]


def test_the_example_of_neighbours_in_the_module_is_what_is_drawn():
    plan = PKSampler(np.repeat(np.arange(5), 3), items=4, views=2, seed=0, neighbours=2)
    nearest = np.array([[-1, -1], [-1, -1], [3, 0], [-1, -1], [3, -1]])
    assert (plan.batch(0, nearest)[::2] // 3).tolist() == [2, 4, 3, 1]


def test_neighbours_and_windows_exclude_each_other():
    index = ItemIndex(np.arange(8) // 2, np.zeros(4, np.int32), list("abcd"), np.array([4, 8]))
    with pytest.raises(UserError, match="batch.neighbours takes items from anywhere.* --batch.window 0"):
        make_sampler(index, BatchSettings(items=2, views=2, neighbours=0.5), 0, True, window=4)


def test_the_example_in_the_module_is_what_is_drawn():
    plan = PKSampler(np.repeat(np.arange(5), 3), items=2, views=2, seed=0)
    assert [(plan.batch(step) // 3)[::2].tolist() for step in range(5)] == [[2, 4], [3, 0], [1, 4], [1, 3], [0, 2]]
    assert plan.batch(2).tolist() == [5, 3, 12, 13]
