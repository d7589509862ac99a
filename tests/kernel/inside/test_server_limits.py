"""Limits and accounting through the whole server, over TLS: of one that is root and has all
cgroups, and of one that is an ordinary user and has a delegated one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cli.program import Program
from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb
from kernel.inside.conftest import (
    DISK,
    ROOT,
    USER,
    delegated_directory,
    mounted,
    refusal,
    serving,
    wait_until,
)

MIB = 1 << 20
DEFAULT_MEMORY_MIB = 100
PIDS = 30

DATA = DISK / "read and written by jobs"
# Direct I/O: through the page cache, a limit shows only later.
READ = ["iflag=direct", f"if={DATA}", "of=/dev/null"]
WRITE = ["oflag=direct", "conv=notrunc", "if=/dev/zero", f"of={DATA}"]
OTHER_DISK = ["iflag=direct", "if=/dev/ubdb", "of=/dev/null"]

MANY_PROCESSES = """
import os, signal
for _ in range(200):
    if os.fork() == 0:
        signal.pause()
print("ready", flush=True)
signal.pause()
"""

FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except BlockingIOError:
        pass
"""

# For x86-64, as the kernel is. man 5 elf: one segment, loaded at 4 MiB, with all of the file.
LARGE_PROGRAM = (
    b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    + struct.pack("<IIQQQQQQ", 1, 7, 0, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4096)
    + bytes.fromhex(
        "bf 00104000"  # mov edi, 0x401000
        "c607 01"  # next: mov byte [rdi], 1
        "81c7 00100000"  # add edi, 0x1000
        "81ff 00008000"  # cmp edi, 0x800000
        "75 ef"  # jne next
        "31ff b8 3c000000 0f05"  # exit(0)
    )
)


