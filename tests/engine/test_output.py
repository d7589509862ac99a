"""Readers of real pipes: history, live tail, and what becomes of slow ones."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from jobworker import _fastio
from jobworker._fastio import STDERR, STDOUT, Log
from jobworker.engine.output import (
    FIRST_MESSAGE_BYTES,
    LARGEST_MESSAGE_BYTES,
    LARGEST_PACKED_BYTES,
    SHARE_OF_TAKEN,
    SHARED_BYTES,
    UNLIMITED,
    UNWRITTEN_BUDGET_BYTES,
    Found,
    Output,
    Place,
    Quota,
    Reader,
    Shared,
    Unwritten,
)
from jobworker.errors import ShuttingDownError, StateFolderError
from jobworker.job import LogPolicy
from jobworker.pb import job_worker_pb2 as pb
from locked_pipe import locked

DEADLINE_SECONDS = 10


class Pipes:
    """The write ends of a job."""

    def __init__(self, output: Output, job_id: int = 1, quota: Quota = UNLIMITED) -> None:
        (ours_out, self.stdout), (ours_err, self.stderr) = os.pipe(), os.pipe()
        for descriptor in (ours_out, ours_err):
            os.set_blocking(descriptor, False)
        # As jobinit does: so the pipes outlive the server.
        self.kept_fds = (os.dup(ours_out), os.dup(ours_err))
        self.quota = quota
        self.log = output.open_log(job_id, ours_out, ours_err, quota)

    def resume(self, output: Output) -> None:
        """In the next server."""
        extent = output.recover([1])[1]
        ours_out, ours_err = map(os.dup, self.kept_fds)
        self.log = output.open_log(1, ours_out, ours_err, self.quota, extent)

    def close(self) -> None:
        for descriptor in (self.stdout, self.stderr, *self.kept_fds):
            os.close(descriptor)


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
    payload, _ = await rest_and_lost(reader)
    return payload


async def rest_and_lost(reader: Reader) -> tuple[bytes, int]:
    payload, lost = b"", 0
    while (message := await reader.next()) is not None:
        chunk = pb.DataChunk.FromString(message)
        payload += chunk.payload
        lost += chunk.lost_bytes
    return payload, lost


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


def test_a_reader_of_a_silent_job_comes_to_its_end(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        reader = Reader(output, 1, pipes.log, 0)
        waiting = asyncio.ensure_future(reader.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        await output.finish(pipes.log)
        assert await waiting is None
        reader.close()
        pipes.close()

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


def test_readers_of_the_other_stream_leave_the_loop_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step of each, all of them together take one in a turn of the loop, where
    that has no time for more."""
    monkeypatch.setattr("jobworker.engine.output.PASSING_SECONDS", 0)

    async def test(output: Output) -> None:
        quota = Quota(4 << 20)
        pipes = Pipes(output, quota=quota)
        size = 16 * quota.segment_bytes
        await asyncio.to_thread(os.write, pipes.stdout, bytes(size))
        os.write(pipes.stderr, b"err")
        pipes.close()
        await output.finish(pipes.log)
        readers = [Reader(output, 1, None, size + 3, stream=STDERR, quota=quota) for _ in range(8)]
        steps = steps_before = most_steps = 0
        message = output.message

        async def counted(*arguments: Any) -> Found:
            nonlocal steps
            steps += 1
            return await message(*arguments)

        monkeypatch.setattr(output, "message", counted)
        reading = asyncio.gather(*map(rest, readers))
        await asyncio.sleep(0)
        steps_before = steps
        assert steps_before <= len(readers)
        while not reading.done():
            await asyncio.sleep(0)
            most_steps = max(most_steps, steps - steps_before)
            steps_before = steps
        assert await reading == [b"err"] * len(readers)
        assert steps >= len(readers) * 16
        assert most_steps <= 2  # one over the other stream, and the message that ends another
        for reader in readers:
            reader.close()

    run(tmp_path, test)


