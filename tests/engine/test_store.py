"""The records on a real disk: found again, whatever ends the server or the machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.stores import (
    ended_job,
    every_job,
    new_job,
    put_all,
    run,
    running_job,
    until,
)
from jobworker.engine import store as store_module
from jobworker.engine.ids import fsync
from jobworker.engine.store import (
    IS_OWNER,
    PART_CHARACTERS,
    EndedJob,
    EndedTotals,
    Page,
    Store,
)
from jobworker.errors import StoreError
from jobworker.job import (
    Accounting,
    Bind,
    Cause,
    Job,
    JobSpec,
    Limits,
    LogPolicy,
    Principal,
    Status,
)

FULL = Job(
    id=7,
    spec=JobSpec(
        command="/bin/echo",
        args=("a", "", "ü\n\udcff"),
        limits=Limits(50, 64, 1000),
        environment={"K": "v=w", "EMPTY": ""},
        working_directory="/tmp",
        name="nightly",
        merge_output=True,
        timeout_ms=5000,
        user="nobody",
        profile="default",
        log_max_bytes=1 << 20,
        log_policy=LogPolicy.HEAD,
        network="none",
        root="/srv/root",
        read_only=True,
        binds=(Bind("/srv/a", "/mnt"), Bind("/srv/b", "/tmp/b", read_only=True)),
    ),
    status=Status.STOPPED,
    created_ns=1_700_000_000_000_000_001,
    started_ns=1_700_000_000_000_000_002,
    ended_ns=1_700_000_000_000_000_003,
    end_requested=Cause.STOPPED,
    end_signal=2,
    end_grace_ms=60_000,
    cause=Cause.STOPPED,
    exit_code=3,
    signal=15,
    failed_step="exec",
    failed_errno=2,
    detail="no such file",
    accounting=Accounting(1, None, 3, 0, 5, 6),
    stdout_bytes=1 << 40,
    stderr_bytes=2,
    lost_bytes=77,
    log_bytes=1 << 41,
    cleanup_uncertain=True,
    created_by=Principal("älice", "user", "0AFF"),
    stopped_by=Principal("root", "admin", "01"),
)


# Records


def test_every_field_comes_back(tmp_path: Path) -> None:
    defaults = Job(id=0, spec=JobSpec(""), status=Status.RUNNING, created_ns=0)
    for field in dataclasses.fields(Job):
        if field.name in {"output_problem", "environment_withheld", "is_brief"}:
            continue  # of a live job, at this moment; of one that is shown, or read: not stored
        # A field that is new must get a value here, or nobody sees that it is not stored.
        assert getattr(FULL, field.name) != getattr(defaults, field.name), field.name
    for field in dataclasses.fields(JobSpec):
        assert getattr(FULL.spec, field.name) != getattr(defaults.spec, field.name), field.name

    async def write(store: Store) -> None:
        await put_all(store, [FULL, new_job(8)])
        assert await store.get(7) == FULL

    async def read(store: Store) -> None:
        assert await store.get(7) == FULL
        assert await store.get(8) == new_job(8)
        assert await store.get(9) is None

    run(tmp_path, write)
    run(tmp_path, read)


@pytest.mark.parametrize(
    "strings",
    [{"args": ("\udcff",) * 2_000}, {"environment": {"A": 'é"\\' * 2_000}}],
)
def test_a_large_record_in_brief(tmp_path: Path, strings: dict[str, Any]) -> None:
    large = replace(FULL, spec=replace(FULL.spec, **strings))
    without = replace(large, spec=replace(large.spec, args=(), environment={}), is_brief=True)

    async def test(store: Store) -> None:
        for job in (large, replace(FULL, id=8)):
            await store.put(job)
        assert await store.get(7) == large
        assert await store.get(7, brief=True) == without
        assert await store.get(8, brief=True) == await store.get(8) == replace(FULL, id=8)

    run(tmp_path, test)


def test_the_last_record_of_a_job_counts(tmp_path: Path) -> None:
    async def test(store: Store) -> None:
        await put_all(store, [new_job(1), running_job(1), ended_job(1)])
        assert await store.get(1) == ended_job(1)
        await store.put(running_job(2))
        await store.put(ended_job(2))
        assert await store.get(2) == ended_job(2)

    run(tmp_path, test)


def test_the_unended_oldest_first(tmp_path: Path) -> None:
    async def test(store: Store) -> None:
        await put_all(store, [ended_job(1), running_job(4), new_job(3), ended_job(5), new_job(2)])
        assert await store.unended() == [new_job(2), new_job(3), running_job(4)]

    run(tmp_path, test)


# Pages

NAMES = ("", "a", "b")
OWNERS = ("", "alice", "bob", "alice")


def some_jobs(count: int) -> list[Job]:
    """Of every status, name and owner, in no order that has to do with the id."""
    makes: list[Callable[..., Job]] = [new_job, running_job, ended_job, ended_job]
    jobs = [
        makes[number * 7 % 4](number, NAMES[number % 3], owner=OWNERS[number // 3 % 4])
        for number in range(1, count + 1)
    ]
    return [replace(job, status=Status.FAILED) if job.id % 5 == 0 else job for job in jobs]


@pytest.mark.parametrize("owner", [None, "alice", "none has it", ""])
@pytest.mark.parametrize("name", ["", "a", "none has it"])
@pytest.mark.parametrize(
    "statuses", [set(), {Status.RUNNING}, {Status.FAILED, Status.COMPLETED}, set(Status)]
)
def test_pages(tmp_path: Path, name: str, statuses: set[Status], owner: str | None) -> None:
    """No job is found by the owner that has no name: it is nobody's."""
    jobs = some_jobs(60)

    async def test(store: Store) -> None:
        await put_all(store, jobs)
        for before_id in (None, 61, 31, 2, 1):
            expected = [
                job
                for job in reversed(jobs)
                if (before_id is None or job.id < before_id)
                and (not statuses or job.status in statuses)
                and (not name or job.spec.name == name)
                and (owner is None or (job.owner == owner and owner))
            ]
            for count in (1, 7, 1000):
                found = await store.page(before_id, count, statuses, name, owner)
                assert found.jobs == expected[:count]
                is_last = len(expected) < count
                assert found.before_id == (None if is_last else found.jobs[-1].id)

    run(tmp_path, test)


