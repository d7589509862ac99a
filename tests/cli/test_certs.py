"""Making certificates by hand, and looking at them. What is in them is tested in tests/certs."""

from __future__ import annotations

import json
import os
import stat

from cli.program import Program
from functional.server import Server
from jobworker import certs


def test_init_makes_all_in_the_usual_folder(unconnected: Program) -> None:
    answer = unconnected("certs", "init", "--name", "farm.example.org", "--name", "192.0.2.7")
    assert answer.returncode == 0
    folder = unconnected.folder / "certs"
    assert {line.split()[1] for line in answer.stdout.splitlines()} == {
        f"certs/{path.name}" for path in folder.iterdir()
    }
    names = certs.describe(folder / "server-cert.pem").alternative_names
    assert {"farm.example.org", "192.0.2.7", "localhost"} <= set(names)
    for key in folder.glob("*-key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_the_folder(unconnected: Program) -> None:
    """By argument, by the program's flag, by the environment: the first that is given."""
    unconnected.environ["JOB_WORKER_CERT_PATH"] = "by-variable"
    unconnected("--certs", "by-flag", "certs", "init", "by-argument")
    unconnected("--certs", "by-flag", "certs", "init")
    unconnected("certs", "init")
    made = {path.name for path in unconnected.folder.iterdir()}
    assert {"by-argument", "by-flag", "by-variable"} <= made


def test_nothing_is_overwritten(unconnected: Program) -> None:
    unconnected("certs", "init")
    before = (unconnected.folder / "certs/ca-key.pem").read_bytes()
    answer = unconnected("certs", "init")
    assert answer.returncode == 1
    assert "--force" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert (unconnected.folder / "certs/ca-key.pem").read_bytes() == before
    assert unconnected("certs", "init", "--force").returncode == 0
    assert (unconnected.folder / "certs/ca-key.pem").read_bytes() != before


def test_a_new_ca_is_told(unconnected: Program) -> None:
    assert unconnected("certs", "init").stderr == ""
    refused = unconnected("certs", "init").stderr
    assert "every client needs a new certificate" in refused
    assert "`jobworker certs server`" in refused
    assert "The CA is a new one" in unconnected("certs", "init", "--force").stderr


def test_the_server_alone(unconnected: Program) -> None:
    unconnected("certs", "init", "--name", "farm.example.org")
    folder = unconnected.folder / "certs"
    before = (folder / "ca-cert.pem").read_bytes()
    assert unconnected("certs", "server").stdout == (
        "Made certs/server-key.pem\nMade certs/server-cert.pem\n"
    )
    assert "farm.example.org" in certs.describe(folder / "server-cert.pem").alternative_names
    assert unconnected("certs", "server", "--name", "10.1.2.3").returncode == 0
    assert "10.1.2.3" in certs.describe(folder / "server-cert.pem").alternative_names
    certs.check_server_files(folder)
    assert (folder / "ca-cert.pem").read_bytes() == before


def test_one_more_client(jobworker: Program, server: Server) -> None:
    folder = jobworker.folder / "certs"
    folder.mkdir()
    for name in ("ca-cert.pem", "ca-key.pem"):
        os.symlink(server.certs / name, folder / name)
    made = jobworker("certs", "client", "certs", "--name", "ann", "--role", "viewer")
    assert made.stdout == "Made certs/ann-cert.pem\nMade certs/ann-key.pem\n"
    flags = ["--cert", "certs/ann-cert.pem", "--key", "certs/ann-key.pem"]
    info = jobworker.json(*flags, "info")
    assert (info["identity"], info["role"]) == ("ann", "viewer")


def test_a_name_that_cannot_be(unconnected: Program) -> None:
    unconnected("certs", "init")
    answer = unconnected("certs", "client", "--name", "../x", "--role", "admin")
    assert answer.returncode == 1
    assert "'../x'" in answer.stderr


def test_show(unconnected: Program) -> None:
    unconnected("certs", "init")
    header, *rows = unconnected("certs", "show").stdout.splitlines()
    assert header.split() == ["FILE", "FOR", "ROLE", "UNTIL", "NAMES"]
    shown = {row.split()[0]: row for row in rows}
    assert shown["viewer-cert.pem"].split()[1:3] == ["viewer", "viewer"]
    assert "job-worker, localhost" in shown["server-cert.pem"]
    assert len(rows) == 4


def test_show_warns(unconnected: Program) -> None:
    unconnected("certs", "init")
    (unconnected.folder / "certs/client-key.pem").chmod(0o644)
    assert "client-cert.pem: Its key may be read by others" in unconnected("certs", "show").stdout
    shown = unconnected.json("certs", "show")
    assert [len(each["warnings"]) for each in shown] == [0, 1, 0, 0]
    assert shown[1]["units"] == ["admin"]


def test_show_where_there_is_nothing(unconnected: Program) -> None:
    answer = unconnected("certs", "show")
    assert answer.returncode == 1
    assert "`jobworker certs init`" in answer.stderr


def files_shown(program: Program, *words: str) -> list[str]:
    return [each["file"] for each in program.json(*words)]


def test_show_shows_what_other_commands_use(unconnected: Program) -> None:
    dev = unconnected.folder / ".local/share/jobworker/dev"
    certs.make_all(dev / "certs")
    (dev / "server").write_text(f"127.0.0.1:7001\n{dev}/certs\n")
    assert files_shown(unconnected, "certs", "show")[0] == f"{dev}/certs/ca-cert.pem"
    certs.make_all(unconnected.folder / "certs")
    assert files_shown(unconnected, "certs", "show")[0] == "certs/ca-cert.pem"
    certs.make_all(unconnected.folder / "mine")
    for words in (["--certs", "mine", "certs", "show"], ["certs", "show", "--certs", "mine"]):
        assert files_shown(unconnected, *words)[0] == "mine/ca-cert.pem"
    one_by_one = ["--ca", "mine/ca-cert.pem", "--cert", "mine/client-cert.pem"]
    assert files_shown(unconnected, "certs", "show", *one_by_one) == one_by_one[1::2]
    unconnected.environ["JOB_WORKER_CERT_PATH"] = "gone"
    assert "gone does not exist" in unconnected("certs", "show").stderr


def test_show_one(unconnected: Program) -> None:
    certs.make_all(unconnected.folder)
    assert files_shown(unconnected, "certs", "show", "viewer-cert.pem") == ["viewer-cert.pem"]
    assert "ca-key.pem is not a certificate" in unconnected("certs", "show", "ca-key.pem").stderr
    assert "no.pem does not exist" in unconnected("certs", "show", "no.pem").stderr


def test_as_json(unconnected: Program) -> None:
    made = json.loads(unconnected("certs", "init", "-o", "json").stdout)
    assert "certs/ca-key.pem" in made["made"]


def test_revoke(jobworker: Program, server: Server) -> None:
    path = server.certs / "viewer-cert.pem"
    serial = certs.subject_of(path.read_bytes())[2]
    answer = jobworker("certs", "revoke", str(path), "--list", "revoked")
    assert answer.stdout == f"Revoked {serial} in revoked\n"
    revoked = jobworker.folder / "revoked"
    assert certs.read_revoked(revoked, server.certs / "ca-cert.pem").serials == {int(serial, 16)}
    again = jobworker.json("certs", "revoke", str(path), "--list", "revoked")
    assert again == {"serial": serial, "list": "revoked"}


def test_a_certificate_that_was_named_and_is_missing(unconnected: Program) -> None:
    unconnected("certs", "init")
    answer = unconnected("-s", "localhost:1", "--cert", "none.pem", "--key", "none.pem", "list")
    assert answer.returncode != 0
    assert "none.pem is missing; give the path of one that is there" in answer.stderr
