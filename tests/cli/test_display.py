"""What people read at a glance, and what scripts read exactly."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace

import pytest

from jobworker.cli import display
from jobworker.job import Accounting, Cause, Job, JobSpec, Limits, Principal, Status

SECOND = 1_000_000_000
START = 1_767_268_800 * SECOND  # 2026-01-01T12:00:00Z


def a_job(**fields: object) -> Job:
    job = Job(
        id=7,
        spec=JobSpec("/bin/sh", ("-c", "exit 3"), Limits(50, 64, 0), name="nightly"),
        status=Status.RUNNING,
        created_ns=START,
        started_ns=START,
    )
    return replace(job, **fields)  # type: ignore[arg-type]


def ended(cause: Cause | None, status: Status = Status.FAILED, **fields: object) -> Job:
    return a_job(cause=cause, status=status, ended_ns=START + 2 * SECOND, **fields)


# Values


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102_340, "99.9 KiB"),
        (102_400, "100 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 20, "1.0 MiB"),
        (325_058_560, "310 MiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 63, "8192 PiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert display.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0ms"),
        (0.42, "420ms"),
        (0.9996, "1.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (65, "1m05s"),
        (3599.6, "1h00m"),
        (3 * 3600 + 12 * 60, "3h12m"),
        (86399.9, "1d00h"),
        (2 * 86400 + 4 * 3600, "2d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert display.duration(seconds) == text


def test_times() -> None:
    assert display.rfc3339(0) == "-"
    assert display.rfc3339(START + 999_999_999) == "2026-01-01T12:00:00Z"
    assert display.rfc3339(START + 1_000, timespec="microseconds").endswith(":00.000001Z")


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "now"), (0.5, "now"), (1.2, "1s ago"), (125, "2m05s ago")]
)
def test_how_long_ago(seconds: float, text: str) -> None:
    assert display.ago(time.time_ns() - int(seconds * SECOND)) == text


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\r", "\x9b2J", "\udcff", "\u202e"])
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    shown = display.printable(text)
    assert shown.isprintable()
    assert shown != text


def test_a_surrogate_that_stands_for_no_byte() -> None:
    """As JSON may have it."""
    assert display.printable("a\ud800") == r"a\ud800"


def test_what_can_be_printed_stays_as_it_is() -> None:
    assert display.printable("Grüße, 世界 🙂") == "Grüße, 世界 🙂"


def test_a_command_line_can_be_typed_in_a_shell() -> None:
    assert display.command_line(a_job()) == "/bin/sh -c 'exit 3'"
    assert display.command_line(a_job(), is_short=True) == "sh -c 'exit 3'"


@pytest.mark.parametrize("compact", [True, False])
def test_json_changes_no_terminal_either(
    capsys: pytest.CaptureFixture[str], *, compact: bool
) -> None:
    value = {"args": ["\x1b[31m", "\x9b31m", "\u202e", "\udc80", "a\nb", "Grüße, 世界 🙂"]}
    display.write_json(value, compact=compact)
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()
    assert "Grüße, 世界 🙂" in shown
    assert json.loads(shown) == value


# Endings


@pytest.mark.parametrize(
    ("job", "word", "explanation"),
    [
        (a_job(), "-", ""),
        (ended(Cause.EXITED, Status.COMPLETED, exit_code=0), "exit-0", "exit code 0"),
        (ended(Cause.EXITED, exit_code=3), "exit-3", "exit code 3"),
        (ended(Cause.SIGNALLED, signal=9, detail="ended by SIGKILL"), "SIGKILL", "by SIGKILL"),
        (ended(Cause.SIGNALLED, signal=40), "signal-40", "by signal 40"),
        (ended(Cause.STOPPED, Status.STOPPED, signal=15), "SIGTERM", "stopped, by SIGTERM"),
        (ended(Cause.STOPPED, Status.STOPPED, exit_code=0), "exit-0", "stopped, exit code 0"),
        (
            ended(Cause.OUT_OF_MEMORY, signal=9, detail="its limit of 64 MiB was reached"),
            "out-of-memory",
            "by SIGKILL, its limit of 64 MiB was reached",
        ),
        (
            ended(Cause.START_FAILED, failed_step="exec", failed_errno=8),
            "start-failed",
            "never ran, exec, Exec format error",
        ),
        (
            ended(
                Cause.START_FAILED,
                failed_step="exec",
                failed_errno=8,
                detail="exec: '/srv/x': Exec format error (errno 8); it is no program",
            ),
            "start-failed",
            "never ran, exec: '/srv/x': Exec format error (errno 8); it is no program",
        ),
        (
            ended(Cause.LOST, detail="the machine was restarted"),
            "lost",
            "the machine was restarted",
        ),
        (ended(Cause.TIMED_OUT, signal=15), "timed-out", "its time was over, by SIGTERM"),
        # of a server that tells no cause
        (ended(None, exit_code=-1), "-", ""),
        (ended(None, exit_code=4), "exit-4", "exit code 4"),
    ],
)
def test_endings(job: Job, word: str, explanation: str) -> None:
    assert display.ending(job) == word
    assert display.explained_ending(job) == explanation


@pytest.mark.parametrize("cause", [Cause.START_FAILED, Cause.OUT_OF_MEMORY])
def test_what_a_server_says_of_an_ending_changes_no_terminal(cause: Cause) -> None:
    assert display.explained_ending(ended(cause, detail="\x1b[31m")).endswith("\\x1b[31m")


def test_a_job_in_one_line() -> None:
    assert display.summary(ended(Cause.EXITED, exit_code=3)) == "Job 7: FAILED (exit-3) after 2.0s"
    good = ended(Cause.EXITED, Status.COMPLETED, exit_code=0)
    assert display.summary(good) == "Job 7: COMPLETED after 2.0s"
    assert (
        display.summary(ended(Cause.START_FAILED, started_ns=0)) == "Job 7: FAILED (start-failed)"
    )


# JSON


def test_the_keys_of_a_job_are_a_promise() -> None:
    """More may be added. A key that goes, or means something else, breaks scripts."""
    alice, used = Principal("alice", "user", "0A"), Accounting(cpu_user_us=5)
    job = ended(Cause.SIGNALLED, signal=signal.SIGKILL, accounting=used, created_by=alice)
    assert display.job_as_json(job) == {
        "id": 7,
        "name": "nightly",
        "status": "FAILED",
        "cause": "SIGNALLED",
        "exit_code": None,
        "signal": 9,
        "signal_name": "SIGKILL",
        "detail": "",
        "failed_step": None,
        "failed_errno": None,
        "command": "/bin/sh",
        "args": ["-c", "exit 3"],
        "working_directory": "/",
        "environment": {},
        "merge_output": False,
        "timeout_seconds": None,
        "user": None,
        "profile": None,
        "network": None,
        "root": None,
        "read_only": False,
        "binds": [],
        "limits": {"cpu_percent": 50, "memory_mib": 64, "io_bytes_per_second": 0, "pids": 0},
        "created": "2026-01-01T12:00:00.000000Z",
        "started": "2026-01-01T12:00:00.000000Z",
        "ended": "2026-01-01T12:00:02.000000Z",
        "duration_seconds": 2.0,
        "stdout_bytes": 0,
        "stderr_bytes": 0,
        "lost_bytes": 0,
        "output_problem": None,
        "accounting": {
            "cpu_user_us": 5,
            "cpu_system_us": None,
            "memory_peak_bytes": None,
            "io_read_bytes": None,
            "io_written_bytes": None,
            "oom_kills": None,
        },
        "cleanup_uncertain": False,
        "created_by": {"name": "alice", "role": "user", "serial": "0A"},
        "stopped_by": None,
        "environment_withheld": False,
    }


def test_what_has_not_come_is_null() -> None:
    shown = json.loads(json.dumps(display.job_as_json(a_job(started_ns=0))))
    for key in ("cause", "exit_code", "signal", "started", "ended", "duration_seconds"):
        assert shown[key] is None


# Tables


def test_columns_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    display.write_table(["ID", "NAME", "WHAT"], [["1", "世界", "x"], ["10", "ab", "y"]], ["ID"])
    assert capsys.readouterr().out.splitlines() == [
        "ID  NAME  WHAT",
        " 1  世界  x",
        "10  ab    y",
    ]


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display.write_table(["A", "B"], [["1", "x" * 500]])
    assert capsys.readouterr().out.splitlines()[1] == "1  " + "x" * 500


@pytest.mark.parametrize("text", ["x" * 100, "世" * 50])
def test_a_terminal_gets_lines_that_fit(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "terminal_columns", lambda: 40)
    display.write_table(["A", "B"], [["1", text]])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("…")
    assert 39 <= display._columns(line) <= 40


def test_what_is_very_long_is_cut_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "terminal_columns", lambda: 40)
    began = time.monotonic()
    display.write_table(["A"], [["世" * 100_000]])
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.splitlines()[1].endswith("世…")


def test_fields_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    display.write_fields([("ID", "1"), ("Name", ""), ("Status", "RUNNING")])
    assert capsys.readouterr().out == "ID:     1\nStatus: RUNNING\n"
