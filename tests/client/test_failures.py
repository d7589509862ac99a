"""Which error each gRPC status is."""

from __future__ import annotations

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
        if request.id == "no message":
            return b"\xff\xff"
        return pb.Job(id="1", status=request.id).SerializeToString()


@pytest.fixture(scope="module")
def address(certificates: Path) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Aborting(),))
    names = ("server-key.pem", "server-cert.pem", "ca-cert.pem")
    key, cert, ca = ((certificates / name).read_bytes() for name in names)
    credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(grace=0).wait(10)


@pytest.mark.parametrize("code", KINDS)
def test_each_status_is_one_error(connect: Connect, address: str, code: str) -> None:
    with pytest.raises(CallError) as caught:
        connect(address).get(code)
    error = caught.value
    assert (type(error), error.code, error.rpc) == (KINDS[code], code, "GetJob")


@pytest.mark.parametrize("answer", ["no message", "ASLEEP"])
def test_an_answer_of_another_contract(connect: Connect, address: str, answer: str) -> None:
    with pytest.raises(CallError, match=f"{address}: cannot understand the answer to GetJob"):
        connect(address).get(answer)
