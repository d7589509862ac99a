"""How values cross the wire: messages to and from the types of `jobworker.job`, errors to
gRPC status codes. All of it is pure."""

from __future__ import annotations

import errno
import functools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from jobworker import errors
from jobworker.engine.isolation import Isolation
from jobworker.errors import InvalidRequestError, JobNotFoundError
from jobworker.job import (
    LONGEST_PATH_BYTES,
    LONGEST_STDIN_BYTES,
    LONGEST_STRING_BYTES,
    LONGEST_STRINGS_BYTES,
    MANY_STRINGS,
    MOST_BINDS,
    Accounting,
    Bind,
    Job,
    JobSpec,
    Limits,
    Principal,
    Quota,
    Status,
    check_counts,
)
from jobworker.pb import job_worker_pb2 as pb

# Existing clients receive at most this much in one message.
LARGEST_ANSWER_BYTES = 4 << 20
LARGEST_TOKEN_BYTES = 64  # of the next page, and more
# In a request: thousands, as it may hold, take the loop some milliseconds.
MOST_STATUSES = 100

# More than any valid CreateJob has: its strings cost less on the wire than POINTER_BYTES and a NUL
# each, and what is not named here is short.
LARGEST_CREATE_BYTES = (
    LONGEST_STDIN_BYTES
    + LONGEST_STRINGS_BYTES
    + LONGEST_STRING_BYTES  # the working directory
    + (1 + 2 * MOST_BINDS) * LONGEST_PATH_BYTES
    + (64 << 10)
)

# Characters, each of which may be 4 bytes, and each byte 3 on the wire, of 8 KiB in all.
LONGEST_TEXT = 600

COMMAND_ERRNO = "command-errno"  # in the trailing metadata of CreateJob

