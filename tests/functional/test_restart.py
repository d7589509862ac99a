"""A server may end in any way and at any time: its jobs go on, and the next one takes over."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest

from functional.server import Client, Server, wait_until
from jobinit_processes import jobs_of
from jobworker.daemon import JOBINIT
from jobworker.engine.jobinits import Jobinits
from jobworker.engine.store import Store
from jobworker.job import JobSpec, created
from jobworker.pb import job_worker_pb2 as pb

StartServer = Callable[..., Server]

# Numbered lines on both streams, until the file `sys.argv[1]` is there; the digest of each
# stream in the file `sys.argv[2]`.
NUMBERS = """
import hashlib, os, sys, time
digests = {1: hashlib.sha256(), 2: hashlib.sha256()}
number = 0
while not os.path.exists(sys.argv[1]):
    for stream in (1, 2, 2, 1):
        line = b"%d %d\\n" % (stream, number)
        digests[stream].update(line)
        while line:
            line = line[os.write(stream, line):]
        number += 1
    if number % 1000 == 0:
        time.sleep(0.002)
with open(sys.argv[2], "w") as file:
    file.write(digests[1].hexdigest() + " " + digests[2].hexdigest())
sys.exit(7)
"""


@pytest.fixture(params=[signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def restart(request: pytest.FixtureRequest, start_server: StartServer) -> Callable[[], Server]:
    """Ends the server in one way or the other, and starts the next."""
    servers: list[Server] = []

    def start_next() -> Server:
        if servers:
            servers[-1].stop(request.param)
        servers.append(start_server(STOP_JOBS="no"))
        return servers[-1]

    return start_next


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def release(path: Path) -> None:
    path.touch()


def test_a_running_job_runs_on(restart: Callable[[], Server], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with restart().connect() as client:
        job = client.shell(f"echo before; while ! [ -e {gate} ]; do sleep 0.05; done; exit 3")
        next(client.stream(job.id))
    with restart().connect() as client:
        again = client.get(job.id)
        assert again == job or again.stdout_bytes == 7
        assert again.status == "RUNNING"
        release(gate)
        ended = client.wait(job.id)
        assert (ended.status, ended.cause, ended.exitCode) == ("FAILED", pb.EXITED, 3)
        assert client.output(job.id) == b"before\n"


def test_one_damaged_index_keeps_no_other_job_from_going_on(
    start_server: StartServer, tmp_path: Path
) -> None:
    """As after a power loss: a block of zeros. The files are set aside, and it is said."""
    gate, server = tmp_path / "gate", start_server(STOP_JOBS="no")
    with server.connect() as client:
        script = f"echo before; while ! [ -e {gate} ]; do sleep 0.05; done; echo after; exit 3"
        damaged, sound = (client.shell(script).id for _ in range(2))
        for job_id in (damaged, sound):
            next(client.stream(job_id))
    server.stop(signal.SIGKILL)
    output = server.state / "output"
    index = output / f"{damaged}.0.idx"
    index.write_bytes(bytes(index.stat().st_size))
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        release(gate)
        assert [client.wait(job_id).exitCode for job_id in (damaged, sound)] == [3, 3]
        assert client.output(sound) == b"before\nafter\n"
        assert client.output(damaged) == b"after\n"
    assert (output / f"{damaged}.0.log.damaged").read_bytes() == b"before\n"
    assert (output / f"{damaged}.0.idx.damaged").exists()
    assert f"the output of job {damaged} is damaged" in server.log


def test_what_ends_meanwhile_is_known_exactly(
    restart: Callable[[], Server], start_server: StartServer, tmp_path: Path
) -> None:
    scripts = {
        "exit 0": ("COMPLETED", 0, 0),
        "exit 42": ("FAILED", 42, 0),
        "kill -SEGV $$": ("FAILED", -1, signal.SIGSEGV),
    }
    gate, server = tmp_path / "gate", restart()
    with server.connect() as client:
        jobs = {
            client.shell(f"while ! [ -e {gate} ]; do sleep 0.02; done; echo end; {script}").id: want
            for script, want in scripts.items()
        }
        pids = [int(client.output(client.shell("echo $PPID").id))]
    server.stop(signal.SIGKILL)
    opened_ns = time.time_ns()
    release(gate)
    wait_for_no_children(pids[0])
    ended_ns = time.time_ns()
    time.sleep(0.1)
    with restart().connect() as client:
        for job_id, (status, code, number) in jobs.items():
            ended = client.wait(job_id)
            assert (ended.status, ended.exitCode, ended.signal) == (status, code, number)
            assert opened_ns <= ended.end_time_ns <= ended_ns
            assert client.output(job_id) == b"end\n"


def test_a_time_limit_goes_on_from_the_start_of_the_job(restart: Callable[[], Server]) -> None:
    with restart().connect() as client:
        over = client.create("sleep", "60", timeout_milliseconds=1000)
        running = client.create("sleep", "60", timeout_milliseconds=60_000)
    server = restart()
    with server.connect() as client:
        ended = client.wait(over.id)
        assert (ended.status, ended.cause) == ("FAILED", pb.TIMED_OUT)
        assert 1.0 <= (ended.end_time_ns - over.start_time_ns) / 1e9 < 10
        assert client.get(running.id).status == "RUNNING"
        client.stop(running.id)


def test_a_time_limit_goes_on_where_the_name_of_the_process_is_no_text(
    restart: Callable[[], Server],
) -> None:
    with restart().connect() as client:
        script = r"printf '\377) Z' > /proc/$$/comm && echo named && sleep 60"
        job = client.shell(script, timeout_milliseconds=1000)
        assert next(client.stream(job.id)).payload == b"named\n"
    with restart().connect() as client:
        assert client.wait(job.id).cause == pb.TIMED_OUT


def wait_for_no_children(pid: int) -> None:
    """Until all jobs of this jobinit are reaped."""
    deadline = time.monotonic() + 30
    while jobs_of(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_gone(server: Server) -> None:
    """Until the server has noticed that its jobinit is."""
    deadline = time.monotonic() + 30
    while "is gone" not in server.log:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_output_is_exact_over_many_kills(start_server: StartServer, tmp_path: Path) -> None:
    """And so it is for a reader that resumes by offset each time."""
    gate, digests = tmp_path / "gate", tmp_path / "digests"
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        job = client.create("python3", "-c", NUMBERS, str(gate), str(digests))
    reader = Follower(job.id)
    for _ in range(5):
        with server.connect() as client:
            before = reader.received
            with contextlib.suppress(grpc.RpcError):
                for chunk in client.stream(job.id, from_offset=reader.received):
                    reader.take(chunk)
                    if reader.received > before + 50_000:
                        server.stop(signal.SIGKILL)
        server = start_server(STOP_JOBS="no")
    release(gate)
    with server.connect() as client:
        for chunk in client.stream(job.id, from_offset=reader.received):
            reader.take(chunk)
        late = Follower(job.id)
        for chunk in client.stream(job.id):
            late.take(chunk)
        assert client.get(job.id).exitCode == 7
    expected = digests.read_text().split()
    assert reader.digests() == late.digests() == expected


class Follower:
    """Takes chunks, and makes sure that each continues the one before."""

    def __init__(self, job_id: str) -> None:
        self.received = 0
        self._streams = {pb.STDOUT: hashlib.sha256(), pb.STDERR: hashlib.sha256()}

    def take(self, chunk: pb.DataChunk) -> None:
        assert chunk.offset == self.received
        assert chunk.lost_bytes == 0
        place = 0
        for run in chunk.runs:
            self._streams[run.stream].update(chunk.payload[place : place + run.length])
            place += run.length
        assert place == len(chunk.payload)
        self.received = chunk.next_offset

    def digests(self) -> list[str]:
        return [self._streams[stream].hexdigest() for stream in (pb.STDOUT, pb.STDERR)]


def test_a_job_gets_no_sigpipe_while_no_server_is_there(
    restart: Callable[[], Server], tmp_path: Path
) -> None:
    """It fills its pipe, waits, and goes on."""
    marks = tmp_path / "before", tmp_path / "after"
    server = restart()
    with server.connect() as client:
        job = client.shell(
            f"while ! [ -e {tmp_path}/go ]; do sleep 0.02; done;"
            f"touch {marks[0]}; head -c 3000000 /dev/zero; touch {marks[1]}"
        )
    server.stop(signal.SIGKILL)
    (tmp_path / "go").touch()
    wait_for(marks[0])
    with restart().connect() as client:
        ended = client.wait(job.id)
        assert (ended.exitCode, ended.stdout_bytes) == (0, 3_000_000)
    assert marks[1].exists()


def test_a_stop_stays_the_cause(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        job = client.shell('trap "" TERM; echo up; while :; do sleep 0.05; done')
        next(client.stream(job.id))
        stopper = threading.Thread(target=stop_quietly, args=[client, job.id, 1000])
        stopper.start()
        time.sleep(0.3)
        server.stop(signal.SIGKILL)
        stopper.join()
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        ended = client.wait(job.id)
        assert (ended.status, ended.cause) == ("STOPPED", pb.STOPPED)


def test_a_stop_goes_on_with_its_signal_and_its_grace(restart: Callable[[], Server]) -> None:
    """Also that which was asked for later, and is sooner."""
    script = 'trap "echo int" INT; trap "echo term" TERM; echo up; while :; do sleep 0.05; done'
    server = restart()
    with server.connect() as client:
        patient, hasty = (client.shell(script).id for _ in range(2))
        for job_id in (patient, hasty):
            next(client.stream(job_id))
        stops = [
            client.stop_soon(job_id, signal=signal.SIGINT, grace_milliseconds=grace)
            for job_id, grace in ((patient, 600_000), (hasty, 600_000), (hasty, 9000))
        ]
        wait_until(lambda: client.output(patient, no_follow=True) == b"up\nint\n")
        wait_until(lambda: b"int" in client.output(hasty, no_follow=True))
        time.sleep(1)  # the last stop is stored
    began = time.monotonic()
    with restart().connect() as client:
        wait_until(lambda: client.output(patient, no_follow=True) == b"up\nint\nint\n")
        assert client.wait(hasty).cause == pb.STOPPED
        assert time.monotonic() - began > 7  # and not the server's own 5
        assert b"term" not in client.output(hasty)
        assert client.get(patient).status == "RUNNING"
        client.stop(patient, grace_milliseconds=0)
    del stops


def test_a_stop_of_what_was_left_running_stays_the_cause(restart: Callable[[], Server]) -> None:
    """Its main process had ended by then."""
    with restart().connect() as client:
        job = client.shell("sleep 60 & echo $!")
        next(client.stream(job.id))
        time.sleep(0.5)  # RUNNING is stored
        stop = client.stop_soon(job.id, grace_milliseconds=4000)
        wait_until(lambda: client.get(job.id).HasField("stopped_by"))
        time.sleep(1)  # it is stored
    with restart().connect() as client:
        ended = client.wait(job.id)
        assert (ended.status, ended.cause, ended.exitCode) == ("STOPPED", pb.STOPPED, 0)
        assert ended.stopped_by.name == "admin"
    del stop


def test_a_time_limit_bounds_the_grace_of_what_was_left_running(
    restart: Callable[[], Server],
) -> None:
    script = '(trap "" TERM; exec sleep 30) & trap "exit 0" TERM; echo; while :; do sleep 0.1; done'
    with restart().connect() as client:
        job = client.shell(script, timeout_milliseconds=4000)
        next(client.stream(job.id))
        stop = client.stop_soon(job.id, grace_milliseconds=600_000)
        time.sleep(1)  # its main process has ended
    with restart().connect() as client:
        began = time.monotonic()
        assert client.wait(job.id).cause == pb.STOPPED
        assert time.monotonic() - began < 20
    del stop


def test_a_stop_of_what_starts_is_kept(start_server: StartServer) -> None:
    """Its start hangs, and goes on under the next server."""
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        cgroup = Path(client.info().cgroup)
        (cgroup / "cgroup.freeze").write_text("1")
        calls = [client.create_soon("sh", "-c", "sleep 3; exit 3")]
        wait_for(cgroup / "job-1")
        calls.append(client.stop_soon("1"))
        time.sleep(0.3)
        server.stop(signal.SIGKILL)
        for call in calls:
            assert call.exception() is not None
    with start_server(STOP_JOBS="no").connect() as client:
        assert client.get("1").status == "INITIALIZING"
        (cgroup / "cgroup.freeze").write_text("0")
        ended = client.wait("1")
        assert (ended.cause, ended.signal) == (pb.STOPPED, signal.SIGTERM)


def stop_quietly(client: Client, job_id: str, grace_milliseconds: int = 60_000) -> None:
    with contextlib.suppress(grpc.RpcError):
        client.stop(job_id, grace_milliseconds=grace_milliseconds)


def test_1000_jobs_are_taken_over_within_a_second(start_server: StartServer) -> None:
    server = start_server(STOP_JOBS="no", CLIENT_CALLS="1000")
    with server.connect() as client:
        calls = [client.create_soon("sleep", "300") for _ in range(1000)]
        ids = [call.result().id for call in calls]
    server.stop(signal.SIGKILL)
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        assert client.info().running_jobs == 1000
        assert {client.get(job_id).status for job_id in ids[::50]} == {"RUNNING"}
    assert "took over 1000 jobs" in server.log
    assert server.ready_seconds < 3  # about a second; the machine may be busy
    server.stop()
    start_server().stop()  # ends them


def test_where_jobinit_dies_its_jobs_go_on(start_server: StartServer, tmp_path: Path) -> None:
    """The server is its parent, and reaps the jobs itself."""
    server = start_server(STOP_JOBS="no")
    check_without_jobinit(server, tmp_path)


def test_where_jobinit_of_an_older_server_dies(start_server: StartServer, tmp_path: Path) -> None:
    """The server is not its parent: the kernel is asked, and may not know."""
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        client.create("sleep", "60")  # keeps jobinit
    server.stop(signal.SIGKILL)
    check_without_jobinit(start_server(STOP_JOBS="no"), tmp_path, may_be_unknown=True)


# What the kernel does before Linux 6.15: nobody but the parent gets to know how a process ended.
NO_PIDFD_INFO = """
import fcntl

