"""GetJobsStream: every reader gets every byte, in one order, and the stream ends in time."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from functional.server import Client, Server, wait_until
from jobworker.pb import job_worker_pb2 as pb

# Writes `sys.argv[1]` random bytes to both streams in pieces of random sizes and at random
# moments, and the digest of all in the file `sys.argv[2]`.
NOISE = """
import hashlib, os, random, sys, time
size, path = int(sys.argv[1]), sys.argv[2]
digests = {1: hashlib.sha256(), 2: hashlib.sha256()}
while size:
    piece = os.urandom(min(size, random.choice((1, 10, 100, 5000, 70000))))
    size -= len(piece)
    stream = random.choice((1, 2))
    digests[stream].update(piece)
    while piece:
        piece = piece[os.write(stream, piece):]
    if random.random() < 0.1:
        time.sleep(random.random() / 100)
with open(path, "w") as file:
    file.write(digests[1].hexdigest() + " " + digests[2].hexdigest())
"""


def split(chunks: Iterator[pb.DataChunk]) -> tuple[bytes, bytes, bytes]:
    """(all, stdout, stderr)."""
    both = bytearray()
    apart = {pb.STDOUT: bytearray(), pb.STDERR: bytearray()}
    for chunk in chunks:
        assert chunk.offset == len(both)
        both += chunk.payload
        assert chunk.next_offset == len(both)
        place = 0
        for run in chunk.runs:
            apart[run.stream] += chunk.payload[place : place + run.length]
            place += run.length
        assert place == len(chunk.payload)
    return bytes(both), bytes(apart[pb.STDOUT]), bytes(apart[pb.STDERR])


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_live_stream_is_live(client: Client) -> None:
    job = client.shell("echo first; sleep 0.5; echo second")
    stream = client.stream(job.id)
    assert next(stream).payload == b"first\n"
    assert client.get(job.id).status == "RUNNING"
    assert b"".join(chunk.payload for chunk in stream) == b"second\n"


def test_a_late_reader_gets_everything(client: Client) -> None:
    job, output = client.run("seq 100000")
    assert output == client.output(job.id) == b"".join(b"%d\n" % i for i in range(1, 100_001))


def test_binary(client: Client, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "data").write_bytes(data)
    assert client.run(f"cat {tmp_path}/data")[1] == data


def test_the_last_chunk_has_the_ending_and_no_payload(client: Client) -> None:
    job = client.shell("echo x; exit 3")
    *chunks, last = client.stream(job.id)
    assert not any(chunk.HasField("ending") for chunk in chunks)
    assert last.payload == b""
    assert (last.ending.status, last.ending.exitCode) == ("FAILED", 3)
    assert last.ending == client.get(job.id)


def test_no_output(client: Client) -> None:
    job = client.create("true")
    (last,) = client.stream(job.id)
    assert last.ending.status == "COMPLETED"


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 100_000, 588_894, 588_895])
def test_from_offset_continues_exactly(client: Client, offset: int) -> None:
    job, whole = client.run("seq 100000")
    assert len(whole) == 588_895
    assert client.output(job.id, from_offset=offset) == whole[offset:]


def test_a_stream_that_there_is_not(client: Client) -> None:
    job = client.create("sleep", "100")
    with pytest.raises(grpc.RpcError) as caught:
        client.output(job.id, stream=3)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    client.stop(job.id)


def test_from_an_offset_behind_the_end(client: Client) -> None:
    job, output = client.run("echo hello")
    with pytest.raises(grpc.RpcError) as caught:
        client.output(job.id, from_offset=len(output) + 1)
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert "6" in (caught.value.details() or "")


def test_no_follow_ends_at_what_is_there(client: Client) -> None:
    job = client.shell("echo here; sleep 60")
    next(client.stream(job.id))
    chunks = list(client.stream(job.id, no_follow=True))
    assert b"".join(chunk.payload for chunk in chunks) == b"here\n"
    assert not chunks[-1].HasField("ending")
    client.stop(job.id, grace_milliseconds=0)


@pytest.mark.parametrize("stream", [pb.ALL, pb.STDERR])
def test_no_follow_has_no_ending_where_more_was_written_since(
    client: Client, tmp_path: Path, stream: int
) -> None:
    """Who asks again and again until there is an ending misses nothing."""
    flag = tmp_path / "flag"
    script = f"head -c 20000000 /dev/zero; until [ -e {flag} ]; do sleep 0.05; done; echo rest"
    job = client.shell(f"exec >&2; {script}")
    wait_until(lambda: client.get(job.id).stderr_bytes == 20_000_000)
    slow = client.stream(job.id, no_follow=True, stream=stream)
    offset = next(slow).next_offset
    flag.touch()
    client.wait(job.id)
    *_, last = slow
    assert last.next_offset == 20_000_000 > offset
    assert not last.HasField("ending")
    rest = list(client.stream(job.id, no_follow=True, stream=stream, from_offset=last.next_offset))
    assert b"".join(chunk.payload for chunk in rest) == b"rest\n"
    assert rest[-1].ending.status == "COMPLETED"


def test_one_stream_alone(client: Client) -> None:
    script = "for i in $(seq 50); do echo out $i; echo err $i >&2; done"
    job, _ = client.run(script)
    out, err = ("".join(f"{word} {i}\n" for i in range(1, 51)) for word in ("out", "err"))
    assert client.output(job.id, stream=pb.STDOUT).decode() == out
    assert client.output(job.id, stream=pb.STDERR).decode() == err
    ended = client.get(job.id)
    assert (ended.stdout_bytes, ended.stderr_bytes) == (len(out), len(err))


def test_resuming_one_stream_by_next_offset(client: Client) -> None:
    job, _ = client.run("for i in $(seq 50); do echo out $i; echo err $i >&2; done")
    whole = client.output(job.id, stream=pb.STDERR)
    first = next(client.stream(job.id, stream=pb.STDERR))
    rest = client.output(job.id, stream=pb.STDERR, from_offset=first.next_offset)
    assert first.payload + rest == whole


def test_times_are_those_of_the_job(client: Client) -> None:
    job = client.shell("echo a; sleep 0.4; echo b")
    runs = [run for chunk in client.stream(job.id) for run in chunk.runs]
    assert job.start_time_ns - 20_000_000 <= runs[0].time_ns
    assert 0.3e9 <= runs[1].time_ns - runs[0].time_ns <= 5e9


@pytest.mark.parametrize(
    "script",
    ["sleep 60 & echo done", "setsid sleep 60 & echo done"],
    ids=["grandchild", "daemon"],
)
def test_what_holds_the_pipe_does_not_hold_up_the_end(
    start_server: Callable[..., Server], script: str
) -> None:
    server = start_server(LINGER="0.2")
    with server.connect() as client:
        started = time.monotonic()
        assert client.run(script)[1] == b"done\n"
        assert time.monotonic() - started < 10


def test_a_foreign_process_on_the_pipe_does_not_hold_up_the_end(client: Client) -> None:
    """The test itself opens the job's stdout, and keeps it open."""
    job = client.shell("echo $$; sleep 0.5; echo end")
    stream = client.stream(job.id)
    pid = int(next(stream).payload)
    with open(f"/proc/{pid}/fd/1", "wb", buffering=0) as held:
        held.write(b"foreign\n")
        rest = b"".join(chunk.payload for chunk in stream)
    assert rest == b"foreign\nend\n"


