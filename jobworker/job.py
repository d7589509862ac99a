"""What a job is, what may be asked of one, and how it passes from one state to the next.

A `Job` is an immutable snapshot. The functions below it are the only transitions: pure,
each from one snapshot to the next. The manager alone calls them.

    INITIALIZING ──started──▶ RUNNING ──ended──▶ COMPLETED | FAILED | STOPPED
          │                      │
          └─────start_failed     └─────lost──▶ FAILED
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from jobworker.errors import InvalidRequestError, JobStateError


class Status(enum.StrEnum):
    """The states of the wire contract, by their names there."""

    INITIALIZING = "INITIALIZING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


NETWORKS = ("host", "none")

ENDED = frozenset({Status.COMPLETED, Status.FAILED, Status.STOPPED})


class Cause(enum.IntEnum):
    """Why a job ended; the numbers are the wire contract's."""

    EXITED = 1
    SIGNALLED = 2
    OUT_OF_MEMORY = 3
    TIMED_OUT = 4
    LOG_LIMIT = 5
    START_FAILED = 6
    LOST = 7
    STOPPED = 8


class LogPolicy(enum.StrEnum):
    """What happens once a job's log has reached its quota."""

    RING = "ring"  # the oldest segments give way
    HEAD = "head"  # what comes is dropped
    STOP = "stop"  # the same, and the job is ended


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may use at the most; 0 is no limit."""

    cpu_percent: int = 0  # of one core
    memory_mib: int = 0
    io_bytes_per_second: int = 0  # each of read and write
    pids: int = 0  # processes and threads, together; only the server's default sets it


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or a folder that a job finds at another place too. Both are absolute paths, without
    `..`, and lead through no symbolic link."""

    source: str  # of the machine's files
    destination: str  # of the job's own; is there, or is below /tmp
    read_only: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.destination}" + ":ro" * self.read_only

    @classmethod
    def parse(cls, text: str) -> Bind:
        """Of SRC:DST[:ro]. Raises ValueError."""
        source, *rest = text.split(":")
        if not source or len(rest) not in {1, 2} or not rest[0] or rest[1:] not in ([], ["ro"]):
            raise ValueError(f"{text!r}: use SRC:DST, or SRC:DST:ro")
        return cls(source, rest[0], len(rest) == 2)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a client asked to run, validated and resolved."""

    command: str  # the resolved path of the executable
    args: tuple[str, ...] = ()
    limits: Limits = Limits()  # those in force
    environment: Mapping[str, str] = field(default_factory=dict)  # beyond what every job gets
    working_directory: str = "/"
    name: str = ""
    merge_output: bool = False
    timeout_ms: int = 0  # from its start on; 0: none
    user: str = ""  # as asked for in a request, by name in a job
    profile: str = ""  # the same
    # Of its output; what reading the output takes, whatever the setting says by then.
    log_max_bytes: int = 0  # with the index; 0: no limit
    log_policy: LogPolicy = LogPolicy.RING
    network: str = ""  # as asked for in a request, one of NETWORKS in a job; empty: host
    root: str = ""  # a folder that is its /; empty: the machine's files, as the profile shows them
    read_only: bool = False  # its files, but for its own /tmp and the binds
    binds: tuple[Bind, ...] = ()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asked for something, by the certificate that was shown."""

    name: str  # the subject's CN; whose a job is goes by it alone
    role: str
    serial: str  # in hexadecimal, as openssl shows it


@dataclass(frozen=True, slots=True)
class Quota:
    """What one client may use, or uses, of which the limits of its running jobs count; 0 is no
    quota."""

    running_jobs: int = 0
    total_cpu: int = 0  # percent of one core
    total_memory: int = 0  # MiB
    creates_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Accounting:
    """What an ended job used; None is what the kernel could not tell."""

    cpu_user_us: int | None = None
    cpu_system_us: int | None = None
    memory_peak_bytes: int | None = None
    io_read_bytes: int | None = None
    io_written_bytes: int | None = None
    oom_kills: int | None = None


MANY_STRINGS = 256  # to read or show them takes some 0.2 ms


