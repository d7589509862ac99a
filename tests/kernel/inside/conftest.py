"""What the tests in the kernel share: its cgroups, its disks, and processes in them."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.engine.cgroup import Cgroup, CgroupTree
from jobworker.job import Limits

ROOT = Path("/sys/fs/cgroup")
DISK = Path("/disk")  # ext4 on ubd0
ESCAPED = Path(__file__).with_name("written-inside-the-kernel")
COMMAND_SECONDS = 30
JOB = itertools.count(1)

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
        return tree.create(next(JOB), Limits(**limits), str(working_directory))

    return create_with


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


def device_of(path: str | Path) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"
