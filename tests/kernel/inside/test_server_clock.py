"""The clock of the machine is set back, and forward, while jobs run: the order of times stays
right, and nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.pb import job_worker_pb2 as pb
from kernel.inside.conftest import serving

HOUR = 3600
SCRIPT = "for i in $(seq 1 40); do echo $i; echo $i >&2; sleep 0.1; done; exit 4"
LINES = b"".join(b"%d\n" % number for number in range(1, 41))


@pytest.fixture
def clock() -> Iterator[None]:
    """Is right again afterwards."""
    difference = time.time() - time.monotonic()
    yield
    time.clock_settime(time.CLOCK_REALTIME, time.monotonic() + difference)


def step(seconds: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


@pytest.mark.usefixtures("clock")
def test_a_clock_that_is_stepped(tmp_path: Path, certificates: Path) -> None:
    with serving(tmp_path, certificates) as server, server.connect() as client:
        job = client.shell(SCRIPT)
        stream = client.stream(job.id)
        chunks = [next(stream)]
        step(-HOUR)
        chunks += [next(stream) for _ in range(5)]
        other = client.shell("echo in the past")
        client.wait(other.id)
        step(2 * HOUR)
        chunks += list(stream)
        ended = chunks[-1].ending
        times = [run.time_ns for chunk in chunks for run in chunk.runs]
        assert times == sorted(times)
        assert ended.start_time_ns <= times[0]
        assert ended.created_time_ns <= ended.start_time_ns <= ended.end_time_ns
        assert ended.exitCode == 4
        past = client.get(other.id)
        assert past.created_time_ns <= past.start_time_ns <= past.end_time_ns
        assert client.output(job.id, stream=1) == client.output(job.id, stream=2) == LINES
        # The newest first, by id and not by time.
        assert [each.id for each in client.jobs()] == [other.id, job.id]
    assert server.process.returncode in {0, -signal.SIGTERM}


@pytest.mark.usefixtures("clock")
def test_a_time_limit_is_not_the_clocks(tmp_path: Path, certificates: Path) -> None:
    """Neither sooner nor later, also by a server that comes after the step."""
    with serving(tmp_path, certificates, STOP_JOBS="no") as server, server.connect() as client:
        long = client.create("sleep", "600", timeout_milliseconds=HOUR * 1000)
        step(2 * HOUR)
    with serving(tmp_path, certificates, STOP_JOBS="no") as server, server.connect() as client:
        assert client.get(long.id).status == "RUNNING"
        short = client.create("sleep", "600", timeout_milliseconds=4000)
        step(-2 * HOUR)
    with serving(tmp_path, certificates) as server, server.connect() as client:
        assert client.wait(short.id).cause == pb.TIMED_OUT
        assert client.get(long.id).status == "RUNNING"
