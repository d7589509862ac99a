"""What a gRPC error means to a caller."""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jobworker.client.connection import Target
from jobworker.errors import (
    CallError,
    DeadlineError,
    ExhaustedError,
    ForbiddenError,
    RejectedError,
    UnknownJobError,
    UnreachableError,
    UnsupportedError,
    WrongStateError,
)

COMMAND_ERRNO = "command-errno"  # in the trailing metadata of CreateJob

ERRORS: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: UnknownJobError,
    grpc.StatusCode.INVALID_ARGUMENT: RejectedError,
    grpc.StatusCode.OUT_OF_RANGE: RejectedError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    grpc.StatusCode.UNAUTHENTICATED: ForbiddenError,
    grpc.StatusCode.FAILED_PRECONDITION: WrongStateError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
}

# Only waiting for a job has a deadline for its stream.
DEADLINES = {"GetJobsStream": "the job has not ended"}

# What reading an answer raises where it is none of this contract.
UNREADABLE = (DecodeError, ValueError)

# How gRPC's core words what has happened (no code tells these apart).
NOT_CONNECTED = re.compile(r"failed to connect|errors resolving|DNS resolution failed")
# The connection broke, or a proxy between here and there reset the stream. Just CANCELLED, without
# words of its own: the server was ended before it came to the call.
BROKEN = re.compile(r"RST_STREAM|Stream removed|^CANCELLED$")


def error_from(error: grpc.RpcError, rpc: str, target: Target) -> CallError:
    """What the caller gets. Blocks where it has to find out why there is no connection."""
    code, details = error.code(), printable(error.details() or "")
    if BROKEN.search(details):
        code = grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.UNAVAILABLE:
        if NOT_CONNECTED.search(details):
            # Late: slow to import, and needed only here.
            from jobworker.client import diagnosis

            problem = diagnosis.explain(details, target.address, target.files, target.names)
            return UnreachableError(rpc, code.name, f"{target.address}: {problem}")
        problem = f"{target.address}: the connection broke ({details})"
        return UnreachableError(rpc, code.name, problem, was_connected=True)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = f"{target.address}: {DEADLINES.get(rpc, rpc + ' was not answered')} in time"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        details = f"{target.address}: this server is too old for {rpc}"
    failure = ERRORS.get(code, CallError)(rpc, code.name, details)
    if isinstance(failure, RejectedError):
        failure.command_errno = _command_errno(error)
    return failure


def _command_errno(error: grpc.RpcError) -> int:
    """0: the server has not told any."""
    metadata: Any = error.trailing_metadata()  # pairs; its type stub says otherwise
    for name, value in metadata or ():
        if name == COMMAND_ERRNO and re.fullmatch("[0-9]{1,4}", str(value)):
            return int(value)
    return 0


def late(error: DeadlineError, job_id: int) -> DeadlineError:
    """Of a client's `run`, which asks for the job's end then."""
    told = f"{error} (job {job_id}, which was asked to stop; what it wrote can be streamed)"
    failure = DeadlineError(error.rpc, error.code, told)
    failure.job_id = job_id
    return failure


def closed(rpc: str) -> CallError:
    return CallError(rpc, "CANCELLED", f"{rpc}: this client was closed; make another one")


def unreadable(error: Exception, rpc: str, target: Target) -> CallError:
    """For an answer that is none of this contract."""
    problem = f"{target.address}: cannot understand the answer to {rpc}: {printable(str(error))}"
    return CallError(rpc, "INTERNAL", problem)


def printable(text: str) -> str:
    """In one line: a server's words may end up on a terminal, or in a log."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def unsupported(rpc: str, needs: tuple[str, ...], target: Target) -> UnsupportedError:
    what = ", ".join(needs)
    problem = f"{target.address}: this server is too old for {what}, and would ignore it"
    return UnsupportedError(rpc, "UNIMPLEMENTED", problem)
