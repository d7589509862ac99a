"""Jobs' cgroups, in this machine's own cgroup v2; what needs all controllers is in tests/kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

import leaderless
from descriptors import no_descriptors
from engine.cgroups import make_cgroup
from epolls import EPOLL, nested_epolls
from jobworker.engine import cgroup as module
from jobworker.engine.cgroup import Cgroup, CgroupTree
from jobworker.errors import CgroupError, LimitUnavailableError, StartupError
from jobworker.job import Limits, OomKills

BASE = Path("/sys/fs/cgroup")
NONE = Limits()
MANY = 20

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def tree() -> Iterator[CgroupTree]:
    tree = CgroupTree.open(BASE, f"test-{os.getpid()}")
    if tree.path is None:
        pytest.skip(tree.problem)
    yield tree
    for cgroup in tree.leftovers():
        cgroup.kill()
        cgroup.remove()
    tree.close()
    assert not tree.path.exists()


@pytest.fixture
def cgroup(tree: CgroupTree) -> Cgroup:
    return make_cgroup(tree, 1)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program in a cgroup; each is gone and reaped after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_in(cgroup: Cgroup, *command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command or ["sleep", "1000"], stdout=subprocess.PIPE)
        started.append(process)
        (cgroup.path / "cgroup.procs").write_text(str(process.pid))
        return process

    yield start_in
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


def waits(tree: CgroupTree) -> tuple[int, int]:
    """How many descriptors there are in the tree, and how many epolls. Of other kinds some may
    come and go meanwhile: gRPC still works on what earlier tests left."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(name.startswith(f"{tree.path}/") for name in names), names.count(EPOLL)


# A cgroup for each job


def test_a_job_has_a_cgroup_of_its_own(tree: CgroupTree) -> None:
    first, second = make_cgroup(tree, 1), make_cgroup(tree, 2)
    assert first.path != second.path
    assert first.path.parent == second.path.parent == tree.path
    assert (first.path / "cgroup.procs").exists()


def test_only_what_is_limited_is_to_be_written(tree: CgroupTree) -> None:
    assert tree.limit_files(NONE, "/") == ()
    assert tree.limit_files(Limits(cpu_percent=250, pids=7), "/") == (
        ("cpu.max", "250000 100000"),
        ("pids.max", "7"),
    )


def test_what_an_earlier_server_left_is_found(tree: CgroupTree, start: Start) -> None:
    process = start(make_cgroup(tree, 7))
    make_cgroup(tree, 8)

    assert tree.path
    again = CgroupTree.open(BASE, tree.path.name.removeprefix("jobworker-"))
    found = {cgroup.path.name: cgroup for cgroup in again.leftovers()}

    assert sorted(found) == ["job-7", "job-8"]
    assert found["job-7"].is_populated() and not found["job-8"].is_populated()
    found["job-7"].kill()
    assert process.wait(timeout=10) == -signal.SIGKILL


def test_the_tree_goes_only_when_it_is_empty(tree: CgroupTree, cgroup: Cgroup) -> None:
    assert tree.path
    tree.close()
    assert tree.path.exists()
    cgroup.remove()
    tree.close()
    assert not tree.path.exists()
    tree.close()


# What is alive in it


def test_populated_while_a_process_is_alive(cgroup: Cgroup, start: Start) -> None:
    assert not cgroup.is_populated()
    process = start(cgroup)
    assert cgroup.is_populated()
    process.kill()
    process.wait()
    assert not cgroup.is_populated()


def test_a_limit_on_cpu_is_lifted_before_the_kill(tmp_path: Path) -> None:
    """The kernel may wait with it until those go on that have used up their share."""
    limit = tmp_path / "cpu.max"
    limit.write_text("10000 100000\n")
    os.mkfifo(tmp_path / "cgroup.kill")  # to open it waits for the other end
    killer = threading.Thread(target=Cgroup(tmp_path).kill)
    killer.start()
    with (tmp_path / "cgroup.kill").open() as kill:
        assert limit.read_text().startswith("max")
        assert kill.read() == "1"
    killer.join()


