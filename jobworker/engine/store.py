"""The records of all jobs, the output of small ones, and the ids of those to come.

    jobs.db     the records, in SQLite (jobs.db-wal and jobs.db-shm belong to it)
    next-id     no id from this one on was ever given out; renewed, with fsync, a block ahead
    last-run    how the last server that used them ended, and the id that it would give next
    jobs.db.damaged-*   a damaged database, moved aside: until it is removed, a job of which there
                is no record may have one there

Three threads, each with a connection of its own, so that none waits for another's disk:
- the writer. Whatever was put while it was busy goes into one transaction, so a single record
  never waits for others, and many share one commit. A commit survives the death of this
  process at once.
- the syncer, which brings commits to the disk. They survive the death of the machine within
  a second.
- the reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import queue
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jobworker.engine.mounts import mount_id_of, read_mounts
from jobworker.engine.pace import Pace
from jobworker.errors import StateFolderError, StoreError
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
    changed,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

APPLICATION_ID = 0x6A6F6277  # "jobw", in the file's header
# Each brings the schema from the version that is its place in the list to the next.
MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY,
        status TEXT NOT NULL,
        name TEXT NOT NULL,
        created_ns INTEGER NOT NULL,
        started_ns INTEGER NOT NULL,
        ended_ns INTEGER NOT NULL,
        cause INTEGER,
        exit_code INTEGER NOT NULL,
        signal INTEGER NOT NULL,
        stdout_bytes INTEGER NOT NULL,
        stderr_bytes INTEGER NOT NULL,
        spec TEXT NOT NULL,
        rest TEXT NOT NULL
    );
    CREATE INDEX jobs_by_status ON jobs (status, id);
    CREATE INDEX jobs_by_name ON jobs (name, id) WHERE name != '';
    CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    """,
    # Small outputs, what retention asks for, and no search in which jobs that do not fit are
    # looked at. facts told which ids were given out; last-run does.
    """
    DROP TABLE facts;
    ALTER TABLE jobs ADD COLUMN log_bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE jobs SET log_bytes = stdout_bytes + stderr_bytes WHERE ended_ns > 0;
    DROP INDEX jobs_by_name;
    CREATE INDEX jobs_by_name ON jobs (name, status, id) WHERE name != '';
    CREATE INDEX jobs_by_end ON jobs (ended_ns, id, log_bytes) WHERE ended_ns > 0;
    CREATE TABLE outputs (
        job_id INTEGER PRIMARY KEY,
        segment BLOB NOT NULL,
        "index" BLOB NOT NULL
    );
    CREATE TABLE totals (ended_jobs INTEGER NOT NULL, log_bytes INTEGER NOT NULL);
    INSERT INTO totals SELECT count(*), coalesce(sum(log_bytes), 0) FROM jobs WHERE ended_ns > 0;
    CREATE TRIGGER job_inserted AFTER INSERT ON jobs WHEN new.ended_ns > 0 BEGIN
        UPDATE totals SET ended_jobs = ended_jobs + 1, log_bytes = log_bytes + new.log_bytes;
    END;
    CREATE TRIGGER job_updated AFTER UPDATE ON jobs WHEN new.ended_ns > 0 OR old.ended_ns > 0 BEGIN
        UPDATE totals SET
            ended_jobs = ended_jobs + (new.ended_ns > 0) - (old.ended_ns > 0),
            log_bytes = log_bytes
                + iif(new.ended_ns > 0, new.log_bytes, 0)
                - iif(old.ended_ns > 0, old.log_bytes, 0);
    END;
    CREATE TRIGGER job_deleted AFTER DELETE ON jobs BEGIN
        DELETE FROM outputs WHERE job_id = old.id;
        UPDATE totals SET ended_jobs = ended_jobs - 1, log_bytes = log_bytes - old.log_bytes
            WHERE old.ended_ns > 0;
    END;
    """,
    # Whose a job is. Older ones are nobody's.
    """
    ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    CREATE INDEX jobs_by_owner ON jobs (owner, status, id) WHERE owner != '';
    CREATE INDEX jobs_by_owner_and_name ON jobs (owner, name, status, id)
        WHERE owner != '' AND name != '';
    """,
)
SCHEMA_VERSION = len(MIGRATIONS)

