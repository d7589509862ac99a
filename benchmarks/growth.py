"""Does the server get slower, or larger, as jobs pile up behind it?

Job rate and memory at 0, 10,000 and 100,000 ended jobs, and the time to page through the newest
of them; and how long a server takes to start again and take over 1,000 jobs that run.

The ended jobs are records that this script puts into the store while no server runs, through
the server's own code: what they looked like when they ended, but without output. In the quick
form there are 2,000, which have run.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from client import Client, create_many, run
from figures import QUICK, Findings, Target
from jobworker import job as transition
from jobworker.engine.store import Store
from jobworker.job import Accounting, JobSpec, OomKills
from jobworker.pb import job_worker_pb2 as pb
from server import Server, running_server, workplace

COMMAND = "/bin/true"
ENDED = (0, 2000) if QUICK else (0, 10_000, 100_000)
JOBS = 300 if QUICK else 500
REPETITIONS = 2 if QUICK else 5
IN_FLIGHT = 16
RUNNING = 200 if QUICK else 1000
LEAST_RATIO, MOST_MIB = 0.9, 50.0


async def fill(state: Path, count: int) -> None:
    """Puts so many ended jobs into the store of a server that does not run."""
    store = Store.open(state / "jobs.db")
    for _ in range(0, count, 1000):
        await asyncio.gather(*(store.put(_ended_job(store.reserve_id())) for _ in range(1000)))
    await store.close()


def _ended_job(job_id: int) -> transition.Job:
    now_ns = time.time_ns()
    job = transition.created(job_id, JobSpec(COMMAND, ("--some", "--args")), now_ns)
    job = transition.started(job, now_ns)
    job = transition.ended(job, 0, OomKills(), now_ns)
    return replace(job, accounting=Accounting(1200, 900, 1 << 20))


@asynccontextmanager
async def server_with(ended: int) -> AsyncIterator[tuple[Server, Client]]:
    """One that has so many ended jobs behind it."""
    with workplace() as folder:
        if ended and not QUICK:
            with running_server(folder):  # it makes the state folder
                pass
            await fill(folder / "state", ended)
        with running_server(folder) as server:
            async with Client(server.address, server.certs) as client:
                await create_many(client, ended if QUICK and ended else 100, IN_FLIGHT, COMMAND)
                await client.wait_all_ended()
                yield server, client


async def _rate(client: Client) -> float:
    started = time.perf_counter()
    await create_many(client, JOBS, IN_FLIGHT, COMMAND)
    await client.wait_all_ended()
    return JOBS / (time.perf_counter() - started)


async def _page_ms(client: Client) -> float:
    started = time.perf_counter()
    await client.call("ListJobs", pb.ListJobsReq(page_size=1000))
    return (time.perf_counter() - started) * 1000


async def measure_growth(findings: Findings) -> None:
    """All servers are there at the same time, and asked in turn: what else the machine does
    hits them alike. One that is not asked does nothing."""
    rates: dict[int, list[float]] = {ended: [] for ended in ENDED}
    rss_mib: dict[int, float] = {}
    async with AsyncExitStack() as closing:
        servers = [await closing.enter_async_context(server_with(ended)) for ended in ENDED]
        for _ in range(REPETITIONS):
            for ended, (_, client) in zip(ENDED, servers, strict=True):
                rates[ended].append(await _rate(client))
        for ended, (server, client) in zip(ENDED, servers, strict=True):
            rss_mib[ended] = server.rss_kib() / 1024
            pages = [await _page_ms(client) for _ in range(5)]
            targets = [Target("ratio", "least", LEAST_RATIO)] if ended == ENDED[-1] else []
            findings.add(
                f"job rate at {ended:,} ended jobs",
                "jobs/s",
                rates[ended],
                *targets,
                floor=rates[ENDED[0]] if ended else (),
                floor_name="at 0",
            )
            findings.add(f"RSS at {ended:,} ended jobs", "MiB", [rss_mib[ended]])
            findings.add(f"newest page of 1,000 at {ended:,}", "ms", [statistics.median(pages)])
    findings.add(
        f"RSS at {ENDED[-1]:,} ended jobs, beyond that at 0",
        "MiB",
        [rss_mib[ENDED[-1]] - rss_mib[ENDED[0]]],
        Target("value", "most", MOST_MIB),
    )


async def measure_restart(findings: Findings) -> None:
    empty, full = [], []
    with workplace() as folder:
        for _ in range(REPETITIONS):
            server = Server(folder)
            empty.append(server.ready_seconds)
            server.stop()
        server = Server(folder)
        try:
            async with Client(server.address, server.certs) as client:
                await create_many(client, RUNNING, IN_FLIGHT, "sleep", "100000")
            for _ in range(REPETITIONS):
                server.stop(signal.SIGKILL)
                server = Server(folder)
                full.append(server.ready_seconds)
                await _require_running(server)
        finally:
            server.stop()
    findings.add(
        f"start, and take over {RUNNING:,} jobs", "s", full, floor=empty, floor_name="start alone"
    )


async def _require_running(server: Server) -> None:
    async with Client(server.address, server.certs) as client:
        running = (await client.call("GetServerInfo")).running_jobs
    if running != RUNNING:
        raise RuntimeError(f"{running} of {RUNNING} jobs run on")


async def main() -> None:
    findings = Findings("Does the server get slower, or larger, as jobs pile up behind it?")
    how = "have run" if QUICK else "were put into its store as records, without output"
    findings.note(f"the ended jobs {how}")
    await measure_growth(findings)
    await measure_restart(findings)
    findings.store()


if __name__ == "__main__":
    run(main())
