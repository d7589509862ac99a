"""`jobworker serve`: the server, in the foreground."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jobworker import config
from jobworker.errors import SettingError


def _with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """An option for each setting."""
    for _, option in reversed(list(config.options())):
        function = click.option(
            option.flag,
            option.name,
            metavar="VALUE",
            help=f"{option.help} [{option.variable}; default: {option.shown_default}]",
        )(function)
    return function


@click.command()
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"A TOML file with settings, by the names of the flags. [{config.FILE_VARIABLE}]",
)
@_with_settings
def serve(config_file: Path | None, **flags: Any) -> None:
    """Runs the server until SIGTERM or Ctrl-C."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = config.load(given, os.environ, config_file)
    except SettingError as error:
        raise click.ClickException(f"cannot start: {error}") from error
    # Late: what it imports takes longer than reading the settings.
    from jobworker import daemon

    sys.exit(daemon.main(settings))