# Ids that may be skipped when the machine loses power.
ID_BLOCK = 1000
SYNC_SECONDS = 1.0
# Beyond it the WAL goes into the database. The next start must read what is in it.
LONG_WAL_BYTES = 16 << 20
# How long writing waits for readers that keep the WAL from being cut off, once a second.
WAL_WAIT_MILLISECONDS = 20
LOCK_WAIT_MILLISECONDS = 5000
# To read a row in one go; SQLite's own default is 2 MiB of pages.
CACHE_KIB = 4096

DAMAGED = ".damaged-"  # and the time, behind the name of one that was moved aside

UNENDED = (Status.INITIALIZING, Status.RUNNING)

COLUMNS = (
    *("id", "status", "name", "created_ns", "started_ns", "ended_ns", "cause", "exit_code"),
    *("signal", "stdout_bytes", "stderr_bytes", "spec", "rest", "log_bytes", "owner"),
)
SELECT = f"SELECT {', '.join(COLUMNS)} FROM jobs"
# Of records that are longer nearly all the time that they take goes into arguments and environment.
LONG_SPEC_CHARACTERS = 4 << 10
# Of what jobs were asked for, read before others have their turn; and one record more.
PART_CHARACTERS = 512 << 10
IS_LONG = f"length(spec) > {LONG_SPEC_CHARACTERS}"
WITHOUT_STRINGS = "json_set(spec, '$.args', json_array(), '$.environment', json_object())"
BRIEF_COLUMNS = (
    *(f"iif({IS_LONG}, {WITHOUT_STRINGS}, spec)" if c == "spec" else c for c in COLUMNS),
    "length(spec)",
)
SELECT_BRIEF = f"SELECT {', '.join(BRIEF_COLUMNS)} FROM jobs"
# From the index alone: on the way to the owner in a row is all that its job was asked for, and who
# may not know of it could tell by the time how long that is.
IS_OWNER = (
    "SELECT 1 FROM jobs INDEXED BY jobs_by_owner "
    f"WHERE owner = ? AND owner != '' AND id = ? AND status IN ({', '.join('?' * len(Status))})"
)
ENDED = (
    # The bound that is looked for comes first; the other names the index.
    "SELECT id, ended_ns, log_bytes FROM jobs WHERE ended_ns {} ? AND ended_ns > 0 "
    "ORDER BY ended_ns, id LIMIT ?"
)


@dataclass(frozen=True, slots=True)
class _Statement:
    """One for any number of rows: after each call of SQLite the writer must get the
    interpreter's lock back, so one call for many rows is worth more than many quick ones."""

    head: str
    row: str
    tail: str = ""

    def for_rows(self, count: int) -> str:
        return self.head + ", ".join([self.row] * count) + self.tail


ROWS_AT_ONCE = 64
# A statement keeps its values until it is used again, and there is one for each number of rows. So
# a row with a longer value than that has one for itself.
LONG_VALUE = 16 << 10
PUT_OUTPUT = _Statement("INSERT OR REPLACE INTO outputs VALUES ", "(?, ?, ?)")
PUT = _Statement(
    f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ",
    f"({', '.join('?' * len(COLUMNS))})",
    # And not INSERT OR REPLACE, which would remove a row from every index first.
    f" ON CONFLICT (id) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in COLUMNS[1:])}",
)
DELETE = _Statement("DELETE FROM jobs WHERE id IN (", "?", ")")
# In one transaction. An output is never missing where the ending of its job is known.
ORDER = (PUT_OUTPUT, PUT, DELETE)


class EndedJob(NamedTuple):
    """What retention needs to know of one."""

    id: int
    ended_ns: int
    log_bytes: int


class Page(NamedTuple):
    """Some jobs, newest first."""

    jobs: list[Job]
    # The next page is of those with smaller ids. None: this is the last.
    before_id: int | None


class EndedTotals(NamedTuple):
    """Of all ended jobs."""

    jobs: int
    log_bytes: int


