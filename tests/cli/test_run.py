"""A job as if it ran here: streams, exit codes, Ctrl-C."""

from __future__ import annotations

import base64
import errno
import json
import re
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from cli.program import Program, wait_for
from jobworker.cli import run
from jobworker.errors import RejectedError, UnreachableError
from jobworker.job import Cause, Job, JobSpec, Status

# Streams


def test_each_stream_goes_where_it_belongs(jobworker: Program) -> None:
    answer = jobworker("run", "--", "sh", "-c", "echo one; echo two >&2; echo three")
    assert (answer.stdout, answer.stderr) == ("one\nthree\n", "two\n")
    assert answer.returncode == 0


def test_bytes_stay_as_they_are(jobworker: Program) -> None:
    script = "head -c 300000 /dev/urandom | tee /dev/stderr"
    process = jobworker.start(
        "run", "sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate(timeout=30)
    assert len(out) == 300_000
    assert out == err


def test_the_order_on_a_terminal(jobworker: Program) -> None:
    script = "for i in 1 2 3; do echo out $i; sleep .1; echo err $i >&2; sleep .1; done"
    shown = jobworker.screen("run", "sh", "-c", script)
    assert shown.split("\n")[:6] == ["out 1", "err 1", "out 2", "err 2", "out 3", "err 3"]


def test_what_it_reads(jobworker: Program) -> None:
    """Bytes from a pipe, up to 1 MiB, and nothing unless it is asked for."""
    data = bytes(range(256)) * 4096
    process = jobworker.start("run", "--stdin", "-", "cat", stdin=-1, stdout=-1)
    assert process.communicate(data, timeout=30)[0] == data
    process = jobworker.start("run", "--stdin", "-", "cat", stdin=-1, stdout=-1, stderr=-1)
    out, errors = process.communicate(data + b"x", timeout=30)
    assert (process.returncode, out) == (125, b"")
    assert re.fullmatch(rb"jobworker: [^\n]*--stdin[^\n]*more than 1 MiB[^\n]*\n", errors)
    process = jobworker.start("run", "cat", stdin=-1, stdout=-1)
    assert process.communicate(b"not for the job", timeout=30)[0] == b""
    answer = jobworker("run", "--stdin", "/no/such/file", "cat")
    assert (answer.returncode, answer.stdout) == (125, "")
    assert answer.stderr == "jobworker: cannot read /no/such/file: No such file or directory\n"


def test_when_its_time_is_over(jobworker: Program) -> None:
    started = time.monotonic()
    answer = jobworker("run", "--timeout", "300ms", "sh", "-c", "echo begun; exec sleep 60")
    assert (answer.returncode, answer.stdout) == (124, "begun\n")
    assert re.fullmatch(r"jobworker: job \d+ FAILED: .*0\.3 s was over\n", answer.stderr)
    assert time.monotonic() - started < 20


def test_as_json(jobworker: Program) -> None:
    answer = jobworker("run", "-o", "json", "sh", "-c", "echo out; exit 3")
    assert answer.returncode == 3
    *chunks, last = map(json.loads, answer.stdout.splitlines())
    assert b"".join(base64.b64decode(chunk["data"]) for chunk in chunks) == b"out\n"
    assert last["ending"]["exit_code"] == 3


# Exit codes


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["no-such-command"], 127),
        (["/no/such/command"], 127),
        (["/etc"], 126),
        (["/etc/passwd"], 126),
        ([""], 125),
        (["--no-such-option", "true"], 125),
        (["--max-cpu", "-1", "true"], 125),
        ([], 125),
        (["-s", "localhost:1", "true"], 125),
        (["--certs", "/none", "true"], 125),
    ],
)
def test_exit_codes(jobworker: Program, words: list[str], code: int) -> None:
    answer = jobworker("run", *words)
    assert answer.returncode == code
    assert "Traceback" not in answer.stderr
    assert answer.stderr.count("\n") <= 1


def a_job(status: Status, cause: Cause | None, **fields: object) -> Job:
    job = Job(7, JobSpec("/bin/x"), status, created_ns=1, cause=cause)
    return replace(job, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (a_job(Status.COMPLETED, Cause.EXITED, exit_code=0), 0),
        (a_job(Status.FAILED, Cause.EXITED, exit_code=4), 4),
        (a_job(Status.FAILED, Cause.SIGNALLED, signal=11), 139),
        (a_job(Status.FAILED, Cause.OUT_OF_MEMORY, signal=9), 137),
        (a_job(Status.FAILED, Cause.TIMED_OUT, signal=9), 124),
        (a_job(Status.FAILED, Cause.LOST), 125),
        (a_job(Status.FAILED, Cause.LOG_LIMIT, exit_code=0), 143),
        (a_job(Status.FAILED, Cause.START_FAILED, failed_step="exec", failed_errno=2), 127),
        (a_job(Status.FAILED, Cause.START_FAILED, failed_step="exec", failed_errno=13), 126),
        (a_job(Status.FAILED, Cause.START_FAILED, failed_step="exec", failed_errno=8), 126),
        (a_job(Status.STOPPED, Cause.STOPPED, signal=15), 143),
        (a_job(Status.STOPPED, Cause.STOPPED, signal=9), 137),
        (a_job(Status.STOPPED, Cause.STOPPED, exit_code=5), 5),
        # A job that was stopped is never taken for one that went well.
        (a_job(Status.STOPPED, Cause.STOPPED, exit_code=0), 143),
        (a_job(Status.STOPPED, Cause.STOPPED), 143),
        # of a server that tells no cause
        (a_job(Status.FAILED, None), 125),
        # which are no codes, and would become 0
        (a_job(Status.FAILED, Cause.EXITED, exit_code=256), 125),
        (a_job(Status.COMPLETED, Cause.EXITED, exit_code=512), 125),
        (a_job(Status.FAILED, Cause.SIGNALLED, signal=128), 125),
        (a_job(Status.FAILED, Cause.SIGNALLED, signal=-128), 125),
    ],
)
def test_the_code_of_each_ending(job: Job, code: int) -> None:
    assert run.code_of_job(job) == code


