"""What separates the jobs of a server that is not root from the machine, and from that server."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop

from escapes.stage import (
    AREA_NAMES,
    PYTHON,
    SETTINGS,
    Stage,
    carry,
    got_through,
    program,
    public_folder,
)
from functional.server import Client, Server, wait_until
from functional.test_isolation import SET_USER_ID, first_processes, mounts_of, status_of
from functional.unprivileged import GROUP, USER, StartServer, servers
from jobworker.pb import job_worker_pb2 as pb

APART = ["unshare", "--mount", "--uts", "--ipc", "--propagation=private"]


# The kernel lets it, but delivers none: see the test of these signals.
HARMLESS = {"processes: kill process 1: worked, may signal process 1"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with public_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def start(folder: Path, certificates: Path) -> Iterator[StartServer]:
    with servers(folder, certificates) as start:
        yield start


@pytest.fixture(scope="module")
def server(start: StartServer) -> Server:
    """With the default profile, as it is without any setting."""
    return start(PROFILE="", PROFILES_ALLOWED="none,strict")


@pytest.fixture
def start_other(certificates: Path) -> Iterator[StartServer]:
    with public_folder() as folder, servers(folder, certificates) as start:
        yield start


# Whom it runs as


def test_it_is_confined_by_default(client: Client, server: Server) -> None:
    info = client.info()
    assert info.default_profile == "default"
    assert list(info.profiles) == ["default", "none"]
    assert info.isolation_problem == ""
    in_force = {each.name: "; ".join(each.measures) for each in info.profile_details}
    assert f"as {USER}, the server's own user, in a user namespace" in in_force["default"]


def test_it_has_the_servers_user_and_no_rights_beside(client: Client) -> None:
    status = status_of(client)
    assert {status[f"Cap{which}"][0] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert status["Uid"] == status["Gid"] == [str(USER)] * 4
    # One that it is in and that has no number in the namespace.
    assert sorted(status["Groups"]) == [str(USER), "65534"]


def test_profile_none_is_outside_of_the_namespace(client: Client) -> None:
    status = status_of(client, profile="none")
    assert sorted(status["Groups"]) == [str(USER), str(USER + 1)]
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["0"], ["0"])
    _, output = client.run("readlink /proc/self/ns/user", profile="none")
    assert output.decode().strip() == os.readlink("/proc/self/ns/user")


def test_it_is_in_a_user_namespace_that_it_can_not_leave_or_add_to(client: Client) -> None:
    _, output = client.run(
        "readlink /proc/self/ns/user; cat /proc/self/uid_map /proc/self/setgroups"
    )
    namespace, *rest = output.decode().split()
    assert namespace != os.readlink("/proc/self/ns/user")
    assert rest == [str(USER), str(USER), "1", "deny"]
    job, _ = client.run("unshare -U true || nsenter -t 1 -U true")
    assert job.exitCode != 0


@pytest.mark.parametrize(
    "fields",
    [{"user": "nobody"}, {"user": "0"}, {"profile": "strict"}, {"working_directory": "STATE"}],
    ids=str,
)
def test_what_it_may_not_have(client: Client, server: Server, fields: dict[str, str]) -> None:
    fields = {name: value.replace("STATE", str(server.state)) for name, value in fields.items()}
    with pytest.raises(grpc.RpcError) as caught:
        client.create("true", **fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(next(iter(fields)))


# What it sees


def test_what_is_the_servers_is_hidden(client: Client, server: Server, folder: Path) -> None:
    """All of it belongs to the user that the job has."""
    (folder / "home" / ".profile").write_text("secret")
    places = (server.state, server.certs, folder / "home")
    for place in places:
        _, output = client.run(f"ls -A {place}; chmod 700 {place}; ls -A {place}; touch {place}/x")
        assert output.count(b"Permission denied") == 3, output
        assert output.count(b"Read-only file system") == 1, output
        assert b"ls -A" not in client.run(f"ls {place}", profile="none")[1]
    script = f"cat {folder}/home/.profile {server.certs}/server-key.pem {server.state}/jobs.db"
    job, output = client.run(script)
    assert (job.exitCode, output.count(b"Permission denied")) == (1, 3), output


def test_what_programs_have_in_a_home_that_is_another_users_is_hidden(certificates: Path) -> None:
    """As root owns one for sftp."""
    with (
        public_folder() as other,
        servers(other, certificates, ["env", f"PYTHONPATH={other}/home/.venv/lib"]) as start,
    ):
        home = other / "home"
        (home / ".ssh").mkdir()
        (home / ".ssh" / "id_ed25519").write_text("secret")
        os.chown(home / ".ssh", USER, USER)
        os.chown(home, 0, 0)
        home.chmod(0o755)
        (home / "data").write_text("data")
        (home / ".venv" / "lib").mkdir(parents=True)
        with start(PROFILE="").connect() as client:
            assert client.run(f"ls {home}/.venv")[1] == b"lib\n"
            _, output = client.run(f"cat {home}/.ssh/id_ed25519; touch {home}/.ssh/x")
            assert output.count(b"Permission denied") == 2, output
            assert client.run(f"cat {home}/data")[1] == b"data"


@pytest.mark.parametrize("is_log", [False, True])
def test_what_its_user_can_enter_and_not_list_is_hidden(certificates: Path, is_log: bool) -> None:
    """Names are known: that of a key in a home, or of a log that was rotated."""
    with public_folder() as place, public_folder() as other:
        folder = place / "folder"
        folder.mkdir()
        file = folder / (".netrc" if not is_log else "log.1")
        file.write_text("secret")
        (folder / "log").touch()
        for path in folder.iterdir():
            os.chown(path, USER, USER)
        folder.chmod(0o711)
        launcher = ["sh", "-c", 'exec >> "$0/log" && exec "$@"', str(folder)] if is_log else []
        with servers(other, certificates, launcher) as start:
            if not is_log:
                (other / "home").rmdir()
                (other / "home").symlink_to(folder)
            with start(PROFILE="").connect() as client:
                assert b"Permission denied" in client.run(f"cat {file}")[1]


def test_what_sqlite_keeps_for_a_moment_is_in_no_folder_that_jobs_see(certificates: Path) -> None:
    """It has others' records, and is the server's user's, as jobs are."""
    with public_folder() as other, public_folder() as place:
        os.chown(place, USER, USER)
        launcher = ["env", f"TMPDIR={place}"]
        with (
            servers(other, certificates, launcher) as start,
            start(PROFILE="", KEEP_JOBS="1").connect() as client,
        ):
            made = place.stat().st_mtime_ns
            for _ in range(3):
                client.run("true")
                client.call(
                    "CreateJobs", pb.CreateJobsReq(jobs=[pb.CreateJobReq(command="true")] * 60)
                )
            wait_until(lambda: len(client.jobs()) == 1)
            assert place.stat().st_mtime_ns == made


