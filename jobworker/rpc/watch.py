"""Files that are read again when they have changed, while the server runs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobworker.errors import StartupError

log = logging.getLogger(__name__)

# Each look costs a quiet server a tenth of a millisecond.
LOOK_SECONDS = 1.0
# Looks in which files change, before they are read though they may change again: who revokes
# certificates one after the other is not waited for.
MOST_SETTLING = 2

Signature = tuple[tuple[int, ...] | None, ...]


class WatchedFiles:
    """Files that belong together, and what was read from them last.

    What cannot be used is said once, and changes nothing: what was read before stays.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        load: Callable[[], Any],
        apply: Callable[[Any], None],
        on_outcome: Callable[[str, str], None] = lambda _name, _problem: None,
    ) -> None:
        """load: reads them, in a thread; raises StartupError. apply: takes what was read, on the
        loop. on_outcome: is told the name and the problem, "" for none, of each later reading.

        Reads them; raises StartupError where they cannot be used.
        """
        self._name = name
        self._paths = paths
        self._load = load
        self._apply = apply
        self._on_outcome = on_outcome
        self._seen = self._signature()
        self._settling: Signature | None = None
        self._settling_looks = 0
        apply(load())

    async def look(self, *, at_once: bool = False) -> None:
        """Reads them where they have changed, and have been the same for two looks: who writes
        several files takes a moment, and not for long. at_once: does not wait for that."""
        found = await asyncio.to_thread(self._signature)
        if found == self._seen:
            self._settling, self._settling_looks = None, 0
        elif found == self._settling or at_once or self._settling_looks >= MOST_SETTLING:
            await self._read(found)
        else:
            self._settling = found
            self._settling_looks += 1

    async def _read(self, found: Signature) -> None:
        problem, loaded = "", None
        try:
            loaded = await asyncio.to_thread(self._load)
        except StartupError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 nothing in a file may end the watch of all
            problem = repr(error)
        if await asyncio.to_thread(self._signature) != found:
            return  # written to meanwhile: the next look sees it
        self._seen, self._settling, self._settling_looks = found, None, 0
        if problem:
            log.error("the %s cannot be used, so the old stay in force: %s", self._name, problem)
        else:
            self._apply(loaded)
            log.info("read the %s again", self._name)
        self._on_outcome(self._name, problem)

    def _signature(self) -> Signature:
        return tuple(map(_signature_of, self._paths))


def _signature_of(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Watch:
    """Looks after all watched files, from `start` to `close`."""

    def __init__(self) -> None:
        self._files: list[WatchedFiles] = []
        self._each_look: list[Callable[[], None]] = []
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, files: WatchedFiles) -> None:
        self._files.append(files)

    def at_each_look(self, function: Callable[[], None]) -> None:
        self._each_look.append(function)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def look_now(self) -> None:
        """As on SIGHUP."""
        self._asked.set()

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            is_asked = False
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    is_asked = await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            for function in self._each_look:
                try:
                    function()
                except Exception:  # nothing that is looked after may end the watch of all
                    log.exception("a look failed")
            for files in self._files:
                await files.look(at_once=is_asked)
