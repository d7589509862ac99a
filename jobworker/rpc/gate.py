"""Who may come in, how much at once, and for how long.

Every call of every service passes `Gate.guard`: before its request is read, as what a client may
keep the server waiting for, or have it hold in memory, is bounded by how many calls it may have.
So all RPCs are registered as if their requests were streams; on the wire that is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from jobworker import certs
from jobworker.authorization import Access, authorize
from jobworker.errors import (
    AuditError,
    InvalidRequestError,
    JobNotFoundError,
    JobWorkerError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServerFaultError,
    StoreError,
    UnknownMethodError,
)
from jobworker.roles import Caller, Clients, Identity
from jobworker.rpc import connections, convert
from jobworker.rpc.audit import AuditLog
from jobworker.rpc.identity import certificate_of, identity_of
from jobworker.turns import ALWAYS_FREE, Turn, Turns

log = logging.getLogger(__name__)

# What it may take to tell a revoked client so, before its connection is shut: one that reads
# nothing never comes to the status, as that is behind the message that it does not read.
REVOKED_SECONDS = 1.0
# So long may a client take to take what refuses a call that is not counted as its own.
UNTAKEN_SECONDS = 10.0
# Lines about calls that did nothing, as they failed, were refused or given up: at once, and then a
# second, for each client. Else who may do nothing could fill the disk.
REFUSALS_AT_ONCE = 100
REFUSALS_PER_SECOND = 10.0

# What may be 4 MiB, or nearly so: what of it is not yet sent, or not yet read, is in memory.
LARGE = frozenset({"GetJobs", "ListJobs", "CreateJobs", "ServerReflectionInfo"})
MOST_LARGE = 16  # at once, of each client
# Of these one at once is made for each client: it may be of very many strings.
LISTS = frozenset({"GetJobs", "ListJobs"})
# Of all answers to one client that it has not taken, but for those of streams and of LARGE.
MOST_UNTAKEN_BYTES = 32 << 20
MOST_RECEIVED = 32  # requests of one client that come in at once; others wait for these
# Answers of one client that are made at once, of those that count as untaken afterwards.
MOST_ANSWERED = 16
# Records that are read for one client at once, but for lists: a large one takes a hundredth of a
# second.
MOST_READ = 4
# Messages of old output that are read for one client at once where a disk must be asked: two
# threads do that for all.
MOST_READ_FROM_DISK = 2
# Jobs that CreateJobs of one client make at once: more would only wait for each other, and others
# for all of them.
MOST_CREATED = 64
# Endings of jobs that are larger than the first bytes of any stream, at the end of streams of one
# client that have not taken them. Others wait for these, and hold nothing.
MOST_LARGE_ENDINGS = 32
# For so many times as long as a large request took to parse, or a job with many strings to be
# looked at, the client's next of these wait for others.
OTHERS_SHARE = 2
# Of a request that is in memory as long as its call. Those that create jobs may be larger, but not
# than what can be valid; and of CreateJob, these, and those with many strings, count as coming in
# until the job is made.
LARGEST_LASTING_BYTES = 64 << 10
# Of a request, more than one job can have strings: what 4 MiB can hold of empty ones would take a
# second and 400 MiB.
MOST_FIELDS = 70_000
# Of all headers of a request together, each with its name and what HTTP/2 adds to it. gRPC bounds
# them only where a client has acknowledged the server's settings.
LARGEST_HEADERS_BYTES = 16 << 10
HEADER_BYTES = 32

Context = grpc.aio.ServicerContext[Any, Any]
Parse = Callable[[bytes], Any]
# The answer of a stream is None.
Method = Callable[[Any, "Entry", Context], Awaitable[Any]]
# Whether who may this may have the stream: raises JobWorkerError if not. Knows it at once, as all
# streams are asked about in one go.
StillMay = Callable[[Access], object]
Subject = Callable[[Any, Any], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What all calls of one client, by the name in its certificate, may take together."""

    calls: int  # at once, but for streams
    streams: int  # at once
    connections: int  # with calls, at once


@dataclass(slots=True)
class _Client:
    """What a client has under way."""

    calls: int = 0
    streams: int = 0
    large: int = 0
    untaken_bytes: int = 0
    receiving: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_RECEIVED))
    answering: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_ANSWERED))
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_READ))
    creating: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_CREATED))
    ending: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_LARGE_ENDINGS))
    listing: asyncio.Lock = field(default_factory=asyncio.Lock)
    connections: dict[str, int] = field(default_factory=dict)  # calls on each, by its peer


