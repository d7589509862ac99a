"""What separates a job from the machine, seen from inside of jobs."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import jobworker
from escapes.stage import PYTHON, marked, public_folder
from functional.server import Client, Server, wait_until
from jobworker.engine.files import REPLACED, is_in_any
from jobworker.pb import job_worker_pb2 as pb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only a root server confines its jobs")


@pytest.fixture(scope="module")
def hidden() -> Iterator[Path]:
    """A folder that only the server's setting hides, with a program in it."""
    with public_folder() as folder:
        (folder / "program").write_text("#!/bin/sh\necho started\n")
        (folder / "program").chmod(0o755)
        yield folder


@pytest.fixture(scope="module")
def confining(
    tmp_path_factory: pytest.TempPathFactory, certificates: Path, hidden: Path
) -> Iterator[Server]:
    """A server with the default profile, as it is without any setting."""
    server = Server(
        tmp_path_factory.mktemp("confining"),
        certificates,
        PROFILE="default",
        PROFILES_ALLOWED="none,strict",
        USERS_ALLOWED="daemon,root,4711",
        STRICT_UIDS="3000000-3000002",
        HIDDEN=str(hidden),
        TMP_SIZE="4MiB",
        TMP_FILES="100",
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


SET_USER_ID = """
import ctypes, errno, os, platform, struct
os.umask(0)
libc = ctypes.CDLL(None, use_errno=True)
def file(mode=0o755):
    return os.open("made", os.O_CREAT | os.O_WRONLY, mode)
def open_without_a_mode():
    openat = 257 if platform.machine() == "x86_64" else 56
    libc.syscall(openat, -100, b"/", os.O_RDONLY | os.O_DIRECTORY, 0o4755)
def openat2():
    how = struct.pack("QQQ", os.O_CREAT | os.O_WRONLY, 0o4755, 0)
    if libc.syscall(437, -100, b"made", how, len(how)) < 0:
        raise OSError(ctypes.get_errno(), "")
def unnamed():
    os.fstat(os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o4755))
attempts = {
    "chmod": lambda: os.chmod("made", 0o4755),
    "fchmod": lambda: os.fchmod(file(), 0o4755),
    "fchmodat": lambda: os.chmod("made", 0o4755, dir_fd=os.open(".", os.O_RDONLY)),
    "create": lambda: file(0o4755),
    "unnamed": unnamed,
    "mknod": lambda: os.mknod("node", 0o104755),
    "openat2": openat2,
    "plain": lambda: os.chmod("made", 0o2755),
    "without": open_without_a_mode,
}
file()
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    else:
        print(name, "worked")
"""


@pytest.mark.parametrize("profile", ["none", "default", "strict"])
def test_it_leaves_no_program_by_which_others_have_its_user(
    client: Client, tmp_path: Path, profile: str
) -> None:
    """Who could then reach all jobs of that user, from outside of any."""
    place = str(tmp_path) if profile == "none" else "/tmp"
    job = client.create(
        *PYTHON, stdin=SET_USER_ID.encode(), working_directory=place, profile=profile
    )
    lines = client.output(job.id).decode().splitlines()
    answers = dict(line.split() for line in lines)
    refused = dict.fromkeys(answers, "EPERM") | {"openat2": "ENOSYS"}
    allowed = {"plain": "worked", "without": "worked"}
    assert len(answers) == 9
    assert answers == (dict.fromkeys(answers, "worked") if profile == "none" else refused | allowed)


# To where it is handed a descriptor of the machine's /proc, and of whom it is to look.
LOOK_AT_ANOTHER = """
import os, socket, sys
giver = socket.socket(socket.AF_UNIX)
giver.connect("\\0" + sys.argv[1])
proc = socket.recv_fds(giver, 1, 1)[1][0]
for name, flags in {"environ": os.O_RDONLY, "root/tmp": os.O_RDONLY, "fd/1": os.O_WRONLY}.items():
    try:
        os.open(f"{sys.argv[2]}/{name}", flags, dir_fd=proc)
    except OSError as error:
        print(name, error.strerror)
    else:
        print(name, "worked")
"""


def test_it_reaches_no_other_job_by_the_machines_proc(client: Client) -> None:
    """Whoever can reach a job may hand it a descriptor of that."""
    libc = ctypes.CDLL(None)
    if libc.syscall(444, None, 0, 1) < 6:  # landlock_create_ruleset
        pytest.skip("NOT TESTED: domains of Landlock that keep signals in, new in Linux 6.12")
    mark = uuid.uuid4().hex
    other = client.create("sleep", "60", environment={"MARK": mark})
    pid = marked(mark)[0]
    with socket.socket(socket.AF_UNIX) as giver:
        giver.bind(f"\0{mark}")
        giver.listen()
        giver.settimeout(30)
        job = client.create(*PYTHON, mark, str(pid), stdin=LOOK_AT_ANOTHER.encode())
        proc = os.open("/proc", os.O_RDONLY)
        with giver.accept()[0] as taker:
            socket.send_fds(taker, [b"x"], [proc])
            os.close(proc)
            lines = client.output(job.id).decode().splitlines()
    assert len(lines) == 3
    assert all(line.endswith("Permission denied") for line in lines), lines
    client.stop(other.id, grace_milliseconds=1)


def test_its_limits(client: Client) -> None:
    script = "ulimit -c; ulimit -r; ulimit -e; nice -n -5 nice 2>/dev/null"
    job = client.create("bash", "-c", script)
    assert client.output(job.id).split() == [b"0"] * 4


def test_how_often_it_stops_is_no_matter_of_jobinits(client: Client, confining: Server) -> None:
    """Which would look each time for who has ended, among all jobs."""

    def wakings() -> int:
        status = Path(f"/proc/{confining.jobinit_pid()}/status").read_text()
        return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[0])

    before = wakings()
    stop = "kill -STOP $$; until grep -q 'T (stopped)' /proc/$$/status; do :; done; kill -CONT $$"
    job, _ = client.run(f"(for i in $(seq 200); do {stop}; done)")
    assert job.exitCode == 0
    assert wakings() - before < 30


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
    assert list(info.profiles) == ["default", "none", "strict"]
    in_force = {each.name: "; ".join(each.measures) for each in info.profile_details}
    assert in_force.keys() == set(info.profiles)
    assert "3000000 to 3000002" in in_force["strict"]
    assert "nobody" in in_force["default"] and "4 MiB" in in_force["default"]
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


