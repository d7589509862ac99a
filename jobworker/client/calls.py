"""What may be asked of a server, as requests and answers: no connection, no waiting.

A `Call` is what one method of a client sends and how its answer is read. Both clients
perform the same ones. Answers become the types of `jobworker.job`, also those of servers
that know only the contract's old fields.
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypedDict, TypeVar

from google.protobuf.message import Message

from jobworker.errors import InvalidRequestError, RejectedError, UnsupportedError
from jobworker.job import (
    LONGEST_TIMEOUT_MS,
    Accounting,
    Bind,
    Cause,
    Job,
    JobSpec,
    Limits,
    Principal,
    Quota,
    Status,
    validate,
    validate_stdin,
)
from jobworker.pb import job_worker_pb2 as pb

AnswerT = TypeVar("AnswerT")

LARGEST_INT32 = 2**31 - 1
LARGEST_UINT32 = 2**32 - 1
LARGEST_PAGE_JOBS = 1000
MOST_EMPTY_PAGES = 1000  # one after the other
# Of what is longer, gRPC takes some for no time at all.
LONGEST_CALL_SECONDS = LONGEST_TIMEOUT_MS / 1000

# Those that a server knows that knows only the old fields.
OLD_OPTIONS = {"max_cpu", "max_memory", "max_iobps"}


@dataclass(frozen=True, slots=True)
class Call(Generic[AnswerT]):
    """One unary call. needs: what a server that knows only the old fields would ignore."""

    rpc: str
    request: Message
    read: Callable[[bytes], AnswerT]
    needs: tuple[str, ...] = ()
    extra_seconds: float = 0.0  # that the server may take, beyond the client's timeout


@dataclass(frozen=True, slots=True)
class Controller:
    """A cgroup controller, and why limits that need it cannot be enforced, if so."""

    name: str
    available: bool
    problem: str


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """What a profile does to separate a job from the machine, or why jobs cannot have it."""

    name: str
    problem: str
    measures: tuple[str, ...]  # for people


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What each client, by its CN, may have under way at once; 0: an older server does not tell."""

    calls: int  # but for streams
    streams: int
    connections: int  # with calls


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is, and for whom it takes its caller."""

    version: str
    started_ns: int  # since the epoch
    identity: str  # the CN of the client's certificate
    role: str  # "admin", "user" or "viewer"
    state_directory: str  # empty: not shown to users
    cgroup: str  # below which jobs get their own; empty: none
    controllers: tuple[Controller, ...]
    default_limits: Limits
    running_jobs: int  # a user's own
    maximum_jobs: int
    # Of a job that asks for none, and what else it may ask for.
    default_profile: str
    profiles: tuple[str, ...]
    default_user: str
    users: tuple[str, ...]
    isolation_problem: str  # why no profile but "none" is there; empty: others are
    profile_details: tuple[ProfileInfo, ...]
    roots_allowed: tuple[str, ...]  # folders which, or below which, a job's root may be
    binds_allowed: tuple[str, ...]  # the same of sources of binds; with `:ro` read-only
    ended_jobs: int  # that are kept
    ended_log_bytes: int  # what their output takes
    disk_room_bytes: int  # what is left on the state folder's disk
    disk_reserve_bytes: int  # with less room than that no job is created
    log_max_bytes: int  # of each job's output; 0: no limit
    log_policy: str  # what happens beyond that: "ring", "head" or "stop"
    client_limits: ClientLimits
    quota: Quota  # what the caller may use
    quota_used: Quota  # by its jobs that have not ended


@dataclass(frozen=True, slots=True)
class Page:
    jobs: list[Job] = field(default_factory=list)
    next_token: str = ""  # empty: this was the last page


# Requests


class CreateOptions(TypedDict, total=False):
    """How a job is to run."""

    max_cpu: int  # percent of one core; 0: the server's default
    max_memory: int  # MiB; 0: the server's default
    max_iobps: int  # bytes a second, each of read and write; 0: the server's default
    environment: Mapping[str, str] | None  # added to the few variables that every job gets
    working_directory: str  # absolute; default "/"
    name: str  # for people, and for `list`; need not be unique
    merge_output: bool  # one pipe for both streams: exact order, all counts as stdout
    stdin: bytes  # what the job reads from its standard input; at most 1 MiB
    time_limit: float  # seconds from its start on, after which it is ended; 0: none
    user: str  # whom it runs as; empty: the server's choice
    profile: str  # how it is separated from the machine; empty: the server's choice
    network: str  # host, or none but a loopback interface; empty: the profile's
    root: str  # a folder of the server's that is to be its /; empty: the server's /
    read_only: bool  # its files, but for its own /tmp and the binds
    binds: Collection[Bind]  # files and folders of the server's at other places too


# What an argument must have, in words and as who has it.
TEXT = "a str", lambda value: isinstance(value, str)
NUMBER = "a number", lambda value: hasattr(value, "__float__")
WHOLE_NUMBER = "an int", lambda value: hasattr(value, "__index__")
BYTES = "bytes", lambda value: isinstance(value, bytes | bytearray | memoryview)
BIND = "a Bind", lambda value: isinstance(value, Bind)
KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("max_cpu", "max_memory", "max_iobps"), WHOLE_NUMBER),
    **dict.fromkeys(("working_directory", "name", "user", "profile", "network", "root"), TEXT),
    "stdin": BYTES,
    "time_limit": NUMBER,
}


def create(command: str, args: Iterable[str], options: CreateOptions) -> Call[Job]:
    """Raises RejectedError for what no server could accept, and TypeError."""
    rpc = "CreateJob"
    unknown = options.keys() - CreateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}")
    args = tuple(args)
    _check_kinds(command, args, options)
    with rejecting(rpc):
        spec = _spec_of(command, args, options)
        _check_int32(spec.limits)
        validate(spec)
        stdin = bytes(options.get("stdin") or b"")
        validate_stdin(stdin)
        request = _create_request(spec, stdin)
    asked = {name for name, value in options.items() if value}
    return Call(rpc, request, _read_job, tuple(sorted(asked - OLD_OPTIONS)))


@contextmanager
def rejecting(rpc: str) -> Iterator[None]:
    """What no server could accept is a RejectedError."""
    try:
        yield
    except InvalidRequestError as error:
        raise RejectedError(rpc, "INVALID_ARGUMENT", str(error)) from error
    except UnicodeEncodeError as error:
        problem = f"{error.object!r} is not text; arguments must be UTF-8"
        raise RejectedError(rpc, "INVALID_ARGUMENT", problem) from error


def _check_kinds(command: object, args: Collection[object], options: CreateOptions) -> None:
    """Raises TypeError, which says what would be right: deeper down nobody knows the names."""
    _check_kind("command", command, *TEXT)
    for arg in args:
        _check_kind("each argument of the command", arg, *TEXT)
    for name, value in options.items():
        if value is not None and name in KINDS:
            _check_kind(name, value, *KINDS[name])
    for name, value in (options.get("environment") or {}).items():
        _check_kind("each name in environment", name, *TEXT)
        _check_kind(f"environment[{name!r}]", value, *TEXT)
    for bind in options.get("binds") or ():
        _check_kind("each of binds", bind, *BIND)


def _check_kind(name: str, value: object, kind: str, has: Callable[[object], bool]) -> None:
    if not has(value):
        raise TypeError(f"{name} must be {kind}, not of the type {type(value).__name__}")


def get(job_id: int | str) -> Call[Job]:
    def read(answer: bytes) -> Job:
        return checked(_read_job(answer), job_id)

    with rejecting("GetJob"):
        return Call("GetJob", pb.GetJobReq(id=str(job_id)), read)


def stop(job_id: int | str, signal: int, grace_seconds: float | None) -> Call[None]:
    rpc = "StopJob"
    with rejecting(rpc):
        request = pb.StopJobReq(id=str(job_id))
        _check_range("signal", signal, LARGEST_INT32)
        request.signal = signal
        if grace_seconds is not None:
            _check_range("grace_seconds", grace_seconds, LARGEST_UINT32 // 1000)
            request.grace_milliseconds = round(grace_seconds * 1000)
    new = {"signal": signal != 0, "grace_seconds": grace_seconds is not None}
    needs = tuple(option for option, used in new.items() if used)
    return Call(rpc, request, _read_nothing, needs, extra_seconds=grace_seconds or 0)


def delete(job_id: int | str) -> Call[None]:
    with rejecting("DeleteJob"):
        return Call("DeleteJob", pb.DeleteJobReq(id=str(job_id)), _read_nothing)


def info() -> Call[ServerInfo]:
    return Call("GetServerInfo", pb.EmptyRequest(), _read_info)


def _spec_of(command: str, args: Iterable[str], options: CreateOptions) -> JobSpec:
    return JobSpec(
        command=command,
        args=tuple(args),
        limits=Limits(
            cpu_percent=options.get("max_cpu", 0),
            memory_mib=options.get("max_memory", 0),
            io_bytes_per_second=options.get("max_iobps", 0),
        ),
        environment=options.get("environment") or {},
        working_directory=options.get("working_directory") or "/",
        name=options.get("name", ""),
        merge_output=options.get("merge_output", False),
        timeout_ms=_timeout_ms(options.get("time_limit", 0)),
        user=options.get("user", ""),
        profile=options.get("profile", ""),
        network=options.get("network", ""),
        root=options.get("root", ""),
        read_only=options.get("read_only", False),
        binds=tuple(options.get("binds", ())),
    )


def _timeout_ms(seconds: float) -> int:
    """At least 1 for any limit: 0 would be none."""
    if not 0 <= seconds <= LONGEST_TIMEOUT_MS / 1000:
        problem = f"{seconds} is not possible; use seconds, at most {LONGEST_TIMEOUT_MS // 1000}"
        raise InvalidRequestError("time_limit", f"{problem}, or 0 for none")
    return max(round(seconds * 1000), 1) if seconds else 0


def _create_request(spec: JobSpec, stdin: bytes) -> pb.CreateJobReq:
    return pb.CreateJobReq(
        command=spec.command,
        args=spec.args,
        maxCPU=spec.limits.cpu_percent,
        maxMemory=spec.limits.memory_mib,
        maxIOBPS=spec.limits.io_bytes_per_second,
        environment=spec.environment,
        working_directory=spec.working_directory,
        name=spec.name,
        merge_output=spec.merge_output,
        stdin=stdin,
        timeout_milliseconds=spec.timeout_ms,
        user=spec.user,
        profile=spec.profile,
        network=spec.network,
        root=spec.root,
        read_only=spec.read_only,
        binds=[
            pb.Bind(source=bind.source, destination=bind.destination, read_only=bind.read_only)
            for bind in spec.binds
        ],
    )


def _check_int32(limits: Limits) -> None:
    """More does not fit into the contract's fields."""
    for name, value in (
        ("max_cpu", limits.cpu_percent),
        ("max_memory", limits.memory_mib),
        ("max_iobps", limits.io_bytes_per_second),
    ):
        _check_range(name, value, LARGEST_INT32, " (0 is the server's default)")


