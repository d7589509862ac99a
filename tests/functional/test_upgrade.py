"""A newer server takes over the jobs of an older jobinit, which is kept here as it was built.

fixtures/jobinit-1 is the one of protocol version 1 (x86_64, static). It must work for ever.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from functional.server import Server
from jobworker.engine import jobinit

FIXTURE = Path(__file__).parent.parent / "fixtures" / "jobinit-1"

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the jobinit of version 1 was kept for x86_64 only"
)


def run_older_jobinit(state: Path) -> None:
    """Where the next server looks for its own."""
    state.mkdir(mode=0o700)
    with jobinit.listen(state / "jobinit-1.sock") as listener:
        pid = jobinit.spawn(FIXTURE, listener)
    wait_until(lambda: os.readlink(f"/proc/{pid}/exe") == str(FIXTURE))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_older_jobinit_hands_over_all_its_jobs(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run_older_jobinit(tmp_path / "state")
    server = start_server(STOP_JOBS="no")
    older = server.jobinit_pid()
    assert os.readlink(f"/proc/{older}/exe") == str(FIXTURE)
    with server.connect() as client:
        running = client.shell(f"echo old; while ! [ -e {gate} ]; do sleep 0.02; done; exit 5")
        ended = client.shell("echo short; exit 6")
        next(client.stream(running.id))
    server.stop(signal.SIGKILL)
    # From here on it is of an older version, to the next server.
    (server.state / "jobinit-1.sock").rename(server.state / "jobinit-0.sock")
    server = start_server(STOP_JOBS="no")
    with server.connect() as client:
        new = client.shell("exit 7")
        assert client.wait(new.id).exitCode == 7
        assert client.wait(ended.id).exitCode == 6
        assert client.get(running.id).status == "RUNNING"
        stopped = client.create("sleep", "60")
        assert client.stop(stopped.id).status == "STOPPED"
        gate.touch()
        assert client.wait(running.id).exitCode == 5
        assert client.output(running.id) == b"old\n"
    server.stop()
    # It has no job left, and no server.
    wait_until(lambda: os.waitpid(older, os.WNOHANG)[0] == older)
