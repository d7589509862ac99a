"""The kernel's settings, its devices, and calls that only the machine's master should make."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import signal
import socket
import stat
import struct
import tempfile
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from escapes.attack import (
    Missing,
    Scene,
    attack,
    checked,
    considered,
    first_of,
    libc,
    read_attempt,
    system_call,
    write_attempt,
)

SETTINGS = [
    *(f"/proc/sys/kernel/{name}" for name in ("core_pattern", "modprobe", "hotplug", "sysrq")),
    *(f"/proc/sys/kernel/{name}" for name in ("poweroff_cmd", "panic", "pid_max", "hostname")),
    *(f"/proc/sys/kernel/{name}" for name in ("dmesg_restrict", "kptr_restrict", "threads-max")),
    *(f"/proc/sys/kernel/{name}" for name in ("shmmax", "msgmax", "randomize_va_space")),
    *(f"/proc/sys/vm/{name}" for name in ("drop_caches", "overcommit_memory", "panic_on_oom")),
    *(f"/proc/sys/fs/{name}" for name in ("file-max", "suid_dumpable", "protected_symlinks")),
    *("/proc/sys/fs/binfmt_misc/register", "/proc/sys/fs/mqueue/msg_max"),
    *("/proc/sys/net/ipv4/ip_forward", "/proc/sys/vm/mmap_min_addr"),
    *("/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/mtrr", "/proc/acpi/wakeup"),
    *("/proc/sys/kernel/core_pipe_limit", "/proc/latency_stats", "/proc/scsi/scsi"),
    *("/sys/kernel/uevent_helper", "/sys/kernel/profiling", "/sys/power/state"),
    *("/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/debug/sched/features"),
    *("/sys/module/kernel/parameters/panic", "/sys/kernel/tracing/current_tracer"),
    *("/sys/devices/system/cpu/uevent", "/sys/class/net/lo/mtu", "/sys/class/net/lo/ifalias"),
    *("/sys/bus/pci/rescan", "/sys/firmware/efi/vars", "/sys/kernel/security/apparmor/.load"),
]
SECRETS = [
    *("/proc/kcore", "/proc/keys", "/proc/kmsg", "/proc/slabinfo", "/proc/vmallocinfo"),
    *("/proc/kpageflags", "/proc/timer_list", "/proc/sched_debug", "/dev/kmsg"),
    *("/sys/kernel/debug/tracing/trace", "/sys/firmware/acpi/tables/DSDT"),
]
# Those that may be read by all, but say what is none of a job's business.
PUBLIC_SECRETS = ["/proc/keys"]


def _of(attempt: Callable[[str], str], path: str) -> Callable[[Scene], str]:
    return lambda _: attempt(path)


for _path in SETTINGS:
    attack(name=f"set {_path}")(_of(write_attempt, _path))
for _path in SECRETS:
    _user = "user" if _path in PUBLIC_SECRETS else "root"
    attack(name=f"read {_path}", shown_as=_user)(_of(read_attempt, _path))


@attack()
def read_addresses_of_the_kernel(scene: Scene) -> str:
    with open("/proc/kallsyms", encoding="ascii") as symbols:
        address = symbols.readline().split()[0]
    if int(address, 16) == 0:
        raise PermissionError("all of them are 0")
    return f"the first is {address}"


@attack(shown_as="user")
def go_through_all_file_locks(scene: Scene) -> str:
    """Its own are there, of which it may have many. Nobody takes or releases one meanwhile."""
    with tempfile.TemporaryFile() as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        return read_attempt("/proc/locks")


@attack(is_harmful=True)
def write_core_pattern(scene: Scene) -> str:
    Path("/proc/sys/kernel/core_pattern").write_text("|/bin/false taken\n")
    return "all that crashes is given to a program of the job's"


@attack(is_harmful=True)
def switch_off_by_sysrq(scene: Scene) -> str:
    Path("/proc/sysrq-trigger").write_text("o")
    return "switched off the machine"


# Devices

HARMLESS = {
    *("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "mqueue"),
    *("fd", "stdin", "stdout", "stderr", ".hidden"),
}
# Opening others may itself do something, as of a watchdog.
DEVICES = [
    *("mem", "kmem", "port", "kmsg", "fuse", "kvm", "loop-control", "net/tun", "mapper/control"),
    *("btrfs-control", "autofs", "hwrng", "cpu/0/msr", "snapshot", "userfaultfd", "vhost-net"),
    *("vhost-vsock", "vsock", "uinput", "cpu_dma_latency", "console", "tty0", "tty1", "ttyS0"),
    *("hpet", "nvram", "vcs", "vga_arbiter", "uhid", "ubuntu_tpm", "tpm0", "random_seed", "rfkill"),
]


@attack()
def open_disks(scene: Scene) -> str:
    found = [path for path in Path("/dev").iterdir() if _is_block_device(path)]
    if not found:
        raise Missing("no block device is seen")
    return first_of(partial(_open_device, path) for path in found)


def _is_block_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def _open_device(path: Path) -> str:
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    return f"opened {path}"


@attack()
def open_devices(scene: Scene) -> str:
    return first_of(partial(_open_device, Path("/dev") / name) for name in DEVICES)


@attack(shown_as="user")
def see_devices(scene: Scene) -> str:
    others = set(os.listdir("/dev")) - HARMLESS
    if not others:
        raise PermissionError("only harmless ones are seen")
    return f"sees {sorted(others)[:5]}"


@attack()
def make_a_device(scene: Scene) -> str:
    """Of the disk that / is on, or any; removed at once."""
    with tempfile.TemporaryDirectory() as folder:
        os.mknod(f"{folder}/disk", stat.S_IFBLK | 0o600, os.makedev(*scene["disk"]))
        return "made a node for the disk"


# Calls

ADDRESS = 0  # where arguments make no sense


@attack()
def load_a_module(scene: Scene) -> str:
    return considered("init_module", 175, ADDRESS, 0, ADDRESS)


@attack()
def load_a_module_from_a_file(scene: Scene) -> str:
    return considered("finit_module", 313, -1, ADDRESS, 0)


@attack()
def remove_a_module(scene: Scene) -> str:
    return considered("delete_module", 176, ADDRESS, os.O_NONBLOCK)


@attack()
def boot_another_kernel(scene: Scene) -> str:
    return considered("kexec_load", 246, ADDRESS, 1 << 20, ADDRESS, 0)


@attack()
def reboot(scene: Scene) -> str:
    return considered("reboot", 169, 0, 0, 0, ADDRESS)


@attack()
def read_the_kernels_log(scene: Scene) -> str:
    room = ctypes.create_string_buffer(64)
    return f"syslog read {system_call('syslog', 103, 3, room, 64)} bytes"


@attack(shown_as="user")
def load_a_program_into_the_kernel(scene: Scene) -> str:
    return considered("bpf", 321, 5, ADDRESS, 1 << 20)


@attack()
def watch_the_kernel(scene: Scene) -> str:
    """perf_event_open of an event on all processes of one processor."""
    event = (ctypes.c_uint * 32)(1, 128)  # PERF_TYPE_SOFTWARE
    os.close(system_call("perf_event_open", 298, event, -1, 0, -1, 0))
    return "watches a processor"


@attack(shown_as="user")
def handle_page_faults(scene: Scene) -> str:
    os.close(system_call("userfaultfd", 323, 1))  # UFFD_USER_MODE_ONLY
    return "has a userfaultfd"


@attack(shown_as="user")
def use_io_uring(scene: Scene) -> str:
    os.close(system_call("io_uring_setup", 425, 1, ctypes.create_string_buffer(256)))
    return "has an io_uring"


@attack(shown_as="user")
def take_contexts_of_aio(scene: Scene) -> str:
    """Of which the whole machine has a certain number (fs.aio-max-nr)."""
    context = ctypes.c_ulong()
    system_call("io_setup", 206, 1, ctypes.byref(context))
    return "has one, and could have all"


@attack(shown_as="user")
def use_keyrings(scene: Scene) -> str:
    """KEYCTL_GET_KEYRING_ID of the user's keyring, that all jobs of a user would share."""
    return f"keyring {system_call('keyctl', 250, 0, -4, 1)}"


