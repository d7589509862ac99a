"""Every error that jobworker raises on purpose, in one tree.

Each carries what it is about in fields, and a message that says what is wrong and what
to do. `jobworker.rpc.convert` maps those of the server to gRPC status codes, in one
place, and `jobworker.client.failures` maps those to the errors of a call.
"""

from __future__ import annotations

import errno
import os


def is_shortage(error: BaseException) -> bool:
    """Whether the kernel has said, perhaps to who raised this, that descriptors or memory are short
    for now, as where jobs have taken all: what was asked for may be there all the same."""
    cause = error.__cause__ or error
    return isinstance(cause, OSError) and cause.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class JobWorkerError(Exception):
    """The root of the tree."""


# What a request asked for


class InvalidRequestError(JobWorkerError):
    """A field of a request has a value that no server could accept.

    error_number: with which errno the kernel would refuse the job's command; 0: it would not.
    """

    def __init__(self, field: str, problem: str, error_number: int = 0) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem
        self.error_number = error_number


class OffsetOutOfRangeError(JobWorkerError):
    """A stream was asked to start behind the end of the output."""

    def __init__(self, job_id: int, offset: int, end: int) -> None:
        super().__init__(
            f"job {job_id} has written {end} bytes so far: cannot start at {offset}; "
            f"use an offset from 0 to {end}"
        )
        self.job_id = job_id
        self.offset = offset
        self.end = end


class JobNotFoundError(JobWorkerError):
    """There is no job with this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}; ids are decimal numbers, see ListJobs")
        self.job_id = job_id


class JobStateError(JobWorkerError):
    """The job is not in a state in which this can be done."""

    def __init__(self, job_id: int, status: str, action: str) -> None:
        has_ended = status in {"COMPLETED", "FAILED", "STOPPED"}
        state = f"has ended already, it is {status}" if has_ended else f"is {status}"
        remedy = "; stop it first" if action == "delete" and not has_ended else ""
        super().__init__(f"job {job_id} {state}: cannot {action} it{remedy}")
        self.job_id = job_id
        self.status = status
        self.action = action


class LimitUnavailableError(JobWorkerError):
    """A limit was asked for that this machine cannot enforce."""

    def __init__(self, limit: str, controller: str, problem: str) -> None:
        super().__init__(
            f"{limit} needs the cgroup controller {controller!r}, which is not available: "
            f"{problem}; leave {limit} at 0 to run without it"
        )
        self.limit = limit
        self.controller = controller
        self.problem = problem


class UnknownMethodError(JobWorkerError):
    """There is no such call, or none yet."""

    def __init__(self) -> None:
        super().__init__("Method not found!")  # as gRPC says it


class PermissionDeniedError(JobWorkerError):
    """The caller's certificate does not allow this call."""


class ResourceExhaustedError(JobWorkerError):
    """The server has reached one of its own limits."""


class QuotaError(ResourceExhaustedError):
    """A client has as much as it may: one of its quotas is used up."""

    def __init__(self, client: str, quota: str, most: str, problem: str, remedy: str) -> None:
        super().__init__(f"the quota {quota} of {client!r} is {most}: {problem}; {remedy}")
        self.client = client
        self.quota = quota


class AuditError(JobWorkerError):
    """The audit log cannot be written, so nothing is begun that it could not tell of."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the server's audit log cannot be written ({problem}), so no job is created; "
            "try again when it can"
        )
        self.problem = problem


class ServerFaultError(JobWorkerError):
    """What nobody thought of. reference: under which the server's log has it."""

    def __init__(self, reference: str) -> None:
        super().__init__(
            f"a fault of the server, and not of the request: its log has it as fault {reference}"
        )
        self.reference = reference


