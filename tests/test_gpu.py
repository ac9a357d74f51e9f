"""What only a GPU shows, by the commands that people give: pytest -m gpu."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import TINY
from nodes import await_reports, reports, until

from clipfh.model import onnx
from clipfh.storage import run_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} finds no GPU that it can use"),
]

JOINT = {**TINY, "loss.triplet": 0.5, "loss.ce": 0.2, "loss.center": 1e-3, "loss.infonce": 0.5, "optimizer.lr": 1e-4}
JOINT |= {"augment.randaugment": 5, "augment.erase": 0.3}
LONG = {**TINY, "budget.images": 16_000, "budget.report_every": 2_000}
FLOAT32, COMPILED, ON_CPU = "--model.precision=float32", "--model.compile=true", "--gpus-per-worker=0"
MIB = 2**20


class Ran(NamedTuple):
    """A command that is over."""

    code: int
    output: str
    taken: int
    """bytes of the GPU's memory, at most"""


def taken() -> int:
    """Bytes of the GPU's memory that all processes hold."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def clipfh(*words: object, **env: str) -> Ran:
    """A command from its start until it is over and has given the GPU back."""
    process, before = start(*words, **env), taken()
    most = before
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=0.05)
                break
            most = max(most, taken())
    finally:
        if process.poll() is None:  # the test's time is over: the next ones want the GPU
            os.killpg(process.pid, signal.SIGKILL)
    until(lambda: taken() < before + 16 * MIB, 30)
    return Ran(process.returncode, output, most - before)


def start(*words: object, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "clipfh", *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **options)


def as_options(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


class Trained(NamedTuple):
    out: Path
    ran: Ran
    reports: list[dict]


@pytest.fixture(scope="module")
def trained(small_catalogue, tmp_path_factory) -> Callable[..., Trained]:
    """A joint run with these options: with all terms of the loss and all augmentation."""

    @functools.cache
    def run(*options: str) -> Trained:
        out = tmp_path_factory.mktemp("run") / "run"
        ran = clipfh("train", "joint", small_catalogue.path, f"--out={out}", *as_options(JOINT), *options)
        assert ran.code == 0, ran.output
        return Trained(out, ran, run_folder.read_metrics(out))

    return run


@pytest.fixture(scope="module")
def two_halves(small_catalogue, tmp_path_factory) -> tuple[Path, Ran]:
    """A sweep of two trials, each on half of the GPU."""
    folder = tmp_path_factory.mktemp("sweep")
    budget, base = ({k: v for k, v in LONG.items() if k.startswith("budget.") == of} for of in (True, False))
    search = {"optimizer.lr": {"loguniform": [1e-4, 1e-3]}}
    sweep = {"name": "halves", "stage": "image", "base": base, "search": search, "trials": 2}
    sweep |= {"budget": {k.removeprefix("budget."): v for k, v in budget.items()}}
    sweep |= {"placement": {"gpus_per_worker": 0.5, "concurrent": 2}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder / "out", clipfh("sweep", folder / "sweep.yaml", small_catalogue.path, "--out", folder / "out")


def assert_alike(one: Trained, other: Trained, loss: float, score: float) -> None:
    """The same batches; losses that differ by so small a share, and val mAP by so little."""
    assert len(one.reports) == len(other.reports) == 3
    for a, b in zip(one.reports, other.reports, strict=True):
        assert a["stream"] == b["stream"]
        terms = [name for name in a if name.startswith("loss")]
        assert {name: a[name] for name in terms} == pytest.approx({name: b[name] for name in terms}, rel=loss)
        assert a["val_mAP"] == pytest.approx(b["val_mAP"], abs=score)


def test_a_run_takes_the_gpu(trained):
    ran = trained().ran
    assert "1 worker on 1 GPU" in ran.output
    assert ran.taken > 256 * MIB


def test_a_run_placed_on_the_cpu_leaves_the_gpu_alone(trained):
    ran = trained(FLOAT32, ON_CPU).ran
    assert "in this process on CPU" in ran.output
    assert ran.taken < 16 * MIB


def test_the_gpu_trains_what_the_cpu_does(trained):
    assert_alike(trained(FLOAT32), trained(FLOAT32, ON_CPU), loss=0.01, score=0.02)


def test_a_compiled_run_trains_what_a_plain_one_does(trained):
    assert_alike(trained(FLOAT32), trained(FLOAT32, COMPILED), loss=0.01, score=0.02)


def test_bfloat16_trains_nearly_what_float32_does(trained):
    assert_alike(trained(), trained(FLOAT32), loss=0.05, score=0.1)


def test_two_trials_share_a_gpu_and_train_at_once(two_halves):
    out, ran = two_halves
    assert ran.code == 0, ran.output
    assert "2 trials, 2 at once, each 1 worker on 0.5 GPU" in ran.output
    trials = [lines for trial, lines in reports(out).items() if trial != "0000"]
    assert len(trials) == 2
    assert max(lines[0]["began"] for lines in trials) < min(lines[-1]["time"] for lines in trials)
    assert (out / "best").is_dir() and (out / "report.html").is_file()


def test_a_killed_run_frees_the_gpu_and_resumes_with_the_batches_of_one_that_was_not(
    two_halves, small_catalogue, tmp_path
):
    out, words = tmp_path / "run", ("train", "image", small_catalogue.path, "--out", tmp_path / "run")
    before = taken()
    process = start(*words, *as_options(LONG))
    await_reports(process, out, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: taken() < before + 16 * MIB, 60)
    assert 0 < run_folder.latest_step(out) < 1000, "killed in mid-run"
    ran = clipfh(*words, "--resume")
    assert ran.code == 0, ran.output
    unkilled = reports(two_halves[0])["0001"]  # of the same seed, batch and length
    assert [line["stream"] for line in run_folder.read_metrics(out)] == [line["stream"] for line in unkilled]


def test_the_gpu_evaluates_as_the_cpu_does(trained, small_catalogue, tmp_path):
    words = ("evaluate", small_catalogue.path, "--checkpoint", trained(FLOAT32).out, FLOAT32, "--random-splits=0")
    on_gpu, on_cpu = (
        clipfh(*words, "--out", tmp_path / name, **env)
        for name, env in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""}))
    )
    assert on_gpu.code == on_cpu.code == 0, on_gpu.output + on_cpu.output
    assert on_cpu.taken < 16 * MIB < 256 * MIB < on_gpu.taken
    scores = [json.loads((tmp_path / name / "metrics.json").read_text())["mAP"] for name in ("gpu", "cpu")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    ours, theirs = (
        np.stack(pq.read_table(tmp_path / name / "embeddings.parquet")["embedding"].to_numpy())
        for name in ("gpu", "cpu")
    )
    assert np.abs(ours - theirs).max() < 1e-4


def test_a_batch_that_does_not_fit_is_told_in_a_line(small_catalogue, tmp_path):
    full = torch.empty(torch.cuda.mem_get_info()[0] - 4096 * MIB, dtype=torch.uint8, device="cuda")
    settings = {"model": "ViT-B/16", "model.pretrained": "none", "batch.items": 16, "batch.views": 16}
    settings |= {"model.precision": "float32", "budget.images": 2560}
    ran = clipfh("train", "image", small_catalogue.path, "--out", tmp_path / "run", *as_options(settings))
    del full
    torch.cuda.empty_cache()
    assert_refused(ran, "--batch.chunk")


@pytest.mark.parametrize(
    "options,env,said",
    [
        (["--gpus-per-worker=2"], {}, "--gpus-per-worker"),
        ([f"--workers={torch.cuda.device_count() + 1}", "--batch.items=64"], {}, "--workers"),
        (["--gpus-per-worker=1"], {"CUDA_VISIBLE_DEVICES": "99"}, "driver"),
    ],
    ids=["more than one a worker", "more workers than GPUs", "one that torch can't use"],
)
def test_gpus_that_are_not_to_be_had_are_refused_in_a_line(options, env, said, small_catalogue, tmp_path):
    ran = clipfh(
        "train", "image", small_catalogue.path, "--out", tmp_path / "run", "--model=clipfh-small", *options, **env
    )
    assert_refused(ran, said)


def assert_refused(ran: Ran, said: str) -> None:
    assert ran.code == 2 and "Traceback" not in ran.output, ran.output
    assert said in ran.output.splitlines()[-1]


def test_onnx_towers_on_the_gpu_embed_as_on_the_cpu(trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("onnxruntime has no CUDA here: pip install onnxruntime-gpu")
    ran = clipfh("export", trained(FLOAT32).out, "--out", tmp_path / "model", "--onnx")
    assert ran.code == 0, ran.output
    file = tmp_path / "model/onnx/image.onnx"
    session = runtime.InferenceSession(file, providers=[("CUDAExecutionProvider", {"use_tf32": 0})])
    (side,) = {each for each in session.get_inputs()[0].shape if isinstance(each, int) and each > 3}
    images = np.random.default_rng(0).standard_normal((4, 3, side, side), np.float32)
    (embedding,) = session.run(None, {session.get_inputs()[0].name: images})
    assert np.abs(embedding - onnx.run_tower(file, images)).max() < 1e-3
