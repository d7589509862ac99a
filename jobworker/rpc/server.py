"""The gRPC server: mutual TLS, the service, health and reflection, and what bounds its clients.

Two things must be set in the environment before grpc is first imported (`prepare_grpc`);
the daemon sees to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from jobworker import certs
from jobworker.config import Settings
from jobworker.errors import SettingError
from jobworker.roles import Clients, Entries
from jobworker.rpc import connections
from jobworker.rpc.audit import AuditLog
from jobworker.rpc.credentials import Credentials
from jobworker.rpc.gate import ClientLimits, Gate, GuardedServices, LargeHeaders, UnknownMethods
from jobworker.rpc.health import Health
from jobworker.rpc.memory import Memory
from jobworker.rpc.service import SERVICE, SUBJECTS, JobService, ServiceHandler
from jobworker.rpc.watch import Watch, WatchedFiles

log = logging.getLogger(__name__)

LARGEST_REQUEST_BYTES = 4 << 20

OPTIONS: list[tuple[str, Any]] = [
    # On by default: a second server would silently share the port with the first.
    ("grpc.so_reuseport", 0),
    # 1,000 and 3,000 by default: many clients that connect at once would be turned away.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    ("grpc.max_receive_message_length", LARGEST_REQUEST_BYTES),
    ("grpc.max_concurrent_streams", 2_000),
    # With it, as by default, each stream may send 4 MiB ahead of what is read of it; without, the
    # 64 KiB that HTTP/2 begins with, and the rest of a message once somebody waits for it.
    ("grpc.http2.bdp_probe", 0),
    # Of all headers of a request together, as by default: what is over the first is refused at
    # random, what is over the second always.
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # 120 s by default. It is over when the client has sent its HTTP/2 settings.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Connections without a call; also those that send a header for ever. Clients connect again
    # by themselves.
    ("grpc.max_connection_idle_ms", 600_000),
    # Two hours by default: so long would a machine that has gone keep its connections.
    ("grpc.keepalive_time_ms", 600_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients that ping more often than this while nothing is sent are told so, and at the third
    # time cut off; as by default, and what `client.connection` keeps to.
    ("grpc.http2.min_ping_interval_without_data_ms", 300_000),
    ("grpc.http2.max_ping_strikes", 2),
]
# Between two looks for connections that give way; so long has a new one for its first call.
CROWD_SECONDS = 0.25
LONGEST_CROWD_SECONDS = 4.0
CROWD_SAID_SECONDS = 10.0
OF_CLIENTS_SAID_SECONDS = 10.0
OF_CLIENTS_CHARACTERS = 200
# What gRPC logs with a traceback though a client alone has caused it: bytes that are no text, and
# answers to who has gone before they were sent.
OF_CLIENTS = (UnicodeDecodeError, grpc.aio.InternalError)


class _OfClients(logging.Filter):
    """What gRPC says of such is short, and said seldom: anybody with a certificate may cause as
    much of it as it likes, and nothing is wrong here."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[type[BaseException], float] = {}
        self._unsaid: Counter[type[BaseException]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        kind = next((kind for kind in OF_CLIENTS if isinstance(error, kind)), None)
        if kind is None:
            return True
        now = time.monotonic()
        if now < self._said_at.get(kind, -OF_CLIENTS_SAID_SECONDS) + OF_CLIENTS_SAID_SECONDS:
            self._unsaid[kind] += 1
            return False
        text = record.getMessage()[:OF_CLIENTS_CHARACTERS]
        record.msg = "%s (and %d such lines since the last)"
        record.args = (text, self._unsaid.pop(kind, 0))
        record.exc_info = None
        self._said_at[kind] = now
        return True


logging.getLogger("grpc._cython.cygrpc").addFilter(_OfClients())


class RpcServer:
    """Listens from `start` to `stop`."""

    def __init__(
        self,
        settings: Settings,
        service: JobService,
        clients: Clients,
        limits: ClientLimits,
        most_connections: int,
        audit: AuditLog,
    ) -> None:
        """audit: stays the caller's, who closes it once all that was begun has ended.

        Raises StartupError where the address cannot be listened on, or a file not be used."""
        self._audit = audit
        self._gate = Gate(clients, limits, self._audit, SUBJECTS)
        self._watch = Watch()
        self._crowd = _Crowd(self._gate, most_connections)
        credentials = Credentials(settings.cert_path, self._crowd.note_handshake, self._tell_reload)
        self._watch.add(credentials.files)
        if settings.clients:
            self._watch.add(self._roles(settings.clients, clients))
        if settings.revoked:
            self._watch.add(self._revocation(settings.revoked, settings.cert_path / certs.CA_CERT))
        for function in (self._audit.look, self._gate.look, credentials.look, Memory().look):
            self._watch.at_each_look(function)
        options = [*OPTIONS, ("grpc.max_allowed_incoming_connections", most_connections)]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((LargeHeaders(self._gate),))
        self._server.add_generic_rpc_handlers((ServiceHandler(service, self._gate),))
        self._health = Health(["", SERVICE])
        guarded: Any = GuardedServices(self._server, self._gate)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guarded)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        # Not `enable_server_reflection`: it does not see that this server is one of asyncio's.
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(names), guarded
        )
        self._server.add_generic_rpc_handlers((UnknownMethods(self._gate),))
        self.port = self._bind(settings.address, credentials)
        self._gate.port = self.port

    async def start(self) -> None:
        await self._server.start()
        self._watch.start()
        self._audit.write(event="start", port=self.port)

    def reload(self) -> None:
        """Reads what has changed on disk, without waiting for it to settle; as on SIGHUP."""
        self._watch.look_now()

    async def stop(self, grace_seconds: float) -> None:
        """Accepts nothing more at once; calls under way have this long to end. May be
        called again with a shorter time."""
        self._health.end()
        await self._server.stop(grace_seconds)

    async def close(self) -> None:
        """To be called once, after the last `stop`."""
        await self._watch.close()
        await self._crowd.close()
        self._audit.write(event="end")

    def _roles(self, path: Path, clients: Clients) -> WatchedFiles:
        def use(entries: Entries) -> None:
            clients.use(entries)
            self._gate.roles_changed()

        return WatchedFiles("clients' roles", [path], clients.read, use, self._tell_reload)

    def _revocation(self, path: Path, ca_path: Path) -> WatchedFiles:
        def use(revoked: certs.Revoked) -> None:
            for warning in revoked.warnings:
                log.warning("%s", warning)
            self._gate.revoke(revoked)

        # With the CA's, as its signature counts.
        return WatchedFiles(
            "revoked certificates",
            [path, ca_path],
            lambda: certs.read_revoked(path, ca_path),
            use,
            self._tell_reload,
            # Who writes the file anew in place has nobody let in meanwhile.
            certs.Revoked.__or__,
        )

    def _tell_reload(self, name: str, problem: str) -> None:
        outcome = {"problem": problem} if problem else {}
        self._audit.write(event="reload", files=name, **outcome)

    def _bind(self, address: str, credentials: Credentials) -> int:
        try:
            port = self._server.add_secure_port(address, credentials.for_grpc())
        except RuntimeError as error:
            raise SettingError(
                "--addr (JOB_WORKER_ADDR)",
                address,
                *_why_not_listen(address),
            ) from error
        return port


