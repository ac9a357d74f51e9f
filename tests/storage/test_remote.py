"""Folders on a disk and in a bucket do the same; a store that fails is waited for, one that refuses is not."""

import contextlib
import errno
import pickle
import re
import shutil
import time

import httpx
import pyarrow as pa
import pyarrow.fs
import pytest
from object_store import CREDENTIALS, Request

from clipfh import UserError
from clipfh.storage import output, remote, store
from clipfh.storage.store import Folder


@pytest.fixture
def hasty(monkeypatch):
    """A store is given up sooner, and asked again sooner."""
    monkeypatch.setattr(remote, "PATIENCE", 8.0)
    monkeypatch.setattr(remote, "QUIET", 0.0)
    monkeypatch.setattr(output, "PATIENCE", 0.0)


def test_a_folder_lists_reads_and_writes_what_lies_in_it(place):
    assert not place.exists() and place.is_empty() and place.folders("trials") == [] and place.read_json("none") == {}
    place.make()
    place.write("lines", '{"step": 1}\n{"step": 2}\n')
    place.write_table("table", pa.table({"AP": [0.5]}))
    for name in ("0002", "0001"):
        (place / "trials" / name).make()
        (place / "trials" / name).write("file", name)
    assert place.is_folder() and not place.is_file() and place.is_file("lines") and not place.is_empty()
    assert place.read_lines("lines") == [{"step": 1}, {"step": 2}] and place.read_lines("none") == []
    assert place.read_table("table").to_pydict() == {"AP": [0.5]}
    assert store.open_parquet(place / "table").read(["AP"]).to_pydict() == {"AP": [0.5]}
    assert place.folders("trials") == [place / "trials" / name for name in ("0001", "0002")]
    assert (place / "trials" / "0001").name == "0001" and (place / "trials").parent == place
    assert place.files().keys() == {"lines", "table", "trials/0001/file", "trials/0002/file"}
    assert place.files()["lines"] == 24
    place.remove("trials")
    place.remove_file("table")
    assert place.files().keys() == {"lines"} and time.time() - place.modified("lines") < 60
    place.clear()
    assert place.is_empty()
    assert pickle.loads(pickle.dumps(place)) == place


def test_what_is_written_in_part_is_not_there(place):
    place.make()
    place.write("file", "old")
    with pytest.raises(KeyError), place.replacing("file") as new:
        new.write(b"half")
        raise KeyError
    with pytest.raises(KeyError), (place / "export").filling() as folder:
        (folder / "weights").touch()
        raise KeyError
    assert place.read_text("file") == "old" and place.files().keys() == {"file"}


def test_no_half_is_sent_where_a_copy_of_what_was_written_fails(bucket, monkeypatch):
    def half(source, target, *_):
        target.write(source.read(4))
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = Folder(bucket.uri("run"))
    folder.write("file", "old")
    monkeypatch.setattr(shutil, "copyfileobj", half)
    with contextlib.suppress(OSError):
        folder.write("file", "what is new")
    assert folder.read_text("file") in ("old", "what is new")
    with contextlib.suppress(OSError), folder.filesystem.open_output_stream(folder.path + "/file") as file:
        file.write(b"newer")
    assert folder.read_text("file") in ("old", "what is new", "newer")


def test_a_folder_is_filled_and_fetched_whole(place, bucket):
    place.make()
    bucket.requests.clear()
    content = bytes(range(256)) * 60_000  # in a bucket, two parts of an upload
    with (place / "export").filling(last="weights") as folder:
        (folder / "onnx").mkdir()
        for name in ("weights", "onnx/image", "words"):
            (folder / name).write_bytes(content)
    assert (place / "export").files() == dict.fromkeys(("weights", "onnx/image", "words"), len(content))
    with (place / "export").fetched("weights", "words", "none") as folder:
        assert (folder / "weights").read_bytes() == content == (folder / "words").read_bytes()
        assert not (folder / "none").exists()
    if not place.is_local:
        sent = [request.path for request in bucket.requests if request.kind in ("part", "PUT")]
        assert sent and sent[-1].endswith("/weights"), "others know by it that all is there"
        assert {request.kind for request in bucket.requests} <= {"part", "PUT", "POST", "HEAD", "GET", "list"}


def test_who_knows_that_a_folder_is_there_deletes_it_with_one_list(bucket):
    folder = Folder(bucket.uri("checkpoint"))
    folder.write("weights", "w")
    filesystem = pickle.loads(pickle.dumps(folder.filesystem_holding_it()))
    bucket.requests.clear()
    assert filesystem.get_file_info(folder.path).type == pyarrow.fs.FileType.Directory
    filesystem.delete_dir(folder.path)
    assert [each.kind for each in bucket.requests].count("list") == 1
    assert folder.is_empty() and filesystem.get_file_info(f"{folder.path}/weights").type == pyarrow.fs.FileType.NotFound


def test_a_large_object_is_read_in_the_parts_that_are_needed(bucket):
    folder = Folder(bucket.uri("large"))
    folder.write_table("table", pa.table({"a": range(300_000), "b": range(300_000)}), compression="none")
    bucket.requests.clear()
    assert store.open_parquet(folder / "table").read(["b"])["b"][-1].as_py() == 299_999
    ranges = [request.headers.get("range", "") for request in bucket.requests if request.method == "GET"]
    read = sum(int(high) - int(low) + 1 for low, high in re.findall(r"bytes=(\d+)-(\d+)", " ".join(ranges)))
    assert len(ranges) < 6 and read < 0.7 * folder.files()["table"]


