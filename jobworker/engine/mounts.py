"""What is mounted on this machine: whether a look at one of its files may wait for another
machine, or for a process, and so for ever."""

from __future__ import annotations

import os
import select

# Whose files are in memory, or on disks of this machine.
LOCAL = frozenset(
    {
        *("bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "iso9660", "overlay"),
        *("squashfs", "vfat", "xfs", "zfs", "devtmpfs", "ramfs", "rootfs", "tmpfs"),
    }
)
# The kernel's own, where no command is; systemd keeps an autofs in one of them.
KERNELS = ("/proc", "/sys", "/dev")


class Mounts:
    """As this process sees them."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._changes = select.poll()
        # So the kernel tells of a change (man 5 proc); once it has been asked, of the next one.
        self._changes.register(self._file, select.POLLPRI)
        self._are_local = False
        self._is_known = False

    def are_local(self) -> bool:
        """All of them."""
        if self._changes.poll(0) or not self._is_known:
            self._are_local = all(map(_is_local, self._lines()))
            self._is_known = True
        return self._are_local

    def close(self) -> None:
        os.close(self._file)

    def _lines(self) -> list[str]:
        os.lseek(self._file, 0, os.SEEK_SET)
        text = b""
        while piece := os.read(self._file, 64 << 10):
            text += piece
        return os.fsdecode(text).splitlines()


def _is_local(line: str) -> bool:
    """line: of mountinfo."""
    before, _, after = line.partition(" - ")
    point, filesystem = before.split(" ")[4], after.split(" ")[0]
    return filesystem in LOCAL or f"{point}/".startswith(tuple(f"{top}/" for top in KERNELS))
