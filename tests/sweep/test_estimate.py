"""What a sweep will take: the arithmetic by hand, and one real measurement."""

import dataclasses
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from clipfh.cluster.resources import Resources
from clipfh.config import presets, schema, sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.config.sweep_file import SweepFile
from clipfh.data.decoding import read_index
from clipfh.model import checkpoint
from clipfh.model.architecture import find as find_architecture
from clipfh.model.devices import choose_device
from clipfh.storage import layout
from clipfh.sweep import estimate, run
from clipfh.train.inputs import tokenize_captions

GIB = 2.0**30
FILE = {
    "name": "x",
    "base": {"model.name": SMALL_MODEL, "batch.items": 8},
    "search": {"batch.views": {"choice": [2, 4, 8]}},
    "trials": 9,
    "budget": {"images": 9000, "first_rung": 1000, "reduction": 3},
}


def sweep(tmp_path, **changes) -> SweepFile:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**FILE, **changes}))
    return sweep_file.load(tmp_path / "sweep.yaml")


def test_estimate_images(tmp_path):
    # All see 1,000 images, a third of them up to 3,000, a ninth up to 9,000
    assert estimate.estimate_images(sweep(tmp_path), 9000) == pytest.approx(1000 + 2000 / 3 + 6000 / 9)
    assert estimate.estimate_images(sweep(tmp_path, budget={"images": 9000}), 9000) == 9000


def test_what_is_told(tmp_path):
    measured = estimate.StepCost("cpu", images_per_second=100, image=GIB / 32, rest=GIB, memory=2 * GIB)
    told = estimate.describe(sweep(tmp_path), measured, 1000)
    assert "9 trials of 9,000 images at most, 2,333 on average" in told
    assert "largest P x K that fits: 8 x 4, and not all of the space: take the larger out" in told
    assert "--batch.chunk 16" in told and "about 3 min" in told
    roomy = dataclasses.replace(measured, memory=3 * GIB)
    assert "largest P x K that fits: 8 x 8, the largest of the space (64 images would)" in estimate.describe(
        sweep(tmp_path), roomy, 1000
    )
    again = estimate.describe(sweep(tmp_path, final={"top": 2, "seeds": 2, "refit": True}), measured, 1000)
    assert "then 5 runs of 9,000 images: about 8 min" in again


@pytest.mark.parametrize(
    ("workers", "chunk", "fits"),
    [
        (1, 0, False),  # 64 images at a time where 40 fit
        (2, 0, True),  # 32 on each worker
        (4, 64, True),  # a chunk is a worker's, and its part of the batch is 16
        (1, 64, False),  # nor does more than one worker divide a chunk
        (1, 32, True),
    ],
)
def test_a_chunk_is_a_workers_and_a_batch_is_shared_out(tmp_path, workers, chunk, fits):
    base = {"model.name": SMALL_MODEL, "batch.items": 32, "batch.views": 2, "batch.chunk": chunk}
    made = sweep(tmp_path, base=base, search={}, placement={"workers": workers})
    measured = estimate.StepCost("cuda", images_per_second=100, image=GIB, rest=0, memory=40 * GIB)
    assert ("largest P x K that fits: 32 x 2" in estimate.describe(made, measured, 1000)) == fits
    if workers == 2:
        chunked = sweep(
            tmp_path, base={**base, "batch.chunk": 64, "batch.items": 256}, search={}, placement={"workers": 4}
        )
        assert "no P x K of the space fits" in estimate.describe(chunked, measured, 1000), (
            "64 at a time on each of four"
        )


def test_half_a_gpu_has_half_the_memory_and_cuda_its_part(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 8 * GIB)  # so 2 GiB are the context's
    whole, half = (estimate._memory(torch.device("cuda"), share) for share in (None, 0.5))
    assert (whole, half) == (pytest.approx(0.9 * 78 * GIB), pytest.approx(0.9 * 38 * GIB))


def test_what_the_checkpoints_take_is_told(tmp_path):
    measured = estimate.StepCost("cpu", 100, GIB / 32, GIB, 2 * GIB, weights=GIB, checkpoint=2 * GIB)
    final = {"top": 2, "seeds": 2, "refit": True}
    told = estimate.describe(sweep(tmp_path, final=final), measured, 1000, at_once=3)
    # 9 trials and 5 runs with two each, and one being written by each of three; leaders: 2 weights and 5 x 2 of the
    # final runs, then all their weights
    assert "a checkpoint takes 2.00 GiB; with 3 trials at once some 22 GiB at most, and 7.00 GiB at the end" in told
    assert "(placement.keep_weights leaders; 62 GiB with all)" in told
    best = estimate.describe(sweep(tmp_path, placement={"keep_weights": "best"}), measured, 1000)
    assert "with 1 trial at once some 7.00 GiB at most, and 1.00 GiB at the end" in best


