"""Jobs that do not end well: they fork, hold on to, flood and leave behind what they can.

Each says "ready" once it has done so. What stays until it is stopped pauses then.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from escapes.attack import libc

DAEMONS = 10
ZOMBIES = 100
SIGNALS = 2000
MANY = 10_000  # more than most kinds have, and soon done

BURDENS: dict[str, Callable[[], None]] = {}


def burden(function: Callable[[], None]) -> Callable[[], None]:
    BURDENS[function.__name__.replace("_", " ")] = function
    return function


def ready() -> None:
    os.write(1, b"ready\n")


def stay() -> None:
    ready()
    while True:
        signal.pause()


def ignore_all_signals() -> None:
    for number in range(1, signal.NSIG):
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)


def until_refused(attempt: Callable[[int], object]) -> int:
    """How often it was not, at most MANY times."""
    for count in range(MANY):
        try:
            attempt(count)
        except OSError:
            return count
    return MANY


# Processes


@burden
def daemons() -> None:
    """Double-forked, in sessions of their own, without its descriptors: it ends, they do not."""
    for _ in range(DAEMONS):
        if os.fork() == 0:
            become_a_daemon()
    for _ in range(DAEMONS):
        os.wait()
    ready()


def become_a_daemon() -> None:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    ignore_all_signals()
    for descriptor in range(3):
        os.close(descriptor)
    while True:
        time.sleep(60)


@burden
def daemons_that_hold_its_output() -> None:
    for _ in range(DAEMONS):
        if os.fork() == 0:
            os.setsid()
            ignore_all_signals()
            while True:
                time.sleep(60)
    ready()


@burden
def deaf_to_signals_and_stopped() -> None:
    """Stopped as a group, with all others ignored."""
    ignore_all_signals()
    for _ in range(DAEMONS):
        if os.fork() == 0:
            while True:
                time.sleep(60)
    ready()
    os.kill(0, signal.SIGSTOP)
    stay()


@burden
def zombies() -> None:
    """Children that nobody waits for, and orphans that process 1 is to wait for."""
    for _ in range(ZOMBIES):
        if os.fork() == 0:
            os._exit(0)
    for _ in range(ZOMBIES // 10):
        if os.fork() == 0:
            for _ in range(10):
                if os.fork() == 0:
                    os._exit(3)
            os._exit(0)
    ready()


@burden
def forks_without_end() -> None:
    """A chain in which each child outlives its parent by one more fork, for two seconds."""
    ready()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if os.fork():
            os._exit(0)
        os.setsid()
    while True:
        time.sleep(60)


@burden
def child_in_vfork() -> None:
    """The kernel holds a parent until its vforked child execs, which it never does."""
    ignore_all_signals()
    if libc.vfork() == 0:
        stay()


@burden
def exec_from_a_thread() -> None:
    """The kernel ends all other threads, and the process goes on as another program."""
    program = ["/bin/sh", "-c", "echo ready; exit 5"]
    thread = threading.Thread(target=lambda: os.execv(program[0], program))
    thread.start()
    signal.pause()


@burden
def misleading_name() -> None:
    """As /proc/PID/stat has it in brackets, among fields that are parsed."""
    set_name = 15
    _checked(libc.prctl(set_name, b") Z 1 1 ("))
    if os.fork() == 0:
        stay()
    ready()


# Signals


@burden
def signals_to_itself() -> None:
    """From many sides at once: plain ones, and queued ones until no more fit."""
    ignore_all_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMAX])
    signal.signal(signal.SIGRTMAX, signal.SIG_DFL)
    parent = os.getpid()
    for _ in range(4):
        if os.fork() == 0:
            for number in itertools.islice(itertools.cycle((10, 12, 17, 18, 20, 28)), SIGNALS):
                os.kill(parent, number)
            os._exit(0)
    for _ in range(MANY):
        try:
            os.kill(parent, signal.SIGRTMAX)
        except OSError:
            break
    ready()


@burden
def signals_upwards() -> None:
    """To its parent, to process 1 and to all at once. Signal 0 does nothing, and is judged as
    any other: what happens to those that do something is for a kernel of its own."""
    numbers = [0] if "HARMLESS" in os.environ else range(signal.NSIG - 1, -1, -1)
    ready()
    if os.fork() == 0:  # outlives the rest of the job, where that ends by it
        ignore_all_signals()
    for number in numbers:
        for pid in (os.getppid(), 1, -1, *range(2, 200)):
            if number not in {signal.SIGKILL, signal.SIGSTOP} or pid != os.getpid():
                with suppress(OSError):
                    os.kill(pid, number)


# Output and input


@burden
def output_closed() -> None:
    """It goes on without: that is not its end."""
    ready()
    os.close(1)
    os.close(2)
    time.sleep(0.3)
    os._exit(7)


@burden
def output_that_it_takes_back() -> None:
    """Its own pipe, opened for reading: it competes with the server for what it writes."""
    descriptor = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
    os.write(1, b"x" * 4096)
    with suppress(BlockingIOError):
        os.read(descriptor, 4096)
    with suppress(OSError):
        fcntl.fcntl(1, 1031, 1)  # F_SETPIPE_SZ: as small as can be
    fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK)
    while True:
        with suppress(BlockingIOError):
            stay()


@burden
def output_that_fills() -> None:
    """More than any pipe holds, then silence, with all ends open."""
    os.write(1, b"x" * (1 << 20))
    os.write(1, b"\n")
    stay()


# What there is a limited number of


@burden
def descriptors() -> None:
    """All that it may have, and as many again on their way between sockets."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    file = os.open("/dev/null", os.O_RDONLY)
    with suppress(OSError):
        for _ in range(100):
            socket.send_fds(ours, [b"x"], [file] * 200)
    until_refused(lambda _: os.dup(file))
    ready()
    signal.pause()
    del theirs


