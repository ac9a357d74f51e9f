"""This machine's cores, shared out evenly among all runs that compute on them now, of whatever command."""

from __future__ import annotations

import fcntl
import math
import os
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

CLAIMED, NEW = ".claim", ".new"


CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux keeps the limits of containers and services, and the file that names a process's own"""


def available() -> int:
    """Number of cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, quota())))


def quota(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float:
    """CPUs that control groups give this process, as Kubernetes and Docker limit containers; infinity without a limit.

    A group's limit holds for all groups below it. Both versions of Linux's control groups are read.
    """
    limits = [_limit(folder / "cpu.max") for folder in group_folders("", root, membership)]
    for top in (root / "cpu", root / "cpu,cpuacct"):
        folders = group_folders("cpu", top, membership)
        limits += [_limit(each / "cpu.cfs_quota_us", each / "cpu.cfs_period_us") for each in folders]
    return min(limits)


def group_folders(controller: str, top: Path, membership: Path) -> list[Path]:
    """The folders below `top` of this process's group of a controller, and of all groups around it.

    The second version of control groups, with one hierarchy for all controllers, has the empty name.
    """
    lines = membership.read_text().splitlines() if membership.is_file() else []
    groups = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    return _upwards(top, next((path for names, path in groups.items() if controller in names.split(",")), "/"))


def _upwards(root: Path, group: str) -> list[Path]:
    """The folders of a group and of all groups around it. A container sees its own as the root."""
    folder = root / group.strip("/")
    return [folder, *(each for each in folder.parents if each.is_relative_to(root))]


def _limit(*files: Path) -> float:
    """Microseconds of CPU in a period by its microseconds; infinity where the files set no limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)


class Share:
    """A claim to an equal share of the cores, for as long as the block lasts.

    Each claim is a file that its process holds locked. So a claim ends with its process, however that ends, and runs
    find each other without a cluster: two commands of a user, the trials of a sweep, the jobs of two clusters.

    Args:
        folder: folder of the claims; by default one for each user of this machine.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.gettempdir()) / f"clipfh-cores-{os.getuid()}"

    def __enter__(self) -> Share:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        name = f"{time.time_ns():020d}-{os.getpid()}-{threading.get_ident()}"
        # Locked before it bears the name that others look for: an unlocked claim counts as one whose process is gone
        new, self.file = self.folder / f"{name}{NEW}", self.folder / f"{name}{CLAIMED}"
        self.descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        new.rename(self.file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.unlink(missing_ok=True)
        os.close(self.descriptor)

    def threads(self) -> int:
        """Threads to compute with now; those of all claims add up to the cores, and each has at least one."""
        claims = sorted(file.name for file in self.folder.glob(f"*{CLAIMED}") if file == self.file or _is_held(file))
        each, over = divmod(available(), len(claims))
        return max(1, each + (claims.index(self.file.name) < over))


def _is_held(claim: Path) -> bool:
    """Whether the claim's process lives; the file of one that was killed is removed."""
    try:
        descriptor = os.open(claim, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    claim.unlink(missing_ok=True)
    return False
