"""What is executed: which file a command names, and with which environment."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping

from jobworker.engine.user import User
from jobworker.errors import InvalidRequestError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


HOME_OF_THE_HOMELESS = "/tmp"  # noqa: S108 such as nobody, who could write nothing in `/`


def base_environment(job_id: int, user: User) -> dict[str, str]:
    """The variables that every job gets; a request's own are stronger. Nothing of the
    server's environment is among them."""
    return {
        "PATH": PATH,
        "HOME": user.home if os.path.isdir(user.home) else HOME_OF_THE_HOMELESS,
        "USER": user.name,
        "LOGNAME": user.name,
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "JOB_ID": str(job_id),
    }


def check_working_directory(path: str) -> None:
    """Raises InvalidRequestError unless it is a directory that the user of this thread may
    enter."""
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


def resolve(command: str, environment: Mapping[str, str], working_directory: str) -> str:
    """The absolute path of the executable that a shell in the job's place would find, with
    the rights of this thread's user.

    Raises InvalidRequestError where there is none.
    """
    if "/" in command:
        path = os.path.normpath(os.path.join(working_directory, command))
        number, problem = _problem_with(path)
        if problem:
            raise InvalidRequestError("command", f"{command!r} {problem}", number)
        return path
    search = environment.get("PATH", PATH)
    is_public = "PATH" not in environment  # values that a client gave are in no message
    best_number, best_problem = errno.ENOENT, ""
    for folder in search.split(":"):
        path = os.path.join(working_directory, folder, command)
        number, problem = _problem_with(path)
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


def _problem_with(path: str) -> tuple[int, str]:
    """Why this file cannot be executed, as errno and in words; 0 and no word where it can."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return errno.ENOENT, NOT_FOUND
    except OSError as error:
        return error.errno or errno.EIO, f"cannot be looked at: {error.strerror}"
    if stat.S_ISDIR(mode):
        return errno.EISDIR, "is a directory; give the program in it"
    if not stat.S_ISREG(mode):
        return errno.EACCES, "is not a regular file"
    if not os.access(path, os.X_OK, effective_ids=True):
        remedy = "use chmod +x, or name its interpreter as the command"
        return errno.EACCES, f"is not executable by its user; {remedy}"
    return 0, ""
