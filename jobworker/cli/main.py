"""The program `jobworker`: its commands, each loaded only when it is called."""

from __future__ import annotations

import importlib
import sys

import click

from jobworker import __version__

# The module that has it (its function has the command's name, dashes as underscores).
COMMANDS = {
    "serve": "jobworker.cli.serve",
}


class LazyGroup(click.Group):
    """Imports a command's module when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = getattr(importlib.import_module(module), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jobworker")
def main() -> None:
    """Runs commands as jobs, each in its own cgroup, and streams their output live."""


def serve_main() -> None:
    """The program `job-worker`: `jobworker serve`."""
    main(["serve", *sys.argv[1:]], prog_name="job-worker")