def test_that_users_mail_is_hidden(certificates: Path) -> None:
    mail = "mount -t tmpfs -o mode=755 none /var/mail && echo secret > /var/mail/user"
    mail += f' && chown {USER} /var/mail/user && exec "$@"'
    with (
        public_folder() as other,
        servers(other, certificates, ["sh", "-c", mail, "sh"]) as start,
        start(PROFILE="").connect() as client,
    ):
        assert b"Permission denied" in client.run("cat /var/mail/user")[1]


def test_neither_are_daemons_that_give_its_groups_all_rights_in_sight(certificates: Path) -> None:
    """Whose sockets are not in /run: LXD is a package, or a snap, and has become Incus."""
    sockets = ["lib/lxd/unix.socket", "lib/incus/unix.socket", "snap/lxd/common/lxd/unix.socket"]
    make = "mount -t tmpfs -o mode=755 none /var; cd /var; mkdir -p tmp"
    for path in sockets:
        make += f" {path}; chgrp {GROUP} {path}; chmod 770 {path}; mkdir -p"
    with (
        public_folder() as other,
        servers(other, certificates, ["sh", "-c", f'{make} log && exec "$@"', "sh"]) as start,
        start(PROFILE="").connect() as client,
    ):
        for path in sockets:
            assert client.run(f"ls /var/{path}")[0].exitCode != 0
        assert client.run("ls /var/lib")[0].exitCode == 0


def test_nothing_is_put_in_the_place_of_the_servers_files(client: Client, server: Server) -> None:
    """Whose folder belongs to the user, too: renamed, the next server would find others."""
    around = server.state.parent
    _, output = client.run(f"touch {around}/x; mv {server.certs} {around}/y; mkdir {around}/z")
    assert output.count(b"Read-only file system") + output.count(b"busy") == 3, output
    assert server.certs.exists() and not (around / "z").exists()


def test_neither_in_that_of_its_log(certificates: Path) -> None:
    """The next start would append to what a link leads to."""
    with public_folder() as folder, public_folder() as logs:
        (logs / "log.1").touch()  # of a rotation
        for path in (logs, logs / "log.1"):
            os.chown(path, USER, USER)
        launcher = ["sh", "-c", 'exec >> "$0/log" && exec "$@"', str(logs)]
        with (
            servers(folder, certificates, launcher) as start,
            start(PROFILE="").connect() as client,
        ):
            names = f"{logs}/log {logs}/log.1 {folder}/server.log"
            _, output = client.run(f"cat {names}; ln -s / {logs}/x")
            assert output.count(b"Permission denied") == 3, output
            assert output.count(b"Read-only file system") == 1, output


