"""What clients may send: any message to any RPC, and any bytes to the port of a real server."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functional.server import Server, channel
from fuzz.builds import FIGURES, FUZZ_SECONDS
from jobworker.pb import job_worker_pb2 as pb

pytestmark = pytest.mark.timeout(FUZZ_SECONDS + 120)

SERVICE = pb.DESCRIPTOR.services_by_name["JobService"]
EXAMPLES_AT_ONCE = 40
CALL_SECONDS = 10
ENOUGH_WAITING_SECONDS = 0.3
# A stop waits for the job as long as it is told to, and a stream follows it.
MAY_WAIT = {"StopJob": ENOUGH_WAITING_SECONDS, "GetJobsStream": ENOUGH_WAITING_SECONDS}
RUNNING_ID = "1"  # stands for that of a job that runs

# Whatever a client sends, it is told what is wrong with it.
PROPER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

# Messages, from their descriptors: a field that is added is sent from then on.

INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),  # proto3 lets numbers of later pass
}
TEXT = st.text(max_size=20) | st.sampled_from(["", "0", "1", "/", "/tmp", "..", "\0", "x" * 5000])
# What is executed is harmless, whatever it is given.
PROGRAMS = st.sampled_from(["/bin/true", "/bin/echo", "/bin/false", "true", ""]) | st.text(
    max_size=20
).map(lambda text: f"/no-such-folder/{text}")
IDS = st.sampled_from(["1", "2", "3", "01", "-1", "9" * 18, "9" * 30, "²"]) | TEXT
BY_NAME = {
    "command": PROGRAMS,
    "id": IDS,
    "profile": st.sampled_from(["", "none", "default", "strict"]) | TEXT,
    "user": st.sampled_from(["", "nobody", "root"]) | TEXT,
}
ALWAYS_THERE = {"command", "id"}
# Of one message in some: from where on it is other bytes.
DAMAGE = st.none() | st.none() | st.none() | st.tuples(st.integers(0, 500), st.binary(max_size=9))
MOST_OTHERS = 3  # of the fields in one message, as most values are refused


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.name in BY_NAME:
        return BY_NAME[field.name]
    if field.type in INTEGERS:
        low, high = INTEGERS[field.type]
        edges = st.sampled_from([low, high, 0, 1, min(high, 100), high // 2 + 1])
        return st.integers(max(low, -2), 200) | edges
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXT
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=100)
    assert field.type == FieldDescriptor.TYPE_MESSAGE, f"{field.name} is of a type new to this"
    return messages(field.message_type)


def fields(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return st.dictionaries(values(key), values(value), max_size=3)
    if field.is_repeated:
        return st.lists(values(field), max_size=3)
    return values(field)


def messages(descriptor: Any) -> st.SearchStrategy[Any]:
    always = [field for field in descriptor.fields if field.name in ALWAYS_THERE]
    others = [field for field in descriptor.fields if field.name not in ALWAYS_THERE]
    some: st.SearchStrategy[list[FieldDescriptor]] = st.just([])
    if others:
        some = st.lists(st.sampled_from(others), max_size=MOST_OTHERS, unique_by=id)
    return some.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {field.name: fields(field) for field in [*always, *chosen]}
        )
    ).map(lambda content: GetMessageClass(descriptor)(**content))


# The server


@pytest.fixture(scope="module")
def attacked(
    tmp_path_factory: pytest.TempPathFactory, certificates: Path, native_fuzzers: object
) -> Iterator[Server]:
    # In a mount namespace of its own, where that can be had: any message is any.
    launcher = ["unshare", "--mount"] if os.geteuid() == 0 else []
    server = Server(tmp_path_factory.mktemp("attacked"), certificates, launcher=launcher)
    yield server
    assert server.stop() == 0


def check_unharmed(server: Server) -> None:
    with server.connect() as client:
        assert client.info().version
    assert server.process.poll() is None
    # grpc prints a traceback of its own when a client hangs up before it has an error's status.
    assert not re.search(r'File ".*/jobworker/', server.log), server.log


@pytest.mark.parametrize("method", list(SERVICE.methods), ids=lambda method: method.name)
def test_any_message_gets_a_proper_answer(attacked: Server, method: MethodDescriptor) -> None:
    counts: dict[grpc.StatusCode, int] = {}
    proper = PROPER | ({grpc.StatusCode.DEADLINE_EXCEEDED} if method.name in MAY_WAIT else set())

    with channel(attacked.address, attacked.certs, "client") as open_channel:
        running = pb.Job()
        call = caller(open_channel, method)

        @settings(
            max_examples=EXAMPLES_AT_ONCE, deadline=None, suppress_health_check=list(HealthCheck)
        )
        @given(messages(method.input_type), DAMAGE)
        def send(message: Any, damage: tuple[int, bytes] | None) -> None:
            if getattr(message, "id", "") == RUNNING_ID:
                message.id = running.id
            request = message.SerializeToString()
            if damage:
                place = damage[0] % (len(request) + 1)
                request = request[:place] + damage[1]
            code, details = call(request)
            counts[code] = counts.get(code, 0) + 1
            assert code in proper, f"{code.name}: {details}"

        def once() -> None:
            with attacked.connect() as client:
                running.CopyFrom(client.create("/bin/sleep", "1000"))
                send()
                if client.get(running.id).status == "RUNNING":
                    client.stop(running.id, grace_milliseconds=0)

        run_for(FUZZ_SECONDS / len(SERVICE.methods), once)
    by_code = ", ".join(f"{code.name} {count}" for code, count in counts.items())
    FIGURES.append(f"{method.name}: {by_code}")
    check_unharmed(attacked)


def caller(
    open_channel: grpc.Channel, method: MethodDescriptor
) -> Callable[[bytes], tuple[grpc.StatusCode, str]]:
    path = f"/{SERVICE.full_name}/{method.name}"
    answer = GetMessageClass(method.output_type).FromString
    kind = open_channel.unary_stream if method.server_streaming else open_channel.unary_unary
    invoke: Any = kind(path, lambda request: request, answer)

    def call(request: bytes) -> tuple[grpc.StatusCode, str]:
        try:
            answered = invoke(request, timeout=MAY_WAIT.get(method.name, CALL_SECONDS))
            if method.server_streaming:
                for _ in answered:
                    pass
            for result in getattr(answered, "results", []):
                assert result.code in {code.value[0] for code in PROPER}, result
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""

    return call


def run_for(seconds: float, once: Callable[[], None]) -> None:
    """At least once."""
    deadline = time.monotonic() + seconds
    while True:
        once()
        if time.monotonic() >= deadline:
            return


# Bytes


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
HEADERS_OF_A_CALL = (
    b"\x83\x87"  # POST, https
    b"\x04\x24/job_worker.JobService/GetServerInfo"
    b"\x01\x0ajob-worker"
    b"\x0f\x10\x10application/grpc"
    b"\x40\x02te\x08trailers"
)


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers_of_a_call(chance: random.Random) -> bytes:
    """Those of one that is right, or one whose values are any bytes: HTTP/2 lets them be."""
    if chance.random() < 0.5:
        return HEADERS_OF_A_CALL
    value = chance.choice([b"GetServerInfo", b"job-worker", b"grpc", b"trailers"])
    return HEADERS_OF_A_CALL.replace(value, chance.randbytes(len(value)))


def any_frames(chance: random.Random) -> bytes:
    """Some that are right, some that are nearly so."""
    made = []
    for _ in range(chance.randrange(1, 12)):
        payload = chance.randbytes(chance.choice([0, 0, 1, 4, 5, 8, 50, 2000]))
        if chance.random() < 0.3:
            payload = headers_of_a_call(chance)
        length = chance.choice([None, None, None, None, 0, 1, 2**14, 2**24 - 1])
        kind = chance.choice([*range(11), 1, 1, 0, 255])
        stream = chance.choice([0, 1, 1, 1, 2, 3, 5, 2**31 - 1, 2**32 - 1])
        made.append(frame(kind, chance.choice([0, 1, 4, 5, 0xFF]), stream, payload, length))
    return b"".join(made)


def any_bytes(chance: random.Random) -> bytes:
    """Of HTTP/2, or of nothing."""
    how = chance.randrange(5)
    if how == 0:
        return chance.randbytes(chance.choice([1, 100, 5000]))
    data = bytearray(PREFACE + SETTINGS + any_frames(chance))
    if how == 1:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    if how == 2:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


def any_hello(chance: random.Random, context: ssl.SSLContext) -> bytes:
    """The first that a client says in TLS, damaged."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="job-worker").do_handshake()
    data = bytearray(outgoing.read())
    for _ in range(chance.choice([0, 1, 1, 5])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.choice([len(data), len(data), chance.randrange(len(data))])])


