"""The native core: real pipes, real files, and a Python list as the oracle."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from descriptors import no_descriptors
from jobworker import _fastio
from jobworker._fastio import (
    ARRIVED,
    FINISHED,
    LIMIT,
    STDERR,
    STDOUT,
    Extent,
    Log,
    Pump,
    read_cached,
    read_extent,
    read_message,
    read_packed,
    read_small,
    remove_folders,
)
from jobworker.pb import job_worker_pb2 as pb
from locked_pipe import locked

SMALL_SEGMENT = 4096
FULL_BYTES = 1000
DEADLINE_SECONDS = 10


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """Call it to have room again. A file-size limit stands for the full disk: the write is
    refused in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
    yield make_room
    make_room()
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def pump(folder: int) -> Iterator[Pump]:
    pump = Pump(folder, 8 << 20)
    yield pump
    pump.close()


@dataclass
class Job:
    """A log, and the write ends that a job would have."""

    pump: Pump
    folder: int
    id: int = 1
    merged: bool = False
    segment_bytes: int = _fastio.SEGMENT_BYTES
    max_bytes: int = 0
    is_ring: bool = False
    watched: bool = True
    written: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ours, theirs = zip(*(os.pipe() for _ in range(1 if self.merged else 2)), strict=True)
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        self.their_fds: dict[int, int] = dict(zip((STDOUT, STDERR), theirs, strict=False))
        self.log = Log(
            self.pump,
            self.id,
            ours[0],
            -1 if self.merged else ours[1],
            segment_bytes=self.segment_bytes,
            max_bytes=self.max_bytes,
            is_ring=self.is_ring,
            watched=self.watched,
        )

    @property
    def size(self) -> int:
        return sum(len(data) for _, data in self.written)

    def write(self, stream: int, data: bytes) -> None:
        """Returns once it is on disk, so that the order of writes is known."""
        os.write(self.their_fds[stream], data)
        self.written.append((stream, data))
        wait_until(lambda: self.log.end == self.size)

    def close(self, *streams: int) -> None:
        for stream in streams or (STDOUT, STDERR):
            if stream in self.their_fds:
                os.close(self.their_fds.pop(stream))

    def expected(self, stream: int = 0) -> bytes:
        return b"".join(data for of, data in self.written if stream in (0, of))

    def read(
        self, offset: int = 0, max_bytes: int = 1 << 20, stream: int = 0
    ) -> list[pb.DataChunk]:
        """All there is now: from memory where it can be had, else from disk."""
        chunks = []
        while True:
            found = self.log.message(offset, max_bytes, stream)
            if found is None:
                found = self.read_disk(offset, max_bytes, stream)
            message, following = found
            if message is not None:
                chunks.append(pb.DataChunk.FromString(message))
            if following == offset:
                return chunks
            offset = following

    def read_disk(self, offset: int, max_bytes: int, stream: int) -> tuple[bytes | None, int]:
        return read_message(
            self.folder, self.id, self.log.told_end, offset, max_bytes, stream, self.segment_bytes
        )

    def read_cached(
        self, offset: int, max_bytes: int, stream: int
    ) -> tuple[bytes | None, int] | None:
        return read_cached(
            self.folder, self.id, self.log.told_end, offset, max_bytes, stream, self.segment_bytes
        )


def payload(chunks: list[pb.DataChunk]) -> bytes:
    return b"".join(chunk.payload for chunk in chunks)


def runs(chunks: list[pb.DataChunk]) -> list[tuple[int, bytes]]:
    """Whose bytes are whose; neighbours of one stream joined."""
    joined: list[tuple[int, bytes]] = []
    for chunk in chunks:
        place = 0
        for run in chunk.runs:
            data = chunk.payload[place : place + run.length]
            place += run.length
            if joined and joined[-1][0] == run.stream:
                joined[-1] = (run.stream, joined[-1][1] + data)
            else:
                joined.append((run.stream, data))
        assert place == len(chunk.payload)
    return joined


def join(written: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    joined: list[tuple[int, bytes]] = []
    for stream, data in written:
        if joined and joined[-1][0] == stream:
            joined[-1] = (stream, joined[-1][1] + data)
        else:
            joined.append((stream, data))
    return joined


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        os.sched_yield()


def wait_news(pump: Pump) -> list[tuple[Log, int]]:
    ready, _, _ = select.select([pump.fileno()], [], [], DEADLINE_SECONDS)
    assert ready, "no news"
    return pump.news()


def wait_finished(pump: Pump, log: Log) -> None:
    while not log.finished:
        wait_news(pump)


def test_bytes_come_out_as_they_went_in(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"out\n")
    job.write(STDERR, b"\x00\xff err \r\n")
    job.write(STDOUT, b"more")
    assert payload(job.read()) == b"out\n\x00\xff err \r\nmore"
    assert job.log.stream_bytes == (8, 9)
    assert runs(job.read()) == job.written
    job.close()


def test_a_chunk_says_where_it_starts_and_where_the_next_one_does(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"x" * 1000)
    for chunk in (chunks := job.read(offset=300, max_bytes=256)):
        assert chunk.next_offset == chunk.offset + len(chunk.payload)
    assert chunks[0].offset == 300
    assert [chunk.offset for chunk in chunks[1:]] == [chunk.next_offset for chunk in chunks[:-1]]
    assert payload(chunks) == b"x" * 700
    job.close()


def test_messages_are_cut_at_multiples_so_that_readers_can_share_them(
    pump: Pump, folder: int
) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"x" * 1000)
    assert [chunk.next_offset for chunk in job.read(300, 256)] == [512, 768, 1000]
    job.close()


