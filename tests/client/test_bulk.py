"""How many creates are put into few requests, without a server."""

from __future__ import annotations

import pytest

from jobworker.client import bulk
from jobworker.client.bulk import Bulk, Created, Spec
from jobworker.errors import (
    CallError,
    ExhaustedError,
    ForbiddenError,
    RejectedError,
    UnreachableError,
    UnsupportedError,
)
from jobworker.job import Status
from jobworker.pb import job_worker_pb2 as pb

TOO_OLD = UnsupportedError("CreateJobs", "UNIMPLEMENTED", "too old")
BROKEN = UnreachableError("CreateJobs", "UNAVAILABLE", "broken", was_connected=True)


def requested(many: Bulk) -> pb.CreateJobsReq:
    request = many.request().request
    assert isinstance(request, pb.CreateJobsReq)
    return request


def answer_to(many: Bulk, first_id: int) -> None:
    call = many.request()
    jobs = requested(many).jobs
    results = [
        pb.CreateJobsRes.Result(id=str(first_id + place), status="RUNNING")
        for place in range(len(jobs))
    ]
    many.take(call.read(pb.CreateJobsRes(results=results).SerializeToString()))


def test_a_spec_is_what_create_takes() -> None:
    many = Bulk([Spec("echo", "a", "b", name="n", stdin=b"in", time_limit=0.5, user="u")])
    [request] = requested(many).jobs
    assert (request.command, list(request.args), request.name) == ("echo", ["a", "b"], "n")
    assert (request.stdin, request.timeout_milliseconds, request.user) == (b"in", 500, "u")
    with pytest.raises(TypeError, match="colour"):
        Bulk([Spec("echo", colour="red")])  # type: ignore[call-arg]


def test_no_request_is_larger_than_a_server_takes() -> None:
    many = Bulk(Spec("cat", stdin=bytes(size)) for size in [1 << 20] * 4 + [5, 5])
    sizes: list[int] = []
    while not many.is_over:
        assert requested(many).ByteSize() <= 4 << 20
        sizes.append(len(requested(many).jobs))
        answer_to(many, sum(sizes))
    assert sizes == [3, 3]
    assert len({result.job_id for result in many.results}) == 6


def test_no_request_has_more_fields_than_a_server_takes() -> None:
    many = Bulk(Spec("echo", *"x" * count) for count in [200] * 500)
    sizes: list[int] = []
    while not many.is_over:
        sizes.append(len(requested(many).jobs))
        answer_to(many, 1)
    assert sizes == [258, 242]


def test_no_request_takes_longer_than_a_call_may() -> None:
    many = Bulk([Spec("true")] * (2 * bulk.MOST_JOBS + 1))
    for expected in (bulk.MOST_JOBS, bulk.MOST_JOBS, 1):
        assert len(requested(many).jobs) == expected
        answer_to(many, 1)
    assert many.is_over


def test_what_no_server_could_accept_is_not_asked_for() -> None:
    many = Bulk([Spec("true"), Spec("true", name="\n"), Spec(""), Spec("false")])
    assert [job.command for job in requested(many).jobs] == ["true", "false"]
    answer_to(many, 7)
    first, second, third, fourth = many.results
    assert (first, fourth) == (Created(7, Status.RUNNING), Created(8, Status.RUNNING))
    assert isinstance(second.error, RejectedError)
    assert "name" in str(second.error)
    assert isinstance(third.error, RejectedError)
    assert Bulk([Spec("")]).is_over
    assert Bulk([]).results == []


def test_the_servers_errors_are_those_of_create() -> None:
    many = Bulk([Spec("true")] * 3)
    results = [
        pb.CreateJobsRes.Result(code=3, error="command: 'x' was not found"),
        pb.CreateJobsRes.Result(code=8, error="full"),
        pb.CreateJobsRes.Result(code=99, error="\x1b]0;title\x07"),
    ]
    many.take(many.request().read(pb.CreateJobsRes(results=results).SerializeToString()))
    errors = [result.error for result in many.results]
    assert [type(error) for error in errors] == [RejectedError, ExhaustedError, CallError]
    assert errors[0]
    assert (errors[0].rpc, errors[0].code) == ("CreateJob", "INVALID_ARGUMENT")
    assert str(errors[0]) == "command: 'x' was not found"
    assert str(errors[2]) == r"\x1b]0;title\x07"


def test_an_answer_that_does_not_fit() -> None:
    call = Bulk([Spec("true")] * 2).request()
    one = pb.CreateJobsRes(results=[pb.CreateJobsRes.Result(id="1", status="RUNNING")])
    with pytest.raises(ValueError, match="1 results for 2 jobs"):
        call.read(one.SerializeToString())
    one.results[0].id = "-٣"
    with pytest.raises(ValueError, match="is no id of a job"):
        Bulk([Spec("true")]).request().read(one.SerializeToString())


def test_a_failure_of_the_first_request_is_raised() -> None:
    many = Bulk([Spec("true")])
    with pytest.raises(UnreachableError):
        many.failed(BROKEN)


def test_a_later_failure_leaves_the_ids_known() -> None:
    many = Bulk([Spec("true")] * (bulk.MOST_JOBS + 2))
    answer_to(many, 1)
    many.failed(BROKEN)
    assert many.is_over
    assert many.results[bulk.MOST_JOBS - 1] == Created(bulk.MOST_JOBS, Status.RUNNING)
    assert [result.error for result in many.results[bulk.MOST_JOBS :]] == [BROKEN] * 2


def test_one_by_one_where_the_server_knows_nothing_else() -> None:
    many = Bulk([Spec("true"), Spec("true", name="n"), Spec("true")])
    many.failed(TOO_OLD)
    call = many.request()
    assert (call.rpc, call.needs) == ("CreateJob", ())
    many.take(call.read(pb.Job(id="4", command="true", status="RUNNING").SerializeToString()))
    assert many.request().needs == ("name",)
    refused = UnsupportedError("CreateJob", "UNIMPLEMENTED", "too old for name")
    many.failed(refused)
    # The next would be forbidden as well: no use to ask.
    forbidden = ForbiddenError("CreateJob", "PERMISSION_DENIED", "no")
    many.failed(forbidden)
    assert many.is_over
    assert [result.error for result in many.results] == [None, refused, forbidden]
    assert many.results[0] == Created(4, Status.RUNNING)
