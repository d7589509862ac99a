"""Which server, and which certificate: flags, environment, the file, what `serve --dev` left."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.program import Program
from functional.server import Server
from jobworker import certs
from jobworker.cli import connection
from jobworker.dev import dev_folder, dev_record, make_dev_folder, write_dev_record
from jobworker.errors import SettingError

FILE = """
default = "farm"

[servers.farm]
address = "farm.example.org:50051"
certs = "certs/farm"

[servers.test]
address = "localhost:7000"
ca = "/pki/ca.pem"
server_name = "farm-test"
"""


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a user who has nothing yet."""
    monkeypatch.chdir(tmp_path)
    return {"XDG_CONFIG_HOME": str(tmp_path / "config"), "XDG_DATA_HOME": str(tmp_path / "data")}


@pytest.fixture
def file(environ: dict[str, str]) -> Path:
    path = connection.config_path(environ)
    path.parent.mkdir(parents=True)
    path.write_text(FILE)
    return path


# What is chosen


def test_without_anything(environ: dict[str, str]) -> None:
    assert connection.choose({}, environ) == {}


def test_a_flag_is_stronger_than_the_environment(environ: dict[str, str]) -> None:
    environ |= {"JOB_WORKER_SERVER": "one:1", "JOB_WORKER_CA": "a", "JOB_WORKER_SERVER_NAME": "n"}
    chosen = connection.choose({"server": "two:2", "ca": "b"}, environ)
    assert chosen == {"address": "two:2", "ca": "b", "server_name": "n"}


def test_the_default_server_of_the_file(environ: dict[str, str], file: Path) -> None:
    assert connection.choose({}, environ) == {
        "address": "farm.example.org:50051",
        "certs": str(file.parent / "certs/farm"),
    }


@pytest.mark.parametrize("place", ["flag", "environment"])
def test_a_server_by_its_name(environ: dict[str, str], file: Path, place: str) -> None:
    flags = {"server": "test"} if place == "flag" else {}
    environ |= {} if flags else {"JOB_WORKER_SERVER": "test"}
    assert connection.choose(flags, environ) == {
        "address": "localhost:7000",
        "ca": "/pki/ca.pem",
        "server_name": "farm-test",
    }


def test_a_named_server_brings_its_certificates_with_it(
    environ: dict[str, str], file: Path
) -> None:
    """Those in the environment are for another server."""
    environ |= {"JOB_WORKER_CERT_PATH": "/elsewhere", "JOB_WORKER_KEY": "/elsewhere/key"}
    chosen = connection.choose({"server": "farm"}, environ)
    assert (chosen["certs"], "key" in chosen) == (str(file.parent / "certs/farm"), False)


def test_an_address_has_nothing_of_the_default_server(environ: dict[str, str], file: Path) -> None:
    assert connection.choose({"server": "other:1"}, environ) == {"address": "other:1"}


def test_the_folder_of_certificates_that_always_was_there(environ: dict[str, str]) -> None:
    make_dev_folder(environ)
    write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))
    Path("certs").mkdir()
    assert connection.choose({}, environ) == {"certs": "certs"}


def test_a_development_server_needs_nothing(environ: dict[str, str]) -> None:
    make_dev_folder(environ)
    write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))
    assert connection.choose({}, environ) == {"address": "127.0.0.1:7001", "certs": "/dev-certs"}


def test_certificates_that_were_given_are_not_the_development_servers(
    environ: dict[str, str],
) -> None:
    make_dev_folder(environ)
    write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))
    assert connection.choose({"certs": "mine"}, environ) == {"certs": "mine"}


def test_a_pair_of_ones_own_is_for_the_development_server_too(environ: dict[str, str]) -> None:
    make_dev_folder(environ)
    write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))
    assert connection.choose({"cert": "a-cert.pem"}, environ) == {
        "address": "127.0.0.1:7001",
        "certs": "/dev-certs",
        "cert": "a-cert.pem",
    }


