"""The records of all jobs, in SQLite, and the ids of those to come.

    jobs.db    the records (jobs.db-wal and jobs.db-shm belong to it)
    next-id    no id from this one on was ever given out; renewed, with fsync, a block ahead

One thread writes. Whatever was put while it was busy goes into one transaction, so a single
record never waits for others, and many share one commit. A commit survives the death of this
process at once, and that of the machine within a second.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jobworker.errors import StateFolderError, StoreError
from jobworker.job import Accounting, Cause, Job, JobSpec, Limits, Status

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
)
SCHEMA_VERSION = len(MIGRATIONS)

# Ids that may be skipped when the machine loses power.
ID_BLOCK = 1000
SYNC_SECONDS = 1.0
# To read a row in one go; SQLite's own default is 2 MiB of pages.
CACHE_KIB = 4096

UNENDED = (Status.INITIALIZING, Status.RUNNING)

COLUMNS = (
    *("id", "status", "name", "created_ns", "started_ns", "ended_ns", "cause", "exit_code"),
    *("signal", "stdout_bytes", "stderr_bytes", "spec", "rest"),
)
SELECT = f"SELECT {', '.join(COLUMNS)} FROM jobs"
REPLACE = f"INSERT OR REPLACE INTO jobs VALUES ({', '.join('?' * len(COLUMNS))})"


class Store:
    """Of one state folder; belongs to the running event loop."""

    def __init__(self, path: Path, connection: sqlite3.Connection, next_id: int) -> None:
        """Use `open`."""
        self._loop = asyncio.get_running_loop()
        self._ids = _Ids(path.with_name("next-id"), next_id)
        self._writer = _Writer(path, connection, self._loop)
        self._reader = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._reader.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._reader_thread = ThreadPoolExecutor(1, thread_name_prefix="store-reader")

    @classmethod
    def open(cls, path: Path) -> Store:
        """Blocks. Makes the database where there is none, and brings an older one up to date.
        One that is damaged is moved aside, and said so.

        Raises StateFolderError where it is of a newer version, or cannot be opened.
        """
        try:
            try:
                connection = _open_database(path)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                _move_aside(path, error)
                connection = _open_database(path)
            return cls(path, connection, _next_id(path, connection))
        except (sqlite3.Error, OSError, ValueError) as error:
            raise StateFolderError(
                f"{path} cannot be used: {error}; check that the folder can be written and has "
                "room, or give another one with JOB_WORKER_STATE_DIR"
            ) from error

    def reserve_id(self) -> int:
        """An id that no job has ever had, and that none will have, whatever happens.
        Blocks once in a thousand calls, for a write to the disk, unless that was done ahead."""
        return self._ids.take()

    async def put(self, job: Job) -> None:
        """Returns once the record survives the death of this process. Raises StoreError."""
        await self._writer.put(job)

    async def get(self, job_id: int) -> Job | None:
        rows = await self._read(f"{SELECT} WHERE id = ?", (job_id,))
        return _job_from(rows[0]) if rows else None

    async def page(
        self,
        before_id: int | None = None,
        count: int = 100,
        statuses: Iterable[Status] = (),
        name: str = "",
    ) -> list[Job]:
        """Newest first, those with ids smaller than `before_id`. statuses: any of these;
        empty: all. name: exactly this one; empty: all."""
        query, parameters = _page_query(before_id, count, sorted(statuses), name)
        return [_job_from(row) for row in await self._read(query, parameters)]

    async def unended(self) -> list[Job]:
        """Oldest first: the jobs that an earlier server left behind."""
        marks = ", ".join("?" * len(UNENDED))
        rows = await self._read(f"{SELECT} WHERE status IN ({marks}) ORDER BY id", UNENDED)
        return [_job_from(row) for row in rows]

    async def close(self) -> None:
        """Once all puts have returned."""
        await asyncio.to_thread(self._writer.close)
        self._reader_thread.shutdown()
        self._reader.close()
        self._ids.close()

    async def _read(self, query: str, parameters: Iterable[object]) -> list[tuple[Any, ...]]:
        def read() -> list[tuple[Any, ...]]:
            return self._reader.execute(query, tuple(parameters)).fetchall()

        try:
            return await self._loop.run_in_executor(self._reader_thread, read)
        except sqlite3.Error as error:
            raise StoreError(f"the job records cannot be read: {error}") from error


def _page_query(
    before_id: int | None, count: int, statuses: list[Status], name: str
) -> tuple[str, list[object]]:
    """Each status is a query of its own, so that every one of them goes along an index and
    stops after `count` rows, however many jobs there are."""
    conditions = ["TRUE"]
    common: list[object] = []
    if before_id is not None:
        conditions.append("id < ?")
        common.append(before_id)
    if name:
        conditions.append("name = ? AND name != ''")
        common.append(name)
    where = " AND ".join(conditions)
    if not statuses:
        return f"{SELECT} WHERE {where} ORDER BY id DESC LIMIT ?", [*common, count]
    if name:
        marks = ", ".join("?" * len(statuses))
        query = f"{SELECT} WHERE {where} AND status IN ({marks}) ORDER BY id DESC LIMIT ?"
        return query, [*common, *statuses, count]
    one = f"SELECT * FROM ({SELECT} WHERE {where} AND status = ? ORDER BY id DESC LIMIT ?)"
    parameters: list[object] = []
    for status in statuses:
        parameters += [*common, status, count]
    query = " UNION ALL ".join([one] * len(statuses))
    return f"SELECT * FROM ({query}) ORDER BY id DESC LIMIT ?", [*parameters, count]


class _Writer:
    """The thread that writes, and what waits for it."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._connection = connection
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Job, asyncio.Future[None]] | None]
        self._queue = queue.SimpleQueue()
        self._wal = f"{path}-wal"
        self._sync_at: float | None = None  # on the monotonic clock; None: nothing to sync
        self._thread = threading.Thread(target=self._run, name="store-writer")
        self._thread.start()

    def put(self, job: Job) -> asyncio.Future[None]:
        future = self._loop.create_future()
        self._queue.put((job, future))
        return future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                error = self._commit([job for job, _ in batch])
                self._loop.call_soon_threadsafe(_resolve, [future for _, future in batch], error)
            if self._sync_at is not None and time.monotonic() >= self._sync_at:
                self._sync()
        # All of the WAL goes into the database.
        self._connection.close()

    def _next_batch(self) -> list[tuple[Job, asyncio.Future[None]]] | None:
        """All that waits; empty when it is time to sync, None at the end."""
        timeout = None
        if self._sync_at is not None:
            timeout = max(0.0, self._sync_at - time.monotonic())
        try:
            first = self._queue.get(timeout=timeout)
        except queue.Empty:
            return []
        if first is None:
            return None
        batch = [first]
        # No more than were there: the first must not wait for ever new ones.
        for _ in range(self._queue.qsize()):
            item = self._queue.get()
            if item is None:
                self._queue.put(None)  # after this batch
                break
            batch.append(item)
        return batch

    def _commit(self, jobs: list[Job]) -> StoreError | None:
        # Of several records of one job only the last counts.
        newest = {job.id: job for job in jobs}
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(REPLACE, map(_row_from, newest.values()))
            self._connection.execute(
                "UPDATE facts SET value = max(value, ?) WHERE name = 'last_id'", (max(newest),)
            )
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            return StoreError(f"job records cannot be written: {error}")
        if self._sync_at is None:
            self._sync_at = time.monotonic() + SYNC_SECONDS
        return None

    def _sync(self) -> None:
        """SQLite syncs the WAL only when it moves it to the database (synchronous = NORMAL)."""
        self._sync_at = None
        try:
            _fsync(self._wal)
        except OSError as error:
            log.error("%s cannot be synced to disk: %s", self._wal, error.strerror)


