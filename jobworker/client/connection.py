"""Where a server is, how to connect to it, and what its gRPC errors mean to a caller."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jobworker.errors import (
    CallError,
    CertificateError,
    DeadlineError,
    ExhaustedError,
    ForbiddenError,
    RejectedError,
    UnknownJobError,
    UnreachableError,
    UnsupportedError,
    WrongStateError,
)

PATH = "/job_worker.JobService/"
DEFAULT_PORT = 50051

# By which clients of this protocol have always called their server, wherever it runs.
SERVER_NAMES = ("job-worker", "localhost")

CLIENT_CERT = "client-cert.pem"
CLIENT_KEY = "client-key.pem"

COMMAND_ERRNO = "command-errno"  # in the trailing metadata of CreateJob

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

ERRORS: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: UnknownJobError,
    grpc.StatusCode.INVALID_ARGUMENT: RejectedError,
    grpc.StatusCode.OUT_OF_RANGE: RejectedError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    grpc.StatusCode.UNAUTHENTICATED: ForbiddenError,
    grpc.StatusCode.FAILED_PRECONDITION: WrongStateError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
}

# Only waiting for a job has a deadline for its stream.
DEADLINES = {"GetJobsStream": "the job has not ended"}

# What reading an answer raises where it is none of this contract.
UNREADABLE = (DecodeError, ValueError)

# How gRPC's core words what has happened (no code tells these apart).
NOT_CONNECTED = re.compile(r"failed to connect|errors resolving|DNS resolution failed")
OTHER_NAME = "Hostname Verification Check failed"
# The connection broke, or a proxy between here and there reset the stream.
BROKEN = re.compile(r"RST_STREAM|Stream removed")


@dataclass(frozen=True, slots=True)
class Files:
    """The PEM files of a client."""

    ca: Path
    cert: Path
    key: Path

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises CertificateError where one is missing or unreadable."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca),
            private_key=_read(self.key),
            certificate_chain=_read(self.cert),
        )


def files_in(
    folder: Path | str | None,
    ca: Path | str | None,
    cert: Path | str | None,
    key: Path | str | None,
) -> Files:
    """Where only one of a certificate and its key is given, the other is NAME-key.pem beside
    NAME-cert.pem, or as usual in the folder. Raises CertificateError where it is in neither."""
    folder = Path("certs" if folder is None else folder)
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


def error_from(error: grpc.RpcError, rpc: str, target: Target) -> CallError:
    """What the caller gets. Blocks where it has to find out why there is no connection."""
    code, details = error.code(), error.details() or ""
    if BROKEN.search(details):
        code = grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.UNAVAILABLE:
        if NOT_CONNECTED.search(details):
            # Late: slow to import, and needed only here.
            from jobworker.client import diagnosis

            problem = diagnosis.explain(details, target.address, target.files, target.names)
            return UnreachableError(rpc, code.name, f"{target.address}: {problem}")
        problem = f"{target.address}: the connection broke ({details})"
        return UnreachableError(rpc, code.name, problem, was_connected=True)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = f"{target.address}: {DEADLINES.get(rpc, rpc + ' was not answered')} in time"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        details = f"{target.address}: this server is too old for {rpc}"
    failure = ERRORS.get(code, CallError)(rpc, code.name, details)
    if isinstance(failure, RejectedError):
        failure.command_errno = _command_errno(error)
    return failure


def _command_errno(error: grpc.RpcError) -> int:
    """0: the server has not told any."""
    metadata: Any = error.trailing_metadata()  # pairs; its type stub says otherwise
    for name, value in metadata or ():
        if name == COMMAND_ERRNO and str(value).isdecimal():
            return int(value)
    return 0


def unreadable(error: Exception, rpc: str, target: Target) -> CallError:
    """For an answer that is none of this contract."""
    problem = f"{target.address}: cannot understand the answer to {rpc}: {error}"
    return CallError(rpc, "INTERNAL", problem)


def unsupported(rpc: str, needs: tuple[str, ...], target: Target) -> UnsupportedError:
    what = ", ".join(needs)
    problem = f"{target.address}: this server is too old for {what}, and would ignore it"
    return UnsupportedError(rpc, "UNIMPLEMENTED", problem)


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
    return "give the folder of the certificates as certs"


def _pairs_in(folder: Path) -> set[str]:
    """Each NAME of which NAME-cert.pem and NAME-key.pem are there."""
    keys = {path.name.removesuffix("-key.pem") for path in folder.glob("*-key.pem")}
    return {name for name in keys if (folder / f"{name}-cert.pem").exists()}
