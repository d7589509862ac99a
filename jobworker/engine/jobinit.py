"""The server's end of the socket to jobinit, the parent of all jobs (jobinit.c).

A packet to jobinit holds one message, a packet from it as many as fit, with the descriptors
of all of them in order. The formats below mirror the structs of jobinit/protocol.h.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import enum
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobworker.engine.pace import Pace
from jobworker.errors import (
    JobinitError,
    StartFailedError,
    StartupError,
    StateFolderError,
    ViewError,
)
from jobworker.job import Bind

log = logging.getLogger(__name__)

MAGIC = 0x54494E4A
PROTOCOL_VERSION = 2
CONNECT_SECONDS = 10.0
TRY_AGAIN = "start again, or, if it never does, end it, and its jobs with it"
VIEW_SECONDS = 30.0  # to make one: a look at each of its paths
ASK_AGAIN_SECONDS = 0.1  # where this process had no descriptor left
LISTENER_FD = 3

# Longer than this a start goes by way of a memfd: seqpacket messages end near 200 KB.
LONGEST_INLINE_START_BYTES = 64 << 10
PACKET_BYTES = 16 << 10
PACKET_DESCRIPTORS = 253


class Ask(enum.IntEnum):
    """Messages to jobinit."""

    START = 1
    SIGNAL = 2
    ACKNOWLEDGE = 3
    LIST = 4
    VIEW = 5


class Tell(enum.IntEnum):
    """Messages from jobinit."""

    HELLO = 101
    STARTING = 102
    STARTED = 103
    FAILED = 104
    EXITED = 105
    LISTED = 106
    REFUSED = 107
    VIEW = 108


HEADER = struct.Struct("=HHIQ")  # type, number of descriptors, size of the body, job id
# flags, arguments, variables, groups, uid, gid, limits, view, binds; then the groups, then the
# strings
START_BODY = struct.Struct("=IIIIIIIII")
# number, flags, bytes and inodes of /tmp, paths that are hidden, read-only; then the paths
VIEW_BODY = struct.Struct("=IIQIII4x")
SIGNAL_BODY = struct.Struct("=ii")  # number, -
# A later jobinit may append to these: what is behind them is ignored.
HELLO_BODY = struct.Struct("=IIi4x")  # magic, version, pid
STARTED_BODY = struct.Struct("=iIQ")  # pid, which descriptors, started_ns
FAILED_BODY = struct.Struct("=IiiIQ")  # step, errno, wait status, which limit or bind, ended_ns
EXITED_BODY = struct.Struct("=i4xQQQQ")  # wait status, ended_ns, user µs, system µs, RSS in KiB
REFUSED_BODY = struct.Struct("=Ii")  # type of the message, errno
VIEW_TOLD_BODY = struct.Struct("=Ii")  # number, errno; then which step of it failed

MERGE_OUTPUT, HAS_INPUT, SET_USER, CONFINED, MAKE_CGROUP, NO_NETWORK = 1, 2, 4, 8, 16, 32
READ_ONLY_FILES = 64
HAS_PIDFD, HAS_STDOUT, HAS_STDERR = 1, 2, 4

# As plain numbers: an operation on the enum's members takes ten times as long.
TRUNCATED, DESCRIPTORS_TRUNCATED = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC)

MFD_EXEC = 0x10
SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

STEPS = {
    1: "fork",
    2: "descriptors",
    3: "cgroup",
    4: "session",
    5: "open files limit",
    6: "oom score",
    7: "namespaces",
    8: "resource limits",
    9: "privileges",
    10: "user",
    11: "working directory",
    12: "system call filter",
    13: "exec",
    14: "process namespace",
    15: "network",
    16: "view of the machine",
    17: "/proc",
    18: "/tmp",  # noqa: S108
    19: "terminals",
    20: "root",
    21: "source of a bind",
    22: "destination of a bind",
    23: "read-only files",
}


LimitFiles = tuple[tuple[str, str], ...]  # names of files in a cgroup, and what to write


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a job runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What jobinit is to start."""

    job_id: int
    executable: str  # a path
    argv: tuple[str, ...]  # with argv[0]
    environment: Mapping[str, str]  # complete
    working_directory: str
    cgroup: str | None  # the directory of the job's cgroup; None: without one
    merge_output: bool
    makes_cgroup: bool = False  # else it is there
    limits: LimitFiles = ()  # of a cgroup that is made
    stdin: bytes = b""
    identity: Identity | None = None  # None: as jobinit itself
    is_confined: bool = False  # it can gain no rights that its user has not
    view: int = 0  # the number of a View that has been made; 0: the machine's files as they are
    has_network: bool = True
    # These take a view and an identity.
    root: str = ""  # a folder of the view; empty: the view's own
    binds: tuple[Bind, ...] = ()
    is_read_only: bool = False  # all but what the job has of its own, and the binds


