"""A job's id on the command line; shells complete it by asking the server."""

from __future__ import annotations

from collections.abc import Collection

import click
from click.shell_completion import CompletionItem

from jobworker.cli.connection import connect, flags_of
from jobworker.cli.display import command_line
from jobworker.errors import JobWorkerError
from jobworker.job import Job, Status

# Whoever presses the tabulator does not wait long, nor read much.
ANSWER_SECONDS = 1.0
MOST_JOBS = 50
MOST_DIGITS = 19


class JobId(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """A decimal number; handed on as the text that it is on the wire."""

    name = "id"

    def __init__(self, statuses: Collection[Status] = ()) -> None:
        """statuses: of the jobs that are offered; empty: all."""
        self._statuses = statuses

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not (value.isascii() and value.isdigit()):
            self.fail(f"{value!r} is no job's id: ids are numbers, `jobworker list` shows them")
        if len(value) > MOST_DIGITS:
            self.fail(f"no job's id has {len(value)} digits; `jobworker list` shows them")
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            jobs = self._ask(ctx)
        except (JobWorkerError, OSError):
            return []  # a shell has no place for errors
        return [
            CompletionItem(
                str(job.id), help=f"{job.status} {command_line(job, is_short=True)}"[:60]
            )
            for job in jobs
            if str(job.id).startswith(incomplete)
        ]

    def _ask(self, ctx: click.Context) -> list[Job]:
        flags = flags_of(ctx, ctx.params)
        with connect(flags, timeout_seconds=ANSWER_SECONDS) as client:
            return list(client.list(statuses=self._statuses, limit=MOST_JOBS))
