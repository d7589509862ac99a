"""Values across the wire."""

from __future__ import annotations

import dataclasses
import errno
import inspect
from typing import Any

import grpc
import pytest

from jobworker import errors
from jobworker.job import (
    LONGEST_NAME,
    LONGEST_PATH_BYTES,
    LONGEST_STDIN_BYTES,
    LONGEST_STRING_BYTES,
    LONGEST_STRINGS_BYTES,
    LONGEST_TIMEOUT_MS,
    MOST_BINDS,
    Accounting,
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
from jobworker.rpc import convert

JOB = Job(
    id=7,
    spec=JobSpec(
        command="/bin/echo",
        args=("a", "b"),
        limits=Limits(50, 64, 1000, 32),
        environment={"K": "v"},
        working_directory="/tmp",
        name="n",
        merge_output=True,
    ),
    status=Status.FAILED,
    created_ns=1_000_000_000,
    started_ns=2_000_000_000,
    ended_ns=3_123_456_789,
    cause=Cause.SIGNALLED,
    exit_code=-1,
    signal=9,
    detail="ended by SIGKILL",
    accounting=Accounting(1, 2, 3, 4, 5, 0),
    stdout_bytes=10,
    stderr_bytes=20,
    created_by=Principal("alice", "user", "0A"),
)


def test_the_fixed_fields_have_their_fixed_numbers() -> None:
    """What an existing client reads: WIRE numbers, checked against bytes on the wire."""
    fields = pb.Job.DESCRIPTOR.fields_by_name
    names = [
        *("id", "command", "args", "maxCPU", "maxMemory", "maxIOBPS"),
        *("status", "startTime", "endTime", "exitCode"),
    ]
    assert [fields[name].number for name in names] == list(range(1, 11))


def test_the_errno_of_a_command_goes_with_its_error() -> None:
    error = errors.InvalidRequestError("command", "is a directory", 21)
    assert convert.metadata_of(error) == (("command-errno", "21"),)
    assert convert.metadata_of(errors.InvalidRequestError("name", "is too long")) == ()
    assert convert.metadata_of(errors.ShuttingDownError()) == ()


def test_a_job() -> None:
    message = convert.job_to(JOB)
    assert (message.id, message.command, list(message.args)) == ("7", "/bin/echo", ["a", "b"])
    assert (message.maxCPU, message.maxMemory, message.maxIOBPS) == (50, 64, 1000)
    assert message.max_pids == 32
    assert (message.status, message.exitCode, message.signal) == ("FAILED", -1, 9)
    assert message.cause == pb.SIGNALLED
    assert message.startTime == "1970-01-01T00:00:02.000000Z"
    assert message.endTime == "1970-01-01T00:00:03.123456Z"
    assert message.accounting.oom_kills == 0
    assert message.accounting.HasField("oom_kills")


def test_who_did_what_to_it() -> None:
    message = convert.job_to(JOB)
    assert message.created_by == pb.Principal(name="alice", role="user", serial="0A")
    assert not message.HasField("stopped_by")


def test_values_of_the_environment_can_be_withheld() -> None:
    message = convert.job_to(JOB)
    assert (dict(message.environment), message.environment_withheld) == ({"K": "v"}, False)
    message = convert.job_to(JOB, shows_environment=False)
    assert (dict(message.environment), message.environment_withheld) == ({"K": ""}, True)
    assert JOB.spec.environment == {"K": "v"}
    plain = dataclasses.replace(JOB, spec=JobSpec("/bin/true"))
    assert not convert.job_to(plain, shows_environment=False).environment_withheld


def test_what_has_not_come_is_empty() -> None:
    job = dataclasses.replace(JOB, status=Status.RUNNING, ended_ns=0, accounting=None, cause=None)
    message = convert.job_to(job)
    assert message.endTime == ""
    assert message.cause == pb.CAUSE_UNSPECIFIED
    assert not message.HasField("accounting")


def test_every_cause_has_the_number_of_the_contract() -> None:
    assert {cause.name: cause.value for cause in Cause} == {
        name: number for name, number in pb.Cause.items() if number
    }


def test_a_request() -> None:
    request = pb.CreateJobReq(command="echo", args=["x"], maxCPU=1, maxMemory=2, maxIOBPS=3)
    spec = convert.spec_from(request)
    assert spec == JobSpec("echo", ("x",), Limits(1, 2, 3), {}, "/", "", False)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        (
            "args",
            pb.CreateJobReq(
                args=[""] * 40_000, environment=dict.fromkeys(map(str, range(30_000)), "")
            ),
        ),
        ("binds", pb.CreateJobReq(binds=[pb.Bind()] * 33)),
    ],
)
def test_too_many_of_something(field: str, request_: pb.CreateJobReq) -> None:
    with pytest.raises(errors.InvalidRequestError, match=field):
        convert.spec_from(request_)


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (b"", 0),
        (pb.CreateJobReq(command="x" * 200, args=["a", ""], timeout_milliseconds=1 << 40), 4),
        (pb.CreateJobsReq(jobs=[pb.CreateJobReq(args=["a", "b"])] * 3), 3),
        (pb.Quota(creates_per_second=1.5, running_jobs=300), 2),
        (b"\x0b\x08\x01\x0c" + b"\x0d1234", 4),  # a group of one field, 4 bytes
        (b"\x08", 1),  # it ends too early
        (b"\x0a\x05abc", 1),
        (b"\xff" * 1000, 1),  # a number that does not end
        ((b"\x08" + b"\xff" * 9 + b"\x01") * 3, 3),
        ((b"\x88\x80\x80\x80\x80\x00" + b"\x01") * 3, 1),  # a tag that no parser takes
        (b"\x88\x80\x80\x80\x00" + b"\x01", 1),
    ],
)
def test_the_fields_of_a_message_are_counted(message: Any, count: int) -> None:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    assert not convert.has_more_fields(data, count)
    assert count == 0 or convert.has_more_fields(data, count - 1)


