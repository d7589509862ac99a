"""The floor of streams and latency: a grpc.aio server that does nothing but send.

floor_grpc.py CERTS    prints its port, and serves until its standard input is closed

/floor/Stream   sends the same pre-encoded message, as often and as large as asked
/floor/Ticks    hands on what a command (ticker.c) writes to a pipe, one message for each read
/floor/Echo     answers what it was asked
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

# As in the server under test.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"

import grpc
import uvloop

from server import Process

MESSAGE_BYTES = 1 << 20
STREAM, TICKS, ECHO = "/floor/Stream", "/floor/Ticks", "/floor/Echo"
Context = grpc.aio.ServicerContext[Any, Any]


def encode(payload: bytes) -> bytes:
    """A DataChunk with nothing else in it."""
    length = len(payload)
    header = bytearray(b"\x0a")
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return bytes(header) + payload


encoded = functools.cache(lambda payload_bytes: encode(bytes(payload_bytes)))


def stream_request(total_bytes: int, message_bytes: int = MESSAGE_BYTES) -> bytes:
    return b"%d %d" % (total_bytes // message_bytes, message_bytes)


def floor_stream(channel: Any, total_bytes: int) -> AsyncIterator[bytes]:
    """For clients."""
    return aiter(channel.unary_stream(STREAM)(stream_request(total_bytes)))


async def stream(request: bytes, context: Context) -> None:
    count, message_bytes = map(int, request.split())
    message = encoded(message_bytes)
    for _ in range(count):
        await context.write(message)


async def ticks(request: bytes, context: Context) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    command = request.decode().split("\0")
    ticker = subprocess.Popen(command, stdout=theirs)  # noqa: ASYNC220 it forks once a run
    os.close(theirs)
    try:
        while data := await _read(ours):
            await context.write(encode(data))
    finally:
        os.close(ours)
        ticker.wait()


async def _read(pipe: int) -> bytes:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pipe, readable.set_result, None)
    try:
        await readable
    finally:
        loop.remove_reader(pipe)
    return os.read(pipe, 65536)


async def echo(request: bytes, _: Context) -> bytes:
    return request


class Handlers(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self._methods: dict[str, Any] = {
            STREAM: grpc.unary_stream_rpc_method_handler(stream),
            TICKS: grpc.unary_stream_rpc_method_handler(ticks),
            ECHO: grpc.unary_unary_rpc_method_handler(echo),
        }

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(details.method)


async def serve(certs: Path) -> None:
    key, certificate, authority = (
        (certs / name).read_bytes() for name in ("server-key.pem", "server-cert.pem", "ca-cert.pem")
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Handlers(),))
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority, True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


@contextlib.contextmanager
def running_floor(certs: Path) -> Iterator[tuple[str, Process]]:
    """Its address, and what it uses."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(certs)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}", Process(process.pid)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))
