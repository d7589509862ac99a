"""`jobworker stream`: a job's output, byte for byte, and where the bytes go."""

from __future__ import annotations

import base64
import itertools
import os
import select
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from jobworker.cli import display
from jobworker.cli.connection import Connect, speaks_to_server
from jobworker.cli.display import duration, json_option, remark, size
from jobworker.cli.job_id import JobId
from jobworker.cli.jobs import up_to
from jobworker.cli.progress import Progress

if TYPE_CHECKING:
    from jobworker.client import Chunk

STDOUT = 1  # the contract's numbers, which are also those of the descriptors
STDERR = 2

retry_option = click.option(
    "--retry",
    "retry_seconds",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="How long to try again after the connection broke.  [default: 60]",
)


@click.command("stream")
@click.argument("job_id", metavar="ID", type=JobId())
@click.option(
    "--from-offset",
    type=int,
    default=0,
    callback=up_to((1 << 63) - 1),
    metavar="BYTES",
    help="Starts behind so many bytes of its output.",
)
@click.option("--no-follow", is_flag=True, help="Ends with what is there now.")
@click.option("--stdout", "only_stdout", is_flag=True, help="Only what it writes to stdout.")
@click.option("--stderr", "only_stderr", is_flag=True, help="Only what it writes to stderr.")
@click.option(
    "--to",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Writes to a file, which is replaced, and shows the progress on a terminal.",
)
@retry_option
@json_option
@speaks_to_server
def stream_command(
    connect: Connect,
    as_json: bool,
    job_id: str,
    from_offset: int,
    no_follow: bool,
    only_stdout: bool,
    only_stderr: bool,
    file: Path | None,
    retry_seconds: float,
) -> None:
    """Writes a job's output, then follows it to its end.

    Nothing but the job's own bytes is written, stdout and stderr in the order in which they
    came. With -o json each piece is an object on a line of its own, its bytes as base64, and the
    last one has the ending.
    """
    if file and as_json:
        raise click.UsageError("--to writes the job's bytes: leave -o json out")
    if only_stdout and only_stderr:
        raise click.UsageError("both streams is what is written without --stdout and --stderr")
    from jobworker.client import Stream

    stream = Stream.STDOUT if only_stdout else Stream.STDERR if only_stderr else Stream.ALL
    with connect(patience_seconds=retry_seconds) as client:
        chunks = client.stream(job_id, from_offset=from_offset, follow=not no_follow, stream=stream)
        if file:
            write_to_file(chunks, file)
        else:
            write_all(chunks, JsonWriter() if as_json else MergedWriter())


class Writer(Protocol):
    """Takes a job's output piece by piece."""

    def write(self, chunk: Chunk) -> None: ...


class MergedWriter:
    """Both streams on one descriptor."""

    def __init__(self, descriptor: int = STDOUT) -> None:
        self._descriptor = descriptor

    def write(self, chunk: Chunk) -> None:
        write_bytes(self._descriptor, chunk.view)


class SplitWriter:
    """stdout to standard output, stderr to standard error."""

    def write(self, chunk: Chunk) -> None:
        payload = chunk.view
        for run in chunk.runs:
            write_bytes(STDERR if run.stream == STDERR else STDOUT, payload[: run.length])
            payload = payload[run.length :]
        # A server that speaks only the first version of the protocol does not say which
        # stream it is.
        write_bytes(STDOUT, payload)


class JsonWriter:
    """Each chunk as an object on a line of its own; the last has the job, once it has ended."""

    def write(self, chunk: Chunk) -> None:
        line: dict[str, Any] = {
            "offset": chunk.offset,
            "next_offset": chunk.next_offset,
            "lost_bytes": chunk.lost_bytes,
            "runs": [
                {
                    "stream": "stderr" if run.stream == STDERR else "stdout",
                    "length": run.length,
                    "time": display.json_time(run.time_ns),
                }
                for run in chunk.runs
            ],
            "data": base64.b64encode(chunk.view).decode(),
            "ending": display.job_as_json(chunk.ending) if chunk.ending else None,
        }
        display.write_json(line, compact=True)


def write_all(chunks: Iterable[Chunk], writer: Writer) -> None:
    with telling_lost(chunks) as counted:
        for chunk in counted:
            writer.write(chunk)


@contextmanager
def telling_lost(chunks: Iterable[Chunk]) -> Iterator[Iterator[Chunk]]:
    """The same chunks; at the end, whichever that is, one line if bytes were missing."""
    lost_bytes = 0

    def counted() -> Iterator[Chunk]:
        nonlocal lost_bytes
        for chunk in chunks:
            lost_bytes += chunk.lost_bytes
            yield chunk

    try:
        yield counted()
    finally:
        if lost_bytes:
            remark(f"{lost_bytes} bytes of its output are lost: the server keeps no more")


def write_to_file(chunks: Iterable[Chunk], file: Path) -> None:
    started, count = time.monotonic(), 0
    # The line about lost bytes comes when that of the progress is gone.
    with telling_lost(chunks) as counted, _opened(file) as descriptor, Progress() as progress:
        writer = MergedWriter(descriptor)
        # What the file had stays until there is something in its place: there may be no such job.
        first = next(counted, None)
        _empty(descriptor)
        for chunk in itertools.chain(() if first is None else (first,), counted):
            writer.write(chunk)
            count += len(chunk.view)
            if progress.is_due:
                progress.show(_rate(count, time.monotonic() - started))


def _rate(count: int, seconds: float) -> str:
    return f"{size(count)} in {duration(seconds)}, {size(int(count / seconds))}/s"


def _empty(descriptor: int) -> None:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.truncate(descriptor, 0)


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise click.ClickException(f"cannot write {file}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_bytes(descriptor: int, view: memoryview) -> None:
    """All of it, at once: whoever reads a live stream waits for each byte."""
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            # Another program that shares this terminal or pipe has made it so.
            select.select([], [descriptor], [])