def test_kill_reaches_all_that_the_job_started(cgroup: Cgroup, start: Start) -> None:
    """Also what is in a session of its own, and ignores signals."""
    script = "trap '' TERM INT HUP; setsid sleep 1000 & (sleep 1000 &) & echo; wait"
    # The shell waits for a line, so that it is in its cgroup before it starts anything.
    process = start(cgroup, "sh", "-c", f"kill -STOP $$; {script}")
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    process.send_signal(signal.SIGCONT)
    assert process.stdout
    process.stdout.readline()

    cgroup.kill()

    assert asyncio.run(cgroup.wait_unpopulated(10))
    assert process.wait() == -signal.SIGKILL
    # Their pipe is closed: none of them has got away.
    assert process.stdout.read() == b""


def start_leaderless(start: Start, cgroup: Cgroup) -> subprocess.Popen[bytes]:
    """Moved before it loses its first thread, as the kernel would move the others alone."""
    process = start(cgroup, "sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *leaderless.ONE)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    process.send_signal(signal.SIGCONT)
    assert process.stdout
    process.stdout.readline()
    return process


def test_kill_reaches_who_has_lost_the_first_thread(cgroup: Cgroup, start: Start) -> None:
    """Of such a process the kernel's own way ends nothing."""
    process = start_leaderless(start, cgroup)

    cgroup.kill()

    assert process.wait(10) == -signal.SIGKILL
    assert not cgroup.is_populated()


def test_a_kill_that_cannot_see_who_is_left_fails(
    cgroup: Cgroup, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is then tried again. The machine may have no descriptor left: a job's doing."""
    process = start_leaderless(start, cgroup)
    with contextlib.ExitStack() as shortage:

        def without_descriptors(path: str) -> list[str]:
            shortage.enter_context(no_descriptors())
            return [path]

        monkeypatch.setattr(module, "_with_descendants", without_descriptors)
        with pytest.raises(OSError, match="Too many open files"):
            cgroup.kill()
    monkeypatch.undo()
    cgroup.kill()
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("number", [errno.ESRCH, errno.EINVAL])
def test_kill_passes_over_who_ends_meanwhile(
    cgroup: Cgroup, start: Start, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Of such a process older kernels say that there is none in two ways."""

    def refuse(pid: int) -> int:
        raise OSError(number, os.strerror(number), str(pid))

    process = start_leaderless(start, cgroup)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    cgroup.kill()
    monkeypatch.undo()
    cgroup.kill()
    assert process.wait(10) == -signal.SIGKILL


def test_a_wait_is_woken(tree: CgroupTree, cgroup: Cgroup, run: Run, start: Start) -> None:
    start(cgroup)

    async def scenario() -> None:
        before = waits(tree)
        waiting = asyncio.create_task(cgroup.wait_unpopulated(10))
        # It waits: it has nothing more to do in this turn of the loop.
        await asyncio.sleep(0)
        assert not waiting.done()
        started = time.monotonic()
        cgroup.kill()
        assert await waiting
        assert time.monotonic() - started < 5
        assert waits(tree) == before

    run(scenario())


def test_a_wait_ends_at_its_timeout(
    tree: CgroupTree, cgroup: Cgroup, run: Run, start: Start
) -> None:
    start(cgroup)

    async def scenario() -> None:
        before = waits(tree)
        assert await cgroup.wait_unpopulated(0.05) is False
        assert await cgroup.wait_unpopulated(0) is False
        assert waits(tree) == before

    run(scenario())


def test_waits_of_many_jobs_share_one_thread(tree: CgroupTree, run: Run, start: Start) -> None:
    cgroups = [make_cgroup(tree, number) for number in range(MANY)]
    for cgroup in cgroups:
        start(cgroup)

    async def scenario() -> None:
        before, threads = waits(tree), threading.active_count()
        waiting = [asyncio.create_task(cgroup.wait_unpopulated(20)) for cgroup in cgroups]
        await asyncio.sleep(0)
        assert waits(tree) == (before[0] + MANY, before[1])
        assert threading.active_count() <= threads  # some of before may end
        for cgroup, task in zip(cgroups, waiting, strict=True):
            cgroup.kill()
            assert await task
        assert waits(tree) == before

    run(scenario())


def test_one_wait_does_not_end_with_anothers(tree: CgroupTree, run: Run, start: Start) -> None:
    short, long = make_cgroup(tree, 1), make_cgroup(tree, 2)
    start(short)
    start(long)

    async def scenario() -> None:
        before = waits(tree)
        other = asyncio.create_task(long.wait_unpopulated(20))
        woken = asyncio.create_task(short.wait_unpopulated(20))
        await asyncio.sleep(0)
        short.kill()
        assert await woken
        assert not other.done()
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        assert waits(tree) == before

    run(scenario())


def test_a_wait_puts_no_epoll_into_another(cgroup: Cgroup, run: Run, start: Start) -> None:
    """For that the kernel has one lock for all, which a job can keep for seconds."""
    start(cgroup)

    async def scenario() -> None:
        waiting = asyncio.create_task(cgroup.wait_unpopulated(10))
        await asyncio.sleep(0.05)  # uvloop tells the kernel some turns later
        assert not waiting.done()
        assert nested_epolls(os.getpid()) == []
        cgroup.kill()
        assert await waiting

    run(scenario())


def test_several_waits_for_one_cgroup_end_together(
    tree: CgroupTree, cgroup: Cgroup, run: Run, start: Start
) -> None:
    start(cgroup)

    async def scenario() -> None:
        before = waits(tree)
        waiting = [asyncio.create_task(cgroup.wait_unpopulated(10)) for _ in range(3)]
        await asyncio.sleep(0)
        cgroup.kill()
        assert await asyncio.gather(*waiting) == [True] * 3
        assert waits(tree) == before

    run(scenario())


def test_a_change_that_leaves_it_populated_ends_no_wait(
    cgroup: Cgroup, run: Run, start: Start
) -> None:
    """Freezing is told by the same file."""
    start(cgroup)

    async def scenario() -> None:
        waiting = asyncio.create_task(cgroup.wait_unpopulated(10))
        for value in ("1", "0"):
            (cgroup.path / "cgroup.freeze").write_text(value)
            await asyncio.sleep(0.05)
            assert not waiting.done()
        cgroup.kill()
        assert await waiting

    run(scenario())


def test_without_watches_a_wait_looks_from_time_to_time(
    tree: CgroupTree,
    cgroup: Cgroup,
    run: Run,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user's watches are counted, and may all be its jobs'. Here the kernel refuses them as
    EPOLLEXCLUSIVE cannot be with what we ask for."""
    monkeypatch.setattr(module, "NEXT_CHANGE", module.NEXT_CHANGE | select.EPOLLEXCLUSIVE)
    start(cgroup)

    async def scenario() -> None:
        before = waits(tree)
        assert not await cgroup.wait_unpopulated(0.2)
        waiting = asyncio.create_task(cgroup.wait_unpopulated(10))
        await asyncio.sleep(0)
        started = time.monotonic()
        cgroup.kill()
        assert await waiting
        assert time.monotonic() - started < 5
        assert waits(tree) == before

    run(scenario())


def test_nothing_is_opened_for_a_cgroup_that_is_empty(
    cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual case at the end of a job."""
    monkeypatch.setattr(module, "_watch", None)
    assert asyncio.run(cgroup.wait_unpopulated(10))


def test_what_ended_between_look_and_wait_is_seen(cgroup: Cgroup, run: Run, start: Start) -> None:
    process = start(cgroup)

    async def scenario() -> bool:
        descriptor = os.open(cgroup.path / "cgroup.events", os.O_RDONLY)
        try:
            assert module._reads_populated(descriptor)
            process.kill()
            process.wait()
            return await module._watch().wait(descriptor, 10)
        finally:
            os.close(descriptor)

    assert run(scenario())


# Its end


def test_a_removed_cgroup_is_harmless(cgroup: Cgroup, run: Run) -> None:
    cgroup.remove()
    assert not cgroup.path.exists()

    cgroup.remove()
    cgroup.kill()
    assert not cgroup.is_populated()
    assert run(cgroup.wait_unpopulated(10))
    assert cgroup.accounts()[0].cpu_user_us is None
    assert cgroup.accounts()[1] == OomKills()


def test_cgroups_that_the_job_made_count_and_go_with_it(cgroup: Cgroup, start: Start) -> None:
    inner = cgroup.path / "a" / "b"
    inner.mkdir(parents=True)
    (cgroup.path / "c").mkdir()
    process = start(Cgroup(inner))

    assert cgroup.is_populated()
    cgroup.kill()
    assert process.wait(timeout=10) == -signal.SIGKILL
    cgroup.remove()
    assert not cgroup.path.exists()


def test_deeply_nested_cgroups_go(cgroup: Cgroup) -> None:
    path = cgroup.path
    for _ in range(500):
        path /= "c"
        path.mkdir()
    cgroup.remove()
    assert not cgroup.path.exists()


def test_removal_waits_for_what_is_on_its_way_out(tree: CgroupTree, start: Start) -> None:
    for number in range(MANY):
        cgroup = make_cgroup(tree, number)
        start(cgroup)
        cgroup.kill()
        cgroup.remove()
        assert not cgroup.path.exists()


def test_removal_names_what_does_not_go(
    cgroup: Cgroup,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "REMOVE_SECONDS", 0.05)
    process = start(cgroup)
    with pytest.raises(CgroupError, match=rf"resource busy; processes in it: {process.pid} \(s"):
        cgroup.remove()
    assert cgroup.path.exists()


def test_cpu_time_is_accounted(cgroup: Cgroup, start: Start) -> None:
    count = "kill -STOP $$; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"
    process = start(cgroup, "sh", "-c", count)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    process.send_signal(signal.SIGCONT)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0

    used = cgroup.accounts()[0]

    assert used.cpu_user_us and used.cpu_system_us is not None
    all_us = used.cpu_user_us + used.cpu_system_us
    # It was started outside, and stopped there or here.
    assert 0.5 < all_us / ((usage.ru_utime + usage.ru_stime) * 1e6) < 1.1


# What this machine has


def test_each_controller_is_available_or_has_a_reason(tree: CgroupTree) -> None:
    assert tree.path
    available = (tree.path / "cgroup.subtree_control").read_text().split()
    assert list(tree.controllers) == ["cpu", "memory", "io", "pids"]
    for name, problem in tree.controllers.items():
        assert (name in available) == (problem == "")


def test_what_v1_holds_is_named(tree: CgroupTree) -> None:
    v1 = {
        line.split()[0]: line.split()[1]
        for line in Path("/proc/cgroups").read_text().splitlines()[1:]
    }
    held = [name for name in ("cpu", "memory", "pids") if v1.get(name, "0") != "0"]
    if not held:
        pytest.skip("cgroup v1 holds no controller of this machine")
    for name in held:
        assert tree.controllers[name].startswith("bound to cgroup v1")


def test_explicit_limits_without_a_controller_are_refused(tree: CgroupTree) -> None:
    tree.check(NONE, "/")
    for limits, limit, controller in (
        (Limits(cpu_percent=1), "maxCPU", "cpu"),
        (Limits(memory_mib=1), "maxMemory", "memory"),
        (Limits(io_bytes_per_second=1), "maxIOBPS", "io"),
    ):
        if not tree.controllers[controller]:
            continue
        with pytest.raises(LimitUnavailableError) as caught:
            tree.check(limits, "/")
        assert (caught.value.limit, caught.value.controller) == (limit, controller)
        assert caught.value.problem == tree.controllers[controller]


def test_without_a_descriptor_no_cgroup_is_taken_for_missing() -> None:
    with no_descriptors(), pytest.raises(StartupError, match=r"Too many open files.*; start again"):
        CgroupTree.open(BASE, "x")


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        (Path("/no/such/place"), "/no/such/place is no cgroup v2: No such file or directory; "),
        (Path("/proc"), "/proc is no cgroup v2: its filesystem is proc; "),
        (Path("/etc/passwd"), "/etc/passwd is no cgroup v2: Not a directory; "),
    ],
)
def test_without_a_cgroup_v2_the_reason_is_told(base: Path, problem: str) -> None:
    tree = CgroupTree.open(base, "x")

    assert tree.path is None
    assert tree.problem.startswith(problem)
    assert "JOB_WORKER_CGROUP_BASE" in tree.problem
    assert set(tree.controllers.values()) == {tree.problem}
    assert tree.leftovers() == []
    tree.close()
    with pytest.raises(LimitUnavailableError, match=r"maxCPU needs .*is no cgroup v2"):
        tree.check(Limits(cpu_percent=1), "/")
    assert tree.of(1) is None