def refuse(*_):
    raise OSError(25, "Inappropriate ioctl for device")

fcntl.ioctl = refuse
"""


def test_a_job_that_dies_with_jobinit(start_server: StartServer, tmp_path: Path) -> None:
    """Its ending may be seen before that of jobinit is, which has more to say."""
    (tmp_path / "sitecustomize.py").write_text(NO_PIDFD_INFO)
    server = start_server(STOP_JOBS="no", launcher=("env", f"PYTHONPATH={tmp_path}"))
    with server.connect() as client:
        jobs = [client.shell("echo $$; exec sleep 100").id for _ in range(20)]
        pids = [int(next(client.stream(job_id)).payload) for job_id in jobs]
        jobinit = server.jobinit_pid()
        server.process.send_signal(signal.SIGSTOP)
        for pid in pids[:-1]:
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.01)  # a message for each
        os.kill(jobinit, signal.SIGKILL)
        os.kill(pids[-1], signal.SIGTERM)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGCONT)
        assert {client.wait(job_id).cause for job_id in jobs} == {pb.SIGNALLED}


def check_without_jobinit(server: Server, tmp_path: Path, *, may_be_unknown: bool = False) -> None:
    gate = tmp_path / "gate"
    wait = f"while ! [ -e {gate} ]; do sleep 0.02; done; echo end;"
    with server.connect() as client:
        jobs = {client.shell(wait + script).id: code for script, code in SCRIPTS.items()}
        os.kill(server.jobinit_pid(), signal.SIGKILL)
        # What is sent to it as it dies fails to start.
        wait_until_gone(server)
        new = client.create("echo", "new")
        assert client.output(new.id) == b"new\n"
        stopped = client.create("sleep", "60")
        assert client.stop(stopped.id).status == "STOPPED"
        assert {client.get(job_id).status for job_id in jobs} == {"RUNNING"}
        release(gate)
        for job_id, code in jobs.items():
            ended = client.wait(job_id)
            assert client.output(job_id) == b"end\n"
            if ended.cause == pb.LOST:
                assert may_be_unknown
                assert ended.exitCode == -1
            else:
                assert (ended.exitCode, ended.signal) == code
    assert "jobinit" in server.log
    assert "is gone" in server.log


SCRIPTS = {"exit 0": (0, 0), "exit 9": (9, 0), "kill -TERM $$": (-1, signal.SIGTERM)}


def test_where_jobinit_dies_as_it_starts_a_job_it_is_not_told_that_it_never_ran(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Without cgroups it may even go on."""
    server = start_server(CGROUP_BASE=str(tmp_path))
    with server.connect() as client:
        for attempt in range(8):
            client.run("true")  # a new jobinit is there
            creates = [client.create_soon("true") for _ in range(6)]
            time.sleep(0.002 * attempt)
            os.kill(server.jobinit_pid(), signal.SIGKILL)
            ended = [client.wait(create.result().id) for create in creates]
            assert {job.cause for job in ended} <= {pb.EXITED, pb.LOST}
            lost = [job for job in ended if "was started" in job.detail]
            assert all(job.cleanup_uncertain for job in lost)