@dataclass(frozen=True, slots=True)
class View:
    """What confined jobs see of the machine's files: this, and what jobinit/view.h says."""

    number: int  # 1 to 8
    tmp_bytes: int  # of /tmp, /var/tmp and /dev/shm together, which each job has of its own
    tmp_inodes: int  # files in these
    hidden: tuple[str, ...] = ()  # paths; each may be absent
    read_only: tuple[str, ...] = ()  # the same


@dataclass(frozen=True, slots=True)
class Started:
    """The exec of a job is proved. The descriptors belong to whoever gets this."""

    job_id: int
    pid: int
    pidfd: int  # -1: the main process has ended already, or the kernel has no pidfds
    stdout_fd: int  # does not block, as stderr_fd
    stderr_fd: int  # -1: merged into stdout
    started_ns: int

    def close(self) -> None:
        self.close_pipes()
        if self.pidfd >= 0:
            os.close(self.pidfd)

    def close_pipes(self) -> None:
        _close_all(fd for fd in (self.stdout_fd, self.stderr_fd) if fd >= 0)


@dataclass(frozen=True, slots=True)
class Exited:
    """The main process of a job has ended. The usage is that of it and of those children
    that it has waited for."""

    job_id: int
    wait_status: int  # as of wait(2)
    ended_ns: int
    cpu_user_us: int
    cpu_system_us: int
    max_rss_bytes: int  # of the largest of the processes


# A file that was there, and could be executed, when the job was created.
EXEC_HINTS = {
    errno.ENOENT: "its interpreter is missing: check its first line (of a program: its loader)",
    errno.ENOEXEC: "it is no program for this machine, and has no first line such as #!/bin/sh",
}


@dataclass(frozen=True, slots=True)
class Failed:
    """The command of a job never ran, and nothing of it is left."""

    job_id: int
    step: str
    error_number: int
    killed_by: int  # the signal that came before the exec; 0: the step failed
    item: int  # which of its request's limits, or binds, it was about, from 1 on; 0: none
    ended_ns: int

    def error(self, request: StartRequest | None = None) -> StartFailedError:
        """request: where it is known, what the step was about is named."""
        about = hint = ""
        if request and self.step == "exec":
            about = repr(request.executable)
            hint = EXEC_HINTS.get(self.error_number, "")
        elif request and self.step == "cgroup" and 0 < self.item <= len(request.limits):
            name, value = request.limits[self.item - 1]
            about = f"cannot write {value!r} to {request.cgroup}/{name}"
        elif request and self.step.endswith("bind") and 0 < self.item <= len(request.binds):
            # Quoted, as a path may have line ends, and this comes to the log.
            about = f"binds[{self.item - 1}], {str(request.binds[self.item - 1])!r}"
        return StartFailedError(self.step, self.error_number, self.killed_by, about, hint)


