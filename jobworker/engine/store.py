"""The records of all jobs, and the output of small ones, in SQLite (`database`).

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
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jobworker.engine.database import (
    LOCK_WAIT_MILLISECONDS,
    connect,
    note_damage,
    open_or_replace,
    set_aside,
    set_up,
)
from jobworker.engine.ids import Ids, LastRun, fsync
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

SYNC_SECONDS = 1.0
# Beyond it the WAL goes into the database. The next start must read what is in it.
LONG_WAL_BYTES = 16 << 20
# How long writing waits for readers that keep the WAL from being cut off, once a second.
WAL_WAIT_MILLISECONDS = 20

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
        self,
        path: Path,
        connections: list[sqlite3.Connection],
        last_run: LastRun,
        ids: Ids,
        damaged: list[str],
    ) -> None:
        """Use `open`."""
        self.damaged = damaged
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
                last_run = LastRun(path.with_name("last-run"))
                undo.callback(last_run.close)
                first, newest_id = open_or_replace(path, last_run)
                undo.callback(first.close)
                connections = [first, connect(path), connect(path)]
                for connection in connections[1:]:
                    undo.callback(connection.close)
                    set_up(connection)
                ids = Ids(path.with_name("next-id"), last_run, newest_id)
                damaged = set_aside(path)
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
        return cls(path, connections, last_run, ids, damaged)

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
            note_damage(error, self._last_run)
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
        last_run: LastRun,
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
            note_damage(error, self._last_run)
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
        fsync(self._wal)
        if os.stat(self._wal).st_size > LONG_WAL_BYTES:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self.is_wal_long = True


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
                "end_signal": job.end_signal,
                "end_grace_ms": job.end_grace_ms,
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