def test_no_core_dump_of_the_server_shows_its_keys(certificates: Path) -> None:
    launcher = ["prlimit", "--core=unlimited"]
    with public_folder() as other, servers(other, certificates, launcher) as start:
        server = start(PROFILE="")
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        assert re.search(r"Max core file size +1 +unlimited", limits)
        assert server.stop(signal.SIGABRT) == -signal.SIGABRT
        assert not list(other.glob("*core*"))


def test_jobinit_runs_from_what_no_job_can_change(server: Server) -> None:
    """A script with /proc/self/exe as its interpreter comes to it, by a mount of the machine."""
    program = f"/proc/{server.jobinit_pid()}/exe"
    with open(program, "rb") as file:
        assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    assert Path(os.readlink(program)).name.startswith("memfd:jobinit")


def test_jobinit_cannot_be_traced(server: Server) -> None:
    """By others of its user: what is its own in /proc is root's then."""
    owners = [
        Path(f"/proc/{pid}/environ").stat().st_uid
        for pid in (server.jobinit_pid(), server.process.pid)
    ]
    assert owners == [0, USER]


def test_neither_is_it_in_sight_where_it_is_mounted_once_more(
    certificates: Path,
) -> None:
    """As all of / is on some machines; and a /proc, as there is one in a folder for chroot."""
    with public_folder() as other:
        mounted = Path("/mnt") / other.name
        mount = f"mount -t tmpfs -o mode=755 none /mnt && mkdir {mounted} {mounted}-proc"
        mount += f" && mount --rbind /srv {mounted} && mount -t proc proc {mounted}-proc"
        launcher = ["sh", "-c", mount + ' && exec "$@"', "sh"]
        with servers(other, certificates, launcher) as start:
            server = start(PROFILE="")
            with server.connect() as client:
                again = mounted / other.name
                script = f"cat {again}/certs/server-key.pem; ls {again}/state {again}/home;"
                script += f"touch {again}/home/x; ls {mounted}-proc; touch {again}/x"
                _, output = client.run(script)
                assert output.count(b"Permission denied") == 5, output
                assert output.count(b"Read-only file system") == 1, output


@pytest.mark.parametrize("is_folder", [False, True])
def test_no_job_leaves_anything_for_others_in_run(certificates: Path, is_folder: bool) -> None:
    """As a socket that C libraries ask for users."""
    make = "mount -t tmpfs -o mode=755 none /var; mkdir -p /var/tmp /var/log; "
    make += "mkdir /var/run" if is_folder else "ln -s /run /var/run"
    with (
        public_folder() as other,
        servers(other, certificates, ["sh", "-c", f'{make} && exec "$@"', "sh"]) as start,
        start(PROFILE="").connect() as client,
    ):
        _, output = client.run("mkdir /run/nscd; mkdir /var/run/nscd")
        assert output.count(b"Read-only file system") == 2, output


# $0: a folder of the server, $1: one that is in sight, $2: a user. As a disk for output is bound,
# and a key, and modules.
BOUND = """
set -e
mkdir -p "$0/state/output" "$0/modules/bound" "$1/output" "$1/modules"
mv "$0/certs/server-key.pem" "$1/key"
touch "$0/certs/server-key.pem"
chown -R "$2" "$0" "$1"
mount --bind "$1/output" "$0/state/output"
mount --bind "$1/key" "$0/certs/server-key.pem"
mount --bind "$1/modules" "$0/modules/bound"
shift 2
exec "$@"
"""


def test_neither_is_what_is_mounted_in_its_folders_in_sight_where_it_is_from(
    certificates: Path,
) -> None:
    with public_folder() as other, public_folder() as disk:
        modules = ["env", f"PYTHONPATH={other}/modules"]
        launcher = ["sh", "-c", BOUND, str(other), str(disk), str(USER), *modules]
        with servers(other, certificates, launcher) as start:
            with start(PROFILE="").connect() as client:
                script = f"cat {disk}/key; ls {disk}/output; touch {disk}/modules/x"
                _, output = client.run(script)
            assert output.count(b"Permission denied") == 2, output
            assert output.count(b"Read-only file system") == 1, output


