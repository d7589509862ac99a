"""The client for asyncio; what `Client` does, awaited."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar, Unpack

import grpc

from jobworker.client import calls, connection, failures
from jobworker.client.bulk import Bulk, Created, Spec
from jobworker.client.calls import Call, CreateOptions, Listing, ServerInfo
from jobworker.client.connection import PATH, Target
from jobworker.client.output import RPC as STREAM_RPC
from jobworker.client.output import Chunk, Collector, Patience, Reading, Result, Stream
from jobworker.errors import CallError, DeadlineError, UnreachableError, UnsupportedError
from jobworker.job import Job

AnswerT = TypeVar("AnswerT")

# Without serializers: what is sent and received is finished bytes.
BytesCall: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"
BytesStream: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[bytes, bytes]"


class AsyncClient:
    """A connection to one server, made when it is first needed, by the event loop that uses
    it. Tasks may share it.

    Arguments, results and errors of its methods are those of `Client`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        certs: Path | str | None = None,
        ca: Path | str | None = None,
        cert: Path | str | None = None,
        key: Path | str | None = None,
        server_name: str | None = None,
        timeout: float = 30.0,
        patience: float = 60.0,
    ) -> None:
        address, certs = connection.server_of(address, certs, ca)
        files = connection.files_in(certs, ca, cert, key)
        self._target = Target(address, files, server_name)
        self._timeout_seconds = min(timeout, calls.LONGEST_CALL_SECONDS)
        self._patience_seconds = patience
        # One for each name that the server's certificate might be for; the last is in use.
        self._channels: list[grpc.aio.Channel] = []
        self._runs: dict[asyncio.Future[None], asyncio.Task[Any] | None] = {}  # until each is over
        self._stopping: set[asyncio.Task[None]] = set()  # jobs of runs that were cancelled
        self._has_answered = False  # the server
        self._knows_new_fields = False
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the calls and streams that are under way, with CallError, as any later call; but
        first the jobs of runs that were cancelled are stopped."""
        # What was cancelled just now does not know it yet.
        cancelled = [over for over, task in self._runs.items() if task and task.cancelling()]
        for ending in (cancelled, self._stopping):
            if ending:
                await asyncio.wait(ending, timeout=self._timeout_seconds)
        self._is_closed = True
        for channel in self._channels:
            await channel.close()

    async def create(self, command: str, *args: str, **options: Unpack[CreateOptions]) -> Job:
        return await self._call(calls.create(command, args, options))

    async def create_many(self, specs: Iterable[Spec]) -> builtins.list[Created]:
        bulk = Bulk(specs)
        while not bulk.is_over:
            try:
                bulk.take(await self._call(bulk.request()))
            except CallError as error:
                bulk.failed(error)
        return bulk.results

    async def get(self, job_id: int | str) -> Job:
        return await self._call(calls.get(job_id))

    async def list(
        self,
        *,
        statuses: Collection[str] = (),
        name: str = "",
        owner: str = "",
        limit: int | None = None,
    ) -> AsyncGenerator[Job, None]:
        listing = Listing(statuses, name, limit, owner)
        while not listing.is_over:
            try:
                page = await self._call(listing.request())
            except UnsupportedError as error:
                page = await self._call(listing.old_request(error))
            for job in listing.take(page):
                yield job

    async def stop(
        self, job_id: int | str, *, signal: int = 0, grace_seconds: float | None = None
    ) -> Job:
        await self._call(calls.stop(job_id, signal, grace_seconds))
        return await self.get(job_id)

    async def delete(self, job_id: int | str) -> None:
        await self._call(calls.delete(job_id))

    def stream(
        self,
        job_id: int | str,
        *,
        from_offset: int = 0,
        follow: bool = True,
        stream: Stream = Stream.ALL,
    ) -> AsyncGenerator[Chunk, None]:
        patience = self._patience()
        return self._read(Reading(job_id, patience, from_offset, follow, stream))

    async def wait(
        self,
        job_id: int | str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 as for `Client`
    ) -> Job:
        patience = self._patience(timeout)
        job = await self._call(calls.get(job_id), patience.left_seconds())
        if job.is_ended:
            return job
        patience.connected()
        # A stream ends when its job does; what it carries meanwhile should be little.
        reading = Reading(job_id, patience, job.output_bytes, stream=Stream.STDERR)
        try:
            return await self._last(reading)
        except UnsupportedError:
            return await self._poll(job_id, patience)

    async def run(
        self,
        command: str,
        *args: str,
        timeout: float | None = None,  # noqa: ASYNC109 as for `Client`
        **options: Unpack[CreateOptions],
    ) -> Result:
        over = asyncio.get_running_loop().create_future()
        self._runs[over] = asyncio.current_task()
        try:
            return await self._run(self.create(command, *args, **options), timeout)
        finally:
            del self._runs[over]
            over.set_result(None)

    async def _run(self, create: Coroutine[Any, Any, Job], timeout_seconds: float | None) -> Result:
        creating = asyncio.ensure_future(create)
        try:
            job = await asyncio.shield(creating)
        except asyncio.CancelledError:  # a job that the server has begun is there all the same
            await self._stop_in_any_case(creating)
            raise
        try:
            return await self._collect(Reading(job.id, self._patience(timeout_seconds)))
        except BaseException as error:
            await self._stop_in_any_case(creating)
            if isinstance(error, DeadlineError):
                raise failures.late(error, job.id) from error
            raise

    async def _stop_in_any_case(self, creating: asyncio.Future[Job]) -> None:
        """Goes on where the caller is cancelled once more."""

        async def stop() -> None:
            with contextlib.suppress(CallError):
                await self.stop((await creating).id)

        stopping = asyncio.ensure_future(stop())
        self._stopping.add(stopping)
        stopping.add_done_callback(self._stopping.discard)
        await asyncio.shield(stopping)

    async def info(self) -> ServerInfo:
        return await self._call(calls.info())

    # Calls

    async def _call(self, call: Call[AnswerT], timeout_seconds: float | None = None) -> AnswerT:
        """timeout_seconds: shortens the client's own."""
        await self._require(call.rpc, call.needs, timeout_seconds)
        seconds = self._timeout_seconds + call.extra_seconds
        if timeout_seconds is not None:
            seconds = min(seconds, timeout_seconds)
        answer = await self._send(call, seconds)
        try:
            return call.read(answer)
        except failures.UNREADABLE as error:
            raise failures.unreadable(error, call.rpc, self._target) from error

    async def _send(self, call: Call[Any], timeout_seconds: float) -> bytes:
        request = call.request.SerializeToString()
        while True:
            channel = self._channel(call.rpc)
            try:
                method: BytesCall = channel.unary_unary(PATH + call.rpc)
                answer = await method(request, timeout=timeout_seconds)
            except grpc.RpcError as error:
                if not self._took_next_name(channel, error):
                    raise await self._error_from(error, call.rpc) from error
            except asyncio.CancelledError:
                self._require_open(call.rpc)
                raise
            else:
                self._has_answered = True
                return answer

    async def _error_from(self, error: grpc.RpcError, rpc: str) -> CallError:
        return await asyncio.to_thread(failures.error_from, error, rpc, self._target)

    async def _require(
        self, rpc: str, needs: tuple[str, ...], timeout_seconds: float | None
    ) -> None:
        """Raises UnsupportedError where the server would ignore what is needed."""
        if not needs or self._knows_new_fields:
            return
        try:
            await self._call(calls.info(), timeout_seconds)
        except UnsupportedError as error:
            raise failures.unsupported(rpc, needs, self._target) from error
        self._knows_new_fields = True

    async def _poll(self, job_id: int | str, patience: Patience) -> Job:
        """As `wait`, of a server that knows only the old fields."""
        while True:
            try:
                job = await self._call(calls.get(job_id), patience.left_seconds())
                if job.is_ended:
                    return job
                patience.connected()
                pause_seconds = patience.pause_seconds("GetJob")
            except UnreachableError as error:
                pause_seconds = patience.failed(error)
            await asyncio.sleep(pause_seconds)

    # Streams

    def _patience(self, timeout_seconds: float | None = None) -> Patience:
        return Patience(self._patience_seconds, timeout_seconds, has_answered=self._has_answered)

    async def _read(self, reading: Reading) -> AsyncGenerator[Chunk, None]:
        await self._require(STREAM_RPC, reading.needs, reading.patience.left_seconds())
        while not reading.is_over:
            try:
                async with contextlib.aclosing(self._read_once(reading)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except CallError as error:
                reading.failed(error)
            await asyncio.sleep(reading.pause_seconds)

    async def _read_once(self, reading: Reading) -> AsyncGenerator[Chunk, None]:
        """As far as one connection carries it."""
        channel = self._channel(STREAM_RPC)
        method: BytesStream = channel.unary_stream(PATH + STREAM_RPC)
        request = reading.request().SerializeToString()
        stream = method(request, timeout=reading.patience.left_seconds())
        try:
            async for message in stream:
                chunk = reading.take(message)
                if chunk:
                    yield chunk
        except grpc.RpcError as error:
            if self._took_next_name(channel, error):
                return
            raise await self._error_from(error, STREAM_RPC) from error
        except asyncio.CancelledError:
            self._require_open(STREAM_RPC)
            raise
        except failures.UNREADABLE as error:
            raise failures.unreadable(error, STREAM_RPC, self._target) from error
        finally:
            stream.cancel()
        if reading.ended():
            get = calls.get(reading.job_id)
            last = reading.conclude(await self._call(get, reading.patience.left_seconds()))
            if last:
                yield last

    async def _last(self, reading: Reading) -> Job:
        async with contextlib.aclosing(self._read(reading)) as chunks:
            async for chunk in chunks:
                if chunk.ending:
                    return chunk.ending
        raise AssertionError("a stream that follows has an ending")

    async def _collect(self, reading: Reading) -> Result:
        collector = Collector()
        async with contextlib.aclosing(self._read(reading)) as chunks:
            async for chunk in chunks:
                result = collector.add(chunk)
                if result:
                    return result
        raise AssertionError("a stream that follows has an ending")

    # Connecting

    def _channel(self, rpc: str) -> grpc.aio.Channel:
        """The one in use; a channel belongs to the loop that is running when it is made. Raises
        CallError after `close`."""
        if self._is_closed:
            raise failures.closed(rpc)
        if not self._channels:
            self._channels.append(self._new_channel(self._target.names[0]))
        return self._channels[-1]

    def _require_open(self, rpc: str) -> None:
        """Raises CallError after `close`, which cancels what is under way; not in a task that
        others have cancelled."""
        task = asyncio.current_task()
        if self._is_closed and not (task and task.cancelling()):
            raise failures.closed(rpc) from None

    def _new_channel(self, name: str) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            self._target.address, self._target.credentials, self._target.options(name)
        )

    def _took_next_name(self, channel: grpc.aio.Channel, error: grpc.RpcError) -> bool:
        """The server's certificate is for another name, and there was one left to try."""
        if not connection.is_other_name(error):
            return False
        names = self._target.names
        if channel is self._channels[-1]:
            if len(self._channels) == len(names):
                return False
            self._channels.append(self._new_channel(names[len(self._channels)]))
        return True
