"""A bare client of the server that the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from functional.server import Client, Server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.connect() as client:
        yield client
