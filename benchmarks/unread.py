"""Streams that nobody reads, in a process of their own: what they cost a client is no part of
any question.

unread.py ADDRESS CERTS COUNT METHOD REQUEST    prints a line, and holds as many streams until
                                                its standard input is closed; REQUEST in hex

Its window is fixed. grpc's default one grows while a stream is not read, on some connections
without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from client import SERVICE, open_channel, run
from floor_grpc import STREAM, stream_request
from jobworker.pb import job_worker_pb2 as pb
from server import Process

PER_CONNECTION = 20
# What grpc's default begins with.
WINDOW_BYTES = 4 << 20
FIXED_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", WINDOW_BYTES))
FLOOR_BYTES = 64 << 20
FLOOR_MESSAGE_BYTES = 32 << 10

QUIET_SECONDS = 3
LONGEST_SECONDS = 120


def unread_output(job_id: str) -> list[str]:
    request = pb.GetJobsStreamReq(id=job_id).SerializeToString()
    return [f"{SERVICE}GetJobsStream", request.hex()]


def unread_floor() -> list[str]:
    return [STREAM, stream_request(FLOOR_BYTES, FLOOR_MESSAGE_BYTES).hex()]


@contextlib.contextmanager
def holding_unread(
    server: Process, address: str, certs: Path, count: int, call: list[str]
) -> Iterator[Process]:
    """The process that holds them, once they and the server are at rest: the question is what
    stands still, and not its start."""
    process = subprocess.Popen(
        [sys.executable, __file__, address, str(certs), str(count), *call],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdout.readline()
        holder = Process(process.pid)
        _wait_at_rest(server, holder)
        yield holder
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def _wait_at_rest(*processes: Process) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while True:
        before = sum(each.cpu_seconds() for each in processes)
        time.sleep(QUIET_SECONDS)
        if sum(each.cpu_seconds() for each in processes) - before < 0.01 * QUIET_SECONDS:
            return
        if time.monotonic() > deadline:
            raise RuntimeError("streams that nobody reads do not come to rest")


async def hold(address: str, certs: Path, count: int, method: str, request: bytes) -> None:
    channels = [
        open_channel(address, certs, *FIXED_WINDOW) for _ in range(-(-count // PER_CONNECTION))
    ]
    streams = [
        channels[place // PER_CONNECTION].unary_stream(method)(request) for place in range(count)
    ]
    await asyncio.gather(*(stream.initial_metadata() for stream in streams))
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # the memory of all that was not read need not be given back


if __name__ == "__main__":
    address, certs, count, method, request = sys.argv[1:]
    run(hold(address, Path(certs), int(count), method, bytes.fromhex(request)))
