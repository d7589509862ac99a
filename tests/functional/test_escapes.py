"""Attacks on the server and the machine by its jobs (tests/escapes), and that each would work
where nothing defends.

Those made here do no harm where they succeed: files are opened and not written to, signals are
number 0, and what is mounted is so in a mount namespace of the server's own. The harmful ones
are for a kernel of its own, tests/kernel/inside/test_escapes.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from escapes.burdens import DAEMONS
from escapes.stage import (
    AREA_NAMES,
    PYTHON,
    SETTINGS,
    Stage,
    carry,
    got_through,
    marked,
    may_be_arranged,
    not_shown,
    program,
    public_folder,
)
from functional.server import Server
from jobworker.engine.isolation import Profile
from jobworker.pb import job_worker_pb2 as pb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only a root server confines its jobs")

APART = ["unshare", "--mount", "--uts", "--ipc", "--propagation=private"]
CONFINING = [profile for profile in Profile if profile is not Profile.NONE]


@contextlib.contextmanager
def set_stage(certificates: Path, settings: dict[str, Any]) -> Iterator[Stage]:
    with public_folder() as folder:
        server = Server(folder, certificates, launcher=APART, **settings, **may_be_arranged(folder))
        with server.connect() as client:
            stage = Stage(server, client, folder, is_own_kernel=False)
            with stage.set_up():
                yield stage
        assert server.stop() == 0


@pytest.fixture(scope="module")
def stage(certificates: Path) -> Iterator[Stage]:
    with set_stage(certificates, SETTINGS) as stage:
        yield stage


@pytest.fixture(scope="module")
def stage_without_none(certificates: Path) -> Iterator[Stage]:
    """As a server is without any setting: its jobinit is another kind."""
    profiles = ",".join(CONFINING)
    with set_stage(certificates, SETTINGS | {"PROFILES_ALLOWED": profiles}) as stage:
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


@pytest.mark.parametrize("area", ["privileges", "processes", "kernel"])
def test_it_holds_where_jobinit_confines_all(stage_without_none: Stage, area: str) -> None:
    found = got_through(stage_without_none, area, Profile.DEFAULT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("area", AREA_NAMES)
def test_these_attacks_work_where_nothing_defends(stage: Stage, area: str) -> None:
    found = not_shown(stage, area)
    assert not found, "\n".join(found)


# What the server looks up for a job


PLACES = [
    *("{state}", "{certs}", "{link}", "{link}/output", "/proc/self/root/{link}", "/root"),
    *("/proc/self/cwd", "/proc/self/fd/3", "/proc/self/fd/4", "/proc/1/root"),
]


@pytest.mark.parametrize("profile", CONFINING)
@pytest.mark.parametrize("place", PLACES)
def test_a_working_directory_that_is_none_of_its_own(
    stage: Stage, profile: str, place: str
) -> None:
    """It is refused, or the job is in its own root, or finds nothing there."""
    path = place.format(**stage.places())
    with contextlib.suppress(grpc.RpcError):
        job = stage.client.shell("[ . -ef / ] || ls -A", profile=profile, working_directory=path)
        assert stage.client.output(job.id) == b""


@pytest.mark.parametrize("profile", CONFINING)
@pytest.mark.parametrize("command", ["{link}/jobs.db", "/proc/self/exe", "/root/x", "{program}"])
def test_a_command_that_is_none_of_its_own(stage: Stage, profile: str, command: str) -> None:
    """The last one is a program that all may execute, in the server's own folder."""
    with pytest.raises(grpc.RpcError) as caught:
        stage.client.create(command.format(**stage.places()), profile=profile)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("profile", CONFINING)
def test_a_job_does_not_become_jobinit(stage: Stage, profile: str) -> None:
    """By a script whose interpreter is the program that a job is until its own is executed."""
    script = Path(stage.places()["link"]).parent / "script"
    script.write_text("#!/proc/self/exe\n")
    script.chmod(0o755)
    job = stage.client.wait(stage.client.create(str(script), profile=profile).id)
    assert (job.cause, job.failed_step) == (pb.START_FAILED, "exec"), job.exitCode


# How each burden ends: the exit code, or None where it is to be stopped.
BURDENS = {
    "daemons": 0,
    "daemons that hold its output": 0,
    "deaf to signals and stopped": None,
    "zombies": 0,
    "forks without end": 0,
    "child in vfork": None,
    "exec from a thread": 5,
    "misleading name": 0,
    "signals to itself": 0,
    "signals upwards": 0,
    "output closed": 7,
    "output that it takes back": None,
    "output that fills": None,
    "descriptors": None,
    "timers and watches": None,
    "names left behind": 0,
}


@pytest.mark.parametrize("name", BURDENS)
@pytest.mark.parametrize("profile", CONFINING)
def test_nothing_is_left_of(stage: Stage, profile: str, name: str) -> None:
    with stage.leaving_nothing() as mark:
        job = carry(stage, name, mark, profile, is_stopped=BURDENS[name] is None)
    if BURDENS[name] is None:
        assert job.status == "STOPPED"
    else:
        assert job.exitCode == BURDENS[name]


def test_what_is_left_would_be_seen(tmp_path: Path) -> None:
    """Without a server, daemons stay, and the look for them finds them."""
    mark = "mark-of-no-job"
    file = tmp_path / "program"
    file.write_bytes(program({}))
    subprocess.run([sys.executable, file, "daemons"], env={"MARK": mark}, check=True)
    found = marked(mark)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert len(found) == DAEMONS


@pytest.mark.skipif("strict" not in CONFINING, reason="no profile strict")
def test_strict_jobs_share_nothing_that_users_have_a_limited_number_of(stage: Stage) -> None:
    """One takes all inotify instances of its user, and others have theirs."""
    assert can_do_beside(stage, "timers and watches", WATCH, "strict")
    # It would show nothing where the job's descriptors are used up before.
    if int(Path("/proc/sys/fs/inotify/max_user_instances").read_text()) < 1000:
        assert not can_do_beside(stage, "timers and watches", WATCH, "default")


@pytest.mark.parametrize("profile", CONFINING)
def test_one_job_has_not_the_terminals_of_all(stage: Stage, profile: str) -> None:
    assert can_do_beside(stage, "terminals", "import os; os.openpty(); print(True)", profile)


WATCH = "import ctypes; print(ctypes.CDLL(None).inotify_init1(0) >= 0)"


def can_do_beside(stage: Stage, burden: str, probe: str, profile: str) -> bool:
    """Another job of this profile, while one has all of something that it may have."""
    client = stage.client
    job = client.create(*PYTHON, burden, stdin=program({}), profile=profile)
    next(client.stream(job.id))
    beside = client.create("python3", "-I", "-c", probe, profile=profile)
    output = client.output(beside.id)
    client.stop(job.id, grace_milliseconds=0)
    return output == b"True\n"
