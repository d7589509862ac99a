"""What attacks are made of. It runs inside of a job, with nothing but the standard library.

An attack is a function that takes the scene (what it is about, by name). It returns in words what
it got, or raises OSError where the kernel refused; Missing (or OSError with ENOENT or ENOSYS) where
there is no such thing here.
They run in processes that the job forks for them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10  # of one attack, before it counts as hung
MOST_AT_ONCE = 200
# All of these change what makes them: its rights, its namespaces.
CHANGING = {"privileges", "view"}
libc = ctypes.CDLL(None, use_errno=True)

Scene = dict[str, Any]
Function = Callable[[Scene], str]


class Missing(Exception):  # noqa: N818 it is no error
    """This kernel, or this machine, has nothing of that kind."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One way out, and what is claimed about it."""

    name: str
    function: Function
    # The profiles that defend against it. "none" is among them where it fails without any.
    held_by: tuple[str, ...]
    # Shown to work where nothing defends as root, or as the unprivileged user that jobs are:
    # what only the uid prevents, or what more than that has to.
    shown_as: str
    # It harms where it succeeds: for a kernel of its own.
    is_harmful: bool
    # The process that makes it is of no use for others afterwards.
    changes_itself: bool
    # A capability without which it fails where nothing defends, and shows nothing; -1: none.
    needs: int


ATTACKS: dict[str, Attack] = {}


def attack(
    *,
    name: str = "",
    held_by: tuple[str, ...] = ("default", "strict"),
    shown_as: str = "root",
    is_harmful: bool = False,
    changes_itself: bool = False,
    needs: int = -1,
) -> Callable[[Function], Function]:
    """Registers a function, as `module.function` or as `module.name`."""

    def register(function: Function) -> Function:
        area = function.__module__.rpartition(".")[2]
        full = f"{area}: {name or function.__name__.replace('_', ' ')}"
        assert full not in ATTACKS, full
        is_changing = changes_itself or area in CHANGING
        ATTACKS[full] = Attack(full, function, held_by, shown_as, is_harmful, is_changing, needs)
        return function

    return register


def main() -> None:
    """In the job: all attacks that the scene names, and for each verdict a line of JSON."""
    descriptors = _open_descriptors()
    with zipfile.ZipFile(sys.argv[0]) as archive:
        scene = json.loads(archive.read("scene.json"))
    scene["descriptors"] = descriptors
    left = list(scene["attacks"])
    while left:
        left = left[_make_some(left, scene) :]


def _open_descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # of the listing itself
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def _make_some(names: list[str], scene: Scene) -> int:
    """In a process of its own, up to one that changes or ends it. Returns how many they were."""
    done = mmap.mmap(-1, 1)  # shared with that process
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        for name in names:
            signal.alarm(SECONDS)
            verdict = _made(ATTACKS[name].function, scene)
            _report(name, *verdict)
            done[0] += 1
            may_have_changed = verdict[0] == "worked" or not scene["is_defended"]
            if (ATTACKS[name].changes_itself and may_have_changed) or done[0] == MOST_AT_ONCE:
                break
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it has started, and left
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        word = "hung" if number == signal.SIGALRM else "refused"
        _report(names[done[0]], word, f"killed by signal {number}")
        done[0] += 1
    return done[0]


def _report(name: str, word: str, reason: str) -> None:
    os.write(1, json.dumps([name, word, reason]).encode() + b"\n")


def _made(function: Function, scene: Scene) -> list[str]:
    try:
        return ["worked", function(scene)[:500]]
    except Missing as missing:
        return ["missing", str(missing)]
    except OSError as error:
        is_missing = error.errno in {errno.ENOENT, errno.ENOSYS}
        return ["missing" if is_missing else "refused", str(error)]
    except Exception as error:  # noqa: BLE001 a mistake in the attack itself is no defence
        return ["broken", repr(error)]


# What many of them do


def checked(result: int, what: str) -> int:
    """Raises OSError where a call of the C library failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def system_call(what: str, number: int, *arguments: Any) -> int:
    """Of x86-64. All arguments are 64 bits wide."""
    if platform.machine() != "x86_64":
        raise Missing("the numbers of these calls are those of x86-64")
    ctypes.set_errno(0)
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *wide), what)


REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSYS}


def considered(what: str, number: int, *arguments: Any) -> str:
    """Of a call whose arguments make no sense, so that it does no harm: did the kernel look at
    these, or refuse it at once?"""
    try:
        system_call(what, number, *arguments)
    except OSError as error:
        if error.errno in REFUSALS:
            raise
        return f"{what}: only its arguments were refused: {error}"
    return f"{what}: done"


def write_attempt(path: str | Path) -> str:
    """Opened for writing, and not written to."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        # Both come after the permission: a program that runs; a queue that nobody reads.
        if error.errno not in {errno.ETXTBSY, errno.ENXIO}:
            raise
    return f"may write {path}"


def create_attempt(folder: str | Path) -> str:
    """A file without a name, which is gone as it is closed."""
    try:
        os.close(os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # which comes after the permission, too
            raise
    return f"may create files in {folder}"


def read_attempt(path: str | Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        data = file.read(8192)
    if not data:
        raise Missing(f"{path} is empty")
    return f"read {data[:12]!r} from {path}"


def first_of(attempts: Iterator[Callable[[], str]]) -> str:
    """Of many ways to the same thing. Raises the last refusal where none works."""
    refusal: Exception = Missing("nothing to try")
    for attempt in attempts:
        try:
            return attempt()
        except (OSError, Missing) as error:
            if not isinstance(error, FileNotFoundError) or isinstance(refusal, Missing):
                refusal = error
    raise refusal


def foreign_processes() -> Iterator[int]:
    """All that /proc shows and that are not of this job."""
    own = cgroup_of("self")
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and cgroup_of(name) != own:
                yield int(name)


def cgroup_of(process: int | str) -> str:
    """In which only the processes of one job are. Also of a kernel's thread: in none at all."""
    lines = Path(f"/proc/{process}/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::"))


def not_of_this_job(pid: int) -> int:
    """The number, where the process that has it here is somebody else's."""
    with suppress(FileNotFoundError):
        if cgroup_of(pid) == cgroup_of("self"):
            raise ProcessLookupError(errno.ESRCH, f"here {pid} is a process of the job's own")
    return pid
