"""Certificates that are renewed, expire and are revoked while the server runs."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from functional.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    connect,
    frame,
    headers_of,
    message_of,
    receive_until,
    request_of,
)
from functional.server import DEADLINE_SECONDS, Client, Server, channel, slow_path, wait_until
from jobworker import certs
from jobworker.certs import making
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc.watch import LOOK_SECONDS

NOTICED_SECONDS = 5
QUIET_SECONDS = 10  # before what a list of revoked certificates has no longer is accepted
TICKS = "while :; do echo tick; sleep 0.05; done"

StartServer = Callable[..., Server]


@pytest.fixture
def folder(tmp_path: Path, certificates: Path) -> Path:
    """Certificates of the test's own."""
    return Path(shutil.copytree(certificates, tmp_path / "certs"))


@pytest.fixture
def start(tmp_path: Path, folder: Path) -> Iterator[StartServer]:
    servers: list[Server] = []

    def start(**settings: Any) -> Server:
        servers.append(Server(tmp_path, folder, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def shown_serial(server: Server) -> int:
    """Of the certificate that a new connection is shown."""
    pem = ssl.get_server_certificate(("127.0.0.1", server.port), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def serial_in(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def renew_server(folder: Path, tmp_path: Path) -> int:
    """Another certificate of the same CA; returns its serial number."""
    certs.make_client(folder, "renewed", "server", force=True)
    # Key first, certificate later, as tools do that write one after the other.
    os.replace(folder / "renewed-key.pem", folder / "server-key.pem")
    os.replace(folder / "renewed-cert.pem", folder / "server-cert.pem")
    return serial_in(folder / "server-cert.pem")


def denied(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, caught.value
    return str(caught.value.details())


# Renewal


def test_a_renewed_certificate_is_shown_and_no_stream_breaks(
    start: StartServer, folder: Path, tmp_path: Path
) -> None:
    server = start()
    with server.connect() as client:
        job = client.shell(TICKS)
        stream = client.stream(job.id)
        before = next(stream).next_offset
        new = renew_server(folder, tmp_path)
        wait_until(lambda: shown_serial(server) == new, NOTICED_SECONDS)
        # Of the job's output nothing is missing, and more comes.
        for _ in range(5):
            chunk = next(stream)
            assert chunk.offset == before
            before = chunk.next_offset
        assert client.get(job.id).status == "RUNNING"
    assert "read the server's certificates again" in server.log
    with_no_certificate = ssl.create_default_context(cafile=folder / "ca-cert.pem")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, with_no_certificate)


def test_the_servers_is_renewed_by_hand_and_its_end_told_before(
    start: StartServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "LIFETIME", datetime.timedelta(days=5))
    certs.make_server(folder)
    server = start()
    assert "server-cert.pem expires on" in server.log
    monkeypatch.undo()
    certs.make_server(folder)
    new = serial_in(folder / "server-cert.pem")
    wait_until(lambda: shown_serial(server) == new, NOTICED_SECONDS)
    assert server.log.count("expires on") == 1
    assert "ERROR" not in server.log


def test_the_end_of_the_servers_is_told_while_it_runs(
    start: StartServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = certs.SERVER_NOTICE + datetime.timedelta(seconds=5)
    monkeypatch.setattr(making, "LIFETIME", soon)
    certs.make_server(folder)
    server = start()
    wait_until(lambda: "server-cert.pem expires on" in server.log)
    time.sleep(3 * LOOK_SECONDS)
    assert server.log.count("expires on") == 1


def handshake(server: Server, context: ssl.SSLContext) -> None:
    import socket

    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        if not wrapped.recv(1):
            raise ConnectionResetError("closed by the server")


@pytest.mark.parametrize("damage", ["mismatched", "broken", "missing"])
def test_a_pair_that_cannot_be_used_changes_nothing(
    start: StartServer, folder: Path, tmp_path: Path, damage: str
) -> None:
    server = start()
    old = shown_serial(server)
    good = (folder / "server-cert.pem").read_bytes()
    if damage == "mismatched":
        shutil.copy(folder / "viewer-cert.pem", folder / "server-cert.pem")
    elif damage == "broken":
        (folder / "server-cert.pem").write_bytes(b"no certificate")
    else:
        (folder / "server-cert.pem").unlink()
    wait_until(lambda: "ERROR" in server.log, NOTICED_SECONDS)
    assert "the old stay in force" in server.log
    assert "server-" in server.log
    assert shown_serial(server) == old
    with server.connect() as client:
        assert client.create("true").id
    (folder / "server-cert.pem").write_bytes(good)
    new = renew_server(folder, tmp_path)
    wait_until(lambda: shown_serial(server) == new, NOTICED_SECONDS)
    assert server.log.count("the old stay in force") == 1


def test_sighup_reads_at_once(start: StartServer, folder: Path, tmp_path: Path) -> None:
    server = start()
    server.process.send_signal(signal.SIGHUP)
    new = renew_server(folder, tmp_path)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: shown_serial(server) == new, NOTICED_SECONDS)
    assert server.process.poll() is None


def test_a_renewed_authority(start: StartServer, folder: Path, tmp_path: Path) -> None:
    """Whom the file names is let in: first the old, then both, then the new."""
    other = tmp_path / "other"
    certs.make_all(other)
    server = start()

    def may_call(certificates: Path) -> bool:
        credentials = grpc.ssl_channel_credentials(
            (folder / "all-cas.pem").read_bytes(),
            (certificates / "client-key.pem").read_bytes(),
            (certificates / "client-cert.pem").read_bytes(),
        )
        options = [
            ("grpc.ssl_target_name_override", "job-worker"),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        with grpc.secure_channel(server.address, credentials, options) as opened:
            try:
                return bool(Client(opened).info().version)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
                return False

    both = (folder / "ca-cert.pem").read_bytes() + (other / "ca-cert.pem").read_bytes()
    (folder / "all-cas.pem").write_bytes(both)
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    assert may_call(old)
    assert not may_call(other)
    (folder / "ca-cert.pem").write_bytes(both)
    wait_until(lambda: may_call(other), NOTICED_SECONDS)
    assert may_call(old)
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        shutil.copy(other / name, folder / name)
    wait_until(lambda: not may_call(old), NOTICED_SECONDS)
    assert may_call(other)


# Expiry


def test_no_call_with_a_certificate_that_has_expired_meanwhile(
    start: StartServer, folder: Path
) -> None:
    server = start()
    make_short_lived(folder, "brief", seconds=4)
    with server.connect("brief") as client:
        job = client.shell(TICKS)
        stream = client.stream(job.id)
        next(stream)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                client.get(job.id)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED  # noqa: PT017
                assert "has expired" in str(error.details())  # noqa: PT017
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # What it began before goes on.
        assert next(stream).payload


def test_a_call_whose_request_comes_after_its_certificate_has_expired(
    start: StartServer, folder: Path
) -> None:
    server = start()
    make_short_lived(folder, "brief", seconds=4)
    request = message_of(pb.CreateJobReq(command="true").SerializeToString())
    expired = b"has expired since it connected"
    with connect(server, "brief") as early:
        early.sendall(frame(HEADERS, END_HEADERS, 1, headers_of("CreateJob")))
        early.sendall(request_of("GetServerInfo", 3))
        receive_until(early, b"grpc-status")
        later = itertools.count(5, 2)

        def is_expired() -> bool:
            early.sendall(request_of("GetServerInfo", next(later)))
            return expired in early.recv(1 << 16)

        wait_until(is_expired)
        early.sendall(frame(DATA, END_STREAM, 1, request))
        receive_until(early, expired)
    with server.connect() as client:
        assert client.jobs() == []


def make_short_lived(folder: Path, name: str, seconds: float) -> None:
    certs.make_client(folder, name, "admin")
    made = x509.load_pem_x509_certificate((folder / f"{name}-cert.pem").read_bytes())
    key = serialization.load_pem_private_key((folder / f"{name}-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        made.issuer,
        made.subject,
        key.public_key(),
        made.serial_number,
        now - datetime.timedelta(hours=1),
        now + datetime.timedelta(seconds=seconds),
    )
    certificate = builder.sign(authority_key(folder), hashes.SHA256())
    path = folder / f"{name}-cert.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def authority_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


# Revocation


def test_a_revoked_client_is_cut_off_and_its_jobs_run_on(
    start: StartServer, folder: Path, tmp_path: Path
) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("# none yet\n")
    certs.make_client(folder, "mallory", "admin", force=True)
    server = start(REVOKED=str(revoked))
    with server.connect("mallory") as mallory, server.connect() as client:
        job = mallory.shell(TICKS)
        silent = mallory.create("sleep", "60")
        streams = [mallory.stream(job.id), mallory.stream(silent.id)]
        others = client.stream(job.id)
        stubborn = mallory.shell("trap '' TERM; echo up; while :; do sleep 1; done")
        next(client.stream(stubborn.id))  # from now on it does not mind
        waiting = mallory.stop_soon(stubborn.id)
        next(streams[0])
        serial = certs.revoke(revoked, folder / "mallory-cert.pem")
        changed = time.monotonic()
        for stream in streams:
            assert f"{serial} is revoked" in denied(lambda stream=stream: list(stream))  # type: ignore[misc]
        assert "is revoked" in denied(waiting.result)
        assert time.monotonic() < changed + NOTICED_SECONDS
        for call in (
            lambda: mallory.get(job.id),
            lambda: mallory.create("true"),
            lambda: list(mallory.stream(job.id)),
        ):
            assert "is revoked" in denied(call)
        with server.connect("mallory") as again:
            assert "is revoked" in denied(again.info)
            assert "is revoked" in denied(lambda: health(server, folder, "mallory"))
        assert client.get(job.id).status == "RUNNING"
        assert next(others).payload
        revoked.write_text("")
        wait_until(lambda: is_let_in(mallory), QUIET_SECONDS + NOTICED_SECONDS)
    assert "Traceback" not in server.log


def test_creates_that_wait_for_looks_end_with_their_client(
    start: StartServer, folder: Path, tmp_path: Path
) -> None:
    revoked = tmp_path / "revoked"
    revoked.touch()
    certs.make_client(folder, "mallory", "admin", force=True)
    server = start(REVOKED=str(revoked))
    environment = {"PATH": slow_path(tmp_path / "links")}
    with server.connect("mallory") as mallory, server.connect() as client:
        creates = [mallory.create_soon("sleep", "60", environment=environment) for _ in range(400)]
        # The server is not asked, as it may answer after all of them on a busy machine.
        wait_until(lambda: any(create.done() for create in creates))
        certs.revoke(revoked, folder / "mallory-cert.pem")
        server.process.send_signal(signal.SIGHUP)
        assert grpc.StatusCode.PERMISSION_DENIED in {create.code() for create in creates}
        begun = client.info().running_jobs
        time.sleep(2)  # for what goes on though nobody waits for it
        assert client.info().running_jobs == begun < len(creates)
    assert "Traceback" not in server.log


def test_a_revoked_client_stays_out_while_the_list_is_written_anew(
    start: StartServer, folder: Path, tmp_path: Path
) -> None:
    """In place and slowly, as programs that copy over a network do."""
    revoked = tmp_path / "revoked"
    certs.revoke(revoked, folder / "viewer-cert.pem")
    text = revoked.read_text()
    server = start(REVOKED=str(revoked))
    with server.connect("viewer") as viewer, revoked.open("w") as file:
        for number in range(6):
            print(f"{number:X}  # somebody", file=file, flush=True)
            for _ in range(12):
                assert not is_let_in(viewer)
                time.sleep(0.1)
        print(text, file=file)
    assert "read the revoked certificates again" in server.log


def is_let_in(client: Client) -> bool:
    try:
        return bool(client.info().version)
    except grpc.RpcError:
        return False


def health(server: Server, folder: Path, name: str) -> None:
    from grpc_health.v1 import health_pb2

    with channel(server.address, folder, name) as opened:
        check = opened.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        check(health_pb2.HealthCheckRequest(), timeout=10)


def test_a_revoked_client_that_reads_nothing_is_cut_off_too(
    start: StartServer, folder: Path, tmp_path: Path
) -> None:
    revoked = tmp_path / "revoked"
    revoked.touch()
    certs.make_client(folder, "mallory", "admin", force=True)
    server = start(REVOKED=str(revoked))
    with server.connect("mallory") as mallory, server.connect() as client:
        job = mallory.shell("head -c 40000000 /dev/zero; sleep 60")
        # More than one connection's window takes: some have not even got their first bytes.
        streams = [mallory.stream(job.id) for _ in range(200)]
        for stream in streams[:3]:
            next(stream)
        wait_until(lambda: client.get(job.id).stdout_bytes == 40_000_000)
        assert server.connections() == 2
        certs.revoke(revoked, folder / "mallory-cert.pem")
        # Their status is behind what they do not read, so their connection is ended.
        wait_until(lambda: server.connections() == 1, NOTICED_SECONDS)
        for stream in streams:
            with pytest.raises(grpc.RpcError):
                list(stream)
        client.stop(job.id, grace_milliseconds=0)
    assert "Traceback" not in server.log


@pytest.mark.parametrize("form", ["PEM", "DER"])
def test_a_list_of_the_authority(
    start: StartServer, folder: Path, tmp_path: Path, form: str
) -> None:
    revoked = tmp_path / "revoked"
    write_list(revoked, folder, [], form)
    server = start(REVOKED=str(revoked))
    with server.connect("viewer") as viewer, server.connect() as client:
        assert viewer.info().role == "viewer"
        write_list(revoked, folder, [serial_in(folder / "viewer-cert.pem")], form)
        wait_until(lambda: not is_let_in(viewer), NOTICED_SECONDS)
        assert "is revoked" in denied(viewer.info)
        assert client.info().role == "admin"


def write_list(
    path: Path, folder: Path, serials: list[int], form: str = "PEM", renewed_hours: float = 1
) -> None:
    authority = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(now - 48 * hour)
        .next_update(now + renewed_hours * hour)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder(serial, now - hour)
        builder = builder.add_revoked_certificate(entry.build())
    made = builder.sign(authority_key(folder), hashes.SHA256())
    path.write_bytes(made.public_bytes(getattr(serialization.Encoding, form)))


def test_an_expired_list_counts_and_is_said(
    start: StartServer, folder: Path, tmp_path: Path
) -> None:
    revoked = tmp_path / "revoked"
    write_list(revoked, folder, [serial_in(folder / "viewer-cert.pem")], renewed_hours=-1)
    server = start(REVOKED=str(revoked))
    assert "should have been renewed" in server.log
    with server.connect("viewer") as viewer:
        assert "is revoked" in denied(viewer.info)


@pytest.mark.parametrize("damage", ["text", "foreign", "missing"])
def test_a_broken_list_keeps_the_server_from_starting_and_changes_nothing_later(
    start: StartServer, folder: Path, tmp_path: Path, damage: str
) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text(f"{serial_in(folder / 'viewer-cert.pem'):X}\n")
    server = start(REVOKED=str(revoked))
    if damage == "text":
        revoked.write_text("12ab\nnot a number\n")
    elif damage == "foreign":
        certs.make_all(tmp_path / "other")
        write_list(revoked, tmp_path / "other", [])
    else:
        revoked.unlink()
    wait_until(lambda: "the old stay in force" in server.log, NOTICED_SECONDS)
    assert str(revoked) in server.log
    with server.connect("viewer") as viewer:
        assert "is revoked" in denied(viewer.info)
    server.stop()
    with pytest.raises(AssertionError, match="cannot start"):
        start(REVOKED=str(revoked))
