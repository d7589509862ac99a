"""jobs.db as SQLite keeps it: its schema, brought up to date; and what is damaged, set aside.

jobs.db     the records (jobs.db-wal and jobs.db-shm belong to it)
jobs.db.damaged-*   a damaged database, moved aside: until it is removed, a job of which there
            is no record may have one there
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from jobworker.engine.ids import LastRun, fsync
from jobworker.engine.mounts import mount_id_of, read_mounts
from jobworker.errors import StateFolderError

log = logging.getLogger(__name__)

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
    # The rest of a record may say with which signal, and within which time, its job is to end.
    "",
)
SCHEMA_VERSION = len(MIGRATIONS)

LOCK_WAIT_MILLISECONDS = 5000
# To read a row in one go; SQLite's own default is 2 MiB of pages.
CACHE_KIB = 4096
# More than what the writer has: three kinds, each for up to 64 rows.
CACHED_STATEMENTS = 256

DAMAGED = ".damaged-"  # and the time, behind the name of one that was moved aside


def open_or_replace(path: Path, last_run: LastRun) -> tuple[sqlite3.Connection, int]:
    """The connection, and the largest id of all jobs that are known; 0 where there is none.
    Raises StateFolderError, and what SQLite raises but for damage."""
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
    connection = connect(path)
    try:
        # Before anything that reads the schema: a newer one may look damaged to this version.
        _check_version(path, connection)
        set_up(connection)
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


def connect(path: Path) -> sqlite3.Connection:
    """To a database that is there already, for one thread more; `set_up` comes next."""
    # SQLite maps a file that all processes share which use the database, or is alone with it.
    vfs = "unix-excl" if _is_on_copying(path) else "unix"
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?vfs={vfs}",
        uri=True,
        timeout=LOCK_WAIT_MILLISECONDS / 1000,
        check_same_thread=False,
        isolation_level=None,
        cached_statements=CACHED_STATEMENTS,
    )


def set_up(connection: sqlite3.Connection) -> None:
    """Reads the schema."""
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # the syncer does
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    # Not in files, which it would make where TMPDIR says: jobs with this process' user could open
    # them, and read others' records, before it removes their names.
    connection.execute("PRAGMA temp_store = MEMORY")


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


def note_damage(error: Exception, last_run: LastRun) -> None:
    """It is dealt with at the next start."""
    if isinstance(error, sqlite3.Error) and _is_damage(error):
        log.critical("the job records are damaged: %s; restart the server", error)
        last_run.set_damaged()


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
    fsync(path.parent)
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


def set_aside(path: Path) -> list[str]:
    """The names of all damaged ones that are still there. Raises OSError: what is in their output
    is not to be lost where nobody can look for them now."""
    return sorted(n for n in os.listdir(path.parent) if n.startswith(path.name + DAMAGED))
