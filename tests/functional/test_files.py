"""What a job has as its root, what is bound for it, and what it can write to."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only a root server confines its jobs")

PROGRAMS = ("sh", "cat", "ls", "readlink", "touch", "id", "mkdir")


@dataclass(frozen=True, slots=True)
class Place:
    """A server, and folders of this machine that its jobs may have, and may not have."""

    server: Server
    root: Path  # of a small system
    data: Path  # which all may write to
    shared: Path  # to be had read-only
    private: Path  # not to be had


@pytest.fixture(scope="module")
def place(certificates: Path) -> Iterator[Place]:
    # Not below /tmp, which jobs do not see.
    with tempfile.TemporaryDirectory(prefix="jobworker-files-", dir="/srv") as name:
        folder = Path(name)
        folder.chmod(0o755)
        paths = [folder / each for each in ("root", "data", "shared", "private")]
        root, data, shared, private = paths
        for path in paths:
            path.mkdir()
            (path / "file").write_text(f"in {path.name}\n")
        data.chmod(0o1777)
        make_root(root)
        (folder / "link-to-root").symlink_to(root)
        # The state folder is below what may be bound.
        server = Server(
            data,
            certificates,
            PROFILE="default",
            PROFILES_ALLOWED="none,strict",
            STRICT_UIDS="3000000-3000009",
            ROOTS_ALLOWED=f"{folder}/link-to-root,{folder}/roots",
            BINDS_ALLOWED=f"{data},{shared}:ro,/etc:ro,{folder}/file-of-its-own",
        )
        (folder / "file-of-its-own").write_text("a file\n")
        (folder / "roots").mkdir()
        yield Place(server, root, data, shared, private)
        assert server.stop() == 0


def make_root(root: Path) -> None:
    """With a few programs, the libraries that they need, and a link as /bin is on many systems."""
    for name in ("usr/bin", "proc", "dev", "tmp", "var/tmp", "etc", "mnt"):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("/usr/bin")
    for program in PROGRAMS:
        path = shutil.which(program)
        assert path
        shutil.copy(path, root / "usr/bin" / program)
        libraries = subprocess.run(["ldd", path], capture_output=True, text=True, check=True)
        for library in re.findall(r"/\S+", libraries.stdout):
            copy = root / library.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, copy)


@pytest.fixture
def client(place: Place) -> Iterator[Client]:
    with place.server.connect() as client:
        yield client


def bind(source: Path | str, destination: str, *, read_only: bool = False) -> pb.Bind:
    return pb.Bind(source=str(source), destination=destination, read_only=read_only)


def refusal(client: Client, **fields: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("CreateJob", pb.CreateJobReq(**({"command": "true"} | fields)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details() or ""


# Binds


@pytest.mark.parametrize("profile", ["default", "strict"])
def test_what_is_bound_is_there_too(client: Client, place: Place, profile: str) -> None:
    script = "cat /mnt/file /tmp/a/b/file; echo x > /mnt/made; echo x > /tmp/a/b/made; ls /tmp/a"
    binds = [bind(place.data, "/mnt"), bind(place.shared, "/tmp/a/b", read_only=True)]
    job, output = client.run(script, profile=profile, binds=binds, merge_output=True)
    lines = output.decode().splitlines()
    assert lines[:2] == ["in data", "in shared"]
    assert "Read-only file system" in output.decode()
    assert lines[-1] == "b"
    assert (place.data / "made").read_text() == "x\n"
    (place.data / "made").unlink()
    assert not (place.shared / "made").exists()
    assert list(job.binds) == binds
    assert list(client.get(job.id).binds) == binds


def test_a_file_can_be_bound(client: Client, place: Place) -> None:
    source = place.root.parent / "file-of-its-own"
    binds = [bind(source, "/etc/hostname"), bind(source, "/tmp/new")]
    _, output = client.run("cat /etc/hostname /tmp/new", binds=binds)
    assert output == b"a file\na file\n"


def test_binds_are_put_in_their_order(client: Client, place: Place) -> None:
    binds = [bind(place.shared, "/mnt", read_only=True), bind(place.data, "/mnt")]
    assert client.run("cat /mnt/file", binds=binds)[1] == b"in data\n"


def test_no_mount_point_is_made_in_what_is_bound(client: Client, place: Place) -> None:
    binds = [bind(place.data, "/tmp/a"), bind(place.data, "/tmp/a/b")]
    job, _ = client.run("true", binds=binds)
    assert (job.status, job.failed_step) == ("FAILED", "destination of a bind")
    assert "binds[1]" in job.detail
    assert not (place.data / "b").exists()


def test_set_user_id_has_no_effect_in_them(client: Client, place: Place) -> None:
    job = client.create("cat", "/proc/self/mountinfo", binds=[bind(place.data, "/mnt")])
    (line,) = (line for line in client.output(job.id).decode().splitlines() if " /mnt " in line)
    assert {"nosuid", "nodev", "rw"} <= set(line.split()[5].split(","))


def test_a_bind_that_fails_writes_one_line_into_the_log(client: Client, place: Place) -> None:
    """Whatever its path, which may look as a line of its own. Of it jobinit makes a file first."""
    forged = "/tmp/a\n2001-02-03 04:05:06,789 INFO jobworker.daemon: ready"
    binds = [bind(f"{place.data}/file", forged), bind(place.data, f"{forged}/b")]
    job, _ = client.run("true", binds=binds)
    assert job.failed_step == "destination of a bind"
    assert job.detail.isprintable()
    assert "\n2001-" not in place.server.log


def test_what_is_hidden_stays_so_in_a_bind_of_its_parent(client: Client, place: Place) -> None:
    script = "exec 2>&1; ls /mnt/state; cat /mnt/state/jobs.db; stat -c %a:%i /mnt/state"
    _, output = client.run(script, binds=[bind(place.data, "/mnt")])
    assert output.count(b"Permission denied") == 2
    # Another folder is there.
    mode, _, inode = output.splitlines()[-1].decode().partition(":")
    assert mode == "0"
    assert int(inode) != place.server.state.stat().st_ino


def test_a_command_is_looked_up_in_what_is_bound(client: Client, place: Place) -> None:
    program = place.data / "program"
    program.write_text("#!/bin/sh\necho $0\n")
    program.chmod(0o755)
    (place.data / "linked").symlink_to("/mnt/program")
    binds = [bind(place.data, "/mnt")]
    for command, environment in (("/mnt/linked", {}), ("linked", {"PATH": "/usr/bin:/mnt"})):
        job = client.create(command, binds=binds, environment=environment)
        assert client.output(job.id) == b"/mnt/linked\n"
        assert job.command == "/mnt/linked"
    (place.data / "linked").unlink()
    problem = refusal(client, command="/mnt/none", binds=binds)
    assert "does not exist" in problem
    job = client.create("pwd", binds=binds, working_directory="/mnt")
    assert client.output(job.id) == b"/mnt\n"


@pytest.mark.parametrize(
    ("source", "destination", "problem"),
    [
        ("{private}", "/mnt", "BINDS_ALLOWED"),
        ("/", "/mnt", "BINDS_ALLOWED"),
        ("/proc", "/mnt", "BINDS_ALLOWED"),
        ("{data}x", "/mnt", "BINDS_ALLOWED"),
        ("{data}/../private", "/mnt", r"`\.\.`"),
        ("data", "/mnt", "absolute"),
        ("{shared}", "/mnt", "read-only"),
        ("{data}/none", "/mnt", "No such file"),
        ("{data}/state", "/mnt", "does not show"),
        ("{data}/state/jobs.db", "/mnt", "does not show"),
        ("{data}/closed/file", "/mnt", "Permission denied"),
        ("{data}/out", "/mnt", "symbolic link"),
        ("{data}/out/file", "/mnt", "symbolic link"),
        # Nor is it told which names there are where a link leads, as to the server's descriptors.
        ("{data}/out/none", "/mnt", "symbolic link"),
        ("{data}", "/", "is /"),
        ("{data}", "/proc", "its own"),
        ("{data}", "/dev/shm", "its own"),
        ("{data}", "/mnt/../proc", r"`\.\.`"),
        ("{data}", "/none", "No such file"),
        ("{data}", "/etc/passwd", "not both"),
        ("{data}/file", "/mnt", "not both"),
        ("{data}", "{data}/out", "symbolic link"),
        ("{data}", "{data}/state", "does not show"),
    ],
)
def test_what_is_not_bound(
    client: Client, place: Place, source: str, destination: str, problem: str
) -> None:
    closed = place.data / "closed"
    closed.mkdir(mode=0o700, exist_ok=True)
    (closed / "file").touch()
    if not (place.data / "out").is_symlink():
        (place.data / "out").symlink_to(place.private)
    paths = {"private": place.private, "data": place.data, "shared": place.shared}
    asked = bind(source.format(**paths), destination.format(**paths))
    found = refusal(client, binds=[asked])
    assert re.search(problem, found) and found.startswith("binds[0]"), found


def test_a_source_that_becomes_a_link_is_not_followed(client: Client, place: Place) -> None:
    """Between the server's look and the mount: it is swapped all the time."""
    swapped = place.data / "swapping" / "source"
    swapped.mkdir(parents=True)
    (swapped / "file").write_text("harmless\n")
    command = ["python3", "-c", SWAP, str(swapped), str(place.private)]
    ends = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as swap, killing(swap):
        assert swap.stdout and swap.stdout.readline()
        for _ in range(50):
            try:
                job, output = client.run("cat /mnt/file", binds=[bind(swapped, "/mnt")])
            except grpc.RpcError:
                continue
            assert output in {b"harmless\n", b""}
            ends.add((job.status, job.failed_step))
    assert ends <= {("COMPLETED", ""), ("FAILED", "source of a bind")}


