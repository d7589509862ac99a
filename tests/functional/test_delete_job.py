"""DeleteJob: an ended job is forgotten, with all that it wrote."""

from __future__ import annotations

import os

import grpc
import pytest

from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb


def test_it_is_gone(server: Server, client: Client) -> None:
    for size in (10, 100_000):
        job, _ = client.run(f"head -c {size} /dev/zero")
        client.call("DeleteJob", pb.DeleteJobReq(id=job.id))
        for call in (client.get, client.output):
            with pytest.raises(grpc.RpcError) as caught:
                call(job.id)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        left = os.listdir(server.state / "output")
        assert not [name for name in left if name.startswith(f"{job.id}.")]


def test_ids_are_not_used_again(client: Client) -> None:
    job, _ = client.run("true")
    client.call("DeleteJob", pb.DeleteJobReq(id=job.id))
    assert int(client.create("true").id) == int(job.id) + 1


def test_a_running_job_stays(client: Client) -> None:
    job = client.create("sleep", "60")
    with pytest.raises(grpc.RpcError) as caught:
        client.call("DeleteJob", pb.DeleteJobReq(id=job.id))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "RUNNING" in str(caught.value.details())
    client.stop(job.id, grace_milliseconds=0)


def test_an_unknown_job(client: Client) -> None:
    for job_id in ("999999", "x"):
        with pytest.raises(grpc.RpcError) as caught:
            client.call("DeleteJob", pb.DeleteJobReq(id=job_id))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_viewer_may_not(server: Server, client: Client) -> None:
    job, _ = client.run("true")
    with server.connect("viewer") as viewer:
        with pytest.raises(grpc.RpcError) as caught:
            viewer.call("DeleteJob", pb.DeleteJobReq(id=job.id))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
