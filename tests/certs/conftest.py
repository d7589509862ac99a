"""Folders of certificates: made here, and by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from certs.by_hand import make_ca_by_hand, sign_by_hand
from jobworker import certs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all that `make_all` makes."""
    certs.make_all(tmp_path / "certs", ["farm.example.org", "192.0.2.7"])
    return tmp_path / "certs"


@pytest.fixture(scope="module")
def made_by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by-hand")
    make_ca_by_hand(folder, "rsa:4096")
    sign_by_hand(folder, "server", "/CN=localhost", bits=4096)
    sign_by_hand(folder, "client", "/O=JobWorker/OU=admin/CN=admin-client", bits=4096)
    return folder


@pytest.fixture
def by_hand(made_by_hand: Path, tmp_path: Path) -> Path:
    """A folder made with openssl: RSA 4096, a server without alternative names."""
    return Path(shutil.copytree(made_by_hand, tmp_path / "by-hand"))
