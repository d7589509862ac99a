"""Certificates as real programs see them: openssl, and TLS handshakes of Python's ssl."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type

from jobworker import certs
from jobworker.errors import CertificateError, PermissionDeniedError
from jobworker.rpc.gate import _passport_of
from jobworker.rpc.identity import identity_of

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None,
    reason="NOT TESTED: certificates made by hand; install openssl",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all that `make_all` makes."""
    certs.make_all(tmp_path / "certs", ["farm.example.org", "192.0.2.7"])
    return tmp_path / "certs"


@pytest.fixture(scope="module")
def made_by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by-hand")
    _make_ca_by_hand(folder, "rsa:4096")
    _sign_by_hand(folder, "server", "/CN=localhost", bits=4096)
    _sign_by_hand(folder, "client", "/O=JobWorker/OU=admin/CN=admin-client", bits=4096)
    return folder


@pytest.fixture
def by_hand(made_by_hand: Path, tmp_path: Path) -> Path:
    """A folder made with openssl: RSA 4096, a server without alternative names."""
    return Path(shutil.copytree(made_by_hand, tmp_path / "by-hand"))


# Making all


def test_all_files_are_made_and_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem"),
        *("client-cert.pem", "client-key.pem", "viewer-cert.pem", "viewer-key.pem"),
    }
    certs.check_server_files(folder)


def test_the_paths_made_are_returned(tmp_path: Path) -> None:
    made = certs.make_all(tmp_path)
    assert sorted(made) == sorted(tmp_path.iterdir())


def test_keys_are_for_their_owner_alone_and_certificates_for_all(
    tmp_path: Path, open_umask: None
) -> None:
    for path in certs.make_all(tmp_path):
        expected = 0o600 if path.name.endswith("-key.pem") else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@needs_openssl
def test_openssl_finds_nothing_wrong(folder: Path) -> None:
    verify = "verify -x509_strict -CAfile ca-cert.pem -purpose"
    _openssl(folder, f"{verify} sslserver server-cert.pem")
    _openssl(folder, f"{verify} sslclient client-cert.pem viewer-cert.pem")


@needs_openssl
@pytest.mark.parametrize(
    ("file", "subject"),
    [
        ("client-cert.pem", "CN=admin,OU=admin,O=JobWorker"),
        ("viewer-cert.pem", "CN=viewer,OU=viewer,O=JobWorker"),
    ],
)
def test_the_subject_says_who_and_which_role(folder: Path, file: str, subject: str) -> None:
    printed = _openssl(folder, f"x509 -noout -subject -nameopt RFC2253 -in {file}")
    assert printed == f"subject={subject}\n"


@pytest.mark.parametrize(
    "name",
    [
        *("job-worker", "localhost", "127.0.0.1", "::1", socket.gethostname()),
        *("farm.example.org", "192.0.2.7"),
    ],
)
def test_clients_reach_the_server_by_each_of_its_names(folder: Path, name: str) -> None:
    client = _client_context(folder, "client")
    assert _handshake(_server_context(folder), client, name) == "admin"


def test_clients_refuse_the_server_by_another_name(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        _handshake(_server_context(folder), _client_context(folder, "client"), "elsewhere")


def test_the_server_refuses_a_client_of_another_ca(folder: Path, tmp_path: Path) -> None:
    certs.make_all(tmp_path / "other")
    client = _client_context(tmp_path / "other", "client")
    client.load_verify_locations(folder / "ca-cert.pem")

    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca|certificate verify failed"):
        _handshake(_server_context(folder), client, "localhost")


def test_a_servers_certificate_is_no_clients(folder: Path) -> None:
    client = _client_context(folder, "server")
    with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.certificate|verify failed"):
        _handshake(_server_context(folder), client, "localhost")


@pytest.mark.parametrize("name", ["", "https://farm", "farm:50051", "two words", "a..b", "ä.de"])
def test_a_name_that_no_server_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="neither a host name nor an address"):
        certs.make_all(tmp_path, [name])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unless_forced(folder: Path) -> None:
    (folder / "viewer-cert.pem").unlink()
    (folder / "viewer-key.pem").unlink()
    before = _contents(folder)

    with pytest.raises(CertificateError) as raised:
        certs.make_all(folder)

    assert raised.value.about == folder
    assert raised.value.problem == (
        "already has ca-cert.pem, ca-key.pem, server-cert.pem, server-key.pem, "
        "client-cert.pem, client-key.pem"
    )
    assert "--force" in raised.value.remedy
    assert _contents(folder) == before


