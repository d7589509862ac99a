"""What the server is, for people and for scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import jobworker as package
from cli.program import Program
from functional.server import Server


def test_info(jobworker: Program, server: Server) -> None:
    shown = jobworker("info").stdout
    assert re.search(rf"^Version: +{package.__version__}$", shown, re.MULTILINE)
    assert re.search(r"^You are: +admin, with the role admin$", shown, re.MULTILINE)
    assert re.search(rf"^State: +{server.state}$", shown, re.MULTILINE)
    assert re.search(r"^Limits: +cpu (yes|no), memory (yes|no), io (yes|no)", shown, re.MULTILINE)


def test_a_limit_that_cannot_be_enforced_is_explained(jobworker: Program) -> None:
    info = jobworker.json("info")
    shown = jobworker("info").stdout
    for controller in info["controllers"]:
        assert controller["available"] == (f"{controller['name']} yes" in shown)
        assert controller["problem"] in shown


def test_the_limits_in_force_are_those_that_can_be_enforced(jobworker: Program) -> None:
    info = jobworker.json("info")
    available = {each["name"] for each in info["controllers"] if each["available"]}
    assert info["limits_in_force"] == {
        "cpu_percent": 100 if "cpu" in available else 0,
        "memory_mib": 512 if "memory" in available else 0,
        "io_bytes_per_second": 0,
        "pids": info["default_limits"]["pids"] if "pids" in available else 0,
    }
    (defaults,) = re.findall(r"^Defaults: +(.*)$", jobworker("info").stdout, re.MULTILINE)
    assert ("CPU 100 %" in defaults) == ("cpu" in available)
    assert (defaults == "none") == (not any(info["limits_in_force"].values()))


def test_what_is_missing_is_labelled_like_the_rest(jobworker: Program) -> None:
    missing = [each["name"] for each in jobworker.json("info")["controllers"] if each["problem"]]
    shown = re.findall(r"^Missing:   ([a-z, ]+): ", jobworker("info").stdout, re.MULTILINE)
    assert [name for names in shown for name in names.split(", ")] == missing


def test_as_json(jobworker: Program, server: Server) -> None:
    info = jobworker.json("info")
    assert info.keys() == {
        *("version", "started", "identity", "role", "running_jobs", "maximum_jobs"),
        *("state_directory", "cgroup", "controllers", "default_limits", "isolation"),
        "limits_in_force",
        *("ended_jobs", "ended_log_bytes", "disk_room_bytes", "disk_reserve_bytes"),
        *("log_max_bytes", "log_policy", "client_limits", "quota", "quota_used"),
    }
    assert (info["role"], info["state_directory"]) == ("admin", str(server.state))
    assert info["default_limits"]["cpu_percent"] == 100
    assert info["isolation"]["default_profile"] in info["isolation"]["profiles"]
    assert json.loads(jobworker("-o", "json", "info").stdout).keys() == info.keys()


def test_what_a_client_may_have_at_once(
    jobworker: Program, start_server: Callable[..., Server]
) -> None:
    server = start_server(CLIENT_CALLS="20", CLIENT_STREAMS="30", CONNECTIONS="80")
    limits = jobworker.json("-s", server.address, "info")["client_limits"]
    assert limits == {"calls": 20, "streams": 30, "connections": 40}
    shown = jobworker("-s", server.address, "info").stdout
    assert re.search(r"^At once: +20 calls, 30 streams, 40 connections$", shown, re.MULTILINE)


def test_quotas(jobworker: Program, tmp_path: Path, start_server: Callable[..., Server]) -> None:
    assert "Quotas:" not in jobworker("info").stdout
    clients = tmp_path / "clients.toml"
    clients.write_text("[cn.admin]\nrunning_jobs = 7\ntotal_cpu = 400\ncreates_per_second = 2.5\n")
    server = start_server(CLIENTS=str(clients))
    shown = jobworker("info", JOB_WORKER_SERVER=server.address).stdout
    quotas = "0 of 7 running jobs, CPU 0 of 400 %, 2.5 creates a second"
    assert re.search(rf"^Quotas: +{quotas}$", shown, re.MULTILINE)


def test_what_is_kept(jobworker: Program) -> None:
    shown = jobworker("info").stdout
    assert re.search(r"^Ended: +\d+ kept, with [\d.]+ \w+ of output$", shown, re.MULTILINE)
    assert re.search(r"^Disk: +[\d.]+ \w+ left$", shown, re.MULTILINE)
    assert re.search(r"^Output: +all is kept$", shown, re.MULTILINE)
    assert re.search(r"^Isolation: +profile none .*, as \w+", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("ring", "of each job the newest 1.0 MiB are kept"),
        ("head", "of each job the first 1.0 MiB are kept"),
        ("stop", "a job that writes more than 1.0 MiB is ended"),
    ],
)
def test_a_quota_and_a_disk_with_too_little_room(
    jobworker: Program, start_server: Callable[..., Server], policy: str, words: str
) -> None:
    server = start_server(LOG_MAX_BYTES="1MiB", LOG_POLICY=policy, DISK_RESERVE="100TiB")
    shown = jobworker("-s", server.address, "info").stdout
    assert re.search(rf"^Output: +{words}$", shown, re.MULTILINE)
    assert re.search(
        r"^Disk: +.* left: too little for new jobs, which need 100 TiB$", shown, re.MULTILINE
    )


def test_on_a_terminal(jobworker: Program) -> None:
    shown = re.sub(r"\x1b\[\d*m", "", jobworker.screen("info"))
    prose = [line for line in shown.splitlines() if not re.match(r"\w[\w ]*:", line)]
    assert all(len(line) <= 80 for line in prose)