def test_neither_are_cgroups_that_are_mounted_once_more(certificates: Path) -> None:
    mount = 'mount -t cgroup2 none /mnt && test -e /mnt/cgroup.procs && exec "$@"'
    with (
        public_folder() as other,
        servers(other, certificates, ["sh", "-c", mount, "sh"]) as start,
        start(PROFILE="").connect() as client,
    ):
        _, output = client.run("ls /mnt; ls /mnt/cgroup.procs")
        assert output.count(b"Permission denied") == 2, output


def test_it_sees_its_own_processes_only(client: Client) -> None:
    _, output = client.run("echo $$; cd /proc; for p in [0-9]*; do echo $p; done")
    assert output.split() == [b"2", b"2"]
    job, output = client.run("cat /proc/1/mountinfo /proc/1/net/dev")
    assert job.exitCode != 0
    assert output.count(b"No such file") == 2, output


def test_its_folders_and_devices_are_its_own(client: Client) -> None:
    script = "touch /tmp/x /var/tmp/y /dev/shm/z && ls -A /tmp; head -c 1 /dev/zero | wc -c"
    _, output = client.run(script + "; echo > /dev/null; echo $HOME; ls /run; touch /dev/x")
    assert output.split()[:5] == [b"x", b"y", b"z", b"1", b"/"]
    assert output.count(b"Read-only") == 1
    program = "import os, pty; print(os.ttyname(pty.openpty()[1]), os.listdir('/dev/pts'))"
    _, output = client.run("exec python3 -", stdin=program.encode())
    assert output == b"/dev/pts/0 ['0', 'ptmx']\n"


def test_nothing_in_its_view_gives_rights(client: Client) -> None:
    mounts = mounts_of(client)
    for point, (filesystem, flags) in mounts.items():
        if filesystem != "devtmpfs":  # a single one of the machine's harmless devices
            assert "nosuid" in flags, point
            assert "nodev" in flags or filesystem in {"tmpfs", "devpts"}, point
    for point in ("/sys", "/dev", "/run", "/proc"):
        assert "ro" in mounts[point][1], point


def test_it_can_have_no_network(client: Client) -> None:
    _, output = client.run("cat /proc/net/dev | tail -n +3", network="none")
    assert [line.split(b":")[0].strip() for line in output.splitlines()] == [b"lo"]


def test_its_output_can_be_opened_again(client: Client) -> None:
    job, output = client.run("echo out > /dev/stdout; echo err > /dev/stderr")
    assert output in {b"out\nerr\n", b"err\nout\n"}
    assert job.exitCode == 0


def test_signals_do_nothing_to_the_first_process_of_its_namespace(client: Client) -> None:
    """Which has the same user. Where there is Landlock, they do not get there."""
    kill = "kill -$s 1 2>/dev/null"
    script = f"for s in KILL STOP SEGV CHLD TERM; do {kill}; done; sleep 0.1 & wait $!"
    job, output = client.run(f"{script}; echo goes on")
    assert (job.exitCode, output) == (0, b"goes on\n")


@pytest.mark.parametrize(
    "variable",
    [
        "PYTHONPATH={}",
        "LD_LIBRARY_PATH={}",
        "LD_LIBRARY_PATH=/none;{}",
        "LD_LIBRARY_PATH=/none:",  # and the working directory
        "LD_PRELOAD=libnone.so {}/none.so",
        "LD_AUDIT=libnone.so:{}/none.so",
        "GCONV_PATH={}",
        "LOCPATH={}",
    ],
)
def test_it_changes_nothing_that_the_server_is_made_of(certificates: Path, variable: str) -> None:
    """Also where that is found by its environment: the next start would run what is put there."""
    with public_folder() as folder, public_folder() as other:
        library = other / "library"
        library.mkdir()
        for path in (other, library):
            os.chown(path, USER, USER)
        launcher = ["env", "-C", str(library), variable.format(library)]
        with (
            servers(folder, certificates, launcher) as start,
            start(PROFILE="").connect() as client,
        ):
            for command in (f"touch {library}/uvloop.py", f"mv {library} {other}/old"):
                job, output = client.run(command)
                assert job.exitCode != 0
                assert b"Read-only" in output or b"busy" in output


def test_nor_what_links_among_its_modules_lead_to(certificates: Path) -> None:
    """As an installer makes them that keeps what it has in a cache."""
    with public_folder() as folder, public_folder() as library, public_folder() as cache:
        installed = Path(uvloop.__file__).parent
        shutil.copytree(installed, cache / "uvloop", ignore=shutil.ignore_patterns("*.pyx", "*.c"))
        (library / "uvloop").symlink_to(cache / "uvloop")
        for path in cache.rglob("*"):
            os.chown(path, USER, USER)
        with (
            servers(folder, certificates, ["env", f"PYTHONPATH={library}"]) as start,
            start(PROFILE="").connect() as client,
        ):
            _, output = client.run(f"echo 1 >> {cache}/uvloop/__init__.py")
            assert b"Read-only" in output


