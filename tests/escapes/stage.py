"""The stage for attacks: a server whose jobs they are, another job to be their victim, and all
else that they may be after. Used on the machine, and in a kernel of its own.

Attacks reach a job as a program on its standard input, so that they need no file anywhere. What
they are about is known to them: paths, process ids and names, as to a well-informed attacker.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
import stat
import struct
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

import jobworker
from escapes.__main__ import AREAS
from escapes.attack import ATTACKS, Attack
from functional.server import Client, Server
from jobworker.engine.isolation import Profile
from jobworker.pb import job_worker_pb2 as pb

AREA_NAMES = [area.__name__.rpartition(".")[2] for area in AREAS]
SOURCES = Path(__file__).parent
PYTHON = ["python3", "-I", "/proc/self/fd/0"]
WAIT_SECONDS = 20
ATTACK_SECONDS = 30
SHM_KEY = 0x6A6F6277
SHARED_PLACES = ["/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock"]
# All that a server of these tests needs to be told.
SETTINGS: dict[str, Any] = {
    "STRICT_UIDS": "3000000-3000999",
    "PROFILE": "default",
    "PROFILES_ALLOWED": ",".join(Profile),
    "USERS_ALLOWED": "nobody",
    "LINGER": "100ms",
}

BOUND = "/mnt"
SYSTEM = ("usr", "etc", "bin", "sbin", "lib", "lib64")

# Another job, and what it leaves where others could find it.
VICTIM = """
import ctypes, os, signal, sys
for folder in ("/tmp", "/dev/shm", "/var/tmp"):
    try:
        with open(f"{folder}/{os.environ['LEFT']}", "w") as file:
            file.write("of another job")
    except OSError:
        pass
ctypes.CDLL(None).shmget(int(os.environ["SHM_KEY"]), 4096, 0o1666)
try:
    terminal = os.ttyname(os.openpty()[1])
except OSError:
    terminal = "/dev/pts/0"
