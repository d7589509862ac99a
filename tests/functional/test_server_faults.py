"""What nobody thought of: a fault in the server, which the tests put there."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from functional.server import Server, wait_until
from jobworker.pb import job_worker_pb2 as pb

SECRET = "swordfish"
# Each of these fails for one job, in a way of its own.
FAULTS = f"""
from jobworker.engine import looks, manager
from jobworker.engine.output import Reader

get, resolve, put = manager.Manager.get, looks.resolve, manager.Store.put

async def get_or_fail(self, job_id, **options):
    if job_id == 77:
        raise ValueError("{SECRET}")
    if job_id == 78:
        raise PermissionError(13, "{SECRET}", "/var/lib/{SECRET}")
    return await get(self, job_id, **options)

def resolve_or_fail(command, *rest):
    if command == "faulty":
        raise KeyError("{SECRET}")
    return resolve(command, *rest)

async def fail(self):
    raise ZeroDivisionError("{SECRET}")

async def put_and_fail(self, job, **options):
    await put(self, job, **options)
    if job.spec.name == "recorded" and not job.is_ended:
        raise LookupError("{SECRET}")

manager.Manager.get = get_or_fail
manager.Store.put = put_and_fail
looks.resolve = resolve_or_fail
Reader.next = fail
"""

# The kernel lets this wait where another keeps its lock of all cgroups.
SLOW_KILL = """
from jobworker.engine.cgroup import Cgroup

kill = Cgroup.kill

def kill_later(self):
    with open({fifo!r}) as fifo:
        fifo.read()
    kill(self)

Cgroup.kill = kill_later
"""

# Each job needs a new block of ids, and the disk takes its time.
SLOW_IDS = """
import os
from jobworker.engine import ids

write = ids._write_whole

def write_later(path, text):
    if text != "2\\n" and os.path.exists({fifo!r}):
        with open({fifo!r}) as fifo:
            fifo.read()
    write(path, text)

ids.ID_BLOCK = 1
ids._write_whole = write_later
"""


@pytest.fixture
def faulty(start_server: Callable[..., Server], tmp_path: Path) -> Server:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    return start_server(
        launcher=("env", f"PYTHONPATH={tmp_path}"), AUDIT_LOG=str(tmp_path / "audit.log")
    )


def check(server: Server, says: str, problem: str) -> None:
    """The answer tells nothing but where to look, and there it is."""
    found = re.fullmatch(
        "a fault of the server, and not of the request: its log has it as fault ([0-9a-f]{8})", says
    )
    assert found
    _, told, log = server.log.partition(f"fault {found[1]}, in ")
    assert told
    assert re.search(rf"Traceback .*^{problem}:.*{SECRET}", log, re.DOTALL | re.MULTILINE)


def test_it_is_told_as_the_servers_and_is_in_its_log(faulty: Server, tmp_path: Path) -> None:
    with faulty.connect() as client:
        job = client.create("true")
        calls: dict[str, Callable[[], object]] = {
            "ValueError": lambda: client.get("77"),
            "PermissionError": lambda: client.get("78"),
            "KeyError": lambda: client.create("faulty"),
            "ZeroDivisionError": lambda: list(client.stream(job.id)),
        }
        for problem, call in calls.items():
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            check(faulty, str(caught.value.details()), problem)
    assert SECRET not in (tmp_path / "audit.log").read_text()


def test_a_job_that_is_recorded_ends(faulty: Server) -> None:
    """And is not there for ever as one that starts."""
    with faulty.connect() as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.create("true", name="recorded")
        check(faulty, str(caught.value.details()), "LookupError")
        [job] = client.jobs()
    assert (job.status, job.failed_step, job.failed_errno) == ("FAILED", "server", 0)
    assert job.detail == "a fault of the server, whose log tells of it"
    faulty.stop()
    with contextlib.closing(sqlite3.connect(faulty.state / "jobs.db")) as store:
        assert store.execute("SELECT status FROM jobs").fetchall() == [("FAILED",)]


def test_of_many_jobs_the_others_are_made(faulty: Server) -> None:
    commands = ("true", "faulty", "true")
    request = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command=name) for name in commands])
    with faulty.connect() as client:
        results = client.call("CreateJobs", request).results
    assert [result.code for result in results] == [0, grpc.StatusCode.INTERNAL.value[0], 0]
    check(faulty, results[1].error, "KeyError")


def test_one_error_for_two_calls(start_server: Callable[..., Server]) -> None:
    """The one does not end what the other does meanwhile."""
    server = start_server()
    with server.connect() as client:
        client.run("true")
        other = sqlite3.connect(server.state / "jobs.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        create = client.create_soon("sleep", "60")
        wait_until(lambda: any(job.status == "INITIALIZING" for job in client.jobs()))
        stop = client.stop_soon("2")
        codes = {create.code(), stop.code()}
        other.close()
    server.stop()
    assert codes == {grpc.StatusCode.UNAVAILABLE}
    assert "Traceback" not in server.log
    # What could not be recorded never was, though there was room for its stop.
    with start_server().connect() as client, pytest.raises(grpc.RpcError) as caught:
        client.get("2")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_calls_go_on_while_a_kill_waits(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "sitecustomize.py").write_text(SLOW_KILL.format(fifo=str(fifo)))
    no_program = tmp_path / "no-program"
    no_program.touch(0o755)
    server = start_server(launcher=("env", f"PYTHONPATH={tmp_path}"))
    with server.connect() as client:
        if not client.info().cgroup:
            pytest.skip("no cgroups here")
        create = client.create_soon(str(no_program))
        with fifo.open("w"):  # once the kill is there
            assert client.info().running_jobs == 1
            assert not create.done()
        assert create.result().cause == pb.START_FAILED


def test_calls_go_on_while_ids_are_reserved(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "sitecustomize.py").write_text(SLOW_IDS.format(fifo=str(fifo)))
    server = start_server(launcher=("env", f"PYTHONPATH={tmp_path}"))
    with server.connect() as client:
        first = client.create("true")
        creates = [client.create_soon("true") for _ in range(2)]
        with fifo.open("w"):  # once more are being reserved
            assert client.wait(first.id).status == "COMPLETED"
            assert [job.id for job in client.jobs()] == [first.id]
            fifo.unlink()  # from now on the disk is fast
        assert {create.result().id for create in creates} == {"2", "3"}