class Store:
    """Of one state folder; belongs to the running event loop."""

    def __init__(
        self, path: Path, connections: list[sqlite3.Connection], last_run: _LastRun, ids: _Ids
    ) -> None:
        """Use `open`."""
        self.damaged = _set_aside(path)
        self._loop = asyncio.get_running_loop()
        self._last_run = last_run
        self._ids = ids
        self._more_ids: asyncio.Future[None] | None = None
        self._spec_texts: dict[int, tuple[JobSpec, str]] = {}  # of jobs that have not ended
        writer, syncer, self._reader = self._connections = connections
        self._syncer = _Syncer(path, syncer)
        self._writer = _Writer(writer, self._syncer, last_run, self._loop)
        self._reader_thread = ThreadPoolExecutor(1, thread_name_prefix="store-reader")

    @classmethod
    def open(cls, path: Path) -> Store:
        """Blocks. Makes the database where there is none, and brings an older one up to date.
        One that is damaged is moved aside, and said so; `damaged` names all that were, and are
        still there.

        Raises StateFolderError where it is of a newer version, or cannot be opened.
        """
        try:
            with contextlib.ExitStack() as undo:
                last_run = _LastRun(path.with_name("last-run"))
                undo.callback(last_run.close)
                first, newest_id = _open_or_replace(path, last_run)
                undo.callback(first.close)
                connections = [first, _connect(path), _connect(path)]
                for connection in connections[1:]:
                    undo.callback(connection.close)
                    _set_up(connection)
                ids = _Ids(path.with_name("next-id"), last_run, newest_id)
                undo.pop_all()
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                advice = "end the other program that has it open, such as a shell of sqlite3"
            else:
                advice = (
                    "check that the folder can be written and has room, or give another one with "
                    "JOB_WORKER_STATE_DIR"
                )
            raise StateFolderError(f"{path} cannot be used: {error}; {advice}") from error
        return cls(path, connections, last_run, ids)

    async def wait_for_ids(self) -> None:
        """Returns once `reserve_id` does not block. Raises StoreError."""
        while True:
            is_under_way = self._more_ids is not None and not self._more_ids.done()
            if not is_under_way and not self._ids.are_used_up:
                return
            if not is_under_way:
                self._more_ids = asyncio.ensure_future(asyncio.to_thread(self._ids.reserve_more))
                # Seen, also where nobody waits for it any more.
                self._more_ids.add_done_callback(lambda done: done.cancelled() or done.exception())
            assert self._more_ids
            await asyncio.shield(self._more_ids)

    def reserve_id(self) -> int:
        """An id that was never given out, and never will be, whatever happens. Blocks once in
        a thousand calls, for a write to the disk, unless that was done ahead. Raises StoreError.
        """
        return self._ids.take()

    async def put(self, job: Job, *, may_wait: bool = False) -> None:
        """Returns once the record survives the death of this process. Raises StoreError.
        Where the caller is cancelled, the record is written nevertheless.

        may_wait: some milliseconds for company, where others come all the time.
        """
        # The spec of a job stays, and is the longest part of its record.
        spec, spec_text = self._spec_texts.pop(job.id, (None, ""))
        if spec is not job.spec:
            spec_text = _spec_text(job.spec)
        if not job.is_ended:
            self._spec_texts[job.id] = (job.spec, spec_text)
        try:
            await self._writer.write(PUT, [_row_from(job, spec_text)], may_wait)
        except StoreError:
            self._spec_texts.pop(job.id, None)
            raise

    async def put_output(self, job_id: int, segment: bytes, index: bytes) -> None:
        """Keeps a small output with the records; goes with its job. What is put before the
        job's ending is never missing where that is known, also if it was not waited for."""
        await self._writer.write(PUT_OUTPUT, [(job_id, segment, index)])

    async def delete(self, job_ids: Iterable[int]) -> None:
        """Forgets jobs, and the outputs that are kept here. All in one commit, for which
        other records wait: give some hundreds at a time."""
        await self._writer.write(DELETE, [(job_id,) for job_id in job_ids])

    async def get(self, job_id: int, *, brief: bool = False) -> Job | None:
        """brief: without what is long in a large record, which is marked so."""
        select, make = (SELECT_BRIEF, _brief_from) if brief else (SELECT, _job_from)
        jobs = await self._read(make, f"{select} WHERE id = ?", (job_id,))
        return jobs[0] if jobs else None

    async def is_owner(self, owner: str, job_id: int) -> bool:
        """Whether there is a record of such a job. Takes the same time for one of another and for
        none."""
        return bool(await self._read(bool, IS_OWNER, (owner, job_id, *Status)))

    async def page(
        self,
        before_id: int | None = None,
        count: int = 100,
        statuses: Iterable[Status] = (),
        name: str = "",
        owner: str | None = None,
    ) -> Page:
        """In brief, those with ids smaller than `before_id`, at most `count`; fewer where large
        records are among them, so that nobody waits long for their being read. statuses: any of
        these; empty: all. name: exactly this one; empty: all. owner: the same; None: all."""
        query, parameters = _page_query(before_id, count, sorted(set(statuses)), name, owner)
        room = PART_CHARACTERS

        def fits(row: tuple[Any, ...]) -> bool:
            nonlocal room
            room -= int(row[-1])
            return room > 0

        jobs = await self._read(_brief_from, query, parameters, fits)
        is_last = len(jobs) < count and room > 0
        return Page(jobs, None if is_last else jobs[-1].id)

    async def unended(self) -> list[Job]:
        """Oldest first: the jobs that an earlier server left behind."""
        marks = ", ".join("?" * len(UNENDED))
        query = f"{SELECT} WHERE status IN ({marks}) ORDER BY id"
        return await self._read(_job_from, query, UNENDED)

    async def get_output(self, job_id: int) -> tuple[bytes, bytes] | None:
        """Segment and index, as they were put."""
        query = 'SELECT segment, "index" FROM outputs WHERE job_id = ?'
        outputs = await self._read(tuple[bytes, bytes], query, (job_id,))
        return outputs[0] if outputs else None

    async def ended_before(self, time_ns: int, count: int) -> list[EndedJob]:
        """Those that ended before this time, at most so many, the longest ended first."""
        return await self._read(EndedJob._make, ENDED.format("<"), (time_ns, count))

    async def ended_after(self, time_ns: int, count: int) -> list[EndedJob]:
        """The same of those that ended after this time."""
        return await self._read(EndedJob._make, ENDED.format(">"), (time_ns, count))

    async def ended_totals(self) -> EndedTotals:
        query = "SELECT ended_jobs, log_bytes FROM totals"
        (totals,) = await self._read(EndedTotals._make, query, ())
        return totals

    async def close(self) -> None:
        """Once all that was put is written; what is put from now on is refused."""
        self._writer.stop_taking()
        if self._more_ids:
            await asyncio.wait([self._more_ids])
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.close()
        self._syncer.close()
        self._reader_thread.shutdown()
        self._ids.close()
        # The last one brings all of the WAL into the database, and to the disk.
        for connection in self._connections:
            connection.close()
        self._last_run.end()

    async def _read(
        self,
        make: Callable[[tuple[Any, ...]], T],
        query: str,
        parameters: Iterable[object],
        may_go_on: Callable[[tuple[Any, ...]], bool] | None = None,
    ) -> list[T]:
        """may_go_on: after this row; None: all are read."""

        def read() -> list[T]:
            with contextlib.closing(self._reader.execute(query, tuple(parameters))) as cursor:
                rows = []
                for row in cursor:
                    rows.append(row)
                    if may_go_on and not may_go_on(row):
                        break
            return [make(row) for row in rows]

        try:
            return await self._loop.run_in_executor(self._reader_thread, read)
        except sqlite3.Error as error:
            self._last_run.note(error)
            raise StoreError(f"the job records cannot be read: {error}") from error


