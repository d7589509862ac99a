"""A tree in a cgroup that others own, or own a part of; and what an earlier server left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.cgroups import make_cgroup
from jobworker.engine.cgroup import Cgroup, CgroupTree
from jobworker.errors import LimitUnavailableError
from jobworker.job import Limits
from kernel.inside.conftest import ROOT, clear, delegate, directory, run

NOBODY = 65534
ALL = {"cpu", "memory", "io", "pids"}

# A server with a tree at argv[1], in the cgroup argv[2], as the user argv[3]; it has a job
# that uses too much memory, and says what it saw.
SERVER = r"""
import json, os, subprocess, sys
from pathlib import Path
from jobworker.engine.cgroup import CgroupTree
from jobworker.job import Limits

base, own, user = sys.argv[1:]
Path(own, "cgroup.procs").write_text("0")
if user != "0":
    os.setgroups([])
    os.setgid(int(user))
    os.setuid(int(user))
nowhere = subprocess.DEVNULL
jobinit = subprocess.Popen(["sleep", "1000"], stdout=nowhere, stderr=nowhere)
tree = CgroupTree.open(Path(base), "x")
seen = {
    "path": str(tree.path),
    "problem": tree.problem,
    "controllers": dict(tree.controllers),
    "cgroup": Path("/proc/self/cgroup").read_text(),
    "jobinit": Path(f"/proc/{jobinit.pid}/cgroup").read_text(),
}
if tree.path and not tree.controllers["memory"]:
    cgroup = tree.of(1)
    cgroup.path.mkdir()
    for name, value in tree.limit_files(Limits(memory_mib=20), "/"):
        (cgroup.path / name).write_text(value)
    # dash, as a job that uses memory: every user can run it.
    script = 'echo 0 > "$0/cgroup.procs"; x=x; while :; do x=$x$x; done'
    seen["returncode"] = subprocess.run(["sh", "-c", script, cgroup.path]).returncode
    seen["killed"] = cgroup.accounts()[1].killed
    cgroup.remove()
jobinit.kill()
jobinit.wait()
print(json.dumps(seen))
"""


def serve(base: Path, own: Path, user: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(sys.executable, "-c", SERVER, base, own, str(user)))
    return answer


@contextlib.contextmanager
def process_in(path: Path) -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (path / "cgroup.procs").write_text(str(process.pid))
            yield process.pid
        finally:
            process.kill()


# Delegated


def test_a_server_in_its_delegated_cgroup_moves_itself_to_a_leaf(delegated: Path) -> None:
    seen = serve(base=delegated, own=delegated)

    assert seen["path"] == str(delegated / "jobworker-x")
    assert set(seen["controllers"].values()) == {""}
    assert seen["cgroup"] == seen["jobinit"] == "0::/delegated/jobworker-x-server\n"
    assert seen["returncode"] == -9 and seen["killed"]


def test_a_user_has_the_same_limits_in_a_delegated_cgroup(delegated: Path) -> None:
    delegate(delegated, NOBODY)

    seen = serve(base=delegated, own=delegated, user=NOBODY)

    assert seen["path"] == str(delegated / "jobworker-x")
    assert set(seen["controllers"].values()) == {""}
    assert seen["cgroup"] == seen["jobinit"] == "0::/delegated/jobworker-x-server\n"
    assert seen["returncode"] == -9 and seen["killed"]


def test_a_user_outside_the_delegated_cgroup_is_told_to_start_in_it(delegated: Path) -> None:
    """The kernel would refuse to move each job."""
    delegate(delegated, NOBODY)

    seen = serve(base=delegated, own=ROOT, user=NOBODY)

    assert seen["path"] == "None"
    assert "this user may not move processes from /sys/fs/cgroup, where" in seen["problem"]
    assert "start the server in a cgroup below /sys/fs/cgroup/delegated" in seen["problem"]
    assert not (delegated / "jobworker-x").exists()


def test_a_user_without_delegation_is_told_how_to_get_it() -> None:
    seen = serve(base=ROOT, own=ROOT, user=NOBODY)

    assert seen["path"] == "None"
    assert seen["problem"].startswith("cannot make /sys/fs/cgroup/jobworker-x: no permission")
    assert "Delegate=yes" in seen["problem"]


def test_controllers_that_were_not_delegated_are_named(delegated: Path) -> None:
    delegate(delegated, NOBODY)
    inner = delegated / "inner"
    inner.mkdir()
    delegate(inner, NOBODY)
    (delegated / "cgroup.subtree_control").write_text("+memory +pids")
    os.chown(delegated / "cgroup.subtree_control", 0, 0)

    seen = serve(base=inner, own=inner, user=NOBODY)

    problems = seen["controllers"]
    assert problems["memory"] == problems["pids"] == ""
    for name in ("cpu", "io"):
        assert problems[name].startswith(
            "cannot write /sys/fs/cgroup/delegated/cgroup.subtree_control: no permission"
        )
    assert "Delegate=yes" in problems["cpu"]


def test_foreign_processes_in_the_base_are_named(delegated: Path) -> None:
    with process_in(delegated) as pid:
        tree = CgroupTree.open(delegated, "x")
        assert tree.path == delegated / "jobworker-x"
        for problem in tree.controllers.values():
            assert problem.startswith(f"processes are in {delegated} itself")
            assert f": {pid} (" in problem
        # Without limits, jobs can run.
        with process_in(make_cgroup(tree, 1).path):
            pass
        with pytest.raises(LimitUnavailableError, match=f"processes are in {delegated} itself"):
            tree.check(Limits(memory_mib=50), "/")
    again = CgroupTree.open(delegated, "x")
    assert set(again.controllers.values()) == {""}


def test_a_base_that_others_have_made_one_of_threads_is_named(delegated: Path) -> None:
    """The kernel lets no process into a cgroup below it."""
    with process_in(delegated) as pid:
        (delegated / "cgroup.subtree_control").write_text("+cpu")
        tree = CgroupTree.open(delegated, "x")
    assert tree.path is None
    assert tree.problem.startswith("no job can be in /sys/fs/cgroup/delegated/jobworker-x: ")
    assert f": {pid} (" in tree.problem
    assert not (delegated / "jobworker-x").exists()


def test_in_a_container_what_was_not_delegated_to_it_is_named() -> None:
    """Its root is not the machine's, and what is above it cannot be seen."""
    with directory(ROOT / "outer"):
        box = ROOT / "outer" / "box"
        box.mkdir()
        # In the cgroup first: it becomes the root of the namespace.
        script = (
            'echo 0 > "$0/cgroup.procs"; exec unshare --cgroup --mount sh -c '
            "'umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && "
            'exec "$0" -c "$1" '
            '/sys/fs/cgroup /sys/fs/cgroup 0\' "$@"'
        )
        seen = json.loads(run("sh", "-c", script, box, sys.executable, SERVER))

    assert seen["path"] == "/sys/fs/cgroup/jobworker-x"
    assert seen["cgroup"] == "0::/jobworker-x-server\n"
    for problem in seen["controllers"].values():
        assert problem.startswith("not delegated to /sys/fs/cgroup;")


