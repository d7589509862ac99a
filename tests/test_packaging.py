"""The package is whole: what was built is there, and what is declared fits."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import pytest

import jobworker
from jobworker import config

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())


def test_jobinit_was_built_and_may_be_run() -> None:
    jobinit = files("jobworker") / "_bin" / "jobinit"
    assert os.access(str(jobinit), os.X_OK)


def test_jobinit_is_static() -> None:
    """So it runs in any mount namespace: it asks for no interpreter (ELF's PT_INTERP)."""
    image = (files("jobworker") / "_bin" / "jobinit").read_bytes()
    header_offset = int.from_bytes(image[32:40], "little")
    header_bytes = int.from_bytes(image[54:56], "little")
    header_count = int.from_bytes(image[56:58], "little")
    types = {
        int.from_bytes(image[start : start + 4], "little")
        for start in range(header_offset, header_offset + header_count * header_bytes, header_bytes)
    }
    pt_load, pt_interp = 1, 3
    assert pt_load in types
    assert pt_interp not in types


@pytest.mark.parametrize("name", ["jobworker", "job-worker", "job-worker-cli"])
def test_each_console_script_names_something_that_can_be_called(name: str) -> None:
    [script] = entry_points(group="console_scripts", name=name)
    assert callable(script.load())


def test_python_m_jobworker_is_the_program() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "jobworker", "--version"], capture_output=True, text=True, check=True
    )
    assert jobworker.__version__ in answer.stdout


def test_a_working_copy_is_built_with_what_a_package_is_built_with() -> None:
    """The lists cannot refer to each other, so they are compared."""
    assert PYPROJECT["dependency-groups"]["build"] == PYPROJECT["build-system"]["requires"]


# The demonstration


def test_the_demonstration_says_what_it_does() -> None:
    """What it shows as typed is what it has run, quotes and all."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    shown = subprocess.run(
        ["sh", Path(__file__).parent.parent / "scripts" / "demo.sh"],
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    typed = shown[shown.index("jobworker create") : shown.index("Job created: ")]
    *words, script = shlex.split(typed)
    assert words[-2:] == ["sh", "-c"]
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    held = {word.partition("=")[0] for word in words if word.startswith("--max-")}
    left_out = set(re.findall(r"^Left out: (--\S+)=\d+, as \w+ is .+$", shown, re.MULTILINE))
    assert held | left_out == {"--max-cpu", "--max-memory", "--max-iobps"}
    assert len(re.findall(r"^I am process \d+, and see .*: [\d ]+$", shown, re.MULTILINE)) == 1
    if re.search("^Cgroup: +/", shown, re.MULTILINE):
        assert re.search(r"/job-1/cgroup\.procs:\d+$", shown, re.MULTILINE)


# Units of systemd

UNITS = Path(__file__).parent.parent / "packaging" / "systemd"
# Known since systemd 254; older ones say so, and go on.
NEWER_THAN_SOME = "Unknown key 'DelegateSubgroup'"


@pytest.mark.parametrize("name", ["jobworker.service", "jobworker-user.service"])
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here")
    # The program of the unit must be there, wherever it is on this machine.
    program = Path(sys.executable).with_name("jobworker")
    unit = (UNITS / name).read_text()
    unit = unit.replace("/opt/jobworker/bin/jobworker", str(program))
    unit = unit.replace("%h/.local/bin/jobworker", str(program))
    (tmp_path / name).write_text(unit)
    whose = "--user" if "user" in name else "--system"
    command = ["systemd-analyze", whose, "verify", str(tmp_path / name)]
    environ = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    complaints = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if name in line and NEWER_THAN_SOME not in line
    ]
    assert complaints == []
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_whole", [False, True])
def test_the_sample_of_settings_can_be_used(tmp_path: Path, is_whole: bool) -> None:
    """is_whole: with all that stands in it as a comment."""
    sample = (UNITS.parent / "config.toml").read_text()
    if is_whole:
        sample = re.sub("^# (?=[a-z_]+ = )", "", sample, flags=re.MULTILINE)
    file = tmp_path / "config.toml"
    file.write_text(sample)
    settings = config.load({}, {}, file)
    assert settings.cert_path == Path("/etc/jobworker/certs")
    assert (settings.revoked is not None) == is_whole


def test_no_setting_of_the_machines_unit_beats_its_file() -> None:
    unit = (UNITS / "jobworker.service").read_text()
    assert "--config /etc/jobworker/config.toml" in unit
    assert "Environment=" not in unit


def test_an_image_is_built_without_keys_and_environments() -> None:
    ignored = (UNITS.parent.parent / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "build", "dist", "certs", "**/*.pem"} <= set(ignored)


def test_a_restart_by_systemd_leaves_the_jobs() -> None:
    for path in UNITS.glob("*.service"):
        assert "\nKillMode=process\n" in path.read_text()
        assert "\nDelegate=yes\n" in path.read_text()


def test_no_start_is_the_last_one() -> None:
    """By default systemd gives up after five in ten seconds: a job that had the server's port for
    so long had ended the server for good."""
    for path in UNITS.glob("*.service"):
        before_service, _, service = path.read_text().partition("\n[Service]\n")
        assert "\nStartLimitIntervalSec=0\n" in before_service
        assert "\nRestart=always\n" in service


def test_no_unit_has_a_limit_on_processes_of_its_own() -> None:
    """By default it is a share of the machine's that one job may reach."""
    for path in UNITS.glob("*.service"):
        assert "\nTasksMax=infinity\n" in path.read_text()
