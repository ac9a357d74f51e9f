"""Runs: what they leave behind, the same for any number of workers, exact after kills."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from conftest import TINY
from nodes import await_reports
from PIL import Image
from safetensors.torch import load_file

import clipfh
from clipfh import UserError
from clipfh.cluster.resources import Resources
from clipfh.config import presets, schema
from clipfh.config.experiment import LOSS_TERMS
from clipfh.data import decoding, images
from clipfh.data.prepare import prepare
from clipfh.data.sampler import ItemIndex, build_index, make_sampler
from clipfh.learn import learner
from clipfh.learn.learner import ItemCaptions
from clipfh.model import checkpoint
from clipfh.model.architecture import find as find_architecture
from clipfh.model.clip import get_preprocess
from clipfh.model.towers import embed_images
from clipfh.retrieval import evaluate
from clipfh.storage import layout, run_folder
from clipfh.train import driver, stream, worker
from clipfh.train import inputs as inputs_module
from clipfh.train.inputs import (
    VALIDATION,
    is_warm_started,
    load_start,
    notes_on_singles,
    open_run,
    prepare_inputs,
    tokenize_captions,
    validation_codes,
)
from clipfh.train.run_inputs import Inputs

# fmt: skip


@pytest.fixture(scope="module")
def fitted(ray_cluster, small_catalogue, tmp_path_factory):
    """Run an experiment in a folder of its own; (experiment, workers) to the folder."""

    def run(experiment, workers=1, name="run"):
        out = tmp_path_factory.mktemp(name) / "run"
        clip, experiment = open_run(out, experiment, small_catalogue)
        resources = Resources(workers=workers, cpus=1, gpus=0, threads=1)
        driver.run_training(experiment, prepare_inputs(small_catalogue, experiment, clip, stream), out, resources)
        return out

    return run


@pytest.fixture
def trained_here(small_catalogue, tmp_path):
    """Run TINY with other settings in this process, in a folder of its own; settings to the folder.

    By one thread: a share of the cores follows what else runs, and each number of threads rounds in its own way.
    """
    folders = (tmp_path / f"run-{number}" for number in itertools.count())

    def run(settings=None, stage="image"):
        settings = TINY | (settings or {})
        done = clipfh.train(stage, small_catalogue, next(folders), settings=settings, cpus_per_worker=1)
        return done.out.local_path()

    return run


@pytest.fixture(scope="module")
def image_run(fitted, tiny):
    return fitted(tiny)


def final(run: Path) -> dict[str, torch.Tensor]:
    """Raw weights of the run's last checkpoint."""
    snapshot = json.loads((run / "checkpoints" / layout.SNAPSHOT).read_text())
    return load_file(
        run / "checkpoints" / snapshot["latest_checkpoint_result"]["checkpoint_dir_name"] / layout.RAW_WEIGHTS
    )


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_a_run_leaves_what_it_should(image_run, tiny):
    lines = run_folder.read_metrics(image_run)
    assert [line["images"] for line in lines] == [64, 128, 192]
    for key in (
        "loss",
        "loss_supcon",
        "floor_supcon",
        "collapse_supcon",
        "grad_norm",
        "val_mAP",
        "data_wait",
        "stream",
    ):
        assert all(key in line for line in lines), key
    assert lines[-1]["best_val_mAP"] == max(line["val_mAP"] for line in lines)
    assert schema.load_experiment(image_run / "experiment.json") == tiny
    assert len((image_run / "stream.jsonl").read_text().splitlines()) == 12
    assert list((image_run / "tensorboard").iterdir())
    weights = checkpoint.load(image_run)
    assert weights.metrics["val_mAP"] == lines[-1]["best_val_mAP"], "a run's weights are its best checkpoint's"


def test_only_the_image_tower_moves_in_the_image_stage(image_run, tiny):
    before, after = load_start(tiny).state_dict(), final(image_run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("visual.") for name in moved)


def test_a_run_repeats_to_the_last_digit(trained_here):
    one, again = trained_here(), trained_here()
    timing = ("images_per_second", "data_wait", "began", "time")
    first, second = (
        [{k: v for k, v in m.items() if k not in timing} for m in run_folder.read_metrics(r)] for r in (one, again)
    )
    assert first == second
    assert apart(final(one), final(again)) == 0


