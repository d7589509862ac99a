"""User Mode Linux: a kernel of its own for the tests of cgroups, as an ordinary process.

Many machines, and most containers, have a cgroup v2 without controllers. Debian's package
user-mode-linux is a Linux with all of them, which boots within seconds from the machine's own
root filesystem. Nothing that is done in it reaches the machine's files: it runs in a mount
namespace in which all of them are read-only, mounts them read-only once more, and guest.py
then puts an overlay over them.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jobworker

# What it takes, and what single tests in it take, which are skipped without.
NEEDED = {"linux.uml": "user-mode-linux", "mkfs.ext4": "e2fsprogs"}
WELCOME = {"dmsetup": "dmsetup", "mkfs.btrfs": "btrfs-progs"}
MEMORY = "2G"
DISK_BYTES = 256 << 20
INSTALL_SECONDS = 120
GUEST = Path(__file__).with_name("guest.py")
REGISTERS = Path(__file__).with_name("registers.c")

# Run in namespaces of its own. $1: the one folder that stays writable, for the disks and for
# the memory, which is a file. The rest: the kernel's command line.
ENTER = r"""
set -e
folder=$1; shift
mount --make-rprivate /
mount --bind "$folder" "$folder"
mount -t tmpfs -o mode=0700 tmpfs "$folder/memory"
while read -r _ _ _ _ point _; do
    point=$(printf %b "$point")
    case $point in
    "$folder" | "$folder"/* | /proc) ;;
    # The first is the one that counts; others may be out of reach below a later mount.
    /) mount -o remount,bind,ro / ;;
    *) mount -o remount,bind,ro "$point" 2>/dev/null || : ;;
    esac
done </proc/self/mountinfo
export TMPDIR="$folder/memory" HOME="$folder/memory"
# Not exec: as PID 1, a kernel that has panicked could not abort, and would hang.
LD_PRELOAD="$folder/registers.so" linux.uml "$@"
exit $?
"""


def why_not() -> str:
    """Why no such kernel can be booted here; empty where it can. Installs it where it may."""
    if os.getuid() != 0:
        return "only root can protect the machine's files from it with a mount namespace"
    namespaces = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if namespaces.returncode:
        return f"no namespace to protect the machine's files: {namespaces.stderr.strip()}"
    if not _missing(NEEDED):
        return ""
    if not shutil.which("apt-get"):
        return f"no {' and no '.join(_missing(NEEDED))} here, and no apt-get to install it"
    return _install(list(_missing(NEEDED | WELCOME).values()))


def _missing(programs: dict[str, str]) -> dict[str, str]:
    return {name: package for name, package in programs.items() if not _find(name)}


def _find(program: str) -> str | None:
    # mkfs and the like are not in every user's PATH.
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _install(packages: list[str]) -> str:
    """Why it cannot be done; empty where it was."""
    install = ["install", "--yes", "--no-install-recommends", *packages]
    deadline = time.monotonic() + INSTALL_SECONDS
    if not _apt_get(install, deadline):
        return ""
    # A fresh system has no list of packages, or an old one.
    return _apt_get(["update"], deadline) or _apt_get(install, deadline)


def _apt_get(arguments: list[str], deadline: float) -> str:
    """Why it failed; empty where it did not."""
    command = " ".join(["apt-get", *arguments])
    try:
        done = subprocess.run(
            ["apt-get", *arguments],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, deadline - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        return f"`{command}` was not done within {INSTALL_SECONDS} s"
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"`{command}` failed: {last}"


class Kernel:
    """One boot, from the first line of its console to the last report of its pytest."""

    def __init__(self, folder: Path, root: Path, pytest_arguments: list[str]) -> None:
        """folder: for its disks, an empty one; root: where pytest runs in it."""
        self._console_path = folder / "console"
        _make_disks(folder)
        library = folder / "registers.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, REGISTERS], check=True)
        init = _write_init(folder, root, pytest_arguments)
        (folder / "memory").mkdir()
        self._reports_fd, guest_fd = os.pipe()
        with self._console_path.open("wb") as console:
            self._process = subprocess.Popen(
                # With a PID namespace nothing of it outlives it, in whatever way it ends.
                [
                    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("sh", "-c", ENTER, "sh", str(folder)),
                    *_command_line(folder, init, guest_fd),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=[guest_fd],
                start_new_session=True,
            )
        os.close(guest_fd)

    def reports(self, deadline: float) -> Iterator[bytes]:
        """Line by line, as they come, until it has ended. Raises TimeoutError at the deadline
        (on the monotonic clock)."""
        data = b""
        while True:
            *lines, data = data.split(b"\n")
            yield from lines
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._reports_fd], [], [], left)[0]:
                raise TimeoutError
            received = os.read(self._reports_fd, 64 << 10)
            if not received:
                return
            data += received

    def console(self) -> str:
        return self._console_path.read_text(errors="replace")

    def end(self) -> None:
        """At once, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reports_fd)


def _command_line(folder: Path, init: Path, reports_fd: int) -> list[str]:
    return [
        f"mem={MEMORY}",
        *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet"),
        f"init={init}",
        f"uml_dir={folder / 'memory'}",
        f"ubd0={folder / 'disk0'}",
        f"ubd1={folder / 'disk1'}",
        # The console is our standard output, the next terminal our pipe, all others nothing.
        *("con=null", "con0=null,fd:1", f"con1=null,fd:{reports_fd}"),
    ]


def _write_init(folder: Path, root: Path, pytest_arguments: list[str]) -> Path:
    """A script, as the kernel's command line is short and knows no quotes."""
    # The jobworker that is tested inside is the one that would be tested outside.
    environment = f"PYTHONPATH={Path(jobworker.__path__[0]).parent}"
    # unshare and the like must be found, whatever the kernel's own PATH is.
    path = f"PATH={os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
    command = ["env", path, environment, "LANG=C.UTF-8", sys.executable, str(GUEST), str(root)]
    init = folder / "init"
    init.write_text(f"#!/bin/sh\nexec {shlex.join([*command, *pytest_arguments])}\n")
    init.chmod(0o700)
    return init


def _make_disks(folder: Path) -> None:
    """The first has a filesystem, the second one partition, from 1 MiB to its end."""
    for name in ("disk0", "disk1"):
        with (folder / name).open("wb") as image:
            image.truncate(DISK_BYTES)
    mkfs = _find("mkfs.ext4")
    assert mkfs
    subprocess.run([mkfs, "-q", folder / "disk0"], check=True, capture_output=True)
    first, count = 2048, DISK_BYTES // 512 - 2048
    linux = 0x83
    entry = struct.pack("<B3sB3sII", 0, b"", linux, b"", first, count)
    with (folder / "disk1").open("r+b") as image:
        image.seek(446)
        image.write(entry)
        image.seek(510)
        image.write(b"\x55\xaa")
