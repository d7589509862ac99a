"""jobinit: real processes, over its real socket."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jobworker
from functional.test_files import make_root
from jobinit_processes import jobs_of
from jobworker.engine import jobinit
from jobworker.engine.jobinit import (
    Ask,
    Exited,
    Failed,
    Held,
    Identity,
    Jobinit,
    Started,
    StartRequest,
    Tell,
    View,
    dial,
)
from jobworker.errors import JobinitError, StartFailedError, StartupError, StateFolderError
from jobworker.job import Bind
from locked_pipe import locked

SOURCE = Path(__file__).parents[2] / "jobinit.c"
DEADLINE_SECONDS = 30
PIPE_BYTES = 64 << 10
# Of a jobinit without jobs: stdio, listener, connection, epoll, signals, its namespace, and
# the one for what is to be closed.
IDLE_DESCRIPTORS = 9

sees_descriptors = pytest.mark.skipif(
    os.geteuid() != 0, reason="jobinit shows its descriptors to root only"
)

Scenario = Callable[["Server"], Awaitable[None]]


# What the tests run on


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that was built, or else one built here."""
    built = Path(jobworker.__file__).parent / "_bin" / "jobinit"
    if built.exists():
        return built
    path = tmp_path_factory.mktemp("bin") / "jobinit"
    warnings = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(
        ["gcc", "-std=gnu17", "-O2", "-static", *warnings, SOURCE, "-o", path], check=True
    )
    return path


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of the test's own; gone with all in it afterwards."""
    base = _cgroup2_mount()
    path = base / f"jobinit-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {base}: {error.strerror}")
    yield path
    (path / "cgroup.kill").write_text("1")
    _wait_until(lambda: "populated 0" in (path / "cgroup.events").read_text())
    path.rmdir()


def _cgroup2_mount() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount_point, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(mount_point)
    pytest.skip("no cgroup v2 is mounted")


class Server:
    """What a server has: a jobinit that it spawned, and a connection to it."""

    def __init__(self, path: Path, pid: int) -> None:
        self.path = path
        self.pid = pid
        self.lost = asyncio.Event()
        self.exit_count: defaultdict[int, int] = defaultdict(int)
        self._ids = itertools.count(1)
        self._exits: dict[int, asyncio.Future[Exited]] = {}
        self._connections: list[Jobinit] = []
        self._started: list[Started] = []

    @property
    def jobinit(self) -> Jobinit:
        return self._connections[-1]

    async def connect(self) -> None:
        connection = await Jobinit.greet(dial(self.path), self._on_exit, self.lost.set)
        self._connections.append(connection)

    async def reconnect(self) -> dict[int, Held]:
        """As a new server does: with nothing of what the one before it had."""
        await self.disconnect()
        await self.connect()
        return await self.adopt()

    async def disconnect(self) -> None:
        await self.jobinit.close()
        while self._started:
            self._started.pop().close()

    async def adopt(self) -> dict[int, Held]:
        held = {held.job_id: held for held in await self.jobinit.adopt()}
        self._started += [held.started for held in held.values() if held.started]
        return held

    def request(self, *argv: str, **fields: object) -> StartRequest:
        defaults: dict[str, object] = {
            "job_id": next(self._ids) if "job_id" not in fields else 0,
            "executable": argv[0],
            "argv": argv,
            "environment": {"PATH": os.environ["PATH"]},
            "working_directory": "/",
            "cgroup": None,
            "merge_output": False,
        }
        return StartRequest(**(defaults | fields))  # type: ignore[arg-type]

    async def start(self, *argv: str, **fields: object) -> Started:
        return await self.ask(self.request(*argv, **fields))

    async def ask(self, request: StartRequest) -> Started:
        started = await self.jobinit.start(request)
        self._started.append(started)
        return started

    async def shell(self, script: str, **fields: object) -> Started:
        return await self.start("/bin/sh", "-c", script, **fields)

    def release(self, started: Started) -> None:
        self._started.remove(started)
        started.close()

    async def run(self, *argv: str, **fields: object) -> tuple[bytes, bytes, Exited]:
        """A command to its end: what it wrote, and how it ended."""
        started = await self.start(*argv, **fields)
        output, errors = await asyncio.gather(
            *(asyncio.to_thread(_read_all, fd) for fd in (started.stdout_fd, started.stderr_fd))
        )
        exited = await self.wait_exit(started.job_id)
        self.jobinit.acknowledge(started.job_id)
        return output, errors, exited

    async def output(self, *argv: str, **fields: object) -> str:
        output, errors, exited = await self.run(*argv, **fields)
        assert (errors, exited.wait_status) == (b"", 0)
        return os.fsdecode(output)

    async def wait_exit(self, job_id: int) -> Exited:
        return await self._exit_of(job_id)

    async def clean_up(self) -> None:
        """Ends and forgets all jobs; jobinit then has nothing to stay for."""
        for held in (await self.adopt()).values():
            if held.ending is None:
                self.jobinit.signal(held.job_id, signal.SIGKILL)
                await self.wait_exit(held.job_id)
                self.jobinit.signal(held.job_id, signal.SIGKILL)
            self.jobinit.acknowledge(held.job_id)
        await self.disconnect()

    def _on_exit(self, exited: Exited | Failed) -> None:
        self.exit_count[exited.job_id] += 1
        if isinstance(exited, Failed):
            return
        future = self._exit_of(exited.job_id)
        if not future.done():
            future.set_result(exited)

    def _exit_of(self, job_id: int) -> asyncio.Future[Exited]:
        return self._exits.setdefault(job_id, asyncio.get_running_loop().create_future())


class Launcher:
    """Spawns jobinits, and sees to it that each has ended when the test has."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self.binary = binary
        self.path = folder / "jobinit.sock"
        self.running: list[int] = []

    def spawn(self, binary: Path | None = None, *, confines_all: bool = False) -> int:
        with jobinit.listen(self.path) as listener:
            pid = jobinit.spawn(binary or self.binary, listener, confines_all=confines_all)
        self.running.append(pid)
        return pid

    def wait_end(self, pid: int) -> int:
        """The exit code."""
        statuses: list[int] = []

        def has_ended() -> bool:
            ended, status = os.waitpid(pid, os.WNOHANG)
            statuses.append(status)
            return ended == pid

        _wait_until(has_ended)
        self.running.remove(pid)
        return os.waitstatus_to_exitcode(statuses[-1])

    def run(
        self, scenario: Scenario, binary: Path | None = None, *, confines_all: bool = False
    ) -> None:
        """jobinit ends by itself after the scenario, with all its jobs ended."""
        pid = self.spawn(binary, confines_all=confines_all)

        async def main() -> None:
            async with asyncio.timeout(DEADLINE_SECONDS):
                server = Server(self.path, pid)
                await server.connect()
                try:
                    await scenario(server)
                    if not server.lost.is_set():
                        await server.clean_up()
                finally:
                    await server.disconnect()

        asyncio.run(main())
        if pid in self.running:
            assert self.wait_end(pid) == 0

    def kill(self) -> None:
        for pid in self.running:
            children = jobs_of(pid)
            os.kill(pid, signal.SIGKILL)
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def launcher(binary: Path, tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(binary, tmp_path)
    yield launcher
    launcher.kill()


def _read_all(fd: int) -> bytes:
    """To the end of a pipe that does not block; nothing from -1."""
    data = b""
    while fd >= 0:
        select.select([fd], [], [], DEADLINE_SECONDS)
        piece = os.read(fd, 1 << 20)
        if not piece:
            break
        data += piece
    return data


def _wait_until(condition: Callable[[], bool]) -> None:
    """For what no event tells."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


async def _wait_gone(pid: int) -> None:
    await asyncio.to_thread(_wait_until, lambda: not Path(f"/proc/{pid}").exists())


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def _wait_descriptors(pid: int, count: int) -> None:
    """What jobinit has sent it may not have closed yet."""
    await asyncio.to_thread(_wait_until, lambda: _descriptors(pid) == count)


def _unread_bytes(fd: int) -> int:
    answer = fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(answer, sys.byteorder)


# Starts that fail


@pytest.mark.parametrize(
    ("executable", "number"),
    [
        ("/no/such/program", errno.ENOENT),
        ("/etc/passwd", errno.EACCES),
        ("/etc", errno.EACCES),
        ("garbage", errno.ENOEXEC),
    ],
)
def test_a_failed_exec_tells_its_errno(
    launcher: Launcher, tmp_path: Path, executable: str, number: int
) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_text("no program")
    garbage.chmod(0o755)

    async def scenario(server: Server) -> None:
        with pytest.raises(StartFailedError) as caught:
            await server.start(str(tmp_path / executable))
        assert (caught.value.step, caught.value.error_number) == ("exec", number)
        assert caught.value.killed_by == 0
        assert jobs_of(server.pid) == []

    launcher.run(scenario)


@pytest.mark.parametrize("path", ["/no/such/folder", "/etc/passwd", ""])
def test_a_failed_working_directory_tells_its_errno(launcher: Launcher, path: str) -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises(StartFailedError) as caught:
            await server.start("/bin/true", working_directory=path)
        expected = errno.ENOTDIR if Path(path).is_file() else errno.ENOENT
        assert (caught.value.step, caught.value.error_number) == ("working directory", expected)

    launcher.run(scenario)


@pytest.mark.parametrize(
    ("path", "number"),
    [("/no/such/cgroup", errno.ENOENT), ("/" + "x" * 5000, errno.ENAMETOOLONG)],
)
def test_a_failed_cgroup_tells_its_errno(launcher: Launcher, path: str, number: int) -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises(StartFailedError) as caught:
            await server.start("/bin/true", cgroup=path)
        assert (caught.value.step, caught.value.error_number) == ("cgroup", number)

    launcher.run(scenario)


