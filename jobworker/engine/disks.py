"""Which disks hold a job's files, as its limit on disk bandwidth is one for each; and what passed
through them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from jobworker.engine.mounts import Mount, mount_of, read_mounts
from jobworker.errors import CgroupError, ResourceExhaustedError, is_shortage

# Filesystems that are on no disk. Others without a block device are served by processes or
# machines for which the job's limit does not count.
DISKLESS = frozenset(
    {
        *("bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs"),
        *("fusectl", "hugetlbfs", "mqueue", "proc", "pstore", "ramfs", "rootfs", "securityfs"),
        *("sysfs", "tmpfs", "tracefs"),
    }
)
# The kernel stacks no more than two (FILESYSTEM_MAX_STACK_DEPTH).
MOST_OVERLAYS = 2


def disks_behind(directories: Iterable[str]) -> tuple[list[str], list[str]]:
    """The disks (major:minor, as io.max takes them) that hold these directories, each once;
    and why those of some directories cannot be limited. What is no directory has none.
    Raises ResourceExhaustedError where that cannot be told for now."""
    mounts = read_mounts()
    disks: list[str] = []
    problems: list[str] = []
    for directory in directories:
        try:
            mount = mount_of(directory, mounts)
            disks += map(_disk_of, _devices_of(mount, mounts))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (CgroupError, OSError) as error:
            if is_shortage(error):
                problem = f"the disk of {directory} cannot be told for now: {error}; try again"
                raise ResourceExhaustedError(problem) from error
            problems.append(str(error))
    return list(dict.fromkeys(disks)), list(dict.fromkeys(problems))


def _devices_of(mount: Mount, mounts: Mapping[int, Mount]) -> list[str]:
    """The block devices (major:minor) under a filesystem."""
    mount = _writable_layer(mount, mounts)
    if mount.filesystem in DISKLESS:
        return []
    if mount.filesystem == "btrfs":
        return _btrfs_devices(mount)
    # fuseblk has a block device, which not the job reads and writes, but its server.
    if mount.device.startswith("0:") or mount.filesystem.startswith("fuse"):
        raise CgroupError(
            f"{mount.point} is on {mount.filesystem} ({mount.source}), which is no disk of this "
            "machine's kernel"
        )
    return [mount.device]


def _writable_layer(mount: Mount, mounts: Mapping[int, Mount]) -> Mount:
    """Where what is written to an overlay goes; other filesystems as they are."""
    layer = mount
    for _ in range(MOST_OVERLAYS):
        if layer.filesystem != "overlay":
            return layer
        upper = layer.options.get("upperdir", "")
        try:
            layer = mount_of(upper, mounts)
        except OSError as error:
            if is_shortage(error):
                raise
            break
    # In a container the directory is often out of sight, or another of the same name is there.
    if layer.filesystem == "overlay":
        raise CgroupError(
            f"{mount.point} is an overlay whose writable layer cannot be seen from here "
            f"({mount.options.get('upperdir', 'it has none')})"
        )
    return layer


def _btrfs_devices(mount: Mount) -> list[str]:
    """The mount names one of its devices; sysfs has them all."""
    try:
        number = os.stat(mount.source).st_rdev
        one = f"{os.major(number)}:{os.minor(number)}"
        for filesystem in os.listdir("/sys/fs/btrfs"):
            folder = f"/sys/fs/btrfs/{filesystem}/devices"
            if not os.path.isdir(folder):  # as that of `features`
                continue
            devices = [_number_of(f"{folder}/{name}") for name in os.listdir(folder)]
            if one in devices:
                return devices
    except OSError as error:
        if is_shortage(error):
            raise
        problem = f"{error.filename}: {error.strerror}"
    else:
        problem = f"{mount.source} is not in /sys/fs/btrfs"
    raise CgroupError(f"the disks under {mount.point} (btrfs) cannot be told: {problem}")


def _disk_of(device: str) -> str:
    """A partition's disk, as limits are the whole disk's; other devices as they are: what
    device mapper or md put together is limited as one."""
    link = f"/sys/dev/block/{device}"
    if os.path.exists(f"{link}/partition"):
        return _number_of(f"{link}/..")
    return device


def _number_of(device: str) -> str:
    """By its folder in sysfs."""
    return Path(f"{device}/dev").read_text().strip()


def sum_io(text: str) -> tuple[int, int]:
    """Bytes read and written, from io.stat."""
    device = ""
    devices: set[str] = set()
    amounts: list[tuple[str, str, int]] = []
    for word in text.split():  # not by line: some kernels forget the end of one
        name, _, value = word.partition("=")
        if not value:
            device = name
        elif name in {"rbytes", "wbytes"}:
            devices.add(device)
            amounts.append((device, name, int(value)))
    # What passes through device mapper or md is counted there, and again below it.
    stacked = {device for device in devices if _is_stacked(device)} if len(devices) > 1 else ()
    read_bytes, written_bytes = (
        sum(size for device, name, size in amounts if name == wanted and device not in stacked)
        for wanted in ("rbytes", "wbytes")
    )
    return read_bytes, written_bytes


def _is_stacked(device: str) -> bool:
    """Whether it is made of other devices."""
    try:
        return bool(os.listdir(f"/sys/dev/block/{device}/slaves"))
    except OSError as error:
        if is_shortage(error):
            raise
        return False