@attack(shown_as="user")
def add_a_key(scene: Scene) -> str:
    """To the keyring of this process alone, which ends."""
    number = system_call("add_key", 248, b"user", b"escape", b"x", 1, -2)
    return f"added key {number}"


@attack()
def swap_to_a_file(scene: Scene) -> str:
    return considered("swapon", 167, b"/nonexistent", 0)


@attack()
def account_to_a_file(scene: Scene) -> str:
    return considered("acct", 163, b"/nonexistent")


@attack()
def list_mounts(scene: Scene) -> str:
    """By a call that some kernels answer with the lock of all mounts held."""
    return considered("listmount", 458, ADDRESS, ADDRESS, 0, 0)


@attack()
def set_the_clock(scene: Scene) -> str:
    """By an offset that is none: microseconds below 0."""
    timex = (ctypes.c_long * 32)(0x0100)  # ADJ_SETOFFSET
    timex[10] = -1
    return considered("adjtimex", 159, timex)


@attack()
def rename_the_machine(scene: Scene) -> str:
    socket.sethostname(socket.gethostname())
    return "may rename it"


@attack(changes_itself=True)
def reach_ports_of_the_hardware(scene: Scene) -> str:
    system_call("iopl", 172, 3)
    return "may use all of them"


@attack()
def change_the_processors_tables(scene: Scene) -> str:
    """modify_ldt, where much of the kernel's trouble of old was."""
    return f"read {system_call('modify_ldt', 154, 0, ctypes.create_string_buffer(64), 64)} bytes"