CODES: dict[type[errors.JobWorkerError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OffsetOutOfRangeError: grpc.StatusCode.OUT_OF_RANGE,
    errors.JobNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.JobStateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LimitUnavailableError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.QuotaError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AuditError: grpc.StatusCode.UNAVAILABLE,
    errors.UnknownMethodError: grpc.StatusCode.UNIMPLEMENTED,
    errors.ServerFaultError: grpc.StatusCode.INTERNAL,
    errors.ShuttingDownError: grpc.StatusCode.UNAVAILABLE,
    errors.StoreError: grpc.StatusCode.UNAVAILABLE,
}


# What the machine itself refuses, such as a file of output that cannot be opened.
CODES_OF_ERRNOS = {
    errno.EBADMSG: grpc.StatusCode.DATA_LOSS,  # _fastio: not what was written
    errno.EMFILE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errno.ENFILE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errno.ENOMEM: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def code_of(error: errors.JobWorkerError | OSError) -> grpc.StatusCode:
    if isinstance(error, OSError):
        return CODES_OF_ERRNOS.get(error.errno or 0, grpc.StatusCode.INTERNAL)
    return CODES.get(type(error), grpc.StatusCode.INTERNAL)


def text_of(error: errors.JobWorkerError | OSError) -> str:
    """For a status and for the audit log. What a client has sent may be in it: cut, so that it fits
    into the headers that clients take."""
    text = str(error)
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]} … {text[-LONGEST_TEXT // 2 :]}"


def metadata_of(error: errors.JobWorkerError | OSError) -> tuple[tuple[str, str], ...]:
    """What goes with its status: the errno of a command that cannot be executed."""
    if isinstance(error, InvalidRequestError) and error.error_number:
        return ((COMMAND_ERRNO, str(error.error_number)),)
    return ()


def job_id_from(text: str) -> int:
    """Ids are decimal strings; what is none names no job."""
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise JobNotFoundError(text)
    return int(text)


# The messages in a message that are counted with it, by the numbers of their fields.
Nested = Mapping[int, "Nested"]
NONE_NESTED: Nested = {}


def _nested_in(message: Any) -> Nested:
    """An entry of a map is one field, as what is in it more than once is not kept."""
    return {
        field.number: _nested_in(field.message_type)
        for field in message.fields
        if field.message_type and not field.message_type.GetOptions().map_entry
    }


NESTED = {
    "CreateJob": _nested_in(pb.CreateJobReq.DESCRIPTOR),
    "CreateJobs": _nested_in(pb.CreateJobsReq.DESCRIPTOR),
}


def has_more_fields(data: bytes, most: int, nested: Nested = NONE_NESTED) -> bool:
    """Whether a message has more than so many, those of the nested ones among them; as far as it
    is a message at all (https://protobuf.dev/programming-guides/encoding)."""
    if len(data) <= most:  # each takes a byte, or more
        return False
    return _count_fields(data, 0, len(data), most, nested) > most


def _count_fields(data: bytes, place: int, end: int, most: int, nested: Nested) -> int:
    """But not far beyond `most`."""
    count = 0
    try:
        while place < end and count <= most:
            count += 1
            tag = data[place]
            place += 1
            if tag >= 0x80:
                tag, place = _varint(data, place - 1)
            kind = tag & 7
            if kind == VARINT:
                place = _end_of_varint(data, place)
            elif kind == BYTES:
                size = data[place]  # mostly one byte; quick, as all others wait meanwhile
                place += 1
                if size >= 0x80:
                    size, place = _varint(data, place - 1)
                inner = nested.get(tag >> 3)
                if inner is not None:
                    inner_end = min(place + size, end)
                    count += _count_fields(data, place, inner_end, most - count, inner)
                place += size
            else:
                place += FIXED.get(kind, 0)
    except IndexError:  # it ends too early
        pass
    return count


VARINT, BYTES = 0, 2
WHOLE_VARINT = re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]")
FIXED = {1: 8, 5: 4}  # bytes; of a group begin and end count, and what is between


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Of a field or a size, which no parser takes in more than five bytes; and where it ends.
    Raises IndexError where it does not."""
    number = 0
    for shift in range(0, 35, 7):
        byte = data[place]
        number |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return number, place
    raise IndexError


def _end_of_varint(data: bytes, place: int) -> int:
    """Raises IndexError where there is none."""
    if data[place] < 0x80:
        return place + 1
    found = WHOLE_VARINT.match(data, place)
    if found is None:
        raise IndexError
    return found.end()


def has_many_strings(request: pb.CreateJobReq) -> bool:
    """Whether it takes more than a moment to look at all of it."""
    return len(request.args) + len(request.environment) > MANY_STRINGS


def spec_from(request: pb.CreateJobReq) -> JobSpec:
    """Raises InvalidRequestError where there is too much of something."""
    check_counts(len(request.args), len(request.environment), len(request.binds))
    return JobSpec(
        command=request.command,
        args=tuple(request.args),
        limits=Limits(
            cpu_percent=request.maxCPU,
            memory_mib=request.maxMemory,
            io_bytes_per_second=request.maxIOBPS,
        ),
        environment=dict(request.environment),
        working_directory=request.working_directory or "/",
        name=request.name,
        merge_output=request.merge_output,
        timeout_ms=request.timeout_milliseconds,
        user=request.user,
        profile=request.profile,
        network=request.network,
        root=request.root,
        read_only=request.read_only,
        binds=tuple(Bind(bind.source, bind.destination, bind.read_only) for bind in request.binds),
    )


def statuses_from(names: Sequence[str]) -> frozenset[Status]:
    if len(names) > MOST_STATUSES:
        problem = f"are {len(names)}, and there are {len(Status)}; give each once"
        raise InvalidRequestError("statuses", problem)
    try:
        return frozenset(Status(name.upper()) for name in names)
    except ValueError as error:
        known = ", ".join(Status)
        raise InvalidRequestError("statuses", f"{error}; use {known}") from error


def job_to(job: Job, *, shows_environment: bool = True) -> pb.Job:
    """shows_environment: its values too, and not only its names."""
    spec = job.spec
    environment = spec.environment
    if not shows_environment:
        environment = dict.fromkeys(environment, "")
    return pb.Job(
        id=str(job.id),
        command=spec.command,
        args=spec.args,
        maxCPU=spec.limits.cpu_percent,
        maxMemory=spec.limits.memory_mib,
        maxIOBPS=spec.limits.io_bytes_per_second,
        status=job.status,
        startTime=rfc3339(job.started_ns),
        endTime=rfc3339(job.ended_ns),
        exitCode=job.exit_code,
        name=spec.name,
        cause=job.cause.name if job.cause else None,
        signal=job.signal,
        failed_step=job.failed_step,
        failed_errno=job.failed_errno,
        detail=job.detail,
        created_time_ns=job.created_ns,
        start_time_ns=job.started_ns,
        end_time_ns=job.ended_ns,
        accounting=accounting_to(job.accounting) if job.accounting else None,
        stdout_bytes=job.stdout_bytes,
        stderr_bytes=job.stderr_bytes,
        working_directory=spec.working_directory,
        environment=environment,
        environment_withheld=bool(environment) and not shows_environment,
        merge_output=spec.merge_output,
        cleanup_uncertain=job.cleanup_uncertain,
        max_pids=spec.limits.pids,
        timeout_milliseconds=spec.timeout_ms,
        user=spec.user,
        profile=spec.profile,
        network=spec.network,
        root=spec.root,
        read_only=spec.read_only,
        binds=map(_bind_to, spec.binds),
        lost_bytes=job.lost_bytes,
        output_problem=job.output_problem,
        created_by=_principal_to(job.created_by),
        stopped_by=_principal_to(job.stopped_by),
    )


def _bind_to(bind: Bind) -> pb.Bind:
    return pb.Bind(source=bind.source, destination=bind.destination, read_only=bind.read_only)


def _principal_to(principal: Principal | None) -> pb.Principal | None:
    if principal is None:
        return None
    return pb.Principal(name=principal.name, role=principal.role, serial=principal.serial)


def profiles_to(isolation: Isolation) -> list[pb.ProfileInfo]:
    possible = [
        pb.ProfileInfo(name=profile, measures=isolation.measures(profile))
        for profile in sorted(isolation.profiles)
    ]
    return possible + [
        pb.ProfileInfo(name=profile, problem=problem)
        for profile, problem in isolation.problems.items()
    ]


def quota_to(quota: Quota) -> pb.Quota:
    return pb.Quota(
        running_jobs=quota.running_jobs,
        total_cpu=quota.total_cpu,
        total_memory=quota.total_memory,
        creates_per_second=quota.creates_per_second,
    )


def accounting_to(accounting: Accounting) -> pb.Accounting:
    return pb.Accounting(
        cpu_user_us=accounting.cpu_user_us,
        cpu_system_us=accounting.cpu_system_us,
        memory_peak_bytes=accounting.memory_peak_bytes,
        io_read_bytes=accounting.io_read_bytes,
        io_written_bytes=accounting.io_written_bytes,
        oom_kills=accounting.oom_kills,
    )


def stop_result_to(job: Job) -> pb.StopJobRes:
    return pb.StopJobRes(
        id=str(job.id),
        status=job.status,
        endTime=rfc3339(job.ended_ns),
        exitCode=job.exit_code,
    )


class JobsWithin:
    """As many jobs, from the first on, as fit into one answer."""

    def __init__(self, largest_bytes: int = LARGEST_ANSWER_BYTES) -> None:
        self.count = 0
        self.last_id = ""
        self._largest_bytes = largest_bytes - LARGEST_TOKEN_BYTES
        self._encoded = bytearray()

    def add(self, job: pb.Job) -> bool:
        """Whether it has fitted."""
        # One by one, as of very many fields a message is far larger than its bytes.
        encoded = pb.Jobs(jobs=[job]).SerializeToString()
        if len(self._encoded) + len(encoded) > self._largest_bytes:
            return False
        self._encoded += encoded
        self.count += 1
        self.last_id = job.id
        return True

    def encoded(self) -> bytes:
        """A message with the field `jobs`, as both Jobs and ListJobsRes have it."""
        return bytes(self._encoded)


def rfc3339(nanoseconds: int) -> str:
    """UTC with microseconds, such as 2026-01-31T12:00:00.000000Z; empty for 0."""
    if not nanoseconds:
        return ""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_whole_second(seconds)}.{rest // 1000:06d}Z"


@functools.lru_cache(maxsize=16)
def _whole_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
