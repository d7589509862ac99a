"""Clients that want all of the server for themselves: what they get, and that others do not
notice. How fast others are meanwhile is a question of the benchmarks."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from functional.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    SETTINGS,
    WINDOW_UPDATE,
    connect,
    field,
    frame,
    headers_of,
    message_of,
    receive_until,
    request_of,
    reset_of,
)
from functional.server import DEADLINE_SECONDS, Client, Server, channel, slow_path, wait_until
from jobworker import certs
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc.convert import LARGEST_CREATE_BYTES
from jobworker.rpc.gate import MOST_CREATED, MOST_LARGE
from slow_links import slow_way

MEBIBYTE = 1 << 20

StartServer = Callable[..., Server]


@pytest.fixture
def mallory(certificates: Path) -> str:
    """Another client, with all that it may."""
    if not (certificates / "mallory-cert.pem").exists():
        certs.make_client(certificates, "mallory", "admin")
    return "mallory"


def others_work(server: Server) -> None:
    """What others do meanwhile."""
    with server.connect() as client:
        _, output = client.run("echo still here")
        assert output == b"still here\n"


def seconds_of_get(client: Client, job_id: str) -> float:
    asked = time.monotonic()
    client.get(job_id)
    return time.monotonic() - asked


def is_reachable(server: Server) -> bool:
    """In the moment in which many come at once, there is no room for one that comes then."""
    try:
        with server.connect() as client:
            return bool(client.info().version)
    except grpc.RpcError:
        return False


# Connections


@pytest.mark.parametrize("kind", ["silent", "TLS"])
def test_connections_without_end(start_server: StartServer, mallory: str, kind: str) -> None:
    server = start_server(CONNECTIONS="200")
    with contextlib.ExitStack() as closing, server.connect() as client:
        job = client.create("sleep", "60")
        stream = client.stream(job.id)
        for _ in range(1000):
            if kind == "silent":
                address = ("127.0.0.1", server.port)
                opened: socket.socket = socket.create_connection(address, timeout=10)
            else:
                with contextlib.suppress(OSError):
                    opened = connect(server, mallory)
                    opened.sendall(request_of("GetServerInfo", 1))
            closing.enter_context(opened)
        wait_until(lambda: server.connections() <= 200)
        wait_until(lambda: is_reachable(server))
        others_work(server)
        # A connection with a call never gives way.
        client.stop(job.id)
        assert [chunk.ending.status for chunk in stream][-1] == "STOPPED"
    assert "ended" in server.log


def test_there_are_never_more_connections(start_server: StartServer, mallory: str) -> None:
    """Also where all have a call; one client has at most half of them."""
    server = start_server(CONNECTIONS="4")
    with contextlib.ExitStack() as closing:
        streams = []
        for name in ("client", "client", mallory, mallory):
            client = closing.enter_context(server.connect(name))
            streams.append(client.stream(client.create("sleep", "60").id))
            wait_until(lambda: server.connections() == len(streams))
        with server.connect("viewer") as viewer, pytest.raises(grpc.RpcError) as caught:
            viewer.info()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        closing.close()
        wait_until(lambda: is_reachable(server))


def test_a_client_gets_half_of_the_connections(start_server: StartServer, mallory: str) -> None:
    server = start_server(CONNECTIONS="10")
    with contextlib.ExitStack() as closing:
        job = closing.enter_context(server.connect(mallory)).create("sleep", "60")
        clients = [closing.enter_context(server.connect(mallory)) for _ in range(6)]
        streams: Any = [client.stream(job.id) for client in clients]
        wait_until(lambda: sum(stream.done() for stream in streams) == 1)
        (refused,) = (stream for stream in streams if stream.done())
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "client_connections" in refused.details()


def test_who_says_nothing_is_not_waited_for(start_server: StartServer) -> None:
    server = start_server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_SECONDS) as silent:
        assert silent.recv(1) == b""


def test_connections_leave_the_jobs_their_descriptors(
    start_server: StartServer, mallory: str
) -> None:
    server = start_server(open_files=400)
    with contextlib.ExitStack() as closing, server.connect() as client:
        client.info()
        for _ in range(500):
            opened = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            closing.enter_context(opened)
        wait_until(lambda: is_reachable(server))
        for _ in range(client.info().maximum_jobs):
            assert client.create("sleep", "60").status == "RUNNING"
        assert "Too many open files" not in server.log


# Calls


def test_streams_without_end(start_server: StartServer, mallory: str) -> None:
    server = start_server(CLIENT_STREAMS="50")
    with server.connect(mallory) as client:
        job = client.shell("head -c 8000000 /dev/zero; sleep 60")
        streams: Any = [client.stream(job.id) for _ in range(400)]
        wait_until(lambda: sum(stream.done() for stream in streams) == 350)
        codes = Counter(stream.code() for stream in streams if stream.done())
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED: 350}
        refused = next(stream for stream in streams if stream.done())
        assert "client_streams" in refused.details()
        others_work(server)
        for stream in streams:
            stream.cancel()
        # What is free again may be used again.
        wait_until(lambda: may_stream(client, job.id))


def may_stream(client: Client, job_id: str) -> bool:
    try:
        return bool(next(client.stream(job_id)).payload)
    except grpc.RpcError:
        return False


# Nothing is in memory, and each read takes as long as with a disk that turns.
SLOW_DISK = """
import time
from jobworker import _fastio

read_message = _fastio.read_message

def read_slowly(*what):
    time.sleep(0.01)
    return read_message(*what)