def test_a_job_makes_its_cgroup_with_its_limits(launcher: Launcher, cgroup: Path) -> None:
    limits = (("cgroup.max.depth", "3"), ("cgroup.max.descendants", "5"))

    async def scenario(server: Server) -> None:
        own = cgroup / "job"
        output = await server.output(
            *("/bin/sh", "-c", 'cat "$0"/cgroup.max.* "$0"/cgroup.procs; echo $$', str(own)),
            cgroup=str(own),
            makes_cgroup=True,
            limits=limits,
        )
        depth, descendants, shell, _cat, same = output.split()
        assert (depth, descendants) == ("3", "5")
        assert shell == same
        own.rmdir()

    launcher.run(scenario)


def test_a_cgroup_that_is_there_already_is_nobodys_to_make(
    launcher: Launcher, cgroup: Path
) -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises(StartFailedError, match="cgroup: File exists") as caught:
            await server.start("/bin/true", cgroup=str(cgroup), makes_cgroup=True)
        assert (caught.value.step, caught.value.error_number) == ("cgroup", errno.EEXIST)
        assert cgroup.exists()

    launcher.run(scenario)


@pytest.mark.parametrize(
    ("limit", "number"),
    [(("cgroup.max.depth", "deep"), errno.EINVAL), (("no.such.file", "1"), errno.ENOENT)],
)
def test_a_limit_that_cannot_be_written_is_named_and_leaves_no_cgroup(
    launcher: Launcher, cgroup: Path, limit: tuple[str, str], number: int
) -> None:
    async def scenario(server: Server) -> None:
        limits = (("cgroup.max.descendants", "5"), limit)
        own = cgroup / "job"
        name, value = limit
        with pytest.raises(StartFailedError, match=f"write {value!r} to {own}/{name}: ") as caught:
            await server.start("/bin/true", cgroup=str(own), makes_cgroup=True, limits=limits)
        assert (caught.value.step, caught.value.error_number) == ("cgroup", number)
        assert not own.exists()

    launcher.run(scenario)


def test_a_child_that_has_lost_its_jobinit_goes_no_further(
    launcher: Launcher, cgroup: Path, tmp_path: Path
) -> None:
    """Nobody knows of it: the server may have looked for its cgroup before there was one."""
    own, witness = cgroup / "job", tmp_path / "it-ran"

    async def scenario(server: Server) -> None:
        (cgroup / "cgroup.freeze").write_text("1")
        request = server.request("/bin/touch", str(witness), cgroup=str(own), makes_cgroup=True)
        starting = asyncio.ensure_future(server.ask(request))
        procs = own / "cgroup.procs"
        await asyncio.to_thread(_wait_until, lambda: own.exists() and procs.read_text() != "")
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(JobinitError):
            await starting
        launcher.wait_end(server.pid)
        (cgroup / "cgroup.freeze").write_text("0")
        await asyncio.to_thread(_wait_until, lambda: procs.read_text() == "")
        assert not witness.exists()
        own.rmdir()

    launcher.run(scenario)


@pytest.mark.parametrize("attempt", range(5))
def test_killed_before_the_exec_is_told_apart(
    launcher: Launcher, cgroup: Path, attempt: int
) -> None:
    """A child that joins a frozen cgroup comes no further. Nobody waits with it."""

    async def scenario(server: Server) -> None:
        (cgroup / "cgroup.freeze").write_text("1")
        stuck = asyncio.create_task(server.start("/bin/true", job_id=100, cgroup=str(cgroup)))
        await asyncio.to_thread(_wait_until, lambda: (cgroup / "cgroup.procs").read_text() != "")
        assert await server.output("/bin/echo", "others start meanwhile")
        assert not stuck.done()
        if attempt % 2:
            (cgroup / "cgroup.kill").write_text("1")
        else:
            server.jobinit.signal(100, signal.SIGKILL)
        with pytest.raises(StartFailedError) as caught:
            await stuck
        assert (caught.value.step, caught.value.error_number) == ("exec", 0)
        assert caught.value.killed_by == signal.SIGKILL
        server.jobinit.acknowledge(100)
        assert await server.adopt() == {}

    launcher.run(scenario)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may have the kernel wait for its memory")
@pytest.mark.parametrize("is_killed", [False, True])
def test_who_executes_again_from_a_thread_has_executed(
    launcher: Launcher, cgroup: Path, tmp_path: Path, is_killed: bool
) -> None:
    """That thread has the number, and a flag of the kernel's as who never has: PF_FORKNOEXEC."""
    program = tmp_path / "exec_from_thread"
    source = Path(__file__).parents[1] / "exec_from_thread.c"
    subprocess.run(["gcc", "-o", program, source], check=True)

    def is_late() -> bool:
        (pid,) = (cgroup / "cgroup.procs").read_text().split()
        return Path(f"/proc/{pid}/wchan").read_text() == "handle_userfault"

    async def scenario(server: Server) -> None:
        (cgroup / "cgroup.freeze").write_text("1")
        request = server.start(str(program), job_id=100, cgroup=str(cgroup))
        starting = asyncio.create_task(request)
        await asyncio.to_thread(_wait_until, lambda: (cgroup / "cgroup.procs").read_text() != "")
        os.kill(server.pid, signal.SIGSTOP)
        (cgroup / "cgroup.freeze").write_text("0")
        await asyncio.to_thread(_wait_until, is_late)
        if is_killed:
            (cgroup / "cgroup.kill").write_text("1")
        os.kill(server.pid, signal.SIGCONT)
        started = await starting
        server.release(started)
        (cgroup / "cgroup.kill").write_text("1")
        assert (await server.wait_exit(100)).wait_status == signal.SIGKILL

    launcher.run(scenario)


@sees_descriptors
def test_that_another_holds_the_status_pipe_does_not_matter(
    launcher: Launcher, cgroup: Path
) -> None:
    """As the first process of another job's namespace does, for a moment."""

    async def scenario(server: Server) -> None:
        before = _descriptors(server.pid)
        (cgroup / "cgroup.freeze").write_text("1")
        starting = asyncio.create_task(server.start("/bin/true", job_id=100, cgroup=str(cgroup)))
        await asyncio.to_thread(_wait_until, lambda: (cgroup / "cgroup.procs").read_text() != "")
        pid = int((cgroup / "cgroup.procs").read_text())
        held = os.open(f"/proc/{pid}/fd/3", os.O_WRONLY)
        try:
            (cgroup / "cgroup.freeze").write_text("0")
            server.release(await starting)
            assert (await server.wait_exit(100)).wait_status == 0
        finally:
            os.close(held)
        server.jobinit.acknowledge(100)
        assert await server.adopt() == {}
        await _wait_descriptors(server.pid, before)

    launcher.run(scenario)


def test_where_no_descriptor_is_left_one_start_fails(launcher: Launcher, tmp_path: Path) -> None:
    limited = tmp_path / "limited"
    limited.write_text(f"#!/bin/sh\nulimit -n 40\nexec {launcher.binary} --serve\n")
    limited.chmod(0o755)

    async def scenario(server: Server) -> None:
        running: list[Started] = []
        with pytest.raises(StartFailedError) as caught:  # noqa: PT012
            while len(running) < 40:
                running.append(await server.start("/bin/sleep", "1000"))
        assert (caught.value.step, caught.value.error_number) == ("fork", errno.EMFILE)
        assert 8 <= len(running) <= 12  # a quarter of the 40 is kept for jobinit itself
        held = await server.reconnect()
        assert {started.job_id for started in running} < set(held)
        server.jobinit.signal(running[0].job_id, signal.SIGKILL)
        await server.wait_exit(running[0].job_id)
        server.jobinit.acknowledge(running[0].job_id)
        await server.start("/bin/sleep", "1000")

    launcher.run(scenario, limited)


@pytest.mark.parametrize("script", ["echo ran; exit 3", "echo ran; exec sleep 1000"])
def test_where_no_descriptor_is_left_a_proof_waits_for_one(
    launcher: Launcher, cgroup: Path, script: str
) -> None:
    """As where a job has all of the machine's. What has run is not told as never started."""

    async def scenario(server: Server) -> None:
        (cgroup / "cgroup.freeze").write_text("1")
        request = server.start("/bin/sh", "-c", script, job_id=100, cgroup=str(cgroup))
        starting = asyncio.create_task(request)
        await asyncio.to_thread(_wait_until, lambda: (cgroup / "cgroup.procs").read_text() != "")
        most = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (0, most))
        (cgroup / "cgroup.freeze").write_text("0")
        # It sleeps between its attempts.
        slept = _sleeps(server.pid)
        await asyncio.to_thread(_wait_until, lambda: _sleeps(server.pid) >= slept + 5)
        assert not starting.done()
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, most))
        started = await starting
        (cgroup / "cgroup.kill").write_text("1")
        status = signal.SIGKILL if "sleep" in script else 3 << 8
        assert (await server.wait_exit(100)).wait_status == status
        assert _read_all(started.stdout_fd) == b"ran\n"

    launcher.run(scenario)


# What a job finds


