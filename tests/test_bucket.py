"""Every command with a bucket for what it reads and writes, and nothing of it on the disk."""

import json
import time

import open_clip
import pytest
from conftest import TINY
from object_store import Request

from clipfh.cli.main import main
from clipfh.storage import layout
from clipfh.storage.store import Folder

SETTINGS = [f"--{name}={value}" for name, value in TINY.items()]


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture
def catalogue(bucket, source, quick):
    uri = bucket.uri("catalogue")
    run("prepare", "--source", source, "--out", uri, "--image-size", 64)
    return uri


def test_each_command_reads_and_writes_a_bucket(bucket, catalogue, small_catalogue, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began, out = len(bucket.requests), bucket.uri
    assert Folder(catalogue).read_json(layout.CATALOGUE)["hash"] == small_catalogue.manifest["hash"]
    assert layout.PLAN not in Folder(catalogue).files()
    run("train", "image", catalogue, "--out", out("run"), *SETTINGS)
    run("status", out("run"))
    assert "192 of 192 images" in capsys.readouterr().out
    run("evaluate", catalogue, "--out", out("test"), "--checkpoint", out("run"), "--random-splits=0")
    run("export", out("run"), "--out", out("export"))
    run("report", out("test"), out("run"), "--out", out("pages/report.html"))
    run("embed", catalogue, "--checkpoint", out("export"), "--out", out("index.parquet"))
    run("search", "--embeddings", out("index.parquet"), "--text", "a red dress", "--top=3", "--html", out("hits.html"))
    run("audit", catalogue)
    run("prompts", catalogue, "--model=clipfh-small", "--out", out("prompts.json"))
    run("train", "image", catalogue, "--out", out("warm"), "--warm-start", out("run"), *SETTINGS, "--budget.images=64")
    written = Folder(out("")).files()
    told = {
        "run/metrics.jsonl",
        "test/metrics.json",
        "pages/report.html",
        "hits.html",
        "prompts.json",
        "catalogue/audit.html",
    }
    assert told <= {*written}
    assert any(name.startswith("run/tensorboard/") for name in written)
    assert list(tmp_path.iterdir()) == []
    assert not [each for each in bucket.requests if each.kind == "copy"], "nothing is renamed"
    lists = [each.time for each in bucket.requests[began:] if each.kind == "list"]
    assert all(later - earlier > 1 for earlier, later in zip(lists, lists[60:], strict=False))
    export = Folder(out("export"))
    with export.fetched(*export.files()) as folder:
        assert open_clip.create_model_and_transforms(f"local-dir:{folder}")


def test_a_run_that_is_stopped_goes_on_with_all_that_it_reported(bucket, catalogue, capsys):
    """The store is slow, so that each checkpoint arrives long after its report."""
    words, out = ["train", "image", catalogue, "--out", bucket.uri("run"), *SETTINGS], Folder(bucket.uri("run"))

    def stop_after_the_second_report(request: Request) -> float | None:
        if "checkpoint_2" in request.path and request.kind in ("PUT", "part"):
            if len(out_lines()) == 2 and not stopped:
                stopped.append(request.path)
                raise_in_main_thread()
            return 0.5
        return None

    def out_lines() -> list[str]:
        return [line for line in told if "images: loss" in line]

    def raise_in_main_thread() -> None:
        import _thread

        _thread.interrupt_main()

    told, stopped = [], list[str]()
    import clipfh.cli.console as console

    plain = console.print_now
    console.print_now = lambda line: told.append(line) or plain(line)
    try:
        with bucket.failing(stop_after_the_second_report):
            assert main(words) == 130
    finally:
        console.print_now = plain
    reported = [line["step"] for line in out.read_lines(layout.REPORTS)]
    snapshot = (out / layout.CHECKPOINTS).read_json(layout.SNAPSHOT)
    assert snapshot["latest_checkpoint_result"]["metrics"]["step"] == reported[-1], "stopping waits for the last one"
    run(*words, "--resume")
    assert [line["step"] for line in out.read_lines(layout.REPORTS)] == [4, 8, 12]


def test_an_outage_is_waited_out_in_the_middle_of_a_run(bucket, catalogue, capfd, monkeypatch):
    began = time.monotonic()
    words = ["train", "image", catalogue, "--out", bucket.uri("run"), *SETTINGS]

    def away(request: Request) -> int | str | None:
        nonlocal began
        is_first = "metrics.jsonl" in request.path and request.method == "PUT"
        began = time.monotonic() if is_first and began == 0 else began
        return 503 if began and time.monotonic() - began < 8 else None

    began = 0
    with bucket.failing(away):
        run(*words)
    assert "s3://shop does not answer" in capfd.readouterr().err
    assert len(Folder(bucket.uri("run")).read_lines(layout.REPORTS)) == 3


def test_a_catalogue_that_was_cut_off_goes_on(bucket, source, quick, small_catalogue):
    """A kill leaves shards and a plan, and no manifest: the next start takes the shards that are there."""
    uri = bucket.uri("catalogue")
    run("prepare", "--source", source, "--out", uri, "--image-size", 64)
    folder = Folder(uri)
    whole, first = folder.files(), min(name for name in folder.files() if name.startswith("train-"))
    plan = {"plan": folder.read_json(layout.CATALOGUE)["plan"]}
    for name in (layout.CATALOGUE, first):
        folder.remove_file(name)
    folder.write(layout.PLAN, json.dumps(plan))
    bucket.requests.clear()
    assert main(["evaluate", uri, "--out", bucket.uri("x"), "--model", "clipfh-small"]) == 2, "half-written"
    run("prepare", "--source", source, "--out", uri, "--image-size", 64)
    assert {n: size for n, size in folder.files().items() if n.endswith(".parquet")} == {
        n: size for n, size in whole.items() if n.endswith(".parquet")
    }
    assert folder.read_json(layout.CATALOGUE)["hash"] == small_catalogue.manifest["hash"]
    sent = {each.path.rpartition("/")[2] for each in bucket.requests if each.method == "PUT" and "parquet" in each.path}
    assert sent == {first}