@attack()
def watch_all_files(scene: Scene) -> str:
    os.close(system_call("fanotify_init", 300, 0x04, 0))  # FAN_CLASS_CONTENT
    return "has a fanotify of contents"


@attack(shown_as="user")
def keep_a_pipe_locked_by_splice(scene: Scene) -> str:
    return _keep_a_pipe_locked(lambda source, pipe: os.splice(source, pipe, 1))


@attack(shown_as="user")
def keep_a_pipe_locked_by_sendfile(scene: Scene) -> str:
    return _keep_a_pipe_locked(lambda source, pipe: os.sendfile(pipe, source, None, 1))


def _keep_a_pipe_locked(move: Callable[[int, int], int]) -> str:
    """While it waits for a socket that has nothing: who looks at the pipe's other end, as the
    server does at each job's output, waits as long, and cannot be killed."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    ours.send(b"x")
    move(theirs.fileno(), writing)
    for seconds in (1, 2, 4):  # on a busy machine it may not have the lock yet, or no longer
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
        holder = os.fork()
        if holder == 0:
            with suppress(OSError):
                move(theirs.fileno(), writing)
            os._exit(0)
        time.sleep(0.3)
        began = time.monotonic()
        fcntl.ioctl(reading, termios.FIONREAD, b"    ")
        waited = time.monotonic() - began
        os.waitpid(holder, 0)
        if waited >= 0.3:
            return f"who looked at it waited for {waited:.1f} s"
    raise PermissionError("nobody waits")


@attack(shown_as="user")
def have_others_wait_to_open_its_files(scene: Scene) -> str:
    """A lease: of the server's code, too, where that belongs to the job's user."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.touch()
        with path.open() as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    return "has a lease"


