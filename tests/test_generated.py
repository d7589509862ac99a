"""What is generated and committed is what the generators make today."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from jobworker.pb import job_worker_pb2

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "jobworker" / "pb"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_committed_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "generate_pb.py", tmp_path], check=True)

    generated = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in COMMITTED.glob("job_worker_pb2*")}
    assert committed == generated, "jobworker/pb is not up to date: run `make proto`"


def test_the_committed_page_of_the_command_line_is_that_of_its_help(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    script = ROOT / "scripts" / "generate_cli_docs.py"
    subprocess.run([sys.executable, script, page], check=True)

    committed = (ROOT / "docs" / "cli.md").read_text()
    assert committed == page.read_text(), f"docs/cli.md is not up to date: run {script.name}"


def test_only_messages_are_generated() -> None:
    """The server's table of methods and the client's are their own: no stubs of services."""
    assert not list(COMMITTED.glob("*_grpc.py*"))


def test_reflection_shows_the_name_that_the_file_always_had() -> None:
    assert job_worker_pb2.DESCRIPTOR.name == "job_worker.proto"
    assert job_worker_pb2.DESCRIPTOR.package == "job_worker"


def test_the_oldest_protobuf_that_may_be_installed_accepts_the_generated_code() -> None:
    """protobuf refuses, on import, code that a newer version than itself generated."""
    code = (COMMITTED / "job_worker_pb2.py").read_text()
    match = re.search(r"^# Protobuf Python Version: (\S+)$", code, re.MULTILINE)
    assert match is not None

    assert Version(match.group(1)) <= _oldest("protobuf")


def test_the_generator_is_not_newer_than_the_oldest_grpcio_that_may_be_installed() -> None:
    [generator] = (Requirement(text) for text in PYPROJECT["dependency-groups"]["proto"])
    [pin] = generator.specifier

    assert (generator.name, pin.operator) == ("grpcio-tools", "==")
    assert Version(pin.version) <= _oldest("grpcio")


def _oldest(name: str) -> Version:
    """The lower bound of one of the package's own requirements."""
    requirements = {r.name: r for r in map(Requirement, PYPROJECT["project"]["dependencies"])}
    [bound] = (spec for spec in requirements[name].specifier if spec.operator == ">=")
    return Version(bound.version)