def _check_range(name: str, value: float, largest: int, hint: str = "") -> None:
    if not 0 <= value <= largest:
        raise InvalidRequestError(name, f"{value} is not possible; use 0 to {largest}{hint}")


class Listing:
    """A way through all jobs, newest first, page by page, until it `is_over`."""

    def __init__(
        self, statuses: Collection[str], name: str, limit: int | None, owner: str = ""
    ) -> None:
        """limit: at most so many jobs; None: all."""
        self._statuses = frozenset(status.upper() for status in statuses)
        self._name = name
        self._owner = owner
        self._left = limit
        self._token = ""
        self._empty_pages = 0
        self.is_over = limit is not None and limit <= 0

    def request(self) -> Call[Page]:
        with rejecting("ListJobs"):
            request = pb.ListJobsReq(
                statuses=sorted(self._statuses),
                name=self._name,
                owner=self._owner,
                page_size=min(self._left or LARGEST_PAGE_JOBS, LARGEST_PAGE_JOBS),
                page_token=self._token,
            )
        return Call("ListJobs", request, self._read_page)

    def old_request(self, error: UnsupportedError) -> Call[Page]:
        """For a server without ListJobs; raises the error where that does not help."""
        if self._name or self._owner:
            raise error
        return Call("GetJobs", pb.EmptyRequest(), self._read_all)

    def take(self, page: Page) -> list[Job]:
        jobs = page.jobs[: self._left]
        self._token = page.next_token
        if self._left is not None:
            self._left -= len(jobs)
        self.is_over = self._left == 0 or not self._token
        return jobs

    def _read_page(self, answer: bytes) -> Page:
        message = pb.ListJobsRes.FromString(answer)
        if message.next_page_token and message.next_page_token == self._token:
            raise ValueError(f"after the page {self._token!r} comes the same again")
        self._empty_pages = 0 if message.jobs else self._empty_pages + 1
        if self._empty_pages > MOST_EMPTY_PAGES:
            raise ValueError(f"there is no job in {self._empty_pages} pages")
        return Page([job_from(job) for job in message.jobs], message.next_page_token)

    def _read_all(self, answer: bytes) -> Page:
        jobs = map(job_from, pb.Jobs.FromString(answer).jobs)
        wanted = [job for job in jobs if not self._statuses or job.status in self._statuses]
        return Page(sorted(wanted, key=lambda job: job.id, reverse=True))


