"""Each job's cgroup v2: what it may use, what is still alive in it, and what it has used.

    <base>/jobworker-<instance>/job-<id>/      one for each job
    <base>/jobworker-<instance>-server/        the server, where it was found in <base> itself

All functions block, if shortly, but for `Cgroup.wait_unpopulated`. Every file name and
format is from the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from jobworker import _fastio
from jobworker.engine.disks import disks_behind, sum_io
from jobworker.engine.mounts import Mount, mount_of, read_mounts
from jobworker.errors import CgroupError, LimitUnavailableError, StartupError, is_shortage
from jobworker.job import Accounting, Limits, OomKills

log = logging.getLogger(__name__)

CONTROLLERS = ("cpu", "memory", "io", "pids")

CPU_PERIOD_US = 100_000
# Where a job's command is likely to read and write, besides its working directory.
USUAL_DIRECTORIES = ("/", "/tmp", "/var/tmp")  # noqa: S108
# What a job that has just been killed, or has just failed to start, may take to be gone.
REMOVE_SECONDS = 10.0
KILLED_AT_ONCE = 64  # each takes a descriptor
LOOK_SECONDS = 0.05  # between looks at a cgroup, where the kernel cannot tell of its changes
NEXT_CHANGE = select.EPOLLPRI | select.EPOLLONESHOT
POPULATED = "populated 1"  # in cgroup.events: a process is alive in it, or below
# Their controllers may be off, and some are newer than others.
OPTIONAL_FILES = ("memory.swap.max", "memory.peak", "memory.events", "io.stat")

DELEGATE = (
    "run the server as root, or in a unit of systemd with Delegate=yes, with that unit's cgroup "
    "in JOB_WORKER_CGROUP_BASE"
)


class CgroupTree:
    """The cgroups of one server's jobs, below one directory."""

    def __init__(self, path: Path | None, problem: str, controllers: Mapping[str, str]) -> None:
        """path: None where there can be no cgroups; `problem` then says why, and what to do.
        controllers: by name, why each cannot be used; empty where it can."""
        self.path = path
        self.problem = problem
        self.controllers = controllers
        # Of these none need be looked for in a job's cgroup. A kernel without swap has no file to
        # limit it, and needs none.
        self._absent = frozenset(
            name for name in OPTIONAL_FILES if path is None or not (path / name).exists()
        )
        self._said: set[str] = set()

    @classmethod
    def open(cls, base: Path, instance: str) -> CgroupTree:
        """Makes the tree in the cgroup v2 at `base`, or `base`/unified (a hybrid mount).

        What is missing raises nothing: `problem` and `controllers` tell it. What passes, as where
        jobs have taken all descriptors, is no reason to go without: raises StartupError.
        """
        try:
            mount, directory = _find_v2(base)
            _move_server_out_of(directory, instance)
            path = _make_tree(mount, directory, instance)
            controllers = _enable_controllers(mount.point, path)
            if not controllers["pids"]:
                _leave_room(mount.point, path)
        except (CgroupError, OSError) as error:
            if is_shortage(error):
                raise StartupError(f"cannot look at the cgroups: {error}; start again") from error
            return cls(None, str(error), dict.fromkeys(CONTROLLERS, str(error)))
        _watch()  # jobs of the same user may leave it no thread later
        return cls(Path(path), "", controllers)

    def check(self, limits: Limits, working_directory: str) -> None:
        """Raises LimitUnavailableError for the first limit that could not be enforced."""
        for limit, controller, value in (
            ("maxCPU", "cpu", limits.cpu_percent),
            ("maxMemory", "memory", limits.memory_mib),
            ("maxIOBPS", "io", limits.io_bytes_per_second),
        ):
            if value and self.controllers[controller]:
                raise LimitUnavailableError(limit, controller, self.controllers[controller])
        if limits.io_bytes_per_second:
            _, problems = disks_behind((working_directory, *USUAL_DIRECTORIES))
            if problems:
                raise LimitUnavailableError("maxIOBPS", "io", problems[0])

    def of(self, job_id: int) -> Cgroup | None:
        """Where a job's cgroup is to be, or is; None where there can be none."""
        return Cgroup(self.path / f"job-{job_id}", self._absent) if self.path else None

    def find(self, job_id: int) -> Cgroup | None:
        """That of a job of an earlier server; None where there is none."""
        cgroup = self.of(job_id)
        return cgroup if cgroup and cgroup.path.exists() else None

    def leftovers(self) -> list[Cgroup]:
        """What an earlier server left. Its processes may still run."""
        if self.path is None:
            return []
        return [Cgroup(Path(path), self._absent) for path in _children(str(self.path))]

    def close(self) -> None:
        """Removes the tree, unless there are still jobs in it."""
        if self.path is None:
            return
        _remove_if_empty(str(self.path))

    def limit_files(self, limits: Limits, working_directory: str) -> tuple[tuple[str, str], ...]:
        """Which files of a job's cgroup put these limits in force, and what is to be written to
        them. Only what is limited: the start of a job is no place for needless system calls.
        Blocks where there is a limit on io."""
        files: list[tuple[str, str]] = []
        if limits.cpu_percent:
            quota_us = limits.cpu_percent * CPU_PERIOD_US // 100
            files.append(("cpu.max", f"{quota_us} {CPU_PERIOD_US}"))
        if limits.memory_mib:
            files.append(("memory.max", str(limits.memory_mib << 20)))
            files.append(("memory.oom.group", "1"))
            if "memory.swap.max" not in self._absent:
                files.append(("memory.swap.max", "0"))
        if limits.io_bytes_per_second:
            files += self._io_files(limits.io_bytes_per_second, working_directory)
        if limits.pids:
            files.append(("pids.max", str(limits.pids)))
        return tuple(files)

    def _io_files(self, bytes_per_second: int, working_directory: str) -> list[tuple[str, str]]:
        """Where no disk can be told, a limit that was asked for has been refused by `check`;
        a default one is left out, and said once."""
        disks, problems = disks_behind((working_directory, *USUAL_DIRECTORIES))
        for problem in problems:
            if problem not in self._said:
                self._said.add(problem)
                log.warning("jobs run without the default io limit: %s", problem)
        return [
            ("io.max", f"{disk} rbps={bytes_per_second} wbps={bytes_per_second}") for disk in disks
        ]


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One job's cgroup. To one that is gone already, everything here is harmless."""

    path: Path
    absent: frozenset[str] = field(default=frozenset(), compare=False)  # files it cannot have

    def kill(self) -> None:
        """All processes in it and below, those too that are just being forked."""
        # Before, as the kernel kills under a lock of all cgroups, and who has that may wait until
        # each process goes on that has used up its share of the processor.
        self._lift_cpu_limit()
        self._tell("cgroup.kill")
        self.lift_io_limits()
        self._kill_each()

    def _kill_each(self) -> None:
        """The kernel gives the signal to the first thread of each process (up to Linux 6.18 at
        least). Where that is ending, or has ended, the others are not told, and may even fork."""
        killed: set[tuple[str, int]] = set()
        while members := self._members() - killed:
            self._tell("cgroup.freeze")  # lest they fork faster than they are found
            for path, processes in itertools.groupby(sorted(members), itemgetter(0)):
                _kill_in(path, [pid for _, pid in processes])
            killed |= members
            self._tell("cgroup.kill")  # what they have forked before

    def _members(self) -> set[tuple[str, int]]:
        """The processes in it and below, also those that are ending, each with its cgroup."""
        paths = _with_descendants(str(self.path))
        return {(path, pid) for path in paths for pid in _processes(path) if pid}

    def _tell(self, name: str) -> None:
        try:
            _write(f"{self.path}/{name}", "1")
        except OSError as error:
            if not _is_gone(error):
                raise CgroupError(f"cannot kill {self.path}: {error.strerror}") from error

    def _lift_cpu_limit(self) -> None:
        """Each process takes a little of a processor to end, too."""
        with contextlib.suppress(CgroupError, OSError):
            if not (self._read("cpu.max") or "max").startswith("max"):
                _write(f"{self.path}/cpu.max", "max")

    def lift_io_limits(self) -> None:
        """No process ends while the kernel holds back what it has asked a disk for; and that goes
        on after the cgroup is removed, when nobody can lift them any more."""
        for line in (self._read("io.max") or "").splitlines():
            disk = line.split()[0]
            try:
                _write(f"{self.path}/io.max", f"{disk} rbps=max wbps=max")
            except OSError as error:
                if is_shortage(error):
                    raise

    def is_populated(self) -> bool:
        """Whether a process is alive in it or below."""
        events = self._read("cgroup.events")
        return events is not None and POPULATED in events

    async def wait_unpopulated(self, timeout_seconds: float) -> bool:
        """Whether all processes in it and below are gone, at the latest after the timeout."""
        if not self.is_populated():  # as mostly: a job is over when its main process is
            return True
        descriptor = self._open_events()
        if descriptor is None:
            return True
        try:
            if not _reads_populated(descriptor):
                return True
            return await _watch().wait(descriptor, timeout_seconds)
        finally:
            os.close(descriptor)

    def accounts(self) -> tuple[Accounting, OomKills]:
        """What it has used so far. Of I/O, what reached the disks while it was here."""
        cpu = _fields(self._read("cpu.stat"))
        peak = self._read("memory.peak")  # since Linux 5.19
        io = self._read("io.stat")
        read_bytes, written_bytes = sum_io(io) if io is not None else (None, None)
        events = _fields(self._read("memory.events"))
        accounting = Accounting(
            cpu_user_us=cpu.get("user_usec"),
            cpu_system_us=cpu.get("system_usec"),
            memory_peak_bytes=int(peak) if peak else None,
            io_read_bytes=read_bytes,
            io_written_bytes=written_bytes,
            oom_kills=events.get("oom_kill"),
        )
        return accounting, OomKills(events.get("oom", 0), events.get("oom_kill", 0))

    def remove(self) -> None:
        """With all cgroups that the job has made in it. Raises CgroupError where processes
        are in it that do not go away."""
        if remove_empty([self]) == [True]:
            return
        deadline = time.monotonic() + REMOVE_SECONDS
        for path in reversed(_with_descendants(str(self.path))):
            _remove_when_unpopulated(path, deadline)

    def _read(self, name: str) -> str | None:
        """None where there is no such file, as its controller is off or the kernel older."""
        if name in self.absent:
            return None
        try:
            return _read(f"{self.path}/{name}")
        except OSError as error:
            if _is_gone(error):
                return None
            raise CgroupError(f"cannot read {self.path}/{name}: {error.strerror}") from error

    def _open_events(self) -> int | None:
        """None: the cgroup is gone. The caller closes it."""
        try:
            return os.open(f"{self.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if _is_gone(error):
                return None
            raise CgroupError(f"cannot watch {self.path}: {error.strerror}") from error


def remove_empty(cgroups: list[Cgroup]) -> list[bool]:
    """At once. False for one in which processes or other cgroups are."""
    errors = _fastio.remove_folders([os.fsencode(cgroup.path) for cgroup in cgroups])
    return [error in {0, errno.ENOENT} for error in errors]


class _Watch:
    """Wakes the tasks whose cgroups have become empty.

    kernfs tells of a change by POLLPRI, but reports POLLIN always, which is all that an event
    loop asks for. So a thread of ours asks, for all loops. The loop could watch an epoll in
    its place, but for an epoll within another the kernel has one lock for the whole machine,
    which any process can keep for seconds.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wakes: dict[int, Callable[[], object]] = {}  # by open cgroup.events
        threading.Thread(target=self._run, name="cgroups", daemon=True).start()

    async def wait(self, descriptor: int, timeout_seconds: float) -> bool:
        """descriptor: a cgroup.events that has been read. What changed since then is seen."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._wait_unpopulated(descriptor)
        except TimeoutError:
            return False
        return True

    async def _wait_unpopulated(self, descriptor: int) -> None:
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._wakes[descriptor] = lambda: loop.call_soon_threadsafe(changed.set)
        try:
            try:
                self._epoll.register(descriptor, NEXT_CHANGE)
            except OSError:  # its user has no more watches: jobs that share it may have them all
                while _reads_populated(descriptor):  # noqa: ASYNC110 nothing else tells of it
                    await asyncio.sleep(LOOK_SECONDS)
                return
            while True:
                await changed.wait()
                changed.clear()
                # Reading it also makes the kernel wait for the next change.
                if not _reads_populated(descriptor):
                    return
                self._epoll.modify(descriptor, NEXT_CHANGE)
        finally:
            del self._wakes[descriptor]
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                # It may be another's by now, who then looks for nothing.
                wake = self._wakes.get(descriptor)
                if wake:
                    with contextlib.suppress(RuntimeError):  # its loop is closed
                        wake()


@functools.cache
def _watch() -> _Watch:
    """The one of this process."""
    return _Watch()


# Finding a place


def _find_v2(base: Path) -> tuple[Mount, str]:
    """The cgroup v2 mount, and the directory in it that is the base."""
    mounts = read_mounts()
    found = ""
    for directory in (base, base / "unified"):
        try:
            mount = mount_of(str(directory), mounts)
        except OSError as error:
            if is_shortage(error):
                raise
            found = found or (error.strerror or str(error))
            continue
        if mount.filesystem == "cgroup2":
            if os.statvfs(directory).f_flag & os.ST_RDONLY:
                raise CgroupError(f"{directory} is mounted read-only; mount it with rw")
            return mount, os.path.realpath(directory)
        found = found or f"its filesystem is {mount.filesystem}"
    raise CgroupError(
        f"{base} is no cgroup v2: {found}; give the directory of one in JOB_WORKER_CGROUP_BASE, "
        "or boot with cgroup_no_v1=all where the machine has only v1"
    )


def _move_server_out_of(base: str, instance: str) -> None:
    """No controller can be enabled below a cgroup that has processes in itself, but for the
    root. In a delegated subtree these are the server, jobinit, which is its child, and a child of
    that."""
    members = _processes(base)
    server = os.getpid()
    if server not in members or _is_root_cgroup(base):
        return
    leaf = f"{base}/jobworker-{instance}-server"
    try:
        _make_directory(leaf)
        for pid in members:
            if server in (pid, _parent(pid), _parent(_parent(pid))):
                _move(pid, leaf)
    except OSError as error:
        raise CgroupError(
            f"the server cannot move itself from {base} to {leaf}: {error.strerror}; " + DELEGATE
        ) from error


def _make_tree(mount: Mount, base: str, instance: str) -> str:
    path = f"{base}/jobworker-{instance}"
    try:
        _make_directory(path)
    except OSError as error:
        raise CgroupError(f"cannot make {path}: {_why_not_writable(error)}") from error
    if not os.path.exists(f"{path}/cgroup.kill"):
        _remove_if_empty(path)
        raise CgroupError(
            f"this kernel ({os.uname().release}) cannot kill a cgroup as a whole; "
            "use Linux 5.14 or newer"
        )
    # "domain invalid": somebody has enabled a controller above, beside processes.
    if _read(f"{path}/cgroup.type") != "domain\n":
        _remove_if_empty(path)
        raise CgroupError(f"no job can be in {path}: {_who_blocks(base) or base + ' is threaded'}")
    _check_jobs_can_be_moved(mount, path)
    return path


def _check_jobs_can_be_moved(mount: Mount, path: str) -> None:
    """The kernel lets a process move only within what its user may write: from where jobinit
    is, which is where the server is, to a job's cgroup, by way of their common parent."""
    server = _server_directory(mount)
    if server is None:
        return
    parent = os.path.commonpath([server, path])
    if not os.access(f"{parent}/cgroup.procs", os.W_OK, effective_ids=True):
        _remove_if_empty(path)
        raise CgroupError(
            f"this user may not move processes from {server}, where the server runs, to "
            f"{path}; start the server in a cgroup below {os.path.dirname(path)}, or as root"
        )


def _server_directory(mount: Mount) -> str | None:
    """None where it cannot be seen through this mount."""
    found = re.search(r"^0::(/.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    relative = os.path.relpath(found[1], mount.root) if found else ".."
    if relative.startswith(".."):
        return None
    return os.path.normpath(os.path.join(mount.point, relative))


# Controllers


def _enable_controllers(top: str, path: str) -> dict[str, str]:
    """For all that is below `path`. By name, why each cannot be used; empty where it can."""
    problems = dict.fromkeys(CONTROLLERS, "")
    for level in _levels(top, path):
        available = _read(f"{level}/cgroup.controllers").split()
        enabled = _read(f"{level}/cgroup.subtree_control").split()
        for name in CONTROLLERS:
            if problems[name] or name in enabled:
                continue
            if name in available:
                problems[name] = _enable(level, name)
            else:
                problems[name] = _why_absent(level, name)
    return problems


def _levels(top: str, bottom: str) -> list[str]:
    """`/a`, `/a/b`, `/a/b/c` for /a and /a/b/c."""
    levels = [bottom]
    while levels[-1] != top:
        levels.append(os.path.dirname(levels[-1]))
    return levels[::-1]


def _enable(level: str, name: str) -> str:
    """Returns why it cannot be done; empty where it was."""
    # The kernel would refuse memory and io, but not cpu and pids: these would make it a cgroup
    # of threads, and then no process could be moved to a job's.
    blocked = _who_blocks(level)
    if blocked:
        return blocked
    path = f"{level}/cgroup.subtree_control"
    try:
        _write(path, f"+{name}")
    except OSError as error:
        if is_shortage(error):
            raise
        return f"cannot write {path}: {_why_not_writable(error)}"
    return ""


def _leave_room(top: str, path: str) -> None:
    """Of the processes that a cgroup above may have, as TasksMax= of a unit sets them, all jobs
    together leave a quarter: to start others, to go on, and to be started again."""
    names = [f"{level}/pids.max" for level in _levels(top, path)[:-1]]
    # That of the whole machine has no such file.
    limits = [_read(name).strip() for name in names if os.path.exists(name)]
    numbers = [int(limit) for limit in limits if limit != "max"]
    room = str(min(numbers) * 3 // 4) if numbers else "max"
    _write(f"{path}/pids.max", room)


def _who_blocks(level: str) -> str:
    """Empty where no processes are in the way."""
    processes = _processes(level)
    if not processes or _is_root_cgroup(level):
        return ""
    return (
        f"processes are in {level} itself, and controllers are only for what is below a cgroup "
        f"without any: {_name_all(processes)}; move them to a cgroup of their own, or give "
        "another JOB_WORKER_CGROUP_BASE"
    )


def _why_not_writable(error: OSError) -> str:
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"no permission, as it is not delegated to this user; {DELEGATE}"
    return error.strerror or str(error)


def _why_absent(level: str, name: str) -> str:
    """level: the top of the mount, as everything below it gets what it enables."""
    if not _is_root_cgroup(level):
        return f"not delegated to {level}; enable it in the cgroup above that one"
    known = {"io": "blkio"}.get(name, name)  # by its name in cgroup v1
    for line in Path("/proc/cgroups").read_text().splitlines()[1:]:
        kernel_name, hierarchy, _, enabled = line.split()
        if kernel_name != known:
            continue
        if enabled == "0":
            return f"switched off by this machine; boot without cgroup_disable={known}"
        if hierarchy != "0":
            return "bound to cgroup v1 by this machine; boot with cgroup_no_v1=all"
    return "not built into this kernel"


# Cgroups as directories


def _is_root_cgroup(path: str) -> bool:
    """Of the whole machine: not that of a container, which has this file."""
    return not os.path.exists(f"{path}/cgroup.type")


def _children(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if _is_gone(error):
            return []
        raise CgroupError(f"cannot list {path}: {error.strerror}") from error


def _with_descendants(path: str) -> list[str]:
    """Each after the one that it is in. Without recursion, as jobs may nest them deeply."""
    paths = [path]
    for each in paths:
        paths += _children(each)
    return paths


def _remove_when_unpopulated(path: str, deadline: float) -> None:
    """deadline: on the monotonic clock."""
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno == errno.EBUSY and _wait_unpopulated(path, deadline):
                continue
            names = _name_all(_processes(path))
            raise CgroupError(
                f"cannot remove {path}: {error.strerror}; processes in it: {names or 'none'}"
            ) from error
        return


def _wait_unpopulated(path: str, deadline: float) -> bool:
    """As Cgroup.wait_unpopulated, for a thread. False where nothing is left to wait for."""
    try:
        descriptor = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return _is_gone(error)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLPRI)
        while _reads_populated(descriptor):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
        return time.monotonic() < deadline
    finally:
        os.close(descriptor)


def _reads_populated(descriptor: int) -> bool:
    """descriptor: an open cgroup.events."""
    try:
        return POPULATED in os.pread(descriptor, 256, 0).decode()
    except OSError as error:
        if _is_gone(error):
            return False
        raise


def _processes(path: str) -> list[int]:
    """0 is one of another PID namespace."""
    try:
        return [int(pid) for pid in Path(path, "cgroup.procs").read_text().split()]
    except OSError as error:
        if is_shortage(error):
            raise
        return []


def _kill_in(path: str, pids: list[int]) -> None:
    """All threads of each of them, unless its number is by now that of a process elsewhere."""
    for first in range(0, len(pids), KILLED_AT_ONCE):
        descriptors: dict[int, int] = {}
        try:
            for pid in pids[first : first + KILLED_AT_ONCE]:
                if (descriptor := _open_process(pid)) is not None:
                    descriptors[pid] = descriptor
            for pid in descriptors.keys() & set(_processes(path)):
                # Not allowed: of profile none, it has changed its user. The kernel's own way needs
                # no right over it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(descriptors[pid], signal.SIGKILL)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def _open_process(pid: int) -> int | None:
    """None: it has ended. Older kernels also say EINVAL where it does so just now."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in {errno.ESRCH, errno.EINVAL}:
            return None
        raise


def _move(pid: int, path: str) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        _write(f"{path}/cgroup.procs", str(pid))


def _parent(pid: int) -> int:
    """0 where it has ended, has none in sight, or nothing may be known of it."""
    try:
        stat = _read(f"/proc/{pid}/stat")
    except OSError as error:
        if is_shortage(error):
            raise
        return 0
    # The name stands in brackets, and may have any character in it.
    return int(stat.rpartition(")")[2].split()[1])


def _name_all(processes: list[int]) -> str:
    return ", ".join(f"{pid} ({_command(pid)})" for pid in processes)


def _command(pid: int) -> str:
    try:
        return _read(f"/proc/{pid}/comm").strip()
    except OSError:
        return "of another PID namespace" if pid == 0 else "ended"


def _is_gone(error: OSError) -> bool:
    """ENODEV: it was removed while the file was open."""
    return error.errno in {errno.ENOENT, errno.ENODEV}


# Files of the kernel. Plain system calls: pathlib and open() make three times as many.


def _make_directory(path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)


def _remove_if_empty(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def _read(path: str) -> str:
    """All of a file that has one value, or one for each line."""
    return os.fsdecode(_fastio.read_small(os.fsencode(path)))


def _fields(text: str | None) -> dict[str, int]:
    """Of a file of lines `name number`; others are passed over."""
    pairs = (line.split() for line in (text or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
