"""The server's secrets and its own code, and the files that decide what the machine runs."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from escapes.attack import (
    Missing,
    Scene,
    attack,
    checked,
    create_attempt,
    first_of,
    foreign_processes,
    libc,
    read_attempt,
    write_attempt,
)

# Reading


def secrets(scene: Scene) -> list[str]:
    """The keys and the records, and what other jobs have written."""
    return [scene["key"], scene["ca_key"], scene["database"], scene["output"]]


@attack()
def read_by_path(scene: Scene) -> str:
    return first_of(partial(read_attempt, path) for path in secrets(scene))


@attack()
def list_the_servers_folders(scene: Scene) -> str:
    return first_of(partial(_listing, scene[name]) for name in ("state", "certs"))


@attack(shown_as="user")
def reach_the_servers_folders(scene: Scene) -> str:
    """Whoever may enter them: they are not what is at their places for a job."""
    for folder in (scene["state"], scene["certs"]):
        if os.stat(folder).st_ino in scene["inodes"]:
            return f"{folder} is the server's"
    raise FileNotFoundError("other folders are there")


def _listing(folder: str) -> str:
    return f"{folder} holds {os.listdir(folder)}"


@attack()
def read_through_other_roots(scene: Scene) -> str:
    """/proc/PID/root leads to what that process sees: the machine's own files."""
    roots = ["/proc/self/root/..", "/proc/self/cwd/../../../../..", "/proc/1/root"]
    roots += [f"/proc/{pid}/root" for pid in (scene["server"], scene["jobinit"])]
    return first_of(partial(read_attempt, root + path) for root in roots for path in secrets(scene))


@attack()
def read_through_open_descriptors(scene: Scene) -> str:
    """/proc/PID/fd and /proc/PID/cwd of the server, of jobinit, and of all that are seen."""
    return first_of(_open_descriptors([scene["server"], scene["jobinit"], *foreign_processes()]))


def _open_descriptors(pids: list[int]) -> Iterator[Callable[[], str]]:
    for pid in pids:
        yield partial(_listing, f"/proc/{pid}/fd/")
        yield partial(_listing, f"/proc/{pid}/cwd/")
        yield partial(_listing, f"/proc/{pid}/map_files/")


@attack()
def read_memory_and_environment(scene: Scene) -> str:
    pids = [scene["server"], scene["jobinit"], *foreign_processes()]
    names = ("environ", "mem", "maps", "auxv", "syscall")
    return first_of(partial(_opened, f"/proc/{pid}/{name}") for pid in pids for name in names)


def _opened(path: str) -> str:
    """The permission to read is checked here. Only the kernel's own threads have none of it."""
    with open(path, "rb", buffering=0) as file:
        if path.endswith("/mem"):
            return f"opened {path}"
        data = file.read(16)
    if not data:
        raise Missing(f"{path} is empty")
    return f"read {data!r} from {path}"


@attack()
def open_the_program_of_jobinit(scene: Scene) -> str:
    """/proc/PID/exe is the file itself, wherever it is: once open, it can be opened again to
    write it when it no longer runs (CVE-2019-5736)."""
    return first_of(partial(_opened, f"/proc/{pid}/exe") for pid in (scene["jobinit"], 1))


@attack(shown_as="user")
def read_the_environment_of_another_job(scene: Scene) -> str:
    """Of the same user, as by default all jobs are."""
    victim = scene["victim"]
    for pid in [victim, *foreign_processes()]:
        path = f"/proc/{pid}/environ"
        try:
            found = scene["secret"].encode() in Path(path).read_bytes()
        except OSError:
            continue
        if found:
            return f"read its secret from {path}"
    raise PermissionError("no environment with its secret")


@attack(shown_as="user")
def read_the_files_of_another_job(scene: Scene) -> str:
    """In /tmp, in shared memory, and through /proc/PID/root."""
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        for root in ("", f"/proc/{scene['victim']}/root"):
            path = Path(root + folder) / scene["left_by_victim"]
            try:
                return f"read {path.read_text()!r} from {path}"
            except OSError:
                continue
    raise FileNotFoundError("no file of the other job is seen")


@attack()
def read_through_a_symbolic_link(scene: Scene) -> str:
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(scene["key"], f"{folder}/link")
        return read_attempt(f"{folder}/link")


