"""ListJobs and GetJobs: all jobs, newest first."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import grpc
import pytest

from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb


def pages(client: Client, **fields: Any) -> list[list[str]]:
    """The ids on each page."""
    found, token = [], ""
    while True:
        answer = client.call("ListJobs", pb.ListJobsReq(**{"page_token": token} | fields))
        found.append([job.id for job in answer.jobs])
        token = answer.next_page_token
        if not token:
            return found


def ids(client: Client, **fields: Any) -> list[str]:
    return [job_id for page in pages(client, **fields) for job_id in page]


def test_pages(start_server: Callable[..., Server]) -> None:
    with start_server().connect() as client:
        created = [client.create("true").id for _ in range(25)]
        newest_first = created[::-1]
        assert ids(client) == newest_first
        found = pages(client, page_size=10)
        assert [len(page) for page in found] == [10, 10, 5]
        assert list(chain(*found)) == newest_first
        assert [job.id for job in client.jobs()] == newest_first


def test_pages_that_are_read_in_parts(start_server: Callable[..., Server]) -> None:
    with start_server().connect() as client:
        bulk = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command="true")] * 250)
        created = [result.id for result in client.call("CreateJobs", bulk).results]
        newest_first = sorted(created, key=int, reverse=True)
        assert pages(client, page_size=1000) == [newest_first]
        assert [len(page) for page in pages(client, page_size=120)] == [120, 120, 10]
        assert ids(client, page_size=120) == newest_first
        assert [job.id for job in client.jobs()] == newest_first


def test_large_jobs_between_others(start_server: Callable[..., Server]) -> None:
    """They are read a few at a time, and those that run are in their place among them."""
    with start_server().connect() as client:
        large = ("\x01" * 50_000,) * 2
        kinds = [("true", *large), ("sleep", "60"), ("true",), ("sleep", "60", *large)]
        created = [client.create(*kinds[number % 4]) for number in range(60)]
        for job in created[::2]:
            client.wait(job.id)
        newest_first = [job.id for job in reversed(created)]
        ended_first = newest_first[1::2]
        for page_size in (1, 7, 30, 1000):
            assert ids(client, page_size=page_size) == newest_first
            found = ids(client, page_size=page_size, statuses=["COMPLETED"])
            assert found == ended_first
        for job in created[1::2]:
            client.stop_soon(job.id, grace_milliseconds=0)


def test_no_jobs(start_server: Callable[..., Server]) -> None:
    with start_server().connect() as client:
        assert client.jobs() == []
        assert pages(client) == [[]]


def test_filters(client: Client) -> None:
    name = "filtered by name"
    good, bad, running = (client.shell(s, name=name) for s in ("exit 0", "exit 1", "sleep 60"))
    client.wait(good.id)
    client.wait(bad.id)
    assert ids(client, name=name) == [running.id, bad.id, good.id]
    assert ids(client, name=name, statuses=["COMPLETED"]) == [good.id]
    assert ids(client, name=name, statuses=["failed", "RUNNING"]) == [running.id, bad.id]
    assert ids(client, name="filtered") == []
    client.stop(running.id, grace_milliseconds=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"page_size": 1001},
        {"page_token": "x"},
        {"statuses": ["ENDED"]},
        {"statuses": ["RUNNING"] * 101},
    ],
)
def test_invalid(client: Client, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("ListJobs", pb.ListJobsReq(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_more_jobs_than_fit_into_one_answer(start_server: Callable[..., Server]) -> None:
    """The newest are in GetJobs, the rest is in ListJobs."""
    with start_server().connect() as client:
        created = [client.create("true", "x" * 100_000, "y" * 100_000).id for _ in range(25)]
        newest = client.call("GetJobs", pb.EmptyRequest())
        assert newest.ByteSize() <= 4 << 20
        assert 10 < len(newest.jobs) < 25
        assert [job.id for job in newest.jobs] == created[::-1][: len(newest.jobs)]
        assert ids(client) == created[::-1]
