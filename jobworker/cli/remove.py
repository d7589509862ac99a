"""`jobworker rm` and `prune`: ended jobs are forgotten, with all that they wrote."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from jobworker.cli import display
from jobworker.cli.connection import Connect, speaks_to_server
from jobworker.cli.display import json_option, remark
from jobworker.cli.exit_codes import ExitCode, message_of
from jobworker.cli.job_id import JobId
from jobworker.cli.jobs import Duration
from jobworker.cli.progress import Progress, bar
from jobworker.errors import UnknownJobError, WrongStateError
from jobworker.job import ENDED, Status

if TYPE_CHECKING:
    from jobworker.client import Client

ENDED_IN_ORDER = [status for status in Status if status in ENDED]


# rm


@click.command("rm")
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True, type=JobId(ENDED_IN_ORDER))
@json_option
@speaks_to_server
def rm_command(connect: Connect, as_json: bool, job_ids: tuple[str, ...]) -> None:
    """Removes ended jobs, with their output, for good.

    One that cannot be removed does not keep the others. Exit code: that of the first error.
    """
    removed: list[int] = []
    code = ExitCode.OK
    with connect() as client:
        for job_id in dict.fromkeys(job_ids):
            try:
                client.delete(job_id)
            except (UnknownJobError, WrongStateError) as error:
                remark(message_of(error))
                is_unknown = isinstance(error, UnknownJobError)
                code = code or (ExitCode.NOT_FOUND if is_unknown else ExitCode.FAILED)
                continue
            removed.append(int(job_id))
            if not as_json:
                click.echo(f"Job removed: ID: {job_id}")
    if as_json:
        display.write_json({"removed": removed})
    click.get_current_context().exit(code)


# prune


@click.command("prune")
@click.option(
    "--older-than",
    "older_than_seconds",
    type=Duration(),
    required=True,
    metavar="DURATION",
    help="Only jobs that ended so long ago, such as 90s, 12h or 7d; 0: all that have ended.",
)
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice(ENDED_IN_ORDER, case_sensitive=False),
    help="Only these; may be given again.",
)
@click.option("--yes", is_flag=True, help="Does not ask, as it does on a terminal.")
@json_option
@speaks_to_server
def prune_command(
    connect: Connect,
    as_json: bool,
    older_than_seconds: float,
    statuses: tuple[Status, ...],
    yes: bool,
) -> None:
    """Removes all jobs that ended long ago, for good."""
    ended_before_ns = time.time_ns() - round(older_than_seconds * 1e9)
    with connect() as client:
        job_ids = [
            job.id
            for job in client.list(statuses=statuses or ENDED_IN_ORDER)
            if job.ended_ns <= ended_before_ns
        ]
        if job_ids and not yes:
            _confirm(len(job_ids))
        removed = _remove_all(client, job_ids)
    if as_json:
        display.write_json({"removed": removed})
    else:
        click.echo(f"Jobs removed: {len(removed)}")


def _confirm(count: int) -> None:
    """Where there is somebody to ask."""
    if not display.is_terminal(sys.stdin):
        return
    jobs = "one job" if count == 1 else f"{count} jobs"
    if not click.confirm(f"Remove {jobs}, with all output, for good?", err=True):
        raise click.ClickException("nothing was removed")


def _remove_all(client: Client, job_ids: list[int]) -> list[int]:
    removed = []
    with Progress() as progress:
        # The oldest first, as the server itself would.
        for done, job_id in enumerate(reversed(job_ids)):
            if progress.is_due:
                progress.show(bar(done, len(job_ids)))
            try:
                client.delete(job_id)
            except UnknownJobError:
                continue  # it has made way for newer ones meanwhile
            removed.append(job_id)
    return removed
