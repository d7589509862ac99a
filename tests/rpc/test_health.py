"""What the health service tells, and that nobody keeps others waiting in it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from jobworker.rpc.health import Health

Answer = health_pb2.HealthCheckResponse


class Context:
    """Of one call. blocks: its client takes nothing."""

    def __init__(self, *, blocks: bool = False) -> None:
        self._blocks = blocks
        self.written: asyncio.Queue[int] = asyncio.Queue()

    async def write(self, answer: Any) -> None:
        if self._blocks:
            await asyncio.Event().wait()
        self.written.put_nowait(answer.status)

    async def abort(self, code: grpc.StatusCode) -> None:
        raise LookupError(code)


def request(service: str) -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def watch(health: Health, service: str, context: Any) -> None:
    await health.Watch(request(service), context)


async def check(health: Health, service: str) -> int:
    context: Any = Context()
    return (await health.Check(request(service), context)).status  # type: ignore[no-any-return]


def test_from_the_start_to_the_end() -> None:
    async def test() -> None:
        health = Health(["", "jobs"])
        for service in ("", "jobs"):
            assert await check(health, service) == Answer.SERVING
        with pytest.raises(LookupError, match="NOT_FOUND"):
            await check(health, "other")
        contexts = {service: Context() for service in ("", "jobs", "other")}
        watches = [
            asyncio.create_task(watch(health, service, context))
            for service, context in contexts.items()
        ]
        first = {service: await context.written.get() for service, context in contexts.items()}
        unknown = Answer.SERVICE_UNKNOWN
        assert first == {"": Answer.SERVING, "jobs": Answer.SERVING, "other": unknown}
        health.end()
        await asyncio.gather(*watches)
        last = {service: context.written.get_nowait() for service, context in contexts.items()}
        assert last == {"": Answer.NOT_SERVING, "jobs": Answer.NOT_SERVING, "other": unknown}
        assert await check(health, "jobs") == Answer.NOT_SERVING

    asyncio.run(test())


def test_who_takes_nothing_keeps_nobody_waiting() -> None:
    async def test() -> None:
        health = Health([""])
        hostile = asyncio.create_task(watch(health, "", Context(blocks=True)))
        await asyncio.sleep(0)
        context = Context()
        other = asyncio.create_task(watch(health, "", context))
        assert await context.written.get() == Answer.SERVING
        health.end()
        await other
        assert await context.written.get() == Answer.NOT_SERVING
        assert not hostile.done()
        hostile.cancel()

    asyncio.run(test())