def tls(certificates: Path, *, certified: bool, protocols: list[str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    context.check_hostname = False
    if certified:
        context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


def test_a_method_that_is_no_text_is_one_call_that_fails(attacked: Server) -> None:
    # Some releases of grpcio decode the name where calls are accepted, and then accept no more.
    context = tls(attacked.certs, certified=True, protocols=["h2"])
    headers = HEADERS_OF_A_CALL.replace(b"GetServerInfo", b"\xf2" * 13)
    plain = socket.create_connection(("127.0.0.1", attacked.port), timeout=CALL_SECONDS)
    with context.wrap_socket(plain, server_hostname="job-worker") as connection:
        connection.sendall(PREFACE + SETTINGS + frame(1, 4, 1, headers) + frame(0, 1, 1, b"\0" * 5))
        answered = b""
        while b"grpc-status" not in answered:
            received = connection.recv(1 << 16)
            assert received, f"it hung up after {answered!r}"
            answered += received
    check_unharmed(attacked)


def throw(server: Server, chance: random.Random, context: ssl.SSLContext | None) -> None:
    """One connection, with whatever the server makes of it."""
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=CALL_SECONDS)
    with contextlib.suppress(OSError), contextlib.closing(plain):
        connection = plain
        if context:
            connection = context.wrap_socket(plain, server_hostname="job-worker")
        with contextlib.closing(connection):
            for _ in range(chance.choice([1, 1, 3])):
                connection.sendall(any_bytes(chance))
            if chance.random() < 0.2:
                connection.settimeout(ENOUGH_WAITING_SECONDS)
                while connection.recv(1 << 16):
                    pass


def test_no_bytes_harm_it(attacked: Server) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    FIGURES.append(f"bytes to the port: seed {seed}")
    certified = tls(attacked.certs, certified=True, protocols=["h2"])
    contexts = [
        *[certified] * 5,
        tls(attacked.certs, certified=True, protocols=[]),
        tls(attacked.certs, certified=False, protocols=["h2"]),
        None,
    ]
    check_unharmed(attacked)
    before = attacked.descriptors()
    count = 0

    def once() -> None:
        nonlocal count
        for _ in range(50):
            throw(attacked, chance, chance.choice(contexts))
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", attacked.port)) as connection,
            ):
                connection.sendall(any_hello(chance, certified))
            count += 2
        check_unharmed(attacked)

    run_for(FUZZ_SECONDS / 2, once)
    FIGURES.append(f"bytes to the port: {count} connections")
    deadline = time.monotonic() + 30
    while attacked.descriptors() > before + 5:
        assert time.monotonic() < deadline, "connections stay open"
        time.sleep(0.05)
