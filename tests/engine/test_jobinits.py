"""The jobinits of a server, as far as its own tests do not show them."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from pathlib import Path

import pytest

from descriptors import no_descriptors
from jobworker.daemon import JOBINIT, _has_confined, _try_isolation
from jobworker.engine import jobinit
from jobworker.engine import jobinits as module
from jobworker.engine.cgroup import CgroupTree
from jobworker.engine.isolation import Isolation, Profile
from jobworker.engine.jobinit import Exited, Held, Started, StartRequest
from jobworker.engine.jobinits import Jobinits
from jobworker.engine.store import Store
from jobworker.errors import StartFailedError, StartupError, ViewError
from jobworker.job import JobSpec, created


def test_what_is_tried_and_takes_too_long_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may keep locked what is to be mounted on: with a no for an answer, the next ones would
    not be confined."""
    monkeypatch.setattr(module, "TRIAL_SECONDS", 0.3)
    jobinits = Jobinits(tmp_path, JOBINIT, (), confines_all=False)
    jobinits.prepare()
    trial = StartRequest(0, "/no/program", ("x",), {}, "/", None, merge_output=False)

    async def main() -> None:
        assert await jobinits.connect(lambda _: None) == []
        pid = (await jobinits._our_jobinit()).pid
        try:
            assert await jobinits.try_out(trial) == ""
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(StartupError, match=r"is not known: .*did not start in time"):
                await jobinits.try_out(trial)
        finally:
            os.kill(pid, signal.SIGCONT)
            await jobinits.close()
            os.kill(pid, signal.SIGKILL)  # it keeps how the trial ended for the next server

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_a_profile_that_is_only_allowed_keeps_no_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a job without a network has to wait, for as long as another one likes."""
    monkeypatch.setattr(module, "TRIAL_SECONDS", 5.0)
    monkeypatch.setattr(module, "TRIAL_END_SECONDS", 0.1)
    isolation = Isolation("default", ("strict",), strict_uids=range(3000000, 3000001))
    jobinits = Jobinits(tmp_path, JOBINIT, isolation.views, confines_all=True)
    jobinits.prepare()
    try_out = jobinits.try_out

    async def stop_and_try_out(trial: StartRequest) -> str:
        if not trial.has_network:
            monkeypatch.setattr(module, "TRIAL_SECONDS", 0.3)
            os.kill((await jobinits._our_jobinit()).pid, signal.SIGSTOP)
        return await try_out(trial)

    monkeypatch.setattr(jobinits, "try_out", stop_and_try_out)

    async def main() -> None:
        assert await jobinits.connect(lambda _: None) == []
        pid = (await jobinits._our_jobinit()).pid
        store = Store.open(tmp_path / "jobs.db")
        try:
            await _try_isolation(isolation, jobinits, [], store, CgroupTree(None, "", {}))
        finally:
            await store.close()
            os.kill(pid, signal.SIGCONT)
            await jobinits.close()
            os.kill(pid, signal.SIGKILL)
        assert isolation.profiles == {Profile.DEFAULT}
        assert "is not known" in isolation.problems[Profile.STRICT]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("profile", "is_alive", "counts"),
    [("default", True, True), ("default", False, False), ("none", True, False)],
)
def test_what_a_job_has_left_behind_lives_on(
    tmp_path: Path, profile: str, is_alive: bool, counts: bool
) -> None:
    """Its main process has ended while there was no server; what the next one needs may be taken
    by another one."""
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1" / "cgroup.events").write_text(f"populated {int(is_alive)}\nfrozen 0\n")

    async def main() -> bool:
        store = Store.open(tmp_path / "jobs.db")
        try:
            await store.put(created(1, JobSpec("sh", profile=profile), time.time_ns()))
            held = [Held(1, ending=Exited(1, 0, time.time_ns(), 0, 0, 0))]
            return await _has_confined(held, store, CgroupTree(tmp_path, "", {}))
        finally:
            await store.close()

    assert asyncio.run(main()) == counts


def test_without_a_descriptor_none_is_taken_for_gone(tmp_path: Path) -> None:
    """Its jobs would be lost."""
    path = tmp_path / "jobinit-2-other.sock"
    path.touch()
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        Jobinits(tmp_path, JOBINIT).prepare()
    assert [*tmp_path.iterdir()] == [path]


def test_another_program_starts_what_comes(tmp_path: Path) -> None:
    """Also of the same protocol: it may keep more from jobs. Those of the older one go on."""
    other = tmp_path / "other"
    other.write_bytes(JOBINIT.read_bytes() + b"\0")
    job = StartRequest(1, "/bin/sleep", ("sleep", "60"), {}, "/", None, merge_output=True)

    async def serve(program: Path, *, starts: bool = False) -> tuple[int, list[Started]]:
        jobinits = Jobinits(tmp_path, program)
        jobinits.prepare()
        found = [each.started for each in await jobinits.connect(lambda _: None) if each.started]
        pid = (await jobinits._our_jobinit()).pid
        if starts:
            found.append(await jobinits.start(job))
        for started in found:
            started.close_pipes()
        await jobinits.close()
        return pid, found

    async def main() -> None:
        first, (started,) = await serve(JOBINIT, starts=True)
        try:
            again, found = await serve(JOBINIT)
            assert (again, [each.job_id for each in found]) == (first, [1])
            another, found = await serve(other)
            assert (another != first, [each.job_id for each in found]) == (True, [1])
        finally:
            os.kill(first, signal.SIGKILL)
            os.kill(started.pid, signal.SIGKILL)

    asyncio.run(main())


def test_one_that_does_not_answer_is_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one in its place would leave its jobs to nobody."""
    monkeypatch.setattr(jobinit, "CONNECT_SECONDS", 0.3)
    job = StartRequest(1, "/bin/sleep", ("sleep", "60"), {}, "/", None, merge_output=True)

    def prepared() -> Jobinits:
        jobinits = Jobinits(tmp_path, JOBINIT)
        jobinits.prepare()
        return jobinits

    async def main() -> None:
        jobinits = prepared()
        await jobinits.connect(lambda _: None)
        pid, started = (await jobinits._our_jobinit()).pid, await jobinits.start(job)
        started.close_pipes()
        await jobinits.close()
        try:
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(StartupError, match="does not answer"):
                await prepared().connect(lambda _: None)
            os.kill(pid, signal.SIGCONT)
            jobinits = prepared()
            (held,) = await jobinits.connect(lambda _: None)
            assert held.started is not None
            held.started.close_pipes()
            await jobinits.close()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.kill(started.pid, signal.SIGKILL)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "is_refusal"),
    [
        (ViewError("make a user namespace", 1), True),
        (ViewError("make a user namespace", 87), True),
        (ViewError("make a user namespace", 28), False),
        (ViewError("killed while it was made", 32), False),
        (StartFailedError("pid namespace", 1), True),
        (StartFailedError("fork", 11), False),
        (StartFailedError("view", 0, killed_by=9), False),
    ],
)
def test_only_what_the_kernel_refuses_for_good_is_a_refusal(
    error: StartFailedError | ViewError, is_refusal: bool
) -> None:
    if is_refusal:
        assert module._refusal(error) == str(error)
        return
    with pytest.raises(StartupError, match="is not known"):
        module._refusal(error)


@pytest.mark.parametrize(
    ("step", "limits", "is_refusal"),
    [
        ("namespaces", {"uts": 0, "net": 30}, True),
        ("namespaces", {"uts": 30, "net": 0, "time": 0}, False),
        ("network", {"uts": 30, "net": 0}, True),
        ("network", {"uts": 30, "net": 30}, False),
    ],
)
def test_namespaces_that_others_have_are_no_refusal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    limits: dict[str, int],
    is_refusal: bool,
) -> None:
    """Also where there may be none of a kind that is not what was missing."""
    monkeypatch.setattr(module, "NAMESPACE_LIMITS", tmp_path)
    for kind, limit in limits.items():
        (tmp_path / f"max_{kind}_namespaces").write_text(f"{limit}\n")
    error = StartFailedError(step, errno.ENOSPC)
    if is_refusal:
        assert module._refusal(error) == str(error)
        return
    with pytest.raises(StartupError, match="is not known"):
        module._refusal(error)
