"""Decides what happens to jobs, and is the only writer of their state.

Every decision is made synchronously, on the event loop, by a transition of `job`; the I/O
that follows from it comes after. A job that only runs costs no task: what happens to it
arrives as a call, and a task lives only while something is being done.

    create:  check ▶ INITIALIZING stored ▶ jobinit: cgroup made, exec proved ▶ RUNNING
    ending:  main process gone ▶ the rest of the cgroup gone ▶ pipes drained ▶ accounts read
             ▶ stored ▶ cgroup removed ▶ jobinit may forget it

A server may be killed between any two of these: the next one finds in the record, and in what
jobinit holds, where to go on (recovery.py decides that).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobworker import job as transition
from jobworker._fastio import Extent, Log
from jobworker.engine.cgroup import Cgroup, CgroupTree, remove_empty
from jobworker.engine.command import base_environment
from jobworker.engine.isolation import NOTHING_SEEN, Confinement, Isolation
from jobworker.engine.jobinit import Exited, Failed, Held, Started, StartRequest
from jobworker.engine.jobinits import Jobinits, OrphanExited
from jobworker.engine.looks import Found, Looks
from jobworker.engine.output import LARGEST_PACKED_BYTES, Output, Packed, Reader
from jobworker.engine.output import Quota as LogQuota
from jobworker.engine.quota import Ledger
from jobworker.engine.recovery import Decision, decide
from jobworker.engine.retention import Retention, quota_of
from jobworker.engine.store import Page, Store
from jobworker.engine.worker import Worker
from jobworker.errors import (
    CgroupError,
    InvalidRequestError,
    JobinitError,
    JobinitGoneError,
    JobNotFoundError,
    JobStateError,
    JobWorkerError,
    OffsetOutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ShuttingDownError,
    StartFailedError,
    StartupError,
    StoreError,
)
from jobworker.job import (
    ENDED,
    Accounting,
    Cause,
    Job,
    JobSpec,
    Limits,
    LogPolicy,
    OomKills,
    Principal,
    Quota,
    Status,
)
from jobworker.roles import Caller
from jobworker.turns import ALWAYS_FREE, Turn

log = logging.getLogger(__name__)

# With these a job that is recorded fails to start. InvalidRequestError: what was there when
# the request was checked is there no longer.
START_ERRORS = (StartFailedError, CgroupError, JobinitError, InvalidRequestError, OSError)

FAULT = JobWorkerError("a fault of the server, whose log tells of it")

# What passes, and must not cost a job its end. RuntimeError: there was no number left for a thread.
PASSING_ERRORS = (CgroupError, OSError, RuntimeError)

KILLED_SECONDS = 10.0  # what a killed cgroup may take to be empty, before that is worth a line
STORE_RUNNING_SECONDS = 0.2
FEW_CREATES = 4  # at once: these are stored without waiting for company
# A job gets so many signals in that time, each of them once: jobinit, which is there for all, gives
# each to all processes of the group, which takes long where these are thousands.
SIGNAL_PAUSE_SECONDS = 1.0
MOST_SIGNALS = 2
STORE_RETRY_SECONDS = 1.0
END_RETRY_SECONDS = 0.5
CLOCK_TOLERANCE_SECONDS = 1.0  # between a process's start and its exec, as the clock tells them
# What the ending of a job may take when the server ends; the next one would do it again.
SETTLE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration says about jobs."""

    default_limits: Limits
    linger_seconds: float  # for what a job leaves behind when its main process ends
    stop_grace_seconds: float
    maximum_jobs: int  # at the same time
    log_max_bytes: int  # of each job's output; 0: no limit
    log_policy: LogPolicy
    disk_reserve_bytes: int  # with less room than that in the state folder no job is made


@dataclass(frozen=True, slots=True)
class Usage:
    """What ended jobs take, and what is left."""

    ended_jobs: int
    ended_log_bytes: int
    disk_room_bytes: int  # of the state folder
    blocked_jobs: int  # whose output cannot be written at the moment


@dataclass(frozen=True, slots=True)
class Stopping:
    """A job that is being ended for a client."""

    over: asyncio.Future[Job]  # the job once it has ended; the end goes on where this is cancelled
    is_news: bool  # the client asked for more than was under way


@dataclass(slots=True, eq=False)
class _LiveJob:
    """A job that has not ended, with what it holds on this machine."""

    job: Job
    begun: asyncio.Future[None]  # its log is open, or it has failed to start
    over: asyncio.Future[Job]
    cgroup: Cgroup | None = None
    log: Log | None = None
    exited: Exited | OrphanExited | None = None
    # Signals, until the end asked for is stored, or their pause is over.
    unsent: list[int] = field(default_factory=list)
    pausing: set[int] = field(default_factory=set)  # signals that were sent a moment ago
    stored_grace_ms: int | None = None  # of the end asked for; None: that is not stored yet
    is_storing_end: bool = False
    asked: frozenset[tuple[str, int]] = frozenset()  # to end, by whom and with which signal
    kill_at: float | None = None  # on the loop's clock; None: nobody asked for the end
    kill_timer: asyncio.TimerHandle | None = None
    timeout_timer: asyncio.TimerHandle | None = None

    def snapshot(self, **changes: Any) -> Job:
        if self.log is None:
            return transition.changed(self.job, **changes)
        stdout_bytes, stderr_bytes = self.log.stream_bytes
        of_output = {
            "stdout_bytes": stdout_bytes,
            "stderr_bytes": stderr_bytes,
            "lost_bytes": self.log.lost_bytes,
            "output_problem": os.strerror(self.log.error) if self.log.error else "",
            "log_bytes": self.log.disk_bytes,
        }
        return transition.changed(self.job, **(of_output | changes))


