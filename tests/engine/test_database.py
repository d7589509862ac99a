"""The database as a start finds it: older, newer, of others, damaged."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from descriptors import no_descriptors
from engine.stores import (
    copy_of_a_running_store,
    every_job,
    new_job,
    nothing,
    run,
    set_other_boot,
    take,
)
from jobworker.engine import database
from jobworker.engine.store import EndedJob, EndedTotals, Store
from jobworker.errors import StateFolderError, StoreError
from jobworker.job import Accounting, Cause, JobSpec, Limits, LogPolicy, Principal

FIXTURES = Path(__file__).parent.parent / "fixtures"


def test_another_program_that_has_the_records_open(tmp_path: Path) -> None:
    take(tmp_path, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db")) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StateFolderError, match="end the other program that has it open"):
            run(tmp_path, nothing)


def make_database(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


def test_a_database_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    make_database(tmp_path / "jobs.db", (FIXTURES / "jobs-1.sql").read_text())
    (tmp_path / "next-id").write_text("1004\n")

    async def test(store: Store) -> None:
        jobs = (await store.page()).jobs
        assert [(job.id, job.status) for job in jobs] == [
            (4, "INITIALIZING"), (3, "RUNNING"), (2, "FAILED"), (1, "FAILED")
        ]  # fmt: skip
        first = jobs[-1]
        assert first.spec == JobSpec(
            *("/bin/echo", ("a", "ü\n"), Limits(50, 64, 1000), {"K": "v"}, "/tmp", "nightly", True)
        )
        assert first.accounting == Accounting(1, 2, 3, None, 5, 0)
        assert (first.exit_code, first.cause, first.ended_ns) == (7, Cause.EXITED, 3000)
        assert (jobs[2].failed_step, jobs[2].failed_errno) == ("exec", 2)
        assert jobs[1].end_requested is Cause.STOPPED
        assert (await store.page(name="nightly")).jobs == [first]
        assert await store.unended() == jobs[1::-1]
        assert await store.ended_totals() == EndedTotals(2, 30)
        assert await store.ended_before(3000, 9) == [EndedJob(2, 2500, 0)]
        assert store.reserve_id() == 1004
        await store.delete([1])
        assert await store.ended_totals() == EndedTotals(1, 0)

    run(tmp_path, test)
    assert version_of(tmp_path / "jobs.db") == database.SCHEMA_VERSION


def test_a_database_of_version_2_is_brought_up_to_date(tmp_path: Path) -> None:
    """Its jobs are nobody's, and all else is as it was."""
    make_database(tmp_path / "jobs.db", (FIXTURES / "jobs-2.sql").read_text())

    async def test(store: Store) -> None:
        jobs = (await store.page()).jobs
        assert [(job.id, job.status, job.owner) for job in jobs] == [
            (4, "INITIALIZING", ""), (3, "RUNNING", ""), (2, "FAILED", ""), (1, "STOPPED", "")
        ]  # fmt: skip
        first = jobs[-1]
        assert (first.created_by, first.stopped_by) == (None, None)
        assert first.spec == JobSpec(
            *("/bin/echo", ("a", "ü\n"), Limits(50, 64, 1000, 32), {"K": "v"}, "/tmp", "nightly"),
            *(True, 5000, "nobody", "default", 1 << 20, LogPolicy.HEAD),
        )
        assert (first.lost_bytes, first.log_bytes) == (4, 60)
        assert await store.get_output(1) == (b"segment\0", b"index")
        assert not await store.is_owner("", 1)
        assert not await store.is_owner("alice", 5)
        assert (await store.page(owner="")).jobs == []
        await store.put(new_job(5, "nightly", "alice"))
        assert (await store.page(owner="alice")).jobs == [new_job(5, "nightly", "alice")]
        assert [job.id for job in (await store.page(name="nightly")).jobs] == [5, 3, 1]
        assert await store.ended_totals() == EndedTotals(2, 60)

    run(tmp_path, test)
    assert version_of(tmp_path / "jobs.db") == database.SCHEMA_VERSION


def test_a_database_of_version_3_is_brought_up_to_date(tmp_path: Path) -> None:
    """Of a job that is to end it does not say how."""
    make_database(tmp_path / "jobs.db", (FIXTURES / "jobs-3.sql").read_text())

    async def test(store: Store) -> None:
        (job,) = (await store.page(owner="alice")).jobs
        assert (job.id, job.end_requested) == (5, Cause.STOPPED)
        assert (job.end_signal, job.end_grace_ms) == (0, 0)
        assert job.stopped_by == Principal("root", "admin", "01")

    run(tmp_path, test)
    assert version_of(tmp_path / "jobs.db") == database.SCHEMA_VERSION


def test_an_older_database_has_the_schema_of_a_new_one(tmp_path: Path) -> None:
    """Every one of them: all the migrations from its version on."""
    schemas = []
    older = [path.read_text() for path in sorted(FIXTURES.glob("jobs-*.sql"))]
    assert len(older) == database.SCHEMA_VERSION - 1
    for name, script in enumerate(["", *older]):
        folder = tmp_path / str(name)
        folder.mkdir()
        make_database(folder / "jobs.db", script)
        run(folder, nothing)
        connection = sqlite3.connect(folder / "jobs.db")
        rows = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name")
        schemas.append([(row[0], " ".join((row[1] or "").split())) for row in rows])
        connection.close()
    assert all(schema == schemas[0] for schema in schemas)


