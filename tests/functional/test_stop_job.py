"""StopJob: whatever a job does, it is gone afterwards, and it is STOPPED."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

import leaderless
from escapes.stage import public_folder
from functional.server import Client, Server, wait_until
from jobworker.pb import job_worker_pb2 as pb


def wait_for_line(client: Client, job_id: str, line: bytes) -> None:
    """Until the job has written this."""
    output = b""
    for chunk in client.stream(job_id):
        output += chunk.payload
        if line in output:
            return
    raise AssertionError(f"{line!r} never came: {output!r}")


def is_running(pid: int) -> bool:
    """Not once it is a zombie: that waits only for its parent to look."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_the_answer_is_the_ending(client: Client) -> None:
    job = client.create("sleep", "60")
    stopped = client.stop(job.id)
    assert (stopped.id, stopped.status, stopped.exitCode) == (job.id, "STOPPED", -1)
    assert stopped.endTime
    ended = client.get(job.id)
    assert (ended.cause, ended.signal) == (pb.STOPPED, signal.SIGTERM)


def test_a_job_may_end_gracefully(client: Client) -> None:
    job = client.shell('trap "echo bye; exit 7" TERM; echo up; while :; do sleep 0.05; done')
    wait_for_line(client, job.id, b"up")
    stopped = client.stop(job.id)
    assert (stopped.status, stopped.exitCode) == ("STOPPED", 7)
    # Not stderr: the shell may say there that the signal has ended its `sleep` too.
    assert client.output(job.id, stream=pb.STDOUT) == b"up\nbye\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may have a lease on what others execute")
def test_a_start_that_hangs(client: Client) -> None:
    """Its exec waits for who has a lease on the file, as it would for a disk."""
    with public_folder() as folder:
        program = folder / "program"
        shutil.copy("/bin/true", program)
        with program.open("rb") as file, ignored(signal.SIGIO):
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            creating = client.create_soon(str(program))
            wait_until(lambda: any(job.command == str(program) for job in client.jobs()))
            (starting,) = [job for job in client.jobs() if job.command == str(program)]
            assert starting.status == "INITIALIZING"
            stopped = client.stop(starting.id, grace_milliseconds=1)
    assert stopped.status == creating.result().status == "STOPPED"
    job = client.get(starting.id)
    assert (job.cause, job.failed_step) == (pb.STOPPED, "exec")


@contextlib.contextmanager
def ignored(number: int) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_chosen_signal(client: Client) -> None:
    job = client.shell('trap "exit 3" USR1; echo up; while :; do sleep 0.05; done')
    wait_for_line(client, job.id, b"up")
    assert client.stop(job.id, signal=signal.SIGUSR1).exitCode == 3


def test_each_of_several_stops_has_its_signal(client: Client) -> None:
    """In the order in which they came, also at once."""
    script = 'trap "echo a" USR1; trap "echo b; exit 3" USR2; echo up; while :; do sleep 0.05; done'
    for _ in range(5):
        job = client.shell(script)
        wait_for_line(client, job.id, b"up")
        numbers = (signal.SIGUSR1, signal.SIGUSR2)
        stops = [client.stop_soon(job.id, signal=number) for number in numbers]
        assert [stop.result().exitCode for stop in stops] == [3, 3]
        assert client.output(job.id, stream=pb.STDOUT) == b"up\na\nb\n"


def test_a_signal_that_is_asked_for_all_the_time(client: Client) -> None:
    """It comes again, but once a second: jobinit has to give it to all processes of the job."""
    job = client.shell('trap "echo a" USR1; echo up; while :; do sleep 0.01; done')
    wait_for_line(client, job.id, b"up")
    began = time.monotonic()
    stops = []
    for _ in range(50):
        stops.append(client.stop_soon(job.id, signal=signal.SIGUSR1))
        time.sleep(0.03)
    wait_until(lambda: client.get(job.id).stdout_bytes > len("up\na\n"))
    seconds = time.monotonic() - began
    client.stop(job.id, signal=signal.SIGKILL)
    assert 2 <= client.output(job.id).count(b"a\n") <= 2 + seconds
    assert {stop.result().status for stop in stops} == {"STOPPED"}


HANDLED = ("HUP", "INT", "QUIT", "USR1", "USR2", "ALRM")


def start_with_handlers(client: Client) -> pb.Job:
    """Which write the signal's name."""
    traps = "; ".join(f'trap "echo {name}" {name}' for name in HANDLED)
    job = client.shell(f"{traps}; echo up; while :; do sleep 0.01; done")
    wait_for_line(client, job.id, b"up")
    return job


def test_many_signals_at_once(client: Client) -> None:
    """Two a second, in the order in which they came: all of them are for all processes, too."""
    job = start_with_handlers(client)
    began = time.monotonic()
    stops = [client.stop_soon(job.id, signal=signal.Signals[f"SIG{name}"]) for name in HANDLED]
    wait_for_line(client, job.id, b"ALRM")
    assert time.monotonic() - began >= 2
    client.stop(job.id, signal=signal.SIGKILL)
    came = client.output(job.id, stream=pb.STDOUT).decode().split()
    assert came == ["up", *HANDLED]
    assert {stop.result().status for stop in stops} == {"STOPPED"}