@dataclass(frozen=True, slots=True)
class Job:
    """One job at one moment. Times are nanoseconds since the epoch, 0 before they came."""

    id: int
    spec: JobSpec
    status: Status
    created_ns: int
    started_ns: int = 0
    ended_ns: int = 0
    # The first accepted of stop, timeout and log limit: the cause once the job has ended.
    end_requested: Cause | None = None
    # For a server that takes it over then: the signal that it was to get, and how long it may take
    # from then on, as was asked for last.
    end_signal: int = 0
    end_grace_ms: int = 0
    cause: Cause | None = None
    exit_code: int = -1
    signal: int = 0
    failed_step: str = ""
    failed_errno: int = 0
    detail: str = ""
    accounting: Accounting | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    lost_bytes: int = 0  # of its output, dropped by a quota or by a full disk
    # While it runs: why its output cannot be written, so that it waits or loses some.
    output_problem: str = ""
    log_bytes: int = 0  # what output and index of an ended job take in the state folder
    cleanup_uncertain: bool = False
    created_by: Principal | None = None  # None: under a version that did not record it
    stopped_by: Principal | None = None  # None: no client did
    environment_withheld: bool = False  # of a job as shown to some: its values are left out
    is_brief: bool = False  # arguments and environment are left out, as they are long

    @property
    def owner(self) -> str:
        """The CN of the client that created it; empty: it is nobody's."""
        return self.created_by.name if self.created_by else ""

    @property
    def is_large(self) -> bool:
        """Whether it takes more than a moment to read or to show all of it."""
        return self.is_brief or len(self.spec.args) + len(self.spec.environment) > MANY_STRINGS

    @property
    def is_ended(self) -> bool:
        return self.status in ENDED

    @property
    def output_bytes(self) -> int:
        """The end of the merged output: one more than the last offset."""
        return self.stdout_bytes + self.stderr_bytes


_JOB_FIELDS = tuple(each.name for each in fields(Job))
_values_of = attrgetter(*_JOB_FIELDS)


def changed(job: Job, **changes: Any) -> Job:
    """dataclasses.replace for a job, in a third of its time: it is called often."""
    new = object.__new__(Job)
    for name, value in zip(_JOB_FIELDS, _values_of(job), strict=True):
        object.__setattr__(new, name, value)
    for name, value in changes.items():
        object.__setattr__(new, name, value)
    return new


@dataclass(frozen=True, slots=True)
class OomKills:
    """How the kernel's out-of-memory killer dealt with a job's cgroup (memory.events)."""

    by_limit: int = 0  # `oom`: the job's own limit was hit and nothing could be reclaimed
    killed: int = 0  # `oom_kill`: its processes killed, whoever ran out of memory


# The kernel's MAX_ARG_STRLEN, and what execve takes with the usual 8 MiB of stack and more
# than enough left for the job (man 2 execve, "Limits on size of arguments and environment").
LONGEST_STRING_BYTES = 128 << 10
LONGEST_STRINGS_BYTES = 512 << 10
POINTER_BYTES = 8  # each string also costs one
LONGEST_NAME = 256
LONGEST_STDIN_BYTES = 1 << 20
LONGEST_TIMEOUT_MS = 1000 * 86400 * 365 * 10
LONGEST_PATH_BYTES = 4096  # the kernel's PATH_MAX, with a NUL at its end
MOST_BINDS = 32
# Where what is bound would be in the way of what the server mounts there for each job.
UNBINDABLE = ("/proc", "/dev", "/sys")


def check_counts(args: int, variables: int, binds: int) -> None:
    """Before each of them is looked at: so many as fit into a message would take seconds. Raises
    InvalidRequestError."""
    count = args + variables
    if count * POINTER_BYTES > LONGEST_STRINGS_BYTES:
        problem = f"are {count} strings, more than a process can be given; pass them in a file"
        raise InvalidRequestError("args and environment", problem)
    if binds > MOST_BINDS:
        raise InvalidRequestError("binds", f"are {binds}; at most {MOST_BINDS} are taken")


def validate(spec: JobSpec) -> None:
    """Raises InvalidRequestError for what no machine could run, and was not refused by its
    counts."""
    if not spec.command:
        raise InvalidRequestError("command", "is empty; give the program to run")
    _check_name(spec.name)
    _check_limits(spec.limits)
    if not spec.working_directory.startswith("/"):
        problem = f"{spec.working_directory!r} is relative; give an absolute path"
        raise InvalidRequestError("working_directory", problem)
    _check_string("working_directory", spec.working_directory)
    _check_string("command", spec.command)
    _check_files(spec)
    for number, arg in enumerate(spec.args):
        _check_string(f"args[{number}]", arg)
    for name, value in spec.environment.items():
        if not name or "=" in name:
            # What stands behind it may be a secret, as all values.
            shown = name.partition("=")[0] + "=…" if name else name
            raise InvalidRequestError("environment", f"{shown!r} is not a variable's name")
        if problem := _problem_of_string(f"{name}={value}"):  # else its name need not be quoted
            raise InvalidRequestError(f"environment[{name!r}]", problem)
    _check_total(spec)
    if not 0 <= spec.timeout_ms <= LONGEST_TIMEOUT_MS:
        problem = f"{spec.timeout_ms} is not from 0, for none, to {LONGEST_TIMEOUT_MS} (ten years)"
        raise InvalidRequestError("timeout_milliseconds", problem)