@pytest.mark.parametrize("owner", [None, "alice"])
def test_of_large_records_few_are_read_at_once(tmp_path: Path, owner: str | None) -> None:
    """Others are read in between; of small ones all are read at once."""
    strings = ("\x01" * 10_000,) * 3
    spec_characters = 6 * 30_000
    at_once = PART_CHARACTERS // spec_characters + 1

    async def test(store: Store) -> None:
        large = [ended_job(number, owner="alice") for number in range(1, 21)]
        large = [replace(job, spec=replace(job.spec, args=strings)) for job in large]
        small = [ended_job(number, owner="alice") for number in range(21, 121)]
        await put_all(store, [*large, *small])
        page = await store.page(None, 100, owner=owner)
        assert page == Page(small[::-1], 21)
        sizes, found = [], []
        while page.before_id is not None:
            page = await store.page(page.before_id, 100, owner=owner)
            sizes.append(len(page.jobs))
            found += page.jobs
        assert [job.id for job in found] == [*range(20, 0, -1)]
        assert all(job.is_brief for job in found)
        assert max(sizes) == at_once < 5
        assert (await store.page(None, 110, owner=owner)).before_id == 21 - at_once

    run(tmp_path, test)


def test_no_question_takes_longer_with_more_jobs(tmp_path: Path) -> None:
    """Counted in steps of SQLite's machine, which no other load of the computer changes."""
    questions: dict[str, Callable[[Store], Awaitable[object]]] = {
        "get": lambda store: store.get(20),
        "output": lambda store: store.get_output(20),
        "page": lambda store: store.page(count=10),
        "page from the middle": lambda store: store.page(15, 10),
        "statuses": lambda store: store.page(None, 10, {Status.COMPLETED, Status.FAILED}),
        "a status that is rare": lambda store: store.page(None, 10, {Status.RUNNING}),
        "a status that none has": lambda store: store.page(None, 10, {Status.STOPPED}),
        "name": lambda store: store.page(None, 10, name="a"),
        "name and a status that none has": lambda store: store.page(
            None, 10, {Status.STOPPED}, "a"
        ),
        "name that none has": lambda store: store.page(None, 10, name="c"),
        "owner": lambda store: store.page(None, 10, owner="alice"),
        "owner with many": lambda store: store.page(None, 10, owner="bob"),
        "owner from the middle": lambda store: store.page(15, 10, owner="bob"),
        "owner that none has": lambda store: store.page(None, 10, owner="carol"),
        "owner and a status": lambda store: store.page(
            None, 10, {Status.COMPLETED, Status.STOPPED}, owner="alice"
        ),
        "owner and name of many others": lambda store: store.page(
            None, 10, name="a", owner="alice"
        ),
        "owner with many, and a name that is rare": lambda store: store.page(
            None, 10, name="rare", owner="bob"
        ),
        "owner with many, name of many, a status that none has": lambda store: store.page(
            None, 10, {Status.STOPPED}, "a", "bob"
        ),
        "whether one is its owner": lambda store: store.is_owner("alice", 20),
        "unended": lambda store: store.unended(),
        "ended": lambda store: store.ended_before(1 << 62, 10),
        "ended later": lambda store: store.ended_after(1 << 62, 10),
        "totals": lambda store: store.ended_totals(),
    }
    steps: dict[str, list[int]] = {question: [] for question in questions}

    async def ask(store: Store) -> None:
        for question, call in questions.items():
            count = 0

            def step() -> int:
                nonlocal count
                count += 1
                return 0

            store._reader.set_progress_handler(step, 1)
            await call(store)
            store._reader.set_progress_handler(None, 1)
            steps[question].append(count)

    async def test(store: Store) -> None:
        await store.put(running_job(1, "a", "alice"))
        await put_all(store, [ended_job(2, "a", owner="alice"), ended_job(3, "rare", owner="bob")])
        for first, last in ((4, 100), (100, 5000)):
            jobs = [ended_job(i, NAMES[i % 2], i % 2, "bob") for i in range(first, last)]
            await put_all(store, jobs)
            await ask(store)

    run(tmp_path, test)
    for question, (few, many) in steps.items():
        assert 0 < many <= few * 1.1 + 20, question


