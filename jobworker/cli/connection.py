"""Which server a command speaks to, and with which certificate.

Each of six values comes from the first of these that has it:

1. a flag, `--server` and so on: before the command's name or after it
2. the environment: JOB_WORKER_SERVER and so on
3. the server that the file ~/.config/jobworker/config.toml calls its default
4. where none of these says which CA or folder of certificates: ./certs if there is such a
   folder, else what `jobworker serve --dev` of this user has left
5. localhost:50051 and ./certs

Of NAME-cert.pem or NAME-key.pem alone, the other is taken if it is beside it.

A server may be HOST:PORT, or a name in that file, which brings its values with it. Where it is
no such name, the port 50051 may be left out of an address, of localhost, and of a host's name
that has a dot.

    default = "farm"

    [servers.farm]
    address = "farm.example.org:50051"
    certs = "~/certs/farm"
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobworker.cli.display import remark
from jobworker.cli.exit_codes import CERTIFICATES_HINT, HINT
from jobworker.dev import dev_record, xdg_folder
from jobworker.errors import SettingError

if TYPE_CHECKING:
    from jobworker.client import Client

DEFAULT_PORT = 50051
DEFAULT_ADDRESS = f"localhost:{DEFAULT_PORT}"
DEFAULT_CERTS = Path("certs")

# By the names of the flags: the variable, and what it is.
VALUES = {
    "server": ("JOB_WORKER_SERVER", "HOST:PORT, or a name from the configuration file."),
    "certs": (
        "JOB_WORKER_CERT_PATH",
        "Folder with ca-cert.pem, client-cert.pem and client-key.pem.",
    ),
    "ca": ("JOB_WORKER_CA", "The CA's certificate, if it is elsewhere."),
    "cert": ("JOB_WORKER_CERT", "The client's certificate, if it is elsewhere."),
    "key": ("JOB_WORKER_KEY", "The client's key, if it is elsewhere."),
    "server_name": (
        "JOB_WORKER_SERVER_NAME",
        "The name that must be in the server's certificate, if it is not the host's.",
    ),
}
FILES = ("certs", "ca", "cert", "key")
KEYS_IN_FILE = {"address", "certs", "ca", "cert", "key", "server_name"}


Connect = Callable[..., "Client"]
Function = Callable[..., Any]


# Options


def server_options(*, hidden: bool = False) -> Callable[[Function], Function]:
    """An option for each of VALUES."""

    def decorate(function: Function) -> Function:
        for name, (variable, text) in reversed(VALUES.items()):
            flag = "--" + name.replace("_", "-")
            flags = (flag, "-s") if name == "server" else (flag,)
            metavar = "SERVER" if name == "server" else "PATH" if name in FILES else "NAME"
            function = click.option(
                *flags, name, metavar=metavar, hidden=hidden, help=f"{text} [{variable}]"
            )(function)
        return function

    return decorate


def speaks_to_server(function: Function) -> Function:
    """The command's first argument is a function that connects.

    The flags that choose the server stand with the program's own in the help, and may stand
    after the command's name as well.
    """

    @server_options(hidden=True)
    @click.pass_context
    @functools.wraps(function)
    def command(context: click.Context, /, **params: Any) -> Any:
        own = {name: params.pop(name) for name in VALUES}
        return function(functools.partial(connect, flags_of(context, own)), **params)

    return command


def flags_of(context: click.Context, own: Mapping[str, str | None]) -> dict[str, str]:
    """What was given before the command's name and after it (stronger)."""
    root = context.find_root().params
    flags = {name: own.get(name) or root.get(name) for name in VALUES}
    return {name: value for name, value in flags.items() if value is not None}


# Connecting


def connect(
    flags: Mapping[str, str], *, timeout_seconds: float = 30.0, patience_seconds: float = 60.0
) -> Client:
    """A client of the server that flags, environment and files choose. It connects with its
    first call.

    timeout_seconds: of each call. patience_seconds: how long streams try to get a broken
    connection back.
    """
    chosen = choose(flags, os.environ)
    if context := click.get_current_context(silent=True):
        context.meta[HINT] = _hint(chosen, os.environ)
        context.meta[CERTIFICATES_HINT] = _certificates_hint(chosen, os.environ)
    # Read when grpc is imported: its core would write lines of its own to standard error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from jobworker.client import Client

    if sys.stderr.isatty():
        _tell_of_breaks()
    return Client(
        chosen.pop("address", DEFAULT_ADDRESS),
        certs=chosen.pop("certs", None),
        ca=chosen.pop("ca", None),
        cert=chosen.pop("cert", None),
        key=chosen.pop("key", None),
        server_name=chosen.pop("server_name", None),
        timeout=timeout_seconds,
        patience=patience_seconds,
    )


def _tell_of_breaks() -> None:
    """While a connection is being made again, nothing happens that would explain itself."""
    import logging

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            remark(record.getMessage())

    log = logging.getLogger("jobworker.client")
    log.setLevel(logging.INFO)
    log.addHandler(Teller())


