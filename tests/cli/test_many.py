"""create --from: many jobs from the lines of a file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from cli.program import Program
from client.old_server import OldServer
from functional.server import Server, wait_until
from jobworker.cli.many import Line, read_lines
from jobworker.job import Bind


def write(folder: Path, *jobs: dict[str, Any]) -> str:
    path = folder / "jobs"
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return str(path)


# What a line may say


def test_all_that_a_line_may_say() -> None:
    job = {
        "command": "cat",
        "args": ["-", "ä"],
        "name": "n",
        "environment": {"A": "b"},
        "working_directory": "/usr",
        "merge_output": True,
        "limits": {"cpu_percent": 1, "memory_mib": 2, "io_bytes_per_second": 3},
        "timeout_seconds": 1.5,
        "user": "u",
        "profile": "p",
        "network": "none",
        "root": "/r",
        "read_only": True,
        "binds": ["/a:/b", "/c:/d:ro"],
        "stdin": "ä",
    }
    options = {
        "name": "n",
        "environment": {"A": "b"},
        "working_directory": "/usr",
        "merge_output": True,
        "max_cpu": 1,
        "max_memory": 2,
        "max_iobps": 3,
        "time_limit": 1.5,
        "user": "u",
        "profile": "p",
        "network": "none",
        "root": "/r",
        "read_only": True,
        "binds": [Bind("/a", "/b"), Bind("/c", "/d", read_only=True)],
        "stdin": "ä".encode(),
    }
    assert read_lines(json.dumps(job).encode()) == [Line(1, "cat", ["-", "ä"], options)]


def test_what_is_left_out_or_null_is_not_asked_for() -> None:
    lines = read_lines(b'\n{"command": "a"}\r\n \n{"command": "b", "name": null, "limits": {}}')
    assert lines == [Line(2, "a", [], {}), Line(4, "b", [], {})]
    assert read_lines(b"") == []


def test_standard_input_that_is_no_text() -> None:
    [line] = read_lines(b'{"command": "cat", "stdin_base64": "AP8="}')
    assert line.options == {"stdin": b"\0\xff"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "is not JSON: .* at column 2"),
        (b"sleep 60", "is not JSON"),
        (b'"text"', "must be an object"),
        (b"[" * 100_000, "recursion"),
        (b'{"command": "\xff"}', "is not UTF-8"),
        (b"{}", 'has no "command"'),
        (b'{"command": "a", "comand": "b"}', 'has "comand"; known of a job are command, args'),
        (b'{"command": 7}', '"command" must be a text'),
        (b'{"command": "a", "args": "b"}', '"args" must be a list of texts'),
        (b'{"command": "a", "args": [1]}', '"args" must be a list of texts'),
        (b'{"command": "a", "environment": {"A": 1}}', '"environment" must be an object of texts'),
        (b'{"command": "a", "merge_output": 1}', '"merge_output" must be true or false'),
        (b'{"command": "a", "timeout_seconds": "5m"}', '"timeout_seconds" must be a number'),
        (b'{"command": "a", "timeout_seconds": true}', '"timeout_seconds" must be a number'),
        (b'{"command": "a", "limits": {"cpu": 1}}', '"limits" has "cpu"; known of limits are cpu_'),
        (b'{"command": "a", "limits": {"pids": 1}}', '"limits" has "pids"'),
        (
            b'{"command": "a", "limits": {"memory_mib": 1.5}}',
            '"limits" "memory_mib" must be a whole',
        ),
        (b'{"command": "a", "stdin": ["b"]}', '"stdin" must be a text'),
        (b'{"command": "a", "stdin_base64": "?"}', '"stdin_base64" '),
        (b'{"command": "a", "stdin": "b", "stdin_base64": "Yg=="}', "both"),
    ],
)
def test_a_line_that_cannot_be_read(line: bytes, problem: str) -> None:
    with pytest.raises(click.UsageError, match=f"^line 2: .*{problem}"):
        read_lines(b'{"command": "true"}\n' + line)


def test_the_names_are_those_of_the_answers(jobworker: Program) -> None:
    """What `get -o json` shows of a job can be asked for again."""
    words = ("--timeout", "90s", "--name", "again", "--env", "A=b", "sh", "-c", "echo $A")
    job = jobworker.json_of_create(*words)
    names = ("command", "args", "name", "environment", "working_directory", "merge_output")
    again = {name: job[name] for name in (*names, "timeout_seconds", "profile")}
    job_id = jobworker("create", "--from", write(jobworker.folder, again)).stdout.strip()
    assert jobworker("stream", job_id).stdout == "b\n"
    new = jobworker.json("get", job_id)
    assert {name: new[name] for name in again} == again


# What becomes of them


def test_ids_in_a_pipe(jobworker: Program) -> None:
    jobs = [{"command": "echo", "args": [str(n)], "name": "from a file"} for n in range(450)]
    answer = jobworker("create", "--from", write(jobworker.folder, *jobs))
    assert (answer.returncode, answer.stderr) == (0, "")
    ids = answer.stdout.split()
    assert len(set(ids)) == 450
    for number in (0, 199, 200, 449):
        assert jobworker("stream", ids[number]).stdout == f"{number}\n"


def test_from_standard_input(jobworker: Program) -> None:
    process = jobworker.start(
        *("create", "--from", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out, _ = process.communicate(b'{"command": "cat", "stdin": "hello"}\n', timeout=30)
    assert process.returncode == 0
    assert jobworker("stream", out.decode().strip()).stdout == "hello"


def test_a_line_that_is_refused_does_not_keep_the_others(jobworker: Program) -> None:
    jobs = [
        {"command": "true"},
        {"command": "no-such-command"},
        {"command": "true", "name": "\n"},
        {"command": "true"},
    ]
    file = write(jobworker.folder, *jobs)
    answer = jobworker("create", "--from", file)
    assert answer.returncode == 1
    assert len(answer.stdout.split()) == 2
    second, third = answer.stderr.splitlines()
    assert second.startswith("jobworker: line 2: command: 'no-such-command' was not found")
    assert third.startswith("jobworker: line 3: name: ")
    as_json = jobworker("create", "--from", file, "-o", "json")
    assert (as_json.returncode, as_json.stderr) == (1, "")
    results = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [result["line"] for result in results] == [1, 2, 3, 4]
    assert [result["error"] is None for result in results] == [True, False, False, True]
    assert [result["id"] is None for result in results] == [False, True, True, False]
    assert all(result.keys() == {"line", "id", "status", "error"} for result in results)


def test_errors_name_what_the_file_calls_it(jobworker: Program) -> None:
    limits = ("cpu_percent", "memory_mib", "io_bytes_per_second")
    jobs: list[Any] = [{"command": "true", "limits": {name: -1}} for name in limits]
    jobs.append({"command": "true", "timeout_seconds": 1e9})
    lines = jobworker("create", "--from", write(jobworker.folder, *jobs)).stderr.splitlines()
    for line, name in zip(lines, [*limits, "timeout_seconds"], strict=True):
        assert f': "{name}": ' in line


def test_a_file_that_cannot_be_read_makes_no_job(jobworker: Program) -> None:
    file = write(jobworker.folder, {"command": "true", "name": "never"}, {"command": 7})
    answer = jobworker("create", "--from", file)
    assert answer.returncode == 2
    assert answer.stderr.startswith('jobworker: line 2: "command" must be a text')
    assert jobworker.json("list", "--name", "never") == []
    answer = jobworker("create", "--from", "/no/such/file")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == "jobworker: cannot read /no/such/file: No such file or directory\n"


@pytest.mark.parametrize("words", [["true"], ["--name", "x"], ["--timeout", "5s"]])
def test_nothing_beside_the_file(jobworker: Program, words: list[str]) -> None:
    answer = jobworker("create", "--from", "/dev/null", *words)
    assert answer.returncode == 2
    assert "leave the rest out" in answer.stderr


def test_on_a_terminal(jobworker: Program) -> None:
    jobs = [{"command": "true"}] * 450
    jobs.append({"command": "no-such-command"})
    shown = jobworker.screen("create", "--from", write(jobworker.folder, *jobs))
    assert re.search(r"\r\[#{10}\.{14}\] 200 of 451", shown)
    assert "jobworker: line 451: command: 'no-such-command' was not found" in shown
    assert re.search(r"Jobs created: 450: IDs from \d+ to \d+; 1 refused\n$", shown)
    assert shown.count("\n") == 2


def test_a_viewer(jobworker: Program, server: Server) -> None:
    flags = ["--cert", f"{server.certs}/viewer-cert.pem", "--key", f"{server.certs}/viewer-key.pem"]
    answer = jobworker(*flags, "create", "--from", write(jobworker.folder, {"command": "true"}))
    assert answer.returncode == 4
    assert "viewer" in answer.stderr


def test_a_server_that_is_gone_meanwhile(
    jobworker: Program, start_server: Callable[..., Server]
) -> None:
    """The ids so far are there, and the error names the first line that is not done."""
    server = start_server()
    jobs = [{"command": "true", "stdin": "x" * 10_000}] * 2_000
    process = jobworker.start(
        *("-s", server.address, "create", "--from", write(jobworker.folder, *jobs)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    first = process.stdout.readline()
    server.stop(signal.SIGKILL)
    ids = [first, *process.stdout]
    errors = process.stderr.read().decode()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(30) == 5
    assert 0 < len(ids) < 2_000
    assert re.match(rf"jobworker: line {len(ids) + 1} and all after it: [^\n]*\n$", errors)
    assert server.address in errors
    start_server().stop()  # which ends what that one has left


@pytest.mark.parametrize("number", [signal.SIGINT, 0])
def test_jobs_of_which_nobody_heard(
    jobworker: Program, start_server: Callable[..., Server], number: int
) -> None:
    """It was interrupted, or the connection broke, before the answer came."""
    server = start_server()
    file = write(jobworker.folder, *[{"command": "true"}] * 300)
    jobinit = server.jobinit_pid()
    os.kill(jobinit, signal.SIGSTOP)
    process = jobworker.start(
        *("-s", server.address, "create", "--from", file), stderr=subprocess.PIPE
    )
    with server.connect() as client:
        wait_until(lambda: client.info().running_jobs > 0)
    if number:
        process.send_signal(number)
    else:
        server.stop(signal.SIGKILL)
    errors = process.communicate(timeout=30)[1].decode()
    os.kill(jobinit, signal.SIGCONT)
    assert "lines 1 to 200 may have become jobs all the same" in errors
    assert process.returncode == (130 if number else 5)
    server.stop()
    start_server().stop()  # which ends what that one may have left


def test_an_old_server(jobworker: Program, certificates: Path) -> None:
    jobs: list[dict[str, Any]] = [
        {"command": "echo", "args": ["1"]},
        {"command": "true", "name": "x"},
    ]
    with OldServer(certificates) as old:
        answer = jobworker(*("-s", old.address, "create", "--from", write(jobworker.folder, *jobs)))
    assert (answer.returncode, answer.stdout) == (1, "1\n")
    assert re.match(r"jobworker: line 2: .* too old for name", answer.stderr)