def test_where_both_die_the_job_is_lost_with_its_output(start_server: StartServer) -> None:
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        job = client.shell("echo before; exec sleep 60")
        next(client.stream(job.id))
        jobinit = server.jobinit_pid()
    server.stop(signal.SIGKILL)
    os.kill(jobinit, signal.SIGKILL)
    with start_server(STOP_JOBS="no").connect() as client:
        lost = client.wait(job.id)
        assert (lost.status, lost.cause, lost.exitCode) == ("FAILED", pb.LOST, -1)
        assert "both died" in lost.detail
        assert lost.stdout_bytes == 7
        assert client.output(job.id) == b"before\n"
        assert int(client.create("true").id) > int(job.id)


def test_where_both_die_it_may_go_on_without_cgroups(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(STOP_JOBS="no", CGROUP_BASE=str(tmp_path))
    with server.connect() as client:
        job = client.shell("echo $$; exec sleep 60")
        pid = int(next(client.stream(job.id)).payload)
        jobinit = server.jobinit_pid()
    server.stop(signal.SIGKILL)
    os.kill(jobinit, signal.SIGKILL)
    try:
        with start_server(CGROUP_BASE=str(tmp_path)).connect() as client:
            lost = client.wait(job.id)
            assert (lost.cause, lost.cleanup_uncertain) == (pb.LOST, True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_of_a_start_that_nobody_knows_of_it_is_not_told_that_the_job_ran(
    start_server: StartServer,
) -> None:
    """A jobinit that held no job has ended by itself."""
    server = start_server(STOP_JOBS="no")
    server.stop(signal.SIGKILL)
    wait_for_end(server.jobinit_pid())

    async def put() -> int:
        store = Store.open(server.state / "jobs.db")
        job_id = store.reserve_id()
        await store.put(created(job_id, JobSpec("/bin/true"), time.time_ns()))
        await store.close()
        return job_id

    job_id = asyncio.run(put())
    with start_server().connect() as client:
        job = client.wait(str(job_id))
    assert (job.cause, job.exitCode) == (pb.LOST, -1)
    assert job.detail == "nobody is left that knows if the job was started"


def test_a_job_without_a_record_is_killed(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        client.create("sleep", "61")
        jobinit = server.jobinit_pid()
    server.stop(signal.SIGKILL)
    for path in server.state.glob("jobs.db*"):
        path.unlink()
    server = start_server(STOP_JOBS="no")
    wait_for_no_children(jobinit)
    assert "no record" in server.log
    server.stop()
    assert "Traceback" not in server.log
    wait_for_end(jobinit)  # it was told that nobody needs the job


OPERATING = Path(__file__).parent.parent.parent / "docs" / "operating.md"


def way_back(state: Path) -> tuple[list[str], str]:
    """The documented commands, and the statements of the last of them."""
    (aside,) = state.glob("jobs.db.damaged-*")
    (script,) = (
        block
        for block in OPERATING.read_text().split("```")
        if block.startswith("sh\n") and ".recover" in block
    )
    script = script.removeprefix("sh\n").replace("/var/lib/jobworker", str(state))
    script = script.replace("jobs.db.damaged-TIME", aside.name)
    statements = script.split('"')[1]
    return ["sh", "-ec", script], statements


def overwrite(state: Path) -> None:
    """And keeps what `.recover` would make of it, as if it could."""
    shutil.copy(state / "jobs.db", state / "recovered.db")
    (state / "jobs.db").write_bytes(os.urandom((state / "jobs.db").stat().st_size))


def damage_index(state: Path) -> None:
    """As a bad disk may; and a server has met it."""
    with contextlib.closing(sqlite3.connect(state / "jobs.db")) as database:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'jobs_by_owner'"
        ((page,),) = database.execute(query)
        ((page_bytes,),) = database.execute("PRAGMA page_size")
    with (state / "jobs.db").open("r+b") as file:
        file.seek((page - 1) * page_bytes)
        file.write(os.urandom(page_bytes))
    with (state / "last-run").open("r+b") as file:
        file.write(b"damaged".ljust(36, b"\0"))


def wait_until_looked_through(server: Server) -> None:
    """The output folder, for what has no record."""
    wait_until(lambda: "without a record stays" in server.log)


def can_recover(folder: Path) -> bool:
    """Some distributions' sqlite3 has the command, and not what it needs."""
    if not shutil.which("sqlite3"):
        return False
    with contextlib.closing(sqlite3.connect(folder / "sound.db")) as database:
        database.execute("CREATE TABLE t (x)")
    command = ["sqlite3", str(folder / "sound.db"), ".recover"]
    return b"CREATE TABLE" in subprocess.run(command, check=False, capture_output=True).stdout


@pytest.mark.parametrize("damage", [overwrite, damage_index])
def test_no_output_is_lost_with_a_damaged_database(
    start_server: StartServer, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    with server.connect() as client:
        large, expected = client.run("seq 100000")
        small, _ = client.run("echo small")
    server.stop()
    state = server.state
    files = {path: path.read_bytes() for path in (state / "output").glob(f"{large.id}.*")}
    damage(state)
    server = start_server()
    with server.connect() as client:
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            client.get(large.id)
        new, new_output = client.run("seq 50000")
        assert int(new.id) > int(small.id)
        wait_until_looked_through(server)
    server.stop()
    server = start_server()
    wait_until_looked_through(server)
    server.stop()
    assert {path: path.read_bytes() for path in files} == files
    commands, statements = way_back(state)
    if (state / "recovered.db").exists():
        monkeypatch.chdir(state)
        with contextlib.closing(sqlite3.connect("jobs.db")) as database:
            database.executescript(statements)
    elif can_recover(state.parent):
        subprocess.run(commands, check=True)
    else:
        pytest.skip("there is no sqlite3 here that can recover a database")
    server = start_server()
    with server.connect() as client:
        assert client.get(large.id) == large
        assert client.output(large.id) == expected
        assert client.output(small.id) == b"small\n"
        assert client.output(new.id) == new_output
        assert client.info().ended_jobs == 3
    server.stop()
    for path in (*state.glob("jobs.db.damaged-*"), state / "recovered.db"):
        path.unlink()
    with start_server().connect() as client:
        assert client.output(large.id) == expected


@pytest.mark.parametrize("log_max_bytes", ["0", "4000000"])
def test_jobs_go_on_where_the_database_is_damaged(
    start_server: StartServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_max_bytes: str,
) -> None:
    """log_max_bytes: what they were made with, and no server later knows."""
    server = start_server(STOP_JOBS="no", LOG_MAX_BYTES=log_max_bytes)
    gates = [tmp_path / "meanwhile", tmp_path / "later"]
    with server.connect() as client:
        ids = []
        for code, gate in enumerate(gates, start=3):
            wait = f"while ! [ -e {gate} ]; do sleep 0.05; done; echo after >&2; exit {code}"
            ids.append(client.shell(f"seq 50000; {wait}").id)
            wait_until(partial(has_written, client, ids[-1], 288_894))
        meanwhile, later = ids
        before = client.get(later)
        jobinit = server.jobinit_pid()
    server.stop()
    overwrite(server.state)
    release(gates[0])
    wait_until(lambda: len(jobs_of(jobinit)) == 1)
    expected = b"".join(b"%d\n" % number for number in range(1, 50_001)) + b"after\n"
    for _ in range(2):  # what a start finds, a later one does too
        server = start_server(STOP_JOBS="no", LOG_MAX_BYTES="300000")
        with server.connect() as client:
            found = client.get(later)
            assert (found.status, found.command) == ("RUNNING", "sh")
            assert "its record was lost" in found.detail
            assert not found.HasField("created_by")
            assert found.start_time_ns == before.start_time_ns
            ended = client.wait(meanwhile)
            assert (ended.exitCode, ended.cause) == (3, pb.EXITED)
            assert "its record was lost" in ended.detail
            assert client.output(meanwhile) == expected
        server.stop(signal.SIGKILL)
    server = start_server(STOP_JOBS="no")
    release(gates[1])
    with server.connect() as client:
        assert client.wait(later).exitCode == 4
        assert client.output(later) == expected
    server.stop()
    _, statements = way_back(server.state)
    monkeypatch.chdir(server.state)
    with contextlib.closing(sqlite3.connect("jobs.db")) as database:
        database.executescript(statements)
    with start_server().connect() as client:
        again = client.get(later)
        assert (again.args, again.created_by) == (before.args, before.created_by)
        assert (again.status, again.exitCode) == ("FAILED", 4)
        assert client.output(later) == client.output(meanwhile) == expected
        assert client.info().ended_jobs == 2


def has_written(client: Client, job_id: str, count: int) -> bool:
    return client.get(job_id).stdout_bytes == count


@pytest.mark.skipif(os.geteuid() != 0, reason="only a root server confines its jobs")
def test_a_start_under_way_is_awaited_whatever_the_settings_are_by_then(
    start_server: StartServer,
) -> None:
    """The profile that it was made with is none that the next server allows."""
    server = start_server(PROFILE="default", STOP_JOBS="no")
    with server.connect() as client:
        cgroup = Path(client.info().cgroup)
        (cgroup / "cgroup.freeze").write_text("1")
        call = client.create_soon("sh", "-c", "echo here; exit 3")
        wait_for(cgroup / "job-1")
        server.stop(signal.SIGKILL)
        assert call.exception() is not None
    server = start_server(PROFILE="none", PROFILES_ALLOWED="none", STOP_JOBS="no")
    with server.connect() as client:
        assert client.get("1").status == "INITIALIZING"
        (cgroup / "cgroup.freeze").write_text("0")
        ended = client.wait("1")
        assert (ended.cause, ended.exitCode) == (pb.EXITED, 3), ended.detail
        assert client.output("1") == b"here\n"


def test_a_start_without_a_record_is_ended_before_its_command_runs(
    start_server: StartServer,
) -> None:
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        cgroup = Path(client.info().cgroup)
        (cgroup / "cgroup.freeze").write_text("1")
        starting = client.create_soon("sleep", "61")  # a call that nobody holds is cancelled
        wait_for(cgroup / "job-1")
        jobinit = server.jobinit_pid()
        server.stop(signal.SIGKILL)
        assert starting.exception() is not None
    for path in server.state.glob("jobs.db*"):
        path.unlink()
    server = start_server(STOP_JOBS="no")
    wait_for_no_children(jobinit)
    (cgroup / "cgroup.freeze").write_text("0")
    server.stop()
    wait_for_end(jobinit)


def test_what_ends_while_it_is_taken_over(start_server: StartServer) -> None:
    """One after the other, from before the next server is there until it is ready."""
    server = start_server(STOP_JOBS="no")
    first_end = time.monotonic() + 4
    with server.connect() as client:
        calls = []
        for number in range(400):
            seconds = first_end + number * 0.003 - time.monotonic()
            calls.append(client.create_soon("sleep", f"{seconds:.3f}"))
        ids = [call.result().id for call in calls]
    time.sleep(max(0.0, first_end - 0.2 - time.monotonic()))
    server.stop(signal.SIGKILL)
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        assert {client.wait(job_id).status for job_id in ids} == {"COMPLETED"}


def test_all_jobs_are_listed_after_a_restart(start_server: StartServer, tmp_path: Path) -> None:
    """In the order of their ids, which is not the order in which jobinit tells of them."""
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "next-id").write_text("4090\n")
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        ids = [client.create("sleep", "60").id for _ in range(12)]
    server.stop(signal.SIGKILL)
    with start_server().connect() as client:
        listed: list[str] = []
        token = ""
        while not listed or token:
            page = client.call("ListJobs", pb.ListJobsReq(page_size=5, page_token=token))
            listed += [job.id for job in page.jobs]
            token = page.next_page_token
        assert listed == ids[::-1]


def test_a_stop_without_grace_stays_the_cause(start_server: StartServer) -> None:
    """The signal must not come before the record that says whose it is."""
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        job = client.create("sleep", "60")
        time.sleep(0.5)  # RUNNING is stored
        with contextlib.closing(sqlite3.connect(server.state / "jobs.db")) as database:
            database.execute("BEGIN IMMEDIATE")  # and nothing more is
            stopper = threading.Thread(target=stop_quietly, args=[client, job.id, 0])
            stopper.start()
            time.sleep(0.5)
            server.stop(signal.SIGKILL)
        stopper.join()
    with start_server().connect() as client:
        if client.get(job.id).status == "RUNNING":
            client.stop(job.id)
        assert client.get(job.id).cause == pb.STOPPED


def test_a_cause_is_shown_once_the_next_server_knows_it(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Of a job that ends by itself just after a stop was accepted."""
    server = start_server(STOP_JOBS="no")
    go = tmp_path / "go"
    with server.connect() as client:
        job = client.shell(f"until [ -e {go} ]; do sleep 0.02; done")
        time.sleep(0.5)  # RUNNING is stored
        with contextlib.closing(sqlite3.connect(server.state / "jobs.db")) as database:
            database.execute("BEGIN IMMEDIATE")  # and nothing more is
            stop = client.stop_soon(job.id)
            time.sleep(0.2)
            go.touch()
            time.sleep(0.8)
            shown = client.get(job.id)
            server.stop(signal.SIGKILL)
        assert stop.code() is grpc.StatusCode.UNAVAILABLE
    with start_server().connect() as client:
        ended = client.wait(job.id)
    assert shown.status in {"RUNNING", ended.status}


# A server whose store takes until there is a file `go` to close.
SLOW_TO_CLOSE = """
import pathlib, time
from jobworker.engine.store import Store

close = Store._close

def close_late(self):
    pathlib.Path("closing").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
    close(self)

Store._close = close_late
"""


def test_what_comes_due_while_a_server_ends_is_for_the_next_one(
    start_server: StartServer, tmp_path: Path
) -> None:
    """It can store nothing any more: what it killed would look like another cause."""
    settings = {"STOP_JOBS": "no", "STOP_GRACE": "0"}
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_CLOSE)
    server = start_server(launcher=("env", f"PYTHONPATH={tmp_path}"), **settings)
    with server.connect() as client:
        job = client.create("sleep", "60", timeout_milliseconds=3000)
        others = [client.create("sleep", "0.1") for _ in range(5)]  # not stored as RUNNING yet
        server.process.send_signal(signal.SIGTERM)
        wait_for(tmp_path / "closing")
        wait_until(lambda: time.time_ns() > job.start_time_ns + 3_200_000_000)
    release(tmp_path / "go")
    assert server.stop() == 0
    assert "Traceback" not in server.log
    with start_server(**settings).connect() as client:
        assert client.wait(job.id).cause == pb.TIMED_OUT
        assert {client.wait(each.id).cause for each in others} == {pb.EXITED}


def test_run_shows_each_line_once_while_the_server_is_killed(
    start_server: StartServer, certificates: Path
) -> None:
    server = start_server(STOP_JOBS="no")
    script = "for i in $(seq 1 60); do echo $i; sleep 0.1; done; exit 9"
    environ = os.environ | {
        "JOB_WORKER_SERVER": server.address,
        "JOB_WORKER_CERT_PATH": str(certificates),
    }
    run = subprocess.Popen(
        [sys.executable, "-m", "jobworker", "run", "--", "sh", "-c", script],
        env=environ,
        cwd=server.state.parent,
        stdout=subprocess.PIPE,
    )
    assert run.stdout
    with run.stdout:
        for number, line in enumerate(run.stdout, start=1):
            assert line == b"%d\n" % number
            if number in {5, 20, 35}:
                server.stop(signal.SIGKILL)
                server = start_server(STOP_JOBS="no", port=server.port)
    assert number == 60
    assert run.wait(timeout=60) == 9


def accept_and_close(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.close()


def test_a_jobinit_that_ends_as_the_server_comes(start_server: StartServer, tmp_path: Path) -> None:
    """It held no job any more: it accepts, and says nothing."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    path = Jobinits(state, JOBINIT)._path
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ending:
        ending.bind(str(path))
        ending.listen()
        closer = threading.Thread(target=accept_and_close, args=[ending])
        closer.start()
        with start_server().connect() as client:
            assert client.run("echo works")[1] == b"works\n"
        closer.join()
