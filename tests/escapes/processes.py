"""The server, jobinit, and another job: seen, signalled, traced, slowed down."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from escapes.attack import (
    Scene,
    attack,
    checked,
    first_of,
    foreign_processes,
    libc,
    not_of_this_job,
    system_call,
)

TARGETS = ["server", "jobinit", "victim"]

Attempt = Callable[[int], str]


def against_each(attempt: Attempt) -> Attempt:
    """Of an attempt on one process: an attack on each of the targets, whose numbers are known
    to the attacker. The other job is of the same user: its uid alone does not save it."""
    for target in TARGETS:
        attack(
            name=f"{attempt.__name__.replace('_', ' ')} of {target}",
            shown_as="user" if target == "victim" else "root",
            changes_itself=attempt.__name__ == "trace",  # until it is let go
        )(_on(attempt, target))
    return attempt


def _on(attempt: Attempt, target: str) -> Callable[[Scene], str]:
    def attack_on(scene: Scene) -> str:
        return attempt(not_of_this_job(scene[target]))

    attack_on.__module__ = attempt.__module__
    return attack_on


@attack(shown_as="user")
def see_others(scene: Scene) -> str:
    for pid in foreign_processes():
        if pid != 1:  # of a namespace of the job's own, it is jobinit's: see below
            return f"sees {pid}"
    raise ProcessLookupError(errno.ESRCH, "none is seen")


@against_each
def kill(pid: int) -> str:
    os.kill(pid, 0)
    return f"may signal {pid}"


@attack()
def kill_process_1(scene: Scene) -> str:
    os.kill(1, 0)
    return "may signal process 1"


@against_each
def kill_the_group(pid: int) -> str:
    os.killpg(os.getpgid(pid), 0)
    return f"may signal the group of {pid}"


@against_each
def tkill(pid: int) -> str:
    system_call("tkill", 200, pid, 0)
    return f"may signal the thread {pid}"


@against_each
def queue_a_signal(pid: int) -> str:
    information = (ctypes.c_int * 32)(0, 0, -1)  # si_code: SI_QUEUE
    system_call("rt_sigqueueinfo", 129, pid, 0, information)
    return f"may queue a signal to {pid}"


@against_each
def signal_a_pidfd(pid: int) -> str:
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, 0)
    return f"may signal the pidfd of {pid}"


@against_each
def take_a_descriptor(pid: int) -> str:
    pidfd = os.pidfd_open(pid)
    os.close(system_call("pidfd_getfd", 438, pidfd, 2, 0))
    return f"has the standard error of {pid}"


PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17


@against_each
def trace(pid: int) -> str:
    """PTRACE_SEIZE does not stop it; with our end it is let go."""
    system_call("ptrace", 101, PTRACE_SEIZE, pid, 0, 0)
    return f"traces {pid}"


class Part(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@against_each
def read_the_memory(pid: int) -> str:
    return _copy_the_memory(pid, "process_vm_readv")


@against_each
def write_the_memory(pid: int) -> str:
    return _copy_the_memory(pid, "process_vm_writev")


def _copy_the_memory(pid: int, name: str) -> str:
    """At an address that is not mapped: that is looked at after the permission, and no byte is
    read or written."""
    room = ctypes.create_string_buffer(8)
    ours = Part(ctypes.cast(room, ctypes.c_void_p), 8)
    theirs = Part(ctypes.c_void_p(8), 8)
    call = getattr(libc, name)
    result = call(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    if result < 0 and ctypes.get_errno() == errno.EFAULT:
        return f"{name} may reach the memory of {pid}"
    return f"{name} of {checked(result, name)} bytes of {pid}"


@against_each
def open_the_memory(pid: int) -> str:
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))
    return f"opened /proc/{pid}/mem"


@against_each
def set_the_limits(pid: int) -> str:
    limits = resource.prlimit(pid, resource.RLIMIT_CORE)
    resource.prlimit(pid, resource.RLIMIT_CORE, limits)
    return f"may set the limits of {pid}"


@against_each
def set_the_priority(pid: int) -> str:
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))
    return f"may set the priority of {pid}"


@against_each
def bind_to_a_processor(pid: int) -> str:
    os.sched_setaffinity(pid, os.sched_getaffinity(pid))
    return f"may choose the processors of {pid}"


@against_each
def offer_to_the_oom_killer(pid: int) -> str:
    path = Path(f"/proc/{pid}/oom_score_adj")
    path.write_text(path.read_text())
    return f"may write {path}"


CLONE_PARENT = 0x8000


@attack(shown_as="user")
def have_children_of_its_parents(scene: Scene) -> str:
    """Of a job's main process that is jobinit: they would be cut off with no word at its end, and
    be dead by the thousand for jobinit to look at before it answers."""
    pid = system_call("clone", 56, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return "has a sibling"


CAP_SYS_RESOURCE = 24


@attack(needs=CAP_SYS_RESOURCE, changes_itself=True)
def lower_its_own_oom_score(scene: Scene) -> str:
    Path("/proc/self/oom_score_adj").write_text("-1000")
    return "is killed last of all"


@attack(changes_itself=True)
def run_before_all_others(scene: Scene) -> str:
    """By a real-time priority. It ends at once."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "has a real-time priority"


@attack(changes_itself=True)
def raise_its_own_priority(scene: Scene) -> str:
    os.setpriority(os.PRIO_PROCESS, 0, -5)
    return "comes before others"


@attack(needs=CAP_SYS_RESOURCE, changes_itself=True)
def raise_its_hard_limits(scene: Scene) -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_RTPRIO)
    more = 1 if hard == resource.RLIM_INFINITY else hard + 1
    system_call("prlimit64", 302, 0, resource.RLIMIT_RTPRIO, (ctypes.c_ulonglong * 2)(0, more), 0)
    return f"raised RLIMIT_RTPRIO from {hard}"


@attack(held_by=("none", "default", "strict"))
def use_inherited_descriptors(scene: Scene) -> str:
    """All but the standard ones, as it was when the job began."""
    others = {number: link for number, link in scene["descriptors"].items() if int(number) > 2}
    if others:
        return f"has {others}"
    raise OSError(errno.EBADF, "no others are open")


@attack(held_by=("none", "default", "strict"))
def find_the_servers_environment(scene: Scene) -> str:
    found = [name for name, value in os.environ.items() if value == scene["servers_secret"]]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "not in its environment")
    return f"found in {found}"


@attack(held_by=("none", "default", "strict"))
def open_the_servers_terminal(scene: Scene) -> str:
    """To push input into it with TIOCSTI: each job is a session of its own, without one."""
    os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    return "opened /dev/tty"


@attack(shown_as="user")
def open_the_terminal_of_another_job(scene: Scene) -> str:
    """Of the same user, which has opened a pseudo-terminal."""
    os.close(os.open(scene["victims_terminal"], os.O_RDWR | os.O_NOCTTY))
    return f"opened {scene['victims_terminal']}"


@attack(is_harmful=True)
def kill_for_real(scene: Scene) -> str:
    """From outside it is looked at whether they live."""
    return first_of(partial(_kill, scene[target]) for target in TARGETS)


def _kill(pid: int) -> str:
    os.kill(not_of_this_job(pid), signal.SIGKILL)
    return f"killed {pid}"
