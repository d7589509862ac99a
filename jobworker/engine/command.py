"""What is executed: which file a command names, and with which environment."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jobworker.engine.files import NOT_SEEN
from jobworker.engine.user import User
from jobworker.errors import InvalidRequestError


class Seen(NamedTuple):
    """What there is at a path."""

    mode: int
    may_execute: bool  # a file, or enter a directory: this thread's user
    place: str = ""  # its path without symbolic links; empty: not known


# Raises OSError.
Look = Callable[[str], Seen]

libc = ctypes.CDLL(None, use_errno=True)
CALL_OPENAT2, CALL_FACCESSAT2 = 437, 439
AT_FDCWD = -100
AS_EFFECTIVE_USER, OF_DESCRIPTOR = 0x200, 0x1000  # AT_EACCESS, AT_EMPTY_PATH
# struct open_how: flags, mode, RESOLVE_CACHED (since Linux 5.12).
ONLY_CACHED = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, 0x20)
# What a path itself can be refused for; anything else may be for want of what is not in memory.
REFUSALS = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}

MOST_FOLDERS = 100  # of a PATH: each is a look, or several, at the machine
# Of this thread's CPU, for all folders of a PATH: mostly some 2 ms, but links that lead through
# links make a single look take 3 ms.
LONGEST_SEARCH_SECONDS = 0.05
# Above a path that is not there; each look may take as long, and a path can have 2,000 parts.
MOST_LOOKS_ABOVE = 4
LONGEST_PATH_BYTES = 4095
TOO_LONG = f"{os.strerror(errno.ENAMETOOLONG)}; use at most {LONGEST_PATH_BYTES} bytes"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


HOME_OF_THE_HOMELESS = "/tmp"  # noqa: S108 such as nobody, who could write nothing in `/`


# Where this process finds what the job finds at a path, whose place may be known; None: the job
# does not see it.
Find = Callable[[str, str], str | None]


def as_here(path: str, _place: str) -> str | None:
    return path


def look_on_disk(path: str) -> Seen:
    return Seen(os.stat(path).st_mode, os.access(path, os.X_OK, effective_ids=True))


def look_in_memory(path: str) -> Seen:
    """Where a disk must be asked first it raises BlockingIOError at once. The path is followed
    once only: a job may change where it leads."""
    descriptor = libc.syscall(
        CALL_OPENAT2, AT_FDCWD, os.fsencode(path), ONLY_CACHED, ctypes.sizeof(ONLY_CACHED)
    )
    if descriptor < 0:
        number = ctypes.get_errno()
        if number not in REFUSALS:
            number = errno.EAGAIN
        raise OSError(number, os.strerror(number), path)
    try:
        refused = libc.syscall(
            CALL_FACCESSAT2, descriptor, b"", os.X_OK, AS_EFFECTIVE_USER | OF_DESCRIPTOR
        )
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        return Seen(os.fstat(descriptor).st_mode, not refused, place)
    finally:
        os.close(descriptor)


def base_environment(job_id: int, user: User, home: str) -> dict[str, str]:
    """The variables that every job gets; a request's own are stronger. Nothing of the
    server's environment is among them. home: of `home_of`."""
    return {
        "PATH": PATH,
        "HOME": home,
        "USER": user.name,
        "LOGNAME": user.name,
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "JOB_ID": str(job_id),
    }


def home_of(user: User, find: Find = as_here, look: Look = look_on_disk) -> str:
    """The user's own, where the job finds a directory there."""
    seen = _see(user.home, find, look, is_told_why_not=False)
    has_one = isinstance(seen, Seen) and stat.S_ISDIR(seen.mode)
    return user.home if has_one else HOME_OF_THE_HOMELESS


def check_working_directory(path: str, find: Find = as_here, look: Look = look_on_disk) -> None:
    """Raises InvalidRequestError unless it is a directory that the user of this thread may
    enter, and that is there for the job."""
    if path == "/":  # the usual one
        return
    if _is_too_long(path):
        raise InvalidRequestError("working_directory", TOO_LONG)
    seen = _see(path, find, look)
    if seen is None:
        raise InvalidRequestError("working_directory", f"{path!r} is not there: {NOT_SEEN}")
    if isinstance(seen, OSError):
        problem = f"{path!r}: {seen.strerror}; give a directory that exists on the server"
        raise InvalidRequestError("working_directory", problem) from seen
    if not stat.S_ISDIR(seen.mode):
        problem = f"{path!r} is not a directory; give one that exists on the server"
        raise InvalidRequestError("working_directory", problem)
    if not seen.may_execute:
        problem = f"{path!r} cannot be entered by the job's user; give one that can"
        raise InvalidRequestError("working_directory", problem)


