"""What is shipped can be installed in an empty environment, and serves there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEWEST, OLDEST = (3, 14), (3, 11)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def run(*command: str | Path) -> str:
    # A test's own settings must not reach pip or the build.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environ, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def install(python: str | Path, package: Path, folder: Path) -> Path:
    """In an empty environment, which is returned."""
    run(python, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "--quiet", package)
    return folder


def try_out(environment: Path) -> None:
    """As a user would."""
    path = f"PATH={environment}/bin:{os.environ['PATH']}"
    output = run("env", path, "sh", ROOT / "packaging" / "try.sh")
    assert "it works, exit code 7" in output


def test_the_wheel_has_all_and_jobinit_with_its_run_bit(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        jobinit = archive.getinfo("jobworker/_bin/jobinit")
    assert jobinit.external_attr >> 16 & 0o111 == 0o111
    assert "jobworker/py.typed" in names
    assert "jobworker/_fastio.pyi" in names
    assert any(name.startswith("jobworker/_fastio.cpython") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_auditwheel_accepts_the_wheel(dist: Path) -> None:
    """It needs nothing but a C library, as new as this machine's or older."""
    (wheel,) = dist.glob("*.whl")
    report = run(sys.executable, "-m", "auditwheel", "show", wheel)
    assert re.search(r'following platform tag:\s*"manylinux_2_\d+_', report), report


def test_the_sources_have_what_building_and_testing_takes(dist: Path) -> None:
    (sources,) = dist.glob("*.tar.gz")
    with tarfile.open(sources) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"jobinit.c", "jobworker/_fastio.pyx", "proto/job_worker.proto", "Makefile"}
    needed |= {"README.md", "ARCHITECTURE.md", "LICENSE", "tests/conftest.py", "docs/cli.md"}
    needed |= {f"jobinit/{part}.h" for part in ("become", "filter", "protocol", "view")}
    assert needed <= names
    ours = {"jobinit.c", "tests/fuzz/jobinit_messages.c"}
    ours |= {"tests/moments.c", "tests/exec_from_thread.c", "tests/kernel/registers.c"}
    assert not [name for name in names - ours if name.endswith((".so", ".c"))]


@pytest.mark.timeout(300)
def test_the_wheel_installs_and_serves(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    environment = install(sys.executable, wheel, tmp_path / "environment")
    try_out(environment)


@pytest.mark.timeout(600)
def test_the_sources_install_and_serve_on_another_python(dist: Path, tmp_path: Path) -> None:
    python = another_python()
    if not python:
        pytest.skip("no other Python from 3.11 to 3.14 is here")
    (sources,) = dist.glob("*.tar.gz")
    environment = install(python, sources, tmp_path / "environment")
    try_out(environment)


def another_python() -> str:
    """The newest that this package supports, by its path; empty where there is none."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        if (3, minor) == sys.version_info[:2]:
            continue
        name = f"python3.{minor}"
        versions = Path.home() / ".pyenv" / "versions"
        found = [shutil.which(name), *map(str, versions.glob(f"3.{minor}.*/bin/{name}"))]
        for path in filter(None, found):
            works = subprocess.run([path, "-c", "import venv, ensurepip"], check=False)
            if works.returncode == 0:
                return path
    return ""
