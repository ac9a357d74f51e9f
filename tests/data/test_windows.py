"""Batches by windows: every property of batches without them, and each shard read once a pass."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfh.data.sampler import PKSampler
from clipfh.data.windows import WindowReader, choose_window


@st.composite
def cases(draw):
    """Items, the ends of shards, and what a sampler takes. Some items lie on two shards, also ones far apart."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=8, max_size=60))
    item = np.repeat(np.arange(len(sizes)), sizes)
    if draw(st.booleans()):  # galleries of the first items behind all others
        item = np.concatenate([item, np.arange(len(sizes) // 3)])
    ends = draw(st.sets(st.integers(1, len(item) - 1), max_size=12))
    singles = draw(st.booleans()) or (np.bincount(item) > 1).sum() < 2
    drawable = np.flatnonzero(np.bincount(item) > (0 if singles else 1))
    items = draw(st.integers(2, max(2, len(drawable) // 4)))
    category = np.random.default_rng(0).integers(0, 4, len(sizes))
    rest = {"category": category, "categories": draw(st.integers(0, items)), "singles": singles}
    rest |= {"window": draw(st.integers(1, len(item))), "shard_ends": np.array([*sorted(ends), len(item)])}
    arguments = (item, items, draw(st.integers(1, 5)), draw(st.integers(0, 5)))
    return drawable, arguments, rest


@given(cases())
@settings(max_examples=80, deadline=None)
def test_every_property_of_batches_holds_with_windows(case):
    drawable, (item, num_items, num_views, seed), rest = case
    plan = PKSampler(item, num_items, num_views, seed, **rest)
    views: dict[int, list[int]] = {i: [] for i in drawable.tolist()}
    drawn: list[int] = []
    for step in range(4 * len(drawable) // num_items + 8):
        rows = plan.batch(step).reshape(num_items, num_views)
        items = item[rows]
        assert (items == items[:, :1]).all() and len(set(items[:, 0])) == num_items, "P distinct items"
        drawn += items[:, 0].tolist()
        for chosen, i in zip(rows.tolist(), items[:, 0].tolist(), strict=True):
            assert len(set(chosen)) == min(num_views, (item == i).sum())
            views[i] += chosen
        windows = plan.windows(step)
        assert len(windows) <= 2
        held = set(np.concatenate([plan.shards(window) for window in windows]).tolist())
        assert set(np.searchsorted(rest["shard_ends"], rows.ravel(), side="right").tolist()) <= held
    for start in range(0, len(drawn) - len(drawable) + 1, len(drawable)):
        assert sorted(drawn[start : start + len(drawable)]) == drawable.tolist(), "each item once a pass"
    for i, chosen in views.items():
        counts = Counter(dict.fromkeys(np.flatnonzero(item == i).tolist(), 0))
        for view in chosen:
            counts[view] += 1
            assert max(counts.values()) - min(counts.values()) <= 1, "every view before any repeats"


@given(cases(), st.integers(0, 10**12))
@settings(max_examples=40, deadline=None)
def test_a_batch_by_windows_is_a_pure_function_of_seed_and_step(case, step):
    _, arguments, rest = case
    fresh, used = (PKSampler(*arguments, **rest) for _ in range(2))
    for other in (step + 3, max(0, step - 5), 0):
        used.batch(other)
    np.testing.assert_array_equal(fresh.batch(step), used.batch(step))


@given(cases())
@settings(max_examples=40, deadline=None)
def test_a_window_of_all_images_changes_no_batch(case):
    _, arguments, rest = case
    whole = PKSampler(*arguments, **{**rest, "window": len(arguments[0])})
    without = PKSampler(*arguments, **{name: rest[name] for name in ("category", "categories", "singles")})
    for step in range(12):
        np.testing.assert_array_equal(whole.batch(step), without.batch(step))


def shards_of_four(window: int, seed: int = 0) -> PKSampler:
    """Sixteen shards of four items of two images, P = 4, K = 2."""
    ends = np.arange(8, 129, 8)
    return PKSampler(np.repeat(np.arange(64), 2), 4, 2, seed, window=window, shard_ends=ends)


def test_each_shard_is_in_one_window_a_pass_and_windows_are_made_anew():
    plan = shards_of_four(window=32)
    passes = [[frozenset(plan.shards((p, w)).tolist()) for w in range(4)] for p in range(3)]
    for windows in passes:
        assert sorted(itertools.chain(*windows)) == list(range(16)) and {len(w) for w in windows} == {4}
    assert len({*passes[0], *passes[1], *passes[2]}) > 8, "other shards together in each pass"
    assert plan.plan.following((0, 3)) == (1, 0) and plan.plan.following((0, 2)) == (0, 3)


def test_a_reader_reads_each_shard_once_a_pass_and_holds_two_windows():
    plan, read, held = shards_of_four(window=32), Counter(), []
    reader = WindowReader(plan.shards, plan.plan.following, lambda shard: read.update([shard]) or shard, ranks=2)
    steps = 16 * 5  # five passes
    for step in range(steps):
        for rank in range(2):
            for window in plan.windows(step):
                assert set(reader.open(window)) == set(plan.shards(window).tolist())
            reader.move(rank, plan.windows(step)[0])
        held.append(len({shard for shards in reader.handles.values() for shard in shards}))
    assert max(read.values()) <= 6 and sum(read.values()) <= 16 * 5 + 4, "and the window to come"
    assert max(held) <= 8


def test_a_reader_waits_for_the_last_worker():
    plan = shards_of_four(window=32)
    reader = WindowReader(plan.shards, plan.plan.following, lambda shard: shard, ranks=2)
    reader.move(0, (0, 2))
    reader.move(1, (0, 0))
    assert {(0, 0), (0, 1)} <= set(reader.handles)
    reader.move(1, (0, 2))
    assert set(reader.handles) == {(0, 2), (0, 3)}


def test_a_reader_that_goes_back_holds_no_window_of_the_pass_before():
    plan = shards_of_four(window=32)
    reader = WindowReader(plan.shards, plan.plan.following, lambda shard: shard)
    reader.move(0, (1, 0))
    reader.move(0, (0, 0))
    assert set(reader.handles) == {(0, 0), (0, 1)}


def test_a_shard_of_two_windows_is_read_once():
    """Its last item goes on in the next shard, which is in another window."""
    reads = []
    reader = WindowReader(lambda window: np.array([window[1], window[1] + 1]), lambda w: (0, w[1] + 1), reads.append)
    reader.move(0, (0, 0))
    reader.move(0, (0, 1))
    assert reads == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "asked,size,window",
    [("auto", 50, 0), ("auto", 51, 294), ("auto", 1000, 15), (0, 1000, 0), (40, 10, 40), (1000, 10, 0), (5000, 9, 0)],
)
def test_a_window_is_chosen_by_memory_unless_it_is_asked_for(asked, size, window):
    assert choose_window(asked, images=1000, size=size, memory=100) == window


def test_runs_at_a_time_share_the_memory_for_windows():
    assert [choose_window("auto", 1000, 1000, 100, runs) for runs in (1, 3)] == [15, 5]
    assert choose_window("auto", 1000, 50, 100, runs=8) == 0, "all hold the same shards"


def test_a_late_step_takes_no_longer():
    plan, fresh = shards_of_four(window=32), shards_of_four(window=32)
    calls = []
    plan.plan._cut = lambda number: calls.append(number) or fresh.plan._cut(number)
    plan.batch(10**9)
    assert len(calls) <= 2, "the pass and the one before"
