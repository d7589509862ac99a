"""Decides what happens to jobs, and is the only writer of their state.

Every decision is made synchronously, on the event loop, by a transition of `job`; the I/O
that follows from it comes after. A job that only runs costs no task: what happens to it
arrives as a call, and a task lives only while something is being done.

    create:  check ▶ INITIALIZING stored, cgroup made ▶ jobinit ▶ exec proved ▶ RUNNING
    ending:  main process gone ▶ the rest of the cgroup gone ▶ pipes drained
             ▶ accounts read, cgroup removed ▶ stored ▶ jobinit may forget it
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jobworker import job as transition
from jobworker._fastio import Log
from jobworker.engine.cgroup import Cgroup, CgroupTree
from jobworker.engine.command import base_environment, check_working_directory, resolve
from jobworker.engine.jobinit import Exited, Jobinit, Started, StartRequest
from jobworker.engine.output import Output, Reader
from jobworker.engine.store import Store
from jobworker.errors import (
    CgroupError,
    JobinitError,
    JobNotFoundError,
    JobStateError,
    JobWorkerError,
    OffsetOutOfRangeError,
    ResourceExhaustedError,
    ShuttingDownError,
    StartFailedError,
)
from jobworker.job import Accounting, Cause, Job, JobSpec, Limits, OomKills, Status

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration says about jobs."""

    default_limits: Limits
    linger_seconds: float  # for what a job leaves behind when its main process ends
    stop_grace_seconds: float
    maximum_jobs: int  # at the same time


@dataclass(slots=True, eq=False)
class _LiveJob:
    """A job that has not ended, with what it holds on this machine."""

    job: Job
    begun: asyncio.Future[None]  # its log is open, or it has failed to start
    over: asyncio.Future[Job]
    cgroup: Cgroup | None = None
    log: Log | None = None
    pidfd: int = -1
    exited: Exited | None = None
    stop_signal: int = 0  # to be sent as soon as there is somebody to send it to
    kill_at: float | None = None  # on the loop's clock; None: nobody asked for the end
    kill_timer: asyncio.TimerHandle | None = None

    def snapshot(self) -> Job:
        if self.log is None:
            return self.job
        stdout_bytes, stderr_bytes = self.log.stream_bytes
        return replace(self.job, stdout_bytes=stdout_bytes, stderr_bytes=stderr_bytes)