@dataclass(slots=True)
class _Refusals:
    """How many lines about refused calls of one client may still be written."""

    left: float = REFUSALS_AT_ONCE
    counted_at: float = 0.0
    unwritten: int = 0


@dataclass(frozen=True, slots=True)
class _Acquired(contextlib.AbstractAsyncContextManager[None]):
    """A semaphore's turn that has come already."""

    semaphore: asyncio.Semaphore

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        self.semaphore.release()


@dataclass(frozen=True, slots=True)
class Passport:
    """What a client's certificate says."""

    identity: Identity
    serial: int
    issuer: str
    expires: float  # seconds since the epoch


@functools.lru_cache(maxsize=1024)
def _passport_of(pem: bytes) -> Passport:
    identity = identity_of(pem)  # first: what cannot be read is refused
    validity = certs.validity_of(pem)
    return Passport(identity, validity.serial, validity.issuer, validity.expires)


@dataclass(slots=True, eq=False)
class _Call:
    rpc: str
    is_stream: bool
    peer: str
    task: asyncio.Task[Any]
    passport: Passport | None = None
    role: str | None = None  # of its caller, when it was last asked what that may; None: never
    client: _Client | None = None  # where it is counted
    untaken_bytes: int = 0  # of its answer
    still_may: StillMay | None = None  # of a stream that has begun
    has_done: bool = False  # something, though it is given up
    is_told: bool = False  # by lines of the audit log that do not wait for its end
    ended_by: JobWorkerError | None = None  # why it is ended though the client waits

    def end(self, error: JobWorkerError) -> None:
        if self.ended_by is None:
            self.ended_by = error
            self.task.cancel()


@dataclass(frozen=True, slots=True)
class Entry:
    """Of one call: what a method asks the gate while it is under way."""

    # What the caller may now, as roles may change. Not for an RPC without a rule. Raises
    # PermissionDeniedError.
    access: Callable[[], Access]
    # The same just before each job that a call creates: once more all that the call was let in
    # for. Raises AuditError, too.
    admit: Callable[[], Access]
    # A line of the audit log that does not wait for the end of the call, with a code and what else
    # is told.
    note: Callable[[Callable[[], Mapping[str, Any]]], None]
    # For a stream: whether its caller may have it, asked now and whenever roles have changed.
    # Until then only the rule of its RPC counts. Raises what that raises.
    keep_asking: Callable[[StillMay], None]
    # Within it, a job's record is read, which may be large.
    reading: Callable[[], asyncio.Semaphore]
    # The same for what goes by an access from before: once its turn has come, the caller must have
    # the same still. Raises PermissionDeniedError.
    reading_as: Callable[[Access], Turn]
    # Within it, a disk is asked for output.
    reading_disk: Callable[[], asyncio.Semaphore]
    # Within it, one of many jobs of a request is made.
    creating: Callable[[], asyncio.Semaphore]
    # For a stream: within it, a large last message is made and written.
    large_ending: Callable[[], asyncio.Semaphore]
    # Within it, a job that is large is read and made a message: of each client one at once, as
    # nothing else is done in these milliseconds.
    large_job: Callable[[], asyncio.Semaphore]


