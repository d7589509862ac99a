"""What is executed: which file a command names, and with which environment."""

from __future__ import annotations

import functools
import os
import pwd
import stat
from collections.abc import Mapping

from jobworker.errors import InvalidRequestError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def base_environment(job_id: int) -> dict[str, str]:
    """The variables that every job gets; a request's own are stronger. Nothing of the
    server's environment is among them."""
    return _of_user(os.getuid()) | {"JOB_ID": str(job_id)}


@functools.cache
def _of_user(user_id: int) -> dict[str, str]:
    name, home = _name_and_home(user_id)
    return {
        "PATH": PATH,
        "HOME": home,
        "USER": name,
        "LOGNAME": name,
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
    }


def _name_and_home(user_id: int) -> tuple[str, str]:
    try:
        user = pwd.getpwuid(user_id)
    except KeyError:  # as in a container that runs with any number for a user
        return str(user_id), "/"
    return user.pw_name, user.pw_dir


def check_working_directory(path: str) -> None:
    """Raises InvalidRequestError unless it is a directory."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        problem = f"{path!r}: {error.strerror}; give a directory that exists on the server"
        raise InvalidRequestError("working_directory", problem) from error
    if not stat.S_ISDIR(mode):
        problem = f"{path!r} is not a directory; give one that exists on the server"
        raise InvalidRequestError("working_directory", problem)


def resolve(command: str, environment: Mapping[str, str], working_directory: str) -> str:
    """The absolute path of the executable that a shell in the job's place would find.

    Raises InvalidRequestError where there is none.
    """
    if "/" in command:
        path = os.path.normpath(os.path.join(working_directory, command))
        problem = _problem_with(path)
        if problem:
            raise InvalidRequestError("command", f"{command!r} {problem}")
        return path
    search = environment.get("PATH", PATH)
    best_problem = ""
    for folder in search.split(":"):
        path = os.path.join(working_directory, folder, command)
        problem = _problem_with(path)
        if not problem:
            return path
        if problem != NOT_FOUND:
            best_problem = f"{path!r} {problem}"
    raise InvalidRequestError(
        "command",
        best_problem
        or f"{command!r} was not found in the job's PATH ({search}); "
        "give its full path, or a PATH in the environment",
    )


NOT_FOUND = "does not exist on the server"


def _problem_with(path: str) -> str:
    """Why this file cannot be executed; empty where it can."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return NOT_FOUND
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "is a directory; give the program in it"
    if not stat.S_ISREG(mode):
        return "is not a regular file"
    if not os.access(path, os.X_OK):
        return "is not executable; use chmod +x, or name its interpreter as the command"
    return ""
