"""Certificates that are made, as real programs see them: openssl, and handshakes."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from certs.by_hand import make_ca_by_hand, needs_openssl, run_openssl
from certs.handshakes import client_context, handshake, server_context
from jobworker import certs
from jobworker.errors import CertificateError

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
    run_openssl(folder, f"{verify} sslserver server-cert.pem")
    run_openssl(folder, f"{verify} sslclient client-cert.pem viewer-cert.pem")


@needs_openssl
@pytest.mark.parametrize(
    ("file", "subject"),
    [
        ("client-cert.pem", "CN=admin,OU=admin,O=JobWorker"),
        ("viewer-cert.pem", "CN=viewer,OU=viewer,O=JobWorker"),
    ],
)
def test_the_subject_says_who_and_which_role(folder: Path, file: str, subject: str) -> None:
    printed = run_openssl(folder, f"x509 -noout -subject -nameopt RFC2253 -in {file}")
    assert printed == f"subject={subject}\n"


@pytest.mark.parametrize(
    "name",
    [
        *("job-worker", "localhost", "127.0.0.1", "::1", socket.gethostname()),
        *("farm.example.org", "192.0.2.7"),
    ],
)
def test_clients_reach_the_server_by_each_of_its_names(folder: Path, name: str) -> None:
    client = client_context(folder, "client")
    assert handshake(server_context(folder), client, name) == "admin"


def test_clients_refuse_the_server_by_another_name(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        handshake(server_context(folder), client_context(folder, "client"), "elsewhere")


def test_the_server_refuses_a_client_of_another_ca(folder: Path, tmp_path: Path) -> None:
    certs.make_all(tmp_path / "other")
    client = client_context(tmp_path / "other", "client")
    client.load_verify_locations(folder / "ca-cert.pem")

    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca|certificate verify failed"):
        handshake(server_context(folder), client, "localhost")


def test_a_servers_certificate_is_no_clients(folder: Path) -> None:
    client = client_context(folder, "server")
    with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.certificate|verify failed"):
        handshake(server_context(folder), client, "localhost")


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
    client = client_context(folder, name)
    assert handshake(server_context(folder), client, "localhost") == name


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
    server = server_context(folder)
    assert handshake(server, client_context(folder, "client"), "farm.example.org") == "admin"


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
    make_ca_by_hand(tmp_path, algorithm)
    certs.make_client(tmp_path, "ann", "viewer")
    run_openssl(tmp_path, "verify -CAfile ca-cert.pem -purpose sslclient ann-cert.pem")


def test_a_name_is_not_given_out_twice(folder: Path) -> None:
    """Else a user `admin` would have the jobs of the admin that every folder begins with."""
    with pytest.raises(CertificateError, match="has the name 'admin' already"):
        certs.make_client(folder, "admin", "user")
    assert not (folder / "admin-cert.pem").exists()
    certs.make_client(folder, "alice", "user")
    certs.make_client(folder, "alice", "viewer", force=True)


# Helpers


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
