"""`jobworker create`, `get`, `list` and `stop`: one question, one answer."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from jobworker.cli import display
from jobworker.cli.connection import Connect, Function, speaks_to_server
from jobworker.cli.display import duration, json_option, printable, remark, size
from jobworker.cli.job_id import JobId
from jobworker.job import LONGEST_STDIN_BYTES, NETWORKS, Accounting, Bind, Job, Principal, Status

INT32_MAX = (1 << 31) - 1
NEWEST_JOBS = 100


# create


class CommandWords(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """The job's command and its arguments, flags too, exactly as they were typed."""

    name = "command"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return _utf8(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return [click.shell_completion.CompletionItem(incomplete, type="file")]


def up_to(most: int) -> Callable[[click.Context, click.Parameter, int | None], int | None]:
    """For an option: a number from 0 on."""

    def check(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
        if value is not None and not 0 <= value <= most:
            raise click.BadParameter(f"{value} is not possible; use 0 to {most}")
        return value

    return check


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """`90`, `90s`, `1.5h`, `7d`: in seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from jobworker.config import parse_seconds

        try:
            return parse_seconds(str(value))
        except ValueError as error:
            self.fail(f"{value!r} is no duration: {error}")


def read_file(file: str, most_bytes: int = -1) -> bytes:
    """`-` is standard input. most_bytes: reads no more than that; -1: all."""
    try:
        if file == "-":
            return sys.stdin.buffer.read(most_bytes)
        with Path(file).open("rb") as source:
            return source.read(most_bytes)
    except OSError as error:
        raise click.ClickException(f"cannot read {file}: {error.strerror}") from error


def _stdin(context: click.Context, _: click.Parameter, value: str | None) -> bytes:
    if value is None or context.resilient_parsing:  # a shell that completes
        return b""
    data = read_file(value, LONGEST_STDIN_BYTES + 1)
    if len(data) > LONGEST_STDIN_BYTES:
        remedy = "put it into a file on the server, and let the job read that"
        raise click.BadParameter(f"{value} holds more than 1 MiB; {remedy}")
    return data


def _utf8(value: str) -> str:
    """The protocol has no other texts."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter(f"{value!r} is not UTF-8") from error
    return value


def _environment(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [_utf8(value).partition("=") for value in values]
    for name, separator, _value in pairs:
        if not name or not separator:
            raise click.BadParameter(f"use NAME=VALUE, not {name!r}")
    return {name: value for name, _separator, value in pairs}


def _binds(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[Bind, ...]:
    try:
        return tuple(Bind.parse(_utf8(value)) for value in values)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


class Network(click.Choice):  # type: ignore[type-arg]  # generic since click 8.2
    """One of NETWORKS; empty, as where it is not given, is the profile's."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) if value else ""


def job_options(function: Function) -> Function:
    """What a new job may be told: `create` and `run` take the same."""
    limit: Any = {"type": int, "default": 0, "callback": up_to(INT32_MAX)}
    for decorate in reversed(
        [
            click.option(
                "--max-cpu", **limit, metavar="PERCENT", help="CPU limit, in percent of one core."
            ),
            click.option("--max-memory", **limit, metavar="MIB", help="Memory limit, in MiB."),
            click.option(
                "--max-iobps",
                **limit,
                metavar="BYTES",
                help="Limit on disk reads, and on writes, in bytes a second.",
            ),
            click.option(
                "--env",
                "environment",
                multiple=True,
                callback=_environment,
                metavar="NAME=VALUE",
                help="A variable of the job's environment; may be given again.",
            ),
            click.option(
                "--workdir",
                "working_directory",
                default="",
                metavar="DIR",
                help="Where the job starts, on the server.  [default: /]",
            ),
            click.option("--name", default="", help="For people; need not be unique."),
            click.option(
                "--merge-output",
                is_flag=True,
                help="One pipe for stdout and stderr: their order is exact, all is stdout.",
            ),
            click.option(
                "--stdin",
                metavar="FILE",
                callback=_stdin,
                help="What the job reads from its standard input, at most 1 MiB; - is this "
                "program's own.",
            ),
            click.option(
                "--timeout",
                "time_limit",
                type=Duration(),
                default="0",
                metavar="DURATION",
                help="Ends the job after so long, such as 90s, 5m, 1.5h or 7d.  [default: never]",
            ),
            click.option("--user", default="", help="Whom it runs as; `jobworker info` says who."),
            click.option(
                "--profile", default="", help="How it is separated from the machine; see the same."
            ),
            click.option(
                "--network",
                type=Network(NETWORKS),
                default="",
                metavar="NETWORK",
                help="host, or none: a loopback interface of its own.  [default: its profile's]",
            ),
            click.option(
                "--root",
                default="",
                metavar="DIR",
                help="A folder of the server's that is the job's /.  [default: the server's /]",
            ),
            click.option(
                "--read-only",
                is_flag=True,
                help="Lets it write to its own /tmp only, and to what is bound.",
            ),
            click.option(
                "--bind",
                "binds",
                multiple=True,
                callback=_binds,
                metavar="SRC:DST[:ro]",
                help="A file or folder of the server's at another place too; may be given again.",
            ),
        ]
    ):
        function = decorate(function)
    return function


# All after the command belongs to the job, flags too.
VERBATIM = {"allow_interspersed_args": False, "ignore_unknown_options": False}


@click.command(
    "create",
    context_settings=VERBATIM,
    options_metavar="[OPTIONS]",
    epilog="A limit of 0 is the server's default, which `jobworker info` shows.",
)
@json_option
@click.option(
    "--from",
    "file",
    metavar="FILE",
    help="Creates many jobs, one from each line of a file; - is standard input.",
)
@job_options
@click.argument("command", nargs=-1, type=CommandWords())
@speaks_to_server
def create_command(
    connect: Connect, as_json: bool, file: str | None, command: tuple[str, ...], **options: Any
) -> None:
    """Starts a job, and prints its id; or many jobs.

    Options stand before COMMAND; all after it is handed to the job as it is.

    Each line of --from is a JSON object. It must have a "command", and may have "args" (a list),
    "name", "environment" (an object), "working_directory", "merge_output", "limits" (with
    "cpu_percent", "memory_mib", "io_bytes_per_second"), "timeout_seconds", "user", "profile",
    "network", "root", "read_only", "binds" (a list of "SRC:DST[:ro]"), and "stdin" or, for what is
    no text, "stdin_base64": the names of `get -o json`. A line that cannot be read is an error
    before any job is made. In a pipe the ids are printed, one a line; with -o json an object for
    each job. Exit code: 1 if a job was refused.
    """
    if file is not None:
        if command or any(options.values()):
            raise click.UsageError("--from has all about its jobs in the file: leave the rest out")
        from jobworker.cli.many import create_all, read_lines

        create_all(connect, read_lines(read_file(file)), as_json)
        return
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'")
    with connect() as client:
        job = client.create(*command, **options)
    try:
        if as_json:
            display.write_json(display.job_as_json(job))
        else:
            click.echo(f"Job created: ID: {job.id}")
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            remark(f"job {job.id} was created")
        raise


# get


@click.command("get")
@click.argument("job_id", metavar="ID", type=JobId())
@json_option
@speaks_to_server
def get_command(connect: Connect, as_json: bool, job_id: str) -> None:
    """Shows all that is known of a job."""
    with connect() as client:
        job = client.get(job_id)
    if as_json:
        display.write_json(display.job_as_json(job))
    else:
        display.write_fields(_fields(job))


def _fields(job: Job) -> list[tuple[str, str]]:
    """Name and value, empty where there is nothing to say."""
    spec, used = job.spec, job.accounting or Accounting()
    directory = spec.working_directory
    return [
        ("ID", str(job.id)),
        ("Name", printable(spec.name)),
        ("Status", display.coloured_status(job)),
        ("Ending", display.explained_ending(job)),
        ("Command", display.command_line(job)),
        ("Directory", "" if directory == "/" else printable(directory)),
        ("Environment", _variables(job)),
        ("Limits", _limits(job)),
        ("Time limit", duration(spec.timeout_ms / 1000) if spec.timeout_ms else ""),
        ("User", printable(spec.user)),
        ("Profile", printable(spec.profile)),
        ("Network", printable(spec.network)),
        ("Root", printable(spec.root)),
        ("Files", "read-only" if spec.read_only else ""),
        ("Binds", ", ".join(printable(str(bind)) for bind in spec.binds)),
        ("Created by", _principal(job.created_by)),
        ("Started", _moment(job.started_ns)),
        ("Ended", _moment(job.ended_ns)),
        ("Stopped by", _principal(job.stopped_by)),
        ("Took" if job.is_ended else "Runs for", display.taken(job) if job.started_ns else ""),
        ("Output", _output(job)),
        ("Lost", f"{size(job.lost_bytes)} of its output" if job.lost_bytes else ""),
        ("Output waits", printable(job.output_problem)),
        ("CPU", _cpu(used)),
        ("Memory", _size(used.memory_peak_bytes, " at the most")),
        ("Disk", _disk(used)),
        ("Caution", "what it left running may go on" if job.cleanup_uncertain else ""),
    ]


def _limits(job: Job) -> str:
    limits = job.spec.limits
    return ", ".join(
        filter(
            None,
            (
                f"CPU {limits.cpu_percent} %" if limits.cpu_percent else "",
                f"memory {size(limits.memory_mib << 20)}" if limits.memory_mib else "",
                f"disk {size(limits.io_bytes_per_second)}/s" if limits.io_bytes_per_second else "",
                f"{limits.pids} processes" if limits.pids else "",
            ),
        )
    )


def _moment(nanoseconds: int) -> str:
    if not nanoseconds:
        return ""
    moment = display.rfc3339(nanoseconds)
    return f"{moment} ({display.ago(nanoseconds)})" if display.is_terminal(sys.stdout) else moment


def _variables(job: Job) -> str:
    environment = job.spec.environment
    if job.environment_withheld:
        return f"{printable(' '.join(environment))} (its values are for its owner and for admins)"
    return printable(" ".join(f"{name}={value}" for name, value in environment.items()))


def _principal(principal: Principal | None) -> str:
    if principal is None:
        return ""
    return printable(f"{principal.name} ({principal.role}, certificate {principal.serial})")


def _output(job: Job) -> str:
    if not job.stderr_bytes:
        return size(job.stdout_bytes) if job.stdout_bytes else ""
    return f"{size(job.stdout_bytes)} on stdout, {size(job.stderr_bytes)} on stderr"


def _cpu(used: Accounting) -> str:
    if used.cpu_user_us is None or used.cpu_system_us is None:
        return ""
    user, system = used.cpu_user_us / 1e6, used.cpu_system_us / 1e6
    return f"{duration(user)} user, {duration(system)} system"


def _disk(used: Accounting) -> str:
    read, written = _size(used.io_read_bytes, " read"), _size(used.io_written_bytes, " written")
    return ", ".join(filter(None, (read, written)))


def _size(count: int | None, what: str) -> str:
    return "" if count is None else size(count) + what


# list


@click.command("list")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice(list(Status), case_sensitive=False),
    help="Only these; may be given again.",
)
@click.option("--name", default="", help="Only jobs with exactly this name.")
@click.option("--owner", default="", metavar="CN", help="Only those that this client created.")
@click.option("--mine", is_flag=True, help="Only those that you created.")
@click.option(
    "-n",
    "--limit",
    type=int,
    callback=up_to(INT32_MAX),
    metavar="NUMBER",
    help=f"Only the newest; 0: all.  [default: {NEWEST_JOBS} on a terminal, else all]",
)
@json_option
@speaks_to_server
def list_command(
    connect: Connect,
    as_json: bool,
    statuses: tuple[Status, ...],
    name: str,
    owner: str,
    mine: bool,
    limit: int | None,
) -> None:
    """Lists jobs, the newest first: those that you may see."""
    if owner and mine:
        raise click.UsageError("give --owner or --mine, not both")
    is_cut = limit is None and not as_json and display.is_terminal(sys.stdout)
    if is_cut:
        limit = NEWEST_JOBS + 1  # tells whether there are more
    with connect() as client:
        if mine and not (owner := client.info().identity):
            raise click.ClickException("your certificate has no CN, so that no job is yours")
        listing = client.list(statuses=statuses, name=name, owner=owner, limit=limit or None)
        jobs = list(listing)
    if as_json:
        display.write_json([display.job_as_json(job) for job in jobs])
        return
    _write_jobs(jobs[:NEWEST_JOBS] if is_cut else jobs)
    if is_cut and len(jobs) > NEWEST_JOBS:
        click.echo(f"The newest {NEWEST_JOBS} only: --limit 0 lists all.")


def _write_jobs(jobs: Sequence[Job]) -> None:
    moment = display.ago if display.is_terminal(sys.stdout) else display.rfc3339
    header = ["ID", "STATUS", "ENDING", "STARTED", "TOOK", "OUTPUT", "COMMAND"]
    rows = [
        [
            str(job.id),
            display.coloured_status(job),
            display.ending(job),
            moment(job.started_ns),
            display.taken(job),
            size(job.output_bytes),
            _label(job),
        ]
        for job in jobs
    ]
    display.write_table(header, rows, right=("ID", "TOOK", "OUTPUT"))


def _label(job: Job) -> str:
    """The command, after the name where it has one; short where there is little room."""
    command = display.command_line(job, is_short=display.is_terminal(sys.stdout))
    return f"{printable(job.spec.name)}: {command}" if job.spec.name else command


# stop


def _signal_number(_: click.Context, __: click.Parameter, value: str | None) -> int:
    """From 15, TERM or SIGTERM; 0: not given."""
    if value is None:
        return 0
    if re.fullmatch("[0-9]{1,3}", value) and 1 <= int(value) < signal.NSIG:
        return int(value)
    name = value.upper()
    found = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
    if found is None:
        raise click.BadParameter(f"{value!r} is no signal; use a name such as INT, or a number")
    return found


@click.command("stop")
@click.argument("job_id", metavar="ID", type=JobId([Status.INITIALIZING, Status.RUNNING]))
@click.option(
    "--signal",
    "signal_number",
    callback=_signal_number,
    metavar="SIGNAL",
    help="Asks it to end with this one.  [default: TERM]",
)
@click.option(
    "--grace",
    "grace_seconds",
    type=click.FloatRange(0, 4_000_000),
    metavar="SECONDS",
    help="How long it may take before all of it is killed.  [default: the server's]",
)
@json_option
@speaks_to_server
def stop_command(
    connect: Connect,
    as_json: bool,
    job_id: str,
    signal_number: int,
    grace_seconds: float | None,
) -> None:
    """Ends a job, and waits until all of it is gone."""
    with connect() as client:
        job = client.stop(job_id, signal=signal_number, grace_seconds=grace_seconds)
    if as_json:
        display.write_json(display.job_as_json(job))
    else:
        click.echo(f"Job stopped: ID: {job.id}")
