"""No byte and no job is lost, whatever happens to the server: the farm under fire.

The short form runs with all tests; `make soak` sets the number of kills.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.farm import Farm
from functional.server import Server, wait_until

KILLS = int(os.environ.get("JOBWORKER_KILLS", "20"))
# A kill and a restart take some half second; what is under way is then waited for.
SECONDS = 120 + 3 * KILLS


@pytest.fixture
def farm(start_server: Callable[..., Server], tmp_path: Path) -> Farm:
    def start(port: int) -> Server:
        return start_server(port=port, STOP_JOBS="no", DEFAULT_MEMORY="0", DEFAULT_CPU="0")

    seed = int(os.environ.get("JOBWORKER_SEED", str(time.time_ns() % 1_000_000)))
    sys.stderr.write(f"JOBWORKER_SEED={seed}\n")  # to be seen where it fails
    return Farm(start, tmp_path, seed)


def has_another_jobinit(farm: Farm, pid: int) -> bool:
    return farm.server.jobinit_pid() != pid


def kill_server(server: Server) -> None:
    server.stop(signal.SIGKILL)


def stop_server(server: Server) -> None:
    assert server.stop(signal.SIGTERM) == 0


@pytest.mark.timeout(SECONDS)
def test_a_server_that_is_killed_again_and_again(farm: Farm) -> None:
    farm.work()
    for number in range(KILLS):
        farm.restart(stop_server if number % 5 == 4 else kill_server)
    assert farm.finish() == []
    assert len(farm.jobs) >= KILLS
    assert sum(follower.resumed for follower in farm.followers) > KILLS / 2


@pytest.mark.timeout(SECONDS)
def test_a_server_that_hangs(farm: Farm) -> None:
    """Jobs wait for it, and lose nothing."""
    farm.work()
    time.sleep(0.5)
    farm.server.process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    farm.server.process.send_signal(signal.SIGCONT)
    assert farm.finish() == []


@pytest.mark.timeout(SECONDS)
def test_a_jobinit_that_is_killed(farm: Farm) -> None:
    """The server that spawned it reaps the endings itself, and knows them all."""
    farm.work()
    for _ in range(max(2, KILLS // 10)):
        time.sleep(farm.chance.uniform(0.1, 0.7))
        killed = farm.server.jobinit_pid()
        os.kill(killed, signal.SIGKILL)
        wait_until(functools.partial(has_another_jobinit, farm, killed))
    problems = farm.finish()
    # Between fork and answer nobody but jobinit knew of a job; such a create has failed, and
    # said so, so that it is not among these.
    assert problems == []
