"""What separates a job from the machine, seen from inside of jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only a root server confines its jobs")


@pytest.fixture(scope="module")
def confining(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Server]:
    """A server with the default profile, as it is without any setting."""
    server = Server(
        tmp_path_factory.mktemp("confining"),
        certificates,
        PROFILE="default",
        PROFILES_ALLOWED="none",
        USERS_ALLOWED="daemon,root,4711",
    )
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(confining: Server) -> Iterator[Client]:
    with confining.connect() as client:
        yield client


def status_of(client: Client, **fields: str) -> dict[str, list[str]]:
    """/proc/self/status of a job: the words of each line, by its name."""
    job = client.create("cat", "/proc/self/status", **fields)
    lines = client.output(job.id).decode().splitlines()
    return {name: words.split() for name, words in (line.split(":", 1) for line in lines)}


# Whom it runs as


def test_a_job_is_an_unprivileged_user(client: Client) -> None:
    job, output = client.run("id -un; id -u; id -G; echo $USER $LOGNAME $HOME")
    assert output.decode().split() == ["nobody", "65534", "65534", "nobody", "nobody", "/tmp"]
    assert (job.user, job.profile) == ("nobody", "default")


def test_it_has_no_capability_and_can_gain_none(client: Client) -> None:
    status = status_of(client)
    assert {status[f"Cap{which}"][0] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"]
    assert status["Uid"] == ["65534"] * 4
    assert status["Gid"] == ["65534"] * 4


def test_a_setuid_program_gives_it_nothing(client: Client, tmp_path: Path) -> None:
    _, output = client.run("su -c id root </dev/null; newgrp root -c id; id -u")
    assert output.splitlines()[-1] == b"65534"
    assert b"uid=0" not in output


def test_its_limits(client: Client) -> None:
    script = "ulimit -c; ulimit -r; ulimit -e; nice -n -5 nice 2>/dev/null"
    job = client.create("bash", "-c", script)
    assert client.output(job.id).split() == [b"0"] * 4


def test_an_allowed_user(client: Client) -> None:
    job, output = client.run("id -un; echo $USER $HOME", user="daemon")
    assert output.split() == [b"daemon", b"daemon", b"/usr/sbin"]
    assert job.user == "daemon"
    assert status_of(client, user="4711")["Uid"] == ["4711"] * 4


def test_its_output_can_be_opened_again(client: Client) -> None:
    """As scripts do: echo > /dev/stderr."""
    job, output = client.run("echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin")
    assert output in {b"out\nerr\n", b"err\nout\n"}
    assert job.exitCode == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "www-data"},
        {"user": "root"},
        {"user": "0"},
        {"profile": "nonsense"},
        {"working_directory": "/root"},
        {"command": "/root/program"},
        {"command": "/etc/shadow"},
    ],
    ids=str,
)
def test_what_it_may_not_have(client: Client, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("CreateJob", pb.CreateJobReq(**({"command": "true"} | fields)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(next(iter(fields)))


def test_profile_none_is_the_servers_user(client: Client) -> None:
    status = status_of(client, profile="none")
    assert status["Uid"] == ["0"] * 4
    assert status["NoNewPrivs"] == ["0"]
    job, output = client.run("id -u", profile="none", user="daemon")
    assert output == b"1\n"
    assert job.user == "daemon"


def test_the_server_tells_what_is_in_force(client: Client) -> None:
    info = client.info()
    assert info.default_profile == "default"
    assert list(info.profiles) == ["default", "none"]
    assert info.default_user == "nobody"
    assert list(info.users) == ["daemon", "root", "4711"]
    assert info.isolation_problem == ""


# Its namespaces


def test_it_has_shared_memory_of_its_own(client: Client) -> None:
    """System V's: nobody else's is seen, and its own is gone afterwards."""
    before = Path("/proc/sysvipc/shm").read_text()
    _, output = client.run(
        "ipcmk -M 4096 >/dev/null; ipcs -m | grep -c 0x; readlink /proc/self/ns/ipc"
    )
    count, namespace = output.splitlines()[-2:]
    assert count == b"1"
    assert namespace.decode() != os.readlink("/proc/self/ns/ipc")
    assert Path("/proc/sysvipc/shm").read_text() == before


def test_it_sees_no_other_cgroup_in_its_path(client: Client) -> None:
    _, output = client.run("grep ^0:: /proc/self/cgroup")
    assert output == b"0::/\n"
    _, output = client.run("grep ^0:: /proc/self/cgroup", profile="none")
    assert output != b"0::/\n" or not client.info().cgroup


def test_it_cannot_rename_the_machine(client: Client) -> None:
    job, _ = client.run("hostname taken 2>&1")
    assert job.exitCode != 0
    assert os.uname().nodename != "taken"


# What it may not ask the kernel for

# Number (on x86_64 and aarch64), arguments, the errno that is expected. All of it is harmless
# where it succeeds: the arguments make no sense, or ask for nothing.
CALLS = """
import ctypes, errno, platform, sys
libc = ctypes.CDLL(None, use_errno=True)
column = ["x86_64", "aarch64"].index(platform.machine())
CALLS = {
    "clone3": (435, 435, errno.ENOSYS), "unshare user": (272, 97, errno.EPERM, 0x10000000),
    "unshare files": (272, 97, 0, 0x400), "clone user": (56, 220, errno.EPERM, 0x10000000 | 17),
    "setns": (308, 268, errno.EPERM, -1, 0), "mount": (165, 40, errno.EPERM),
    "umount2": (166, 39, errno.EPERM), "pivot_root": (155, 41, errno.EPERM),
    "chroot": (161, 51, errno.EPERM, b"/"), "open_tree": (428, 428, errno.EPERM, -1),
    "fsopen": (430, 430, errno.EPERM), "mount_setattr": (442, 442, errno.EPERM),
    "ptrace": (101, 117, errno.EPERM, -1), "process_vm_readv": (310, 270, errno.EPERM),
    "pidfd_getfd": (438, 438, errno.EPERM, -1), "kexec_load": (246, 104, errno.EPERM),
    "init_module": (175, 105, errno.EPERM), "finit_module": (313, 273, errno.EPERM, -1),
    "delete_module": (176, 106, errno.EPERM), "bpf": (321, 280, errno.EPERM, -1),
    "perf_event_open": (298, 241, errno.EPERM), "userfaultfd": (323, 282, errno.EPERM, -1),
    "io_uring_setup": (425, 425, errno.ENOSYS), "keyctl": (250, 219, errno.EPERM, -1),
    "add_key": (248, 217, errno.EPERM), "request_key": (249, 218, errno.EPERM),
    "of a later kernel": (470, 470, errno.ENOSYS),
    "of x32": (0x40000000 | 39, 1 << 30, errno.ENOSYS),
    "getppid": (110, 173, 0), "the first": (0, 0, errno.EBADF, -1),
}
for name, (x86, arm, expected, *arguments) in CALLS.items():
    ctypes.set_errno(0)
    result = libc.syscall([x86, arm][column], *(arguments + [0] * (5 - len(arguments))))
    found = ctypes.get_errno() if result == -1 else 0
    if found != expected:
        print(name, errno.errorcode.get(found, found), flush=True)
"""


def test_calls_that_it_has_no_use_for_are_refused(client: Client) -> None:
    job, output = client.run("exec python3 -", stdin=CALLS.encode())
    assert (output, job.exitCode) == (b"", 0)


def test_with_profile_none_they_are_not(client: Client) -> None:
    status = status_of(client, profile="none")
    assert (status["Seccomp"], status_of(client)["Seccomp"]) == (["0"], ["2"])


def test_programs_run_under_the_filter(client: Client) -> None:
    """Threads, processes, shared memory and sockets, which is what the calls are for."""
    program = """
import multiprocessing, socket, subprocess, threading
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
subprocess.run(["echo", "process"], check=True)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(sum(pool.map(abs, range(10))))
a, b = socket.socketpair()
"""
    job, output = client.run("exec python3 -u -", stdin=program.encode())
    assert job.exitCode == 0, output
    assert sorted(output.split()) == [b"45", b"process", b"thread"]
