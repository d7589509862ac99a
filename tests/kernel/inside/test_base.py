"""Mounts that the tree of cgroups can be in, or cannot.

By its name this file comes first: v1 takes a controller only where no cgroup with it is left,
and this kernel keeps the cgroup of a process that ran out of memory.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc

from engine.cgroups import make_cgroup
from jobworker.engine.cgroup import CgroupTree
from jobworker.job import Limits
from kernel.inside.conftest import ROOT, clear, mounted, refusal, run, serving, wait_until

PROBLEM = "bound to cgroup v1 by this machine; boot with cgroup_no_v1=all"


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
            "pids": PROBLEM,
        }
        cgroup = make_cgroup(tree, 1, Limits(memory_mib=50))
        assert (cgroup.path / "memory.max").read_text() == f"{50 << 20}\n"
        clear(tree)

        only_v1 = CgroupTree.open(tmp_path / "pids", "x")
        assert only_v1.path is None
        assert "its filesystem is cgroup; " in only_v1.problem
        assert "cgroup_no_v1=all" in only_v1.problem


def test_a_server_on_a_hybrid_machine(tmp_path: Path, certificates: Path) -> None:
    """What v1 has is refused where a client asks for it, and left out, once said, where it is a
    default. The rest works."""
    with (
        mounted("tmpfs", tmp_path, "-t", "tmpfs"),
        v1_mounted("cpu", tmp_path / "cpu"),
        mounted("none", tmp_path / "unified", "-t", "cgroup2"),
        serving(tmp_path, certificates, CGROUP_BASE=str(tmp_path)) as server,
        server.connect() as client,
    ):
        assert {each.name: each.problem for each in client.info().controllers} == {
            "cpu": PROBLEM,
            "memory": "",
            "io": "",
            "pids": "",
        }
        code, message = refusal(client, maxCPU=50)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert message.startswith("maxCPU needs the cgroup controller 'cpu', which is not avail")
        assert PROBLEM in message

        assert server.log.count(f"without the default limits on cpu (100): {PROBLEM}") == 1
        own = f"{tmp_path}/unified$(sed -n s/^0:://p /proc/self/cgroup)"
        job, output = client.run(f'cat "{own}/memory.max"', maxMemory=50)
        assert (job.status, job.maxCPU, job.maxMemory) == ("COMPLETED", 0, 50)
        assert output == b"%d\n" % (50 << 20)


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