@attack()
def read_by_another_name(scene: Scene) -> str:
    """The folder that the server's own is in is bound: what is hidden there is not in it."""
    names = (os.path.relpath(path, scene["shared"]) for path in secrets(scene))
    return first_of(partial(read_attempt, f"{scene['bound']}/{name}") for name in names)


@attack()
def write_to_what_is_bound_read_only(scene: Scene) -> str:
    """It is a folder that all may write to."""
    return create_attempt(scene["fixed"])


@attack()
def read_through_a_hard_link(scene: Scene) -> str:
    with tempfile.TemporaryDirectory(dir=scene["shared"]) as folder:
        os.link(scene["key"], f"{folder}/link")
        return read_attempt(f"{folder}/link")


class FileHandle(ctypes.Structure):
    """struct file_handle, of open_by_handle_at(2)."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * 128),
    )


@attack()
def open_by_handle(scene: Scene) -> str:
    """By the number of its inode, whatever is mounted over the way to it."""
    return first_of(partial(_open_by_handle, path) for path in ("/", "/disk", "/dev/shm", "/tmp"))


def _open_by_handle(path: str) -> str:
    handle = FileHandle(handle_bytes=128)
    mount_id = ctypes.c_int()
    arguments = (path.encode(), ctypes.byref(handle), ctypes.byref(mount_id), 0)
    checked(libc.name_to_handle_at(-100, *arguments), f"name_to_handle_at {path}")
    anything_there = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    result = libc.open_by_handle_at(anything_there, ctypes.byref(handle), os.O_RDONLY)
    os.close(checked(result, f"open_by_handle_at {path}"))
    return f"opened {path} by its handle"


# Writing

FILES = [
    *("/etc/passwd", "/etc/shadow", "/etc/group", "/etc/sudoers", "/etc/ld.so.preload"),
    *("/etc/ld.so.cache", "/etc/crontab", "/etc/profile", "/etc/hosts", "/etc/resolv.conf"),
    *("/etc/environment", "/bin/sh", "/usr/bin/python3"),
]
FOLDERS = [
    *("/", "/etc", "/etc/cron.d", "/etc/cron.daily", "/var/spool/cron", "/var/spool/cron/crontabs"),
    *("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/etc/init.d"),
    *("/etc/ld.so.conf.d", "/etc/profile.d", "/etc/sudoers.d", "/etc/pam.d", "/etc/tmpfiles.d"),
    *("/etc/udev/rules.d", "/etc/modprobe.d", "/etc/apt/apt.conf.d", "/etc/logrotate.d"),
    *("/usr/bin", "/usr/lib", "/usr/local/bin", "/usr/local/lib", "/root", "/home", "/boot"),
    *("/run", "/var/log", "/var/lib", "/opt", "/srv", "/lib/modules", "/mnt"),
]
# What is the server's, by its name in the scene.
OWN_FILES = ["key", "database", "log", "source", "extension", "jobinit_program", "interpreter"]
OWN_FOLDERS = ["state", "certs", "package", "site_packages", "bin"]


def _of_the_scene(attempt: Callable[[str], str], name: str) -> Callable[[Scene], str]:
    return lambda scene: attempt(scene[name])


def _of_the_machine(attempt: Callable[[str], str], path: str) -> Callable[[Scene], str]:
    return lambda _: attempt(path)


for _path in FILES:
    attack(name=f"write {_path}")(_of_the_machine(write_attempt, _path))
for _path in FOLDERS:
    attack(name=f"create in {_path}")(_of_the_machine(create_attempt, _path))
for _name in OWN_FILES:
    attack(name=f"write the server's {_name}")(_of_the_scene(write_attempt, _name))
for _name in OWN_FOLDERS:
    attack(name=f"create in the server's {_name}")(_of_the_scene(create_attempt, _name))


@attack()
def write_through_a_symbolic_link(scene: Scene) -> str:
    with tempfile.TemporaryDirectory() as folder:
        os.symlink("/etc/passwd", f"{folder}/link")
        return write_attempt(f"{folder}/link")


@attack(held_by=("strict",), shown_as="user")
def write_anywhere_but_in_its_own_folders(scene: Scene) -> str:
    """A folder that all may write to, of the machine's own: strict has a read-only root."""
    return create_attempt(scene["writable"])