@attack(shown_as="user")
def have_others_signal_for_each_of_its_descriptors(scene: Scene) -> str:
    """Whoever reads in a folder, such as that of the libraries: for thousands, each time."""
    folder = os.open("/", os.O_RDONLY)
    try:
        fcntl.fcntl(folder, fcntl.F_NOTIFY, fcntl.DN_ACCESS | fcntl.DN_MULTISHOT)
    finally:
        os.close(folder)
    return "is told of it"


@attack(shown_as="user")
def have_others_signal_all_its_processes(scene: Scene) -> str:
    """Whoever reads its output, for each time that it has opened that."""
    for end in os.pipe():
        fcntl.fcntl(end, fcntl.F_SETOWN, -os.getpgrp())
        os.close(end)
    return "may have them signalled"


@attack(shown_as="user")
def have_others_wait_to_close_its_sockets(scene: Scene) -> str:
    """A thread of the kernel, where they are left in each other's queues: what is behind them, also
    of other jobs, stays as memory that no limit counts."""
    with socket.socket() as left:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        is_on, _ = struct.unpack("ii", left.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    if not is_on:
        raise OSError(errno.EPERM, "without effect")
    return "may have them wait"


@attack(shown_as="user")
def leave_connections_behind(scene: Scene) -> str:
    """For 24 days: with the memory of what they have not sent, their ports, and their network."""
    with socket.socket() as left:
        left.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (1 << 31) - 1)
        if not left.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT):
            raise OSError(errno.EPERM, "without effect")
    return "may leave them"


# No signal ends what these have begun, so that a job of many of them ends hours later. Here of one
# more than is let through, which is soon done.


@attack(shown_as="user")
def ask_for_what_is_in_memory_without_end(scene: Scene) -> str:
    """Of all addresses, into the same memory again and again."""
    size = (1 << 30) + 4096
    told = (ctypes.c_ubyte * (size >> 12))()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = ctypes.c_char.from_buffer(pages)
    checked(libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), told), "mincore")
    return "may ask of all it has, in one call"


@attack(shown_as="user")
def ask_where_pages_are_without_end(scene: Scene) -> str:
    count = (1 << 16) + 1
    system_call(
        "move_pages", 279, 0, count, (ctypes.c_void_p * count)(), 0, (ctypes.c_int * count)(), 0
    )
    return "may ask of any number"


@attack(shown_as="user")
def receive_without_end(scene: Scene) -> str:
    """Of a socket that has been shut down, each message is there at once."""
    count = 1025
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.close()
        messages = (ctypes.c_char * (64 * count))()
        checked(libc.recvmmsg(ours.fileno(), messages, count, 0, None), "recvmmsg")
    return "may receive any number"


@attack(shown_as="user")
def keep_a_processor_by_semaphores(scene: Scene) -> str:
    """Thousands wait with 500 operations each, and each lets only the one before it go on: the
    kernel goes through all of them for each, and nothing else runs there meanwhile."""
    operations = b"".join(struct.pack("<HhH", number, 1, 0) for number in range(9))
    semaphores = checked(libc.semget(0, 9, 0o600), "semget")
    try:
        checked(libc.semop(semaphores, operations, 9), "semop")
    finally:
        libc.semctl(semaphores, 0, 0)  # IPC_RMID
    return "may wait with any number of operations"


@attack(shown_as="user")
def keep_the_siblings_of_processors_idle(scene: Scene) -> str:
    """Who shares no core with others has the rest of it idle, which no limit on CPU counts."""
    sched_core, create = 62, 1
    try:
        checked(libc.prctl(sched_core, create, 0, 0, 0), "prctl(PR_SCHED_CORE)")
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENODEV}:
            raise
    return "may, where kernel and processor have such cores"


# mov eax, 20 (getpid); int 0x80; ret: as a 32-bit program would call.
OTHER_ENTRY = bytes.fromhex("b814000000cd80c3")