def _page_query(
    before_id: int | None, count: int, statuses: list[Status], name: str, owner: str | None
) -> tuple[str, list[object]]:
    """Each status is a search of its own, so that every one of them goes along an index and
    stops after `count` ids, however many jobs there are."""
    before = "id < ?" if before_id is not None else "TRUE"
    parameters: list[object] = [] if before_id is None else [before_id]
    if not statuses and not name and owner is None:
        return f"{SELECT_BRIEF} WHERE {before} ORDER BY id DESC LIMIT ?", [*parameters, count]
    fixed = {"owner": owner} if owner is not None else {}
    fixed |= {"name": name} if name else {}
    where = " AND ".join([*(f"{column} = ? AND {column} != ''" for column in fixed), before])
    parameters = [*fixed.values(), *parameters]
    one = f"SELECT id FROM jobs WHERE {where} AND status = ? ORDER BY id DESC LIMIT ?"
    searches = " UNION ALL ".join([f"SELECT * FROM ({one})"] * len(statuses or Status))
    query = f"{SELECT_BRIEF} WHERE id IN ({searches}) ORDER BY id DESC LIMIT ?"
    each = [(*parameters, status, count) for status in statuses or Status]
    return query, [*itertools.chain(*each), count]


class _Write(NamedTuple):
    statement: _Statement
    rows: list[tuple[Any, ...]]  # each with the job's id first
    future: asyncio.Future[None]