_fastio.read_cached = lambda *what: None
_fastio.read_message = read_slowly
"""


@pytest.fixture
def on_slow_disk(start_server: StartServer, tmp_path: Path) -> Server:
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    return start_server(launcher=("env", f"PYTHONPATH={tmp_path}"))


def test_streams_of_old_output_on_a_slow_disk(on_slow_disk: Server, mallory: str) -> None:
    """Each at another place: another's, of 30 messages, is read in between."""
    with on_slow_disk.connect(mallory) as client, on_slow_disk.connect() as other:
        old, _ = client.run("head -c 40000000 /dev/zero")
        others, _ = other.run("head -c 1000000 /dev/zero")
        opened: Any = [
            client.stream(old.id, from_offset=number * 100_000, timeout=300)
            for number in range(300)
        ]
        next(opened[-1])
        began = time.monotonic()
        assert len(other.output(others.id)) == 1_000_000
        assert time.monotonic() - began < 5  # beside what is read of 300 others it takes 45 s
        for each in opened:
            each.cancel()


def test_streams_of_old_output_that_are_given_up(on_slow_disk: Server, mallory: str) -> None:
    """One after the other, while the disk is asked for each: nobody waits for that."""
    with on_slow_disk.connect(mallory) as client, on_slow_disk.connect() as other:
        old, _ = client.run("head -c 40000000 /dev/zero")
        others, _ = other.run("head -c 100000 /dev/zero")
        for number in range(1000):
            given_up = client.stream(old.id, from_offset=number * 30_000)
            time.sleep(0.002)
            given_up.cancel()
        began = time.monotonic()
        assert len(other.output(others.id)) == 100_000
        assert time.monotonic() - began < 1  # behind all that was begun it takes 3 s


def test_ten_thousand_streams_that_read_nothing(start_server: StartServer, mallory: str) -> None:
    server = start_server()
    with server.connect(mallory) as client:
        job = client.shell("head -c 8000000 /dev/zero; sleep 60")
        before = server.rss_bytes()
        streams: Any = [client.stream(job.id, timeout=300) for _ in range(10_000)]
        wait_until(lambda: any(stream.done() for stream in streams))  # the limit is reached
        others_work(server)
        assert server.rss_bytes() - before < 400 * MEBIBYTE
        for stream in streams:
            stream.cancel()


def test_calls_without_end(start_server: StartServer, mallory: str) -> None:
    server = start_server(CLIENT_CALLS="20")
    with server.connect(mallory) as client:
        job = client.shell("trap '' TERM; echo up; while :; do sleep 1; done")
        next(client.stream(job.id))  # from now on it does not mind
        calls = [client.stop_soon(job.id) for _ in range(100)]
        wait_until(lambda: sum(call.done() for call in calls) == 80)
        codes = {call.exception().code() for call in calls if call.done()}
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        others_work(server)
        for call in calls:
            call.cancel()


def test_large_calls_without_end(start_server: StartServer, mallory: str) -> None:
    server = start_server()

    def are_refused(client: Client) -> bool:
        try:
            client.jobs()
        except grpc.RpcError as error:
            return f"has {MOST_LARGE} calls with large messages" in str(error.details())
        return False

    with connect(server, mallory) as hostile, server.connect(mallory) as client:
        for number in range(1, 2 * MOST_LARGE, 2):  # whose requests never come
            hostile.sendall(frame(HEADERS, END_HEADERS, number, headers_of("GetJobs")))
        wait_until(lambda: are_refused(client))
        assert client.info().identity == mallory
        others_work(server)


def test_requests_that_never_come(start_server: StartServer, mallory: str) -> None:
    """Each of these calls says that 4 MiB follow."""
    server = start_server()
    with connect(server, mallory) as hostile:
        before = server.rss_bytes()
        for number in range(1, 2000, 2):
            begin = b"\0" + struct.pack(">I", 4 * MEBIBYTE) + b"x" * 10
            hostile.sendall(
                frame(HEADERS, END_HEADERS, number, headers_of("CreateJob"))
                + frame(DATA, 0, number, begin)
            )
        others_work(server)
        assert server.rss_bytes() - before < 150 * MEBIBYTE
        # So few of a client's requests are received at once that another of its own waits.
        with server.connect(mallory) as client:
            call: Any = client.stream("1", timeout=1)
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


