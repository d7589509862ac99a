"""Another view of the machine: namespaces, mounts, roots."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from escapes.attack import (
    Scene,
    attack,
    checked,
    first_of,
    foreign_processes,
    libc,
    read_attempt,
    system_call,
)

NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
SIGCHLD = 17
MS_BIND, MS_REMOUNT, MS_REC, MS_PRIVATE = 4096, 32, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD = -100
CAP_SYS_RESOURCE = 24

# Where new namespaces are made by root, what is mounted is the attack's own; elsewhere all of
# these fail, or end with the job's view. The server itself is in a mount namespace of its own.


@contextmanager
def scratch() -> Iterator[str]:
    """A folder, in a mount namespace of the attack's own where it may have one."""
    with suppress(OSError):
        checked(libc.unshare(NAMESPACES["mount"]), "unshare")
        checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private")
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        libc.umount2(folder.encode(), MNT_DETACH)
        with suppress(OSError):
            os.rmdir(folder)


def _unshare(flag: int) -> Callable[[Scene], str]:
    def attempt(scene: Scene) -> str:
        checked(libc.unshare(flag), "unshare")
        return "is in a namespace of its own"

    return attempt


def _clone(flag: int) -> Callable[[Scene], str]:
    def attempt(scene: Scene) -> str:
        pid = system_call("clone", 56, flag | SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return "has a child in a namespace of its own"

    return attempt


for _name, _flag in NAMESPACES.items():
    # Anyone may make a user namespace, and is its root: the way to all the others.
    _user = "user" if _name == "user" else "root"
    attack(name=f"unshare {_name}", shown_as=_user)(_unshare(_flag))
    attack(name=f"clone {_name}", shown_as=_user)(_clone(_flag))


class CloneArguments(ctypes.Structure):
    """struct clone_args, of clone3(2)."""

    _fields_ = tuple(
        (name, ctypes.c_ulonglong)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size"),
            *("tls", "set_tid", "set_tid_size", "cgroup"),
        )
    )


@attack(shown_as="user")
def clone3_user(scene: Scene) -> str:
    """Its flags are in memory, where a filter cannot look."""
    arguments = CloneArguments(flags=NAMESPACES["user"], exit_signal=SIGCHLD)
    size = ctypes.sizeof(arguments)
    pid = system_call("clone3", 435, ctypes.byref(arguments), size)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "has a child in a user namespace"


@attack()
def clone3_into_another_cgroup(scene: Scene) -> str:
    cgroup = os.open(scene["victims_cgroup"], os.O_RDONLY | os.O_DIRECTORY)
    arguments = CloneArguments(flags=1 << 33, exit_signal=SIGCHLD, cgroup=cgroup)
    size = ctypes.sizeof(arguments)
    pid = system_call("clone3", 435, ctypes.byref(arguments), size)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "has a child in the cgroup of another job"


@attack(shown_as="user")
def become_root_of_a_user_namespace(scene: Scene) -> str:
    """And mount there, as the unprivileged do where they may."""
    identity = os.getuid()
    checked(libc.unshare(NAMESPACES["user"] | NAMESPACES["mount"]), "unshare")
    Path("/proc/self/uid_map").write_text(f"0 {identity} 1")
    checked(libc.mount(b"none", b"/mnt", b"tmpfs", 0, None), "mount")
    return "mounted as a root of its own"


def _joins(target: str, name: str) -> Callable[[Scene], str]:
    def attempt(scene: Scene) -> str:
        pid = scene.get(target, target)
        with open(f"/proc/{pid}/ns/{name}", "rb") as namespace:
            checked(libc.setns(namespace.fileno(), 0), "setns")
        return f"is in the {name} namespace of {target}"

    return attempt


for _target in ("1", "server", "victim"):
    for _name in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
        # Process 1 may have more capabilities than the root that the tests run as.
        _needs = CAP_SYS_RESOURCE if _target == "1" else -1
        attack(name=f"join {_name} of {_target}", needs=_needs)(_joins(_target, _name))


@attack(shown_as="user")
def see_the_mounts_of_others(scene: Scene) -> str:
    """Which paths the machine has, and of which other machines it mounts what."""
    return first_of(partial(read_attempt, f"/proc/{pid}/mountinfo") for pid in foreign_processes())


@attack()
def join_all_of_the_server_by_pidfd(scene: Scene) -> str:
    pidfd = os.pidfd_open(scene["server"])
    checked(libc.setns(pidfd, NAMESPACES["uts"] | NAMESPACES["ipc"]), "setns")
    return "is in the server's namespaces"