def test_what_it_cannot_reach_does_not_keep_it_from_starting(certificates: Path) -> None:
    """As a key of its CA; nor does a link among its modules, to itself at last."""
    with public_folder() as folder, public_folder() as library, public_folder() as other:
        (other / "closed").mkdir(0o700)
        (other / "loop").symlink_to("loop")
        (library / "link").symlink_to(other / "loop")
        environ = [f"LD_LIBRARY_PATH={other}/closed/folder", f"PYTHONPATH={library}"]
        with servers(folder, certificates, ["env", *environ]) as start:
            key = folder / "certs" / "ca-key.pem"
            key.unlink()
            key.symlink_to(other / "closed" / "ca-key.pem")
            with start(PROFILE="").connect() as client:
                assert client.run("true")[0].exitCode == 0


def test_what_links_lead_to_is_the_servers_too(certificates: Path) -> None:
    """As where certificates are renewed by a program that keeps the older ones."""
    with (
        public_folder() as folder,
        public_folder() as other,
        servers(folder, certificates) as start,
    ):
        archive = other / "archive"
        archive.mkdir()
        for path in (other, archive):
            os.chown(path, USER, USER)
        key = folder / "certs" / "server-key.pem"
        kept = Path(shutil.move(key, archive))
        key.symlink_to(kept)
        log = other / "logs" / "audit.log"
        log.parent.mkdir()
        log.symlink_to(archive / "log")
        with start(PROFILE="", AUDIT_LOG=str(log)).connect() as client:
            assert client.run(f"cat {kept} {key}")[0].exitCode != 0
            assert client.run(f"cat {archive}/log || exit 7")[0].exitCode == 7
            assert client.run(f"mv {archive} {other}/old")[0].exitCode != 0


def test_also_where_its_user_cannot_list_them(certificates: Path) -> None:
    with (
        public_folder() as folder,
        public_folder() as other,
        servers(folder, certificates) as start,
    ):
        key = folder / "certs" / "server-key.pem"
        kept = Path(shutil.move(key, other))
        key.symlink_to(kept)
        os.chown(folder / "certs", 0, 0)
        (folder / "certs").chmod(0o711)
        with start(PROFILE="").connect() as client:
            assert client.run(f"cat {kept} || exit 7")[0].exitCode == 7


# $0: a user, whose / is: all that is in it is mounted.
OWN_ROOT = """
set -e
mount -t tmpfs -o mode=755,uid=$0 tmpfs /mnt
for each in /*; do
    if [ -h "$each" ]; then cp -d "$each" /mnt; elif [ -d "$each" ]; then mkdir "/mnt$each"; fi
    [ "$each" = /mnt ] || [ -h "$each" ] || [ ! -d "$each" ] || mount --rbind "$each" "/mnt$each"
done
cd /mnt
pivot_root . mnt
umount -l /mnt
exec "$@"
"""


def test_a_root_folder_that_is_its_users(certificates: Path) -> None:
    launcher = [*APART, "sh", "-c", OWN_ROOT, str(USER)]
    with (
        public_folder() as folder,
        servers(folder, certificates, launcher) as start,
        start(PROFILE="").connect() as client,
    ):
        assert client.run("touch /file || exit 7")[0].exitCode == 7
        assert client.run(f"ls {folder}/state || exit 7")[0].exitCode == 7
        assert client.run(f"cat {folder}/certs/server-key.pem || exit 7")[0].exitCode == 7


def test_it_leaves_no_program_by_which_others_have_its_user(certificates: Path) -> None:
    """Whose home, keys and state would be theirs."""
    with public_folder() as other, servers(other, certificates) as start, public_folder() as place:
        os.chown(place, USER, USER)
        with start(PROFILE="", PROFILES_ALLOWED="none").connect() as client:
            answers = []
            for profile in ("none", ""):
                job = client.create(
                    *PYTHON,
                    stdin=SET_USER_ID.encode(),
                    working_directory=str(place),
                    profile=profile,
                )
                lines = client.output(job.id).decode().splitlines()
                answers.append(dict(line.split() for line in lines))
                for path in place.iterdir():
                    path.unlink()
        assert set(answers[0].values()) == {"worked"}
        worked = {"plain": "worked", "without": "worked"}
        refused = dict.fromkeys(answers[0], "EPERM") | {"openat2": "ENOSYS"}
        assert answers[1] == refused | worked


