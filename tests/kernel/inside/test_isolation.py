"""What separates confined jobs from a machine with a cgroup v2 and an older kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from escapes.stage import public_folder
from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb
from kernel.inside.conftest import USER, delegated_directory, serving

MEMORY_MIB = 60


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Client]:
    server = Server(
        tmp_path_factory.mktemp("server"),
        certificates,
        PROFILE="default",
        PROFILES_ALLOWED="strict",
        STRICT_UIDS="3000000-3000009",
        DEFAULT_MEMORY=str(MEMORY_MIB),
    )
    with server.connect() as client:
        yield client
    assert server.stop() == 0


@pytest.mark.parametrize("profile", ["default", "strict"])
def test_a_confined_job(client: Client, profile: str) -> None:
    script = "echo $$; ls /proc/1/fd /run/ /sys/fs/cgroup/; mkdir /tmp/x /sys/x; ls /tmp"
    job, output = client.run("exec 2>&1; " + script, profile=profile)
    lines = output.splitlines()
    assert (lines[0], lines[-1]) == (b"2", b"x"), output
    assert b"/sys/x" in output and b"Read-only" in output
    assert b"cgroup.procs" not in output
    assert (job.cause, job.profile) == (pb.EXITED, profile)


def test_what_it_writes_to_its_tmp_is_memory_of_its_own(client: Client) -> None:
    job, output = client.run(f"head -c {2 * MEMORY_MIB}M /dev/zero > /tmp/a; echo survived")
    assert b"survived" not in output
    assert job.cause == pb.OUT_OF_MEMORY
    assert str(MEMORY_MIB) in job.detail


def test_the_cgroup_is_empty_once_the_job_is_gone(client: Client) -> None:
    """The first process of its namespace, which is not the job's, is not in it."""
    job = client.create("sleep", "60")
    [path] = Path(client.info().cgroup).glob(f"job-{job.id}/cgroup.procs")
    assert len(path.read_text().split()) == 1
    client.stop(job.id)
    assert not path.exists()


LIMITS = """
from resource import RLIMIT_CORE, RLIMIT_NICE, RLIMIT_RTPRIO, getrlimit
print([getrlimit(each) for each in (RLIMIT_CORE, RLIMIT_RTPRIO, RLIMIT_NICE)])
"""


@pytest.mark.parametrize("core", [0, -1])
def test_what_the_server_may_is_not_handed_down(
    tmp_path: Path, certificates: Path, core: int
) -> None:
    """Of crashes that leave 0 bytes, a program that core_pattern names would be told."""
    launcher = ["prlimit", f"--core={core}", "--rtprio=50", "--nice=30"]
    server = Server(
        tmp_path, certificates, launcher=launcher, PROFILE="default", PROFILES_ALLOWED="none"
    )
    expected = {"none": [(core, core), (50, 50), (30, 30)], "default": [(1, 1), (0, 0), (0, 0)]}
    with server.connect() as client:
        for profile, limits in expected.items():
            job = client.create("python3", "-c", LIMITS, profile=profile)
            assert client.output(job.id).decode() == f"{limits}\n"
    assert server.stop() == 0


def test_a_server_that_is_not_root_confines_its_jobs(certificates: Path) -> None:
    with (
        public_folder() as folder,
        delegated_directory(USER) as cgroup,
        serving(
            folder, certificates, cgroup, USER, PROFILE="default", CGROUP_BASE=str(cgroup)
        ) as server,
        server.connect() as client,
    ):
        script = f"echo $$; id -u; grep CapEff /proc/self/status; ls {server.state} {server.certs}"
        _, output = client.run(script + " 2>&1")
        assert output.split()[:4] == [b"2", str(USER).encode(), b"CapEff:", b"0" * 16]
        assert output.count(b"Permission denied") == 2
        job, output = client.run("head -c 100M /dev/zero > /tmp/a; echo survived", maxMemory=50)
        assert (b"survived" not in output, job.cause) == (True, pb.OUT_OF_MEMORY)