@dataclass(slots=True)
class Held:
    """A job that jobinit holds: it is starting (`started` and `ending` are None, and
    `await_start` gets to know how that ends), it runs, or it has ended."""

    job_id: int
    started: Started | None = None
    ending: Exited | Failed | None = None


def listen(path: Path) -> socket.socket:
    """The socket that jobinit is to accept servers on, with mode 0600. A connection waits in
    its backlog until jobinit comes. Raises StateFolderError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.unlink(missing_ok=True)
        # The file inherits the socket's mode (unix_bind in net/unix/af_unix.c), so there is
        # no moment in which others may connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(os.fspath(path))
        listener.listen()
    except OSError as error:
        listener.close()
        raise StateFolderError(
            f"{path}: no socket can be made there: {error.strerror or error}; "
            "use a state folder that is writable and has a short path"
        ) from error
    return listener


@contextlib.contextmanager
def sealed_copy(binary: Path) -> Iterator[Path]:
    """In memory, where nobody can change it. For a moment each job is a copy of jobinit, and its
    command may be a script with /proc/self/exe as its interpreter: so it comes to the file that
    jobinit runs from, and past its view, as by a mount of the machine. Were that the file on disk,
    a job with its owner's user could change it. Another user's cannot even execute it. Raises
    StartupError."""
    try:
        memfd = _executable_memfd(binary.read_bytes())
        os.fchmod(memfd, stat.S_IRUSR | stat.S_IXUSR)
    except OSError as error:
        if error.errno == errno.EACCES and os.geteuid() == 0:
            log.warning("jobinit runs from its file, as vm.memfd_noexec leaves no other way")
            yield binary
            return
        raise StartupError(
            f"{binary} cannot be started from memory: {error.strerror}; check that it is there, "
            "and that the setting vm.memfd_noexec of the kernel is not 2"
        ) from error
    try:
        yield Path(f"/proc/self/fd/{memfd}")
    finally:
        os.close(memfd)


def _executable_memfd(data: bytes) -> int:
    try:
        return _sealed_memfd("jobinit", data, MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return _sealed_memfd("jobinit", data)  # before Linux 6.3, where all can be executed


def spawn(binary: Path, listener: socket.socket, *, confines_all: bool = False) -> int:
    """Starts jobinit, in a session of its own so that it outlives this process and its
    terminal. Belongs before the import of grpc. confines_all: it is to start confined jobs only;
    takes root. Returns the pid. Raises StartupError."""
    try:
        return os.posix_spawn(
            binary,
            ["jobinit", "--serve-confined" if confines_all else "--serve"],
            {},
            file_actions=[(os.POSIX_SPAWN_DUP2, listener.fileno(), LISTENER_FD)],
            setsid=True,
        )
    except OSError as error:
        raise StartupError(
            f"{binary} cannot be started: {error.strerror}; install jobworker again"
        ) from error


def dial(path: Path) -> socket.socket:
    """A connection to the jobinit that listens there. Raises JobinitError where none does, and
    StartupError where one may: it must not be taken for gone, as its jobs would be."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(os.fspath(path))
    except OSError as error:
        connection.close()
        problem = f"{path}: {error.strerror or error}"
        if error.errno not in {errno.ECONNREFUSED, errno.ENOENT}:
            raise StartupError(f"jobinit cannot be reached at {problem}; {TRY_AGAIN}") from error
        raise JobinitError(f"no jobinit at {problem}") from error
    return connection


