"""The JobService: one short handler for each RPC, and the table that registers them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import grpc

from jobworker.authorization import RULES, Access
from jobworker.engine.manager import Manager
from jobworker.engine.output import FIRST_MESSAGE_BYTES, Reader
from jobworker.errors import InvalidRequestError, JobNotFoundError
from jobworker.job import Job
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc import convert
from jobworker.rpc.gate import (
    MOST_CREATED,
    ClientLimits,
    Entry,
    Gate,
    GivenUp,
    Method,
    Subject,
    expected,
    forget_frames,
    leaving_time_for_others,
)

SERVICE = "job_worker.JobService"
PAGE_JOBS = 100
# Of one request: with a message of 4 MiB two million could be asked for.
MOST_CREATES = 1000
LARGEST_PAGE_JOBS = 1000
MOST_JOBS_AT_ONCE = 100
# Of arguments and variables, shown before others have their turn: some 2 ms.
MOST_STRINGS_AT_ONCE = 2000
# What GetServerInfo keeps from those who may see their own jobs only.
ABOUT_OTHERS = ("state_directory", "ended_jobs", "ended_log_bytes", "blocked_jobs")

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What GetServerInfo tells beside what the manager knows."""

    version: str
    started_ns: int
    state_directory: str
    client_limits: ClientLimits