@attack(shown_as="user")
def call_as_a_32_bit_program(scene: Scene) -> str:
    """Its calls have other numbers, which a filter of the 64-bit ones would misread."""
    if platform.machine() != "x86_64":
        raise Missing("x86-64 only")
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(OTHER_ENTRY)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    pid = os.fork()
    if pid == 0:
        is_answered = ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid()
        os._exit(0 if is_answered else 1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS:
        raise PermissionError("killed by the filter")
    if status:
        raise Missing("this kernel has no 32-bit calls")
    return "was answered"


@attack(shown_as="user")
def call_by_the_numbers_of_x32(scene: Scene) -> str:
    try:
        return f"getpid is {system_call('getpid of x32', 0x40000000 | 39)}"
    except OSError as error:
        raise Missing("neither this kernel nor a filter knows them") from error


# Families that no network namespace separates, or that are of no use to a job.
FAMILIES = {"AF_VSOCK": 40, "AF_ALG": 38, "AF_KEY": 15, "AF_TIPC": 30, "AF_RDS": 21}


@attack(shown_as="user")
def make_sockets_of_other_families(scene: Scene) -> str:
    return first_of(partial(_make_socket, *family) for family in FAMILIES.items())


def _make_socket(name: str, family: int) -> str:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        try:
            socket.socket(family, kind, 0).close()
        except OSError:
            continue
        return f"has a socket of {name}"
    raise Missing("all are refused, or not in this kernel")


# At least one of them is in each kernel: that of raw packets, of eBPF, or of virtual machines.
PAIRS = FAMILIES | {"AF_PACKET": 17, "AF_XDP": 44}


@attack(shown_as="user")
def make_pairs_of_sockets_of_other_families(scene: Scene) -> str:
    """The kernel loads the family's module, and makes two, before it says that it pairs none."""
    return first_of(partial(_make_pair, *family) for family in PAIRS.items())


def _make_pair(name: str, family: int) -> str:
    try:
        system_call("socketpair", 53, family, socket.SOCK_STREAM, 0, (ctypes.c_int * 2)())
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise Missing("all are refused, or not in this kernel") from error
        return f"{name}: only the kind was refused: {error}"
    return f"has two sockets of {name}"


NETLINK_CONNECTOR, NETLINK_KOBJECT_UEVENT = 11, 15


@attack(shown_as="user")
def watch_the_machines_devices(scene: Scene) -> str:
    return _listen_to_netlink(NETLINK_KOBJECT_UEVENT)


@attack()
def watch_the_machines_processes(scene: Scene) -> str:
    """All that are made and that end, with their numbers: of some kernels as any user."""
    return _listen_to_netlink(NETLINK_CONNECTOR)


def _listen_to_netlink(protocol: int) -> str:
    try:
        ours = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, protocol)
    except OSError as error:
        raise Missing("refused, or not in this kernel") from error
    with ours:
        ours.bind((0, 1))
    return "is in the group that all of it is told to"


@attack(shown_as="user")
def make_sockets_of_other_protocols(scene: Scene) -> str:
    """One that each kernel has. Of those that it has not, it looks for a module."""
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2).close()
    return "has a netlink socket for whoever uses it"


@attack(shown_as="user")
def make_sockets_of_ping(scene: Scene) -> str:
    """The whole machine has 65,536 numbers for them. Who asks for one when none is left keeps a
    processor for seconds."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except PermissionError as error:
        raise Missing("net.ipv4.ping_group_range lets nobody") from error
    return "may take them all"


TIOCSETD = 0x5423


@attack(shown_as="user")
def choose_the_discipline_of_a_terminal(scene: Scene) -> str:
    """That is of its own. Of others than the usual one the kernel looks for modules."""
    _, terminal = os.openpty()
    fcntl.ioctl(terminal, TIOCSETD, struct.pack("i", 0))
    return "has the usual one, and may ask for others"


@attack()
def listen_to_the_wire(scene: Scene) -> str:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, struct.unpack("<H", b"\x00\x03")[0]).close()
    return "has a packet socket"


@attack()
def send_forged_packets(scene: Scene) -> str:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return "has a raw socket"