def make_image(folder: Path, size_bytes: int, *mkfs: str) -> Path:
    """Of a file system, to be mounted; mkfs: what makes it."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run([*mkfs, image], check=True)
    return image


# $0: a folder for a file system, whose image is $1; $2: certificates. All is a user's.
OWN_SUBVOLUME = f"""
set -e
mount -o loop,user_subvol_rm_allowed "$1" "$0"
btrfs -q subvolume create "$0/own"
btrfs -q subvolume create "$0/own/state"
cp -r "$2" "$0/own/certs"
mkdir "$0/place"
chown -R {USER}:{USER} "$0/own" "$0/place"
shift 2
exec "$@"
"""

SNAPSHOTS = """
import fcntl, os, struct
own, place = os.open("own", os.O_RDONLY), os.open("place", os.O_RDONLY)
by_number = 1 << 4
for request, argument in {
    0x50009401: struct.pack("q4088s", own, b"first"),
    0x50009417: struct.pack("qQQ32s4040s", own, 0, 0, b"", b"second"),
    0x5000943F: struct.pack("qQQ32sQ4032x", 0, 0, by_number, b"", 257),
    0x4020BC10: bytes(32),  # these two are bcachefs'
    0x4030BC1D: bytes(48),
}.items():
    try:
        fcntl.ioctl(place, request, bytearray(argument))
    except OSError as error:
        print(error.strerror)
print(os.listdir("place"))
"""


def test_no_snapshot_shows_what_is_hidden(certificates: Path) -> None:
    """Nor is a subvolume removed that is."""
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("NOT TESTED: btrfs, as there is no program mkfs.btrfs")
    with public_folder() as folder, public_folder() as disk:
        image = make_image(folder, 128 << 20, "mkfs.btrfs", "-q")
        mount = ["unshare", "--mount", "mount", "-o", "loop", str(image), str(disk)]
        if subprocess.run(mount, check=False).returncode != 0:
            pytest.skip("NOT TESTED: btrfs, which cannot be mounted here")
        launcher = ["sh", "-c", OWN_SUBVOLUME, str(disk), str(image), str(certificates)]
        with servers(folder, certificates, launcher) as start:
            paths = {"STATE_DIR": f"{disk}/own/state", "CERT_PATH": f"{disk}/own/certs"}
            server = start(PROFILE="", **paths)
            with server.connect() as client:
                job = client.create(*PYTHON, stdin=SNAPSHOTS.encode(), working_directory=str(disk))
                refused = b"Operation not permitted\n" * 5
                assert client.output(job.id) == refused + b"[]\n"


# To a folder, that of a user's encrypted file system.
ADD_KEY = f"""
import fcntl, os, struct, sys
os.chown(sys.argv[1], {USER}, {USER})
os.chdir(sys.argv[1])
os.setuid({USER})
argument = bytearray(struct.pack("II32sII32s", 2, 0, b"", 64, 0, b"") + bytes(range(64)))
fcntl.ioctl(os.open(".", os.O_RDONLY), 0xC0506617, argument)
open("identifier", "wb").write(argument[8:24])
"""

# $0: a folder for a file system, whose image is $1; $2: what adds a key to it.
OWN_KEY = 'mount -o loop "$1" "$0" && python3 -c "$2" "$0" && shift 2 && exec "$@"'

KEYS = """
import fcntl, os, struct
key = struct.pack("II32s", 2, 0, open("identifier", "rb").read())
for request, argument in {
    0xC0506617: key + struct.pack("II32s64s", 64, 0, b"", b"another"),
    0xC0406618: key + bytes(24),
}.items():
    try:
        fcntl.ioctl(os.open(".", os.O_RDONLY), request, bytearray(argument))
    except OSError as error:
        print(error.strerror)
    else:
        print("worked")
"""


def test_the_key_of_a_folder_that_its_user_has_encrypted_is_not_taken_away(
    certificates: Path,
) -> None:
    """The server's own may be in there; whose key it is the kernel knows by the user alone."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("NOT TESTED: keys of file systems, as there is no program mkfs.ext4")
    with public_folder() as folder, public_folder() as disk:
        image = make_image(folder, 16 << 20, "mkfs.ext4", "-q", "-O", "encrypt")
        launcher = ["sh", "-c", OWN_KEY, str(disk), str(image), ADD_KEY]
        if subprocess.run([*APART, *launcher, "true"], check=False).returncode != 0:
            pytest.skip("NOT TESTED: keys of file systems, which cannot be had here")
        with (
            servers(folder, certificates, launcher) as start,
            start(PROFILE="").connect() as client,
        ):
            job = client.create(*PYTHON, stdin=KEYS.encode(), working_directory=str(disk))
            assert client.output(job.id) == b"Operation not permitted\n" * 2


# What it shares with the server, as the kernel counts by user


