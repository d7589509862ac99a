"""`jobworker create --from`: many jobs, one from each line of a file."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from jobworker.cli import display
from jobworker.cli.connection import Connect
from jobworker.cli.exit_codes import ExitCode, FailedError, code_of, message_of
from jobworker.cli.progress import Progress, bar
from jobworker.errors import CallError
from jobworker.job import Bind

if TYPE_CHECKING:
    from jobworker.client import Client, Created

# A request is over before anybody wonders how far it has come.
LINES_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Line:
    """What one line of the file asks for."""

    number: int
    command: str
    args: list[str]
    options: dict[str, Any]  # of `Client.create`


def create_all(connect: Connect, lines: Sequence[Line], as_json: bool) -> None:
    report = Report(as_json)
    try:
        with connect() as client:
            failure = _create_all(client, lines, report)
    finally:
        report.summarize()
    if failure:
        raise failure
    if report.refused:
        click.get_current_context().exit(ExitCode.FAILED)


def _create_all(client: Client, lines: Sequence[Line], report: Report) -> FailedError | None:
    """Why it was left before the end, if it was."""
    from jobworker.client import Spec

    with Progress() as progress:
        for start in range(0, len(lines), LINES_AT_ONCE):
            part = lines[start : start + LINES_AT_ONCE]
            progress.show(bar(start, len(lines)))
            specs = [Spec(line.command, *line.args, **line.options) for line in part]
            try:
                results = client.create_many(specs)
            except KeyboardInterrupt:
                display.remark(_may_be_there(part))
                raise
            except CallError as error:
                lead = f"line {part[0].number} and all after it: " if start else ""
                doubt = f"; {_may_be_there(part)}" if error.may_have_happened else ""
                return FailedError(lead + message_of(error) + doubt, code_of(error))
            progress.clear()
            for line, result in zip(part, results, strict=True):
                report.add(line, result)
    return None


def _may_be_there(part: Sequence[Line]) -> str:
    lines = f"lines {part[0].number} to {part[-1].number}"
    return f"{lines} may have become jobs all the same: look with `jobworker list`"


class Report:
    """What became of the lines: at once in a pipe, in the end on a terminal."""

    def __init__(self, as_json: bool) -> None:
        self.refused = 0
        self._ids: list[int] = []
        self._as_json = as_json
        self._is_summary = not as_json and display.is_terminal(sys.stdout)

    def add(self, line: Line, result: Created) -> None:
        if result.job_id is not None:
            self._ids.append(result.job_id)
        else:
            self.refused += 1
        if self._as_json:
            display.write_json(_as_json(line, result), compact=True)
        elif result.error:
            display.remark(f"line {line.number}: {' '.join(_in_keys(result.error).split())}")
        elif not self._is_summary:
            click.echo(result.job_id)

    def summarize(self) -> None:
        if not self._is_summary:
            return
        ids = f": IDs from {min(self._ids)} to {max(self._ids)}" if self._ids else ""
        refused = f"; {self.refused} refused" if self.refused else ""
        click.echo(f"Jobs created: {len(self._ids)}{ids}{refused}")


def _as_json(line: Line, result: Created) -> dict[str, Any]:
    return {
        "line": line.number,
        "id": result.job_id,
        "status": result.status,
        "error": _in_keys(result.error) if result.error else None,
    }


# What the file calls otherwise than the protocol, or the SDK, at the beginning of an error.
FIELDS = {
    **dict.fromkeys(("maxCPU", "max_cpu"), "cpu_percent"),
    **dict.fromkeys(("maxMemory", "max_memory"), "memory_mib"),
    **dict.fromkeys(("maxIOBPS", "max_iobps"), "io_bytes_per_second"),
    "time_limit": "timeout_seconds",
}


def _in_keys(error: CallError) -> str:
    """In the words of the file."""
    field, colon, problem = str(error).partition(": ")
    return f'"{FIELDS[field]}": {problem}' if field in FIELDS else field + colon + problem


# Reading

# A value of the file, as options of `Client.create`. Raises ValueError.
Reader = Callable[[Any], dict[str, Any]]


def read_lines(data: bytes) -> list[Line]:
    """All of them, or UsageError. Empty lines are left out."""
    return [
        _read_line(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()
    ]


def _read_line(number: int, line: bytes) -> Line:
    try:
        values = json.loads(line.decode())
        return _line(number, values)
    except UnicodeDecodeError as error:
        raise click.UsageError(f"line {number}: is not UTF-8") from error
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} at column {error.colno}"
        raise click.UsageError(f"line {number}: {problem}") from error
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"line {number}: {error}") from error


def _line(number: int, values: Any) -> Line:
    """Raises ValueError."""
    given = _object_of(values, KEYS, "a job")
    options = _options_of(given, KEYS)
    if "command" not in options:
        raise ValueError('has no "command"')
    if {"stdin", "stdin_base64"} <= given.keys():
        raise ValueError('has both "stdin" and "stdin_base64"')
    return Line(number, options.pop("command"), options.pop("args", []), options)


def _object_of(value: Any, known: dict[str, Reader], what: str) -> dict[str, Any]:
    """Without what is null. Nothing that would be ignored is let pass."""
    if not isinstance(value, dict):
        raise ValueError(f"must be an object, for {what}")  # noqa: TRY004 as all of a line
    unknown = ", ".join(f'"{key}"' for key in value if key not in known)
    if unknown:
        raise ValueError(f"has {unknown}; known of {what} are {', '.join(known)}")
    return {key: each for key, each in value.items() if each is not None}


def _options_of(given: dict[str, Any], known: dict[str, Reader]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in given.items():
        try:
            options |= known[key](value)
        except ValueError as error:
            raise ValueError(f'"{key}" {error}') from error
    return options


def _of_type(option: str, types: type | tuple[type, ...], what: str) -> Reader:
    """Reads a value as that option of `Client.create`."""

    def read(value: Any) -> dict[str, Any]:
        is_wrong_bool = isinstance(value, bool) and types is not bool
        if is_wrong_bool or not isinstance(value, types):
            raise ValueError(f"must be {what}")
        return {option: value}

    return read


def _args(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("must be a list of texts")
    return {"args": value}


def _environment(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueError("must be an object of texts")
    return {"environment": value}


def _binds(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("must be a list of texts")
    return {"binds": [Bind.parse(each) for each in value]}


def _limits(value: Any) -> dict[str, Any]:
    return _options_of(_object_of(value, LIMITS, "limits"), LIMITS)


def _stdin(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        raise ValueError("must be a text")  # noqa: TRY004 as all of a line
    return {"stdin": value.encode()}


def _stdin_base64(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        raise ValueError("must be a text")  # noqa: TRY004 as all of a line
    return {"stdin": base64.b64decode(value, validate=True)}


LIMITS: dict[str, Reader] = {
    "cpu_percent": _of_type("max_cpu", int, "a whole number"),
    "memory_mib": _of_type("max_memory", int, "a whole number"),
    "io_bytes_per_second": _of_type("max_iobps", int, "a whole number"),
}
KEYS: dict[str, Reader] = {
    "command": _of_type("command", str, "a text"),
    "args": _args,
    "name": _of_type("name", str, "a text"),
    "environment": _environment,
    "working_directory": _of_type("working_directory", str, "a text"),
    "merge_output": _of_type("merge_output", bool, "true or false"),
    "limits": _limits,
    "timeout_seconds": _of_type("time_limit", (int, float), "a number"),
    "user": _of_type("user", str, "a text"),
    "profile": _of_type("profile", str, "a text"),
    "network": _of_type("network", str, "a text"),
    "root": _of_type("root", str, "a text"),
    "read_only": _of_type("read_only", bool, "true or false"),
    "binds": _binds,
    "stdin": _stdin,
    "stdin_base64": _stdin_base64,
}
