"""This process's memory."""

from __future__ import annotations

import os
from pathlib import Path

from clipfh.config.cores import CGROUPS, MEMBERSHIP, group_folders


def available(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes of memory that this process may use: this machine's, and no more than its control groups allow."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = [folder / "memory.max" for folder in group_folders("", root, membership)]
    files += [folder / "memory.limit_in_bytes" for folder in group_folders("memory", root / "memory", membership)]
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return min([machine, *(int(text) for text in texts if text.isdigit())])