class Jobinit:
    """A connection to jobinit, on the running event loop."""

    def __init__(
        self,
        connection: socket.socket,
        on_exit: Callable[[Exited | Failed], None],
        on_lost: Callable[[], None],
    ) -> None:
        """Use `greet`."""
        self.pid = 0
        self.version = 0
        self._socket = connection
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._greeted = self._loop.create_future()
        self._starting: dict[int, tuple[StartRequest | None, asyncio.Future[Started]]] = {}
        self._viewing: dict[int, asyncio.Future[None]] = {}
        self._adopting: asyncio.Future[list[Held]] | None = None
        self._held: dict[int, Held] = {}  # what came so far, while adopting
        self._recorded: Pace[int] = Pace(self._send_recorded)
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()  # packet, and memfds
        self._loop.add_reader(connection.fileno(), self._receive)

    @classmethod
    async def greet(
        cls,
        connection: socket.socket,
        on_exit: Callable[[Exited | Failed], None],
        on_lost: Callable[[], None],
    ) -> Jobinit:
        """connection: of `dial`; ours from now on.
        on_exit: is called once for each job of `start` or `adopt` that ends; not before
        the task that awaits its `start` has run on. With Failed only where no task does.
        on_lost: is called once, when jobinit has gone without a `close`.

        Raises JobinitError where it has gone, and StartupError where it does not answer.
        """
        jobinit = cls(connection, on_exit, on_lost)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await jobinit._greeted
        except TimeoutError as error:
            # To take it for gone would be the end of its jobs.
            raise StartupError(f"jobinit does not answer; {TRY_AGAIN}") from error
        finally:
            if jobinit.pid == 0:
                await jobinit.close()
        return jobinit

    @property
    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    async def start(self, request: StartRequest) -> Started:
        """Returns once the exec is proved. To ask again for a job that was started before
        gives fresh descriptors, and starts nothing.

        Raises StartFailedError where a step of it failed: that ending too is to be
        acknowledged. Raises JobinitError where jobinit is gone or refuses, and OSError where
        there is no descriptor or memory to ask with. Cancelling does not stop the job.
        """
        self._require_connection()
        body = _encode_start(request)
        is_long = len(body) > LONGEST_INLINE_START_BYTES
        memfds = _memfds_with([body] * is_long + [request.stdin] * bool(request.stdin))
        future: asyncio.Future[Started] = self._loop.create_future()
        self._starting[request.job_id] = (request, future)
        self._recorded.act()  # first, as it gives back descriptors
        self._send(Ask.START, request.job_id, b"" if is_long else body, memfds)
        return await future

    async def await_start(self, job_id: int) -> Started:
        """As `start`, of a job that jobinit holds: it is asked for by its id alone."""
        self._require_connection()
        future: asyncio.Future[Started] = self._loop.create_future()
        self._starting[job_id] = (None, future)
        self._send(Ask.START, job_id)
        return await future

    async def make_view(self, view: View) -> None:
        """Afterwards jobs can be started with it. One of the same number is replaced; jobs that
        have a copy of it keep that. Raises JobinitError, which says what could not be done."""
        self._require_connection()
        paths = [*view.hidden, *view.read_only]
        body = VIEW_BODY.pack(
            view.number,
            0,
            view.tmp_bytes,
            view.tmp_inodes,
            len(view.hidden),
            len(view.read_only),
        )
        future = self._viewing[view.number] = self._loop.create_future()
        self._send(Ask.VIEW, 0, body + b"".join(os.fsencode(path) + b"\0" for path in paths))
        try:
            async with asyncio.timeout(VIEW_SECONDS):
                await future
        except TimeoutError as error:
            raise JobinitError("the machine's file systems do not answer") from error

    def signal(self, job_id: int, number: int) -> None:
        """To the main process of a job and its process group; to what is left of the group
        where the process has ended and there is no cgroup. Nothing tells whether it arrived."""
        self._send(Ask.SIGNAL, job_id, SIGNAL_BODY.pack(number, 0))

    def acknowledge(self, job_id: int) -> None:
        """The ending is recorded: jobinit forgets the job, and closes its pipe ends. That may
        wait a little, so that it is not woken for each."""
        self._recorded.add(job_id, may_wait=True)

    def _send_recorded(self, job_ids: list[int]) -> None:
        for job_id in job_ids:
            self._send(Ask.ACKNOWLEDGE, job_id)

    async def adopt(self) -> list[Held]:
        """All jobs that jobinit holds. To be called by a server that has just connected,
        before it starts any; jobinit tells nothing of older jobs without it."""
        self._require_connection()
        self._adopting = self._loop.create_future()
        self._recorded.act()
        self._send(Ask.LIST, 0)
        return await self._adopting

    async def close(self) -> None:
        """jobinit goes on for as long as it holds a job."""
        self._recorded.act()
        self._disconnect(JobinitError("the connection to jobinit is closed"))

    def _require_connection(self) -> None:
        if self.is_closed:
            raise JobinitError("jobinit is gone")

    # Sending

    def _send(
        self, kind: Ask, job_id: int, body: bytes = b"", memfds: tuple[int, ...] = ()
    ) -> None:
        """Nothing is sent once the connection is gone: `on_lost` has told of that."""
        if self._socket.fileno() < 0:
            return
        header = HEADER.pack(kind, len(memfds), len(body), job_id)
        self._unsent.append((header + body, memfds))
        if len(self._unsent) == 1 and not self._send_unsent():
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        if self._send_unsent() and self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())

    def _send_unsent(self) -> bool:
        """False: the socket is full."""
        while self._unsent:
            packet, memfds = self._unsent[0]
            try:
                _send_packet(self._socket, packet, memfds)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                # The reader finds that out too, after what jobinit has said last.
                self._drop_unsent()
            except OSError as error:
                self._lose(f"cannot send to jobinit: {error.strerror}")
            else:
                self._unsent.popleft()
                _close_all(memfds)
        return True

    def _drop_unsent(self) -> None:
        for _, memfds in self._unsent:
            _close_all(memfds)
        self._unsent.clear()

    # Receiving

    def _receive(self) -> None:
        if self.is_closed:
            return
        try:
            packet, descriptors, flags = _receive_packet(self._socket)
        except BlockingIOError:
            return
        except ConnectionResetError:
            # It comes once, and before what jobinit has said last (it ended without reading
            # all from us). uvloop tells nothing more of a socket that had an error.
            self._loop.call_soon(self._receive_to_end)
            return
        except OSError as error:
            self._lose(f"cannot receive from jobinit: {error.strerror}")
            return
        if not packet:
            self._lose("jobinit is gone")
        elif flags & TRUNCATED or (flags & DESCRIPTORS_TRUNCATED and self._adopting):
            _close_all(descriptors)
            self._lose("a message of jobinit was cut off: this process has no descriptor left")
        else:
            self._take_packet(packet, descriptors, is_cut=bool(flags & DESCRIPTORS_TRUNCATED))

    def _receive_to_end(self) -> None:
        while not self.is_closed:
            self._receive()

    def _take_packet(self, packet: bytes, descriptors: list[int], *, is_cut: bool) -> None:
        """is_cut: this process had no room for some of the descriptors, nobody knows which."""
        try:
            for kind, count, job_id, body in _split(packet):
                if kind == Tell.STARTED and is_cut:
                    self._loop.call_later(ASK_AGAIN_SECONDS, self._ask_again, job_id)
                    continue
                if kind == Tell.STARTED:
                    self._take_started(_decode_started(job_id, body, count, descriptors))
                    continue
                _close_all(descriptors[:count])
                del descriptors[:count]
                self._take(kind, job_id, body)
        except (struct.error, ValueError) as error:
            self._lose(f"jobinit broke its protocol: {error}")
        finally:
            _close_all(descriptors)

    def _ask_again(self, job_id: int) -> None:
        """Of a job that jobinit knows, it needs nothing but the id."""
        if job_id in self._starting:
            self._send(Ask.START, job_id)

    def _take(self, kind: int, job_id: int, body: bytes) -> None:
        if kind == Tell.EXITED:
            self._take_exited(_decode_exited(job_id, body))
        elif kind == Tell.FAILED:
            self._take_failed(_decode_failed(job_id, body))
        elif kind == Tell.HELLO:
            self._take_hello(body)
        elif kind == Tell.STARTING and self._adopting:
            self._held[job_id] = Held(job_id)
        elif kind == Tell.LISTED:
            self._take_listed()
        elif kind == Tell.REFUSED:
            self._take_refused(job_id, body)
        elif kind == Tell.VIEW:
            self._take_view(body)
        # Anything else is of a later jobinit, for servers that know it.

    def _take_hello(self, body: bytes) -> None:
        magic, self.version, pid = HELLO_BODY.unpack_from(body)
        if magic != MAGIC:
            raise ValueError(f"magic number {magic:#x}")
        self.pid = pid
        if not self._greeted.done():
            self._greeted.set_result(None)

    def _take_started(self, started: Started) -> None:
        _, future = self._starting.pop(started.job_id, (None, None))
        if future and not future.done():
            future.set_result(started)
        elif self._adopting:
            self._held[started.job_id] = Held(started.job_id, started)
        else:
            started.close()  # nobody waits for it: `start` gets it again

    def _take_exited(self, exited: Exited) -> None:
        if self._adopting and exited.job_id in self._held:
            self._held[exited.job_id].ending = exited
        else:
            # Not at once: whoever awaits its `start` is to run first.
            self._loop.call_soon(self._on_exit, exited)

    def _take_failed(self, failed: Failed) -> None:
        request, future = self._starting.pop(failed.job_id, (None, None))
        if future and not future.done():
            future.set_exception(failed.error(request))
        elif self._adopting:
            self._held[failed.job_id] = Held(failed.job_id, ending=failed)
        else:  # one that was killed as nobody wants it
            self._loop.call_soon(self._on_exit, failed)

    def _take_listed(self) -> None:
        if self._adopting and not self._adopting.done():
            self._adopting.set_result(list(self._held.values()))
            self._held = {}
        self._drop_held()

    def _drop_held(self) -> None:
        """Nobody has got it."""
        self._adopting = None
        for held in self._held.values():
            if held.started:
                held.started.close()
        self._held.clear()

    def _take_refused(self, job_id: int, body: bytes) -> None:
        kind, number = REFUSED_BODY.unpack_from(body)
        message = f"jobinit refused message {kind} for job {job_id}: {os.strerror(number)}"
        log.error(message)
        if kind == Ask.VIEW:
            self._fail_views(JobinitError(message))
        if kind != Ask.START:
            return
        _, future = self._starting.pop(job_id, (None, None))
        if future and not future.done():
            future.set_exception(JobinitError(message))

    def _take_view(self, body: bytes) -> None:
        view_number, number = VIEW_TOLD_BODY.unpack_from(body)
        future = self._viewing.pop(view_number, None)
        if future is None or future.done():
            return
        if number == 0:
            future.set_result(None)
        else:
            step = os.fsdecode(body[VIEW_TOLD_BODY.size :])
            future.set_exception(ViewError(step, number))

    def _fail_views(self, error: JobinitError) -> None:
        _fail(self._viewing.values(), error)
        self._viewing.clear()

    # The end

    def _lose(self, problem: str) -> None:
        was_connected = self._greeted.done()
        self._disconnect(JobinitError(problem))
        if was_connected:
            # After the last of on_exit.
            self._loop.call_soon(self._on_lost)

    def _disconnect(self, error: JobinitError) -> None:
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._drop_unsent()
        starting = [future for _, future in self._starting.values()]
        _fail([self._greeted, self._adopting, *starting], error)
        self._starting.clear()
        self._fail_views(error)
        self._drop_held()


