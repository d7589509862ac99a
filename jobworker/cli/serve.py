"""`jobworker serve`: the server, in the foreground."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from jobworker import config
from jobworker.cli.connection import is_loopback
from jobworker.config import Settings
from jobworker.dev import dev_folder, make_dev_folder, write_dev_record
from jobworker.errors import SettingError, StartupError

DEV_ADDRESS = "127.0.0.1:50051"


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


@click.command("serve")
@click.option(
    "--dev",
    is_flag=True,
    help="For trying out: makes certificates on first use and listens on this machine only. "
    "Commands of the same user then need no options. All is in ~/.local/share/jobworker/dev.",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help=f"A TOML file with settings, by the names of the flags. [{config.FILE_VARIABLE}]",
)
@_with_settings
def serve_command(dev: bool, config_file: Path | None, **flags: Any) -> None:
    """Runs the server until SIGTERM or Ctrl-C."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = _load(given, config_file, is_development=dev)
    except StartupError as error:
        raise click.ClickException(f"cannot start: {error}") from error
    # Late: what it imports takes longer than reading the settings.
    from jobworker import daemon

    def leave_record() -> None:
        """By which commands find the server."""
        if dev:
            write_dev_record(os.environ, settings.address, settings.cert_path)

    code = daemon.main(settings, leave_record)
    logging.shutdown()
    sys.stdout.flush()
    # Without waiting for threads: one may look at a filesystem that does not answer.
    os._exit(code)


def _load(given: Mapping[str, str], config_file: Path | None, *, is_development: bool) -> Settings:
    if not is_development:
        return config.load(given, os.environ, config_file)
    certs_folder = dev_folder(os.environ) / "certs"
    # A folder of its own: what was tried out is not to be among the jobs of a real server.
    state_folder = dev_folder(os.environ) / "state"
    defaults = {
        "addr": DEV_ADDRESS,
        "cert_path": str(certs_folder),
        "state_dir": str(state_folder),
    }
    settings = config.load(given, os.environ, config_file, defaults)
    if not is_loopback(settings.address) or settings.address.endswith(":0"):
        remedy = f"with --dev use one of this machine only, such as {DEV_ADDRESS}"
        raise SettingError("addr", settings.address, "is not possible", remedy)
    _prepare_development(settings)
    return settings


def _prepare_development(settings: Settings) -> None:
    """Certificates, if there are none."""
    from jobworker import certs

    make_dev_folder(os.environ)
    if not (settings.cert_path / certs.CA_CERT).exists():
        certs.make_all(settings.cert_path)
