"""The native core: bytes, descriptors, and the layout of a DataChunk. See _fastio.pyx.

No call here blocks on a disk or a lock for longer than a memory copy takes, except
`read_message` and `read_extent` (read from disk; give them to a thread), `remove_folders` (the
same) and `Pump.close` (joins its threads).
"""

from collections.abc import Iterable
from typing import Final

STDOUT: Final = 1
STDERR: Final = 2

# The bits of `Pump.news`.
ARRIVED: Final = 1
FINISHED: Final = 2
TROUBLE: Final = 4
LIMIT: Final = 8

SEGMENT_BYTES: Final = 67108864

class Pump:
    """The native threads that drain all jobs' pipes to disk."""

    def __init__(self, directory: int, ring_budget: int, drops_when_full: bool = False) -> None:
        """directory: an open directory descriptor that stays the caller's, for the files
        `<job>.<first offset>.log` and `.idx`; must outlive the pump.
        ring_budget: bytes of memory for the hot tails of all logs together.
        drops_when_full: what comes while the disk is full is dropped, and counted. Else it
        stays in the job's pipes, and the job waits.
        """

    def fileno(self) -> int:
        """A descriptor that is readable while `news` has something to say."""

    def news(self) -> list[tuple[Log, int]]:
        """The logs to which something happened since the last call, with bits that say what:

        ARRIVED: bytes came, and `Log.wait_from` had asked for it.
        FINISHED: both pipes are closed and all their bytes are on disk. Comes once.
        TROUBLE: `Log.error` has changed.
        LIMIT: bytes came for which `max_bytes` has no room; they and all after them are
        dropped. Comes once, and not of a ring.
        """

    def serving(self) -> list[int]:
        """The ids of jobs with whose output a thread is busy now."""

    def close(self) -> None:
        """Stops the threads, which may take as long as what they are busy with, and closes the
        pipes of logs that are not finished. What they had not taken from a pipe stays there, for
        whoever else holds its read end."""

class Log:
    """One job's output, from the moment its pipes are ours until all of it is on disk.

    Offsets count the bytes of both streams together, in the order in which they came.
    """

    def __init__(
        self,
        pump: Pump,
        job: int,
        stdout: int,
        stderr: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        max_bytes: int = 0,
        is_ring: bool = False,
        resumed: Extent | None = None,
        watched: bool = True,
    ) -> None:
        """Takes the non-blocking read ends of the job's pipes, and owns them from here on;
        stderr is -1 where one pipe carries both.

        segment_bytes: the size of a full segment, the same for the life of the log.
        max_bytes: of segments and indexes together; 0: no limit.
        is_ring: beyond `max_bytes` the oldest segments give way, but for the newest. Else
        what comes is dropped.
        resumed: goes on where an earlier process was when it died or was closed.
        watched: False leaves what comes in the pipes, until `watch` or `drain`.
        """

    def watch(self) -> None:
        """From now on what comes is taken at once. Harmless where it is already."""

    @property
    def job(self) -> int: ...
    @property
    def segment_bytes(self) -> int: ...
    @property
    def end(self) -> int:
        """The bytes that came so far, dropped ones too: one more than the offset of the last."""

    @property
    def told_end(self) -> int:
        """How far readers can go: `end`, but not into a gap that may still grow."""

    @property
    def stream_bytes(self) -> tuple[int, int]:
        """How many of them were stdout's, and how many stderr's."""

    @property
    def lost_bytes(self) -> int:
        """How many of them were dropped: by the quota, or while the disk was full."""

    @property
    def disk_bytes(self) -> int:
        """The size of all its files."""

    @property
    def finished(self) -> bool:
        """Both pipes are closed: no byte will be added. A job may close them long before it
        ends."""

    @property
    def error(self) -> int:
        """The errno with which the disk refuses the job's bytes, which then wait in its
        pipes and are tried again, or are dropped; 0 while all is well."""

    def drain(self) -> None:
        """To be called once nothing of the job is left to write: takes what its pipes hold when
        a thread looks, so that a process that is not the job's cannot prolong it, and closes
        them. FINISHED follows, unless it came before."""

    def add_reader(self) -> None:
        """Keeps the newest bytes in memory while there are readers, but no large bursts, which are
        cheaper read from the page cache. Pair with `remove_reader`."""

    def remove_reader(self) -> None: ...
    def wait_from(self, offset: int) -> bool:
        """True: nothing is there at `offset`, and ARRIVED or FINISHED will say when.
        False: there is, or never will be; do not wait."""

    def message(
        self, offset: int, max_bytes: int, stream: int = 0
    ) -> tuple[bytes | None, int] | None:
        """A finished DataChunk that starts at `offset`, from memory, and where the next one
        starts. None: it is not in memory, use `read_message`. (None, offset): there is
        nothing yet. (None, more): what is in between is all of the other stream.
        Dropped bytes are told in a chunk without payload, which says how many.

        max_bytes: of payload. stream: STDOUT, STDERR, or 0 for both.
        """

def read_message(
    directory: int,
    job: int,
    end: int,
    offset: int,
    max_bytes: int,
    stream: int = 0,
    segment_bytes: int = SEGMENT_BYTES,
) -> tuple[bytes | None, int]:
    """The same from disk, also for a job that ended long ago. Blocks, without the GIL.

    end: of the log, from `Log.told_end` or the job's record.
    segment_bytes: of the log.
    (None, more): may be far more than max_bytes, as the index alone tells of the other stream.
    What is in no segment counts as dropped. Raises OSError where an index is damaged.
    """

def read_cached(
    directory: int,
    job: int,
    end: int,
    offset: int,
    max_bytes: int,
    stream: int = 0,
    segment_bytes: int = SEGMENT_BYTES,
) -> tuple[bytes | None, int] | None:
    """The same as far as it is in the page cache: does not block, and returns None where it
    would have to, or meets any trouble; `read_message` then knows more."""

def read_packed(
    segment: bytes, index: bytes, end: int, offset: int, max_bytes: int, stream: int = 0
) -> tuple[bytes | None, int]:
    """The same from the bytes of the two files of a log that is one segment."""

class Extent:
    """How far a log goes that an earlier process wrote."""

    @property
    def segment_bytes(self) -> int:
        """0 where nothing of it is on disk."""

    @property
    def stdout_bytes(self) -> int: ...
    @property
    def stderr_bytes(self) -> int: ...
    @property
    def end(self) -> int:
        """Of both streams together."""

    @property
    def lost_bytes(self) -> int:
        """How many of them were dropped."""

    @property
    def disk_bytes(self) -> int:
        """The size of all its files."""

def read_extent(directory: int, job: int, firsts: Iterable[int]) -> Extent:
    """By what is on disk. Blocks, without the GIL. Nobody may be writing.

    firsts: the first offsets of its segments.
    Exact after the death of a process at any moment, but for what that one had dropped since
    it last could say so in an index. Raises OSError where a file cannot be read.
    """

def read_small(path: bytes) -> bytes:
    """What one read returns, of at most 64 KiB: all of a file that the kernel makes up. Raises
    OSError."""

def remove_folders(paths: list[bytes]) -> list[int]:
    """Each that is empty; for each the errno, 0 where it is removed. May block, and does so
    without the GIL: one call for many makes a thread wait for that once."""
