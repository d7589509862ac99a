"""The job's own limits, and the cgroups of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from escapes.attack import Missing, Scene, attack, first_of, write_attempt

LIMITS = [
    *("cgroup.max.descendants", "cgroup.max.depth", "cgroup.subtree_control", "cgroup.type"),
    *("memory.max", "memory.high", "memory.swap.max", "memory.oom.group", "pids.max", "cpu.max"),
    *("io.max", "cpu.weight"),
]


def own_cgroups(scene: Scene) -> Iterator[Path]:
    """By all paths that may lead to it: on the machine, and where a cgroup namespace is mounted."""
    yield Path(scene["cgroup"]) / f"job-{os.environ['JOB_ID']}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2"):
            yield Path(before.split()[4])


@attack()
def raise_its_own_limits(scene: Scene) -> str:
    """What is in them is written again."""
    paths = (cgroup / name for cgroup in own_cgroups(scene) for name in LIMITS)
    return first_of(partial(_written_again, path) for path in paths)


def _written_again(path: Path) -> str:
    value = path.read_text().strip()
    path.write_text(value)
    return f"may write {path}"


@attack()
def raise_the_limits_of_all_jobs(scene: Scene) -> str:
    paths = (Path(scene["cgroup"]) / name for name in LIMITS)
    return first_of(partial(_written_again, path) for path in paths)


@attack()
def divide_its_own_cgroup(scene: Scene) -> str:
    return first_of(partial(_made_and_removed, cgroup / "inner") for cgroup in own_cgroups(scene))


def _made_and_removed(path: Path) -> str:
    path.mkdir()
    path.rmdir()
    return f"made {path}"


def _moves_to(name: str) -> Callable[[Scene], str]:
    def attempt(scene: Scene) -> str:
        procs = Path(scene[name]) / "cgroup.procs"
        procs.write_text("0")  # whoever writes it, and this process ends at once
        return f"is in {procs.parent}"

    return attempt


for _name in ("victims_cgroup", "root_cgroup"):
    attack(name=f"move to {_name.replace('_', ' ')}", changes_itself=True)(_moves_to(_name))


def _writes(name: str) -> Callable[[Scene], str]:
    return lambda scene: write_attempt(Path(scene["victims_cgroup"]) / name)


for _name in ("cgroup.kill", "cgroup.freeze", "cgroup.procs", "cgroup.max.descendants"):
    attack(name=f"write {_name} of victim")(_writes(_name))


@attack(shown_as="user")
def list_the_cgroups_of_the_machine(scene: Scene) -> str:
    """Who does so into memory that is slow keeps root from making any meanwhile."""
    folders = [Path(scene["root_cgroup"]), Path("/sys/fs/cgroup"), *own_cgroups(scene)]
    return first_of(partial(_listed, folder) for folder in folders)


def _listed(folder: Path) -> str:
    if "cgroup.procs" not in os.listdir(folder):
        raise Missing("no cgroup")
    return f"lists {folder}"


@attack()
def see_the_cgroups_of_others(scene: Scene) -> str:
    """Who reads them sees what others use, and when."""
    processes = (Path(scene["victims_cgroup"]) / "cgroup.procs").read_text()
    return f"another job has the processes {processes.split()}"


@attack()
def have_a_program_run_at_a_release(scene: Scene) -> str:
    """release_agent of cgroup v1: the classic way from a container to the machine's root."""
    found = [*Path("/sys/fs/cgroup").glob("*/release_agent")]
    if not found:
        raise Missing("no cgroup v1")
    return first_of(partial(write_attempt, path) for path in found)


@attack()
def leave_its_cgroups_of_version_1(scene: Scene) -> str:
    found = [*Path("/sys/fs/cgroup").glob("*/tasks")]
    if not found:
        raise Missing("no cgroup v1")
    return first_of(partial(write_attempt, path) for path in found)


@attack(shown_as="user")
def know_its_place_in_the_tree(scene: Scene) -> str:
    """And so the server's, and how many jobs there were."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next(line for line in lines if line.startswith("0::"))
    if path == "0::/":
        raise PermissionError("it is the root of what it sees")
    return path
