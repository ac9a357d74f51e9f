"""What a cluster is connected to with."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from nodes import free_port

from clipfh import UserError
from clipfh.cluster import connect


def test_an_address_of_rays_client_is_refused(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match="ray://head:10001 is that of Ray's client.*HOST:6379.*clipfh submit"):
        connect.connect("ray://head:10001")


@pytest.mark.parametrize(
    "version,is_refused", [("2.60.0", False), ("2.60.3", False), ("2.61.0", True), ("3.60.0", True)]
)
def test_another_minor_version_of_ray_is_refused_in_a_line(monkeypatch, version, is_refused):
    monkeypatch.setattr("ray.__version__", version)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    try:
        connect.connect()
        assert not is_refused
    except UserError as error:
        assert is_refused
        assert str(error) == f'clipfh needs Ray 2.60, here is {version}: pip install "ray>=2.60,<2.61"'


def test_a_cluster_of_our_own_says_so_and_where_its_logs_are(ray_cluster):
    assert connect.is_own() and connect.logs().startswith(f"{os.environ['RAY_TMPDIR']}/ray/session_")


@pytest.mark.parametrize("is_ours", [True, False])
def test_our_answer_to_sigterm_outlives_rays(is_ours):
    def ours(*_):
        pass

    def rays(*_):
        pass

    before = signal.signal(signal.SIGTERM, ours if is_ours else signal.SIG_DFL)
    try:
        with connect.own_answer_to_sigterm():
            signal.signal(signal.SIGTERM, rays)  # as ray.init does
        assert signal.getsignal(signal.SIGTERM) is (ours if is_ours else rays)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_that_this_process_only_joined_is_not_its_own(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(connect, "_is_own", False)
    monkeypatch.setattr(connect, "_check_reachable", lambda address: None)
    monkeypatch.setattr(connect.ray_private, "show_token", lambda: True)
    monkeypatch.setattr(ray, "init", lambda address, **options: monkeypatch.setattr("ray.is_initialized", lambda: True))
    connect.connect("head:6379")
    assert not connect.is_own()


@pytest.mark.parametrize(
    "tmpdir,ray_tmpdir,expected",
    [("/" + "t" * 80, None, "/tmp"), ("/short", None, None), ("/x", "/" + "r" * 60, "refused")],
)
def test_rays_sockets_have_a_short_folder(monkeypatch, tmpdir, ray_tmpdir, expected):
    monkeypatch.setattr("tempfile.gettempdir", lambda: tmpdir)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    if ray_tmpdir:
        monkeypatch.setenv("RAY_TMPDIR", ray_tmpdir)
        with pytest.raises(UserError, match="RAY_TMPDIR /r+ is too long for Ray's sockets: set RAY_TMPDIR to a folder"):
            connect._choose_short_folder()
    else:
        connect._choose_short_folder()
        assert os.environ.get("RAY_TMPDIR") == expected


OWN = """
import pwd, sys
def gone(*arguments):
    raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = gone  # as in a container whose user has no line in /etc/passwd
import ray
from clipfh.cluster import connect
with connect.connected("local"):
    print(ray.get(ray.remote(lambda: 7).remote()))
"""


def test_a_cluster_of_our_own_needs_no_home_and_leaves_nothing_there(tmp_path):
    (tmp_path / "home").mkdir()
    for home in (tmp_path / "home", Path("/proc/none")):  # which nobody can make
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "RAY_TMPDIR": "/tmp/clipfh-tests"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        told = subprocess.run([sys.executable, "-c", OWN], env=environment, capture_output=True, text=True, timeout=240)
        assert told.stdout == "7\n", told.stderr
    assert not list((tmp_path / "home").iterdir()), "a token there would be asked for by every `ray start` from now on"


JOIN = """
import sys
from clipfh import UserError
from clipfh.cluster import connect
try:
    with connect.connected(sys.argv[1]):
        print("joined")
except UserError as error:
    print(error)
"""


@pytest.mark.resilience
def test_a_cluster_that_checks_tokens_is_joined_with_the_users_own_or_says_so(tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    }
    mine = plain | {"HOME": str(tmp_path)}
    port = free_port()
    ray_command = [str(Path(sys.executable).parent / "ray")]
    options = ["--num-cpus=1", "--include-dashboard=false", f"--temp-dir=/tmp/clipfh-tests/t{port}"]
    start = [*ray_command, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", *options]
    head = subprocess.Popen(start, env=mine, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(port)
        lines = []
        for environment in (mine, plain | {"HOME": str(tmp_path / "other")}):
            told = [sys.executable, "-c", JOIN, f"127.0.0.1:{port}"]
            lines.append(subprocess.run(told, env=environment, capture_output=True, text=True, timeout=240).stdout)
    finally:
        head.terminate()
        head.wait()
    assert lines[0] == "joined\n"
    assert lines[1].startswith(f"the cluster at --address 127.0.0.1:{port} checks tokens: set RAY_AUTH_MODE=token")


def await_port(port: int) -> None:
    """Wait until a server listens there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing listens at {port}")