print(terminal, flush=True)
signal.pause()
"""


@dataclass(frozen=True, slots=True)
class Role:
    """As what the attacks are made."""

    profile: str
    user: str = ""  # empty: that of the profile
    is_arranged: bool = False  # with a root of its own, and binds


# Where nothing defends: what is held then, only the kernel's own rules hold.
UNDEFENDED = {"root": Role("none"), "user": Role("none", "nobody")}


@dataclass(frozen=True, slots=True)
class Verdict:
    word: str  # worked, refused, missing, hung or broken
    reason: str


class Stage:
    """A server and what is around it, to be attacked by its own jobs."""

    def __init__(
        self, server: Server, client: Client, folder: Path, *, is_own_kernel: bool
    ) -> None:
        """folder: empty, and one that all may enter. is_own_kernel: also what would harm."""
        self.server = server
        self.client = client
        self._folder = folder
        self._is_own_kernel = is_own_kernel
        self._verdicts: dict[Role, dict[str, Verdict]] = {}
        self._failed: set[Role] = set()
        self._surroundings: dict[str, Any] = {}

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            self._surroundings = {
                **self._of_the_server(),
                **_programs(self._folder),
                **_sockets(stack, self._folder),
                "disk": _disk(),
                "is_own_kernel": self._is_own_kernel,
            }
            yield

    def verdicts(self, role: Role) -> dict[str, Verdict]:
        """Of all attacks, each made once by a job in that role."""
        if role not in self._verdicts:
            assert role not in self._failed, "failed before"
            self._failed.add(role)
            self._verdicts[role] = self._attack(role)
        return self._verdicts[role]

    def _attack(self, role: Role) -> dict[str, Verdict]:
        with self._victim(role) as victim:
            before = self.state(victim["victim"])
            names = [each.name for each in self._made_as(role)]
            is_defended = role not in UNDEFENDED.values()
            scene = self._surroundings | victim | {"attacks": names, "is_defended": is_defended}
            scene |= {"bound": BOUND if role.is_arranged else str(self._folder)}
            scene |= {"fixed": f"{BOUND}/writable" if role.is_arranged else str(self._folder)}
            arranged = _arranged(self._folder) if role.is_arranged else {}
            job = self.client.create(
                *PYTHON, stdin=program(scene), profile=role.profile, user=role.user, **arranged
            )
            output = self._output(job.id)
            assert self.client.get(job.id).status == "COMPLETED", output
            after = self.state(victim["victim"])
            changed = {name: after.get(name) for name in before if after.get(name) != before[name]}
            assert not changed, output
        lines = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
        found = {name: Verdict(*words) for name, *words in lines}
        assert list(found) == names, output
        return found

    @contextlib.contextmanager
    def leaving_nothing(self) -> Iterator[str]:
        """Around a job that has the yielded mark in its environment, and leaves behind what it
        can: afterwards nothing of it is on the machine."""
        mark = f"mark-{secrets.token_hex(4)}"
        before = self._inventory()
        yield mark
        wait_until(lambda: not marked(mark))
        wait_until(lambda: self._inventory() == before)
        places = [Path(place, mark) for place in SHARED_PLACES]
        left = [path for path in places if path.exists()]
        for path in left:
            path.unlink()
        assert not left

    def _output(self, job_id: str) -> str:
        """Of a job that is stopped if it takes too long."""
        output = b""
        try:
            for chunk in self.client.stream(job_id, timeout=ATTACK_SECONDS):
                output += chunk.payload
        except grpc.RpcError as error:
            self.client.stop(job_id, grace_milliseconds=0)
            last = output.decode().splitlines()[-1:]
            raise AssertionError(f"{error}; the last verdict was {last}") from error
        return output.decode()

    def _inventory(self) -> dict[str, Any]:
        jobinit = self._surroundings["jobinit"]
        return {
            "children of jobinit": _children(jobinit),
            "children of the server": _children(self._surroundings["server"]),
            "descriptors of jobinit": len(os.listdir(f"/proc/{jobinit}/fd")),
            "cgroups": sorted(Path(self._surroundings["cgroup"]).rglob("*/")),
            "mounts": Path("/proc/self/mountinfo").read_text(),
            "mounts of the server": Path(f"/proc/{jobinit}/mountinfo").read_text(),
            **{name: Path(f"/proc/sysvipc/{name}").read_text() for name in ("shm", "sem", "msg")},
        }

    def _made_as(self, role: Role) -> list[Attack]:
        if role in UNDEFENDED.values():
            return [each for each in ATTACKS.values() if self.is_to_be_shown(each)]
        return [each for each in ATTACKS.values() if self._is_own_kernel or not each.is_harmful]

    def is_to_be_shown(self, each: Attack) -> bool:
        """On the machine all but those that harm. Elsewhere only what another kernel may add:
        processes take long to make there."""
        is_of_the_kernel = each.name.startswith(("kernel: ", "cgroups: ")) or each.needs >= 0
        return not each.is_harmful and (is_of_the_kernel or not self._is_own_kernel)

    @contextlib.contextmanager
    def _victim(self, role: Role) -> Iterator[dict[str, Any]]:
        secret, left = secrets.token_hex(8), f"left-{secrets.token_hex(4)}"
        job = self.client.create(
            *("python3", "-I", "-"),
            stdin=VICTIM.encode(),
            profile=role.profile,
            user=role.user,
            environment={"SECRET": secret, "LEFT": left, "SHM_KEY": str(SHM_KEY)},
        )
        terminal = next(self.client.stream(job.id)).payload.decode().strip()
        cgroup = Path(self.client.info().cgroup) / f"job-{job.id}"
        try:
            yield {
                "victim": _with_environment(cgroup, secret),
                "victims_cgroup": str(cgroup),
                "victims_terminal": terminal,
                "secret": secret,
                "left_by_victim": left,
                "shm_key": SHM_KEY,
                "output": str(next((self.server.state / "output").glob(f"{job.id}.*.log"))),
            }
        finally:
            self.client.stop(job.id, grace_milliseconds=0)
            for folder in ("/tmp", "/dev/shm", "/var/tmp"):
                Path(folder, left).unlink(missing_ok=True)

    def _of_the_server(self) -> dict[str, Any]:
        package = Path(jobworker.__path__[0])
        (extension,) = package.glob("_fastio*.so")
        return {
            "server": self.server.process.pid,
            "jobinit": self.server.jobinit_pid(),
            "servers_secret": "do not pass on",
            "port": self.server.port,
            "cgroup": self.client.info().cgroup,
            "root_cgroup": str(Path(self.client.info().cgroup).parent),
            "state": str(self.server.state),
            "inodes": [os.stat(path).st_ino for path in (self.server.state, self.server.certs)],
            "database": str(self.server.state / "jobs.db"),
            "log": str(self.server.state.parent / "server.log"),
            "jobinit_socket": str(next(self.server.state.glob("jobinit-*.sock"))),
            "certs": str(self.server.certs),
            "key": str(self.server.certs / "server-key.pem"),
            "ca_key": str(self.server.certs / "ca-key.pem"),
            "package": str(package),
            "source": str(package / "__init__.py"),
            "extension": str(extension),
            "jobinit_program": str(package / "_bin" / "jobinit"),
            "interpreter": os.path.realpath(sys.executable),
            "site_packages": sysconfig.get_path("purelib"),
            "bin": str(Path(sys.executable).parent),
        }

    def places(self) -> dict[str, str]:
        """Of the server: its folders, a link to one of them, and a program in it."""
        link = self._folder / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(self.server.state)
        program = self.server.state / "program"
        shutil.copy("/bin/true", program)
        about = {name: self._surroundings[name] for name in ("state", "certs")}
        return about | {"link": str(link), "program": str(program)}

    def state(self, victim: int) -> dict[str, Any]:
        """What must be the same after the attacks, as it is seen from outside."""
        about = self._surroundings
        state: dict[str, Any] = {}
        for pid in (about["server"], about["jobinit"], victim):
            state |= {f"process {pid}: {name}": value for name, value in _process(pid).items()}
        for path in map(Path, [*UNCHANGED, about["key"], about["ca_key"], *_files_of(about)]):
            if path.is_file():
                state[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        state["mounts of the server"] = Path(f"/proc/{about['server']}/mountinfo").read_text()
        state["mounts"] = Path("/proc/self/mountinfo").read_text()
        state["jobs"] = sorted(Path(about["cgroup"]).glob("job-*"))
        return state


# Files and settings of the machine that the attacks try to change, and nobody else does meanwhile.
UNCHANGED = [
    *("/etc/passwd", "/etc/shadow", "/etc/group", "/etc/ld.so.preload", "/etc/crontab"),
    *(f"/proc/sys/kernel/{name}" for name in ("core_pattern", "modprobe", "hostname", "sysrq")),
    *(f"/proc/sys/vm/{name}" for name in ("overcommit_memory", "panic_on_oom")),
]


def _files_of(about: dict[str, Any]) -> list[Path]:
    return [*Path(about["package"]).rglob("*.py"), Path(about["extension"])]


def _process(pid: int) -> dict[str, Any]:
    if not Path(f"/proc/{pid}").exists():
        return {"start": "it is gone"}
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    start_time = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return {
        "start": start_time,
        "stopped": fields["State"][0] in "Tt",
        "tracer": fields["TracerPid"],
        "oom score": Path(f"/proc/{pid}/oom_score_adj").read_text(),
        "priority": os.getpriority(os.PRIO_PROCESS, pid),
        "processors": os.sched_getaffinity(pid),
        "limits": Path(f"/proc/{pid}/limits").read_text(),
        "cgroup": Path(f"/proc/{pid}/cgroup").read_text(),
    }


def program(scene: dict[str, Any]) -> bytes:
    """The attacks, and the burdens, as one file, that Python runs without unpacking it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("escapes")  # zipimport finds no package without
        for name in ("attack", "burdens", *AREA_NAMES):
            archive.writestr(f"escapes/{name}.py", (SOURCES / f"{name}.py").read_text())
        archive.writestr("__main__.py", (SOURCES / "__main__.py").read_text())
        archive.writestr("scene.json", json.dumps(scene))
    return file.getvalue()


