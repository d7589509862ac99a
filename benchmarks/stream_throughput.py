"""How fast does a job's output reach its readers?

A job writes at full speed as soon as its readers are there: to stdout alone, and to both
streams at once. Measured from then on until the last reader has the last byte, all readers
together. Each reader has a connection of its own.

Floor: the same client reads as many messages of 1 MiB, which a grpc.aio server sends from
memory, encoded before, over the same TLS.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from client import Client, open_channel, payload_bytes, run
from figures import QUICK, Findings, Target
from floor_grpc import ECHO, floor_stream, running_floor
from server import Server, make_fifo, running_server, workplace

MIB = 1 << 20
REPETITIONS = 2 if QUICK else 5
# What the job writes, for each number of readers.
SIZES_MIB = {1: 256, 4: 64, 16: 32} if QUICK else {1: 1024, 4: 1024, 16: 1024}
TARGETS = {1: 0.6, 16: 0.85}
READY = b"ready\n"

WRITE = "dd if=/dev/zero bs=1M count={} status=none"
# The job waits at a FIFO, so that its readers are there from the first byte on.
ONE_STREAM = f"echo ready; read go < {{}}; {WRITE}"
BOTH_STREAMS = f"echo ready; read go < {{}}; {WRITE} & {WRITE} >&2; wait"


async def drain(messages: AsyncIterator[bytes]) -> int:
    """Bytes of payload, to the end of the stream."""
    total = 0
    async for message in messages:
        total += payload_bytes(message)
    return total


async def measure_floor(address: str, certs: Path, readers: int, mib: int) -> float:
    """MiB/s of all readers together."""
    async with AsyncExitStack() as closing:
        channels = [
            await closing.enter_async_context(open_channel(address, certs)) for _ in range(readers)
        ]
        for channel in channels:
            await channel.unary_unary(ECHO)(b"connected")
        started = time.perf_counter()
        totals = await asyncio.gather(
            *(drain(floor_stream(channel, mib * MIB)) for channel in channels)
        )
        took = time.perf_counter() - started
    return _rate(totals, mib * MIB, took)


async def measure_job(server: Server, readers: int, mib: int, script: str, parts: int) -> float:
    """MiB/s of all readers together. parts: by which the script divides what it writes."""
    fifo = make_fifo(server.state.parent, "go")
    async with AsyncExitStack() as closing:
        clients = [
            await closing.enter_async_context(Client(server.address, server.certs))
            for _ in range(readers)
        ]
        filled = script.format(fifo, *[mib // parts] * parts)
        job_id = await clients[0].create("sh", "-c", filled)
        streams = [client.stream(job_id) for client in clients]
        for stream in streams:
            assert payload_bytes(await anext(stream)) == len(READY)
        started = time.perf_counter()
        await asyncio.to_thread(fifo.write_text, "go\n")
        totals = await asyncio.gather(*map(drain, streams))
        took = time.perf_counter() - started
        await clients[0].wait_all_ended()
    fifo.unlink()
    return _rate(totals, mib * MIB, took)


def _rate(totals: Sequence[int], expected: int, seconds: float) -> float:
    for total in totals:
        if total != expected:
            raise RuntimeError(f"a reader got {total} of {expected} bytes")
    return sum(totals) / MIB / seconds


async def main() -> None:
    findings = Findings("How fast does a job's output reach its readers?")
    with workplace() as folder, running_floor(folder / "certs") as (floor, _):
        for readers, mib in SIZES_MIB.items():
            floor_runs, one, both = [], [], []
            for _ in range(REPETITIONS):
                # A server for each, or the disk would fill with what was written before.
                with running_server(folder) as server:
                    floor_runs.append(await measure_floor(floor, server.certs, readers, mib))
                    one.append(await measure_job(server, readers, mib, ONE_STREAM, 1))
                    both.append(await measure_job(server, readers, mib, BOTH_STREAMS, 2))
                _remove_output(server)
            plural = "reader" if readers == 1 else "readers"
            targets = [Target("ratio", "least", TARGETS[readers])] if readers in TARGETS else []
            beside: dict[str, Any] = {"floor": floor_runs, "floor_name": "grpc.aio alone"}
            findings.add(f"{readers} {plural}, stdout", "MiB/s", one, *targets, **beside)
            findings.add(f"{readers} {plural}, stdout and stderr", "MiB/s", both, **beside)
    findings.store()


def _remove_output(server: Server) -> None:
    for path in (server.state / "output").iterdir():
        path.unlink()


if __name__ == "__main__":
    run(main())
