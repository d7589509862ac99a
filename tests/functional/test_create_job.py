"""CreateJob: what runs, in which surroundings, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import signal
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from functional.server import Client, Server, wait_until
from jobworker.pb import job_worker_pb2 as pb


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details() or ""


def test_the_answer_is_the_running_job(client: Client) -> None:
    job = client.create("sleep", "60", maxCPU=0)
    assert job.id.isdigit()
    assert job.command == "/usr/bin/sleep" or job.command.endswith("/sleep")
    assert list(job.args) == ["60"]
    assert job.status == "RUNNING"
    assert job.startTime.endswith("Z")
    assert job.endTime == ""
    client.stop(job.id, grace_milliseconds=0)


def test_ids_count_up(client: Client) -> None:
    first, second = client.create("true"), client.create("true")
    assert int(second.id) == int(first.id) + 1


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_codes(client: Client, code: int) -> None:
    job, _ = client.run(f"exit {code}")
    assert job.exitCode == code
    assert job.status == ("COMPLETED" if code == 0 else "FAILED")
    assert job.cause == pb.EXITED


def test_a_signal_of_its_own(client: Client) -> None:
    job, _ = client.run("kill -SEGV $$")
    assert (job.status, job.cause, job.signal) == ("FAILED", pb.SIGNALLED, signal.SIGSEGV)
    assert job.exitCode == -1
    assert "SIGSEGV" in job.detail


def test_the_environment_is_documented_and_has_nothing_of_the_servers(client: Client) -> None:
    job = client.create("/usr/bin/env", environment={"MINE": "1", "LANG": "de_DE.UTF-8"})
    lines = client.output(job.id).decode().splitlines()
    variables = dict(line.split("=", 1) for line in lines)
    assert variables.keys() == {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "JOB_ID", "MINE",
    }  # fmt: skip
    assert variables["MINE"] == "1"
    assert variables["LANG"] == "de_DE.UTF-8"
    assert variables["JOB_ID"] == job.id


def test_arguments_arrive_exactly(client: Client) -> None:
    args = ["", " ", "a b", "*", "$HOME", "ü\n\t", "'\"\\"]
    job = client.create("python3", "-c", "import sys; print(sys.argv[1:])", *args)
    assert client.output(job.id).decode().strip() == repr(args)


def test_argv0_is_the_command_as_given(client: Client) -> None:
    job = client.create("sh", "-c", "tr '\\0' '\\n' < /proc/$$/cmdline | head -1")
    assert client.output(job.id) == b"sh\n"


def test_300_kib_of_arguments(client: Client) -> None:
    job = client.create("sh", "-c", 'echo "$#"; echo "${1}" | wc -c', "sh", *["x" * 100_000] * 3)
    assert client.output(job.id).split() == [b"3", b"100001"]


def test_the_working_directory(client: Client, tmp_path: Path) -> None:
    _, output = client.run("pwd", working_directory=str(tmp_path))
    assert output.decode().strip() == str(tmp_path.resolve())
    _, output = client.run("pwd")
    assert output == b"/\n"


def test_a_relative_command_is_looked_up_in_the_working_directory(
    client: Client, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho found\n")
    script.chmod(0o755)
    job = client.create("./script", working_directory=str(tmp_path))
    assert job.command == str(script)
    assert client.output(job.id) == b"found\n"


def test_surroundings(client: Client) -> None:
    """Its own session and group, /dev/null, no descriptor, no mask and no ignored signal."""
    _, output = client.run(
        "readlink /proc/$$/fd/0; ls -m /proc/$$/fd; umask;"
        "grep -E 'Sig(Blk|Ign)' /proc/$$/status | tr '\\n' ' '; echo;"
        "cut -d' ' -f1,5,6 /proc/$$/stat; ulimit -n"
    )
    stdin, descriptors, umask, signals, ids, files = output.decode().splitlines()
    assert stdin == "/dev/null"
    assert descriptors == "0, 1, 2"
    assert umask == "0022"
    assert signals.split()[1::2] == ["0000000000000000"] * 2
    pid, group, session = ids.split()
    assert pid == group == session
    assert int(files) == os.sysconf("SC_OPEN_MAX")


def test_stdin(client: Client) -> None:
    stdin = bytes(range(256)) * 4096  # as much as is taken
    job = client.create("cat", stdin=stdin)
    assert client.output(job.id) == stdin
    _, output = client.run("wc -l; cat <&0", stdin=b"one\ntwo\n")
    assert output == b"2\n"


def test_a_time_limit(client: Client) -> None:
    started = time.monotonic()
    job, output = client.run("echo up; exec sleep 60", timeout_milliseconds=300)
    assert 0.3 <= time.monotonic() - started < 10
    assert (job.status, job.cause, job.signal) == ("FAILED", pb.TIMED_OUT, signal.SIGTERM)
    assert job.timeout_milliseconds == 300
    assert "0.3 s" in job.detail
    assert output == b"up\n"


def test_what_is_out_of_time_ends_as_gracefully_as_by_a_stop(client: Client) -> None:
    script = 'trap "echo bye; exit 7" TERM; while :; do sleep 0.02; done'
    job, _ = client.run(script, timeout_milliseconds=300)
    assert (job.status, job.cause, job.exitCode) == ("FAILED", pb.TIMED_OUT, 7)
    assert client.output(job.id, stream=pb.STDOUT) == b"bye\n"


def test_a_stop_does_not_lift_the_time_limit(client: Client) -> None:
    """By a signal that the job does not mind, and with a grace that nobody lives to see."""
    job = client.create("sleep", "60", timeout_milliseconds=500)
    stop = client.stop_soon(job.id, signal=signal.SIGWINCH, grace_milliseconds=2**32 - 1)
    job = client.wait(job.id)
    assert (job.status, job.cause, job.signal) == ("STOPPED", pb.STOPPED, signal.SIGTERM)
    stop.result()


def test_nor_for_what_its_main_process_leaves(client: Client) -> None:
    left = "(trap '' USR1; exec sleep 60)"
    script = f"{left} & trap 'exit 0' USR1; echo up; while :; do sleep 0.05; done"
    job = client.shell(script, timeout_milliseconds=1500)
    next(client.stream(job.id))
    stop = client.stop_soon(job.id, signal=signal.SIGUSR1, grace_milliseconds=2**32 - 1)
    job = client.wait(job.id)
    assert (job.status, job.cause, job.exitCode) == ("STOPPED", pb.STOPPED, 0)
    stop.result()


def test_a_stop_before_its_start_does_not_lift_it_either(server: Server, client: Client) -> None:
    jobinit = server.jobinit_pid()
    os.kill(jobinit, signal.SIGSTOP)
    try:
        creating = client.create_soon("sleep", "60", timeout_milliseconds=500)
        wait_until(lambda: any(job.status == "INITIALIZING" for job in client.jobs()))
        (starting,) = (job.id for job in client.jobs() if job.status == "INITIALIZING")
        stop = client.stop_soon(starting, signal=signal.SIGWINCH, grace_milliseconds=2**32 - 1)
        time.sleep(0.3)  # for the stop to come to the server
    finally:
        os.kill(jobinit, signal.SIGCONT)
    assert creating.result().id == starting
    job = client.wait(starting)
    assert (job.status, job.cause, job.signal) == ("STOPPED", pb.STOPPED, signal.SIGTERM)
    stop.result()


def test_a_time_limit_that_is_not_reached_changes_nothing(client: Client) -> None:
    job, _ = client.run("exit 3", timeout_milliseconds=60_000)
    assert (job.cause, job.exitCode) == (pb.EXITED, 3)


def test_who_ends_within_its_time_limit_has_not_timed_out(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    """Though the server may be told of it only afterwards."""
    server = start_server()
    script = f"echo $$; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 3"
    with server.connect() as client:
        job = client.shell(script, timeout_milliseconds=3000)
        pid = int(next(client.stream(job.id)).payload)
        jobinit = server.jobinit_pid()
        os.kill(jobinit, signal.SIGSTOP)
        try:
            (tmp_path / "go").touch()
            wait_until(lambda: ") Z " in Path(f"/proc/{pid}/stat").read_text())
            wait_until(lambda: time.time_ns() > job.start_time_ns + 3_200_000_000)
        finally:
            os.kill(jobinit, signal.SIGCONT)
        ended = client.wait(job.id)
    assert (ended.cause, ended.exitCode) == (pb.EXITED, 3)


def test_a_stop_before_the_time_limit_is_the_cause(client: Client) -> None:
    script = 'trap "" TERM; echo up; while :; do sleep 0.02; done'
    job = client.shell(script, timeout_milliseconds=500)
    next(client.stream(job.id))
    assert client.stop(job.id, grace_milliseconds=1000).status == "STOPPED"
    ended = client.get(job.id)
    assert ended.cause == pb.STOPPED
    # Nor has the time limit cut the grace period short, or made it longer.
    assert 1.0 <= (ended.end_time_ns - job.start_time_ns) / 1e9 < 5


def test_a_time_limit_that_comes_due_while_the_ending_is_stored(
    server: Server, client: Client, tmp_path: Path
) -> None:
    """Of a job that was stopped before."""
    trap = f"echo stopping; until [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 3"
    script = f"trap '{trap}' TERM; echo up; while :; do sleep 0.02; done"
    job = client.shell(script, timeout_milliseconds=2000)
    stream = client.stream(job.id, stream=pb.STDOUT)
    next(stream)
    stop = client.stop_soon(job.id)
    assert next(stream).payload == b"stopping\n"  # by now the stop is stored
    with contextlib.closing(sqlite3.connect(server.state / "jobs.db")) as database:
        database.execute("BEGIN IMMEDIATE")
        (tmp_path / "go").touch()
        wait_until(lambda: client.get(job.id).status == "STOPPED")
        wait_until(lambda: time.time_ns() > job.start_time_ns + 2_200_000_000)
    assert stop.result().status == "STOPPED"
    assert "Traceback" not in server.log


def test_merged_output_has_the_exact_order(client: Client) -> None:
    script = "for i in $(seq 200); do echo out $i; echo err $i >&2; done"
    _, output = client.run(script, merge_output=True)
    expected = "".join(f"out {i}\nerr {i}\n" for i in range(1, 201))
    assert output.decode() == expected


def test_a_name(client: Client) -> None:
    assert client.create("true", name="nightly build").name == "nightly build"


def test_a_foreign_interpreter_that_is_missing_is_a_failed_start(
    client: Client, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    job = client.create(str(script))
    assert (job.status, job.cause, job.failed_step) == ("FAILED", pb.START_FAILED, "exec")
    assert job.failed_errno == 2
    assert f"exec: '{script}': No such file" in job.detail
    assert "its interpreter is missing: check its first line" in job.detail
    assert client.get(job.id) == job
    assert client.output(job.id) == b""


def test_a_text_without_an_interpreter_is_a_failed_start(client: Client, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    job = client.create(str(script))
    assert (job.status, job.cause, job.failed_step) == ("FAILED", pb.START_FAILED, "exec")
    assert job.failed_errno == errno.ENOEXEC
    assert f"exec: '{script}': Exec format error" in job.detail
    assert "has no first line such as #!/bin/sh" in job.detail


INVALID: dict[str, dict[str, Any]] = {
    "empty": {"command": ""},
    "nul in command": {"command": "ec\0ho"},
    "nul in argument": {"command": "echo", "args": ["a\0b"]},
    "nul in environment": {"command": "echo", "environment": {"A": "b\0"}},
    "no name of a variable": {"command": "echo", "environment": {"A=B": "c"}},
    "not found": {"command": "no-such-command"},
    "not found by path": {"command": "/no/such/command"},
    "not executable": {"command": "/etc/passwd"},
    "a directory": {"command": "/etc"},
    "negative cpu": {"command": "echo", "maxCPU": -1},
    "negative memory": {"command": "echo", "maxMemory": -1},
    "negative io": {"command": "echo", "maxIOBPS": -1},
    "no directory": {"command": "echo", "working_directory": "/no/such"},
    "relative directory": {"command": "echo", "working_directory": "tmp"},
    "file as directory": {"command": "echo", "working_directory": "/etc/passwd"},
    "one long string": {"command": "echo", "args": ["x" * (128 << 10)]},
    "many strings": {"command": "echo", "args": ["x" * 60_000] * 10},
    "stdin": {"command": "echo", "stdin": bytes((1 << 20) + 1)},
    "time limit": {"command": "echo", "timeout_milliseconds": 1 << 60},
    "name with control characters": {"command": "echo", "name": "a\nb"},
}


@pytest.mark.parametrize("fields", INVALID.values(), ids=INVALID.keys())
def test_what_is_invalid_leaves_nothing_behind(client: Client, fields: dict[str, Any]) -> None:
    last = client.create("true")
    code, details = refusal(lambda: client.call("CreateJob", pb.CreateJobReq(**fields)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT, details
    assert ":" in details  # names the field, and says what is wrong
    assert int(client.create("true").id) == int(last.id) + 1


def test_a_limit_that_cannot_hold_is_refused(client: Client) -> None:
    missing = [controller for controller in client.info().controllers if not controller.available]
    fields = {"cpu": "maxCPU", "memory": "maxMemory", "io": "maxIOBPS"}
    asked = [(fields[c.name], c) for c in missing if c.name in fields]
    if not asked:
        pytest.skip("this machine has all controllers")
    for field, controller in asked:
        code, details = refusal(partial(client.create, "true", **{field: 1 << 20}))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert field in details
        assert repr(controller.name) in details


def test_a_job_outlives_the_client_that_created_it(server: Server) -> None:
    with server.connect() as first:
        job = first.shell("sleep 0.3; echo done")
    with server.connect() as second:
        assert second.output(job.id) == b"done\n"


# A filesystem that nobody serves: who looks at a file of it waits until the server is killed.
SILENT = """
exec 9<> /dev/fuse
mount -i -t fuse -o fd=9,rootmode=40000,user_id=0,group_id=0 none "$0"
exec "$@"
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="takes root, and FUSE"
)
def test_a_home_that_does_not_answer_is_waited_for_by_its_own_jobs_alone(
    start_server: Callable[..., Server],
) -> None:
    user = next(user for user in pwd.getpwall() if user.pw_uid and is_a_home_apart(user.pw_dir))
    launcher = ["unshare", "--mount", "sh", "-e", "-c", SILENT, user.pw_dir]
    server = start_server(launcher=launcher, USERS_ALLOWED=user.pw_name)
    with server.connect() as client:
        job = client.shell("trap '' TERM; echo up; sleep 60")
        next(client.stream(job.id))
        waiting = [client.create_soon("true", user=user.pw_name) for _ in range(10)]
        assert client.run("echo here")[1] == b"here\n"
        assert client.stop(job.id, grace_milliseconds=100).status == "STOPPED"
        assert client.info().running_jobs == 0
        assert not any(call.done() for call in waiting)
        assert server.stop() == 0


def is_a_home_apart(path: str) -> bool:
    """A folder of its own, that nothing else looks at."""
    return path.startswith("/var/") and os.path.isdir(path) and path == os.path.realpath(path)
