"""Claims of real processes to this machine's cores."""

import math
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    "files,membership,cpus",
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", math.inf),
        (
            {"a.slice/cpu.max": "200000 100000\n", "a.slice/b.service/cpu.max": "max 100000\n"},
            "0::/a.slice/b.service\n",
            2,
        ),
        (
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            "4:cpu,cpuacct:/\n",
            0.5,
        ),
        ({"cpu/pod/cpu.cfs_quota_us": "300000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/pod\n", 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", math.inf),
        ({}, None, math.inf),
    ],
)
def test_a_containers_quota_is_what_counts_as_cores(tmp_path, monkeypatch, files, membership, cpus):
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if membership:
        (tmp_path / "member").write_text(membership)
    assert cores.quota(tmp_path / "cgroup", tmp_path / "member") == cpus
    monkeypatch.setattr(cores, "quota", lambda: cpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert cores.available() == (64 if cpus == math.inf else max(1, math.ceil(cpus)))