@pytest.fixture(scope="module", params=["root", "user"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Path
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    settings: dict[str, Any] = {
        "DEFAULT_MEMORY": str(DEFAULT_MEMORY_MIB),
        "DEFAULT_PIDS": str(PIDS),
        "LINGER": "100ms",
    }
    with contextlib.ExitStack() as stack:
        if request.param == "root":
            server = stack.enter_context(serving(folder, certificates, **settings))
        else:
            base = stack.enter_context(delegated_directory(USER))
            settings["CGROUP_BASE"] = str(base)
            server = stack.enter_context(serving(folder, certificates, base, USER, **settings))
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.connect() as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def data() -> None:
    DATA.write_bytes(bytes(4 * MIB))
    DATA.chmod(0o666)
    Path("/dev/ubdb").chmod(0o666)


def python(script: str) -> list[str]:
    return [sys.executable, "-S", "-c", script]


def run(client: Client, command: list[str], **fields: Any) -> pb.Job:
    return client.wait(client.create(*command, **fields).id)


def cgroup_of(client: Client, job: pb.Job) -> Path:
    return Path(client.info().cgroup) / f"job-{job.id}"


def test_every_limit_can_be_enforced(client: Client) -> None:
    info = client.info()
    assert {each.name for each in info.controllers if each.available} == {
        *("cpu", "memory", "io", "pids")
    }
    assert info.default_pids == PIDS


def test_the_memory_limit_kills_and_is_named(client: Client) -> None:
    job = run(client, python("bytearray(200 << 20)"), maxMemory=50)

    assert (job.status, job.cause, job.exitCode) == ("FAILED", pb.OUT_OF_MEMORY, -1)
    assert job.detail == "out of memory: its limit of 50 MiB was reached"
    assert job.accounting.oom_kills
    assert 45 * MIB < job.accounting.memory_peak_bytes <= 50 * MIB


def test_on_the_command_line(server: Server) -> None:
    program = Program(
        server.state.parent,
        JOB_WORKER_SERVER=server.address,
        JOB_WORKER_CERT_PATH=str(server.certs),
    )
    done = program("run", "--max-memory=50", *python("bytearray(200 << 20)"))

    assert done.returncode == 128 + signal.SIGKILL
    assert "its limit of 50 MiB was reached" in done.stderr
    assert f"{PIDS} processes" in program("info").stdout


def test_the_default_memory_limit_kills(client: Client) -> None:
    job = run(client, python("bytearray(200 << 20)"))

    assert (job.cause, job.maxMemory) == (pb.OUT_OF_MEMORY, DEFAULT_MEMORY_MIB)
    assert job.detail == f"out of memory: its limit of {DEFAULT_MEMORY_MIB} MiB was reached"


@pytest.fixture
def above(client: Client) -> Iterator[Path]:
    """The memory limit of all jobs together, which an administrator may set."""
    path = Path(client.info().cgroup) / "memory.max"
    yield path
    path.write_text("max")


def test_a_limit_that_is_not_the_jobs_own_is_not_named_as_its_own(
    client: Client, above: Path
) -> None:
    above.write_text(str(30 * MIB))
    job = run(client, python("bytearray(60 << 20)"), maxMemory=90)

    assert (job.status, job.cause) == ("FAILED", pb.OUT_OF_MEMORY)
    assert job.detail.startswith("out of memory: not by its own limit")


def test_memory_that_does_not_even_allow_the_exec(client: Client, above: Path) -> None:
    """Killed between fork and exec, the job never ran, and that is what its record says."""
    used = int(above.with_name("memory.current").read_text())
    above.write_text(str(used + (256 << 10)))
    # Copying the arguments is what the memory does not suffice for. Where anything else of an
    # exec runs out of it, this kernel panics.
    job = run(client, ["true", *["x" * 100_000] * 4])

    assert (job.status, job.cause, job.failed_step) == ("FAILED", pb.START_FAILED, "exec")
    assert job.startTime == ""
    assert "killed before the command ran, by signal 9; out of memory" in job.detail


@pytest.fixture
def large_program() -> Iterator[Path]:
    """It first of all writes to each page of its data, all of 4 MiB, and then ends well. Large
    programs do the like when they are linked at their start; but in those, this kernel could
    run out of memory where that makes it panic."""
    path = DISK / "large program"
    path.write_bytes(LARGE_PROGRAM)
    os.truncate(path, 4 * MIB)
    path.chmod(0o755)
    yield path
    path.unlink()


def test_a_memory_limit_below_what_the_start_needs_is_named(
    client: Client, large_program: Path
) -> None:
    job = run(client, [str(large_program)], maxMemory=1)

    assert (job.status, job.cause) == ("FAILED", pb.OUT_OF_MEMORY)
    assert job.detail == "out of memory: its limit of 1 MiB was reached"
    assert run(client, [str(large_program)], maxMemory=16).status == "COMPLETED"


def test_the_cpu_limit_holds(client: Client) -> None:
    job = client.shell("while :; do :; done", maxCPU=50)
    usage = cgroup_of(client, job) / "cpu.stat"
    wait_until(lambda: cpu_seconds(usage) > 0.2)  # it has started
    begun, before = time.monotonic(), cpu_seconds(usage)
    wait_until(lambda: cpu_seconds(usage) > before + 1.5)
    share = (cpu_seconds(usage) - before) / (time.monotonic() - begun)
    client.stop(job.id, grace_milliseconds=0)

    assert share == pytest.approx(0.5, rel=0.15)


def cpu_seconds(path: Path) -> float:
    return int(path.read_text().split()[1]) / 1e6


@pytest.mark.parametrize("direction", [READ, WRITE], ids=["read", "write"])
def test_the_io_limit_holds(client: Client, direction: list[str]) -> None:
    dd = ["dd", "bs=64k", "count=32", *direction]

    assert 1.7 < seconds_of(run(client, dd, maxIOBPS=MIB, working_directory=str(DISK))) < 8
    assert seconds_of(run(client, dd, working_directory=str(DISK))) < 1.6


def test_the_io_limit_is_of_the_disk_that_the_job_is_on(client: Client) -> None:
    dd = ["dd", "bs=64k", "count=32", *OTHER_DISK]

    assert seconds_of(run(client, dd, maxIOBPS=MIB, working_directory=str(DISK))) < 1.6


def test_who_waits_for_a_disk_at_its_limit_can_be_ended(client: Client) -> None:
    """A request of 4 MiB at 20 kB/s, through which the kernel lets no signal."""
    dd = ["bs=4M", "count=1", "oflag=direct", "conv=notrunc", "if=/dev/zero", f"of={DATA}"]
    fields = {"maxIOBPS": 20_000, "working_directory": str(DISK)}
    stopped = client.create("dd", *dd, **fields)
    late = client.create("dd", *dd, timeout_milliseconds=500, **fields)
    time.sleep(1)
    assert client.stop(stopped.id, grace_milliseconds=0).status == "STOPPED"
    ended = client.wait(late.id)
    assert ended.cause == pb.TIMED_OUT
    assert (ended.end_time_ns - ended.start_time_ns) / 1e9 < 20


def test_who_waits_for_a_disk_while_it_starts_can_be_ended(
    tmp_path: Path, certificates: Path
) -> None:
    """At 20 bytes a second, what the exec has to know of the interpreter's folder takes minutes,
    and the kernel lets no signal through meanwhile."""
    folder, partition = Path("/mnt"), "/dev/ubdb1"
    command, interpreter = folder / "command", folder / "a" / "b" / "c" / "interpreter"
    subprocess.run(["mkfs.ext4", "-q", "-F", partition], check=True)
    with mounted(partition, folder):
        interpreter.parent.mkdir(parents=True)
        shutil.copy("/bin/true", interpreter)
        command.write_text(f"#!{interpreter}\n")
        command.chmod(0o755)
    with (
        mounted(partition, folder),  # anew, and so nothing of it is in memory
        serving(tmp_path, certificates) as server,
        server.connect() as client,
    ):
        command.read_bytes()  # that, the kernel would give up at a signal
        created = client.create_soon(str(command), maxIOBPS=20, working_directory=str(folder))
        wait_until(lambda: any(map(waits_for_a_disk, Path(client.info().cgroup).glob("job-*"))))
        [job] = client.jobs()
        assert job.status == "INITIALIZING"
        assert client.stop(job.id, grace_milliseconds=0).status == "STOPPED"
        assert created.result().status == "STOPPED"


def waits_for_a_disk(cgroup: Path) -> bool:
    """Its one process."""
    with contextlib.suppress(OSError, ValueError):
        [pid] = (cgroup / "cgroup.procs").read_text().split()
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
    return False


LEAVE_WRITES = """
import ctypes, os
BEGIN_TO_WRITE = 2  # SYNC_FILE_RANGE_WRITE
file = os.open("left", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
for _ in range(4):
    place = ctypes.c_long(os.lseek(file, 0, os.SEEK_CUR))
    size = ctypes.c_long(os.write(file, bytes(1 << 20)))
    ctypes.CDLL(None).sync_file_range(file, place, size, BEGIN_TO_WRITE)
"""


def test_nobody_waits_for_what_an_ended_job_has_left_to_be_written(client: Client) -> None:
    """4 MiB at 150 kB/s, with which the kernel goes on after the cgroup is removed."""
    folder = Path(tempfile.mkdtemp(dir=DISK))
    folder.chmod(0o777)
    job = run(client, python(LEAVE_WRITES), maxIOBPS=150_000, working_directory=str(folder))
    assert seconds_of(job) < 8
    before = time.monotonic()
    sync = ["dd", "if=/dev/zero", f"of={DATA}", "count=1", "conv=notrunc,fsync"]
    subprocess.run(sync, check=True, capture_output=True)
    assert time.monotonic() - before < 8


def test_a_stop_that_is_accepted_while_a_limited_job_ends_is_its_cause(client: Client) -> None:
    """Its disk is let go of by threads, which have many cgroups to go through here."""
    folder = Path(tempfile.mkdtemp(dir=DISK))
    folder.chmod(0o777)
    fifo = folder / "end"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    others = [client.create("sleep", "1000") for _ in range(6)]
    for job in others:
        for number in range(200):
            (cgroup_of(client, job) / str(number)).mkdir()
    limits = {"maxIOBPS": MIB, "working_directory": str(folder)}
    limited = [client.shell("echo ready; read _ <end; exit 0", **limits) for _ in range(6)]
    for job in limited:
        next(client.stream(job.id))
    time.sleep(0.5)  # until all have opened it
    ends = [client.stop_soon(job.id, grace_milliseconds=0) for job in others]
    time.sleep(0.05)  # until these keep the threads
    os.close(os.open(fifo, os.O_WRONLY))
    stops = []
    for _ in range(50):
        stops += [client.stop_soon(job.id) for job in limited]
        time.sleep(0.004)
    accepted = [stop.result() for stop in stops if not stop.exception()]
    assert {answer.status for answer in accepted} <= {"STOPPED"}
    for end in ends:
        end.result()


MANY = """
import os, time
for _ in range(25):
    if os.fork() == 0:
        break
else:
    print("ready", flush=True)
time.sleep(1000)
"""


def test_many_at_a_low_cpu_limit_can_be_ended(client: Client) -> None:
    job = client.create(*python(MANY))
    assert next(client.stream(job.id)).payload == b"ready\n"
    # Lower than any that can be asked for, so that not as many are needed.
    (cgroup_of(client, job) / "cpu.max").write_text("1000 1000000")
    before = time.monotonic()
    assert client.stop(job.id, grace_milliseconds=0).status == "STOPPED"
    assert time.monotonic() - before < 3


def seconds_of(job: pb.Job) -> float:
    assert job.status == "COMPLETED", job
    return (job.end_time_ns - job.start_time_ns) / 1e9


def test_an_io_limit_where_there_is_no_disk_is_refused(client: Client) -> None:
    """hostfs stands for all that is served from elsewhere, as NFS is."""
    with mounted("none", Path("/mnt"), "-t", "hostfs", "-o", "ro"):
        code, message = refusal(client, maxIOBPS=MIB, working_directory="/mnt")
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert message.startswith("maxIOBPS needs the cgroup controller 'io'")
    assert "/mnt is on hostfs" in message


# Older kernels keep a buffer in the pipe for a write from memory that cannot be read.
EMPTY_BUFFER = """
import ctypes, time
print("written", flush=True)
time.sleep(0.5)  # until that is taken
ctypes.CDLL(None).write(1, ctypes.c_void_p(16), 10)
time.sleep(1000)
"""


def test_a_buffer_of_no_bytes_takes_no_time(server: Server, client: Client) -> None:
    job = client.create(*python(EMPTY_BUFFER))
    assert next(client.stream(job.id)).payload == b"written\n"
    time.sleep(1)
    before = server_seconds(server)
    time.sleep(3)
    assert server_seconds(server) - before < 0.5
    client.stop(job.id, grace_milliseconds=0)


def server_seconds(server: Server) -> float:
    pid = server.process.pid
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_fork_bomb_is_contained(client: Client) -> None:
    """Others can start jobs beside it, and the end of it is the end of all of it."""
    bomb = client.create(*python(FORK_BOMB), maxCPU=50)
    cgroup = cgroup_of(client, bomb)
    wait_until(lambda: (cgroup / "pids.events").read_text() != "max 0\n")

    assert int((cgroup / "pids.current").read_text()) == PIDS
    beside, output = client.run("echo fine")
    assert (beside.status, output) == ("COMPLETED", b"fine\n")
    client.stop(bomb.id, grace_milliseconds=0)
    assert not cgroup.exists()


def test_cpu_and_memory_are_accounted(client: Client) -> None:
    script = """
import time
block = bytearray(64 << 20)
while time.process_time() < 1:
    pass
print(time.process_time())
"""
    command, *args = python(script)
    job = client.create(command, *args)
    own_seconds = float(client.output(job.id))
    job = client.wait(job.id)

    used = job.accounting
    used_seconds = (used.cpu_user_us + used.cpu_system_us) / 1e6
    # Here are its last moments too, and this kernel tells user from system by whole ticks.
    assert used_seconds == pytest.approx(own_seconds, rel=0.1, abs=0.1)
    assert 64 * MIB < used.memory_peak_bytes < 80 * MIB
    assert used.oom_kills == 0


def test_io_is_accounted(client: Client) -> None:
    """Almost to the byte, as nothing else of this disk is used."""
    job, _ = client.run(
        f'dd bs=64k count=32 iflag=direct if="{DATA}" of=/dev/null; '
        f'dd bs=64k count=16 oflag=direct conv=notrunc if=/dev/zero of="{DATA}"'
    )

    assert 2 * MIB <= job.accounting.io_read_bytes < 2.2 * MIB
    assert 1 * MIB <= job.accounting.io_written_bytes < 1.2 * MIB


def test_cgroups_that_the_job_makes_go_with_it(client: Client) -> None:
    script = f"""
own={ROOT}$(sed -n s/^0:://p /proc/self/cgroup)
mkdir "$own/made" "$own/made/by the job"
sleep 1000 & echo $! > "$own/made/by the job/cgroup.procs"
echo $!
"""
    before = time.monotonic()
    job, output = client.run(script)

    assert (job.status, job.exitCode) == ("COMPLETED", 0), output
    assert time.monotonic() - before < 20
    assert not cgroup_of(client, job).exists()
    # It was killed; it goes when process 1 has reaped it.
    wait_until(lambda: not Path(f"/proc/{int(output)}").exists())


def test_many_jobs_leave_no_cgroup(
    client: Client, server: Server, request: pytest.FixtureRequest
) -> None:
    # For a user, the same code meets the same kernel: some will do.
    count = 200 if request.node.callspec.params["server"] == "root" else 50
    ids = [client.create("true").id for _ in range(count)]
    wait_until(lambda: client.info().running_jobs == 0)

    newest = client.jobs()[:count]
    assert [job.id for job in newest] == ids[::-1]
    assert {job.status for job in newest} == {"COMPLETED"}
    assert [path for path in Path(client.info().cgroup).iterdir() if path.is_dir()] == []


def test_jobs_end_where_the_server_can_have_no_other_thread(
    tmp_path: Path, certificates: Path
) -> None:
    """Jobs can leave the machine no number for one. To kill them takes threads, of which there are
    not enough for all at once."""
    most = Path("/proc/sys/kernel/pid_max")
    before = most.read_text()
    with serving(tmp_path, certificates) as server, server.connect() as client:
        jobs = [client.create("python3", "-c", MANY_PROCESSES).id for _ in range(8)]
        for job in jobs:
            assert next(client.stream(job)).payload == b"ready\n"
        most.write_text("301")  # fewer than there are
        try:
            stops = [client.stop_soon(job, grace_milliseconds=0) for job in jobs]
            assert {stop.result().status for stop in stops} == {"STOPPED"}
        finally:
            most.write_text(before)
