"""The first process of the User Mode Linux that uml.py boots: makes a machine of it, runs pytest
in it, and switches it off.

It gets the host's root filesystem, read-only, and puts an overlay over it that lives in its own
memory: whatever is written, nothing of it reaches the host. It calls the kernel itself, as the
host may lack the programs, and starting one takes long here.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct
import sys
import traceback
import tty
from pathlib import Path

MODULES = Path("/usr/lib/uml/modules")
# Opened by the host on a pipe: what it writes there, the host reads.
REPORTS = "/dev/tty1"
DISK = "/disk"
LAYERS = "/dev/overlay"

MNT_DETACH = 2
SYS_PIVOT_ROOT = 155
SYS_FINIT_MODULE = 313
RB_POWER_OFF = 0x4321FEDC
SIOCSIFFLAGS = 0x8914

libc = ctypes.CDLL(None, use_errno=True)


def main(folder: str, pytest_arguments: list[str]) -> None:
    """folder: where pytest runs."""
    try:
        make_machine()
        os.chdir(folder)
        run_pytest(pytest_arguments)
    except BaseException:  # noqa: BLE001 the first process must not end: the kernel would panic
        traceback.print_exc()
    switch_off()


def make_machine() -> None:
    enter_overlay()
    load_module("kernel/drivers/block/loop.ko")
    load_module("kernel/drivers/md/dm-mod.ko")
    os.mkdir(DISK)
    mount("/dev/ubda", DISK, "ext4")
    bring_loopback_up()
    socket.sethostname("kernel")


def run_pytest(arguments: list[str]) -> None:
    with open(REPORTS, "wb", buffering=0) as reports:
        tty.setraw(reports.fileno())
    environ = os.environ | {"JOBWORKER_KERNEL_REPORTS": REPORTS, "HOME": "/root"}
    command = [sys.executable, "-m", "pytest", *arguments]
    pytest = os.posix_spawn(sys.executable, command, environ)
    # All that loses its parent becomes the first process's own to reap.
    while os.wait()[0] != pytest:
        pass


def enter_overlay() -> None:
    """Its layers are in /dev, which is in memory, can be written at once, and is mounted again
    in the overlay: so one can see from there where what is written goes."""
    for name in ("upper", "work", "root"):
        os.makedirs(f"{LAYERS}/{name}")
    load_module("kernel/fs/overlayfs/overlay.ko")
    layers = f"lowerdir=/,upperdir={LAYERS}/upper,workdir={LAYERS}/work"
    mount("overlay", f"{LAYERS}/root", "overlay", layers)
    os.chdir(f"{LAYERS}/root")
    for folder in ("proc", "sys", "dev", "run"):
        os.makedirs(folder, exist_ok=True)
    mount("proc", "proc", "proc")
    mount("sysfs", "sys", "sysfs")
    mount("cgroup2", "sys/fs/cgroup", "cgroup2")
    mount("devtmpfs", "dev", "devtmpfs")
    os.makedirs("dev/pts", exist_ok=True)
    os.makedirs("dev/shm", exist_ok=True)
    mount("devpts", "dev/pts", "devpts", "ptmxmode=0666")
    mount("tmpfs", "dev/shm", "tmpfs")
    mount("tmpfs", "run", "tmpfs")
    # Not chroot: in one, the kernel refuses user namespaces.
    call("pivot_root", libc.syscall(SYS_PIVOT_ROOT, b".", b"."))
    call("umount", libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def load_module(path: str) -> None:
    with open(MODULES / platform.release() / path, "rb") as module:
        call(f"load {path}", libc.syscall(SYS_FINIT_MODULE, module.fileno(), b"", 0))


def mount(source: str, target: str, filesystem: str, options: str = "") -> None:
    result = libc.mount(source.encode(), target.encode(), filesystem.encode(), 0, options.encode())
    call(f"mount {target}", result)


def bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up_and_running = struct.pack("16sh", b"lo", 0x1 | 0x40)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, up_and_running)


def call(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def switch_off() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    libc.sync()
    libc.reboot(RB_POWER_OFF)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
