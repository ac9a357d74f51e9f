"""A run in this process gets the very batches that Ray Data would bring, and leaves a folder as Ray Train does."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY

from clipfh import UserError
from clipfh.cluster.resources import resolve_placement, share_cores
from clipfh.config import cores, memory
from clipfh.config.experiment import BatchSettings, Placement
from clipfh.data import decoding
from clipfh.data.decoding import BatchSpec, StreamPart
from clipfh.model.clip import load_initial_model
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.train import in_process, stream, worker
from clipfh.train.inputs import prepare_inputs
from clipfh.train.run import train


@pytest.fixture(scope="module")
def shared(small_catalogue):
    return in_process.InProcessFeed().share(small_catalogue, "train")


@pytest.fixture(scope="module")
def recipe(tiny):
    return BatchSpec(tiny.batch, tiny.augment, seed=3, size=64, singles=True)


def test_its_batches_are_those_of_ray_data(shared, recipe, small_catalogue, ray_cluster):
    recipe = dataclasses.replace(recipe, batch=BatchSettings(items=6, views=2, neighbours=0.5))
    near = np.arange(len(shared.index.names))[:, None] + 1
    here = list(in_process.InProcessFeed().batches(StreamPart(shared, recipe, 2, 9, nearest=near)))
    part = StreamPart(stream.share(small_catalogue, "train"), recipe, 2, 9, nearest=stream.put(near))
    over_ray = list(stream.batches(part))
    assert [step for step, _, _ in here] == list(range(2, 9)) == [step for step, _, _ in over_ray]
    for one, other in zip(here, over_ray, strict=True):
        np.testing.assert_array_equal(one[1], other[1])
        np.testing.assert_array_equal(one[2], other[2])


def test_a_batch_is_decoded_when_it_is_asked_for_in_as_many_parts_as_the_steps_have_threads(
    shared, recipe, monkeypatch
):
    steps, decode_batch = [], decoding.decode_batch
    monkeypatch.setattr(decoding, "decode_batch", lambda *args: steps.append(args[2]) or decode_batch(*args))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        stream = in_process.InProcessFeed().batches(StreamPart(shared, recipe, 2, 9))
        apart = [next(stream)[2] for _ in range(2)]
        assert steps == [2] * 3 + [3] * 3
        torch.set_num_threads(1)
        whole = next(in_process.InProcessFeed().batches(StreamPart(shared, recipe, 3, 9)))[2]
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(apart[1], whole)


def test_windows_are_read_once_a_pass_and_their_batches_are_the_samplers(recipe, small_catalogue, monkeypatch):
    reads, read_shard = Counter(), decoding.read_shard
    monkeypatch.setattr(decoding, "read_shard", lambda path: reads.update([path]) or read_shard(path))
    recipe = dataclasses.replace(recipe, batch=BatchSettings(items=2, views=2))
    feed = in_process.InProcessFeed()
    images = feed.share(small_catalogue, "train", window=40)
    assert not reads and images.window == 40
    plan, table = decoding.open_sampler(images, recipe), small_catalogue.images("train")
    assert len(plan.plan.windows(0).item_ends) > 1
    steps = 4 * plan.num_items // plan.items
    for step, rows, pixels in feed.batches(StreamPart(images, recipe, 0, steps, tasks=1)):
        np.testing.assert_array_equal(rows, plan.batch(step))
        expected = decoding.decode_batch(recipe, lambda row: table["image"][row].as_py(), step, 0, rows)
        np.testing.assert_array_equal(pixels, expected)
    assert max(reads.values()) <= 5, "four passes, and the window to come"
    assert decoding.read_paths(images, rows) == [table["path"][int(row)].as_py() for row in rows]


def test_a_run_keeps_the_window_that_it_began_with(small_catalogue, tmp_path, monkeypatch):
    images, size = small_catalogue.size("train")
    settings = {**TINY, "batch.items": 2, "budget.images": 32, "budget.report_every": 16}
    monkeypatch.setattr(in_process, "trains_here", lambda *_: True)
    monkeypatch.setattr(memory, "available", lambda: size)
    lines: list[str] = []
    train("image", small_catalogue, tmp_path / "run", settings=settings, log=lines.append)
    assert [line for line in lines if f"windows a pass, each of about {int(0.15 * images)} images" in line]
    monkeypatch.setattr(memory, "available", lambda: 100 * size)
    train("image", small_catalogue, tmp_path / "run", resume=True, log=lines.append)
    assert json.loads((tmp_path / "run" / layout.RUN).read_text())["window"] == int(0.15 * images)
    with pytest.raises(UserError, match="--keep-gib keeps decoded images of a catalogue that memory holds whole"):
        train("image", small_catalogue, tmp_path / "run", resume=True, keep_gib=1, log=lines.append)


def test_a_batch_has_neighbours_from_the_first_report_on_over_a_restart(small_catalogue, tmp_path, monkeypatch):
    settings = {**TINY, "batch.items": 6, "batch.views": 2, "batch.neighbours": 0.5}
    settings |= {"budget.images": 96, "budget.report_every": 48}
    monkeypatch.setattr(in_process, "trains_here", lambda *_: True)

    def stop_at_a_report(line):
        if "val mAP" in line:
            raise KeyboardInterrupt

    whole, halted = tmp_path / "whole", tmp_path / "halted"
    train("image", small_catalogue, whole, settings=settings, log=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        train("image", small_catalogue, halted, settings=settings, log=stop_at_a_report)
    assert len(run_folder.read_metrics(halted)) == 1
    train("image", small_catalogue, halted, resume=True, log=lambda line: None)
    one, other = (run_folder.read_metrics(folder)[-1] for folder in (whole, halted))
    assert one["stream"] == other["stream"]
    steps = [json.loads(line) for line in (whole / layout.STREAM).read_text().splitlines()]
    index = in_process.InProcessFeed().share(small_catalogue, "train").index
    plan = decoding.make_sampler(index, BatchSettings(items=6, views=2, neighbours=0.5), 0, True)
    at_random = [plan.batch(each["step"]).tolist() == each["images"] for each in steps]
    assert at_random[:4] == [True] * 4 and not all(at_random)


def test_validation_images_beyond_their_share_are_decoded_at_each_report(small_catalogue, monkeypatch):
    from clipfh.data.images import Preprocess

    splits, preprocess = ("val_query", "val_gallery"), Preprocess(64, (0.5,) * 3, (0.5,) * 3)
    feed = in_process.InProcessFeed()
    kept = feed.decode_for_evaluation(small_catalogue, splits, preprocess)
    monkeypatch.setattr(decoding, "EVALUATION_SHARE", 0)
    anew = feed.decode_for_evaluation(small_catalogue, splits, preprocess)
    assert kept.decode is None and anew.decode is not None and len(kept) == len(anew) == len(kept[:])
    for part in (slice(0, 3), slice(2, len(kept)), slice(len(kept) - 1, len(kept))):
        np.testing.assert_array_equal(kept[part], anew[part])


def test_kept_images_change_no_pixel_and_stay_within_their_memory(shared, recipe):
    feed, size, crop_min = in_process.InProcessFeed(), recipe.size, recipe.augment.crop_min
    sizes = [decoding.decoded_bytes(shard, size, crop_min) for shard in shared.shards]
    some = feed.cache_decoded(shared, sum(sizes) / 2 / 2**30, size, crop_min)
    kept = [each.pixels.nbytes for each in some.decoded if each is not None]
    assert 0 < sum(kept) <= sum(sizes) / 2
    plain_batches, cached_batches = (feed.batches(StreamPart(each, recipe, 0, 3)) for each in (shared, some))
    for plain, found in zip(plain_batches, cached_batches, strict=True):
        np.testing.assert_array_equal(plain[2], found[2])


@pytest.mark.parametrize("passes,kept", [(1.9, False), (2, True)])
def test_images_are_kept_decoded_unasked_where_they_come_again(passes, kept, small_catalogue, tiny, monkeypatch):
    images, batch = small_catalogue.num_images("train"), BatchSettings(items=2, views=2)
    budget = dataclasses.replace(tiny.budget, images=int(passes * images))
    experiment = dataclasses.replace(tiny, batch=batch, budget=budget)
    clip, feed = load_initial_model(experiment.model, 0), in_process.InProcessFeed()
    prepared = prepare_inputs(small_catalogue, experiment, clip, feed, "auto").images
    assert bool(prepared.decoded) == kept and all(prepared.decoded)
    monkeypatch.setattr(memory, "available", lambda: 8 * small_catalogue.size("train")[1])
    prepared = prepare_inputs(small_catalogue, experiment, clip, feed, "auto").images
    assert not prepared.window and not (prepared.decoded and all(prepared.decoded))


def test_validation_images_are_those_of_ray_data(small_catalogue, ray_cluster):
    from clipfh.data.images import Preprocess

    splits, preprocess = ("val_query", "val_gallery"), Preprocess(64, (0.5,) * 3, (0.5,) * 3)
    here = in_process.InProcessFeed().decode_for_evaluation(small_catalogue, splits, preprocess)
    over_ray = stream.decode_for_evaluation(small_catalogue, splits, preprocess)
    np.testing.assert_array_equal(here[:], over_ray[:])


def test_the_best_checkpoint_and_the_latest_are_kept(tmp_path):
    def save(folder):
        (folder / "weights").write_text("")

    told = []
    session = in_process._LocalSession(Folder(tmp_path), "val_mAP", told.append)
    with session.checkpoint() as begun:
        assert begun is None
    for step, score in enumerate([0.2, 0.5, 0.4, 0.3], 1):
        session.report({"step": step, "val_mAP": score}, save)
    half = tmp_path / "checkpoints" / "checkpoint_half.new"
    half.mkdir()  # as a kill leaves it
    again = in_process._LocalSession(Folder(tmp_path), "val_mAP", told.append)
    with again.checkpoint() as latest:
        assert latest
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("checkpoint_*-*"))
    listed = json.loads((tmp_path / "checkpoints" / layout.SNAPSHOT).read_text())
    assert sorted(each["checkpoint_dir_name"] for each in listed["checkpoint_results"]) == kept
    assert [each["metrics"]["step"] for each in listed["checkpoint_results"]] == [4, 2], "worst first"
    assert run_folder.find_best_checkpoint(tmp_path) == listed["checkpoint_results"][1]["checkpoint_dir_name"]
    assert run_folder.latest_step(tmp_path) == 4 and latest.endswith(
        listed["latest_checkpoint_result"]["checkpoint_dir_name"]
    )
    assert not half.exists() and len(told) == 4


def test_where_a_run_trains(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    alone = Placement()
    assert in_process.trains_here(alone, None)
    assert not in_process.trains_here(alone, "auto")
    assert not in_process.trains_here(dataclasses.replace(alone, workers=2), None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert not in_process.trains_here(alone, None), "a GPU is fed by processes"
    assert in_process.trains_here(dataclasses.replace(alone, gpus_per_worker=0.0), None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not in_process.trains_here(dataclasses.replace(alone, gpus_per_worker=0.0), None)


def test_threads_follow_the_runs_on_this_machine(tmp_path, monkeypatch):
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "available", lambda: 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(worker._Threads, "EVERY_S", 0.0)
    try:
        with worker._Threads(4, shared=True) as threads:
            threads.adjust()
            assert torch.get_num_threads() == 4
            with cores.Share():
                threads.adjust()
                assert torch.get_num_threads() == 2
            threads.adjust()
            assert torch.get_num_threads() == 4
        with worker._Threads(3, shared=False) as threads, cores.Share():
            threads.adjust()
            assert torch.get_num_threads() == 3, "as many as were asked for"
    finally:
        torch.set_num_threads(before)


def test_who_shares_cores(ray_cluster):
    assert resolve_placement(Placement()).shares_cores
    assert not resolve_placement(Placement(concurrent=2), alone=False).shares_cores, "trials have a thread each"
    assert not resolve_placement(Placement(cpus_per_worker=1.0)).shares_cores
    trials = resolve_placement(Placement(concurrent=2), alone=False)
    assert share_cores(trials, Placement(concurrent=2)).shares_cores, "the last runs may be fewer than the cores"
    assert not share_cores(trials, Placement(cpus_per_worker=1.0)).shares_cores