class Obedient:
    """Sends all that the server's windows have room for, and answers its pings: for who does, gRPC
    may open the windows further."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self.connection = connection
        self.connection.settimeout(1)
        self.unread = b""
        self.initial_window = self.window = 65_535  # until the server says otherwise
        self.windows: dict[int, int] = {}
        self.sent: Counter[int] = Counter()  # of data, by stream

    def open(self, rpc: str, stream: int, message: bytes) -> None:
        self.connection.sendall(frame(HEADERS, END_HEADERS, stream, headers_of(rpc)))
        self.windows[stream] = self.initial_window
        self.send(stream, message)

    def send(self, stream: int, data: bytes) -> None:
        """As much of it as there is room for now."""
        while part := data[: max(0, min(self.window, self.windows[stream], 1 << 14))]:
            self.connection.sendall(frame(DATA, 0, stream, part))
            data = data[len(part) :]
            self.window -= len(part)
            self.windows[stream] -= len(part)
            self.sent[stream] += len(part)

    def listen(self) -> bool:
        """Takes what the server has sent; False: nothing for a second."""
        try:
            self.unread += self.connection.recv(1 << 16)
        except TimeoutError:
            return False
        # A shorter one is more than there is, whatever its length says.
        while len(self.unread) >= (end := 9 + int.from_bytes(self.unread[:3])):
            kind, flags = self.unread[3:5]
            self._take(kind, flags, int.from_bytes(self.unread[5:9]), self.unread[9:end])
            self.unread = self.unread[end:]
        return True

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == PING and not flags & ACK:
            self.connection.sendall(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and stream == 0:
            self.window += int.from_bytes(payload)
        elif kind == WINDOW_UPDATE:
            self.windows[stream] += int.from_bytes(payload)
        elif kind == SETTINGS and not flags & ACK:
            self.connection.sendall(frame(SETTINGS, ACK, 0, b""))
            for name, value in struct.iter_unpack(">HI", payload):
                if name == INITIAL_WINDOW_SIZE:
                    for each in self.windows:
                        self.windows[each] += value - self.initial_window
                    self.initial_window = value


def test_what_is_sent_ahead_waits_with_the_client(start_server: StartServer, mallory: str) -> None:
    """Of each stream nobody reads more than the request: 64 KiB of the rest may come."""
    server = start_server()
    with server.connect() as client:
        job = client.create("sleep", "60")
    request = message_of(pb.GetJobsStreamReq(id=job.id).SerializeToString())
    with connect(server, mallory) as connection:
        hostile = Obedient(connection)
        for number in range(1, 200, 2):
            hostile.open("GetJobsStream", number, request)
        while hostile.listen():
            for number in hostile.windows:
                hostile.send(number, bytes(MEBIBYTE))
        others_work(server)
        assert max(hostile.sent.values()) < 256 << 10


def test_answers_that_are_not_taken(start_server: StartServer, mallory: str) -> None:
    """The client's window is closed: each answer of some MiB has to wait in the server."""
    server = start_server()
    with server.connect() as client:
        big = pb.CreateJobReq(command="true", args=["x" * 1000] * 100)
        client.call("CreateJobs", pb.CreateJobsReq(jobs=[big] * 35))
    with connect(server, mallory, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)) as hostile:
        before = server.rss_bytes()
        for number in range(1, 1000, 2):
            hostile.sendall(request_of("GetJobs", number))
        others_work(server)
        assert server.rss_bytes() - before < 400 * MEBIBYTE


def test_many_answers_that_are_not_taken(start_server: StartServer, mallory: str) -> None:
    """Each of half a MiB, as of a job with long arguments."""
    server = start_server()
    with server.connect(mallory) as client, server.connect() as other:
        job = client.create("true", *["x" * 100_000] * 5)
        request = pb.GetJobReq(id=job.id).SerializeToString()
        with connect(server, mallory, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)) as hostile:
            before = server.rss_bytes()
            for number in range(1, 1001, 2):
                hostile.sendall(request_of("GetJob", number, request))
            wait_until(lambda: is_refused(client, job.id))
            assert server.rss_bytes() - before < 150 * MEBIBYTE
            assert other.get(job.id).id == job.id
            others_work(server)
        wait_until(lambda: not is_refused(client, job.id))


def is_refused(client: Client, job_id: str) -> bool:
    try:
        client.get(job_id)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
        return "answers that this client has not taken" in str(error.details())
    return False


def test_endings_that_are_not_taken(start_server: StartServer, mallory: str) -> None:
    """Each of half a MiB: the last message of a stream has the job."""
    server = start_server()
    with server.connect(mallory) as client, server.connect() as other:
        job = client.create("true", *["x" * 100_000] * 5)
        client.wait(job.id)
        request = pb.GetJobsStreamReq(id=job.id).SerializeToString()
        with connect(server, mallory, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)) as hostile:
            before = server.rss_bytes()
            for number in range(1, 801, 2):
                hostile.sendall(request_of("GetJobsStream", number, request))
            late = client.stream(job.id)
            # Who takes them gets all, however many.
            streams = [other.stream(job.id) for _ in range(100)]
            assert {chunk.ending.id for stream in streams for chunk in stream} == {job.id}
            others_work(server)
            assert server.rss_bytes() - before < 250 * MEBIBYTE
        # They wait for the same client's only, and not for ever.
        assert next(late).ending.id == job.id


@pytest.mark.parametrize("how", ["they run", "they are refused", "they do not start"])
def test_what_creates_took_is_given_back(
    start_server: StartServer, mallory: str, tmp_path: Path, how: str
) -> None:
    """At once: the collector, which counts no strings, comes after hundreds of jobs."""
    server = start_server()
    arguments = [f"{number:08}" for number in range(30_000)]  # 2 MiB
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)

    def create() -> None:
        if how == "they run":
            # Not in the first folder of the PATH.
            client.wait(client.create("true", *arguments).id)
        elif how == "they do not start":
            assert client.create(str(script), *arguments).failed_step == "exec"
        else:
            with pytest.raises(grpc.RpcError) as caught:
                client.create("passwd", *arguments, environment={"PATH": "/etc"})
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    with server.connect(mallory) as client:
        for _ in range(10):
            create()
        before = server.rss_bytes()
        for _ in range(50):
            create()
        assert server.rss_bytes() - before < 50 * MEBIBYTE


def test_large_requests_one_after_the_other(start_server: StartServer, mallory: str) -> None:
    """Others have their time in between also where a client has one call at a time."""
    server = start_server()
    arguments, others = [""] * 57_000, 0
    with server.connect(mallory) as client, server.connect() as other:
        one_by_one = threading.Thread(target=create_refused, args=(client, 15, arguments))
        one_by_one.start()
        while one_by_one.is_alive():
            other.info()
            others += 1
    assert others > 3 * 15


def create_refused(client: Client, count: int, arguments: list[str]) -> None:
    for _ in range(count):
        with contextlib.suppress(grpc.RpcError):
            client.create("true", *arguments, timeout_milliseconds=1 << 62)