@attack()
def mount_memory(scene: Scene) -> str:
    with scratch() as folder:
        checked(libc.mount(b"none", folder.encode(), b"tmpfs", 0, None), "mount")
        return "mounted a tmpfs"


@attack()
def mount_proc(scene: Scene) -> str:
    with scratch() as folder:
        checked(libc.mount(b"proc", folder.encode(), b"proc", 0, None), "mount")
        return "mounted a proc without what is masked"


@attack()
def mount_cgroups(scene: Scene) -> str:
    with scratch() as folder:
        checked(libc.mount(b"none", folder.encode(), b"cgroup2", 0, None), "mount")
        return "mounted the tree of cgroups"


@attack()
def mount_a_disk(scene: Scene) -> str:
    with scratch() as folder:
        node = f"{folder}/disk"
        os.mknod(node, 0o60600, os.makedev(*scene["disk"]))
        try:
            # As it is mounted elsewhere, it is the same filesystem once more.
            checked(libc.mount(node.encode(), folder.encode(), b"ext4", 0, None), "mount")
        finally:
            libc.umount2(folder.encode(), MNT_DETACH)
            os.unlink(node)
        return "mounted the disk"


@attack()
def bind_the_root_elsewhere(scene: Scene) -> str:
    with scratch() as folder:
        checked(libc.mount(b"/", folder.encode(), None, MS_BIND, None), "bind")
        return "has / without what is mounted over it"


@attack()
def make_writable_again(scene: Scene) -> str:
    """Each mount that is read-only, or else /proc: to what it is."""
    points = [line.split()[4] for line in _mounts() if "ro" in line.split()[5].split(",")]
    with scratch():
        return first_of(partial(_remount, point) for point in [*points, "/proc"])


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def _remount(point: str) -> str:
    flags = MS_BIND | MS_REMOUNT
    checked(libc.mount(b"none", point.encode(), None, flags, None), f"remount {point}")
    return f"remounted {point}"


@attack()
def unmount_what_is_in_the_way(scene: Scene) -> str:
    """Whatever can be unmounted: below it is the machine's own."""
    with scratch():
        points = [line.split()[4] for line in reversed(_mounts())]
        return first_of(partial(_unmount, point) for point in points if point != "/")


def _unmount(point: str) -> str:
    checked(libc.umount2(point.encode(), MNT_DETACH), f"umount {point}")
    return f"unmounted {point}"


@attack()
def make_a_filesystem_by_the_new_calls(scene: Scene) -> str:
    context = system_call("fsopen", 430, b"tmpfs", 0)
    system_call("fsconfig", 431, context, 6, 0, 0, 0)  # FSCONFIG_CMD_CREATE
    os.close(system_call("fsmount", 432, context, 0, 0))
    return "has a mount of its own"


@attack()
def clone_the_tree_of_mounts(scene: Scene) -> str:
    os.close(system_call("open_tree", 428, AT_FDCWD, b"/", 1))  # OPEN_TREE_CLONE
    return "has a copy of the root"


@attack()
def change_a_mount_by_the_new_call(scene: Scene) -> str:
    with scratch():
        attributes = (ctypes.c_ulonglong * 4)(0, 1, 0, 0)  # clear MOUNT_ATTR_RDONLY
        system_call("mount_setattr", 442, AT_FDCWD, b"/proc", 0, attributes, 32)
        return "may make mounts writable"


@attack()
def pivot_root(scene: Scene) -> str:
    with scratch() as folder:
        root, above = folder.encode(), os.open(os.path.dirname(folder), os.O_RDONLY)
        checked(libc.mount(b"none", root, b"tmpfs", 0, None), "mount")
        system_call("pivot_root", 155, root, root)
        # It is no mount point any more, and its path no longer leads there.
        os.rmdir(os.path.basename(folder), dir_fd=above)
        return "has another root"


@attack()
def chroot_and_out_of_it(scene: Scene) -> str:
    """The classic: with a descriptor outside, a chroot inside, and `..` for long enough."""
    outside = os.open("/", os.O_RDONLY)
    with tempfile.TemporaryDirectory() as folder:
        os.chroot(folder)
        os.fchdir(outside)
        for _ in range(64):
            os.chdir("..")
        os.chroot(".")
        return f"sees {len(os.listdir('/'))} names in the root of all"