def test_memory_and_disk_give_the_same_message(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.log.add_reader()
    for number in range(50):
        job.write(STDOUT if number % 3 else STDERR, b"%d;" % number)
    for stream in (0, STDOUT, STDERR):
        assert job.log.message(0, 4096, stream) == job.read_disk(0, 4096, stream)
        # Just written, so it is in the page cache; None where the kernel cannot tell.
        assert job.read_cached(0, 4096, stream) in (None, job.read_disk(0, 4096, stream))
    job.close()


def test_what_is_not_in_the_page_cache_is_not_waited_for(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, bytes(20_000))
    cached = job.read_cached(0, 1 << 20, 0)
    if cached is None:
        pytest.skip("this kernel or filesystem cannot tell what is in the page cache")
    segment = os.open(f"{job.id}.0.log", os.O_RDONLY, dir_fd=folder)
    os.fsync(segment)
    os.posix_fadvise(segment, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(segment)
    # (On tmpfs all is in memory.)
    assert job.read_cached(0, 1 << 20, 0) in (None, cached)
    assert job.read_disk(0, 1 << 20, 0) == cached
    job.close()


def test_a_burst_is_not_copied_into_memory(pump: Pump, folder: int) -> None:
    """Readers find it in the page cache; what comes after it is in memory again."""
    job = Job(pump, folder)
    job.log.add_reader()
    job.write(STDOUT, b"a")
    os.set_blocking(job.their_fds[STDOUT], False)
    burst = b"b" * os.write(job.their_fds[STDOUT], b"b" * (1 << 16))
    job.written.append((STDOUT, burst))
    wait_until(lambda: job.log.end == job.size)
    job.write(STDERR, b"after")
    assert payload(job.read()) == job.expected()
    assert job.log.message(job.size // 2, 1024) is None
    assert job.log.message(job.size - 5, 1024) == job.read_disk(job.size - 5, 1024, 0)
    job.close()


def test_one_stream_alone(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    for number in range(20):
        job.write(STDOUT if number % 2 else STDERR, b"%d;" % number)
    assert payload(job.read(stream=STDOUT)) == job.expected(STDOUT)
    assert payload(job.read(stream=STDERR)) == job.expected(STDERR)
    job.close()


def test_one_step_passes_all_of_a_run_of_the_other_stream(pump: Pump, folder: int) -> None:
    """Over segments it takes one each, and none goes beyond a byte that was asked for."""
    job = Job(pump, folder, segment_bytes=1 << 16)
    job.write(STDERR, b"first")
    for _ in range(40):
        job.write(STDOUT, bytes(4096))
    job.write(STDERR, b"last")
    for read in (job.read_disk, job.read_cached):
        offsets, chunks = [0], []
        while offsets[-1] < job.size:
            found = read(offsets[-1], 1024, STDERR)
            if found is None:
                break  # this kernel or filesystem cannot tell what is in the page cache
            message, offset = found
            offsets.append(offset)
            chunks += [pb.DataChunk.FromString(message)] if message else []
        else:
            assert offsets == [0, 1024, 1 << 16, 2 << 16, job.size - 4, job.size]
            assert runs(chunks) == [(STDERR, b"firstlast")]
    job.close()


def test_a_run_without_bytes_holds_up_no_reader() -> None:
    """Its record was written, and then bytes of the other stream came first."""
    index = b"jwindex\x01" + struct.pack("=5Q", 0, 1 << 16, 0, 0, 0)
    for offset, stream in ((0, STDOUT), (4, STDERR), (4, STDOUT), (8, STDERR), (8, STDERR)):
        index += struct.pack("=2Q", stream << 56 | offset, 0)
    segment = b"outsmoreerr"
    assert read_packed(segment, index, 11, 0, 2, STDERR) == (None, 8)
    assert read_packed(segment, index, 11, 4, 2, STDERR) == (None, 8)
    assert read_packed(segment, index, 8, 4, 2, STDERR) == (None, 8)
    message, offset = read_packed(segment, index, 11, 8, 4, STDERR)
    assert offset == 11
    assert message is not None
    assert pb.DataChunk.FromString(message).payload == b"err"
    assert read_packed(segment, index, 11, 8, 4, STDOUT) == (None, 11)


def test_more_runs_than_a_message_holds(pump: Pump, folder: int) -> None:
    """Every run costs a record; a message from disk takes some thousand of them."""
    job = Job(pump, folder)
    for number in range(2500):
        job.write(STDOUT if number % 2 else STDERR, b"%04d" % number)
    chunks = job.read()
    assert len(chunks) > 1
    assert runs(chunks) == job.written
    job.close()


def test_finished_once_all_writers_are_gone(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"last words")
    job.close(STDOUT)
    assert not job.log.finished
    job.close(STDERR)
    wait_finished(pump, job.log)
    assert payload(job.read()) == b"last words"


def test_drain_does_not_wait_for_a_foreign_writer(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"before")
    job.log.drain()
    wait_finished(pump, job.log)  # though the write ends are still open
    with pytest.raises(BrokenPipeError):
        os.write(job.their_fds[STDOUT], b"after")
    assert payload(job.read()) == b"before"
    job.close()


def test_drain_takes_all_that_is_in_the_pipes(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    for stream in (STDOUT, STDERR):
        os.write(job.their_fds[stream], b"y" * 60_000)
    job.log.drain()
    wait_finished(pump, job.log)
    assert job.log.stream_bytes == (60_000, 60_000)
    job.close()


def test_what_is_not_watched_stays_in_the_pipes(pump: Pump, folder: int) -> None:
    job = Job(pump, folder, watched=False)
    watched = Job(pump, folder, id=2)
    os.write(job.their_fds[STDOUT], b"first")
    watched.write(STDOUT, b"meanwhile")
    assert job.log.end == 0
    job.log.watch()
    job.log.watch()
    wait_until(lambda: job.log.end == 5)
    for each in (job, watched):
        each.close()
        wait_finished(pump, each.log)
    assert payload(job.read()) == b"first"


def test_a_silent_job_that_is_not_watched_is_finished_at_once(pump: Pump, folder: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    job = Job(pump, folder, watched=False)
    job.close()
    job.log.drain()
    assert job.log.finished
    assert len(os.listdir("/proc/self/fd")) == before
    job.log.watch()
    job.log.drain()
    assert job.read() == []
    assert pump.news() == []
    Job(pump, folder, watched=False).close()  # with the same id: nothing is left of the first


def test_drain_takes_what_was_not_watched(pump: Pump, folder: int) -> None:
    job = Job(pump, folder, watched=False)
    for stream in (STDOUT, STDERR):
        os.write(job.their_fds[stream], b"y" * 60_000)
    job.log.drain()
    wait_finished(pump, job.log)  # though the write ends are still open
    assert job.log.stream_bytes == (60_000, 60_000)
    job.close()


# moments: the numbers of moments.c, to be set.
IN_MOMENTS = """
import ctypes, os, sys, time
from jobworker._fastio import Log, Pump
library = ctypes.CDLL(sys.argv[1])
moments = {name: ctypes.c_int.in_dll(library, name)
           for name in ("slow_events", "slow_questions", "refused_watches")}
pump = Pump(os.open(sys.argv[2], os.O_RDONLY), 1 << 20)
"""


@pytest.fixture
def in_moments(tmp_path: Path) -> Callable[[str], str]:
    """Runs a program with `pump` and `moments`; returns what it prints."""
    library = tmp_path / "moments.so"
    source = Path(__file__).with_name("moments.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    folder = tmp_path / "output"
    folder.mkdir()

    def run(program: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", IN_MOMENTS + program, library, folder],
            env={**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {library}"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=30,
            check=True,
        ).stdout

    return run


def test_a_thread_that_is_late_serves_who_came_after(in_moments: Callable[[str], str]) -> None:
    """With an event for a log that has ended, whose memory another one has now: its end is told
    once."""
    program = """
out, end = os.pipe()
moments["slow_events"].value = 1
first = Log(pump, 1, out, -1)
os.write(end, b"x")
os.close(end)
time.sleep(0.1)
first.drain()
time.sleep(0.1)
print([log.job for log, _ in pump.news()])
del first
out, end = os.pipe()
second = Log(pump, 2, out, -1, watched=False)
moments["slow_questions"].value = 1
time.sleep(0.5)
print(pump.serving())
os.close(end)
second.drain()
time.sleep(0.7)
print([(log.job, bits) for log, bits in pump.news()], second.finished)
"""
    assert in_moments(program) == f"[1]\n[2]\n[(2, {FINISHED})] True\n"


def test_a_pipe_that_cannot_be_watched_yet_is_watched_later(
    in_moments: Callable[[str], str],
) -> None:
    program = """
moments["refused_watches"].value = 3
out, end = os.pipe()
log = Log(pump, 1, out, -1)
os.write(end, b"before")
deadline = time.monotonic() + 10
while log.end < 6 or moments["refused_watches"].value:
    assert time.monotonic() < deadline
    time.sleep(0.05)
time.sleep(2)
os.write(end, b" and after")
while log.end < 16:
    assert time.monotonic() < deadline
    time.sleep(0.05)
print("all of it")
"""
    assert in_moments(program) == "all of it\n"


@pytest.mark.parametrize("watched", [True, False])
def test_drain_does_not_wait_for_who_has_the_pipe_locked(
    pump: Pump, folder: int, watched: bool
) -> None:
    job = Job(pump, folder, watched=watched)
    with locked(job.their_fds[STDOUT]) as is_locked:
        job.log.drain()
        assert is_locked()
    wait_finished(pump, job.log)
    job.close()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_jobs_that_lock_their_pipes_keep_no_others_waiting(pump: Pump, folder: int) -> None:
    """More than there are threads at first; these are as few again afterwards."""
    before = threads()
    jobs = [Job(pump, folder, number) for number in range(10)]
    with contextlib.ExitStack() as locks:
        held = [locks.enter_context(locked(job.their_fds[STDOUT])) for job in jobs]
        for job in jobs:
            job.log.drain()
        other = Job(pump, folder, 10)
        other.write(STDOUT, b"in time")
        other.close()
        assert all(is_locked() for is_locked in held)
        wait_until(lambda: threads() > before)
    for job in jobs:
        job.close()
    finished: set[object] = set()
    while len(finished) < 11:
        finished |= {log for log, bits in pump.news() if bits & FINISHED}
    wait_until(lambda: threads() <= before)


def test_a_waiting_reader_is_told(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    assert job.log.wait_from(0)
    os.write(job.their_fds[STDOUT], b"news")
    assert wait_news(pump) == [(job.log, ARRIVED)]
    assert not job.log.wait_from(0)
    job.close()


def test_nobody_is_told_who_did_not_ask(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"quiet")
    assert pump.news() == []
    job.close()
    wait_until(lambda: job.log.finished)
    assert wait_news(pump) == [(job.log, FINISHED)]


def test_no_output_no_file(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.close()
    wait_finished(pump, job.log)
    assert os.listdir(folder) == []


def test_no_descriptor_stays_open(pump: Pump, folder: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1, 100):
        job = Job(pump, folder, id=number)
        job.write(STDOUT, b"x")
        job.close()
        wait_finished(pump, job.log)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_idle_job_costs_two_descriptors(pump: Pump, folder: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    job = Job(pump, folder)
    job.write(STDOUT, b"x")
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before + 4)  # two of them the test's
    job.close()


def test_a_merged_pipe_counts_as_stdout(pump: Pump, folder: int) -> None:
    job = Job(pump, folder, merged=True)
    job.write(STDOUT, b"both")
    job.close()
    wait_finished(pump, job.log)
    assert job.log.stream_bytes == (4, 0)


def test_many_megabytes_over_several_segments(folder: int, tmp_path: Path) -> None:
    pump = Pump(folder, 8 << 20)
    job = Job(pump, folder, segment_bytes=1 << 20)
    job.log.add_reader()
    data = os.urandom(7_654_321)
    (tmp_path / "data").write_bytes(data)
    with subprocess.Popen(["cat", tmp_path / "data"], stdout=job.their_fds[STDOUT]):
        received, offset = [], 0
        while offset < len(data):
            if job.log.wait_from(offset):
                wait_news(pump)
            for chunk in job.read(offset):
                received.append(chunk.payload)
                offset = chunk.next_offset
    assert b"".join(received) == data
    assert payload(job.read()) == data
    job.log.remove_reader()
    job.close()
    pump.close()


def test_a_full_disk_holds_the_job_and_loses_nothing(
    pump: Pump, folder: int, full_disk: Callable[[], None]
) -> None:
    job = Job(pump, folder)
    os.write(job.their_fds[STDOUT], b"z" * 5000)
    wait_until(lambda: job.log.error != 0)
    assert job.log.end <= FULL_BYTES
    full_disk()
    wait_until(lambda: job.log.end == 5000)
    wait_until(lambda: job.log.error == 0)
    assert payload(job.read()) == b"z" * 5000
    assert job.log.lost_bytes == 0
    job.close()


def test_a_full_disk_may_drop_bytes_and_count_them(
    folder: int, full_disk: Callable[[], None]
) -> None:
    pump = Pump(folder, 8 << 20, drops_when_full=True)
    job = Job(pump, folder)
    job.log.add_reader()
    job.write(STDOUT, b"kept")
    job.write(STDERR, b"z" * 5000)
    job.write(STDOUT, b"lost")
    assert job.log.error == errno.EFBIG
    assert job.log.lost_bytes == 5008 - FULL_BYTES
    assert job.log.told_end == FULL_BYTES  # the gap may still grow
    full_disk()
    while job.log.told_end < job.size:
        job.write(STDOUT, b".")
    assert job.log.error == 0
    chunks = job.read()
    assert payload(chunks)[:FULL_BYTES] == b"kept" + b"z" * (FULL_BYTES - 4)
    assert [(chunk.offset, chunk.lost_bytes) for chunk in chunks if chunk.lost_bytes] == [
        (FULL_BYTES + job.log.lost_bytes, job.log.lost_bytes)
    ]
    job.close()
    wait_finished(pump, job.log)
    extent = read_extent(folder, 1, segments(folder))
    assert (extent.stdout_bytes, extent.stderr_bytes) == job.log.stream_bytes
    assert (extent.lost_bytes, extent.disk_bytes) == (job.log.lost_bytes, disk_bytes(folder))
    pump.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_job_that_never_had_room_for_a_byte(tmp_path: Path) -> None:
    """A real file system without a free block, in a mount namespace of its own."""
    program = """
import os, sys, time
from jobworker._fastio import Log, Pump, read_extent, read_message
folder = os.open(sys.argv[1], os.O_RDONLY)
filler = os.open("filler", os.O_CREAT | os.O_WRONLY, dir_fd=folder)
try:
    while True:
        os.write(filler, bytes(4096))
except OSError:
    pass
ours, theirs = os.pipe()
os.set_blocking(ours, False)
pump = Pump(folder, 1 << 20, drops_when_full=True)
log = Log(pump, 1, ours, -1)
os.write(theirs, b"x" * 5000)
while log.end < 5000:
    time.sleep(0.001)
os.unlink("filler", dir_fd=folder)
os.close(filler)
while log.told_end < log.end or log.end == 5000:
    os.write(theirs, b"y")
    time.sleep(0.001)
os.close(theirs)
while not log.finished:
    time.sleep(0.001)
pump.close()
print(log.end, log.lost_bytes, read_extent(folder, 1, [0]).end)
_, offset = read_message(folder, 1, log.end, 0, 1 << 20)
message, _ = read_message(folder, 1, log.end, offset, 1 << 20)
print(offset, b"xx" in message, b"y" in message)  # one x may be in its header
"""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"),
            *(sys.executable, "-c", program, str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    end, lost, recovered, offset, *kinds = done.stdout.split()
    assert recovered == end
    assert offset == lost
    assert kinds == ["False", "True"]


def test_a_ring_keeps_the_newest_segments(pump: Pump, folder: int) -> None:
    quota = 20 * SMALL_SEGMENT
    job = Job(pump, folder, segment_bytes=SMALL_SEGMENT, max_bytes=quota, is_ring=True)
    for number in range(1000):
        job.write(STDOUT if number % 3 else STDERR, b"%06d;" % number * 30)
        assert job.log.disk_bytes <= quota
    assert job.log.disk_bytes == disk_bytes(folder)
    kept = job.log.end - job.log.lost_bytes
    assert quota - 2 * SMALL_SEGMENT < kept + len(segments(folder)) * 2000
    chunks = job.read(10)
    assert sum(chunk.lost_bytes for chunk in chunks) == job.log.lost_bytes - 10
    assert payload(chunks) == job.expected()[-kept:]
    job.close()
    wait_finished(pump, job.log)
    assert payload(read_all(folder, job.size, SMALL_SEGMENT)) == job.expected()[-kept:]
    extent = read_extent(folder, 1, segments(folder))
    assert (extent.stdout_bytes, extent.stderr_bytes) == job.log.stream_bytes
    assert (extent.lost_bytes, extent.disk_bytes) == (job.log.lost_bytes, disk_bytes(folder))


def test_a_ring_that_can_open_no_file_drops_nothing_for_now(pump: Pump, folder: int) -> None:
    quota = 20 * SMALL_SEGMENT
    job = Job(pump, folder, segment_bytes=SMALL_SEGMENT, max_bytes=quota, is_ring=True)
    while job.log.lost_bytes == 0 or job.size % SMALL_SEGMENT > 100:
        job.write(STDOUT, b"x" * 99)
    lost = job.log.lost_bytes
    # With the rest of this segment it is one too many.
    assert job.log.disk_bytes + SMALL_SEGMENT - 200 > quota
    with no_descriptors():
        os.write(job.their_fds[STDOUT], b"y" * SMALL_SEGMENT)
        wait_until(lambda: job.log.error == errno.EMFILE)
    job.written.append((STDOUT, b"y" * SMALL_SEGMENT))
    wait_until(lambda: job.log.end == job.size)
    assert job.log.lost_bytes <= lost + 2 * SMALL_SEGMENT
    assert job.log.disk_bytes == disk_bytes(folder) <= quota
    assert payload(job.read(job.log.lost_bytes)) == job.expected()[job.log.lost_bytes :]


def test_what_cannot_be_opened_is_not_taken_for_empty(pump: Pump, folder: int) -> None:
    """The log would begin anew, over what is there."""
    job = Job(pump, folder)
    job.write(STDOUT, b"kept")
    with no_descriptors(), pytest.raises(OSError, match="cannot read") as caught:
        read_extent(folder, 1, [0])
    assert caught.value.errno == errno.EMFILE
    assert read_extent(folder, 1, [0]).stdout_bytes == 4


def test_without_a_ring_the_first_bytes_stay(pump: Pump, folder: int) -> None:
    quota = 10_000
    job = Job(pump, folder, segment_bytes=SMALL_SEGMENT, max_bytes=quota)
    for number in range(200):
        job.write(STDOUT if number % 3 else STDERR, b"%06d;" % number * 30)
    assert wait_news(pump) == [(job.log, LIMIT)]  # once
    assert pump.news() == []
    assert quota - 100 < disk_bytes(folder) <= quota
    kept = job.size - job.log.lost_bytes
    assert job.log.told_end == kept
    assert payload(job.read()) == job.expected()[:kept]
    assert job.log.wait_from(kept)  # what is dropped wakes nobody
    job.write(STDOUT, b"more")
    assert pump.news() == []
    job.close()
    wait_finished(pump, job.log)
    *chunks, last = read_all(folder, job.size, SMALL_SEGMENT)
    assert (last.offset, last.lost_bytes, last.payload) == (job.size, job.size - kept, b"")
    assert payload(chunks) == job.expected()[:kept]
    extent = read_extent(folder, 1, segments(folder))
    assert (extent.stdout_bytes, extent.stderr_bytes) == job.log.stream_bytes
    assert (extent.lost_bytes, extent.disk_bytes) == (job.log.lost_bytes, disk_bytes(folder))


def test_a_packed_log_is_read_like_its_files(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    for number in range(100):
        job.write(STDOUT if number % 3 else STDERR, b"%d;" % number)
    segment, index = (open_bytes(folder, f"1.0.{kind}") for kind in ("log", "idx"))
    for offset, max_bytes, stream in [(0, 4096, 0), (7, 16, STDERR), (job.size, 16, 0)]:
        found = read_packed(segment, index, job.size, offset, max_bytes, stream)
        assert found == job.read_disk(offset, max_bytes, stream)
    job.close()


def open_bytes(folder: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
        return file.read()


def test_a_damaged_index_is_an_error_and_not_wrong_bytes(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"x" * 100)
    os.truncate(f"/proc/self/fd/{folder}/1.0.idx", 5)
    with pytest.raises(OSError, match="shorter than"):
        job.read_disk(0, 1024, 0)
    job.close()


# What no log has: where in the index, and 8 bytes for there.
IMPOSSIBLE = {
    "a run before the one before it": (48 + 2 * 16, STDERR << 56 | 50),
    "a run behind all logs": (48 + 2 * 16, STDERR << 56 | 1 << 55),
    "a third stream": (48 + 16, 3 << 56 | 100),
}
MISCOUNTED = {
    "more than there can be": (24, 1 << 63),
    "more than there was": (24, 100),
    "stored, and never written": (40, 100),
    "no segment": (16, 0),
    "of another": (8, 4096),
    "another magic": (0, 1),
}


def damaged_job(pump: Pump, folder: int, place: int, number: int) -> Job:
    """Of three runs, of 100 bytes each."""
    job = Job(pump, folder)
    for stream in (STDOUT, STDERR, STDOUT):
        job.write(stream, b"x" * 100)
    index = os.open("1.0.idx", os.O_WRONLY, dir_fd=folder)
    os.pwrite(index, number.to_bytes(8, sys.byteorder), place)
    os.close(index)
    return job


@pytest.mark.parametrize(("place", "number"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_runs_are_an_error(pump: Pump, folder: int, place: int, number: int) -> None:
    """Once they were messages larger than asked for, or the same offset again and again."""
    job = damaged_job(pump, folder, place, number)
    with pytest.raises(OSError, match="different from") as caught:
        job.read_disk(0, 1024, 0)
    assert (caught.value.errno, caught.value.filename) == (errno.EBADMSG, "1.0")
    with pytest.raises(OSError, match="different from"):
        read_extent(folder, 1, [0])
    job.close()


@pytest.mark.parametrize(("place", "number"), MISCOUNTED.values(), ids=MISCOUNTED)
def test_an_impossible_header_is_an_error(pump: Pump, folder: int, place: int, number: int) -> None:
    """A log of an impossible length could not be gone on with."""
    job = damaged_job(pump, folder, place, number)
    with pytest.raises(OSError, match="different from") as caught:
        read_extent(folder, 1, [0])
    assert (caught.value.errno, caught.value.filename) == (errno.EBADMSG, "1.0")
    job.close()


def test_what_a_segment_has_lost_is_told(pump: Pump, folder: int) -> None:
    job = Job(pump, folder)
    job.write(STDOUT, b"x" * 100)
    os.truncate(f"/proc/self/fd/{folder}/1.0.log", 5)
    chunks = job.read()
    assert payload(chunks) == b"x" * 5
    assert [chunk.lost_bytes for chunk in chunks] == [0, 95]
    job.close()


def test_closing_the_pump_closes_the_pipes(folder: int) -> None:
    pump = Pump(folder, 1 << 20)
    job = Job(pump, folder)
    pump.close()
    with pytest.raises(BrokenPipeError):
        os.write(job.their_fds[STDOUT], b"x")
    job.close()


# What a killed process leaves, and how the next one goes on.

KILLS = 25
# A process that moves the output of job 1 until it is killed.
MOVER = """
import os, signal, sys
from jobworker._fastio import Log, Pump, read_extent
folder, stdout, stderr, segment_bytes, max_bytes, *firsts = map(int, sys.argv[1:])
pump = Pump(folder, 1 << 20)
log = Log(
    pump,
    1,
    stdout,
    stderr,
    segment_bytes=segment_bytes,
    max_bytes=max_bytes,
    is_ring=True,
    resumed=read_extent(folder, 1, firsts),
)
signal.pause()
"""


def segments(folder: int, job: int = 1) -> list[int]:
    names = [name.split(".") for name in os.listdir(folder)]
    return sorted(int(first) for of, first, kind in names if of == str(job) and kind == "log")


def read_all(folder: int, end: int, segment_bytes: int, stream: int = 0) -> list[pb.DataChunk]:
    offset, chunks = 0, []
    while offset < end:
        message, offset = read_message(folder, 1, end, offset, 1 << 20, stream, segment_bytes)
        if message is not None:
            chunks.append(pb.DataChunk.FromString(message))
    return chunks


@pytest.mark.parametrize("max_bytes", [0, 200_000])
def test_killed_at_any_moment_and_gone_on_with(folder: int, max_bytes: int) -> None:
    """Each byte once, in order, of the right stream, after many kills; in a ring too, each byte
    that it dropped is counted."""
    segment_bytes = 10_000
    ours, theirs = zip(os.pipe(), os.pipe(), strict=True)
    for descriptor in ours:
        os.set_blocking(descriptor, False)
    program = "i=0; while :; do echo out $((++i)); echo err $i >&2; done"
    with subprocess.Popen(["bash", "-c", program], stdout=theirs[0], stderr=theirs[1]) as job:
        for descriptor in theirs:
            os.close(descriptor)
        for kill in range(KILLS):
            before = file_sizes(folder)
            mover = subprocess.Popen(
                [
                    *(sys.executable, "-c", MOVER, str(folder), *map(str, ours)),
                    *(str(segment_bytes), str(max_bytes), *map(str, segments(folder))),
                ],
                pass_fds=(folder, *ours),
            )
            while file_sizes(folder) == before:
                assert mover.poll() is None
            time.sleep(kill % 8 / 1000)  # anywhere in what it does
            mover.kill()
            mover.wait()
        job.kill()
    pump = Pump(folder, 1 << 20)
    extent = read_extent(folder, 1, segments(folder))
    log = Log(
        *(pump, 1, *ours),
        segment_bytes=segment_bytes,
        max_bytes=max_bytes,
        is_ring=True,
        resumed=extent,
    )
    wait_finished(pump, log)
    pump.close()
    kept = 0
    for stream, name in ((STDOUT, "out"), (STDERR, "err")):
        data = payload(read_all(folder, log.end, segment_bytes, stream))
        count = int(data.split()[-1])
        assert count > 1000
        written = "".join(f"{name} {i}\n" for i in range(1, count + 1)).encode()
        assert log.stream_bytes[stream - 1] == len(written)
        assert written.endswith(data)
        kept += len(data)
    assert log.lost_bytes == log.end - kept
    assert (log.lost_bytes > 0) == (max_bytes > 0)
    assert log.disk_bytes == disk_bytes(folder)
    assert not max_bytes or log.disk_bytes <= max_bytes


def disk_bytes(folder: int) -> int:
    """Without an index whose segment is gone: `Output.recover` removes it."""
    names = [f"1.{first}.{kind}" for first in segments(folder) for kind in ("log", "idx")]
    return sum(os.stat(name, dir_fd=folder).st_size for name in names)


def file_sizes(folder: int) -> dict[str, int]:
    sizes = {}
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # a ring has just dropped it
            sizes[name] = os.stat(name, dir_fd=folder).st_size
    return sizes


# A property test: the log against two byte strings.

STREAMS = st.sampled_from([STDOUT, STDERR])
# (the size of a segment, the quota, whether it is a ring)
QUOTAS = st.one_of(
    st.just((SMALL_SEGMENT, 0, False)),
    st.tuples(st.sampled_from([256, 1000]), st.integers(2000, 30_000), st.booleans()),
)


class LogMachine(RuleBasedStateMachine):
    """Writes, readers, full disks and restarts, in any order.

    Only one stream is written to at a time, so which byte stands at which offset is known,
    whether it was dropped or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = tempfile.mkdtemp()
        self.folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The read ends that outlive a server.
        self.kept_fds, self.their_fds = zip(os.pipe(), os.pipe(), strict=True)
        self.data = bytearray()
        self.streams = bytearray()
        self.known: dict[int, bool] = {}  # by offset, whether a reader was given the byte
        self.was_full = False
        self.shift = 0

    @initialize(quota=QUOTAS, ring_budget=st.sampled_from([0, 1 << 20]))
    def begin(self, quota: tuple[int, int, bool], ring_budget: int) -> None:
        self.segment_bytes, self.max_bytes, self.is_ring = quota
        self.ring_budget = ring_budget
        self.open(None)

    def open(self, extent: Extent | None) -> None:
        self.pump = Pump(self.folder, self.ring_budget, drops_when_full=True)
        ours = [os.dup(descriptor) for descriptor in self.kept_fds]
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        self.log = Log(
            self.pump,
            1,
            *ours,
            segment_bytes=self.segment_bytes,
            max_bytes=self.max_bytes,
            is_ring=self.is_ring,
            resumed=extent,
        )

    def send(self, stream: int, data: bytes) -> None:
        os.write(self.their_fds[stream - 1], data)
        self.data += data
        self.streams += bytes([stream]) * len(data)

    @rule(stream=STREAMS, data=st.binary(min_size=1, max_size=3000))
    def write(self, stream: int, data: bytes) -> None:
        self.send(stream, data)
        self.settle()

    def settle(self) -> None:
        wait_until(lambda: self.log.end == len(self.data))

    @precondition(lambda self: not self.max_bytes)
    @rule(stream=STREAMS, size=st.integers(1, 100_000))
    def write_a_burst(self, stream: int, size: int) -> None:
        self.write(stream, b"b" * size)

    @rule(pieces=st.lists(st.tuples(STREAMS, st.binary(min_size=1, max_size=9)), max_size=60))
    def write_in_pieces(self, pieces: list[tuple[int, bytes]]) -> None:
        for stream, data in pieces:
            self.write(stream, data)

    @rule(stream=STREAMS, data=st.binary(min_size=1, max_size=5000), room=st.integers(0, 3000))
    def write_to_a_full_disk(self, stream: int, data: bytes, room: int) -> None:
        self.was_full = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, self.limits[1]))
        try:
            self.write(stream, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    @rule()
    def read_from_memory(self) -> None:
        self.log.add_reader()

    @rule(
        start=st.floats(0, 1),
        max_bytes=st.sampled_from([16, 256, 1024, 65536]),
        stream=st.sampled_from([0, STDOUT, STDERR]),
        from_disk=st.booleans(),
    )
    def read(self, start: float, max_bytes: int, stream: int, from_disk: bool) -> None:
        end = self.log.told_end
        offset = int(start * end)
        while offset < end:
            found = None if from_disk else self.log.message(offset, max_bytes, stream)
            if found is None:
                place = (self.folder, 1, end, offset, max_bytes, stream, self.segment_bytes)
                found = read_message(*place)
                # The file may have been dropped in between, of a ring.
                assert read_cached(*place) in (None, found)
            message, following = found
            chunk = pb.DataChunk.FromString(message or b"")
            self.check(chunk, offset, following, stream)
            offset = following
        assert offset == end

    def check(self, chunk: pb.DataChunk, offset: int, following: int, stream: int) -> None:
        """The chunk is all there is to say about the bytes from `offset` to `following`."""
        assert following > offset
        if chunk.lost_bytes:
            assert (chunk.lost_bytes, chunk.payload) == (following - offset, b"")
            assert chunk.offset == chunk.next_offset == following
            self.lost(offset, following)
            return
        streams = self.streams[offset:following]
        asked = [at for at, of in enumerate(streams, offset) if stream in (0, of)]
        assert chunk.payload == bytes(self.data[at] for at in asked)
        told = b"".join(bytes([run.stream]) * run.length for run in chunk.runs)
        assert told == bytes(self.streams[at] for at in asked)
        for at in asked:
            assert self.known.get(at, True), "it was dropped, and came back"
            self.known[at] = True

    def lost(self, offset: int, following: int) -> None:
        assert self.max_bytes or self.was_full, "nothing may be lost"
        for at in range(offset, following):
            if not self.is_ring:
                assert not self.known.get(at), "it was kept, and went away"
            self.known[at] = False

    @rule(stream=STREAMS, data=st.binary(max_size=3000), is_busy=st.booleans())
    def restart(self, stream: int, data: bytes, is_busy: bool) -> None:
        """While bytes are moving, or not."""
        told_end = self.log.told_end
        if is_busy and data:
            self.send(stream, data)
        self.pump.close()
        extent = read_extent(self.folder, 1, segments(self.folder))
        assert extent.end >= told_end, "offsets that readers may have seen are gone"
        assert extent.disk_bytes == self.log.disk_bytes == disk_bytes(self.folder)
        unknown = self.log.end - extent.end  # of a gap that the full disk could not note
        if unknown:
            assert self.was_full
            del self.data[extent.end : self.log.end]
            del self.streams[extent.end : self.log.end]
        # The limit that stands for the full disk may cut in two what a disk writes in one: then
        # how many bytes of a gap were of which stream is the older figure.
        self.shift = extent.stdout_bytes - self.streams[: extent.end].count(STDOUT)
        assert self.shift == 0 or self.was_full
        assert extent.lost_bytes == self.log.lost_bytes - unknown
        self.open(extent)
        self.settle()

    @invariant()
    def sizes_are_right(self) -> None:
        if not hasattr(self, "log"):
            return
        assert self.log.end == len(self.data)
        stdout_bytes = self.streams.count(STDOUT) + self.shift
        assert self.log.stream_bytes == (stdout_bytes, len(self.data) - stdout_bytes)
        # A gap is noted after its bytes were dropped.
        wait_until(lambda: self.log.disk_bytes == disk_bytes(self.folder))
        newest = 2 * self.segment_bytes + 17 * self.segment_bytes
        if self.max_bytes:
            assert self.log.disk_bytes <= max(self.max_bytes, self.is_ring * newest)

    def teardown(self) -> None:
        try:
            if hasattr(self, "log"):
                self.finish()
        finally:
            signal.signal(signal.SIGXFSZ, self.handler)
            self.pump.close()
            for descriptor in (*self.kept_fds, *self.their_fds, self.folder):
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            shutil.rmtree(self.path)

    def finish(self) -> None:
        """The job ends; its log, now read from disk alone, has or tells every byte."""
        for descriptor in self.their_fds:
            os.close(descriptor)
        wait_finished(self.pump, self.log)
        chunks = read_all(self.folder, self.log.end, self.segment_bytes)
        kept = sum(len(chunk.payload) for chunk in chunks)
        lost = sum(chunk.lost_bytes for chunk in chunks)
        assert (kept + lost, lost) == (len(self.data), self.log.lost_bytes)
        for chunk in chunks:
            offset = chunk.offset - chunk.lost_bytes
            self.check(chunk, offset, chunk.next_offset, 0)
        if self.max_bytes and not self.is_ring and not self.was_full and lost:
            assert len(chunks[-1].payload) == 0
            assert not any(chunk.lost_bytes for chunk in chunks[:-1])


TestAnyLog = LogMachine.TestCase
TestAnyLog.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


def test_a_small_file_is_read_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "fi\udcffle"
    path.write_bytes(b"")
    assert read_small(os.fsencode(path)) == b""
    path.write_bytes(b"a\0b" * 30_000)
    assert read_small(os.fsencode(path)) == (b"a\0b" * 30_000)[: 64 << 10]
    before = len(os.listdir("/proc/self/fd"))
    for place, number in ((tmp_path / "none", errno.ENOENT), (tmp_path, errno.EISDIR)):
        with pytest.raises(OSError, match=str(place)) as caught:
            read_small(os.fsencode(place))
        assert (caught.value.errno, caught.value.filename) == (number, str(place))
    assert len(os.listdir("/proc/self/fd")) <= before  # others may be closed meanwhile


def test_folders_are_removed_where_they_are_empty(tmp_path: Path) -> None:
    for name in ("empty", "full", "full/inner"):
        (tmp_path / name).mkdir()
    names = ("full", "empty", "none")
    errors = remove_folders([os.fsencode(tmp_path / name) for name in names])
    assert errors == [errno.ENOTEMPTY, 0, errno.ENOENT]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert remove_folders([]) == []
