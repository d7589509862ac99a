"""What may be asked of a job, and how it passes from one state to the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker import job as transition
from jobworker.errors import InvalidRequestError, JobStateError
from jobworker.job import (
    ENDED,
    LONGEST_NAME,
    LONGEST_STRING_BYTES,
    LONGEST_STRINGS_BYTES,
    MOST_BINDS,
    Bind,
    Cause,
    Job,
    JobSpec,
    Limits,
    OomKills,
    Status,
    check_counts,
    validate,
)

SPEC = JobSpec("/bin/true")
NEW = transition.created(1, SPEC, 100)
RUNNING = transition.started(NEW, 200)
NO_OOM = OomKills()


def exited(code: int) -> int:
    return code << 8


# Transitions


def test_from_the_first_to_the_last() -> None:
    assert (NEW.status, NEW.created_ns, NEW.is_ended) == (Status.INITIALIZING, 100, False)
    assert (RUNNING.status, RUNNING.started_ns, RUNNING.is_ended) == (Status.RUNNING, 200, False)
    job = transition.ended(RUNNING, exited(0), NO_OOM, 300)
    assert (job.status, job.cause, job.exit_code, job.signal) == ("COMPLETED", Cause.EXITED, 0, 0)
    assert (job.created_ns, job.started_ns, job.ended_ns) == (100, 200, 300)
    assert job.is_ended


def test_a_snapshot_never_changes() -> None:
    transition.ended(RUNNING, exited(0), NO_OOM, 300)
    assert transition.started(NEW, 200) == RUNNING
    with pytest.raises(FrozenInstanceError):
        NEW.status = Status.RUNNING  # type: ignore[misc]


def asked_to_end(job: Job, cause: Cause) -> Job:
    return transition.request_end(job, cause, signal.SIGTERM, 5000)


ENDINGS: dict[str, Callable[[Job, int], Job]] = {
    "ended": lambda job, now_ns: transition.ended(job, exited(0), NO_OOM, now_ns),
    "start_failed": lambda job, now_ns: transition.start_failed(job, "exec", 2, "", now_ns),
    "lost": lambda job, now_ns: transition.lost(job, "", now_ns),
}
BY_STATUS = {
    Status.INITIALIZING: NEW,
    Status.RUNNING: RUNNING,
    Status.COMPLETED: transition.ended(RUNNING, exited(0), NO_OOM, 300),
    Status.FAILED: transition.ended(RUNNING, exited(1), NO_OOM, 300),
    Status.STOPPED: transition.lost(asked_to_end(RUNNING, Cause.STOPPED), "", 300),
}
ALL: dict[str, Callable[[Job, int], Job]] = {
    **ENDINGS,
    "started": transition.started,
    "request_end": lambda job, _: asked_to_end(job, Cause.STOPPED),
}
ALLOWED = {
    Status.INITIALIZING: {"started", "start_failed", "lost", "request_end"},
    Status.RUNNING: {"ended", "lost", "request_end"},
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("status", Status)
def test_the_whole_table_of_states_and_transitions(status: Status, name: str) -> None:
    job = BY_STATUS[status]
    assert job.status is status
    assert job.is_ended == (status in ENDED)
    if name in ALLOWED.get(status, set()):
        ALL[name](job, 300)
    else:
        with pytest.raises(JobStateError, match=f"^job 1 .*is {status}") as caught:
            ALL[name](job, 300)
        assert (caught.value.job_id, caught.value.status) == (1, status)


# How it ended

OUT_OF_MEMORY = Cause.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("wait_status", "oom", "expected"),
    [
        (exited(0), NO_OOM, ("COMPLETED", Cause.EXITED, 0, 0)),
        (exited(1), NO_OOM, ("FAILED", Cause.EXITED, 1, 0)),
        (exited(255), NO_OOM, ("FAILED", Cause.EXITED, 255, 0)),
        # A shell's way to say that what it ran was killed is an exit of its own.
        (exited(137), NO_OOM, ("FAILED", Cause.EXITED, 137, 0)),
        (signal.SIGTERM, NO_OOM, ("FAILED", Cause.SIGNALLED, -1, 15)),
        (signal.SIGSEGV | 0x80, NO_OOM, ("FAILED", Cause.SIGNALLED, -1, 11)),  # with a core
        (signal.SIGKILL, NO_OOM, ("FAILED", Cause.SIGNALLED, -1, 9)),
        (signal.SIGKILL, OomKills(1, 1), ("FAILED", OUT_OF_MEMORY, -1, 9)),
        (signal.SIGKILL, OomKills(0, 1), ("FAILED", OUT_OF_MEMORY, -1, 9)),
        # The limit was hit, and what was reclaimed was enough.
        (signal.SIGKILL, OomKills(1, 0), ("FAILED", Cause.SIGNALLED, -1, 9)),
        # A helper process was killed, and the job itself went on.
        (exited(0), OomKills(1, 1), ("COMPLETED", Cause.EXITED, 0, 0)),
        (exited(3), OomKills(1, 1), ("FAILED", Cause.EXITED, 3, 0)),
        (signal.SIGTERM, OomKills(1, 1), ("FAILED", Cause.SIGNALLED, -1, 15)),
    ],
)
def test_endings(wait_status: int, oom: OomKills, expected: tuple[str, Cause, int, int]) -> None:
    job = transition.ended(RUNNING, wait_status, oom, 300)
    assert (job.status, job.cause, job.exit_code, job.signal) == expected


def test_wait_statuses_are_those_of_the_kernel() -> None:
    for script, code, number in (("exit 7", 7, 0), ("kill -USR1 $$", -1, signal.SIGUSR1)):
        child = subprocess.Popen(["sh", "-c", script])
        _, wait_status = os.waitpid(child.pid, 0)
        child.returncode = 0  # reaped
        job = transition.ended(RUNNING, wait_status, NO_OOM, 300)
        assert (job.exit_code, job.signal) == (code, number)


def test_a_lost_record_stays_in_the_detail() -> None:
    job = transition.found(7, JobSpec("sleep"), 100)
    job = transition.started(job, 100)
    assert "lost with a damaged database" in job.detail
    killed = transition.ended(job, signal.SIGKILL, OomKills(1, 1), 300)
    assert killed.detail == f"{job.detail}; out of memory: its limit was reached"
    assert transition.lost(job, "nobody knows", 300).detail == f"{job.detail}; nobody knows"
    assert transition.ended(job, 0, OomKills(), 300).detail == job.detail


def test_details_name_what_happened() -> None:
    limited = replace(RUNNING, spec=replace(SPEC, limits=Limits(memory_mib=64)))
    details = [
        transition.ended(limited, wait_status, oom, 300).detail
        for wait_status, oom in (
            (exited(1), NO_OOM),
            (signal.SIGSEGV, NO_OOM),
            (signal.SIGRTMIN + 3, NO_OOM),
            (signal.SIGKILL, OomKills(1, 1)),
            (signal.SIGKILL, OomKills(0, 1)),
        )
    ]
    assert details[:3] == ["", "ended by SIGSEGV", f"ended by signal {signal.SIGRTMIN + 3}"]
    assert "limit of 64 MiB" in details[3]
    assert "the machine" in details[4]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("cause", [Cause.STOPPED, Cause.TIMED_OUT, Cause.LOG_LIMIT])
def test_the_end_that_was_asked_for_is_the_cause_whatever_came_then(
    ending: str, cause: Cause
) -> None:
    job = RUNNING if ending == "ended" else NEW
    job = ENDINGS[ending](asked_to_end(job, cause), 300)
    assert job.cause is cause
    assert job.status == ("STOPPED" if cause is Cause.STOPPED else "FAILED")


def test_a_stopped_job_keeps_its_exit_code_and_is_not_out_of_memory() -> None:
    asked = asked_to_end(RUNNING, Cause.STOPPED)
    job = transition.ended(asked, exited(0), NO_OOM, 300)
    assert (job.status, job.exit_code) == ("STOPPED", 0)
    job = transition.ended(asked, signal.SIGKILL, OomKills(1, 1), 300)
    assert (job.status, job.cause, job.signal) == ("STOPPED", Cause.STOPPED, 9)


def test_the_first_request_stays() -> None:
    """But for the time that is left."""
    asked = asked_to_end(RUNNING, Cause.TIMED_OUT)
    sooner = transition.request_end(asked, Cause.STOPPED, signal.SIGINT, 100)
    assert sooner == replace(asked, end_grace_ms=100)


def test_a_failed_start() -> None:
    job = transition.start_failed(NEW, "exec", 2, "no such file", 300)
    assert (job.status, job.cause, job.exit_code) == ("FAILED", Cause.START_FAILED, -1)
    assert (job.failed_step, job.failed_errno, job.detail) == ("exec", 2, "no such file")
    assert (job.started_ns, job.ended_ns) == (0, 300)


@pytest.mark.parametrize("job", [NEW, RUNNING], ids=["new", "running"])
def test_a_lost_job(job: Job) -> None:
    lost = transition.lost(job, "nobody knows", 300)
    assert (lost.status, lost.cause, lost.exit_code) == ("FAILED", Cause.LOST, -1)
    assert (lost.detail, lost.ended_ns) == ("nobody knows", 300)


@pytest.mark.parametrize("ending", ENDINGS)
@given(times=st.tuples(*[st.integers(1, 1000)] * 3))
def test_times_are_in_order_wherever_the_clock_is_set(
    ending: str, times: tuple[int, int, int]
) -> None:
    job = transition.created(1, SPEC, times[0])
    if ending != "start_failed":
        job = transition.started(job, times[1])
        assert job.started_ns >= job.created_ns
    ended = ENDINGS[ending](job, times[2])
    assert ended.created_ns == times[0]
    assert ended.ended_ns >= max(ended.started_ns, *times[::2])


def test_output_bytes() -> None:
    assert replace(RUNNING, stdout_bytes=3, stderr_bytes=4).output_bytes == 7


# What may be asked


def longest(marker: str) -> str:
    return marker * (LONGEST_STRING_BYTES - 1)


VALID = {
    "least": SPEC,
    "not resolved yet": JobSpec("true"),
    "all": JobSpec(
        "/bin/true", ("", "a\n", "ü", "\udcff"), Limits(1, 2, 3), {"A": "=", "ü": ""}, "/tmp", "n"
    ),
    "the longest name": JobSpec("true", name="ü" * LONGEST_NAME),
    "the longest string": JobSpec("true", (longest("x"),)),
    "the longest variable": JobSpec("true", environment={"A": longest("x")[2:]}),
}
INVALID = {
    "no command": (JobSpec(""), "command"),
    "NUL in the command": (JobSpec("a\0"), "command"),
    "NUL in an argument": (JobSpec("true", ("", "a\0b")), "args[1]"),
    "NUL in a variable": (JobSpec("true", environment={"A": "\0"}), "environment['A']"),
    "NUL in a variable's name": (JobSpec("true", environment={"\0": ""}), "environment['\\x00']"),
    "variable without a name": (JobSpec("true", environment={"": "x"}), "environment"),
    "= in a variable's name": (JobSpec("true", environment={"A=B": "x"}), "environment"),
    "relative folder": (JobSpec("true", working_directory="tmp"), "working_directory"),
    "no folder": (JobSpec("true", working_directory=""), "working_directory"),
    "NUL in the folder": (JobSpec("true", working_directory="/\0"), "working_directory"),
    "line in the name": (JobSpec("true", name="a\nb"), "name"),
    "escape in the name": (JobSpec("true", name="\x1b[31m"), "name"),
    "long name": (JobSpec("true", name="x" * (LONGEST_NAME + 1)), "name"),
    "negative CPU": (JobSpec("true", limits=Limits(cpu_percent=-1)), "maxCPU"),
    "negative memory": (JobSpec("true", limits=Limits(memory_mib=-1)), "maxMemory"),
    "negative IO": (JobSpec("true", limits=Limits(io_bytes_per_second=-1)), "maxIOBPS"),
    "long argument": (JobSpec("true", (longest("x") + "x",)), "args[0]"),
    "long in bytes": (JobSpec("true", (longest("ü"),)), "args[0]"),
    "long variable": (JobSpec("true", environment={"A": longest("x")}), "environment['A']"),
    "long together": (JobSpec("true", (longest("x"),) * 4), "args and environment"),
    "many that are empty": (JobSpec("true", ("",) * 100_000), "args and environment"),
    "many variables": (
        JobSpec("true", environment={str(i): "x" * 100 for i in range(6000)}),
        "args and environment",
    ),
}


@pytest.mark.parametrize("spec", VALID.values(), ids=VALID)
def test_valid(spec: JobSpec) -> None:
    validate(spec)


@pytest.mark.parametrize(("spec", "field"), INVALID.values(), ids=INVALID)
def test_invalid(spec: JobSpec, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate(spec)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300  # names what is wrong, and does not repeat it


def test_paths_of_many_parts_are_soon_looked_at() -> None:
    """All other calls wait meanwhile."""
    path = "/a" * 1000
    spec = JobSpec("true", binds=(Bind(path, path),) * MOST_BINDS)

    def seconds_of(function: Callable[[], object]) -> float:
        began = time.thread_time()
        function()
        return time.thread_time() - began

    def split() -> None:
        for _ in range(2 * MOST_BINDS):
            path.split("/")

    looks = min(seconds_of(lambda: validate(spec)) for _ in range(20))
    assert looks < 4 * min(seconds_of(split) for _ in range(20))


class Unquotable(str):
    __slots__ = ()

    def __repr__(self) -> str:
        raise AssertionError(str(self))


def test_names_of_variables_that_are_valid_are_not_quoted() -> None:
    """Of many long ones that takes milliseconds, in which all other calls wait."""
    validate(JobSpec("true", environment={Unquotable("A"): ""}))


def test_values_of_the_environment_are_in_no_error() -> None:
    for name, value in (("A", "secret\0"), ("A=", "secret"), ("A", "secret" * 50_000)):
        with pytest.raises(InvalidRequestError) as caught:
            validate(JobSpec("true", environment={name: value}))
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "args",
    [(longest("x"),) * 3 + ("x" * 100_000,), ("",) * (LONGEST_STRINGS_BYTES // 9 - 10)],
    ids=["long", "many"],
)
def test_the_kernel_takes_what_is_valid(args: tuple[str, ...]) -> None:
    validate(JobSpec(sys.executable, args))
    subprocess.run(["true", *args], env={}, check=True)


def test_the_kernel_does_not_take_longer_strings() -> None:
    with pytest.raises(OSError, match="too long"):
        subprocess.run(["true", longest("x") + "x"], check=True)


def test_many_strings_are_refused_before_they_are_looked_at() -> None:
    check_counts(65_000, 536, 0)
    with pytest.raises(InvalidRequestError, match="65537 strings"):
        check_counts(65_000, 537, 0)
