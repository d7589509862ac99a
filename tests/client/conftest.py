"""Servers for the clients, and both clients for one test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.server import Server
from jobworker import AsyncClient, Client


class Awaited:
    """An AsyncClient, used without await: what Client can do must work on it as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*args, **kwargs)
        self._iterators: list[Generator[Any, None, None]] = []

    def close(self) -> None:
        for iterator in self._iterators:
            iterator.close()
        self._runner.run(self._client.close())
        self._runner.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if hasattr(result, "__aiter__"):
                self._iterators.append(self._iterate(result))
                return self._iterators[-1]
            return self._runner.run(result)

        return call

    def _iterate(self, source: Any) -> Generator[Any, None, None]:
        try:
            while True:
                try:
                    yield self._runner.run(_next(source))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(source.aclose())


async def _next(source: AsyncIterator[Any]) -> Any:
    return await anext(source)


Connect = Callable[..., Client]


@pytest.fixture(params=[Client, Awaited], ids=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest, certificates: Path) -> Iterator[Connect]:
    """Makes a client of either kind, with the admin's certificate unless told otherwise."""
    clients: list[Client] = []

    def make(address: str, **options: Any) -> Client:
        clients.append(request.param(address, **{"certs": certificates} | options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Connect, server: Server) -> Client:
    return connect(server.address)
