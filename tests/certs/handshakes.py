"""TLS handshakes of Python's ssl."""

from __future__ import annotations

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobworker import certs


def server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    context.load_verify_locations(folder / "ca-cert.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(folder: Path, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(folder / f"{name}-cert.pem", folder / f"{name}-key.pem")
    context.load_verify_locations(folder / "ca-cert.pem")
    return context


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
    """Connects for real. Returns the CN that the server saw; raises the client's SSLError, or
    else the server's."""
    server_end, client_end = socket.socketpair()

    def serve() -> str:
        with server_end, server.wrap_socket(server_end, server_side=True) as connection:
            connection.sendall(b"x")
            certificate = connection.getpeercert(binary_form=True)
            assert certificate is not None
            return certs.subject_of(ssl.DER_cert_to_PEM_cert(certificate).encode())[0]

    with ThreadPoolExecutor(max_workers=1) as executor:
        seen = executor.submit(serve)
        with client_end, client.wrap_socket(client_end, server_hostname=name) as connection:
            # In TLS 1.3 the client learns only here whether it was accepted.
            assert connection.recv(1) == b"x"
        return seen.result(timeout=10)
