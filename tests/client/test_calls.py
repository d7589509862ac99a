"""Requests and answers, without a server."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from jobworker import job as transition
from jobworker.client import calls
from jobworker.client.calls import ProfileInfo, nanoseconds
from jobworker.errors import RejectedError, UnsupportedError
from jobworker.job import (
    Accounting,
    Bind,
    Cause,
    Job,
    JobSpec,
    Limits,
    OomKills,
    Principal,
    Quota,
    Status,
)
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc import convert

NOON_NS = 1_769_860_800_000_000_000


def an_ended_job() -> Job:
    """Every field has a value that is not its default."""
    spec = JobSpec(
        command="/usr/bin/env",
        args=("a", "", "ä\n"),
        limits=Limits(50, 64, 1000, 32),
        environment={"A": "b", "C": ""},
        working_directory="/usr",
        name="a name",
        merge_output=True,
        timeout_ms=5000,
        user="nobody",
        profile="none",
        network="host",
        root="/srv/root",
        read_only=True,
        binds=(Bind("/srv/a", "/mnt"), Bind("/srv/b", "/tmp/b", read_only=True)),
    )
    running = transition.started(transition.created(7, spec, NOON_NS + 1), NOON_NS + 2)
    ended = transition.ended(running, 9, OomKills(by_limit=1, killed=1), NOON_NS + 3)
    return dataclasses.replace(
        ended,
        failed_step="exec",
        failed_errno=2,
        accounting=Accounting(1, 2, 3, 4, 0, None),
        stdout_bytes=2**40,
        stderr_bytes=5,
        lost_bytes=2**41,
        output_problem="No space left on device",
        cleanup_uncertain=True,
        created_by=Principal("alice", "user", "0A"),
        stopped_by=Principal("", "admin", "0B"),
    )


@pytest.mark.parametrize(
    "job", [an_ended_job(), transition.created(1, JobSpec("/bin/true"), NOON_NS)]
)
def test_a_job_arrives_as_the_server_has_it(job: Job) -> None:
    assert calls.get(job.id).read(convert.job_to(job).SerializeToString()) == job
    message = convert.job_to(job, shows_environment=False)
    shown = calls.get(job.id).read(message.SerializeToString())
    assert shown.spec.environment == dict.fromkeys(job.spec.environment, "")
    assert shown.environment_withheld == bool(job.spec.environment)


@pytest.mark.parametrize(
    ("status", "exit_code", "cause"),
    [
        ("RUNNING", 0, None),
        ("COMPLETED", 0, Cause.EXITED),
        ("FAILED", 2, Cause.EXITED),
        ("FAILED", -1, None),
        ("STOPPED", -1, Cause.STOPPED),
    ],
)
def test_a_job_of_an_old_server(status: str, exit_code: int, cause: Cause | None) -> None:
    message = pb.Job(
        id="12",
        command="/bin/x",
        status=status,
        exitCode=exit_code,
        startTime="2026-01-31T12:00:00Z",
        endTime="" if status == "RUNNING" else "2026-01-31T12:00:00.25Z",
    )
    job = calls.job_from(message)
    assert (job.id, job.status, job.cause, job.exit_code) == (12, status, cause, exit_code)
    assert job.created_ns == job.started_ns == NOON_NS
    assert job.ended_ns == (0 if status == "RUNNING" else NOON_NS + 250_000_000)


@pytest.mark.parametrize(
    "fields",
    [
        *({"id": text, "status": "RUNNING"} for text in ("x", "-1", "٣", "1_0", " 1", "9" * 5000)),
        {"id": "1", "status": "ASLEEP"},
        {},
    ],
)
def test_what_is_no_job(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError) as caught:
        calls.job_from(pb.Job(**fields))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 100


def test_another_job_than_was_asked_for() -> None:
    answer = pb.Job(id="777", status="RUNNING").SerializeToString()
    assert calls.get("0777").read(answer).id == 777
    with pytest.raises(ValueError, match="it is about job 777, not 7"):
        calls.get(7).read(answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("2026-01-31T12:00:00Z", NOON_NS),
        ("2026-01-31t12:00:00z", NOON_NS),
        ("2026-01-31T12:00:00.000000001Z", NOON_NS + 1),
        ("2026-01-31T12:00:00.1234567891Z", NOON_NS + 123_456_789),
        ("2026-01-31T14:30:00.5+02:30", NOON_NS + 500_000_000),
        ("2026-01-31T11:00:00-01:00", NOON_NS),
        (convert.rfc3339(NOON_NS + 1000), NOON_NS + 1000),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert nanoseconds(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("yesterday", "2026-01-31", "2026-13-31T12:00:00Z", "12:00:00Z"),
        # Nor one that can be shown.
        *("9999-12-31T23:59:59-23:00", "0001-01-01T00:00:00+23:00"),
    ],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        nanoseconds(text)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_cpu": 2**31}, "max_cpu: 2147483648 is not possible; use 0 to 2147483647"),
        ({"max_memory": -1}, "max_memory: -1 is not possible"),
        ({"environment": {"A=B": "c"}}, "not a variable's name"),
        ({"environment": {"A": "\0"}}, "NUL"),
        ({"working_directory": "here"}, "absolute"),
        ({"name": "\udcff"}, "printable"),
        ({"stdin": bytes(1_048_577)}, "stdin: is 1048577 bytes long"),
        ({"time_limit": -1}, "time_limit: -1 is not possible"),
        ({"time_limit": 1e10}, "time_limit: "),
        ({"time_limit": float("nan")}, "time_limit: nan"),
    ],
)
def test_what_no_server_could_accept(options: Any, problem: str) -> None:
    with pytest.raises(RejectedError, match=problem) as caught:
        calls.create("true", (), options)
    assert (caught.value.rpc, caught.value.code) == ("CreateJob", "INVALID_ARGUMENT")


def test_needs_are_what_was_added_to_the_contract() -> None:
    assert calls.create("true", ["x"], {"max_cpu": 1, "max_memory": 2, "max_iobps": 3}).needs == ()
    nothing: calls.CreateOptions = {"environment": None, "name": "", "merge_output": False}
    assert calls.create("true", [], nothing).needs == ()
    all_new: calls.CreateOptions = {
        "environment": {"A": "b"},
        "working_directory": "/",
        "name": "n",
        "merge_output": True,
        "stdin": b"s",
        "time_limit": 0.5,
        "user": "nobody",
        "profile": "none",
        "network": "none",
        "root": "/srv/root",
        "read_only": True,
        "binds": [Bind("/srv/a", "/mnt")],
    }
    assert set(calls.create("true", [], all_new).needs) == all_new.keys()
    assert calls.stop(1, 0, None).needs == ()
    assert calls.stop(1, 15, 0).needs == ("signal", "grace_seconds")


@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(0, 0), (0.0001, 1), (16.1, 16_100), (90, 90_000)]
)
def test_a_time_limit_is_never_rounded_to_none(seconds: float, milliseconds: int) -> None:
    request = calls.create("true", [], {"time_limit": seconds}).request
    assert isinstance(request, pb.CreateJobReq)
    assert request.timeout_milliseconds == milliseconds


def test_all_that_a_server_tells_of_itself_arrives() -> None:
    """Every field has a value that is not its default."""
    message = pb.ServerInfo(default_profile="default", profiles=["default", "none"])
    message.users.append("daemon")
    message.roots_allowed.append("/srv/root")
    message.binds_allowed.append("/srv/a:ro")
    fields: Any = pb.ServerInfo.DESCRIPTOR.fields
    for number, field in enumerate(fields, 1):
        if not field.is_repeated and field.message_type is None:
            text = f"{number}" if field.type == field.TYPE_STRING else number
            setattr(message, field.name, text)
    message.controllers.add(name="cpu", available=True, problem="none")
    message.profile_details.add(name="strict", problem="p", measures=["a", "b"])
    message.quota.CopyFrom(pb.Quota(running_jobs=1, total_cpu=2, creates_per_second=0.5))
    message.quota_used.CopyFrom(pb.Quota(total_memory=3))
    message.client_limits.CopyFrom(pb.ClientLimits(calls=4, streams=5, connections=6))
    info = calls.info().read(message.SerializeToString())
    values = [getattr(info, field.name) for field in dataclasses.fields(info)]
    assert all(values)
    numbers = {value for value in values if isinstance(value, int)}
    numbers |= set(dataclasses.astuple(info.default_limits))
    assert len(numbers) == 12
    assert (info.profiles, info.users) == (("default", "none"), ("daemon",))
    assert info.profile_details == (ProfileInfo("strict", "p", ("a", "b")),)
    assert (info.quota, info.quota_used) == (Quota(1, 2, 0, 0.5), Quota(total_memory=3))
    assert info.client_limits == calls.ClientLimits(4, 5, 6)


def test_a_stop_may_take_as_long_as_its_grace() -> None:
    call = calls.stop(1, 0, 90.5)
    assert call.extra_seconds == 90.5
    assert isinstance(call.request, pb.StopJobReq)
    assert call.request.grace_milliseconds == 90_500


@pytest.mark.parametrize("seconds", [-1, 2**32, math.inf, math.nan])
def test_a_grace_that_cannot_be(seconds: float) -> None:
    with pytest.raises(RejectedError, match=f"grace_seconds: {seconds} is not possible"):
        calls.stop(1, 0, seconds)


def test_a_listing_ends_at_its_limit_and_at_the_last_page() -> None:
    job = transition.created(1, JobSpec("/bin/true"), NOON_NS)
    listing = calls.Listing((), "", 5)
    first = listing.take(calls.Page([job] * 3, "next"))
    assert (first, listing.is_over) == ([job] * 3, False)
    assert listing.request().request == pb.ListJobsReq(page_size=2, page_token="next")
    second = listing.take(calls.Page([job] * 3, "next"))
    assert (second, listing.is_over) == ([job] * 2, True)
    endless = calls.Listing([Status.RUNNING], "", None)
    endless.take(calls.Page([job], ""))
    assert endless.is_over


def test_a_page_that_comes_again_and_again_is_no_answer() -> None:
    listing = calls.Listing((), "", None)
    answer = pb.ListJobsRes(next_page_token="7").SerializeToString()
    listing.take(listing.request().read(answer))
    with pytest.raises(ValueError, match="the page '7' comes the same again"):
        listing.request().read(answer)


def test_pages_without_an_end_and_without_a_job_are_no_answer() -> None:
    listing = calls.Listing((), "", 5)

    def take(number: int, jobs: int) -> None:
        message = pb.ListJobsRes(next_page_token=f"{number}")
        message.jobs.extend([pb.Job(id="1", status="RUNNING")] * jobs)
        listing.take(listing.request().read(message.SerializeToString()))

    for number in range(2 * calls.MOST_EMPTY_PAGES):
        take(number, jobs=number == calls.MOST_EMPTY_PAGES - 1)
    with pytest.raises(ValueError, match="no job in 1001 pages"):
        take(2 * calls.MOST_EMPTY_PAGES, jobs=0)


def test_an_old_server_cannot_list_by_name_or_owner() -> None:
    error = UnsupportedError("ListJobs", "UNIMPLEMENTED", "too old")
    for listing in (calls.Listing((), "name", None), calls.Listing((), "", None, "alice")):
        with pytest.raises(UnsupportedError):
            listing.old_request(error)
