"""A command as a Ray job: send it to a cluster from anywhere, follow its log, and return its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from clipfh import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PATIENCE = 60
"""Seconds for which a job is followed while its cluster doesn't answer."""

EXCLUDED = (
    *(".env*", "*.pem", "*.key", ".netrc", "id_rsa*", "id_ed25519*", ".aws/", ".ssh/", ".kube/", ".ray/"),
    *("wandb/", "mlruns/", "mlartifacts/", "mlflow.db", "/catalogue/", "/runs/", "/demo/", "/out/"),
)
"""What is not sent with the folder, as .gitignore would name it: secrets, and what commands write."""


def run(address: str, working_dir: Path, words: list[str]) -> int:
    """Run `clipfh WORDS` on the head of a cluster, and print its log as it grows.

    Args:
        address: the address of the cluster's dashboard, http://HEAD:8265.
        working_dir: the folder to send, without what .gitignore and EXCLUDED name; the command runs in a copy of it.
        words: the command and its arguments.

    Returns:
        The command's exit code; 1 where it has none because the job was stopped.

    Raises:
        UserError: the cluster doesn't answer or refuses.
    """
    client = connect(address)
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)
    entrypoint = shlex.join(["python", "-m", "clipfh", *words])
    print(f"sends {working_dir} without what .gitignore names, and without {' '.join(EXCLUDED)}", flush=True)
    try:
        environment = {"working_dir": str(working_dir), "excludes": list(EXCLUDED)}
        job = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the cluster at {address} did not take the job, with which --working-dir {working_dir} is sent: "
            f"{_first_line(error)}"
        ) from error
    print(f"job {job} on {address}", flush=True)
    try:
        return follow(client, job, address)
    except KeyboardInterrupt:
        print(
            f"\nThe job goes on. To follow it again: ray job logs --address {address} --follow {job}\n"
            f"To stop it: ray job stop --address {address} {job}",
            flush=True,
        )
        return 130


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the cluster whose dashboard is at the address.

    Raises:
        UserError: no dashboard answers, or the token is missing or wrong.
    """
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: give the dashboard's, such as http://HEAD:8265")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        _refused(address, error)
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(
            f"no Ray dashboard answers at --address {address}: is the cluster up, and its port 8265 reachable from "
            "here? (ssh -L 8265:localhost:8265 HEAD makes it http://localhost:8265)"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--address {address} is no Ray dashboard: {_first_line(error)}") from error


def _refused(address: str, error: Exception) -> NoReturn:
    how = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or its file in RAY_AUTH_TOKEN_PATH"
    wrong = "RAY_AUTH_MODE=token is not set" if os.environ.get("RAY_AUTH_MODE") != "token" else "no token, or another's"
    raise UserError(f"the cluster at {address} wants its token ({wrong}): {how}") from error


def follow(client: JobSubmissionClient, job: str, address: str) -> int:
    """Print the job's log until it ends, and return its exit code. A broken connection is made again."""
    import aiohttp

    log, silent_since = _Log(client, job), None
    while True:
        try:
            asyncio.run(log.follow())
            details = client.get_job_info(job)
            if details.status.is_terminal():
                break
            silent_since = None
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > PATIENCE:
                raise UserError(
                    f"the cluster at {address} no longer answers ({_first_line(error)}): if its head was lost, so was "
                    "the job; submit the command again with --resume"
                ) from error
        time.sleep(1)
    if details.driver_exit_code is None:
        print(f"job {job} {details.status.lower()}: {details.message}", flush=True)
        return 1
    return details.driver_exit_code if details.driver_exit_code >= 0 else 128 - details.driver_exit_code


class _Log:
    """A job's log. At each connection the cluster sends it from its start: what was printed is not printed again."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job, self.printed = client, job, 0

    async def follow(self) -> None:
        received = 0
        async for text in self.client.tail_job_logs(self.job):
            print(text[max(0, self.printed - received) :], end="", flush=True)
            received += len(text)
            self.printed = max(self.printed, received)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
