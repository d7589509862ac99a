"""The client for ordinary code: each call blocks until its answer is there."""

from __future__ import annotations

import builtins
import contextlib
import threading
import time
from collections.abc import Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
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
BytesCall: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"
BytesStream: TypeAlias = "grpc.UnaryStreamMultiCallable[bytes, bytes]"

OPTIONS: list[tuple[str, Any]] = [
    # The thread that iterates a stream drives it itself, without another one in between.
    # grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, which has no type stub.
    ("SingleThreadedUnaryStream", 1),
]


class Client:
    """A connection to one server, made when it is first needed. Threads may share it.

    Every call raises an error of the tree below `jobworker.errors.CallError`.
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
        """address: HOST:PORT; default localhost:50051.
        certs: the folder with ca-cert.pem, client-cert.pem and client-key.pem; default ./certs.
        Where there is none, and no ca is given, what `jobworker serve --dev` of this user has
        left is the default of both.
        ca, cert, key: files instead of those. Of NAME-cert.pem or NAME-key.pem alone, the
        other is taken if it is beside it.
        server_name: for which name the server's certificate must be valid; default: one of
        job-worker, localhost and the address's host.
        timeout: seconds that each call may take; streams may take as long as their job.
        patience: seconds for which a stream tries to get a broken connection back.
        Raises CertificateError where a file is missing, unreadable or no PEM.
        """
        address, certs = connection.server_of(address, certs, ca)
        files = connection.files_in(certs, ca, cert, key)
        self._target = Target(address, files, server_name)
        self._timeout_seconds = min(timeout, calls.LONGEST_CALL_SECONDS)
        self._patience_seconds = patience
        self._lock = threading.Lock()
        # One for each name that the server's certificate might be for; the last is in use.
        self._channels = [self._new_channel(self._target.names[0])]
        self._has_answered = False  # the server
        self._knows_new_fields = False
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the calls and streams that are under way, with CallError, as any later call."""
        self._is_closed = True
        for channel in self._channels:
            channel.close()

    def create(self, command: str, *args: str, **options: Unpack[CreateOptions]) -> Job:
        """Starts a job; returns it once its command runs, or has failed to.

        options: max_cpu, max_memory, max_iobps, environment, working_directory, name,
        merge_output, stdin, time_limit, user, profile, network, root, read_only, binds; see
        CreateOptions.
        """
        return self._call(calls.create(command, args, options))

    def create_many(self, specs: Iterable[Spec]) -> builtins.list[Created]:
        """Starts many jobs, hundreds with each request; returns what became of each, in order.

        Raises what the first request meets, such as UnreachableError. Later errors are those
        of the jobs that they hit, so that the ids of those before stay known.
        """
        bulk = Bulk(specs)
        while not bulk.is_over:
            try:
                bulk.take(self._call(bulk.request()))
            except CallError as error:
                bulk.failed(error)
        return bulk.results

    def get(self, job_id: int | str) -> Job:
        return self._call(calls.get(job_id))

    def list(
        self,
        *,
        statuses: Collection[str] = (),
        name: str = "",
        owner: str = "",
        limit: int | None = None,
    ) -> Generator[Job, None, None]:
        """Jobs, newest first, fetched page by page.

        statuses: any of these; empty: all. name: exactly this; empty: all. owner: the CN of
        the client that created them; empty: all. limit: at most so many; None: all.
        """
        listing = Listing(statuses, name, limit, owner)
        while not listing.is_over:
            try:
                page = self._call(listing.request())
            except UnsupportedError as error:
                page = self._call(listing.old_request(error))
            yield from listing.take(page)

    def stop(
        self, job_id: int | str, *, signal: int = 0, grace_seconds: float | None = None
    ) -> Job:
        """Ends a job; returns it once it has ended.

        signal: the first that the job gets; 0: SIGTERM.
        grace_seconds: how long it may take then, before it is killed; None: as long as the
        server's default. Raises WrongStateError if it had ended before.
        """
        self._call(calls.stop(job_id, signal, grace_seconds))
        return self.get(job_id)

    def delete(self, job_id: int | str) -> None:
        """Forgets an ended job, and removes its output. Raises WrongStateError while it runs."""
        self._call(calls.delete(job_id))

    def stream(
        self,
        job_id: int | str,
        *,
        from_offset: int = 0,
        follow: bool = True,
        stream: Stream = Stream.ALL,
    ) -> Generator[Chunk, None, None]:
        """The job's output: what it has written so far, then live, until it has ended. The
        last chunk has no payload and the ended job as `ending`.

        A connection that breaks is made again, and the stream goes on where it was.
        from_offset: start here, in bytes of the merged output.
        follow: False: only what is there now, and an ending only if the job has ended and that is
        all of it.
        stream: only this one.
        """
        patience = self._patience()
        return self._read(Reading(job_id, patience, from_offset, follow, stream))

    def wait(self, job_id: int | str, *, timeout: float | None = None) -> Job:
        """The job once it has ended. timeout: in seconds; raises DeadlineError after it."""
        patience = self._patience(timeout)
        job = self._call(calls.get(job_id), patience.left_seconds())
        if job.is_ended:
            return job
        patience.connected()
        # A stream ends when its job does; what it carries meanwhile should be little.
        reading = Reading(job_id, patience, job.output_bytes, stream=Stream.STDERR)
        try:
            return self._last(reading)
        except UnsupportedError:
            return self._poll(job_id, patience)

    def run(
        self,
        command: str,
        *args: str,
        timeout: float | None = None,
        **options: Unpack[CreateOptions],
    ) -> Result:
        """Creates a job, and returns its output and ending once it has ended.

        All output is collected in memory, however much it is; `stream` does not.
        timeout: in seconds; after it the job is stopped, and DeadlineError raised, with its
        job_id. The job is also stopped where this is interrupted. (`time_limit` is kept by the
        server, and such a job has its ending with the cause TIMED_OUT.)
        """
        created: list[Job] = []

        def create() -> None:
            created.append(self.create(command, *args, **options))

        try:
            # In a thread, where it goes on though this is interrupted, and is waited for.
            with ThreadPoolExecutor(1) as executor:
                # The thread runs, then: who is interrupted while it starts, forgets it.
                executor.submit(int).result()
                executor.submit(create).result()
            patience = self._patience(timeout)
            return self._collect(Reading(created[0].id, patience))
        except BaseException as error:
            for job in created:
                with contextlib.suppress(CallError):
                    self.stop(job.id)
            if created and isinstance(error, DeadlineError):
                raise failures.late(error, created[0].id) from error
            raise

    def info(self) -> ServerInfo:
        """What the server is, which limits it can enforce, and for whom it takes us."""
        return self._call(calls.info())

    # Calls

    def _call(self, call: Call[AnswerT], timeout_seconds: float | None = None) -> AnswerT:
        """timeout_seconds: shortens the client's own."""
        self._require(call.rpc, call.needs, timeout_seconds)
        seconds = self._timeout_seconds + call.extra_seconds
        if timeout_seconds is not None:
            seconds = min(seconds, timeout_seconds)
        answer = self._send(call, seconds)
        try:
            return call.read(answer)
        except failures.UNREADABLE as error:
            raise failures.unreadable(error, call.rpc, self._target) from error

    def _send(self, call: Call[Any], timeout_seconds: float) -> bytes:
        request = call.request.SerializeToString()
        while True:
            channel = self._channel(call.rpc)
            try:
                method: BytesCall = channel.unary_unary(PATH + call.rpc)
                answer = method(request, timeout=timeout_seconds)
            except grpc.RpcError as error:
                if not self._took_next_name(channel, error):
                    raise failures.error_from(error, call.rpc, self._target) from error
            else:
                self._has_answered = True
                return answer

    def _require(self, rpc: str, needs: tuple[str, ...], timeout_seconds: float | None) -> None:
        """Raises UnsupportedError where the server would ignore what is needed."""
        if not needs or self._knows_new_fields:
            return
        try:
            self._call(calls.info(), timeout_seconds)
        except UnsupportedError as error:
            raise failures.unsupported(rpc, needs, self._target) from error
        self._knows_new_fields = True

    def _poll(self, job_id: int | str, patience: Patience) -> Job:
        """As `wait`, of a server that knows only the old fields."""
        while True:
            try:
                job = self._call(calls.get(job_id), patience.left_seconds())
                if job.is_ended:
                    return job
                patience.connected()
                pause_seconds = patience.pause_seconds("GetJob")
            except UnreachableError as error:
                pause_seconds = patience.failed(error)
            time.sleep(pause_seconds)

    # Streams

    def _patience(self, timeout_seconds: float | None = None) -> Patience:
        return Patience(self._patience_seconds, timeout_seconds, has_answered=self._has_answered)

    def _read(self, reading: Reading) -> Generator[Chunk, None, None]:
        self._require(STREAM_RPC, reading.needs, reading.patience.left_seconds())
        while not reading.is_over:
            try:
                yield from self._read_once(reading)
            except CallError as error:
                reading.failed(error)
            time.sleep(reading.pause_seconds)

    def _read_once(self, reading: Reading) -> Generator[Chunk, None, None]:
        """As far as one connection carries it."""
        channel = self._channel(STREAM_RPC)
        method: BytesStream = channel.unary_stream(PATH + STREAM_RPC)
        request = reading.request().SerializeToString()
        stream = method(request, timeout=reading.patience.left_seconds())
        try:
            for message in stream:
                chunk = reading.take(message)
                if chunk:
                    yield chunk
        except grpc.RpcError as error:
            if self._took_next_name(channel, error):
                return
            raise failures.error_from(error, STREAM_RPC, self._target) from error
        except failures.UNREADABLE as error:
            raise failures.unreadable(error, STREAM_RPC, self._target) from error
        finally:
            stream.cancel()
        if reading.ended():
            get = calls.get(reading.job_id)
            last = reading.conclude(self._call(get, reading.patience.left_seconds()))
            if last:
                yield last

    def _last(self, reading: Reading) -> Job:
        for chunk in self._read(reading):
            if chunk.ending:
                return chunk.ending
        raise AssertionError("a stream that follows has an ending")

    def _collect(self, reading: Reading) -> Result:
        collector = Collector()
        for chunk in self._read(reading):
            result = collector.add(chunk)
            if result:
                return result
        raise AssertionError("a stream that follows has an ending")

    # Connecting

    def _channel(self, rpc: str) -> grpc.Channel:
        """The one in use. Raises CallError after `close`."""
        if self._is_closed:
            raise failures.closed(rpc)
        return self._channels[-1]

    def _new_channel(self, name: str) -> grpc.Channel:
        return grpc.secure_channel(
            self._target.address, self._target.credentials, self._target.options(name) + OPTIONS
        )

    def _took_next_name(self, channel: grpc.Channel, error: grpc.RpcError) -> bool:
        """The server's certificate is for another name, and there was one left to try."""
        if not connection.is_other_name(error):
            return False
        names = self._target.names
        with self._lock:
            if channel is self._channels[-1]:
                if len(self._channels) == len(names):
                    return False
                self._channels.append(self._new_channel(names[len(self._channels)]))
            return True
