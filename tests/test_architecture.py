"""The shape of the project, as ARCHITECTURE.md tells it: layers, exports, and where tests are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jobworker
from jobworker.pb import job_worker_pb2

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jobworker"
TESTS = ROOT / "tests"
SERVICE = job_worker_pb2.DESCRIPTOR.services_by_name["JobService"]

# Modules whose tests are not at the place that mirrors theirs.
TESTED_ELSEWHERE = {
    "__main__": "test_packaging.py",
    "daemon": "functional/test_server.py",
    "engine/jobinits": "functional/test_restart.py",  # who dies, and what then
    "engine/looks": "functional/test_create_job.py",
    "engine/manager": "functional",  # one module an RPC
    "errors": "rpc/test_convert.py",  # the tree is tested where all of it is mapped
    "rpc/connections": "functional/test_abuse.py",
    "rpc/credentials": "functional/test_credentials.py",
    "rpc/gate": "functional/test_abuse.py",
    "rpc/identity": "functional/test_server.py",
    "rpc/memory": "functional/test_abuse.py",
    "rpc/server": "functional/test_server.py",
    "rpc/service": "functional",  # one module an RPC
}
# RPCs whose functional tests are those of another one.
TESTED_TOGETHER = {"GetJobs": "ListJobs"}
# Tests of what is no module of the package.
TESTS_OF_THE_WHOLE = {
    "test_architecture",
    "test_compatibility",
    "test_generated",
    "test_install",
    "test_packaging",
}


# Layers


def test_imports_go_downwards_and_never_to_a_sibling() -> None:
    """The contracts are in pyproject.toml, [tool.importlinter]."""
    check = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_native_core_knows_bytes_and_descriptors_only() -> None:
    """import-linter does not read Cython."""
    source = (PACKAGE / "_fastio.pyx").read_text()
    imported = re.findall(r"^\s*(?:from|c?import)\s+(\w+)", source, re.MULTILINE)

    assert imported
    assert set(imported) <= {"cython", "cpython", "libc", "posix"}


def test_only_the_engine_uses_the_native_core() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(?:from|import) .*\b_fastio\b", path.read_text(), re.MULTILINE)
    }
    assert users == {"engine"}


def test_importing_the_package_loads_nothing_else() -> None:
    """A command line that answers at once imports only what its command needs."""
    program = "import sys, jobworker; print(*sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = answer.stdout.split()
    assert [name for name in modules if name.startswith("jobworker")] == ["jobworker"]
    assert not {"grpc", "google.protobuf", "cryptography", "asyncio"} & set(modules)


# Exports


def test_the_package_exports_what_it_says() -> None:
    public = {
        name
        for name, value in vars(jobworker).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public <= set(jobworker.__all__)
    assert [name for name in jobworker.__all__ if not hasattr(jobworker, name)] == []


def test_the_stub_of_the_native_core_describes_what_was_built(tmp_path: Path) -> None:
    # Cython shows no signature of a constructor, and adds private functions of its own.
    excepted = tmp_path / "allowlist"
    excepted.write_text(r"jobworker\._fastio\.(\w+\.__init__|__\w+__)")
    check = subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", "jobworker._fastio"),
            *("--allowlist", excepted, "--ignore-disjoint-bases"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


# Where tests are


def _modules() -> list[str]:
    """`engine/cgroup` for jobworker/engine/cgroup.py, and so on; without generated ones."""
    paths = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx")])
    names = [path.relative_to(PACKAGE).with_suffix("") for path in paths]
    return [name.as_posix() for name in names if name.name != "__init__" and name.parts[0] != "pb"]


def _mirror(module: str) -> str:
    """`engine/test_cgroup.py` for `engine/cgroup`, `test_fastio.py` for `_fastio`."""
    path = Path(module)
    return (path.parent / f"test_{path.name.lstrip('_')}.py").as_posix()


@pytest.mark.parametrize("module", _modules())
def test_each_module_has_its_tests(module: str) -> None:
    assert (TESTS / TESTED_ELSEWHERE.get(module, _mirror(module))).exists()


@pytest.mark.parametrize("rpc", list(SERVICE.methods_by_name))
def test_each_rpc_has_its_functional_tests(rpc: str) -> None:
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", TESTED_TOGETHER.get(rpc, rpc)).lower()
    assert (TESTS / "functional" / f"test_{name}.py").exists()


def test_each_test_module_belongs_to_a_module() -> None:
    mirrors = {_mirror(module) for module in _modules()}
    strays = [
        name
        for path in TESTS.rglob("test_*.py")
        if (name := path.relative_to(TESTS).as_posix()) not in mirrors
        and path.stem not in TESTS_OF_THE_WHOLE
        and not name.startswith(("functional/", "fuzz/", "kernel/"))
    ]
    assert strays == []