def test_sizes_are_those_of_a_real_checkpoint(small_catalogue, tmp_path):
    for stage in ("image", "joint"):
        experiment = presets.resolve(stage, None, {"model.name": SMALL_MODEL, "loss.ce": 0.1, "loss.infonce": 0.1})
        index, architecture = read_index(small_catalogue, "train"), find_architecture(experiment.model)
        captions, _ = tokenize_captions(small_catalogue, index.names, experiment, architecture, "train")
        learner = estimate._learner(experiment, index, captions, torch.device("cpu"), 8, 0)
        _, (weights, whole) = estimate._timed(learner, 8)
        folder = tmp_path / stage
        folder.mkdir()
        checkpoint.save(
            folder, experiment, architecture, learner.clip.state_dict(), learner.average.weights, learner.state(), {}
        )
        found = {file.name: file.stat().st_size for file in folder.iterdir()}
        assert weights == pytest.approx(found[layout.RAW_WEIGHTS] + found[layout.AVERAGE_WEIGHTS], rel=0.02)
        assert whole == pytest.approx(sum(found.values()), rel=0.02)


def test_a_measurement_is_of_this_machine(small_catalogue, tiny):
    wide = dataclasses.replace(tiny, batch=dataclasses.replace(tiny.batch, categories=8))
    measured = estimate.measure(small_catalogue, wide)  # more categories than the measured batch has items
    assert measured.device == str(choose_device()) and measured.images_per_second > 0
    assert 0 < measured.image < measured.memory and measured.images > 100
    assert measured.memory < psutil.virtual_memory().total and measured.checkpoint > measured.weights > 0


@pytest.mark.parametrize(
    ("views", "chunk", "workers", "images"),
    [(2, 0, 1, 32), (8, 0, 1, 64), (8, 0, 2, 32), (16, 0, 1, 100), (16, 16, 1, 128)],
)
def test_the_speed_of_a_gpu_is_that_of_a_batch_like_the_experiments(
    small_catalogue, tiny, monkeypatch, views, chunk, workers, images
):
    """A batch as small as those by which memory is measured would only show how fast work is handed over."""
    batch = {"batch.items": 8, "batch.views": views, "batch.chunk": chunk}
    peaks, timed = iter((8 * GIB, 32 * GIB)), []
    monkeypatch.setattr(estimate, "choose_device", lambda gpus: torch.device("cuda"))
    monkeypatch.setattr(estimate, "_memory", lambda device, gpus: 100 * GIB)
    monkeypatch.setattr(estimate, "_peak", lambda device: next(peaks))
    monkeypatch.setattr(estimate, "_learner", lambda *parts: parts[-2:])
    monkeypatch.setattr(estimate, "_timed", lambda made, images: timed.append((made, images)) or (0.5, (1.0, 2.0)))
    found = estimate.measure(small_catalogue, schema.replace(tiny, batch), workers=workers)
    assert found.images == 100 and found.images_per_second == images / 0.5
    assert timed[-1] == ((images, chunk), images)


def test_what_is_measured_is_given_what_a_worker_is(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(estimate, "measure", lambda catalogue, experiment, *given: asked.append(given))
    run._measure_here(sweep(tmp_path, placement={"gpus_per_worker": 0.5}), None, in_a_process=False)
    assert asked.pop() == (0, 0.5, 1)

    for seen, given in ((0, 0), (4, 1)):  # one that torch can't compute on is given too, and refused
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        run._measure_here(sweep(tmp_path), None, in_a_process=False)
        assert asked.pop() == (0, given, 1)

    task = SimpleNamespace(options=lambda **how: asked.append(how) or SimpleNamespace(remote=estimate.measure))
    monkeypatch.setattr("ray.remote", lambda **_: lambda function: task)
    monkeypatch.setattr("ray.get", lambda result: result)
    monkeypatch.setattr(run, "resolve_placement", lambda *_, **__: Resources(1, 1, 0.5, 1))
    monkeypatch.setattr(run, "max_concurrent_runs", lambda *_: 2)
    assert run._measure_on_a_worker(sweep(tmp_path), None)[1] == 2
    assert asked == [{"num_cpus": 1, "num_gpus": 0.5}, (1, 0.5, 1)]