def test_a_record_that_is_damaged_is_none(environ: dict[str, str]) -> None:
    make_dev_folder(environ)
    write_dev_record(environ, "127.0.0.1:7001", Path("/dev-certs"))
    (dev_folder(environ) / "server").write_text("nonsense")
    assert connection.choose({}, environ) == {}


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither HOME nor an entry in passwd, as in many containers."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", home)
    assert connection.choose({"server": "localhost"}, {}) == {"address": "localhost:50051"}


# Files that are not right


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("default = ", "is not TOML"),
        ('default = "gone"', "gone"),
        ('[servers.test]\naddres = "x:1"', "servers.test"),
        ("[servers.test]\naddress = 1", "servers.test"),
        ('servers = "test"', "test"),
        (b"\xff", "is not TOML"),
        ("x = " + 3000 * "[", "is not TOML"),
    ],
)
def test_a_file_that_is_not_right(
    environ: dict[str, str], file: Path, content: str | bytes, named: str
) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = {} if b"default" in file.read_bytes() or content == b"\xff" else {"server": "test"}
    with pytest.raises(SettingError) as caught:
        connection.choose(flags, environ)
    assert named in str(caught.value)
    assert str(file) in str(caught.value)


def test_the_file_is_utf_8_whatever_the_locale(environ: dict[str, str], file: Path) -> None:
    file.write_text('[servers."büro"]\naddress = "x:1"', "utf-8")
    program = """if True:
        import os; from jobworker.cli import connection
        from jobworker.dev import write_dev_record
        write_dev_record(os.environ, "x:1", "\\xfc")
        print(ascii(connection.ConfigFile(connection.config_path(os.environ)).names()))
    """
    environ |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    make_dev_folder(environ)
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "['b\\xfcro']\n"
    assert dev_record(environ) == {"address": "x:1", "certs": "ü"}


def test_a_name_that_is_not_in_the_file(environ: dict[str, str], file: Path) -> None:
    with pytest.raises(SettingError, match=r"'nowhere': .* \(there: farm, test\)"):
        connection.choose({"server": "nowhere"}, environ)


@pytest.mark.parametrize(
    ("server", "address"),
    [
        ("localhost", "localhost:50051"),
        ("127.0.0.1", "127.0.0.1:50051"),
        ("farm.example.org", "farm.example.org:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:7", "[::1]:7"),
        ("farm:7", "farm:7"),
    ],
)
def test_an_address_without_its_port(environ: dict[str, str], server: str, address: str) -> None:
    assert connection.choose({"server": server}, environ) == {"address": address}


@pytest.mark.parametrize("server", ["nowhere", "localhost:", "farm.example.org:", ".", "a/b.c"])
def test_no_address_and_no_name(environ: dict[str, str], server: str) -> None:
    with pytest.raises(SettingError, match="as HOST:PORT its port is missing"):
        connection.choose({"server": server}, environ)


@pytest.mark.parametrize(
    ("server", "remedy"),
    [
        ("localhost:abc", "the port 'abc' is no number from 1 to 65535"),
        ("localhost:99999", "the port '99999' is no number"),
        ("localhost:0", "the port '0' is no number"),
        (":50051", "the host before the port is missing, as in localhost:50051"),
        ("https://localhost:50051", "leave out https://"),
        ("http://localhost", "leave out http://"),
    ],
)
def test_what_is_no_address(environ: dict[str, str], server: str, remedy: str) -> None:
    with pytest.raises(SettingError, match=re.escape(remedy)):
        connection.choose({"server": server}, environ)


def test_a_name_in_the_file_before_a_host(environ: dict[str, str], file: Path) -> None:
    file.write_text('[servers.localhost]\naddress = "localhost:7"')
    assert connection.choose({"server": "localhost"}, environ) == {"address": "localhost:7"}


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.0.2.1:1", False),
        ("127.0.0.1.example.org:1", False),
    ],
)
def test_loopback(address: str, is_loopback: bool) -> None:
    assert connection.is_loopback(address) is is_loopback


# The program


