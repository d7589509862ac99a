"""What the server is, for people and for scripts."""

from __future__ import annotations

import re

import jobworker as package
from cli.program import Program
from functional.server import Server


def test_info(jobworker: Program, server: Server) -> None:
    shown = jobworker("info").stdout
    assert re.search(rf"^Version: +{package.__version__}$", shown, re.MULTILINE)
    assert re.search(r"^You are: +admin, admin$", shown, re.MULTILINE)
    assert re.search(rf"^State: +{server.state}$", shown, re.MULTILINE)
    assert re.search(r"^Limits: +cpu (yes|no), memory (yes|no), io (yes|no)", shown, re.MULTILINE)


def test_a_limit_that_cannot_be_enforced_is_explained(jobworker: Program) -> None:
    info = jobworker.json("info")
    shown = jobworker("info").stdout
    for controller in info["controllers"]:
        assert controller["available"] == (f"{controller['name']} yes" in shown)
        assert controller["problem"] in shown


def test_as_json(jobworker: Program, server: Server) -> None:
    info = jobworker.json("info")
    assert info.keys() == {
        *("version", "started", "identity", "role", "running_jobs", "maximum_jobs"),
        *("state_directory", "cgroup", "controllers", "default_limits", "isolation"),
    }
    assert (info["role"], info["state_directory"]) == ("admin", str(server.state))
    assert info["default_limits"]["cpu_percent"] == 100
    assert info["isolation"]["default_profile"] in info["isolation"]["profiles"]
    assert jobworker("-o", "json", "info").stdout == jobworker("info", "-o", "json").stdout


def test_on_a_terminal(jobworker: Program) -> None:
    shown = re.sub(r"\x1b\[\d*m", "", jobworker.screen("info"))
    prose = [line for line in shown.splitlines() if not re.match(r"\w[\w ]*:", line)]
    assert all(len(line) <= 80 for line in prose)