def test_many_jobs_that_are_refused(start_server: StartServer, mallory: str) -> None:
    """Nothing is waited for, and others have their turns in between all the same."""
    server = start_server()
    refused = pb.CreateJobReq(command="true", timeout_milliseconds=1 << 62)
    request, others = pb.CreateJobsReq(jobs=[refused] * 1000).SerializeToString(), 0
    with channel(server.address, server.certs, mallory) as opened, server.connect() as other:
        other.info()
        method: Any = opened.unary_unary("/job_worker.JobService/CreateJobs")
        calls = [method.future(request, timeout=DEADLINE_SECONDS) for _ in range(8)]
        while not all(call.done() for call in calls):
            other.info()
            others += 1
    for call in calls:
        results = pb.CreateJobsRes.FromString(call.result()).results
        assert {result.code for result in results} == {grpc.StatusCode.INVALID_ARGUMENT.value[0]}
    assert others > 5 * len(calls)


def test_large_jobs_that_are_read_after_they_have_ended(
    start_server: StartServer, mallory: str
) -> None:
    """What they were asked for is not kept until their output has been taken."""
    server = start_server()
    arguments = [f"{number:08}" for number in range(28_000)]  # 2 MiB
    with (
        server.connect(mallory) as client,
        connect(server, mallory, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)) as hostile,
    ):

        def create_and_read(count: int) -> None:
            for _ in range(count):
                job = client.create("sh", "-c", "sleep 0.5; echo hi", *arguments)
                request = pb.GetJobsStreamReq(id=job.id).SerializeToString()
                hostile.sendall(request_of("GetJobsStream", next(streams), request))
            wait_until(lambda: not client.info().running_jobs)

        streams = itertools.count(1, 2)
        create_and_read(10)
        before = server.rss_bytes()
        create_and_read(60)
        assert server.rss_bytes() - before < 60 * MEBIBYTE


# Of which each costs far more as an object than on the wire.
MANY_VARIABLES = {f"{number:x}": "" for number in range(9_000)}


def test_many_endings_of_a_job_with_many_variables(start_server: StartServer, mallory: str) -> None:
    """Not all are in memory at once, whoever takes them how fast."""
    server = start_server()
    with server.connect(mallory) as client:
        job = client.create("true", environment=MANY_VARIABLES)
        client.wait(job.id)
        before = server.rss_bytes()
        streams = [client.stream(job.id) for _ in range(400)]
        sizes = {len(chunk.ending.environment) for stream in streams for chunk in stream}
        assert sizes == {len(MANY_VARIABLES)}
        assert server.peak_bytes() - before < 100 * MEBIBYTE


def test_many_lists_of_jobs_with_many_variables(start_server: StartServer, mallory: str) -> None:
    """They are made one after the other, and others have their turn in between."""
    server = start_server()
    request = pb.ListJobsReq(page_size=1000).SerializeToString()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        jobs = [client.create("true", environment=MANY_VARIABLES) for _ in range(30)]
        client.wait(jobs[-1].id)
        small = client.create("true")
        before = server.rss_bytes()
        method: Any = opened.unary_unary("/job_worker.JobService/ListJobs")
        began = time.monotonic()
        lists = [method.future(request, timeout=DEADLINE_SECONDS) for _ in range(16)]
        time.sleep(0.2)
        took = seconds_of_get(client, small.id)
        answers = [pb.ListJobsRes.FromString(call.result()) for call in lists]
        assert took < (time.monotonic() - began) / 10
        assert {len(answer.jobs) for answer in answers} == {31}
        assert server.peak_bytes() - before < 100 * MEBIBYTE


@pytest.mark.parametrize("rpc", ["StopJob", "GetJobsStream"])
def test_many_calls_about_a_large_job(start_server: StartServer, mallory: str, rpc: str) -> None:
    """Few look at its record at once, and others in between."""
    server = start_server()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        # 3 MB in the record.
        job, small = client.create("true", *["\1" * 127_000] * 4), client.create("true")
        client.wait(job.id)
        client.wait(small.id)
        method: Any = opened.unary_stream(f"/job_worker.JobService/{rpc}")
        request = pb.GetJobReq(id=job.id).SerializeToString()  # as that of either
        calls = [method(request, timeout=DEADLINE_SECONDS) for _ in range(300)]
        time.sleep(0.3)
        assert seconds_of_get(client, small.id) < 1
        for call in calls:
            call.cancel()


def test_stops_of_large_jobs_that_do_not_mind(start_server: StartServer, mallory: str) -> None:
    """What says nothing new is not written again."""
    server = start_server()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        script = 'trap "echo no" TERM; echo up; while :; do sleep 0.05; done'
        large = ["\1" * 127_000] * 4  # 3 MB in the record
        jobs = [client.create("sh", "-c", script, *large).id for _ in range(4)]
        method: Any = opened.unary_unary("/job_worker.JobService/StopJob")
        stops = [pb.StopJobReq(id=each, grace_milliseconds=600_000) for each in jobs]
        # So that each has its trap.
        for each in jobs:
            wait_until(partial(has_told_more, client, each, 0))
        written, calls = [], []
        for _ in range(8):
            told = [client.get(each).stdout_bytes for each in jobs]
            written.append(server.written_bytes())
            calls += [method.future(each.SerializeToString(), timeout=60) for each in stops]
            for each, before in zip(jobs, told, strict=True):
                wait_until(partial(has_told_more, client, each, before))
        # Once from the WAL into the database; with each round it would be 84 MiB.
        assert written[-1] - written[1] < 30 * MEBIBYTE
        for each in jobs:
            client.stop(each, grace_milliseconds=0)
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}


def has_told_more(client: Client, job_id: str, than: int) -> bool:
    return client.get(job_id).stdout_bytes > than