class JobService:
    """What clients may ask; each answer is a message of the contract."""

    def __init__(self, manager: Manager, facts: ServerFacts) -> None:
        self._manager = manager
        self._facts = facts

    async def create_job(self, request: pb.CreateJobReq, entry: Entry, _context: Context) -> pb.Job:
        access = entry.access()
        if convert.has_many_strings(request):
            async with leaving_time_for_others(entry.large_job()):
                creating = self._create(request, entry)
        else:
            creating = self._create(request, entry)
        try:
            job = await asyncio.shield(creating)
        except asyncio.CancelledError:
            # What is begun goes on, and has its line, however often this is cancelled.
            creating.add_done_callback(partial(_note_created, request, entry))
            await _given_up(creating)
            raise GivenUp(is_told=True) from None
        return _shown(job, access)

    async def create_jobs(
        self, request: pb.CreateJobsReq, entry: Entry, _context: Context
    ) -> pb.CreateJobsRes:
        count = len(request.jobs)
        if count > MOST_CREATES:
            problem = f"{count} are too many for one request; use at most {MOST_CREATES}"
            raise InvalidRequestError("jobs", problem)
        results = [pb.CreateJobsRes.Result() for _ in range(count)]
        pending = deque(enumerate(request.jobs))

        async def work() -> None:
            while pending:
                async with entry.creating():
                    if not pending:
                        return
                    place, each = pending.popleft()
                    try:
                        result = results[place] = await self._result_of(each, entry)
                    except asyncio.CancelledError:
                        entry.note(partial(_told_given_up, each))
                        raise
                    entry.note(partial(_told_of, each, result))
                    if result.code:  # most that are refused have waited for nothing
                        async with entry.large_job():
                            await asyncio.sleep(0)

        workers = asyncio.gather(*(work() for _ in range(min(MOST_CREATED, count))))
        # Seen, also where nobody waits for it any more, as the server ends.
        workers.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.shield(workers)
        except asyncio.CancelledError:
            pending.clear()
            await _given_up(workers)
            raise
        return pb.CreateJobsRes(results=results)

    async def _result_of(self, request: pb.CreateJobReq, entry: Entry) -> pb.CreateJobsRes.Result:
        try:
            job = await self._create(request, entry)
        except Exception as error:  # noqa: BLE001 the others' results are not lost with it
            return _refused(error)
        return pb.CreateJobsRes.Result(id=str(job.id), status=job.status)

    def _create(self, request: pb.CreateJobReq, entry: Entry) -> asyncio.Future[Job]:
        spec = convert.spec_from(request)
        return self._manager.create(spec, request.stdin, lambda: entry.admit().caller)

    async def delete_job(
        self, request: pb.DeleteJobReq, entry: Entry, _context: Context
    ) -> pb.DeleteJobRes:
        access = entry.access()
        job_id = await self._within_reach(request.id, access)
        deleting = await self._manager.delete(job_id, entry.reading_as(access))
        try:
            await deleting
        except asyncio.CancelledError:
            raise GivenUp from None
        return pb.DeleteJobRes()

    async def get_job(self, request: pb.GetJobReq, entry: Entry, _context: Context) -> pb.Job:
        access = entry.access()
        job_id = await self._within_reach(request.id, access)
        job = await self._manager.get(job_id, brief=True, turn=entry.reading_as(access))
        if not job.is_large:
            return _shown(job, access)
        del job
        async with leaving_time_for_others(entry.large_job()):
            return _shown(await self._manager.get(job_id, turn=entry.reading_as(access)), access)

    async def stop_job(
        self, request: pb.StopJobReq, entry: Entry, _context: Context
    ) -> pb.StopJobRes:
        access = entry.access()
        grace_seconds = None
        if request.HasField("grace_milliseconds"):
            grace_seconds = request.grace_milliseconds / 1000
        if not 0 <= request.signal < signal.NSIG:
            problem = f"{request.signal} is no signal; use 1 to {signal.NSIG - 1}, 0 for SIGTERM"
            raise InvalidRequestError("signal", problem)
        job_id = await self._within_reach(request.id, access)
        stopping = await self._manager.stop(
            job_id, request.signal, grace_seconds, access.caller, entry.reading()
        )
        try:
            return convert.stop_result_to(await stopping.over)
        except asyncio.CancelledError:
            if stopping.is_news:
                raise GivenUp from None
            raise

    async def get_jobs(self, request: pb.EmptyRequest, entry: Entry, _context: Context) -> bytes:
        access = entry.access()
        jobs, _ = await self._newest(entry, access, owner=access.owner)
        return jobs.encoded()

    async def list_jobs(self, request: pb.ListJobsReq, entry: Entry, _context: Context) -> bytes:
        access = entry.access()
        if request.page_size > LARGEST_PAGE_JOBS:
            problem = f"{request.page_size} is too large; use at most {LARGEST_PAGE_JOBS}"
            raise InvalidRequestError("page_size", problem)
        if access.owner is not None and request.owner not in {"", access.owner}:
            return b""  # as for an owner without jobs
        jobs, is_last = await self._newest(
            entry,
            access,
            before_id=_page_start(request.page_token),
            most=request.page_size or PAGE_JOBS,
            statuses=convert.statuses_from(request.statuses),
            name=request.name,
            owner=access.owner if access.owner is not None else request.owner or None,
        )
        token = "" if is_last else jobs.last_id
        return jobs.encoded() + pb.ListJobsRes(next_page_token=token).SerializeToString()

    async def _newest(
        self,
        entry: Entry,
        access: Access,
        before_id: int | None = None,
        most: int | None = None,
        **filters: Any,
    ) -> tuple[convert.JobsWithin, bool]:
        """As many as fit into one answer, and whether there are no more. most: None: no limit. May
        take seconds, in which the caller must have the same access."""
        found = convert.JobsWithin()
        while most is None or found.count < most:
            count = (
                MOST_JOBS_AT_ONCE if most is None else min(MOST_JOBS_AT_ONCE, most - found.count)
            )
            async with entry.reading_as(access):
                part, before_id = await self._manager.page(before_id, count, **filters)
            if not await self._add(part, found, entry, access):
                return found, False
            if before_id is None:
                return found, True
        return found, False

    async def _add(
        self, part: list[Job], found: convert.JobsWithin, entry: Entry, access: Access
    ) -> bool:
        """Whether all of them have fitted."""
        strings = 0
        for each in part:
            try:
                job = each
                if each.is_brief:
                    job = await self._manager.get(each.id, turn=entry.reading_as(access))
            except JobNotFoundError:  # deleted meanwhile
                continue
            strings += len(job.spec.args) + len(job.spec.environment)
            if strings > MOST_STRINGS_AT_ONCE:
                await asyncio.sleep(0)
                strings = 0
            if not found.add(_shown(job, access)):
                return False
        return True

    async def get_server_info(
        self, request: pb.EmptyRequest, entry: Entry, _context: Context
    ) -> pb.ServerInfo:
        access = entry.access()
        manager, caller = self._manager, access.caller
        defaults = manager.policy.default_limits
        usage = await manager.usage()
        used = manager.usage_of(caller.name)
        limits = self._facts.client_limits
        info = pb.ServerInfo(
            version=self._facts.version,
            start_time_ns=self._facts.started_ns,
            identity=caller.name,
            role=access.role,
            state_directory=self._facts.state_directory,
            cgroup=str(manager.cgroups.path or ""),
            controllers=[
                pb.Controller(name=name, available=not problem, problem=problem)
                for name, problem in manager.cgroups.controllers.items()
            ],
            default_cpu=defaults.cpu_percent,
            default_memory=defaults.memory_mib,
            default_iobps=defaults.io_bytes_per_second,
            default_pids=defaults.pids,
            running_jobs=manager.live_count,
            maximum_jobs=manager.policy.maximum_jobs,
            default_profile=manager.isolation.profile,
            profiles=_choices(sorted(manager.isolation.profiles), caller.profiles),
            default_user=manager.isolation.job_user.name,
            users=_choices(manager.isolation.user_names, caller.users),
            isolation_problem=manager.isolation.problem,
            profile_details=convert.profiles_to(manager.isolation),
            roots_allowed=manager.isolation.allowed.roots,
            binds_allowed=manager.isolation.allowed.binds,
            ended_jobs=usage.ended_jobs,
            ended_log_bytes=usage.ended_log_bytes,
            disk_room_bytes=usage.disk_room_bytes,
            blocked_jobs=usage.blocked_jobs,
            disk_reserve_bytes=manager.policy.disk_reserve_bytes,
            log_max_bytes=manager.policy.log_max_bytes,
            log_policy=manager.policy.log_policy,
            client_limits=pb.ClientLimits(
                calls=limits.calls, streams=limits.streams, connections=limits.connections
            ),
            quota=convert.quota_to(caller.quota),
            quota_used=convert.quota_to(used),
        )
        if access.owner is not None:
            info.running_jobs = used.running_jobs
            for field in ABOUT_OTHERS:
                info.ClearField(field)
        return info

    async def get_jobs_stream(
        self, request: pb.GetJobsStreamReq, entry: Entry, context: Context
    ) -> None:
        if request.stream not in pb.Stream.values():
            raise InvalidRequestError("stream", f"{request.stream} is none; use 0, 1 or 2")
        job_id = await self._within_reach(request.id, entry.access())
        follow = not request.no_follow
        reader, owner = await self._manager.read(
            *(job_id, request.from_offset, request.stream, follow),
            *(entry.reading(), entry.reading_disk()),
        )
        try:
            entry.keep_asking(partial(_require_reach, job_id, owner))
            # The messages are finished bytes, shared by all readers at the same place.
            while (message := await reader.next()) is not None:
                await context.write(message)
            await self._write_ending(job_id, reader, follow, entry, context)
        finally:
            reader.close()

    async def _write_ending(
        self, job_id: int, reader: Reader, follow: bool, entry: Entry, context: Context
    ) -> None:
        ending = self._manager.wait if follow else self._manager.get
        job = await ending(job_id, brief=True, turn=entry.reading())
        if not job.is_ended:
            return
        if not follow and reader.offset < job.output_bytes:  # it has written more since then
            return
        if not job.is_large:
            last = _ending(job, reader.offset, entry.access())
            if len(last) <= FIRST_MESSAGE_BYTES:
                await context.write(last)
                return
            del last
        # Who does not take it has it in memory: meanwhile others of the same client wait, and
        # hold neither message nor job.
        del job
        async with entry.large_ending():
            async with entry.large_job():
                job = await self._manager.get(job_id)
                last = _ending(job, reader.offset, entry.access())
                del job
            await context.write(last)

    async def _within_reach(self, text: str, access: Access) -> int:
        """The id of a job that the call may be about; any other does not exist for the caller."""
        job_id = convert.job_id_from(text)
        if access.owner is not None:
            await self._manager.require_owner(job_id, access.owner)
        return job_id


