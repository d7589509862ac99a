"""The server itself: how it starts, who may call it, how it ends."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from functional.server import Client, Server, channel
from jobworker import certs
from jobworker.pb import job_worker_pb2 as pb

StartServer = Callable[..., Server]


def serve(folder: Path, certificates: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A server that is expected to give up."""
    environ = {
        "PATH": os.environ["PATH"],
        "JOB_WORKER_ADDR": "127.0.0.1:0",
        "JOB_WORKER_CERT_PATH": str(certificates),
        "JOB_WORKER_STATE_DIR": str(folder / "state"),
    } | {f"JOB_WORKER_{name}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "jobworker", "serve"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


# Start


def test_ready_within_a_second(start_server: StartServer) -> None:
    times = []
    for _ in range(3):
        server = start_server()
        times.append(server.ready_seconds)
        server.stop()
    assert min(times) < 1


def test_a_state_folder_in_use(start_server: StartServer, certificates: Path) -> None:
    server = start_server()
    ended = serve(server.state.parent, certificates)
    assert ended.returncode == 1
    assert "in use by another server" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_address_in_use(start_server: StartServer, certificates: Path, tmp_path: Path) -> None:
    server = start_server()
    ended = serve(tmp_path / "other", certificates, ADDR=server.address)
    assert ended.returncode == 1
    assert server.address in ended.stderr
    assert "JOB_WORKER_ADDR" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_locale_of_another_encoding(start_server: StartServer) -> None:
    """Jobs would get other arguments than their clients gave."""
    launcher = ["env", "LC_ALL=C", "PYTHONCOERCECLOCALE=0", "PYTHONUTF8=0"]
    with pytest.raises(AssertionError, match=r"cannot start: .*'ascii'.*LC_ALL"):
        start_server(launcher=launcher)
    server = start_server(launcher=["env", "LC_ALL=C"])
    with server.connect() as client:
        assert client.run("echo é")[1] == "é\n".encode()


def test_an_address_of_another_machine(certificates: Path, tmp_path: Path) -> None:
    ended = serve(tmp_path, certificates, ADDR="192.0.2.1:50051")
    assert ended.returncode == 1
    assert "give an address of this machine" in ended.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("ADDR", "nonsense"), ("DEFAULT_CPU", "many"), ("LINGER", "-1"), ("STATE_DIR", "/proc/x")],
)
def test_a_setting_that_cannot_be(
    tmp_path: Path, certificates: Path, name: str, value: str
) -> None:
    ended = serve(tmp_path, certificates, **{name: value})
    assert ended.returncode not in (0, -signal.SIGKILL)
    assert f"JOB_WORKER_{name}" in ended.stderr
    assert value in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("file", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_certificate_file_that_is_missing(tmp_path: Path, certificates: Path, file: str) -> None:
    folder = tmp_path / "certs"
    shutil.copytree(certificates, folder)
    (folder / file).unlink()
    ended = serve(tmp_path, folder)
    assert ended.returncode == 1
    assert str(folder / file) in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "place", ["CLIENTS", "REVOKED", "CONFIG", "ca-cert.pem", "server-cert.pem", "server-key.pem"]
)
def test_a_file_that_never_ends(tmp_path: Path, certificates: Path, place: str) -> None:
    folder, pipe = shutil.copytree(certificates, tmp_path / "certs"), tmp_path / "pipe"
    os.mkfifo(pipe)
    settings = {place: str(pipe)}
    if place.endswith(".pem"):
        settings, pipe = {}, pipe.rename(folder / place)
    ended = serve(tmp_path, folder, **settings)
    assert ended.returncode in {1, 2}
    assert str(pipe) in ended.stderr
    assert "is no ordinary file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_failed_start_leaves_no_process(tmp_path: Path, certificates: Path) -> None:
    serve(tmp_path, certificates, ADDR="192.0.2.1:1")
    mark = str(tmp_path).encode()
    deadline = time.monotonic() + 15
    while any(mark in _read(path) for path in Path("/proc").glob("[0-9]*/environ")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# Callers


def test_a_viewer_may_look_and_nothing_else(server: Server, client: Client) -> None:
    job = client.create("echo", "x")
    client.wait(job.id)
    with server.connect("viewer") as viewer:
        assert viewer.get(job.id).status == "COMPLETED"
        assert viewer.output(job.id) == b"x\n"
        assert viewer.jobs()
        assert viewer.info().role == "viewer"
        for call in (lambda: viewer.create("true"), lambda: viewer.stop(job.id)):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_no_certificate_no_connection(server: Server) -> None:
    context = ssl.create_default_context(cafile=server.certs / "ca-cert.pem")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, context)