class _Writer:
    """The thread that writes, and what waits for it."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        syncer: _Syncer,
        last_run: _LastRun,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._connection = connection
        self._syncer = syncer
        self._last_run = last_run
        self._loop = loop
        self._is_closing = False
        self._queue: queue.SimpleQueue[list[_Write] | None] = queue.SimpleQueue()
        self._pace: Pace[_Write] = Pace(self._queue.put)
        # A daemon, as the next one: a server that ends in an error does not wait for them.
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def write(
        self, statement: _Statement, rows: list[tuple[Any, ...]], may_wait: bool = False
    ) -> asyncio.Future[None]:
        if self._is_closing or not self._thread.is_alive():
            raise StoreError("job records cannot be written: the store is closed")
        future = self._loop.create_future()
        self._pace.add(_Write(statement, rows, future), may_wait=may_wait)
        return future

    def stop_taking(self) -> None:
        self._is_closing = True
        self._pace.act()

    def close(self) -> None:
        """Blocks; after `stop_taking`."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            error = self._commit(batch)
            self._loop.call_soon_threadsafe(_resolve, [write.future for write in batch], error)
            del batch  # the next may take long to come
            if self._syncer.is_wal_long:
                self._shorten_wal()

    def _next_batch(self) -> list[_Write]:
        """All that waits; empty at the end."""
        batch: list[_Write] = []
        # No more than were there: the first must not wait for ever new ones.
        for _ in range(max(1, self._queue.qsize())):
            writes = self._queue.get()
            if writes is None:
                if batch:
                    self._queue.put(None)  # after this batch
                break
            batch += writes
        return batch

    def _commit(self, batch: list[_Write]) -> StoreError | None:
        try:
            self._roll_back()
            statements = _statements(batch)
            # A single one is a transaction by itself.
            if len(statements) > 1:
                self._connection.execute("BEGIN IMMEDIATE")
            for statement, values in statements:
                self._connection.execute(statement, values)
            if len(statements) > 1:
                self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 no error may end the thread that all wait for
            with contextlib.suppress(sqlite3.Error):
                self._roll_back()
            self._last_run.note(error)
            return StoreError(f"job records cannot be written: {error}")
        self._syncer.expect()
        return None

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _shorten_wal(self) -> None:
        """Only possible while nobody writes. The syncer has brought most of it into the
        database just before, so little is left to do."""
        self._syncer.is_wal_long = False
        try:
            self._connection.execute(f"PRAGMA busy_timeout = {WAL_WAIT_MILLISECONDS}")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._connection.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_MILLISECONDS}")
        except sqlite3.Error as error:
            log.error("the WAL of the job records cannot be shortened: %s", error)


def _statements(batch: list[_Write]) -> list[tuple[str, list[Any]]]:
    rows: dict[_Statement, dict[int, tuple[Any, ...]]] = {statement: {} for statement in ORDER}
    for write in batch:
        # Of several records of one job only the last counts.
        rows[write.statement].update((row[0], row) for row in write.rows)
    return [
        (statement.for_rows(len(part)), list(itertools.chain(*part)))
        for statement, by_id in rows.items()
        for part in _parts(by_id.values())
    ]


def _parts(rows: Iterable[tuple[Any, ...]]) -> Iterable[list[tuple[Any, ...]]]:
    short: list[tuple[Any, ...]] = []
    for row in rows:
        if _is_long(row):
            yield [row]
        else:
            short.append(row)
    for first in range(0, len(short), ROWS_AT_ONCE):
        yield short[first : first + ROWS_AT_ONCE]


def _is_long(row: tuple[Any, ...]) -> bool:
    return any(isinstance(value, str | bytes) and len(value) > LONG_VALUE for value in row)


def _resolve(futures: list[asyncio.Future[None]], error: StoreError | None) -> None:
    for future in futures:
        if future.done():  # cancelled
            continue
        if error:
            future.set_exception(error)
        else:
            future.set_result(None)


