"""What is wrong with certificates, and how it is told."""

from __future__ import annotations

import shutil
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from certs.by_hand import needs_openssl, run_openssl, sign_by_hand
from certs.handshakes import client_context, handshake, server_context
from jobworker import certs
from jobworker.certs import making
from jobworker.errors import CertificateError


def test_what_renews_a_certificate_that_has_expired(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "LIFETIME", timedelta(minutes=-5))
    certs.make_server(folder)
    assert "`jobworker certs server`" in _refusal(folder).remedy
    cert, key = certs.make_client(folder, "ann", "viewer")
    with pytest.raises(CertificateError) as caught:
        certs.check_client_files(folder / "ca-cert.pem", cert, key)
    assert "`jobworker certs client --name ann --role viewer --force`" in caught.value.remedy
    assert "init" not in caught.value.remedy


def test_a_notice_of_the_end_of_the_servers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert certs.notice_of_end(folder, certs.end_of_server(folder)) == ""
    monkeypatch.setattr(making, "LIFETIME", timedelta(days=13))
    certs.make_server(folder)
    notice = certs.notice_of_end(folder, certs.end_of_server(folder))
    assert "server-cert.pem expires on" in notice
    assert "`jobworker certs server`" in notice


# Starting a server


def test_certificates_made_by_hand_serve(by_hand: Path) -> None:
    certs.check_server_files(by_hand)

    client = client_context(by_hand, "client")
    client.check_hostname = False  # Python's ssl wants alternative names; gRPC does not
    assert handshake(server_context(by_hand), client, "localhost") == "admin-client"


def test_a_chain_with_an_intermediate_serves(tmp_path: Path) -> None:
    root, intermediate = _chain_in(tmp_path)
    certs.check_server_files(tmp_path)

    server = (tmp_path / "server-cert.pem").read_bytes()
    leaf = server.removesuffix(intermediate)
    (tmp_path / "server-cert.pem").write_bytes(leaf + root + intermediate)
    with pytest.raises(CertificateError, match="certificates that do not sign each other"):
        certs.check_server_files(tmp_path)


