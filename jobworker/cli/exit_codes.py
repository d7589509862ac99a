"""With which code the program ends: a contract with the scripts that call it."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import click

from jobworker import errors


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    DENIED = 4
    UNREACHABLE = 5
    NOT_COMPLETED = 6
    TIMED_OUT = 124
    RUN_FAILED = 125
    NOT_EXECUTABLE = 126
    COMMAND_NOT_FOUND = 127
    INTERRUPTED = 130
    BROKEN_PIPE = 141


# For the documentation. `run` ends as its job has ended: `jobworker.cli.run` says how.
MEANINGS = {
    ExitCode.OK: "All went well.",
    ExitCode.FAILED: "The server refused or failed, or a file cannot be used; `create --from`, "
    "`rm`: one of many failed.",
    ExitCode.USAGE: "The command line can never work, or what it asks for.",
    ExitCode.NOT_FOUND: "There is no such job.",
    ExitCode.DENIED: "The certificate's role does not allow it (`run`: 125).",
    ExitCode.UNREACHABLE: "No connection, or no answer in time (`run`: 125).",
    ExitCode.NOT_COMPLETED: "`wait`: a job ended otherwise than COMPLETED.",
    ExitCode.TIMED_OUT: "`wait`: its time was over; `run`: the job's was.",
    ExitCode.RUN_FAILED: "`run`: its own errors, and a job whose ending cannot be known.",
    ExitCode.NOT_EXECUTABLE: "`run`: the job's command cannot be executed.",
    ExitCode.COMMAND_NOT_FOUND: "`run`: the server has no such command.",
    ExitCode.INTERRUPTED: "Ctrl-C. `run` stops its job first, and ends as that does: with 143 "
    "where SIGTERM has ended it; a second Ctrl-C leaves at once.",
    ExitCode.BROKEN_PIPE: "Nobody reads what is written any more, such as `head`.",
}

CODES: dict[type[errors.JobWorkerError], ExitCode] = {
    errors.RejectedError: ExitCode.USAGE,
    errors.InvalidRequestError: ExitCode.USAGE,
    errors.UnknownJobError: ExitCode.NOT_FOUND,
    errors.ForbiddenError: ExitCode.DENIED,
    errors.UnreachableError: ExitCode.UNREACHABLE,
    errors.DeadlineError: ExitCode.UNREACHABLE,
}


class FailedError(click.ClickException):
    """An error that ends the program with its own code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def one_line(error: click.ClickException) -> str:
    """What is wrong, and where to read what would be right."""
    # Of an option, and in newer versions of a command, that is misspelt.
    close = getattr(error, "possibilities", None) or ()
    message = " ".join((error.message if close else error.format_message()).split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message.rstrip('.')}{perhaps(close)}; see `{error.ctx.command_path} --help`"
    return message


def perhaps(close: Sequence[str]) -> str:
    """What may have been meant; "" where nothing is close."""
    return f", perhaps {' or '.join(close)}" if close else ""


# What the errors of servers call by the names of the protocol.
NAMES = {
    "maxCPU": "--max-cpu",
    "maxMemory": "--max-memory",
    "maxIOBPS": "--max-iobps",
    "max_cpu": "--max-cpu",
    "max_memory": "--max-memory",
    "max_iobps": "--max-iobps",
    "working_directory": "--workdir",
    "timeout_milliseconds": "--timeout",
    "time_limit": "--timeout",
    "from_offset": "--from-offset",
    "; stop it first": "; stop it first (`jobworker stop`)",
    "see ListJobs": "`jobworker list` shows them",
    "as cert and key": "with --cert and --key",
    "of the certificates as certs": "of the certificates with --certs (or JOB_WORKER_CERT_PATH)",
}

# The fields of a request that an error starts with.
FIELDS = re.compile(
    r"(user|profile|network|root|stdin|name|environment|binds)(\[\d+\]\.\w+)?(?=: )"
)
FLAGS = {"environment": "--env", "binds": "--bind"}  # the others are called like the field

# In a context's `meta`: what to add where no connection came about, and where certificates may
# be why.
HINT = "jobworker.hint"
CERTIFICATES_HINT = "jobworker.certificates_hint"

# What is wrong may be the certificates.
OF_CERTIFICATES = re.compile(r"certificate|\bCA\b|\.pem\b")

# A command of several words in one, which is what `sh -c` wants and no file's name.
# The part before the first such character holds none, so that there is but one way to look: a
# server's words may be long.
SHELL_LINE = re.compile(
    r"command: (['\"])[^\s|&;<>$]*[\s|&;<>$].*\1 (was not found|does not exist)"
)


def message_of(error: errors.JobWorkerError) -> str:
    """In the words of the command line."""
    message = str(error)
    if field := FIELDS.match(message):
        message = FLAGS.get(field[1], f"--{field[1]}") + message[field.end() :]
    for name, flag in NAMES.items():
        message = message.replace(name, flag)
    if SHELL_LINE.match(message):
        message += "; for a shell line: sh -c '…'"
    context = click.get_current_context(silent=True)
    if not context or not _is_unconnected(error):
        return message
    hint = context.meta.get(HINT)
    if isinstance(error, errors.CertificateError) or OF_CERTIFICATES.search(message):
        hint = context.meta.get(CERTIFICATES_HINT) or hint
    return f"{message}; {hint}" if hint else message


def os_message(error: OSError) -> str:
    """Of one that nothing has put into words: with a file's name it is about that, and else about
    what was written."""
    problem = error.strerror or str(error)
    return f"{error.filename}: {problem}" if error.filename else f"cannot write: {problem}"


def _is_unconnected(error: errors.JobWorkerError) -> bool:
    if isinstance(error, errors.UnreachableError):
        return not error.was_connected
    return isinstance(error, errors.CertificateError)


def code_of(error: errors.JobWorkerError) -> ExitCode:
    return CODES.get(type(error), ExitCode.FAILED)
