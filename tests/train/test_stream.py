"""What reaches the workers is the plan, in order, the same for any number of workers and after any restart."""

import asyncio
import dataclasses
import gc
import sys
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import ray
from ray.data._internal.stats import STATS_ACTOR_NAME, STATS_ACTOR_NAMESPACE
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.tune.execution.class_cache import DEFAULT_ENV_VARS

from clipfh import UserError
from clipfh.cluster import ray_private
from clipfh.config.experiment import BatchSettings
from clipfh.data import decoding as decoding_module
from clipfh.data import sampler
from clipfh.data.decoding import BatchSpec, StreamPart
from clipfh.data.sampler import PKSampler, build_index
from clipfh.train import stream
from clipfh.train.in_process import InProcessFeed


@pytest.fixture(scope="module")
def shared(ray_cluster, small_catalogue):
    return stream.share(small_catalogue, "train")


@pytest.fixture(scope="module")
def recipe(tiny):
    return BatchSpec(tiny.batch, tiny.augment, seed=3, size=64, singles=False)


def streamed(shared, recipe, first, last, workers):
    """Step to (rows, images) of the global batch; the images put together from what each rank got."""
    parts = [list(stream.batches(StreamPart(shared, recipe, first, last, rank, workers))) for rank in range(workers)]
    for part in parts:
        assert [step for step, _, _ in part] == list(range(first, last)), "every step once, in order"
    found = {}
    for step in zip(*parts, strict=True):
        assert all(np.array_equal(rows, step[0][1]) for _, rows, _ in step), "all ranks know the whole batch's rows"
        found[step[0][0]] = step[0][1], np.concatenate([images for _, _, images in step])
    return found


def test_the_stream_is_the_plan_decoded(shared, recipe, small_catalogue):
    found = streamed(shared, recipe, 0, 6, workers=1)
    table = small_catalogue.images("train")
    index = build_index(small_catalogue.rows("train"), np.array([len(table)]))
    plan = PKSampler(index.item, recipe.batch.items, recipe.batch.views, recipe.seed, index.category, singles=False)
    for step, (rows, images) in found.items():
        np.testing.assert_array_equal(rows, plan.batch(step))
        expected = decoding_module.decode_batch(recipe, lambda row: table["image"][row].as_py(), step, 0, rows)
        np.testing.assert_array_equal(images, expected)


def test_windows_give_any_number_of_workers_the_samplers_batches(recipe, small_catalogue, ray_cluster):
    recipe = dataclasses.replace(recipe, batch=BatchSettings(items=2, views=2))
    images = stream.share(small_catalogue, "train", window=40)
    plan, table = decoding_module.open_sampler(images, recipe), small_catalogue.images("train")
    assert len(plan.plan.windows(0).item_ends) > 1
    last = 2 * plan.num_items // plan.items
    one, two = (streamed(images, recipe, first, last, workers) for first, workers in ((0, 1), (last - 2, 2)))
    for step, (rows, pixels) in one.items():
        np.testing.assert_array_equal(rows, plan.batch(step))
        expected = decoding_module.decode_batch(recipe, lambda row: table["image"][row].as_py(), step, 0, rows)
        np.testing.assert_array_equal(pixels, expected)
    for step, (rows, pixels) in two.items():
        np.testing.assert_array_equal(rows, one[step][0])
        np.testing.assert_array_equal(pixels, one[step][1])


def test_a_task_waits_until_its_window_is_near(recipe, small_catalogue):
    recipe = dataclasses.replace(recipe, batch=BatchSettings(items=2, views=2))
    part = StreamPart(InProcessFeed().share(small_catalogue, "train", window=40), recipe, 0, 100)
    plan = decoding_module.open_sampler(part.images, recipe)
    windows = [(0, 0), (0, 1), (1, 0), (1, 1)]
    start, then, _, far = (next(step for step in range(100) if plan.windows(step)[0] >= each) for each in windows)

    class Windows(stream._Windows):
        def _begin_reading(self, path):
            reading = Future()
            reading.set_result(path)
            return reading

    async def three_tasks():
        actor = Windows(part, ranks=1)
        waiting = asyncio.create_task(actor.open(0, far, windows[3]))
        await actor.begin(0, start)
        assert await actor.open(0, start, (0, 0)) == {s: part.images.shards[s] for s in plan.shards((0, 0))}
        await actor.close(0, then, far)
        for _ in range(100):
            await asyncio.sleep(0)  # let the task come as far as it can
        assert not waiting.done(), "steps before these are not yet decoded"
        await actor.close(0, start, then)
        assert set(await waiting) == set(plan.shards(windows[3]).tolist())
        assert min(actor.reader.handles) == windows[3]

    asyncio.run(three_tasks())


