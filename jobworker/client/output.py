"""A job's output as its readers get it: chunks, and how a stream goes on after a break.

Nothing here does I/O: `Reading` says what to ask for and takes what came, and both clients
carry one through.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jobworker.client.calls import LONGEST_CALL_SECONDS, checked, job_from, rejecting
from jobworker.errors import (
    CallError,
    DeadlineError,
    RejectedError,
    UnreachableError,
    UnsupportedError,
)
from jobworker.job import Job
from jobworker.pb import job_worker_pb2 as pb

log = logging.getLogger(__name__)

RPC = "GetJobsStream"

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0

PAYLOAD_TAG = b"\x0a"  # field 1, length-delimited
LONGEST_VARINT_BYTES = 10

NOT_APART = "this server does not tell stdout and stderr apart; use `output`, which has both"


class Stream(enum.IntEnum):
    """Which output; the numbers are the wire contract's."""

    ALL = 0
    STDOUT = 1
    STDERR = 2


STREAMS = frozenset(map(int, Stream))


class Run(NamedTuple):
    """Bytes of a payload that came from one stream at one time."""

    stream: Stream
    length: int  # in bytes
    time_ns: int  # when they arrived at the server, since the epoch


class Chunk:
    """A piece of a job's output.

    view: its bytes, without a copy.
    offset: of its first byte, in the merged output.
    next_offset: where the next chunk starts; a stream from there continues exactly.
    lost_bytes: before `offset`, dropped by a quota since the chunk before.
    ending: the ended job, in the last chunk of a stream whose job has ended; else None.
    """

    __slots__ = ("_runs", "ending", "lost_bytes", "next_offset", "offset", "view")

    def __init__(
        self,
        view: memoryview,
        offset: int,
        next_offset: int,
        runs: Iterable[pb.DataChunk.Run] = (),
        lost_bytes: int = 0,
        ending: Job | None = None,
    ) -> None:
        self.view = view
        self.offset = offset
        self.next_offset = next_offset
        self._runs = runs
        self.lost_bytes = lost_bytes
        self.ending = ending

    @property
    def payload(self) -> bytes:
        """Its bytes, as a copy."""
        return bytes(self.view)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Which bytes came from which stream, and when, in order; empty where the server
        is too old to tell."""
        return tuple(Run(Stream(run.stream), run.length, run.time_ns) for run in self._runs)

    def __repr__(self) -> str:
        end = f" {self.ending.status}" if self.ending else ""
        return f"<Chunk {self.offset}..{self.next_offset}, {len(self.view)} bytes{end}>"


@dataclass(frozen=True, slots=True)
class Result:
    """What `run` returns: the ended job, and all that it wrote."""

    job: Job
    output: bytes  # stdout and stderr as they came
    runs: tuple[Run, ...] = field(repr=False, default=())

    @property
    def stdout(self) -> bytes:
        """Raises UnsupportedError where the server was too old to tell the streams apart."""
        return self._of(Stream.STDOUT)

    @property
    def stderr(self) -> bytes:
        """As stdout."""
        return self._of(Stream.STDERR)

    def _of(self, stream: Stream) -> bytes:
        if self.output and not self.runs:
            raise UnsupportedError(RPC, "UNIMPLEMENTED", NOT_APART)
        pieces, place = [], 0
        for run in self.runs:
            if run.stream is stream:
                pieces.append(self.output[place : place + run.length])
            place += run.length
        return b"".join(pieces)


class Collector:
    """Makes a Result from chunks."""

    def __init__(self) -> None:
        self._pieces: list[memoryview] = []
        self._runs: list[Run] = []

    def add(self, chunk: Chunk) -> Result | None:
        """The result, once the chunk is the last."""
        self._pieces.append(chunk.view)
        self._runs += chunk.runs
        if chunk.ending is None:
            return None
        return Result(chunk.ending, b"".join(self._pieces), tuple(self._runs))


class Patience:
    """How long a caller goes on trying: after a connection broke, and in all.

    Each failure and each wait says with `pause_seconds` how long to sleep before the next
    try, longer each time until something comes.
    """

    def __init__(
        self,
        patience_seconds: float,
        timeout_seconds: float | None = None,
        *,
        has_answered: bool = False,
    ) -> None:
        """patience_seconds: for getting a broken connection back; a server that was never
        there is not waited for. timeout_seconds: for everything; None: no limit. has_answered:
        the server, other calls before.
        """
        self._patience_seconds = patience_seconds
        self._give_up_at = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._was_connected = has_answered
        self._broken_at: float | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def left_seconds(self) -> float | None:
        if self._give_up_at is None:
            return None
        return min(max(0.0, self._give_up_at - time.monotonic()), LONGEST_CALL_SECONDS)

    def pause_seconds(self, rpc: str) -> float:
        """Before the next try. Raises DeadlineError where there is no time for one."""
        pause, left = self._pause_seconds, self.left_seconds()
        if left is not None and left <= pause:
            raise DeadlineError(rpc, "DEADLINE_EXCEEDED", "the job did not end in the time given")
        self._pause_seconds = min(2 * pause, LONGEST_PAUSE_SECONDS)
        return pause

    def connected(self) -> None:
        """The server has answered."""
        self._was_connected = True
        self._broken_at = None

    def progressed(self) -> None:
        """Something new came."""
        self.connected()
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def failed(self, error: CallError) -> float:
        """The pause before the next try; raises the error where there is none."""
        if not isinstance(error, UnreachableError):
            raise error
        self._was_connected |= error.was_connected
        now = time.monotonic()
        if self._broken_at is None:
            self._broken_at = now
        if not self._was_connected or now - self._broken_at >= self._patience_seconds:
            raise error
        if self._broken_at == now:
            log.info("%s; trying again for %g s", error, self._patience_seconds)
        return self.pause_seconds(error.rpc)


class Reading:
    """One reader's way through a job's output, over as many connections as it takes.

    Until it `is_over`, a client opens a stream with `request`, hands each message to `take`,
    and says how that one went, `ended` or `failed`; then it sleeps for `pause_seconds`.
    """

    def __init__(
        self,
        job_id: int | str,
        patience: Patience,
        from_offset: int = 0,
        follow: bool = True,
        stream: Stream = Stream.ALL,
    ) -> None:
        """Raises RejectedError."""
        if not 0 <= from_offset < 2**64:
            problem = f"from_offset: {from_offset} is not possible; use 0 or more"
            raise RejectedError(RPC, "OUT_OF_RANGE", problem)
        self.is_over = False
        self.pause_seconds = 0.0
        self.follow = follow
        self.job_id = str(job_id)
        self.patience = patience
        self._stream = stream
        self._offset = from_offset  # of the next byte for the reader, in the merged output
        # Of a server that knows only the old fields: bytes that the reader has already had.
        self._skip = 0

    @property
    def needs(self) -> tuple[str, ...]:
        """What a server that knows only the old fields would ignore."""
        asked = {"follow=False": not self.follow, f"stream={self._stream.name}": self._stream != 0}
        return tuple(option for option, used in asked.items() if used)

    def request(self) -> pb.GetJobsStreamReq:
        self._skip = self._offset  # one that ignores from_offset starts at 0
        self.pause_seconds = 0.0
        with rejecting(RPC):
            return pb.GetJobsStreamReq(
                id=self.job_id,
                from_offset=self._offset,
                no_follow=not self.follow,
                stream=pb.Stream.Name(self._stream),
            )

    def take(self, message: bytes) -> Chunk | None:
        """None: nothing in it that the reader has not had. Raises ValueError or DecodeError
        for what is no chunk."""
        view, rest = split_payload(message)
        if view and not rest.next_offset:
            return self._take_old(view)
        if any(run.stream not in STREAMS for run in rest.runs):
            raise ValueError("it has bytes of an unknown stream")
        self.patience.progressed()
        if not view and not rest.next_offset and not rest.HasField("ending"):
            return None
        if not self._offset <= rest.offset <= rest.next_offset:
            raise ValueError(
                f"from {self._offset} on it goes back to {rest.offset}..{rest.next_offset}"
            )
        ending = None
        if rest.HasField("ending"):
            ending = checked(job_from(rest.ending), self.job_id)
        self._offset = rest.next_offset
        self.is_over = ending is not None
        return Chunk(view, rest.offset, rest.next_offset, rest.runs, rest.lost_bytes, ending)

    def failed(self, error: CallError) -> None:
        """Raises the error where it is the end of the reading."""
        self.pause_seconds = self.patience.failed(error)

    def ended(self) -> bool:
        """The stream has ended without an error. True: the server knows only the old fields,
        and sends no ending; `conclude` says whether the job has one."""
        if not self.follow:
            self.is_over = True
        return not self.is_over

    def conclude(self, job: Job) -> Chunk | None:
        """The last chunk. None: the stream was cut off, as the job goes on.

        Raises RejectedError where the output is shorter than where the reader is.
        """
        self.patience.connected()
        if not job.is_ended:
            self.pause_seconds = self.patience.pause_seconds(RPC)
            return None
        if self._skip:
            problem = f"job {job.id} has no more than {self._offset - self._skip} bytes of output"
            raise RejectedError(RPC, "OUT_OF_RANGE", f"{problem}: cannot go on at {self._offset}")
        self.is_over = True
        return Chunk(memoryview(b""), self._offset, self._offset, ending=job)

    def _take_old(self, view: memoryview) -> Chunk | None:
        self.patience.connected()
        skipped = min(self._skip, len(view))
        self._skip -= skipped
        if skipped == len(view):
            return None
        self.patience.progressed()
        offset = self._offset
        self._offset += len(view) - skipped
        return Chunk(view[skipped:], offset, self._offset)


def split_payload(message: bytes) -> tuple[memoryview, pb.DataChunk]:
    """An encoded DataChunk's payload, without a copy, and all else of it.

    Encoders write fields in order, so the payload stands first; where it does not, the
    message is decoded as a whole.
    """
    if message[:1] != PAYLOAD_TAG:
        chunk = pb.DataChunk.FromString(message)
        return memoryview(chunk.payload), chunk
    length, start = _varint(message, 1)
    end = start + length
    rest = pb.DataChunk.FromString(message[end:])
    if rest.payload or end > len(message):
        chunk = pb.DataChunk.FromString(message)
        return memoryview(chunk.payload), chunk
    return memoryview(message)[start:end], rest


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The number there, and the place behind it; where it has no end, one that is too large."""
    value = 0
    for count, byte in enumerate(message[place : place + LONGEST_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    return len(message), place
