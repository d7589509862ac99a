"""What does it cost to separate a job from the machine?

/bin/true, BULK in a request, two requests under way at a time; with each profile in turn, and
with the default one without a network. Floor: profile none, a cgroup only, of another server:
one that does not allow it confines for less. CPU is that of server, jobinit and jobs together.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client import Client, run
from figures import QUICK, Findings, Target
from jobworker.pb import job_worker_pb2 as pb
from server import Server, running_server, workplace

COMMAND = "/bin/true"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
REPETITIONS = 3 if QUICK else 9
JOBS = 300 if QUICK else 2000
BULK = 100
CONFINING = {
    "PROFILE": "default",
    "PROFILES_ALLOWED": "strict",
    "STRICT_UIDS": "3000000-3065535",
}
CASES: dict[str, dict[str, Any]] = {
    "none": {"profile": "none"},
    "default": {"profile": "default"},
    "default, without a network": {"profile": "default", "network": "none"},
    "strict": {"profile": "strict"},
}
RATE_TARGETS = {"default": 0.7}


def cpu_seconds(server: Server) -> float:
    """Of server and jobinit, and of all jobs that jobinit has reaped."""
    fields = Path(f"/proc/{server.jobinit.pid}/stat").read_text().rpartition(")")[2].split()
    return server.cpu_seconds() + sum(map(int, fields[11:15])) / TICKS_PER_SECOND


async def measure(server: Server, client: Client, case: dict[str, Any]) -> tuple[float, float]:
    """Jobs a second, and CPU milliseconds a job."""
    request = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command=COMMAND, **case)] * BULK)
    left = iter(range(JOBS // BULK))
    before, started = cpu_seconds(server), time.perf_counter()
    await asyncio.gather(*(send_all(client, request, left) for _ in range(2)))
    await client.wait_all_ended()
    seconds = time.perf_counter() - started
    return JOBS / seconds, (cpu_seconds(server) - before) / JOBS * 1000


async def connected(stack: contextlib.AsyncExitStack, **settings: str) -> tuple[Server, Client]:
    server = stack.enter_context(running_server(stack.enter_context(workplace()), **settings))
    return server, await stack.enter_async_context(Client(server.address, server.certs))


async def send_all(client: Client, request: pb.CreateJobsReq, left: Iterator[int]) -> None:
    for _ in left:
        answer = await client.call("CreateJobs", request)
        if any(result.error or result.status == "FAILED" for result in answer.results):
            raise RuntimeError(str(answer.results[0]))


async def main() -> None:
    findings = Findings("What does it cost to separate a job from the machine?")
    if os.geteuid() != 0:
        findings.note("only a root server separates its jobs: nothing is measured")
        findings.store()
        return
    rates: dict[str, list[float]] = {name: [] for name in CASES}
    costs: dict[str, list[float]] = {name: [] for name in CASES}
    async with contextlib.AsyncExitStack() as stack:
        none = await connected(stack, PROFILE="none")
        confining = await connected(stack, **CONFINING)
        for _ in range(REPETITIONS + 1):
            for name, case in CASES.items():
                rate, cost = await measure(*(none if name == "none" else confining), case)
                rates[name].append(rate)
                costs[name].append(cost)
    for figures in (*rates.values(), *costs.values()):
        del figures[0]  # to warm up
    for name in CASES:
        floor = [] if name == "none" else rates["none"]
        targets = [Target("ratio", "least", RATE_TARGETS[name])] if name in RATE_TARGETS else []
        findings.add(
            f"profile {name}", "jobs/s", rates[name], *targets, floor=floor, floor_name="none"
        )
    for name in CASES:
        floor = [] if name == "none" else costs["none"]
        findings.add(f"CPU, profile {name}", "ms/job", costs[name], floor=floor, floor_name="none")
    findings.store()


if __name__ == "__main__":
    run(main())