class _Syncer:
    """The thread that waits for the disk, so that the writer does not."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.is_wal_long = False  # the writer may shorten it
        self._connection = connection
        self._wal = f"{path}-wal"
        self._expected = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-syncer", daemon=True)
        self._thread.start()

    def expect(self) -> None:
        """There is something that is not on the disk yet."""
        self._expected.set()

    def close(self) -> None:
        self._is_closing.set()
        self._expected.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._expected.wait()
            self._is_closing.wait(SYNC_SECONDS)
            # Cleared before the other is looked at: `close` sets that one first.
            self._expected.clear()
            try:
                self._sync()
            except (OSError, sqlite3.Error) as error:
                log.error("job records cannot be brought to the disk: %s", error)
                self._expected.set()  # again, though no record may come

    def _sync(self) -> None:
        """SQLite syncs the WAL only when it moves it to the database (synchronous = NORMAL)."""
        _fsync(self._wal)
        if os.stat(self._wal).st_size > LONG_WAL_BYTES:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self.is_wal_long = True


class _LastRun:
    """A file that outlives a server in the machine's memory, and tells the next one how this
    one ended. In it the state, as text, and the next id, as a native integer.

    It is written and not mapped: a full file system that takes room for each change, as btrfs
    does, would answer that with SIGBUS."""

    CLEAN = b"clean"  # written at the end; until then the boot's id stands there
    DAMAGED = b"damaged"
    STATE = slice(0, 36)
    NEXT_ID = slice(64, 72)
    BYTES = 72

    def __init__(self, path: Path) -> None:
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._content = bytearray(os.pread(self._file, self.BYTES, 0).ljust(self.BYTES, b"\0"))
        self._is_synced = False
        state = bytes(self._content[self.STATE]).rstrip(b"\0")
        self.was_there = bool(state)
        # A killed process damages nothing: SQLite and the kernel know all that it did.
        self.was_orderly = state in {self.CLEAN, self._boot}
        next_id = int.from_bytes(self._content[self.NEXT_ID], sys.byteorder)
        self.next_id = next_id if self.was_orderly else None

    def begin(self, next_id: int) -> None:
        self._set_state(self._boot)
        try:
            self.set_next_id(next_id)
        except OSError as error:  # with the first id that is given out it is tried again
            log.error("it cannot be noted that a server runs: %s", error.strerror)

    def set_next_id(self, next_id: int) -> None:
        """Raises OSError."""
        self._content[self.NEXT_ID] = next_id.to_bytes(8, sys.byteorder)
        self._write()
        if not self._is_synced:
            # Or, after a power loss, this would be the file of the run before, whose end was clean.
            os.fsync(self._file)
            self._is_synced = True

    def note(self, error: Exception) -> None:
        """What is damaged is dealt with at the next start."""
        if isinstance(error, sqlite3.Error) and _is_damage(error):
            log.critical("the job records are damaged: %s; restart the server", error)
            self._set_state(self.DAMAGED)
            with contextlib.suppress(OSError):
                self._write()

    def end(self) -> None:
        if self._content[self.STATE] == self._boot:
            self._set_state(self.CLEAN)
            with contextlib.suppress(OSError):  # the next one takes it for one that was killed
                self._write()
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def _set_state(self, state: bytes) -> None:
        self._content[self.STATE] = state.ljust(36, b"\0")

    def _write(self) -> None:
        os.pwrite(self._file, self._content, 0)


class _Ids:
    """Counts up. The file holds a number that is larger than each one given out."""

    def __init__(self, path: Path, last_run: _LastRun, newest_id: int) -> None:
        """newest_id: of all jobs that are known."""
        self._path = path
        self._last_run = last_run
        # After a power loss nobody knows what was given out of the block that was reserved.
        next_id = last_run.next_id or _read_number(path) or 1
        self._next = self._reserved = max(next_id, newest_id + 1)
        self._ahead: threading.Thread | None = None
        # On a full disk a server starts, and refuses jobs.
        self._reserve_ahead()
        last_run.begin(self._next)

    @property
    def are_used_up(self) -> bool:
        return self._next == self._reserved

    def reserve_more(self) -> None:
        """For when they are used up. Blocks. Raises StoreError."""
        self._finish_ahead()
        if self.are_used_up:
            self._reserve(self._reserved + ID_BLOCK)

    def take(self) -> int:
        if self.are_used_up:
            self.reserve_more()
        try:
            self._last_run.set_next_id(self._next + 1)
        except OSError as error:
            raise StoreError(f"no job id can be given out: {error.strerror}") from error
        job_id = self._next
        self._next += 1
        if self._reserved - self._next < ID_BLOCK // 2 and self._ahead is None:
            self._ahead = threading.Thread(target=self._reserve_ahead, name="store-ids")
            self._ahead.start()
        elif self._ahead and not self._ahead.is_alive():
            self._finish_ahead()
        return job_id

    def close(self) -> None:
        """Gives back what was not used."""
        self._finish_ahead()
        try:
            self._reserve(self._next)
        except StoreError as error:
            log.error("%s; some ids will be skipped", error)

    def _reserve_ahead(self) -> None:
        try:
            self._reserve(self._reserved + ID_BLOCK)
        except StoreError as error:
            log.error("%s", error)  # tried again when none is left

    def _finish_ahead(self) -> None:
        if self._ahead:
            self._ahead.join()
            self._ahead = None

    def _reserve(self, until: int) -> None:
        try:
            _write_whole(self._path, f"{until}\n")
        except OSError as error:
            raise StoreError(
                f"no job ids can be reserved in {self._path}: {error.strerror}"
            ) from error
        self._reserved = until


# Opening


def _open_or_replace(path: Path, last_run: _LastRun) -> tuple[sqlite3.Connection, int]:
    """The connection, and the largest id of all jobs that are known; 0 where there is none."""
    check = not last_run.was_orderly
    try:
        if last_run.was_there:
            _check_not_empty(path)
        return _open_database(path, check)
    except sqlite3.Error as error:
        if not _is_damage(error):
            raise
        _move_aside(path, error)
        return _open_database(path, check)


def _open_database(path: Path, check: bool) -> tuple[sqlite3.Connection, int]:
    connection = _connect(path)
    try:
        # Before anything that reads the schema: a newer one may look damaged to this version.
        _check_version(path, connection)
        _set_up(connection)
        _use_wal(path, connection)
        # It reads all there is: some 0.1 s for 100,000 jobs.
        if check:
            _check_whole(connection)
        _migrate(path, connection)
        (newest_id,) = connection.execute("SELECT max(id) FROM jobs").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection, newest_id or 0


def _is_on_copying(path: Path) -> bool:
    """A file system that takes room for each change: where it is full, a change of a mapped file
    is SIGBUS, and the end of this process."""
    mount = read_mounts().get(mount_id_of(str(path.parent)))
    return mount is not None and mount.filesystem in {"btrfs", "bcachefs", "zfs"}


def _connect(path: Path) -> sqlite3.Connection:
    # SQLite maps a file that all processes share which use the database, or is alone with it.
    vfs = "unix-excl" if _is_on_copying(path) else "unix"
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?vfs={vfs}",
        uri=True,
        timeout=LOCK_WAIT_MILLISECONDS / 1000,
        check_same_thread=False,
        isolation_level=None,
        cached_statements=4 * ROWS_AT_ONCE,
    )


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # the syncer does
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")


def _check_version(path: Path, connection: sqlite3.Connection) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application not in {0, APPLICATION_ID}:
        raise StateFolderError(
            f"{path} belongs to another program; give another state folder with "
            "JOB_WORKER_STATE_DIR"
        )
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StateFolderError(
            f"{path} was made by a newer jobworker (its version is {version}, the newest known "
            f"here {SCHEMA_VERSION}); install that one again, or give another state folder "
            "with JOB_WORKER_STATE_DIR"
        )


def _use_wal(path: Path, connection: sqlite3.Connection) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StateFolderError(
            f"{path} is on a filesystem where SQLite cannot share memory between connections; "
            "give a folder on a local disk with JOB_WORKER_STATE_DIR"
        )


def _check_whole(connection: sqlite3.Connection) -> None:
    (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if answer != "ok":
        raise _damage(answer)


def _check_not_empty(path: Path) -> None:
    """As of a copy onto a full disk: SQLite would take it for a new one."""
    if path.exists() and not path.stat().st_size:
        raise _damage("the file is empty")


def _damage(problem: str) -> sqlite3.Error:
    error = sqlite3.DatabaseError(problem)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _migrate(path: Path, connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number in range(version, SCHEMA_VERSION):
        if version:
            log.info("%s: from version %d to %d", path, number, number + 1)
        connection.executescript(
            f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; "
            f"PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
        )


def _is_damage(error: sqlite3.Error) -> bool:
    """Not what a full disk or missing permission is: the code's low byte, of SQLite's list."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _move_aside(path: Path, error: sqlite3.Error) -> None:
    suffix = time.strftime(f"{DAMAGED}%Y%m%dT%H%M%SZ", time.gmtime())
    # The database last: SQLite would remove the WAL of one that is new.
    for end in ("-wal", "-shm", ""):
        damaged = path.with_name(path.name + end)
        if damaged.exists():
            damaged.rename(path.with_name(path.name + suffix + end))
    _fsync(path.parent)
    log.error(
        "%s is damaged (%s): moved aside, as %s, and a new one begun. Older jobs are not known "
        "until their records are brought back, and as long as %s is there their output stays in "
        "%s: stop the server, and bring them back as docs/operating.md says (sqlite3 %s .recover)",
        path,
        error,
        path.name + suffix,
        path.name + suffix,
        path.with_name("output"),
        path.name + suffix,
    )


