"""Versions: each that stands in ARCHITECTURE.md is the code's, and what is older or newer is read
or refused clearly. Older databases: engine/test_database.py. An older jobinit:
functional/test_upgrade.py. Older servers and clients: client/, and the functional tests.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path

import pytest

from jobworker import _fastio
from jobworker.engine import database, jobinit
from jobworker.engine.output import Output, Place

ROOT = Path(__file__).parent.parent
# Written by the first version: job 1 wrote to both streams in turn, 40 bytes in all.
OUTPUT_1 = Path(__file__).parent / "fixtures" / "output-1"
WRITTEN = b"".join(b"out %d\nerr%d\n" % (number, number) for number in range(4))


def version_in_architecture(what: str) -> int:
    row = re.search(
        rf"^\| {what} \| (\d+) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE
    )
    assert row, what
    return int(row[1])


def test_the_versions_are_written_down() -> None:
    assert version_in_architecture("database") == database.SCHEMA_VERSION
    assert version_in_architecture("jobinit protocol") == jobinit.PROTOCOL_VERSION
    header = (OUTPUT_1 / "1.0.idx").read_bytes()[:8]
    assert header == b"jwindex" + bytes([version_in_architecture("index")])


def test_jobinit_and_the_server_agree() -> None:
    source = (ROOT / "jobinit/protocol.h").read_text()
    found = re.search(r"PROTOCOL_VERSION = (\d+)", source)
    assert found
    assert int(found[1]) == jobinit.PROTOCOL_VERSION


def read(folder: int, **fields: int) -> bytes:
    message, end = _fastio.read_message(folder, 1, len(WRITTEN), 0, 4096, **fields)
    assert message is not None
    assert end == len(WRITTEN)
    return message


@pytest.fixture
def folder(tmp_path: Path) -> int:
    shutil.copytree(OUTPUT_1, tmp_path / "output")
    return os.open(tmp_path / "output", os.O_RDONLY | os.O_DIRECTORY)


def test_output_of_the_first_version_is_read_for_ever(folder: int) -> None:
    from jobworker.pb import job_worker_pb2 as pb

    chunk = pb.DataChunk.FromString(read(folder))
    assert chunk.payload == WRITTEN
    assert [run.stream for run in chunk.runs] == [pb.STDOUT, pb.STDERR] * 4
    only = pb.DataChunk.FromString(read(folder, stream=_fastio.STDERR))
    assert only.payload == b"err0\nerr1\nerr2\nerr3\n"
    os.close(folder)


def test_and_gone_on_with(tmp_path: Path) -> None:
    shutil.copytree(OUTPUT_1, tmp_path / "output")

    async def go_on() -> bytes:
        output = Output(tmp_path / "output", 1 << 20)
        extent = output.recover([1])[1]
        assert (extent.stdout_bytes, extent.stderr_bytes) == (24, 20)
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        log = output.open_log(1, ours, -1, resumed=extent)
        os.write(theirs, b"more\n")
        os.close(theirs)
        await output.wait_finished(log)
        turn, place = asyncio.Semaphore(), Place(1, 0, 4096, 0)
        message, _ = await output.message(place, None, log.end, log.segment_bytes, turn)
        await output.close()
        assert message is not None
        return message

    assert WRITTEN + b"more\n" in asyncio.run(go_on())


def test_an_index_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(OUTPUT_1, tmp_path / "output")
    index = tmp_path / "output" / "1.0.idx"
    index.write_bytes(b"jwindex\x63" + index.read_bytes()[8:])
    folder = os.open(tmp_path / "output", os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(OSError, match=r"1\.0"):
        read(folder)
    os.close(folder)
