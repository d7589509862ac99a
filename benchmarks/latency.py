"""How long does it take from a job's write to its reader's receipt?

A job writes the time every few milliseconds, and its reader compares it with its own clock:
alone on the machine, beside 100 other jobs with a line every 100 ms and a reader each, and
beside a job that writes to its output, and so to the disk, at full speed.

Floor: the same writer behind a pipe, whose bytes a grpc.aio server hands on.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from client import Client, open_channel, payload_of, run
from figures import QUICK, Findings, Target, percentile
from floor_grpc import TICKS, running_floor
from server import Server, compile_program, running_server, workplace

REPETITIONS = 1 if QUICK else 3
TICK_COUNT = 500 if QUICK else 2500
PERIOD_MS = 4
WARM_UP = 50  # the first ticks meet cold caches, and a client that is still starting
OTHERS = 100
OTHERS_PERIOD_MS = 100
OTHER_CONNECTIONS = 10
LOUD_BYTES = 24 << 30  # more than it gets to write, and at most half of what the disk has left

PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
TARGETS = {
    ("idle", "p50"): Target("ratio", "most", 1.5),
    ("idle", "p99"): Target("value", "most", 3.0),
    ("beside a loud job", "p99"): Target("value", "most", 10.0),
}

Delays = list[float]


def ticker(server: Server) -> list[str]:
    return [str(server.state.parent / "jobs" / "ticker"), str(TICK_COUNT), str(PERIOD_MS)]


async def collect(messages: AsyncIterator[bytes]) -> Delays:
    """In ms, of each tick to the end of the stream."""
    delays = []
    async for message in messages:
        now_ns = time.monotonic_ns()
        payload = payload_of(message)
        for place in range(0, len(payload), 8):
            written_ns = int.from_bytes(payload[place : place + 8], "little")
            delays.append((now_ns - written_ns) / 1e6)
    if len(delays) != TICK_COUNT:
        raise RuntimeError(f"{len(delays)} of {TICK_COUNT} ticks")
    return delays[WARM_UP:]


async def measure_floor(address: str, server: Server) -> Delays:
    async with open_channel(address, server.certs) as channel:
        request = "\0".join(ticker(server)).encode()
        return await collect(aiter(channel.unary_stream(TICKS)(request)))


async def measure_job(server: Server) -> Delays:
    async with Client(server.address, server.certs) as client:
        job_id = await client.create(*ticker(server))
        return await collect(client.stream(job_id))


async def measure_beside_others(server: Server) -> Delays:
    script = f"while :; do echo a line of output; sleep {OTHERS_PERIOD_MS / 1000}; done"
    async with AsyncExitStack() as closing:
        clients = [
            await closing.enter_async_context(Client(server.address, server.certs))
            for _ in range(OTHER_CONNECTIONS)
        ]
        job_ids = [await clients[0].create("sh", "-c", script) for _ in range(OTHERS)]
        readers = [
            asyncio.create_task(_discard(clients[place % OTHER_CONNECTIONS].stream(job_id)))
            for place, job_id in enumerate(job_ids)
        ]
        delays = await measure_job(server)
        await asyncio.gather(*map(clients[0].stop, job_ids), *readers)
    return delays


async def measure_beside_loud(server: Server) -> Delays:
    async with Client(server.address, server.certs) as client:
        most_bytes = min(LOUD_BYTES, shutil.disk_usage(server.state).free // 2)
        job_id = await client.create("head", "-c", str(most_bytes), "/dev/zero")
        delays = await measure_job(server)
        if (await client.call("GetServerInfo")).running_jobs == 0:
            raise RuntimeError(
                f"the loud job was over too early, after {most_bytes >> 30} GiB: set BENCH_DIR to "
                "a folder on a larger disk"
            )
        await client.stop(job_id)
    for path in (server.state / "output").glob(f"{job_id}.*"):
        path.unlink()
    return delays


async def _discard(messages: AsyncIterator[bytes]) -> None:
    async for _ in messages:
        pass


async def main() -> None:
    findings = Findings("How long does it take from a job's write to its reader's receipt?")
    measured: dict[str, list[Delays]] = {"floor": []}
    situations = {
        "idle": measure_job,
        "beside 100 others": measure_beside_others,
        "beside a loud job": measure_beside_loud,
    }
    with (
        workplace() as folder,
        running_floor(folder / "certs") as (floor, _),
        running_server(folder) as server,
    ):
        compile_program(folder, "ticker")
        for _ in range(REPETITIONS):
            measured["floor"].append(await measure_floor(floor, server))
            for name, measure in situations.items():
                measured.setdefault(name, []).append(await measure(server))
    floor_runs = measured.pop("floor")
    for name, runs in measured.items():
        for label, share in PERCENTILES.items():
            target = TARGETS.get((name, label))
            findings.add(
                f"{name}, {label}",
                "ms",
                [percentile(delays, share) for delays in runs],
                *([target] if target else []),
                floor=[percentile(delays, share) for delays in floor_runs],
                floor_name="pipe and grpc.aio",
            )
    findings.store()


if __name__ == "__main__":
    run(main())