def validate_stdin(stdin: bytes) -> None:
    """Raises InvalidRequestError where it is too long. It is no part of the spec: nothing
    keeps it once the job has got it."""
    if len(stdin) > LONGEST_STDIN_BYTES:
        problem = f"is {len(stdin)} bytes long; at most {LONGEST_STDIN_BYTES} are taken"
        raise InvalidRequestError("stdin", f"{problem}, so pass it in a file")


def _check_name(name: str) -> None:
    if len(name) > LONGEST_NAME or not name.isprintable():
        problem = f"use at most {LONGEST_NAME} printable characters"
        raise InvalidRequestError("name", problem)


def _check_limits(limits: Limits) -> None:
    for field_name, value in (
        ("maxCPU", limits.cpu_percent),
        ("maxMemory", limits.memory_mib),
        ("maxIOBPS", limits.io_bytes_per_second),
    ):
        if value < 0:
            problem = f"{value} is negative; use 0 for the server's default"
            raise InvalidRequestError(field_name, problem)


def _check_files(spec: JobSpec) -> None:
    if spec.root:
        _check_path("root", spec.root)
    for number, bind in enumerate(spec.binds):
        _check_path(f"binds[{number}].source", bind.source)
        destination = f"binds[{number}].destination"
        _check_path(destination, bind.destination)
        path = bind.destination.rstrip("/")
        if not path:
            raise InvalidRequestError(destination, "is /; give a root instead")
        if any(path == top or path.startswith(top + "/") for top in UNBINDABLE):
            problem = f"{bind.destination!r} is where a job has its own; give another place"
            raise InvalidRequestError(destination, problem)


def _check_path(field_name: str, path: str) -> None:
    """That it is absolute, and that its text says where it leads, unless links are on the way."""
    if not path.startswith("/"):
        raise InvalidRequestError(field_name, f"{path!r} is not an absolute path; give one")
    if "\0" in path or _size(path) > LONGEST_PATH_BYTES:
        problem = f"has a NUL byte, or more than {LONGEST_PATH_BYTES - 1} bytes"
        raise InvalidRequestError(field_name, problem)
    ended = path.rstrip("/") + "/"
    if "//" in ended or "/./" in ended or "/../" in ended:
        problem = f"{path!r} has an empty part, `.` or `..`; give the path without"
        raise InvalidRequestError(field_name, problem)


def _check_string(field_name: str, value: str) -> None:
    if problem := _problem_of_string(value):
        raise InvalidRequestError(field_name, problem)


def _problem_of_string(value: str) -> str:
    """Empty where there is none."""
    if "\0" in value:
        return "has a NUL byte, which no process can be given"
    if _size(value) > LONGEST_STRING_BYTES:
        problem = f"is {_size(value) - 1} bytes long; the kernel takes {LONGEST_STRING_BYTES - 1}"
        return f"{problem}, so pass it in a file"
    return ""


def _check_total(spec: JobSpec) -> None:
    variables = [f"{name}={value}" for name, value in spec.environment.items()]
    strings = [spec.command, *spec.args, *variables]
    total = sum(map(_size, strings)) + POINTER_BYTES * len(strings)
    if total > LONGEST_STRINGS_BYTES:
        problem = f"are {total} bytes together; at most {LONGEST_STRINGS_BYTES} are taken"
        raise InvalidRequestError("args and environment", f"{problem}, so pass them in a file")


def _size(value: str) -> int:
    """As execve counts: in bytes, with the NUL at the end."""
    return len(value.encode("utf-8", "surrogateescape")) + 1


RECORD_LOST = (
    "its record was lost with a damaged database: what was asked for, and by whom, is not known"
)


def created(job_id: int, spec: JobSpec, now_ns: int, created_by: Principal | None = None) -> Job:
    return Job(job_id, spec, Status.INITIALIZING, now_ns, created_by=created_by)