def test_whose_a_job_is_says_the_index_alone(tmp_path: Path) -> None:
    """The time that a row takes would tell who may not know of it how long that is."""

    async def test(store: Store) -> None:
        await put_all(store, [ended_job(1, owner="alice"), running_job(2, owner="alice")])
        assert [await store.is_owner("alice", job_id) for job_id in (1, 2, 3)] == [
            True,
            True,
            False,
        ]
        assert not await store.is_owner("bob", 1)
        question = f"EXPLAIN QUERY PLAN {IS_OWNER}"
        plan = store._reader.execute(question, ("alice", 1, *Status)).fetchall()
        assert len(plan) == 1
        assert "USING COVERING INDEX jobs_by_owner" in str(plan)

    run(tmp_path, test)


# Writing


@contextlib.contextmanager
def blocked(folder: Path) -> Iterator[None]:
    """Another connection is about to write: the writer waits."""
    blocker = sqlite3.connect(folder / "jobs.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    yield
    blocker.execute("ROLLBACK")
    blocker.close()


def test_what_did_not_come_to_the_disk_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though no other record comes."""
    wal, elsewhere = tmp_path / "jobs.db-wal", tmp_path / "elsewhere"

    async def test(store: Store) -> None:
        await store.put(new_job(1))
        wal.rename(elsewhere)
        try:
            await until(lambda: caplog.text.count("cannot be brought to the disk") >= 2)
        finally:
            elsewhere.rename(wal)

    run(tmp_path, test)


async def put_and_wait_until_taken(store: Store, job: Job) -> asyncio.Future[None]:
    """What is put from now on goes into the next commit."""
    put = asyncio.ensure_future(store.put(job))
    await asyncio.sleep(0)
    await until(store._writer._queue.empty)
    return put


def test_what_waits_shares_a_commit(tmp_path: Path) -> None:
    statements: list[str] = []

    async def test(store: Store) -> None:
        await store.put(new_job(1))
        store._writer._connection.set_trace_callback(statements.append)
        with blocked(tmp_path):
            first = await put_and_wait_until_taken(store, new_job(1))
            rest = [asyncio.ensure_future(store.put(new_job(i))) for i in range(2, 202)]
            await asyncio.sleep(0)
            assert not first.done()
        await asyncio.gather(first, *rest)
        assert statements.count("COMMIT") == 1
        assert len(await every_job(store)) == 201

    run(tmp_path, test)


def test_a_caller_that_is_cancelled_harms_nobody(tmp_path: Path) -> None:
    async def test(store: Store) -> None:
        with blocked(tmp_path):
            await put_and_wait_until_taken(store, new_job(9))
            cancelled = asyncio.ensure_future(store.put(new_job(1)))
            other = asyncio.ensure_future(store.put(new_job(2)))  # in the same commit
            await asyncio.sleep(0)
            cancelled.cancel()
        await other
        assert cancelled.cancelled()
        assert await store.get(1) == new_job(1)

    run(tmp_path, test)


def test_close_writes_all_that_was_put(tmp_path: Path) -> None:
    async def write() -> None:
        store = Store.open(tmp_path / "jobs.db")
        puts = [asyncio.ensure_future(store.put(new_job(i))) for i in range(1, 501)]
        await asyncio.sleep(0)
        await store.close()
        assert all(put.done() and not put.exception() for put in puts)
        with pytest.raises(StoreError, match="closed"):
            await store.put(new_job(501))

    async def read(store: Store) -> None:
        assert len(await every_job(store)) == 500

    asyncio.run(write())
    run(tmp_path, read)


def test_what_cannot_be_written_ends_no_thread(tmp_path: Path) -> None:
    async def test(store: Store) -> None:
        with pytest.raises(StoreError, match="written"):
            await store.put_output(1, object(), b"")  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="written"):
            await store.put(replace(new_job(1), exit_code=1 << 70))
        await store.put(new_job(1))
        assert await store.get(1) == new_job(1)

    run(tmp_path, test)


def test_a_program_that_forgets_to_close_can_end(tmp_path: Path) -> None:
    program = """if True:
        import asyncio, pathlib, sys
        from jobworker.engine.store import Store
        async def main():
            Store.open(pathlib.Path(sys.argv[1]))
            sys.exit(3)
        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "jobs.db"], timeout=30, check=False
    )
    assert ended.returncode == 3