def test_it_has_namespaces_of_its_own(client: Client) -> None:
    names = ("cgroup", "ipc", "mnt", "pid", "uts")
    paths = [f"/proc/self/ns/{name}" for name in names]
    found = client.output(client.create("readlink", *paths).id).decode().split()
    assert len(found) == len(paths)
    assert not set(found) & {os.readlink(path) for path in paths}


def test_it_cannot_rename_the_machine(client: Client) -> None:
    job, _ = client.run("hostname taken 2>&1")
    assert job.exitCode != 0
    assert os.uname().nodename != "taken"


# Its processes


@pytest.mark.parametrize("name", ["TERM", "ABRT", "SEGV", "KILL", "INT"])
def test_a_signal_to_itself_ends_it_as_anywhere(client: Client, name: str) -> None:
    """The first process of a namespace would not get it."""
    job, _ = client.run(f"kill -{name} $$; sleep 60")
    assert (job.cause, job.signal) == (pb.SIGNALLED, getattr(signal, f"SIG{name}"))


def test_abort_ends_it(client: Client) -> None:
    job = client.create("python3", "-c", "import os; os.abort()")
    assert client.wait(job.id).signal == signal.SIGABRT


def test_it_sees_its_own_processes_only(client: Client) -> None:
    _, output = client.run("echo $$ $PPID; cd /proc; for p in [0-9]*; do echo $p; done")
    assert output.split() == [b"2", b"0", b"2"]
    job, output = client.run("cd /proc/1 || cat /proc/1/mountinfo /proc/1/net/dev")
    assert job.exitCode != 0
    assert output.count(b"No such file") == 2, output


def test_what_it_leaves_behind_is_reaped(client: Client) -> None:
    script = """
for i in 1 2 3 4 5; do (sleep 0.01 &) ; done
while pgrep -x sleep >/dev/null; do :; done
grep -l '^State:.Z' /proc/[0-9]*/status
"""
    assert client.run(script)[1] == b""