def test_the_code_of_each_failure() -> None:
    def rejected(message: str) -> int:
        return run.code_of_failure(RejectedError("CreateJob", "INVALID_ARGUMENT", message))

    assert rejected("command: 'x' was not found in the job's PATH (/bin)") == 127
    assert rejected("command: '/x' does not exist on the server") == 127
    assert rejected("command: '/x' is a directory; give the program in it") == 126
    assert rejected("command: '/x' cannot be looked at: Permission denied") == 126
    assert rejected("command: is empty; give the program to run") == 125
    assert rejected("name: was not found") == 125
    for number, code in ((errno.ENOENT, 127), (errno.EACCES, 126), (errno.EISDIR, 126)):
        error = RejectedError("CreateJob", "INVALID_ARGUMENT", "command: in other words")
        error.command_errno = number
        assert run.code_of_failure(error) == code
    assert run.code_of_failure(UnreachableError("CreateJob", "UNAVAILABLE", "command: ")) == 125


def test_what_the_code_does_not_tell(capsys: pytest.CaptureFixture[str]) -> None:
    run._explain(a_job(Status.FAILED, Cause.LOST, detail="the machine was restarted"))
    assert capsys.readouterr().err == "jobworker: job 7 FAILED: the machine was restarted\n"
    run._explain(a_job(Status.FAILED, Cause.EXITED, exit_code=3))
    assert capsys.readouterr().err == ""


# Ending it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_job(jobworker: Program, number: signal.Signals) -> None:
    """Its last words and its ending still come."""
    script = "trap 'echo last words; exit 7' TERM; echo ready; while :; do sleep .05; done"
    process = jobworker.start("run", "--name", number.name, "sh", "-c", script, stdout=-1)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stdout.read() == b"last words\n"
    assert process.wait(30) == 7
    process.stdout.close()
    [job] = jobworker.json("list", "--name", number.name)
    assert job["status"] == "STOPPED"


def test_ctrl_c_on_a_terminal(jobworker: Program) -> None:
    with jobworker.on_terminal("run", "sh", "-c", "echo ready; exec sleep 60") as terminal:
        terminal.wait_shown("ready")
        terminal.press("\x03")
        assert terminal.wait() == 143
        assert "Ctrl-C again" in terminal.shown


def test_a_second_ctrl_c_leaves_at_once(jobworker: Program) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep .05; done"
    with jobworker.on_terminal("run", "--name", "stubborn", "sh", "-c", script) as terminal:
        terminal.wait_shown("ready")
        terminal.press("\x03")
        terminal.wait_shown("Ctrl-C again")
        terminal.press("\x03")
        assert terminal.wait() == 130
    job_id = jobworker.newest_id("--name", "stubborn")
    # The grace period of the first one is not over yet.
    assert jobworker.json("get", job_id)["status"] == "RUNNING"
    jobworker("stop", job_id, "--grace", "0")


def test_two_ctrl_c_in_a_row_stop_the_job(jobworker: Program) -> None:
    """The program is gone, and the request to stop was sent all the same."""
    with jobworker.on_terminal(
        "run", "--name", "twice", "sh", "-c", "echo r; sleep 60"
    ) as terminal:
        terminal.wait_shown("r")
        terminal.press("\x03")
        terminal.wait_shown("Ctrl-C again")
        terminal.press("\x03")
        terminal.wait()
    job_id = jobworker.newest_id("--name", "twice")
    assert jobworker("wait", job_id).stdout.startswith(f"Job {job_id}: STOPPED")


def test_nohup_stays_nohup(jobworker: Program) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = jobworker.start("run", "sh", "-c", "echo ready; sleep .3", stdout=-1)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    process.stdout.close()


def test_nobody_reads(jobworker: Program) -> None:
    """As a program that runs here would end."""
    process = jobworker.start("run", "--name", "unread", "yes", stdout=-1, stderr=-1)
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    job_id = jobworker.newest_id("--name", "unread")
    wait_for(lambda: jobworker.json("get", job_id)["status"] == "STOPPED")


def test_output_that_cannot_be_written(jobworker: Program) -> None:
    with open("/dev/full", "wb") as full:
        process = jobworker.start("run", "--name", "unwritten", "yes", stdout=full)
        assert process.wait(30) == 125
    job_id = jobworker.newest_id("--name", "unwritten")
    wait_for(lambda: jobworker.json("get", job_id)["status"] == "STOPPED")