@pytest.mark.parametrize("file", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
class TestEachFileOfAServer:
    def test_missing(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        error = _refusal(folder)
        assert (error.about, error.problem) == (folder / file, "is missing")
        assert "jobworker certs init" in error.remedy
        assert "JOB_WORKER_CERT_PATH" in error.remedy

    def test_unreadable(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()  # root may read whatever its mode is
        error = _refusal(folder)
        assert (error.about, error.problem) == (folder / file, "cannot be read: Is a directory")

    @pytest.mark.parametrize("content", [b"", b"text", b"\xff\x00"])
    def test_not_pem(self, folder: Path, file: str, content: bytes) -> None:
        (folder / file).write_bytes(content)
        error = _refusal(folder)
        assert error.about == folder / file
        assert error.problem.endswith("in PEM form")

    def test_not_pem_as_far_as_grpc_reads(self, folder: Path, file: str) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content + b"\0")
        certs.check_server_files(folder)
        (folder / file).write_bytes(b"\0" + content)
        error = _refusal(folder)
        assert error.about == folder / file
        assert error.problem.endswith("in PEM form")


def test_a_folder_that_is_missing_is_as_good_as_empty(tmp_path: Path) -> None:
    error = _refusal(tmp_path / "nowhere")
    assert (error.about, error.problem) == (tmp_path / "nowhere" / "ca-cert.pem", "is missing")


def test_a_key_of_another_certificate(folder: Path) -> None:
    shutil.copy(folder / "client-key.pem", folder / "server-key.pem")
    error = _refusal(folder)
    assert error.about == folder / "server-key.pem"
    assert error.problem == "is not the key of server-cert.pem"


@needs_openssl
def test_a_key_with_a_passphrase(folder: Path) -> None:
    run_openssl(folder, "pkey -aes256 -passout pass:x -in client-key.pem -out server-key.pem")
    error = _refusal(folder)
    assert (error.about, error.problem) == (folder / "server-key.pem", "is encrypted")


@needs_openssl
def test_a_key_that_cannot_sign(folder: Path) -> None:
    run_openssl(folder, "genpkey -algorithm X25519 -out server-key.pem")
    error = _refusal(folder)
    assert error.about == folder / "server-key.pem"
    assert error.problem == "is of a kind that cannot sign"


@pytest.mark.parametrize(
    ("lifetime", "file"), [("CA_LIFETIME", "ca-cert.pem"), ("LIFETIME", "server-cert.pem")]
)
def test_an_expired_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lifetime: str, file: str
) -> None:
    monkeypatch.setattr(making, lifetime, timedelta(minutes=-5))
    certs.make_all(tmp_path)

    error = _refusal(tmp_path)
    assert error.about == tmp_path / file
    assert error.problem.startswith(f"expired on {datetime.now(UTC) - timedelta(minutes=5):%Y-%m}")


def test_a_certificate_of_the_future(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "BACKDATED", timedelta(days=-1))
    certs.make_all(tmp_path)

    error = _refusal(tmp_path)
    assert error.about == tmp_path / "ca-cert.pem"
    assert error.problem.startswith("is not valid before ")
    assert "clock" in error.remedy


def test_a_certificate_of_another_ca(folder: Path, tmp_path: Path) -> None:
    """Of the same name, so that only the signature tells."""
    certs.make_all(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca-cert.pem", folder / "ca-cert.pem")

    error = _refusal(folder)
    assert error.about == folder / "server-cert.pem"
    assert error.problem == "is not signed by ca-cert.pem"


def test_two_cas_in_one_file_as_while_one_replaces_the_other(folder: Path, tmp_path: Path) -> None:
    certs.make_all(tmp_path / "other")
    other = (tmp_path / "other" / "ca-cert.pem").read_bytes()
    (folder / "ca-cert.pem").write_bytes(other + (folder / "ca-cert.pem").read_bytes())

    certs.check_server_files(folder)


# Describing


def test_what_a_client_is(folder: Path) -> None:
    description = certs.describe(folder / "client-cert.pem")

    assert (description.name, description.units) == ("admin", ("admin",))
    assert not description.is_authority
    assert description.alternative_names == ()
    left = description.expires - datetime.now(UTC)
    assert making.LIFETIME - timedelta(minutes=5) < left <= making.LIFETIME
    assert description.warnings == ()


def test_what_a_server_is(folder: Path) -> None:
    description = certs.describe(folder / "server-cert.pem")

    assert set(description.alternative_names) == {
        *("job-worker", "localhost", "127.0.0.1", "::1", socket.gethostname()),
        *("farm.example.org", "192.0.2.7"),
    }
    assert description.warnings == ()


def test_what_a_ca_is(folder: Path) -> None:
    description = certs.describe(folder / "ca-cert.pem")
    assert description.is_authority
    assert description.warnings == ()


def test_a_warning_before_the_end_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certs.make_all(tmp_path)
    monkeypatch.setattr(making, "LIFETIME", timedelta(days=7, minutes=5))
    soon, _ = certs.make_client(tmp_path, "soon", "viewer")
    assert certs.describe(soon).warnings == ("It expires in 7 days.",)
    for hours, told in ((25, "in 1 day"), (23, "within a day")):
        lifetime = timedelta(hours=hours)
        monkeypatch.setattr(making, "LIFETIME", lifetime)
        soon, _ = certs.make_client(tmp_path, "soon", "viewer", force=True)
        assert certs.describe(soon).warnings == (f"It expires {told}.",)

    monkeypatch.setattr(making, "LIFETIME", timedelta(minutes=-5))
    late, _ = certs.make_client(tmp_path, "late", "viewer")
    [warning] = certs.describe(late).warnings
    assert warning.startswith("It expired on ")


def test_a_warning_of_a_key_that_others_may_read(folder: Path) -> None:
    key = folder / "client-key.pem"
    key.chmod(0o640)
    assert certs.describe(folder / "client-cert.pem").warnings == (
        f"Its key may be read by others: chmod 600 {key}",
    )


def test_a_warning_of_another_ca_and_of_another_key(folder: Path) -> None:
    shutil.copy(folder / "client-key.pem", folder / "server-key.pem")
    assert certs.describe(folder / "server-cert.pem").warnings == (
        "server-key.pem is not its key.",
    )
    certs.make_client(folder, "ann", "user")
    certs.make_all(folder, force=True)
    assert certs.describe(folder / "ann-cert.pem").warnings == (
        "It is not signed by the ca-cert.pem beside it.",
    )
    assert certs.describe(folder / "ca-cert.pem").warnings == ()


@needs_openssl
def test_warnings_of_what_gives_no_role_and_of_a_short_key(by_hand: Path) -> None:
    sign_by_hand(by_hand, "odd", "/OU=viewer/OU=admin/CN=x", bits=1024)
    (by_hand / "odd-key.pem").chmod(0o600)
    assert certs.describe(by_hand / "odd-cert.pem").warnings == (
        "It has 2 OU: a client needs exactly one, its role.",
        "Its RSA key has 1024 bits only, use 2048 or more.",
    )


# Helpers


def _refusal(folder: Path) -> CertificateError:
    with pytest.raises(CertificateError) as raised:
        certs.check_server_files(folder)
    return raised.value


def _chain_in(folder: Path) -> tuple[bytes, bytes]:
    """A server whose certificate an intermediate CA has signed. Returns root and intermediate."""
    root = trustme.CA()
    intermediate = root.create_child_ca()
    server = intermediate.issue_cert("localhost")
    root.cert_pem.write_to_path(folder / "ca-cert.pem")
    server.private_key_pem.write_to_path(folder / "server-key.pem")
    for blob in server.cert_chain_pems:
        blob.write_to_path(folder / "server-cert.pem", append=True)
    return root.cert_pem.bytes(), intermediate.cert_pem.bytes()
