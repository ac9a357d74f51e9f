"""What was there stays there, whole, where there is no room for what comes."""

import gc
import subprocess
import sys

import pytest

from clipfh.storage import store

CODE = """
import pickle, resource, sys
from pathlib import Path
import pyarrow.fs
from clipfh.storage import store as files

folder = Path(sys.argv[1])
store, path = pickle.loads(pickle.dumps(files.local_store())), str(folder / "copied")
(folder / "copied").mkdir()

def fill(text):
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "state").write_text(text)
    for write in (
        lambda: files.write(folder / "written", text),
        lambda: pyarrow.fs.copy_files(str(source), path, destination_filesystem=store),
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
    assert ran.stdout.split() == ["OSError", "OSError"]
    assert (tmp_path / "written").read_text() == (tmp_path / "copied/state").read_text() == "old"
    assert not list(tmp_path.rglob("*.new"))


def test_a_file_that_nobody_closed_is_not_whole(tmp_path):
    file = tmp_path / "state"
    file.write_text("old")
    stream = store.local_store().open_output_stream(str(file))
    stream.write(b"half")
    del stream
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
