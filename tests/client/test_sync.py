"""Both clients against real servers; what only one of them can do is in test_aio.py, or at the
end here."""

from __future__ import annotations

import doctest
import errno
import hashlib
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.conftest import Connect
from client.old_server import OldServer
from client.proxy import Proxy
from functional.server import Server, slow_path
from jobworker import Client, errors
from jobworker.client import Chunk, Spec, Stream
from jobworker.errors import (
    CallError,
    DeadlineError,
    ForbiddenError,
    RejectedError,
    UnknownJobError,
    UnreachableError,
    UnsupportedError,
    WrongStateError,
)
from jobworker.job import Bind, Cause, Limits, Status

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"

StartServer = Callable[..., Server]


def output(chunks: Iterable[Chunk]) -> bytes:
    return b"".join(chunk.payload for chunk in chunks)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Calls


def test_create_and_wait(client: Client) -> None:
    job = client.create("sh", "-c", "exit 7", name="seven", environment={"A": "b"})
    assert (job.spec.name, job.spec.environment) == ("seven", {"A": "b"})
    ended = client.wait(job.id)
    assert (ended.status, ended.cause, ended.exit_code) == (Status.FAILED, Cause.EXITED, 7)
    assert ended == client.get(str(job.id)) == client.wait(job.id)


def test_run(client: Client) -> None:
    result = client.run(
        "sh", "-c", "echo out; sleep 0.1; echo err >&2; pwd", working_directory="/usr"
    )
    assert result.job.status is Status.COMPLETED
    assert sorted(result.output.split()) == [b"/usr", b"err", b"out"]
    assert (result.stdout, result.stderr) == (b"out\n/usr\n", b"err\n")


def test_run_with_input_and_a_time_limit(client: Client) -> None:
    result = client.run("sh", "-c", "cat; exec sleep 60", stdin=b"\0in\n", time_limit=0.5)
    assert result.stdout == b"\0in\n"
    assert (result.job.cause, result.job.spec.timeout_ms) == (Cause.TIMED_OUT, 500)


def test_run_in_time_or_stopped(client: Client) -> None:
    with pytest.raises(DeadlineError) as caught:
        client.run("sh", "-c", "echo ready; sleep 60", name="too slow", timeout=0.5)
    (job,) = client.list(name="too slow", limit=1)
    assert job.status is Status.STOPPED
    assert caught.value.job_id == job.id
    assert f"(job {job.id}, which was asked to stop" in str(caught.value)
    assert b"".join(chunk.payload for chunk in client.stream(job.id)) == b"ready\n"


def test_a_client_that_is_closed(server: Server) -> None:
    client = Client(server.address, certs=server.certs)
    job = client.run("true").job
    client.close()
    for call in (client.info, lambda: client.get(job.id), lambda: list(client.stream(job.id))):
        with pytest.raises(CallError, match="this client was closed; make another one"):
            call()


def test_wait_in_time(client: Client) -> None:
    job = client.create("sleep", "60")
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        client.wait(job.id, timeout=0.3)
    assert 0.2 < time.monotonic() - started < 5
    assert client.get(job.id).status is Status.RUNNING
    client.stop(job.id)


def test_wait_ends_with_the_job_and_takes_no_output(client: Client) -> None:
    job = client.create("sh", "-c", "head -c 50000000 /dev/zero; sleep 0.5")
    assert client.wait(job.id).stdout_bytes == 50_000_000