def test_a_reader_that_waits_for_its_turn_can_go(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        os.write(pipes.stdout, b"out")
        pipes.close()
        await output.finish(pipes.log)
        readers = [Reader(output, 1, None, 3, stream=STDERR) for _ in range(3)]
        tasks = [asyncio.ensure_future(rest(reader)) for reader in readers]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        assert await tasks[2] == b""
        assert all(task.cancelled() for task in tasks[:2])
        for reader in readers:
            reader.close()

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
        size = (SHARE_OF_TAKEN + 4) * LARGEST_MESSAGE_BYTES
        writer = asyncio.to_thread(lambda: os.write(pipes.stdout, b"x" * size))
        await asyncio.gather(writer, landed(pipes.log, size))
        reader = Reader(output, 1, pipes.log, 0)
        sizes = []
        while reader.offset < size:
            taken = reader.offset
            sizes.append(len(await next_payload(reader)))
            # So a window full of what nobody reads does not become one of large messages.
            assert sizes[-1] <= max(FIRST_MESSAGE_BYTES, taken // SHARE_OF_TAKEN)
        assert sizes[0] == FIRST_MESSAGE_BYTES
        assert max(sizes) == LARGEST_MESSAGE_BYTES
        reader.close()
        assert output.unwritten.total_bytes == 0
        pipes.close()

    run(tmp_path, test)


def test_readers_that_stop_leave_large_messages_to_those_that_read_on() -> None:
    unwritten = Unwritten()
    stopped = LARGEST_MESSAGE_BYTES // 8
    while unwritten.reserve(stopped) == stopped:
        pass
    assert unwritten.reserve(LARGEST_MESSAGE_BYTES) == LARGEST_MESSAGE_BYTES


def test_what_readers_leave_unwritten_is_bounded() -> None:
    unwritten = Unwritten()
    sizes = [unwritten.reserve(LARGEST_MESSAGE_BYTES) for _ in range(10_000)]
    assert sizes[-1] == FIRST_MESSAGE_BYTES
    large = [size for size in sizes if size > FIRST_MESSAGE_BYTES]
    assert sum(large) == unwritten.total_bytes <= UNWRITTEN_BUDGET_BYTES
    for size in large:
        unwritten.change(size, -size)
    assert unwritten.total_bytes == 0
    assert unwritten.reserve(LARGEST_MESSAGE_BYTES) == LARGEST_MESSAGE_BYTES


def test_readers_at_one_place_get_the_same_object(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        size = 4 * FIRST_MESSAGE_BYTES
        await asyncio.gather(
            asyncio.to_thread(lambda: os.write(pipes.stdout, bytes(size))),
            landed(pipes.log, size),
        )
        readers = [Reader(output, 1, pipes.log, 0) for _ in range(3)]
        while readers[0].offset < size:
            first, *others = [await reader.next() for reader in readers]
            assert all(other is first for other in others)
        os.write(pipes.stdout, b"live")
        first, *others = await asyncio.gather(*(reader.next() for reader in readers))
        assert all(other is first for other in others)
        for reader in readers:
            reader.close()
        pipes.close()

    run(tmp_path, test)


def test_a_reader_of_what_is_there_gets_no_shared_message_with_more(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        os.write(pipes.stdout, b"now")
        await landed(pipes.log, 3)
        snapshot = Reader(output, 1, pipes.log, 0, follow=False)
        os.write(pipes.stdout, b"later")
        await landed(pipes.log, 8)
        follower = Reader(output, 1, pipes.log, 0)
        assert await next_payload(follower) == b"nowlater"
        assert await rest(snapshot) == b"now"
        follower.close()
        snapshot.close()
        pipes.close()

    run(tmp_path, test)


def test_what_is_shared_is_bounded_and_gone_with_the_readers() -> None:
    shared = Shared()
    messages = [(Place(1, offset, 1 << 20, 0), offset + (1 << 20)) for offset in range(100)]
    for place, following in messages:
        shared.keep(place, (bytes(1 << 20), following), 2)
    kept = [shared.get(place, following) for place, following in messages]
    assert None not in kept[-8:]
    assert kept.count(None) >= 100 - (SHARED_BYTES >> 20)
    # The second time was the last.
    assert shared.get(*messages[-1]) is not None
    assert shared.get(*messages[-1]) is None
    shared.clear()
    assert shared.get(*messages[-2]) is None


def test_a_failed_read_is_tried_again(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        place, turn = Place(9, 0, 2 * FIRST_MESSAGE_BYTES, 0), asyncio.Semaphore()
        (tmp_path / "output" / "9.0.log").write_bytes(bytes(1 << 20))
        (tmp_path / "output" / "9.0.idx").write_bytes(b"damaged")
        for _ in range(2):
            with pytest.raises(OSError):
                await output.message(place, None, 1 << 20, UNLIMITED.segment_bytes, turn)
            await asyncio.sleep(0)
        assert not output._reading
        assert not turn.locked()

    run(tmp_path, test)


def test_many_readers_of_one_disk_leave_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one client, each at another place, of which half go before they have read."""
    asked: list[int] = []

    def read_slowly(_directory: int, job_id: int, *_what: int) -> Found:
        asked.append(job_id)
        time.sleep(0.01)
        return b"", 1 << 20

    monkeypatch.setattr(_fastio, "read_cached", lambda *_: None)
    monkeypatch.setattr(_fastio, "read_message", read_slowly)

    async def test(output: Output) -> None:
        turn = asyncio.Semaphore(2)

        async def read(job_id: int, offset: int, turn: asyncio.Semaphore) -> None:
            place = Place(job_id, offset, FIRST_MESSAGE_BYTES, 0)
            await output.message(place, None, 1 << 20, UNLIMITED.segment_bytes, turn)

        readers = [asyncio.create_task(read(1, offset, turn)) for offset in range(100)]
        await asyncio.sleep(0)
        for reader in readers[::2]:
            reader.cancel()
        await read(2, 0, asyncio.Semaphore(2))
        assert asked.index(2) <= 4
        await asyncio.wait(readers)
        assert asked.count(1) <= 52
        assert not turn.locked()

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


def test_who_keeps_the_end_waiting_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        output = Output(tmp_path / "output", 1 << 20)
        pipes = Pipes(output, 7)
        with locked(pipes.stdout) as is_locked:
            pipes.log.drain()
            ending = asyncio.create_task(output.close())
            while "once jobs 7 let it read" not in caplog.text:
                await asyncio.sleep(0.01)
            assert is_locked() and not ending.done()
        await ending
        pipes.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_SECONDS))


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


def test_a_log_goes_on_in_the_next_server(tmp_path: Path) -> None:
    pipes: Pipes

    async def first(output: Output) -> None:
        nonlocal pipes
        pipes = Pipes(output)
        os.write(pipes.stdout, b"one ")
        await landed(pipes.log, 4)

    async def second(output: Output) -> None:
        os.write(pipes.stderr, b"two ")
        pipes.resume(output)
        assert pipes.log.end >= 4
        reader = Reader(output, 1, pipes.log, 0, offset=4)
        assert await next_payload(reader) == b"two "
        os.write(pipes.stdout, b"three")
        await landed(pipes.log, 13)
        pipes.close()
        assert await rest(reader) == b"three"
        reader.close()
        assert await rest(Reader(output, 1, None, 13, stream=STDOUT)) == b"one three"
        assert sizes(output, 1) == (9, 4)

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_reader_that_a_ring_overtakes_is_told_and_goes_on(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output, quota=Quota(2 << 20))
        size = 0
        reader = Reader(output, 1, pipes.log, 0, quota=pipes.quota)
        os.write(pipes.stdout, b"first")
        assert await next_payload(reader) == b"first"
        for number in range(128):
            os.write(pipes.stdout, bytes([number]) * 65536)
            size += 65536
            await landed(pipes.log, 5 + size)
        pipes.close()
        payload, lost = await rest_and_lost(reader)
        reader.close()
        assert len(payload) + lost == size
        assert payload == b"".join(bytes([n]) * 65536 for n in range(128))[lost:]
        assert (1 << 20) < len(payload) <= pipes.log.disk_bytes <= (2 << 20)
        # Once more from disk, from before and after the place where it starts.
        for offset in (0, size - 10):
            late = Reader(output, 1, None, size + 5, offset=offset, quota=pipes.quota)
            kept, missing = await rest_and_lost(late)
            assert len(kept) + missing == size + 5 - offset
            assert payload.endswith(kept)

    run(tmp_path, test)


@pytest.mark.parametrize("policy", [LogPolicy.HEAD, LogPolicy.STOP])
def test_a_limit_is_reported_once_and_the_rest_counted(tmp_path: Path, policy: LogPolicy) -> None:
    async def test(output: Output) -> None:
        reported: list[int] = []
        output.on_log_limit = reported.append
        pipes = Pipes(output, quota=Quota(100_000, policy))
        for number in range(20):
            os.write(pipes.stdout, b"x" * 10_000)
            await landed(pipes.log, 10_000 * (number + 1))
        while not reported:
            await asyncio.sleep(0)
        pipes.close()
        reader = Reader(output, 1, pipes.log, 0, quota=pipes.quota)
        payload, lost = await rest_and_lost(reader)
        reader.close()
        assert reported == [1]
        assert 99_000 < len(payload) <= pipes.log.disk_bytes <= 100_000
        assert lost == pipes.log.lost_bytes == 200_000 - len(payload)

    run(tmp_path, test)


def test_a_head_keeps_to_its_quota_over_restarts(tmp_path: Path) -> None:
    """A gap that goes on in the next server is the same one, and takes no more records."""
    pipes: Pipes
    size = 0

    async def first(output: Output) -> None:
        nonlocal pipes
        pipes = Pipes(output, quota=Quota(100_000, LogPolicy.HEAD))
        await write_more(12)

    async def next_one(output: Output) -> None:
        pipes.resume(output)
        await write_more(1)

    async def write_more(times: int) -> None:
        nonlocal size
        for _ in range(times):
            size += os.write(pipes.stdout, b"x" * 10_000)
            size += os.write(pipes.stderr, b"y" * 100)
            await landed(pipes.log, size)

    async def last(output: Output) -> None:
        pipes.resume(output)
        pipes.close()
        payload, lost = await rest_and_lost(Reader(output, 1, pipes.log, 0, quota=pipes.quota))
        assert len(payload) + lost == size
        assert 99_000 < len(payload) <= disk_bytes(tmp_path) <= 100_000
        assert sizes(output, 1) == (size * 100 // 101, size // 101)

    run(tmp_path, first)
    for _ in range(10):
        run(tmp_path, next_one)
    run(tmp_path, last)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "output").iterdir())


def test_a_follower_learns_of_a_gap_once_it_is_over(tmp_path: Path) -> None:
    """And does not turn in circles while it grows."""

    async def test(output: Output) -> None:
        pipes = Pipes(output, quota=Quota(66_000, LogPolicy.HEAD))
        reader = Reader(output, 1, pipes.log, 0, quota=pipes.quota)
        following = asyncio.ensure_future(rest_and_lost(reader))
        for number in range(20):
            os.write(pipes.stdout, b"x" * 10_000)
            await landed(pipes.log, 10_000 * (number + 1))
        assert not following.done()
        pipes.close()
        payload, lost = await following
        reader.close()
        assert lost == pipes.log.lost_bytes
        assert len(payload) + lost == 200_000

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("max_bytes", "segment_bytes"),
    [(0, 64 << 20), (1, 64 << 10), (2 << 20, 64 << 10), (1 << 30, 32 << 20), (1 << 50, 64 << 20)],
)
def test_segments_are_a_small_part_of_their_quota(max_bytes: int, segment_bytes: int) -> None:
    assert Quota(max_bytes).segment_bytes == segment_bytes


def test_a_quota_that_fits_segments_of_an_unknown_one() -> None:
    sizes = [1 << power for power in range(16, 27)]  # all that there can be
    for max_bytes in (0, 1, 10 << 20, 1 << 40):
        quota = Quota(max_bytes, LogPolicy.HEAD)
        assert quota.fitted(quota.segment_bytes) is quota
        assert [quota.fitted(size).segment_bytes for size in sizes] == sizes
        assert {quota.fitted(size).policy for size in sizes} == {LogPolicy.HEAD}
    assert UNLIMITED.fitted(1 << 20).max_bytes >= 33 << 20


def test_deleted_files_are_gone_and_readers_told(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        quota = Quota(10 << 20)
        pipes = Pipes(output, quota=quota)
        end = 0
        for _ in range(8):
            os.write(pipes.stdout, b"x" * 65536)
            end += 65536
            await landed(pipes.log, end)
        pipes.close()
        await output.wait_finished(pipes.log)
        assert output.job_ids() == {1}
        assert output.disk_bytes(1, end, quota) == pipes.log.disk_bytes > end
        reader = Reader(output, 1, None, end, quota=quota)
        got = await next_payload(reader)
        output.delete(1, end, quota)
        output.delete(1, end, quota)  # what is gone stays gone
        assert os.listdir(tmp_path / "output") == []
        assert output.disk_bytes(1, end, quota) == 0
        assert await rest_and_lost(reader) == (b"", end - len(got))

    run(tmp_path, test)


def test_a_small_log_can_do_without_files(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        os.write(pipes.stdout, b"out")
        await landed(pipes.log, 3)
        os.write(pipes.stderr, b"err")
        pipes.close()
        await output.wait_finished(pipes.log)
        packed = output.pack(1, 6)
        assert packed
        assert sum(map(len, packed)) <= 100
        output.delete(1, 6)
        for offset, stream, expected in ((0, 0, b"outerr"), (1, STDOUT, b"ut")):
            reader = Reader(output, 1, None, 6, offset, stream)
            reader.use_packed(packed)
            assert await rest(reader) == expected
            reader.close()
        assert output.pack(1, 6) is None
        assert output.pack(1, 0) is None

    run(tmp_path, test)


def test_a_large_log_is_not_packed(tmp_path: Path) -> None:
    async def test(output: Output) -> None:
        pipes = Pipes(output)
        size = LARGEST_PACKED_BYTES  # and its index
        os.write(pipes.stdout, b"x" * size)
        pipes.close()
        await output.wait_finished(pipes.log)
        assert output.pack(1, size) is None

    run(tmp_path, test)


def test_an_index_without_its_segment_is_removed(tmp_path: Path) -> None:
    """Of a server that was killed while it dropped a segment."""

    async def test(output: Output) -> None:
        folder = tmp_path / "output"
        (folder / "7.0.idx").write_bytes(b"jwindex\x01")
        (folder / "8.0.log").touch()  # killed before anything was written
        extent = output.recover([7, 8])
        assert (extent[7].end, extent[8].end) == (0, 0)
        assert os.listdir(folder) == ["8.0.log"]

    run(tmp_path, test)


def test_a_filesystem_without_splice_is_refused() -> None:
    async def main() -> None:
        with pytest.raises((StateFolderError, OSError)):
            Output(Path("/proc/self/task"), 1 << 20)

    asyncio.run(main())


def test_streams_have_the_numbers_of_the_wire() -> None:
    assert (pb.STDOUT, pb.STDERR) == (STDOUT, STDERR)


def test_readers_that_go_leave_nothing_behind(tmp_path: Path) -> None:
    """Of a job that says nothing, for which nobody is woken."""

    async def test(output: Output) -> None:
        pipes = Pipes(output)
        for _ in range(10):
            reader = Reader(output, 1, pipes.log, 0)
            waiting = asyncio.create_task(reader.next())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            reader.close()
        assert not any(output._waiting.values())
        pipes.close()

    run(tmp_path, test)