def processes_with(word: str) -> list[int]:
    """Of this machine, whose command line has it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_its_daemons_end_with_it(start_server: Callable[..., Server]) -> None:
    """Whatever they do to get away: the last of them ends the first process, too."""
    word = uuid.uuid4().hex
    server = start_server(PROFILE="default", LINGER="100ms")
    with server.connect() as client:
        script = f"setsid sh -c 'sleep 1000; : {word}' </dev/null >/dev/null 2>&1 & sleep 0.1"
        job = client.shell(script)
        assert client.wait(job.id).exitCode == 0
        wait_until(lambda: not processes_with(word))
        wait_until(lambda: not first_processes(server.jobinit_pid()))


def first_processes(jobinit: int) -> list[int]:
    """Of namespaces."""
    children = Path(f"/proc/{jobinit}/task/{jobinit}/children").read_text().split()
    return [int(pid) for pid in children if "pid 1" in Path(f"/proc/{pid}/comm").read_text()]


def test_a_signal_to_all_reaches_only_its_own(client: Client) -> None:
    other = client.create("sleep", "60")
    # Only where it is in a namespace: elsewhere it would reach others of its user.
    script = "[ $$ = 2 ] || exit; exec 2>/dev/null; sleep 61 & kill -9 -1; wait $!; echo $?"
    job, output = client.run(script)
    assert (output, job.exitCode) == (b"137\n", 0)
    assert client.get(other.id).status == "RUNNING"
    client.stop(other.id)


def test_it_goes_on_without_jobinit_and_without_the_server(
    start_server: Callable[..., Server],
) -> None:
    word = uuid.uuid4().hex
    server = start_server(PROFILE="default", STOP_JOBS="no")
    script = f"trap 'exit 5' TERM; echo ready; while sleep 0.05; do : {word}; done"
    with server.connect() as client:
        job = client.shell(script)
        next(client.stream(job.id))
        os.kill(server.jobinit_pid(), signal.SIGKILL)
        # What is sent to it as it dies fails to start.
        wait_until(lambda: "is gone" in server.log)
        # Another jobinit, with views of its own.
        assert client.run("echo new")[1] == b"new\n"
    server.stop(signal.SIGKILL)
    server = start_server(PROFILE="default", STOP_JOBS="no")
    with server.connect() as client:
        assert client.run("echo newer")[1] == b"newer\n"
        assert client.get(job.id).status in {"RUNNING", "FAILED"}
        for pid in processes_with(word):
            os.kill(pid, signal.SIGKILL)
        client.wait(job.id)


@pytest.mark.parametrize("allowed", ["none", ""])
def test_it_goes_on_where_other_profiles_are_allowed_from_now_on(
    start_server: Callable[..., Server], allowed: str
) -> None:
    """By the jobinit that it has; what comes is started by one of another kind."""
    other = "" if allowed else "none"
    server = start_server(PROFILE="default", PROFILES_ALLOWED=allowed, STOP_JOBS="no")
    with server.connect() as client:
        job = client.shell("trap 'exit 5' TERM; echo ready; while sleep 0.05; do :; done")
        next(client.stream(job.id))
    server.stop()
    before = server.jobinit_pid()
    server = start_server(PROFILE="default", PROFILES_ALLOWED=other)
    with server.connect() as client:
        assert server.jobinit_pid() != before
        capabilities = "grep CapBnd /proc/self/status"
        assert int(client.run(capabilities)[1].split()[1], 16) == 0
        if other:
            own = Path("/proc/self/status").read_text()
            assert client.run(capabilities, profile="none")[1].decode() in own
        client.stop(job.id)
        assert client.wait(job.id).exitCode == 5


# Its files


def mounts_of(client: Client, **fields: str) -> dict[str, tuple[str, set[str]]]:
    """File system and flags of what it sees, by where it is."""
    job = client.create("cat", "/proc/self/mountinfo", **fields)
    found = {}
    for line in client.output(job.id).decode().splitlines():
        before, _, after = line.partition(" - ")
        found[before.split()[4]] = (after.split()[0], set(before.split()[5].split(",")))
    return found


def test_it_mounts_nothing_on_the_machine(client: Client) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    job = client.create("sleep", "60")
    assert Path("/proc/self/mountinfo").read_text() == before
    client.stop(job.id)
    assert Path("/proc/self/mountinfo").read_text() == before


def test_set_user_id_and_devices_have_no_effect_anywhere(client: Client) -> None:
    for point, (filesystem, flags) in mounts_of(client).items():
        assert "nosuid" in flags, point
        # Where /dev's own file system is, so that its few can be used.
        assert "nodev" in flags or filesystem in {"tmpfs", "devpts"}, point


def test_its_temporary_folders_are_its_own(client: Client) -> None:
    name = uuid.uuid4().hex
    folders = ("/tmp", "/var/tmp", "/dev/shm")
    files = " ".join(f"{folder}/{name}" for folder in folders)
    script = f"ls -A {' '.join(folders)} | grep -v :; touch {files}"
    for _ in range(2):
        job, output = client.run(script)
        assert (output.split(), job.exitCode) == ([], 0)
    assert not any(Path(folder, name).exists() for folder in folders)


def test_they_stay_so_while_other_jobs_come(client: Client) -> None:
    script = "touch /tmp/first; trap 'ls /tmp; exit' TERM; echo ready; sleep 60 & wait"
    first = client.shell(script)
    assert next(client.stream(first.id)).payload == b"ready\n"
    client.run("touch /tmp/second")
    client.stop(first.id)
    assert client.output(first.id) == b"ready\nfirst\n"


def test_they_are_small(client: Client) -> None:
    _, output = client.run("head -c 5000000 /dev/zero > /tmp/a 2>/dev/null; stat -c %s /tmp/a")
    assert int(output) == 4 << 20
    _, output = client.run(
        "for i in $(seq 200); do touch /tmp/$i 2>/dev/null || break; done; ls /tmp | wc -l"
    )
    assert int(output.split()[-1]) < 100


def test_it_has_harmless_devices_only(client: Client) -> None:
    script = "exec 2>&1; ls /dev; for d in null zero full random urandom; do head -c 1 /dev/$d"
    _, output = client.run(
        script + " | wc -c; done; echo x > /dev/null; mknod /tmp/m b 1 1; touch /dev/x"
    )
    names, counts = output.split()[:13], output.split()[13:18]
    assert (
        names == (b"fd full null ptmx pts random shm stderr stdin stdout tty urandom zero").split()
    )
    assert counts == [b"0", b"1", b"1", b"1", b"1"]
    assert output.count(b"Operation not permitted") == 1
    assert output.count(b"Read-only") == 1


def test_it_has_terminals_of_its_own(client: Client) -> None:
    program = "import os, pty; print(os.ttyname(pty.openpty()[1]), os.listdir('/dev/pts'))"
    _, output = client.run("exec python3 -", stdin=program.encode())
    assert output == b"/dev/pts/0 ['0', 'ptmx']\n"


def test_what_is_the_kernels_is_read_only_or_hidden(client: Client) -> None:
    mounts = mounts_of(client)
    for point in ("/sys", "/dev", "/run", "/proc"):
        assert "ro" in mounts[point][1], point
    _, output = client.run("cat /proc/keys /proc/key-users /proc/timer_list")
    assert output.count(b"Permission denied") == 3
    files = "/proc/self/loginuid /proc/self/comm /proc/pressure/cpu /proc/sys/kernel/core_pattern"
    _, output = client.run(f"for file in {files}; do echo x > $file; done")
    assert output.count(b"Read-only") == 4


def test_it_sees_no_cgroups_wherever_they_are_mounted(tmp_path: Path, certificates: Path) -> None:
    """Who lists a folder for long keeps others from making cgroups in it."""
    mount = 'mount -t cgroup2 none /mnt && test -e /mnt/cgroup.procs && exec "$@"'
    launcher = ["unshare", "--mount", "--propagation=private", "sh", "-c", mount, "sh"]
    server = Server(tmp_path, certificates, launcher=launcher, PROFILE="default")
    with server.connect() as client:
        mounts = mounts_of(client).values()
        assert not [name for name, _ in mounts if name.startswith("cgroup")]
        _, output = client.run("find /mnt /sys/fs/cgroup -name 'cgroup.*'")
        assert output == b""
    assert server.stop() == 0


def test_it_does_not_let_jobs_out_of_a_chroot(tmp_path: Path, certificates: Path) -> None:
    """Whoever comes to their mounts comes to the root of these, which is outside. What each job
    mounts would come to the machine, too, where that shares its mounts, as with systemd."""
    enter = 'mkdir -p "$0" && mount --rbind / "$0" && exec chroot "$0" "$@"'
    root = str(tmp_path / "root")
    launcher = ["unshare", "--mount", "--propagation=private", "sh", "-c", enter, root]
    with pytest.raises(AssertionError, match="the outside of a chroot: Operation not permitted"):
        Server(tmp_path, certificates, launcher=launcher, PROFILE="default")
    server = Server(tmp_path, certificates, launcher=launcher, PROFILE="none")
    server.stop()


def test_what_is_mounted_in_sys_is_not_there(tmp_path: Path, certificates: Path) -> None:
    """The kernel's tracing, debugging and the like, of which some is for all users."""
    mount = 'mount -t tmpfs none /sys/firmware && touch /sys/firmware/of-the-kernel && exec "$@"'
    launcher = ["unshare", "--mount", "--propagation=private", "sh", "-c", mount, "sh"]
    server = Server(
        tmp_path, certificates, launcher=launcher, PROFILE="default", PROFILES_ALLOWED="none"
    )
    with server.connect() as client:
        for profile, lines in (("none", [b"of-the-kernel"]), ("default", [])):
            _, output = client.run(
                "find /sys/firmware -name of-the-kernel -printf '%f\n'", profile=profile
            )
            assert output.split() == lines
    assert server.stop() == 0