# Answers


def _read_nothing(answer: bytes) -> None:
    """The job itself tells more than the answer to a stop; that to a delete is empty."""


def _read_job(answer: bytes) -> Job:
    return job_from(pb.Job.FromString(answer))


def _read_info(answer: bytes) -> ServerInfo:
    message = pb.ServerInfo.FromString(answer)
    return ServerInfo(
        version=message.version,
        started_ns=message.start_time_ns,
        identity=message.identity,
        role=message.role,
        state_directory=message.state_directory,
        cgroup=message.cgroup,
        controllers=tuple(
            Controller(controller.name, controller.available, controller.problem)
            for controller in message.controllers
        ),
        default_limits=Limits(
            message.default_cpu, message.default_memory, message.default_iobps, message.default_pids
        ),
        running_jobs=message.running_jobs,
        maximum_jobs=message.maximum_jobs,
        default_profile=message.default_profile,
        profiles=tuple(message.profiles),
        default_user=message.default_user,
        users=tuple(message.users),
        isolation_problem=message.isolation_problem,
        profile_details=tuple(
            ProfileInfo(each.name, each.problem, tuple(each.measures))
            for each in message.profile_details
        ),
        roots_allowed=tuple(message.roots_allowed),
        binds_allowed=tuple(message.binds_allowed),
        ended_jobs=message.ended_jobs,
        ended_log_bytes=message.ended_log_bytes,
        disk_room_bytes=message.disk_room_bytes,
        disk_reserve_bytes=message.disk_reserve_bytes,
        log_max_bytes=message.log_max_bytes,
        log_policy=message.log_policy,
        client_limits=ClientLimits(
            message.client_limits.calls,
            message.client_limits.streams,
            message.client_limits.connections,
        ),
        quota=_quota_from(message.quota),
        quota_used=_quota_from(message.quota_used),
    )


