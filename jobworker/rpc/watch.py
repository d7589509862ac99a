"""Files that are read again when they have changed, while the server runs."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobworker.errors import StartupError, is_shortage

log = logging.getLogger(__name__)

# Each look costs a quiet server 0.2 ms. What is revoked is to be refused within 5 s.
LOOK_SECONDS = 2.0
SETTLE_SECONDS = 0.5  # to the next, once something has changed
QUIET_SECONDS = 10.0  # without a change, before what is gone from files of some kinds is given up
CLOSE_SECONDS = 1.0  # for a look that is under way, which a file system may keep for ever
# Looks in which files change, before they are read though they may change again: who revokes
# certificates one after the other is not waited for. As often what changes while it is read is
# read anew.
MOST_SETTLING = 2

Signature = tuple[tuple[int, ...] | None, ...]


class WatchedFiles:
    """Files that belong together, and what was read from them last.

    What cannot be used is said once, and changes nothing: what was read before stays. It is read
    again once it changes; or at the next look, where only descriptors or memory were short.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        load: Callable[[], Any],
        apply: Callable[[Any], None],
        on_outcome: Callable[[str, str], None] = lambda _name, _problem: None,
        unite: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        """load: reads them, in the watch's thread; raises StartupError. apply: takes what was
        read, on the loop. on_outcome: is told the name and the problem, "" for none, of each
        later reading. unite: what holds of what was in force and what was read, in the watch's
        thread, until the files have stayed the same for QUIET_SECONDS; default: what was read.
        With it, a change that only another file than the first has, and that changes nothing of
        what holds, is no news.

        Reads them; raises StartupError where they cannot be used.
        """
        self._name = name
        self._paths = paths
        self._load = load
        self._apply = apply
        self._on_outcome = on_outcome
        self._unite = unite
        self._seen = self._found = self._signature()
        self._found_at = time.monotonic()  # for the first time
        self._settling: Signature | None = None
        self._settling_looks = 0
        self._torn_looks = 0  # in which they changed while they were read
        loaded = self._load_files()
        self._in_force = loaded if unite else None
        self._is_more_in_force = False  # than was read
        self._is_broken = False  # what was read last, so that the old stays in force
        self._is_short_said = False
        apply(loaded)

    def look(self, *, at_once: bool = False) -> Callable[[], None] | None:
        """To be called in the watch's thread. Reads them where they have changed, and have been
        the same for two looks: who writes several files takes a moment, and not for long.
        at_once: does not wait for that. Returns what is to be called on the loop then, if
        anything."""
        found = self._signature()
        if found != self._found:
            self._found, self._found_at = found, time.monotonic()
        is_quiet = time.monotonic() >= self._found_at + QUIET_SECONDS
        if found == self._seen and not self._is_short_said:
            self._settled(found)
            if self._is_more_in_force and is_quiet:
                return self._read(found, is_quiet=True)
        elif (
            found == self._settling
            or at_once
            or self._is_short_said
            or self._settling_looks >= MOST_SETTLING
        ):
            return self._read(found, is_quiet=is_quiet)
        else:
            self._settling = found
            self._settling_looks += 1
        return None

    @property
    def is_settling(self) -> bool:
        """They have changed, and are not read yet."""
        return self._settling is not None

    def _read(self, found: Signature, *, is_quiet: bool) -> Callable[[], None] | None:
        problem, loaded, is_short = "", None, False
        try:
            loaded = self._load_files()
        except StartupError as error:
            problem, is_short = str(error), is_shortage(error)
        except Exception as error:  # noqa: BLE001 nothing in a file may end the watch of all
            problem, is_short = repr(error), is_shortage(error)
        was_said, self._is_short_said = self._is_short_said, is_short
        if is_short:
            return None if was_said else partial(self._tell, problem, None, False, True)
        if self._signature() != found:  # written to meanwhile: the next look sees it
            self._torn_looks += 1
            if problem or self._torn_looks < MOST_SETTLING:
                return None
            is_quiet = False
        is_news = found[:1] != self._seen[:1] or self._unite is None or self._is_broken or was_said
        before, self._is_broken = self._in_force, bool(problem)
        self._settled(found)
        if self._unite is None or problem:
            self._is_more_in_force = False
        else:
            whole = loaded if is_quiet else self._unite(self._in_force, loaded)
            self._is_more_in_force = whole != loaded
            self._in_force = loaded = whole
            is_news = is_news or whole != before
        return partial(self._tell, problem, loaded, self._is_more_in_force, is_news)

    def _settled(self, found: Signature) -> None:
        self._seen = found
        self._settling, self._settling_looks, self._torn_looks = None, 0, 0

    def _tell(self, problem: str, loaded: Any, is_more_in_force: bool, is_news: bool) -> None:
        if problem:
            log.error("the %s cannot be used, so the old stay in force: %s", self._name, problem)
        else:
            self._apply(loaded)
            more = f"; what is gone counts until nobody wrote for {QUIET_SECONDS:.0f} s"
            level = logging.INFO if is_news else logging.DEBUG
            log.log(level, "read the %s again%s", self._name, more if is_more_in_force else "")
        self._on_outcome(self._name, problem)

    def _load_files(self) -> Any:
        """Raises StartupError, also for what could keep the reader waiting for ever, as a pipe."""
        for path in self._paths:
            if path.exists() and not path.is_file():
                raise StartupError(f"{path} is no ordinary file; put one there")
        return self._load()

    def _signature(self) -> Signature:
        return tuple(map(_signature_of, self._paths))


def _signature_of(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    # Programs set the time of the contents to what they like (rsync, cp -p), but not that of the
    # change.
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


class Watch:
    """Looks after all watched files, from `start` to `close`.

    In a thread of its own, which wakes the loop only for what has changed: a quiet server is to
    take no processor, and a file system that does not answer holds up nobody.
    """

    def __init__(self) -> None:
        self._files: list[WatchedFiles] = []
        self._each_look: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._asked = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._timer: asyncio.TimerHandle | None = None

    def add(self, files: WatchedFiles) -> None:
        self._files.append(files)

    def at_each_look(self, function: Callable[[], None]) -> None:
        """To be called on the loop, as often as files are looked at."""
        self._each_look.append(function)

    def start(self) -> None:
        self._thread.start()
        self._look_on_loop()

    def look_now(self) -> None:
        """As on SIGHUP."""
        self._asked.set()
        self._look_on_loop()

    async def close(self) -> None:
        self._is_closed = True
        self._asked.set()
        if self._timer:
            self._timer.cancel()
            await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)

    def _look_on_loop(self) -> None:
        for function in self._each_look:
            try:
                function()
            except Exception:  # nothing that is looked after may end the watch of all
                log.exception("a look failed")
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look_on_loop)

    def _run(self) -> None:
        while True:
            is_settling = any(files.is_settling for files in self._files)
            is_asked = self._asked.wait(SETTLE_SECONDS if is_settling else LOOK_SECONDS)
            self._asked.clear()
            for files in self._files:
                news = files.look(at_once=is_asked)
                if self._is_closed:
                    return
                if news:
                    self._loop.call_soon_threadsafe(news)
