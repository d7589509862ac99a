"""How many jobs a second can be started, and recorded as ended?

/bin/true, one CreateJob for each, with 1, 16 and 64 of them under way at a time; measured
until the server has recorded the ending of the last. With profile `none`, as neither floor nor
peer separates a job from the machine; with profile `default` beside it.

Floor: a C program that does for each job what the kernel must (floor.c), two at a time.
Peer: HyperQueue from PyPI with the same command, all in one submission.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
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
    answer = subprocess.run(
        [PEER_ENVIRONMENT / "bin" / "python", HERE / "peer_hyperqueue.py", str(JOBS), COMMAND],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return float(answer.stdout.partition("rate ")[2].split()[0])


@dataclass
class Runs:
    """Jobs a second, of one profile."""

    client: Client
    single: dict[int, list[float]]  # by how many are in flight
    bulk: list[float]


async def main() -> None:
    findings = Findings("How many jobs a second can be started, and recorded as ended?")
    no_peer = install_peer()
    if no_peer:
        findings.note(f"HyperQueue is not compared: it cannot be installed here: {no_peer}")
    floor_runs: list[float] = []
    peer_runs: list[float] = []
    runs: dict[str, Runs] = {}
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
            runs[info.default_profile] = Runs(client, {number: [] for number in IN_FLIGHT}, [])
            base = Path(info.cgroup).parent if info.cgroup else None
            await create_many(client, 100, 16, COMMAND)
        if base is None:
            findings.note("no writable cgroup v2: the floor is left out, jobs have no cgroups")
        for _ in range(REPETITIONS):
            if base:
                floor_runs.append(measure_floor(program, base))
            for profile, of_profile in runs.items():
                for in_flight, rates in of_profile.single.items():
                    rates.append(await measure_single(of_profile.client, in_flight, profile))
                of_profile.bulk.append(await measure_bulk(of_profile.client, profile))
            if not no_peer:
                peer_runs.append(measure_peer())
    for profile in sorted(runs, key=lambda name: name != COMPARED_PROFILE):
        report(findings, profile, runs[profile], floor_runs)
    report_peer(findings, runs[COMPARED_PROFILE], floor_runs, peer_runs)
    findings.store()


def report(findings: Findings, profile: str, runs: Runs, floor_runs: list[float]) -> None:
    is_compared = bool(floor_runs) and profile == COMPARED_PROFILE
    about = "" if profile == COMPARED_PROFILE else f", profile {profile}"
    for in_flight, rates in runs.single.items():
        targets = []
        if is_compared and in_flight in FLOOR_TARGETS:
            targets = [Target("ratio", "least", FLOOR_TARGETS[in_flight])]
        findings.add(
            f"one RPC each, {in_flight} in flight{about}",
            "jobs/s",
            rates,
            *targets,
            floor=floor_runs,
            floor_name="C floor",
        )
    findings.add(
        f"in bulk, {BULK} in a request{about}",
        "jobs/s",
        runs.bulk,
        *([Target("ratio", "least", BULK_TARGET)] if is_compared else []),
        floor=floor_runs,
        floor_name="C floor",
    )


def report_peer(
    findings: Findings, runs: Runs, floor_runs: list[float], peer_runs: list[float]
) -> None:
    if not peer_runs:
        return
    findings.add("HyperQueue", "jobs/s", peer_runs, floor=floor_runs, floor_name="C floor")
    for in_flight, least in PEER_TARGETS.items():
        findings.add(
            f"one RPC each, {in_flight} in flight, beside HyperQueue",
            "jobs/s",
            runs.single[in_flight],
            Target("ratio", "least", least),
            floor=peer_runs,
            floor_name="HyperQueue",
        )


if __name__ == "__main__":
    run(main())
