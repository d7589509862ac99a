"""Roles and quotas: of certificates alone, and of a file of clients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobworker.errors import SettingError
from jobworker.job import Quota
from jobworker.roles import UNLIMITED, Caller, Clients, Entries, Identity, Role

PROFILES = ("default", "none")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "clients.toml"


def clients_of(file: Path) -> Clients:
    clients = Clients(file, PROFILES)
    clients.use(clients.read())
    return clients


def caller(clients: Clients, name: str, *units: str) -> Caller:
    return clients.caller(Identity(name, units, "01"))


def role(clients: Clients, name: str, *units: str) -> Role | None:
    return caller(clients, name, *units).role


def test_without_a_file_the_ou_is_the_role() -> None:
    clients = Clients()
    assert caller(clients, "alice", "User") == Caller(
        Identity("alice", ("User",), "01"), Role.USER, UNLIMITED, None, None
    )
    assert role(clients, "alice", "admin", "user") is None
    assert role(clients, "alice", "users") is None
    assert role(clients, "admin") is None


def test_a_cn_is_stronger_than_an_ou_key_by_key(file: Path) -> None:
    file.write_text("""
        [ou.Build]
        role = "user"
        running_jobs = 10
        total_cpu = 400
        profiles = ["default"]
        [cn."alice smith"]
        running_jobs = 20
        creates_per_second = 0.5
        users = ["nobody"]
        [cn.root]
        role = "admin"
        [ou.viewer]
        total_memory = 1
    """)
    clients = clients_of(file)
    alice = caller(clients, "alice smith", "bUILD")
    assert alice.role is Role.USER
    assert alice.quota == Quota(20, 400, 0, 0.5)
    assert (alice.profiles, alice.users) == (frozenset({"default"}), frozenset({"nobody"}))
    assert caller(clients, "bob", "build").quota == Quota(10, 400)
    assert caller(clients, "bob", "viewer").quota == Quota(0, 0, 1)
    assert role(clients, "bob", "viewer") is Role.VIEWER
    # A CN needs no OU; more than one count for nothing.
    assert role(clients, "root") is Role.ADMIN
    assert role(clients, "bob", "build", "build") is None
    assert caller(clients, "alice smith", "build", "build").quota == Quota(20, 0, 0, 0.5)
    # A CN is exactly this one.
    assert role(clients, "Root") is None
    assert role(clients, "cn.root") is None


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[cn.alice\n", 1, "at line 1"),
        ('x = 1\n[cn.a]\nrole = "user"\nrole = "user"', 4, "at line 4"),
        ("[cn.alice]\n\n[people.bob]", 3, r"people in .*\[cn.NAME\]"),
        ("cn = 1", 1, "is no client"),
        ('[ou.a]\n[cn]\nbob = "admin"', 3, "cn.bob in .*is no client"),
        ('[cn.""]\nrole = "user"', 1, "is no client"),
        (
            '[cn.alice]\nrole = "user"\n[cn.bob]\n\nrole = "boss"',
            5,
            "cn.bob.role .*'boss'.*use admin",
        ),
        ("[cn.a]\nrole = 1", 2, "no such role"),
        ("[ou.a]\nrunning = 1", 2, "is not known; use role, running_jobs"),
        ('[cn.build.example.org]\nrole = "user"', 1, r'quotes: \[cn."build.example.org"\]'),
        ("[ou.a]\nrunning_jobs = 1.5", 2, "is not a number; use one from 0"),
        ('[ou.a]\nrunning_jobs = "1"', 2, "is not a number"),
        ("[ou.a]\nrunning_jobs = true", 2, "is not a number"),
        ("[ou.a]\ntotal_cpu = -1", 2, "is not a number"),
        ("[ou.a]\ncreates_per_second = nan", 2, "is not a number"),
        ("[ou.a]\ncreates_per_second = inf", 2, "is not a number"),
        ('[ou.a]\nprofiles = "none"', 2, "is not a list"),
        ("[ou.a]\nusers = [1]", 2, "is not a list"),
        ('[ou.a]\nprofiles = [\n  "nine"\n]', 4, "not known; use some of default, none"),
        ("[ou.a]\n[ou.b]\n[ou.A]", 3, "twice"),
        ('ou.role = { role = "user" }\nou.x = { role = "role" }', 2, "ou.x.role"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    file: Path, text: str, line: int, says: str
) -> None:
    file.write_text(text)
    with pytest.raises(SettingError, match=says) as caught:
        clients_of(file)
    assert f"line {line}" in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(SettingError, match=r"JOB_WORKER_CLIENTS.*No such file"):
        clients_of(file)
    for content in (b"\xff", b"x = " + 3000 * b"[" + 3000 * b"]"):
        file.write_bytes(content)
        with pytest.raises(SettingError, match=r"JOB_WORKER_CLIENTS.*is not TOML"):
            clients_of(file)


def test_the_file_is_utf_8_whatever_the_locale(file: Path) -> None:
    file.write_text('[cn."müller"]\nrole = "viewer"', "utf-8")
    program = """if True:
        import sys; from pathlib import Path; from jobworker.roles import Clients
        print(ascii(*Clients(Path(sys.argv[1])).read().cn))
    """
    # Here ASCII stands for all others that Python does not replace by UTF-8 by itself.
    environ = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program, str(file)]
    found = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "'m\\xfcller'\n"


def test_what_is_read_again_holds_once_it_is_used(file: Path) -> None:
    file.write_text('[cn.alice]\nrole = "user"')
    clients = clients_of(file)
    assert role(clients, "alice") is Role.USER
    file.write_text('[cn.alice]\nrole = "admin"')
    entries = clients.read()
    assert role(clients, "alice") is Role.USER
    clients.use(entries)
    assert role(clients, "alice") is Role.ADMIN
    assert Clients().read() == Entries()
