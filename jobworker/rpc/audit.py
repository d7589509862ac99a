"""The audit log: who has changed what, and who was refused; one JSON object a line.

A line is in the kernel's hands before the call is answered: a server that is killed has told of
all that its clients know of. Values of a job's environment and its standard input are never
among what is given to `write`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import time
from collections import deque
from pathlib import Path
from typing import Any

from jobworker.errors import AuditError, SettingError

log = logging.getLogger(__name__)

MOST_WAITING = 4096  # lines that could not be written yet


class AuditLog:
    """Appends to one file, until `close`. With None as path it does nothing."""

    def __init__(self, path: Path | None) -> None:
        """Raises SettingError where the file cannot be opened."""
        self._path = path
        self._descriptor = -1
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._problem = ""
        self._missing = ""  # why there is no file where it should be
        if path is None:
            return
        try:
            self._descriptor = _open(path)
        except OSError as error:
            raise SettingError(
                "--audit-log (JOB_WORKER_AUDIT_LOG)",
                path,
                f"cannot be appended to: {error.strerror}",
                "give a file in a folder that this user can write",
            ) from error

    @property
    def is_on(self) -> bool:
        return self._path is not None

    def check(self) -> None:
        """Raises AuditError while lines cannot be written: what they could not tell of is not to
        be begun."""
        if self._waiting:
            self._flush()
        if self._waiting or self._missing:
            raise AuditError(self._problem or self._missing)

    def write(self, **fields: Any) -> None:
        """Adds the time. A line that cannot be written waits for the next, or for `look`."""
        if self._path is None:
            return
        line = {"time": _now()} | fields
        self._append(json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")

    def look(self) -> None:
        """Opens the file anew where it has been moved or removed, and writes what waits. To be
        called every now and then, and after a rotation."""
        if self._path is None:
            return
        try:
            self._reopen_if_moved()
        except OSError as error:
            # Lines go on to where it was moved; but that may be nowhere.
            self._say_missing(error.strerror or str(error))
        else:
            self._say_missing("")
        if self._waiting:
            self._flush()

    def close(self) -> None:
        if self._descriptor >= 0:
            self.look()
            if self._waiting:
                log.error("%d lines of the audit log are lost", len(self._waiting))
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, line: bytes) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self._lost += 1
            return
        self._waiting.append(line)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._write_whole(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._say(error)
            return
        self._say_again()

    def _write_whole(self, line: bytes) -> None:
        """Or nothing of it: what a full disk had no room for may come to another file, or the
        server be killed before."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if written:
                with contextlib.suppress(OSError):  # as of a file that can only be appended to
                    os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                    written = 0
            self._waiting[0] = line[written:]
            raise

    def _say(self, error: OSError) -> None:
        problem = error.strerror or str(error)
        if problem != self._problem:
            log.error(
                "the audit log %s cannot be written, so no job is created: %s", self._path, problem
            )
        self._problem = problem

    def _say_missing(self, problem: str) -> None:
        if problem == self._missing:
            return
        self._missing = problem
        if problem:
            log.error(
                "the audit log %s was moved or removed, and cannot be begun anew, so no job is "
                "created: %s",
                self._path,
                problem,
            )
        else:
            log.error("the audit log is begun anew")

    def _say_again(self) -> None:
        if not self._problem:
            return
        self._problem = ""
        lost, self._lost = self._lost, 0
        log.error("the audit log is written again; lines lost meanwhile: %d", lost)
        if lost:
            self.write(event="lost", lines=lost)

    def _reopen_if_moved(self) -> None:
        assert self._path is not None
        ours = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
            if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                return
        except FileNotFoundError:
            pass
        descriptor = _open(self._path)
        os.close(self._descriptor)
        self._descriptor = descriptor


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    # A pipe could block, or have its end closed; NONBLOCK so that opening one does not.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "is no ordinary file")
    return descriptor


def _now() -> str:
    """RFC 3339, UTC, with microseconds."""
    nanoseconds = time.time_ns()
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}Z"
