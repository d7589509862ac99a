"""A job's bytes and nothing else: to a pipe, to a file, as JSON."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Callable

import pytest

from cli.program import Program
from functional.server import Server
from jobworker.cli.stream import telling_lost, write_bytes
from jobworker.client import Chunk


@pytest.fixture
def job_id(jobworker: Program) -> str:
    """Of a job that has ended, and has written to both streams."""
    job_id = jobworker.create(
        "sh", "-c", "echo one; sleep .05; echo two >&2; sleep .05; echo three"
    )
    jobworker("wait", job_id)
    return job_id


def raw(program: Program, *words: str) -> bytes:
    process = program.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    return output


def test_the_bytes_and_nothing_else(jobworker: Program) -> None:
    job_id = jobworker.create("sh", "-c", r"printf '\0\377\r\n\033[31m'; head -c 5000000 /dev/zero")
    assert raw(jobworker, "stream", job_id) == b"\0\xff\r\n\x1b[31m" + bytes(5_000_000)


def test_both_streams_and_each(jobworker: Program, job_id: str) -> None:
    assert raw(jobworker, "stream", job_id) == b"one\ntwo\nthree\n"
    assert raw(jobworker, "stream", job_id, "--stdout") == b"one\nthree\n"
    assert raw(jobworker, "stream", job_id, "--stderr") == b"two\n"


def test_from_an_offset(jobworker: Program, job_id: str) -> None:
    assert raw(jobworker, "stream", job_id, "--from-offset", "6") == b"o\nthree\n"
    assert raw(jobworker, "stream", job_id, "--from-offset", "14") == b""


def test_a_byte_comes_when_it_is_written(jobworker: Program) -> None:
    """Not when a buffer is full."""
    job_id = jobworker.create("sh", "-c", "printf x; exec sleep 60")
    with jobworker.start("stream", job_id, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.read(1) == b"x"
        jobworker("stop", job_id)
        assert process.stdout.read() == b""


def test_only_what_is_there(jobworker: Program) -> None:
    job_id = jobworker.create("sh", "-c", "printf x; exec sleep 60")
    with jobworker.start("stream", job_id, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(1)
        assert raw(jobworker, "stream", job_id, "--no-follow") == b"x"
        jobworker("stop", job_id)


def test_nobody_reads(jobworker: Program) -> None:
    job_id = jobworker.create("yes")
    process = jobworker.start("stream", job_id, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    jobworker("stop", job_id)


def test_ctrl_c_ends_it_and_not_the_job(jobworker: Program) -> None:
    job_id = jobworker.create("sh", "-c", "echo ready; exec sleep 60")
    with jobworker.on_terminal("stream", job_id) as terminal:
        terminal.wait_shown("ready")
        terminal.press("\x03")
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.shown
    assert jobworker.json("stop", job_id)["status"] == "STOPPED"


def test_as_json(jobworker: Program, job_id: str) -> None:
    *chunks, last = map(json.loads, jobworker("stream", job_id, "-o", "json").stdout.splitlines())
    assert b"".join(base64.b64decode(chunk["data"]) for chunk in chunks) == b"one\ntwo\nthree\n"
    runs = [run for chunk in chunks for run in chunk["runs"]]
    assert [(run["stream"], run["length"]) for run in runs] == [
        *(("stdout", 4), ("stderr", 4), ("stdout", 6)),
    ]
    assert all(re.fullmatch(r"[-\d]+T[:\d]+\.\d{6}Z", run["time"]) for run in runs)
    assert chunks[0]["offset"] == 0
    assert last["ending"] == jobworker.json("get", job_id)


# What the server keeps no more


@pytest.fixture
def keeping_little(jobworker: Program, start_server: Callable[..., Server]) -> Program:
    server = start_server(LOG_MAX_BYTES="100000", LOG_POLICY="ring")
    return Program(jobworker.folder, **jobworker.environ | {"JOB_WORKER_SERVER": server.address})


def test_lost_bytes_are_told_in_one_line(keeping_little: Program) -> None:
    job_id = keeping_little.create("head", "-c", "1000000", "/dev/zero")
    keeping_little("wait", job_id)
    lost_bytes = keeping_little.json("get", job_id)["lost_bytes"]
    assert 800_000 < lost_bytes < 1_000_000
    words = f"jobworker: {lost_bytes} bytes of its output are lost: the server keeps no more\n"
    for options in ([], ["--to", "output"], ["-o", "json"]):
        answer = keeping_little("stream", job_id, *options)
        assert (answer.returncode, answer.stderr) == (0, words)
    assert (keeping_little.folder / "output").stat().st_size == 1_000_000 - lost_bytes
    shown = keeping_little("get", job_id).stdout
    assert re.search(r"^Lost: +[\d.]+ KiB of its output$", shown, re.MULTILINE)
    offset = str(lost_bytes)
    assert keeping_little("stream", job_id, "--from-offset", offset).stderr == ""


def test_lost_bytes_are_told_after_however_many_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    """And also where the reading ends early."""
    chunk = Chunk(memoryview(b""), 5, 5, lost_bytes=5)
    with telling_lost([chunk] * 3) as chunks:
        next(chunks)
        next(chunks)
    assert capsys.readouterr().err.startswith("jobworker: 10 bytes of its output are lost")
    with telling_lost([Chunk(memoryview(b"x"), 0, 1)]) as chunks:
        assert len(list(chunks)) == 1
    assert capsys.readouterr().err == ""


# To a file


def test_to_a_file(jobworker: Program, job_id: str) -> None:
    file = jobworker.folder / "output"
    file.write_bytes(b"x" * 100)
    answer = jobworker("stream", job_id, "--to", "output")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert file.read_bytes() == b"one\ntwo\nthree\n"


def test_a_file_is_kept_where_there_is_nothing_to_put_in_its_place(jobworker: Program) -> None:
    file = jobworker.folder / "output"
    file.write_bytes(b"of another job")
    assert jobworker("stream", "999999999", "--to", "output").returncode == 3
    assert jobworker("-s", "localhost:1", "stream", "1", "--to", "output").returncode == 5
    assert file.read_bytes() == b"of another job"
    silent = jobworker.create("true")
    assert jobworker("stream", silent, "--to", "output").returncode == 0
    assert file.read_bytes() == b""


def test_progress_on_a_terminal(jobworker: Program) -> None:
    script = "head -c 100000 /dev/zero; sleep .3; head -c 100000 /dev/zero"
    job_id = jobworker.create("sh", "-c", script)
    shown = jobworker.screen("stream", job_id, "--to", "output")
    assert re.search(r"\r\d+\.\d KiB in \S+, .*/s", shown)
    assert shown.endswith("\r")
    assert (jobworker.folder / "output").stat().st_size == 200_000


def test_a_file_that_cannot_be_written(jobworker: Program, job_id: str) -> None:
    answer = jobworker("stream", job_id, "--to", "/no/such/folder/file")
    assert answer.returncode == 1
    assert "/no/such/folder/file" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_file_and_json(jobworker: Program, job_id: str) -> None:
    assert jobworker("stream", job_id, "--to", "x", "-o", "json").returncode == 2


def test_a_descriptor_that_does_not_block() -> None:
    """Who shares the terminal may have made it so; no byte is lost."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(["wc", "-c"], stdin=reader, stdout=subprocess.PIPE) as count:
        os.close(reader)
        write_bytes(writer, memoryview(bytes(3_000_000)))
        os.close(writer)
        assert count.stdout
        assert count.stdout.read().strip() == b"3000000"
