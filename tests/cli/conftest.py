"""The command line, connected to the server that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.program import Program
from functional.server import Server


@pytest.fixture
def jobworker(server: Server, tmp_path: Path) -> Program:
    """An admin's."""
    return Program(
        tmp_path, JOB_WORKER_SERVER=server.address, JOB_WORKER_CERT_PATH=str(server.certs)
    )


@pytest.fixture
def unconnected(tmp_path: Path) -> Program:
    """It knows of no server."""
    return Program(tmp_path)
