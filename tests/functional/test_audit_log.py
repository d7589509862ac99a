"""What the audit log says of real calls, and what happens where it cannot be written."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import NameOID

from functional.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    connect,
    frame,
    headers_of,
    message_of,
    receive_until,
    request_of,
    reset_of,
)
from functional.server import DEADLINE_SECONDS, Server, slow_path, wait_until
from functional.test_authorization import make_client
from jobworker import certs
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc.gate import MOST_CREATED, REVOKED_SECONDS

SECRET = "swordfish"

StartServer = Callable[..., Server]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


def lines(path: Path) -> list[dict[str, Any]]:
    # Where a test has made it large: all before the first line is a hole.
    return [json.loads(line) for line in path.read_bytes().lstrip(b"\0").splitlines()]


def calls(path: Path, rpc: str) -> list[dict[str, Any]]:
    return [line for line in lines(path) if line.get("rpc") == rpc]


def test_each_change_has_a_line_when_it_is_answered(start_server: StartServer, path: Path) -> None:
    server = start_server(AUDIT_LOG=str(path))
    serial = certs.subject_of((server.certs / "client-cert.pem").read_bytes())[2]
    with server.connect() as client:
        job = client.create("sleep", "60", environment={"TOKEN": SECRET}, stdin=SECRET.encode())
        (line,) = calls(path, "CreateJob")
        assert line["time"].endswith("Z")
        assert line["peer"].startswith("127.0.0.1:")
        assert {name: value for name, value in line.items() if name not in {"time", "peer"}} == {
            "who": "admin",
            "role": "admin",
            "serial": serial,
            "rpc": "CreateJob",
            "code": "OK",
            "command": ["sleep", "60"],
            "environment": ["TOKEN"],
            "job": job.id,
            "status": "RUNNING",
        }
        client.get(job.id)
        client.stop(job.id)
        assert calls(path, "StopJob")[-1]["job"] == job.id
        client.call("DeleteJob", pb.DeleteJobReq(id=f"00{job.id}"))  # a name for it, too
        assert calls(path, "DeleteJob")[-1]["code"] == "OK"
        assert calls(path, "DeleteJob")[-1]["job"] == job.id
        assert calls(path, "GetJob") == []
    server.stop()
    events = [line["event"] for line in lines(path) if "event" in line]
    assert events == ["start", "end"]
    assert SECRET not in path.read_text()
    assert SECRET not in server.log


def test_each_job_of_many_has_a_line(start_server: StartServer, path: Path) -> None:
    server = start_server(AUDIT_LOG=str(path))
    environment = {"TOKEN": SECRET}
    with server.connect() as client:
        request = pb.CreateJobsReq(
            jobs=[
                pb.CreateJobReq(command="true", environment=environment),
                pb.CreateJobReq(command="/nowhere", environment=environment),
            ]
        )
        made, refused = client.call("CreateJobs", request).results
    # In the order in which they came to their ends.
    second, first = sorted(calls(path, "CreateJobs"), key=lambda line: str(line["code"]))
    assert (first["job"], first["code"]) == (made.id, "OK")
    assert (second["code"], second["problem"]) == ("INVALID_ARGUMENT", refused.error)
    assert second["command"] == ["/nowhere"]
    assert SECRET not in path.read_text()


def test_what_fails_and_what_is_refused_has_a_line(start_server: StartServer, path: Path) -> None:
    server = start_server(AUDIT_LOG=str(path))
    with server.connect("viewer") as viewer, server.connect() as client:
        for call in (lambda: viewer.create("true"), lambda: client.stop("77")):
            with pytest.raises(grpc.RpcError):
                call()
    (denied,) = calls(path, "CreateJob")
    assert (denied["who"], denied["code"]) == ("viewer", "PERMISSION_DENIED")
    assert "needs the role admin or user" in denied["problem"]
    (missing,) = calls(path, "StopJob")
    assert (missing["job"], missing["code"]) == ("77", "NOT_FOUND")


@pytest.mark.parametrize("rpc", ["GetJob", "GetJobsStream"])
def test_who_asks_for_anothers_job_has_a_line(
    start_server: StartServer, path: Path, rpc: str
) -> None:
    """For the client there is none; so there is a line for one that does not exist, too."""
    server = start_server(AUDIT_LOG=str(path))
    subject = [(NameOID.COMMON_NAME, "mallory"), (NameOID.ORGANIZATIONAL_UNIT_NAME, "user")]
    make_client(server.certs, "asking", subject)
    with server.connect() as client, server.connect("asking") as mallory:
        ids = [client.create("true").id, "999"]
        for job_id in ids:
            with pytest.raises(grpc.RpcError):
                mallory.get(job_id) if rpc == "GetJob" else mallory.output(job_id)
    told = [(line["who"], line["code"], line["problem"]) for line in calls(path, rpc)]
    assert [each[:2] for each in told] == [("mallory", "NOT_FOUND")] * 2
    assert all(repr(job_id) in problem for job_id, (*_, problem) in zip(ids, told, strict=True))


def test_a_flood_of_refused_calls_is_counted(start_server: StartServer, path: Path) -> None:
    """Who may do nothing cannot fill the disk either."""
    server = start_server(AUDIT_LOG=str(path))
    with server.connect("viewer") as viewer:
        for _ in range(400):
            with pytest.raises(grpc.RpcError):
                viewer.create("true")

    def told() -> int:
        counts: list[int] = [line["count"] for line in lines(path) if "count" in line]
        return len(calls(path, "CreateJob")) + sum(counts)

    wait_until(lambda: told() == 400)
    assert len(calls(path, "CreateJob")) < 300


def test_failures_of_who_may_create_are_counted_too(start_server: StartServer, path: Path) -> None:
    """And what such a client sends does not make a line long."""
    server = start_server(AUDIT_LOG=str(path))
    with server.connect() as client:
        client.call("CreateJobs", pb.CreateJobsReq(jobs=[pb.CreateJobReq()] * 1000))
        for request in (lambda: client.stop("9" * 1_000_000), lambda: client.shell("exit 0")):
            with contextlib.suppress(grpc.RpcError):
                request()

    def counts() -> list[int]:
        return [line["count"] for line in lines(path) if "count" in line]

    wait_until(lambda: sum(counts()) > 0)
    assert len(calls(path, "CreateJobs")) < 300
    assert len(calls(path, "CreateJobs")) + sum(counts()) in {1000, 1001}
    # What was done is always told.
    assert [line["code"] for line in calls(path, "CreateJob")] == ["OK"]
    assert max(map(len, path.read_bytes().splitlines())) < 4000


@pytest.mark.parametrize("how", ["cancelled", "revoked"])
def test_jobs_of_a_call_that_is_given_up_have_their_lines(
    start_server: StartServer, path: Path, tmp_path: Path, how: str
) -> None:
    revoked = tmp_path / "revoked"
    revoked.touch()
    server = start_server(AUDIT_LOG=str(path), REVOKED=str(revoked))
    with server.connect(given_up_client(server)) as user, server.connect() as admin:
        job = pb.CreateJobReq(command="sleep", args=["60"])
        call = user.call_soon("CreateJobs", pb.CreateJobsReq(jobs=[job] * 1000))
        wait_until(lambda: admin.info().running_jobs > 0)
        if how == "cancelled":
            call.cancel()
        else:
            certs.revoke(revoked, server.certs / "given-up-cert.pem")
            server.process.send_signal(signal.SIGHUP)
            assert call.code() is grpc.StatusCode.PERMISSION_DENIED
        wait_until(lambda: len(calls(path, "CreateJobs")) > 0 and nothing_goes_on(path))
        running = {each.id for each in admin.jobs()}
        assert 0 < len(running) < 1000
        told = calls(path, "CreateJobs")
        assert {line["job"] for line in told if line["code"] == "OK"} == running
        if how == "revoked":
            codes = {line["code"] for line in told}
            assert codes == {"OK", "PERMISSION_DENIED"}


def given_up_client(server: Server) -> str:
    if not (server.certs / "given-up-cert.pem").exists():
        certs.make_client(server.certs, "given-up", "user")
    return "given-up"


@pytest.mark.parametrize("how", ["its connection is shut", "the server ends"])
def test_creates_that_take_long_have_their_lines(
    start_server: StartServer, path: Path, tmp_path: Path, how: str
) -> None:
    """Though their calls are cancelled more than once."""
    revoked = tmp_path / "revoked"
    revoked.touch()
    server = start_server(AUDIT_LOG=str(path), REVOKED=str(revoked), STOP_JOBS="no")
    job = pb.CreateJobReq(command="sleep", args=["60"])
    jobinit = server.jobinit_pid()
    with server.connect(given_up_client(server)) as user, server.connect() as admin:
        os.kill(jobinit, signal.SIGSTOP)
        bulk = pb.CreateJobsReq(jobs=[job] * 5)
        under_way = [user.call_soon("CreateJob", job), user.call_soon("CreateJobs", bulk)]
        wait_until(lambda: admin.info().running_jobs == 6)
        ids = {each.id for each in admin.jobs()}
        if how == "the server ends":
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(DEADLINE_SECONDS)
        else:
            certs.revoke(revoked, server.certs / "given-up-cert.pem")
            server.process.send_signal(signal.SIGHUP)
            time.sleep(REVOKED_SECONDS + 1)
        os.kill(jobinit, signal.SIGCONT)
        assert all(call.done() for call in under_way)
        if how == "the server ends":
            codes = [line["code"] for line in lines(path) if "command" in line]
            assert codes == ["CANCELLED"] * 6
            server.stop()
            return
        wait_until(lambda: len([line for line in lines(path) if line.get("code") == "OK"]) >= 6)
        assert {line["job"] for line in lines(path) if line.get("code") == "OK"} == ids
        assert [line["code"] for line in calls(path, "CreateJob")] == ["OK"]


def test_a_stop_whose_client_is_revoked_meanwhile_was_not_refused(
    start_server: StartServer, path: Path, tmp_path: Path
) -> None:
    revoked = tmp_path / "revoked"
    revoked.touch()
    server = start_server(AUDIT_LOG=str(path), REVOKED=str(revoked))
    with server.connect(given_up_client(server)) as user, server.connect() as admin:
        job = user.shell("trap '' TERM; echo up; while :; do sleep 0.1; done")
        next(admin.stream(job.id))  # from now on it does not mind
        stop = user.stop_soon(job.id)
        wait_until(lambda: bool(admin.get(job.id).stopped_by.name))
        certs.revoke(revoked, server.certs / "given-up-cert.pem")
        server.process.send_signal(signal.SIGHUP)
        assert stop.code() is grpc.StatusCode.PERMISSION_DENIED
        (told,) = calls(path, "StopJob")
        assert (told["code"], told["job"]) == ("CANCELLED", job.id)
        assert "is revoked" in told["problem"]
        admin.stop(job.id, grace_milliseconds=0)


def test_what_was_done_is_told_with_the_role_that_allowed_it(
    start_server: StartServer, path: Path, tmp_path: Path
) -> None:
    """Though it is another one by the time of the answer."""
    roles = tmp_path / "clients.toml"
    roles.write_text("")
    server = start_server(AUDIT_LOG=str(path), CLIENTS=str(roles))
    with server.connect(given_up_client(server)) as user, server.connect() as admin:
        job = user.shell("trap '' TERM; echo up; while :; do sleep 0.1; done")
        next(admin.stream(job.id))
        stop = user.stop_soon(job.id)
        wait_until(lambda: bool(admin.get(job.id).stopped_by.name))
        roles.write_text('[cn.given-up]\nrole = "viewer"\n')
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: user.info().role == "viewer")
        admin.stop(job.id, grace_milliseconds=0)
        assert stop.result().status == "STOPPED"
        told = {line["who"]: line["role"] for line in calls(path, "StopJob")}
        assert told == {"admin": "admin", "given-up": "user"}


def test_calls_that_did_nothing_and_are_given_up_are_counted_too(
    start_server: StartServer, path: Path
) -> None:
    """As stops of a job that ends no sooner for them. The first has its line in any case."""
    server = start_server(AUDIT_LOG=str(path))
    script = "trap '' TERM; echo up; while :; do sleep 0.1; done"
    with server.connect() as client, connect(server, "client") as hostile:
        jobs = [client.shell(script).id for _ in range(2)]
        for job in jobs:
            next(client.stream(job))  # from now on it does not mind
        stops = [pb.StopJobReq(id=job, grace_milliseconds=600_000) for job in jobs]
        again, first = (stop.SerializeToString() for stop in stops)
        numbers = itertools.count(1, 2)

        def give_up(count: int, *others: bytes) -> None:
            messages = [again] * count + list(others)
            stops = list(zip(numbers, messages, strict=False))
            hostile.sendall(b"".join(request_of("StopJob", *stop) for stop in stops))
            hostile.sendall(request_of("GetServerInfo", next(numbers)))
            receive_until(hostile, str(server.state).encode())  # so the stops are begun
            wait_until(lambda: all(map(is_stopped, jobs[: 1 + len(others)])))
            hostile.sendall(b"".join(reset_of(number) for number, _ in stops))

        def is_stopped(job: str) -> bool:
            return bool(client.get(job).stopped_by.name)

        def counted() -> int:
            return sum(line["count"] for line in lines(path) if "count" in line)

        for _ in range(4):
            give_up(100)
        wait_until(lambda: counted() > 0)
        assert len(calls(path, "StopJob")) < 300
        give_up(60, first)
        wait_until(lambda: jobs[1] in [line["job"] for line in calls(path, "StopJob")])
        assert {line["code"] for line in calls(path, "StopJob")} == {"CANCELLED"}
        for job in jobs:
            client.stop(job, grace_milliseconds=0)


def nothing_goes_on(path: Path) -> bool:
    size = path.stat().st_size
    time.sleep(0.5)
    return path.stat().st_size == size


@pytest.mark.parametrize("how", ["SIGHUP", "by itself"])
def test_rotation(start_server: StartServer, path: Path, how: str) -> None:
    server = start_server(AUDIT_LOG=str(path))
    with server.connect() as client:
        before = client.create("true").id
        moved = path.rename(path.with_name("audit.log.1"))
        if how == "SIGHUP":
            server.process.send_signal(signal.SIGHUP)
        wait_until(path.exists)
        after = client.create("true").id
    assert [line["job"] for line in calls(moved, "CreateJob")] == [before]
    assert [line["job"] for line in calls(path, "CreateJob")] == [after]


def test_no_job_is_created_that_the_log_could_not_tell_of(
    start_server: StartServer, path: Path
) -> None:
    path.touch()
    # Nothing else that the server writes is as large: only this file is full.
    most = 64 << 20
    os.truncate(path, most)
    server = start_server(AUDIT_LOG=str(path))
    with server.connect() as client:
        job = client.create("sleep", "60")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        with pytest.raises(grpc.RpcError):
            client.stop("77")  # the first line that does not fit
        with pytest.raises(grpc.RpcError) as caught:
            client.create("true")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "audit log cannot be written" in str(caught.value.details())
        # What frees a full disk goes on; its lines wait.
        assert client.stop(job.id).status == "STOPPED"
        assert client.get(job.id).status == "STOPPED"
        limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        assert client.create("true").id
    assert [line["job"] for line in calls(path, "StopJob")] == ["77", job.id]
    assert "ERROR jobworker.rpc.audit" in server.log


def test_a_call_that_came_before_the_log_could_not_be_written(
    start_server: StartServer, path: Path
) -> None:
    """Its request comes afterwards."""
    path.touch()
    most = 64 << 20
    os.truncate(path, most)
    server = start_server(AUDIT_LOG=str(path))
    request = message_of(pb.CreateJobReq(command="true").SerializeToString())
    with connect(server, "client") as early, server.connect() as client:
        early.sendall(frame(HEADERS, END_HEADERS, 1, headers_of("CreateJob")))
        early.sendall(request_of("GetServerInfo", 3))
        receive_until(early, b"grpc-status")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        with pytest.raises(grpc.RpcError):
            client.stop("77")  # the first line that does not fit
        early.sendall(frame(DATA, END_STREAM, 1, request))
        receive_until(early, b"audit log cannot be written")
        assert client.jobs() == []


def test_creates_that_were_let_in_before_the_log_could_not_be_written(
    start_server: StartServer, path: Path, tmp_path: Path
) -> None:
    """They wait for looks at their commands."""
    path.touch()
    os.truncate(path, 64 << 20)
    server = start_server(AUDIT_LOG=str(path))
    environment = {"PATH": slow_path(tmp_path / "links")}
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with server.connect() as client:
        for _ in range(10):  # on a busy machine all may be over before it is told
            creates = [client.create_soon("true", environment=environment) for _ in range(400)]
            client.info()  # comes behind them
            full = (path.stat().st_size, resource.RLIM_INFINITY)
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, full)
            codes = Counter(create.code() for create in creates)
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
            assert codes.keys() <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, codes
            client.create("true")
            if codes[grpc.StatusCode.UNAVAILABLE]:
                return
    pytest.fail("no create was refused")


def test_a_bulk_does_not_go_on_where_the_log_cannot_tell_of_it(
    start_server: StartServer, path: Path
) -> None:
    path.touch()
    most = 64 << 20
    os.truncate(path, most - 2000)  # room for some lines
    server = start_server(AUDIT_LOG=str(path))
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    with server.connect() as client:
        job = pb.CreateJobReq(command="true", args=["x" * 100])
        results = client.call("CreateJobs", pb.CreateJobsReq(jobs=[job] * 1000)).results
        made = {result.id for result in results if result.id}
        assert 0 < len(made) < 200
        refused = {(result.code, result.error.partition(":")[0]) for result in results} - {(0, "")}
        ((code, problem),) = refused
        assert code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert "audit log cannot be written" in problem
        limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        client.create("true")
    told = [line["job"] for line in calls(path, "CreateJobs") if line["code"] == "OK"]
    assert sorted(told) == sorted(made)


def test_a_bulk_that_is_killed_has_its_lines(start_server: StartServer, path: Path) -> None:
    """Of all jobs that were created, but for those that were under way just then."""
    server = start_server(AUDIT_LOG=str(path))
    with server.connect() as client:
        job = pb.CreateJobReq(command="true")
        call = client.call_soon("CreateJobs", pb.CreateJobsReq(jobs=[job] * 1000))
        wait_until(lambda: len(calls(path, "CreateJobs")) > 100)
        assert not call.done()
        server.stop(signal.SIGKILL)
    told = {line["job"] for line in calls(path, "CreateJobs")}
    with start_server().connect() as client:
        made = {job.id for job in client.jobs()}
    assert told <= made
    assert len(made - told) <= MOST_CREATED


def test_a_log_that_cannot_be_opened(start_server: StartServer, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="JOB_WORKER_AUDIT_LOG"):
        start_server(AUDIT_LOG=str(tmp_path / "missing" / "audit.log"))