def test_a_job_has_its_argv_and_working_directory(launcher: Launcher, tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        argv = ("zeroth", "-c", 'pwd; printf "%s|" "$0" "$@"', "", "a b", "ä", "\udcff", "-x")
        output = await server.output(*argv, executable="/bin/sh", working_directory=str(tmp_path))
        assert output == f"{tmp_path}\n|a b|ä|\udcff|-x|"

    launcher.run(scenario)


@pytest.mark.parametrize("environment", [{}, {"A": "1", "EMPTY": "", "B": "x=y\nz \udcfe ü"}])
def test_a_job_has_exactly_its_environment(launcher: Launcher, environment: dict[str, str]) -> None:
    async def scenario(server: Server) -> None:
        output = await server.output("/usr/bin/env", "-0", environment=environment)
        assert output == "".join(f"{name}={value}\0" for name, value in environment.items())

    launcher.run(scenario)


def test_a_job_has_default_signals_and_no_mask(launcher: Launcher) -> None:
    """Python ignores SIGPIPE, and this test what it can; jobinit blocks SIGCHLD."""
    ignored = [signal.SIGUSR1, signal.SIGINT, signal.SIGRTMAX]
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in ignored]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

    async def scenario(server: Server) -> None:
        status = await server.output("/bin/cat", "/proc/self/status")
        for field in ("SigBlk", "SigIgn", "SigPnd", "ShdPnd"):
            assert f"{field}:\t0000000000000000\n" in status

    try:
        launcher.run(scenario)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before:
            signal.signal(number, handler)


def test_a_job_has_no_descriptor_but_its_own(launcher: Launcher, tmp_path: Path) -> None:
    """Not one that the server passed on to all its children either."""
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)

    async def scenario(server: Server) -> None:
        await server.start("/bin/sleep", "1000")
        output = await server.output("/bin/ls", "/proc/self/fd")
        assert output.split() == ["0", "1", "2", "3"]  # 3 is what ls lists

    try:
        launcher.run(scenario)
    finally:
        os.close(inherited)


@sees_descriptors
def test_a_child_that_hangs_holds_nothing_of_jobinit(launcher: Launcher, cgroup: Path) -> None:
    async def scenario(server: Server) -> None:
        await server.start("/bin/sleep", "1000")
        (cgroup / "cgroup.freeze").write_text("1")
        stuck = asyncio.create_task(server.start("/bin/true", cgroup=str(cgroup)))
        await asyncio.to_thread(_wait_until, lambda: (cgroup / "cgroup.procs").read_text() != "")
        pid = int((cgroup / "cgroup.procs").read_text())
        # stdin, stdout, stderr, the status pipe, and the cgroup's file that it is writing.
        assert _descriptors(pid) <= 5
        (cgroup / "cgroup.freeze").write_text("0")
        await stuck

    launcher.run(scenario)


def test_a_job_reads_nothing_from_stdin(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        assert await server.output("/bin/readlink", "/proc/self/fd/0") == "/dev/null\n"
        assert await server.output("/bin/cat") == ""

    launcher.run(scenario)


@pytest.mark.parametrize("argument_bytes", [0, 100 << 10])
def test_a_job_reads_its_input(launcher: Launcher, argument_bytes: int) -> None:
    """All of it, once, and it cannot be changed; with a start that is inline or in a memfd."""

    async def scenario(server: Server) -> None:
        stdin = bytes(range(256)) * 4096
        script = "import os, sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
        script += (
            "\ntry: os.ftruncate(0, 0)\nexcept PermissionError: print('sealed', file=sys.stderr)"
        )
        argv = (sys.executable, "-c", script, "x" * argument_bytes)
        output, errors, exited = await server.run(*argv, stdin=stdin)
        assert (output, errors, exited.wait_status) == (stdin, b"sealed\n", 0)

    launcher.run(scenario)


@sees_descriptors
def test_input_that_is_announced_and_does_not_come_is_refused(launcher: Launcher) -> None:
    pid = launcher.spawn()
    has_input = _start_body("/bin/true", flags=2)
    with _raw_connection(launcher.path) as connection:
        for body, memfds in (
            (has_input, []),
            (_start_body("/bin/true"), [b""]),
            (b"", [has_input]),
            (has_input, [b"", b""]),
        ):
            descriptors = [_memfd(data) for data in memfds]
            socket.send_fds(connection, [_packet(Ask.START, 7, body)], descriptors)
            assert _refusal(connection) == (Ask.START, 7, errno.EBADMSG)
            for descriptor in descriptors:
                os.close(descriptor)
        _wait_until(lambda: _descriptors(pid) == IDLE_DESCRIPTORS)
    assert launcher.wait_end(pid) == 0


def test_a_job_leads_its_own_session_and_group(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.start("/bin/cat", "/proc/self/stat")
        output = await asyncio.to_thread(_read_all, started.stdout_fd)
        _, _, fields = output.partition(b") ")
        _, parent, group, session, *_ = fields.split()
        assert int(group) == int(session) == started.pid
        assert int(parent) == server.pid

    launcher.run(scenario)


def test_a_job_has_the_usual_umask(launcher: Launcher) -> None:
    before = os.umask(0o077)

    async def scenario(server: Server) -> None:
        assert await server.output("/bin/sh", "-c", "umask") == "0022\n"

    try:
        launcher.run(scenario)
    finally:
        os.umask(before)


def test_a_job_has_the_original_limit_of_open_files(launcher: Launcher) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (777, before[1]))

    async def scenario(server: Server) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        output = await server.output("/bin/sh", "-c", "ulimit -Sn; ulimit -Hn")
        assert output == f"777\n{before[1]}\n"
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (before[1], before[1])

    try:
        launcher.run(scenario)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("inherited", "of_jobs"), [(0, 200), (300, 500), (900, 1000)])
def test_a_job_has_a_higher_oom_score_than_the_server(
    launcher: Launcher, tmp_path: Path, inherited: int, of_jobs: int
) -> None:
    """Than that which jobinit inherited, whatever it gives to itself."""
    likely = tmp_path / "likely"
    likely.write_text(
        f"#!/bin/sh\necho {inherited} > /proc/self/oom_score_adj\nexec {launcher.binary} --serve\n"
    )
    likely.chmod(0o755)

    async def scenario(server: Server) -> None:
        assert await server.output("/bin/cat", "/proc/self/oom_score_adj") == f"{of_jobs}\n"
        own = Path(f"/proc/{server.pid}/oom_score_adj").read_text()
        assert own == ("-900\n" if _has_capability(CAP_SYS_RESOURCE) else f"{inherited}\n")

    launcher.run(scenario, likely)


CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24


