"""After its jobs, a server holds what it held before them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from epolls import nested_epolls
from functional.server import Client, Server
from jobinit_processes import jobs_of

JOBS = 1000
IN_FLIGHT = 8


def test_1000_jobs_leave_no_cgroup_no_zombie_no_descriptor(
    start_server: Callable[..., Server],
) -> None:
    server = start_server()
    with server.connect() as client:
        run_jobs(client, 20)  # all that is made once is made
        jobinit = server.jobinit_pid()
        assert children(jobinit) == []
        before = settled(server, jobinit)
        run_jobs(client, JOBS)
        cgroup = client.info().cgroup
        assert cgroups_in(cgroup) == []
        assert children(jobinit) == []
        assert settled(server, jobinit) == before
    server.stop()
    assert not cgroup or not Path(cgroup).exists()


def test_while_a_server_waits_for_what_a_job_left_no_epoll_is_in_another(
    start_server: Callable[..., Server],
) -> None:
    """For that the kernel has one lock for the whole machine, which a job can keep for seconds."""
    server = start_server(LINGER="1s")
    with server.connect() as client:
        job = client.shell("sleep 1000 >/dev/null 2>&1 & exit 0")
        while client.get(job.id).status == "RUNNING":
            assert nested_epolls(server.process.pid) == []
            time.sleep(0.05)


def run_jobs(client: Client, count: int) -> None:
    """Jobs of every kind that ends: quickly, by a signal, with children, not started."""
    scripts = ["exit 0", "echo x; exit 1", "kill -9 $$", "true & true &", "exec /no/such/program"]
    running: deque[str] = deque()
    for number in range(count):
        running.append(client.shell(scripts[number % len(scripts)]).id)
        if len(running) == IN_FLIGHT:
            client.wait(running.popleft())
    for job_id in running:
        client.wait(job_id)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def settled(server: Server, jobinit: int) -> tuple[int, int]:
    """The descriptors of both, once they stay as they are: the last acknowledgements may still
    be on their way."""
    counts = [(server.descriptors(), descriptors(jobinit))]
    while len(counts) < 10 or len(set(counts[-10:])) > 1:
        time.sleep(0.02)
        counts.append((server.descriptors(), descriptors(jobinit)))
    return counts[-1]


def children(pid: int) -> list[int]:
    """Also those that are only zombies; the last may still be on its way out."""
    deadline = time.monotonic() + 5
    while True:
        found = jobs_of(pid)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def cgroups_in(path: str) -> list[str]:
    if not path:
        return []
    return [entry.name for entry in os.scandir(path) if entry.is_dir()]