@contextlib.contextmanager
def killing(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


SWAP = """
import os, sys
name, target = sys.argv[1:]
link, folder = name + "-link", name + "-folder"
os.symlink(target, link)
print("ready", flush=True)
while True:
    os.rename(name, folder); os.rename(link, name)
    os.rename(name, link); os.rename(folder, name)
"""


# Read-only


def test_read_only_files(client: Client, place: Place) -> None:
    places = f"/tmp /var/tmp /dev/shm /mnt {place.data} /var/lib"
    script = f"for d in {places}; do touch $d/x 2>/dev/null && echo $d; done; rm -f /mnt/x"
    job, output = client.run(script, read_only=True, binds=[bind(place.data, "/mnt")])
    assert output.decode().split() == ["/tmp", "/var/tmp", "/dev/shm", "/mnt"]
    assert job.read_only
    assert not client.run("true")[0].read_only
    assert client.run("true", profile="strict")[0].read_only


# A root


@pytest.mark.parametrize("profile", ["default", "strict"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_root(client: Client, place: Place, profile: str, *, read_only: bool) -> None:
    script = "ls /; cat /file; ls /dev /tmp /var/tmp; readlink /proc/self; id -u; cat /etc/passwd"
    root = f"{place.root.parent}/link-to-root"
    fields: dict[str, Any] = {"root": root, "read_only": read_only, "profile": profile}
    job = client.create("sh", "-c", script, **fields)
    output = client.output(job.id).decode()
    names, _, rest = output.partition("in root\n")
    assert set(names.split()) >= {"bin", "dev", "file", "proc", "tmp", "usr"}
    assert "srv" not in names.split() and "home" not in names.split()
    assert "zero" in rest and "No such file" in rest
    assert job.command in {"/usr/bin/sh", "/bin/sh"}
    assert (job.root, job.read_only) == (root, read_only or profile == "strict")
    assert client.get(job.id).root == root


def test_the_old_root_is_gone(client: Client, place: Place) -> None:
    fields: dict[str, Any] = {"root": str(place.root)}
    job = client.create("cat", "/proc/self/mountinfo", **fields)
    points = {line.split()[4] for line in client.output(job.id).decode().splitlines()}
    assert {"/", "/proc", "/dev", "/tmp", "/var/tmp", "/dev/shm", "/dev/pts"} <= points
    assert not any(point.startswith(("/sys", "/srv", "/run")) for point in points)
    script = "ls /../srv; ls /proc/1/root/srv; ls /proc/1/root; cat /proc/keys; "
    script += "ls /dev/.hidden/folder"
    job = client.create("sh", "-c", script, **fields)
    output = client.output(job.id).decode()
    assert "private" not in output
    assert output.count("No such file") + output.count("Permission denied") == 5


def test_binds_in_a_root(client: Client, place: Place) -> None:
    binds = [bind(place.data, "/mnt"), bind(place.shared, "/tmp/new", read_only=True)]
    fields: dict[str, Any] = {"root": str(place.root), "read_only": True, "binds": binds}
    script = "cat /mnt/file /tmp/new/file; touch /mnt/y && echo made; touch /etc/x /tmp/new/x"
    job = client.create("sh", "-c", script, **fields)
    output = client.output(job.id).decode()
    assert "in data\nin shared\nmade\n" in output
    assert output.count("Read-only file system") == 2
    (place.data / "y").unlink()


def test_a_command_is_looked_up_in_the_root(client: Client, place: Place) -> None:
    fields: dict[str, Any] = {"root": str(place.root)}
    assert "not found" in refusal(client, command="python3", **fields)
    assert "does not exist" in refusal(client, command="/usr/bin/env", **fields)
    assert "not executable" in refusal(client, command="/file", **fields)
    assert refusal(client, command="ls", working_directory="/srv", **fields)
    job = client.create("./ls", working_directory="/bin", **fields)
    assert b"readlink" in client.output(job.id)


@pytest.mark.parametrize("name", ["proc", "dev", "tmp", "var/tmp"])
@pytest.mark.parametrize("target", ["/etc", "../../../../..", "{private}", "/proc/self/root"])
def test_a_root_whose_folders_lead_elsewhere(
    client: Client, place: Place, name: str, target: str
) -> None:
    """Nothing is mounted through a link, also where that stays within the root."""
    root = place.root.parent / "roots" / "hostile"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(place.root, root, symlinks=True)
    (root / name).rmdir()
    (root / name).symlink_to(target.format(private=place.private))
    before = Path("/proc/self/mountinfo").read_text()
    job = client.create("ls", "/", root=str(root))
    assert (job.status, job.failed_step, job.failed_errno) == ("FAILED", "root", 40)
    assert Path("/proc/self/mountinfo").read_text() == before


def test_a_root_without_folders_for_what_is_the_jobs_own(client: Client, place: Place) -> None:
    root = place.root.parent / "roots" / "bare"
    shutil.copytree(place.root, root, symlinks=True)
    for name in ("proc", "dev", "tmp", "var/tmp"):
        (root / name).rmdir()
    job = client.create("ls", "/", root=str(root))
    assert set(client.output(job.id).decode().split()) >= {"usr", "bin"}
    assert "is not there" in refusal(
        client, command="ls", root=str(root), binds=[bind(place.data, "/tmp/a")]
    )


@pytest.mark.parametrize(
    ("root", "problem"),
    [
        ("{private}", "ROOTS_ALLOWED"),
        ("{root}/../private", r"`\.\."),
        ("root", "absolute"),
        ("{root}/none", "No such file"),
        ("{root}/file", "not a directory"),
        ("{root}/bin", "symbolic link"),
        ("/proc/1/root", "ROOTS_ALLOWED"),
    ],
)
def test_what_is_no_root(client: Client, place: Place, root: str, problem: str) -> None:
    found = refusal(client, root=root.format(private=place.private, root=place.root))
    assert re.search(problem, found) and found.startswith("root"), found


@pytest.mark.parametrize("name", ["root", "read_only", "binds"])
def test_profile_none_has_none_of_it(client: Client, place: Place, name: str) -> None:
    value = {"root": str(place.root), "read_only": True, "binds": [bind(place.data, "/mnt")]}[name]
    assert refusal(client, profile="none", **{name: value}).startswith(f"{name}: profile none")


def test_the_server_tells_what_is_allowed(client: Client, place: Place) -> None:
    info = client.info()
    assert f"{place.root.parent}/roots" in info.roots_allowed
    assert f"{place.shared}:ro" in info.binds_allowed


def test_what_is_allowed_and_not_there_is_told_at_the_start(place: Place) -> None:
    folder = place.root.parent
    told = re.findall(r"allowed (\S+) as root or bind, but it is not there", place.server.log)
    assert told == [f"{folder}/roots", f"{folder}/file-of-its-own"]
