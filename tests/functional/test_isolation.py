"""What separates a job from the machine, seen from inside of jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only a root server confines its jobs")


@pytest.fixture(scope="module")
def confining(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Server]:
    """A server with the default profile, as it is without any setting."""
    server = Server(
        tmp_path_factory.mktemp("confining"),
        certificates,
        PROFILE="default",
        PROFILES_ALLOWED="none",
        USERS_ALLOWED="daemon,root,4711",
    )
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(confining: Server) -> Iterator[Client]:
    with confining.connect() as client:
        yield client


def status_of(client: Client, **fields: str) -> dict[str, list[str]]:
    """/proc/self/status of a job: the words of each line, by its name."""
    job = client.create("cat", "/proc/self/status", **fields)
    lines = client.output(job.id).decode().splitlines()
    return {name: words.split() for name, words in (line.split(":", 1) for line in lines)}


# Whom it runs as


def test_a_job_is_an_unprivileged_user(client: Client) -> None:
    job, output = client.run("id -un; id -u; id -G; echo $USER $LOGNAME $HOME")
    assert output.decode().split() == ["nobody", "65534", "65534", "nobody", "nobody", "/tmp"]
    assert (job.user, job.profile) == ("nobody", "default")


def test_it_has_no_capability_and_can_gain_none(client: Client) -> None:
    status = status_of(client)
    assert {status[f"Cap{which}"][0] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"]
    assert status["Uid"] == ["65534"] * 4
    assert status["Gid"] == ["65534"] * 4


def test_a_setuid_program_gives_it_nothing(client: Client, tmp_path: Path) -> None:
    _, output = client.run("su -c id root </dev/null; newgrp root -c id; id -u")
    assert output.splitlines()[-1] == b"65534"
    assert b"uid=0" not in output


def test_its_limits(client: Client) -> None:
    script = "ulimit -c; ulimit -r; ulimit -e; nice -n -5 nice 2>/dev/null"
    job = client.create("bash", "-c", script)
    assert client.output(job.id).split() == [b"0"] * 4


def test_an_allowed_user(client: Client) -> None:
    job, output = client.run("id -un; echo $USER $HOME", user="daemon")
    assert output.split() == [b"daemon", b"daemon", b"/usr/sbin"]
    assert job.user == "daemon"
    assert status_of(client, user="4711")["Uid"] == ["4711"] * 4


def test_its_output_can_be_opened_again(client: Client) -> None:
    """As scripts do: echo > /dev/stderr."""
    job, output = client.run("echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin")
    assert output in {b"out\nerr\n", b"err\nout\n"}
    assert job.exitCode == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "www-data"},
        {"user": "root"},
        {"user": "0"},
        {"profile": "nonsense"},
        {"working_directory": "/root"},
        {"command": "/root/program"},
        {"command": "/etc/shadow"},
    ],
    ids=str,
)
def test_what_it_may_not_have(client: Client, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("CreateJob", pb.CreateJobReq(**({"command": "true"} | fields)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(next(iter(fields)))


def test_profile_none_is_the_servers_user(client: Client) -> None:
    status = status_of(client, profile="none")
    assert status["Uid"] == ["0"] * 4
    assert status["NoNewPrivs"] == ["0"]
    job, output = client.run("id -u", profile="none", user="daemon")
    assert output == b"1\n"
    assert job.user == "daemon"


def test_the_server_tells_what_is_in_force(client: Client) -> None:
    info = client.info()
    assert info.default_profile == "default"
    assert list(info.profiles) == ["default", "none"]
    assert info.default_user == "nobody"
    assert list(info.users) == ["daemon", "root", "4711"]
    assert info.isolation_problem == ""
