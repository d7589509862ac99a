"""What `jobworker serve --dev` leaves, and who finds it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from functional.server import Server
from jobworker.client import Client
from jobworker.client.connection import server_of
from jobworker.dev import dev_folder, dev_record, make_dev_folder, write_dev_record
from jobworker.errors import SettingError


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a user who has nothing yet."""
    monkeypatch.chdir(tmp_path)
    environ = {"XDG_DATA_HOME": str(tmp_path / "data")}
    monkeypatch.setenv(*environ.copy().popitem())
    return environ


def test_the_record_is_the_users_alone(environ: dict[str, str]) -> None:
    make_dev_folder(environ)
    write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))
    assert dev_record(environ) == {"address": "127.0.0.1:7001", "certs": "/dev-certs"}
    assert stat.S_IMODE(dev_folder(environ).stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(SettingError, match="set XDG_DATA_HOME, or HOME"):
        make_dev_folder({"XDG_DATA_HOME": "/dev/null"})


def test_a_record_that_cannot_be_written(environ: dict[str, str]) -> None:
    (make_dev_folder(environ) / "server").symlink_to("/dev/full")
    with pytest.raises(SettingError, match="cannot be written to: No space left on device; set"):
        write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))


def test_a_client_finds_the_development_server(environ: dict[str, str], server: Server) -> None:
    make_dev_folder(environ)
    write_dev_record(environ, server.address, server.certs)
    with Client() as client:
        assert client.info().role == "admin"


def test_what_is_given_or_there_is_stronger_than_the_record(environ: dict[str, str]) -> None:
    assert server_of(None, None, None) == ("localhost:50051", None)
    make_dev_folder(environ)
    write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))
    assert server_of(None, None, None) == ("127.0.0.1:7001", "/dev-certs")
    assert server_of("farm:1", None, None) == ("farm:1", "/dev-certs")
    assert server_of(None, "mine", None) == ("localhost:50051", "mine")
    assert server_of(None, None, "ca.pem") == ("localhost:50051", None)
    Path("certs").mkdir()
    assert server_of(None, None, None) == ("localhost:50051", None)