class Manager:
    """All jobs of this server."""

    def __init__(
        self, policy: Policy, cgroups: CgroupTree, output: Output, store: Store
    ) -> None:
        self.policy = policy
        self.cgroups = cgroups
        self._output = output
        self._store = store
        self._jobinit: Jobinit | None = None
        self._live: dict[int, _LiveJob] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._closing = False

    # What clients ask for

    @property
    def live_count(self) -> int:
        return len(self._live)

    async def create(self, request: JobSpec) -> Job:
        """Starts a job; returns it RUNNING, or FAILED where one step of its start failed.

        A client that goes away meanwhile does not take the job with it.
        """
        self._admit()
        transition.validate(request)
        return await self._shielded(self._create(request))

    async def get(self, job_id: int) -> Job:
        live = self._live.get(job_id)
        if live:
            return live.snapshot()
        job = await self._store.get(job_id)
        if job is None:
            raise JobNotFoundError(str(job_id))
        return job

    async def page(
        self,
        before_id: int | None = None,
        count: int = 100,
        statuses: frozenset[Status] = frozenset(),
        name: str = "",
    ) -> list[Job]:
        """Jobs with smaller ids than `before_id`, newest first."""
        jobs = await self._store.page(before_id, count, statuses, name)
        return [self._live[job.id].snapshot() if job.id in self._live else job for job in jobs]

    async def wait(self, job_id: int) -> Job:
        """The job once it has ended."""
        live = self._live.get(job_id)
        if live:
            return await asyncio.shield(live.over)
        return await self.get(job_id)

    async def stop(
        self, job_id: int, signal_number: int = 0, grace_seconds: float | None = None
    ) -> Job:
        """Ends a job; returns it once it has ended. Raises JobStateError if it had before."""
        live = self._live.get(job_id)
        if live is None:
            job = await self.get(job_id)
            raise JobStateError(job_id, job.status, "stop")
        if grace_seconds is None:
            grace_seconds = self.policy.stop_grace_seconds
        self._request_end(live, Cause.STOPPED, signal_number or signal.SIGTERM, grace_seconds)
        return await asyncio.shield(live.over)

    async def read(self, job_id: int, offset: int, stream: int, follow: bool) -> Reader:
        """A reader of the job's output. The caller closes it."""
        live = self._live.get(job_id)
        if live:
            await asyncio.shield(live.begun)
        open_log = live.log if live else None
        end = open_log.end if open_log else (await self.get(job_id)).output_bytes
        if offset > end:
            raise OffsetOutOfRangeError(job_id, offset, end)
        return Reader(self._output, job_id, open_log, end, offset, stream, follow)

    # From the start of the server to its end

    async def recover(self) -> None:
        """Deals with what an earlier server left: its cgroups and its unended records.

        Jobs cannot be taken over yet: they are killed, and their records say so.
        """
        for cgroup in await asyncio.to_thread(self.cgroups.leftovers):
            log.warning("killing what an earlier server left in %s", cgroup.path)
            await asyncio.to_thread(cgroup.kill)
            await cgroup.wait_unpopulated(timeout_seconds=10)
            await asyncio.to_thread(cgroup.remove)
        jobs = await self._store.unended()
        extents = await asyncio.to_thread(self._output.recover, [job.id for job in jobs])
        for job in jobs:
            extent = extents[job.id]
            lost = transition.lost(job, "the server ended before the job did", time.time_ns())
            log.warning("job %d is lost: the server ended before it did", job.id)
            await self._store.put(
                replace(
                    lost, stdout_bytes=extent.stdout_bytes, stderr_bytes=extent.stderr_bytes
                )
            )

    def use(self, jobinit: Jobinit) -> None:
        """From now on jobs can be started."""
        self._jobinit = jobinit

    async def close(self) -> None:
        """Takes no more work, stops all jobs, and returns once they have ended."""
        self._closing = True
        if self._live:
            log.warning("stopping %d jobs, as the server ends", len(self._live))
        for live in list(self._live.values()):
            self._request_end(
                live, Cause.STOPPED, signal.SIGTERM, self.policy.stop_grace_seconds
            )
        while self._tasks or self._live:
            pending: list[Awaitable[Any]] = [*self._tasks]
            pending += [live.over for live in self._live.values()]
            await asyncio.wait(map(asyncio.ensure_future, pending), return_when="FIRST_COMPLETED")
        if self._jobinit:
            await self._jobinit.close()

    # What jobinit reports

    def on_exit(self, exited: Exited) -> None:
        """A job's main process has ended."""
        live = self._live.get(exited.job_id)
        if live is None:
            log.error("jobinit reports the end of job %d, which is not ours", exited.job_id)
            return
        live.exited = exited
        if live.job.status is Status.RUNNING:
            self._spawn(self._end(live))

    def on_jobinit_lost(self) -> None:
        """jobinit is gone: nobody is left to say how jobs end, nor to start any."""
        log.critical("jobinit is gone; killing its jobs, as their endings cannot be known")
        self._jobinit = None
        for live in list(self._live.values()):
            if live.job.status is Status.RUNNING and live.exited is None:
                self._spawn(self._lose(live))

    # Starting

    def _admit(self) -> None:
        if self._closing or self._jobinit is None:
            raise ShuttingDownError
        if len(self._live) >= self.policy.maximum_jobs:
            raise ResourceExhaustedError(
                f"{len(self._live)} jobs are running, as many as the server's limit on open "
                "descriptors allows; wait for one to end, or raise its hard RLIMIT_NOFILE"
            )

    async def _create(self, request: JobSpec) -> Job:
        limits = self._limits_in_force(request.limits)
        path = await asyncio.to_thread(self._check_on_machine, request)
        spec = replace(request, command=path, limits=limits)
        job = transition.created(self._store.reserve_id(), spec, time.time_ns())
        live = _LiveJob(job, self._loop.create_future(), self._loop.create_future())
        self._live[job.id] = live
        try:
            await self._start(live, request.command)
        except (StartFailedError, CgroupError, JobinitError, OSError) as error:
            await self._fail_start(live, error)
        except BaseException:
            del self._live[job.id]
            raise
        return live.snapshot()

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
        )

    def _check_on_machine(self, request: JobSpec) -> str:
        """The path of the executable. Blocks: every look at a filesystem may."""
        self.cgroups.check(request.limits, request.working_directory)
        check_working_directory(request.working_directory)
        return resolve(request.command, request.environment, request.working_directory)

    async def _start(self, live: _LiveJob, argv0: str) -> None:
        job, spec = live.job, live.job.spec
        stored = asyncio.ensure_future(self._store.put(job))
        try:
            if self.cgroups.path:
                live.cgroup = await asyncio.to_thread(
                    self.cgroups.create, job.id, spec.limits, spec.working_directory
                )
        finally:
            await stored
        if self._jobinit is None:
            raise JobinitError("jobinit is gone; restart the server")
        started = await self._jobinit.start(
            StartRequest(
                job_id=job.id,
                executable=spec.command,
                argv=(argv0, *spec.args),
                environment=base_environment(job.id) | dict(spec.environment),
                working_directory=spec.working_directory,
                cgroup=str(live.cgroup.path) if live.cgroup else None,
                merge_output=spec.merge_output,
            )
        )
        self._started(live, started)

    def _started(self, live: _LiveJob, started: Started) -> None:
        live.pidfd = started.pidfd
        live.log = self._output.open_log(live.job.id, started.stdout_fd, started.stderr_fd)
        live.begun.set_result(None)
        live.job = transition.started(live.job, started.started_ns)
        # Not waited for: were we killed now, jobinit would know that the job runs.
        self._spawn(self._store.put(live.job))
        if live.exited:
            self._spawn(self._end(live))
        elif live.kill_at is not None:
            self._send_stop(live)

    async def _fail_start(self, live: _LiveJob, error: Exception) -> None:
        if isinstance(error, StartFailedError):
            step, number = error.step, error.error_number
        elif isinstance(error, CgroupError):
            step, number = "cgroup", getattr(error.__cause__, "errno", 0) or 0
        else:
            step, number = "jobinit", getattr(error, "errno", 0) or errno.EPIPE
        log.warning("job %d did not start: %s", live.job.id, error)
        if live.cgroup:
            await self._remove_cgroup(live.cgroup)
        job = transition.start_failed(live.job, step, number, str(error), time.time_ns())
        await self._record_end(live, job)

    # Ending

    def _request_end(
        self, live: _LiveJob, cause: Cause, signal_number: int, grace_seconds: float
    ) -> None:
        live.job = transition.request_end(live.job, cause)
        deadline = self._loop.time() + grace_seconds
        live.kill_at = deadline if live.kill_at is None else min(live.kill_at, deadline)
        live.stop_signal = signal_number
        if live.job.status is Status.RUNNING:
            self._send_stop(live)

    def _send_stop(self, live: _LiveJob) -> None:
        assert live.kill_at is not None
        if live.exited is None and live.kill_at > self._loop.time():
            self._spawn(self._signal(live, live.stop_signal))
        if live.kill_timer:
            live.kill_timer.cancel()
        live.kill_timer = self._loop.call_at(
            live.kill_at, lambda: self._spawn(self._kill(live))
        )

    async def _signal(self, live: _LiveJob, number: int) -> None:
        if self._jobinit:
            await self._jobinit.signal(live.job.id, number)

    async def _kill(self, live: _LiveJob) -> None:
        """All of the job, at once."""
        if live.job.is_ended:
            return
        if live.cgroup:
            await asyncio.to_thread(live.cgroup.kill)
        else:
            await self._signal(live, signal.SIGKILL)

    async def _end(self, live: _LiveJob) -> None:
        """From the exit of the main process to the record of the ending."""
        exited, log_ = live.exited, live.log
        assert exited is not None and log_ is not None
        if live.cgroup:
            await self._empty_cgroup(live, live.cgroup)
        else:
            await self._empty_session(live, log_)
        log_.drain()
        await self._output.wait_finished(log_)
        accounting, oom = await self._account(live, exited)
        job = transition.ended(live.job, exited.wait_status, oom, exited.ended_ns)
        await self._record_end(live, replace(job, accounting=accounting))

    async def _empty_cgroup(self, live: _LiveJob, cgroup: Cgroup) -> None:
        """Gives what the main process left behind its time, then kills it."""
        if await cgroup.wait_unpopulated(self._linger_seconds(live)):
            return
        await asyncio.to_thread(cgroup.kill)
        while not await cgroup.wait_unpopulated(timeout_seconds=10):
            log.error("job %d: killed, and still not gone: %s", live.job.id, cgroup.path)

    async def _empty_session(self, live: _LiveJob, log_: Log) -> None:
        """Without a cgroup nobody knows what is left; while something holds the job's pipes
        it may be a part of it. What left the job's process group cannot be found."""
        try:
            async with asyncio.timeout(self._linger_seconds(live)):
                await self._output.wait_finished(log_)
        except TimeoutError:
            pass
        await self._signal(live, signal.SIGKILL)
        live.job = replace(live.job, cleanup_uncertain=True)

    def _linger_seconds(self, live: _LiveJob) -> float:
        if live.kill_at is None:
            return self.policy.linger_seconds
        return max(0.0, live.kill_at - self._loop.time())

    async def _account(self, live: _LiveJob, exited: Exited) -> tuple[Accounting, OomKills]:
        if live.cgroup is None:
            accounting = Accounting(
                cpu_user_us=exited.cpu_user_us,
                cpu_system_us=exited.cpu_system_us,
                memory_peak_bytes=exited.max_rss_bytes,
            )
            return accounting, OomKills()
        cgroup = live.cgroup
        accounting, oom = await asyncio.to_thread(
            lambda: (cgroup.accounting(), cgroup.oom_kills())
        )
        await self._remove_cgroup(cgroup)
        if accounting.memory_peak_bytes is None:
            accounting = replace(accounting, memory_peak_bytes=exited.max_rss_bytes)
        return accounting, oom

    async def _lose(self, live: _LiveJob) -> None:
        """jobinit has died: the job is killed, and how it ended cannot be known."""
        await self._kill(live)
        if live.cgroup:
            await live.cgroup.wait_unpopulated(timeout_seconds=10)
            await self._remove_cgroup(live.cgroup)
        if live.log:
            live.log.drain()
            await self._output.wait_finished(live.log)
        job = transition.lost(live.job, "jobinit died, and the job with it", time.time_ns())
        await self._record_end(live, job)

    async def _remove_cgroup(self, cgroup: Cgroup) -> None:
        try:
            await asyncio.to_thread(cgroup.remove)
        except CgroupError:
            log.exception("cannot remove %s; the next start of the server will", cgroup.path)

    async def _record_end(self, live: _LiveJob, job: Job) -> None:
        """The ending is certain: store it, then let go of everything."""
        live.job = job
        live.job = live.snapshot()
        try:
            await self._store.put(live.job)
        except JobWorkerError:
            log.exception("the ending of job %d cannot be stored", job.id)
        else:
            if self._jobinit:
                self._jobinit.acknowledge(job.id)
        if not live.begun.done():
            live.begun.set_result(None)
        if live.kill_timer:
            live.kill_timer.cancel()
        if live.pidfd >= 0:
            os.close(live.pidfd)
            live.pidfd = -1
        del self._live[job.id]
        live.over.set_result(live.job)

    # Tasks

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("a job's task failed", exc_info=task.exception())

    async def _shielded(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Goes on to its end even where the caller is cancelled."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)
