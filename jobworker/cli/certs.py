"""`jobworker certs`: making certificates, and looking at them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobworker.cli import display
from jobworker.cli.connection import (
    DEFAULT_CERTS,
    VALUES,
    Function,
    choose,
    flags_of,
    server_options,
)
from jobworker.cli.display import coloured, json_option, printable

if TYPE_CHECKING:
    from jobworker.certs import Description

ROLES = ("admin", "user", "viewer")


@click.group("certs")
def certs_command() -> None:
    """Makes certificates, and shows what they say."""


def _default_folder() -> Path:
    given = click.get_current_context().find_root().params.get("certs")
    return Path(given or os.environ.get(VALUES["certs"][0]) or DEFAULT_CERTS)


folder_argument = click.argument(
    "folder",
    required=False,
    type=click.Path(file_okay=False, path_type=Path),
    callback=lambda _ctx, _param, value: value or _default_folder(),
)


def names_option(default: str = "") -> Callable[[Function], Function]:
    """Of a server's certificate. default: what it has without, for the help."""
    return click.option(
        "--name",
        "names",
        multiple=True,
        metavar="HOST",
        help="A name or address by which clients reach the server, beside localhost and this "
        f"host's own; may be given again.{default}",
    )


force_option = click.option("--force", is_flag=True, help="Replaces files that are there.")

FOLDER_TEXT = "FOLDER is $JOB_WORKER_CERT_PATH, or ./certs, if it is not given."


@certs_command.command("init", epilog=FOLDER_TEXT)
@folder_argument
@names_option()
@click.option(
    "--force",
    is_flag=True,
    help="Replaces files that are there, the CA too: every client then needs a new certificate. "
    "`certs server` renews the server's alone.",
)
@json_option
def init(folder: Path, names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Makes a CA, and with it a server, an admin and a viewer.

    client-cert.pem and client-key.pem are the admin's: commands use them by themselves.
    """
    from jobworker import certs

    had_authority = (folder / certs.CA_CERT).exists()
    _show_made(certs.make_all(folder, names, force=force), as_json)
    if had_authority:
        click.echo(
            "The CA is a new one: clients with certificates of the one before are refused until "
            "they have this ca-cert.pem and a new certificate (`jobworker certs client`).",
            err=True,
        )


@certs_command.command("server", epilog=FOLDER_TEXT)
@folder_argument
@names_option(" Without it, those of the certificate that is there.")
@json_option
def server(folder: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Makes the server's certificate anew, with the CA that is there.

    Replaces server-cert.pem and server-key.pem. A server that runs takes them by itself, and
    clients need nothing new.
    """
    from jobworker import certs

    _show_made(certs.make_server(folder, names), as_json)


@certs_command.command("client", epilog=FOLDER_TEXT)
@folder_argument
@click.option(
    "--name",
    required=True,
    help="Who it is for; also names the files. A user's jobs are those of its name: give each to "
    "one client only.",
)
@click.option(
    "--role",
    required=True,
    type=click.Choice(ROLES, case_sensitive=False),
    help="admin may do all; user may create jobs, and do all to its own; viewer may get, list and "
    "stream all.",
)
@force_option
@json_option
def client(folder: Path, name: str, role: str, force: bool, as_json: bool) -> None:
    """Makes the certificate of one more client.

    The client needs NAME-cert.pem, NAME-key.pem and ca-cert.pem, never ca-key.pem.
    """
    from jobworker import certs

    _show_made(certs.make_client(folder, name, role, force=force), as_json)


@certs_command.command("revoke")
@click.argument("certificate", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--list",
    "list_path",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file that the server's JOB_WORKER_REVOKED names; made if it is not there.",
)
@json_option
def revoke(certificate: Path, list_path: Path, as_json: bool) -> None:
    """Ends what the certificate in a file allows.

    Adds its serial number to a list. A server that has this list refuses its owner within
    seconds, and ends what the owner follows; the owner's jobs run on.
    """
    from jobworker import certs

    serial = certs.revoke(list_path, certificate)
    if as_json:
        display.write_json({"serial": serial, "list": str(list_path)})
        return
    click.echo(f"Revoked {serial} in {list_path}")


def _show_made(paths: Sequence[Path], as_json: bool) -> None:
    if as_json:
        display.write_json({"made": [str(path) for path in paths]})
        return
    for path in paths:
        click.echo(f"Made {path}")


@certs_command.command("show", epilog="Without PATH, those that the other commands use.")
@click.argument("place", metavar="[PATH]", required=False, type=click.Path(path_type=Path))
@json_option
@server_options(hidden=True)
def show(place: Path | None, as_json: bool, **flags: str | None) -> None:
    """Shows who, which role, until when, and what is wrong.

    PATH is a folder of certificates, or a single one.
    """
    from jobworker import certs

    paths = _certificates_at(place) if place else _certificates_in_use(flags)
    described = [(path, certs.describe(path)) for path in paths]
    if as_json:
        display.write_json([_as_json(path, description) for path, description in described])
        return
    header = ["FILE", "FOR", "ROLE", "UNTIL", "NAMES"]
    display.write_table(header, [_row(path, description) for path, description in described])
    for path, description in described:
        for warning in description.warnings:
            display.write_paragraph(coloured(f"{path.name}: {warning}", "yellow"))


def _certificates_at(path: Path) -> list[Path]:
    from jobworker.errors import CertificateError

    if path.is_file():
        return [path]
    remedy = "make some: `jobworker certs init`"
    if not path.exists():
        raise CertificateError(path, "does not exist", f"give another folder, or {remedy}")
    found = sorted(path.glob("*-cert.pem"))
    if not found:
        raise CertificateError(path, "has no *-cert.pem", remedy)
    return found


def _certificates_in_use(flags: Mapping[str, str | None]) -> list[Path]:
    """All in the folder, and those that are given one by one."""
    chosen = choose(flags_of(click.get_current_context(), flags), os.environ)
    single = [Path(chosen[name]) for name in ("ca", "cert") if name in chosen]
    if single and "certs" not in chosen:
        return single
    folder = Path(chosen.get("certs", DEFAULT_CERTS))
    return list(dict.fromkeys([*_certificates_at(folder), *single]))


def _row(path: Path, description: Description) -> list[str]:
    return [
        path.name,
        printable(description.name) or "-",
        printable(_role(description)) or "-",
        f"{description.expires:%Y-%m-%d}",
        printable(", ".join(description.alternative_names)) or "-",
    ]


def _role(description: Description) -> str:
    return "CA" if description.is_authority else ", ".join(description.units)


def _as_json(path: Path, description: Description) -> dict[str, Any]:
    return {
        "file": str(path),
        "name": description.name,
        "is_ca": description.is_authority,
        "units": list(description.units),
        "alternative_names": list(description.alternative_names),
        "expires": description.expires.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "warnings": list(description.warnings),
    }
