"""What is mounted on this machine: whether a look at one of its files may wait for another
machine, or for a process, and so for ever; and where the same files are in sight once more."""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

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


def other_places(paths: Iterable[str]) -> set[str]:
    """Where else all of these is mounted, as by a bind of `/` or of /home in a folder for NFS; and
    each /proc that is not the usual one, as in a folder for chroot.

    The paths are without symbolic links. What is mounted somewhere else only in part is not meant:
    who did that meant it to be there.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = list(map(_mount, file))
    found = {each.point for each in mounts if each.filesystem == "proc" and each.point != "/proc"}
    for path in paths:
        found.update(_other_places(path, mounts))
    return found


@dataclass(frozen=True, slots=True)
class _Mount:
    device: str
    root: str  # what of its filesystem is mounted
    point: str
    filesystem: str


def _mount(line: str) -> _Mount:
    before, _, after = line.partition(" - ")
    _, _, device, root, point, *_ = before.split(" ")
    return _Mount(device, _unescaped(root), _unescaped(point), after.split(" ")[0])


def _unescaped(text: str) -> str:
    """As in proc_pid_mountinfo(5): \\040 is a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _other_places(path: str, mounts: list[_Mount]) -> Iterator[str]:
    # The last one at a point is in sight.
    above = (each for each in reversed(mounts) if _below(path, each.point) is not None)
    own = max(above, key=lambda each: len(each.point), default=None)
    if own is None:  # in a chroot, where / need not be a mount
        return
    inside = own.root.rstrip("/") + (_below(path, own.point) or "")
    for each in mounts:
        rest = _below(inside, each.root) if each.device == own.device else None
        if rest is not None and (place := each.point.rstrip("/") + rest or "/") != path:
            # Something else may be mounted over it.
            with contextlib.suppress(OSError):
                if Path(place).samefile(path):
                    yield place


def _below(path: str, folder: str) -> str | None:
    """What of a path comes below a folder: empty, or beginning with a slash. None: nothing."""
    folder = folder.rstrip("/")
    return path[len(folder) :].rstrip("/") if f"{path}/".startswith(f"{folder}/") else None