def choose(flags: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """address, certs, ca, cert, key and server_name, as far as anything says them.

    Raises SettingError.
    """
    from_environ = {
        name: environ[variable] for name, (variable, _) in VALUES.items() if environ.get(variable)
    }
    file = ConfigFile(config_path(environ))
    layers = [_with_named(flags, file), _with_named(from_environ, file)]
    if not any("address" in layer for layer in layers):
        layers.append(file.default())
    chosen = _first_of_each(layers)
    if not chosen.keys() & {"certs", "ca"}:
        chosen = _first_of_each([chosen, _fallback(environ)])
    return chosen


def _with_named(layer: Mapping[str, str], file: ConfigFile) -> dict[str, str]:
    """The same, with what the file says of the server that it names."""
    values = dict(layer)
    server = values.pop("server", None)
    if server is None:
        return values
    is_name = ":" not in server and server in file.names()
    named = file.server(server) if is_name else {"address": _address(server, file)}
    return _first_of_each([values, named])


def _address(server: str, file: ConfigFile) -> str:
    """HOST:PORT. Raises SettingError."""
    host = server.strip("[]")
    if _is_ip_address(host):
        return f"[{host}]:{DEFAULT_PORT}" if ":" in host else f"{host}:{DEFAULT_PORT}"
    if ":" in server and not server.endswith(":"):
        if remedy := _wrong_with(server):
            raise SettingError("server", server, "cannot be used", remedy)
        return server
    if host == "localhost" or re.fullmatch(r"\w[\w.-]*\.[\w.-]*\w", host):
        return f"{host}:{DEFAULT_PORT}"
    remedy = f"as HOST:PORT its port is missing, and it is no name from {file.told()}"
    raise SettingError("server", server, "cannot be used", remedy)


def _wrong_with(address: str) -> str:
    """What has a colon, and is no HOST:PORT: why not; "": it is one."""
    scheme = re.match(r"https?://", address, re.IGNORECASE)
    if scheme:
        return f"leave out {scheme[0]} and what comes after the port, as in farm.example.org:50051"
    host, _, port = address.rpartition(":")
    if not host:
        return f"the host before the port is missing, as in localhost{address}"
    if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 1 << 16):
        return f"the port {port!r} is no number from 1 to 65535"
    return ""


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _first_of_each(layers: list[dict[str, str]]) -> dict[str, str]:
    """Each value from the first layer that has it, but no single file beside a folder that is
    stronger: they would not fit together."""
    chosen: dict[str, str] = {}
    for layer in layers:
        is_folder_chosen = "certs" in chosen
        for name, value in layer.items():
            if not (is_folder_chosen and name in FILES):
                chosen.setdefault(name, value)
    return chosen


def _fallback(environ: Mapping[str, str]) -> dict[str, str]:
    if DEFAULT_CERTS.is_dir():
        return {"certs": str(DEFAULT_CERTS)}
    return dev_record(environ)


# The configuration file


def config_path(environ: Mapping[str, str]) -> Path:
    return xdg_folder(environ, "XDG_CONFIG_HOME", ".config") / "jobworker" / "config.toml"


class ConfigFile:
    """Named servers, and which of them is the default. A file that is not there names none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def default(self) -> dict[str, str]:
        name = self._content.get("default")
        return {} if name is None else self.server(str(name))

    def server(self, name: str) -> dict[str, str]:
        """Its values by name. Raises SettingError for one that is not there, or not right."""
        if name not in self.names():
            raise SettingError("server", name, "no such name", f"use one from {self.told()}")
        values = self._content["servers"][name]
        if (
            not isinstance(values, dict)
            or not values.keys() <= KEYS_IN_FILE
            or not all(isinstance(value, str) for value in values.values())
        ):
            remedy = f"give it texts for some of {', '.join(sorted(KEYS_IN_FILE))}"
            raise SettingError(f"servers.{name} in {self._path}", values, "not right", remedy)
        return {
            key: self._path_of(value) if key in FILES else value for key, value in values.items()
        }

    def names(self) -> list[str]:
        servers = self._content.get("servers", {})
        return list(servers) if isinstance(servers, dict) else []

    def told(self) -> str:
        """Where it is, and which names it has."""
        return f"{self._path} (there: {', '.join(self.names()) or 'none yet'})"

    def _path_of(self, text: str) -> str:
        """Relative to the file, not to wherever the command is typed."""
        return str(self._path.parent / Path(text).expanduser())

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        import tomllib

        try:
            return tomllib.loads(self._path.read_text("utf-8"))
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise SettingError("configuration file", self._path, problem, "mend it") from error
        except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
            problem = f"is not TOML: {error}"
            remedy = 'write lines such as default = "farm"'
            raise SettingError("configuration file", self._path, problem, remedy) from error


# Beside it


def _hint(chosen: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """What else may be wanted where this server cannot be reached; "": nothing."""
    if not chosen.keys() & set(FILES):
        return "or start a server to try out: `jobworker serve --dev`"
    record = dev_record(environ)
    if "address" not in chosen and record and _port(record["address"]) != str(DEFAULT_PORT):
        return _other_than(record, chosen)
    return ""


def _certificates_hint(chosen: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """The same, where the certificates may be why."""
    record = dev_record(environ)
    if not record or chosen.keys() & {"ca", "cert", "key", "server_name"}:
        return ""
    address = chosen.get("address", DEFAULT_ADDRESS)
    is_its_server = is_loopback(address) and _port(address) == _port(record["address"])
    if is_its_server or "address" not in chosen:
        return _other_than(record, chosen)
    if chosen.get("certs") == record["certs"]:
        return "the certificates are what `jobworker serve --dev` has left; use --certs for others"
    return ""


def _other_than(record: Mapping[str, str], chosen: Mapping[str, str]) -> str:
    is_default = chosen.get("certs") == str(DEFAULT_CERTS)
    if not is_default or Path(record["certs"]) == DEFAULT_CERTS.absolute():
        return ""
    flags = f"-s {record['address']} --certs {record['certs']}"
    return f"./certs was used, not what `jobworker serve --dev` has left; for that: {flags}"


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    return host in {"localhost", "::1"} or re.fullmatch(r"127(\.\d+){3}", host) is not None
