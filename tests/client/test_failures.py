"""Which error each gRPC status is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.conftest import Connect
from jobworker import errors
from jobworker.errors import CallError
from jobworker.pb import job_worker_pb2 as pb

KINDS = {
    "UNAVAILABLE": errors.UnreachableError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "NOT_FOUND": errors.UnknownJobError,
    "INVALID_ARGUMENT": errors.RejectedError,
    "OUT_OF_RANGE": errors.RejectedError,
    "PERMISSION_DENIED": errors.ForbiddenError,
    "UNAUTHENTICATED": errors.ForbiddenError,
    "FAILED_PRECONDITION": errors.WrongStateError,
    "RESOURCE_EXHAUSTED": errors.ExhaustedError,
    "UNIMPLEMENTED": errors.UnsupportedError,
    "INTERNAL": CallError,
    "UNKNOWN": CallError,
    "CANCELLED": CallError,
}


class Aborting(grpc.GenericRpcHandler):
    """A server whose GetJob ends with the status that the id names, or answers nonsense."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer, pb.GetJobReq.FromString)

    def _answer(self, request: pb.GetJobReq, context: grpc.ServicerContext) -> bytes:
        if request.id in KINDS:
            context.abort(grpc.StatusCode[request.id], "as asked for")
        if request.id == "errno":
            context.set_trailing_metadata((("command-errno", "9" * 5000),))
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "as asked for")
        if request.id == "terminal":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "\x1b]0;title\x07\nü")
        if request.id == "no message":
            return b"\xff\xff"
        return pb.Job(id="1", status=request.id).SerializeToString()


class Ending(grpc.GenericRpcHandler):
    """A server that is ended, and had not come to its first call by then: gRPC answers that one."""

    def __init__(self) -> None:
        self._has_answered = False

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method.endswith("/GetJobsStream"):
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _stream(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        job = pb.Job.FromString(self._answer(request, context))
        yield pb.DataChunk(ending=job).SerializeToString()

    def _answer(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        if not self._has_answered:
            self._has_answered = True
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        return pb.Job(id="1", status="COMPLETED").SerializeToString()


class Stalling(grpc.GenericRpcHandler):
    """A server that does not answer one RPC, or not again, and whose streams are cut off."""

    def __init__(self, rpc: str, answers: int) -> None:
        self.released = threading.Event()
        self._rpc = rpc
        self._answers = answers  # before it stalls

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method.endswith("/GetJobsStream"):
            return grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter(()))
        if details.method.endswith(f"/{self._rpc}"):
            self._answers -= 1
            if self._answers < 0:
                return grpc.unary_unary_rpc_method_handler(self._stall)
        job = pb.Job(id="1", status="RUNNING").SerializeToString()
        answer = job if details.method.endswith("/GetJob") else b""
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: answer)

    def _stall(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        self.released.wait(30)
        return b""


@contextlib.contextmanager
def listening(handler: grpc.GenericRpcHandler, certificates: Path) -> Iterator[str]:
    """Its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    names = ("server-key.pem", "server-cert.pem", "ca-cert.pem")
    key, cert, ca = ((certificates / name).read_bytes() for name in names)
    credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=0).wait(10)


@pytest.fixture(scope="module")
def address(certificates: Path) -> Iterator[str]:
    with listening(Aborting(), certificates) as address:
        yield address


@pytest.mark.parametrize("code", KINDS)
def test_each_status_is_one_error(connect: Connect, address: str, code: str) -> None:
    with pytest.raises(CallError) as caught:
        connect(address).get(code)
    error = caught.value
    assert (type(error), error.code, error.rpc) == (KINDS[code], code, "GetJob")


def test_a_number_that_is_none(connect: Connect, address: str) -> None:
    with pytest.raises(errors.RejectedError) as caught:
        connect(address).get("errno")
    assert caught.value.command_errno == 0


def test_a_stream_goes_on_that_came_while_the_server_was_ended(
    connect: Connect, certificates: Path
) -> None:
    with listening(Ending(), certificates) as address:
        (chunk,) = connect(address).stream(1)
    assert chunk.ending


def test_a_call_that_came_while_the_server_was_ended(connect: Connect, certificates: Path) -> None:
    broke = pytest.raises(errors.UnreachableError, match="the connection broke")
    with listening(Ending(), certificates) as address, broke as caught:
        connect(address).get(1)
    assert caught.value.may_have_happened


@pytest.mark.parametrize("answer", ["no message", "ASLEEP"])
def test_an_answer_of_another_contract(connect: Connect, address: str, answer: str) -> None:
    with pytest.raises(CallError, match=f"{address}: cannot understand the answer to GetJob"):
        connect(address).get(answer)


def test_what_a_server_says_changes_no_terminal(connect: Connect, address: str) -> None:
    with pytest.raises(errors.RejectedError) as caught:
        connect(address).get("terminal")
    assert str(caught.value) == r"\x1b]0;title\x07\nü"


@pytest.mark.parametrize(("rpc", "answers"), [("GetServerInfo", 0), ("GetJob", 1)])
def test_a_wait_ends_in_time_whatever_the_server_does_not_answer(
    connect: Connect, certificates: Path, rpc: str, answers: int
) -> None:
    handler = Stalling(rpc, answers)
    with listening(handler, certificates) as address:
        client = connect(address, timeout=20)
        before = time.monotonic()
        with pytest.raises(errors.DeadlineError):
            client.wait(1, timeout=1)
        handler.released.set()
    assert time.monotonic() - before < 10