def wait_until(condition: Callable[[], bool]) -> None:
    """For what no event tells."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """The processes with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _children(pid: int) -> list[int]:
    """Zombies too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return sorted(found)


def _with_environment(cgroup: Path, secret: str) -> int:
    """The process of that job itself, by the machine's number; not its PID 1."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        for pid in (cgroup / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                if f"SECRET={secret}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    return int(pid)
    raise AssertionError("the other job did not start")


def _programs(folder: Path) -> dict[str, Any]:
    """That would give their rights to those who run them."""
    names = {"setuid_program": 0o4755, "setgid_program": 0o2755, "privileged_program": 0o755}
    for name, mode in names.items():
        source = "/usr/bin/cat" if name == "privileged_program" else "/usr/bin/id"
        shutil.copy(source, folder / name)
        (folder / name).chmod(mode)
    version_2_effective, cap_dac_read_search = 0x02000001, 1 << 2
    capabilities = struct.pack("<IIIII", version_2_effective, cap_dac_read_search, 0, 0, 0)
    os.setxattr(folder / "privileged_program", "security.capability", capabilities)
    writable = folder / "writable"
    writable.mkdir()
    writable.chmod(0o1777)
    paths = {name: str(folder / name) for name in names}
    return {**paths, "writable": str(writable), "shared": str(folder)}


def may_be_arranged(folder: Path) -> dict[str, Any]:
    """Settings that allow what `_arranged` asks for."""
    return {
        "ROOTS_ALLOWED": str(folder),
        "BINDS_ALLOWED": f"{folder}:ro," + ",".join(f"/{name}:ro" for name in SYSTEM),
    }


