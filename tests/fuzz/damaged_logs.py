"""Reads logs whose files were damaged at random: damaged_logs.py SECONDS FOLDER [SEED]

For the extension as gcc's sanitizers check it (builds.py). FOLDER holds the files that are read
at the moment: what they are when the program fails is what made it fail. `damaged_logs.py 0
FOLDER` only reads what is there.

An index has no checksum, so a changed bit in it may go unseen: then bytes belong to the other
stream, or to no time, or to a gap. What has to hold is this: each answer is an OSError with the
file's name, or a whole message of exactly the bytes that the segment has at that place; it is no
larger than was asked for, the next one is further on, and nothing crashes or takes for ever.
"""

from __future__ import annotations

import faulthandler
import os
import random
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jobworker._fastio import (
    SEGMENT_BYTES,
    STDERR,
    STDOUT,
    Log,
    Pump,
    read_extent,
    read_message,
    read_packed,
)
from jobworker.pb import job_worker_pb2 as pb

HANG_SECONDS = 20
SMALL_SEGMENT_BYTES = 4096
LARGEST_OVERHEAD_BYTES = 32 << 10  # of a message, beside its payload
LARGEST_OFFSET = 1 << 56
MORE_THAN_A_MESSAGE_HOLDS = 2600  # runs, as every second one is of the same stream as the last
NUMBERS = [0, 1, 47, 48, 2**31, 2**32 - 1, 2**55, 2**56 - 1, 2**63 - 1, 2**63, 2**64 - 1]


class Shape(NamedTuple):
    """What is fixed in the life of a log."""

    segment_bytes: int = SMALL_SEGMENT_BYTES
    max_bytes: int = 0
    is_ring: bool = False


class Original(NamedTuple):
    shape: Shape
    end: int
    files: dict[str, bytes]


SHAPES = [
    Shape(),
    Shape(SEGMENT_BYTES),
    Shape(max_bytes=20_000, is_ring=True),  # the first segments were dropped
    Shape(max_bytes=6_000),  # all but the first bytes were dropped: a gap
]


