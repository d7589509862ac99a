"""What becomes of ended jobs: their small logs are packed, and the oldest give way.

ended ─▶ small log? ─▶ into the store, files removed ─▶ too many, too old, too large?
                                                          └─▶ the longest ended are deleted
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from jobworker.engine.output import LARGEST_PACKED_BYTES, Output, Quota
from jobworker.engine.store import EndedJob, Store
from jobworker.errors import JobWorkerError, StoreError
from jobworker.job import Job
from jobworker.turns import Turns

log = logging.getLogger(__name__)

T = TypeVar("T")

THREADS = 2
# Between two looks at what is to be deleted, where jobs end all the time.
PRUNE_PAUSE_SECONDS = 1.0
# So often where none ends, as they grow older all the same.
AGE_SECONDS = 60.0
BATCH_JOBS = 200
# So long the packing of what an earlier server has left waits for that of one job which is read.
READ_SECONDS = 1.0
# What deletes may take when the server ends: the next one removes files without a record.
CLOSE_SECONDS = 3.0
# RuntimeError: the machine had no number left for a thread.
PASSING_ERRORS = (JobWorkerError, OSError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Keep:
    """How much of ended jobs is kept; 0 is no limit."""

    jobs: int = 0
    seconds: float = 0.0
    log_bytes: int = 0


class _Written(NamedTuple):
    """An ended job's output. Of the job no more is kept in memory: what it was asked for may be
    large, and its output may be read for long."""

    job_id: int
    owner: str
    bytes: int
    quota: Quota


class Retention:
    """Of one server's ended jobs; works in the background, from `start` to `close`."""

    def __init__(self, store: Store, output: Output, keep: Keep) -> None:
        self._store = store
        self._output = output
        self._keep = keep
        self._packing: dict[int, asyncio.Task[None]] = {}
        self._deleting: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        # Apart from the threads of `to_thread`, which jobs need for their end: much output takes
        # long to remove.
        self._threads = ThreadPoolExecutor(THREADS, "retention")
        self._turns = Turns(1)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, live_ids: Iterable[int]) -> None:
        """live_ids: the jobs that have not ended."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._tidy(frozenset(live_ids)))]
        if self._keep != Keep():
            self._tasks.append(loop.create_task(self._prune()))

    async def close(self) -> None:
        tasks = [*self._tasks, *self._packing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._deleting:
            _, late = await asyncio.wait(self._deleting, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        # What has begun works in a folder that is closed next.
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    async def _in_turn(self, owner: str, function: Callable[..., T], *arguments: object) -> T:
        """The same, one after the other for jobs of one client: others find a thread."""
        async with self._turns.of(owner):
            return await self._in_thread(function, *arguments)

    def take(self, job: Job) -> None:
        """A job whose ending has just been stored."""
        self._ended.set()
        if 0 < job.output_bytes <= LARGEST_PACKED_BYTES:
            self._pack_soon(_written_by(job))

    def delete(self, jobs: Iterable[Job], *, in_turn: bool = True) -> asyncio.Future[None]:
        """Forgets ended jobs, and removes what they have written. Raises StoreError.

        in_turn: after what else of the same client's is removed; else with no regard to that.
        Who goes away meanwhile does not leave files without a record."""
        task = asyncio.get_running_loop().create_task(
            self._delete(list(map(_written_by, jobs)), in_turn)
        )
        self._deleting.add(task)
        task.add_done_callback(self._deleting.discard)
        return asyncio.shield(task)

    async def _delete(self, outputs: list[_Written], in_turn: bool) -> None:
        ids = [output.job_id for output in outputs]
        for job_id in ids:
            if task := self._packing.get(job_id):
                task.cancel()
                await asyncio.wait([task])
        try:
            # First the records: of files without a record the next start knows what to do.
            await self._store.delete(ids)
        except StoreError:
            # As on a full disk, on which these files may be what makes room for that.
            await self._delete_files_or_say(outputs, in_turn)
            await self._store.delete(ids)
        else:
            await self._delete_files_or_say(outputs, in_turn)

    async def _delete_files_or_say(self, outputs: Iterable[_Written], in_turn: bool) -> None:
        try:
            for output in outputs:
                if output.bytes and in_turn:
                    await self._in_turn(output.owner, self._delete_files, output)
                elif output.bytes:
                    await self._in_thread(self._delete_files, output)
        except OSError as error:
            log.error("files of deleted jobs stay until the next start: %s", error)

    def _delete_files(self, output: _Written) -> None:
        self._output.delete(output.job_id, output.bytes, output.quota)

    # Packing

    def _pack_soon(self, output: _Written) -> asyncio.Task[None]:
        job_id = output.job_id
        task = asyncio.get_running_loop().create_task(self._pack(output))
        self._packing[job_id] = task
        task.add_done_callback(lambda _: self._packing.pop(job_id, None))
        return task

    async def _pack(self, output: _Written) -> None:
        """While nobody reads it: a reader goes on where it began."""
        job_id, owner = output.job_id, output.owner
        try:
            await self._output.wait_unread(job_id)
            packed = await self._in_turn(owner, self._output.pack, job_id, output.bytes)
            if packed is None:
                return
            await self._store.put_output(job_id, *packed)
            # Who came before it was stored reads the files.
            await self._output.wait_unread(job_id)
            await self._in_turn(owner, self._delete_files, output)
        except PASSING_ERRORS as error:
            log.warning("the output of job %d stays in files: %s", job_id, error)

    async def _tidy(self, live_ids: frozenset[int]) -> None:
        """What an earlier server did not come to do."""
        kept = 0
        unpacked: list[int] = []
        for job_id in sorted(await self._in_thread(self._output.job_ids) - live_ids):
            job = await self._store.get(job_id, brief=True)
            if job is None and self._store.damaged:
                kept += 1
            elif job is None:
                log.warning("removing the output of job %d, of which there is no record", job_id)
                await self._in_thread(self._output.delete_stray, job_id)
            elif job.is_ended and 0 < job.output_bytes <= LARGEST_PACKED_BYTES:
                unpacked.append(job_id)
        if kept:
            log.warning(
                "the output of %d jobs without a record stays: their records may be in %s",
                *(kept, ", ".join(self._store.damaged)),
            )
        # Last, as each waits for who reads it, which may be for ever.
        for job_id in unpacked:
            job = await self._store.get(job_id, brief=True)
            if job and job_id not in self._packing:  # it has ended in between
                await asyncio.wait([self._pack_soon(_written_by(job))], timeout=READ_SECONDS)

    # Pruning

    async def _prune(self) -> None:
        self._ended.set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGE_SECONDS):
                    await self._ended.wait()
            self._ended.clear()
            try:
                while surplus := await self._surplus():
                    jobs = [await self._store.get(each.id, brief=True) for each in surplus]
                    await self.delete((job for job in jobs if job), in_turn=False)
                    log.info("deleted %d ended jobs, up to job %d", len(jobs), surplus[-1].id)
            except PASSING_ERRORS as error:
                log.error("ended jobs cannot be deleted: %s", error)
            await asyncio.sleep(PRUNE_PAUSE_SECONDS)

    async def _surplus(self) -> list[EndedJob]:
        """Those to be deleted next."""
        now = time.time_ns()
        totals = await self._store.ended_totals()
        # Of a time to come is what ended before all others: the clock has been set back since.
        later = await self._store.ended_after(now, BATCH_JOBS)
        oldest = [each for each in later if each.ended_ns > time.time_ns()]
        surplus = surplus_of(self._keep, totals.jobs, totals.log_bytes, oldest, now)
        if surplus:
            return surplus
        oldest = await self._store.ended_before(now, BATCH_JOBS)
        return surplus_of(self._keep, totals.jobs, totals.log_bytes, oldest, now)


def surplus_of(
    keep: Keep, jobs: int, log_bytes: int, oldest: list[EndedJob], now_ns: int
) -> list[EndedJob]:
    """oldest: the longest ended first, of `jobs` with `log_bytes` in all."""
    surplus = []
    for each in oldest:
        is_too_many = keep.jobs and jobs > keep.jobs
        is_too_large = keep.log_bytes and log_bytes > keep.log_bytes
        is_too_old = keep.seconds and each.ended_ns < now_ns - int(keep.seconds * 1e9)
        if not (is_too_many or is_too_large or is_too_old):
            break
        surplus.append(each)
        jobs -= 1
        log_bytes -= each.log_bytes
    return surplus


def _written_by(job: Job) -> _Written:
    return _Written(job.id, job.owner, job.output_bytes, quota_of(job))


def quota_of(job: Job) -> Quota:
    """Of its log, as it was when the job was made."""
    return Quota(job.spec.log_max_bytes, job.spec.log_policy)