def test_forced_all_are_replaced(folder: Path) -> None:
    before = _contents(folder)
    certs.make_all(folder, force=True)

    after = _contents(folder)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    certs.check_server_files(folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CertificateError, match="cannot be written: Not a directory") as raised:
        certs.make_all(tmp_path / "file" / "certs")
    assert str(tmp_path / "file") in str(raised.value)


def test_what_fails_half_way_leaves_whole_files_only(folder: Path) -> None:
    before = _contents(folder)
    (folder / "viewer-key.pem").unlink()
    (folder / "viewer-key.pem").mkdir()  # in the way of the last file only

    with pytest.raises(CertificateError, match=r"viewer-key\.pem cannot be written"):
        certs.make_all(folder, force=True)

    assert {path.name for path in folder.iterdir()} == before.keys()
    certs.check_server_files(folder)


def test_of_two_makers_at_once_one_makes_all(tmp_path: Path) -> None:
    together = Barrier(2)

    def make() -> bool:
        together.wait(timeout=10)
        try:
            certs.make_all(tmp_path)
        except CertificateError:
            return False
        return True

    with ThreadPoolExecutor(max_workers=2) as executor:
        outcomes = [executor.submit(make) for _ in range(2)]
        assert sorted(outcome.result(timeout=10) for outcome in outcomes) == [False, True]
    certs.check_server_files(tmp_path)


# Making a client


@pytest.mark.parametrize("name", ["ann", "ann@example.org", "build-7.farm_2", "a" * 64])
def test_a_client_with_a_name_and_a_role(folder: Path, name: str) -> None:
    made = certs.make_client(folder, name, "viewer")

    assert made == [folder / f"{name}-cert.pem", folder / f"{name}-key.pem"]
    assert certs.subject_of(made[0].read_bytes())[:2] == (name, ("viewer",))
    assert stat.S_IMODE(made[1].stat().st_mode) == 0o600
    client = _client_context(folder, name)
    assert _handshake(_server_context(folder), client, "localhost") == name


@pytest.mark.parametrize("name", ["", "ca", "server", "../ann", "a/b", ".ann", "-ann", "a" * 65])
def test_a_name_that_no_client_can_have_is_refused(folder: Path, name: str) -> None:
    before = _contents(folder)
    with pytest.raises(CertificateError, match="cannot be the name of a client"):
        certs.make_client(folder, name, "admin", force=True)
    assert _contents(folder) == before


def test_a_client_is_not_replaced_unless_forced(folder: Path) -> None:
    first, _ = certs.make_client(folder, "ann", "viewer")
    with pytest.raises(CertificateError, match=r"already has ann-cert\.pem, ann-key\.pem"):
        certs.make_client(folder, "ann", "admin")
    assert certs.describe(first).units == ("viewer",)

    certs.make_client(folder, "ann", "admin", force=True)
    assert certs.describe(first).units == ("admin",)


def test_a_servers_certificate_made_anew_is_of_the_same_ca(folder: Path) -> None:
    before = _contents(folder)
    assert certs.make_server(folder) == [folder / "server-key.pem", folder / "server-cert.pem"]
    after = _contents(folder)
    assert {name for name in after if after[name] != before[name]} == {
        *("server-cert.pem", "server-key.pem")
    }
    certs.check_server_files(folder)
    assert stat.S_IMODE((folder / "server-key.pem").stat().st_mode) == 0o600
    server = _server_context(folder)
    assert _handshake(server, _client_context(folder, "client"), "farm.example.org") == "admin"


def test_a_servers_certificate_with_other_names(folder: Path) -> None:
    certs.make_server(folder, ["new.example.org"])
    names = certs.describe(folder / "server-cert.pem").alternative_names
    assert "new.example.org" in names and "localhost" in names
    assert "farm.example.org" not in names


