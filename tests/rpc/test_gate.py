"""Streams whose callers' roles change, without a server around them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography import x509

from functional.test_authorization import make_client
from jobworker.pb import job_worker_pb2 as pb
from jobworker.roles import Clients, Entries, Role
from jobworker.rpc.audit import AuditLog
from jobworker.rpc.gate import ClientLimits, Gate
from jobworker.rpc.service import SERVICE, JobService, ServiceHandler

CN, OU = x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATIONAL_UNIT_NAME
STREAM: Any = SimpleNamespace(method=f"/{SERVICE}/GetJobsStream")
MANY = 500
OWNERS = {1: "alice", 2: "bob", 3: ""}


class Context:
    """Of one call."""

    def __init__(self, pem: bytes, job_id: int) -> None:
        self._pem = pem
        self._job_id = job_id

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem]}

    def add_done_callback(self, _callback: object) -> None:
        pass

    async def read(self) -> bytes:
        return pb.GetJobsStreamReq(id=str(self._job_id)).SerializeToString()

    async def abort(self, code: grpc.StatusCode, text: str, _metadata: object) -> None:
        raise PermissionError(code, text)


class Manager:
    """Whose jobs write nothing, and whose records are no longer read once `is_busy`."""

    is_busy = False
    may_read: asyncio.Event
    begun = 0

    async def require_owner(self, _job_id: int, _owner: str) -> None:
        if self.is_busy:
            await asyncio.Event().wait()

    async def read(self, job_id: int, *_: object) -> tuple[Any, str]:
        self.begun += 1
        await self.may_read.wait()
        reader = SimpleNamespace(next=asyncio.Event().wait, close=lambda: None)
        return reader, OWNERS[job_id]


class Streams:
    """Of alice."""

    def __init__(self, certificates: Path) -> None:
        make_client(certificates, "alice-of-gate", [(CN, "alice"), (OU, "Build")])
        self._pem = (certificates / "alice-of-gate-cert.pem").read_bytes()
        self.manager: Any = Manager()
        self.manager.may_read = asyncio.Event()
        self._clients = Clients()
        limits = ClientLimits(calls=MANY, streams=9 * MANY, connections=1)
        self._gate = Gate(self._clients, limits, AuditLog(None), {})
        service = JobService(self.manager, SimpleNamespace())  # type: ignore[arg-type]
        self._handler: Any = ServiceHandler(service, self._gate).service(STREAM)
        self.become(Role.VIEWER)

    async def begin(self, job_id: int) -> asyncio.Task[Any]:
        begun = self.manager.begun
        context = Context(self._pem, job_id)
        task: asyncio.Task[Any] = asyncio.ensure_future(self._handler.stream_stream(None, context))
        while self.manager.begun == begun:
            await asyncio.sleep(0)
        return task

    def become(self, role: Role | str) -> None:
        self._clients.use(Entries(cn={"alice": {"role": role}}))
        self._gate.roles_changed()


async def ending(stream: asyncio.Task[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(PermissionError) as caught:
        await asyncio.wait_for(stream, 5)
    code, text = caught.value.args
    return code, text


def test_what_roles_take_away_ends_though_no_record_can_be_read(certificates: Path) -> None:
    async def test() -> None:
        streams = Streams(certificates)
        streams.manager.may_read.set()
        kept = [await streams.begin(1) for _ in range(MANY)]
        lost = [await streams.begin(job_id) for job_id in (2, 3) for _ in range(MANY)]
        await asyncio.sleep(0)
        streams.manager.is_busy = True
        streams.become(Role.ADMIN)
        await asyncio.sleep(0)
        assert not any(stream.done() for stream in [*kept, *lost])
        streams.become(Role.USER)
        for stream in lost:
            code, text = await ending(stream)
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert "the roles have changed since this stream began: there is no job" in text
        assert not any(stream.done() for stream in kept)
        streams.become("")
        assert {(await ending(stream))[0] for stream in kept} == {grpc.StatusCode.PERMISSION_DENIED}

    asyncio.run(test())


def test_roles_that_change_before_a_stream_has_its_job(certificates: Path) -> None:
    async def test() -> None:
        streams = Streams(certificates)
        own, foreign = await streams.begin(1), await streams.begin(2)
        streams.become("")
        streams.become(Role.USER)
        assert "gives no role" in (await ending(own))[1]
        assert "gives no role" in (await ending(foreign))[1]

        streams.become(Role.VIEWER)
        own, foreign = await streams.begin(1), await streams.begin(2)
        streams.become(Role.USER)
        streams.manager.may_read.set()
        assert (await ending(foreign))[0] is grpc.StatusCode.NOT_FOUND
        assert not own.done()
        own.cancel()

    asyncio.run(test())