@burden
def timers_and_watches() -> None:
    """As many as the user may have of each."""
    identity = ctypes.byref(ctypes.c_int())
    until_refused(lambda _: _checked(libc.inotify_init1(0)))
    until_refused(lambda _: _checked(libc.timer_create(1, None, identity)))
    until_refused(lambda _: _checked(libc.timerfd_create(1, 0)))
    stay()


@burden
def terminals() -> None:
    until_refused(lambda _: os.openpty())
    stay()


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@burden
def names_left_behind() -> None:
    """Shared memory, semaphores, queues and files, all of them for everybody."""
    key, mark = int(os.environ["SHM_KEY"]), os.environ["MARK"]
    libc.shmget(key, 1 << 20, 0o1666)
    libc.semget(key, 10, 0o1666)
    libc.msgget(key, 0o1666)
    libc.mq_open(f"/{mark}".encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
    for folder in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock"):
        with suppress(OSError):
            Path(folder, mark).write_text("left behind")
            Path(folder, mark).chmod(0o2777)
    ready()


# For a kernel of its own: these take the machine with them where they are not held


@burden
def fork_bomb() -> None:
    ready()
    while True:
        with suppress(OSError):
            os.fork()


@burden
def memory_bomb() -> None:
    ready()
    blocks = []
    while True:
        blocks.append(bytearray(1 << 20))
        blocks[-1][::4096] = b"x" * 256


def fill(folder: str) -> None:
    """With files, until it is full. Says how many MiB fitted."""
    block = bytes(1 << 20)
    with open(f"{folder}/filled", "wb", buffering=0) as file:
        for count in range(1 << 20):
            try:
                file.write(block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                os.write(1, f"full at {count} MiB\n".encode())
                return


@burden
def tmp_filled() -> None:
    fill("/tmp")


@burden
def shared_memory_filled() -> None:
    fill("/dev/shm")


@burden
def inodes_used_up() -> None:
    """In each place that it may write to."""
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/dev"):
        count = 0
        with suppress(OSError):
            for count in itertools.count():
                # With names that differ: some of these are the same filesystem.
                path = f"{folder}/{count}-of-{os.path.basename(folder)}"
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.write(1, f"{folder} holds {count}\n".encode())


@burden
def pipes_filled() -> None:
    """Memory of the kernel, which counts as the job's."""
    for _ in range(MANY):
        try:
            _, ours = os.pipe2(os.O_NONBLOCK)
        except OSError:
            break
        with suppress(OSError):
            fcntl.fcntl(ours, 1031, 1 << 20)
        with suppress(BlockingIOError):
            while True:
                os.write(ours, bytes(1 << 16))


def main(name: str) -> None:
    BURDENS[name]()
    sys.stdout.flush()
