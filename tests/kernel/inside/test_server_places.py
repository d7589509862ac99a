"""Servers in places of all kinds: what each can enforce, and what it says of the rest."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from socket import AF_UNIX, SOCK_SEQPACKET, socket
from typing import Any

import grpc
import pytest

from jobworker.pb import job_worker_pb2 as pb
from kernel.inside.conftest import (
    ROOT,
    USER,
    delegate,
    delegated_directory,
    refusal,
    serving,
    wait_until,
)

FORK_BOMB = """
import os, time
try:
    while os.fork():
        pass
except BlockingIOError:
    print("no more", flush=True)
time.sleep(1000)
"""


def test_a_user_without_delegation_is_told_how_to_get_it(
    tmp_path: Path, certificates: Path
) -> None:
    """The server runs, and refuses only limits that a client asks for."""
    with serving(tmp_path, certificates, user=USER) as server, server.connect() as client:
        info = client.info()
        assert info.cgroup == ""
        for controller in info.controllers:
            assert not controller.available
            assert "Delegate=yes" in controller.problem
        for limit in ("maxCPU", "maxMemory", "maxIOBPS"):
            code, message = refusal(client, **{limit: 50})
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert message.startswith(f"{limit} needs the cgroup controller ")
            assert "Delegate=yes" in message
        job, output = client.run("id -u; echo $USER $HOME")
        assert (job.status, job.cleanup_uncertain) == ("COMPLETED", True)
        assert output == f"{USER}\n{USER} /\n".encode()
        assert (job.maxCPU, job.maxMemory) == (0, 0)
    (said,) = [line for line in server.log.splitlines() if "without cgroups" in line]
    assert "Delegate=yes" in said


def test_what_was_not_delegated_is_refused_by_name(
    delegated: Path, tmp_path: Path, certificates: Path
) -> None:
    inner = delegated / "inner"
    inner.mkdir()
    delegate(inner, USER)
    (delegated / "cgroup.subtree_control").write_text("+memory +pids")

    with (
        serving(tmp_path, certificates, inner, USER, CGROUP_BASE=str(inner)) as server,
        server.connect() as client,
    ):
        for limit, controller in (("maxCPU", "cpu"), ("maxIOBPS", "io")):
            code, message = refusal(client, **{limit: 50})
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert message.startswith(f"{limit} needs the cgroup controller '{controller}'")
            assert f"cannot write {delegated}/cgroup.subtree_control" in message
            assert "Delegate=yes" in message
        job = client.wait(client.create("true", maxMemory=50).id)
        assert (job.status, job.maxMemory, job.maxCPU) == ("COMPLETED", 50, 0)
    assert server.log.count("without the default limits on cpu (100): ") == 1


def test_a_server_in_its_delegated_cgroup_moves_itself_to_a_leaf(
    delegated: Path, tmp_path: Path, certificates: Path
) -> None:
    """With jobinit, of which all jobs come."""
    with (
        serving(tmp_path, certificates, delegated, CGROUP_BASE=str(delegated)) as server,
        server.connect() as client,
    ):
        assert client.info().cgroup.startswith(f"{delegated}/jobworker-")
        assert all(controller.available for controller in client.info().controllers)
        leaf = f"0::{client.info().cgroup.removeprefix(str(ROOT))}-server\n"
        for pid in (server.process.pid, server.jobinit_pid()):
            assert Path(f"/proc/{pid}/cgroup").read_text() == leaf
        job, output = client.run("cat /proc/self/cgroup")
        assert output.decode() == leaf.replace("-server\n", f"/job-{job.id}\n")


HOLD = """
import os, time
file = os.memfd_create("held")
for _ in range(80):
    os.write(file, bytes(1 << 20))
print("held", flush=True)
time.sleep(1000)
"""


def test_jobs_go_before_their_server_where_the_memory_of_all_is_short(
    delegated: Path, tmp_path: Path, certificates: Path
) -> None:
    """That of a unit with MemoryMax=, all held in files that nobody has mapped."""
    settings = {"CGROUP_BASE": str(delegated), "DEFAULT_MEMORY": "100"}
    with (
        serving(tmp_path, certificates, delegated, USER, **settings) as server,
        server.connect() as client,
    ):
        (delegated / "memory.max").write_text(str(350 << 20))
        jobs = [client.create(sys.executable, "-S", "-c", HOLD).id for _ in range(6)]
        wait_until(lambda: any(client.get(job).status == "FAILED" for job in jobs))
        assert client.run("echo fine")[1] == b"fine\n"
        for job in jobs:
            if client.get(job).status == "RUNNING":
                client.stop(job, grace_milliseconds=0)


def test_what_a_dead_server_and_its_jobinit_left_is_killed(
    tmp_path: Path, certificates: Path
) -> None:
    script = f"""