def test_a_server_needs_the_key_of_the_ca(folder: Path) -> None:
    (folder / "ca-key.pem").unlink()
    before = _contents(folder)
    with pytest.raises(CertificateError, match="is missing; do this where it is kept"):
        certs.make_server(folder)
    assert _contents(folder) == before


def test_what_renews_a_certificate_that_has_expired(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certs, "LIFETIME", timedelta(minutes=-5))
    certs.make_server(folder)
    assert "`jobworker certs server`" in _refusal(folder).remedy
    cert, key = certs.make_client(folder, "ann", "viewer")
    with pytest.raises(CertificateError) as caught:
        certs.check_client_files(folder / "ca-cert.pem", cert, key)
    assert "`jobworker certs client --name ann --role viewer --force`" in caught.value.remedy
    assert "init" not in caught.value.remedy


def test_a_notice_of_the_end_of_the_servers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert certs.notice_of_end(folder, certs.end_of_server(folder)) == ""
    monkeypatch.setattr(certs, "LIFETIME", timedelta(days=13))
    certs.make_server(folder)
    notice = certs.notice_of_end(folder, certs.end_of_server(folder))
    assert "server-cert.pem expires on" in notice
    assert "`jobworker certs server`" in notice


def test_a_client_needs_the_key_of_the_ca(folder: Path) -> None:
    (folder / "ca-key.pem").unlink()
    with pytest.raises(CertificateError, match=r"ca-key\.pem is missing"):
        certs.make_client(folder, "ann", "viewer")


def test_a_client_needs_the_right_key_of_the_ca(folder: Path) -> None:
    shutil.copy(folder / "server-key.pem", folder / "ca-key.pem")
    with pytest.raises(CertificateError, match=r"is not the key of ca-cert\.pem"):
        certs.make_client(folder, "ann", "viewer")


@needs_openssl
@pytest.mark.parametrize("algorithm", ["rsa:2048", "ed25519", "ed448"])
def test_a_ca_made_by_hand_signs_clients_too(tmp_path: Path, algorithm: str) -> None:
    _make_ca_by_hand(tmp_path, algorithm)
    certs.make_client(tmp_path, "ann", "viewer")
    _openssl(tmp_path, "verify -CAfile ca-cert.pem -purpose sslclient ann-cert.pem")


# Subjects


@needs_openssl
@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("/O=JobWorker/OU=admin/CN=admin-client", ("admin-client", ("admin",))),
        ("/CN=x,OU=admin", ("x,OU=admin", ())),
        ("/CN=x\\/OU=admin", ("x/OU=admin", ())),
        ("/CN=x\nOU=admin", ("x\nOU=admin", ())),
        ("/OU=viewer/CN=x/OU=admin", ("x", ("viewer", "admin"))),
        ("/OU=viewer+OU=admin/CN=x", ("x", ("admin", "viewer"))),  # a set, sorted by DER
        ("/O=JobWorker", ("", ())),
        ("/CN=x/CN=y/OU=user", ("", ("user",))),
    ],
)
def test_roles_are_units_and_never_parts_of_a_name(
    by_hand: Path, subject: str, expected: tuple[str, tuple[str, ...]]
) -> None:
    _sign_by_hand(by_hand, "odd", subject)
    assert certs.subject_of((by_hand / "odd-cert.pem").read_bytes())[:2] == expected