def resolve(
    command: str,
    environment: Mapping[str, str],
    working_directory: str,
    find: Find = as_here,
    look: Look = look_on_disk,
) -> str:
    """The absolute path of the executable that a shell in the job's place would find, with
    the rights of this thread's user.

    Raises InvalidRequestError where there is none.
    """
    if _is_too_long(command):  # to tell of each folder that it is so would take long
        raise InvalidRequestError("command", TOO_LONG, errno.ENAMETOOLONG)
    if "/" in command:
        path = os.path.join(working_directory, command)
        if ".." not in path.split("/"):  # above a link that is another folder than where it leads
            path = os.path.normpath(path)
        number, problem = _problem_with(path, find, look)
        if problem:
            raise InvalidRequestError("command", f"{command!r} {problem}", number)
        return path
    search = environment.get("PATH", PATH)
    is_public = "PATH" not in environment  # values that a client gave are in no message
    best_number, best_problem = errno.ENOENT, ""
    folders = search.split(":")
    if len(folders) > MOST_FOLDERS:
        problem = f"PATH has {len(folders)} folders, and at most {MOST_FOLDERS} are searched"
        raise InvalidRequestError("environment", f"{problem}; give the command's full path")
    latest = 0.0 if is_public else time.thread_time() + LONGEST_SEARCH_SECONDS
    for folder in folders:
        if not is_public and time.thread_time() > latest:
            problem = "PATH takes too long to search, as where links lead through many others"
            raise InvalidRequestError("environment", f"{problem}; give the command's full path")
        path = os.path.join(working_directory, folder, command)
        number, problem = _problem_with(path, find, look)
        if not problem:
            return path
        if problem != NOT_FOUND:
            found = repr(path) if is_public else f"{command!r}, in the job's PATH,"
            best_number, best_problem = number, f"{found} {problem}"
    raise InvalidRequestError(
        "command",
        best_problem
        or f"{command!r} was not found in the job's PATH{f' ({search})' if is_public else ''}; "
        "give its full path, or a PATH in the environment",
        best_number,
    )


def _see(
    path: str, find: Find, look: Look, *, is_told_why_not: bool = True
) -> Seen | OSError | None:
    """What there is, or why it cannot be looked at; None: the job does not see it. Raises
    BlockingIOError."""
    if _is_too_long(path):  # nowhere is there anything by that name
        return OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if look is look_on_disk:
        found = find(path, "")
        return None if found is None else _try(look, found)
    # `find` follows a path by hand, which may block; but not where its place is known.
    seen = _try(look, path)
    if isinstance(seen, OSError) and not is_told_why_not:
        return seen
    place = seen.place if isinstance(seen, Seen) else _place_of_missing(path, look)
    return None if find(path, place) is None else seen


def _is_too_long(path: str) -> bool:
    return len(os.fsencode(path)) > LONGEST_PATH_BYTES


def _place_of_missing(path: str, look: Look) -> str:
    """Where it would be: of what the job does not see, it is not told which names there are.
    Raises BlockingIOError, also where that would take long."""
    end = len(path)
    for _ in range(MOST_LOOKS_ABOVE):
        end = path.rindex("/", 0, end)
        above = _try(look, path[:end] or "/")
        if isinstance(above, Seen):
            return above.place.rstrip("/") + path[end:]
    raise BlockingIOError


def _try(look: Look, path: str) -> Seen | OSError:
    """Raises BlockingIOError."""
    try:
        return look(path)
    except BlockingIOError:
        raise
    except OSError as error:
        # Which would keep the request, by the frames in it, until the collector comes.
        return error.with_traceback(None)


NOT_FOUND = "does not exist on the server"
NOT_REGULAR = "is not a regular file"


def _problem_with(path: str, find: Find, look: Look) -> tuple[int, str]:
    """Why this file cannot be executed, as errno and in words; 0 and no word where it can."""
    seen = _see(path, find, look)
    if seen is None:
        return errno.ENOENT, f"is not there: {NOT_SEEN}"
    if isinstance(seen, FileNotFoundError | NotADirectoryError):
        return errno.ENOENT, NOT_FOUND
    if isinstance(seen, OSError):
        return seen.errno or errno.EIO, f"cannot be looked at: {seen.strerror}"
    if not stat.S_ISREG(seen.mode):
        is_directory = stat.S_ISDIR(seen.mode)
        number = errno.EISDIR if is_directory else errno.EACCES
        return number, "is a directory; give the program in it" if is_directory else NOT_REGULAR
    if not seen.may_execute:
        remedy = "use chmod +x, or name its interpreter as the command"
        return errno.EACCES, f"is not executable by its user; {remedy}"
    return 0, ""
