"""More rights than a job has: by calls, by programs that give them, by other users."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from pathlib import Path

from escapes.attack import Scene, attack, checked, libc


@attack()
def become_root(scene: Scene) -> str:
    os.setresuid(0, 0, 0)
    return "is root"


@attack()
def enter_roots_group(scene: Scene) -> str:
    os.setresgid(0, 0, 0)
    return "is in root's group"


@attack()
def leave_or_enter_groups(scene: Scene) -> str:
    os.setgroups([0])
    return "chose its groups"


@attack()
def see_files_as_root(scene: Scene) -> str:
    libc.setfsuid(0)
    if libc.setfsuid(-1) != 0:
        raise PermissionError("setfsuid did nothing")
    return "sees files as root"


@attack()
def own_a_file_as_another(scene: Scene) -> str:
    fd = os.memfd_create("file")
    os.fchown(fd, 1, 1)
    return "gave a file to another user"


CAP_SYS_ADMIN = 1 << 21


@attack()
def have_capabilities(scene: Scene) -> str:
    status = Path("/proc/self/status").read_text()
    sets = [line for line in status.splitlines() if line.startswith("Cap")]
    having = [line for line in sets if int(line.split()[1], 16)]
    if not having:
        raise PermissionError("all sets are empty")
    return f"has {having[0]}"


@attack()
def take_capabilities(scene: Scene) -> str:
    header = struct.pack("<II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    low = struct.pack("<III", CAP_SYS_ADMIN, CAP_SYS_ADMIN, 0)
    checked(libc.capset(header, low + bytes(12)), "capset")
    return "has CAP_SYS_ADMIN"


@attack()
def let_programs_inherit_capabilities(scene: Scene) -> str:
    """The ambient set, which execs do not take away."""
    take_capabilities_to_inherit()
    raise_ambient, cap_sys_admin = 2, 21
    result = libc.prctl(47, raise_ambient, ctypes.c_ulong(cap_sys_admin), 0, 0)
    checked(result, "prctl(PR_CAP_AMBIENT)")
    return "what it starts has CAP_SYS_ADMIN"


def take_capabilities_to_inherit() -> None:
    header = struct.pack("<II", 0x20080522, 0)
    low = struct.pack("<III", CAP_SYS_ADMIN, CAP_SYS_ADMIN, CAP_SYS_ADMIN)
    checked(libc.capset(header, low + bytes(12)), "capset")


def _output_of(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=5,
    )
    return done.stdout + done.stderr


@attack(shown_as="user")
def run_a_setuid_program(scene: Scene) -> str:
    """A copy of id(1) that is root's and setuid."""
    return _unless_refused("euid=0", scene["setuid_program"])


@attack(shown_as="user")
def run_a_setgid_program(scene: Scene) -> str:
    return _unless_refused("egid=0", scene["setgid_program"])


def _unless_refused(expected: str, *command: str) -> str:
    said = _output_of(*command)
    if expected not in said:
        raise PermissionError(f"{command[0]}: {said.strip()}")
    return said.strip()


@attack(shown_as="user")
def run_a_program_with_capabilities(scene: Scene) -> str:
    """A copy of cat(1) that may read all files."""
    return _unless_refused("root:", scene["privileged_program"], "/etc/shadow")


@attack()
def forget_that_privileges_are_given_up(scene: Scene) -> str:
    """no_new_privs can be set, and never cleared."""
    if libc.prctl(39, 0, 0, 0, 0) == 1:  # PR_GET_NO_NEW_PRIVS
        checked(libc.prctl(38, 0, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    return "programs may give it rights"


@attack(shown_as="user")
def filter_the_calls_of_a_setuid_program(scene: Scene) -> str:
    """Without no_new_privs the kernel refuses a filter; with it, one can only add to it."""
    if libc.prctl(21, 0, 0, 0, 0) == 2:  # PR_GET_SECCOMP
        raise PermissionError("is filtered itself, for ever")
    return "is not filtered"