@pytest.mark.parametrize("seconds", ["0", "60"])
def test_many_calls_about_a_job_with_many_variables(
    start_server: StartServer, mallory: str, seconds: str
) -> None:
    """They are read and shown one after the other, and others in between: also where the job runs,
    so that nothing has to be read."""
    server = start_server()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        job = client.create("sleep", seconds, environment=MANY_VARIABLES)
        small = client.create("true")
        client.wait(small.id)
        if seconds == "0":
            client.wait(job.id)
        method: Any = opened.unary_unary("/job_worker.JobService/GetJob")
        request = pb.GetJobReq(id=job.id).SerializeToString()
        began = time.monotonic()
        calls = [method.future(request, timeout=DEADLINE_SECONDS) for _ in range(400)]
        time.sleep(0.3)
        took = seconds_of_get(client, small.id)
        assert all(call.code() for call in calls)
        assert took < (time.monotonic() - began) / 5


def test_bulks_of_what_is_refused(server: Server, mallory: str) -> None:
    """One after the other: what was asked for is not kept with what was wrong with it."""
    job = pb.CreateJobReq(command="no-such-command", args=["x" * 100_000] * 5)
    bulk = pb.CreateJobsReq(jobs=[job] * 7)
    with server.connect(mallory) as client:
        client.call("CreateJobs", bulk)
        before = server.rss_bytes()
        for _ in range(40):
            client.call("CreateJobs", bulk)
    assert server.rss_bytes() - before < 100 * MEBIBYTE


def test_refusals_that_are_not_taken(start_server: StartServer, mallory: str) -> None:
    """Each is in memory until then. Anybody with a certificate may be refused, and call what
    nobody serves."""
    server = start_server(CLIENT_CALLS="20")

    def holds_no_more() -> bool:
        """Of the connection the socket."""
        before = server.unsent_bytes()
        time.sleep(1)
        return MEBIBYTE < before == server.unsent_bytes()

    with server.connect() as client:
        big = pb.CreateJobReq(command="true", args=["x" * 1000] * 100)
        client.call("CreateJobs", pb.CreateJobsReq(jobs=[big] * 38))
    window = struct.pack(">HI", INITIAL_WINDOW_SIZE, MEBIBYTE << 4)
    with connect(server, mallory, window) as hostile:
        hostile.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MEBIBYTE << 6)))
        for number in range(1, 25, 2):  # more than the sockets hold
            hostile.sendall(request_of("GetJobs", number))
        wait_until(holds_no_more)
        for number in range(25, 225, 2):
            headers = headers_of("GetJobs").replace(b"Service", b"Nothing")
            hostile.sendall(frame(HEADERS, END_HEADERS | END_STREAM, number, headers))
        wait_until(lambda: "do not take answers" in server.log)
        wait_until(lambda: server.connections() == 0)


# Headers, messages, pings


def test_a_header_that_never_ends(start_server: StartServer, mallory: str) -> None:
    server = start_server()
    with connect(server, mallory) as hostile:
        before = server.rss_bytes()
        hostile.sendall(frame(HEADERS, 0, 1, headers_of("GetJob")))
        with contextlib.suppress(OSError):  # it may be cut off for it
            for _ in range(20_000):
                hostile.sendall(frame(CONTINUATION, 0, 1, field("a" * 50, "b" * 100)))
        others_work(server)
        assert server.rss_bytes() - before < 50 * MEBIBYTE


def test_what_a_client_sends_does_not_come_back_at_any_length(server: Server, mallory: str) -> None:
    """Its own limit on headers would refuse an error with all of it."""
    calls: list[tuple[grpc.StatusCode, Callable[[], object]]]
    long = "\N{SNOWMAN}" * 500_000
    with server.connect(mallory) as client:
        calls = [
            (grpc.StatusCode.NOT_FOUND, lambda: client.get(long[:20_000])),
            (grpc.StatusCode.INVALID_ARGUMENT, lambda: client.create(long)),
            (grpc.StatusCode.INVALID_ARGUMENT, lambda: client.create("true", profile=long)),
        ]
        for code, call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is code
        result = client.call("CreateJobs", pb.CreateJobsReq(jobs=[pb.CreateJobReq(command=long)]))
        assert len(result.results[0].error) < 1000


