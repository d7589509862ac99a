"""Jobs' output: the logs that native threads fill, and the readers that follow them.

A reader is a cursor and not a queue: it knows an offset, and asks for the message there.
History on disk and the live tail in memory are one loop, so nothing can fall in between,
and a slow reader holds up nobody and misses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

from jobworker import _fastio
from jobworker._fastio import Extent, Log
from jobworker.errors import ShuttingDownError, StateFolderError
from jobworker.job import LogPolicy

logger = logging.getLogger(__name__)

# A reader starts with small messages and gets larger ones while they are taken fast: so
# what gRPC holds for a thousand readers that read nothing stays small.
FIRST_MESSAGE_BYTES = 32 << 10
LARGEST_MESSAGE_BYTES = 1 << 20
GROWTH = 2  # from one size to the next
FAST_WRITE_SECONDS = 0.05
SLOW_WRITE_SECONDS = 0.5
# A client's window, of 4 to 16 MiB, takes messages fast though nobody reads them. So none is
# larger than this share of what its reader has taken before.
SHARE_OF_TAKEN = 32
# Handed to gRPC and not yet written, of all readers, in messages larger than the first. Each
# size below the largest has a budget of its own: readers that stop at the end of their window
# all stop at one size, and leave the others to those who read on.
UNWRITTEN_BUDGET_BYTES = 32 << 20
UNWRITTEN_BUDGET_OF_SIZE_BYTES = 4 << 20
# Made a moment ago: readers of one job who come to the same place share them.
SHARED_BYTES = 32 << 20
SHARED_OVERHEAD_BYTES = 1 << 10  # of each, about

# After this a new log's pipes are looked after. Many a job is over by then, and has written
# nothing: no thread is woken for it.
WATCH_SECONDS = 0.002

HISTORY_THREADS = 2

# In one turn of the loop, of all readers together, for steps over streams not asked for.
PASSING_SECONDS = 0.0005

# So long is waited for threads to stop before it is said which jobs keep them.
SAID_SECONDS = 1.0

SEGMENT_NAME = re.compile(r"(\d+)\.(\d+)\.log")
DAMAGED = ".damaged"

# Of a job with a quota, in segments: no index outgrows its segment more than sixteenfold, so
# the newest segment alone never exceeds a quota that is not tiny.
SMALLEST_SEGMENT_BYTES = 64 << 10
SEGMENTS_PER_QUOTA = 17
# Beyond so many possible names of files it is faster to look which there are.
MOST_GUESSED_SEGMENTS = 4096

# What a log may have at the most to be kept in some other way than in two files.
LARGEST_PACKED_BYTES = 16 << 10


# A message, or None, and where the next one starts.
Found: TypeAlias = tuple[bytes | None, int]
Reading: TypeAlias = asyncio.Future[Found]

# With these errors a disk says that it has no room.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Quota:
    """Of one job's log; the same for its life, and needed to read it."""

    max_bytes: int = 0  # of all its files; 0: no limit
    policy: LogPolicy = LogPolicy.RING

    @property
    def segment_bytes(self) -> int:
        """A power of two."""
        if not self.max_bytes:
            return _fastio.SEGMENT_BYTES
        largest = 1 << (self.max_bytes // SEGMENTS_PER_QUOTA).bit_length() >> 1
        return max(SMALLEST_SEGMENT_BYTES, min(largest, _fastio.SEGMENT_BYTES))

    def fitted(self, segment_bytes: int) -> Quota:
        """This one, or, where its segments are not of this size, the largest whose are."""
        if segment_bytes == self.segment_bytes:
            return self
        if segment_bytes == _fastio.SEGMENT_BYTES:
            return Quota(0, self.policy)
        return Quota(2 * SEGMENTS_PER_QUOTA * segment_bytes - 1, self.policy)


UNLIMITED = Quota()


class Packed(NamedTuple):
    """A small log of an ended job: the bytes of its two files."""

    segment_data: bytes
    index_data: bytes


class Place(NamedTuple):
    """In a log, and how much is wanted from there on."""

    job_id: int
    offset: int
    max_bytes: int
    stream: int


class Shared:
    """The newest messages of logs with several readers, each until all of them have had it."""

    def __init__(self) -> None:
        self._messages: OrderedDict[Place, Found] = OrderedDict()
        self._uses_left: dict[Place, int] = {}
        self._bytes = 0

    def get(self, place: Place, end: int) -> Found | None:
        """end: beyond it the reader wants nothing."""
        found = self._messages.get(place)
        if not found or found[1] > end:
            return None
        self._uses_left[place] -= 1
        if not self._uses_left[place]:
            self._drop(place)
        return found

    def keep(self, place: Place, found: Found, uses: int) -> None:
        if place in self._messages:
            self._drop(place)
        self._messages[place] = found
        self._uses_left[place] = uses
        self._bytes += _shared_bytes(found)
        while self._bytes > SHARED_BYTES:
            self._drop(next(iter(self._messages)))

    def clear(self) -> None:
        for place in list(self._messages):
            self._drop(place)

    def _drop(self, place: Place) -> None:
        self._bytes -= _shared_bytes(self._messages.pop(place))
        del self._uses_left[place]


def _shared_bytes(found: Found) -> int:
    return len(found[0] or b"") + SHARED_OVERHEAD_BYTES


class Unwritten:
    """Bytes handed to gRPC and not yet written, in messages larger than the first."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._by_size: Counter[int] = Counter()  # size: the most that a message may have

    def reserve(self, most_bytes: int) -> int:
        """For one message; returns how large that may be"""
        size = most_bytes
        while size > FIRST_MESSAGE_BYTES and not self._has_room(size):
            size //= GROWTH
        self.change(size, size)
        return size

    def change(self, size: int, by_bytes: int) -> None:
        if size > FIRST_MESSAGE_BYTES:
            self.total_bytes += by_bytes
            self._by_size[size] += by_bytes

    def _has_room(self, size: int) -> bool:
        budget = UNWRITTEN_BUDGET_OF_SIZE_BYTES
        if size == LARGEST_MESSAGE_BYTES:
            budget = UNWRITTEN_BUDGET_BYTES
        return (
            self._by_size[size] + size <= budget
            and self.total_bytes + size <= UNWRITTEN_BUDGET_BYTES
        )


class Output:
    """The logs of all jobs, in one folder."""

    def __init__(self, folder: Path, ring_budget_bytes: int, drops_when_full: bool = False) -> None:
        """Belongs to the running event loop. Raises StateFolderError where the folder cannot
        hold logs.

        drops_when_full: what jobs write while the disk is full is dropped; else they wait.
        """
        self.unwritten = Unwritten()
        self.is_closing = False
        # Called with the id of a job whose log has used up its quota, unless that is a ring.
        self.on_log_limit: Callable[[int], None] | None = None
        self._drops_when_full = drops_when_full
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, set[asyncio.Future[None]]] = {}
        self._unwatched: list[Log] = []  # opened a moment ago
        self._readers: Counter[int] = Counter()  # by job
        self._unread: dict[int, list[asyncio.Future[None]]] = {}
        self._shared = Shared()
        self._reading: dict[Place, Reading] = {}
        self._passing = asyncio.Lock()
        self._passing_until = 0.0
        self._folder = folder
        self._directory = _open_folder(folder)
        self._threads = ThreadPoolExecutor(HISTORY_THREADS, thread_name_prefix="history")
        self._pump = _fastio.Pump(self._directory, ring_budget_bytes, drops_when_full)
        self._loop.add_reader(self._pump.fileno(), self._take_news)

    def open_log(
        self,
        job_id: int,
        stdout_fd: int,
        stderr_fd: int,
        quota: Quota = UNLIMITED,
        resumed: Extent | None = None,
    ) -> Log:
        """Takes over the read ends of a job's pipes; stderr_fd is -1 for a merged one.

        resumed: from `recover`, for a job that an earlier server started.
        """
        log = Log(
            self._pump,
            job_id,
            stdout_fd,
            stderr_fd,
            segment_bytes=quota.segment_bytes,
            max_bytes=quota.max_bytes,
            is_ring=quota.policy is LogPolicy.RING,
            resumed=resumed,
            watched=resumed is not None,
        )
        self._unwatched.append(log)
        if len(self._unwatched) == 1:
            self._loop.call_later(WATCH_SECONDS, self._watch)
        return log

    def _watch(self) -> None:
        for log in self._unwatched:
            log.watch()
        self._unwatched.clear()

    async def finish(self, log: Log) -> None:
        """Nobody may write to it any more: returns once what is in its pipes is on disk."""
        log.drain()
        if log.finished:
            _resolve(self._waiting.pop(log.job, ()))
        await self.wait_finished(log)

    async def wait_finished(self, log: Log) -> None:
        """Returns once both pipes are closed and all their bytes are on disk."""
        while not log.finished:
            await self._news_of(log)

    def recover(self, job_ids: Iterable[int]) -> dict[int, Extent]:
        """How far the logs of these jobs go, by what an earlier server left on disk. Blocks.

        To be called before any log is opened. Raises OSError where files cannot be read. Those
        that are damaged are set aside, as one bad file must not keep all other jobs from going
        on: a job without an extent is one whose log begins anew.
        """
        _remove_stray_indexes(self._directory)
        found = _segments(self._directory)
        extents = {}
        for job_id in job_ids:
            firsts = found.get(job_id, [])
            try:
                extents[job_id] = _fastio.read_extent(self._directory, job_id, firsts)
            except OSError as error:
                if error.errno != errno.EBADMSG:
                    raise
                logger.error(
                    "the output of job %d is damaged, and set aside in %s as %d.*%s: %s",
                    *(job_id, self._folder, job_id, DAMAGED, error),
                )
                _set_aside(self._directory, job_id, firsts)
        return extents

    def job_ids(self) -> set[int]:
        """The jobs that have segments here. Blocks."""
        return set(_segments(self._directory))

    def disk_bytes(self, job_id: int, end: int, quota: Quota = UNLIMITED) -> int:
        """The size of all files of an ended job, which wrote `end` bytes. Blocks."""
        return sum(
            _size(self._directory, f"{job_id}.{first}.{kind}")
            for first in _firsts(self._directory, job_id, end, quota)
            for kind in ("log", "idx")
        )

    def delete(self, job_id: int, end: int, quota: Quota = UNLIMITED) -> None:
        """Removes all files of an ended job, which wrote `end` bytes. Blocks. A reader who is
        still at it is told that the rest was dropped."""
        for first in _firsts(self._directory, job_id, end, quota):
            _remove(self._directory, f"{job_id}.{first}.log")
            _remove(self._directory, f"{job_id}.{first}.idx")

    def pack(self, job_id: int, end: int) -> Packed | None:
        """The log of an ended job, where it is so small that two files are too much for it;
        then they can be deleted. Blocks."""
        if not 0 < end <= LARGEST_PACKED_BYTES:
            return None
        try:
            packed = Packed(
                _read_small(self._directory, f"{job_id}.0.log"),
                _read_small(self._directory, f"{job_id}.0.idx"),
            )
        except FileNotFoundError:
            return None  # all of it was dropped
        return packed if sum(map(len, packed)) <= LARGEST_PACKED_BYTES else None

    def delete_stray(self, job_id: int) -> None:
        """Removes all files of a job of which nothing is known. Blocks."""
        for first in _segments(self._directory).get(job_id, ()):
            _remove(self._directory, f"{job_id}.{first}.log")
            _remove(self._directory, f"{job_id}.{first}.idx")

    def count_reader(self, job_id: int, change: int) -> None:
        """change: 1 for one that comes, -1 for one that goes."""
        self._readers[job_id] += change
        if not self._readers[job_id]:
            del self._readers[job_id]
            _resolve(self._unread.pop(job_id, ()))
        if not self._readers:
            self._shared.clear()

    async def wait_unread(self, job_id: int) -> None:
        """Until nobody reads the output of this job."""
        while self._readers[job_id]:
            future = self._loop.create_future()
            self._unread.setdefault(job_id, []).append(future)
            await future

    def room_bytes(self) -> int:
        """What is left on the disk: nothing where it can take no more files (some file systems
        know no such number)."""
        disk = os.fstatvfs(self._directory)
        takes_files = disk.f_favail > 0 or disk.f_files == 0
        return disk.f_bavail * disk.f_frsize if takes_files else 0

    def size_bytes(self) -> int:
        """Of the disk."""
        disk = os.fstatvfs(self._directory)
        return disk.f_blocks * disk.f_frsize

    def interrupt_readers(self) -> None:
        """All readers that have caught up, now and from now on, end with ShuttingDownError."""
        self.is_closing = True
        for job_id in list(self._waiting):
            _resolve(self._waiting.pop(job_id))

    async def close(self) -> None:
        """Stops the threads; pipes of jobs that still run are closed."""
        self._loop.remove_reader(self._pump.fileno())
        closing = asyncio.ensure_future(asyncio.to_thread(self._pump.close))
        _, waits = await asyncio.wait([closing], timeout=SAID_SECONDS)
        if waits:
            jobs = ", ".join(map(str, self._pump.serving()))
            logger.warning("the server ends once jobs %s let it read their output", jobs)
            await closing
        self._threads.shutdown()
        os.close(self._directory)
        for futures in self._waiting.values():
            _resolve(futures)

    async def message(
        self,
        place: Place,
        log: Log | None,
        end: int,
        segment_bytes: int,
        turn: asyncio.Semaphore,
    ) -> Found:
        """The finished DataChunk at this place, and where the next one starts; see `Log.message`.

        log: None where only what is on disk counts. end: as far as there is something to read.
        turn: what a disk is asked within, as others wait so long.
        """
        found = self._shared.get(place, end)
        if found:
            return found
        if log:
            found = log.message(place.offset, place.max_bytes, place.stream)
        if found is None:
            found = await self._message_from_disk(place, end, segment_bytes, turn)
        others = self._readers[place.job_id] - 1
        if found[0] and others > 0:
            self._shared.keep(place, found, others)
        return found

    async def _message_from_disk(
        self, place: Place, end: int, segment_bytes: int, turn: asyncio.Semaphore
    ) -> Found:
        """In a thread, unless all is in the page cache: a slow disk delays nobody else."""
        what = (place.job_id, end, *place[1:], segment_bytes)
        found = _fastio.read_cached(self._directory, *what)
        if found:
            return found
        # Of a part that is complete, who reads now or later reads the same.
        is_complete = place.offset + place.max_bytes <= end
        reading = self._reading.get(place) if is_complete else None
        if reading is None:
            await turn.acquire()
            reading = self._reading.get(place) if is_complete else None
            if reading is None:
                read = partial(_fastio.read_message, self._directory, *what)
                reading = self._begin_reading(read, turn)
                if is_complete:
                    self._reading[place] = reading
                    reading.add_done_callback(lambda _: self._reading.pop(place))
            else:  # another has begun it meanwhile
                turn.release()
        # Shielded: others may wait for the same.
        return await asyncio.shield(reading)

    def _begin_reading(self, read: Callable[[], Found], turn: asyncio.Semaphore) -> Reading:
        """Has the turn until it is over, though the reader may go before."""
        try:
            reading = self._loop.run_in_executor(self._threads, read)
        except BaseException:
            turn.release()
            raise
        reading.add_done_callback(lambda _: turn.release())
        return reading

    async def passed_over(self) -> None:
        """After each step over what a reader does not want: nothing is sent, so nothing else would
        make it wait, and all other calls would."""
        if time.monotonic() < self._passing_until:
            return
        async with self._passing:
            await asyncio.sleep(0)
            self._passing_until = time.monotonic() + PASSING_SECONDS

    async def wait_from(self, log: Log, offset: int) -> bool:
        """False once there will never be a byte at `offset`; True when it is worth a look."""
        if log.wait_from(offset):
            await self._news_of(log)
        return not log.finished or offset < log.told_end

    async def _news_of(self, log: Log) -> None:
        future = self._loop.create_future()
        waiting = self._waiting.setdefault(log.job, set())
        waiting.add(future)
        try:
            await future
        finally:
            waiting.discard(future)  # of a reader that goes, from a job that says nothing

    def _take_news(self) -> None:
        for log, bits in self._pump.news():
            _resolve(self._waiting.pop(log.job, ()))
            if bits & _fastio.TROUBLE:
                self._report_trouble(log)
            if bits & _fastio.LIMIT and self.on_log_limit:
                self.on_log_limit(log.job)

    def _report_trouble(self, log: Log) -> None:
        if not log.error:
            logger.warning("job %d: its output can be written again", log.job)
            return
        reason = os.strerror(log.error)
        if self._drops_when_full and log.error in FULL:
            logger.error("job %d loses output, which cannot be written: %s", log.job, reason)
        else:
            logger.error("job %d waits, as its output cannot be written: %s", log.job, reason)


class Reader:
    """One reader of one job's output, at one place in it."""

    def __init__(
        self,
        output: Output,
        job_id: int,
        log: Log | None,
        end: int,
        offset: int = 0,
        stream: int = 0,
        follow: bool = True,
        quota: Quota = UNLIMITED,
        turn: asyncio.Semaphore | None = None,
    ) -> None:
        """log: of a job that has not ended; None: the job has ended, and wrote `end` bytes.
        stream: _fastio.STDOUT, STDERR, or 0 for both.
        follow: False ends at what is there now.
        quota: of the job's log.
        turn: what a disk is asked within; None: one of its own.
        """
        self.offset = offset
        self._output = output
        self._job_id = job_id
        self._log = log
        self._end = log.end if log else end
        self._stream = stream
        self._follow = follow and log is not None
        self._quota = quota
        self._turn = turn or asyncio.Semaphore()
        self._packed: Packed | None = None
        self._is_open = True
        output.count_reader(job_id, 1)
        self._max_bytes = FIRST_MESSAGE_BYTES
        self._size = FIRST_MESSAGE_BYTES  # the most that the message under way may have
        self._reserved_bytes = 0
        self._handed_bytes = 0
        self._handed_at = 0.0
        self._taken_bytes = 0
        if log:
            log.add_reader()

    def use_packed(self, packed: Packed) -> None:
        """The log is that of an ended job, and no longer in files. To be looked for when there
        is a Reader already: from then on the files stay, if they were there."""
        self._packed = packed

    async def next(self) -> bytes | None:
        """The next finished DataChunk; None when there are no more. Where bytes were dropped,
        one without payload says how many.

        Asking for the next says that the one before has been written. Raises
        ShuttingDownError where it would have to wait and the server is about to end.
        """
        self._take_back()
        while True:
            before = self.offset
            message = await self._advance()
            if message is not None:
                self._hand_out(message)
                return message
            self._release()
            if self.offset > before:  # that was all of the other stream
                await self._output.passed_over()
            if self.offset < self._end:
                continue
            if self._log is None or not self._follow:
                return None
            if self._output.is_closing and not self._log.finished:
                raise ShuttingDownError
            if not await self._output.wait_from(self._log, self.offset):
                return None

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._take_back()
        self._output.count_reader(self._job_id, -1)
        if self._log:
            self._log.remove_reader()
            self._log = None

    async def _advance(self) -> bytes | None:
        """Steps to the end of the next message; None where that has no byte for us."""
        place = Place(self._job_id, self.offset, self._reserve(), self._stream)
        log = self._log if self._follow else None
        if log:
            self._end = log.told_end  # a gap is told when it is over
        if self._packed:
            message, self.offset = _fastio.read_packed(*self._packed, self._end, *place[1:])
        else:
            message, self.offset = await self._output.message(
                place, log, self._end, self._quota.segment_bytes, self._turn
            )
        return message

    def _reserve(self) -> int:
        """How large the next message may be."""
        self._release()
        self._size = self._reserved_bytes = self._output.unwritten.reserve(self._max_bytes)
        return self._size

    def _release(self) -> None:
        self._output.unwritten.change(self._size, -self._reserved_bytes)
        self._reserved_bytes = 0

    def _hand_out(self, message: bytes) -> None:
        self._output.unwritten.change(self._size, len(message) - self._reserved_bytes)
        self._reserved_bytes = self._handed_bytes = len(message)
        self._handed_at = time.monotonic()

    def _take_back(self) -> None:
        self._release()
        if not self._handed_bytes:
            return
        took = time.monotonic() - self._handed_at
        self._taken_bytes += self._handed_bytes
        was_full = self._handed_bytes >= self._size
        self._handed_bytes = 0
        if took > SLOW_WRITE_SECONDS:
            self._max_bytes = FIRST_MESSAGE_BYTES
        elif was_full and took < FAST_WRITE_SECONDS and self._may_grow():
            self._max_bytes *= GROWTH

    def _may_grow(self) -> bool:
        return (
            self._max_bytes < LARGEST_MESSAGE_BYTES
            and self._max_bytes * GROWTH * SHARE_OF_TAKEN <= self._taken_bytes
        )


def _resolve(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _open_folder(folder: Path) -> int:
    folder.mkdir(mode=0o700, exist_ok=True)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _try_splice(folder, directory)
    except BaseException:
        os.close(directory)
        raise
    return directory


def _try_splice(folder: Path, directory: int) -> None:
    """Bytes go from pipe to disk by splice and in no other way, so that they are never in
    the server's memory only; a filesystem that cannot do that is refused here."""
    descriptors = list(os.pipe())
    try:
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        descriptors.append(os.open(".probe", flags, 0o600, dir_fd=directory))
        os.unlink(".probe", dir_fd=directory)
        ours, theirs, probe = descriptors
        os.write(theirs, b"x")
        os.splice(ours, probe, 1, offset_dst=0)
    except OSError as error:
        if error.errno in FULL:  # it could, with room; deletes make some
            return
        if error.errno != errno.EINVAL:
            raise
        raise StateFolderError(
            f"{folder}: its filesystem does not support splice; put the state folder on "
            "ext4, xfs, btrfs or tmpfs"
        ) from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _segments(directory: int) -> dict[int, list[int]]:
    """By job, the first offsets of its segments."""
    found: dict[int, list[int]] = {}
    for name in os.listdir(directory):
        match = SEGMENT_NAME.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), []).append(int(match[2]))
    return found


