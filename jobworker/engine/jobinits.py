"""All jobinits of this server: the one that starts jobs, and older ones whose jobs still run.

A jobinit listens on `jobinit-<version>-<program>.sock`, by the version of its protocol, and by what
it is. All versions understand what it takes to follow a job and to end it, so a newer server takes
over the jobs of an older jobinit, and starts its own ones with one of its own. Each ends by itself,
once it holds no job and no server is connected.

Where a jobinit dies, its jobs go on. This process is their next ancestor if it has spawned that
jobinit, and then it reaps them; if not, the kernel is asked. A new jobinit starts what comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from socket import socket

from jobworker.engine.jobinit import (
    PROTOCOL_VERSION,
    Exited,
    Failed,
    Held,
    Jobinit,
    Started,
    StartRequest,
    View,
    dial,
    listen,
    sealed_copy,
    spawn,
)
from jobworker.errors import (
    JobinitError,
    JobinitGoneError,
    JobWorkerError,
    StartFailedError,
    StartupError,
    ViewError,
)

log = logging.getLogger(__name__)

RESPAWN_SECONDS = 1.0  # between two, where each dies at once
GONE_SECONDS = 1.0  # what one that has closed its connection may take to be gone

TRIAL_ID = 0  # no job has it
TRIAL_SECONDS = 30.0
TRIAL_END_SECONDS = 5.0  # what a killed one may take to be gone
# How the kernel says that it will not do something, however often it is asked. What else it may
# say (no memory, no descriptors) may be otherwise a moment later, or be another job's doing.
REFUSALS = {
    *(errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP),
    errno.EUSERS,  # namespaces are too deep in others
}
NAMESPACE_LIMITS = Path("/proc/sys/user")
NAMESPACES = ("mnt", "pid", "ipc", "uts", "cgroup")  # that confined jobs take

PR_SET_CHILD_SUBREAPER = 36
# Of linux/pidfd.h, since Linux 6.15: struct pidfd_info as it first was, 64 bytes.
PIDFD_GET_INFO = 0xC040FF0B
PIDFD_INFO_EXIT = 1 << 3
PIDFD_INFO = struct.Struct("=Q52xi")  # mask, ..., exit_code
# The kernel knows the code once the parent, whoever that is, has reaped.
ASK_AGAIN_SECONDS = (0.0, 0.001, 0.01, 0.05, 0.2, 0.5)


@dataclass(frozen=True, slots=True)
class OrphanExited:
    """The main process of a job whose jobinit has died has ended."""

    job_id: int
    wait_status: int | None  # as of wait(2); None: nobody can tell
    ended_ns: int  # when it was noticed


OnExit = Callable[[Exited | Failed | OrphanExited], None]


@dataclass(slots=True)
class _Hold:
    """Who holds a job. The pidfd is ours to close."""

    jobinit: Jobinit | None  # None: it has died
    pid: int = 0  # 0: not known to have started
    pidfd: int = -1
    is_ended: bool = False  # and told so


class Jobinits:
    """From `prepare`, which belongs before the import of grpc, by `connect` to `close`."""

    def __init__(
        self,
        folder: Path,
        binary: Path,
        views: Iterable[View] = (),
        *,
        confines_all: bool = False,
    ) -> None:
        """folder: for the sockets. binary: the program of our version. views: that jobs are to
        be started with. confines_all: no job is to be started that is not confined; takes root."""
        self._views = tuple(views)
        self._trial: asyncio.Future[None] | None = None
        self._folder = folder
        self._binary = binary
        self._confines_all = confines_all
        # One that starts all kinds of jobs is as another version to who wants one of these.
        kind = "-confined" if confines_all else ""
        self._path = folder / f"jobinit-{PROTOCOL_VERSION}{kind}-{_digest(binary)}.sock"
        self.was_there = False  # one of an earlier server
        self._dialled: dict[Path, socket] = {}
        self._jobs_open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._holds: dict[int, _Hold] = {}
        self._orphans: dict[int, int] = {}  # pid -> job id
        self._on_exit: OnExit
        self._loop: asyncio.AbstractEventLoop
        self._current: asyncio.Future[Jobinit]
        self._all: list[Jobinit] = []
        self._spawned_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    def prepare(self) -> None:
        """Finds those that are there, and spawns ours where it is missing. Raises StartupError
        or JobinitError."""
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        # Not pathlib's: it may take a folder for empty that cannot be read for now, and with it all
        # that jobinits hold.
        for name in os.listdir(self._folder):
            if not (name.startswith("jobinit-") and name.endswith(".sock")):
                continue
            path = self._folder / name
            try:
                self._dialled[path] = dial(path)
            except JobinitError:  # it has ended
                path.unlink(missing_ok=True)
        self.was_there = bool(self._dialled)
        if self._path not in self._dialled:
            self._spawn()

    async def connect(self, on_exit: OnExit) -> list[Held]:
        """Returns the jobs that are held from before. on_exit: is called once for each of
        these and of `start` that ends, unless its ending is told here. Raises JobinitError."""
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._current = self._loop.create_future()
        signal.signal(signal.SIGCHLD, self._on_child)
        held: list[Held] = []
        for path in list(self._dialled):
            jobinit = await self._greet_found(path)
            if jobinit is None:
                continue
            if path == self._path:
                self._current.set_result(jobinit)
            for each in await jobinit.adopt():
                self._hold(jobinit, each.job_id, each.started)
                self._holds[each.job_id].is_ended = each.ending is not None
                if each.job_id == TRIAL_ID:
                    await self._end_trial(each.started)
                else:
                    held.append(each)
        return held

    async def try_out(self, request: StartRequest) -> str:
        """Why no job can be started so, all but its exec; empty where one can. Needs no command
        that exists.

        Raises StartupError where that is not known, as where a job of an earlier server has the
        start of others wait: to take that for a no would be a way out for it."""
        self._trial = self._loop.create_future()
        started = None
        try:
            async with asyncio.timeout(TRIAL_SECONDS):
                await self._make_view(await self._our_jobinit(), request.view)
                started = await self.start(replace(request, job_id=TRIAL_ID))
        except StartFailedError as error:
            self._holds[TRIAL_ID].is_ended = True
            return "" if error.step == "exec" else _refusal(error)
        except ViewError as error:
            return _refusal(error)
        except (JobinitError, OSError) as error:
            raise _not_known(error) from error
        finally:
            await self._end_trial(started)
        return ""

    def drop_views(self) -> None:
        """No job is to be started with one."""
        self._views = ()

    async def _end_trial(self, started: Started | None) -> None:
        """Also one that an earlier server has left."""
        if started:
            started.close_pipes()
        hold = self._holds.get(TRIAL_ID)
        if hold and not hold.is_ended:
            self._trial = self._trial or self._loop.create_future()
            self.signal(TRIAL_ID, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TRIAL_END_SECONDS):
                    await self._trial
        self.acknowledge(TRIAL_ID)
        self._trial = None

    async def _make_view(self, jobinit: Jobinit, number: int) -> None:
        for view in self._views:
            if view.number == number:
                await jobinit.make_view(view)

    async def _greet_found(self, path: Path) -> Jobinit | None:
        """One that was just about to end when it was dialled, as it held no job, says nothing
        more. Ours is then spawned; None for an older one."""
        try:
            return await self._greet(self._dialled.pop(path))
        except JobinitError as error:
            log.info("%s: %s", path.name, error)
        if path != self._path:
            return None
        self._spawn()
        return await self._greet(self._dialled.pop(path))

    async def start(self, request: StartRequest) -> Started:
        """As `Jobinit.start`. The pidfd stays ours."""
        jobinit = await self._our_jobinit()
        return await self._started(jobinit, request.job_id, jobinit.start(request))

    async def await_start(self, job_id: int) -> Started:
        """The same, of a job that was starting when it was told of by `connect`."""
        jobinit = self._holds[job_id].jobinit
        if jobinit is None:
            raise JobinitGoneError("the jobinit that was starting it is gone")
        return await self._started(jobinit, job_id, jobinit.await_start(job_id))

    async def _started(
        self, jobinit: Jobinit, job_id: int, start: Coroutine[None, None, Started]
    ) -> Started:
        self._hold(jobinit, job_id, None)
        try:
            started = await start
        except JobinitError as error:
            if not jobinit.is_closed:
                raise
            # Before it is gone, the child may not yet have found out, and go on.
            await self._wait_gone(jobinit.pid)
            raise JobinitGoneError(str(error)) from error
        self._hold(jobinit, job_id, started)
        return started

    def signal(self, job_id: int, number: int) -> None:
        """To the job's main process and its group, as `Jobinit.signal`."""
        hold = self._holds.get(job_id)
        if hold and hold.jobinit:
            hold.jobinit.signal(job_id, number)
        elif hold and hold.pidfd >= 0:
            # As long as it has not been reaped, its number is its group's.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(hold.pidfd, number)
                os.killpg(hold.pid, number)

    def has_ended(self, job_id: int) -> bool:
        """Whether the main process of a job has, by the kernel: to be told of it takes time."""
        hold = self._holds.get(job_id)
        if hold is None or hold.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(hold.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def acknowledge(self, job_id: int) -> None:
        """The ending is recorded: nobody need hold the job any longer."""
        hold = self._holds.pop(job_id, None)
        if hold is None:
            return
        if hold.pidfd >= 0:
            os.close(hold.pidfd)
        if hold.jobinit:
            hold.jobinit.acknowledge(job_id)

    async def close(self) -> None:
        """They go on for as long as they hold jobs."""
        self._is_closing = True
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for task in self._tasks:
            task.cancel()
        for jobinit in self._all:
            await jobinit.close()
        for job_id, hold in self._holds.items():
            if hold.pidfd >= 0:
                if job_id in self._orphans.values():
                    self._loop.remove_reader(hold.pidfd)
                os.close(hold.pidfd)
        self._holds.clear()

    # Ours

    async def _our_jobinit(self) -> Jobinit:
        return await asyncio.shield(self._current)

    def _spawn(self) -> None:
        self._spawned_at = time.monotonic()
        now = resource.getrlimit(resource.RLIMIT_NOFILE)
        with sealed_copy(self._binary) as program, listen(self._path) as listener:
            # It hands on to the jobs what it inherits.
            resource.setrlimit(resource.RLIMIT_NOFILE, self._jobs_open_files)
            try:
                spawn(program, listener, confines_all=self._confines_all)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, now)
            self._dialled[self._path] = dial(self._path)

    async def _greet(self, connection: socket) -> Jobinit:
        jobinit: Jobinit

        def lost() -> None:
            self._on_lost(jobinit)

        jobinit = await Jobinit.greet(connection, self._on_exited, lost)
        self._all.append(jobinit)
        log.info("jobinit is process %d", jobinit.pid)
        return jobinit

    def _hold(self, jobinit: Jobinit, job_id: int, started: Started | None) -> None:
        if started:
            before = self._holds.get(job_id)
            is_ended = before is not None and before.is_ended
            self._holds[job_id] = _Hold(jobinit, started.pid, started.pidfd, is_ended)
        else:
            self._holds.setdefault(job_id, _Hold(jobinit))

    def _on_exited(self, exited: Exited | Failed | OrphanExited) -> None:
        hold = self._holds.get(exited.job_id)
        if hold is None or hold.is_ended:
            return
        hold.is_ended = True
        if exited.job_id != TRIAL_ID:
            self._on_exit(exited)
        elif self._trial and not self._trial.done():
            self._trial.set_result(None)

    # Where one has died

    def _on_lost(self, jobinit: Jobinit) -> None:
        if self._is_closing or jobinit not in self._all:
            return
        self._all.remove(jobinit)
        bereaved = [job_id for job_id, hold in self._holds.items() if hold.jobinit is jobinit]
        log.critical(
            "jobinit (process %d) is gone; %d jobs of it go on", jobinit.pid, len(bereaved)
        )
        for job_id in bereaved:
            hold = self._holds[job_id]
            hold.jobinit = None
            if hold.is_ended:
                continue
            if hold.pidfd < 0:
                self._tell(job_id, None)
                continue
            self._orphans[hold.pid] = job_id
            self._loop.add_reader(hold.pidfd, self._on_orphan_ended, job_id)
        self._reap_all()
        if self._current.done() and self._current.result() is jobinit:
            self._current = self._loop.create_future()
            self._start_task(self._respawn())

    async def _wait_gone(self, pid: int) -> None:
        """For the moment between the end of a connection and that of the process."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # reaped already; or nothing can be told
            return
        gone = asyncio.Event()
        self._loop.add_reader(pidfd, gone.set)
        try:
            async with asyncio.timeout(GONE_SECONDS):
                await gone.wait()
        except TimeoutError:
            pass
        finally:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)

    async def _respawn(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._spawned_at + RESPAWN_SECONDS - time.monotonic()))
            try:
                self._spawn()
                jobinit = await self._greet(self._dialled.pop(self._path))
            except (JobWorkerError, OSError) as error:
                log.critical("no new jobinit, so no job can be started: %s", error)
                continue
            try:
                for view in self._views:
                    await jobinit.make_view(view)
            except JobinitError as error:
                log.critical("the new jobinit cannot start jobs: %s", error)
                await jobinit.close()
                self._all.remove(jobinit)
                continue
            log.warning("a new jobinit starts jobs")
            self._current.set_result(jobinit)
            return

    def _on_orphan_ended(self, job_id: int) -> None:
        hold = self._holds[job_id]
        self._loop.remove_reader(hold.pidfd)
        self._orphans.pop(hold.pid, None)
        try:
            self._tell(job_id, _reap(hold.pidfd))
        except ChildProcessError:  # not ours to reap
            self._start_task(self._ask_kernel(job_id, hold.pidfd))

    async def _ask_kernel(self, job_id: int, pidfd: int) -> None:
        wait_status = None
        for seconds in ASK_AGAIN_SECONDS:
            await asyncio.sleep(seconds)
            wait_status = _exit_of(pidfd)
            if wait_status is not None:
                break
        self._tell(job_id, wait_status)

    def _tell(self, job_id: int, wait_status: int | None) -> None:
        self._loop.call_soon(self._on_exited, OrphanExited(job_id, wait_status, time.time_ns()))

    def _on_child(self, *_: object) -> None:
        """SIGCHLD: as a sub-reaper this process also inherits what jobs leave behind."""
        self._loop.call_soon_threadsafe(self._reap_all)

    def _reap_all(self) -> None:
        # Its jobs are children of ours by now, and may be dead; but it may have more to say.
        if any(_is_dead_child(jobinit.pid) for jobinit in self._all):
            return  # `_on_lost` is about to come
        with contextlib.suppress(ChildProcessError):
            while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if dead.si_pid in self._orphans:
                    self._on_orphan_ended(self._orphans[dead.si_pid])
                else:
                    os.waitpid(dead.si_pid, os.WNOHANG)

    def _start_task(self, coroutine: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_dead_child(pid: int) -> bool:
    """Not reaped yet."""
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _reap(pidfd: int) -> int:
    """The wait status. Raises ChildProcessError where it is not our child."""
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    if ended is None:
        raise ChildProcessError
    if ended.si_code == os.CLD_EXITED:
        return ended.si_status << 8
    return ended.si_status | (0x80 if ended.si_code == os.CLD_DUMPED else 0)


def _exit_of(pidfd: int) -> int | None:
    """The wait status of a process that somebody else has reaped; None: not known (yet)."""
    info = bytearray(PIDFD_INFO.size)
    PIDFD_INFO.pack_into(info, 0, PIDFD_INFO_EXIT, 0)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:  # an older kernel, or not yet reaped
        return None
    mask, wait_status = PIDFD_INFO.unpack(info)
    return wait_status if mask & PIDFD_INFO_EXIT else None


def _digest(program: Path) -> str:
    """A jobinit that an older program has started may let jobs do what ours does not."""
    try:
        return sha256(program.read_bytes()).hexdigest()[:6]
    except OSError:  # told by who starts it
        return "none"


def _refusal(error: StartFailedError | ViewError) -> str:
    """Raises StartupError for what is none."""
    number = error.error_number
    # Where some namespaces are allowed, jobs may have all of them, also of jobs that have ended.
    if number in REFUSALS or (number == errno.ENOSPC and _takes_what_is_not_allowed(error)):
        return str(error)
    raise _not_known(error) from error


def _takes_what_is_not_allowed(error: StartFailedError | ViewError) -> bool:
    """A namespace of which there may be none. That there may be none of others, as of the network
    or of time on some machines, says nothing."""
    is_of_network = isinstance(error, StartFailedError) and error.step == "network"
    kinds = ("net",) if is_of_network else NAMESPACES
    if os.geteuid() != 0:
        kinds = ("user", *kinds)
    limits = (NAMESPACE_LIMITS / f"max_{kind}_namespaces" for kind in kinds)
    return any(int(limit.read_text()) == 0 for limit in limits if limit.exists())


def _not_known(error: Exception) -> StartupError:
    problem = str(error) or "a job that was to try it did not start in time"
    return StartupError(
        f"whether jobs can be separated from the machine is not known: {problem}; start again, or "
        "end the job that is in the way, by its cgroup.kill"
    )
