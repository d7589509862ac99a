"""Looks at this machine's files, for a job that is to be: its command, its folders, its disks.

Each may block, and so belongs into a thread, of which each client has some; but where all mounts
are local, and the kernel has the paths in memory, nobody could be waited for, and it is done at
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from jobworker.engine.cgroup import CgroupTree
from jobworker.engine.command import (
    Look,
    check_working_directory,
    home_of,
    look_in_memory,
    look_on_disk,
    resolve,
)
from jobworker.engine.isolation import Confinement
from jobworker.engine.jobinit import LimitFiles
from jobworker.engine.mounts import Mounts
from jobworker.engine.user import file_rights_of
from jobworker.job import JobSpec, Limits
from jobworker.turns import Turns

T = TypeVar("T")

THREADS = 48
MOST_LOOKS = 12  # at once, of each client: others find a thread
# Of the event loop's time, for a look in memory; mostly some 0.05 ms, but a path that leads through
# many links takes 5. Then all looks are for threads, for so long.
LONG_LOOK_SECONDS = 0.001
ASIDE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a look has shown of a job that is to be."""

    path: str  # of its executable
    limit_files: LimitFiles  # that put its limits in force
    home: str


class Looks:
    """All that are under way; belongs to the running event loop."""

    def __init__(self, cgroups: CgroupTree) -> None:
        self._cgroups = cgroups
        self._loop = asyncio.get_running_loop()
        self._mounts = Mounts()
        # Apart from the threads of `to_thread`, which what runs already needs for its end.
        self._threads = ThreadPoolExecutor(THREADS, "look")
        self._turns = Turns(MOST_LOOKS)
        self._aside_until = 0.0  # on the loop's clock

    async def find(
        self, request: JobSpec, limits: Limits, confinement: Confinement, client: str
    ) -> Found:
        """limits: in force. Raises InvalidRequestError, or LimitUnavailableError, where the job
        could not be as it was asked for."""
        files = confinement.files
        is_arranged = files is not None and files.is_arranged
        # A PATH that the client gave may make it many looks.
        is_simple = not (limits.io_bytes_per_second or is_arranged or "PATH" in request.environment)
        is_simple &= self._loop.time() >= self._aside_until
        if is_simple and self._mounts.are_local():
            began = time.thread_time()
            try:
                with contextlib.suppress(BlockingIOError):
                    return self._find(request, limits, confinement, look_in_memory)
            finally:
                if time.thread_time() - began > LONG_LOOK_SECONDS:
                    self._aside_until = self._loop.time() + ASIDE_SECONDS
        return await self._in_thread(client, self._find, request, limits, confinement, look_on_disk)

    async def home_of(self, confinement: Confinement, client: str) -> str:
        """As of `command.home_of`."""
        return await self._in_thread(client, home_of, confinement.user, confinement.find)

    def close(self) -> None:
        """Waits for none that is under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._mounts.close()

    async def _in_thread(self, client: str, function: Callable[..., T], *arguments: Any) -> T:
        """Of those that may wait for ever, where a filesystem does not answer. Looks of one
        client that work for long leave others the processor in between."""
        turn = self._turns.of(client)
        await turn.acquire()
        worked_seconds = 0.0

        # Given as arguments: what it knew by itself would stay with its error until the collector
        # comes.
        def look(function: Callable[..., T], *arguments: Any) -> T:
            nonlocal worked_seconds
            began = time.thread_time()
            try:
                return function(*arguments)
            finally:
                worked_seconds = time.thread_time() - began

        try:
            return await self._loop.run_in_executor(self._threads, look, function, *arguments)
        finally:
            if worked_seconds > LONG_LOOK_SECONDS:
                self._loop.call_later(MOST_LOOKS * worked_seconds, turn.release)
            else:
                turn.release()

    def _find(
        self, request: JobSpec, limits: Limits, confinement: Confinement, look: Look
    ) -> Found:
        folder, find = request.working_directory, confinement.find
        with file_rights_of(confinement.user):
            if confinement.files and confinement.files.is_arranged:
                confinement.files.check()
            check_working_directory(folder, find, look)
            path = resolve(request.command, request.environment, folder, find, look)
        if limits.io_bytes_per_second:
            folder = find(folder, "") or folder
        self._cgroups.check(request.limits, folder)
        limit_files = self._cgroups.limit_files(limits, folder)
        return Found(path, limit_files, home_of(confinement.user, find, look))
