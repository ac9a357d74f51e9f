"""Claims of real processes to this machine's cores."""

import subprocess
import sys

from clipfh.config import cores

CLAIM = """
import sys, pathlib
from clipfh.config import cores
with cores.Share(pathlib.Path(sys.argv[1])) as share:
    print("claimed", flush=True)
    sys.stdin.readline()
    print(share.threads(), flush=True)
"""


def claimed(folder) -> subprocess.Popen:
    """Another process that holds a claim until it is sent a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", CLAIM, str(folder)], **pipes)
    assert process.stdout.readline() == "claimed\n"
    return process


def test_threads_of_all_processes_add_up_to_the_cores(tmp_path, monkeypatch):
    total = cores.available()
    with cores.Share(tmp_path) as share:
        assert share.threads() == total
        other = claimed(tmp_path)
        mine = share.threads()
        theirs = int(other.communicate("\n")[0])
        assert (mine, theirs) == (max(1, total - total // 2), max(1, total // 2))
        assert share.threads() == total, "the other has ended"


def test_a_claim_ends_with_a_process_that_is_killed(tmp_path):
    with cores.Share(tmp_path) as share:
        other = claimed(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        other.kill()
        other.wait()
        assert share.threads() == cores.available()
        assert len(list(tmp_path.iterdir())) == 1, "its file is gone too"
    assert not list(tmp_path.iterdir())


def test_more_runs_than_cores_have_a_thread_each(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "available", lambda: 2)
    with cores.Share(tmp_path) as first, cores.Share(tmp_path) as second, cores.Share(tmp_path) as third:
        assert [first.threads(), second.threads(), third.threads()] == [1, 1, 1]