def _has_capability(number: int) -> bool:
    effective = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    return bool(effective and int(effective[1], 16) >> number & 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to be somebody else")
@pytest.mark.parametrize("groups", [(), (65534,), tuple(range(7000, 7300))])
def test_a_job_is_the_user_that_it_is_asked_to_be(
    launcher: Launcher, groups: tuple[int, ...]
) -> None:
    async def scenario(server: Server) -> None:
        identity = Identity(4711, 4712, groups)
        status = await server.output("/bin/cat", "/proc/self/status", identity=identity)
        lines = dict(line.split(":", 1) for line in status.splitlines())
        assert lines["Uid"].split() == ["4711"] * 4
        assert lines["Gid"].split() == ["4712"] * 4
        assert lines["Groups"].split() == [str(group) for group in groups]
        assert {lines[f"Cap{which}"].strip() for which in ("Prm", "Eff", "Inh", "Amb")} == {
            "0" * 16
        }
        assert lines["NoNewPrivs"].strip() == "0"

    launcher.run(scenario)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to make namespaces")
@pytest.mark.parametrize("is_confined", [False, True])
def test_a_confined_job_can_gain_no_rights(launcher: Launcher, is_confined: bool) -> None:
    async def scenario(server: Server) -> None:
        status = await server.output("/bin/cat", "/proc/self/status", is_confined=is_confined)
        lines = dict(line.split(":", 1) for line in status.splitlines())
        assert int(lines["NoNewPrivs"]) == is_confined
        assert (int(lines["CapBnd"], 16) == 0) == is_confined

    launcher.run(scenario)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to make namespaces")
def test_one_that_confines_all_has_no_privileges_to_hand_down(launcher: Launcher) -> None:
    """A job that is to have some is refused: it would be without."""

    async def scenario(server: Server) -> None:
        async def job_status(**fields: object) -> str:
            return await server.output("/bin/cat", "/proc/self/status", is_confined=True, **fields)

        await server.jobinit.make_view(View(number=1, tmp_bytes=0, tmp_inodes=0))
        own_status = Path(f"/proc/{server.pid}/status").read_text()
        as_nobody = await job_status(view=1, identity=Identity(65534, 65534, (65534,)))
        for status in (own_status, as_nobody, await job_status()):
            lines = dict(line.split(":", 1) for line in status.splitlines())
            assert int(lines["NoNewPrivs"]) == 1
            assert int(lines["CapBnd"], 16) == 0
        with pytest.raises(JobinitError, match="Operation not permitted"):
            await server.start("/bin/true")

    launcher.run(scenario, confines_all=True)


# As a kernel does of whose net.core.bpf_jit_limit nothing is left.
NO_FILTERS_FOR_THE_UNPRIVILEGED = """
#include <errno.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int __real_prctl(int option, ...);

int __wrap_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct own[2];

	syscall(SYS_capget, &header, own);
	if (option == PR_SET_SECCOMP && !(own[0].effective & 1 << CAP_SYS_ADMIN)) {
		errno = 524; /* ENOTSUPP */
		return -1;
	}
	return __real_prctl(option, a, b, c, d);
}
"""


@pytest.mark.skipif(not _has_capability(CAP_SYS_ADMIN), reason="takes root, with CAP_SYS_ADMIN")
@pytest.mark.parametrize("confines_all", [False, True])
def test_others_may_use_up_what_filters_are_compiled_to(
    launcher: Launcher, tmp_path: Path, confines_all: bool
) -> None:
    around, binary = tmp_path / "around.c", tmp_path / "jobinit"
    around.write_text(NO_FILTERS_FOR_THE_UNPRIVILEGED)
    subprocess.run(["gcc", "-static", "-Wl,--wrap=prctl", SOURCE, around, "-o", binary], check=True)

    async def scenario(server: Server) -> None:
        identity = Identity(65534, 65534, (65534,))
        await server.start("/bin/true", is_confined=True, identity=identity)

    launcher.run(scenario, binary, confines_all=confines_all)


def test_a_job_is_born_in_its_cgroup(launcher: Launcher, cgroup: Path) -> None:
    async def scenario(server: Server) -> None:
        output = await server.output("/bin/cat", "/proc/self/cgroup", cgroup=str(cgroup))
        assert f"0::/{cgroup.name}" in output.splitlines()

    launcher.run(scenario)


@pytest.mark.parametrize("argument_bytes", [300 << 10, 500 << 10])
def test_long_arguments_travel_in_a_memfd(launcher: Launcher, argument_bytes: int) -> None:
    async def scenario(server: Server) -> None:
        piece = 100 << 10
        arguments = [str(n) * piece for n in range(argument_bytes // piece)]
        environment = {"LONG": "x" * (argument_bytes % piece)}
        script = 'printf "%s" "$@" "$LONG"'
        argv = ("/bin/sh", "-c", script, "sh", *arguments)
        output = await server.output(*argv, environment=environment)
        assert output == "".join(arguments) + environment["LONG"]

    launcher.run(scenario)


# Output and endings


def test_merged_output_is_one_pipe_in_exact_order(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        script = "i=0; while [ $i -lt 500 ]; do echo o$i; echo e$i >&2; i=$((i+1)); done"
        started = await server.shell(script, merge_output=True)
        assert started.stderr_fd == -1
        output = await asyncio.to_thread(_read_all, started.stdout_fd)
        assert output.decode().split() == [f"{s}{i}" for i in range(500) for s in "oe"]

    launcher.run(scenario)


def test_only_the_read_ends_do_not_block(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.shell("sleep 1000")
        for ours, theirs in ((started.stdout_fd, 1), (started.stderr_fd, 2)):
            assert not os.get_blocking(ours)
            assert not os.get_inheritable(ours)
            info = Path(f"/proc/{started.pid}/fdinfo/{theirs}").read_text()
            flags = re.search(r"flags:\s*([0-7]+)", info)
            assert flags and not int(flags[1], 8) & os.O_NONBLOCK

    launcher.run(scenario)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -TERM $$", -signal.SIGTERM),
        ("kill -KILL $$", -signal.SIGKILL),
        ("ulimit -c 0; kill -ABRT $$", -signal.SIGABRT),
    ],
)
def test_an_ending_has_the_true_wait_status(launcher: Launcher, script: str, code: int) -> None:
    async def scenario(server: Server) -> None:
        before_ns = time.time_ns()
        started = await server.shell(script)
        exited = await server.wait_exit(started.job_id)
        assert os.waitstatus_to_exitcode(exited.wait_status) == code
        assert before_ns <= started.started_ns <= exited.ended_ns <= time.time_ns()

    launcher.run(scenario)


def test_an_ending_has_the_usage(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        work = "import time; x = b'x' * (64 << 20)\nwhile time.process_time() < 0.3: pass"
        started = await server.start(sys.executable, "-c", work)
        exited = await server.wait_exit(started.job_id)
        assert 300_000 <= exited.cpu_user_us + exited.cpu_system_us < 5_000_000
        assert 64 << 20 <= exited.max_rss_bytes < 256 << 20

    launcher.run(scenario)


def test_a_job_ends_when_its_main_process_does(launcher: Launcher) -> None:
    """Whatever it leaves behind, on its pipes too; and that is reaped like all else."""

    async def scenario(server: Server) -> None:
        started = await server.shell("sleep 1000 & echo $!")
        await server.wait_exit(started.job_id)
        orphan = int(os.read(started.stdout_fd, 100))
        assert jobs_of(server.pid) == [orphan]
        os.kill(orphan, signal.SIGKILL)
        await asyncio.to_thread(_wait_until, lambda: jobs_of(server.pid) == [])

    launcher.run(scenario)


def test_many_dead_keep_no_server_waiting(launcher: Launcher) -> None:
    """They are reaped some at a time. jobinit is stopped once it has answered: some are left then.
    It may have come to the last of them meanwhile; so it is tried again."""
    pid = launcher.spawn()

    def orphans(count: int) -> bool:
        return len(jobs_of(pid)) == count

    with _raw_connection(launcher.path) as connection:
        for job_id in itertools.count(1):
            script = f"for i in $(seq {ORPHANS}); do (sleep 1000 &); done"
            connection.send(_packet(Ask.START, job_id, _start_body("/bin/sh", "-c", script)))
            told: list[tuple[int, int, bytes]] = []
            while len(told) < 2:
                told += _receive(connection)
            assert [kind for kind, _, _ in told] == [Tell.STARTED, Tell.EXITED]
            _wait_until(partial(orphans, ORPHANS))
            os.kill(pid, signal.SIGSTOP)
            group, *_ = struct.unpack("=iIQ", told[0][2])
            os.killpg(group, signal.SIGKILL)
            connection.send(_packet(Ask.ACKNOWLEDGE, job_id))
            connection.send(_packet(Ask.LIST, 0))
            _wait_until(partial(_are_zombies, jobs_of(pid)))
            os.kill(pid, signal.SIGCONT)
            assert _receive(connection) == [(Tell.LISTED, 0, b"")]
            os.kill(pid, signal.SIGSTOP)
            left = len(jobs_of(pid))
            os.kill(pid, signal.SIGCONT)
            _wait_until(partial(orphans, 0))
            if left:
                break
            assert job_id < 20, "all were reaped before"
    assert launcher.wait_end(pid) == 0


ORPHANS = 150


def _are_zombies(pids: list[int]) -> bool:
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in pids)
    return all(stat.rpartition(")")[2].split()[0] == "Z" for stat in stats)


# Signals


def test_a_signal_reaches_the_whole_group(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        trap = "trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.01; done"
        started = await server.shell(f"({trap}) & {trap}")
        ready = b""
        while ready.count(b"ready") < 2:
            select.select([started.stdout_fd], [], [], DEADLINE_SECONDS)
            ready += os.read(started.stdout_fd, 100)
        server.jobinit.signal(started.job_id, signal.SIGUSR1)
        output = await asyncio.to_thread(_read_all, started.stdout_fd)
        assert output == b"got it\n" * 2
        exited = await server.wait_exit(started.job_id)
        assert os.waitstatus_to_exitcode(exited.wait_status) == 5

    launcher.run(scenario)


def test_without_a_cgroup_what_is_left_of_the_group_gets_the_signal(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.shell("sleep 1000 & sleep 1000 & exit 0")
        await server.wait_exit(started.job_id)
        assert len(jobs_of(server.pid)) == 2
        server.jobinit.signal(started.job_id, signal.SIGKILL)
        await asyncio.to_thread(_wait_until, lambda: jobs_of(server.pid) == [])
        server.jobinit.signal(started.job_id, signal.SIGKILL)  # to nobody
        server.jobinit.acknowledge(started.job_id)
        assert await server.adopt() == {}

    launcher.run(scenario)


def test_a_signal_to_no_job_or_of_no_number_harms_nobody(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sleep", "1000")
        server.jobinit.signal(999, signal.SIGKILL)
        for number in (-1, 0, 65, 1 << 30):
            server.jobinit.signal(started.job_id, number)
        held = await server.adopt()
        assert held[started.job_id].ending is None

    launcher.run(scenario)


# A server that goes, and one that comes


def test_a_new_server_gets_all_that_jobinit_holds(launcher: Launcher, tmp_path: Path) -> None:
    go = tmp_path / "go"

    async def scenario(server: Server) -> None:
        running = await server.shell("echo before; read x < /dev/zero", merge_output=True)
        ended = await server.shell(
            f"while [ ! -e {go} ]; do sleep 0.01; done; echo bye; echo oh >&2; exit 7"
        )
        with pytest.raises(StartFailedError):
            await server.start("/no/such/program")
        gone = await server.shell("exit 0")
        await server.wait_exit(gone.job_id)
        server.jobinit.acknowledge(gone.job_id)
        await server.disconnect()
        go.touch()
        await _wait_gone(ended.pid)

        await server.connect()
        held = await server.adopt()

        assert set(held) == {running.job_id, ended.job_id, ended.job_id + 1}
        again = held[running.job_id].started
        assert again and held[running.job_id].ending is None
        assert (again.pid, again.started_ns) == (running.pid, running.started_ns)
        assert os.read(again.stdout_fd, 100) == b"before\n"
        signal.pidfd_send_signal(again.pidfd, signal.SIGKILL)
        assert (await server.wait_exit(running.job_id)).wait_status == signal.SIGKILL

        over, ending = held[ended.job_id].started, held[ended.job_id].ending
        assert over and over.pidfd == -1
        assert _read_all(over.stdout_fd) == b"bye\n" and _read_all(over.stderr_fd) == b"oh\n"
        assert isinstance(ending, Exited)
        assert os.waitstatus_to_exitcode(ending.wait_status) == 7
        assert over.started_ns < ending.ended_ns < time.time_ns()

        failed = held[ended.job_id + 1]
        assert failed.started is None and isinstance(failed.ending, Failed)
        assert (failed.ending.step, failed.ending.error_number) == ("exec", errno.ENOENT)

    launcher.run(scenario)


def test_a_start_that_hangs_delays_no_new_server(launcher: Launcher, cgroup: Path) -> None:
    async def scenario(server: Server) -> None:
        (cgroup / "cgroup.freeze").write_text("1")
        request = server.request("/bin/sh", "-c", "exit 4", cgroup=str(cgroup))
        stuck = asyncio.create_task(server.start("", **_fields(request)))
        await asyncio.to_thread(_wait_until, lambda: (cgroup / "cgroup.procs").read_text() != "")
        held = await server.reconnect()
        with pytest.raises(JobinitError):
            await stuck
        assert held == {request.job_id: Held(request.job_id)}

        answer = asyncio.create_task(server.ask(request))
        (cgroup / "cgroup.freeze").write_text("0")
        assert (await answer).job_id == request.job_id
        assert os.waitstatus_to_exitcode((await server.wait_exit(request.job_id)).wait_status) == 4
        assert server.exit_count == {request.job_id: 1}

    launcher.run(scenario)


def _fields(request: StartRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in StartRequest.__slots__ if name != "argv"} | {
        "argv": request.argv
    }


def test_a_new_server_hears_of_older_jobs_only_when_it_asks(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sleep", "1000")
        await server.disconnect()
        await server.connect()
        server.jobinit.signal(started.job_id, signal.SIGKILL)
        await _wait_gone(started.pid)
        assert await server.output("/bin/echo", "later") == "later\n"
        assert started.job_id not in server.exit_count
        held = await server.adopt()
        assert isinstance(held[started.job_id].ending, Exited)

    launcher.run(scenario)


def test_a_job_waits_for_its_server_on_a_full_pipe(launcher: Launcher) -> None:
    """It gets no SIGPIPE, and not a byte is lost."""

    async def scenario(server: Server) -> None:
        total = 4 * PIPE_BYTES
        script = f"import os\nfor i in range({total // 8}): os.write(1, b'%07d ' % i)"
        started = await server.start(sys.executable, "-c", script)
        held = await server.reconnect()
        ours = held[started.job_id].started
        assert ours
        await server.jobinit.close()
        await asyncio.to_thread(_wait_until, lambda: _unread_bytes(ours.stdout_fd) == PIPE_BYTES)
        await server.connect()
        held = await server.adopt()
        assert held[started.job_id].ending is None
        output = await asyncio.to_thread(_read_all, ours.stdout_fd)
        assert output == b"".join(b"%07d " % i for i in range(total // 8))
        assert (await server.wait_exit(started.job_id)).wait_status == 0

    launcher.run(scenario)


def test_to_ask_again_for_a_job_starts_nothing(launcher: Launcher, tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        script = f"echo once >> {tmp_path}/count; echo ready; sleep 1000"
        request = server.request("/bin/sh", "-c", script)
        first = await server.ask(request)
        second = await server.ask(request)
        assert (second.pid, second.started_ns) == (first.pid, first.started_ns)
        assert len({first.pidfd, first.stdout_fd, second.pidfd, second.stdout_fd}) == 4
        assert os.path.sameopenfile(first.stdout_fd, second.stdout_fd)
        select.select([first.stdout_fd], [], [], DEADLINE_SECONDS)
        server.jobinit.signal(request.job_id, signal.SIGKILL)
        await server.wait_exit(request.job_id)
        third = await server.ask(request)
        assert (third.pid, third.pidfd) == (first.pid, -1)
        assert await server.adopt()
        assert server.exit_count == {request.job_id: 1}
        assert (tmp_path / "count").read_text() == "once\n"

    launcher.run(scenario)


def test_to_ask_again_for_a_failed_start_gives_the_same_answer(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        request = server.request("/no/such/program")
        for _ in range(2):
            with pytest.raises(StartFailedError):
                await server.ask(request)
        server.jobinit.acknowledge(request.job_id)
        assert await server.adopt() == {}

    launcher.run(scenario)


def test_what_runs_cannot_be_acknowledged(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sleep", "1000")
        server.jobinit.acknowledge(started.job_id)
        server.jobinit.acknowledge(999)
        assert set(await server.adopt()) == {started.job_id}

    launcher.run(scenario)


PIDFD_GETFD = 438
libc = ctypes.CDLL(None)


async def _lock_and_forget(server: Server, locks: contextlib.ExitStack) -> Callable[[], bool]:
    """A job that is over, and acknowledged, while another process has its output's pipe locked.
    Returns whether that still has."""
    job = await server.start("/bin/sleep", "1000")
    theirs = libc.syscall(PIDFD_GETFD, job.pidfd, 1, 0)
    is_locked = locks.enter_context(locked(theirs))
    os.close(theirs)
    server.jobinit.signal(job.job_id, signal.SIGKILL)
    await server.wait_exit(job.job_id)
    server.release(job)
    server.jobinit.acknowledge(job.job_id)
    return is_locked


@sees_descriptors
def test_pipes_that_are_kept_locked_keep_nobody_waiting(launcher: Launcher) -> None:
    """The last close of a pipe waits for its lock. The second time, with more than can wait for the
    process that is stuck with the first."""

    async def scenario(server: Server) -> None:
        with contextlib.ExitStack() as locks:
            for count in (900, 1):
                is_locked = await _lock_and_forget(server, locks)
                for _ in range(count):
                    other = await server.start("/bin/true")
                    await server.wait_exit(other.job_id)
                    server.release(other)
                    server.jobinit.acknowledge(other.job_id)
                assert is_locked()
            await _wait_descriptors(server.pid, IDLE_DESCRIPTORS)

    launcher.run(scenario)


@sees_descriptors
def test_an_acknowledged_job_leaves_nothing(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sh", "-c", "exec sleep 1000", "x" * (100 << 10))
        await _wait_descriptors(server.pid, IDLE_DESCRIPTORS + 2)
        merged = await server.start("/bin/sleep", "1000", merge_output=True)
        await _wait_descriptors(server.pid, IDLE_DESCRIPTORS + 3)
        for job_id in (started.job_id, merged.job_id):
            server.jobinit.signal(job_id, signal.SIGKILL)
            await server.wait_exit(job_id)
        await _wait_descriptors(server.pid, IDLE_DESCRIPTORS + 3)
        for job_id in (started.job_id, merged.job_id):
            server.jobinit.acknowledge(job_id)
        assert await server.adopt() == {}
        await _wait_descriptors(server.pid, IDLE_DESCRIPTORS)

    launcher.run(scenario)


@sees_descriptors
def test_500_jobs_leave_no_descriptor_and_no_zombie(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        gate = asyncio.Semaphore(16)

        async def one(number: int) -> None:
            async with gate:
                started = await server.shell(f"true & exit {number % 7}")
                exited = await server.wait_exit(started.job_id)
                assert os.waitstatus_to_exitcode(exited.wait_status) == number % 7
                server.jobinit.acknowledge(started.job_id)
                server.release(started)

        await asyncio.gather(*(one(number) for number in range(500)))
        assert await server.adopt() == {}
        await asyncio.to_thread(_wait_until, lambda: jobs_of(server.pid) == [])
        await _wait_descriptors(server.pid, IDLE_DESCRIPTORS)

    launcher.run(scenario)


def test_200_jobs_are_handed_over_in_batches(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        # One merged, so that three each do not make a batch of 252 but could of 254.
        jobs = [await server.start("/bin/sleep", "1000", merge_output=n == 0) for n in range(200)]
        held = await server.reconnect()
        assert {job_id: of.started.pid for job_id, of in held.items() if of.started} == {
            job.job_id: job.pid for job in jobs
        }
        pidfds = [of.started.pidfd for of in held.values() if of.started]
        assert len(set(pidfds)) == 200
        for pidfd in pidfds:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for job in jobs:
            await server.wait_exit(job.job_id)

    launcher.run(scenario)


# Its own beginning and end


def test_it_ends_when_no_server_ever_comes(launcher: Launcher) -> None:
    pid = launcher.spawn()
    assert launcher.wait_end(pid) == 0


def test_it_stays_while_it_holds_an_ending(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sleep", "1000")
        await server.disconnect()
        os.kill(started.pid, signal.SIGKILL)
        await _wait_gone(started.pid)
        await server.connect()
        held = await server.adopt()
        assert isinstance(held[started.job_id].ending, Exited)

    launcher.run(scenario)


def test_a_server_that_waits_already_is_served_before_it_ends(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        next_server = asyncio.create_task(
            Jobinit.greet(dial(launcher.path), lambda _: None, lambda: None)
        )
        await asyncio.sleep(0)  # it is in the backlog
        assert not next_server.done()
        await server.disconnect()
        await (await next_server).close()
        server.lost.set()

    launcher.run(scenario)


def test_without_a_descriptor_for_a_server_it_waits_for_one(launcher: Launcher) -> None:
    """It sleeps between its attempts, and the connection is not lost."""

    async def scenario(server: Server) -> None:
        most = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (0, most))
        next_server = asyncio.create_task(
            Jobinit.greet(dial(launcher.path), lambda _: None, lambda: None)
        )
        await asyncio.sleep(0)  # it is in the backlog
        await server.disconnect()
        slept = _sleeps(server.pid)
        await asyncio.to_thread(_wait_until, lambda: _sleeps(server.pid) >= slept + 5)
        assert not next_server.done()
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, most))
        await (await next_server).close()
        server.lost.set()

    launcher.run(scenario)


def _sleeps(pid: int) -> int:
    """How often it has waited for something so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_the_socket_is_for_its_user_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with jobinit.listen(tmp_path / "socket"):
            mode = (tmp_path / "socket").stat().st_mode
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize("name", ["no/folder", "x" * 200])
def test_a_socket_that_cannot_be_made_is_a_start_up_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(StateFolderError, match=name):
        jobinit.listen(tmp_path / name)


def test_a_missing_binary_is_a_start_up_error(tmp_path: Path) -> None:
    with (
        jobinit.listen(tmp_path / "socket") as listener,
        pytest.raises(StartupError, match="missing"),
    ):
        jobinit.spawn(tmp_path / "missing", listener)


def test_connecting_to_nobody_raises(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(JobinitError):
            await Jobinit.greet(dial(tmp_path / "socket"), lambda _: None, lambda: None)

    with jobinit.listen(tmp_path / "socket"):
        pass
    asyncio.run(main())


def test_one_that_has_not_come_to_others_yet_is_not_taken_for_gone(tmp_path: Path) -> None:
    """As where servers were started again and again meanwhile."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jobinit.listen(tmp_path / "socket"))
        connections = iter(lambda: stack.enter_context(dial(tmp_path / "socket")), None)
        with pytest.raises(StartupError, match="cannot be reached"):
            list(connections)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to be somebody else")
def test_another_user_is_sent_away(launcher: Launcher) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        launcher.path = Path(folder) / "socket"

        async def scenario(server: Server) -> None:
            os.chmod(launcher.path, 0o666)
            program = (
                "import os, socket, sys\n"
                "os.setuid(65534)\n"
                "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
                "s.connect(sys.argv[1])\n"
                "print('connected', flush=True)\n"
                "print(s.recv(100))"
            )
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", program, str(launcher.path)), stdout=subprocess.PIPE
            )
            assert process.stdout
            started = await server.start("/bin/sleep", "1000")
            assert await process.stdout.readline() == b"connected\n"
            await server.disconnect()
            assert await process.stdout.readline() == b"b''\n"
            await process.wait()
            await server.connect()
            assert set(await server.adopt()) == {started.job_id}

        launcher.run(scenario)


# When it dies


def test_when_it_dies_the_server_is_told_once(launcher: Launcher, cgroup: Path) -> None:
    lost = []

    async def scenario(server: Server) -> None:
        jobinit_ = await Jobinit.greet(dial(launcher.path), lambda _: None, lambda: lost.append(1))
        request = server.request("/bin/true", cgroup=str(cgroup))
        (cgroup / "cgroup.freeze").write_text("1")
        pending = asyncio.create_task(jobinit_.start(request))
        await asyncio.to_thread(_wait_until, lambda: (cgroup / "cgroup.procs").read_text() != "")
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(JobinitError):
            await pending
        with pytest.raises(JobinitError):
            await jobinit_.start(request)
        with pytest.raises(JobinitError):
            await jobinit_.adopt()
        jobinit_.signal(1, signal.SIGTERM)
        jobinit_.acknowledge(1)
        await jobinit_.close()

    pid = launcher.spawn()

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await scenario(Server(launcher.path, pid))

    asyncio.run(main())
    assert lost == [1]
    assert launcher.wait_end(pid) == -signal.SIGKILL


def test_a_server_without_descriptors_asks_again(launcher: Launcher) -> None:
    """Until it has some, and loses neither the connection nor the job."""

    async def scenario(server: Server) -> None:
        open_before = set(os.listdir("/proc/self/fd"))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, before[1]))
        try:
            start = asyncio.create_task(server.start("/bin/sleep", "1000", job_id=1))
            done, _ = await asyncio.wait([start], timeout=0.3)
            assert not done
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        # Without that by which the folder is listed.
        assert len(os.listdir("/proc/self/fd")) == len(open_before)
        started = await start
        assert min(started.pidfd, started.stdout_fd, started.stderr_fd) >= 0
        assert not server.lost.is_set()
        server.jobinit.signal(1, signal.SIGKILL)
        assert (await server.wait_exit(1)).wait_status == signal.SIGKILL

    launcher.run(scenario)


def test_a_start_that_finds_no_descriptor_leaves_nothing(launcher: Launcher) -> None:
    """It is to bring two memfds, and there is room for one."""

    async def scenario(server: Server) -> None:
        open_before = len(os.listdir("/proc/self/fd"))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                await server.start("/bin/true", "x" * 100_000, job_id=1, stdin=b"x")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert len(os.listdir("/proc/self/fd")) == open_before
        assert server.jobinit._starting == {}

    launcher.run(scenario)


# Congestion


def test_nothing_is_lost_when_jobinit_reads_late(launcher: Launcher) -> None:
    """Its socket is full: what is to be sent waits in the server, and nobody is blocked."""

    async def scenario(server: Server) -> None:
        started = await server.shell("trap : USR1; while :; do sleep 0.01; done")
        os.kill(server.pid, signal.SIGSTOP)
        for _ in range(2000):
            server.jobinit.signal(started.job_id, signal.SIGUSR1)
        starts = [asyncio.create_task(server.shell(f"exit {n % 5}")) for n in range(50)]
        await asyncio.sleep(0)
        assert len(server.jobinit._unsent) > 100
        os.kill(server.pid, signal.SIGCONT)
        for number, job in enumerate(await asyncio.gather(*starts)):
            exited = await server.wait_exit(job.job_id)
            assert os.waitstatus_to_exitcode(exited.wait_status) == number % 5
        assert not server.jobinit._unsent

    launcher.run(scenario)


def test_nothing_is_lost_when_the_server_reads_late(launcher: Launcher) -> None:
    """Its socket is full: jobinit goes on reaping, and tells all when there is room."""
    count = 4000  # mostly some hundreds are enough
    pid = launcher.spawn()
    with _raw_connection(launcher.path) as connection:
        sent = 0
        while sent < count:
            # Without reading: until jobinit, for want of room, does not read either.
            _, writable, _ = select.select([], [connection], [], 2)
            if not writable:
                break
            sent += 1
            connection.send(_packet(Ask.START, sent, _start_body("/bin/true")))
        assert 100 < sent < count
        _wait_until(lambda: jobs_of(pid) == [])

        told: list[tuple[int, int]] = []
        while len(told) < 2 * sent:
            told += [(kind, job_id) for kind, job_id, _ in _receive(connection)]
        expected = [(kind, n + 1) for n in range(sent) for kind in (Tell.STARTED, Tell.EXITED)]
        assert sorted(told) == sorted(expected)
        assert all(
            told.index((Tell.STARTED, n + 1)) < told.index((Tell.EXITED, n + 1))
            for n in range(sent)
        )
        for number in range(sent):
            connection.send(_packet(Ask.ACKNOWLEDGE, number + 1))
    assert launcher.wait_end(pid) == 0


# Views


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
SMALL = View(1, tmp_bytes=1 << 20, tmp_inodes=100)


def confined(**fields: object) -> dict[str, object]:
    identity = Identity(65534, 65534, (65534,))
    return {"is_confined": True, "identity": identity, "view": 1} | fields


@as_root
def test_a_view_is_what_confined_jobs_see(launcher: Launcher, tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()

    async def scenario(server: Server) -> None:
        await server.jobinit.make_view(replace(SMALL, hidden=(hidden, "/not/there")))
        output, errors, _ = await server.run("/bin/ls", "/proc/self/fd", hidden, **confined())
        assert output.splitlines()[1:] == [b"0", b"1", b"2", b"3"], "a descriptor is left"
        assert b"Permission denied" in errors
        # What is replaced holds for later jobs.
        await server.jobinit.make_view(SMALL)
        output = (await server.run("/bin/ls", hidden, **confined()))[0]
        assert output == b"content\n"

    # Not below /tmp, which is a job's own.
    with tempfile.TemporaryDirectory(dir="/srv") as hidden:
        Path(hidden).chmod(0o755)
        Path(hidden, "content").touch()
        launcher.run(scenario)
    assert Path("/proc/self/mountinfo").read_text() == before


@as_root
@pytest.mark.parametrize(
    "fields",
    [
        {"root": "/srv", "view": 0},
        {"binds": (Bind("/srv", "/mnt"),), "view": 0},
        {"is_read_only": True, "view": 0},
        {"root": "/srv", "is_confined": False},
        {"root": "/srv", "identity": None},
        {"binds": (Bind("/srv", "/mnt"),) * 33},
    ],
    ids=str,
)
def test_files_are_arranged_in_a_view_only(launcher: Launcher, fields: dict[str, Any]) -> None:
    async def scenario(server: Server) -> None:
        await server.jobinit.make_view(SMALL)
        with pytest.raises(JobinitError, match="refused"):
            await server.start("/bin/true", **confined(**fields))

    launcher.run(scenario)


@as_root
@pytest.mark.parametrize(
    ("fields", "step", "number"),
    [
        ({"root": "/srv/no/such"}, "root", errno.ENOENT),
        ({"root": "/etc/passwd"}, "root", errno.ENOTDIR),
        ({"root": "/proc/self/root"}, "root", errno.ELOOP),
        ({"binds": (Bind("/no", "/mnt"),)}, "source of a bind", errno.ENOENT),
        ({"binds": (Bind("/etc", "/no"),)}, "destination of a bind", errno.ENOENT),
        ({"binds": (Bind("/etc", "/proc/self/root"),)}, "destination of a bind", errno.ELOOP),
        ({"binds": (Bind("/etc/passwd", "/mnt"),)}, "destination of a bind", errno.EINVAL),
        ({"binds": (Bind("CLOSED/x", "/mnt"),)}, "source of a bind", errno.EACCES),
        ({"binds": (Bind("/etc", "CLOSED/x"),)}, "destination of a bind", errno.EACCES),
    ],
)
def test_files_that_cannot_be_arranged(
    launcher: Launcher, fields: dict[str, Any], step: str, number: int
) -> None:
    """Also what the job's user cannot reach, whatever is there."""
    before = Path("/proc/self/mountinfo").read_text()
    with tempfile.TemporaryDirectory(dir="/srv") as closed:
        for bind in fields.get("binds", ()):
            paths = (path.replace("CLOSED", closed) for path in (bind.source, bind.destination))
            fields = {"binds": (Bind("/etc", "/tmp/first"), Bind(*paths))}

        async def scenario(server: Server) -> None:
            await server.jobinit.make_view(SMALL)
            with pytest.raises(StartFailedError) as caught:
                await server.start("/bin/true", **confined(**fields))
            assert (caught.value.step, caught.value.error_number) == (step, number)
            assert ("binds[1]" in str(caught.value)) == ("binds" in fields)

        launcher.run(scenario)
    assert Path("/proc/self/mountinfo").read_text() == before


@as_root
def test_a_root_without_what_a_job_has_of_its_own_is_none(
    launcher: Launcher, binary: Path, tmp_path: Path
) -> None:
    """As where there are too few descriptors, or jobs of others have left few namespaces of mounts:
    the job would find the folders of the root itself, which others share."""
    outcomes: list[object] = []

    async def scenario(server: Server) -> None:
        await server.jobinit.make_view(SMALL)
        try:
            outcomes.append(await server.output("/bin/ls", "/tmp", **confined(root=root)))
        except StartFailedError as error:
            outcomes.append((error.step, error.error_number))

    wrapper = tmp_path / "with few descriptors"
    with tempfile.TemporaryDirectory(dir="/srv") as root:
        Path(root).chmod(0o755)
        make_root(Path(root))
        Path(root, "tmp", "of all who have that root").touch()
        for most in range(6, 12):
            wrapper.write_text(f'#!/bin/sh\nulimit -Sn {most}\nexec {binary} "$@"\n')
            wrapper.chmod(0o700)
            launcher.run(scenario, wrapper)
    assert set(outcomes) == {("root", errno.EMFILE), ""}


@as_root
def test_files_are_looked_up_with_the_groups_of_the_jobs_user(launcher: Launcher) -> None:
    group = 7001

    async def scenario(server: Server) -> None:
        await server.jobinit.make_view(SMALL)
        fields = confined(binds=(Bind(f"{folder}/file", "/tmp/file"),))
        fields["identity"] = Identity(65534, 65534, (65534, group))
        output, *_ = await server.run("/bin/cat", "/tmp/file", **fields)
        assert output == b"content\n"

    with tempfile.TemporaryDirectory(dir="/srv") as folder:
        Path(folder, "file").write_text("content\n")
        os.chown(folder, 0, group)
        Path(folder).chmod(0o710)
        launcher.run(scenario)


@as_root
def test_a_view_that_cannot_be_made_says_what_could_not_be_done(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        path = "/" + 300 * "x"
        with pytest.raises(JobinitError, match=r"mount /xxx.*File name too long"):
            await server.jobinit.make_view(replace(SMALL, read_only=(path,)))
        with pytest.raises(JobinitError, match="refused"):
            await server.start("/bin/true", **confined())
        with pytest.raises(JobinitError, match="refused"):
            await server.jobinit.make_view(replace(SMALL, number=9))
        await server.jobinit.make_view(SMALL)
        await server.run("/bin/true", **confined())

    launcher.run(scenario)


@as_root
def test_a_view_without_confinement_is_refused(launcher: Launcher) -> None:
    """Its mounts would be the machine's. jobinit is in a namespace of its own here, so that they
    would not."""
    wrapper = launcher.path.with_name("apart")
    wrapper.write_text(f'#!/bin/sh\nexec unshare -m --propagation private {launcher.binary} "$@"\n')
    wrapper.chmod(0o755)

    async def scenario(server: Server) -> None:
        await server.jobinit.make_view(SMALL)
        before = Path(f"/proc/{server.pid}/mountinfo").read_text()
        with pytest.raises(JobinitError, match="refused"):
            await server.start("/bin/true", **confined(is_confined=False))
        assert Path(f"/proc/{server.pid}/mountinfo").read_text() == before

    launcher.run(scenario, wrapper)


@as_root
def test_a_server_that_goes_while_a_view_is_made_is_no_harm(launcher: Launcher) -> None:
    async def scenario(server: Server) -> None:
        await server.start("/bin/sleep", "60")  # without a job it would end
        for _ in range(5):
            making = asyncio.create_task(server.jobinit.make_view(SMALL))
            await asyncio.sleep(0)
            await server.disconnect()
            with pytest.raises(JobinitError):
                await making
            await server.connect()
        await server.adopt()
        await server.jobinit.make_view(SMALL)
        output, _, _ = await server.run("/bin/sh", "-c", "echo $$", **confined())
        assert output == b"2\n"

    launcher.run(scenario)


@sees_descriptors
def test_the_first_process_of_a_namespace_waits_outside_of_the_job(
    launcher: Launcher, cgroup: Path
) -> None:
    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sleep", "60", cgroup=str(cgroup), **confined(view=0))
        [first] = [pid for pid in jobs_of(server.pid) if pid != started.pid]
        # But for a pidfd of the job, whose end it waits for.
        await _wait_descriptors(first, 1)
        assert "pidfd" in await asyncio.to_thread(os.readlink, f"/proc/{first}/fd/0")
        assert (cgroup / "cgroup.procs").read_text().split() == [str(started.pid)]
        server.jobinit.signal(started.job_id, signal.SIGTERM)
        assert (await server.wait_exit(started.job_id)).wait_status == signal.SIGTERM
        await _wait_gone(first)

    launcher.run(scenario)


@sees_descriptors
def test_without_a_descriptor_the_first_process_of_a_namespace_ends_no_job(
    launcher: Launcher,
) -> None:
    """It would be the end of all others in there. The machine may have none left: another job's
    doing."""

    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sleep", "60", **confined(view=0))
        [first] = [pid for pid in jobs_of(server.pid) if pid != started.pid]
        await _wait_descriptors(first, 0)
        most = resource.prlimit(first, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(first, resource.RLIMIT_NOFILE, (0, most))
        slept = _sleeps(first)
        os.kill(first, signal.SIGCHLD)  # it looks for the job at once
        await asyncio.to_thread(_wait_until, lambda: _sleeps(first) >= slept + 2)
        resource.prlimit(first, resource.RLIMIT_NOFILE, (most, most))
        await _wait_descriptors(first, 1)
        server.jobinit.signal(started.job_id, signal.SIGTERM)
        assert (await server.wait_exit(started.job_id)).wait_status == signal.SIGTERM
        await _wait_gone(first)

    launcher.run(scenario)


# As the filter of system calls does in which some containers and units run.
NO_PIDFDS = """
#include <errno.h>

long __real_syscall(long call, ...);

long __wrap_syscall(long call, long a, long b, long c, long d, long e, long f)
{
	if (call == 434 /* pidfd_open */) {
		errno = %s;
		return -1;
	}
	return __real_syscall(call, a, b, c, d, e, f);
}
"""


@as_root
@pytest.mark.parametrize("error", ["ENOSYS", "EPERM"])
def test_without_pidfds_the_first_process_of_a_namespace_ends_with_its_job(
    launcher: Launcher, tmp_path: Path, error: str
) -> None:
    """And not before."""
    around, binary = tmp_path / "around.c", tmp_path / "jobinit"
    around.write_text(NO_PIDFDS % error)
    options = ["-static", "-Wl,--wrap=syscall"]
    subprocess.run(["gcc", *options, SOURCE, around, "-o", binary], check=True)

    async def scenario(server: Server) -> None:
        started = await server.start("/bin/sleep", "60", **confined(view=0))
        [first] = [pid for pid in jobs_of(server.pid) if pid != started.pid]
        await _wait_descriptors(first, 0)
        slept = _sleeps(first)
        os.kill(first, signal.SIGCHLD)  # it looks for the job at once
        await asyncio.to_thread(_wait_until, lambda: _sleeps(first) >= slept + 2)
        server.jobinit.signal(started.job_id, signal.SIGTERM)
        assert (await server.wait_exit(started.job_id)).wait_status == signal.SIGTERM
        await _wait_gone(first)

    launcher.run(scenario, binary)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_one_that_dies_before_it_has_read_all_is_missed(run: Callable[..., None]) -> None:
    """The kernel then tells first that what was sent is lost; uvloop tells that once."""

    async def scenario() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        hello = struct.pack("=IIii", 0x54494E4A, jobinit.PROTOCOL_VERSION, 1, 0)
        theirs.send(_packet(Tell.HELLO, 0, hello))
        lost = asyncio.Event()
        connection = await Jobinit.greet(ours, lambda _: None, lost.set)
        connection.signal(1, signal.SIGTERM)
        theirs.close()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await lost.wait()

    run(scenario())


# What makes no sense


@contextlib.contextmanager
def _raw_connection(path: Path) -> Iterator[socket.socket]:
    """After its hello."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(DEADLINE_SECONDS)
        connection.connect(os.fspath(path))
        [(kind, _, body)] = _receive(connection)
        assert kind == Tell.HELLO
        assert struct.unpack("=IIii", body)[:2] == (0x54494E4A, jobinit.PROTOCOL_VERSION)
        yield connection


def _packet(kind: int, job_id: int, body: bytes = b"", descriptors: int = 0) -> bytes:
    return struct.pack("=HHIQ", kind, descriptors, len(body), job_id) + body


def _start_body(
    *argv: str, flags: int = 0, arguments: int = -1, variables: int = 0, groups: int = 0
) -> bytes:
    strings = [argv[0], "/", "", "", *argv]
    counts = (len(argv) if arguments < 0 else arguments, variables, groups)
    head = struct.pack("=IIIIIIIII", flags, *counts, 65534, 65534, 0, 0, 0)
    return head + "".join(string + "\0" for string in strings).encode()


def _receive(connection: socket.socket) -> list[tuple[int, int, bytes]]:
    """(type, job id, body) of each message in a packet."""
    packet, descriptors, flags, _ = socket.recv_fds(connection, 16 << 10, 253)
    for descriptor in descriptors:
        os.close(descriptor)
    assert packet and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    return [(kind, job_id, body) for kind, _, job_id, body in jobinit._split(packet)]


def _refusal(connection: socket.socket) -> tuple[int, int, int]:
    """(type, job id, errno) of what was refused."""
    [(kind, job_id, body)] = _receive(connection)
    assert kind == Tell.REFUSED
    refused, number = struct.unpack("=Ii", body)
    return refused, job_id, number


SENSELESS = {
    "short": (b"x", (ord("x"), 0, errno.EBADMSG)),
    "no body": (_packet(Ask.START, 7), (Ask.START, 7, errno.EBADMSG)),
    "unknown": (_packet(99, 7), (99, 7, errno.EOPNOTSUPP)),
    "of jobinit": (_packet(Tell.EXITED, 7), (Tell.EXITED, 7, errno.EOPNOTSUPP)),
    "longer than it says": (_packet(Ask.LIST, 7) + b"x", (Ask.LIST, 7, errno.EBADMSG)),
    "shorter": (_packet(Ask.SIGNAL, 7, bytes(8))[:-1], (Ask.SIGNAL, 7, errno.EBADMSG)),
    "half a signal": (_packet(Ask.SIGNAL, 7, bytes(4)), (Ask.SIGNAL, 7, errno.EBADMSG)),
    "no signal": (_packet(Ask.SIGNAL, 7, bytes(8)), (Ask.SIGNAL, 7, errno.EINVAL)),
    "too long": (_packet(Ask.START, 7, bytes(65 << 10)), (Ask.START, 7, errno.EMSGSIZE)),
    "not ended": (
        _packet(Ask.START, 7, _start_body("/bin/true")[:-1]),
        (Ask.START, 7, errno.EBADMSG),
    ),
    "no argv": (
        _packet(Ask.START, 7, _start_body("/bin/true", arguments=0)),
        (Ask.START, 7, errno.EBADMSG),
    ),
    "more strings": (
        _packet(Ask.START, 7, _start_body("/bin/true") + b"x\0"),
        (Ask.START, 7, errno.EBADMSG),
    ),
    "fewer strings": (
        _packet(Ask.START, 7, _start_body("/bin/true", variables=1)),
        (Ask.START, 7, errno.EBADMSG),
    ),
    "countless strings": (
        _packet(Ask.START, 7, _start_body("/bin/true", arguments=2**32 - 1, variables=2**32 - 1)),
        (Ask.START, 7, errno.EBADMSG),
    ),
    "countless groups": (
        _packet(Ask.START, 7, _start_body("/bin/true", groups=2**32 - 1)),
        (Ask.START, 7, errno.EBADMSG),
    ),
    "more groups than fit": (
        _packet(Ask.START, 7, _start_body("/bin/true", groups=8)),
        (Ask.START, 7, errno.EBADMSG),
    ),
    "a flag of later": (
        _packet(Ask.START, 7, _start_body("/bin/true", flags=1 << 31)),
        (Ask.START, 7, errno.EOPNOTSUPP),
    ),
}


def test_what_makes_no_sense_is_refused_and_harms_nobody(launcher: Launcher) -> None:
    pid = launcher.spawn()
    with _raw_connection(launcher.path) as connection:
        for packet, refusal in SENSELESS.values():
            connection.send(packet)
            assert _refusal(connection) == refusal
        connection.send(_packet(Ask.LIST, 0))
        assert _receive(connection) == [(Tell.LISTED, 0, b"")]
    assert launcher.wait_end(pid) == 0


def test_each_refusal_is_told_however_fast_they_come(launcher: Launcher) -> None:
    pid = launcher.spawn()
    with _raw_connection(launcher.path) as connection:
        with _halted(pid):
            for number in range(1, 9):
                connection.send(_packet(99, number))
        for number in range(1, 9):
            assert _refusal(connection) == (99, number, errno.EOPNOTSUPP)
    assert launcher.wait_end(pid) == 0


def test_what_comes_together_is_told_together(launcher: Launcher) -> None:
    pid = launcher.spawn()
    with _raw_connection(launcher.path) as connection:
        for number in (1, 2):
            connection.send(_packet(Ask.START, number, _start_body("/bin/true")))
        told: list[int] = []
        while len(told) < 4:
            told += [kind for kind, _, _ in _receive(connection)]
        assert sorted(told) == [Tell.STARTED, Tell.STARTED, Tell.EXITED, Tell.EXITED]
        with _halted(pid):
            for number in (1, 2):
                connection.send(_packet(Ask.START, number))  # again, as after a failed delivery
        both = _receive(connection)
        assert [job_id for kind, job_id, _ in both if kind == Tell.STARTED] == [1, 2]
        for number in (1, 2):
            connection.send(_packet(Ask.ACKNOWLEDGE, number))
    assert launcher.wait_end(pid) == 0


@contextlib.contextmanager
def _halted(pid: int) -> Iterator[None]:
    """What is sent meanwhile it finds all at once."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@sees_descriptors
@pytest.mark.parametrize("kind", ["directory", "empty", "huge", "senseless", "two"])
def test_a_senseless_memfd_is_refused(launcher: Launcher, tmp_path: Path, kind: str) -> None:
    pid = launcher.spawn()
    descriptors = {
        "directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
        "empty": lambda: [_memfd(b"")],
        "huge": lambda: [_memfd(bytes((1 << 20) + 1))],
        "senseless": lambda: [_memfd(b"x" * 1000)],
        "two": lambda: [_memfd(b""), _memfd(_start_body("/bin/true"))],
    }[kind]()
    with _raw_connection(launcher.path) as connection:
        packet = _packet(Ask.START, 7, descriptors=1)
        socket.send_fds(connection, [packet], descriptors)
        number = errno.EMSGSIZE if kind in {"directory", "huge"} else errno.EBADMSG
        assert _refusal(connection) == (Ask.START, 7, number)
        _wait_until(lambda: _descriptors(pid) == IDLE_DESCRIPTORS)
    for descriptor in descriptors:
        os.close(descriptor)
    assert launcher.wait_end(pid) == 0


def _memfd(data: bytes) -> int:
    memfd = os.memfd_create("test")
    os.write(memfd, data)
    return memfd


# Starts whose strings name no program, and no cgroup that could be made: random ones might.
START_BODIES = st.builds(
    lambda flags, arguments, variables, groups, limits, view, binds, strings: (
        struct.pack("=IIII", flags, arguments, variables, groups)
        + struct.pack("=IIIII", 65534, 65534, limits, view, binds)
        + strings
    ),
    st.integers(0, 127) | st.integers(0, 2**32 - 1),
    st.integers(0, 1) | st.integers(0, 2**32 - 1),
    st.integers(0, 5) | st.integers(0, 2**32 - 1),
    st.integers(0, 5) | st.integers(0, 2**32 - 1),
    st.integers(0, 5) | st.integers(0, 2**32 - 1),
    st.integers(0, 5) | st.integers(0, 2**32 - 1),
    st.integers(0, 2) | st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([b"\0", b"/no/no", b"x/x\0"])).map(b"".join),
)
PACKETS = (
    st.binary(min_size=1, max_size=200)
    | st.builds(_packet, st.integers(0, 200), st.integers(0, 3), st.binary(max_size=50))
    | st.builds(_packet, st.just(Ask.START), st.integers(0, 3), START_BODIES)
)


def test_no_packet_harms_it(launcher: Launcher) -> None:
    pid = launcher.spawn()
    with _raw_connection(launcher.path) as connection:

        @settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(PACKETS, max_size=5))
        def send(packets: list[bytes]) -> None:
            for packet in packets:
                connection.send(packet)
            connection.send(_packet(Ask.LIST, 0))
            while not any(kind == Tell.LISTED for kind, _, _ in _receive(connection)):
                pass

        send()
        _wait_until(lambda: jobs_of(pid) == [])
        for job_id in range(4):
            connection.send(_packet(Ask.ACKNOWLEDGE, job_id))
    assert launcher.running == [pid]
    os.kill(pid, 0)


def test_both_ends_have_the_same_names_and_numbers() -> None:
    source = (SOURCE.parent / "jobinit/protocol.h").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+),", source)}
    expected = {f"ASK_{ask.name}": ask.value for ask in Ask}
    expected |= {f"TELL_{tell.name}": tell.value for tell in Tell}
    assert {name: numbers.get(name) for name in expected} == expected
    steps = re.search(r"enum step \{(.*?)\}", source, re.DOTALL)
    assert steps
    assert len(re.findall(r"STEP_\w+", steps[1])) == len(jobinit.STEPS)


# By hand


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--", "true"], 0),
        (["--", "/bin/sh", "-c", "exit 3"], 3),
        (["--", "sh", "-c", "kill -9 $$"], 137),
        (["--", "/etc/passwd"], 126),
        (["--cgroup", "/no/such", "--", "true"], 126),
        (["--", "no-such-command"], 127),
        (["--", "/no/such/command"], 127),
        ([], 125),
        (["true"], 125),
        (["--cgroup", "/no/such"], 125),
    ],
)
def test_by_hand_it_ends_as_the_job_does(binary: Path, arguments: list[str], code: int) -> None:
    process = subprocess.run([binary, *arguments], capture_output=True, check=False)
    assert process.returncode == code
    assert (process.stderr != b"") == (code in {125, 126, 127})


def test_by_hand_a_job_has_the_terminal_s_descriptors(binary: Path, tmp_path: Path) -> None:
    script = "pwd; cat; echo $GREETING >&2"
    process = subprocess.run(
        [binary, "--", "sh", "-c", script],
        input=b"input",
        env={"PATH": os.environ["PATH"], "GREETING": "hello"},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert process.stdout == f"{tmp_path}\ninput".encode()
    assert process.stderr == b"hello\n"


def test_by_hand_a_job_runs_in_the_cgroup(binary: Path, cgroup: Path) -> None:
    process = subprocess.run(
        [binary, "--cgroup", cgroup, "--", "cat", "/proc/self/cgroup"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"0::/{cgroup.name}" in process.stdout.splitlines()


def test_by_hand_a_job_gets_the_signals(binary: Path) -> None:
    script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done"
    with subprocess.Popen([binary, "--", "sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == 9
