"""Each limit at work, and what the job is told to have used."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

import leaderless
from jobworker.engine.cgroup import CgroupTree
from jobworker.job import Limits
from kernel.inside.conftest import DISK, Create, run_in, started

MIB = 1 << 20


def use_memory(mebibytes: int) -> list[str]:
    """A command that touches so much, and exits with 0."""
    return [sys.executable, "-S", "-c", f"bytearray({mebibytes} << 20)"]


def test_all_controllers_are_available(tree: CgroupTree) -> None:
    assert tree.controllers == {"cpu": "", "memory": "", "io": "", "pids": ""}


def test_only_what_is_limited_is_written(create: Create) -> None:
    cgroup = create(memory_mib=50)
    assert (cgroup.path / "memory.max").read_text() == f"{50 * MIB}\n"
    assert (cgroup.path / "memory.swap.max").read_text() == "0\n"
    assert (cgroup.path / "memory.oom.group").read_text() == "1\n"
    assert (cgroup.path / "cpu.max").read_text() == "max 100000\n"
    assert (cgroup.path / "io.max").read_text() == ""

    cgroup = create(cpu_percent=250, io_bytes_per_second=MIB)
    assert (cgroup.path / "memory.max").read_text() == "max\n"
    assert (cgroup.path / "memory.oom.group").read_text() == "0\n"
    assert (cgroup.path / "cpu.max").read_text() == "250000 100000\n"
    assert (
        cgroup.path / "io.max"
    ).read_text() == f"98:0 rbps={MIB} wbps={MIB} riops=max wiops=max\n"


@pytest.mark.parametrize("percent", [1, 2_147_483_647])
def test_the_smallest_and_the_largest_cpu_limit(create: Create, percent: int) -> None:
    assert (create(cpu_percent=percent).path / "cpu.max").read_text().startswith(f"{percent}000 ")


def test_the_memory_limit_kills(create: Create) -> None:
    cgroup = create(memory_mib=50)

    assert run_in(cgroup, *use_memory(200)).returncode == -9

    kills = cgroup.accounts()[1]
    # The kernel counts the process that it chose once more when it kills the group.
    assert kills.by_limit == 1 and kills.killed in {1, 2}
    accounting = cgroup.accounts()[0]
    assert accounting.oom_kills == kills.killed
    assert accounting.memory_peak_bytes
    assert 45 * MIB < accounting.memory_peak_bytes <= 50 * MIB


def test_the_memory_limit_kills_all_of_the_job(create: Create) -> None:
    """Never one helper process only, with the rest of the job waiting for it."""
    cgroup = create(memory_mib=50)
    with started(
        cgroup, "sh", "-c", 'sleep 1000 & "$@"; sleep 1000', "sh", *use_memory(200)
    ) as job:
        assert job.wait(timeout=30) == -9
        assert asyncio.run(cgroup.wait_unpopulated(10))
    assert cgroup.accounts()[1].killed > 1


def test_within_its_memory_limit_a_job_ends_by_itself(create: Create) -> None:
    cgroup = create(memory_mib=50)
    assert run_in(cgroup, *use_memory(20)).returncode == 0
    assert cgroup.accounts()[1].killed == 0


def test_the_cpu_limit_holds(create: Create) -> None:
    cgroup = create(cpu_percent=50)
    with started(cgroup, "sh", "-c", "echo; while :; do :; done") as job:
        assert job.stdout
        job.stdout.readline()
        begun, before = time.monotonic(), cpu_seconds(cgroup.path)
        with pytest.raises(Exception, match="timed out"):
            job.wait(timeout=4)
        share = (cpu_seconds(cgroup.path) - before) / (time.monotonic() - begun)
    assert share == pytest.approx(0.5, rel=0.15)


def test_without_a_cpu_limit_a_job_gets_all(create: Create) -> None:
    cgroup = create()

    def gets_all() -> bool:
        """In some second: in others, the machine may have had more to do."""
        begun, before = time.monotonic(), cpu_seconds(cgroup.path)
        time.sleep(1)
        return (cpu_seconds(cgroup.path) - before) / (time.monotonic() - begun) > 0.8

    with started(cgroup, "sh", "-c", "echo; while :; do :; done") as job:
        assert job.stdout
        job.stdout.readline()
        assert any(gets_all() for _ in range(30))


def test_kill_overtakes_who_forks_without_first_threads(create: Create) -> None:
    """Such a process survives the kernel's own way, and so do its children, once they are such."""
    cgroup = create(pids=32)
    with started(cgroup, *leaderless.MORE_AND_MORE) as job:
        assert job.stdout
        job.stdout.readline()
        job.stdout.readline()
        cgroup.kill()
        assert job.wait(timeout=30) == -9
        assert asyncio.run(cgroup.wait_unpopulated(10))


def cpu_seconds(path: Path) -> float:
    return int((path / "cpu.stat").read_text().split()[1]) / 1e6


# Direct I/O: through the page cache, a limit shows only later.
READ = ("iflag=direct", f"if={DISK}/data", "of=/dev/null")
WRITE = ("oflag=direct", "conv=notrunc", "if=/dev/zero", f"of={DISK}/data")


@pytest.fixture(scope="module", autouse=True)
def data() -> None:
    (DISK / "data").write_bytes(bytes(4 * MIB))


@pytest.mark.parametrize("direction", [READ, WRITE], ids=["read", "write"])
def test_the_io_limit_holds(create: Create, direction: tuple[str, ...]) -> None:
    limited, free = create(io_bytes_per_second=MIB), create()

    assert 2.7 < seconds_of_dd(limited, direction, mebibytes=3) < 9
    assert seconds_of_dd(free, direction, mebibytes=3) < 1.6


def seconds_of_dd(cgroup, direction: tuple[str, ...], mebibytes: int) -> float:  # type: ignore[no-untyped-def]  # noqa: ANN001
    begun = time.monotonic()
    result = run_in(cgroup, "dd", "bs=64k", f"count={mebibytes * 16}", *direction)
    assert result.returncode == 0, result.stderr
    return time.monotonic() - begun


def test_io_is_accounted(create: Create) -> None:
    """To the byte, as nothing else of this disk is used."""
    cgroup = create()
    run_in(cgroup, "dd", "bs=64k", "count=32", *READ)
    run_in(cgroup, "dd", "bs=64k", "count=16", *WRITE)

    accounting = cgroup.accounts()[0]

    assert accounting.io_read_bytes is not None and accounting.io_written_bytes is not None
    assert 2 * MIB <= accounting.io_read_bytes < 2.2 * MIB
    assert 1 * MIB <= accounting.io_written_bytes < 1.2 * MIB


def test_limits_that_can_be_enforced_are_accepted(tree: CgroupTree) -> None:
    tree.check(Limits(cpu_percent=10, memory_mib=10, io_bytes_per_second=MIB), str(DISK))
