"""The ids of jobs to come, and how the last server ended.

next-id     no id from this one on was ever given out; renewed, with fsync, a block ahead
last-run    how the last server that used the state folder ended, and the id that it would
            give next
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from pathlib import Path

from jobworker.errors import StateFolderError, StoreError

log = logging.getLogger(__name__)

# Ids that may be skipped when the machine loses power.
ID_BLOCK = 1000


class LastRun:
    """A file that outlives a server in the machine's memory, and tells the next one how this
    one ended. In it the state, as text, and the next id, as a native integer.

    It is written and not mapped: a full file system that takes room for each change, as btrfs
    does, would answer that with SIGBUS."""

    CLEAN = b"clean"  # written at the end; until then the boot's id stands there
    DAMAGED = b"damaged"
    STATE = slice(0, 36)
    NEXT_ID = slice(64, 72)
    BYTES = 72

    def __init__(self, path: Path) -> None:
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._content = bytearray(os.pread(self._file, self.BYTES, 0).ljust(self.BYTES, b"\0"))
        self._is_synced = False
        state = bytes(self._content[self.STATE]).rstrip(b"\0")
        self.was_there = bool(state)
        # A killed process damages nothing: SQLite and the kernel know all that it did.
        self.was_orderly = state in {self.CLEAN, self._boot}
        next_id = int.from_bytes(self._content[self.NEXT_ID], sys.byteorder)
        self.next_id = next_id if self.was_orderly else None

    def begin(self, next_id: int) -> None:
        self._set_state(self._boot)
        try:
            self.set_next_id(next_id)
        except OSError as error:  # with the first id that is given out it is tried again
            log.error("it cannot be noted that a server runs: %s", error.strerror)

    def set_next_id(self, next_id: int) -> None:
        """Raises OSError."""
        self._content[self.NEXT_ID] = next_id.to_bytes(8, sys.byteorder)
        self._write()
        if not self._is_synced:
            # Or, after a power loss, this would be the file of the run before, whose end was clean.
            os.fsync(self._file)
            self._is_synced = True

    def set_damaged(self) -> None:
        """The next one looks at the whole database."""
        self._set_state(self.DAMAGED)
        with contextlib.suppress(OSError):
            self._write()

    def end(self) -> None:
        if self._content[self.STATE] == self._boot:
            self._set_state(self.CLEAN)
            with contextlib.suppress(OSError):  # the next one takes it for one that was killed
                self._write()
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def _set_state(self, state: bytes) -> None:
        self._content[self.STATE] = state.ljust(36, b"\0")

    def _write(self) -> None:
        os.pwrite(self._file, self._content, 0)


class Ids:
    """Counts up. The file holds a number that is larger than each one given out."""

    def __init__(self, path: Path, last_run: LastRun, newest_id: int) -> None:
        """newest_id: of all jobs that are known."""
        self._path = path
        self._last_run = last_run
        # After a power loss nobody knows what was given out of the block that was reserved.
        next_id = last_run.next_id or _read_number(path) or 1
        self._next = self._reserved = max(next_id, newest_id + 1)
        self._ahead: threading.Thread | None = None
        # On a full disk a server starts, and refuses jobs.
        self._reserve_ahead()
        last_run.begin(self._next)

    @property
    def are_used_up(self) -> bool:
        return self._next == self._reserved

    def reserve_more(self) -> None:
        """For when they are used up. Blocks. Raises StoreError."""
        self._finish_ahead()
        if self.are_used_up:
            self._reserve(self._reserved + ID_BLOCK)

    def take(self) -> int:
        if self.are_used_up:
            self.reserve_more()
        try:
            self._last_run.set_next_id(self._next + 1)
        except OSError as error:
            raise StoreError(f"no job id can be given out: {error.strerror}") from error
        job_id = self._next
        self._next += 1
        if self._reserved - self._next < ID_BLOCK // 2 and self._ahead is None:
            self._ahead = threading.Thread(target=self._reserve_ahead, name="store-ids")
            self._ahead.start()
        elif self._ahead and not self._ahead.is_alive():
            self._finish_ahead()
        return job_id

    def close(self) -> None:
        """Gives back what was not used."""
        self._finish_ahead()
        try:
            self._reserve(self._next)
        except StoreError as error:
            log.error("%s; some ids will be skipped", error)

    def _reserve_ahead(self) -> None:
        try:
            self._reserve(self._reserved + ID_BLOCK)
        except StoreError as error:
            log.error("%s", error)  # tried again when none is left

    def _finish_ahead(self) -> None:
        if self._ahead:
            self._ahead.join()
            self._ahead = None

    def _reserve(self, until: int) -> None:
        try:
            _write_whole(self._path, f"{until}\n")
        except OSError as error:
            raise StoreError(
                f"no job ids can be reserved in {self._path}: {error.strerror}"
            ) from error
        self._reserved = until


def _read_number(path: Path) -> int | None:
    """None where there is no file."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StateFolderError(
            f"{path} holds no number; write one into it that is larger than every job's id"
        ) from error


def _write_whole(path: Path, text: str) -> None:
    """All of it or nothing, whatever happens to the machine."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync(path.parent)


def fsync(path: Path | str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
