"""The attacks of tests/escapes in a kernel that may be harmed, which has all cgroup controllers:
also those that harm, and bombs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from escapes.stage import (
    AREA_NAMES,
    SETTINGS,
    Stage,
    carry,
    got_through,
    may_be_arranged,
    not_shown,
    public_folder,
    wait_until,
)
from jobworker.engine.isolation import Profile
from jobworker.pb import job_worker_pb2 as pb
from kernel.inside.conftest import serving

CONFINING = [profile for profile in Profile if profile is not Profile.NONE]
MEMORY_MIB = 60
PIDS = 60
TMP_MIB = 16
TMP_FILES = 2000


@pytest.fixture(scope="module")
def stage(certificates: Path) -> Iterator[Stage]:
    limits: dict[str, Any] = {
        "DEFAULT_MEMORY": str(MEMORY_MIB),
        "DEFAULT_PIDS": str(PIDS),
        "TMP_SIZE": f"{TMP_MIB}MiB",
        "TMP_FILES": str(TMP_FILES),
    }
    Path("/proc/sys/net/ipv4/ping_group_range").write_text(f"0 {(1 << 31) - 1}")  # as systemd does
    with (
        public_folder() as folder,
        serving(folder, certificates, **SETTINGS, **limits, **may_be_arranged(folder)) as server,
        server.connect() as client,
    ):
        stage = Stage(server, client, folder, is_own_kernel=True)
        with stage.set_up():
            yield stage


@pytest.mark.parametrize("area", AREA_NAMES)
@pytest.mark.parametrize("profile", CONFINING)
def test_it_holds(stage: Stage, profile: str, area: str) -> None:
    found = got_through(stage, area, profile)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("area", AREA_NAMES)
@pytest.mark.parametrize("profile", CONFINING)
def test_it_holds_in_a_root_of_its_own(stage: Stage, profile: str, area: str) -> None:
    """With binds of the system, and of the folder that the server's own is in."""
    found = got_through(stage, area, profile, is_arranged=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("area", AREA_NAMES)
def test_these_attacks_work_where_nothing_defends(stage: Stage, area: str) -> None:
    found = not_shown(stage, area)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("profile", CONFINING)
def test_a_fork_bomb(stage: Stage, profile: str) -> None:
    with stage.leaving_nothing() as mark:
        job = carry(stage, "fork bomb", mark, profile, is_stopped=True, maxCPU=50)
    assert job.status == "STOPPED"


@pytest.mark.parametrize("profile", CONFINING)
def test_a_memory_bomb(stage: Stage, profile: str) -> None:
    with stage.leaving_nothing() as mark:
        job = carry(stage, "memory bomb", mark, profile, is_stopped=False)
    assert job.cause == pb.OUT_OF_MEMORY
    assert job.signal == signal.SIGKILL


@pytest.mark.parametrize("profile", CONFINING)
@pytest.mark.parametrize("name", ["tmp filled", "shared memory filled", "inodes used up"])
def test_its_own_filesystems_have_bounds(stage: Stage, profile: str, name: str) -> None:
    with stage.leaving_nothing() as mark:
        job = carry(stage, name, mark, profile, is_stopped=False, is_ready=False)
    assert job.status == "COMPLETED"
    numbers = [int(word) for word in stage.client.output(job.id).split() if word.isdigit()]
    assert 0 < sum(numbers) <= (TMP_FILES if name == "inodes used up" else TMP_MIB)


@pytest.mark.parametrize("profile", CONFINING)
def test_full_pipes(stage: Stage, profile: str) -> None:
    """Bounded by what the kernel lets a user have of them, or by the job's memory."""
    with stage.leaving_nothing() as mark:
        job = carry(stage, "pipes filled", mark, profile, is_stopped=False, is_ready=False)
    assert job.status == "COMPLETED" or job.cause == pb.OUT_OF_MEMORY


# Each end waits in the other's queue, with memory that both were given.
SOCKETS_THAT_HOLD_EACH_OTHER = """
import os, socket
kept = os.memfd_create("kept")
for _ in range(20):
    os.write(kept, bytes(1 << 20))
ends = socket.socketpair()
for end in ends:
    socket.send_fds(end, [b"x"], [kept, *(each.fileno() for each in ends)])
"""


@pytest.mark.parametrize("profile", CONFINING)
def test_nothing_is_left_in_sockets_that_hold_each_other(stage: Stage, profile: str) -> None:
    """The kernel lets go of them only when somebody closes a socket, as nobody here does."""
    before = shared_memory_kib()
    job = stage.client.create("python3", "-I", "-c", SOCKETS_THAT_HOLD_EACH_OTHER, profile=profile)
    assert stage.client.wait(job.id).status == "COMPLETED"
    wait_until(lambda: shared_memory_kib() < before + (10 << 10))


def shared_memory_kib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


@pytest.mark.parametrize("profile", CONFINING)
def test_signals_upwards(stage: Stage, profile: str) -> None:
    """For real, SIGKILL and SIGSTOP among them: the server and jobinit go on."""
    with stage.leaving_nothing() as mark:
        carry(stage, "signals upwards", mark, profile, is_stopped=False, is_harmless=False)
    state = stage.state(stage.server.process.pid)
    assert {value for name, value in state.items() if name.endswith("stopped")} == {False}


@pytest.mark.parametrize("profile", CONFINING)
def test_a_crash_is_no_matter_of_the_machines(stage: Stage, profile: str, tmp_path: Path) -> None:
    """What the machine has for cores is a program of root's, outside of any job. It is told of
    the last, which nothing confines: so it would have been of those before."""
    handler, pattern = tmp_path / "handler", Path("/proc/sys/kernel/core_pattern")
    handler.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/told\n")
    handler.chmod(0o755)
    before = pattern.read_text()
    pattern.write_text(f"|{handler} %e")
    crashes = {"first": "", "second": "ulimit -c unlimited;", "third": "ulimit -S -c 0;"}
    try:
        for name, limit in {**crashes, "last": "ulimit -c unlimited;"}.items():
            script = f"{limit} ln -s /bin/sh /tmp/{name}; exec /tmp/{name} -c 'kill -SEGV $$'"
            job, _ = stage.client.run(script, profile=profile if name in crashes else "none")
            assert job.signal == signal.SIGSEGV
        told = tmp_path / "told"
        wait_until(lambda: told.exists() and "last" in told.read_text())
    finally:
        pattern.write_text(before)
        Path("/tmp/last").unlink(missing_ok=True)
    assert told.read_text() == "last\n"


CRASH = """
import os, resource
limit = resource.getrlimit(resource.RLIMIT_CORE)
os.chdir("/tmp")
for new in (limit[1], 0):
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (new, limit[1]))
        try:  # which also wants to know the old one
            resource.prlimit(0, resource.RLIMIT_CORE, (new, limit[1]))
        except PermissionError:
            pass
        else:
            os._exit(1)
        assert resource.prlimit(0, resource.RLIMIT_CORE) == limit
        os.abort()
    status = os.wait()[1]
    print(os.WTERMSIG(status), os.WCOREDUMP(status), os.listdir())
"""


@pytest.mark.parametrize("profile", CONFINING)
def test_no_crash_is_written_anywhere(stage: Stage, profile: str) -> None:
    """This kernel looks at all addresses that are reserved then, and lets no signal through
    meanwhile: with 400 GiB of them and no memory, a job ended 5 s after it had been killed."""
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    pattern.write_text("core")
    try:
        job = stage.client.create("python3", "-I", "-c", CRASH, profile=profile)
        assert stage.client.output(job.id) == b"6 False []\n6 False []\n"
    finally:
        pattern.write_text(before)


# Of each family that a job may have, kinds and protocols that are there, and that are not. And
# ioctls: of bridges, of VLANs, and one for what a terminal does with its lines.
ASKING = """
import ctypes, os, socket
libc = ctypes.CDLL(None)
for family in (1, 2, 10, 16):
    for kind in (1, 2, 3, 4, 5, 6, 10):
        for protocol in (0, 1, 4, 9, 11, 17, 25, 58, 132, 136):
            libc.socket(family, kind, protocol)
            libc.socketpair(family, kind, protocol, (ctypes.c_int * 2)())
inet = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in (0x8940, 0x8941, 0x89A0, 0x89A1, 0x89A2, 0x89A3, 0x8982, 0x8983):
    libc.ioctl(inet.fileno(), ctypes.c_ulong(number), ctypes.create_string_buffer(256))
libc.ioctl(os.openpty()[1], ctypes.c_ulong(0x5423), ctypes.byref(ctypes.c_int(13)))
print("tried")
"""
UNKNOWN = "import ctypes; ctypes.CDLL(None).socket(2, 1, 132); print('tried')"


@pytest.mark.parametrize("profile", CONFINING)
def test_nothing_has_the_kernel_look_for_modules(stage: Stage, profile: str) -> None:
    """It would by a program of root's, outside of any job."""
    with public_folder() as folder, modules_looked_for(folder) as told:
        for script, asking in ((ASKING, profile), (UNKNOWN, "none")):
            job = stage.client.create("python3", "-I", "-c", script, profile=asking)
            assert stage.client.output(job.id) == b"tried\n"
        # Each call returned after that.
        assert told.read_text().split() == ["net-pf-2-proto-132-type-1", "net-pf-2-proto-132"]


@contextlib.contextmanager
def modules_looked_for(folder: Path) -> Iterator[Path]:
    """Their names, in a file that comes with the first."""
    told, program = folder / "told", folder / "modprobe"
    program.write_text(f'#!/bin/sh\nfor name; do :; done; echo "$name" >> {told}\n')
    program.chmod(0o755)
    setting = Path("/proc/sys/kernel/modprobe")
    before = setting.read_text()
    setting.write_text(str(program))
    try:
        yield told
    finally:
        setting.write_text(before)
