"""How people read it: sizes, durations and times at a glance, tables, colour on a terminal.

What scripts read, `-o json`, has exact figures instead: see `job_as_json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from jobworker.job import Cause, Job, Status, signal_name

COLOURS = {
    Status.RUNNING: "cyan",
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.STOPPED: "yellow",
}

ENDINGS = {
    Cause.OUT_OF_MEMORY: "out of memory",
    Cause.TIMED_OUT: "its time was over",
    Cause.LOG_LIMIT: "it wrote more than its log may hold",
    Cause.LOST: "unknown",
    Cause.STOPPED: "stopped",
}

SIZE_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


# Terminals


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def is_coloured(stream: TextIO) -> bool:
    """On a terminal that can, unless the user wants none (https://no-color.org)."""
    return (
        is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def coloured(text: str, colour: str | None = None, *, bold: bool = False) -> str:
    """As it should stand on standard output."""
    if not is_coloured(sys.stdout):
        return text
    return click.style(text, fg=colour, bold=bold or None)


def terminal_columns() -> int | None:
    """The width that lines on standard output must not exceed; None: any."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


# Values


def size(count: int) -> str:
    """`17 B`, `1.2 KiB`, `310 MiB`."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, len(SIZE_UNITS))
    value = count / (1 << 10 * power)
    if value >= 1023.5 and power < len(SIZE_UNITS):  # would be shown as 1024
        power, value = power + 1, value / 1024
    return f"{value:.{1 if value < 99.95 else 0}f} {SIZE_UNITS[power - 1]}"


def duration(seconds: float) -> str:
    """`420ms`, `2.1s`, `1m05s`, `3h12m`, `2d04h`."""
    if seconds < 0.9995:
        return f"{max(seconds, 0) * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest_seconds = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days}d{rest_hours:02d}h"
    if hours:
        return f"{hours}h{rest_minutes:02d}m"
    return f"{minutes}m{rest_seconds:02d}s" if minutes else f"{rest_seconds}s"


def rfc3339(nanoseconds: int, *, timespec: str = "seconds") -> str:
    """UTC; `-` for a time that has not come."""
    if not nanoseconds:
        return "-"
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def ago(nanoseconds: int) -> str:
    """`2m05s ago`; `-` for a time that has not come."""
    if not nanoseconds:
        return "-"
    seconds = int(time.time() - nanoseconds / 1e9)
    if seconds < 1:
        return "now"
    return f"{seconds}s ago" if seconds < 60 else f"{duration(seconds)} ago"


def printable(text: str) -> str:
    """One line, in which nothing moves the cursor or changes the terminal's colours: names and
    arguments come from anybody."""
    with contextlib.suppress(UnicodeEncodeError):  # JSON has surrogates that stand for no byte
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text
    )


def remark(text: str) -> None:
    """A line on stderr, beside what was asked for. text: also a server's, which is anybody's."""
    click.echo(f"jobworker: {printable(text)}", err=True)


# Jobs


def command_line(job: Job, *, is_short: bool = False) -> str:
    """As one would type it in a shell. is_short: without the folder that it is in."""
    command = job.spec.command
    words = [command.rpartition("/")[2] if is_short else command, *job.spec.args]
    return printable(shlex.join(words))


def taken_seconds(job: Job) -> float | None:
    """From its start to its end, or until now; None: it never ran."""
    if not job.started_ns:
        return None
    return ((job.ended_ns or time.time_ns()) - job.started_ns) / 1e9


def taken(job: Job) -> str:
    seconds = taken_seconds(job)
    return "-" if seconds is None else duration(seconds)


def ending(job: Job) -> str:
    """In one word: how it ended, `-` while it has not."""
    if not job.is_ended:
        return "-"
    # A server that speaks only the first version of the protocol tells no cause.
    if job.cause in {None, Cause.EXITED, Cause.SIGNALLED, Cause.STOPPED}:
        if job.signal:
            return signal_name(job.signal).replace(" ", "-")
        return f"exit-{job.exit_code}" if job.exit_code >= 0 else "-"
    assert job.cause
    return job.cause.name.lower().replace("_", "-")


def explained_ending(job: Job) -> str:
    """For people: what became of it, and why."""
    if not job.is_ended:
        return ""
    if job.cause is Cause.START_FAILED:
        problem = os.strerror(job.failed_errno) if job.failed_errno else ""
        # Which mostly has both in it.
        is_told = job.detail.startswith(f"{job.failed_step}: ") and problem in job.detail
        parts = ("never ran", *(() if is_told else (job.failed_step, problem)), job.detail)
        return printable(", ".join(filter(None, parts)))
    exit_code = f"exit code {job.exit_code}" if job.exit_code >= 0 else ""
    by_signal = f"by {signal_name(job.signal)}" if job.signal else ""
    # "ended by SIGKILL" says no more than "by SIGKILL".
    detail = "" if job.cause is Cause.SIGNALLED else job.detail
    cause = ENDINGS.get(job.cause, "") if job.cause and not detail else ""
    return printable(", ".join(filter(None, (cause, exit_code, by_signal, detail))))


def coloured_status(job: Job) -> str:
    return coloured(job.status, COLOURS.get(job.status))


def summary(job: Job) -> str:
    """One line of a job: `Job 7: FAILED (exit-3) after 2.1s`."""
    line = f"Job {job.id}: {coloured_status(job)}"
    if job.is_ended and job.status is not Status.COMPLETED and ending(job) != "-":
        line += f" ({ending(job)})"
    return line if taken_seconds(job) is None else f"{line} after {taken(job)}"


def job_as_json(job: Job) -> dict[str, Any]:
    """The keys that `-o json` has for a job; more may be added, none goes.

    Times are RFC 3339 in UTC; what has not come, or cannot be known, is null.
    """
    spec = job.spec
    return {
        "id": job.id,
        "name": spec.name,
        "status": job.status.value,
        "cause": job.cause.name if job.cause else None,
        "exit_code": job.exit_code if job.is_ended and job.exit_code >= 0 else None,
        "signal": job.signal or None,
        "signal_name": signal_name(job.signal) if job.signal else None,
        "detail": job.detail,
        "failed_step": job.failed_step or None,
        "failed_errno": job.failed_errno or None,
        "command": spec.command,
        "args": list(spec.args),
        "working_directory": spec.working_directory,
        "environment": dict(spec.environment),
        "environment_withheld": job.environment_withheld,
        "merge_output": spec.merge_output,
        "timeout_seconds": spec.timeout_ms / 1000 or None,
        "created_by": asdict(job.created_by) if job.created_by else None,
        "stopped_by": asdict(job.stopped_by) if job.stopped_by else None,
        "user": spec.user or None,
        "profile": spec.profile or None,
        "network": spec.network or None,
        "root": spec.root or None,
        "read_only": spec.read_only,
        "binds": [str(bind) for bind in spec.binds],
        "limits": asdict(spec.limits),
        "created": json_time(job.created_ns),
        "started": json_time(job.started_ns),
        "ended": json_time(job.ended_ns),
        "duration_seconds": taken_seconds(job),
        "stdout_bytes": job.stdout_bytes,
        "stderr_bytes": job.stderr_bytes,
        "lost_bytes": job.lost_bytes,
        "output_problem": job.output_problem or None,
        "accounting": asdict(job.accounting) if job.accounting else None,
        "cleanup_uncertain": job.cleanup_uncertain,
    }


def json_time(nanoseconds: int) -> str | None:
    return rfc3339(nanoseconds, timespec="microseconds") if nanoseconds else None


# Output


def _is_json(context: click.Context, _: click.Parameter, value: str | None) -> bool:
    """From after the command's name, or before it."""
    if value is None and context.parent:
        return bool(context.find_root().params.get("as_json"))
    return value == "json"


json_option = click.option(
    "-o",
    "--output",
    "as_json",
    type=click.Choice(["text", "json"]),
    callback=_is_json,
    help="How the answer is written.  [default: text]",
)


def write_json(value: Any, *, compact: bool = False) -> None:
    """One value: on one line, or indented as people like to read it, and so that nothing in it
    changes the terminal."""
    is_utf8 = sys.stdout.encoding.lower() == "utf-8"
    text = json.dumps(value, indent=None if compact else 2, ensure_ascii=not is_utf8)
    click.echo("\n".join(map(_printable_json, text.split("\n"))))


def _printable_json(line: str) -> str:
    """What is not printable can only stand in a string, for which JSON has escapes."""
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in line)


