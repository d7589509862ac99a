"""A full disk: jobs wait or lose output, as configured; nothing else is lost, and all goes on
when there is room."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from functional.server import Client, Server
from jobworker.engine.cgroup import Cgroup
from jobworker.pb import job_worker_pb2 as pb

MIB = 1 << 20
DISK_BYTES = 8 * MIB
OPTIONS = f"size={DISK_BYTES},nr_inodes=500"
# In a mount namespace of its own; a pipe end of the server's is all that is seen of it outside.
MOUNT = f'mkdir -p "$0" && mount -t tmpfs -o {OPTIONS} tmpfs "$0" && exec "$@"'
SIZE = 20 * MIB
WRITE = f"head -c {SIZE} /dev/zero; echo end >&2"


@pytest.fixture
def start_on_small_disk(
    start_server: Callable[..., Server], tmp_path: Path
) -> Callable[..., Server]:
    def start(**settings: str) -> Server:
        launcher = ["unshare", "--mount", "sh", "-c", MOUNT, str(tmp_path / "state")]
        return start_server(launcher=launcher, **settings)

    return start


@pytest.fixture
def start_on_disk_that_stays(
    start_server: Callable[..., Server], tmp_path: Path
) -> Iterator[Callable[..., Server]]:
    """The next server finds what the one before it left."""
    mount = ["unshare", "--mount", "sh", "-c", MOUNT, str(tmp_path / "state")]
    command = [*mount, "sh", "-c", "echo mounted; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdout
        assert keeper.stdout.readline() == b"mounted\n"
        launcher = ["nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt"]
        yield lambda **settings: start_server(launcher=launcher, **settings)


def fill(server: Server) -> Path:
    """To the last byte."""
    filler = state_of(server) / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def fill_with_files(server: Server) -> Path:
    """Until it takes no more, though there is room."""
    folder = state_of(server) / "files"
    folder.mkdir()
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (folder / str(number)).touch()
    return folder


def state_of(server: Server) -> Path:
    """As the server sees it."""
    return Path(f"/proc/{server.process.pid}/root{server.state}")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def bytes_of(job: pb.Job) -> tuple[int, int]:
    return job.stdout_bytes, job.stderr_bytes


def read_all(client: Client, job_id: str) -> tuple[int, int, int]:
    """Bytes of stdout, of stderr, and lost ones."""
    counts = {pb.STDOUT: 0, pb.STDERR: 0}
    lost = 0
    for chunk in client.stream(job_id):
        lost += chunk.lost_bytes
        for run in chunk.runs:
            counts[run.stream] += run.length
    return counts[pb.STDOUT], counts[pb.STDERR], lost


def test_jobs_wait_for_room_and_lose_nothing(start_on_small_disk: Callable[..., Server]) -> None:
    server = start_on_small_disk(DISK_RESERVE=str(MIB), LOG_MAX_BYTES=str(64 * MIB))
    filler = state_of(server) / "filler"
    filler.write_bytes(bytes(6 * MIB))
    with server.connect() as client:
        job = client.shell(f"head -c {4 * MIB} /dev/zero; echo end >&2")
        wait_for(lambda: "No space left" in client.get(job.id).output_problem)
        assert client.info().blocked_jobs == 1
        for _ in range(20):  # until there is room
            assert client.get(job.id).output_problem
            time.sleep(0.02)
        with pytest.raises(grpc.RpcError) as caught:
            client.create("true")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.get(job.id).status == "RUNNING"
        filler.unlink()
        ended = client.wait(job.id)
        assert (ended.exitCode, ended.lost_bytes, ended.output_problem) == (0, 0, "")
        assert client.info().blocked_jobs == 0
        assert read_all(client, job.id) == (4 * MIB, 4, 0)
        assert client.create("true").id
    assert server.log.count("output cannot be written") == 1
    assert server.log.count("can be written again") == 1


def test_output_is_dropped_and_counted_where_that_is_wanted(
    start_on_small_disk: Callable[..., Server],
) -> None:
    server = start_on_small_disk(DISK_FULL="drop", DISK_RESERVE="0")
    filler = state_of(server) / "filler"
    filler.write_bytes(bytes(4 * MIB))
    with server.connect() as client:
        job = client.shell(f"{WRITE}; sleep 60")
        wait_for(lambda: bytes_of(client.get(job.id)) == (SIZE, 4))
        filler.unlink()
        client.stop(job.id, grace_milliseconds=0)
        ended = client.get(job.id)
        out, err, lost = read_all(client, job.id)
        assert lost == ended.lost_bytes > 0
        assert out + err + lost == ended.stdout_bytes + ended.stderr_bytes == SIZE + 4


def test_an_ending_waits_for_room(start_on_small_disk: Callable[..., Server]) -> None:
    """The record of it cannot be stored: it is tried again until it can."""
    server = start_on_small_disk(DISK_RESERVE="0")
    filler = state_of(server) / "filler"
    with server.connect() as client:
        job = client.shell("while ! [ -e /proc/1/nothing ]; do sleep 0.1; done")
        with pytest.raises(OSError):
            filler.write_bytes(bytes(DISK_BYTES))
        stopper = threading.Thread(target=client.stop, args=[job.id])
        stopper.start()
        wait_for(lambda: "waits to be stored" in server.log)
        assert client.get(job.id).cause == pb.STOPPED
        filler.unlink()
        stopper.join()
        assert client.wait(job.id).cause == pb.STOPPED


def test_the_server_ends_though_a_job_cannot(start_on_small_disk: Callable[..., Server]) -> None:
    """What it was to stop waits for room with its output; the next server goes on with it."""
    server = start_on_small_disk(DISK_RESERVE="0", STOP_GRACE="0.5")
    with server.connect() as client:
        job = client.shell(f"{WRITE}; sleep 60")
        wait_for(lambda: "No space left" in client.get(job.id).output_problem)
        jobinit, cgroup = server.jobinit_pid(), client.info().cgroup
    assert server.stop() == 0
    assert "left to the next server" in server.log
    # There is no next one: the disk has gone with this one.
    os.kill(jobinit, signal.SIGKILL)
    if cgroup:
        Cgroup(Path(cgroup)).kill()
        Cgroup(Path(cgroup)).remove()


def test_a_server_starts_on_a_full_disk(start_on_disk_that_stays: Callable[..., Server]) -> None:
    """Jobs have ended meanwhile, and what frees the disk may be to delete some."""
    server = start_on_disk_that_stays(STOP_JOBS="no")
    with server.connect() as client:
        job = client.shell("while ! [ -e /proc/1/nothing ]; do sleep 0.1; done")
        client.wait(client.create("true").id)  # so that there is a WAL
        fill(server)
        server.stop(signal.SIGKILL)
    server = start_on_disk_that_stays(STOP_JOBS="no")
    with server.connect() as client:
        assert client.get(job.id).status == "RUNNING"
        (state_of(server) / "filler").unlink()
        client.stop(job.id)


def test_a_disk_is_full_that_takes_no_more_files(
    start_on_disk_that_stays: Callable[..., Server],
) -> None:
    server = start_on_disk_that_stays(STOP_JOBS="no")
    with server.connect() as client:
        job = client.shell("trap 'exit 5' TERM; echo ready; while sleep 0.05; do :; done")
        next(client.stream(job.id))
        fill_with_files(server)
        server.stop(signal.SIGKILL)
    server = start_on_disk_that_stays(STOP_JOBS="no", DISK_RESERVE="1")
    with server.connect() as client:
        with pytest.raises(grpc.RpcError, match="has 0 MiB left"):
            client.create("true")
        shutil.rmtree(state_of(server) / "files")
        client.stop(job.id)
        assert client.wait(job.id).exitCode == 5
        assert client.run("exit 3")[0].exitCode == 3


def test_to_delete_a_job_frees_a_full_disk(
    start_on_disk_that_stays: Callable[..., Server],
) -> None:
    """Even its record could not be deleted without the room that its output took."""
    server = start_on_disk_that_stays()
    with server.connect() as client:
        job, _ = client.run(f"head -c {MIB} /dev/zero")
        fill(server)
        with pytest.raises(grpc.RpcError, match="full"):
            client.create("true")
        client.call("DeleteJob", pb.DeleteJobReq(id=job.id))
        assert client.wait(client.create("true").id).exitCode == 0
        assert job.id not in [each.id for each in client.jobs()]


def test_a_job_is_deleted_though_its_files_cannot_be(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    """Its record is gone by then: the next start removes what is left."""
    output = tmp_path / "state/output"
    server = start_server(launcher=["unshare", "--mount", "sh", "-c", MOUNT, str(output)])
    with server.connect() as client:
        job, _ = client.run(f"head -c {MIB} /dev/zero")
        inside = ["nsenter", f"--mount=/proc/{server.process.pid}/ns/mnt"]
        subprocess.run([*inside, "mount", "-o", "remount,ro", output], check=True)
        client.call("DeleteJob", pb.DeleteJobReq(id=job.id))
        assert client.jobs() == []
        assert "files of deleted jobs stay until the next start: [Errno 30]" in server.log
        subprocess.run([*inside, "mount", "-o", "remount,rw", output], check=True)
