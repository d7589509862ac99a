"""What is executed: which file a command names, and with which environment."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping

from jobworker.engine.user import User
from jobworker.errors import InvalidRequestError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


HOME_OF_THE_HOMELESS = "/tmp"  # noqa: S108 such as nobody, who could write nothing in `/`


Sees = Callable[[str], bool]  # whether what is at a path here is there for the job too


def sees_all(_: str) -> bool:
    return True


def base_environment(job_id: int, user: User, sees: Sees = sees_all) -> dict[str, str]:
    """The variables that every job gets; a request's own are stronger. Nothing of the
    server's environment is among them."""
    return {
        "PATH": PATH,
        "HOME": user.home if sees(user.home) and os.path.isdir(user.home) else HOME_OF_THE_HOMELESS,
        "USER": user.name,
        "LOGNAME": user.name,
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "JOB_ID": str(job_id),
    }


def check_working_directory(path: str, sees: Sees = sees_all) -> None:
    """Raises InvalidRequestError unless it is a directory that the user of this thread may
    enter, and that is there for the job."""
    if not sees(path):
        raise InvalidRequestError("working_directory", f"{path!r} is not there: {NOT_SEEN}")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        problem = f"{path!r}: {error.strerror}; give a directory that exists on the server"
        raise InvalidRequestError("working_directory", problem) from error
    if not stat.S_ISDIR(mode):
        problem = f"{path!r} is not a directory; give one that exists on the server"
        raise InvalidRequestError("working_directory", problem)
    if not os.access(path, os.X_OK, effective_ids=True):
        problem = f"{path!r} cannot be entered by the job's user; give one that can"
        raise InvalidRequestError("working_directory", problem)


def resolve(
    command: str,
    environment: Mapping[str, str],
    working_directory: str,
    sees: Sees = sees_all,
) -> str:
    """The absolute path of the executable that a shell in the job's place would find, with
    the rights of this thread's user.

    Raises InvalidRequestError where there is none.
    """
    if "/" in command:
        path = os.path.normpath(os.path.join(working_directory, command))
        number, problem = _problem_with(path, sees)
        if problem:
            raise InvalidRequestError("command", f"{command!r} {problem}", number)
        return path
    search = environment.get("PATH", PATH)
    is_public = "PATH" not in environment  # values that a client gave are in no message
    best_number, best_problem = errno.ENOENT, ""
    for folder in search.split(":"):
        path = os.path.join(working_directory, folder, command)
        number, problem = _problem_with(path, sees)
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


NOT_FOUND = "does not exist on the server"
NOT_REGULAR = "is not a regular file"
NOT_SEEN = "this job's profile does not show it"


def _problem_with(path: str, sees: Sees) -> tuple[int, str]:
    """Why this file cannot be executed, as errno and in words; 0 and no word where it can."""
    if not sees(path):
        return errno.ENOENT, f"is not there: {NOT_SEEN}"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return errno.ENOENT, NOT_FOUND
    except OSError as error:
        return error.errno or errno.EIO, f"cannot be looked at: {error.strerror}"
    if not stat.S_ISREG(mode):
        is_directory = stat.S_ISDIR(mode)
        number = errno.EISDIR if is_directory else errno.EACCES
        return number, "is a directory; give the program in it" if is_directory else NOT_REGULAR
    if not os.access(path, os.X_OK, effective_ids=True):
        remedy = "use chmod +x, or name its interpreter as the command"
        return errno.EACCES, f"is not executable by its user; {remedy}"
    return 0, ""
