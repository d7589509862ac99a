"""`jobworker run`: a job as if it ran here: its output, its exit code, Ctrl-C."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import click

from jobworker.cli import display
from jobworker.cli.connection import Connect, speaks_to_server
from jobworker.cli.display import json_option, remark
from jobworker.cli.exit_codes import ExitCode, FailedError, message_of, one_line, os_message
from jobworker.cli.jobs import VERBATIM, CommandWords, job_options
from jobworker.cli.stream import JsonWriter, SplitWriter, Writer, retry_option, telling_lost
from jobworker.errors import JobWorkerError, RejectedError, WrongStateError
from jobworker.job import Cause, Job, Status

if TYPE_CHECKING:
    from jobworker.client import Client

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Two Ctrl-C in a row: the request to stop gets out before this program is gone.
SENDING_SECONDS = 1.5
FROM_SIGNAL = 128  # as shells say it: 128 + its number


class RunCommand(click.Command):
    """Its own errors have codes of their own, lest a job's code be taken for one of them."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except click.ClickException as error:
            raise FailedError(one_line(error), ExitCode.RUN_FAILED) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except JobWorkerError as error:
            raise FailedError(message_of(error), code_of_failure(error)) from error
        except OSError as error:
            raise FailedError(os_message(error), ExitCode.RUN_FAILED) from error
        except click.ClickException as error:
            raise FailedError(str(error), ExitCode.RUN_FAILED) from error


@click.command(
    "run",
    cls=RunCommand,
    context_settings=VERBATIM,
    options_metavar="[OPTIONS] [--]",
    epilog="Exit code: the job's, or 128 + the signal that ended it; 126 or 127 if its command "
    "cannot be executed or found, 124 if its time was over, 125 for errors of jobworker itself "
    "and where the ending cannot be known. A job that was stopped never gives 0.",
)
@retry_option
@json_option
@job_options
@click.argument("command", nargs=-1, required=True, type=CommandWords())
@speaks_to_server
def run_command(
    connect: Connect,
    retry_seconds: float,
    as_json: bool,
    command: tuple[str, ...],
    **options: Any,
) -> None:
    """Runs a job as if it ran here: output, exit code, Ctrl-C.

    What it writes to stdout and stderr is written to stdout and stderr. Ctrl-C stops the job
    (so do SIGTERM and SIGHUP), and a second one leaves at once. Its standard input is empty:
    --stdin - hands on that of this program, read to its end before the job starts. With -o json
    the output is written as `stream -o json` does.
    """
    writer = JsonWriter() if as_json else SplitWriter()
    with connect(patience_seconds=retry_seconds) as client, Interrupts(client) as interrupts:
        job = client.create(*command, **options)
        interrupts.stop_when_asked(job.id)
        try:
            ending = _follow(client, job, writer)
        except JobWorkerError as error:
            problem = f"job {job.id} may still run, `jobworker stream {job.id}` follows it"
            raise click.ClickException(f"{message_of(error)}; {problem}") from error
    if not as_json:
        _explain(ending)
    click.get_current_context().exit(code_of_job(ending))


def _follow(client: Client, job: Job, writer: Writer) -> Job:
    """Its output up to its end."""
    try:
        with telling_lost(client.stream(job.id)) as chunks:
            for chunk in chunks:
                writer.write(chunk)
                if chunk.ending:
                    return chunk.ending
    except OSError:
        # As a program does that runs here, where nobody reads it, or a disk is full.
        client.stop(job.id)
        raise
    raise AssertionError("a stream that follows has an ending")


class Interrupts:
    """Within it, the first Ctrl-C asks the server to stop the job, whose last output and ending
    are still waited for; the second ends this program."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._job_id: int | None = None
        self._is_asked = False
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # Under nohup, SIGHUP is ignored, and stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_when_asked(self, job_id: int) -> None:
        """From now on, and also if it was asked for while the job was being created."""
        self._job_id = job_id
        if self._is_asked:
            self._start_stopping(job_id)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._is_asked:
            time.sleep(max(0.0, self._asked_at + SENDING_SECONDS - time.monotonic()))
            os._exit(FROM_SIGNAL + number)
        self._is_asked = True
        self._asked_at = time.monotonic()
        if self._job_id is not None:
            self._start_stopping(self._job_id)

    def _start_stopping(self, job_id: int) -> None:
        # First of all: while the rest is told, the second Ctrl-C may come, and end all.
        threading.Thread(target=self._stop, args=(job_id,), daemon=True).start()
        if display.is_terminal(sys.stderr):
            click.echo(err=True)
            remark(f"stopping job {job_id}; Ctrl-C again leaves it")

    def _stop(self, job_id: int) -> None:
        try:
            self._client.stop(job_id)
        except JobWorkerError as error:
            # That it has ended meanwhile is what was wanted.
            if not isinstance(error, WrongStateError):
                remark(f"job {job_id} was not stopped: {error}")


# Exit codes

CODES_OF_CAUSES = {Cause.LOST: ExitCode.RUN_FAILED, Cause.TIMED_OUT: ExitCode.TIMED_OUT}


def code_of_job(job: Job) -> int:
    """As the contract's table says.

    Only COMPLETED comes to 0: a job that was stopped, or ended by the server, and that left
    with 0 upon that, is like one that SIGTERM has ended. Nor do numbers that no process ends with,
    of which exit(3) takes the lowest eight bits.
    """
    code = _code_of_job(job)
    is_possible = 0 < code < 256 or (code == 0 and job.status is Status.COMPLETED)
    return code if is_possible else ExitCode.RUN_FAILED


def _code_of_job(job: Job) -> int:
    if job.cause in CODES_OF_CAUSES:
        return CODES_OF_CAUSES[job.cause]
    if job.cause is Cause.START_FAILED:
        return _code_of_errno(job.failed_errno)
    if job.signal:
        return FROM_SIGNAL + job.signal
    if job.exit_code > 0 or job.status is Status.COMPLETED:
        return job.exit_code
    if job.exit_code == 0 or job.status is Status.STOPPED:
        return FROM_SIGNAL + signal.SIGTERM
    return ExitCode.RUN_FAILED


def code_of_failure(error: JobWorkerError) -> int:
    """A job whose command is refused never ran: as a shell says it."""
    if isinstance(error, RejectedError) and error.command_errno:
        return _code_of_errno(error.command_errno)
    # A server that does not tell the errno.
    if isinstance(error, RejectedError) and str(error).startswith("command: "):
        if re.search("not found|does not exist", str(error)):
            return ExitCode.COMMAND_NOT_FOUND
        if re.search("is a directory|not a regular file|not executable|Permission", str(error)):
            return ExitCode.NOT_EXECUTABLE
    return ExitCode.RUN_FAILED


def _code_of_errno(number: int) -> int:
    if number in {errno.ENOENT, errno.ENOTDIR}:
        return ExitCode.COMMAND_NOT_FOUND
    return ExitCode.NOT_EXECUTABLE


def _explain(job: Job) -> None:
    """What the exit code alone would not tell."""
    if job.cause not in {Cause.EXITED, Cause.SIGNALLED, Cause.STOPPED, None}:
        remark(f"job {job.id} FAILED: {display.explained_ending(job)}")