@pytest.mark.parametrize("later", ["short", "longer than what was there"])
def test_a_file_that_is_replaced_while_it_is_read_is_one_or_the_other(bucket, later):
    folder, replaced = Folder(bucket.uri("run")), []
    folder.write("file", "what was there")

    def replace_behind_the_size(request: Request) -> None:
        if request.method == "GET" and request.path.endswith("/file") and not replaced:
            replaced.append(request.path)
            bucket.replace(request, later.encode())

    with bucket.failing(replace_behind_the_size):
        assert folder.read_text("file") == later
    assert replaced


def test_a_store_that_is_away_is_waited_for(bucket, hasty, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 120.0)
    folder = Folder(bucket.uri("run"))
    for fault in (503, "cut"):
        lines: list[str] = []
        monkeypatch.setattr(remote, "_tell", lines.append)
        with bucket.failing(lambda request, fault=fault, lines=lines: None if lines else fault):
            folder.write("file", "content")
        assert folder.read_text("file") == "content"
        assert ["does not answer" in lines[0], "answers again" in lines[1], len(lines)] == [True, True, 2]


FAULTS = {
    "whole": lambda request: request.kind == "PUT",
    "begin": lambda request: request.kind == "POST" and "uploadId" not in request.query,
    "part": lambda request: request.kind == "part",
    "end": lambda request: request.kind == "POST" and "uploadId" in request.query,
}
"""The requests that send a small file, and those that send a large one in parts."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_stays_away_is_said_in_one_line(bucket, hasty, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    folder, size = Folder(bucket.uri("run")), 9 if fault == "whole" else 20_000_000
    (tmp_path / "file").write_bytes(bytes(size))
    with bucket.failing(lambda request: 503 if FAULTS[fault](request) else None):
        for write in (lambda: folder.write("file", bytes(size)), lambda: folder.send(tmp_path)):
            with pytest.raises(UserError, match=r"s3://shop has not answered.*--resume"):
                write()
    assert not folder.exists("file")
    folder.send(tmp_path)
    assert folder.files() == {"file": size}


@pytest.mark.parametrize(
    ("uri", "status", "said"),
    [
        ("s3://nobody/run", None, "s3://nobody refuses .*NO_SUCH_BUCKET"),
        ("s3://shop/run", 403, "s3://shop refuses .*ACCESS_DENIED"),
        ("s3://key:secret@shop/run", None, "credentials in an address"),
        ("abfs://run:secret@shop.dfs.core.windows.net/run", None, "credentials in an address"),
        ("abfss://:secret@shop.blob.core.windows.net/run", None, "credentials in an address"),
        ("nosuch://shop/run", None, "no file system"),
    ],
)
def test_a_refusal_is_one_line_at_once(bucket, hasty, uri, status, said):
    with bucket.failing(lambda request: status), pytest.raises(UserError, match=said) as caught:
        output.require_writable(uri)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_hub_without_a_network_is_waited_for_too(hasty, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.0)

    def ask() -> None:
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    with pytest.raises(UserError, match=r"hf://datasets has not answered .*Name or service not known"):
        remote.patiently(ask, name="hf://datasets")


def test_an_address_at_which_nothing_listens_is_said_at_once(bucket, hasty, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="s3://shop has not answered.*AWS_ENDPOINT_URL"):
        output.require_writable("s3://shop/run")


def test_looking_whether_a_store_can_be_written_leaves_nothing(bucket):
    output.require_writable(bucket.uri("run"))
    assert bucket.objects() == {}


def test_what_failed_leaves_a_folder_as_it_was(place):
    with pytest.raises(KeyError), output.all_or_nothing(place, "metrics.json"):
        place.make()
        place.write("log", "text")
        raise KeyError
    assert not place.exists()
    with pytest.raises(KeyError), output.all_or_nothing(place, "checkpoints/checkpoint_*"):
        (place / "checkpoints" / "checkpoint_1").make()
        (place / "checkpoints" / "checkpoint_1").write("weights", "text")
        raise KeyError
    assert place.files()


def test_trials_that_all_failed_leave_their_leaderboard_to_resume_from(tmp_path):
    out = Folder(tmp_path / "sweep")
    with pytest.raises(KeyError), output.all_or_nothing(out, "trials/*/metrics.jsonl", "leaderboard.csv"):
        out.make()
        out.write("leaderboard.csv", "trial,status\n0001,failed\n")
        raise KeyError
    assert out.files().keys() == {"leaderboard.csv"}


def test_the_endpoint_is_read_as_awss_own_tools_read_it(tmp_path, monkeypatch):
    config = tmp_path / "config"
    config.write_text("[default]\nregion = eu-west-1\n[profile own]\nendpoint_url = http://store:9000\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    assert remote.endpoint() == ""
    monkeypatch.setenv("AWS_PROFILE", "own")
    assert remote.endpoint() == "http://store:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:9000")
    assert remote.endpoint() == "http://other:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://third:9000")
    assert remote.endpoint() == "http://third:9000"


def test_a_file_system_of_fsspec_is_one_too():
    folder = Folder("memory://shop/run")
    folder.write("file", "text")
    assert folder.read_text("file") == "text" and folder.files() == {"file": 4}
    folder.clear()


def test_what_goes_to_other_processes_holds_no_credentials(bucket):
    filesystem = Folder(bucket.uri("run")).filesystem
    pickled = pickle.dumps(filesystem)
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in pickled and pickle.loads(pickled) == filesystem
    assert isinstance(pickle.loads(pickled), pyarrow.fs.PyFileSystem)


def test_what_the_store_does_not_say_is_not_waited_for(bucket, hasty):
    folder = Folder(bucket.uri("shop"))
    folder.write("file", "content")
    with pytest.raises(OSError, match="it is a file"):
        folder.remove("file")