class ShuttingDownError(JobWorkerError):
    """The server is about to end and takes no more work."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try again when it is back")


# What a call to a server came to, as its client sees it


class CallError(JobWorkerError):
    """A call to a server did not do what was asked for; the root of the errors of clients.

    rpc: which call, such as "CreateJob".
    code: the name of its gRPC status, such as "NOT_FOUND".
    """

    def __init__(self, rpc: str, code: str, message: str) -> None:
        super().__init__(message)
        self.rpc = rpc
        self.code = code

    @property
    def may_have_happened(self) -> bool:
        """What was asked for may be so all the same: only the answer is missing."""
        return False


class UnreachableError(CallError):
    """There is no connection to the server: check address and certificates, or try again.

    was_connected: there was one, and it broke during the call, which may have had its effect.
    """

    def __init__(self, rpc: str, code: str, message: str, *, was_connected: bool = False) -> None:
        super().__init__(rpc, code, message)
        self.was_connected = was_connected

    @property
    def may_have_happened(self) -> bool:
        return self.was_connected


class DeadlineError(CallError):
    """The time that the caller gave was over first; what was asked for may have happened.

    job_id: of a client's `run`, the job, whose output is there to be streamed; else None.
    """

    job_id: int | None = None

    @property
    def may_have_happened(self) -> bool:
        return True


class UnknownJobError(CallError):
    """The server has no job with this id."""


class RejectedError(CallError):
    """A value in the request is invalid or out of range: no use to try that again.

    command_errno: why the job's command cannot be executed; 0: something else is wrong, or
    the server is too old to tell.
    """

    command_errno: int = 0


class ForbiddenError(CallError):
    """The certificate's role does not allow this call."""


class WrongStateError(CallError):
    """Not in this state of the job (it has ended), or not on this machine (a limit that it
    cannot enforce)."""


class ExhaustedError(CallError):
    """The server has as much to do as it can, or an answer is too large: try later, or less."""


class UnsupportedError(CallError):
    """This server is too old for that: it would ignore what was asked for."""


# What a server needs to start


class StartupError(JobWorkerError):
    """The server cannot start; the root of the errors that say why."""


class SettingError(StartupError):
    """A setting has a value that cannot be used."""

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{setting} = {str(value)!r}: {problem}; {remedy}")
        self.setting = setting
        self.value = value
        self.problem = problem
        self.remedy = remedy


class StateFolderError(StartupError):
    """The state folder cannot be used: taken, unreadable, or of a newer version."""


class CertificateError(StartupError):
    """A certificate or key is missing, unreadable, or does not fit the others; or one cannot
    be made as asked for."""

    def __init__(self, about: object, problem: str, remedy: str) -> None:
        super().__init__(f"{about} {problem}; {remedy}")
        self.about = about  # mostly the path of the file
        self.problem = problem  # goes on where `about` ends: "is missing"
        self.remedy = remedy


# The machine below


class JobinitError(JobWorkerError):
    """jobinit is gone, or broke its protocol."""


class JobinitGoneError(JobinitError):
    """It has ended as it started a job, which may have come to its exec."""


class ViewError(JobinitError):
    """What confined jobs are to see could not be made. error_number: why not."""

    def __init__(self, step: str, error_number: int) -> None:
        super().__init__(f"{step}: {os.strerror(error_number)}")
        self.error_number = error_number


class StartFailedError(JobWorkerError):
    """A job's command never ran: one step of starting it failed, or (`killed_by` is the signal,
    `error_number` 0) it was killed before it came to its exec. about: on what the step failed.
    hint: what is likely."""

    def __init__(
        self, step: str, error_number: int, killed_by: int = 0, about: str = "", hint: str = ""
    ) -> None:
        if killed_by:
            problem = f"killed before the command ran, by signal {killed_by}"
        else:
            problem = f"{os.strerror(error_number)} (errno {error_number})"
        if about:
            problem = f"{about}: {problem}"
        if hint:
            problem = f"{problem}; {hint}"
        super().__init__(f"{step}: {problem}")
        self.step = step
        self.error_number = error_number
        self.killed_by = killed_by


class StoreError(JobWorkerError):
    """Job records could not be written or read."""


class CgroupError(JobWorkerError):
    """A cgroup could not be made, written or removed."""
