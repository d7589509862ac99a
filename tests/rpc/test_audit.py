"""The audit log as a file: what it is when lines cannot be written, and when it is moved."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobworker.errors import AuditError, SettingError
from jobworker.rpc import audit
from jobworker.rpc.audit import AuditLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def audit_log(path: Path) -> Iterator[AuditLog]:
    opened = AuditLog(path)
    yield opened
    opened.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_and_there_at_once(audit_log: AuditLog, path: Path) -> None:
    audit_log.write(who="alice", problem="a\nb\u2028\x1b[0m")
    assert path.read_text().count("\n") == 1
    assert path.read_text().isascii()
    (line,) = lines(path)
    assert line.pop("time").endswith("Z")
    assert line == {"who": "alice", "problem": "a\nb\u2028\x1b[0m"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = AuditLog(path)
    again.write(who="bob")
    again.close()
    assert [line["who"] for line in lines(path)] == ["alice", "bob"]


def test_none_is_no_file() -> None:
    nothing = AuditLog(None)
    nothing.write(who="alice")
    nothing.check()
    nothing.look()
    nothing.close()
    assert not nothing.is_on


def test_a_file_that_was_moved_away_is_begun_anew(audit_log: AuditLog, path: Path) -> None:
    audit_log.write(number=1)
    moved = path.rename(path.with_name("audit.log.1"))
    audit_log.write(number=2)  # not noticed yet
    audit_log.look()
    audit_log.write(number=3)
    assert [line["number"] for line in lines(moved)] == [1, 2]
    assert [line["number"] for line in lines(path)] == [3]
    path.unlink()
    audit_log.look()
    audit_log.write(number=4)
    assert [line["number"] for line in lines(path)] == [4]


@pytest.mark.parametrize("spoil", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_cannot_be_begun_anew_is_said_and_keeps_jobs_from_being_created(
    audit_log: AuditLog, path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path.unlink()
    spoil(path)
    for _ in range(2):
        audit_log.look()
    assert caplog.text.count("cannot be begun anew") == 1
    with pytest.raises(AuditError):
        audit_log.check()
    audit_log.write(event="kept where it was")
    with pytest.raises(AuditError):
        audit_log.check()
    path.rmdir() if path.is_dir() else path.unlink()
    audit_log.look()
    audit_log.check()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing/audit.log", "."):
        with pytest.raises(SettingError) as caught:
            AuditLog(tmp_path / name)
        assert "JOB_WORKER_AUDIT_LOG" in caught.value.setting


FULL = """
import resource, signal, sys
from pathlib import Path
from jobworker.errors import AuditError
from jobworker.rpc.audit import AuditLog

path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))  # as a full disk
log = AuditLog(path)
for number in range(20):
    log.write(number=number)
try:
    log.check()
except AuditError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
log.check()
log.write(number=20)
log.close()
"""


def test_what_a_full_disk_has_no_room_for_waits(path: Path) -> None:
    """In a process of its own: the limit is one of a process."""
    ended = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True
    )
    assert "File too large" in ended.stdout
    assert "no job is created" in ended.stdout
    assert ended.stderr.count("cannot be written") == 1
    assert "written again; lines lost meanwhile: 0" in ended.stderr
    assert [line["number"] for line in lines(path)] == list(range(21))


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a full disk: the signal that goes with the error is ignored in Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_in_one_file_where_the_disk_was_full(path: Path) -> None:
    """And none of it is there before there was room for all."""
    audit_log = AuditLog(path)
    audit_log.write(number=0)
    with files_no_larger_than(path.stat().st_size + 20):
        audit_log.write(number=1)
    moved = path.rename(path.with_name("audit.log.1"))
    audit_log.look()
    audit_log.close()
    assert [line["number"] for line in lines(moved)] == [0]
    assert [line["number"] for line in lines(path)] == [1]


def test_what_does_not_fit_in_memory_is_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "MOST_WAITING", 3)
    audit_log = AuditLog(path)
    with files_no_larger_than(0), caplog.at_level(logging.ERROR):
        for number in range(5):
            audit_log.write(number=number)
        with pytest.raises(AuditError):
            audit_log.check()
    audit_log.check()
    audit_log.close()
    assert [line.get("number", line.get("lines")) for line in lines(path)] == [0, 1, 2, 2]
    assert lines(path)[-1]["event"] == "lost"
