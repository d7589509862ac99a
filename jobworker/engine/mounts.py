"""What is mounted on this machine: whether a look at one of its files may wait for another
machine, or for a process, and so for ever; and where the same files are in sight once more."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobworker.errors import StartupError, is_shortage

# Whose files are in memory, or on disks of this machine.
LOCAL = frozenset(
    {
        *("bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "iso9660", "overlay"),
        *("squashfs", "vfat", "xfs", "zfs", "devtmpfs", "ramfs", "rootfs", "tmpfs"),
    }
)
# The kernel's own, where no command is; systemd keeps an autofs in one of them.
KERNELS = ("/proc", "/sys", "/dev")
MOUNTINFO = "/proc/self/mountinfo"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo (man 5 proc)."""

    device: str  # major:minor; major 0 is no block device
    root: str  # what of the filesystem is mounted
    point: str
    filesystem: str
    source: str
    options: Mapping[str, str]  # of the filesystem; "" for those without a value


def read_mounts() -> dict[int, Mount]:
    """All that this process sees, by id."""
    return parse_mountinfo(os.fsdecode(Path(MOUNTINFO).read_bytes()))


def parse_mountinfo(text: str) -> dict[int, Mount]:
    """By id."""
    mounts = {}
    for line in text.split("\n")[:-1]:  # names of files may have what else ends a line
        before, _, after = line.partition(" - ")
        mount_id, _, device, root, point, *_ = before.split(" ")
        filesystem, source, options = after.split(" ", 2)
        mounts[int(mount_id)] = Mount(
            device,
            _unescape(root),
            _unescape(point),
            filesystem,
            _unescape(source),
            _parse_options(options),
        )
    return mounts


def _parse_options(text: str) -> dict[str, str]:
    options = {}
    for option in text.split(","):
        name, _, value = option.partition("=")
        options[name] = _unescape(value)
    return options


def _unescape(text: str) -> str:
    """The kernel writes spaces, commas and the like as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def mount_id_of(path: str, flags: int = 0) -> int:
    """Of the one in sight there, also where mounts cover each other, or folders above them. flags:
    of `open`. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    finally:
        os.close(descriptor)
    return int(info.partition("mnt_id:")[2].split()[0])


def mount_of(directory: str, mounts: Mapping[int, Mount]) -> Mount:
    """Raises OSError."""
    mount_id = mount_id_of(directory, os.O_DIRECTORY)
    if mount_id not in mounts:
        raise OSError(errno.ENODEV, "Its mount is out of sight, as in some chroots", directory)
    return mounts[mount_id]


class Mounts:
    """As this process sees them."""

    def __init__(self) -> None:
        self._file = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._changes = select.poll()
        # So the kernel tells of a change (man 5 proc); once it has been asked, of the next one.
        self._changes.register(self._file, select.POLLPRI)
        self._are_local = False
        self._is_known = False

    def are_local(self) -> bool:
        """All of them."""
        if self._changes.poll(0) or not self._is_known:
            self._are_local = all(map(_is_local, self._read().values()))
            self._is_known = True
        return self._are_local

    def close(self) -> None:
        os.close(self._file)

    def _read(self) -> dict[int, Mount]:
        os.lseek(self._file, 0, os.SEEK_SET)
        text = b""
        while piece := os.read(self._file, 64 << 10):
            text += piece
        return parse_mountinfo(os.fsdecode(text))


def _is_local(mount: Mount) -> bool:
    is_kernels = f"{mount.point}/".startswith(tuple(f"{top}/" for top in KERNELS))
    return is_kernels or mount.filesystem in LOCAL


def other_places(paths: Iterable[str]) -> set[str]:
    """Where else all of these is mounted, as by a bind of `/` or of /home in a folder for NFS; and
    each /proc that is not the usual one, as in a folder for chroot.

    The paths are without symbolic links. What is mounted somewhere else only in part is not meant:
    who did that meant it to be there. Raises StartupError where that cannot be told for now.
    """
    mounts = read_mounts()
    found = {
        each.point
        for each in mounts.values()
        if each.filesystem == "proc" and each.point != "/proc"
    }
    for path in paths:
        found.update(_other_places(path, mounts))
    return found


def _other_places(path: str, mounts: Mapping[int, Mount]) -> Iterator[str]:
    try:
        own = mounts[mount_id_of(path)]
    except OSError as error:  # not there
        if is_shortage(error):
            raise StartupError(f"{path} cannot be looked at: {error.strerror}") from error
        return
    except KeyError:  # in a chroot, where / need not be a mount
        return
    inside = own.root.rstrip("/") + (_below(path, own.point) or "")
    for each in mounts.values():
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
