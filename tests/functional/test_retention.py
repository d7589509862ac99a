"""Quotas of output, and what becomes of ended jobs: packed, deleted, given way to newer ones."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from functional.server import Client, Server, wait_until
from jobworker import certs
from jobworker.pb import job_worker_pb2 as pb

StartServer = Callable[..., Server]


def files(server: Server) -> list[str]:
    return sorted(os.listdir(server.state / "output"))


def read(client: Client, job_id: str, **fields: int) -> tuple[bytes, int]:
    """All that is left, and how many bytes were said to be lost."""
    payload, lost = b"", 0
    for chunk in client.stream(job_id, **fields):
        payload += chunk.payload
        lost += chunk.lost_bytes
    return payload, lost


WRITE = "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); echo 123456789-$i; done"
WRITTEN = b"".join(b"123456789-%d\n" % i for i in range(1, 20_001))


def test_no_output_no_file(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as client:
        client.run("true")
    assert files(server) == []


def test_small_outputs_do_not_stay_files(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as client:
        jobs = [client.run(f"echo out {n}; echo err >&2")[0] for n in range(5)]
        large, _ = client.run("head -c 50000 /dev/zero")
        wait_until(lambda: files(server) == [f"{large.id}.0.idx", f"{large.id}.0.log"])
        for number, job in enumerate(jobs):
            out = client.output(job.id, stream=pb.STDOUT)
            assert out == b"out %d\n" % number
            assert client.output(job.id, stream=pb.STDERR) == b"err\n"
            assert client.output(job.id, from_offset=4) == client.output(job.id)[4:]
    server.stop()
    with start_server().connect() as client:
        assert client.output(jobs[0].id, stream=pb.STDOUT) == b"out 0\n"


def test_a_reader_goes_on_while_its_job_is_packed(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as client:
        job = client.shell("echo one; sleep 0.3; echo two")
        stream = client.stream(job.id)
        first = next(stream)
        time.sleep(1)  # it ends meanwhile, and could be packed
        rest = b"".join(chunk.payload for chunk in stream)
        assert first.payload + rest == b"one\ntwo\n"
        wait_until(lambda: files(server) == [])


def test_a_ring_keeps_the_newest(start_server: StartServer) -> None:
    with start_server(LOG_MAX_BYTES="100000", LOG_POLICY="ring").connect() as client:
        job, _ = client.run(WRITE)
        payload, lost = read(client, job.id)
        assert lost + len(payload) == len(WRITTEN)
        assert 20_000 < len(payload) <= 100_000
        assert payload == WRITTEN[lost:]
        ended = client.get(job.id)
        assert (ended.lost_bytes, ended.stdout_bytes) == (lost, len(WRITTEN))
        # Offsets are those of all that was written.
        assert read(client, job.id, from_offset=lost + 10) == (payload[10:], 0)


def test_head_keeps_the_first(start_server: StartServer) -> None:
    with start_server(LOG_MAX_BYTES="100000", LOG_POLICY="head").connect() as client:
        job, _ = client.run(WRITE)
        payload, lost = read(client, job.id)
        assert lost + len(payload) == len(WRITTEN)
        assert payload == WRITTEN[: len(payload)]
        assert client.get(job.id).cause == pb.EXITED


def test_stop_ends_the_job(start_server: StartServer) -> None:
    with start_server(LOG_MAX_BYTES="100000", LOG_POLICY="stop").connect() as client:
        job = client.shell("while :; do echo 123456789; done")
        ended = client.wait(job.id)
        assert (ended.status, ended.cause) == ("FAILED", pb.LOG_LIMIT)
        payload, _ = read(client, job.id)
        assert payload == (b"123456789\n" * 10_000)[: len(payload)]
        assert len(payload) > 50_000


def test_ended_jobs_give_way(start_server: StartServer) -> None:
    server = start_server(KEEP_JOBS="3")
    with server.connect() as client:
        ids = [client.run("head -c 20000 /dev/zero")[0].id for _ in range(8)]
        wait_until(lambda: len(client.jobs()) == 3)
        assert [job.id for job in client.jobs()] == ids[:-4:-1]
        wait_until(lambda: len(files(server)) == 6)
        with pytest.raises(grpc.RpcError) as caught:
            client.get(ids[0])
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert client.info().ended_jobs == 3


def test_what_ended_before_the_clock_was_set_back_gives_way_first(
    start_server: StartServer,
) -> None:
    server = start_server(KEEP_JOBS="3")
    with server.connect() as client:
        for _ in range(3):
            client.run("true")
    server.stop()
    with contextlib.closing(sqlite3.connect(server.state / "jobs.db")) as records:
        records.execute("UPDATE jobs SET ended_ns = ended_ns + 3600000000000")
        records.commit()
    with start_server(KEEP_JOBS="3").connect() as client:
        new = [client.run("true")[0].id for _ in range(3)]
        wait_until(lambda: len(client.jobs()) == 3)
        assert {job.id for job in client.jobs()} == set(new)


# To remove the files of a job takes as long as with a disk that turns.
SLOW_DISK = """
import time
from jobworker.engine.output import Output