# Small outputs, and what becomes of ended jobs


def test_outputs_go_with_their_jobs(tmp_path: Path) -> None:
    async def write(store: Store) -> None:
        await put_all(store, [ended_job(1), ended_job(2)])
        await store.put_output(1, b"segment\0", b"index")
        await store.put_output(2, b"", b"\xff" * 100_000)

    async def read(store: Store) -> None:
        assert await store.get_output(1) == (b"segment\0", b"index")
        assert await store.get_output(2) == (b"", b"\xff" * 100_000)
        assert await store.get_output(3) is None
        await store.delete([1, 3])
        assert await store.get_output(1) is None
        assert await store.get(1) is None
        assert await store.get(2) == ended_job(2)
        await store.delete([])

    run(tmp_path, write)
    run(tmp_path, read)


def test_an_output_is_there_where_the_ending_is_known(tmp_path: Path) -> None:
    """Put before the ending and not waited for; another connection never sees one alone."""

    async def test(store: Store) -> None:
        witness = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
        missing = (
            "SELECT count(*) FROM jobs LEFT JOIN outputs ON id = job_id "
            "WHERE ended_ns > 0 AND job_id IS NULL"
        )
        for first in range(1, 500, 10):
            ids = range(first, first + 10)
            writes = [call for i in ids for call in (store.put_output(i, b"x", b"i"),)]
            writes += [store.put(ended_job(i)) for i in ids]
            done = asyncio.gather(*writes)
            while not done.done():
                assert witness.execute(missing).fetchone() == (0,)
                await asyncio.sleep(0)
        witness.close()

    run(tmp_path, test)