def write_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()
) -> None:
    """Columns, the last of which is cut where a terminal ends.

    right: columns that are aligned to the right.
    """
    rows = [header, *rows]
    widths = [max(_columns(row[i]) for row in rows) for i in range(len(header))]
    is_right = [name in right for name in header]
    room = terminal_columns()
    for number, row in enumerate(rows):
        line = "  ".join(
            _padded(text, width, to_right)
            for text, width, to_right in zip(row[:-1], widths, is_right, strict=False)
        )
        line += "  " + _cut(row[-1], room and max(room - _columns(line) - 2, 8))
        click.echo(coloured(line, bold=True) if not number else line)


def write_paragraph(text: str) -> None:
    """One line, which a terminal would break inside of words."""
    room = terminal_columns()
    click.echo(click.wrap_text(text, room) if room else text)


def write_fields(fields: Iterable[tuple[str, str]]) -> None:
    """`name: value` lines; a field without a value is left out."""
    filled = [(name, value) for name, value in fields if value]
    width = max(len(name) for name, _ in filled) + 1
    for name, value in filled:
        lead = f"{name}:".ljust(width)
        click.echo(f"{coloured(lead, bold=True)} {value}")


def _padded(text: str, width: int, to_right: bool) -> str:
    space = " " * (width - _columns(text))
    return space + text if to_right else text + space


def _cut(text: str, room: int | None) -> str:
    if room is None or _columns(text) <= room:
        return text
    end = room - 1  # more never fits, and a text may be long: nothing is coloured here
    while _columns(text[:end]) > room - 1:
        end -= 1
    return text[:end] + "…"


def _columns(text: str) -> int:
    """How many columns of a terminal it takes; colours take none."""
    text = click.unstyle(text)
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)