def test_two_workers_train_what_one_does_and_share_its_windows(fitted, trained_here, small_catalogue):
    settings: dict[str, object] = {f"loss.{term}": 0.2 for term in LOSS_TERMS}
    settings |= {"loss.center": 1e-3, "loss.arcface_start": "mean", "batch.memory": 20, "optimizer.lr": 1e-4}
    settings |= {"budget.images": 64, "batch.items": 4, "batch.window": 60}
    experiment = presets.resolve("joint", None, TINY | settings)
    readers, over = set(), threading.Event()

    def look():
        while not over.wait(0.05):
            readers.update(name for name in ray.util.list_named_actors() if name.startswith("clipfh-windows-"))

    looking = threading.Thread(target=look)
    looking.start()
    one, two = trained_here(settings, "joint"), fitted(experiment, 2)
    over.set()
    looking.join()
    assert len(readers) == 1
    index = decoding.read_index(small_catalogue, "train")
    plan = make_sampler(index, experiment.batch, experiment.seed, experiment.loss.takes_singles, window=60)
    assert len(plan.plan.windows(0).item_ends) > 1
    drawn = [json.loads(line)["images"] for line in (two / "stream.jsonl").read_text().splitlines()]
    assert drawn == [plan.batch(step).tolist() for step in range(8)]
    assert (one / "stream.jsonl").read_text() == (two / "stream.jsonl").read_text()
    losses = [run_folder.read_metrics(run)[-1] for run in (one, two)]
    for term in ("loss", *(f"loss_{t}" for t in LOSS_TERMS)):
        assert losses[0][term] == pytest.approx(losses[1][term], rel=1e-4), term
    assert apart(final(one), final(two)) < 5e-4, "a step of AdamW turns rounding of tiny gradients into up to lr"


def test_divergence_ends_the_run_with_the_reason(trained_here, tmp_path):
    with pytest.raises(UserError, match="not finite"):
        trained_here({"optimizer.lr": 1e30, "optimizer.clip": 0.0})
    last = run_folder.read_metrics(tmp_path / "run-0")[-1]
    assert "loss or gradient are not finite at step" in last["diverged"] and last["val_mAP"] == 0.0
    assert len(last["diverged_images"]) == 16 and last["diverged_images"][0] in last["diverged"]


def test_a_gpu_with_too_little_memory_is_one_line_and_not_tried_again(ray_cluster, small_catalogue, tiny, tmp_path):
    started = tmp_path / "started"

    class Weights:
        def items(self):
            with started.open("a") as file:
                file.write("once ")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    clip, experiment = open_run(tmp_path / "run", tiny, small_catalogue)
    inputs = dataclasses.replace(prepare_inputs(small_catalogue, experiment, clip, stream), weights=ray.put(Weights()))
    with pytest.raises(
        UserError, match=r"memory is too small \(CUDA out of memory.*2.00 GiB.*--batch.chunk 64"
    ) as caught:
        driver.run_training(experiment, inputs, tmp_path / "run", Resources(1, 1, 0, 1), retries=3)
    assert started.read_text() == "once " and "\n" not in str(caught.value)


def test_prompts_that_are_cut_are_counted(small_catalogue, tiny, tmp_path):
    names = small_catalogue.rows("train")["item_id"].unique().to_pylist()
    (tmp_path / "prompts.json").write_text(json.dumps({names[0]: "long " * 80, names[1]: "a shirt"}))
    experiment = schema.replace(tiny, {"text.file": str(tmp_path / "prompts.json"), "loss.infonce": 1.0})
    captions, num_cut = tokenize_captions(
        small_catalogue, pa.array(names), experiment, find_architecture(experiment.model), "train"
    )
    assert num_cut == 1 and (captions.of_item >= 0).tolist() == [True, True] + [False] * (len(names) - 2)


def test_items_without_a_prompt_are_told_and_all_of_them_are_an_error(small_catalogue, tiny, monkeypatch):
    names = small_catalogue.rows("train")["item_id"].unique().to_pylist()
    experiment = schema.replace(tiny, {"loss.supcon_captions": True})
    clip = load_start(experiment)
    for told, prompts in ((2, names[2:]), (len(names), [])):
        monkeypatch.setattr(
            inputs_module, "load_prompts_for", lambda *_, prompts=prompts: dict.fromkeys(prompts, "a hat")
        )
        if prompts:
            notes = notes_on_singles(prepare_inputs(small_catalogue, experiment, clip, Held()), experiment.loss)
            assert f"note: {told} train items have no prompt: terms that learn from prompts leave them out" in notes
        else:
            with pytest.raises(UserError, match="no train item has a prompt by text.strategy structured"):
                prepare_inputs(small_catalogue, experiment, clip, Held())