def started(job: Job, now_ns: int) -> Job:
    """The exec of the job's command is proved."""
    _require(job, Status.INITIALIZING, "start")
    return changed(job, status=Status.RUNNING, started_ns=_not_before(job, now_ns))


def request_end(
    job: Job, cause: Cause, signal: int, grace_ms: int, by: Principal | None = None
) -> Job:
    """Stop, timeout or log limit: the first that is accepted stays, with its signal, but for the
    time that is left. by: the client, if any."""
    if job.is_ended:
        raise JobStateError(job.id, job.status, "stop")
    if job.end_requested is not None:
        return changed(job, end_grace_ms=grace_ms)
    return changed(
        job, end_requested=cause, end_signal=signal, end_grace_ms=grace_ms, stopped_by=by
    )


def found(job_id: int, spec: JobSpec, started_ns: int) -> Job:
    """It has started, and its record was lost. spec: what of it can be seen."""
    return changed(created(job_id, spec, started_ns), detail=RECORD_LOST)


def start_failed(job: Job, step: str, error_number: int, detail: str, now_ns: int) -> Job:
    """One step before the exec failed; nothing of the job ever ran."""
    _require(job, Status.INITIALIZING, "fail the start of")
    cause = job.end_requested or Cause.START_FAILED
    return changed(
        job,
        status=_status_of(cause, exit_code=-1),
        cause=cause,
        failed_step=step,
        failed_errno=error_number,
        detail=detail,
        ended_ns=_not_before(job, now_ns),
    )


def ended(
    job: Job,
    wait_status: int,
    oom: OomKills,
    now_ns: int,
) -> Job:
    """The job's main process has ended with `wait_status` (wait(2)), and all of it is gone."""
    _require(job, Status.RUNNING, "end")
    exit_code = (wait_status >> 8) & 0xFF if wait_status & 0x7F == 0 else -1
    signal_number = wait_status & 0x7F
    cause, detail = _cause_of(job, signal_number, oom)
    detail = "; ".join(filter(None, (job.detail, detail)))
    return changed(
        job,
        status=_status_of(cause, exit_code),
        cause=cause,
        exit_code=exit_code,
        signal=signal_number,
        detail=detail,
        ended_ns=_not_before(job, now_ns),
    )


def lost(job: Job, detail: str, now_ns: int) -> Job:
    """Nobody is left who could know how the job ended."""
    if job.is_ended:
        raise JobStateError(job.id, job.status, "lose")
    cause = job.end_requested or Cause.LOST
    return changed(
        job,
        status=_status_of(cause, exit_code=-1),
        cause=cause,
        detail="; ".join(filter(None, (job.detail, detail))),
        ended_ns=_not_before(job, now_ns),
    )


def out_of_memory(job: Job, oom: OomKills) -> str:
    """Whose limit it was, for people; empty where nothing was killed for want of memory."""
    if not oom.killed:
        return ""
    if oom.by_limit:
        limit = job.spec.limits.memory_mib  # 0: its record was lost
        return f"out of memory: its limit{f' of {limit} MiB' if limit else ''} was reached"
    return "out of memory: not by its own limit, but by the machine's or a cgroup's above"


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 77` for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cause_of(job: Job, signal_number: int, oom: OomKills) -> tuple[Cause, str]:
    if job.end_requested is Cause.TIMED_OUT:
        return Cause.TIMED_OUT, f"its time limit of {job.spec.timeout_ms / 1000:g} s was over"
    if job.end_requested is not None:
        return job.end_requested, ""
    # oom_kill also counts a helper process that died while the job itself went on to a
    # good end; only a main process that the SIGKILL ended was ended by it.
    if oom.killed and signal_number == signal.SIGKILL:
        return Cause.OUT_OF_MEMORY, out_of_memory(job, oom)
    if signal_number:
        return Cause.SIGNALLED, f"ended by {signal_name(signal_number)}"
    return Cause.EXITED, ""


def _status_of(cause: Cause, exit_code: int) -> Status:
    if cause is Cause.STOPPED:
        return Status.STOPPED
    if cause is Cause.EXITED and exit_code == 0:
        return Status.COMPLETED
    return Status.FAILED


def _not_before(job: Job, now_ns: int) -> int:
    """The clock may have been set back: no time stands before one that came earlier."""
    return max(now_ns, job.started_ns, job.created_ns)


def _require(job: Job, status: Status, action: str) -> None:
    if job.status is not status:
        raise JobStateError(job.id, job.status, action)
