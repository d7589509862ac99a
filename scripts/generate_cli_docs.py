"""Writes the page of the command line: `generate_cli_docs.py [FILE]`, by default docs/cli.md.

All of it comes from what the program itself shows with --help, and from the tables by which
it works; a test makes sure that the committed page is that of today.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from jobworker.cli import connection
from jobworker.cli.exit_codes import MEANINGS
from jobworker.cli.main import SECTIONS, main

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

START = """\
# The command line

Made by `scripts/generate_cli_docs.py` from what `jobworker --help` shows: do not edit.

`jobworker` and `job-worker-cli` are the same program; `job-worker` is `jobworker serve`.
On a terminal there are tables that fit, colours (not with NO_COLOR), and the progress of long
work; in a pipe there is plain text in whole lines, and nothing on standard error but errors.
`-o json` gives scripts one object or array, with exact figures and keys that stay; `stream`, `run`
and `create --from` give an object a line, as it comes. An error is one line on standard error.
"""


def page() -> str:
    os.environ["COLUMNS"] = "80"
    parts = [START, exit_codes(), choosing_a_server(), help_of()]
    for heading, commands in SECTIONS.items():
        parts.append(f"## {heading}\n")
        for name in commands:
            parts += [help_of(*words) for words in words_of(name)]
    return "\n".join(parts)


def exit_codes() -> str:
    rows = [f"| {code.value} | {text} |" for code, text in MEANINGS.items()]
    return "\n".join(["## Exit codes\n", "| code | when |", "|---|---|", *rows, ""])


def choosing_a_server() -> str:
    return f"## Which server\n\n{inspect.cleandoc(connection.__doc__ or '')}\n"


def words_of(name: str) -> Iterator[list[str]]:
    """What one types for the command, and for each of those below it."""
    yield [name]
    command = main.get_command(click.Context(main), name)
    if isinstance(command, click.Group):
        yield from ([name, inner] for inner in command.commands)


def help_of(*words: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*words, "--help"], prog_name="jobworker")
    return f"### {' '.join(['jobworker', *words])}\n\n```text\n{shown.getvalue()}```\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(page())