def test_why_no_prompt_of_a_file_is_of_a_train_item_is_told(small_catalogue, tiny, tmp_path):
    names = small_catalogue.rows("train")["item_id"].unique().to_pylist()
    (tmp_path / "prompts.json").write_text(json.dumps({names[0].upper(): "a shirt"}))
    experiment = schema.replace(tiny, {"text.file": str(tmp_path / "prompts.json"), "loss.infonce": 1.0})
    with pytest.raises(UserError, match="none of its 1 prompts .* its names differ in case, blanks or .0: 'ID_"):
        tokenize_captions(small_catalogue, pa.array(names), experiment, find_architecture(experiment.model), "train")


def test_patience_stops_a_run_that_no_longer_improves(trained_here):
    still = {"optimizer.lr": 1e-12, "budget.images": 640, "budget.patience": 2}
    assert len(run_folder.read_metrics(trained_here(still))) == 3


def test_a_report_that_is_not_due_costs_no_patience():
    progress = worker.Progress(best_val_mAP=0.5, reports_since_best=1, step=4)
    assert progress.with_score(0.4, is_due=True)["reports_since_best"] == 2
    assert progress.with_score(0.4, is_due=False)["reports_since_best"] == 1
    assert progress.with_score(0.6, is_due=False)["reports_since_best"] == 0


def test_begin_refuses_what_does_not_fit(image_run, small_catalogue, tiny, tmp_path):
    cases = [
        (tmp_path / "new", tiny, True, "holds no run; leave --resume out"),
        (image_run, tiny, False, "is not empty: --resume goes on with its run"),
        (image_run, schema.replace(tiny, {"optimizer.lr": 0.5}), True, "the settings differ from those in"),
    ]
    for out, experiment, resume, message in cases:
        with pytest.raises(UserError, match=message):
            open_run(out, experiment, small_catalogue, resume=resume)
    assert open_run(image_run, None, small_catalogue, resume=True)[1] == tiny
    with pytest.raises(UserError, match="was started from no other run: leave --warm-start out"):
        open_run(image_run, None, small_catalogue, "runs/other", resume=True)


def test_warm_start_takes_another_runs_weights(image_run, tiny):
    clip = load_start(tiny, str(image_run))
    expected = checkpoint.load(image_run).state
    assert all(torch.equal(tensor, expected[name]) for name, tensor in clip.state_dict().items())


# --- Kills -----------------------------------------------------------------------------------------------------------

LONG = {**TINY, "budget.images": 960, "budget.report_every": 192}


def command(catalogue, out, *more: str) -> list[str]:
    settings = [f"--{name}={value}" for name, value in LONG.items()] if "--resume" not in more else []
    clipfh = [sys.executable, "-m", "clipfh"]
    return [*clipfh, "train", "image", str(catalogue.path), f"--out={out}", "--cpus-per-worker=1", *settings, *more]