def test_flags_stand_before_and_after_the_command(unconnected: Program, server: Server) -> None:
    flags = ["-s", server.address, "--certs", str(server.certs)]
    assert unconnected(*flags, "info").returncode == 0
    assert unconnected("info", *flags).returncode == 0
    assert unconnected(*flags[:2], "info", *flags[2:]).returncode == 0


def test_the_later_flag_is_stronger(unconnected: Program, server: Server) -> None:
    flags = ["-s", server.address, "--certs", str(server.certs)]
    assert unconnected("-s", "localhost:1", "info", *flags).returncode == 0


def test_files_elsewhere(unconnected: Program, server: Server) -> None:
    viewer = [
        "--cert",
        f"{server.certs}/viewer-cert.pem",
        "--key",
        f"{server.certs}/viewer-key.pem",
    ]
    flags = ["-s", server.address, "--ca", f"{server.certs}/ca-cert.pem", *viewer]
    assert unconnected.json(*flags, "info")["role"] == "viewer"


def test_one_of_a_pair_stands_for_both(unconnected: Program, server: Server) -> None:
    flags = ["-s", server.address, "--certs", str(server.certs)]
    for flag in ("cert", "key"):
        pair = [f"--{flag}", f"{server.certs}/viewer-{flag}.pem"]
        assert unconnected.json(*flags, *pair, "info")["role"] == "viewer"


def test_a_folder_that_hides_the_development_server(
    unconnected: Program, server: Server, tmp_path: Path
) -> None:
    """As when somebody has tried both, in the same folder."""
    environ = {"XDG_DATA_HOME": str(tmp_path / "data")}
    unconnected.environ |= environ
    make_dev_folder(environ)
    write_dev_record(environ, server.address, server.certs)
    assert unconnected("info").returncode == 0

    flags = f"-s {server.address} --certs {server.certs}"
    told = f"./certs was used, not what `jobworker serve --dev` has left; for that: {flags}"
    (tmp_path / "certs").mkdir()
    assert told in unconnected("info").stderr
    certs.make_all(tmp_path / "certs")
    for words in (["info"], ["run", "true"]):
        assert told in unconnected("-s", server.address, *words).stderr
    assert told in unconnected("info").stderr  # where --dev has another port
    for words in (
        ["-s", "127.0.0.1:1"],  # nobody is there: whichever certificates
        ["-s", "127.0.0.1:1", "--cert", "nowhere.pem"],
        ["-s", server.address, "--cert", "nowhere.pem"],
        ["-s", server.address, "--server-name", "other"],
    ):
        answer = unconnected(*words, "info")
        assert answer.returncode
        assert "was used" not in answer.stderr
    assert unconnected(*flags.split(), "info").returncode == 0
    assert "was used" not in unconnected("--certs", "./certs/../certs", "info").stderr


def test_certificates_of_the_development_server_for_another_one(
    unconnected: Program, server: Server, tmp_path: Path
) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path / "data")}
    unconnected.environ |= environ
    make_dev_folder(environ)
    certs.make_all(tmp_path / "other")
    write_dev_record(environ, "127.0.0.1:1", tmp_path / "other")
    told = "the certificates are what `jobworker serve --dev` has left; use --certs for others"
    assert told in unconnected("-s", server.address, "info").stderr
    assert told not in unconnected("-s", "127.0.0.1:2", "info").stderr


def test_a_named_server(unconnected: Program, server: Server) -> None:
    folder = unconnected.folder / ".config/jobworker"
    folder.mkdir(parents=True)
    shutil.copytree(server.certs, folder / "mine")
    (folder / "config.toml").write_text(
        f'default = "here"\n[servers.here]\naddress = "{server.address}"\ncerts = "mine"\n'
    )
    assert unconnected("info").returncode == 0
    assert unconnected("-s", "here", "info").returncode == 0
    wrong = unconnected("-s", "there", "info")
    assert wrong.returncode == 1
    assert "there" in wrong.stderr


def test_a_server_of_another_name(jobworker: Program) -> None:
    answer = jobworker("--server-name", "somebody-else", "info")
    assert answer.returncode == 5
    assert "somebody-else" in answer.stderr
