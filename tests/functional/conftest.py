"""Servers for the functional tests: one that all share, and as many of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.server import Client, Server
from jobworker import certs


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    certs.make_all(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), certificates)
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.connect() as client:
        yield client


@pytest.fixture
def start_server(tmp_path: Path, certificates: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server of the test's own; each ends with the test."""
    servers: list[Server] = []

    def start(**settings: Any) -> Server:
        servers.append(Server(tmp_path, certificates, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
    # Where jobs were to go on, and the test did not come to their end.
    if any(server.keeps_jobs for server in servers):
        Server(tmp_path, certificates).stop()