@pytest.fixture(scope="module")
def undisturbed(small_catalogue, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(command(small_catalogue, out), check=True, capture_output=True)
    return out


def assert_same(run: Path, undisturbed: Path) -> None:
    assert (run / "stream.jsonl").read_text() == (undisturbed / "stream.jsonl").read_text()
    assert [m["step"] for m in run_folder.read_metrics(run)] == [
        m["step"] for m in run_folder.read_metrics(undisturbed)
    ]
    assert apart(final(run), final(undisturbed)) < 1e-6


HERE, OVER_RAY = (), ("--address=local",)
"""A run in the command's own process, and one by Ray Train on this machine."""


@pytest.mark.slow
@pytest.mark.resilience
def test_a_run_that_is_told_to_end_and_killed_comes_to_the_same_end(small_catalogue, undisturbed, tmp_path):
    """SIGTERM after a report; over Ray its worker killed after two, then all of it; Ctrl-C after four; to the end."""
    run = tmp_path / "run"

    def start(*more: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command(small_catalogue, run, *more), start_new_session=True, **pipes)

    def assert_told(process: subprocess.Popen, reports: int, number: int, code: int, words: str) -> None:
        await_reports(process, run, reports)
        process.send_signal(number)
        line = f"clipfh: {words}; the same command with --resume goes on from the last checkpoint\n"
        assert (process.communicate()[1], process.returncode) == (line, code)

    assert_told(start(*HERE), 1, signal.SIGTERM, 143, "told to end")
    process = start("--resume", *OVER_RAY)
    await_reports(process, run, 2)
    os.kill(training_worker(process), signal.SIGKILL)
    await_reports(process, run, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert_told(start("--resume", *HERE), 4, signal.SIGINT, 130, "stopped")
    assert run_folder.latest_step(run) < 60, "stopped in mid-run"
    assert start("--resume", *HERE).wait() == 0
    assert_same(run, undisturbed)
    assert len(list((run / "checkpoints").glob("checkpoint_*-*"))) <= 2, "the best and the latest alone are kept"


def training_worker(process: subprocess.Popen) -> int:
    """Process of the one training worker of a command."""
    pids = subprocess.run(["pgrep", "-f", "ray::.*TrainWorker"], capture_output=True, text=True).stdout.split()
    (ours,) = (pid for pid in map(int, pids) if process.pid in ancestors(pid))
    return ours


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        found.append(pid)
    return found


def test_what_a_worker_loads_beforehand_asks_for_no_gpu():
    """Ray gives an actor its GPU when it takes the process; CUDA would not look again."""
    code = """
import torch
def asked(*_): raise SystemExit("a GPU was asked for")
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_isDriverSufficient"): setattr(torch._C, name, asked)
"""
    load, ask = "from clipfh.train import ray_worker; ray_worker.load()", "torch.cuda.is_available()"
    done = [subprocess.run([sys.executable, "-c", code + line], capture_output=True) for line in (load, ask)]
    assert [each.returncode for each in done] == [0, 1], done[0].stderr


def test_a_warm_start_keeps_the_preprocessing_of_its_weights(tmp_path):
    name = {"model.name": "ViT-L-14"}
    trained = presets.resolve("image", None, {**name, "model.pretrained": "laion2b_s32b_b82k"})
    checkpoint.save(tmp_path, trained, find_architecture(trained.model), {"visual.proj": torch.zeros(1)}, {}, {}, {})
    with pytest.raises(UserError, match=r"prepared as for .* give --model.pretrained laion2b_s32b_b82k$"):
        load_start(presets.resolve("joint", None, name), str(tmp_path))


def test_a_validation_photo_does_not_find_itself(tmp_path, tiny):
    """As in evaluation, whose figure of the zero-shot model is what trials are compared with."""
    rng, lines = np.random.default_rng(0), ["image_path,item_id,split"]
    for i in range(36):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{i}.png")
        splits = ("train",) if i < 6 else ("query", "gallery") if i < 9 else VALIDATION
        lines += [f"{i}.png,item{i // 3},{split}" for split in splits]
    (tmp_path / "shop.csv").write_text("\n".join(lines))
    made = prepare(str(tmp_path / "shop.csv"), tmp_path / "catalogue", image_size=64)
    clip = load_start(tiny)
    preprocess = get_preprocess(clip)
    encoded = [photo.as_py() for split in VALIDATION for photo in made.images(split)["image"]]
    pixels = np.stack([images.decode_for_evaluation(photo, preprocess) for photo in encoded])
    index = build_index(made.rows("train"), np.array([6]))
    captions = ItemCaptions(np.zeros((1, 77), np.int32), np.zeros(2, np.int32))
    one = learner.Learner(tiny, clip, index, captions, torch.device("cpu"))
    found = one.validate(learner.Validation(pixels, *validation_codes(made)))
    embedding = embed_images(one.towers, pixels, torch.float32)
    embedded = evaluate._assembled(made, evaluate.get_splits("val"), {}, embedding, None)
    assert found == pytest.approx(evaluate.compute_metrics(embedded, 0)["mAP"], abs=1e-9) and found < 0.5


def test_prompts_are_made_only_where_a_term_takes_them(small_catalogue, tiny, monkeypatch):
    names = small_catalogue.rows("train")["item_id"].unique().to_pylist()
    monkeypatch.setattr(inputs_module, "load_prompts_for", lambda *asked: pytest.fail("nobody wants them"))
    asked = small_catalogue, pa.array(names), tiny, find_architecture(tiny.model), "train"
    captions, num_cut = tokenize_captions(*asked)
    assert (captions.of_item == -1).all() and len(captions.of_item) == len(names) and num_cut == 0
    index = build_index(small_catalogue.rows("train"), np.array([small_catalogue.num_images("train")]))
    one = learner.Learner(tiny, load_start(tiny), index, captions, torch.device("cpu"))
    rows = make_sampler(index, tiny.batch, 0, tiny.loss.takes_singles).batch(0)
    one.train_step(rows, np.zeros((len(rows), 96, 96, 3), np.uint8))


def test_random_weights_are_drawn_by_each_runs_seed(tiny):
    index = ItemIndex(np.array([0, 0, 1, 1], np.int32), np.zeros(2, np.int32), ["a", "b"], np.array([4]))
    captions = ItemCaptions(np.zeros((0, 0), np.int32), np.full(2, -1))
    kept = {name: tensor.numpy() for name, tensor in load_start(tiny).state_dict().items()}

    def first(seed: int, weights) -> list[torch.Tensor]:
        inputs = Inputs(
            find_architecture(tiny.model), SimpleNamespace(index=index), captions, weights, None, None, 64, 4, 0, 0, 0
        )
        settings = {"seed": seed, "batch.items": 2}
        one = worker.make_learner(schema.replace(tiny, settings), inputs, torch.device("cpu"))
        return [weight.detach().clone() for weight in one.clip.parameters()]

    def are_equal(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
        return all(map(torch.equal, some, others))

    assert are_equal(first(0, None), load_start(tiny).parameters())
    assert are_equal(first(3, None), load_start(schema.replace(tiny, {"seed": 3})).parameters())
    assert not are_equal(first(3, None), first(0, None))
    assert are_equal(first(3, kept), first(0, kept)), "pretrained weights are the same for all seeds"


class Held:
    """A feed that holds nothing but what it is given."""

    put = staticmethod(lambda value: value)
    decode_for_evaluation = staticmethod(lambda *args: None)

    @staticmethod
    def share(catalogue, *splits, window):
        rows = catalogue.rows("train")
        return SimpleNamespace(index=build_index(rows, np.array([rows.num_rows])), window=0)


@pytest.mark.parametrize("settings,warm,held", [({}, False, False), ({}, True, True), ({"f": 1}, False, True)])
def test_only_weights_that_are_not_random_are_shared(small_catalogue, tiny, tmp_path, settings, warm, held):
    clip = load_start(tiny)
    if settings:
        torch.save(clip.state_dict(), tmp_path / "weights.pt")
        tiny = schema.replace(tiny, {"model.pretrained": str(tmp_path / "weights.pt")})
    assert (prepare_inputs(small_catalogue, tiny, clip, Held(), warm=warm).weights is not None) == held


def test_what_a_run_is_made_of_must_be_the_same_when_it_is_resumed(small_catalogue, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = small_catalogue.rows("train")["item_id"].unique().to_pylist()
    prompts, weights, out = tmp_path / "prompts.json", tmp_path / "warm.pt", tmp_path / "run"
    prompts.write_text(json.dumps({names[0]: "a shirt"}))
    torch.save(load_start(schema.replace(tiny, {"seed": 5})).state_dict(), weights)
    experiment = schema.replace(tiny, schema.with_absolute_paths({"text.file": "prompts.json"}))
    clip, _ = open_run(out, experiment, small_catalogue, "warm.pt")
    monkeypatch.chdir("/")
    again, resumed = open_run(out, None, small_catalogue, resume=True)
    assert resumed == experiment and torch.equal(again.visual.proj, clip.visual.proj) and is_warm_started(out)
    for file, option in ((prompts, "--text.file"), (weights, "--warm-start")):
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        with pytest.raises(UserError, match=f"--resume: the file of {option} has changed since"):
            open_run(out, None, small_catalogue, resume=True)
        file.write_bytes(before)
    weights.unlink()
    monkeypatch.setattr(run_folder, "latest_step", lambda out: 4)
    open_run(out, None, small_catalogue, resume=True)  # the checkpoint has all weights