class _Crowd:
    """Has connections give way where there are nearly as many as there may be."""

    def __init__(self, gate: Gate, most: int) -> None:
        self._gate = gate
        self._most = most
        self._loop = asyncio.get_running_loop()
        # At the most so many: those counted last, and those that came since then.
        self._counted = 0
        self._arrivals = itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._ended = 0
        self._said_at = -CROWD_SAID_SECONDS

    def note_handshake(self) -> None:
        """In a thread of gRPC's."""
        if self._may_be_crowded():
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._make_room_soon)

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _may_be_crowded(self) -> bool:
        return self._counted + next(self._arrivals) > self._most * connections.CROWDED_SHARE

    def _make_room_soon(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._make_room())

    async def _make_room(self) -> None:
        seen: set[str] = set()
        pause = CROWD_SECONDS
        # Until it is no longer crowded: where all are taken, no handshake would tell.
        while self._may_be_crowded():
            self._arrivals = itertools.count(1)
            busy = self._gate.busy_addresses()
            seen, ended = await asyncio.to_thread(
                connections.make_room, self._gate.port, self._most, busy, seen
            )
            self._counted = len(seen) - ended
            self._say(len(seen), ended)
            # Where all have a call, there is nothing to do for long.
            pause = CROWD_SECONDS if ended else min(2 * pause, LONGEST_CROWD_SECONDS)
            await asyncio.sleep(pause)

    def _say(self, count: int, ended: int) -> None:
        self._ended += ended
        if self._ended and self._loop.time() > self._said_at + CROWD_SAID_SECONDS:
            log.warning(
                "%d connections, and %d are the most: ended %d without a call since this was last "
                "said, of the hosts that have most",
                count,
                self._most,
                self._ended,
            )
            self._ended, self._said_at = 0, self._loop.time()


def client_limits(settings: Settings, most_connections: int) -> ClientLimits:
    return ClientLimits(
        settings.client_calls, settings.client_streams, max(1, most_connections // 2)
    )


def _why_not_listen(address: str) -> tuple[str, str]:
    """And what to do. gRPC does not tell; the kernel does, asked for the same."""
    host, _, port = address.rpartition(":")
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, OTHER_ADDRESS)
        return f"cannot listen there: {error.strerror}", remedy
    return "cannot listen there", OTHER_ADDRESS


OTHER_ADDRESS = "choose another one; `ss -ltnp` shows who has it"
REMEDIES = {
    errno.EACCES: "choose a port from 1024 on; lower ones take root, or CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "give an address of this machine, or 0.0.0.0 for all of them",
}
