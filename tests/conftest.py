"""What holds for all tests: where they write, and the server that those of clients share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.server import Server
from jobworker import certs

ROOM_BYTES = 8 << 30


def pytest_configure() -> None:
    """Jobs write gigabytes here. Where the usual folder for temporary files is in memory, as on
    many machines, there is the one that outlives a restart."""
    if shutil.disk_usage(tempfile.gettempdir()).free < ROOM_BYTES:
        os.environ["TMPDIR"] = tempfile.tempdir = "/var/tmp"
    # A shell without job control starts what runs in its background with SIGINT ignored, nohup
    # does so with SIGHUP; and what is ignored stays so in all that tests start.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


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