def main() -> None:
    seconds, folder = float(sys.argv[1]), Path(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(1 << 32)
    print(f"seed {seed}", flush=True)  # noqa: T201 a program
    chance = random.Random(seed)
    if seconds == 0:
        for shape in SHAPES:
            for end in (0, 1, 500, 30_000):
                read_all(chance, folder, shape, end)
        return
    lengths = [3, 60, 200]
    originals = [write(chance, folder, shape, length) for shape in SHAPES for length in lengths]
    originals.append(write(chance, folder, Shape(SEGMENT_BYTES), MORE_THAN_A_MESSAGE_HOLDS))
    for original in originals:
        put(folder, original.files)
        assert read_all(chance, folder, original.shape, original.end) == 0
    counts = {"logs": 0, "errors": 0}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        original = chance.choice(originals)
        put(folder, damage(chance, original.files))
        counts["logs"] += 1
        counts["errors"] += read_all(chance, folder, original.shape, original.end)
    print(*(f"{name} {count}" for name, count in counts.items()))  # noqa: T201


# Logs, and what happens to them


def write(chance: random.Random, folder: Path, shape: Shape, length: int) -> Original:
    put(folder, {})
    with opened(folder) as directory:
        pump = Pump(directory, 1 << 20)
        log, writers = open_log(pump, shape, None)
        for _ in range(length):
            fill(chance, log, writers)
        finish(pump, log, writers)
        pump.close()
        return Original(shape, log.end, files_in(folder))


def open_log(pump: Pump, shape: Shape, resumed: object) -> tuple[Log, list[int]]:
    ours, theirs = zip(*(os.pipe() for _ in range(2)), strict=True)
    for fd in ours:
        os.set_blocking(fd, False)
    try:
        log = Log(pump, 1, *ours, **shape._asdict(), resumed=resumed)  # type: ignore[arg-type]
    except BaseException:
        for fd in (*ours, *theirs):
            os.close(fd)
        raise
    return log, list(theirs)


def fill(chance: random.Random, log: Log, writers: list[int]) -> bytes:
    """Returns once it is on disk, or dropped."""
    data = chance.randbytes(chance.choice([1, 10, 200, 300]))
    before = log.end
    os.write(chance.choice(writers), data)
    while log.end < before + len(data):
        os.sched_yield()
    return data


def finish(pump: Pump, log: Log, writers: list[int]) -> None:
    for fd in writers:
        os.close(fd)
    while not log.finished:
        select.select([pump.fileno()], [], [], HANG_SECONDS)
        pump.news()


def damage(chance: random.Random, files: dict[str, bytes]) -> dict[str, bytes]:
    damaged = dict(files)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        name = chance.choice(list(files))
        # Indexes say more in fewer bytes.
        if chance.random() < 0.7:
            name = name.removesuffix("log").removesuffix("idx") + "idx"
        data = bytearray(damaged.get(name, b""))
        what = chance.randrange(9)
        place = chance.randrange(len(data)) if data else 0
        if what == 0:
            damaged.pop(name, None)
            continue
        if what == 1 and data:
            data[place] ^= 1 << chance.randrange(8)
        elif what == 2 and data:
            data[place] = chance.randrange(256)
        elif what == 3:
            del data[place:]
        elif what == 4:
            data += bytes(chance.choice([1, 15, 16, 160, 40_000]))
        elif what == 5:
            data += chance.randbytes(chance.choice([1, 15, 16, 160]))
        elif what == 6:
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        elif what == 7:
            place -= place % 8
            data[place : place + 8] = chance.choice(NUMBERS).to_bytes(8, sys.byteorder)
        elif what == 8:
            data = bytearray(damaged.get(chance.choice(list(files)), b""))
        damaged[name] = bytes(data)
    return damaged


# What has to hold


class Question(NamedTuple):
    """How a log is read, and what its files hold by now."""

    files: dict[str, bytes]
    end: int
    max_bytes: int
    stream: int
    segment_bytes: int  # LARGEST_OFFSET: its one segment is read from memory, and has no name


Reader = Callable[[int], tuple[bytes | None, int]]


def read_all(chance: random.Random, folder: Path, shape: Shape, end: int) -> int:
    """Returns how many errors there were."""
    files = files_in(folder)
    max_bytes = chance.choice([64, *[1024] * 4, *[1 << 20] * 8])
    stream = chance.choice([0, 0, 1, 2])
    asked = Question(files, end, max_bytes, stream, shape.segment_bytes)
    with opened(folder) as directory:

        def from_disk(offset: int) -> tuple[bytes | None, int]:
            return read_message(directory, 1, end, offset, max_bytes, stream, shape.segment_bytes)

        def from_memory(offset: int) -> tuple[bytes | None, int]:
            segment, index = files.get("1.0.log", b""), files.get("1.0.idx", b"")
            return read_packed(segment, index, end, offset, max_bytes, stream)

        errors = walk(from_disk, asked)
        errors += walk(from_memory, asked._replace(segment_bytes=LARGEST_OFFSET))
        firsts = [int(name.split(".")[1]) for name in files if name.endswith(".log")]
        try:
            extent = read_extent(directory, 1, firsts)
        except OSError as error:
            check_error(error)
            return errors + 1
        assert extent.end < LARGEST_OFFSET
        assert extent.lost_bytes <= extent.end
        if chance.random() < 0.05:
            go_on(chance, directory, shape, extent)
    return errors


def walk(read: Reader, asked: Question) -> int:
    """From the first byte to the last. Returns 1 where an error ended it."""
    offset = 0
    while offset < asked.end:
        try:
            message, following = read(offset)
        except OSError as error:
            if asked.segment_bytes != LARGEST_OFFSET:
                check_error(error)
            return 1
        assert offset < following <= asked.end, (offset, following, asked.end)
        if message is not None:
            check_message(message, offset, following, asked)
        offset = following
    return 0


def check_error(error: OSError) -> None:
    assert error.filename, error
    assert str(error.filename).startswith("1."), error


def check_message(message: bytes, offset: int, following: int, asked: Question) -> None:
    assert len(message) <= asked.max_bytes + LARGEST_OVERHEAD_BYTES
    chunk = pb.DataChunk.FromString(message)
    assert chunk.next_offset == following
    if chunk.lost_bytes:
        assert not chunk.payload
        assert chunk.lost_bytes == following - offset
        return
    assert chunk.offset == offset
    assert len(chunk.payload) <= asked.max_bytes
    assert sum(run.length for run in chunk.runs) == len(chunk.payload)
    streams = {asked.stream} if asked.stream else {STDOUT, STDERR}
    assert {run.stream for run in chunk.runs} <= streams
    if asked.stream == 0:
        first = offset - offset % asked.segment_bytes
        segment = asked.files[f"1.{first}.log"]
        assert chunk.payload == segment[offset - first : following - first]


def go_on(chance: random.Random, directory: int, shape: Shape, extent: object) -> None:
    """As the next server does: what the job writes then is there, and where it says."""
    pump = Pump(directory, 1 << 20)
    try:
        log, writers = open_log(pump, shape, extent)
    except OSError as error:
        pump.close()
        check_error(error)
        return
    start = log.end
    data = b"".join(fill(chance, log, writers) for _ in range(3))
    finish(pump, log, writers)
    pump.close()
    assert log.end == start + len(data)
    offset = start
    while offset < log.end:
        try:
            found = read_message(directory, 1, log.end, offset, 1 << 20, 0, shape.segment_bytes)
        except OSError as error:
            check_error(error)
            return
        if found[0] is not None:
            chunk = pb.DataChunk.FromString(found[0])
            assert chunk.lost_bytes or chunk.payload == data[offset - start :][: len(chunk.payload)]
        assert found[1] > offset
        offset = found[1]


# Files


class opened:  # noqa: N801 reads as a function does
    """A descriptor of a folder."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def names_in(folder: Path) -> Iterator[Path]:
    return folder.glob("1.*")


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in names_in(folder)}


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in names_in(folder):
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
