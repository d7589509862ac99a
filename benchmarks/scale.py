"""What do many jobs, many readers, and readers that read nothing cost?

Sleeping jobs, as many as the server takes: how fast they start, what each costs in memory, what
all of them cost in CPU while nothing happens, and how long get, list and stop take then.
1,000 readers of one job that writes a line; 1,000 jobs with a line a second and a reader each;
1,000 streams that nobody reads, and what that does to one that is read; beside it, what as many
do to a grpc.aio server that sends from memory.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from client import Client, create_many, for_each, payload_bytes, payload_of, run
from figures import QUICK, Findings, Target, percentile
from floor_grpc import ECHO, floor_stream, running_floor
from jobworker.pb import job_worker_pb2 as pb
from server import Process, Server, make_fifo, running_server, workplace
from unread import PER_CONNECTION, WINDOW_BYTES, holding_unread, unread_floor, unread_output

MOST_SLEEPERS = 500 if QUICK else 1_000_000  # the server's own limit is lower
STREAMS = 200 if QUICK else 1000
IDLE_SECONDS = 2 if QUICK else 20
CALLS = 50 if QUICK else 300
LINES = 30 if QUICK else 200
LINE_SECONDS = 5 if QUICK else 20
HISTORY_MIB = 16 if QUICK else 64
HISTORY_READS = 3 if QUICK else 7
IN_FLIGHT = 16

SLEEP = ("sleep", "100000")


async def main() -> None:
    findings = Findings("What do many jobs, many readers, and readers that read nothing cost?")
    for measure in (
        measure_sleepers,
        measure_readers_of_one,
        measure_jobs_with_readers,
        measure_unread,
    ):
        # A server for each: what one situation leaves in memory must not count in another.
        with workplace() as folder, running_server(folder, CLIENT_STREAMS="2000") as server:
            await measure(findings, server)
    findings.store()


# Sleeping jobs


async def measure_sleepers(findings: Findings, server: Server) -> None:
    async with Client(server.address, server.certs) as client:
        await client.call("GetServerInfo")
        await _report_quiet(findings, server)
        await _warm_up(client)
        before_kib, jobinit_before_kib = server.rss_kib(), server.jobinit.rss_kib()
        room = (await client.call("GetServerInfo")).maximum_jobs
        count = min(MOST_SLEEPERS, room)
        started = time.perf_counter()
        job_ids = await create_many(client, count, IN_FLIGHT, *SLEEP)
        took = time.perf_counter() - started
        findings.note(f"{count:,} sleeping jobs, of {room:,} that the server takes")
        findings.add("start of sleeping jobs", "jobs/s", [count / took])
        findings.add(
            "server RSS for each sleeping job",
            "KiB",
            [(server.rss_kib() - before_kib) / count],
            Target("value", "most", 12),
        )
        findings.add(
            "jobinit RSS for each sleeping job",
            "bytes",
            [(server.jobinit.rss_kib() - jobinit_before_kib) * 1024 / count],
            Target("value", "most", 400),
        )
        idle = await _cpu_percents(server)
        findings.add("CPU while all sleep", "%", idle, Target("value", "most", 1))
        await _report_calls(findings, client, job_ids)


async def _report_quiet(findings: Findings, server: Server) -> None:
    """A server that has done nothing yet."""
    findings.add(
        "RSS of a quiet server", "MiB", [server.rss_kib() / 1024], Target("value", "most", 80)
    )
    findings.add(
        "RSS of an empty jobinit",
        "MiB",
        [server.jobinit.rss_kib() / 1024],
        Target("value", "most", 1),
    )
    with running_floor(server.certs) as (floor, floor_process):
        async with Client(floor, server.certs) as floor_client:
            await floor_client.channel.unary_unary(ECHO)(b"")
            quiet, floor_quiet = await _cpu_percents(server, floor_process)
    findings.add(
        "CPU of a quiet server",
        "%",
        [quiet],
        Target("value", "most", 0.05),
        floor=[floor_quiet],
        floor_name="a grpc.aio server that does nothing",
    )


async def _warm_up(client: Client) -> None:
    """What the first jobs of a server load and keep is not theirs."""
    await create_many(client, 64, IN_FLIGHT, "/bin/true")
    await client.wait_all_ended()


async def _report_calls(findings: Findings, client: Client, job_ids: list[str]) -> None:
    some = job_ids[:: max(1, len(job_ids) // CALLS)]
    get = [await _time_ms(client.call("GetJob", pb.GetJobReq(id=each))) for each in some]
    findings.add("get, p50", "ms", [statistics.median(get)])
    findings.add(
        f"list of all {len(job_ids):,}, in pages of 1,000",
        "ms",
        [await _time_ms(_list_all(client))],
    )
    stop = [await _time_ms(client.stop(each)) for each in some]
    findings.add("stop of one, p50", "ms", [statistics.median(stop)])
    left = sorted(set(job_ids) - set(some), key=int)
    started = time.perf_counter()
    await _stop_all(client, left)
    rate = len(left) / (time.perf_counter() - started)
    findings.add(f"stop of all others, {IN_FLIGHT} in flight", "jobs/s", [rate])


async def _list_all(client: Client) -> None:
    token = ""
    while True:
        request = pb.ListJobsReq(page_size=1000, page_token=token)
        token = (await client.call("ListJobs", request)).next_page_token
        if not token:
            return


async def _stop_all(client: Client, job_ids: list[str]) -> None:
    await for_each(job_ids, IN_FLIGHT, client.stop)


# Streams


@asynccontextmanager
async def connections(server: Server, streams: int) -> AsyncIterator[list[Client]]:
    async with AsyncExitStack() as closing:
        yield [
            await closing.enter_async_context(Client(server.address, server.certs))
            for _ in range(-(-streams // PER_CONNECTION))
        ]


async def measure_readers_of_one(findings: Findings, server: Server) -> None:
    """A line is at its last reader how much later than it was written?"""
    fifo = make_fifo(server.state.parent, "lines")
    script = f"echo ready; while read line; do echo $line; done < {fifo}"
    async with connections(server, STREAMS) as clients:
        job_id = await clients[0].create("sh", "-c", script)
        before_kib = server.rss_kib()
        started = time.perf_counter()
        readers = [clients[place // PER_CONNECTION].stream(job_id) for place in range(STREAMS)]
        await asyncio.gather(*map(anext, readers))
        findings.add(
            f"{STREAMS:,} readers of one job: all attached", "s", [time.perf_counter() - started]
        )
        growth_kib = server.rss_kib() - before_kib
        findings.add(
            "server RSS for each reader and its part of a connection", "KiB", [growth_kib / STREAMS]
        )
        with await asyncio.to_thread(fifo.open, "w", buffering=1) as lines:
            delays = []
            for number in range(LINES):
                written = time.perf_counter()
                lines.write(f"{number}\n")
                await asyncio.gather(*map(anext, readers))
                delays.append((time.perf_counter() - written) * 1000)
        findings.add(f"a line at all {STREAMS:,} readers, p50", "ms", [statistics.median(delays)])
        findings.add(f"a line at all {STREAMS:,} readers, p99", "ms", [percentile(delays, 0.99)])
        await asyncio.gather(*map(_to_end, readers))


async def measure_jobs_with_readers(findings: Findings, server: Server) -> None:
    # The seconds since the start of the machine, as CLOCK_MONOTONIC counts them; to 10 ms.
    script = "while :; do read up rest < /proc/uptime; echo $up; sleep 1; done"
    async with connections(server, STREAMS) as clients:
        job_ids = await create_many(clients[0], STREAMS, IN_FLIGHT, "sh", "-c", script)
        delays: list[float] = []
        readers = [
            asyncio.create_task(_collect(clients[place // PER_CONNECTION].stream(each), delays))
            for place, each in enumerate(job_ids)
        ]
        await asyncio.sleep(2)  # history is read, all follow live
        delays.clear()
        cpu_before, started = server.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(LINE_SECONDS)
        took, seen = time.perf_counter() - started, list(delays)
        cpu = (server.cpu_seconds() - cpu_before) / took * 100
        findings.note(f"{STREAMS:,} jobs with a line a second: their clock counts in 10 ms")
        findings.add("lines that arrived", "1/s", [len(seen) / took])
        findings.add("a line at its reader, p50", "ms", [percentile(seen, 0.5)])
        findings.add("a line at its reader, p99", "ms", [percentile(seen, 0.99)])
        findings.add(f"CPU of the server at {STREAMS:,} lines a second", "%", [cpu])
        await _stop_all(clients[0], job_ids)
        await asyncio.gather(*readers)


async def measure_unread(findings: Findings, server: Server) -> None:
    # Of two servers, with room for as much again.
    count = min(STREAMS, _available_bytes() // (4 * WINDOW_BYTES))
    script = f"dd if=/dev/zero bs=1M count={HISTORY_MIB} status=none; exec sleep 100000"
    address, certs = server.address, server.certs
    with running_floor(certs) as (floor, floor_process):
        async with Client(address, certs) as client, Client(floor, certs) as floor_client:
            job_id = await client.create("sh", "-c", script)
            readers = (
                lambda: client.stream(job_id),
                lambda: floor_stream(floor_client.channel, HISTORY_MIB << 20),
            )
            await _read_history(readers[0]())  # from then on all of it is there
            before = await _read_in_turn(*readers)
            before_kib = server.rss_kib()
            with (
                holding_unread(server, address, certs, count, unread_output(job_id)) as holder,
                holding_unread(floor_process, floor, certs, count, unread_floor()),
            ):
                growth_mib = (server.rss_kib() - before_kib) / 1024
                held_mib = holder.rss_kib() / 1024
                beside, floor_beside = await _read_in_turn(*readers)
            after = await _read_in_turn(*readers)
            await client.stop(job_id)
    # Before and after: the machine is faster at one minute and slower at another.
    alone, floor_alone = (
        [statistics.mean(pair) for pair in zip(*runs, strict=True)]
        for runs in zip(before, after, strict=True)
    )
    findings.note(f"{count:,} streams that nobody reads; their client holds {held_mib:,.0f} MiB")
    findings.add(
        f"server RSS for {count:,} unread streams",
        "MiB",
        [growth_mib],
        *([] if QUICK else [Target("value", "most", 96)]),
    )
    reader = f"a reader beside {count:,} unread streams"
    findings.add(
        reader,
        "MiB/s",
        beside,
        Target("ratio", "least", 0.9),
        floor=alone,
        floor_name="alone",
    )
    findings.add(
        f"{reader}, grpc.aio", "MiB/s", floor_beside, floor=floor_alone, floor_name="alone"
    )


async def _read_in_turn(*sources: Callable[[], AsyncIterator[bytes]]) -> list[list[float]]:
    """MiB/s of each, several times."""
    runs: list[list[float]] = [[] for _ in sources]
    for _ in range(HISTORY_READS):
        for source, found in zip(sources, runs, strict=True):
            found.append(await _read_history(source()))
    return runs


async def _read_history(stream: AsyncIterator[bytes]) -> float:
    """MiB/s."""
    wanted = HISTORY_MIB << 20
    total, started = 0, time.perf_counter()
    while total < wanted:
        total += payload_bytes(await anext(stream))
    return HISTORY_MIB / (time.perf_counter() - started)


def _available_bytes() -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


async def _to_end(messages: AsyncIterator[bytes]) -> None:
    async for _ in messages:
        pass


async def _collect(messages: AsyncIterator[bytes], delays_ms: list[float]) -> None:
    async for message in messages:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        delays_ms += [(now - float(line)) * 1000 for line in payload_of(message).split()]


# Time


async def _cpu_percents(server: Server, *others: Process) -> list[float]:
    """Of one core, of the server and its jobinit, and of the others, while no client does
    anything."""

    def used_seconds() -> list[float]:
        server_seconds = server.cpu_seconds() + server.jobinit.cpu_seconds()
        return [server_seconds, *(each.cpu_seconds() for each in others)]

    await asyncio.sleep(1)
    before = used_seconds()
    await asyncio.sleep(IDLE_SECONDS)
    after = used_seconds()
    return [(end - start) / IDLE_SECONDS * 100 for start, end in zip(before, after, strict=True)]


async def _time_ms(call: Awaitable[Any]) -> float:
    started = time.perf_counter()
    await call
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    run(main())