def test_no_socket_of_a_daemon_is_in_reach(client: Client) -> None:
    resolver = os.path.realpath("/etc/resolv.conf")
    _, output = client.run("find /run/ -type s -o -type f")
    assert output.decode().split() == ([resolver] if resolver.startswith("/run/") else [])


def test_what_is_hidden(client: Client, confining: Server, hidden: Path) -> None:
    script = f"cat {hidden}/program || ls {hidden}; ls {confining.state} {confining.certs}"
    _, output = client.run(script)
    assert b"started" not in output and b"program\n" not in output
    assert b".pem" not in output and b"jobs.db" not in output
    assert client.run(f"{hidden}/program", profile="none")[1] == b"started\n"


def test_the_servers_code_cannot_be_changed(client: Client) -> None:
    mounts = mounts_of(client)
    for path in (Path(sys.prefix), Path(jobworker.__file__).parent):
        covering = max((point for point in mounts if path.is_relative_to(point)), key=len)
        if is_in_any(str(path), REPLACED):  # not there at all
            assert covering in REPLACED, path
        else:
            assert "ro" in mounts[covering][1], path


@pytest.mark.parametrize("setting", ["JOB_USER", "USERS_ALLOWED"])
def test_nothing_is_put_in_the_place_of_what_the_server_uses(
    tmp_path: Path, certificates: Path, setting: str
) -> None:
    """Where a folder above belongs to the user of a job."""
    with public_folder() as place:
        own = place / "own"
        shutil.copytree(certificates, own / "folder" / "certs")
        for path in (own, own / "folder"):
            os.chown(path, 4711, 4711)
        settings: dict[str, Any] = {"PROFILE": "default", setting: "4711"}
        server = Server(tmp_path, own / "folder" / "certs", **settings)
        try:
            with server.connect() as client:
                job = client.create("mv", f"{own}/folder", f"{own}/old", user="4711")
                assert b"Read-only" in client.output(job.id)
            assert f"{own} is read-only for jobs" in server.log
        finally:
            server.stop()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("command", "HIDDEN/program"),
        ("working_directory", "HIDDEN"),
        ("command", "PRIVATE/program"),
        ("working_directory", "PRIVATE"),
    ],
)
def test_what_it_would_not_see_is_not_accepted(
    client: Client, hidden: Path, tmp_path: Path, field: str, value: str
) -> None:
    """As what does not exist."""
    (tmp_path / "program").write_text("#!/bin/sh\n")
    (tmp_path / "program").chmod(0o755)
    path = value.replace("HIDDEN", str(hidden)).replace("PRIVATE", str(tmp_path))
    fields: dict[str, Any] = {"command": "true"} | {field: path}
    with pytest.raises(grpc.RpcError, match="does not show") as caught:
        client.call("CreateJob", pb.CreateJobReq(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    if value.startswith("PRIVATE"):
        job = client.call("CreateJob", pb.CreateJobReq(**fields, profile="none"))
        assert client.wait(job.id).exitCode == 0


# Its network


def test_without_a_network(client: Client, confining: Server) -> None:
    program = f"""
import socket
print([name for _, name in socket.if_nameindex()])
listener = socket.create_server(("127.0.0.1", 0))
print(socket.create_connection(listener.getsockname()).getpeername() == listener.getsockname())
print(socket.socket().connect_ex(("127.0.0.1", {confining.port})) != 0)
"""
    job, output = client.run("exec python3 -", stdin=program.encode(), network="none")
    assert output == b"['lo']\nTrue\nTrue\n"
    assert job.network == "none"
    job, output = client.run("exec python3 -", stdin=program.encode())
    assert output.endswith(b"True\nFalse\n")
    assert job.network == "host"


@pytest.mark.parametrize(
    "fields",
    [
        {"network": "bridge"},
        {"network": "none", "profile": "none"},
        {"network": "host", "profile": "strict"},
    ],
    ids=str,
)
def test_networks_that_there_are_not(client: Client, fields: dict[str, str]) -> None:
    with pytest.raises(grpc.RpcError, match="network") as caught:
        client.create("true", **fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# Profile strict


def test_a_strict_job_has_little(client: Client) -> None:
    job, output = client.run("id -u; id -G; tail -n +3 /proc/net/dev", profile="strict")
    uid, groups, interface, *_ = output.decode().split()
    assert uid == groups == job.user
    assert int(uid) in range(3000000, 3000003)
    assert interface == "lo:"
    assert (job.profile, job.network) == ("strict", "none")
    for point, (_, flags) in mounts_of(client, profile="strict").items():
        is_own = point.startswith(("/tmp", "/var/tmp", "/dev/shm", "/dev/pts"))
        assert ("rw" in flags) == is_own, point
    assert client.run("touch /tmp/a /dev/shm/b && ls /var/tmp", profile="strict")[0].exitCode == 0


def test_each_strict_job_is_a_user_of_its_own(start_server: Callable[..., Server]) -> None:
    settings = {"PROFILE": "strict", "STRICT_UIDS": "3000000-3000001", "STOP_JOBS": "no"}
    server = start_server(**settings)
    with server.connect() as client:
        jobs = [client.create("sleep", "60") for _ in range(2)]
        assert {job.user for job in jobs} == {"3000000", "3000001"}
        with pytest.raises(grpc.RpcError, match="STRICT_UIDS") as caught:
            client.create("true")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        client.stop(jobs[0].id)
        assert client.wait(client.create("true").id).user == jobs[0].user
    server.stop(signal.SIGKILL)
    # The next server knows who has one.
    server = start_server(**settings)
    with server.connect() as client:
        again = client.create("sleep", "60")
        assert again.user == jobs[0].user
        with pytest.raises(grpc.RpcError, match="STRICT_UIDS"):
            client.create("true")
        for job in (again, jobs[1]):
            client.stop(job.id)


def test_a_strict_job_may_not_choose_its_user(client: Client) -> None:
    with pytest.raises(grpc.RpcError, match="user"):
        client.create("true", profile="strict", user="3000000")


# What it may not ask the kernel for

# Number (on x86_64 and aarch64), arguments, the errno that is expected. All of it is harmless
# where it succeeds: the arguments make no sense, or ask for nothing.
CALLS = """
import ctypes, errno, platform, sys
libc = ctypes.CDLL(None, use_errno=True)
column = ["x86_64", "aarch64"].index(platform.machine())
CALLS = {
    "clone3": (435, 435, errno.ENOSYS), "unshare user": (272, 97, errno.EPERM, 0x10000000),
    "unshare files": (272, 97, 0, 0x400), "unshare time": (272, 97, errno.EPERM, 0x81),
    "clone user": (56, 220, errno.EPERM, 0x10000000 | 17),
    "clone of a parent": (56, 220, errno.EPERM, 0x8000 | 17),
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
    "socket vsock": (41, 198, errno.EAFNOSUPPORT, 40, 1), "socket unix": (41, 198, 0, 1, 1),
    "socket inet": (41, 198, 0, 2, 1), "socket inet6": (41, 198, 0, 10, 1),
    "socket netlink": (41, 198, 0, 16, 3), "socket alg": (41, 198, errno.EAFNOSUPPORT, 38, 5),
    "socket tcp": (41, 198, 0, 2, 0x80801, 6), "socket udp": (41, 198, 0, 10, 2, 17),
    "socket routes": (41, 198, 0, 16, 0x80002), "socket of packets": (41, 198, 0, 1, 5),
    "socket lite": (41, 198, errno.EPROTONOSUPPORT, 2, 2, 136),
    "socket raw": (41, 198, errno.EPROTONOSUPPORT, 10, 3, 58),
    "socket seqpacket": (41, 198, errno.EPROTONOSUPPORT, 2, 5),
    "socket packet": (41, 198, errno.EPROTONOSUPPORT, 2, 10),
    "socket beyond": (41, 198, errno.EPROTONOSUPPORT, 2, 1, 0x10006),
    "socket below": (41, 198, errno.EPROTONOSUPPORT, 2, 1, -1),
    "socket diag": (41, 198, errno.EPROTONOSUPPORT, 16, 3, 4),
    "socket uevent": (41, 198, errno.EPROTONOSUPPORT, 16, 2, 15),
    "socket generic": (41, 198, errno.EPROTONOSUPPORT, 16, 3, 16),
    "linger": (54, 208, 0, -1, 1, 13), "keepalive": (54, 208, errno.EBADF, -1, 1, 9),
    "linger of TCP": (54, 208, errno.EBADF, -1, 6, 13),
    "user timeout": (54, 208, 0, -1, 6, 18), "18 of sockets": (54, 208, errno.EBADF, -1, 1, 18),
    "18 of IP": (54, 208, errno.EBADF, -1, 0, 18),
    "line discipline": (16, 29, errno.EPERM, -1, 0x5423),
    "vlan": (16, 29, errno.EPERM, -1, 0x8982), "bridge": (16, 29, errno.EPERM, -1, 0x8940),
    "window size": (16, 29, errno.EBADF, -1, 0x5413),
    "pair inet": (53, 199, errno.EPROTONOSUPPORT, 2, 4, 0),
    "of a later kernel": (470, 470, errno.ENOSYS),
    "of x32": (0x40000000 | 39, 1 << 30, errno.ENOSYS),
    "io_setup": (206, 0, errno.ENOSYS), "io_uring_enter": (426, 426, errno.ENOSYS, -1),
    "io_uring_register": (427, 427, errno.ENOSYS, -1), "statmount": (457, 457, errno.ENOSYS),
    "listmount": (458, 458, errno.ENOSYS), "fsconfig": (431, 431, errno.EPERM, -1),
    "open_tree_attr": (467, 467, errno.EPERM, -1), "quotactl": (179, 60, errno.EPERM, -1),
    "quotactl_fd": (443, 443, errno.EPERM, -1), "open_by_handle_at": (304, 265, errno.EPERM, -1),
    "process_vm_writev": (311, 271, errno.EPERM), "kcmp": (312, 272, errno.EPERM),
    "process_madvise": (440, 440, errno.EPERM, -1), "kexec_file_load": (320, 294, errno.EPERM, -1),
    "settimeofday": (164, 170, errno.EPERM, 1), "clock_settime": (227, 112, errno.EPERM, -1),
    "nfsservctl": (180, 42, errno.EPERM), "splice": (275, 76, errno.EINVAL, -1),
    "sendfile": (40, 71, errno.EINVAL, -1), "lease": (72, 25, errno.EPERM, -1, 1024),
    "delegation": (72, 25, errno.EPERM, -1, 1040), "descriptor flags": (72, 25, errno.EBADF, -1, 1),
    "signals of a folder": (72, 25, errno.EPERM, -1, 1026),
    "signals to a group": (72, 25, errno.EPERM, -1, 8, -1),
    "signals to one": (72, 25, errno.EBADF, -1, 8, 1), "to any": (72, 25, errno.EPERM, -1, 15),
    "signals of a socket": (16, 29, errno.EPERM, -1, 0x8901),
    "signals of any": (16, 29, errno.EPERM, -1, 0x8902),
    "snapshot": (16, 29, errno.EPERM, -1, 0x50009401),
    "snapshot of today": (16, 29, errno.EPERM, -1, 0x50009417),
    "snapshot removed": (16, 29, errno.EPERM, -1, 0x5000943F),
    "getppid": (110, 173, 0), "read": (0, 63, errno.EBADF, -1),
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
