"""The program `jobworker`: its commands, each loaded only when it is called."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import click

from jobworker import __version__
from jobworker.cli.connection import server_options
from jobworker.cli.display import json_option, remark
from jobworker.cli.exit_codes import (
    ExitCode,
    FailedError,
    code_of,
    message_of,
    one_line,
    os_message,
    perhaps,
)
from jobworker.errors import JobWorkerError

# By heading of the help: command, and the module that has it as a function of that name.
SECTIONS = {
    "Jobs": {
        "run": "jobworker.cli.run",
        "create": "jobworker.cli.jobs",
        "list": "jobworker.cli.jobs",
        "get": "jobworker.cli.jobs",
        "stream": "jobworker.cli.stream",
        "wait": "jobworker.cli.wait",
        "stop": "jobworker.cli.jobs",
        "rm": "jobworker.cli.remove",
        "prune": "jobworker.cli.remove",
    },
    "Server": {
        "serve": "jobworker.cli.serve",
        "info": "jobworker.cli.info",
    },
    "Setting up": {
        "certs": "jobworker.cli.certs",
        "completion": "jobworker.cli.completion",
    },
}
COMMANDS = {name: module for section in SECTIONS.values() for name, module in section.items()}

# What people type who know similar programs.
ELSEWHERE = {
    "ps": "list",
    "ls": "list",
    "logs": "stream",
    "tail": "stream",
    "kill": "stop",
    "exec": "run",
    "submit": "create",
    "show": "get",
    "status": "get",
    "inspect": "get",
    "delete": "rm",
    "remove": "rm",
}

UNBROKEN_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class HelpFormatter(click.HelpFormatter):
    """Breaks no line at a hyphen: `ca-key.pem` and `--limit` are one word."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", UNBROKEN_HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], *args: Any, **options: Any) -> None:
        unbroken = [(term, text.replace("-", UNBROKEN_HYPHEN)) for term, text in rows]
        super().write_dl(unbroken, *args, **options)

    def getvalue(self) -> str:
        return super().getvalue().replace(UNBROKEN_HYPHEN, "-")


# Each command makes its own context.
click.Context.formatter_class = HelpFormatter


class LazyGroup(click.Group):
    """Imports a command's module when that command is asked for. An error is one line on
    standard error, and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        # `list` would hide the builtin in its module.
        command = getattr(importlib.import_module(module), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            elsewhere = ELSEWHERE.get(name)
            close = [elsewhere] if elsewhere else difflib.get_close_matches(name, COMMANDS)
            raise click.UsageError(f"No such command {name!r}{perhaps(close)}", ctx)
        require_standard_output(name)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, section in SECTIONS.items():
            commands = ((name, self.get_command(ctx, name)) for name in section)
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (name, command.get_short_help_str(70))
                        for name, command in commands
                        if command
                    ]
                )

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        fill_closed_streams()
        escape_what_cannot_be_shown()
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            code = error.exit_code
        except click.ClickException as error:
            remark(one_line(error))
            code = error.code if isinstance(error, FailedError) else error.exit_code
        except click.Abort:
            code = ExitCode.INTERRUPTED
        except OSError as error:  # of a help that cannot be written
            remark(os_message(error))
            code = ExitCode.FAILED
        leave(code or ExitCode.OK)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except JobWorkerError as error:
            raise FailedError(message_of(error), code_of(error)) from error
        except UnicodeEncodeError as error:
            problem = f"{error.object!r} is not text; arguments must be UTF-8"
            raise click.UsageError(problem) from error
        except BrokenPipeError:
            ctx.exit(ExitCode.BROKEN_PIPE)
        except OSError as error:
            raise click.ClickException(os_message(error)) from error


def escape_what_cannot_be_shown() -> None:
    """Where the locale has no UTF-8: one job's text is not to end a list of all."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="backslashreplace")


def fill_closed_streams() -> None:
    """Lest a file or connection that is opened later gets the number of one, and what is written
    there. Standard output stays None, which tells that nobody can read an answer."""
    for name, mode in (("stdin", "r"), ("stdout", ""), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if mode:
                setattr(sys, name, os.fdopen(descriptor, mode))


def require_standard_output(command: str) -> None:
    """Before anything is done of which nobody would be told."""
    if sys.stdout is not None:
        return
    if command != "serve":
        code = ExitCode.RUN_FAILED if command == "run" else ExitCode.FAILED
        problem = "standard output is closed, so nothing was done; for none use >/dev/null"
        raise FailedError(problem, code)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 as long as the program


def leave(code: int) -> NoReturn:
    """The last of the output may fail to get out."""
    if sys.stdout is None:
        sys.exit(code or ExitCode.FAILED)
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter would try once more, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(ExitCode.BROKEN_PIPE)
        if not code:  # else it has been told already
            remark(os_message(error))
        sys.exit(code or ExitCode.FAILED)
    sys.exit(code)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="All of these options but --version may stand after the command's name as well.",
)
@click.version_option(__version__, prog_name="jobworker")
@json_option
@server_options()
def main(**_: Any) -> None:
    """Runs commands as jobs, each in its own cgroup, and streams their output live."""


def serve_main() -> None:
    """The program `job-worker`: `jobworker serve`."""
    main(["serve", *sys.argv[1:]], prog_name="job-worker")