LARGEST_BYTES = 4 * MEBIBYTE - 100
ARGS = "\x12\0" * (LARGEST_BYTES // 2 - 4)
MANY_FIELDS = {
    "binds": ("CreateJob", b"\x8a\x01\0" * (LARGEST_CREATE_BYTES // 3)),
    "jobs": ("CreateJobs", b"\x0a\0" * (LARGEST_BYTES // 2)),
    "a job of many": ("CreateJobs", pb.GetJobReq(id=ARGS).SerializeToString()),  # field 1, too
}


@pytest.mark.parametrize("kind", MANY_FIELDS)
def test_requests_of_very_many_fields(start_server: StartServer, mallory: str, kind: str) -> None:
    """Some KiB on the wire, 4 MiB as a message, and some hundred as objects."""
    server = start_server()
    rpc, request = MANY_FIELDS[kind]
    with channel(server.address, server.certs, mallory) as opened:
        method: Any = opened.unary_unary(f"/job_worker.JobService/{rpc}")
        before = server.rss_bytes()
        calls = [
            method.future(
                request,
                compression=grpc.Compression.Gzip,
                timeout=DEADLINE_SECONDS,
            )
            for _ in range(8)
        ]
        assert {call.code() for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}
        assert server.rss_bytes() - before < 60 * MEBIBYTE
    assert "fields" in calls[0].details()


VARIABLES = {f"{number:x}": "" for number in range(38_000)}
OF_MANY_VARIABLES = pb.CreateJobReq(command="true", environment=VARIABLES).SerializeToString()
MANY_ARGS = pb.CreateJobReq(command="true", args=[""] * 32_000, working_directory="/none")
# These take some time to read, and the last, which is not that large, to be looked at.
MANY_STRINGS = {
    "variables": (150, OF_MANY_VARIABLES),
    "what cannot be parsed": (150, OF_MANY_VARIABLES + b"\x0a"),
    "args": (500, MANY_ARGS.SerializeToString()),
}


@pytest.mark.parametrize("kind", MANY_STRINGS)
def test_many_requests_of_very_many_strings(
    start_server: StartServer, mallory: str, kind: str
) -> None:
    """Others come in between, though all of these came before them; and few are in memory."""
    server = start_server()
    count, request = MANY_STRINGS[kind]
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        job = client.create("true")
        before = server.rss_bytes()
        method: Any = opened.unary_unary("/job_worker.JobService/CreateJob")
        calls = [method.future(request, timeout=DEADLINE_SECONDS) for _ in range(count)]
        wait_until(calls[0].done)
        assert seconds_of_get(client, job.id) < 1.5
        assert sum(call.done() for call in calls) < count * 2 / 3
        assert server.rss_bytes() - before < 250 * MEBIBYTE
        for call in calls:
            call.cancel()


def padded(request: pb.CreateJobReq, size: int) -> bytes:
    """With a field that the server does not know."""
    data = request.SerializeToString() + b"\xfa\x3e"
    missing = size - len(data) - 4
    lengths = (missing & 0x7F | 0x80, missing >> 7 & 0x7F | 0x80, missing >> 14 & 0x7F | 0x80, 0)
    return data + bytes(lengths) + bytes(missing)


def test_commands_that_are_looked_for_slowly(
    start_server: StartServer, mallory: str, tmp_path: Path
) -> None:
    """In a PATH through as many links as the kernel follows; of which there are hundreds."""
    path = ":".join([slow_way(tmp_path / "links")] * 99)
    slow = pb.CreateJobReq(command="x", environment={"PATH": path})
    server = start_server()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        method: Any = opened.unary_unary("/job_worker.JobService/CreateJobs")
        began = time.monotonic()
        request = pb.CreateJobsReq(jobs=[slow] * 100).SerializeToString()
        creates = method.future(request, timeout=DEADLINE_SECONDS)
        time.sleep(0.2)
        asked = time.monotonic()
        assert client.create("true", environment={"PATH": "/bin"}).status == "RUNNING"
        took = time.monotonic() - asked
        assert creates.code() is grpc.StatusCode.OK
        assert took < (time.monotonic() - began) / 3


def test_many_commands_that_are_looked_for_slowly(
    start_server: StartServer, mallory: str, tmp_path: Path
) -> None:
    """In as many calls as a client may have, all the time: all of its looks at once would keep the
    processors from the loop, which takes a turn for each call that comes."""
    path = slow_path(tmp_path / "links")
    request = pb.CreateJobReq(command="x", environment={"PATH": path}).SerializeToString()
    server = start_server()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        job = client.create("true")
        method: Any = opened.unary_unary("/job_worker.JobService/CreateJob")
        answered: list[None] = []
        is_over = False

        def send(_: object = None) -> None:
            answered.append(None)
            if not is_over:
                method.future(request, timeout=DEADLINE_SECONDS).add_done_callback(send)

        for _ in range(500):
            send()
        wait_until(lambda: len(answered) > 700)
        # Another test may have the processors meanwhile.
        wait_until(lambda: sum(seconds_of_get(client, job.id) for _ in range(10)) < 2)
        is_over = True


def test_commands_that_are_found_slowly(
    start_server: StartServer, mallory: str, tmp_path: Path
) -> None:
    """By a path through as many links, where no disk is to be asked."""
    way = slow_way(tmp_path / "links")
    slow = pb.CreateJobReq(command=f"{way}/x", working_directory=way)
    request = pb.CreateJobsReq(jobs=[slow] * 64).SerializeToString()
    server = start_server()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        method: Any = opened.unary_unary("/job_worker.JobService/CreateJobs")
        began = time.monotonic()
        creates = [method.future(request, timeout=DEADLINE_SECONDS) for _ in range(4)]
        time.sleep(0.2)
        asked = time.monotonic()
        assert client.create("true").status == "RUNNING"
        took = time.monotonic() - asked
        assert {each.code() for each in creates} == {grpc.StatusCode.OK}
        assert took < (time.monotonic() - began) / 3


def test_bulks_that_leave_others_their_turn(start_server: StartServer, mallory: str) -> None:
    """However many there are: another's job waits for as many as one request makes at once."""
    server = start_server()
    request = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command="/bin/true")] * 100)
    with channel(server.address, server.certs, mallory) as opened, server.connect() as other:
        method: Any = opened.unary_unary("/job_worker.JobService/CreateJobs")
        os.kill(server.jobinit_pid(), signal.SIGSTOP)
        try:
            data = request.SerializeToString()
            calls = [method.future(data, timeout=DEADLINE_SECONDS) for _ in range(5)]
            with contextlib.suppress(AssertionError):  # so many should not come
                wait_until(lambda: other.info().running_jobs > MOST_CREATED, seconds=3)
            assert other.info().running_jobs == MOST_CREATED
        finally:
            os.kill(server.jobinit_pid(), signal.SIGCONT)
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}


def test_creates_of_large_requests(start_server: StartServer, mallory: str) -> None:
    """All at once, while none of the jobs can be made: of few the request is in memory."""
    server = start_server()
    request = pb.CreateJobReq(command="true", stdin=bytes(MEBIBYTE))
    largest = padded(request, LARGEST_CREATE_BYTES)
    with channel(server.address, server.certs, mallory) as opened, server.connect() as other:
        create: Any = opened.unary_unary("/job_worker.JobService/CreateJob")
        before = server.rss_bytes()
        os.kill(server.jobinit_pid(), signal.SIGSTOP)
        try:
            calls = [create.future(largest, timeout=DEADLINE_SECONDS) for _ in range(150)]
            with contextlib.suppress(AssertionError):  # so many should not come
                wait_until(lambda: other.info().running_jobs > 100, seconds=3)
            assert server.rss_bytes() - before < 350 * MEBIBYTE
        finally:
            os.kill(server.jobinit_pid(), signal.SIGCONT)
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}