def test_an_unknown_job(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.output("123456789")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_an_old_client_sees_only_what_it_knows(client: Client) -> None:
    """Its DataChunk is `bytes payload = 1`, which stands first in each message."""
    job = client.shell("echo old; echo style >&2", merge_output=True)
    for chunk in client.stream(job.id):
        encoded = pb.DataChunk(payload=chunk.payload).SerializeToString()
        assert chunk.SerializeToString().startswith(encoded)


def test_no_chunk_is_larger_than_old_clients_take(client: Client) -> None:
    job = client.shell("head -c 30000000 /dev/zero")
    sizes = [chunk.ByteSize() for chunk in client.stream(job.id)]
    assert sum(sizes) > 30_000_000
    assert max(sizes) < 4 << 20


def test_a_slow_reader_loses_nothing_and_slows_nobody(client: Client) -> None:
    job = client.shell("head -c 50000000 /dev/urandom | tee /dev/stderr | sha256sum; exit 0")
    slow = client.stream(job.id, stream=pb.STDERR)
    first = next(slow)
    ended = client.wait(job.id)
    assert ended.status == "COMPLETED"
    received = first.payload + b"".join(chunk.payload for chunk in slow)
    expected = client.output(job.id, stream=pb.STDOUT).split()[0].decode()
    assert digest(received) == expected


def test_100_jobs_with_an_early_a_slow_and_a_late_reader_each(
    server: Server, tmp_path: Path
) -> None:
    jobs: list[tuple[str, Path]] = []
    failures: list[str] = []
    expected_size = 300_000

    def check(kind: str, job_id: str, path: Path, chunks: Iterator[pb.DataChunk]) -> None:
        both, out, err = split(chunks)
        wrote = path.read_text().split()
        if len(both) != expected_size or [digest(out), digest(err)] != wrote:
            failures.append(f"{kind} reader of job {job_id}")

    def read(kind: str, job_id: str, path: Path) -> None:
        with server.connect() as client:
            stream = client.stream(job_id)
            check(kind, job_id, path, slowly(stream) if kind == "slow" else stream)

    def slowly(stream: Iterator[pb.DataChunk]) -> Iterator[pb.DataChunk]:
        for number, chunk in enumerate(stream):
            if number < 20:
                time.sleep(0.02)
            yield chunk

    threads = []
    with server.connect() as client:
        for number in range(100):
            path = tmp_path / f"digests.{number}"
            job = client.create("python3", "-c", NOISE, str(expected_size), str(path))
            jobs.append((job.id, path))
            for kind in ("early", "slow"):
                threads.append(threading.Thread(target=read, args=(kind, job.id, path)))
                threads[-1].start()
        for thread in threads:
            thread.join()
        for job_id, path in jobs:
            check("late", job_id, path, client.stream(job_id))
    assert failures == []


@pytest.mark.parametrize("reader", ["none", "fast", "sleeping"])
def test_2_gib_of_output_stay_out_of_memory(
    start_server: Callable[..., Server], reader: str
) -> None:
    size = 2 << 30
    server = start_server()
    with server.connect() as client:
        client.run("head -c 10000000 /dev/zero")  # all that is made once is made
        before = server.rss_bytes()
        job = client.shell(f"head -c {size} /dev/zero")
        stream = client.stream(job.id, timeout=300)
        peak = before
        if reader == "sleeping":
            next(stream)
        if reader == "fast":
            for number, _ in enumerate(stream):
                if number % 100 == 0:
                    peak = max(peak, server.rss_bytes())
        else:
            while client.get(job.id).status == "RUNNING":
                peak = max(peak, server.rss_bytes())
                time.sleep(0.05)
        stream.cancel()
        assert client.get(job.id).stdout_bytes == size
        assert peak - before <= 64 << 20
    (server.state / "output").rename(server.state / "gone")
    for path in (server.state / "gone").iterdir():
        os.unlink(path)


def test_200_readers_of_one_job(client: Client) -> None:
    job = client.shell("sleep 1; seq 10000; sleep 0.5; seq 10000")
    outputs: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: outputs.append(client.output(job.id))) for _ in range(90)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = b"".join(b"%d\n" % i for i in range(1, 10_001)) * 2
    assert len(outputs) == 90
    assert all(output == expected for output in outputs)


def test_a_reader_that_goes_away_is_forgotten(server: Server, client: Client) -> None:
    job = client.shell("while :; do echo x; sleep 0.01; done")
    before = server.descriptors()
    for _ in itertools.repeat(None, 30):
        with server.connect() as other:
            next(other.stream(job.id))
    client.stop(job.id, grace_milliseconds=0)
    deadline = time.monotonic() + 10
    while server.descriptors() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_damaged_output_is_said_to_be_so(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with server.connect() as client:
        job, _ = client.run("head -c 50000 /dev/zero")
        index = server.state / "output" / f"{job.id}.0.idx"
        index.write_bytes(b"no index" * 10)
        with pytest.raises(grpc.RpcError) as caught:
            client.output(job.id)
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        assert f"{job.id}.0" in str(caught.value.details())