def _fail(waiting: Iterable[asyncio.Future[Any] | None], error: JobinitError) -> None:
    for future in waiting:
        if future and not future.done():
            future.set_exception(error)


def _encode_start(request: StartRequest) -> bytes:
    variables = [f"{name}={value}" for name, value in request.environment.items()]
    strings = [request.executable, request.working_directory, request.cgroup or "", request.root]
    for limit in request.limits:
        strings += limit
    for bind in request.binds:
        strings += [bind.source, bind.destination, "ro" * bind.read_only]
    strings += [*request.argv, *variables]
    who = request.identity or Identity(0, 0, ())
    flags = MERGE_OUTPUT * request.merge_output | HAS_INPUT * bool(request.stdin)
    flags |= SET_USER * bool(request.identity) | CONFINED * request.is_confined
    flags |= MAKE_CGROUP * request.makes_cgroup | NO_NETWORK * (not request.has_network)
    counts = (len(request.argv), len(variables), len(who.groups))
    flags |= READ_ONLY_FILES * request.is_read_only
    items = (len(request.limits), request.view, len(request.binds))
    head = START_BODY.pack(flags, *counts, who.uid, who.gid, *items)
    head += struct.pack(f"={len(who.groups)}I", *who.groups)
    return head + os.fsencode("\0".join(strings)) + b"\0"


