"""Servers that are not root, in a cgroup that is theirs, as one of systemd's users has it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import jobworker
from functional.server import Server
from jobworker.engine.cgroup import Cgroup

USER = 4242  # has no name
GROUP = 4243  # that it is also in
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", f"--groups={USER},{GROUP}"]

# $0: a folder to mount things on for a moment; then one closed folder and what of it is needed, as
# `_closed` says, and after -- the command.
REACH = """
set -e
closed=$1; shift;
mkdir -p "$0/kept"
mount --rbind "$closed" "$0/kept"
mount -t tmpfs -o mode=755 tmpfs "$closed"
while [ "$1" != -- ]; do
    mkdir -p "$1"
    mount --bind "$0/kept${1#"$closed"}" "$1"
    shift
done
umount -l "$0/kept"
rmdir "$0/kept"
shift
exec "$@"
"""

StartServer = Callable[..., Server]


@contextlib.contextmanager
def servers(
    folder: Path, certificates: Path, launcher: Sequence[str] = ()
) -> Iterator[StartServer]:
    """Starts servers of that user, one after the other. folder: empty, and one that all may
    enter. launcher: what root does before, in mounts of its own. PROFILE="": no such setting."""
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    folder.chmod(0o755)
    shutil.copytree(certificates, folder / "certs")
    (folder / "home").mkdir(mode=0o700)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    running: list[Server] = []
    with delegated_cgroup() as cgroup:

        def start(**settings: Any) -> Server:
            join = ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(cgroup)]
            reach = ["unshare", "--mount", "--propagation=private"]
            for closed, needed in _closed().items():
                reach += ["sh", "-c", REACH, str(folder), closed, *needed, "--"]
            unset = ["--unset=JOB_WORKER_PROFILE"] if settings.get("PROFILE") == "" else []
            environ = ["env", *unset, f"HOME={folder / 'home'}"]
            command = [*join, *reach, *launcher, *AS_USER, *environ]
            settings = {"CGROUP_BASE": str(cgroup)} | settings
            running.append(Server(folder, folder / "certs", launcher=command, **settings))
            return running[-1]

        try:
            yield start
        finally:
            for server in running:
                server.stop()


@contextlib.contextmanager
def delegated_cgroup() -> Iterator[Path]:
    """As systemd makes one for a unit with Delegate=yes."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    root = next(point for _, point, filesystem, *_ in mounts if filesystem == "cgroup2")
    path = Path(root, f"jobworker-test-{secrets.token_hex(4)}")
    path.mkdir()
    try:
        for name in (".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
            os.chown(path / name, USER, USER)
        yield path
    finally:
        cgroup = Cgroup(path)
        cgroup.kill()
        cgroup.remove()


def _closed() -> dict[str, list[str]]:
    """The folders on the way to Python and jobworker that only root may enter, such as its home,
    and what of each the server needs."""
    needed_of: dict[str, list[str]] = {}
    for path in (sys.base_prefix, sys.prefix, str(Path(jobworker.__file__).parent)):
        for parent in reversed(Path(path).parents):
            if not parent.stat().st_mode & 0o001:
                needed_of.setdefault(str(parent), []).append(path)
                break
    return needed_of
