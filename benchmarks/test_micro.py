"""What do the small parts cost, each beside the plainest thing that could do its work?

Run by `make bench` alone. Each group has a `floor`, or a peer, next to what is ours.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from pytest_benchmark.fixture import BenchmarkFixture

from jobworker import certs
from jobworker import job as transition
from jobworker._fastio import Log, Pump, read_message
from jobworker.engine.store import Store
from jobworker.job import Accounting, Job, JobSpec, OomKills
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc import convert

READY_SECONDS = 20
CHUNK_BYTES = (1 << 10, 64 << 10, 1 << 20)
RING_CHUNK_BYTES = (1 << 10, 32 << 10)
WRITE_BYTES = 16 << 10  # at once; larger bursts are not copied into the ring
LOG_BYTES = 8 << 20
COMMIT_JOBS = (1, 64)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# A log, its ring and its index


class FilledLog:
    """A live log of LOG_BYTES; the newest of them are in its ring."""

    def __init__(self, folder: Path) -> None:
        self.directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.pump = Pump(self.directory, 64 << 20)
        ours, self._theirs = os.pipe()
        os.set_blocking(ours, False)
        self.log = Log(self.pump, 1, ours, -1)
        self.log.add_reader()
        data = os.urandom(LOG_BYTES)
        for end in range(WRITE_BYTES, LOG_BYTES + 1, WRITE_BYTES):
            os.write(self._theirs, data[end - WRITE_BYTES : end])
            self._wait_for(end)
        self.path = folder / "1.0.log"

    def _wait_for(self, end: int) -> None:
        wait_until(lambda: self.log.end == end)

    def close(self) -> None:
        os.close(self._theirs)
        self.log.remove_reader()
        self.pump.close()
        os.close(self.directory)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FilledLog]:
    log = FilledLog(tmp_path_factory.mktemp("log"))
    yield log
    log.close()


@pytest.mark.parametrize("size", RING_CHUNK_BYTES)
class TestRing:
    """A finished chunk from memory; floor: a copy of as many bytes."""

    @pytest.fixture(autouse=True)
    def group(self, benchmark: BenchmarkFixture, size: int) -> None:
        benchmark.group = f"chunk from the ring, {size >> 10} KiB"

    def test_ours(self, benchmark: BenchmarkFixture, filled: FilledLog, size: int) -> None:
        offset = LOG_BYTES - size
        found = benchmark(filled.log.message, offset, size)
        assert found is not None
        assert len(found[0] or b"") > size // 2

    def test_floor_memcpy(self, benchmark: BenchmarkFixture, size: int) -> None:
        source = bytearray(os.urandom(size))
        benchmark(bytes, source)

    def test_floor_protobuf(self, benchmark: BenchmarkFixture, size: int) -> None:
        payload = os.urandom(size)
        benchmark(lambda: pb.DataChunk(payload=payload, offset=1 << 30).SerializeToString())


@pytest.mark.parametrize("size", CHUNK_BYTES)
class TestHistory:
    """A finished chunk from disk, with its files opened; floor: pread of an open file."""

    @pytest.fixture(autouse=True)
    def group(self, benchmark: BenchmarkFixture, size: int) -> None:
        benchmark.group = f"chunk from disk, {size >> 10} KiB"

    def test_ours(self, benchmark: BenchmarkFixture, filled: FilledLog, size: int) -> None:
        message, end = benchmark(read_message, filled.directory, 1, LOG_BYTES, 2 << 20, size)
        assert message is not None
        assert end > 2 << 20

    def test_floor_pread(self, benchmark: BenchmarkFixture, filled: FilledLog, size: int) -> None:
        file = os.open(filled.path, os.O_RDONLY)
        try:
            benchmark(os.pread, file, size, 2 << 20)
        finally:
            os.close(file)


# Certificates and messages


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("certs")
    certs.make_all(folder)
    return (folder / certs.CLIENT_CERT).read_bytes()


@pytest.mark.benchmark(group="certificate to its subject")
class TestCertificate:
    def test_ours(self, benchmark: BenchmarkFixture, pem: bytes) -> None:
        assert benchmark(certs.subject_of, pem)[1] == ("admin",)

    def test_floor_parse(self, benchmark: BenchmarkFixture, pem: bytes) -> None:
        benchmark(x509.load_pem_x509_certificate, pem)


def ended_job(job_id: int = 1) -> Job:
    now_ns = time.time_ns()
    job = transition.created(job_id, JobSpec("/bin/true", ("--some", "--args")), now_ns)
    job = transition.ended(transition.started(job, now_ns), 0, OomKills(), now_ns)
    return replace(job, accounting=Accounting(1200, 900, 1 << 20))


@pytest.mark.benchmark(group="job to its message, as bytes")
class TestAnswer:
    def test_ours(self, benchmark: BenchmarkFixture) -> None:
        job = ended_job()
        benchmark(lambda: convert.job_to(job).SerializeToString())

    def test_floor_protobuf(self, benchmark: BenchmarkFixture) -> None:
        message = convert.job_to(ended_job())
        benchmark(message.SerializeToString)


@pytest.mark.benchmark(group="a job's three transitions")
class TestTransitions:
    def test_ours(self, benchmark: BenchmarkFixture) -> None:
        spec = JobSpec("/bin/true")

        def live() -> Job:
            job = transition.started(transition.created(1, spec, 1), 2)
            return transition.ended(job, 0, OomKills(), 3)

        assert benchmark(live).is_ended

    def test_floor_objects(self, benchmark: BenchmarkFixture) -> None:
        spec = JobSpec("/bin/true")
        status = transition.Status.COMPLETED
        benchmark(lambda: [Job(1, spec, status, 1, 2, 3) for _ in range(3)])


# The store


@pytest.mark.parametrize("count", COMMIT_JOBS)
class TestCommit:
    """Records put at once; floor: as many rows of as many bytes in one transaction."""

    @pytest.fixture(autouse=True)
    def group(self, benchmark: BenchmarkFixture, count: int) -> None:
        benchmark.group = f"commit, {count} record{'s' if count > 1 else ''}"

    def test_ours(self, benchmark: BenchmarkFixture, tmp_path: Path, count: int) -> None:
        jobs = [ended_job(number) for number in range(1, count + 1)]
        with asyncio.Runner() as runner:

            async def open_store() -> Store:
                return Store.open(tmp_path / "jobs.db")

            store = runner.run(open_store())

            async def put() -> None:
                await asyncio.gather(*map(store.put, jobs))

            benchmark(lambda: runner.run(put()))
            runner.run(store.close())

    def test_floor_sqlite(self, benchmark: BenchmarkFixture, tmp_path: Path, count: int) -> None:
        connection = sqlite3.connect(tmp_path / "plain.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE jobs (id INTEGER PRIMARY KEY, record TEXT)")
        rows: list[Any] = [(number, "x" * 400) for number in range(1, count + 1)]

        def commit() -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?)", rows)
            connection.execute("COMMIT")

        benchmark(commit)
        connection.close()
