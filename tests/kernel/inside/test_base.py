"""Mounts that the tree of cgroups can be in, or cannot.

By its name this file comes first: v1 takes a controller only where no cgroup with it is left,
and this kernel keeps the cgroup of a process that ran out of memory.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobworker.engine.cgroup import CgroupTree
from jobworker.job import Limits
from kernel.inside.conftest import ROOT, clear, mounted, run

WAIT_SECONDS = 20


def test_a_read_only_mount_is_named() -> None:
    with mounted("none", Path("/mnt"), "-t", "cgroup2"):
        run("mount", "-o", "remount,bind,ro", "/mnt")
        tree = CgroupTree.open(Path("/mnt"), "x")
    assert tree.path is None
    assert tree.problem == "/mnt is mounted read-only; mount it with rw"


def test_hybrid(tmp_path: Path) -> None:
    """What v1 has is named, the rest works. As in systemd's layout, v2 is in `unified`."""
    with (
        mounted("tmpfs", tmp_path, "-t", "tmpfs"),
        v1_mounted("pids", tmp_path / "pids"),
        mounted("none", tmp_path / "unified", "-t", "cgroup2"),
    ):
        tree = CgroupTree.open(tmp_path, "x")
        assert tree.path == tmp_path / "unified" / "jobworker-x"
        assert tree.controllers == {
            "cpu": "",
            "memory": "",
            "io": "",
            "pids": "bound to cgroup v1 by this machine; boot with cgroup_no_v1=all",
        }
        cgroup = tree.create(1, Limits(memory_mib=50), "/")
        assert (cgroup.path / "memory.max").read_text() == f"{50 << 20}\n"
        clear(tree)

        only_v1 = CgroupTree.open(tmp_path / "pids", "x")
        assert only_v1.path is None
        assert "its filesystem is cgroup; " in only_v1.problem
        assert "cgroup_no_v1=all" in only_v1.problem


@contextlib.contextmanager
def v1_mounted(controller: str, folder: Path) -> Iterator[None]:
    """v1 takes only what no cgroup of v2 uses, and gives it back late; there is no event for
    either."""
    folder.mkdir()
    (ROOT / "cgroup.subtree_control").write_text(f"-{controller}")
    mount = ["mount", "-t", "cgroup", "-o", controller, "none", str(folder)]
    wait_until(lambda: subprocess.run(mount, check=False, capture_output=True).returncode == 0)
    yield
    run("umount", folder)
    available = ROOT / "cgroup.controllers"
    wait_until(lambda: controller in available.read_text().split())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
