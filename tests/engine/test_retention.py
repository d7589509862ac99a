"""Which ended jobs give way, and wholly; that they do is in functional/test_retention.py."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobworker.engine.output import Output
from jobworker.engine.retention import Keep, Retention, surplus_of
from jobworker.engine.store import EndedJob, Store
from jobworker.job import Job, JobSpec, Principal, Status

DEADLINE_SECONDS = 10
SECOND = 1_000_000_000
NOW = 1_000 * SECOND
# Of ten jobs with 100 bytes each, the oldest four: they ended 40, 30, 20 and 10 s ago.
OLDEST = [EndedJob(number, NOW - (50 - 10 * number) * SECOND, 100) for number in range(1, 5)]


@pytest.mark.parametrize(
    ("keep", "ids"),
    [
        (Keep(), []),
        (Keep(jobs=10), []),
        (Keep(jobs=8), [1, 2]),
        (Keep(jobs=1), [1, 2, 3, 4]),
        (Keep(log_bytes=1000), []),
        (Keep(log_bytes=850), [1, 2]),
        (Keep(seconds=25), [1, 2]),
        (Keep(seconds=25, jobs=9), [1, 2]),
        (Keep(seconds=35, jobs=7), [1, 2, 3]),
    ],
)
def test_the_longest_ended_give_way_first(keep: Keep, ids: list[int]) -> None:
    surplus = surplus_of(keep, 10, 1000, OLDEST, NOW)
    assert [each.id for each in surplus] == ids


class SlowStore:
    """Which forgets a job, and takes its time to say so."""

    def __init__(self) -> None:
        self.deleted: list[int] = []
        self.may_answer = asyncio.Event()

    async def delete(self, ids: Any) -> None:
        self.deleted += ids
        await self.may_answer.wait()


class SlowOutput:
    """Whose files take long to remove, as large ones do."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def delete(self, *_: Any) -> None:
        self.may_go_on.wait(DEADLINE_SECONDS)


def test_who_deletes_much_keeps_no_job_from_its_end() -> None:
    """Which takes a thread, as to kill what is left in its cgroup."""
    job = Job(1, JobSpec("true"), Status.COMPLETED, created_ns=NOW, stdout_bytes=100_000)

    async def run() -> None:
        store: Any = SlowStore()
        store.may_answer.set()
        output: Any = SlowOutput()
        retention = Retention(store, output, Keep())
        try:
            deleting = [retention.delete([job]) for _ in range(100)]
            await asyncio.wait_for(asyncio.to_thread(int), DEADLINE_SECONDS / 2)
        finally:
            output.may_go_on.set()
        await asyncio.gather(*deleting)
        await retention.close()

    asyncio.run(run())


def test_who_deletes_much_keeps_no_other_from_it() -> None:
    """Neither others nor what makes room: but for others whose own files are being removed."""

    def ended(job_id: int, owner: str, output_bytes: int) -> Job:
        job = Job(job_id, JobSpec("true"), Status.COMPLETED, created_ns=NOW)
        by = Principal(owner, "user", "")
        return dataclasses.replace(job, stdout_bytes=output_bytes, created_by=by)

    class LargeIsSlow(SlowOutput):
        def delete(self, _job_id: int, end: int, *_: Any) -> None:
            if end > 1000:
                super().delete()

    async def run() -> None:
        store: Any = SlowStore()
        store.may_answer.set()
        output: Any = LargeIsSlow()
        retention = Retention(store, output, Keep())
        try:
            deleting = [retention.delete([ended(n, "alice", 100_000)]) for n in range(100)]
            await asyncio.sleep(0.05)
            other = retention.delete([ended(100, "bob", 1000)])
            await asyncio.wait_for(other, DEADLINE_SECONDS / 2)
            oldest = retention.delete([ended(101, "alice", 1000)], in_turn=False)
            await asyncio.wait_for(oldest, DEADLINE_SECONDS / 2)
        finally:
            output.may_go_on.set()
        await asyncio.gather(*deleting)
        await retention.close()

    asyncio.run(run())


def test_who_deletes_much_keeps_no_server_from_its_end() -> None:
    """The next one removes the rest."""
    job = Job(1, JobSpec("true"), Status.COMPLETED, created_ns=NOW, stdout_bytes=100_000)
    removed = []

    class Slow:
        def delete(self, job_id: int, *_: Any) -> None:
            time.sleep(0.2)
            removed.append(job_id)

    async def run() -> None:
        store: Any = SlowStore()
        store.may_answer.set()
        output: Any = Slow()
        retention = Retention(store, output, Keep())
        deleting = [retention.delete([job]) for _ in range(100)]
        await asyncio.sleep(0)
        await retention.close()
        begun = len(removed)
        await asyncio.gather(*deleting, return_exceptions=True)
        assert len(removed) == begun < 100
        assert len(store.deleted) == 100

    asyncio.run(run())


@pytest.mark.parametrize("is_closed", [False, True])
def test_who_gives_up_leaves_no_files_without_a_record(tmp_path: Path, is_closed: bool) -> None:
    """is_closed: the server ends meanwhile."""
    job = Job(1, JobSpec("true"), Status.COMPLETED, created_ns=NOW, ended_ns=NOW)
    job = dataclasses.replace(job, stdout_bytes=100_000)

    async def main() -> None:
        output = Output(tmp_path, 1 << 20)
        files = [tmp_path / f"1.0.{kind}" for kind in ("log", "idx")]
        for file in files:
            file.touch()
        store = SlowStore()
        slow: Store = store  # type: ignore[assignment]
        retention = Retention(slow, output, Keep())
        deleting = asyncio.ensure_future(retention.delete([job]))
        await asyncio.sleep(0)
        assert store.deleted == [1]
        deleting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deleting
        asyncio.get_running_loop().call_soon(store.may_answer.set)
        if is_closed:
            await retention.close()
        else:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while any(file.exists() for file in files):
                    await asyncio.sleep(0.01)
        assert not any(file.exists() for file in files)
        await output.close()

    asyncio.run(main())


def test_who_reads_keeps_nothing_of_an_earlier_server_where_it_was(tmp_path: Path) -> None:
    """Neither files without a record, nor others' small outputs that are not packed yet."""

    async def main() -> None:
        output = Output(tmp_path, 1 << 20)
        store = Store.open(tmp_path / "jobs.db")
        for number in (1, 2):
            job = Job(number, JobSpec("true"), Status.COMPLETED, created_ns=NOW, ended_ns=NOW)
            await store.put(dataclasses.replace(job, stdout_bytes=2))
        for number in (1, 2, 3):
            (tmp_path / f"{number}.0.log").write_bytes(b"hi")
            (tmp_path / f"{number}.0.idx").write_bytes(bytes(64))
        output.count_reader(1, 1)
        retention = Retention(store, output, Keep())
        retention.start([])
        async with asyncio.timeout(DEADLINE_SECONDS):
            while {int(path.name[0]) for path in tmp_path.glob("*.0.*")} != {1}:
                await asyncio.sleep(0.01)
        await retention.close()
        await store.close()
        await output.close()

    asyncio.run(main())