own={ROOT}$(sed -n s/^0:://p /proc/self/cgroup)
mkdir "$own/inner"
setsid sleep 1000 & echo $! > "$own/inner/cgroup.procs"
echo $! $$
exec sleep 1000
"""
    with serving(tmp_path, certificates) as server, server.connect() as client:
        job = client.shell(script)
        pids = next(client.stream(job.id)).payload.split()
        cgroup = Path(client.info().cgroup) / f"job-{job.id}"
        jobinit = server.jobinit_pid()
        # First of all it itself: it would see that jobinit is gone, and kill the job.
        os.kill(server.process.pid, signal.SIGKILL)
        os.kill(jobinit, signal.SIGKILL)
        server.process.wait()
        assert (cgroup / "inner").exists()

    with serving(tmp_path, certificates) as server, server.connect() as client:
        lost = client.wait(job.id)
        assert (lost.status, lost.cause, lost.exitCode) == ("FAILED", pb.LOST, -1)
        assert not cgroup.exists()
        # The first process reaps them in its own time.
        wait_until(lambda: not any(Path(f"/proc/{int(pid)}").exists() for pid in pids))
        assert client.run("true")[0].status == "COMPLETED"


@pytest.mark.parametrize("user", [0, USER])
def test_jobs_leave_a_quarter_of_the_processes_that_their_unit_may_have(
    tmp_path: Path, certificates: Path, user: int
) -> None:
    """The unit may have fewer than a single job: without, no job started, nor the next server."""
    with delegated_directory(user) as base:
        own = base / "server"
        own.mkdir()
        delegate(own, user)
        (base / "pids.max").write_text("160")
        settings: dict[str, Any] = {"CGROUP_BASE": str(base), "STOP_JOBS": "no"}
        with serving(tmp_path, certificates, own, user, **settings) as server:
            with server.connect() as client:
                bomb = client.create(sys.executable, "-c", FORK_BOMB)
                cgroup = Path(client.info().cgroup, f"job-{bomb.id}")
                assert next(client.stream(bomb.id)).payload == b"no more\n"
                assert int((cgroup / "pids.current").read_text()) == 120
                job, output = client.run("echo fine")
                assert (job.status, output) == ("COMPLETED", b"fine\n")
            server.stop(signal.SIGKILL)
        with (
            serving(tmp_path, certificates, own, user, **settings) as server,
            server.connect() as client,
        ):
            client.stop(bomb.id, grace_milliseconds=0)
            assert client.wait(bomb.id).cause == pb.STOPPED


def test_the_next_server_takes_over_though_there_were_no_watches_of_epoll(
    tmp_path: Path, certificates: Path
) -> None:
    """As where jobs of its user take all, with each that a server gives back as it ends."""
    most = Path("/proc/sys/fs/epoll/max_user_watches")
    before = most.read_text()
    with serving(tmp_path, certificates, user=USER, STOP_JOBS="no") as server:
        with server.connect() as client:
            job = client.shell("trap 'exit 5' TERM; echo ready; while sleep 0.05; do :; done")
            next(client.stream(job.id))
        most.write_text("0")
        server.stop(signal.SIGKILL)
        (path,) = server.state.glob("jobinit-*.sock")
        with socket(AF_UNIX, SOCK_SEQPACKET) as too_early:
            too_early.connect(str(path))
            time.sleep(0.2)
        most.write_text(before)
    with (
        serving(tmp_path, certificates, user=USER) as server,
        server.connect() as client,
    ):
        client.stop(job.id)
        assert client.wait(job.id).exitCode == 5


@pytest.mark.parametrize("left", [1, 6, 7])
def test_mounts_that_jobs_leave_no_namespaces_for_are_no_reason_to_confine_none(
    tmp_path: Path, certificates: Path, left: int
) -> None:
    """As where jobs that have ended gave theirs to a service, which has not taken them. Nor is
    anything left out: the resolv.conf comes last."""
    resolver = Path("/run/resolver")
    resolver.touch()
    Path("/etc/resolv.conf").unlink(missing_ok=True)
    Path("/etc/resolv.conf").symlink_to(resolver)
    most = Path("/proc/sys/user/max_mnt_namespaces")
    before = most.read_text()
    most.write_text(str(left))
    try:
        with (
            pytest.raises(AssertionError, match=r"(make|mount) /(dev|run)/.*: No space left"),
            serving(tmp_path, certificates, user=USER, PROFILE=""),
        ):
            pass
    finally:
        most.write_text(before)