def test_a_certificate_of_another_authority(server: Server, tmp_path: Path) -> None:
    certs.make_all(tmp_path / "other")
    context = ssl.create_default_context(cafile=server.certs / "ca-cert.pem")
    context.load_cert_chain(
        tmp_path / "other" / "client-cert.pem", tmp_path / "other" / "client-key.pem"
    )
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, context)


@pytest.mark.parametrize(
    ("version", "works"), [(ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)]
)
def test_tls_1_3_only(server: Server, version: ssl.TLSVersion, works: bool) -> None:
    context = ssl.create_default_context(cafile=server.certs / "ca-cert.pem")
    context.load_cert_chain(server.certs / "client-cert.pem", server.certs / "client-key.pem")
    context.minimum_version = context.maximum_version = version
    if works:
        assert handshake(server, context) == "TLSv1.3"
    else:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(server, context)


def handshake(server: Server, context: ssl.SSLContext) -> str | None:
    """With TLS 1.3 the server's word on our certificate comes after the handshake."""
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        if not wrapped.recv(1):
            raise ConnectionResetError("closed by the server")
        return wrapped.version()


@pytest.mark.parametrize("rpc", ["GetJob", "GetJobsStream"])
@pytest.mark.parametrize("data", [b"\xff\xff\x07", b"\x0a\x01\xff"], ids=["tag", "text"])
def test_what_is_no_message_is_an_invalid_argument(server: Server, rpc: str, data: bytes) -> None:
    with channel(server.address, server.certs, "client") as open_channel:
        kind: Any = open_channel.unary_stream if "Stream" in rpc else open_channel.unary_unary
        call = kind(f"/job_worker.JobService/{rpc}", lambda message: message, None)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(data, timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in server.log


def test_health(server: Server) -> None:
    with channel(server.address, server.certs, "viewer") as open_channel:
        check = open_channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        for service in ("", "job_worker.JobService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING


def test_reflection(server: Server) -> None:
    with channel(server.address, server.certs, "viewer") as open_channel:
        database = ProtoReflectionDescriptorDatabase(open_channel)
        assert "job_worker.JobService" in database.get_services()
        file = database.FindFileContainingSymbol("job_worker.JobService")
        assert file.name == "job_worker.proto"


def test_as_many_jobs_as_descriptors_allow(start_server: StartServer) -> None:
    server = start_server(open_files=212)
    with server.connect() as client:
        most = client.info().maximum_jobs
        jobs = [client.create("sleep", "60") for _ in range(most)]
        with pytest.raises(grpc.RpcError) as caught:
            client.create("true")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        client.stop(jobs[0].id, grace_milliseconds=0)
        assert client.create("true").id


def test_not_more_jobs_at_once_either(start_server: StartServer) -> None:
    server = start_server(open_files=260)
    with server.connect() as client:
        most = client.info().maximum_jobs
        calls = [client.create_soon("sleep", "60") for _ in range(3 * most)]
        assert sum(call.exception() is None for call in calls) == most
        assert client.info().running_jobs == most


def test_a_job_ends_though_no_descriptor_was_left(start_server: StartServer) -> None:
    server = start_server(open_files=260, LINGER="0.5")
    with server.connect() as client:
        ended = client.create("sleep", "6")
        killed = client.shell(
            "trap '' TERM; while :; do sleep 0.05; done", timeout_milliseconds=5000
        )
        with take_all_descriptors(server):
            time.sleep(max(0.0, 7 + (ended.start_time_ns - time.time_ns()) / 1e9))
        assert client.wait(ended.id).status == "COMPLETED"
        assert client.wait(killed.id).cause == pb.TIMED_OUT


def test_a_job_starts_though_no_descriptor_was_left(start_server: StartServer) -> None:
    """jobinit is not given up, nor its jobs, because what it sends cannot be taken."""
    server = start_server(open_files=260)
    with server.connect() as client:
        before = client.create("sleep", "60")
        with take_all_descriptors(server):
            calls = [client.create_soon("echo", "x") for _ in range(10)]
            time.sleep(1)
        for call in calls:
            with contextlib.suppress(grpc.RpcError):
                assert client.wait(call.result().id).status in {"COMPLETED", "FAILED"}
        assert client.wait(client.create("true").id).status == "COMPLETED"
        assert client.stop(before.id).status == "STOPPED"
    assert "is gone" not in server.log


@contextlib.contextmanager
def take_all_descriptors(server: Server) -> Iterator[None]:
    """As where all are in use: below the limit, none is free."""
    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, hard))
    yield
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_a_job_that_cannot_be_recorded_never_was(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as client:
        first = client.create("true")
        with contextlib.closing(sqlite3.connect(server.state / "jobs.db")) as database:
            database.execute("BEGIN IMMEDIATE")
            call = client.create_soon("true")
            job_id = str(int(first.id) + 1)
            deadline = time.monotonic() + 4
            while job_id not in [job.id for job in client.jobs()]:
                assert time.monotonic() < deadline
            with pytest.raises(grpc.RpcError) as caught:
                list(client.stream(job_id))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            client.get(job_id)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        cgroup = client.info().cgroup
        assert not cgroup or not Path(cgroup, f"job-{job_id}").exists()
        assert client.wait(client.create("true").id).status == "COMPLETED"


# End


def test_the_end_stops_jobs_that_are_just_being_made(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as client:
        calls = [client.create_soon("sleep", "100") for _ in range(300)]
        calls[0].result()
        assert server.stop() == 0
        ids = [call.result().id for call in calls if call.exception() is None]
    with start_server().connect() as client:
        assert {client.get(job_id).status for job_id in ids} == {"STOPPED"}


def test_no_ending_is_made_of_what_the_end_cut_off(
    start_server: StartServer, tmp_path: Path
) -> None:
    """The next server has the pipes, and all that is in them."""
    settings = {"STOP_JOBS": "no", "CGROUP_BASE": str(tmp_path), "LINGER": "10"}
    server = start_server(**settings)
    script = f"(while ! [ -e {tmp_path}/go ]; do sleep 0.1; done; echo late) & sleep 1; echo main"
    with server.connect() as client:
        blocker = client.shell("trap '' TERM; echo up; while :; do sleep 0.1; done")
        next(client.stream(blocker.id))
        jobs = [client.shell(script) for _ in range(20)]
        call = client.stop_soon(blocker.id)  # keeps the server for some seconds
        time.sleep(0.3)
        server.stop()
        assert call.exception() is not None
    (tmp_path / "go").touch()
    with start_server(**settings).connect() as client:
        for job in jobs:
            assert client.wait(job.id).status == "COMPLETED"
            assert client.output(job.id) == b"main\nlate\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_stops_the_jobs_and_says_so(start_server: StartServer, number: int) -> None:
    server = start_server()
    with server.connect() as client:
        # A job that ends at once would make whole a stream that learns of the server's end late.
        slow = "trap 'sleep 1; exit' TERM; echo ready; while :; do sleep 0.05; done"
        stream = client.stream(client.shell(slow).id)
        pid = int(client.output(client.shell("echo $PPID").id))  # jobinit's
        assert next(stream).payload == b"ready\n"
        assert server.stop(number) == 0
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "stopping 1 job" in server.log
    assert "Traceback" not in server.log
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_next_server_knows_the_jobs(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as client:
        done, output = client.run("echo kept; echo too >&2")
        running = client.create("sleep", "60")
    server.stop()
    with start_server().connect() as client:
        assert client.get(done.id) == done
        assert client.output(done.id) == output
        assert client.get(running.id).status == "STOPPED"
        assert int(client.create("true").id) == int(running.id) + 1