delete = Output.delete

def delete_slowly(*what):
    time.sleep(0.1)
    delete(*what)

Output.delete = delete_slowly
"""


def start_on_slow_disk(start_server: StartServer, folder: Path, **settings: str) -> Server:
    (folder / "sitecustomize.py").write_text(SLOW_DISK)
    return start_server(launcher=("env", f"PYTHONPATH={folder}"), **settings)


def test_who_deletes_much_does_not_keep_the_oldest(
    start_server: StartServer, certificates: Path, tmp_path: Path
) -> None:
    certs.make_client(certificates, "deleting", "user")
    server = start_on_slow_disk(start_server, tmp_path, KEEP_BYTES="20000000")
    with server.connect("deleting") as client, server.connect() as other:
        client.run("head -c 50000 /dev/zero")
        oldest, _ = other.run("head -c 9000000 /dev/zero")
        spec = pb.CreateJobReq(command="head", args=["-c", "50000", "/dev/zero"])
        made = client.call("CreateJobs", pb.CreateJobsReq(jobs=[spec] * 200)).results
        for each in made:
            client.wait(each.id)
        deletes = [client.call_soon("DeleteJob", pb.DeleteJobReq(id=each.id)) for each in made]
        other.run("head -c 15000000 /dev/zero")
        wait_until(lambda: f"{oldest.id}.0.log" not in files(server))
        assert not deletes[-1].done()


def test_who_has_many_small_outputs_keeps_no_other_from_deleting(
    start_server: StartServer, certificates: Path, tmp_path: Path
) -> None:
    certs.make_client(certificates, "small", "user")
    server = start_on_slow_disk(start_server, tmp_path)
    with server.connect("small") as client, server.connect() as other:
        large, _ = other.run("head -c 50000 /dev/zero")
        spec = pb.CreateJobReq(command="echo", args=["out"])
        made = client.call("CreateJobs", pb.CreateJobsReq(jobs=[spec] * 200)).results
        client.wait(made[-1].id)
        before = len(files(server))
        other.call("DeleteJob", pb.DeleteJobReq(id=large.id))
        left = files(server)
        assert f"{large.id}.0.log" not in left
        assert len(left) > before - 60  # of 30 jobs


def test_no_room_no_job(start_server: StartServer) -> None:
    """What runs goes on."""
    with start_server(DISK_RESERVE="100TiB").connect() as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.create("true")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "reserve" in str(caught.value.details())
        assert client.info().disk_reserve_bytes == 100 << 40


def test_output_without_a_record_is_removed(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as client:
        job, _ = client.run("head -c 20000 /dev/zero")
    server.stop()
    for kind in ("log", "idx"):
        known = server.state / "output" / f"{job.id}.0.{kind}"
        Path(known.with_name(f"999.0.{kind}")).write_bytes(known.read_bytes())
    server = start_server()
    wait_until(lambda: files(server) == [f"{job.id}.0.idx", f"{job.id}.0.log"])
