"""What do others notice while one client takes all that it can?

GetJob of one client, call after call, and the server's memory: alone, beside 1,000 connections
that another holds and does not use, and beside its 10,000 streams of a job's output, on ten
connections, of which it reads nothing. The other client is a process of its own. How long the
worst call took is noted too: while so much is opened, others wait behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import socket
import ssl
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from client import Client, open_channel, run
from figures import QUICK, Findings, percentile
from jobworker import certs
from jobworker.pb import job_worker_pb2 as pb
from server import Server, running_server, workplace

CONNECTIONS = 200 if QUICK else 1000
STREAMS = 1000 if QUICK else 10_000
STREAM_CONNECTIONS = 10
CALLS = 200 if QUICK else 2000
HISTORY_BYTES = 8_000_000
OPENED = "opened"
# Where there are too many connections, those of the host that has most of them give way.
OTHER_HOST = "127.0.0.2"


async def delays_ms(client: Client, job_id: str) -> list[float]:
    delays = []
    for _ in range(CALLS):
        started = time.perf_counter()
        await client.call("GetJob", pb.GetJobReq(id=job_id))
        delays.append((time.perf_counter() - started) * 1000)
    return delays


@asynccontextmanager
async def hostile(kind: str, server: Server, job_id: str) -> AsyncIterator[asyncio.Task[None]]:
    """Runs this script as the other client; the task ends when it has opened all."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, kind, server.address, str(_others_certs(server)), job_id),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )

    async def wait_opened() -> None:
        assert process.stdout is not None
        if OPENED not in (await process.stdout.readline()).decode():
            raise RuntimeError("the other client did not get so far")

    opened = asyncio.create_task(wait_opened())
    try:
        yield opened
    finally:
        process.kill()
        await process.wait()


async def measure(findings: Findings, server: Server) -> None:
    async with Client(server.address, server.certs) as client:
        job_id = await client.create(
            "sh", "-c", f"head -c {HISTORY_BYTES} /dev/zero; exec sleep 100000"
        )
        _report(findings, "alone", await delays_ms(client, job_id), server)
        for kind, name in (
            ("connections", f"beside {CONNECTIONS:,} idle connections"),
            ("streams", f"beside {STREAMS:,} unread streams"),
        ):
            async with hostile(kind, server, job_id) as opened:
                opening = []
                while not opened.done():
                    opening += await delays_ms(client, job_id)
                await opened
                _report(findings, name, await delays_ms(client, job_id), server)
                findings.add(
                    f"while these are opened: the worst GetJob, {kind}", "ms", [max(opening)]
                )
        await client.stop(job_id)


def _report(findings: Findings, name: str, delays: list[float], server: Server) -> None:
    findings.add(f"{name}: GetJob p50", "ms", [statistics.median(delays)])
    findings.add(f"{name}: GetJob p99", "ms", [percentile(delays, 0.99)])
    findings.add(f"{name}: server RSS", "MiB", [server.rss_kib() / 1024])


async def main() -> None:
    findings = Findings("What do others notice while one client takes all that it can?")
    with workplace() as folder, running_server(folder) as server:
        _make_others_certs(server)
        await measure(findings, server)
    findings.store()


# The other client


def _others_certs(server: Server) -> Path:
    return server.certs / "other"


def _make_others_certs(server: Server) -> None:
    """A folder as `open_channel` takes it: of a client with another name."""
    folder = _others_certs(server)
    folder.mkdir()
    for made in certs.make_client(server.certs, "mallory", "admin"):
        made.rename(folder / made.name.replace("mallory", "client"))
    shutil.copy(server.certs / "ca-cert.pem", folder)


async def be_hostile(kind: str, address: str, folder: Path, job_id: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = (
        _connections(address, folder)
        if kind == "connections"
        else _streams(address, folder, job_id)
    )
    kept = await held
    print(OPENED, flush=True)
    await asyncio.Event().wait()
    del kept


async def _connections(address: str, folder: Path) -> object:
    context = ssl.create_default_context(cafile=folder / "ca-cert.pem")
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    kept = []
    for _ in range(CONNECTIONS):
        with contextlib.suppress(OSError):  # refused
            plain = socket.create_connection((host, int(port)), source_address=(OTHER_HOST, 0))
            kept.append(context.wrap_socket(plain, server_hostname="localhost"))
            kept[-1].sendall(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
            )
    return kept


async def _streams(address: str, folder: Path, job_id: str) -> object:
    request = pb.GetJobsStreamReq(id=job_id).SerializeToString()
    channels = [open_channel(address, folder) for _ in range(STREAM_CONNECTIONS)]
    kept = []
    for place in range(STREAMS):
        method = channels[place % STREAM_CONNECTIONS].unary_stream(
            "/job_worker.JobService/GetJobsStream"
        )
        kept.append(method(request))
        await asyncio.sleep(0)
    return channels, kept


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(be_hostile(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]))
    else:
        run(main())