def test_what_retention_asks_for(tmp_path: Path) -> None:
    """The clock was set back meanwhile: not the smallest id has ended first."""
    times = {1: 500, 2: 100, 3: 300, 4: 300}

    async def test(store: Store) -> None:
        assert await store.ended_totals() == EndedTotals(0, 0)
        await put_all(store, [running_job(i) for i in range(1, 7)])
        ended = [
            replace(ended_job(i), ended_ns=ended_ns, log_bytes=10 * i)
            for i, ended_ns in times.items()
        ]
        await put_all(store, ended)
        in_order = [
            EndedJob(2, 100, 20), EndedJob(3, 300, 30), EndedJob(4, 300, 40), EndedJob(1, 500, 10)
        ]  # fmt: skip
        assert await store.ended_before(501, 10) == in_order
        assert await store.ended_before(500, 10) == in_order[:3]
        assert await store.ended_before(1 << 62, 2) == in_order[:2]
        assert await store.ended_before(100, 10) == []
        assert await store.ended_after(100, 2) == in_order[1:3]
        assert await store.ended_after(500, 10) == []
        assert await store.ended_totals() == EndedTotals(4, 100)

        await store.put(replace(ended[1], log_bytes=5))  # some of it was dropped
        assert await store.ended_totals() == EndedTotals(4, 85)
        await store.delete([2, 6])  # 6 has not ended, and was never counted
        assert await store.ended_totals() == EndedTotals(3, 80)
        assert await store.ended_before(1 << 62, 10) == in_order[1:]
        await store.put(replace(ended_job(7), log_bytes=1))  # without a record before
        assert await store.ended_totals() == EndedTotals(4, 81)

    run(tmp_path, test)


def test_many_are_deleted_at_once(tmp_path: Path) -> None:
    async def test(store: Store) -> None:
        await put_all(store, [ended_job(i) for i in range(1, 1001)])
        await store.delete(range(1, 1000))
        assert (await store.page()).jobs == [ended_job(1000)]
        assert (await store.ended_totals()).jobs == 1

    run(tmp_path, test)


# The WAL


def wal_bytes(folder: Path) -> int:
    return os.stat(folder / "jobs.db-wal").st_size


def shorten_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SYNC_SECONDS", 0.01)
    monkeypatch.setattr(store_module, "LONG_WAL_BYTES", 200_000)


async def put_until(store: Store, is_enough: Callable[[], bool]) -> None:
    """Without a pause, so that there is no moment without a writer."""
    job_id = 0
    while not is_enough():
        ids = range(job_id + 1, job_id + 21)
        await put_all(store, [running_job(i) for i in ids])
        job_id = ids[-1]


def test_the_wal_stays_short_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_soon(monkeypatch)
    sizes = [0]

    def was_shortened_thrice() -> bool:
        sizes.append(wal_bytes(tmp_path))
        return sum(later < size for size, later in pairwise(sizes)) >= 3

    async def test(store: Store) -> None:
        load = asyncio.ensure_future(put_until(store, was_shortened_thrice))
        while not load.done():
            await store.page(count=20)
        await load

    run(tmp_path, test)


def test_a_foreign_reader_keeps_the_wal_only_while_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_soon(monkeypatch)

    async def test(store: Store) -> None:
        await store.put(new_job(1))
        reader = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
        await put_until(store, lambda: wal_bytes(tmp_path) > 600_000)
        assert reader.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
        reader.close()
        await put_until(store, lambda: wal_bytes(tmp_path) < 600_000)

    run(tmp_path, test)