def _resolve(futures: list[asyncio.Future[None]], error: StoreError | None) -> None:
    for future in futures:
        if future.done():  # cancelled
            continue
        if error:
            future.set_exception(error)
        else:
            future.set_result(None)


class _Ids:
    """Counts up. The file holds a number that is larger than each one given out."""

    def __init__(self, path: Path, next_id: int) -> None:
        self._path = path
        self._next = next_id
        self._reserved = next_id
        self._ahead: threading.Thread | None = None
        self._reserve(next_id + ID_BLOCK)

    def take(self) -> int:
        if self._next == self._reserved:
            self._finish_ahead()
        if self._next == self._reserved:
            self._reserve(self._reserved + ID_BLOCK)
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


def _open_database(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        _check_whole(connection)
        _migrate(path, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_whole(connection: sqlite3.Connection) -> None:
    (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if answer != "ok":
        raise sqlite3.DatabaseError(f"database disk image is malformed: {answer}")


def _migrate(path: Path, connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StateFolderError(
            f"{path} was made by a newer jobworker (its version is {version}, the newest known "
            f"here {SCHEMA_VERSION}); install that one again, or give another state folder "
            "with JOB_WORKER_STATE_DIR"
        )
    for number in range(version, SCHEMA_VERSION):
        log.info("%s: from version %d to %d", path, number, number + 1)
        connection.executescript(
            f"BEGIN; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
        )
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Not what a full disk or missing permission is: the code's low byte, of SQLite's list."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _move_aside(path: Path, error: sqlite3.DatabaseError) -> None:
    suffix = time.strftime(".damaged-%Y%m%dT%H%M%SZ", time.gmtime())
    for end in ("", "-wal", "-shm"):
        damaged = path.with_name(path.name + end)
        if damaged.exists():
            damaged.rename(path.with_name(path.name + suffix + end))
    log.error(
        "%s is damaged (%s): moved aside, as %s; older jobs are not known until it is repaired "
        "(sqlite3 %s .recover)",
        path,
        error,
        path.name + suffix,
        path.name + suffix,
    )


def _next_id(path: Path, connection: sqlite3.Connection) -> int:
    """Records survive the death of a server, so that the next one knows the last id exactly;
    not so after a power loss, or in a new database: then the block that was reserved is over.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    facts = dict(connection.execute("SELECT name, value FROM facts"))
    reserved_file = path.with_name("next-id")
    reserved = int(reserved_file.read_text()) if reserved_file.exists() else 1
    next_id = reserved
    if facts.get("boot") == boot and facts["last_id"] < reserved:
        next_id = facts["last_id"] + 1
    connection.executemany(
        "INSERT OR REPLACE INTO facts VALUES (?, ?)",
        [("boot", boot), ("last_id", next_id - 1)],
    )
    return max(1, next_id)


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


def _row_from(job: Job) -> tuple[object, ...]:
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
        json.dumps(_fields(job.spec)),
        json.dumps(
            {
                "end_requested": job.end_requested,
                "failed_step": job.failed_step,
                "failed_errno": job.failed_errno,
                "detail": job.detail,
                "accounting": job.accounting and _fields(job.accounting),
                "cleanup_uncertain": job.cleanup_uncertain,
            }
        ),
    )


def _fields(value: Any) -> dict[str, Any]:
    """One level of dataclasses.asdict, which would copy all below it too."""
    return {
        field.name: _fields(inner) if isinstance(inner, Limits) else inner
        for field in dataclasses.fields(value)
        if (inner := getattr(value, field.name)) is not None
    }


def _job_from(row: tuple[Any, ...]) -> Job:
    (job_id, status, _, created_ns, started_ns, ended_ns, cause, exit_code, signal, *_) = row
    stdout_bytes, stderr_bytes, spec, rest = row[9:]
    spec, rest = json.loads(spec), json.loads(rest)
    return Job(
        id=job_id,
        spec=JobSpec(**spec | {"args": tuple(spec["args"]), "limits": Limits(**spec["limits"])}),
        status=Status(status),
        created_ns=created_ns,
        started_ns=started_ns,
        ended_ns=ended_ns,
        cause=_optional(Cause, cause),
        exit_code=exit_code,
        signal=signal,
        stdout_bytes=stdout_bytes,
        stderr_bytes=stderr_bytes,
        **rest
        | {
            "end_requested": _optional(Cause, rest["end_requested"]),
            "accounting": _optional(lambda fields: Accounting(**fields), rest["accounting"]),
        },
    )


def _optional(make: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else make(value)