@pytest.mark.parametrize("processes", ["4000", "4000:8000"])
def test_it_leaves_others_some_of_what_the_user_may_have(
    certificates: Path, processes: str
) -> None:
    """jobinit has to start others, and to pass on their descriptors."""
    launcher = ["prlimit", f"--nproc={processes}"]
    with (
        public_folder() as folder,
        servers(folder, certificates, launcher) as start,
        start(PROFILE="", open_files=2000).connect() as client,
    ):
        job = client.create(*PYTHON, "descriptors", stdin=program({}))
        next(client.stream(job.id))
        _, output = client.run("grep -e files -e processes /proc/self/limits")
        assert [line.split()[-3:-1] for line in output.splitlines()] == [
            [b"3000", b"3000"],
            [b"1500", b"1500"],
        ]


def test_also_where_the_server_has_been_started_anew(start_other: StartServer) -> None:
    """The kernel counts processes by the user namespace that they are in."""
    namespaces = set()
    for _ in range(2):
        server = start_other(PROFILE="default", STOP_JOBS="no")
        with server.connect() as client:
            job = client.shell("readlink /proc/self/ns/user; sleep 1000")
            namespaces.add(next(client.stream(job.id)).payload)
        server.stop()
    assert len(namespaces) == 1


# How it ends


def test_all_of_it_ends_with_it(client: Client, server: Server) -> None:
    job = client.shell(
        "setsid sleep 1000 & trap 'exit 7' TERM; echo ready; while sleep 0.05; do :; done"
    )
    next(client.stream(job.id))
    client.stop(job.id)
    assert client.wait(job.id).exitCode == 7
    wait_until(lambda: not first_processes(server.jobinit_pid()))
    job, _ = client.run("kill -ABRT $$; sleep 60")
    assert job.signal == signal.SIGABRT


def test_a_program_that_is_none_fails_to_start(client: Client, folder: Path) -> None:
    program = folder / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    job = client.create(str(program))
    assert "exec" in client.wait(job.id).detail


# The server's start


@pytest.mark.parametrize("has_link", [False, True])
def test_nothing_is_put_in_the_place_of_what_its_user_could_change(
    start_other: StartServer, certificates: Path, has_link: bool
) -> None:
    """A folder that the user owns has no write bit, which it can set; or has a link, to which
    another one leads."""
    with public_folder() as place:
        own = place / "own"
        shutil.copytree(certificates, place / "certs" if has_link else own / "certs")
        own.mkdir(exist_ok=True)
        if has_link:
            (own / "certs").symlink_to(place / "certs")
            (place / "entry").symlink_to(own / "certs")
        for each in place.rglob("*"):
            os.chown(each, USER, USER, follow_symlinks=False)
        place.chmod(0o755)
        own.chmod(0o555)
        path = place / "entry" if has_link else own / "certs"
        server = start_other(PROFILE="default", CERT_PATH=str(path))
        with server.connect() as client:
            _, output = client.run(f"exec 2>&1; chmod 755 {own}; mv {own}/certs {own}/others")
        assert output.count(b"Read-only file system") + output.count(b"busy") == 2, output
        assert (own / "certs").exists()


def test_what_its_user_cannot_reach_is_left_out(certificates: Path) -> None:
    """As what is in root's home, where root's environment was kept."""
    with public_folder() as closed, public_folder() as folder:
        closed.chmod(0o700)
        launcher = ["env", f"PYTHONPATH={closed}/modules", f"LD_LIBRARY_PATH={closed}/lib"]
        with servers(folder, certificates, launcher) as start:
            (folder / "certs" / "older.pem").symlink_to(closed / "older.pem")
            (folder / "home").rmdir()
            (folder / "home").symlink_to(closed / "home")
            assert "jobinit is process" in start(PROFILE="default").log


@pytest.mark.parametrize("mode", [0o700, 0o744])
def test_a_log_that_its_user_cannot_reach_is_left_out(certificates: Path, mode: int) -> None:
    """As in a folder of root's, who has started the server."""
    with public_folder() as closed, public_folder() as folder:
        (closed / "logs").mkdir()
        (closed / "logs" / "output.1").touch()
        (closed / "logs").chmod(mode)
        closed.chmod(mode)
        launcher = ["sh", "-c", f'exec "$@" >{closed}/logs/output', "sh"]
        with servers(folder, certificates, launcher) as start:
            assert "jobinit is process" in start(PROFILE="default").log