def test_what_large_jobs_took_is_given_back(start_server: StartServer, mallory: str) -> None:
    """Once they have ended: their records are on the disk."""
    server = start_server()
    # Each of its characters takes six in the record.
    job = pb.CreateJobReq(command="/bin/true", args=["\1" * 100_000] * 4)
    request = pb.CreateJobsReq(jobs=[job] * 9).SerializeToString()
    with channel(server.address, server.certs, mallory) as opened, server.connect() as client:
        method: Any = opened.unary_unary("/job_worker.JobService/CreateJobs")
        before = server.rss_bytes()
        for _ in range(2):
            calls = [method.future(request, timeout=DEADLINE_SECONDS) for _ in range(10)]
            assert {call.code() for call in calls} == {grpc.StatusCode.OK}
        wait_until(lambda: not client.info().running_jobs)
        wait_until(lambda: server.rss_bytes() - before < 250 * MEBIBYTE)


def test_creates_that_are_larger_than_any_is_valid(server: Server, mallory: str) -> None:
    request = pb.CreateJobReq(command="true")
    with channel(server.address, server.certs, mallory) as opened:
        create: Any = opened.unary_unary("/job_worker.JobService/CreateJob")
        create(padded(request, LARGEST_CREATE_BYTES), timeout=DEADLINE_SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            create(padded(request, LARGEST_CREATE_BYTES + 1), timeout=DEADLINE_SECONDS)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(LARGEST_CREATE_BYTES) in str(caught.value.details())


def test_requests_that_are_refused_are_not_kept(start_server: StartServer, mallory: str) -> None:
    server = start_server()
    with server.connect(mallory) as client:
        before = server.rss_bytes()
        for _ in range(100):
            with pytest.raises(grpc.RpcError, match="stdin"):
                client.create("true", stdin=bytes(3 * MEBIBYTE))
        assert server.rss_bytes() - before < 60 * MEBIBYTE


@pytest.mark.parametrize(
    "method", ["job_worker.JobService/GetJobsStream", "grpc.health.v1.Health/Watch"]
)
def test_requests_that_last_are_small(server: Server, mallory: str, method: str) -> None:
    """They are in memory as long as the stream."""
    with channel(server.address, server.certs, mallory) as opened:
        call: Any = opened.unary_stream(f"/{method}")
        request = pb.GetJobsStreamReq(id="x" * 100_000).SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            next(call(request, timeout=DEADLINE_SECONDS))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("size", [20_000, 1 << 16, 1 << 20])
def test_large_metadata(server: Server, mallory: str, size: int) -> None:
    with channel(server.address, server.certs, mallory) as opened:
        call: Any = opened.unary_unary("/job_worker.JobService/GetJobs")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", metadata=(("x", "y" * size),), timeout=DEADLINE_SECONDS)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(b"", metadata=(("x", "y" * 4000),), timeout=DEADLINE_SECONDS) is not None


def test_large_headers_of_who_acknowledges_no_settings(
    start_server: StartServer, mallory: str
) -> None:
    """Of whom gRPC does not bound them: each byte refers to a header that was sent before."""
    server = start_server()
    before = server.rss_bytes()
    headers = headers_of("GetServerInfo")
    large = headers + b"\xbe" * 24_000
    with connect(server, mallory) as hostile:
        hostile.settimeout(1)
        first = headers + b"\x40\3x-a\1a"
        hostile.sendall(frame(HEADERS, END_HEADERS | END_STREAM, 1, first))
        with contextlib.suppress(OSError):
            for number in range(3, 303, 2):
                hostile.sendall(
                    frame(HEADERS, END_STREAM, number, large[:16_000])
                    + frame(CONTINUATION, END_HEADERS, number, large[16_000:])
                )
        wait_until(lambda: "too large headers" in server.log)
        others_work(server)
    assert server.rss_bytes() - before < 200 * MEBIBYTE


def test_large_headers_are_hardly_said(start_server: StartServer, mallory: str) -> None:
    """Anybody with a certificate could fill the disk with lines."""
    server = start_server()
    headers = headers_of("GetServerInfo")
    large = headers + b"\xbe" * 24_000
    for _ in range(30):
        with connect(server, mallory) as hostile, contextlib.suppress(OSError):
            hostile.sendall(
                frame(HEADERS, END_HEADERS | END_STREAM, 1, headers + b"\x40\3x-a\1a")
                + frame(HEADERS, END_STREAM, 3, large[:16_000])
                + frame(CONTINUATION, END_HEADERS, 3, large[16_000:])
            )
            while hostile.recv(65536):
                pass
    wait_until(lambda: "too large headers" in server.log)
    assert server.log.count("too large headers") < 10


def test_large_headers_of_many_connections(start_server: StartServer, mallory: str) -> None:
    """To find each, the server goes through all that it has open, in threads which stops need."""
    server = start_server()
    large = headers_of("GetServerInfo") + field("x", "y" * 100) * 150
    request = frame(HEADERS, END_STREAM, 1, large[:16_000])
    request += frame(CONTINUATION, END_HEADERS, 1, large[16_000:])
    sleeper = pb.CreateJobReq(command="sleep", args=["60"])
    with contextlib.ExitStack() as closing, server.connect() as client:
        client.call("CreateJobs", pb.CreateJobsReq(jobs=[sleeper] * 500))
        job = client.create("sleep", "60")
        hostile = [closing.enter_context(connect(server, mallory)) for _ in range(400)]
        for each in hostile:
            each.sendall(request)
        asked = time.monotonic()
        client.stop(job.id, grace_milliseconds=0)
        assert time.monotonic() - asked < 2  # 3 s on a quiet machine, where each is looked for
        wait_until(lambda: server.connections() <= 1)
        others_work(server)


def test_what_a_flood_of_calls_took_is_given_back(start_server: StartServer, mallory: str) -> None:
    """Given up at once, each with headers of 8 KiB: they wait until the server comes to them."""
    server = start_server()
    before = server.rss_bytes()
    headers = headers_of("GetServerInfo")
    with contextlib.ExitStack() as closing:
        hostile = [closing.enter_context(connect(server, mallory)) for _ in range(8)]
        for connection in hostile:
            first = headers + b"\x40\3x-a\1a"
            connection.sendall(
                frame(SETTINGS, ACK, 0, b"")
                + frame(HEADERS, END_HEADERS | END_STREAM, 1, first)
                + reset_of(1)
            )
        numbers = range(3, 4003, 2)
        calls = [
            frame(HEADERS, END_HEADERS | END_STREAM, number, headers + b"\xbe" * 200)
            for number in numbers
        ]
        for connection in hostile:
            connection.sendall(b"".join(calls))
            connection.sendall(b"".join(map(reset_of, numbers)))
        wait_until(lambda: server.rss_bytes() - before > 200 * MEBIBYTE)
        others_work(server)
    wait_until(lambda: server.rss_bytes() - before < 100 * MEBIBYTE)


def test_bytes_that_are_no_text_are_hardly_said(start_server: StartServer, mallory: str) -> None:
    """Anybody with a certificate could fill the disk with lines, and say anything in them."""
    server = start_server()
    others_work(server)
    before = len(server.log)
    path = b"/job_worker.JobService/\xff\nforged"
    headers = (
        headers_of("GetServerInfo").replace(
            field(":path", "/job_worker.JobService/GetServerInfo"),
            b"\0\5:path" + bytes([len(path)]) + path,
        )
        + b"\0\1x\x78"
        + b"\xff" * 120
    )
    with connect(server, mallory) as hostile:
        for number in range(1, 400, 2):
            hostile.sendall(
                frame(HEADERS, END_HEADERS, number, headers)
                + frame(DATA, END_STREAM, number, bytes(5))
            )
        wait_until(lambda: "forged" in server.log)
        others_work(server)
    assert len(server.log) - before < 3000
    assert "\nforged" not in server.log


@pytest.mark.parametrize("rpc", ["GetJobsStream", "GetJob"])
def test_who_goes_before_the_answer_is_hardly_said(
    start_server: StartServer, mallory: str, rpc: str
) -> None:
    """Its window is closed, so what is sent waits in the server: to where nobody is, then."""
    server = start_server()
    with server.connect(mallory) as client:
        job = client.shell("head -c 200000 /dev/zero; sleep 60")
        next(client.stream(job.id))
    before = len(server.log)
    request = pb.GetJobReq(id=job.id).SerializeToString()  # the same bytes for both
    for _ in range(5):
        with connect(server, mallory, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)) as hostile:
            hostile.settimeout(1)
            numbers = range(1, 201, 2)
            hostile.sendall(b"".join(request_of(rpc, number, request) for number in numbers))
            with contextlib.suppress(TimeoutError):  # until all are begun
                while hostile.recv(1 << 16):
                    pass
            hostile.sendall(b"".join(map(reset_of, numbers)))
            others_work(server)
    wait_until(lambda: server.connections() == 0)
    assert "Traceback" not in server.log
    assert len(server.log) - before < 3000


