"""Addresses, files and names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobworker.client.connection import Target, files_in
from jobworker.errors import CertificateError


def test_files() -> None:
    assert files_in(None, None, None, None).ca == Path("certs/ca-cert.pem")
    files = files_in("/etc/x", None, "/home/a.pem", Path("b.pem"))
    assert files.ca == Path("/etc/x/ca-cert.pem")
    assert (files.cert, files.key) == (Path("/home/a.pem"), Path("b.pem"))


def test_the_other_of_a_pair(certificates: Path, tmp_path: Path) -> None:
    viewer = (certificates / "viewer-cert.pem", certificates / "viewer-key.pem")
    for given in ({"cert": viewer[0], "key": None}, {"cert": None, "key": str(viewer[1])}):
        files = files_in(tmp_path, None, **given)
        assert (files.cert, files.key) == viewer
    # Not beside it, but in the folder as usual.
    shutil.copy(viewer[0], tmp_path)
    files = files_in(certificates, None, tmp_path / "viewer-cert.pem", None)
    assert files.key == certificates / "client-key.pem"
    with pytest.raises(CertificateError, match=r"viewer-cert\.pem has no key beside it; give both"):
        files_in(tmp_path, None, tmp_path / "viewer-cert.pem", None)


@pytest.mark.parametrize("kind", ["ca", "cert", "key"])
@pytest.mark.parametrize("damage", ["empty", "NUL", "text"])
def test_what_is_no_pem_is_refused(
    certificates: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    """gRPC reads as far as the first NUL, and ends the process where nothing is left."""
    files = files_in(certificates, None, None, None)
    path = tmp_path / "x.pem"
    content = getattr(files, kind).read_bytes()
    path.write_bytes({"empty": b"", "NUL": b"\0" + content, "text": b"text"}[damage])
    with pytest.raises(CertificateError, match=r"x\.pem is not a .* in PEM form; convert it"):
        replace(files, **{kind: path}).credentials()
    path.write_bytes(b"Of farm1\n" + content + b"\0")
    replace(files, **{kind: path}).credentials()


@pytest.mark.parametrize(
    ("address", "full", "host"),
    [
        ("farm1", "farm1:50051", "farm1"),
        ("farm1:99", "farm1:99", "farm1"),
        ("[::1]:99", "[::1]:99", "::1"),
        ("localhost", "localhost:50051", "localhost"),
    ],
)
def test_addresses(certificates: Path, address: str, full: str, host: str) -> None:
    target = Target(address, files_in(certificates, None, None, None), None)
    assert target.address == full
    assert set(target.names) == {"job-worker", "localhost", host}
    named = Target(address, files_in(certificates, None, None, None), "mine")
    assert named.names == ("mine",)
