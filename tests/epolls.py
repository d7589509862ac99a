"""The epolls of a process, as /proc shows them."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

EPOLL = "anon_inode:[eventpoll]"


def nested_epolls(pid: int) -> list[tuple[int, int]]:
    """The descriptors of each epoll that watches another one, and of that one."""
    epolls = [int(name) for name in os.listdir(f"/proc/{pid}/fd") if _is_epoll(pid, int(name))]
    found = []
    for epoll in epolls:
        with contextlib.suppress(FileNotFoundError):
            info = Path(f"/proc/{pid}/fdinfo/{epoll}").read_text()
            watched = map(int, re.findall(r"^tfd: *(\d+)", info, re.MULTILINE))
            found += [(epoll, descriptor) for descriptor in watched if descriptor in epolls]
    return found


def _is_epoll(pid: int, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/{pid}/fd/{descriptor}") == EPOLL
    return False
