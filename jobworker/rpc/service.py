"""The JobService: one short handler for each RPC, and the table that registers them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from jobworker.authorization import ALLOWED, Identity, authorize
from jobworker.engine.manager import Manager
from jobworker.engine.output import Reader
from jobworker.errors import InvalidRequestError, JobWorkerError
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc import convert
from jobworker.rpc.identity import identify

SERVICE = "job_worker.JobService"
PAGE_JOBS = 100
CREATES_AT_ONCE = 64  # of one request: more would only wait for each other
LARGEST_PAGE_JOBS = 1000

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What GetServerInfo tells beside what the manager knows."""

    version: str
    started_ns: int
    state_directory: str


class JobService:
    """What clients may ask; each answer is a message of the contract."""

    def __init__(self, manager: Manager, facts: ServerFacts) -> None:
        self._manager = manager
        self._facts = facts

    async def create_job(self, request: pb.CreateJobReq, caller: Identity) -> pb.Job:
        spec = convert.spec_from(request)
        return convert.job_to(await self._manager.create(spec, request.stdin))

    async def create_jobs(self, request: pb.CreateJobsReq, caller: Identity) -> pb.CreateJobsRes:
        at_once = asyncio.Semaphore(CREATES_AT_ONCE)

        async def create(each: pb.CreateJobReq) -> pb.CreateJobsRes.Result:
            async with at_once:
                try:
                    job = await self._manager.create(convert.spec_from(each), each.stdin)
                except JobWorkerError as error:
                    code = convert.code_of(error).value[0]
                    return pb.CreateJobsRes.Result(code=code, error=str(error))
            return pb.CreateJobsRes.Result(id=str(job.id), status=job.status)

        return pb.CreateJobsRes(results=await asyncio.gather(*map(create, request.jobs)))

    async def delete_job(self, request: pb.DeleteJobReq, caller: Identity) -> pb.DeleteJobRes:
        await self._manager.delete(convert.job_id_from(request.id))
        return pb.DeleteJobRes()

    async def get_job(self, request: pb.GetJobReq, caller: Identity) -> pb.Job:
        return convert.job_to(await self._manager.get(convert.job_id_from(request.id)))

    async def stop_job(self, request: pb.StopJobReq, caller: Identity) -> pb.StopJobRes:
        grace_seconds = None
        if request.HasField("grace_milliseconds"):
            grace_seconds = request.grace_milliseconds / 1000
        if not 0 <= request.signal < signal.NSIG:
            problem = f"{request.signal} is no signal; use 1 to {signal.NSIG - 1}, 0 for SIGTERM"
            raise InvalidRequestError("signal", problem)
        job_id = convert.job_id_from(request.id)
        job = await self._manager.stop(job_id, request.signal, grace_seconds)
        return convert.stop_result_to(job)

    async def get_jobs(self, request: pb.EmptyRequest, caller: Identity) -> pb.Jobs:
        answer = pb.Jobs()
        before_id = None
        while True:
            page = await self._manager.page(before_id, LARGEST_PAGE_JOBS)
            fitting = convert.jobs_within(page, convert.LARGEST_ANSWER_BYTES - answer.ByteSize())
            answer.jobs.extend(fitting)
            if len(fitting) < LARGEST_PAGE_JOBS:
                return answer
            before_id = page[-1].id

    async def list_jobs(self, request: pb.ListJobsReq, caller: Identity) -> pb.ListJobsRes:
        if request.page_size > LARGEST_PAGE_JOBS:
            problem = f"{request.page_size} is too large; use at most {LARGEST_PAGE_JOBS}"
            raise InvalidRequestError("page_size", problem)
        jobs = await self._manager.page(
            before_id=_page_start(request.page_token),
            count=request.page_size or PAGE_JOBS,
            statuses=convert.statuses_from(request.statuses),
            name=request.name,
        )
        fitting = convert.jobs_within(jobs)
        is_last = len(fitting) == len(jobs) < (request.page_size or PAGE_JOBS)
        token = "" if is_last or not fitting else fitting[-1].id
        return pb.ListJobsRes(jobs=fitting, next_page_token=token)

    async def get_server_info(self, request: pb.EmptyRequest, caller: Identity) -> pb.ServerInfo:
        manager = self._manager
        defaults = manager.policy.default_limits
        usage = await manager.usage()
        return pb.ServerInfo(
            version=self._facts.version,
            start_time_ns=self._facts.started_ns,
            identity=caller.name,
            role=caller.role or "",
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
            profiles=sorted(manager.isolation.profiles),
            default_user=manager.isolation.job_user.name,
            users=manager.isolation.user_names,
            isolation_problem=manager.isolation.problem,
            ended_jobs=usage.ended_jobs,
            ended_log_bytes=usage.ended_log_bytes,
            disk_room_bytes=usage.disk_room_bytes,
            blocked_jobs=usage.blocked_jobs,
            disk_reserve_bytes=manager.policy.disk_reserve_bytes,
            log_max_bytes=manager.policy.log_max_bytes,
            log_policy=manager.policy.log_policy,
        )

    async def get_jobs_stream(
        self, request: pb.GetJobsStreamReq, caller: Identity, context: Context
    ) -> None:
        job_id = convert.job_id_from(request.id)
        follow = not request.no_follow
        reader = await self._manager.read(job_id, request.from_offset, request.stream, follow)
        try:
            # The messages are finished bytes, shared by all readers at the same place.
            while (message := await reader.next()) is not None:
                await context.write(message)
            await self._write_ending(job_id, reader, follow, context)
        finally:
            reader.close()

    async def _write_ending(
        self, job_id: int, reader: Reader, follow: bool, context: Context
    ) -> None:
        job = await (self._manager.wait(job_id) if follow else self._manager.get(job_id))
        if job.is_ended:
            last = pb.DataChunk(
                offset=reader.offset, next_offset=reader.offset, ending=convert.job_to(job)
            )
            await context.write(last.SerializeToString())