def test_controllers_are_enabled_all_the_way_down() -> None:
    with directory(ROOT / "a"):
        base = ROOT / "a" / "b" / "c"
        base.mkdir(parents=True)
        tree = CgroupTree.open(base, "x")
        assert set(tree.controllers.values()) == {""}
        assert tree.path == base / "jobworker-x"
        for level in (ROOT, *tree.path.relative_to(ROOT).parents):
            enabled = (ROOT / level / "cgroup.subtree_control").read_text().split()
            assert set(enabled) >= ALL
        clear(tree)


# What is left


def test_a_dead_servers_jobs_are_found_killed_and_removed() -> None:
    tree = CgroupTree.open(ROOT, "dead")
    cgroup = make_cgroup(tree, 5, Limits(memory_mib=50))
    inner = cgroup.path / "made" / "by the job"
    inner.mkdir(parents=True)
    with process_in(inner):
        (found,) = CgroupTree.open(ROOT, "dead").leftovers()
        assert found == Cgroup(cgroup.path)
        found.kill()
        found.remove()
    assert CgroupTree.open(ROOT, "other").leftovers() == []
    for instance in ("dead", "other"):
        clear(CgroupTree.open(ROOT, instance))


def test_limits_hold_for_cgroups_that_the_job_makes() -> None:
    """It may enable controllers for them; its own limits stay."""
    tree = CgroupTree.open(ROOT, "test")
    cgroup = make_cgroup(tree, 1, Limits(memory_mib=30))
    (cgroup.path / "cgroup.subtree_control").write_text("+memory")
    inner = cgroup.path / "inner"
    inner.mkdir()
    script = 'echo 0 > "$0/cgroup.procs"; x=x; while :; do x=$x$x; done'
    assert subprocess.run(["sh", "-c", script, inner], check=False).returncode == -9
    assert cgroup.accounts()[1].killed
    clear(tree)


def test_many_jobs_leave_nothing() -> None:
    tree = CgroupTree.open(ROOT, "many")
    assert tree.path
    for number in range(500):
        cgroup = make_cgroup(tree, number, Limits(cpu_percent=100, memory_mib=512))
        cgroup.kill()
        cgroup.remove()
    assert tree.leftovers() == []
    tree.close()
    assert not tree.path.exists()
