"""The gRPC server: mutual TLS, the service, health and reflection.

Two things must be set in the environment before grpc is first imported (`prepare_grpc`);
the daemon sees to it.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jobworker.config import Settings
from jobworker.errors import SettingError
from jobworker.roles import Clients
from jobworker.rpc.service import SERVICE, JobService, ServiceHandler

LARGEST_REQUEST_BYTES = 4 << 20

OPTIONS: list[tuple[str, Any]] = [
    # On by default: a second server would silently share the port with the first.
    ("grpc.so_reuseport", 0),
    # 1,000 and 3,000 by default: many clients that connect at once would be turned away.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    ("grpc.max_receive_message_length", LARGEST_REQUEST_BYTES),
    ("grpc.max_concurrent_streams", 2_000),
]


class RpcServer:
    """Listens from `start` to `stop`."""

    def __init__(self, settings: Settings, service: JobService, clients: Clients) -> None:
        """Raises SettingError where the address cannot be listened on."""
        self._server = grpc.aio.server(options=OPTIONS)
        self._server.add_generic_rpc_handlers((ServiceHandler(service, clients),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, _GenericOnly(self._server))
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, _GenericOnly(self._server))
        self.port = self._bind(settings)

    async def start(self) -> None:
        await self._server.start()
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_seconds: float) -> None:
        """Accepts nothing more at once; calls under way have this long to end. May be
        called again with a shorter time."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)

    def _bind(self, settings: Settings) -> int:
        try:
            port = self._server.add_secure_port(settings.address, _credentials(settings.cert_path))
        except RuntimeError as error:
            raise SettingError(
                "--addr (JOB_WORKER_ADDR)",
                settings.address,
                _why_not_listen(settings.address),
                "choose another one; `ss -ltnp` shows who has it",
            ) from error
        return port


class _GenericOnly:
    """Registers servicers of other packages by their generic handlers alone, for the reason
    that `ServiceHandler` gives."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        pass


def _why_not_listen(address: str) -> str:
    """gRPC does not tell; the kernel does, asked for the same."""
    host, _, port = address.rpartition(":")
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
    except OSError as error:
        return f"cannot listen there: {error.strerror}"
    return "cannot listen there"


def _credentials(folder: Path) -> grpc.ServerCredentials:
    key, certificate, authority = (
        (folder / name).read_bytes()
        for name in ("server-key.pem", "server-cert.pem", "ca-cert.pem")
    )
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=authority, require_client_auth=True
    )
