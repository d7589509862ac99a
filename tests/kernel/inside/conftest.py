"""What the tests in the kernel share: its cgroups, its disks, processes in them, and servers."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import jobworker
from engine.cgroups import make_cgroup
from functional.server import Client, Server
from jobworker import certs
from jobworker.engine.cgroup import Cgroup, CgroupTree
from jobworker.job import Limits

ROOT = Path("/sys/fs/cgroup")
DISK = Path("/disk")  # ext4 on ubd0
ESCAPED = Path(__file__).with_name("written-inside-the-kernel")
COMMAND_SECONDS = 30
WAIT_SECONDS = 20
JOB = itertools.count(1)

DELEGATED = ROOT / "delegated"
USER = 4242  # has no name here

Create = Callable[..., Cgroup]


@pytest.fixture
def tree() -> Iterator[CgroupTree]:
    tree = CgroupTree.open(ROOT, "test")
    assert tree.path, tree.problem
    yield tree
    clear(tree)
    assert not tree.path.exists()


@pytest.fixture
def create(tree: CgroupTree) -> Create:
    """A cgroup with limits, given by name, for a job on the ext4 disk."""

    def create_with(working_directory: str | Path = DISK, **limits: int) -> Cgroup:
        return make_cgroup(tree, next(JOB), Limits(**limits), str(working_directory))

    return create_with


@pytest.fixture
def delegated() -> Iterator[Path]:
    with delegated_directory() as path:
        yield path


def clear(tree: CgroupTree) -> None:
    for cgroup in tree.leftovers():
        cgroup.kill()
        cgroup.remove()
    tree.close()


@contextlib.contextmanager
def started(cgroup: Cgroup, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """In the cgroup from its first instruction, as a job is."""
    join = 'echo 0 > "$0/cgroup.procs" && exec "$@"'
    process = subprocess.Popen(
        ["sh", "-c", join, str(cgroup.path), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        cgroup.kill()
        process.communicate()


def run_in(cgroup: Cgroup, *command: str) -> subprocess.CompletedProcess[str]:
    with started(cgroup, *command) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(
        command, process.returncode, output.decode(), errors.decode()
    )


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(device: str, folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run("mount", *options, device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextlib.contextmanager
def directory(path: Path) -> Iterator[Path]:
    """A cgroup of the test's own, with what may be in it."""
    path.mkdir()
    try:
        yield path
    finally:
        cgroup = Cgroup(path)
        cgroup.kill()
        cgroup.remove()


@contextlib.contextmanager
def delegated_directory(user: int = 0) -> Iterator[Path]:
    """A cgroup as systemd makes one for a unit with Delegate=yes."""
    (ROOT / "cgroup.subtree_control").write_text("+cpu +memory +io +pids")
    with directory(DELEGATED):
        delegate(DELEGATED, user)
        yield DELEGATED


def delegate(path: Path, user: int) -> None:
    for name in (".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(path / name, user, user)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what no event tells."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Servers


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    certs.make_all(folder)
    return folder


@contextlib.contextmanager
def serving(
    folder: Path, certificates: Path, cgroup: Path = ROOT, user: int = 0, **settings: Any
) -> Iterator[Server]:
    """A server in this cgroup, as this user; its files are in the folder. PROFILE="": no such
    setting."""
    shutil.copytree(certificates, folder / "certs", dirs_exist_ok=True)
    if user:
        give_to(folder, user)
    # The shell moves itself, and becomes the server.
    launcher = ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(cgroup)]
    if user:
        launcher += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    if settings.get("PROFILE") == "":
        launcher += ["env", "--unset=JOB_WORKER_PROFILE"]
    server = Server(folder, folder / "certs", launcher=launcher, **settings)
    try:
        yield server
    finally:
        server.stop()


def give_to(folder: Path, user: int) -> None:
    """With all that is in it. And the way to it, and to Python and jobworker: these are often
    in a home that is closed to others. All of this happens in the overlay only."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)
    for path in (folder, Path(sys.executable).resolve(), Path(jobworker.__path__[0])):
        for parent in path.parents:
            parent.chmod(parent.stat().st_mode | 0o055)


def refusal(client: Client, **fields: Any) -> tuple[grpc.StatusCode, str]:
    """Of a job with these fields."""
    with pytest.raises(grpc.RpcError) as caught:
        client.create("true", **fields)
    return caught.value.code(), caught.value.details() or ""


def device_of(path: str | Path) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"