class Manager:
    """All jobs of this server."""

    def __init__(
        self,
        policy: Policy,
        cgroups: CgroupTree,
        output: Output,
        store: Store,
        jobinits: Jobinits,
        isolation: Isolation,
        retention: Retention,
    ) -> None:
        self.policy = policy
        self.cgroups = cgroups
        self.isolation = isolation
        self._output = output
        self._store = store
        self._jobinits = jobinits
        self._retention = retention
        output.on_log_limit = self._on_log_limit
        self._remover = Worker("cgroups", remove_empty)
        self._looks = Looks(cgroups)
        self._live: dict[int, _LiveJob] = {}
        self._ledgers: dict[str, Ledger] = {}  # by the owner of the jobs
        self._strangers: set[int] = set()
        # Of jobs that end after jobinit has told of them, and before they are taken over.
        self._early_exits: dict[int, Exited | OrphanExited] = {}
        self._has_recovered = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._creates: set[asyncio.Task[Job]] = set()
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._has_let_go = False

    # What clients ask for

    @property
    def live_count(self) -> int:
        return len(self._live)

    def usage_of(self, owner: str) -> Quota:
        """What the client's jobs take that have not ended."""
        ledger = self._ledgers.get(owner) or Ledger(owner)
        return Quota(len(ledger.job_ids), ledger.cpu_percent, ledger.memory_mib)

    async def usage(self) -> Usage:
        totals = await self._store.ended_totals()
        blocked = sum(1 for live in self._live.values() if live.log and live.log.error)
        return Usage(totals.jobs, totals.log_bytes, self._output.room_bytes(), blocked)

    def create(
        self, request: JobSpec, stdin: bytes, admit: Callable[[], Caller]
    ) -> asyncio.Future[Job]:
        """Starts a job, which is RUNNING then, or FAILED where one step of its start failed.
        stdin: what it is to read; it is not recorded. admit: whose the job is to be, and what that
        client may now; is asked again once nothing is to be waited for before there is a job.
        Raises what `admit` raises.

        A client that goes away meanwhile does not take the job with it.
        """
        client = admit()
        self._admit()
        self._require_room()
        self._ledger(client.name).take_create(client.quota.creates_per_second, self._loop.time())
        transition.validate(request)
        transition.validate_stdin(stdin)
        task = self._loop.create_task(self._create(request, stdin, client, admit))
        self._creates.add(task)
        task.add_done_callback(self._creates.discard)
        return asyncio.shield(task)

    async def get(self, job_id: int, *, brief: bool = False, turn: Turn = ALWAYS_FREE) -> Job:
        """brief: what is long in a large record may be left out, and is quicker then. turn: what
        a record is read within, as others wait so long."""
        live = self._live.get(job_id)
        if live:
            return live.snapshot()
        async with turn:
            job = await self._store.get(job_id, brief=brief)
        if job is None:
            raise JobNotFoundError(str(job_id))
        return job

    async def require_owner(self, job_id: int, owner: str) -> None:
        """Raises JobNotFoundError for a job of another, exactly as for one that does not exist:
        the store is asked in any case, so that not even the time tells them apart."""
        is_stored = await self._store.is_owner(owner, job_id)
        live = self._live.get(job_id)
        if not owner or not (live.job.owner == owner if live else is_stored):
            raise JobNotFoundError(str(job_id))

    async def page(
        self,
        before_id: int | None = None,
        count: int = 100,
        statuses: frozenset[Status] = frozenset(),
        name: str = "",
        owner: str | None = None,
    ) -> Page:
        """As of the store, with those that have not ended. May be empty, and not the last."""
        # Those that live are known best here, whatever of them is stored by now.
        found = self._live_page(before_id, count, statuses, name, owner)
        stored = Page([], None)
        if ended := (statuses or ENDED) & ENDED:
            stored = await self._store.page(before_id, count, ended, name, owner)
            found += [job for job in stored.jobs if job.id not in self._live]
        # Further down there may be others between those that live.
        unique = {job.id: job for job in found if job.id >= (stored.before_id or 0)}
        jobs = [unique[job_id] for job_id in sorted(unique, reverse=True)[:count]]
        return Page(jobs, jobs[-1].id if len(jobs) == count else stored.before_id)

    def _live_page(
        self,
        before_id: int | None,
        count: int,
        statuses: frozenset[Status],
        name: str,
        owner: str | None,
    ) -> list[Job]:
        def matches(job: Job) -> bool:
            return (
                (before_id is None or job.id < before_id)
                and (not statuses or job.status in statuses)
                and (not name or job.spec.name == name)
            )

        # Ids count up.
        of_owner = self._ledgers.get(owner) or Ledger(owner) if owner is not None else None
        ids = reversed(of_owner.job_ids if of_owner else self._live)
        newest_first = map(self._live.__getitem__, ids)
        found = itertools.islice((each for each in newest_first if matches(each.job)), count)
        return [each.snapshot() for each in found]

    async def wait(self, job_id: int, *, brief: bool = False, turn: Turn = ALWAYS_FREE) -> Job:
        """The job once it has ended. brief, turn: as of `get`."""
        live = self._live.get(job_id)
        if live:
            return await asyncio.shield(live.over)
        return await self.get(job_id, brief=brief, turn=turn)

    async def stop(
        self,
        job_id: int,
        signal_number: int = 0,
        grace_seconds: float | None = None,
        client: Caller | None = None,
        turn: Turn = ALWAYS_FREE,
    ) -> Stopping:
        """Ends a job. turn: as of `get`. Raises JobStateError if it had ended before."""
        live = self._live.get(job_id)
        if live is None:
            job = await self.get(job_id, brief=True, turn=turn)
            raise JobStateError(job_id, job.status, "stop")
        if grace_seconds is None:
            grace_seconds = self.policy.stop_grace_seconds
        by = client.principal if client else None
        is_news = self._request_end(
            live, Cause.STOPPED, signal_number or signal.SIGTERM, grace_seconds, by
        )
        return Stopping(asyncio.shield(live.over), is_news)

    async def read(
        self,
        job_id: int,
        offset: int,
        stream: int,
        follow: bool,
        turn: Turn = ALWAYS_FREE,
        disk_turn: asyncio.Semaphore | None = None,
    ) -> tuple[Reader, str]:
        """A reader of the job's output, which the caller closes, and whose the job is. turn: as
        of `get`. disk_turn: of `Reader`."""
        live = self._live.get(job_id)
        if live:
            await asyncio.shield(live.begun)
        open_log = live.log if live else None
        job = await self.get(job_id, brief=True, turn=turn)
        end = open_log.end if open_log else job.output_bytes
        if offset > end:
            raise OffsetOutOfRangeError(job_id, offset, end)
        quota = quota_of(job)
        reader = Reader(
            self._output, job_id, open_log, end, offset, stream, follow, quota, disk_turn
        )
        if open_log is None and end <= LARGEST_PACKED_BYTES:
            await self._use_packed(reader, job_id)
        return reader, job.owner

    async def _use_packed(self, reader: Reader, job_id: int) -> None:
        try:
            packed = await self._store.get_output(job_id)
        except BaseException:
            reader.close()
            raise
        if packed:
            reader.use_packed(Packed(*packed))

    async def delete(self, job_id: int, turn: Turn = ALWAYS_FREE) -> asyncio.Future[None]:
        """Begins to forget an ended job, and what it has written; that ends also where the client
        goes away. turn: as of `get`. Raises JobStateError for one that has not ended."""
        live = self._live.get(job_id)
        if live:
            if not live.job.is_ended:
                raise JobStateError(job_id, live.job.status, "delete")
            # GetJob shows the ending already; its last steps are under way.
            await asyncio.shield(live.over)
        return self._retention.delete([await self.get(job_id, brief=True, turn=turn)])

    # From the start of the server to its end

    async def recover(self, held: list[Held]) -> None:
        """Takes over what an earlier server left. held: of `Jobinits.connect`. Raises
        StartupError."""
        records = {job.id: job for job in await self._store.unended()}
        lost = {each.job_id: each for each in held if await self._has_lost_record(each)}
        extents = await asyncio.to_thread(self._output.recover, [*records, *lost])
        for job_id, each in lost.items():
            records[job_id] = await self._found(each, extents.get(job_id))
        held_by_id = {each.job_id: each for each in held}
        # By id, as what is made from now on comes behind them.
        for job_id in sorted(records.keys() | held_by_id.keys()):
            record = records.get(job_id) or await self._store.get(job_id)
            self._take_over(job_id, record, held_by_id.get(job_id), extents.get(job_id))
            if early := self._early_exits.pop(job_id, None):
                self.on_exit(early)
        self._has_recovered = True
        if held:
            ended = sum(each.ending is not None for each in held)
            log.info("took over %s, of which %d ended meanwhile", _count(held), ended)
        await self._kill_leftovers()
        self._retention.start(self._live)

    async def close(self, *, stop_jobs: bool) -> None:
        """Takes no more work. Jobs go on, unless they are to be stopped: then this returns once
        they have ended, or none can."""
        self._closing = True
        if stop_jobs:
            await self._stop_all()
        elif self._live:
            log.info("%s running on, for the next server to take over", _count(self._live))
        if tasks := self._tasks | self._creates:
            await asyncio.wait(tasks, timeout=SETTLE_SECONDS)

    async def let_go(self) -> None:
        """Leaves what is under way to the next server. To be called before what it works with is
        closed: a log that is closed would look like the end of its job's output."""
        self._has_let_go = True
        tasks = self._tasks | self._creates
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._retention.close()
        await self._remover.close()
        self._looks.close()

    async def _stop_all(self) -> None:
        if self._live:
            log.warning("stopping %s, as the server ends", _count(self._live))
        for live in self._live.values():
            if not live.job.is_ended:
                self._request_end(
                    live, Cause.STOPPED, signal.SIGTERM, self.policy.stop_grace_seconds
                )
        while count := len(self._live):
            overs = [live.over for live in self._live.values()]
            await asyncio.wait(overs, timeout=self.policy.stop_grace_seconds + KILLED_SECONDS)
            if len(self._live) == count:
                # As where the disk is full: their output waits in the pipes.
                log.error("%s cannot end now: left to the next server", _count(self._live))
                return

    # What an earlier server left

    def _take_over(
        self, job_id: int, record: Job | None, held: Held | None, extent: Extent | None
    ) -> None:
        decision = decide(record, held, is_jobinit_there=self._jobinits.was_there)
        if decision is Decision.RECORDED:
            _close_pipes(held)
            self._jobinits.acknowledge(job_id)
            return
        if record is None:
            self._disown(job_id, held)
            return
        live = self._new_live(record)
        live.cgroup = self.cgroups.find(job_id)
        if decision is Decision.FOLLOW:
            assert held is not None and held.started is not None
            self._follow(live, held.started, held.ending, extent)
        elif decision is Decision.AWAIT:
            self._go_on_ending(live)
            self._spawn(self._await_start(live))
        elif decision is Decision.NEVER_RAN:
            assert held is not None and isinstance(held.ending, Failed)
            error = held.ending.error()
            self._spawn(self._certainly(live, partial(self._fail_start, live, error)))
        elif decision is Decision.NEVER_ASKED:
            problem = "the server ended before it could start the job; create it again"
            never_asked = JobinitError(problem)
            self._spawn(self._certainly(live, partial(self._fail_start, live, never_asked)))
        else:
            self._spawn(self._certainly(live, partial(self._lose, live, extent)))

    def _follow(
        self,
        live: _LiveJob,
        started: Started,
        ending: Exited | Failed | None,
        extent: Extent | None,
    ) -> None:
        self._open_log(live, started, extent)
        if live.job.status is Status.INITIALIZING:
            self._mark_started(live, started)
        self._go_on_ending(live)
        if isinstance(ending, Exited):
            # It bounds the grace of a stop for what was left behind.
            self._set_timeout(live, _seconds_since(started.started_ns))
            self.on_exit(ending)
            return
        if live.job.spec.timeout_ms:
            self._set_timeout(live, _run_seconds(started))

    def _go_on_ending(self, live: _LiveJob) -> None:
        """Its grace begins anew, and it gets the signal again: nobody knows how much of the one
        was over, and whether it got the other."""
        job = live.job
        if job.end_requested is None:
            return
        number, grace_seconds = job.end_signal, job.end_grace_ms / 1e3
        if not number:  # under a version that recorded neither
            number, grace_seconds = signal.SIGTERM, self.policy.stop_grace_seconds
        self._request_end(live, job.end_requested, number, grace_seconds)

    async def _await_start(self, live: _LiveJob) -> None:
        try:
            started = await self._jobinits.await_start(live.job.id)
            live.cgroup = self.cgroups.find(live.job.id)
            self._started(live, started)
        except START_ERRORS as error:
            live.cgroup = self.cgroups.find(live.job.id)
            await self._certainly(live, partial(self._fail_start, live, error))

    async def _lose(self, live: _LiveJob, extent: Extent | None) -> None:
        """Neither jobinit nor a record knows how the job ended, if it has."""
        log.warning("job %d is lost: nobody is left to tell how it ended", live.job.id)
        if live.cgroup:
            await self._kill_cgroup(live, live.cgroup)
        await self._lift_io_limits(live)
        if self.cgroups.path is None and live.job.created_ns >= _boot_ns():
            live.job = transition.changed(live.job, cleanup_uncertain=True)
        if extent:
            live.job = transition.changed(
                live.job,
                stdout_bytes=extent.stdout_bytes,
                stderr_bytes=extent.stderr_bytes,
                lost_bytes=extent.lost_bytes,
                log_bytes=extent.disk_bytes,
            )
        await self._store_request(live)
        accounting = self._account(live, None)
        job = transition.lost(live.job, _why_lost(live.job), time.time_ns())
        await self._record_end(live, job, accounting[0])

    async def _has_lost_record(self, held: Held) -> bool:
        is_known = not self._store.damaged or await self._store.get(held.job_id, brief=True)
        return held.started is not None and not is_known

    async def _found(self, held: Held, extent: Extent | None) -> Job:
        """A record of what is known of a job whose own was lost: it goes on, as nobody's."""
        log.error(
            "job %d goes on, though its record was lost with the damaged database: only admins "
            "see it, and it has no time limit any more",
            held.job_id,
        )
        assert held.started is not None
        if held.ending is None:
            spec = self.isolation.seen(held.started.pid)
        else:
            spec = NOTHING_SEEN
            # Whose user what it left behind has is not known, so that no other job must get it.
            if cgroup := self.cgroups.find(held.job_id):
                await _kill_for_start(cgroup)
        quota = LogQuota(self.policy.log_max_bytes, self.policy.log_policy)
        if extent and extent.segment_bytes:
            quota = quota.fitted(extent.segment_bytes)
        spec = replace(
            spec,
            merge_output=held.started.stderr_fd < 0,
            log_max_bytes=quota.max_bytes,
            log_policy=quota.policy,
        )
        return transition.found(held.job_id, spec, held.started.started_ns)

    def _disown(self, job_id: int, held: Held | None) -> None:
        log.error("jobinit holds a job %d of which there is no record: killing it", job_id)
        _close_pipes(held)
        self._jobinits.signal(job_id, signal.SIGKILL)
        if held and held.ending is None:
            self._strangers.add(job_id)
        else:
            self._jobinits.acknowledge(job_id)

    async def _kill_leftovers(self) -> None:
        """Cgroups of jobs that nobody holds, and of which nobody knows any more: before others
        come, which may get the same user."""
        # Those too that jobinit is about to make.
        known = {self.cgroups.of(job_id) for job_id in self._live}
        for cgroup in self.cgroups.leftovers():
            if cgroup not in known:
                log.warning("killing what an earlier server left in %s", cgroup.path)
                await _kill_for_start(cgroup)
                self._spawn(self._remove_cgroup(cgroup))

    # What jobinit reports

    def on_exit(self, exited: Exited | Failed | OrphanExited) -> None:
        """A job's main process has ended, or will never be."""
        if self._has_let_go:
            return
        if exited.job_id in self._strangers:
            self._strangers.remove(exited.job_id)
            self._jobinits.acknowledge(exited.job_id)
            return
        if isinstance(exited, Failed):  # `await_start` is about to be told
            return
        live = self._live.get(exited.job_id)
        if live is None and not self._has_recovered:
            self._early_exits[exited.job_id] = exited
            return
        if live is None:
            log.error("jobinit reports the end of job %d, which is not ours", exited.job_id)
            return
        live.exited = exited
        if live.job.status is Status.RUNNING:
            self._spawn(self._certainly(live, partial(self._end, live)))

    def _on_log_limit(self, job_id: int) -> None:
        live = self._live.get(job_id)
        if live is None or live.job.is_ended:
            return
        log.warning("job %d has used up its log quota", job_id)
        if live.job.spec.log_policy is LogPolicy.STOP:
            self._request_end(live, Cause.LOG_LIMIT, signal.SIGTERM, self.policy.stop_grace_seconds)

    # Starting

    def _admit(self) -> None:
        if self._closing:
            raise ShuttingDownError
        if len(self._live) >= self.policy.maximum_jobs:
            raise ResourceExhaustedError(
                f"{len(self._live)} jobs are running, as many as the server's limit on open "
                "descriptors allows; wait for one to end, or raise its hard RLIMIT_NOFILE"
            )

    def _require_room(self) -> None:
        room = self._output.room_bytes()
        if room < self.policy.disk_reserve_bytes:
            raise ResourceExhaustedError(
                f"the disk of the state folder has {room >> 20} MiB left, less than the reserve of "
                f"{self.policy.disk_reserve_bytes >> 20} MiB; delete ended jobs, or make room"
            )

    async def _create(
        self, request: JobSpec, stdin: bytes, client: Caller, admit: Callable[[], Caller]
    ) -> Job:
        limits = self._limits_in_force(request.limits)
        self._ledger(client.name).check(client.quota, limits, self.cgroups.controllers)
        confinement = self.isolation.choose(request.profile, request.user, request.network)
        confinement = self.isolation.arrange(confinement, request)
        _check_choice(client, request, confinement)
        found = await self._looks.find(request, limits, confinement, client.name)
        await self._store.wait_for_ids()
        # Again: it may have taken long.
        client = admit()
        _check_choice(client, request, confinement)
        user = confinement.user
        confinement = self.isolation.assign(confinement)
        spec = replace(
            request,
            command=found.path,
            limits=limits,
            user=confinement.user.name,
            profile=confinement.profile,
            network=confinement.network,
            root=request.root if confinement.files and confinement.files.root else "",
            read_only=confinement.is_read_only,
            log_max_bytes=self.policy.log_max_bytes,
            log_policy=self.policy.log_policy,
        )
        self._admit()  # again: others have come meanwhile, or the end of the server
        self._ledger(client.name).check(client.quota, limits, self.cgroups.controllers)
        job_id, now_ns = self._store.reserve_id(), time.time_ns()
        live = self._new_live(transition.created(job_id, spec, now_ns, client.principal))
        try:
            cgroup = self.cgroups.of(live.job.id)
            if confinement.user.home != user.home:  # as of one of profile strict that has a name
                home = await self._looks.home_of(confinement, client.name)
                found = replace(found, home=home)
            start = self._start_request(
                live.job, cgroup, request.command, confinement, found, stdin
            )
            # Of many, each loses less by waiting for others than it gains by a common commit.
            await self._store.put(live.job, may_wait=len(self._creates) > FEW_CREATES)
            live.cgroup = cgroup
            self._started(live, await self._jobinits.start(start))
        except START_ERRORS as error:
            # Without its frames: a future in one of them has it, and would keep them until the
            # collector comes.
            error.with_traceback(None)
            await self._certainly(live, partial(self._fail_start, live, error))
        except StoreError as error:
            self._forget(live, error.with_traceback(None))  # as above
            raise
        except Exception:
            # Nobody thought of it, and the log tells of it. There may be a record, even a process.
            if live.job.status is Status.INITIALIZING:
                self._jobinits.signal(live.job.id, signal.SIGKILL)
                await self._certainly(live, partial(self._fail_start, live, FAULT))
            raise
        except asyncio.CancelledError:
            self._drop(live)
            live.begun.cancel()
            live.over.cancel()
            raise
        return live.job

    def _forget(self, live: _LiveJob, error: StoreError) -> None:
        """It could not be recorded, so it never was; who has heard of it is told so."""
        self._drop(live)
        for future in (live.begun, live.over):
            future.set_exception(StoreError(*error.args))
            future.exception()  # seen, also where nobody waits
        if live.kill_timer:  # a stop came, whose record may be written after all
            live.kill_timer.cancel()
            self._spawn(self._unrecord(live.job.id))

    async def _unrecord(self, job_id: int) -> None:
        with contextlib.suppress(StoreError):
            await self._store.delete([job_id])

    def _new_live(self, job: Job) -> _LiveJob:
        live = _LiveJob(job, self._loop.create_future(), self._loop.create_future())
        self._live[job.id] = live
        self._ledger(job.owner).open(job)
        self.isolation.hold(job.spec)
        return live

    def _drop(self, live: _LiveJob) -> None:
        del self._live[live.job.id]
        self.isolation.release(live.job.spec)
        ledger = self._ledger(live.job.owner)
        ledger.close(live.job)
        if ledger.is_idle(self._loop.time()):
            del self._ledgers[live.job.owner]

    def _ledger(self, owner: str) -> Ledger:
        ledger = self._ledgers.get(owner)
        if ledger is None:
            ledger = self._ledgers[owner] = Ledger(owner)
        return ledger

    def _limits_in_force(self, asked: Limits) -> Limits:
        """With the defaults, but for those that this machine cannot enforce (the server has
        said which when it started)."""
        default = self.policy.default_limits
        available = self.cgroups.controllers

        def choose(value: int, default_value: int, controller: str) -> int:
            return value or (0 if available[controller] else default_value)

        return Limits(
            cpu_percent=choose(asked.cpu_percent, default.cpu_percent, "cpu"),
            memory_mib=choose(asked.memory_mib, default.memory_mib, "memory"),
            io_bytes_per_second=choose(
                asked.io_bytes_per_second, default.io_bytes_per_second, "io"
            ),
            pids=choose(asked.pids, default.pids, "pids"),
        )

    def _start_request(
        self,
        job: Job,
        cgroup: Cgroup | None,
        argv0: str,
        confinement: Confinement,
        found: Found,
        stdin: bytes = b"",
    ) -> StartRequest:
        spec = job.spec
        return StartRequest(
            job_id=job.id,
            executable=spec.command,
            argv=(argv0, *spec.args),
            environment=base_environment(job.id, confinement.user, found.home)
            | dict(spec.environment),
            working_directory=spec.working_directory,
            cgroup=str(cgroup.path) if cgroup else None,
            makes_cgroup=cgroup is not None,
            limits=found.limit_files,
            merge_output=spec.merge_output,
            stdin=stdin,
            identity=confinement.identity,
            is_confined=confinement.is_confined,
            view=confinement.view.number if confinement.view else 0,
            has_network=confinement.network != "none",
            root=confinement.files.root if confinement.files else "",
            binds=confinement.files.binds if confinement.files else (),
            is_read_only=confinement.is_read_only,
        )

    def _started(self, live: _LiveJob, started: Started) -> None:
        self._open_log(live, started)
        self._mark_started(live, started)
        if live.exited:
            self._spawn(self._certainly(live, partial(self._end, live)))
            return
        if live.kill_at is not None:
            self._send_stop(live)
        self._set_timeout(live, _seconds_since(started.started_ns))

    def _open_log(self, live: _LiveJob, started: Started, resumed: Extent | None = None) -> None:
        live.log = self._output.open_log(
            live.job.id, started.stdout_fd, started.stderr_fd, quota_of(live.job), resumed
        )
        live.begun.set_result(None)

    def _mark_started(self, live: _LiveJob, started: Started) -> None:
        live.job = transition.started(live.job, started.started_ns)
        # Not at once: were we killed now, jobinit would know that the job runs; and of those
        # that are over soon, the ending is all that need be stored.
        self._loop.call_later(STORE_RUNNING_SECONDS, self._store_running_soon, live)

    def _store_running_soon(self, live: _LiveJob) -> None:
        if not live.job.is_ended:
            self._spawn(self._store_unended(live))

    async def _store_unended(self, live: _LiveJob) -> None:
        """Asks and puts in one step: a record that waits for its turn could come after that of
        the ending, and stay."""
        if not live.job.is_ended:
            await self._store.put(live.job, may_wait=True)

    async def _fail_start(self, live: _LiveJob, error: Exception) -> None:
        if isinstance(error, JobinitGoneError) and (
            self.cgroups.path is None or self.cgroups.find(live.job.id)
        ):  # without its cgroup it did not come to its exec
            await self._lose(live, None)
            return
        if isinstance(error, StartFailedError):
            step, number = error.step, error.error_number
        elif isinstance(error, CgroupError):
            step, number = "cgroup", getattr(error.__cause__, "errno", 0) or 0
        elif error is FAULT:
            step, number = "server", 0
        else:
            step, number = "jobinit", getattr(error, "errno", 0) or errno.EPIPE
        detail = str(error)
        if live.cgroup:
            # Where jobinit died over it, it may have started and be alive.
            await asyncio.to_thread(live.cgroup.kill)
            # The memory may not even have been enough for the exec.
            _, oom = self._account(live, None)
            detail = "; ".join(filter(None, [detail, transition.out_of_memory(live.job, oom)]))
        log.warning("job %d did not start: %s", live.job.id, detail)
        await self._store_request(live)
        job = transition.start_failed(live.job, step, number, detail, time.time_ns())
        await self._record_end(live, job)

    # Ending

    def _request_end(
        self,
        live: _LiveJob,
        cause: Cause,
        signal_number: int,
        grace_seconds: float,
        by: Principal | None = None,
    ) -> bool:
        """Whether it does more than what was asked for before: another's, with another signal, or
        with half of the time that was left. Of these one job has some hundred at the most."""
        now = self._loop.time()
        deadline = now + grace_seconds
        is_first = live.kill_at is None
        is_news = live.kill_at is None or deadline - now < (live.kill_at - now) / 2
        if is_news or live.job.is_ended:  # which raises
            grace_ms = int(grace_seconds * 1e3)
            live.job = transition.request_end(live.job, cause, signal_number, grace_ms, by)
        asked = (by.name if by else "", signal_number)
        is_news |= asked not in live.asked
        live.asked |= {asked}
        live.kill_at = deadline if live.kill_at is None else min(live.kill_at, deadline)
        if signal_number not in live.unsent:
            live.unsent.append(signal_number)
        if live.job.status is Status.RUNNING:
            self._send_stop(live)
        else:
            if is_first:
                self._spawn(self._store_unended(live))  # also for the next server
            self._set_kill_timer(live)  # its exec may hang, as where a disk does not answer
        return is_news

    def _set_timeout(self, live: _LiveJob, run_seconds: float) -> None:
        """From the job's start on, though that may have been under an earlier server, and also of
        a job that is to end: its grace may be far longer."""
        if live.job.spec.timeout_ms and live.job.end_requested is not Cause.TIMED_OUT:
            left_seconds = live.job.spec.timeout_ms / 1e3 - run_seconds
            live.timeout_timer = self._loop.call_later(max(0.0, left_seconds), self._time_out, live)

    def _time_out(self, live: _LiveJob) -> None:
        if live.job.is_ended:  # and that is being stored
            return
        # Once its main process has ended, the linger time bounds the rest; or what is left of the
        # grace of a stop, which may be far longer.
        has_exited = live.exited is not None or self._jobinits.has_ended(live.job.id)
        if not has_exited or live.kill_at is not None:
            self._request_end(live, Cause.TIMED_OUT, signal.SIGTERM, self.policy.stop_grace_seconds)

    def _send_stop(self, live: _LiveJob) -> None:
        assert live.kill_at is not None
        is_due = live.kill_at <= self._loop.time()  # which is stored, and then killed
        if not is_due and not live.is_storing_end:  # which sends all signals afterwards
            self._spawn(self._store_and_signal(live))
        self._set_kill_timer(live)

    def _set_kill_timer(self, live: _LiveJob) -> None:
        assert live.kill_at is not None
        if live.kill_timer:
            live.kill_timer.cancel()
        live.kill_timer = self._loop.call_at(live.kill_at, self._kill_soon, live)

    async def _store_and_signal(self, live: _LiveJob) -> None:
        """In this order: what it dies of would else look like another cause to the next
        server."""
        live.is_storing_end = True
        try:
            await self._store_request(live)
        finally:
            live.is_storing_end = False
        # Others may have asked meanwhile: all get theirs, but for pauses in their order. SIGKILL,
        # after which none means anything, waits for no other.
        signals = [number for number in live.unsent if number not in live.pausing]
        if signal.SIGKILL in signals:
            signals = [signal.SIGKILL]
        else:
            signals = signals[: max(0, MOST_SIGNALS - len(live.pausing))]
        live.unsent = [number for number in live.unsent if number not in signals]
        for number in signals if live.exited is None else ():
            self._jobinits.signal(live.job.id, number)
            live.pausing.add(number)
            self._loop.call_later(SIGNAL_PAUSE_SECONDS, self._end_pause, live, number)

    async def _store_request(self, live: _LiveJob) -> None:
        """To end it, where there is one: also before an ending is shown, as the next server would
        tell another cause. Where the disk refuses, it goes on without."""
        with contextlib.suppress(JobWorkerError):
            # Else it says nothing new, and may be large.
            while live.job.end_requested and live.job.end_grace_ms != live.stored_grace_ms:
                grace_ms = live.job.end_grace_ms
                await self._store.put(live.job)
                live.stored_grace_ms = grace_ms

    def _end_pause(self, live: _LiveJob, number: int) -> None:
        live.pausing.remove(number)
        if live.unsent and live.exited is None and not live.is_storing_end:
            self._spawn(self._store_and_signal(live))

    def _kill_soon(self, live: _LiveJob) -> None:
        self._spawn(self._certainly(live, partial(self._kill, live)))

    async def _kill(self, live: _LiveJob) -> None:
        """All of the job, at once; recorded first, as in `_store_and_signal`."""
        await self._store_request(live)
        if live.job.is_ended:
            return
        if not live.cgroup or live.job.status is not Status.RUNNING:
            # Of one that starts there is one process, which may not have a cgroup yet.
            self._jobinits.signal(live.job.id, signal.SIGKILL)
        if live.cgroup:  # also of one that starts, which may wait for a disk at its limit
            await asyncio.to_thread(live.cgroup.kill)

    async def _end(self, live: _LiveJob) -> None:
        """From the exit of the main process to the record of the ending."""
        exited, log_ = live.exited, live.log
        assert exited is not None and log_ is not None
        if live.cgroup:
            await self._empty_cgroup(live, live.cgroup)
        else:
            await self._empty_session(live, log_)
        await self._output.finish(log_)
        await self._lift_io_limits(live)
        await self._store_request(live)
        # From here on nothing is waited for: the cause is that of all that was accepted before.
        accounting, oom = self._account(live, exited)
        if exited.wait_status is None:
            detail = "jobinit died, and the kernel could not tell how the job ended"
            job = transition.lost(live.job, detail, exited.ended_ns)
        else:
            job = transition.ended(live.job, exited.wait_status, oom, exited.ended_ns)
        await self._record_end(live, job, accounting)

    async def _empty_cgroup(self, live: _LiveJob, cgroup: Cgroup) -> None:
        """Gives what the main process left behind its time, then kills it."""
        if not await cgroup.wait_unpopulated(self._linger_seconds(live)):
            await self._kill_cgroup(live, cgroup)

    async def _kill_cgroup(self, live: _LiveJob, cgroup: Cgroup) -> None:
        await asyncio.to_thread(cgroup.kill)
        while not await cgroup.wait_unpopulated(KILLED_SECONDS):
            log.error("job %d: killed, and still not gone: %s", live.job.id, cgroup.path)

    async def _empty_session(self, live: _LiveJob, log_: Log) -> None:
        """Without a cgroup nobody knows what is left; while something holds the job's pipes
        it may be a part of it. What left the job's process group cannot be found."""
        try:
            async with asyncio.timeout(self._linger_seconds(live)):
                await self._output.wait_finished(log_)
        except TimeoutError:
            pass
        self._jobinits.signal(live.job.id, signal.SIGKILL)
        live.job = transition.changed(live.job, cleanup_uncertain=True)

    async def _lift_io_limits(self, live: _LiveJob) -> None:
        """Who syncs the disk waits for what the job has left to be written there."""
        if live.cgroup and live.job.spec.limits.io_bytes_per_second:
            await asyncio.to_thread(live.cgroup.lift_io_limits)

    def _linger_seconds(self, live: _LiveJob) -> float:
        if live.kill_at is None:
            return self.policy.linger_seconds
        return max(0.0, live.kill_at - self._loop.time())

    def _account(
        self, live: _LiveJob, exited: Exited | OrphanExited | None
    ) -> tuple[Accounting, OomKills]:
        of_process = Accounting()
        if isinstance(exited, Exited):
            of_process = Accounting(
                cpu_user_us=exited.cpu_user_us,
                cpu_system_us=exited.cpu_system_us,
                memory_peak_bytes=exited.max_rss_bytes,
            )
        cgroup = live.cgroup
        if cgroup is None:
            return of_process, OomKills()
        # Not in a thread: these files are memory, and the way there would cost more.
        accounting, oom = cgroup.accounts()
        if accounting.memory_peak_bytes is None:
            accounting = replace(accounting, memory_peak_bytes=of_process.memory_peak_bytes)
        return accounting, oom

    async def _remove_cgroup(self, cgroup: Cgroup) -> None:
        try:
            # The other way may take its time: processes are in it that have just been killed.
            if not await self._remover.ask(cgroup):
                await asyncio.to_thread(cgroup.remove)
        except PASSING_ERRORS:
            log.exception("cannot remove %s; the next start of the server will", cgroup.path)

    async def _record_end(
        self, live: _LiveJob, job: Job, accounting: Accounting | None = None
    ) -> None:
        """The ending is certain: store it, then let go of everything."""
        live.job = job
        live.job = job = live.snapshot(accounting=accounting, output_problem="")
        await self._store_certainly(job)
        if live.cgroup:
            await self._remove_cgroup(live.cgroup)
        self._jobinits.acknowledge(job.id)
        if not live.begun.done():
            live.begun.set_result(None)
        for timer in (live.kill_timer, live.timeout_timer):
            if timer:
                timer.cancel()
        self._drop(live)
        live.over.set_result(job)
        self._retention.take(job)

    async def _certainly(
        self, live: _LiveJob, step: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Again, where this process is short of descriptors, threads or the like: the job would
        wait for its end for ever. All that is done twice then does no harm."""
        while True:
            try:
                return await step()
            except PASSING_ERRORS as error:
                log.error("the ending of job %d has to wait: %s", live.job.id, error)
                await asyncio.sleep(END_RETRY_SECONDS)

    async def _store_certainly(self, job: Job) -> None:
        """However long the disk refuses: jobinit, too, holds the ending until then."""
        while True:
            try:
                # Who has stopped a job waits for its end.
                await self._store.put(job, may_wait=job.cause is not Cause.STOPPED)
                return
            except StoreError as error:
                log.error("the ending of job %d waits to be stored: %s", job.id, error)
                await asyncio.sleep(STORE_RETRY_SECONDS)

    # Tasks

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        if self._has_let_go:  # a timer that came due meanwhile: the next server does it
            coroutine.close()
            return
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("a job's task failed", exc_info=task.exception())


def _check_choice(client: Caller, request: JobSpec, confinement: Confinement) -> None:
    """Of what the server would allow: the profile that the job would have, and the user that it
    asks for. Raises PermissionDeniedError."""
    choices: list[tuple[str, str, frozenset[str] | None]] = [
        ("profile", confinement.profile, client.profiles)
    ]
    if request.user:
        choices.append(("user", confinement.user.name, client.users))
    for what, name, allowed in choices:
        if allowed is not None and name not in allowed:
            others = ", ".join(sorted(allowed)) or "none"
            raise PermissionDeniedError(
                f"{client.name!r} may not have the {what} {str(name)!r}; ask for one of: {others}"
            )


async def _kill_for_start(cgroup: Cgroup) -> None:
    """Raises StartupError."""
    try:
        await asyncio.to_thread(cgroup.kill)
    except PASSING_ERRORS as error:
        problem = f"what an earlier server left in {cgroup.path} cannot be killed"
        raise StartupError(f"{problem}: {error}; start again") from error


def _count(jobs: Sized) -> str:
    return "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"


def _close_pipes(held: Held | None) -> None:
    if held and held.started:
        held.started.close_pipes()


def _why_lost(job: Job) -> str:
    if job.created_ns < _boot_ns():
        return "the machine was restarted while the job ran"
    if job.status is Status.INITIALIZING and not job.output_bytes:
        return "nobody is left that knows if the job was started"
    return "jobinit and the server both died while the job ran"


def _seconds_since(started_ns: int) -> float:
    return (time.time_ns() - started_ns) / 1e9


def _run_seconds(started: Started) -> float:
    """Of an earlier server's job; by the kernel, where the clock seems to have been set since."""
    seconds = _seconds_since(started.started_ns)
    with contextlib.suppress(OSError):  # it has just ended
        # The process's name, in brackets, may have any bytes in it.
        stat = Path(f"/proc/{started.pid}/stat").read_bytes()
        ticks = int(stat.rpartition(b")")[2].split()[19])
        of_kernel = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        if abs(of_kernel - seconds) > CLOCK_TOLERANCE_SECONDS:
            return of_kernel
    return seconds


def _boot_ns() -> int:
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