def _set_aside(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.glob(f"{path.name}{DAMAGED}*"))


def _read_number(path: Path) -> int | None:
    """None where there is no file."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StateFolderError(
            f"{path} holds no number; write one into it that is larger than every job's id"
        ) from error


def _write_whole(path: Path, text: str) -> None:
    """All of it or nothing, whatever happens to the machine."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _fsync(path.parent)


def _fsync(path: Path | str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Rows


def _row_from(job: Job, spec_text: str) -> tuple[object, ...]:
    return (
        job.id,
        job.status,
        job.spec.name,
        job.created_ns,
        job.started_ns,
        job.ended_ns,
        job.cause,
        job.exit_code,
        job.signal,
        job.stdout_bytes,
        job.stderr_bytes,
        spec_text,
        _encode(
            {
                "end_requested": job.end_requested,
                "failed_step": job.failed_step,
                "failed_errno": job.failed_errno,
                "detail": job.detail,
                "accounting": job.accounting and _fields(job.accounting),
                "cleanup_uncertain": job.cleanup_uncertain,
                "lost_bytes": job.lost_bytes,
                "created_by": _values(job.created_by),
                "stopped_by": _values(job.stopped_by),
            }
        ),
        job.log_bytes,
        job.owner,
    )


def _values(by: Principal | None) -> tuple[str, ...] | None:
    return (by.name, by.role, by.serial) if by else None


def _spec_text(spec: JobSpec) -> str:
    binds = [(bind.source, bind.destination, bind.read_only) for bind in spec.binds]
    return _encode(_fields(spec) | {"limits": _fields(spec.limits), "binds": binds})


_encode = json.JSONEncoder().encode
_NAMES = {
    kind: tuple(each.name for each in dataclasses.fields(kind))
    for kind in (JobSpec, Limits, Accounting)
}


def _fields(value: JobSpec | Limits | Accounting) -> dict[str, Any]:
    """One level of dataclasses.asdict, which would copy all below it too."""
    return {
        name: inner for name in _NAMES[type(value)] if (inner := getattr(value, name)) is not None
    }


def _job_from(row: tuple[Any, ...]) -> Job:
    (job_id, status, _, created_ns, started_ns, ended_ns, cause, exit_code, signal, *_) = row
    stdout_bytes, stderr_bytes, spec, rest, log_bytes, _ = row[9:]
    spec, rest = json.loads(spec), json.loads(rest)
    return Job(
        id=job_id,
        spec=_spec_from(spec),
        status=Status(status),
        created_ns=created_ns,
        started_ns=started_ns,
        ended_ns=ended_ns,
        cause=_optional(Cause, cause),
        exit_code=exit_code,
        signal=signal,
        stdout_bytes=stdout_bytes,
        stderr_bytes=stderr_bytes,
        log_bytes=log_bytes,
        **rest
        | {
            "end_requested": _optional(Cause, rest["end_requested"]),
            "accounting": _optional(lambda fields: Accounting(**fields), rest["accounting"]),
            "created_by": _optional(lambda values: Principal(*values), rest.get("created_by")),
            "stopped_by": _optional(lambda values: Principal(*values), rest.get("stopped_by")),
        },
    )


def _brief_from(row: tuple[Any, ...]) -> Job:
    *columns, spec_characters = row
    job = _job_from(tuple(columns))
    return changed(job, is_brief=True) if spec_characters > LONG_SPEC_CHARACTERS else job


def _spec_from(fields: dict[str, Any]) -> JobSpec:
    binds = tuple(Bind(*values) for values in fields.get("binds", ()))
    inner = {"args": tuple(fields["args"]), "limits": Limits(**fields["limits"]), "binds": binds}
    spec = JobSpec(**fields | inner)
    return dataclasses.replace(spec, log_policy=LogPolicy(spec.log_policy))


def _optional(make: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else make(value)
