"""What a caller is told where there is no connection: which it probably is, and what to do."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from client.conftest import Connect
from functional.server import Server
from jobworker import certs
from jobworker.certs import making
from jobworker.errors import CertificateError, UnreachableError


@pytest.fixture(scope="module")
def other_certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    certs.make_all(folder)
    return folder


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Something that is no job server, at this address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


def with_tls(folder: Path, version: ssl.TLSVersion) -> Callable[[socket.socket], object]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    context.set_alpn_protocols(["h2"])
    context.maximum_version = version

    def answer(connection: socket.socket) -> None:
        connection.settimeout(5)
        with context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.recv(1)

    return answer


def test_nobody_listens(connect: Connect) -> None:
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1: nobody listens there"):
        connect("127.0.0.1:1").info()


def test_a_host_without_an_address(connect: Connect) -> None:
    with pytest.raises(UnreachableError, match="host's name is not known"):
        connect("no-such-host.invalid:50051").info()


def test_no_tls(connect: Connect) -> None:
    with (
        listening(lambda connection: connection.sendall(b"220 mail.example ESMTP\r\n")) as address,
        pytest.raises(UnreachableError, match="does not speak TLS"),
    ):
        connect(address).info()


def test_what_hangs_up_at_once(connect: Connect) -> None:
    with (
        listening(socket.socket.close) as address,
        pytest.raises(UnreachableError, match="hangs up at once"),
    ):
        connect(address).info()


def test_the_server_has_another_ca(
    connect: Connect, server: Server, other_certificates: Path
) -> None:
    with pytest.raises(UnreachableError, match=r"not signed by the CA in .*ca-cert\.pem"):
        connect(server.address, certs=other_certificates).info()


def test_the_client_has_another_ca(
    connect: Connect, server: Server, other_certificates: Path
) -> None:
    with pytest.raises(UnreachableError, match=r"client-cert\.pem is not signed by .*ca-cert"):
        connect(
            server.address,
            cert=other_certificates / "client-cert.pem",
            key=other_certificates / "client-key.pem",
        ).info()


def test_the_server_knows_a_further_ca_only(
    connect: Connect, server: Server, other_certificates: Path, tmp_path: Path
) -> None:
    """Here all looks well: the client trusts both."""
    both = tmp_path / "both.pem"
    folders = (server.certs, other_certificates)
    both.write_bytes(b"".join((folder / "ca-cert.pem").read_bytes() for folder in folders))
    with pytest.raises(UnreachableError, match=r"hung up when it saw .*client-cert\.pem"):
        connect(server.address, certs=other_certificates, ca=both).info()


def test_an_expired_client(
    connect: Connect, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "certs"
    shutil.copytree(server.certs, folder)
    monkeypatch.setattr(making, "LIFETIME", -timedelta(seconds=10))
    certs.make_client(folder, "late", "admin")
    with pytest.raises(UnreachableError, match=r"late-cert\.pem expired on 20"):
        connect(server.address, cert=folder / "late-cert.pem", key=folder / "late-key.pem").info()


def test_an_expired_server(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "LIFETIME", -timedelta(seconds=10))
    certs.make_all(tmp_path)
    with (
        listening(with_tls(tmp_path, ssl.TLSVersion.TLSv1_3)) as address,
        pytest.raises(UnreachableError, match="server's certificate has expired"),
    ):
        connect(address, certs=tmp_path).info()


def test_another_name(connect: Connect, server: Server) -> None:
    with pytest.raises(UnreachableError, match="not for 'farm1'; give the name"):
        connect(server.address, server_name="farm1").info()


def test_a_key_of_another_certificate(connect: Connect, server: Server) -> None:
    with pytest.raises(UnreachableError, match=r"viewer-key\.pem is not the key of client-cert"):
        connect(
            server.address,
            cert=server.certs / "client-cert.pem",
            key=server.certs / "viewer-key.pem",
        ).info()


@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem", "client-key.pem"])
def test_no_certificate(connect: Connect, server: Server, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "certs"
    shutil.copytree(server.certs, folder)
    (folder / name).unlink()
    with pytest.raises(CertificateError, match=f"{name} is missing") as missing:
        connect(server.address, certs=folder)
    (folder / name).mkdir()
    with pytest.raises(CertificateError, match=f"{name} cannot be read: Is a dir") as unreadable:
        connect(server.address, certs=folder)
    # A traceback with what pathlib has met would say the same once more.
    assert missing.value.__suppress_context__
    assert unreadable.value.__suppress_context__


def test_tls_1_2(certificates: Path) -> None:
    """For programs that want TLS 1.3 only, as the command line does; the environment says so
    before gRPC is loaded."""
    program = (
        "import sys\nfrom jobworker import Client\nfrom jobworker.errors import UnreachableError\n"
        "try: Client(sys.argv[1], certs=sys.argv[2]).info()\n"
        "except UnreachableError as error: print(error)"
    )
    with listening(with_tls(certificates, ssl.TLSVersion.TLSv1_2)) as address:
        answer = subprocess.run(
            [sys.executable, "-c", program, address, certificates],
            env=os.environ | {"GRPC_SSL_CIPHER_SUITES": "ECDHE-PSK-CHACHA20-POLY1305"},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert "probably speaks only TLS 1.2 or older" in answer.stdout
