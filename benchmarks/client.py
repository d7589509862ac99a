"""A bare client: grpc.aio and bytes. What it costs is no part of any question, and the floors
pay it too."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

# Before grpc is imported: its fork handlers would stop all its threads at each fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# It would tell of each connection that a server ends.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
import uvloop

from jobworker.pb import job_worker_pb2 as pb

T = TypeVar("T")

SERVICE = "/job_worker.JobService/"
TAG_PAYLOAD = 0x0A
ANSWERS: dict[str, Any] = {
    "CreateJob": pb.Job,
    "CreateJobs": pb.CreateJobsRes,
    "GetJob": pb.Job,
    "StopJob": pb.StopJobRes,
    "ListJobs": pb.ListJobsRes,
    "GetServerInfo": pb.ServerInfo,
}


def run(main: Coroutine[Any, Any, None]) -> None:
    uvloop.run(main)


def open_channel(address: str, certs: Path, *more_options: tuple[str, Any]) -> Any:
    """A grpc.aio.Channel with a connection of its own, however many there are. (Any: the
    stubs have no type for calls without serializers.)"""
    credentials = grpc.ssl_channel_credentials(
        (certs / "ca-cert.pem").read_bytes(),
        (certs / "client-key.pem").read_bytes(),
        (certs / "client-cert.pem").read_bytes(),
    )
    options = [
        ("grpc.ssl_target_name_override", "job-worker"),
        ("grpc.use_local_subchannel_pool", 1),
        *more_options,
    ]
    return grpc.aio.secure_channel(address, credentials, options)


class Client:
    """One connection to a server."""

    def __init__(self, address: str, certs: Path) -> None:
        self.channel = open_channel(address, certs)
        self._methods: dict[str, Any] = {
            rpc: self.channel.unary_unary(
                SERVICE + rpc, lambda request: request.SerializeToString(), answer.FromString
            )
            for rpc, answer in ANSWERS.items()
        }
        self._stream: Any = self.channel.unary_stream(SERVICE + "GetJobsStream")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def call(self, rpc: str, request: Any = None) -> Any:
        return await self._methods[rpc](request or pb.EmptyRequest())

    async def create(self, command: str, *args: str, profile: str = "") -> str:
        """Returns the id of a job that runs."""
        request = pb.CreateJobReq(command=command, args=args, profile=profile)
        job = await self.call("CreateJob", request)
        if job.failed_step:
            raise RuntimeError(f"{command} did not start: {job.detail}")
        return str(job.id)

    async def stop(self, job_id: str) -> None:
        await self.call("StopJob", pb.StopJobReq(id=job_id, grace_milliseconds=0))

    def stream(self, job_id: str) -> AsyncIterator[bytes]:
        """Finished DataChunks, as they are on the wire."""
        return aiter(self._stream(pb.GetJobsStreamReq(id=job_id).SerializeToString()))

    async def wait_all_ended(self) -> None:
        """Until the server has recorded the ending of each job."""
        deadline = time.monotonic() + 300
        while (await self.call("GetServerInfo")).running_jobs:
            if time.monotonic() > deadline:
                raise TimeoutError("jobs that do not end")
            await asyncio.sleep(0.002)


async def create_many(
    client: Client, count: int, in_flight: int, *command: str, profile: str = ""
) -> list[str]:
    """One RPC for each job, so many of them at a time."""
    ids: list[str] = []

    async def create(_: int) -> None:
        ids.append(await client.create(*command, profile=profile))

    await for_each(range(count), in_flight, create)
    return ids


async def for_each(items: Iterable[T], in_flight: int, act: Callable[[T], Awaitable[None]]) -> None:
    """So many at a time."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            await act(item)

    await asyncio.gather(*(work() for _ in range(in_flight)))


def payload_of(chunk: bytes) -> bytes:
    start, length = _payload_place(chunk)
    return chunk[start : start + length]


def payload_bytes(chunk: bytes) -> int:
    return _payload_place(chunk)[1]


def _payload_place(chunk: bytes) -> tuple[int, int]:
    """Of a DataChunk whose payload comes first, as encoders write it: start and length."""
    if not chunk or chunk[0] != TAG_PAYLOAD:
        return 0, 0
    length = shift = 0
    place = 1
    while True:
        byte = chunk[place]
        length |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return place, length
        shift += 7