@pytest.mark.parametrize("pem", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_certificate_has_no_subject(pem: bytes) -> None:
    with pytest.raises(CertificateError, match="is not a certificate in PEM form"):
        certs.subject_of(pem)


# Starting a server


@needs_openssl
@pytest.mark.parametrize(
    ("tag", "content"), [(0x14, "K\u00f6ln".encode("latin-1")), (0x02, b"\1\2\3\4")]
)
def test_a_subject_that_is_no_text_is_refused(folder: Path, tag: int, content: bytes) -> None:
    """Names in Latin-1, or numbers, as some CAs have signed them."""
    certs.make_client(folder, "Mona", "user")
    path = folder / "Mona-cert.pem"
    der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    assert der.count(b"\x0c\4Mona") == 1
    odd = der.replace(b"\x0c\4Mona", bytes([tag, 4]) + content)
    pem = ssl.DER_cert_to_PEM_cert(odd).encode()
    with pytest.raises(PermissionDeniedError, match="is no text"):
        identity_of(pem)
    path.write_bytes(pem)
    with pytest.raises(CertificateError, match=r"Mona-cert\.pem has a subject that is no text"):
        certs.describe(path)
    assert certs.make_client(folder, "next", "user")


@pytest.mark.parametrize(
    ("found", "put"),
    [(b"\xa0\3\2\1\2", b"\xa0\3\2\1\1"), (b"\x0c\4Mona", b"\x13\4Mon\xff")],
    ids=["of version 2", "letters that are none"],
)
def test_what_openssl_takes_and_cannot_be_read_is_refused(
    folder: Path, found: bytes, put: bytes
) -> None:
    certs.make_client(folder, "Mona", "user")
    path = folder / "Mona-cert.pem"
    der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    assert der.count(found) == 1
    path.write_bytes(ssl.DER_cert_to_PEM_cert(der.replace(found, put)).encode())
    with pytest.raises(PermissionDeniedError, match="is not a certificate"):
        _passport_of(path.read_bytes())
    with pytest.raises(CertificateError, match=r"Mona-cert\.pem is not a certificate"):
        certs.describe(path)


def test_certificates_made_by_hand_serve(by_hand: Path) -> None:
    certs.check_server_files(by_hand)

    client = _client_context(by_hand, "client")
    client.check_hostname = False  # Python's ssl wants alternative names; gRPC does not
    assert _handshake(_server_context(by_hand), client, "localhost") == "admin-client"


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
    _openssl(folder, "pkey -aes256 -passout pass:x -in client-key.pem -out server-key.pem")
    error = _refusal(folder)
    assert (error.about, error.problem) == (folder / "server-key.pem", "is encrypted")


@needs_openssl
def test_a_key_that_cannot_sign(folder: Path) -> None:
    _openssl(folder, "genpkey -algorithm X25519 -out server-key.pem")
    error = _refusal(folder)
    assert error.about == folder / "server-key.pem"
    assert error.problem == "is of a kind that cannot sign"


@pytest.mark.parametrize(
    ("lifetime", "file"), [("CA_LIFETIME", "ca-cert.pem"), ("LIFETIME", "server-cert.pem")]
)
def test_an_expired_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lifetime: str, file: str
) -> None:
    monkeypatch.setattr(certs, lifetime, timedelta(minutes=-5))
    certs.make_all(tmp_path)

    error = _refusal(tmp_path)
    assert error.about == tmp_path / file
    assert error.problem.startswith(f"expired on {datetime.now(UTC) - timedelta(minutes=5):%Y-%m}")


