"""What the server shows and whom it trusts: read again when the files change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from jobworker.certs import CA_CERT, SERVER_CERT, SERVER_KEY, check_server_files, notice_of_end
from jobworker.errors import CertificateError
from jobworker.rpc.watch import WatchedFiles

log = logging.getLogger(__name__)


class Credentials:
    """The server's certificate, its key, and the CA of its clients.

    A connection keeps what it began with; the next handshake takes what is there now.
    """

    def __init__(
        self,
        folder: Path,
        on_handshake: Callable[[], None],
        on_outcome: Callable[[str, str], None],
    ) -> None:
        """on_handshake: is called at the begin of each, in a thread of gRPC's.
        on_outcome: as of WatchedFiles. Raises CertificateError."""
        self._folder = folder
        self._on_handshake = on_handshake
        self._current: grpc.ServerCertificateConfiguration | None = None
        self._new: grpc.ServerCertificateConfiguration | None = None
        paths = [folder / name for name in (CA_CERT, SERVER_CERT, SERVER_KEY)]
        self.files = WatchedFiles("server's certificates", paths, self._load, self._use, on_outcome)

    def for_grpc(self) -> grpc.ServerCredentials:
        # A client's certificate stays required, whatever is fetched later.
        assert self._current is not None
        fetch: Any = self._fetch  # its stub does not know of None
        return grpc.dynamic_ssl_server_credentials(
            self._current, fetch, require_client_authentication=True
        )

    def _load(self) -> grpc.ServerCertificateConfiguration:
        check_server_files(self._folder)
        if notice := notice_of_end(self._folder):
            log.warning("%s", notice)
        try:
            authority, certificate, key = (
                (self._folder / name).read_bytes() for name in (CA_CERT, SERVER_CERT, SERVER_KEY)
            )
        except OSError as error:  # gone since the check
            raise CertificateError(self._folder, f"cannot be read: {error}", "try again") from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    def _use(self, configuration: grpc.ServerCertificateConfiguration) -> None:
        self._current = self._new = configuration

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """None: no change. gRPC keeps what it was given last."""
        self._on_handshake()
        new, self._new = self._new, None
        return new