def _require_reach(job_id: int, owner: str, access: Access) -> None:
    """For a job that the caller had within its reach when the call began."""
    if access.owner not in {None, owner}:
        raise JobNotFoundError(str(job_id))


def _choices(names: Iterable[str], allowed: Collection[str] | None) -> list[str]:
    return [name for name in names if allowed is None or name in allowed]


def _shown(job: Job, access: Access) -> pb.Job:
    return convert.job_to(job, shows_environment=access.shows_environment(job.owner))


def _refused(caught: Exception) -> pb.CreateJobsRes.Result:
    error = expected(caught, "CreateJobs")
    result = pb.CreateJobsRes.Result(
        code=convert.code_of(error).value[0], error=convert.text_of(error)
    )
    forget_frames(caught)
    return result


async def _given_up(begun: asyncio.Future[Any]) -> None:
    """Waits for what goes on though its caller went away; not where this is cancelled again."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait([begun])


def _note_created(request: pb.CreateJobReq, entry: Entry, created: asyncio.Future[Job]) -> None:
    if created.cancelled():  # as the server ends
        entry.note(partial(_told_given_up, request))
    elif isinstance(error := created.exception(), Exception):
        entry.note(partial(_told_of, request, _refused(error)))
    else:
        entry.note(
            lambda: _asked(request) | _made(str(created.result().id), created.result().status)
        )


def _ending(job: Job, offset: int, access: Access) -> bytes:
    """The last message of a stream."""
    last = pb.DataChunk(offset=offset, next_offset=offset, ending=_shown(job, access))
    return last.SerializeToString()


def _page_start(token: str) -> int | None:
    if not token:
        return None
    if not token.isascii() or not token.isdigit() or len(token) > 18:
        raise InvalidRequestError("page_token", "use next_page_token of the page before")
    return int(token)


# Registration


class ServiceHandler(grpc.GenericRpcHandler):
    """All RPCs of the service in one generic handler: the server waits, for each call, on
    every method that was registered by itself (grpc #41796)."""

    def __init__(self, service: JobService, gate: Gate) -> None:
        streams: list[tuple[str, Method, Any]] = [
            ("GetJobsStream", service.get_jobs_stream, pb.GetJobsStreamReq),
        ]
        whole: list[tuple[str, Method, Any]] = [
            ("GetJob", service.get_job, pb.GetJobReq),
            ("GetJobs", service.get_jobs, pb.EmptyRequest),
            ("ListJobs", service.list_jobs, pb.ListJobsReq),
            ("GetServerInfo", service.get_server_info, pb.EmptyRequest),
            ("StopJob", service.stop_job, pb.StopJobReq),
            ("DeleteJob", service.delete_job, pb.DeleteJobReq),
            ("CreateJob", service.create_job, pb.CreateJobReq),
            ("CreateJobs", service.create_jobs, pb.CreateJobsReq),
        ]
        methods = {rpc: _whole(gate, rpc, *rest) for rpc, *rest in whole}
        methods |= {rpc: _stream(gate, rpc, *rest) for rpc, *rest in streams}
        if methods.keys() != RULES.keys():
            raise RuntimeError(f"RPCs without a rule: {methods.keys() ^ RULES.keys()}")
        self._methods: Mapping[str, Any] = {
            f"/{SERVICE}/{rpc}": handler for rpc, handler in methods.items()
        }

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(details.method)


def _whole(gate: Gate, rpc: str, method: Method, request_type: Any) -> Any:
    """Its answer is one message."""
    handle = gate.guard(rpc, method, request_type.FromString, is_stream=False)
    return grpc.stream_unary_rpc_method_handler(handle, None, None)


def _stream(gate: Gate, rpc: str, method: Method, request_type: Any) -> Any:
    handle = gate.guard(rpc, method, request_type.FromString, is_stream=True)
    # No serializer: what is written is finished bytes.
    return grpc.stream_stream_rpc_method_handler(handle, None, None)


# What the audit log says of the calls that change something


def _created(request: pb.CreateJobReq | None, answer: pb.Job | None) -> list[dict[str, Any]]:
    if request is None:
        return []
    made = _made(answer.id, answer.status) if answer else {}
    return [_asked(request) | made]


def _told_before(_request: Any, _answer: Any) -> list[dict[str, Any]]:
    """Job by job, as each was created."""
    return []


def _told_of(request: pb.CreateJobReq, result: pb.CreateJobsRes.Result) -> dict[str, Any]:
    if result.code:
        return _asked(request) | {"code": CODE_NAMES[result.code], "problem": result.error}
    return _asked(request) | _made(result.id, result.status)


def _told_given_up(request: pb.CreateJobReq) -> dict[str, Any]:
    return _asked(request) | {"code": "CANCELLED"}


def _made(job_id: str, status: str) -> dict[str, Any]:
    """Also where the client did not wait for its answer."""
    return {"code": "OK", "job": job_id, "status": status}


def _named(request: pb.StopJobReq | pb.DeleteJobReq | None, _answer: Any) -> list[dict[str, Any]]:
    if request is None:
        return []
    try:
        return [{"job": str(convert.job_id_from(request.id))}]  # one name for each job
    except JobNotFoundError:
        return [{"job": request.id[:LONGEST_TOLD]}]


def _asked(request: pb.CreateJobReq) -> dict[str, Any]:
    """Never what the values of the environment are, nor the standard input."""
    fields: dict[str, Any] = {"command": _told(itertools.chain([request.command], request.args))}
    if request.environment:
        # What stands behind a `=` in a name is refused, and may be a secret as all values.
        names = (name.partition("=")[0] for name in request.environment)
        fields["environment"] = _told(sorted(itertools.islice(names, LONGEST_TOLD)))
    for name in ("name", "working_directory", "user", "profile"):
        if value := getattr(request, name):
            fields[name] = value[:LONGEST_TOLD]
    return fields


def _told(words: Iterable[str]) -> list[str]:
    """As much as a line may hold of it; what is left out is told by a last word."""
    told: list[str] = []
    room = LONGEST_TOLD
    for word in words:
        told.append(word[:room])
        room -= len(word) + 1
        if room < 0:
            told.append("\N{HORIZONTAL ELLIPSIS}")
            break
    return told


CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
LONGEST_TOLD = 1024  # characters of a command, and of what else a client says

SUBJECTS: Mapping[str, Subject] = MappingProxyType(
    {
        "CreateJob": _created,
        "CreateJobs": _told_before,
        "StopJob": _named,
        "DeleteJob": _named,
    }
)