def _remove_stray_indexes(directory: int) -> None:
    """Those without a segment, of a server that was killed while it removed both."""
    names = set(os.listdir(directory))
    for name in names:
        if name.endswith(".idx") and name.removesuffix("idx") + "log" not in names:
            _remove(directory, name)


def _firsts(directory: int, job_id: int, end: int, quota: Quota) -> Iterable[int]:
    """The first offsets of all segments that a log may have; it may have begun one at `end`."""
    guessed = range(0, end + 1, quota.segment_bytes)
    if len(guessed) <= MOST_GUESSED_SEGMENTS:
        return guessed
    return _segments(directory).get(job_id, ())


def _set_aside(directory: int, job_id: int, firsts: Iterable[int]) -> None:
    """For people to look at: nothing here knows these names."""
    for first in firsts:
        for kind in ("idx", "log"):
            name = f"{job_id}.{first}.{kind}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(name, name + DAMAGED, src_dir_fd=directory, dst_dir_fd=directory)


def _remove(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _size(directory: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=directory).st_size
    except FileNotFoundError:
        return 0


def _read_small(directory: int, name: str) -> bytes:
    """One byte more than can be packed, where there are more."""
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    with open(descriptor, "rb") as file:
        return file.read(LARGEST_PACKED_BYTES + 1)