class Gate:
    """All calls under way."""

    def __init__(
        self,
        clients: Clients,
        limits: ClientLimits,
        audit: AuditLog,
        subjects: Mapping[str, Subject],
    ) -> None:
        """subjects: for each RPC that changes something, what the audit log says of it: made of
        the request and the answer, either of which may be None."""
        self._roles = clients
        self._limits = limits
        self._audit = audit
        self._subjects = subjects
        self._revoked = certs.NOBODY_REVOKED
        self._calls: set[_Call] = set()
        self._refused: dict[_Call, float] = {}  # since when, of those that are not counted
        self._clients: dict[str, _Client] = {}
        # Not with what else is counted of each client, which goes with its last call: a disk is
        # read on though all calls that wanted it have gone, and the pause after what took the loop
        # long is for others also where the client has one call at a time.
        self._disk_turns = Turns(MOST_READ_FROM_DISK)
        self._parsing_turns = Turns(1)
        self._large_job_turns = Turns(1)
        self._refusals: dict[str, _Refusals] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._shutting: set[str] = set()
        self._turned_away: list[str] = []  # addresses that the log has not told of
        self.port = 0

    def guard(
        self,
        rpc: str,
        method: Method,
        parse: Parse,
        *,
        is_stream: bool,
        is_ours: bool = True,
        takes_stream: bool = False,
    ) -> Any:
        """A handler for gRPC that lets the right callers in, and is to be given requests as bytes.
        parse: makes the request of them. is_stream: the answer is one. is_ours: an RPC with a
        rule in `authorization`; others are for all who have a certificate. An answer of one of
        ours is made bytes here. takes_stream: the method is given not one request, but all that
        come, which gRPC has parsed."""
        parse = parser(parse, rpc)
        # What has changed something is answered in any case, and LARGE has a bound of its own.
        is_refusable = is_ours and not is_stream and rpc not in self._subjects.keys() | LARGE

        async def handle(requests: Any, context: Context) -> Any:
            call = _Call(rpc, is_stream, context.peer(), _current_task())
            # Not when this ends, but when the answer has gone out: until then it takes memory.
            leave: Any = functools.partial(self._leave, call)
            context.add_done_callback(leave)
            entry = self._entry(call)
            request = answer = sent = None
            turn: Turn = ALWAYS_FREE
            try:
                try:
                    self._admit(call, context)
                    assert call.client is not None
                    if is_ours:
                        entry.access()
                    if takes_stream:
                        request = requests
                    else:
                        request, turn = await self._receive(call, context, parse)
                    if is_ours and is_stream:
                        call.still_may = _by_its_rule
                    async with _turn_of(call, is_refusable) or turn:
                        self._admit_again(call)
                        answer = sent = await method(request, entry, context)
                        if is_ours and not is_stream:
                            sent = self._counted(call, answer, is_refusable)
                except GivenUp as given_up:
                    call.is_told, call.has_done = given_up.is_told, not given_up.is_told
                    raise
                except grpc.aio.InternalError:  # the client has gone, or only its connection
                    raise asyncio.CancelledError from None
                except grpc.aio.BaseError:  # gRPC's own
                    raise
                except Exception as caught:  # noqa: BLE001 whatever it is, it is answered
                    error = expected(caught, rpc)
                else:
                    self._note(call, request, answer, "OK")
                    return sent
            except asyncio.CancelledError:
                if call.ended_by is None:
                    # Nobody waits for the answer. What was asked for may happen all the same.
                    self._note(call, request, answer, "CANCELLED")
                    raise
                error = call.ended_by
            code, text = convert.code_of(error), convert.text_of(error)
            metadata = convert.metadata_of(error)
            told_code = "CANCELLED" if call.has_done else code.name  # it was not refused
            self._note(call, request, answer, told_code, error)
            # Who takes no answer does not keep the server's memory; nor do the frames of the error,
            # which tasks know as well.
            request = answer = sent = call.still_may = None
            forget_frames(error)
            return await self._abort(call, context, code, text, metadata)

        return handle

    async def turn_away(self, _requests: Any, context: Context) -> None:
        """A handler for gRPC of what no honest client sends: ends the connection."""
        peer = context.peer()
        if peer not in self._shutting:
            self._turned_away.append(connections.address_of(peer))
            self._shutting.add(peer)
            if len(self._shutting) == 1:
                self._spawn(self._turn_away())
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the headers are too large")

    async def _turn_away(self) -> None:
        """All that have come meanwhile at once, and with pauses: each time all descriptors are
        looked through, in a thread of those that jobs need for their end."""
        try:
            while peers := set(self._shutting):
                began = time.monotonic()
                await self._shut(peers)
                await asyncio.sleep(OTHERS_SHARE * (time.monotonic() - began))
                self._shutting -= peers
        finally:
            self._shutting.clear()

    def revoke(self, revoked: certs.Revoked) -> None:
        """From now on these are refused; what they have under way is ended."""
        self._revoked = revoked
        calls = [call for call in self._calls if call.passport and self._is_revoked(call.passport)]
        for call in calls:
            assert call.passport is not None
            call.end(_revoked_error(call.passport))
        if calls:
            log.warning("ended %d calls of clients whose certificate is revoked", len(calls))
            self._spawn(self._shut_soon({call.peer for call in calls}))

    def roles_changed(self) -> None:
        """Streams that their callers may no longer have are ended. What was on its way to them
        they may still read; their connections stay, as others of their streams may go on."""
        ended = 0
        for call in list(self._calls):
            try:
                if call.still_may:
                    call.still_may(self._access(call))
            except JobWorkerError as error:
                text = f"the roles have changed since this stream began: {error}"
                call.end(PermissionDeniedError(text))
                ended += 1
        if ended:
            log.warning("ended %d streams of clients whose role has changed", ended)

    def busy_addresses(self) -> set[str]:
        """Of connections with calls."""
        peers = {peer for client in self._clients.values() for peer in client.connections}
        return set(map(connections.address_of, peers))

    def look(self) -> None:
        """To be called every now and then."""
        now = time.monotonic()
        untaken = [call for call, since in self._refused.items() if since < now - UNTAKEN_SECONDS]
        if untaken:
            for call in untaken:
                del self._refused[call]
            peers = {call.peer for call in untaken}
            log.warning("ending %d connections that do not take answers", len(peers))
            self._spawn(self._shut(peers))
        if told := self._turned_away:
            text = "ended %d connections with too large headers, the first from %s"
            log.warning(text, len(told), told[0])
            self._turned_away = []
        for name, refusals in list(self._refusals.items()):
            if refusals.unwritten:
                self._audit.write(
                    event="refused calls without a line", who=name, count=refusals.unwritten
                )
                refusals.unwritten = 0
            elif now > refusals.counted_at + REFUSALS_AT_ONCE / REFUSALS_PER_SECOND:
                del self._refusals[name]

    def _entry(self, call: _Call) -> Entry:
        return Entry(
            access=functools.partial(self._access, call),
            admit=functools.partial(self._admit_part, call),
            note=functools.partial(self._note_part, call),
            keep_asking=functools.partial(self._keep_asking, call),
            reading=lambda: _client_of(call).reading,
            reading_as=functools.partial(self._reading_as, call),
            reading_disk=functools.partial(_turn_in, self._disk_turns, call),
            creating=lambda: _client_of(call).creating,
            large_ending=lambda: _client_of(call).ending,
            large_job=functools.partial(_turn_in, self._large_job_turns, call),
        )

    # Coming and going

    async def _abort(
        self,
        call: _Call,
        context: Context,
        code: grpc.StatusCode,
        text: str,
        metadata: tuple[tuple[str, str], ...],
    ) -> NoReturn:
        if call.client is None:
            self._refused[call] = time.monotonic()
        try:
            await context.abort(code, text, metadata)
        except grpc.aio.InternalError:  # the connection has ended, and nobody is to be told
            raise asyncio.CancelledError from None

    def _admit(self, call: _Call, context: Context) -> None:
        passport = call.passport = _passport_of(certificate_of(context))
        self._require_valid(passport)
        self._count(call, passport.identity.name)
        self._calls.add(call)
        if call.rpc in CREATES:
            self._audit.check()

    def _admit_again(self, call: _Call) -> None:
        """Once the request is there: it may have come long after the call."""
        assert call.passport is not None
        self._require_valid(call.passport)
        if call.rpc in CREATES:
            self._audit.check()
        _check_untaken(call)

    def _admit_part(self, call: _Call) -> Access:
        assert call.passport is not None
        self._require_valid(call.passport)
        self._audit.check()
        return self._access(call)

    def _require_valid(self, passport: Passport) -> None:
        if self._is_revoked(passport):
            raise _revoked_error(passport)
        if time.time() > passport.expires:
            raise PermissionDeniedError(
                f"the certificate of {passport.identity.name!r} has expired since it connected; "
                "connect again with a new one"
            )

    def _access(self, call: _Call) -> Access:
        caller = self._caller(call)
        call.role = caller.role or ""
        return authorize(caller, call.rpc)

    def _caller(self, call: _Call) -> Caller:
        assert call.passport is not None
        return self._roles.caller(call.passport.identity)

    @contextlib.asynccontextmanager
    async def _reading_as(self, call: _Call, access: Access) -> AsyncIterator[None]:
        async with _client_of(call).reading:
            assert call.passport is not None
            self._require_valid(call.passport)
            now = self._access(call)
            if (now.role, now.reach) != (access.role, access.reach):
                problem = "the roles have changed since this call began; call again"
                raise PermissionDeniedError(problem)
            yield

    def _keep_asking(self, call: _Call, still_may: StillMay) -> None:
        still_may(self._access(call))
        call.still_may = still_may

    def _count(self, call: _Call, name: str) -> None:
        client = self._clients.get(name) or _Client()
        limits = self._limits
        if call.is_stream and client.streams >= limits.streams:
            raise _too_many("client_streams", name, limits.streams, "streams")
        if not call.is_stream and client.calls >= limits.calls:
            raise _too_many("client_calls", name, limits.calls, "calls")
        if call.rpc in LARGE and client.large >= MOST_LARGE:
            raise _too_many("client_calls", name, MOST_LARGE, "calls with large messages")
        on_this = client.connections.get(call.peer, 0)
        if not on_this and len(client.connections) >= limits.connections:
            raise _too_many("client_connections", name, limits.connections, "connections in use")
        self._clients[name] = client
        client.connections[call.peer] = on_this + 1
        if call.is_stream:
            client.streams += 1
        else:
            client.calls += 1
        client.large += call.rpc in LARGE
        call.client = client

    async def _receive(self, call: _Call, context: Context, parse: Parse) -> tuple[Any, Turn]:
        """The request, and what it is to be answered within."""
        turn: Turn = ALWAYS_FREE
        receiving = _client_of(call).receiving
        await receiving.acquire()
        try:
            data: Any = await context.read()
            if data is grpc.aio.EOF:
                raise InvalidRequestError("request", "there is none")
            if len(data) <= LARGEST_LASTING_BYTES:
                request = parse(data)
                if call.rpc == "CreateJob" and convert.has_many_strings(request):
                    turn = _Acquired(receiving)  # in memory it is far larger
                return request, turn
            # Each may take a tenth of a second.
            async with leaving_time_for_others(_turn_in(self._parsing_turns, call)):
                request = parse(data)
            if call.rpc not in LARGE:
                turn = _Acquired(receiving)
            return request, turn
        finally:
            if turn is ALWAYS_FREE:
                receiving.release()

    def _counted(self, call: _Call, answer: Any, is_refusable: bool) -> bytes:
        """The answer as it is sent; counted until then."""
        sent: bytes = answer if isinstance(answer, bytes) else answer.SerializeToString()
        if is_refusable:
            _check_untaken(call, len(sent))
        if call.rpc not in LARGE:
            assert call.client is not None
            call.untaken_bytes = len(sent)
            call.client.untaken_bytes += len(sent)
        return sent

    def _leave(self, call: _Call, _context: Any = None) -> None:
        self._calls.discard(call)
        self._refused.pop(call, None)
        client = call.client
        if client is None:
            return
        client.large -= call.rpc in LARGE
        client.untaken_bytes -= call.untaken_bytes
        if call.is_stream:
            client.streams -= 1
        else:
            client.calls -= 1
        client.connections[call.peer] -= 1
        if not client.connections[call.peer]:
            del client.connections[call.peer]
            if not client.connections:
                assert call.passport is not None
                del self._clients[call.passport.identity.name]

    def _is_revoked(self, passport: Passport) -> bool:
        return self._revoked.has(passport.issuer, passport.serial)

    async def _shut_soon(self, peers: set[str]) -> None:
        await asyncio.sleep(REVOKED_SECONDS)
        await self._shut(peers)

    async def _shut(self, peers: set[str]) -> None:
        addresses = set(map(connections.address_of, peers))
        await asyncio.to_thread(connections.shut, self.port, addresses)

    def _spawn(self, ending: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    # The audit log

    def _note(
        self,
        call: _Call,
        request: Any,
        answer: Any,
        code: str,
        error: JobWorkerError | OSError | None = None,
    ) -> None:
        if not self._audit.is_on or call.is_told:
            return
        subject = self._subjects.get(call.rpc)
        told = list(subject(request, answer)) if subject and request is not None else []
        problem = {"problem": convert.text_of(error)} if error else {}
        for fields in told:
            # Of many jobs each has a code of its own.
            self._write(call, fields if "code" in fields else {"code": code, **fields, **problem})
        # What was done before it was ended does not tell why it was.
        is_told = told and answer is None
        if error and not is_told and (subject or isinstance(error, REFUSALS)):
            self._write(call, {"code": code, **problem})

    def _note_part(self, call: _Call, tell: Callable[[], Mapping[str, Any]]) -> None:
        if self._audit.is_on:
            self._write(call, tell())

    def _write(self, call: _Call, fields: Mapping[str, Any]) -> None:
        """fields: the code among them. What was done always has its line."""
        if fields["code"] != "OK" and not call.has_done and not self._may_note_failure(call):
            return
        passport, role = call.passport, call.role
        if passport and role is None:
            role = self._caller(call).role
        self._audit.write(
            who=passport.identity.name if passport else "",
            role=role or "",
            serial=passport.identity.serial if passport else "",
            peer=connections.address_of(call.peer),
            rpc=call.rpc,
            **fields,
        )

    def _may_note_failure(self, call: _Call) -> bool:
        name = call.passport.identity.name if call.passport else ""
        refusals = self._refusals.setdefault(name, _Refusals())
        now = time.monotonic()
        earned = (now - refusals.counted_at) * REFUSALS_PER_SECOND
        refusals.left = min(REFUSALS_AT_ONCE, refusals.left + earned)
        refusals.counted_at = now
        if refusals.left < 1:
            refusals.unwritten += 1
            return False
        refusals.left -= 1
        return True


# An audit log that cannot be written refuses these. Not those that end or remove jobs: they are
# what frees a full disk.
CREATES = frozenset({"CreateJob", "CreateJobs"})

# The last one: also for who asks for a job of another.
REFUSALS = (PermissionDeniedError, ResourceExhaustedError, AuditError, JobNotFoundError)


class GivenUp(asyncio.CancelledError):
    """The caller went away, or was ended, and something had been done by then, or goes on."""

    def __init__(self, *, is_told: bool = False) -> None:
        """is_told: by lines of the audit log, now or later."""
        super().__init__()
        self.is_told = is_told


def expected(error: Exception, rpc: str) -> JobWorkerError | OSError:
    """The error itself, where somebody has thought of it. Else one that says where the log has
    it: what Python says of it is about the server's inside."""
    if isinstance(error, JobWorkerError):
        return error
    if isinstance(error, OSError) and error.errno in convert.CODES_OF_ERRNOS:
        return error
    reference = secrets.token_hex(4)
    log.error("fault %s, in %s", reference, rpc, exc_info=error)
    return ServerFaultError(reference)


def forget_frames(error: Exception) -> None:
    """Their variables, a request among them, would else stay until the collector comes. But not
    those of what may be one error for many calls: it knows the frames of others, which would end
    with them."""
    if not isinstance(error, StoreError | OSError):
        traceback.clear_frames(error.__traceback__)


@contextlib.asynccontextmanager
async def leaving_time_for_others(turn: asyncio.Semaphore) -> AsyncIterator[None]:
    """For what takes the loop long, one after the other of each client: others come in between,
    for long enough, as gRPC lets in one call in each turn of the loop."""
    await turn.acquire()
    began = time.monotonic()
    try:
        yield
    finally:  # what is refused takes as long
        pause_seconds = OTHERS_SHARE * (time.monotonic() - began)
        asyncio.get_running_loop().call_later(pause_seconds, turn.release)


def parser(parse: Parse, rpc: str) -> Parse:
    """The same for requests of this RPC, with all that is wrong with one an
    InvalidRequestError."""

    def parse_request(data: bytes) -> Any:
        if rpc not in CREATES and len(data) > LARGEST_LASTING_BYTES:
            problem = f"{len(data)} bytes are too many; use at most {LARGEST_LASTING_BYTES}"
            raise InvalidRequestError("request", problem)
        if rpc == "CreateJob" and len(data) > convert.LARGEST_CREATE_BYTES:
            problem = f"{len(data)} bytes are too many; use at most {convert.LARGEST_CREATE_BYTES}"
            problem += ", and pass a longer stdin, args or environment in files"
            raise InvalidRequestError("request", problem)
        if convert.has_more_fields(data, MOST_FIELDS, convert.NESTED.get(rpc, {})):
            problem = f"has more than {MOST_FIELDS} fields; ask for less at once"
            raise InvalidRequestError("request", problem)
        try:
            return parse(data)
        except DecodeError as error:
            raise InvalidRequestError("request", str(error)) from error

    return parse_request


class GuardedServices:
    """Takes the servicers of other packages, and registers their handlers with a guard each;
    and as generic ones alone, for the reason that `service.ServiceHandler` gives."""

    def __init__(self, server: grpc.aio.Server, gate: Gate) -> None:
        self._server = server
        self._gate = gate

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        guarded = [_GuardedHandler(handler, self._gate) for handler in handlers]
        self._server.add_generic_rpc_handlers(guarded)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        pass


class _GuardedHandler(grpc.GenericRpcHandler):
    def __init__(self, handler: grpc.GenericRpcHandler, gate: Gate) -> None:
        self._handler = handler
        self._gate = gate
        self._methods: dict[str, Any] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method not in self._methods:
            found: Any = self._handler.service(details)
            if found is None:
                return None  # and not kept: anybody may ask for any name
            self._methods[details.method] = self._guarded(details.method, found)
        return self._methods[details.method]

    def _guarded(self, name: str, inner: Any) -> Any:
        is_stream = inner.response_streaming
        rpc = name.rpartition("/")[2]
        handler = self._gate.guard(
            rpc,
            _streaming(inner) if is_stream else _answering(inner),
            inner.request_deserializer,
            is_stream=is_stream,
            is_ours=False,
            takes_stream=inner.request_streaming,
        )
        make: Any = grpc.stream_unary_rpc_method_handler
        if is_stream:
            make = grpc.stream_stream_rpc_method_handler
        parse = parser(inner.request_deserializer, rpc) if inner.request_streaming else None
        return make(handler, parse, inner.response_serializer)


class LargeHeaders(grpc.GenericRpcHandler):
    """To be the first handler: takes the calls with headers that are larger than gRPC is told to
    let in, and turns their callers away."""

    def __init__(self, gate: Gate) -> None:
        self._handler: Any = grpc.stream_unary_rpc_method_handler(gate.turn_away)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        size = 0
        for name, value in details.invocation_metadata:
            size += len(name) + len(value) + HEADER_BYTES
        return self._handler if size > LARGEST_HEADERS_BYTES else None


class UnknownMethods(grpc.GenericRpcHandler):
    """To be the last handler: what no other serves. gRPC would answer by itself, and bound no
    client's calls."""

    def __init__(self, gate: Gate) -> None:
        handle = gate.guard("", _unknown, bytes, is_stream=False, is_ours=False, takes_stream=True)
        self._handler: Any = grpc.stream_unary_rpc_method_handler(handle)

    def service(self, _details: grpc.HandlerCallDetails) -> Any:
        return self._handler


def _by_its_rule(_access: Access) -> None:
    """Who has an access may have it."""


async def _unknown(_requests: Any, _entry: Entry, _context: Context) -> None:
    raise UnknownMethodError


def _answering(inner: Any) -> Method:
    async def method(request: Any, _entry: Entry, context: Context) -> Any:
        return await inner.unary_unary(request, context)

    return method


def _streaming(inner: Any) -> Method:
    behaviour = inner.stream_stream or inner.unary_stream

    async def method(request: Any, _entry: Entry, context: Context) -> None:
        if inspect.iscoroutinefunction(behaviour):
            await behaviour(request, context)
        else:
            async for answer in behaviour(request, context):
                await context.write(answer)

    return method


def _turn_of(call: _Call, is_refusable: bool) -> Turn | None:
    """What its answer is to be made within; None: what its request has brought."""
    client = _client_of(call)
    if call.rpc in LISTS:
        return client.listing
    return client.answering if is_refusable else None


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _turn_in(turns: Turns, call: _Call) -> asyncio.Semaphore:
    assert call.passport is not None
    return turns.of(call.passport.identity.name)


def _client_of(call: _Call) -> _Client:
    assert call.client is not None
    return call.client


def _too_many(limit: str, name: str, most: int, what: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"{limit}: {name!r} has {most} {what} already, which is the most that the server allows "
        "one client at once"
    )


def _check_untaken(call: _Call, more_bytes: int = 0) -> None:
    assert call.client is not None
    if call.client.untaken_bytes + more_bytes > MOST_UNTAKEN_BYTES:
        raise ResourceExhaustedError(
            f"the answers that this client has not taken yet are {MOST_UNTAKEN_BYTES >> 20} MiB, "
            "which is the most that the server keeps for one client; take them first"
        )


def _revoked_error(passport: Passport) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"the certificate of {passport.identity.name!r} with the serial number "
        f"{passport.identity.serial} is revoked"
    )
