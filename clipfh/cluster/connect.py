"""The connection to a Ray cluster: one that runs already, or one that this process starts on its machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import ray

from clipfh import UserError
from clipfh.cluster import ray_private
from clipfh.config import cores
from clipfh.config.experiment import Placement

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
"""Options of every `ray.init`: Ray prints nothing. Commands say what people should read, Ray's log files have more."""

_is_own = False
"""Whether this process started the cluster that it is, or was last, connected to."""


def connect(address: str | None = None, placement: Placement | None = None, dashboard: bool = False) -> None:
    """Connect to the cluster at the address (or in RAY_ADDRESS), or start one on this machine.

    Does nothing where this process is connected to a cluster already.

    Raises:
        UserError: another version of Ray, an address at which no cluster answers, or one of Ray's client.
    """
    ray_private.require_supported_version()
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise UserError(
            f"--address {address} is that of Ray's client, which can't do all that is needed here: on a node of the "
            "cluster give HOST:6379 of its head; from elsewhere, clipfh submit --address http://HOST:8265"
        )
    _quieten()
    # Train asks its workers for reports at this interval; at its default of 2 s every report waits for it
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if address == "local":
        _start(placement.workers if placement else 1, dashboard)
    else:
        _join(address)


def _quieten() -> None:
    """Keep what Ray's Python side says off the terminal; its log files have it."""
    import ray.data  # noqa: F401  it sets the level of its logger as it loads

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the sweep has its own line for a failed trial
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    ray_private.log_remarks()


def _environment() -> dict[str, Any]:
    """Settings of this process for all others of the job: the address of a store, and never credentials."""
    names = ("RAY_TRAIN_", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
    return ray_private.shared_env({name: value for name, value in os.environ.items() if name.startswith(names)})


LONGEST = 39
"""Longest path of a temporary folder, in letters, with which Ray's sockets stay within the 107 that Linux allows"""


def _choose_short_folder() -> None:
    """Give Ray a short temporary folder where TMPDIR is a long one, as batch systems set it.

    Raises:
        UserError: there is no short folder, or RAY_TMPDIR names a long one.
    """
    own = os.environ.get("RAY_TMPDIR")
    folder = own or tempfile.gettempdir()
    if len(folder) <= LONGEST:
        return
    short = next((each for each in ("/tmp", "/var/tmp", "/dev/shm") if os.access(each, os.W_OK)), None)
    if own or not short:
        raise UserError(
            f"{'RAY_TMPDIR' if own else 'TMPDIR'} {folder} is too long for Ray's sockets: set RAY_TMPDIR to a folder "
            f"of at most {LONGEST} letters on a local disk"
        )
    os.environ["RAY_TMPDIR"] = short


def _keep_token_here() -> None:
    """Make a token for a cluster that this process starts, but no file in the user's home, which may be read-only.

    Ray would write one there, and every later `ray start` would ask for it.
    """
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start(workers: int, dashboard: bool) -> None:
    """Start a cluster for runs with `workers` workers each.

    It declares more CPUs than there are cores: a slot here is a process that may run, and with two cores a trial's
    worker and its data pipeline, twice, would otherwise wait for each other for ever.
    """
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process for each run; nobody takes this machine away
    slots = max(2 * cores.available(), 4, 4 * workers)
    _choose_short_folder()
    if not dashboard:  # with one, people need the token for its page, and find it in Ray's usual place
        _keep_token_here()
    try:
        with own_answer_to_sigterm():
            ray.init("local", num_cpus=slots, include_dashboard=dashboard, runtime_env=_environment(), **QUIET)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start within 30 s: the machine is too busy; try again when it is less so"
        ) from error
    global _is_own
    _is_own = True


@contextlib.contextmanager
def own_answer_to_sigterm() -> Iterator[None]:
    """Keep this process's own answer to SIGTERM, where it has one: Ray would exit with 1 and without a word."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _join(address: str) -> None:
    has_token = ray_private.show_token()
    if address != "auto":
        _check_reachable(address)
        if not has_token and ray_private.checks_tokens(address):
            raise UserError(
                f"the cluster at --address {address} checks tokens: set RAY_AUTH_MODE=token, and its token in "
                "RAY_AUTH_TOKEN or the token's file in RAY_AUTH_TOKEN_PATH"
            )
    try:
        with own_answer_to_sigterm():
            ray.init(address, runtime_env=_environment(), **QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"no Ray cluster at --address {address} ({reason}): start one, or leave --address out"
        ) from error


def _check_reachable(address: str) -> None:
    """Refuse an address at which nothing listens: Ray would try for a minute, and then end the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at --address {address} ({error}): give HOST:6379 of its head, or leave it out"
        ) from error


def disconnect() -> None:
    """Leave the cluster; one that this process started ends."""
    global _is_own
    _is_own = False
    ray.shutdown()


@contextlib.contextmanager
def connected(
    address: str | None = None, placement: Placement | None = None, dashboard: bool = False
) -> Iterator[None]:
    """Connect to the cluster at the address, or start one that ends with the block.

    Where this process is connected already, the block uses that cluster and leaves it as it is.

    Raises:
        UserError: as `connect`.
    """
    was_connected = ray.is_initialized()
    connect(address, placement, dashboard)
    try:
        yield
    finally:
        if not was_connected:
            disconnect()


def is_own() -> bool:
    """Whether this process started the cluster that it is connected to."""
    return _is_own and ray.is_initialized()


def logs() -> str:
    """The folder of Ray's own logs of this session, on this machine."""
    with own_answer_to_sigterm():
        context: Any = ray.init(ignore_reinit_error=True, **QUIET)
    return f"{context.address_info['session_dir']}/logs"