def test_a_decoder_lets_go_of_a_window_as_it_leaves_it(recipe, small_catalogue):
    """Python's garbage collection comes later: objects of several windows would fill the object store meanwhile."""
    recipe = dataclasses.replace(recipe, batch=BatchSettings(items=2, views=2))
    part = StreamPart(InProcessFeed().share(small_catalogue, "train", window=40), recipe, 0, 100)
    held: list[weakref.ref] = []

    def open_window(window):
        shards = {shard: decoding_module.read_shard(part.images.shards[shard]) for shard in plan.shards(window)}
        held.extend(map(weakref.ref, shards.values()))
        return shards

    gc.disable()
    try:
        decoder = decoding_module.BatchDecoder(part, open_window)
        plan = decoder.sampler
        for step in range(2 * plan.num_items // plan.items):
            decoder(step)
            alive = sum(each() is not None for each in held)
            assert alive == sum(len(plan.shards(window)) for window in plan.windows(step))
        del decoder
        assert not any(each() for each in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_kept_images_change_no_pixel_and_stay_within_their_memory(shared, recipe, share):
    whole = stream.cache_decoded(shared, 1.0, recipe.size, recipe.augment.crop_min)
    sizes = [ray.get(ref).pixels.nbytes for ref in whole.decoded]
    limit = share * sum(sizes) / 2**30
    some = stream.cache_decoded(shared, limit, recipe.size, recipe.augment.crop_min)
    kept = [size for size, ref in zip(sizes, some.decoded, strict=True) if ref]
    assert sum(kept) <= limit * 2**30 and bool(kept) == bool(share) and (len(kept) == len(sizes)) == (share == 1)
    plain, found = (streamed(each, recipe, 0, 3, 1) for each in (shared, some))
    for step in plain:
        np.testing.assert_array_equal(plain[step][1], found[step][1])


def test_more_than_the_object_store_is_refused(shared):
    with pytest.raises(UserError, match="--keep-gib 1000 is more"):
        stream.cache_decoded(shared, 1000, 64, 0.5)


def test_three_workers_get_the_same_batches_and_pixels(shared, recipe):
    """Though they can't share 16 images evenly."""
    one, three = (streamed(shared, recipe, 0, 4, workers) for workers in (1, 3))
    for step in one:
        np.testing.assert_array_equal(one[step][0], three[step][0])
        np.testing.assert_array_equal(one[step][1], three[step][1])


def test_nothing_is_loaded_where_it_is_not_used(recipe, small_catalogue):
    """A worker loads open_clip, its tasks and Ray Data's own actor do not, and none loads what timm and it would."""

    def load(block, **_):
        step = block["step"]
        return {"step": step, "row": step, "image": np.full(len(step), "open_clip" in sys.modules)}

    # Processes of this test's own: others may have loaded something, and are not to decode by `load`
    @ray.remote(runtime_env=ray_private.setup_hook_env("clipfh.train.ray_worker.load"), max_calls=1)
    def worker(images):
        stream._decode_steps = load
        stream.TASK["runtime_env"] = {"env_vars": {**stream.TASK["runtime_env"]["env_vars"], "TEST": "of its own"}}
        decoding = [bool(image) for _, _, image in stream.batches(StreamPart(images, recipe, 0, 2))]
        return [name in sys.modules for name in ("open_clip", "wandb", "transformers")], decoding

    for name in ray.util.list_named_actors(all_namespaces=True):
        if name["namespace"] == STATS_ACTOR_NAMESPACE:  # another test's
            ray.kill(ray.get_actor(**name))
            while name in ray.util.list_named_actors(all_namespaces=True):
                pass
    assert ray.get(worker.remote(stream.share(small_catalogue, "train"))) == ([True, False, False], [False, False])
    actor = ray.get_actor(STATS_ACTOR_NAME, STATS_ACTOR_NAMESPACE)
    assert not ray.get(actor.__ray_call__.remote(lambda _: "open_clip" in sys.modules))


def test_a_workers_tasks_use_the_drivers_processes(ray_cluster):
    """Their environments are the same to the letter, though the one is asked for by a trial's worker."""

    @ray.remote(**stream.TASK)
    def environment():
        return ray.get_runtime_context().get_runtime_env_string()

    @ray.remote
    def of_a_task():
        return ray.get(environment.remote())

    train = {**DEFAULT_ENV_VARS, **get_env_vars_to_propagate(), **ray_private.setup_hook_env("gc.collect")["env_vars"]}
    assert ray.get(of_a_task.options(runtime_env={"env_vars": train}).remote()) == ray.get(environment.remote())


def test_a_restart_goes_on_where_it_was(shared, recipe):
    assert not list(stream.batches(StreamPart(shared, recipe, 3, 3)))
    whole, rest = streamed(shared, recipe, 0, 7, 1), streamed(shared, recipe, 4, 7, 1)
    for step in rest:
        np.testing.assert_array_equal(whole[step][1], rest[step][1])


def test_another_seed_is_another_stream(shared, recipe):
    other = dataclasses.replace(recipe, seed=4)
    assert not np.array_equal(streamed(shared, recipe, 0, 1, 1)[0][0], streamed(shared, other, 0, 1, 1)[0][0])


def test_digest_tells_streams_apart():
    rows = np.arange(4)
    assert sampler.digest("", 0, rows) == sampler.digest("", 0, rows.astype(np.int32))
    different = {sampler.digest("", 0, rows), sampler.digest("", 1, rows), sampler.digest("", 0, rows[::-1])}
    assert len(different | {sampler.digest("x", 0, rows)}) == 4