def test_a_certificate_of_the_future(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "BACKDATED", timedelta(days=-1))
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
    assert certs.LIFETIME - timedelta(minutes=5) < left <= certs.LIFETIME
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
    monkeypatch.setattr(certs, "LIFETIME", timedelta(days=7, minutes=5))
    soon, _ = certs.make_client(tmp_path, "soon", "viewer")
    assert certs.describe(soon).warnings == ("It expires in 7 days.",)
    for hours, told in ((25, "in 1 day"), (23, "within a day")):
        lifetime = timedelta(hours=hours)
        monkeypatch.setattr(certs, "LIFETIME", lifetime)
        soon, _ = certs.make_client(tmp_path, "soon", "viewer", force=True)
        assert certs.describe(soon).warnings == (f"It expires {told}.",)

    monkeypatch.setattr(certs, "LIFETIME", timedelta(minutes=-5))
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
    _sign_by_hand(by_hand, "odd", "/OU=viewer/OU=admin/CN=x", bits=1024)
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


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _openssl(folder: Path, words: str, *arguments: str) -> str:
    """Runs openssl in the folder, with the words of one string and further arguments."""
    finished = subprocess.run(
        ["openssl", *words.split(), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def _make_ca_by_hand(folder: Path, algorithm: str) -> None:
    _openssl(
        folder,
        f"req -x509 -newkey {algorithm} -nodes -days 365 -subj /O=JobWorker/CN=CA "
        "-keyout ca-key.pem -out ca-cert.pem",
    )


def _sign_by_hand(folder: Path, name: str, subject: str, bits: int = 2048) -> None:
    _openssl(
        folder,
        f"req -new -newkey rsa:{bits} -nodes -keyout {name}-key.pem -out {name}.csr",
        *("-multivalue-rdn", "-subj", subject),
    )
    _openssl(
        folder,
        "x509 -req -days 365 -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial "
        f"-in {name}.csr -out {name}-cert.pem",
    )


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


def _server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    context.load_verify_locations(folder / "ca-cert.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client_context(folder: Path, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(folder / f"{name}-cert.pem", folder / f"{name}-key.pem")
    context.load_verify_locations(folder / "ca-cert.pem")
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
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


# Revocation


def _serial(path: Path) -> int:
    return certs.validity_of(path.read_bytes()).serial


def test_serial_numbers_in_any_usual_form(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("\ufeff1\n# whom, when\n\n0A:1B  # alice\n0xFF\n  7\nserial=2B\n-05\n")
    found = certs.read_revoked(revoked, folder / "ca-cert.pem")
    assert found.serials == {1, 0xA1B, 0xFF, 7, 0x2B, -5}
    assert found.has("any issuer", 7)
    assert not found.has("any issuer", 8)


@pytest.mark.parametrize(
    "content", [b"12 34\n", b"xyz\n", b"\x30\x82", b"-----BEGIN X509 CRL-----\nx\n"]
)
def test_what_is_no_list_of_serial_numbers(folder: Path, tmp_path: Path, content: bytes) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_bytes(content)
    with pytest.raises(CertificateError) as caught:
        certs.read_revoked(revoked, folder / "ca-cert.pem")
    assert caught.value.about == revoked


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("ca-cert.pem", "take it out of the server's ca-cert.pem"),
        ("server-cert.pem", "`jobworker certs server`"),
        ("none.pem", "give the path of a client's certificate"),
    ],
)
def test_what_is_no_clients_is_not_revoked(
    folder: Path, tmp_path: Path, file: str, remedy: str
) -> None:
    with pytest.raises(CertificateError) as caught:
        certs.revoke(tmp_path / "revoked", folder / file)
    assert remedy in caught.value.remedy
    assert not (tmp_path / "revoked").exists()


def test_a_list_that_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"JOB_WORKER_REVOKED, or make an empty one"):
        certs.read_revoked(tmp_path / "none", folder / "ca-cert.pem")


def test_revoking_appends(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("ff")  # without an end of the line
    for name in ("viewer", "client"):
        certs.revoke(revoked, folder / f"{name}-cert.pem")
    found = certs.read_revoked(revoked, folder / "ca-cert.pem")
    names = ("viewer-cert.pem", "client-cert.pem")
    assert found.serials == {0xFF, *(_serial(folder / name) for name in names)}
    assert "# viewer, 20" in revoked.read_text()


@needs_openssl
@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # the library's
@pytest.mark.parametrize("serial", ["-5", "0", "0x" + "ff" * 20, "0x" + "1f" * 21])
def test_a_serial_number_of_any_sign_and_length(by_hand: Path, serial: str) -> None:
    names = "-CA ca-cert.pem -CAkey ca-key.pem -in client.csr -out client-cert.pem"
    _openssl(by_hand, f"x509 -req -days 365 {names} -set_serial {serial}")
    shown = _openssl(by_hand, "x509 -noout -serial -in client-cert.pem").strip()
    assert certs.revoke(by_hand / "revoked", by_hand / "client-cert.pem") == shown[7:]
    found = certs.read_revoked(by_hand / "revoked", by_hand / "ca-cert.pem")
    assert found.serials == {int(serial, 0)} == {_serial(by_hand / "client-cert.pem")}


def test_nothing_is_appended_to_a_list_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("1F2E\nnot a serial\n")
    with pytest.raises(CertificateError, match="has in line 2 'not a serial'"):
        certs.revoke(revoked, folder / "client-cert.pem")
    assert revoked.read_text() == "1F2E\nnot a serial\n"


def test_nothing_is_appended_to_a_list_of_the_authority(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_bytes(b"-----BEGIN X509 CRL-----\n")
    with pytest.raises(CertificateError):
        certs.revoke(revoked, folder / "viewer-cert.pem")
    assert revoked.read_bytes() == b"-----BEGIN X509 CRL-----\n"


def test_a_list_that_writes_the_issuer_in_another_way(folder: Path, tmp_path: Path) -> None:
    """As where a CA was renewed by another program: TLS takes both for the same name."""
    authority = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    client = certs.validity_of((folder / "client-cert.pem").read_bytes())
    now = datetime.now(UTC)
    entry = x509.RevokedCertificateBuilder(client.serial, now).build()
    issuer = x509.Name(
        x509.NameAttribute(each.oid, f"{each.value!s} ".upper(), _type=_ASN1Type.PrintableString)
        for each in authority.subject
    )
    builder = x509.CertificateRevocationListBuilder(issuer, now, now + timedelta(days=1))
    crl = builder.add_revoked_certificate(entry).sign(key, hashes.SHA256())
    (tmp_path / "crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    found = certs.read_revoked(tmp_path / "crl.pem", folder / "ca-cert.pem")
    assert found.has(client.issuer, client.serial)


def _list(
    folder: Path,
    serials: Iterable[int] = (),
    extensions: Iterable[tuple[x509.ExtensionType, bool]] = (),
) -> bytes:
    key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    authority = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder(authority.subject, now, now + timedelta(days=1))
    for serial in serials:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder(serial, now).build()
        )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, is_critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _unknown(oid: str, content: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), content)


def _part(**fields: Any) -> x509.IssuingDistributionPoint:
    none: dict[str, Any] = {
        "full_name": None,
        "relative_name": None,
        "only_contains_user_certs": False,
        "only_contains_ca_certs": False,
        "only_some_reasons": None,
        "indirect_crl": False,
        "only_contains_attribute_certs": False,
    }
    return x509.IssuingDistributionPoint(**{**none, **fields})


@pytest.mark.parametrize(
    ("extension", "warning"),
    [
        (_part(only_contains_ca_certs=True), "has a CRL of CAs only: "),
        (_part(only_contains_attribute_certs=True), "has a CRL of attribute certificates only: "),
        (
            _part(only_some_reasons=frozenset([x509.ReasonFlags.key_compromise])),
            "has a CRL of some reasons only: ",
        ),
        (_unknown("1.2.3.4", b"\5\0"), "has a CRL with the critical extension 1.2.3.4, which"),
        (_part(only_contains_user_certs=True), ""),
        (x509.CRLNumber(7), ""),
    ],
    ids=["CAs", "attributes", "reasons", "unknown", "users", "number"],
)
def test_a_list_that_may_not_have_all_counts_and_is_told(
    folder: Path, tmp_path: Path, extension: x509.ExtensionType, warning: str
) -> None:
    path = tmp_path / "crl.pem"
    client = certs.validity_of((folder / "client-cert.pem").read_bytes())
    path.write_bytes(_list(folder, [client.serial], [(extension, True)]))
    found = certs.read_revoked(path, folder / "ca-cert.pem")
    assert found.has(client.issuer, client.serial)
    assert len(found.warnings) == bool(warning)
    assert all(each.startswith(f"{path} {warning}") for each in found.warnings)


def test_an_unknown_extension_that_is_not_critical_is_not_told(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "crl.pem"
    path.write_bytes(_list(folder, extensions=[(_unknown("1.2.3.4", b"\5\0"), False)]))
    assert certs.read_revoked(path, folder / "ca-cert.pem").warnings == ()


@pytest.mark.parametrize("oid", ["2.5.29.20", "2.5.29.27", "2.5.29.28"])
@pytest.mark.parametrize("is_critical", [False, True])
def test_a_list_with_a_broken_extension(
    folder: Path, tmp_path: Path, oid: str, is_critical: bool
) -> None:
    path = tmp_path / "crl.pem"
    path.write_bytes(_list(folder, extensions=[(_unknown(oid, b"\x04\x01"), is_critical)]))
    with pytest.raises(CertificateError, match=r"crl\.pem has a broken CRL"):
        certs.read_revoked(path, folder / "ca-cert.pem")


@pytest.mark.parametrize(
    ("found", "put"),
    [(b"\x2a\3\5", b"\x2a\3\4"), (b"jobworker CA", b"jobworker \xff\xff")],
    ids=["an extension twice", "an issuer that is no text"],
)
def test_a_list_with_what_only_later_proves_broken(
    folder: Path, tmp_path: Path, found: bytes, put: bytes
) -> None:
    pair = [(_unknown(f"1.2.3.{last}", b"\5\0"), False) for last in (4, 5)]
    crl = x509.load_pem_x509_crl(_list(folder, extensions=pair))
    der = crl.public_bytes(serialization.Encoding.DER)
    assert found in der
    path = tmp_path / "crl.der"
    path.write_bytes(der.replace(found, put))
    with pytest.raises(CertificateError, match=r"crl\.der has a broken CRL"):
        certs.read_revoked(path, folder / "ca-cert.pem")


@pytest.mark.parametrize(
    ("text", "serial"),
    [
        ("0x1234  # mallory", 0x1234),
        ("serial=1F2E", 0x1F2E),
        ("\ufeff1F2E", 0x1F2E),
        ("Of our CA:\n  1f:2e", 0x1F2E),
        ("-05", -5),
    ],
)
def test_serial_numbers_around_a_list_count_too(
    folder: Path, tmp_path: Path, text: str, serial: int
) -> None:
    crl, path = _list(folder), tmp_path / "crl.pem"
    for content in (text.encode() + b"\n" + crl, crl + text.encode()):
        path.write_bytes(content)
        found = certs.read_revoked(path, folder / "ca-cert.pem")
        assert (set(found.serials), found.warnings) == ({serial}, ())


def test_what_is_nearly_a_serial_number_beside_a_list_is_told(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "crl.pem"
    nearly = ["1f2e bob", "  1f:2e; x", "serial=1F2G"]
    text = "\n".join(["Added by the CA, in 2026", "a list", *nearly, "12  # 34 5"])
    path.write_bytes(text.encode() + b"\n" + _list(folder))
    found = certs.read_revoked(path, folder / "ca-cert.pem")
    assert found.serials == {0x12}
    assert len(found.warnings) == len(nearly)
    for line, warning in zip(nearly, found.warnings, strict=True):
        assert f"{path} has {line.strip()!r} beside a CRL" in warning


@needs_openssl
def test_what_openssl_writes_beside_a_list_is_no_serial_number(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "crl.pem"
    path.write_bytes(_list(folder))
    text = _openssl(tmp_path, "crl -in crl.pem -text")
    assert "        30:4" in text  # of its signature
    number = "            X509v3 CRL Number: \n                1\n    Signature Algorithm"
    for beside in (text, text.replace("    Signature Algorithm", number), f"{text}0a\n{text}"):
        path.write_text(beside)
        found = certs.read_revoked(path, folder / "ca-cert.pem")
        assert found.serials == ({10} if "\n0a" in beside else set())
        assert found.warnings == ()


@needs_openssl
def test_a_list_that_openssl_makes(by_hand: Path, tmp_path: Path) -> None:
    (tmp_path / "index").touch()
    config = tmp_path / "ca.cnf"
    config.write_text(
        "[ca]\ndefault_ca=ca\n[ca]\ndefault_md=sha256\ndefault_crl_days=30\n"
        f"database={tmp_path}/index\n"
    )
    key = ("-cert", by_hand / "ca-cert.pem", "-keyfile", by_hand / "ca-key.pem")
    revoke = ("openssl", "ca", "-config", config, *key)
    actions: list[list[str | Path]] = [
        ["-revoke", by_hand / "client-cert.pem"],
        ["-gencrl", "-out", tmp_path / "crl.pem"],
    ]
    for action in actions:
        subprocess.run([*revoke, *action], check=True, capture_output=True)
    found = certs.read_revoked(tmp_path / "crl.pem", by_hand / "ca-cert.pem")
    client = certs.validity_of((by_hand / "client-cert.pem").read_bytes())
    assert found.has(client.issuer, client.serial)
    assert not found.has("another issuer", client.serial)
    assert found.warnings == ()


def test_a_name_is_not_given_out_twice(folder: Path) -> None:
    """Else a user `admin` would have the jobs of the admin that every folder begins with."""
    with pytest.raises(CertificateError, match="has the name 'admin' already"):
        certs.make_client(folder, "admin", "user")
    assert not (folder / "admin-cert.pem").exists()
    certs.make_client(folder, "alice", "user")
    certs.make_client(folder, "alice", "viewer", force=True)
