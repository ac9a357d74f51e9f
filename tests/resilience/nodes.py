"""A real Ray cluster of several nodes on this machine, each with its own raylet, behind a token."""

import contextlib
import csv
import io
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import clipfh
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder

HEAD, FIRST, SECOND, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"


def until(condition, seconds=600, pause=0.1):
    """What the condition says, as soon as it says anything; the limit is for a machine that is busy."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
    return found


def await_reports(process: subprocess.Popen, run: Path, count: int) -> None:
    """Wait until a checkpoint follows so many reports, and the next steps have begun."""
    while (
        len(run_folder.read_metrics(run)) < count
        or run_folder.latest_step(run) < run_folder.read_metrics(run)[-1]["step"]
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Nodes:
    """The nodes by address. Ray takes a folder for each: they would delete each other's files in one.

    Args:
        folder: for all that is theirs.
        apart: whether each has a /tmp of its own, in which its home and its working folder are, too.
        env: of their processes, beside this process's.
    """

    def __init__(self, folder: Path, apart: bool = False, env: dict[str, str] | None = None) -> None:
        self.folder, self.apart, self.port, self.dashboard = folder, apart, free_port(), free_port()
        self.token, self.started = folder / "token", {}
        self.token.write_text(secrets.token_hex(32))
        paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        without = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH"))}
        self.env = {**without, "PATH": paths, "PYTHONPATH": str(Path(clipfh.__file__).parents[1])}
        self.env |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_worker_niceness": "0",  # at Ray's 15, what else runs on the machine leaves them nothing
            **(env or {}),
        }
        self.env |= {"RAY_AUTH_TOKEN": self.token.read_text(), "HOME": "/tmp"} if apart else {}
        self.env |= {} if apart else {"RAY_AUTH_TOKEN_PATH": str(self.token)}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, address: str, *options: str) -> None:
        log, own = self.folder / f"{address}.log", self.folder / address
        own.mkdir(exist_ok=True)
        inside = ["unshare", "--mount", "sh", "-c", 'mount --bind . /tmp && cd /tmp && exec "$@"', "sh"]
        command = (
            [*inside, "ray", "start", "--temp-dir=/tmp/ray"] if self.apart else ["ray", "start", f"--temp-dir={own}"]
        )
        command += [*options, "--block", f"--node-ip-address={address}", "--object-store-memory=200000000"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        for _ in range(3):  # Ray gives a raylet 30 s, in which it may not be up on a busy machine
            with log.open("w") as out:
                self.started[address] = subprocess.Popen(
                    command, stdout=out, stderr=out, env=self.env, cwd=own, start_new_session=True
                )
            until(lambda: "Ray runtime started" in log.read_text() or self.started[address].poll() is not None)
            if self.started[address].poll() is None:
                return
            self.kill(address)
        raise AssertionError(log.read_text())

    def start_all(self) -> None:
        """The head, which trains nothing, and two workers."""
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard}"]
        self.start(HEAD, "--head", "--num-cpus=0", *ports, f"--ray-client-server-port={free_port()}")
        self.start_worker(FIRST)
        self.start_worker(SECOND)

    def start_worker(self, address: str) -> None:
        self.start(address, f"--address=127.0.0.1:{self.port}", "--num-cpus=2")

    def on_head(self, *words: object) -> dict:
        """Arguments of Popen for a program that runs on the head."""
        enter = ["nsenter", f"--target={self.started[HEAD].pid}", "--mount", "sh", "-c", 'cd /tmp && exec "$@"', "sh"]
        return {
            "args": [*(enter if self.apart else ()), sys.executable, *map(str, words)],
            "env": self.env,
            "cwd": self.folder / HEAD,
        }

    def kill(self, address: str) -> None:
        """All processes of a node at once."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.started[address].pid, signal.SIGKILL)
        self.started.pop(address).wait()

    def kill_all(self) -> None:
        for address in list(self.started):
            self.kill(address)

    def submit(self, *words: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "clipfh", "submit", "--address", self.address, "--", *map(str, words)]
        return subprocess.Popen(
            command, env=self.env, cwd=self.folder / "work", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def reports(out: Path | Folder) -> dict[str, list[dict]]:
    """The reports of each trial."""
    runs = ((run.name, run_folder.read_metrics(run)) for run in Folder(out).folders(layout.TRIALS))
    return {trial: lines for trial, lines in runs if lines}


def leaderboard(out: Path | Folder) -> dict[str, dict]:
    """The row of each trial, empty where there is no leaderboard yet."""
    return {row["trial"]: row for row in csv.DictReader(io.StringIO(Folder(out).read_if_there(layout.LEADERBOARD)))}
