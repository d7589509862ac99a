"""Where a server is, and how to connect to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from jobworker.dev import dev_record
from jobworker.errors import CertificateError

PATH = "/job_worker.JobService/"
DEFAULT_PORT = 50051
DEFAULT_ADDRESS = f"localhost:{DEFAULT_PORT}"
DEFAULT_CERTS = "certs"

# By which clients of this protocol have always called their server, wherever it runs.
SERVER_NAMES = ("job-worker", "localhost")

CLIENT_CERT = "client-cert.pem"
CLIENT_KEY = "client-key.pem"

# What a file has to be, and how it comes to be that.
CERTIFICATE = "a certificate", "openssl x509 -outform pem"
KEY = "a private key", "openssl pkey -outform pem"

OPTIONS: list[tuple[str, Any]] = [
    # A connection of its own: closing one client never touches another.
    ("grpc.use_local_subchannel_pool", 1),
    # How soon a lost connection is tried again: by default up to 120 s later.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Notices a peer that has vanished without a word, some 60 s after the ping. Many servers
    # turn clients away that ping more often than every 5 minutes.
    ("grpc.keepalive_time_ms", 330_000),
    # The errors of many creates quote what was asked for, with escapes: more than the 4 MiB
    # that a request may have.
    ("grpc.max_receive_message_length", 32 << 20),
]

# How gRPC's core words it (no code tells it apart).
OTHER_NAME = "Hostname Verification Check failed"


@dataclass(frozen=True, slots=True)
class Files:
    """The PEM files of a client."""

    ca: Path
    cert: Path
    key: Path

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises CertificateError where one is missing, unreadable or no PEM."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read_pem(self.ca, *CERTIFICATE),
            private_key=_read_pem(self.key, *KEY),
            certificate_chain=_read_pem(self.cert, *CERTIFICATE),
        )


def server_of(
    address: str | None, certs: Path | str | None, ca: Path | str | None
) -> tuple[str, Path | str | None]:
    """Address and folder of certificates: as for commands, those that `jobworker serve --dev` has
    left where no CA is given and there is no ./certs."""
    record = {}
    if certs is None and ca is None and not Path(DEFAULT_CERTS).is_dir():
        record = dev_record(os.environ)
    return address or record.get("address", DEFAULT_ADDRESS), certs or record.get("certs")


def files_in(
    folder: Path | str | None,
    ca: Path | str | None,
    cert: Path | str | None,
    key: Path | str | None,
) -> Files:
    """Where only one of a certificate and its key is given, the other is NAME-key.pem beside
    NAME-cert.pem, or as usual in the folder. Raises CertificateError where it is in neither."""
    folder = Path(DEFAULT_CERTS if folder is None else folder)
    files = Files(
        ca=Path(ca or folder / "ca-cert.pem"),
        cert=Path(cert or _beside(key, "-key.pem", "-cert.pem") or folder / CLIENT_CERT),
        key=Path(key or _beside(cert, "-cert.pem", "-key.pem") or folder / CLIENT_KEY),
    )
    if cert and not key and not files.key.exists():
        raise CertificateError(cert, "has no key beside it", "give both as cert and key")
    if key and not cert and not files.cert.exists():
        raise CertificateError(key, "has no certificate beside it", "give both as cert and key")
    return files


def _beside(path: Path | str | None, ending: str, other_ending: str) -> Path | None:
    if path is None or not str(path).endswith(ending):
        return None
    other = Path(str(path).removesuffix(ending) + other_ending)
    return other if other.exists() else None


class Target:
    """One server, by the names for which its certificate may be valid."""

    def __init__(self, address: str, files: Files, server_name: str | None) -> None:
        """server_name: None tries those that servers of this protocol have, then the
        address's own. Raises CertificateError."""
        self.address = address if ":" in address else f"{address}:{DEFAULT_PORT}"
        self.files = files
        self.credentials = files.credentials()
        host = self.address.rpartition(":")[0].strip("[]")
        names = (server_name,) if server_name else (*SERVER_NAMES, host)
        self.names = tuple(dict.fromkeys(names))

    def options(self, name: str) -> list[tuple[str, Any]]:
        return [*OPTIONS, ("grpc.ssl_target_name_override", name)]


def is_other_name(error: grpc.RpcError) -> bool:
    """The server has shown a certificate, and it is for another name."""
    return OTHER_NAME in (error.details() or "")


def _read_pem(path: Path, kind: str, command: str) -> bytes:
    """As far as gRPC reads, which ends the whole process where nothing is left."""
    pem = _read(path).partition(b"\0")[0]
    if b"-----BEGIN " not in pem:
        raise CertificateError(path, f"is not {kind} in PEM form", f"convert it: {command}")
    return pem


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CertificateError(path, "is missing", _remedy_for_missing(path)) from None
    except OSError as error:
        raise CertificateError(
            path, f"cannot be read: {error.strerror}", "give this user the right to read it"
        ) from None


def _remedy_for_missing(path: Path) -> str:
    """Many have their pair under their own name, as `jobworker certs client` makes it."""
    others = _pairs_in(path.parent) - {"ca", "server", "client"}
    if path.name in {CLIENT_CERT, CLIENT_KEY} and others:
        name = min(others)
        return (
            f"{name}-cert.pem and {name}-key.pem are there: give them as cert and key, or "
            "rename them"
        )
    if path.name not in {"ca-cert.pem", CLIENT_CERT, CLIENT_KEY}:  # it was named as it is
        return "give the path of one that is there"
    return "give the folder of the certificates as certs"


def _pairs_in(folder: Path) -> set[str]:
    """Each NAME of which NAME-cert.pem and NAME-key.pem are there."""
    keys = {path.name.removesuffix("-key.pem") for path in folder.glob("*-key.pem")}
    return {name for name in keys if (folder / f"{name}-cert.pem").exists()}
