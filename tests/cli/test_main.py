"""What a user can fix is one line and exit code 2; nothing is started for it."""

import argparse
import contextlib
import functools
import json
import shutil
import signal
from pathlib import Path

import pytest
from ray.exceptions import OutOfDiskError, OutOfMemoryError

import clipfh
from clipfh.cli import main, options
from clipfh.model.checkpoint import load_model


def refused(capsys, *words):
    """The one line that a command ends with."""
    assert main.main([str(word) for word in words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("clipfh: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "words,message",
    [
        (["train", "image", "none", "--out", "x", "--optimizer.lrr", "1"], "did you mean --optimizer.lr?"),
        (["train", "image", "none", "--out", "x", "--optimizer.lr", "abc"], "optimizer.lr must be a number, not 'abc'"),
        (["train", "image", "none", "--out", "x", "--batch.items", "1.5"], "batch.items must be a whole number"),
        (["train", "image", "none", "--out", "x", "--preset", "joint-v2"], "not for the image stage"),
        (["train", "image", "none", "--out", "x", "--loss", "foo"], "unknown loss 'foo'"),
        (["train", "image", "none", "--out", "x", "--workers", "x"], "workers"),
        (
            ["train", "image", "none", "--out", "x", "--workers", "0-2"],
            "workers must be 1 or more, or the fewest and the most, as 1-8, not 0-2",
        ),
        (["train", "image", "none", "--out", "x", "--workers", "3-2"], "as 1-8, not 3-2"),
        (["train", "image", "none", "--out", "x"], "not a catalogue"),
        (["evaluate", "none", "--out", "x"], "not a catalogue"),
        (["prepare", "--source", "none", "--out", "x"], "none"),
        (["sweep", "none.yaml", "none", "--out", "x"], "no such sweep file"),
        (["export", "none", "--out", "x"], "no such file or folder"),
        (["embed", "none", "--out", "x"], "not a catalogue"),
        (["search", "--embeddings", "none", "--text", "a dress"], "make one with clipfh embed"),
        (["search", "--embeddings", "none"], "--image --text is required"),
        (["report", "none"], "none"),
        (["trian", "image"], "did you mean train?"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert not any(tmp_path.iterdir()), "nothing is written"


def test_a_catalogue_of_another_version(small_catalogue, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small_catalogue.path, other)
    manifest = json.loads((other / "catalogue.json").read_text())
    (other / "catalogue.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "version 99" in refused(capsys, "train", "image", other, "--out", tmp_path / "run")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_nobody_answers_at_the_address(small_catalogue, capsys, tmp_path, address, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    words = ["evaluate", small_catalogue.path, "--out", tmp_path / "x", "--model", "clipfh-small", "--address", address]
    assert address in refused(capsys, *words)


@pytest.mark.parametrize(
    "search,words",
    [
        ("{model.freeze_blocks: {choice: [0, 99]}}", "--model.freeze_blocks 99: clipfh-small has"),
        (
            "{model.freeze_blocks: {choice: [0, 2]}, model.lora_rank: {choice: [0, 8]}, "
            "model.lora_targets: {choice: [all, mlp]}}",
            "--model.lora_rank 8: the image tower of clipfh-small has no weight for it with model.lora_targets mlp and "
            "model.freeze_blocks 2",
        ),
        (
            "{optimizer.head_first: {choice: [0.0, 0.2]}, model.lora_rank: {choice: [0, 8]}, "
            "model.lora_targets: {choice: [all, mlp]}}",
            "may be drawn together, and do not fit together (--optimizer.head_first: with model.lora_targets mlp",
        ),
    ],
)
def test_a_sweep_that_may_train_nothing_starts_nothing(small_catalogue, capsys, tmp_path, search, words):
    (tmp_path / "sweep.yaml").write_text(f"base: {{model.name: clipfh-small}}\nsearch: {search}\n")
    line = refused(capsys, "sweep", tmp_path / "sweep.yaml", small_catalogue.path, "--out", tmp_path / "out")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_out_in_use_and_nothing_to_resume(small_catalogue, capsys, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    train = ["train", "image", small_catalogue.path, "--model", "clipfh-small", "--out"]
    assert "is not empty" in refused(capsys, *train, tmp_path / "used")
    assert "holds no run" in refused(capsys, *train, tmp_path / "new", "--resume")


def test_a_lost_node_is_one_line_that_says_how_to_go_on(tmp_path):
    from ray.exceptions import ActorDiedError

    (tmp_path / "sweep.yaml").write_text("")
    args = options.parse(["sweep", "file.yaml", "catalogue", "--out", str(tmp_path)])
    try:
        try:
            raise ActorDiedError()
        except ActorDiedError as cause:
            raise RuntimeError("evaluation") from cause
    except RuntimeError as error:
        line = main.explain(error, args)
    assert line.startswith("Ray lost a process or a node (") and line.endswith(
        "--resume goes on from the last checkpoint"
    )


@pytest.mark.parametrize(
    "error,cause",
    [
        (OutOfMemoryError("1 worker(s) were killed"), "memory was nearly full"),
        (OutOfDiskError(), "set RAY_TMPDIR to a"),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_machine_that_is_full_is_one_line_with_a_remedy(error, cause, as_text):
    if as_text:  # as it comes from another process
        error = RuntimeError(f"Traceback:\n  ...\nray.exceptions.{type(error).__name__}: {error}")
    args = options.parse(["evaluate", "catalogue", "--out", "new"])
    line = main.explain(error, args)
    assert cause in line and line.endswith("; give the same command again") and "\n" not in line


def test_a_store_that_refuses_is_one_line_before_anything_is_done(
    bucket, small_catalogue, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = str(small_catalogue.path)
    for command in (["prepare", "--source", path], ["evaluate", path], ["train", "image", path], ["embed", path]):
        assert "s3://nobody refuses" in refused(capsys, *command, "--out", "s3://nobody/x")
    for write in (clipfh.prepare, clipfh.evaluate, clipfh.embed, functools.partial(clipfh.train, "image")):
        with pytest.raises(clipfh.UserError, match="s3://nobody refuses"):
            write(path, Path("s3://nobody/x"))
    assert not list(tmp_path.iterdir())


def interrupted(_path):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("path", ["none", "interrupted"])
def test_a_program_that_calls_a_command_keeps_its_signal_handlers(path, monkeypatch, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if path == "interrupted":
        monkeypatch.setattr("clipfh.report.status.describe", interrupted)
    assert main.main(["status", path]) == (130 if path == "interrupted" else 2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("given,computed", [([], "float32"), (["auto"], "float32"), (["bfloat16"], "bfloat16")])
def test_models_are_measured_in_the_precision_of_exports(given, computed):
    """On any device: so a laptop's zero-shot and a GPU's tuned model are measured alike, and by a hash of one name."""
    precision = [f"--model.precision={value}" for value in given]
    args = options.parse(["evaluate", "none", "--out", "x", "--model", "clipfh-small", *precision])
    assert load_model(None, args.settings)[1].model.precision == computed


def test_being_told_to_end_while_ray_waits_is_said(monkeypatch, capsys):
    """Ray's wait takes the exit that the signal raises for one of its own, with another code."""

    def wait(args):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        raise SystemExit(1)

    monkeypatch.setattr("clipfh.cli.main.parse", lambda argv: argparse.Namespace(function=wait))
    assert main.main(["sweep"]) == 143
    assert capsys.readouterr().err == "clipfh: told to end; give the same command again\n"
