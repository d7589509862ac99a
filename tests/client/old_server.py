"""A small server that speaks only the contract's fixed fields, as servers did before any field
was added: with messages of its own, and jobs that are bare processes."""

from __future__ import annotations

import io
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

TYPES = {"string": 9, "int32": 5, "bytes": 12}
JOB = [
    *("string id", "string command", "repeated string args"),
    *("int32 maxCPU", "int32 maxMemory", "int32 maxIOBPS"),
    *("string status", "string startTime", "string endTime", "int32 exitCode"),
]
MESSAGES = {
    "EmptyRequest": [],
    "CreateJobReq": [
        *("string command", "repeated string args"),
        *("int32 maxCPU", "int32 maxMemory", "int32 maxIOBPS"),
    ],
    "GetJobReq": ["string id"],
    "StopJobReq": ["string id"],
    "StopJobRes": ["string id", "string status", "string endTime", "int32 exitCode"],
    "GetJobsStreamReq": ["string id"],
    "DataChunk": ["bytes payload"],
    "Job": JOB,
    "Jobs": ["repeated Job jobs"],
}
CHUNK_BYTES = 10_000


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="old.proto", package="job_worker")
    file.syntax = "proto3"
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, text in enumerate(fields, 1):
            *label, kind, field = text.split()
            message.field.add(
                name=field,
                number=number,
                label=3 if label else 1,
                type=TYPES.get(kind, 11),
                type_name=None if kind in TYPES else f".job_worker.{kind}",
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"job_worker.{name}"))
        for name in MESSAGES
    }


OLD = _messages()


class OldJob:
    """A process, and its output so far."""

    def __init__(self, job_id: str, request: Any) -> None:
        self.output = bytearray()
        self.news = threading.Condition()
        self._stopped = False
        self._message = OLD["Job"](
            id=job_id,
            command=request.command,
            args=request.args,
            maxCPU=request.maxCPU,
            status="RUNNING",
            startTime=_now(),
        )
        self._process = subprocess.Popen(
            [request.command, *request.args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def message(self) -> Any:
        with self.news:
            return OLD["Job"].FromString(self._message.SerializeToString())

    def stop(self) -> None:
        self._stopped = True
        self._process.kill()
        self.thread.join()

    def wait_beyond(self, offset: int) -> bool:
        """False once there will be nothing there."""
        with self.news:
            self.news.wait_for(lambda: len(self.output) > offset or self._message.endTime)
            return len(self.output) > offset

    def _read(self) -> None:
        with self._process as process:
            assert isinstance(process.stdout, io.BufferedReader)
            while data := process.stdout.read1():
                with self.news:
                    self.output += data
                    self.news.notify_all()
        code = process.returncode
        with self.news:
            self._message.exitCode = max(code, -1)
            self._message.status = "COMPLETED" if code == 0 else "FAILED"
            if self._stopped:
                self._message.status = "STOPPED"
            self._message.endTime = _now()
            self.news.notify_all()


class OldServer(grpc.GenericRpcHandler):
    """Listens on a free port of the loopback interface, as long as the context."""

    def __init__(self, certs: Path) -> None:
        self.jobs: dict[str, OldJob] = {}
        self.requests: list[tuple[str, Any]] = []
        self.cut_off_after = 1 << 60  # a stream ends as if complete after so many bytes
        self._server = grpc.server(ThreadPoolExecutor(20))
        self._server.add_generic_rpc_handlers((self,))
        files = ("server-key.pem", "server-cert.pem", "ca-cert.pem")
        key, cert, ca = ((certs / name).read_bytes() for name in files)
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs.values():
            job.stop()
        self._server.stop(grace=0).wait(10)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        rpc = details.method.removeprefix("/job_worker.JobService/")
        handlers = {
            "CreateJob": ("CreateJobReq", self._create),
            "GetJob": ("GetJobReq", lambda request, context: self._job(request, context).message()),
            "StopJob": ("StopJobReq", self._stop),
            "GetJobs": ("EmptyRequest", self._list),
        }
        if rpc == "GetJobsStream":
            return grpc.unary_stream_rpc_method_handler(
                self._stream, OLD["GetJobsStreamReq"].FromString, _serialize
            )
        if rpc not in handlers:
            return None
        request, method = handlers[rpc]
        return grpc.unary_unary_rpc_method_handler(
            self._noting(rpc, method), OLD[request].FromString, _serialize
        )

    def _noting(self, rpc: str, method: Any) -> Any:
        def handle(request: Any, context: Any) -> Any:
            self.requests.append((rpc, request))
            return method(request, context)

        return handle

    def _create(self, request: Any, context: Any) -> Any:
        job_id = str(len(self.jobs) + 1)
        self.jobs[job_id] = OldJob(job_id, request)
        return self.jobs[job_id].message()

    def _job(self, request: Any, context: Any) -> OldJob:
        if request.id not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such job")
        return self.jobs[request.id]

    def _stop(self, request: Any, context: Any) -> Any:
        job = self._job(request, context)
        if job.message().endTime:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the job has ended")
        job.stop()
        message = job.message()
        return OLD["StopJobRes"](id=message.id, status=message.status, endTime=message.endTime)

    def _list(self, request: Any, context: Any) -> Any:
        return OLD["Jobs"](jobs=[job.message() for job in self.jobs.values()])

    def _stream(self, request: Any, context: Any) -> Iterator[Any]:
        job = self._job(request, context)
        offset = 0
        while offset < self.cut_off_after and job.wait_beyond(offset):
            payload = bytes(job.output[offset : offset + CHUNK_BYTES])
            offset += len(payload)
            yield OLD["DataChunk"](payload=payload)


def _serialize(message: Any) -> bytes:
    data = message.SerializeToString()
    assert isinstance(data, bytes)
    return data


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