def test_an_idle_store_has_all_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def noted(path: Path | str) -> None:
        fsync(path)
        synced.append(str(path))

    async def test(store: Store) -> None:
        await store.put(new_job(1))
        await until(lambda: synced.count(f"{tmp_path}/jobs.db-wal") == 1)
        await store.put(new_job(2))
        await until(lambda: synced.count(f"{tmp_path}/jobs.db-wal") == 2)

    monkeypatch.setattr(store_module, "SYNC_SECONDS", 0.01)
    monkeypatch.setattr(store_module, "fsync", noted)
    run(tmp_path, test)


def test_close_while_all_is_just_being_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SYNC_SECONDS", 0.0005)

    async def test(store: Store) -> None:
        await store.put(new_job(1))

    for _ in range(150):
        run(tmp_path, test)


# The full disk


def test_a_database_that_cannot_grow(tmp_path: Path) -> None:
    """SQLite's own limit stands for the disk's: nothing half, and it goes on afterwards."""

    async def test(store: Store) -> None:
        connection = store._writer._connection
        await put_all(store, [ended_job(i) for i in range(1, 101)])
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="full"):
            await put_all(store, [ended_job(i) for i in range(101, 301)])
        known = await every_job(store)
        assert len(known) < 300
        assert (await store.ended_totals()).jobs == len(known)
        connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
        await put_all(store, [ended_job(i) for i in range(101, 301)])
        assert len(await every_job(store)) == 300

    run(tmp_path, test)


ON_A_FULL_DISK = """if True:
    import asyncio, os, pathlib, sys
    from jobworker.engine.store import Store
    from jobworker.errors import StoreError
    from jobworker.job import JobSpec, created

    folder = pathlib.Path(sys.argv[1])
    ballast = folder / "ballast"

    def fill():
        with ballast.open("ab", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    async def refuse(call):
        try:
            await call
        except StoreError as error:
            return str(error)
        raise AssertionError("was taken")

    async def count(store):
        count, before_id = 0, 1 << 62
        while before_id is not None:
            jobs, before_id = await store.page(before_id, 1000)
            count += len(jobs)
        return count

    async def first():
        store = Store.open(folder / "jobs.db")
        acknowledged = [store.reserve_id()]
        await store.put(created(acknowledged[0], JobSpec("/bin/true"), 1))
        fill()
        async def put_until_full():
            while True:
                job_id = store.reserve_id()
                await store.put(created(job_id, JobSpec("/bin/true", ("x" * 3000,)), 1))
                acknowledged.append(job_id)
        print("put:", await refuse(put_until_full()))
        async def take_until_full():
            while True:
                store.reserve_id()
        print("id:", await refuse(take_until_full()))
        assert await store.get(acknowledged[-1])
        assert await count(store) == len(acknowledged)
        ballast.unlink()
        last = store.reserve_id()
        await store.put(created(last, JobSpec("/bin/true"), 1))
        assert await count(store) == len(acknowledged) + 1
        fill()
        os._exit(0)  # as kill -9 would end it

    async def second():
        store = Store.open(folder / "jobs.db")  # still full
        assert (await store.page()).jobs
        ballast.unlink()
        (newest,), _ = await store.page(count=1)
        print("next:", store.reserve_id() > newest.id)
        await store.close()

    asyncio.run({"first": first, "second": second}[sys.argv[2]]())
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: a tmpfs of 3 MiB, in a mount namespace of its own."""
    private = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
    if subprocess.run([*private, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here: not root, and no user namespaces")
    run_both = (
        f'{mount} && for each in first second; do "$0" -c "$1" {tmp_path} $each || exit; done'
    )
    ended = subprocess.run(
        [*private, "sh", "-c", run_both, sys.executable, ON_A_FULL_DISK],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    put, job_id, next_id = ended.stdout.splitlines()
    assert put.startswith("put: job records cannot be written: ")
    assert job_id.startswith("id: no job ids can be reserved")
    assert next_id == "next: True"
