"""CreateJobs: many jobs in one request, and a result for each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb
from slow_links import slow_way


def create_all(client: Client, *requests: pb.CreateJobReq) -> list[pb.CreateJobsRes.Result]:
    return list(client.call("CreateJobs", pb.CreateJobsReq(jobs=requests)).results)


def test_each_has_its_result_in_order(client: Client) -> None:
    results = create_all(
        client,
        pb.CreateJobReq(command="echo", args=["first"]),
        pb.CreateJobReq(command="no-such-command"),
        pb.CreateJobReq(command="echo", args=["third"], environment={"A=B": "c"}),
        pb.CreateJobReq(command="echo", args=["fourth"]),
    )
    assert [result.code for result in results] == [
        0,
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        0,
    ]
    assert client.output(results[0].id) == b"first\n"
    assert client.output(results[3].id) == b"fourth\n"
    assert results[0].status in {"RUNNING", "COMPLETED"}
    assert (results[1].id, results[2].id) == ("", "")
    assert "no-such-command" in results[1].error


def test_hundreds(client: Client) -> None:
    requests = [pb.CreateJobReq(command="true", name="one of many") for _ in range(300)]
    results = create_all(client, *requests)
    ids = [result.id for result in results]
    assert len(set(ids)) == 300
    assert [client.wait(job_id).status for job_id in ids] == ["COMPLETED"] * 300


def test_none(client: Client) -> None:
    assert create_all(client) == []


def test_too_many(client: Client) -> None:
    before = len(client.jobs())
    with pytest.raises(grpc.RpcError) as caught:
        create_all(client, *[pb.CreateJobReq(command="true")] * 1001)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 1000" in str(caught.value.details())
    assert len(client.jobs()) == before


def test_a_viewer_may_not(server: Server) -> None:
    with server.connect("viewer") as viewer:
        with pytest.raises(grpc.RpcError) as caught:
            create_all(viewer, pb.CreateJobReq(command="true"))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_the_end_of_the_server_meanwhile(start_server: Callable[..., Server]) -> None:
    """Its log tells of no fault."""
    server = start_server(STOP_JOBS="no")
    with tempfile.TemporaryDirectory() as folder, server.connect() as client:
        path = ":".join([slow_way(Path(folder) / "links")] * 99)
        slow = pb.CreateJobReq(command="x", environment={"PATH": path})
        many = pb.CreateJobsReq(jobs=[slow] * 500)
        creates = [client.call_soon("CreateJobs", many) for _ in range(16)]
        creates += [client.create_soon("x", environment=slow.environment) for _ in range(300)]
        time.sleep(3)  # so that they have begun
        assert server.stop() == 0
    assert "Traceback" not in server.log
