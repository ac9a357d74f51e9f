"""What was there stays there, whole, where there is no room for what comes."""

import contextlib
import gc
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pytest

from clipfh import UserError
from clipfh.storage import store
from clipfh.storage.remote import Patient

CODE = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from clipfh.storage import store

folder, plain = Path(sys.argv[1]), {"use_dictionary": False, "compression": "none"}

def fill(text):
    for write in (
        lambda: store.write(folder / "written", text),
        lambda: store.Folder(folder).write_table("table", pa.table({"text": list(text)}), **plain),
    ):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            write()
        except OSError as error:
            print(type(error).__name__)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

for text in ("old", "new" * 100_000):
    fill(text)
"""


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    ran = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["OSError"] * 2
    assert store.Folder(tmp_path).read_table("table")["text"].to_pylist() == ["o", "l", "d"]
    assert (tmp_path / "written").read_text() == "old"
    assert not list(tmp_path.rglob("*.new"))


def test_a_file_that_was_written_in_part_is_not_whole(tmp_path):
    file = tmp_path / "state"
    file.write_text("old")
    with pytest.raises(KeyError), store.replacing(file) as new:
        new.write(b"half")
        raise KeyError
    assert file.read_text() == "old"
    with pytest.raises(UnicodeEncodeError):
        store.write(file, "\udc80")
    assert file.read_text() == "old"
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_that_is_not_there_is_an_error_and_no_more(tmp_path):
    with pytest.raises(FileNotFoundError):
        store.write(tmp_path / "none/file", "text")
    gc.collect()


def test_a_folder_lists_reads_and_writes_what_lies_in_it(tmp_path):
    folder = store.Folder(tmp_path / "a run #1 100%")
    assert not folder.exists() and folder.folders("trials") == [] and folder.read_json("none") == {}
    folder.make()
    folder.write("lines", '{"step": 1}\n{"step": 2}\n')
    folder.write_table("table", pa.table({"AP": [0.5]}))
    (folder / "trials").make()
    for name in ("0002", "0001"):
        (folder / "trials" / name).make()
    assert folder.read_lines("lines") == [{"step": 1}, {"step": 2}]
    assert folder.read_table("table").to_pydict() == {"AP": [0.5]}
    assert [str(each) for each in folder.folders("trials")] == [f"{folder}/trials/{n}" for n in ("0001", "0002")]
    folder.remove("trials")
    assert sorted(each.name for each in folder.local_path().iterdir()) == ["lines", "table"]
    assert time.time() - folder.modified("lines") < 60


def test_an_error_names_the_file(tmp_path):
    folder = store.Folder(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        folder.read_text("none")
    assert (caught.value.filename, caught.value.strerror) == (f"{tmp_path}/none", "No such file or directory")
    folder.write("broken", "{")
    with pytest.raises(UserError, match="broken can't be read"):
        folder.read_json("broken")


def test_a_folder_at_a_uri_is_written_whole_too(tmp_path):
    files, folder = pa.fs._MockFileSystem(), store.Folder(f"file://{tmp_path}")
    folder.write("file", "text")
    assert folder.local_path("file").read_text() == "text" == store.Folder(tmp_path).read_text("file")
    store.write("file", "text", pa.fs.PyFileSystem(Patient(files, "files")))
    assert [info.path for info in files.get_file_info(pa.fs.FileSelector("", recursive=True))] == ["file"]


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "export"
    path.mkdir()
    for ends_well in (False, True):
        with contextlib.suppress(KeyError), store.whole_folder(path) as new:
            (new / "weights").touch()
            assert not any(path.iterdir())
            if not ends_well:
                raise KeyError
        assert [file.name for file in tmp_path.rglob("*")] == ["export"] + ["weights"] * ends_well


def test_a_model_of_a_folder_is_no_address():
    assert store.as_text(Path("local-dir:/models/mine")) == "local-dir:/models/mine"
    assert store.as_text(Path("s3://bucket/runs")) == "s3://bucket/runs"
