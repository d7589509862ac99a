"""`jobworker wait`: until jobs have ended."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from jobworker.cli import display
from jobworker.cli.connection import Connect, speaks_to_server
from jobworker.cli.display import json_option
from jobworker.cli.exit_codes import ExitCode
from jobworker.cli.job_id import JobId
from jobworker.cli.progress import INTERVAL_SECONDS, Progress
from jobworker.cli.stream import retry_option
from jobworker.job import Job, Status

if TYPE_CHECKING:
    from jobworker.client import Client

# Each waits for one job; what comes after them waits for its turn, which makes nothing later.
MOST_THREADS = 64


@click.command("wait")
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True, type=JobId([Status.RUNNING]))
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Gives up then, with exit code 124.  [default: never]",
)
@retry_option
@json_option
@speaks_to_server
def wait_command(
    connect: Connect,
    retry_seconds: float,
    as_json: bool,
    job_ids: tuple[str, ...],
    timeout_seconds: float | None,
) -> None:
    """Waits until jobs have ended, and says how.

    Exit code: 0 if all are COMPLETED, else 6.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    wanted = list(dict.fromkeys(int(job_id) for job_id in job_ids))
    ended: dict[int, Job] = {}
    with connect(patience_seconds=retry_seconds) as client, Progress() as progress:
        for job in _endings(client, wanted, deadline, progress):
            ended[job.id] = job
            progress.clear()
            if not as_json:
                click.echo(display.summary(job))
    if as_json:
        display.write_json([display.job_as_json(ended[id_]) for id_ in wanted if id_ in ended])
    _exit([ended.get(job_id) for job_id in wanted])


def _endings(
    client: Client, job_ids: Sequence[int], deadline: float | None, progress: Progress
) -> Iterator[Job]:
    """Each job when it has ended; fewer if the deadline comes first. Raises what a call does."""
    # One by one first: an id that does not exist is known at once.
    jobs = [client.get(job_id) for job_id in job_ids]
    yield from (job for job in jobs if job.is_ended)
    running = [job.id for job in jobs if not job.is_ended]
    ended = _wait_in_threads(client, running)
    while running:
        if deadline is not None and time.monotonic() >= deadline:
            return
        try:
            result = ended.get(timeout=INTERVAL_SECONDS)
        except queue.Empty:
            progress.show(_progress(len(job_ids), running))
            continue
        if isinstance(result, Exception):
            raise result
        running.remove(result.id)
        yield result


def _wait_in_threads(client: Client, job_ids: Sequence[int]) -> queue.SimpleQueue[Job | Exception]:
    """A queue of endings. Its threads end with the program: a call cannot be hurried."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Job | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                ended.put(client.wait(todo.get_nowait()))
        except queue.Empty:
            pass
        except Exception as error:  # noqa: BLE001 the main thread raises it
            ended.put(error)

    for job_id in job_ids:
        todo.put(job_id)
    for _ in job_ids[:MOST_THREADS]:
        threading.Thread(target=work, daemon=True).start()
    return ended


def _progress(count: int, running: Sequence[int]) -> str:
    some = ", ".join(map(str, running[:8])) + (", …" if len(running) > 8 else "")
    return f"{count - len(running)} of {count} ended; waiting for {some}"


def _exit(jobs: Sequence[Job | None]) -> None:
    context = click.get_current_context()
    if None in jobs:
        left = jobs.count(None)
        run = "runs" if left == 1 else "run"
        display.remark(f"the time is over, and {left} of {len(jobs)} still {run}")
        context.exit(ExitCode.TIMED_OUT)
    if any(job and job.status is not Status.COMPLETED for job in jobs):
        context.exit(ExitCode.NOT_COMPLETED)