def _memfds_with(contents: Iterable[bytes]) -> tuple[int, ...]:
    memfds: list[int] = []
    try:
        memfds.extend(_sealed_memfd("start", data) for data in contents)
    except BaseException:
        _close_all(memfds)
        raise
    return tuple(memfds)


def _sealed_memfd(name: str, data: bytes, flags: int = 0) -> int:
    """To be read from the beginning, and to be changed by nobody: a job gets one as stdin."""
    memfd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(memfd, view) :]
        os.lseek(memfd, 0, os.SEEK_SET)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALED)
    except BaseException:
        os.close(memfd)
        raise
    return memfd


def _send_packet(connection: socket.socket, packet: bytes, memfds: tuple[int, ...]) -> None:
    if memfds:
        socket.send_fds(connection, [packet], memfds)
    else:
        connection.send(packet)


def _receive_packet(connection: socket.socket) -> tuple[bytes, list[int], int]:
    """(packet, descriptors, flags); an empty packet is the end."""
    packet, ancillary, flags, _ = connection.recvmsg(
        PACKET_BYTES, socket.CMSG_SPACE(PACKET_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) // 4 * 4])
    return packet, list(descriptors), flags


def _split(packet: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, number of descriptors, job id, body) of each message."""
    place = 0
    while place < len(packet):
        kind, count, size, job_id = HEADER.unpack_from(packet, place)
        place += HEADER.size
        if place + size > len(packet):
            raise ValueError(f"message {kind} is cut off")
        yield kind, count, job_id, packet[place : place + size]
        place += size


def _decode_started(job_id: int, body: bytes, count: int, descriptors: list[int]) -> Started:
    """Takes its descriptors out of the list, unless it raises."""
    pid, having, started_ns = STARTED_BODY.unpack_from(body)
    if not count == having.bit_count() <= len(descriptors):
        raise ValueError(f"descriptors {having:#x} are {len(descriptors)}")
    pidfd, stdout_fd, stderr_fd = (
        descriptors.pop(0) if having & bit else -1 for bit in (HAS_PIDFD, HAS_STDOUT, HAS_STDERR)
    )
    return Started(job_id, pid, pidfd, stdout_fd, stderr_fd, started_ns)


def _decode_exited(job_id: int, body: bytes) -> Exited:
    wait_status, ended_ns, user_us, system_us, rss_kib = EXITED_BODY.unpack_from(body)
    return Exited(job_id, wait_status, ended_ns, user_us, system_us, rss_kib << 10)


def _decode_failed(job_id: int, body: bytes) -> Failed:
    step, number, wait_status, item, ended_ns = FAILED_BODY.unpack_from(body)
    killed_by = 0 if number else wait_status & 0x7F
    return Failed(job_id, STEPS.get(step, f"step {step}"), number, killed_by, item, ended_ns)


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