JOB_REQUEST = pb.CreateJobReq(
    command="x",
    args=["a", "b", ""],
    environment={"a": "b", "c": ""},
    binds=[pb.Bind(source="/a", destination="/b"), pb.Bind()],
    stdin=b"\x0a\x00" * 100,
)


@pytest.mark.parametrize(
    ("rpc", "message", "count"),
    [
        ("CreateJob", JOB_REQUEST, 11),
        ("CreateJobs", pb.CreateJobsReq(jobs=[JOB_REQUEST] * 3), 36),
        ("CreateJobs", pb.CreateJobsReq(jobs=[pb.CreateJobReq()] * 3), 3),
        ("CreateJobs", b"\x0a\x04" + b"\x12\x00" * 3, 4),  # what is after the job's end
        ("CreateJobs", b"\x0a\x20" + b"\x12\x00" * 3, 4),  # it ends too early
        ("CreateJobs", b"\x0a\x0a" + b"\xff" * 10 + b"\x10\x01" * 3, 5),
    ],
)
def test_the_fields_of_nested_messages_are_counted_with_it(
    rpc: str, message: Any, count: int
) -> None:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    nested = convert.NESTED[rpc]
    assert not convert.has_more_fields(data, count, nested)
    assert convert.has_more_fields(data, count - 1, nested)


@pytest.mark.parametrize("text", ["", "a", "-1", "1.0", " 1", "١", "9" * 19])
def test_what_is_no_id_names_no_job(text: str) -> None:
    with pytest.raises(errors.JobNotFoundError):
        convert.job_id_from(text)


def test_as_many_jobs_as_fit() -> None:
    one = convert.job_to(JOB).ByteSize()
    found = convert.JobsWithin(one * 10)
    while found.add(convert.job_to(JOB)):
        pass
    assert 5 < found.count < 10
    assert len(found.encoded()) <= one * 10
    for kind in (pb.Jobs, pb.ListJobsRes):
        jobs: Any = kind.FromString(found.encoded())
        assert list(jobs.jobs) == [convert.job_to(JOB)] * found.count
    assert found.last_id == str(JOB.id)


def test_every_error_that_a_call_can_cause_has_a_code() -> None:
    """Start-up errors and those of the machine below never reach a client as such; those of a
    call are the client's own."""
    never = (
        errors.CallError,
        errors.CgroupError,
        errors.JobinitError,
        errors.StartFailedError,
        errors.StartupError,
    )
    tree = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.JobWorkerError) and kind is not errors.JobWorkerError
    ]
    for kind in tree:
        assert (kind in convert.CODES) != issubclass(kind, never), kind


def test_codes() -> None:
    not_found = errors.JobNotFoundError("7")
    assert convert.code_of(not_found) is grpc.StatusCode.NOT_FOUND
    assert convert.code_of(errors.CgroupError("x")) is grpc.StatusCode.INTERNAL


def test_codes_of_what_the_machine_refuses() -> None:
    assert convert.code_of(OSError(errno.EMFILE, "x")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert convert.code_of(OSError(errno.EBADMSG, "x")) is grpc.StatusCode.DATA_LOSS
    assert convert.code_of(OSError(errno.EIO, "x")) is grpc.StatusCode.INTERNAL


def test_what_is_used_may_be_more_than_any_limit() -> None:
    most = (1 << 31) - 1  # of one job
    assert convert.quota_to(Quota(total_cpu=6000 * most, total_memory=6000 * most)).total_cpu > most


LONG = "x" * (LONGEST_STRING_BYTES - 1)
PATH = "/" + "x" * (LONGEST_PATH_BYTES - 2)


@pytest.mark.parametrize(
    "strings",
    [
        {"args": [LONG[20:]] * 4},
        {"args": [""] * (LONGEST_STRINGS_BYTES // 9 - 2)},
        {"environment": {f"{number:05}": "" for number in range(LONGEST_STRINGS_BYTES // 15 - 2)}},
        {"environment": {f"{number:05}": "x" * 500 for number in range(1015)}},
    ],
)
def test_what_is_valid_is_not_too_large(strings: dict[str, Any]) -> None:
    request = pb.CreateJobReq(
        command="x",
        name="\N{SNOWMAN}" * LONGEST_NAME,
        working_directory="/" + LONG[1:],
        stdin=bytes(LONGEST_STDIN_BYTES),
        root=PATH,
        binds=[pb.Bind(source=PATH, destination=PATH, read_only=True)] * MOST_BINDS,
        user="x" * 255,
        profile="default",
        network="none",
        maxCPU=-1,
        timeout_milliseconds=LONGEST_TIMEOUT_MS,
        **strings,
    )
    spec = convert.spec_from(request)
    validate(dataclasses.replace(spec, limits=Limits()))
    validate_stdin(request.stdin)
    assert request.ByteSize() <= convert.LARGEST_CREATE_BYTES
    # Nor is the limit far from it.
    assert request.ByteSize() > convert.LARGEST_CREATE_BYTES * 3 / 4
