"""Whether the server takes calls (https://grpc.io/docs/guides/health-checking)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Answer = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serving until `end`. grpc_health's own holds a lock while it writes: a client that takes no
    answer would keep all others, and the server's end, waiting."""

    def __init__(self, services: Iterable[str]) -> None:
        """services: by their names; empty is the whole server."""
        self._services = frozenset(services)
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Tells who watches."""
        self._ending.set()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802 as gRPC calls it
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return self._answer(request.service)

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802 the same
        if not self._ending.is_set():
            await context.write(self._answer(request.service))
            await self._ending.wait()
        await context.write(self._answer(request.service))

    def _answer(self, service: str) -> Any:
        if service not in self._services:
            return Answer(status=Answer.SERVICE_UNKNOWN)
        return Answer(status=Answer.NOT_SERVING if self._ending.is_set() else Answer.SERVING)
