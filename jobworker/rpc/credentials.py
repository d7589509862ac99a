"""What the server shows and whom it trusts: read again when the files change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc

from jobworker.certs import (
    CA_CERT,
    SERVER_CERT,
    SERVER_KEY,
    check_server_files,
    end_of_server,
    notice_of_end,
)
from jobworker.errors import CertificateError
from jobworker.rpc.watch import WatchedFiles

log = logging.getLogger(__name__)

NOTICE_SECONDS = 86400.0  # from one notice of the end to the next


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
        self._end: datetime  # of the server's certificate
        self._noticed_at: float
        paths = [folder / name for name in (CA_CERT, SERVER_CERT, SERVER_KEY)]
        self.files = WatchedFiles("server's certificates", paths, self._load, self._use, on_outcome)

    def for_grpc(self) -> grpc.ServerCredentials:
        # A client's certificate stays required, whatever is fetched later.
        assert self._current is not None
        fetch: Any = self._fetch  # its stub does not know of None
        return grpc.dynamic_ssl_server_credentials(
            self._current, fetch, require_client_authentication=True
        )

    def look(self) -> None:
        """Tells of the end of the server's certificate, once a day from some time before it."""
        if time.monotonic() < self._noticed_at + NOTICE_SECONDS:
            return
        if notice := notice_of_end(self._folder, self._end):
            log.warning("%s", notice)
            self._noticed_at = time.monotonic()

    def _load(self) -> tuple[grpc.ServerCertificateConfiguration, datetime]:
        check_server_files(self._folder)
        end = end_of_server(self._folder)
        try:
            authority, certificate, key = (
                (self._folder / name).read_bytes() for name in (CA_CERT, SERVER_CERT, SERVER_KEY)
            )
        except OSError as error:  # gone since the check
            raise CertificateError(self._folder, f"cannot be read: {error}", "try again") from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority), end

    def _use(self, loaded: tuple[grpc.ServerCertificateConfiguration, datetime]) -> None:
        configuration, self._end = loaded
        self._current = self._new = configuration
        self._noticed_at = -NOTICE_SECONDS
        self.look()

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """None: no change. gRPC keeps what it was given last."""
        self._on_handshake()
        new, self._new = self._new, None
        return new
