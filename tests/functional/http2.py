"""What no client library would say: HTTP/2 (RFC 9113) as a test likes it, over TLS."""

from __future__ import annotations

import socket
import ssl
import struct

from functional.server import Server

# Frames by their types' numbers, and the flags that are used here.
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
INITIAL_WINDOW_SIZE = 4
CANCEL = 8


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    length = struct.pack(">I", len(payload))[1:]
    return length + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def field(name: str, value: str) -> bytes:
    """Of a header, as a literal that is not to be kept (RFC 7541)."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def headers_of(rpc: str, service: str = "job_worker.JobService") -> bytes:
    return b"".join(
        [
            field(":method", "POST"),
            field(":scheme", "https"),
            field(":path", f"/{service}/{rpc}"),
            field(":authority", "localhost"),
            field("content-type", "application/grpc"),
            field("te", "trailers"),
        ]
    )


def message_of(request: bytes, flag: int = 0) -> bytes:
    """flag: 1 where it is compressed."""
    return bytes([flag]) + struct.pack(">I", len(request)) + request


def request_of(rpc: str, stream: int, message: bytes = b"") -> bytes:
    """A call."""
    headers = frame(HEADERS, END_HEADERS, stream, headers_of(rpc))
    return headers + frame(DATA, END_STREAM, stream, message_of(message))


def reset_of(stream: int) -> bytes:
    """The end of a call that its client gives up."""
    return frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))


def connect(server: Server, name: str, settings: bytes = b"") -> ssl.SSLSocket:
    """Speaks HTTP/2 as it likes, over TLS as it must."""
    context = ssl.create_default_context(cafile=server.certs / "ca-cert.pem")
    context.load_cert_chain(server.certs / f"{name}-cert.pem", server.certs / f"{name}-key.pem")
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    wrapped = context.wrap_socket(plain, server_hostname="localhost")
    wrapped.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))
    return wrapped


def receive_until(connection: ssl.SSLSocket, expected: bytes) -> None:
    received = b""
    while expected not in received:
        part = connection.recv(1 << 16)
        assert part, received
        received += part
