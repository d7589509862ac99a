"""Readers of real pipes: history, live tail, and what becomes of slow ones."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from jobworker._fastio import STDERR, STDOUT, Log
from jobworker.engine.output import FIRST_MESSAGE_BYTES, LARGEST_MESSAGE_BYTES, Output, Reader
from jobworker.errors import ShuttingDownError, StateFolderError
from jobworker.pb import job_worker_pb2 as pb

DEADLINE_SECONDS = 10


class Pipes:
    """The write ends of a job."""

    def __init__(self, output: Output, job_id: int = 1) -> None:
        (ours_out, self.stdout), (ours_err, self.stderr) = os.pipe(), os.pipe()
        for descriptor in (ours_out, ours_err):
            os.set_blocking(descriptor, False)
        self.log = output.open_log(job_id, ours_out, ours_err)

    def close(self) -> None:
        os.close(self.stdout)
        os.close(self.stderr)


def run(folder: Path, test: Callable[[Output], Awaitable[None]]) -> None:
    async def main() -> None:
        output = Output(folder / "output", 1 << 20)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await test(output)
        finally:
            await output.close()

    asyncio.run(main())


async def next_payload(reader: Reader) -> bytes:
    message = await reader.next()
    assert message is not None
    return pb.DataChunk.FromString(message).payload


async def rest(reader: Reader) -> bytes:
    payload = b""
    while (message := await reader.next()) is not None:
        payload += pb.DataChunk.FromString(message).payload
    return payload


def sizes(output: Output, job_id: int) -> tuple[int, int]:
    extent = output.recover([job_id])[job_id]
    return extent.stdout_bytes, extent.stderr_bytes


async def landed(log: Log, size: int) -> None:
    while log.end < size:
        await asyncio.sleep(0)


def test_history_then_live_then_the_end(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        os.write(pipes.stdout, b"history")
        await landed(pipes.log, 7)
        reader = Reader(output, 1, pipes.log, 0)
        assert await next_payload(reader) == b"history"
        waiting = asyncio.ensure_future(next_payload(reader))
        await asyncio.sleep(0)
        os.write(pipes.stderr, b"live")
        assert await waiting == b"live"
        pipes.close()
        assert await reader.next() is None
        reader.close()

    run(tmp_path, test)


def test_an_ended_job_is_read_from_disk(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        os.write(pipes.stdout, b"out")
        await landed(pipes.log, 3)
        os.write(pipes.stderr, b"err")
        pipes.close()
        await output.wait_finished(pipes.log)
        assert await rest(Reader(output, 1, None, 6)) == b"outerr"
        assert await rest(Reader(output, 1, None, 6, offset=2)) == b"terr"
        assert await rest(Reader(output, 1, None, 6, stream=STDERR)) == b"err"
        assert sizes(output, 1) == (3, 3)

    run(tmp_path, test)


def test_no_follow(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        os.write(pipes.stdout, b"now")
        await landed(pipes.log, 3)
        reader = Reader(output, 1, pipes.log, 0, follow=False)
        os.write(pipes.stdout, b"later")
        await landed(pipes.log, 8)
        assert await rest(reader) == b"now"
        reader.close()
        pipes.close()

    run(tmp_path, test)


def test_messages_grow_for_a_reader_that_takes_them(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        size = 8 << 20
        writer = asyncio.to_thread(lambda: os.write(pipes.stdout, b"x" * size))
        await asyncio.gather(writer, landed(pipes.log, size))
        reader = Reader(output, 1, pipes.log, 0)
        sizes = []
        while reader.offset < size:
            sizes.append(len(await next_payload(reader)))
        assert sizes[0] == FIRST_MESSAGE_BYTES
        assert max(sizes) == LARGEST_MESSAGE_BYTES
        reader.close()
        assert output.unwritten_bytes == 0
        pipes.close()

    run(tmp_path, test)


def test_readers_that_wait_are_interrupted(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        os.write(pipes.stdout, b"x")
        await landed(pipes.log, 1)
        reader = Reader(output, 1, pipes.log, 0)
        assert await next_payload(reader) == b"x"
        waiting = asyncio.ensure_future(reader.next())
        await asyncio.sleep(0)
        output.interrupt_readers()
        with pytest.raises(ShuttingDownError):
            await waiting
        reader.close()
        pipes.close()

    run(tmp_path, test)


def test_sizes_are_recovered_from_a_torn_index(tmp_path: Path) -> None:
    """The server was killed between two bytes of a record, or before the bytes it announced."""

    async def test(output: Output) -> None:
        pipes = Pipes(output)
        for number in range(10):
            os.write(pipes.stdout if number % 2 else pipes.stderr, b"12345")
            await landed(pipes.log, 5 * (number + 1))
        pipes.close()
        await output.wait_finished(pipes.log)
        assert sizes(output, 1) == (25, 25)
        with open(tmp_path / "output" / "1.0.idx", "ab") as index:
            index.write(b"torn")
        assert sizes(output, 1) == (25, 25)
        assert sizes(output, 2) == (0, 0)

    run(tmp_path, test)


def test_a_filesystem_without_splice_is_refused() -> None:
    async def main() -> None:
        with pytest.raises((StateFolderError, OSError)):
            Output(Path("/proc/self/task"), 1 << 20)

    asyncio.run(main())


def test_streams_have_the_numbers_of_the_wire() -> None:
    assert (pb.STDOUT, pb.STDERR) == (STDOUT, STDERR)