def test_another_proc_is_in_no_folder_that_a_job_could_open_again(certificates: Path) -> None:
    """In the namespace of its user nobody has rights over what is of another group."""
    with public_folder() as place, public_folder() as folder:
        own = place / "own"
        (own / "proc").mkdir(parents=True)
        os.chown(own, USER, GROUP)
        own.chmod(0)
        launcher = ["sh", "-c", f'mount -t proc proc {own}/proc && exec "$@"', "sh"]
        with servers(folder, certificates, launcher) as start:
            for profile in ("", "default"):
                with pytest.raises(AssertionError, match="a folder of this user's is closed"):
                    start(PROFILE=profile)
            own.chmod(0o700)
            with start(PROFILE="").connect() as client:
                assert b"Permission denied" in client.run(f"ls {own}/proc")[1]


def test_nor_by_way_of_another_mount(certificates: Path) -> None:
    """Of a folder between the outermost one that the user could change, and what is hidden."""
    with public_folder() as place, public_folder() as again, public_folder() as folder:
        own = place / "own"
        shutil.copytree(certificates, own / "folder" / "certs")
        for each in place.rglob("*"):
            os.chown(each, USER, USER)
        launcher = ["sh", "-c", f'mount --bind {own} {again} && exec "$@"', "sh"]
        place.chmod(0o755)
        os.chown(place, USER, USER)
        with (
            servers(folder, certificates, launcher) as start,
            start(PROFILE="", CERT_PATH=str(own / "folder" / "certs")).connect() as client,
        ):
            _, output = client.run(f"mv {again}/folder {again}/old")
            assert b"Read-only" in output


def test_the_next_server_takes_it_over(start_other: StartServer) -> None:
    server = start_other(PROFILE="default", STOP_JOBS="no")
    with server.connect() as client:
        job = client.shell("trap 'exit 5' TERM; echo ready; while sleep 0.05; do :; done")
        next(client.stream(job.id))
    server.stop(signal.SIGKILL)
    server = start_other(PROFILE="default")
    with server.connect() as client:
        assert client.run("echo new")[1] == b"new\n"
        client.stop(job.id)
        assert client.wait(job.id).exitCode == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"root": "/usr"},
        {"read_only": True},
        {"binds": [pb.Bind(source="/usr", destination="/mnt")]},
    ],
)
def test_files_are_not_arranged(start_other: StartServer, fields: dict[str, Any]) -> None:
    server = start_other(PROFILE="default", ROOTS_ALLOWED="/usr", BINDS_ALLOWED="/usr")
    with server.connect() as client, pytest.raises(grpc.RpcError) as caught:
        client.call("CreateJob", pb.CreateJobReq(command="true", **fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the server is not root" in (caught.value.details() or "")
    for name in ("ROOTS_ALLOWED", "BINDS_ALLOWED"):
        assert f"JOB_WORKER_{name} has no effect: the server is not root" in server.log
    assert "JOB_USER" not in server.log


def test_where_the_kernel_allows_none_it_says_so(certificates: Path) -> None:
    """As to who is in a chroot."""
    script = 'mkdir -p "$0" && mount --rbind / "$0" && exec chroot "$0" "$@"'
    with public_folder() as folder:
        launcher = ["sh", "-c", script, f"{folder}/root"]
        with servers(folder, certificates, launcher) as start:
            server = start(PROFILE="")
            assert "jobs are not separated from the machine: the server is not root" in server.log
            with server.connect() as client:
                info = client.info()
                assert (info.default_profile, list(info.profiles)) == ("none", ["none"])
                assert "make a user namespace" in info.isolation_problem
                assert client.run("id -u")[1] == f"{USER}\n".encode()
            server.stop()
            with pytest.raises(AssertionError, match="max_user_namespaces"):
                start(PROFILE="default")


def test_it_does_not_pretend_to_be_strict(start_other: StartServer) -> None:
    with pytest.raises(AssertionError, match="has no other users for its jobs"):
        start_other(PROFILE="strict", STRICT_UIDS="3000000-3000009")


# Attacks


@pytest.fixture(scope="module")
def stage(certificates: Path) -> Iterator[Stage]:
    with public_folder() as folder, servers(folder, certificates, APART) as start:
        server = start(**SETTINGS)
        with server.connect() as client:
            stage = Stage(server, client, folder, is_own_kernel=False)
            with stage.set_up():
                yield stage


@pytest.mark.parametrize("area", AREA_NAMES)
def test_attacks_fail(stage: Stage, area: str) -> None:
    found = [each for each in got_through(stage, area, "default") if each not in HARMLESS]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["daemons", "zombies", "signals upwards", "names left behind"])
def test_nothing_is_left_of(stage: Stage, name: str) -> None:
    with stage.leaving_nothing() as mark:
        job = carry(stage, name, mark, "default", is_stopped=False)
    assert job.exitCode == 0
