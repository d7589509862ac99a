"""Memory that is free again goes back to the machine: the C library keeps what a flood of calls has
taken, as pages that are free stand between others."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
from pathlib import Path

# So much more than at the start is worth it: it takes some 40 ms of a thread where much is given
# back, and 3 where nothing is.
WORTH_BYTES = 128 << 20
PAUSE_SECONDS = 10.0


class Memory:
    """Of this process."""

    def __init__(self) -> None:
        # Not every C library has it.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._at_start = _resident_bytes()
        self._loop = asyncio.get_running_loop()
        self._next = 0.0

    def look(self) -> None:
        """To be called on the loop every now and then."""
        now = self._loop.time()
        worth_bytes = self._at_start + WORTH_BYTES
        # The peak first: for a quiet server, to read a file costs more than all else that it does.
        if not self._trim or now <= self._next or _peak_bytes() <= worth_bytes:
            return
        if _resident_bytes() > worth_bytes:
            self._next = now + PAUSE_SECONDS
            self._loop.run_in_executor(None, self._trim, 0)


def _peak_bytes() -> int:
    """The most that was resident at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