def _quota_from(message: pb.Quota) -> Quota:
    return Quota(
        message.running_jobs,
        message.total_cpu,
        message.total_memory,
        message.creates_per_second,
    )


def id_from(text: str) -> int:
    """Raises ValueError for what is no id of the contract."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{text[:40]!r} is no id of a job")
    return int(text)


def checked(job: Job, asked: int | str) -> Job:
    """Raises ValueError where it is another one than was asked for."""
    text = str(asked)
    if text.isascii() and text.isdecimal() and int(text) != job.id:
        raise ValueError(f"it is about job {job.id}, not {text}")
    return job


def job_from(message: pb.Job) -> Job:
    """Raises ValueError for what is no job of the contract."""
    status = Status(message.status)
    started_ns = message.start_time_ns or nanoseconds(message.startTime)
    is_old = not message.created_time_ns
    return Job(
        id=id_from(message.id),
        spec=_spec_from(message),
        status=status,
        # Servers that know only the old fields do not tell: the start is the nearest.
        created_ns=message.created_time_ns or started_ns,
        started_ns=started_ns,
        ended_ns=message.end_time_ns or nanoseconds(message.endTime),
        cause=_old_cause(status, message.exitCode) if is_old else _cause(message.cause),
        exit_code=message.exitCode,
        signal=message.signal,
        failed_step=message.failed_step,
        failed_errno=message.failed_errno,
        detail=message.detail,
        accounting=_accounting_from(message),
        stdout_bytes=message.stdout_bytes,
        stderr_bytes=message.stderr_bytes,
        lost_bytes=message.lost_bytes,
        output_problem=message.output_problem,
        cleanup_uncertain=message.cleanup_uncertain,
        created_by=_principal_from(message.created_by) if message.HasField("created_by") else None,
        stopped_by=_principal_from(message.stopped_by) if message.HasField("stopped_by") else None,
        environment_withheld=message.environment_withheld,
    )


def _principal_from(message: pb.Principal) -> Principal:
    return Principal(message.name, message.role, message.serial)


def _spec_from(message: pb.Job) -> JobSpec:
    return JobSpec(
        command=message.command,
        args=tuple(message.args),
        limits=Limits(message.maxCPU, message.maxMemory, message.maxIOBPS, message.max_pids),
        environment=dict(message.environment),
        working_directory=message.working_directory or "/",
        name=message.name,
        merge_output=message.merge_output,
        timeout_ms=message.timeout_milliseconds,
        user=message.user,
        profile=message.profile,
        network=message.network,
        root=message.root,
        read_only=message.read_only,
        binds=tuple(Bind(bind.source, bind.destination, bind.read_only) for bind in message.binds),
    )


def _cause(number: int) -> Cause | None:
    return Cause(number) if number else None


def _old_cause(status: Status, exit_code: int) -> Cause | None:
    """What the old fields say about it; None where they leave it open."""
    if status is Status.STOPPED:
        return Cause.STOPPED
    if status is Status.COMPLETED or (status is Status.FAILED and exit_code > 0):
        return Cause.EXITED
    return None


def _accounting_from(message: pb.Job) -> Accounting | None:
    if not message.HasField("accounting"):
        return None
    values = message.accounting
    known = {descriptor.name: value for descriptor, value in values.ListFields()}
    return Accounting(**known)


RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))"
)

# Of the years that can be shown, which an offset may lead out of.
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799


def nanoseconds(text: str) -> int:
    """Since the epoch, for a time such as 2026-01-31T12:00:00.5Z; 0 for none."""
    if not text:
        return 0
    found = RFC_3339.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a time of RFC 3339")
    day, clock, fraction, sign, hours, minutes = found.groups()
    seconds = calendar.timegm(time.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S"))
    if sign:
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds -= offset if sign == "+" else -offset
    if not FIRST_SECOND <= seconds <= LAST_SECOND:
        raise ValueError(f"{text!r} is not within the years 1 to 9999")
    return seconds * 1_000_000_000 + int((fraction or "")[:9].ljust(9, "0"))