def test_stop(client: Client) -> None:
    job = client.create("sh", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done")
    next(client.stream(job.id))
    stopped = client.stop(job.id, grace_seconds=0.2)
    assert (stopped.status, stopped.signal) == (Status.STOPPED, signal.SIGKILL)
    job = client.create("sleep", "60")
    assert client.stop(job.id, signal=signal.SIGUSR1).signal == signal.SIGUSR1


def test_delete(client: Client) -> None:
    job = client.create("echo", "hello")
    client.wait(job.id)
    client.delete(job.id)
    with pytest.raises(UnknownJobError):
        client.get(job.id)
    with pytest.raises(UnknownJobError):
        client.delete(str(job.id))
    running = client.create("sleep", "60")
    with pytest.raises(WrongStateError, match="RUNNING"):
        client.delete(running.id)
    client.stop(running.id)


def test_create_many(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several requests, and in order."""
    monkeypatch.setattr("jobworker.client.bulk.MOST_JOBS", 7)
    specs = [Spec("sh", "-c", f"cat; echo {n}", stdin=b"%d+" % n, name="bulk") for n in range(20)]
    specs[3:3] = [Spec("no-such-command"), Spec("true", max_cpu=-1)]
    results = client.create_many(iter(specs))
    assert len(results) == 22
    assert all(isinstance(result.error, RejectedError) for result in results[3:5])
    assert (results[3].job_id, results[4].job_id) == (None, None)
    assert "no-such-command" in str(results[3].error)
    for number, result in enumerate(results[:3] + results[5:]):
        assert result.error is None
        assert result.job_id is not None
        assert result.status in {Status.RUNNING, Status.COMPLETED}
        assert output(client.stream(result.job_id)) == b"%d+%d\n" % (number, number)
    assert len(list(client.list(name="bulk"))) % 20 == 0
    assert client.create_many([]) == []


def test_create_many_of_the_largest(client: Client) -> None:
    """More than 4 MiB in all, and an error that is larger than what was sent."""
    data = random.Random(2).randbytes(1 << 20)
    specs = [Spec("sha256sum", stdin=data)] * 9 + [Spec("\x01" * 130_000)] * 30
    results = client.create_many(specs)
    for result in results[:9]:
        assert result.job_id is not None
        assert output(client.stream(result.job_id)).split()[0].decode() == digest(data)
    assert all(isinstance(result.error, RejectedError) for result in results[9:])


def test_list(client: Client) -> None:
    jobs = [client.create("true", name="listed") for _ in range(4)]
    newest_first = [job.id for job in reversed(jobs)]
    assert [job.id for job in client.list(name="listed", limit=4)] == newest_first
    assert [job.id for job in client.list(limit=2)] == newest_first[:2]
    client.wait(jobs[-1].id)
    done = client.list(name="listed", statuses=[Status.COMPLETED], limit=1)
    assert [job.status for job in done] == [Status.COMPLETED]
    assert list(client.list(limit=0)) == []


def test_list_page_by_page(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [client.create("true", name="paged") for _ in range(7)]
    monkeypatch.setattr("jobworker.client.calls.LARGEST_PAGE_JOBS", 3)
    assert {job.id for job in client.list()} >= {job.id for job in jobs}
    assert [job.id for job in client.list(name="paged", limit=5)] == [
        job.id for job in reversed(jobs[2:])
    ]


def test_info(client: Client, server: Server) -> None:
    info = client.info()
    assert (info.identity, info.role) == ("admin", "admin")
    assert info.state_directory == str(server.state)
    assert info.default_limits.cpu_percent == 100
    assert {controller.name for controller in info.controllers} == {"cpu", "memory", "io", "pids"}
    assert (info.log_max_bytes, info.disk_reserve_bytes) == (0, 0)
    assert info.disk_room_bytes > 0
    assert "none" in info.profiles
    client.wait(client.create("true").id)
    assert client.info().ended_jobs > 0


def test_ids_names_and_limits_over_the_top_are_the_callers_mistake(client: Client) -> None:
    too_much: list[dict[str, Any]] = [
        {"max_cpu": 2**31},
        {"max_memory": 2**31},
        {"max_iobps": 2**40},
        {"max_cpu": -1},
        {"working_directory": "relative"},
        {"environment": {"A": "\0"}},
        {"name": "\n"},
    ]
    for options in too_much:
        with pytest.raises(RejectedError, match=next(iter(options))):
            client.create("true", **options)
    for command in ("", "a\0b", "\udcff", "no-such-command"):
        with pytest.raises(RejectedError):
            client.create(command)
    with pytest.raises(TypeError, match="max_gpu"):
        client.create("true", max_gpu=1)  # type: ignore[call-arg]
    job = client.create("true", max_cpu=0, max_memory=0)
    assert job.spec.limits in (Limits(), client.info().default_limits)


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ((["ls", "-l"],), {}, "command must be a str, not of the type list"),
        (("ls", 1), {}, "each argument of the command must be a str, not of the type int"),
        (("ls",), {"stdin": "text"}, "stdin must be bytes, not of the type str"),
        (("ls",), {"max_memory": "64M"}, "max_memory must be an int, not of the type str"),
        (("ls",), {"time_limit": "5m"}, "time_limit must be a number, not of the type str"),
        (("ls",), {"environment": {"A": 1}}, r"environment\['A'\] must be a str"),
        (("ls",), {"name": b"x"}, "name must be a str, not of the type bytes"),
        (("ls",), {"binds": ["/a:/b"]}, "each of binds must be a Bind, not of the type str"),
    ],
)
def test_arguments_of_a_wrong_type(
    client: Client, command: tuple[Any, ...], options: Any, told: str
) -> None:
    with pytest.raises(TypeError, match=told):
        client.create(*command, **options)


def test_ids_and_names_that_are_no_text(client: Client) -> None:
    lone = "\ud800"
    calls: list[Callable[[], object]] = [
        lambda: client.get(lone),
        lambda: client.stop(lone),
        lambda: client.delete(lone),
        lambda: client.wait(lone),
        lambda: list(client.stream(lone)),
        lambda: list(client.list(name=lone)),
        lambda: list(client.list(owner=lone)),
    ]
    for call in calls:
        with pytest.raises(RejectedError, match="is not text"):
            call()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_a_job_reads_in_any_kind_of_bytes(client: Client, kind: Any) -> None:
    assert client.run("cat", stdin=kind(b"input")).stdout == b"input"


def test_errors_say_what_the_caller_can_do(client: Client) -> None:
    job, wrote = client.create("echo", "hello"), 6
    client.wait(job.id)
    with pytest.raises(UnknownJobError) as caught:
        client.get(10**9)
    assert (caught.value.rpc, caught.value.code) == ("GetJob", "NOT_FOUND")
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    with pytest.raises(UnknownJobError):
        client.get("one")
    with pytest.raises(WrongStateError, match="COMPLETED"):
        client.stop(job.id)
    with pytest.raises(RejectedError, match=str(wrote)):
        list(client.stream(job.id, from_offset=wrote + 1))
    with pytest.raises(RejectedError, match="from_offset"):
        client.stream(job.id, from_offset=-1)
    with pytest.raises(RejectedError, match="grace_seconds"):
        client.stop(job.id, grace_seconds=-1)
    with pytest.raises(RejectedError, match="statuses"):
        list(client.list(statuses=["GONE"]))
    assert issubclass(UnreachableError, CallError)
    assert issubclass(CallError, errors.JobWorkerError)


def test_a_viewer_is_told_so(connect: Connect, server: Server) -> None:
    viewer = connect(
        server.address,
        cert=server.certs / "viewer-cert.pem",
        key=server.certs / "viewer-key.pem",
    )
    assert viewer.info().role == "viewer"
    for call in (
        lambda: viewer.create("true"),
        lambda: viewer.create_many([Spec("true")]),
        lambda: viewer.delete(1),
    ):
        with pytest.raises(ForbiddenError):
            call()


def test_a_refused_command_has_its_errno(client: Client) -> None:
    for command, number in (("/none", errno.ENOENT), ("/etc", errno.EISDIR), ("", 0)):
        with pytest.raises(RejectedError) as caught:
            client.create(command)
        assert caught.value.command_errno == number
    with pytest.raises(RejectedError, match="working_directory") as caught:
        client.create("true", working_directory="/none")
    assert caught.value.command_errno == 0


def test_lost_bytes_are_told(connect: Connect, start_server: StartServer) -> None:
    client = connect(start_server(LOG_MAX_BYTES="100000", LOG_POLICY="ring").address)
    assert (client.info().log_max_bytes, client.info().log_policy) == (100_000, "ring")
    result = client.run("head", "-c", "1000000", "/dev/zero")
    job = client.get(result.job.id)
    assert 800_000 < job.lost_bytes < 1_000_000
    assert sum(chunk.lost_bytes for chunk in client.stream(job.id)) == job.lost_bytes


# Streams


def test_a_stream_is_live_and_ends_with_the_job(client: Client) -> None:
    job = client.create("sh", "-c", "echo first; sleep 0.5; echo second >&2")
    stream = client.stream(job.id)
    first = next(stream)
    assert (first.payload, first.offset, first.next_offset) == (b"first\n", 0, 6)
    assert [(run.stream, run.length) for run in first.runs] == [(Stream.STDOUT, 6)]
    assert abs(first.runs[0].time_ns - job.started_ns) < 10e9
    assert client.get(job.id).status is Status.RUNNING
    second, last = stream
    assert [(run.stream, run.length) for run in second.runs] == [(Stream.STDERR, 7)]
    assert (last.payload, last.ending) == (b"", client.get(job.id))
    assert (second.ending, second.lost_bytes) == (None, 0)


def test_a_part_of_a_stream(client: Client) -> None:
    job = client.create("sh", "-c", "echo out; echo err >&2; sleep 60")
    stream = client.stream(job.id)
    received = 0
    while received < 8:
        received += len(next(stream).view)
    assert sorted(output(client.stream(job.id, follow=False)).split()) == [b"err", b"out"]
    only = client.stream(job.id, follow=False, stream=Stream.STDERR)
    assert output(only) == b"err\n"
    assert output(client.stream(job.id, follow=False, from_offset=6)) in (b"t\n", b"r\n")
    client.stop(job.id)


def test_the_payload_without_a_copy(client: Client) -> None:
    job = client.create("head", "-c", "5000000", "/dev/urandom")
    copied = output(client.stream(job.id))
    views = [chunk.view for chunk in client.stream(job.id)]
    assert b"".join(views) == copied
    assert len(copied) == 5_000_000


def test_many_broken_connections_lose_and_double_no_byte(connect: Connect, server: Server) -> None:
    """The client gets 24 MB, live, through a proxy that resets every connection after some
    hundred KiB."""
    program = (
        "import os, sys, time\nfor i in range(240):\n os.write(1 + i % 2, os.urandom(100_000))\n"
    )
    chance = random.Random(1)
    with Proxy(server.port, lambda: chance.randrange(20_000, 1_500_000)) as proxy:
        direct = connect(server.address)
        job = direct.create("python3", "-c", program)
        received = hashlib.sha256()
        size, last = 0, None
        for chunk in connect(proxy.address).stream(job.id):
            assert chunk.offset == size
            received.update(chunk.view)
            size += len(chunk.view)
            last = chunk
        assert proxy.broken >= 10
        assert last
        assert last.ending
        assert size == last.ending.output_bytes == 24_000_000
        assert received.hexdigest() == digest(output(direct.stream(job.id)))
        resumed = connect(proxy.address).stream(job.id, stream=Stream.STDERR)
        assert output(resumed) == output(direct.stream(job.id, stream=Stream.STDERR))


def test_a_silent_job_waited_for_over_broken_connections(connect: Connect, server: Server) -> None:
    with Proxy(server.port) as proxy:
        client = connect(proxy.address)
        job = client.create("sleep", "1.5")
        timers = [threading.Timer(delay, proxy.break_all) for delay in (0.3, 0.6, 0.9)]
        for timer in timers:
            timer.start()
        assert client.wait(job.id, timeout=30).status is Status.COMPLETED
        for timer in timers:
            timer.join()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_restarted_server_is_found_again(
    connect: Connect, start_server: StartServer, tmp_path: Path, how: int
) -> None:
    """The server ends in the middle, the job writes on, and half a second later there is one
    at the same address."""
    gate = tmp_path / "gate"
    server = start_server(STOP_JOBS="no")
    client = connect(server.address)
    script = f"echo before; while ! [ -e {gate} ]; do sleep 0.05; done; seq 20000; exit 3"
    job = client.create("sh", "-c", script)
    stream = client.stream(job.id)
    chunks = [next(stream)]
    server.stop(how)
    gate.touch()
    options = {"ADDR": server.address, "STOP_JOBS": "no"}
    restarting = threading.Timer(0.5, start_server, kwargs=options)
    restarting.start()
    chunks += stream
    restarting.join()
    assert output(chunks) == b"before\n" + b"".join(b"%d\n" % i for i in range(1, 20_001))
    assert chunks[-1].ending == client.get(job.id)
    assert chunks[-1].ending.exit_code == 3


def test_a_restarted_server_is_waited_for_by_a_new_stream(
    connect: Connect, start_server: StartServer
) -> None:
    """As the one of `run`, which begins once the job is created."""
    server = start_server(STOP_JOBS="no")
    client = connect(server.address)
    job = client.create("sh", "-c", "echo before; exit 3")
    server.stop()
    options = {"ADDR": server.address, "STOP_JOBS": "no"}
    restarting = threading.Timer(0.5, start_server, kwargs=options)
    restarting.start()
    chunks = list(client.stream(job.id))
    restarting.join()
    assert output(chunks) == b"before\n"
    assert chunks[-1].ending


def test_patience_has_an_end(connect: Connect, start_server: StartServer) -> None:
    server = start_server(STOP_JOBS="no")  # else the job's ending may come, and not the break
    client = connect(server.address, patience=1)
    job = client.create("sh", "-c", "echo before; exec sleep 60")
    stream = client.stream(job.id)
    next(stream)
    server.stop()
    started = time.monotonic()
    with pytest.raises(UnreachableError):
        next(stream)
    assert 0.5 < time.monotonic() - started < 6


def test_a_server_that_was_never_there_is_not_waited_for(connect: Connect) -> None:
    client = connect("127.0.0.1:1")
    started = time.monotonic()
    for call in (lambda: client.get(1), lambda: client.wait(1), lambda: next(client.stream(1))):
        with pytest.raises(UnreachableError, match="nobody listens") as caught:
            call()
        assert not caught.value.was_connected
    assert time.monotonic() - started < 5


def test_a_call_whose_connection_breaks_says_that_it_may_have_worked(
    connect: Connect, start_server: StartServer
) -> None:
    server = start_server()
    with Proxy(server.port) as proxy:
        client = connect(proxy.address)
        job = client.create("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
        breaking = threading.Timer(0.5, proxy.break_all)
        breaking.start()
        with pytest.raises(UnreachableError) as caught:
            client.stop(job.id, grace_seconds=2)
        assert caught.value.was_connected
        assert connect(server.address).wait(job.id).status is Status.STOPPED


@pytest.mark.parametrize("seconds", [1e12, math.inf])
def test_any_time(connect: Connect, server: Server, seconds: float) -> None:
    client = connect(server.address, timeout=seconds)
    assert client.run("echo", "done", timeout=seconds).output == b"done\n"
    job = client.create("sleep", "0.5")
    assert client.wait(job.id, timeout=seconds).status is Status.COMPLETED


def test_no_answer_in_time(connect: Connect, start_server: StartServer) -> None:
    address = start_server(STOP_GRACE="1").address
    client = connect(address)
    job = client.create("sh", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done")
    next(client.stream(job.id))  # from now on it does not mind
    with pytest.raises(DeadlineError):
        connect(address, timeout=0.3).stop(job.id)
    assert client.wait(job.id, timeout=20).status is Status.STOPPED


def test_readers_that_leave_are_forgotten_by_the_server(client: Client) -> None:
    """A connection has 2,000 streams: were they not given back, the next would wait for ever."""
    job = client.create("sh", "-c", "echo; exec sleep 60")
    for _ in range(2_001):
        stream: Any = client.stream(job.id)
        next(stream)
        stream.close()
    client.stop(job.id)


# Connecting


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As people make them with openssl: RSA, the server CN=localhost, no alternative names."""
    folder = tmp_path_factory.mktemp("by_hand")

    def openssl(words: str) -> None:
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)

    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca-cert.pem -subj /CN=CA")
    subjects = {"server": "/CN=localhost", "client": "/O=JobWorker/OU=admin/CN=admin-client"}
    for name, subject in subjects.items():
        openssl(f"req -newkey rsa:2048 -nodes -keyout {name}-key.pem -out r.csr -subj {subject}")
        signing = "-CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial"
        openssl(f"x509 -req -in r.csr {signing} -out {name}-cert.pem")
    return folder


def test_certificates_made_by_hand(connect: Connect, by_hand: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, by_hand)
    try:
        client = connect(server.address, certs=by_hand)
        assert client.info().identity == "admin-client"
        fresh = connect(server.address, certs=by_hand)
        assert output(fresh.stream(client.create("echo", "x").id)) == b"x\n"
        with pytest.raises(UnreachableError, match="not for 'job-worker'"):
            connect(server.address, certs=by_hand, server_name="job-worker").info()
    finally:
        server.stop()


def test_threads_that_find_the_name_together(by_hand: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, by_hand)
    roles: list[str] = []
    try:
        with Client(server.address, certs=by_hand) as client:
            threads = [
                threading.Thread(target=lambda: roles.append(client.info().role)) for _ in range(16)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        server.stop()
    assert roles == ["admin"] * 16


# Servers that speak only the old fields


def test_the_basics_with_an_old_server(connect: Connect, certificates: Path) -> None:
    with OldServer(certificates) as old:
        client = connect(old.address)
        job = client.create("sh", "-c", "echo out; echo err >&2; exit 3", max_cpu=50)
        assert job.id == 1
        ended = client.wait(job.id)
        assert (ended.status, ended.cause, ended.exit_code) == (Status.FAILED, Cause.EXITED, 3)
        assert abs(time.time() - ended.ended_ns / 1e9) < 60
        result = client.run("sh", "-c", "echo out; echo err >&2")
        assert result.output == b"out\nerr\n"
        with pytest.raises(UnsupportedError, match="apart"):
            _ = result.stdout
        assert [job.id for job in client.list()] == [2, 1]
        assert [job.id for job in client.list(limit=1)] == [2]
        assert [job.id for job in client.list(statuses=["FAILED"])] == [1]
        with pytest.raises(UnknownJobError):
            client.get(3)


def test_wait_for_and_stop_jobs_of_an_old_server(connect: Connect, certificates: Path) -> None:
    with OldServer(certificates) as old:
        client = connect(old.address)
        job = client.create("sleep", "0.7")
        assert client.wait(job.id).status is Status.COMPLETED
        asked = [rpc for rpc, _ in old.requests].count("GetJob")
        assert 2 <= asked <= 12
        job = client.create("sleep", "60")
        with pytest.raises(DeadlineError):
            client.wait(job.id, timeout=0.3)
        stopped = client.stop(job.id)
        assert (stopped.status, stopped.cause) == (Status.STOPPED, Cause.STOPPED)


def test_what_an_old_server_would_ignore_is_an_error(connect: Connect, certificates: Path) -> None:
    with OldServer(certificates) as old:
        client = connect(old.address)
        job = client.create("sleep", "60")
        refused: list[tuple[str, Callable[[], Any]]] = [
            ("environment", lambda: client.create("true", environment={"A": "b"})),
            ("name", lambda: client.create("true", name="x")),
            ("working_directory", lambda: client.create("true", working_directory="/usr")),
            ("stdin", lambda: client.create("true", stdin=b"x")),
            ("time_limit", lambda: client.create("true", time_limit=1)),
            ("user", lambda: client.create("true", user="nobody")),
            ("profile", lambda: client.run("true", profile="none")),
            ("network", lambda: client.run("true", network="none")),
            ("root", lambda: client.create("true", root="/srv")),
            ("read_only", lambda: client.create("true", read_only=True)),
            ("binds", lambda: client.create("true", binds=[Bind("/srv", "/mnt")])),
            ("DeleteJob", lambda: client.delete(job.id)),
            ("merge_output", lambda: client.run("true", merge_output=True)),
            ("signal", lambda: client.stop(job.id, signal=2)),
            ("grace_seconds", lambda: client.stop(job.id, grace_seconds=0)),
            ("follow", lambda: list(client.stream(job.id, follow=False))),
            ("STDERR", lambda: list(client.stream(job.id, stream=Stream.STDERR))),
            ("too old", lambda: list(client.list(name="x"))),
            ("GetServerInfo", client.info),
        ]
        before = len(old.requests)
        for word, call in refused:
            with pytest.raises(UnsupportedError, match=word):
                call()
        assert len(old.requests) == before
        assert client.get(job.id).status is Status.RUNNING


def test_create_many_with_an_old_server(connect: Connect, certificates: Path) -> None:
    """One by one; what it would ignore is an error of that one."""
    with OldServer(certificates) as old:
        client = connect(old.address)
        specs = [Spec("echo", "1"), Spec("true", name="x"), Spec("echo", "3", max_cpu=50)]
        first, second, third = client.create_many(specs)
        assert (first.job_id, second.job_id, third.job_id) == (1, None, 2)
        assert isinstance(second.error, UnsupportedError)
        assert "name" in str(second.error)
        assert [rpc for rpc, _ in old.requests] == ["CreateJob", "CreateJob"]
        assert output(client.stream(2)) == b"3\n"


def test_streams_of_an_old_server_resume(connect: Connect, certificates: Path) -> None:
    """It sends everything again, from the start."""
    program = (
        "import os, time\nfor i in range(40):\n os.write(1, os.urandom(10_000)); time.sleep(.02)\n"
    )
    breaks = iter([50_000, 90_000, 150_000, 200_000, 350_000])
    with OldServer(certificates) as old, Proxy(old.port, lambda: next(breaks, 1 << 60)) as proxy:
        client = connect(proxy.address)
        job = connect(old.address).create("python3", "-c", program)
        chunks = list(client.stream(job.id))
        assert proxy.broken == 5
        assert output(chunks) == old.jobs["1"].output
        assert chunks[-1].ending == client.get(job.id)
        assert chunks[-1].next_offset == 400_000
        places = [(chunk.offset, chunk.next_offset) for chunk in chunks]
        assert all(end == start for (_, end), (start, _) in pairwise(places))
        assert output(client.stream(job.id, from_offset=123_456)) == old.jobs["1"].output[123_456:]
        assert output(client.stream(job.id, from_offset=400_000)) == b""
        with pytest.raises(RejectedError, match="400000"):
            list(client.stream(job.id, from_offset=400_001))


def test_an_old_server_that_cuts_a_stream_off(connect: Connect, certificates: Path) -> None:
    """It ends as if complete, while the job goes on."""
    with OldServer(certificates) as old:
        client = connect(old.address)
        job = client.create("sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done")
        old.cut_off_after = 4
        stream = client.stream(job.id)
        chunks = [next(stream)]
        timer = threading.Timer(0.5, lambda: setattr(old, "cut_off_after", 1 << 60))
        timer.start()
        chunks += stream
        timer.join()
        assert output(chunks) == b"1\n2\n3\n4\n5\n6\n"


# Ctrl-C, and threads: Client alone


@pytest.mark.parametrize(
    "call", ["next(c.stream(int(sys.argv[3])))", "c.wait(int(sys.argv[3]))", "c.run('sleep', '61')"]
)
def test_ctrl_c(server: Server, call: str) -> None:
    program = (
        "import sys\nfrom jobworker import Client\n"
        "with Client(sys.argv[1], certs=sys.argv[2]) as c:\n"
        f" print('ready', flush=True)\n {call}\n"
    )
    with Client(server.address, certs=server.certs) as client:
        job = client.create("sleep", "60")
        process = subprocess.Popen(
            [sys.executable, "-c", program, server.address, server.certs, str(job.id)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.5)  # until the call is under way, which nothing tells
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, log = process.communicate(timeout=20)
        assert time.monotonic() - sent < 3
        assert b"KeyboardInterrupt" in log
        assert process.returncode == -signal.SIGINT
        client.stop(job.id)
        running = [job for job in client.list(limit=20) if job.spec.args == ("61",)]
        assert all(job.status is Status.STOPPED for job in running)


def test_close_from_another_thread_ends_a_stream(server: Server) -> None:
    client = Client(server.address, certs=server.certs)
    job = client.create("sleep", "60")
    timer = threading.Timer(0.3, client.close)
    timer.start()
    with pytest.raises(CallError):
        next(client.stream(job.id))
    timer.join()
    with Client(server.address, certs=server.certs) as other:
        other.stop(job.id)


def test_a_run_that_is_interrupted_while_its_job_is_created_leaves_none(
    server: Server, tmp_path: Path
) -> None:
    environment = {"PATH": slow_path(tmp_path / "links")}

    def run_and_interrupt(client: Client) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        client.run("sleep", "60", name="interrupted", environment=environment)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with Client(server.address, certs=server.certs) as client:
            client.info()
            for _ in range(5):
                with pytest.raises(KeyboardInterrupt):
                    run_and_interrupt(client)
            time.sleep(0.5)  # for what the server has begun without the client
            # On a busy machine one may be interrupted before it has asked for its job.
            assert {job.status for job in client.list(name="interrupted")} == {Status.STOPPED}
    finally:
        signal.signal(signal.SIGALRM, before)


def test_importing_the_client_is_quick() -> None:
    """The command line answers in 0.3 s, all in all."""
    program = "import sys; from jobworker.client import Client; print(*sys.modules)"
    times, modules = [], set()
    for _ in range(3):
        started = time.monotonic()
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        times.append(time.monotonic() - started)
        modules = set(answer.stdout.split())
    ours = {name for name in modules if name.startswith("jobworker.") and name.count(".") == 1}
    assert ours == {f"jobworker.{name}" for name in ("client", "dev", "errors", "job", "pb")}
    assert not {"cryptography", "click", "uvloop", "sqlite3"} & modules
    assert min(times) < 1


# The page about it


def test_the_examples_of_the_page(server: Server, tmp_path: Path) -> None:
    os.symlink(server.certs, tmp_path / "certs")
    text = PAGE.read_text().replace("localhost:50051", server.address)
    examples = "\n\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert examples.count(">>>") > 10
    test = doctest.DocTestParser().get_doctest(examples, {}, "sdk.md", str(PAGE), 0)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    finally:
        os.chdir(before)
    assert failed == 0
