"""How many jobs a second can be started, and recorded as ended?

/bin/true, one CreateJob for each, with 1, 16 and 64 of them under way at a time; measured
until the server has recorded the ending of the last. With profile `none`, as neither floor nor
peer separates a job from the machine; with profile `default` beside it.

Floor: a C program that does for each job what the kernel must (floor.c), two at a time; measured
anew just before each figure, as a shared machine is faster at one moment and slower at another.
Peer: HyperQueue from PyPI with the same command, all in one submission.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from client import Client, create_many, run
from figures import HERE, QUICK, Findings, Target
from jobworker.pb import job_worker_pb2 as pb
from server import compile_program, running_server, workplace

COMMAND = "/bin/true"
REPETITIONS = 2 if QUICK else 5
JOBS = 400 if QUICK else 3000
FLOOR_WORKERS = 2
IN_FLIGHT = (1, 16, 64)
FLOOR_TARGETS = {16: 0.5}
BULK = 100
BULK_TARGET = 0.65
PEER_TARGETS = {16: 1.8}
COMPARED_PROFILE = "none"
# The kernel goes on for a while with what has ended: its cgroups, namespaces and mounts.
SETTLE_SECONDS = 0.2 if QUICK else 0.5
PEER_ENVIRONMENT = HERE.parent / "build" / "hyperqueue"


def measure_floor(program: Path, base: Path) -> float:
    """Jobs a second. base: a directory of a cgroup v2."""
    cgroup = base / f"jobworker-floor-{os.getpid()}"
    cgroup.mkdir()
    try:
        answer = subprocess.run(
            [program, cgroup, str(JOBS), str(FLOOR_WORKERS), COMMAND],
            check=True,
            capture_output=True,
            text=True,
        )
    finally:
        cgroup.rmdir()
    return JOBS / float(answer.stdout)


async def measure_single(client: Client, in_flight: int, profile: str) -> float:
    """Jobs a second, one RPC each."""
    started = time.perf_counter()
    await create_many(client, JOBS, in_flight, COMMAND, profile=profile)
    await client.wait_all_ended()
    return JOBS / (time.perf_counter() - started)


async def measure_bulk(client: Client, profile: str) -> float:
    """Jobs a second, BULK in a request, two requests in flight."""
    request = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command=COMMAND, profile=profile)] * BULK)
    left = [request] * (JOBS // BULK)

    async def send_all() -> None:
        while left:
            answer = await client.call("CreateJobs", left.pop())
            if any(result.error or result.status == "FAILED" for result in answer.results):
                raise RuntimeError(str(answer.results[0]))

    started = time.perf_counter()
    await asyncio.gather(send_all(), send_all())
    await client.wait_all_ended()
    return JOBS // BULK * BULK / (time.perf_counter() - started)


def install_peer() -> str | None:
    """Why it cannot be had; None: it is there."""
    if (PEER_ENVIRONMENT / "installed").exists():
        return None
    steps: tuple[list[str], ...] = (
        [sys.executable, "-m", "venv", "--clear", str(PEER_ENVIRONMENT)],
        [str(PEER_ENVIRONMENT / "bin" / "pip"), "--quiet", "install", "hyperqueue"],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr or done.stdout).strip().splitlines()[-1]
    (PEER_ENVIRONMENT / "installed").touch()
    return None


def measure_peer() -> float:
    """Jobs a second. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:  # for all that it leaves behind
        answer = subprocess.run(
            [PEER_ENVIRONMENT / "bin" / "python", HERE / "peer_hyperqueue.py", str(JOBS), COMMAND],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"TMPDIR": folder},
        )
    return float(answer.stdout.partition("rate ")[2].split()[0])


@dataclass(frozen=True)
class Case:
    """What is measured of one server."""

    name: str
    measure: Callable[[], Awaitable[float]]  # jobs a second
    runs: list[float] = field(default_factory=list)
    floor_runs: list[float] = field(default_factory=list)
    target: float | None = None  # of the floor, at least
    peer_target: float | None = None


def cases_of(client: Client, profile: str) -> Iterator[Case]:
    is_compared = profile == COMPARED_PROFILE
    about = "" if is_compared else f", profile {profile}"
    for in_flight in IN_FLIGHT:
        yield Case(
            f"one RPC each, {in_flight} in flight{about}",
            partial(measure_single, client, in_flight, profile),
            target=FLOOR_TARGETS.get(in_flight) if is_compared else None,
            peer_target=PEER_TARGETS.get(in_flight) if is_compared else None,
        )
    yield Case(
        f"in bulk, {BULK} in a request{about}",
        partial(measure_bulk, client, profile),
        target=BULK_TARGET if is_compared else None,
    )


async def main() -> None:
    findings = Findings("How many jobs a second can be started, and recorded as ended?")
    no_peer = install_peer()
    if no_peer:
        findings.note(f"HyperQueue is not compared: it cannot be installed here: {no_peer}")
    peer_runs: list[float] = []
    cases: list[Case] = []
    base: Path | None = None
    async with contextlib.AsyncExitStack() as stack:
        program = compile_program(stack.enter_context(workplace()), "floor")
        # Each of a server that allows no other one, as usual. Where it is not root there is no
        # other one.
        for settings in ({"PROFILE": COMPARED_PROFILE}, {}):
            folder = stack.enter_context(workplace())
            server = stack.enter_context(running_server(folder, **settings))
            client = await stack.enter_async_context(Client(server.address, server.certs))
            info = await client.call("GetServerInfo")
            cases += cases_of(client, info.default_profile)
            base = Path(info.cgroup).parent if info.cgroup else None
            await create_many(client, 100, 16, COMMAND)
        if base is None:
            findings.note("no writable cgroup v2: the floor is left out, jobs have no cgroups")
        for _ in range(REPETITIONS):
            for case in cases:
                if base:
                    await asyncio.sleep(SETTLE_SECONDS)
                    case.floor_runs.append(measure_floor(program, base))
                await asyncio.sleep(SETTLE_SECONDS)
                case.runs.append(await case.measure())
                if case.peer_target and not no_peer:
                    await asyncio.sleep(SETTLE_SECONDS)
                    peer_runs.append(measure_peer())
    report(findings, cases, peer_runs)
    findings.store()


def report(findings: Findings, cases: list[Case], peer_runs: list[float]) -> None:
    for case in cases:
        targets = [Target("ratio", "least", case.target)] if case.target else []
        findings.add(
            case.name,
            "jobs/s",
            case.runs,
            *(targets if case.floor_runs else []),
            floor=case.floor_runs,
            floor_name="C floor",
        )
    for case in cases:
        if case.peer_target and peer_runs:
            findings.add(
                "HyperQueue", "jobs/s", peer_runs, floor=case.floor_runs, floor_name="C floor"
            )
            findings.add(
                f"{case.name}, beside HyperQueue",
                "jobs/s",
                case.runs,
                Target("ratio", "least", case.peer_target),
                floor=peer_runs,
                floor_name="HyperQueue",
            )


if __name__ == "__main__":
    run(main())