def _page_start(token: str) -> int | None:
    if not token:
        return None
    if not token.isascii() or not token.isdigit() or len(token) > 18:
        raise InvalidRequestError("page_token", "use next_page_token of the page before")
    return int(token)


# Registration

UnaryMethod = Callable[[Any, Identity], Awaitable[Any]]
StreamMethod = Callable[[Any, Identity, Context], Awaitable[None]]


class ServiceHandler(grpc.GenericRpcHandler):
    """All RPCs of the service in one generic handler: the server waits, for each call, on
    every method that was registered by itself (grpc #41796)."""

    def __init__(self, service: JobService) -> None:
        unary: list[tuple[str, UnaryMethod, Any]] = [
            ("CreateJob", service.create_job, pb.CreateJobReq),
            ("CreateJobs", service.create_jobs, pb.CreateJobsReq),
            ("DeleteJob", service.delete_job, pb.DeleteJobReq),
            ("GetJob", service.get_job, pb.GetJobReq),
            ("StopJob", service.stop_job, pb.StopJobReq),
            ("GetJobs", service.get_jobs, pb.EmptyRequest),
            ("ListJobs", service.list_jobs, pb.ListJobsReq),
            ("GetServerInfo", service.get_server_info, pb.EmptyRequest),
        ]
        streams: list[tuple[str, StreamMethod, Any]] = [
            ("GetJobsStream", service.get_jobs_stream, pb.GetJobsStreamReq),
        ]
        methods = {rpc: _unary(rpc, *rest) for rpc, *rest in unary}
        methods |= {rpc: _stream(rpc, *rest) for rpc, *rest in streams}
        if methods.keys() != ALLOWED.keys():
            raise RuntimeError(f"RPCs without a rule: {methods.keys() ^ ALLOWED.keys()}")
        self._methods: Mapping[str, Any] = {
            f"/{SERVICE}/{rpc}": handler for rpc, handler in methods.items()
        }

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(details.method)


def _unary(rpc: str, method: UnaryMethod, request_type: Any) -> Any:
    async def handle(request: Any, context: Context) -> Any:
        try:
            caller = identify(context)
            authorize(caller, rpc)
            return await method(request, caller)
        except JobWorkerError as error:
            code, metadata = convert.code_of(error), convert.metadata_of(error)
            await context.abort(code, str(error), metadata)

    return grpc.unary_unary_rpc_method_handler(
        handle, request_type.FromString, lambda answer: answer.SerializeToString()
    )


def _stream(rpc: str, method: StreamMethod, request_type: Any) -> Any:
    async def handle(request: Any, context: Context) -> None:
        try:
            caller = identify(context)
            authorize(caller, rpc)
            await method(request, caller, context)
        except (JobWorkerError, OSError) as error:
            await context.abort(convert.code_of(error), str(error))

    # No serializer: what is written is finished bytes.
    return grpc.unary_stream_rpc_method_handler(handle, request_type.FromString, None)
