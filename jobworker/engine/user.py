"""Whom a job runs as, and what that user may do with the files of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import pwd
from collections.abc import Iterator
from dataclasses import dataclass

# setgroups(2) for one thread alone: the C library's own sets it for all of them.
SETGROUPS = {"x86_64": 116, "aarch64": 159}.get(platform.machine())

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class User:
    """One user of this machine."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # all that it is in, the gid among them
    home: str  # may not exist


def find_user(name: str) -> User:
    """name: as in the machine's list of users, or a number, which need not be in it. Raises
    LookupError."""
    if name.isascii() and name.isdigit():
        return _user_of(int(name))
    try:
        return _known_user(pwd.getpwnam(name))
    except KeyError:
        _require_descriptor()
        raise


def own_user() -> User:
    """The one that this process runs as."""
    return _user_of(os.geteuid())


def _user_of(uid: int) -> User:
    try:
        return _known_user(pwd.getpwuid(uid))
    except (KeyError, OverflowError):
        if uid >= (1 << 32) - 1:
            raise LookupError(f"{uid} is no user's number") from None
        _require_descriptor()
        return User(str(uid), uid, uid, (uid,), "/")


def _require_descriptor() -> None:
    """Without, the C library knows nobody. Raises OSError."""
    os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))


def _known_user(entry: pwd.struct_passwd) -> User:
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)


@contextlib.contextmanager
def file_rights_of(user: User) -> Iterator[None]:
    """This thread sees files as the user would. To be used in a thread that does nothing else
    meanwhile, and only where this process is root or the user itself."""
    if user.uid == os.geteuid() or SETGROUPS is None:
        yield
        return
    own_groups = os.getgroups()
    _set_groups(user.groups)
    # With an fsuid that is not root's the kernel also takes from the thread what lets root
    # pass over permissions, and gives it back afterwards.
    libc.setfsgid(user.gid)
    libc.setfsuid(user.uid)
    try:
        yield
    finally:
        libc.setfsuid(os.geteuid())
        libc.setfsgid(os.getegid())
        _set_groups(own_groups)


def _set_groups(groups: tuple[int, ...] | list[int]) -> None:
    numbers = (ctypes.c_uint32 * len(groups))(*groups)
    if libc.syscall(SETGROUPS, len(groups), numbers) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setgroups: {os.strerror(number)}")
