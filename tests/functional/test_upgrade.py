"""A newer server takes over the jobs of an older jobinit, which is kept here as it was built.

fixtures/jobinit-1 is the one of protocol version 1 (x86_64, static). It must work for ever.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.server import Server, wait_until
from jobworker.engine import jobinit
from jobworker.engine.jobinit import Ask, Tell
from jobworker.engine.store import Store
from jobworker.job import Job, JobSpec, created

FIXTURE = Path(__file__).parent.parent / "fixtures" / "jobinit-1"

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the jobinit of version 1 was kept for x86_64 only"
)


def leave_jobs(state: Path, *scripts: str) -> tuple[int, list[Job]]:
    """What a server of that version leaves when it is killed as its jobs have just started:
    its jobinit's pid, and the jobs."""
    state.mkdir(mode=0o700)
    path = state / "jobinit-1.sock"
    with jobinit.listen(path) as listener:
        pid = jobinit.spawn(FIXTURE, listener)
    jobs = asyncio.run(record(state, scripts))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.fspath(path))
        for job in jobs:
            body = start_of_version_1(job.spec)
            connection.send(jobinit.HEADER.pack(Ask.START, 0, len(body), job.id) + body)
        told: list[int] = []
        while told.count(Tell.STARTED) < len(jobs):
            told += [kind for kind, *_ in jobinit._split(connection.recv(jobinit.PACKET_BYTES))]
    return pid, jobs


async def record(state: Path, scripts: tuple[str, ...]) -> list[Job]:
    store = Store.open(state / "jobs.db")
    jobs = []
    for script in scripts:
        spec = JobSpec("/bin/sh", ("-c", script))
        jobs.append(created(store.reserve_id(), spec, time.time_ns()))
        await store.put(jobs[-1])
    await store.close()
    return jobs


def start_of_version_1(spec: JobSpec) -> bytes:
    """As its engine/jobinit.py encoded it; without a cgroup."""
    strings = [spec.command, spec.working_directory, "", spec.command, *spec.args]
    head = struct.pack("=IIIIII", 0, 1 + len(spec.args), 0, 0, 0, 0)
    return head + "\0".join(strings).encode() + b"\0"


def test_an_older_jobinit_hands_over_all_its_jobs(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    older, (running, stopped, ended) = leave_jobs(
        tmp_path / "state",
        f"echo old; while ! [ -e {gate} ]; do sleep 0.02; done; exit 5",
        "echo until stopped; exec sleep 60",
        "echo short; exit 6",
    )
    server = start_server(STOP_JOBS="no")
    assert server.jobinit_pid() != older
    with server.connect() as client:
        new = client.shell("exit 7")
        assert client.wait(new.id).exitCode == 7
        assert client.wait(str(ended.id)).exitCode == 6
        assert client.output(str(ended.id)) == b"short\n"
        assert client.get(str(running.id)).status == "RUNNING"
        assert client.stop(str(stopped.id)).status == "STOPPED"
        gate.touch()
        assert client.wait(str(running.id)).exitCode == 5
        assert client.output(str(running.id)) == b"old\n"
    server.stop()
    # It has no job left, and no server.
    wait_until(lambda: os.waitpid(older, os.WNOHANG)[0] == older)