def _arranged(folder: Path) -> dict[str, Any]:
    """A root in which the system is bound; and, twice, the folder that the server's is in."""
    root = folder / "root"
    binds = [pb.Bind(source=str(folder), destination=place) for place in (BOUND, str(folder))]
    for name in ("proc", "dev", "tmp", "var/tmp", BOUND[1:], str(folder)[1:]):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in SYSTEM:
        own, copy = Path("/", name), root / name
        if own.is_symlink() and not copy.is_symlink():
            copy.symlink_to(own.readlink())
        elif own.is_dir() and not own.is_symlink():
            copy.mkdir(exist_ok=True)
            binds.append(pb.Bind(source=str(own), destination=str(own)))
    for bind in binds:
        bind.read_only = True
    return {"root": str(root), "binds": binds}


def _sockets(stack: contextlib.ExitStack, folder: Path) -> dict[str, Any]:
    """Of daemons that let all in."""
    name = folder.name
    in_tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobworker-", dir="/tmp")))
    in_tmp.chmod(0o755)
    paths = {"socket_in_run": f"/run/{name}.sock", "socket_in_tmp": str(in_tmp / "daemon.sock")}
    for path in paths.values():
        _listen(stack, path)
        os.chmod(path, 0o666)
        stack.callback(os.unlink, path)
    _listen(stack, f"\0{name}")
    tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return {**paths, "abstract_socket": name, "tcp_port": tcp.getsockname()[1]}


def _listen(stack: contextlib.ExitStack, address: str) -> None:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(address)
    listener.listen(100)


def _disk() -> tuple[int, int]:
    """One with ext4 that is mounted: that of /, or of the kernel's own /disk."""
    for path in ("/", "/disk"):
        device = os.stat(path).st_dev
        if os.major(device):
            return os.major(device), os.minor(device)
    block = next(path for path in Path("/dev").iterdir() if stat.S_ISBLK(path.stat().st_mode))
    device = block.stat().st_rdev
    return os.major(device), os.minor(device)


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """One that all may enter, and that confined jobs see: not below /tmp."""
    with tempfile.TemporaryDirectory(prefix="jobworker-escapes-", dir="/srv") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def _has_capability(number: int) -> bool:
    """number: -1 for none in particular."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split(maxsplit=1)[0], 16)
    return number < 0 or bool(effective >> number & 1)


# Burdens


def carry(
    stage: Stage,
    name: str,
    mark: str,
    profile: str,
    *,
    is_stopped: bool,
    is_harmless: bool = True,
    is_ready: bool = True,
    **fields: Any,
) -> pb.Job:
    """Runs that burden to its end, or stops it once it is ready; other jobs go on meanwhile."""
    client = stage.client
    environment = {"MARK": mark, "SHM_KEY": str(SHM_KEY)}
    if is_harmless:
        environment["HARMLESS"] = "1"
    job = client.create(
        *PYTHON, name, stdin=program({}), profile=profile, environment=environment, **fields
    )
    stream = client.stream(job.id)
    said = b""
    while is_ready and b"ready" not in said:
        said += next(stream).payload
    beside, output = client.run("echo fine", profile=profile)
    assert (beside.exitCode, output) == (0, b"fine\n")
    if is_stopped:
        client.stop(job.id, grace_milliseconds=100)
    for _ in stream:
        pass
    return client.get(job.id)


# What is claimed


def got_through(stage: Stage, area: str, profile: str, *, is_arranged: bool = False) -> list[str]:
    """The attacks that this profile should hold, and does not; and why so."""
    return [
        f"{name}: {verdict.word}, {verdict.reason}"
        for name, verdict in stage.verdicts(Role(profile, is_arranged=is_arranged)).items()
        if name.startswith(f"{area}: ")
        and profile in ATTACKS[name].held_by
        and verdict.word not in {"refused", "missing"}
    ]


def not_shown(stage: Stage, area: str) -> list[str]:
    """The attacks that fail even where nothing defends: that they fail proves nothing."""
    found = []
    for each in ATTACKS.values():
        if not each.name.startswith(f"{area}: ") or not stage.is_to_be_shown(each):
            continue
        if "none" in each.held_by:
            expected = {"refused", "missing"}
        elif _has_capability(each.needs):
            expected = {"worked", "missing"}
        else:
            continue
        verdict = stage.verdicts(UNDEFENDED[each.shown_as])[each.name]
        if verdict.word not in expected:
            found.append(f"{each.name}: {verdict.word}, {verdict.reason}")
    return found
