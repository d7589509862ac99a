"""What a jobinit has as children, as the kernel tells."""

from __future__ import annotations

import contextlib
from pathlib import Path


def jobs_of(jobinit: int) -> list[int]:
    """Zombies among them, but not those that close its descriptors; of one that is gone, none."""
    try:
        children = Path(f"/proc/{jobinit}/task/{jobinit}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(pid) for pid in children if _name(pid) != "jobinit: closer"]


def _name(pid: str) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().rstrip()
    return ""