def test_a_kill_waits_for_no_other_signal(client: Client) -> None:
    job = start_with_handlers(client)
    numbers = [signal.Signals[f"SIG{name}"] for name in (*HANDLED, "KILL")]
    stops = [client.stop_soon(job.id, signal=number) for number in numbers]
    assert {stop.result().status for stop in stops} == {"STOPPED"}
    assert client.wait(job.id).signal == signal.SIGKILL
    assert b"ALRM" not in client.output(job.id, stream=pb.STDOUT)


def test_what_ignores_the_signal_is_killed(client: Client) -> None:
    job = client.shell('trap "" TERM; echo up; sleep 60 & wait; sleep 60')
    wait_for_line(client, job.id, b"up")
    started = time.monotonic()
    stopped = client.stop(job.id, grace_milliseconds=300)
    assert stopped.status == "STOPPED"
    assert client.get(job.id).signal == signal.SIGKILL
    assert time.monotonic() - started >= 0.3


def test_no_grace(client: Client) -> None:
    job = client.shell('trap "" TERM; echo up; sleep 60')
    wait_for_line(client, job.id, b"up")
    client.stop(job.id, grace_milliseconds=0)
    assert client.get(job.id).signal == signal.SIGKILL


@pytest.mark.parametrize(
    "script",
    [
        "sleep 60 & sleep 60 & echo $! up; wait",
        "setsid sh -c 'trap \"\" TERM HUP; echo $$ up; sleep 60' & wait",
        "setsid sh -c '(echo $(sh -c \"echo \\$PPID\") up; exec sleep 60) & exit' & sleep 60",
    ],
    ids=["forks", "daemonises and ignores signals", "double fork"],
)
def test_what_it_started_is_gone(client: Client, script: str) -> None:
    if not client.info().cgroup:
        pytest.skip("without a cgroup the cleanup is not certain")
    job = client.shell(script)
    output = b""
    for chunk in client.stream(job.id):
        output += chunk.payload
        if b"up" in output:
            break
    pid = int(output.split()[0])
    assert is_running(pid)
    client.stop(job.id, grace_milliseconds=200)
    assert not is_running(pid)


def test_stopping_an_ended_job_names_its_state(client: Client) -> None:
    job = client.create("true")
    client.wait(job.id)
    with pytest.raises(grpc.RpcError) as caught:
        client.stop(job.id)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "COMPLETED" in (caught.value.details() or "")


@pytest.mark.parametrize("job_id", ["999999999", "", "abc", "-1", "1.5", "9" * 30])
def test_an_unknown_job(client: Client, job_id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stop(job_id)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_signal_that_does_not_exist(client: Client) -> None:
    job = client.create("sleep", "60")
    with pytest.raises(grpc.RpcError) as caught:
        client.stop(job.id, signal=1000)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.get(job.id).status == "RUNNING"
    client.stop(job.id, grace_milliseconds=0)


def test_two_stops_get_the_same_ending(client: Client) -> None:
    job = client.shell('trap "sleep 0.3; exit 5" TERM; echo up; while :; do sleep 0.05; done')
    wait_for_line(client, job.id, b"up")
    endings: list[pb.StopJobRes] = []
    threads = [
        threading.Thread(target=lambda: endings.append(client.stop(job.id))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert endings[0] == endings[1]
    assert endings[0].exitCode == 5


def test_linger_gives_what_is_left_its_time(client: Client) -> None:
    """Bash ends before the `cat` that its output goes through."""
    _, output = client.run("exec bash -c 'exec > >(sleep 0.3; cat); echo the tail'")
    assert output == b"the tail\n"


def test_what_lingers_too_long_is_killed(start_server: Callable[..., Server]) -> None:
    server = start_server(LINGER="0.3")
    with server.connect() as client:
        job, output = client.run("sleep 60 & echo $!")
        assert job.status == "COMPLETED"
        if client.info().cgroup:
            assert not is_running(int(output))


def test_a_stop_during_linger_is_a_stop(start_server: Callable[..., Server]) -> None:
    server = start_server(LINGER="30")
    with server.connect() as client:
        if not client.info().cgroup:
            pytest.skip("needs a cgroup")
        job = client.shell("setsid sleep 60 & echo up; exit 0")
        wait_for_line(client, job.id, b"up")
        stopped = client.stop(job.id, grace_milliseconds=100)
        assert (stopped.status, stopped.exitCode) == ("STOPPED", 0)


def test_no_process_of_a_job_can_outlive_it(server: Server, client: Client) -> None:
    """Nothing of this test's jobs is left anywhere."""
    mark = f"3600.{os.getpid()}"
    job = client.shell(f"for i in 1 2 3; do setsid sleep {mark} & done; wait")
    client.stop(job.id, grace_milliseconds=100)
    left = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if mark.encode() in _read(path) and b"sleep" in _read(path)
    ]
    assert left == []


def test_who_has_lost_the_first_thread_is_killed(client: Client) -> None:
    if not client.info().cgroup:
        pytest.skip("needs a cgroup")
    job = client.create(*leaderless.ONE)
    wait_for_line(client, job.id, b"up")
    assert client.stop(job.id, grace_milliseconds=100).status == "STOPPED"
    assert client.get(job.id).signal == signal.SIGKILL


def test_what_is_left_behind_without_its_first_thread_is_killed(
    start_server: Callable[..., Server],
) -> None:
    with start_server(LINGER="1s").connect() as client:
        if not client.info().cgroup:
            pytest.skip("needs a cgroup")
        job = client.create("sh", "-c", 'setsid "$0" "$@" & exit 3', *leaderless.ONE)
        assert client.wait(job.id).exitCode == 3
        assert b"up" in client.output(job.id)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