def test_pings_without_end(server: Server, mallory: str) -> None:
    with connect(server, mallory) as hostile, pytest.raises(OSError):  # noqa: PT012
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            hostile.sendall(frame(PING, 0, 0, b"12345678"))
            time.sleep(0.01)


def test_a_watch_that_takes_nothing(start_server: StartServer, mallory: str) -> None:
    """Others have their answers, and the server ends as if it were not there."""
    server = start_server(STOP_GRACE="20")
    call = b"".join(
        [
            frame(HEADERS, END_HEADERS, 1, headers_of("Watch", "grpc.health.v1.Health")),
            frame(DATA, END_STREAM, 1, message_of(b"")),
        ]
    )
    with (
        connect(server, mallory, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)) as hostile,
        channel(server.address, server.certs, "client") as opened,
    ):
        hostile.sendall(call + request_of("GetServerInfo", 3))
        receive_until(hostile, b"content-type")
        watch: Any = opened.unary_stream("/grpc.health.v1.Health/Watch")
        assert next(watch(b"", timeout=5))
        others_work(server)
        server.process.terminate()
        server.process.wait(10)


def test_other_services_have_the_same_limits(start_server: StartServer, mallory: str) -> None:
    """Anybody with a certificate may call these."""
    server = start_server(CLIENT_STREAMS="5")
    with channel(server.address, server.certs, mallory) as opened:
        watch: Any = opened.unary_stream("/grpc.health.v1.Health/Watch")
        streams: Any = [watch(b"", timeout=DEADLINE_SECONDS) for _ in range(20)]
        wait_until(lambda: sum(stream.done() for stream in streams) == 15)
        codes = {stream.code() for stream in streams if stream.done()}
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for stream in streams:
            stream.cancel()