def test_a_migration_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(tmp_path, 1)
    with monkeypatch.context() as patch:
        broken = (*database.MIGRATIONS, "DROP TABLE outputs; DROP TABLE no_such_table;")
        patch.setattr(database, "MIGRATIONS", broken)
        patch.setattr(database, "SCHEMA_VERSION", len(broken))
        with pytest.raises(StateFolderError, match="no_such_table"):
            run(tmp_path, nothing)
    assert version_of(tmp_path / "jobs.db") == database.SCHEMA_VERSION
    assert take(tmp_path, 1) == [2]


def test_a_newer_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    """Nor taken for a damaged one, if what is in it is not understood here."""
    make_database(
        tmp_path / "jobs.db",
        """
        PRAGMA user_version = 99;
        CREATE TABLE jobs (id);
        PRAGMA writable_schema = ON;
        UPDATE sqlite_master SET sql = 'CREATE NOVELTY jobs (id)';
        """,
    )
    before = (tmp_path / "jobs.db").read_bytes()
    with pytest.raises(StateFolderError, match=r"newer jobworker .*99"):
        run(tmp_path, nothing)
    assert (tmp_path / "jobs.db").read_bytes() == before
    assert not list(tmp_path.glob("*damaged*"))


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    make_database(tmp_path / "jobs.db", "PRAGMA application_id = 42; CREATE TABLE t (x);")
    with pytest.raises(StateFolderError, match="another program"):
        run(tmp_path, nothing)


@pytest.mark.parametrize("boot", ["this boot", "other boot"])
def test_garbage_is_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, boot: str
) -> None:
    ids = take(tmp_path, 10)
    (tmp_path / "jobs.db").write_bytes(os.urandom(50_000))
    if boot == "other boot":
        set_other_boot(tmp_path)
    assert take(tmp_path, 1) == [ids[-1] + 1]
    (aside,) = tmp_path.glob("jobs.db.damaged-*")
    assert aside.stat().st_size == 50_000
    assert aside.name in caplog.text
    assert ".recover" in caplog.text
    assert damaged(tmp_path) == [aside.name]
    aside.unlink()
    assert damaged(tmp_path) == []


def test_without_a_descriptor_nothing_damaged_is_passed_over(tmp_path: Path) -> None:
    """Output that may have its records there would be removed."""
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        database.set_aside(tmp_path / "jobs.db")


def damaged(folder: Path) -> list[str]:
    names: list[str] = []

    async def look(store: Store) -> None:
        names.extend(store.damaged)

    run(folder, look)
    return names


def test_an_empty_database_is_damaged_unless_no_server_was_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "jobs.db").touch()
    ids = take(tmp_path, 10)
    assert damaged(tmp_path) == []
    (tmp_path / "jobs.db").write_bytes(b"")
    assert take(tmp_path, 1) == [ids[-1] + 1]
    assert len(damaged(tmp_path)) == 1
    assert "empty" in caplog.text


def test_a_wal_is_moved_aside_before_its_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may die in between, and SQLite removes the WAL of a new database."""
    moved: list[str] = []

    def rename(path: Path, target: Path) -> None:
        moved.append(path.name)
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    for name in ("jobs.db", "jobs.db-wal", "jobs.db-shm"):
        (tmp_path / name).touch()
    database._move_aside(tmp_path / "jobs.db", sqlite3.DatabaseError("damaged"))
    assert sorted(moved) == ["jobs.db", "jobs.db-shm", "jobs.db-wal"]
    assert moved[-1] == "jobs.db"


def damage_pages(path: Path) -> None:
    """Some in the middle, as a bad disk may."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4 // 4096 * 4096)
        file.write(os.urandom(size // 2))


def test_damage_is_found_at_the_start_after_a_power_loss(tmp_path: Path) -> None:
    ids = copy_of_a_running_store(tmp_path, tmp_path / "copy", 2000)
    damage_pages(tmp_path / "jobs.db")
    set_other_boot(tmp_path)

    async def test(store: Store) -> None:
        assert (await store.page()).jobs == []
        assert store.reserve_id() > ids[-1]

    run(tmp_path, test)
    assert len(list(tmp_path.glob("jobs.db.damaged-*"))) == 1


def test_damage_that_is_found_later_is_dealt_with_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = copy_of_a_running_store(tmp_path, tmp_path / "copy", 2000)
    damage_pages(tmp_path / "jobs.db")

    async def find(store: Store) -> None:
        with pytest.raises(StoreError, match="read"):
            await every_job(store)

    async def use(store: Store) -> None:
        job_id = store.reserve_id()
        assert job_id > ids[-1]
        await store.put(new_job(job_id))
        assert (await store.page()).jobs == [new_job(job_id)]

    run(tmp_path, find)
    assert "damaged" in caplog.text
    assert not list(tmp_path.glob("jobs.db.damaged-*"))
    run(tmp_path, use)
    assert len(list(tmp_path.glob("jobs.db.damaged-*"))) == 1


@pytest.mark.parametrize("folder", ["/proc", "/no/such/folder"])
def test_a_folder_that_cannot_be_written(folder: str) -> None:
    with pytest.raises(StateFolderError, match="JOB_WORKER_STATE_DIR"):
        run(Path(folder), nothing)
