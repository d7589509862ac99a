"""A real server in a process of its own, and a bare client of its protocol."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc

from jobworker.pb import job_worker_pb2 as pb
from slow_links import slow_way

READY_SECONDS = 20
END_SECONDS = 30
CALL_SECONDS = 30
DEADLINE_SECONDS = 30

ANSWERS: dict[str, Any] = {
    "CreateJob": pb.Job,
    "GetJob": pb.Job,
    "StopJob": pb.StopJobRes,
    "GetJobs": pb.Jobs,
    "ListJobs": pb.ListJobsRes,
    "GetServerInfo": pb.ServerInfo,
    "CreateJobs": pb.CreateJobsRes,
    "DeleteJob": pb.DeleteJobRes,
}


def slow_path(folder: Path) -> str:
    """A PATH by way of a new folder, in which the look for a command takes some 20 ms."""
    return ":".join([slow_way(folder)] * 4 + ["/bin"])


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)  # what asks may be a call, which is not to be a burden itself


class Server:
    """`jobworker serve` on a free port of the loopback interface, until `stop`."""

    def __init__(
        self,
        folder: Path,
        certs: Path,
        *,
        launcher: Sequence[str] = (),
        open_files: int = 0,
        port: int = 0,
        **settings: str,
    ) -> None:
        """launcher: a command that becomes the server's, which it is given as arguments.
        open_files: its hard limit on descriptors, 0: ours. port: 0: any free one.
        settings: JOB_WORKER_<NAME>, by name."""
        self.state = folder / "state"
        self.certs = certs
        self._log_path = folder / "server.log"
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "SECRET_OF_THE_SERVER": "do not pass on",
            "JOB_WORKER_ADDR": f"127.0.0.1:{port}",
            "JOB_WORKER_CERT_PATH": str(certs),
            "JOB_WORKER_STATE_DIR": str(self.state),
            "JOB_WORKER_DISK_RESERVE": "0",  # the machine's disk may be small
            "JOB_WORKER_STOP_JOBS": "yes",  # so that no test leaves any
            # Where the subject is not isolation itself, jobs write into folders of the tests,
            # and show the machine's own process ids.
            "JOB_WORKER_PROFILE": "none",
        }
        environ |= {f"JOB_WORKER_{name}": value for name, value in settings.items()}
        self.keeps_jobs = environ["JOB_WORKER_STOP_JOBS"] == "no"
        command = [*launcher, sys.executable, "-P", "-m", "jobworker", "serve"]
        if open_files:
            command = ["prlimit", f"--nofile={open_files}:{open_files}", *command]
        started = time.monotonic()
        # A file and no pipe: jobinit shares it, and outlives the server.
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command, env=environ, cwd=folder, stdin=subprocess.DEVNULL, stderr=log
            )
        self.port = self._wait_ready()
        self.ready_seconds = time.monotonic() - started

    @property
    def log(self) -> str:
        """Its own lines, and not those of a server before it in the same folder."""
        return self._log_path.read_bytes()[self._log_start :].decode()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def connect(self, name: str = "client") -> Iterator[Client]:
        """With the certificate `<name>-cert.pem`: client is the admin's, viewer a viewer's."""
        with channel(self.address, self.certs, name) as open_channel:
            yield Client(open_channel)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(END_SECONDS)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def connections(self) -> int:
        """Established ones, with clients."""
        return len(self._unsent())

    def unsent_bytes(self) -> int:
        """What of its answers the kernel still has, of all connections."""
        return sum(self._unsent())

    def _unsent(self) -> list[int]:
        """Of each established connection."""
        tables = (Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
        lines = [line for table in tables for line in table.splitlines()[1:]]
        ours = f":{self.port:04X}"
        return [
            int(fields[4].partition(":")[0], 16)
            for fields in map(str.split, lines)
            if fields[1].endswith(ours) and fields[3] == "01"
        ]

    def rss_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self) -> int:
        """The most of it that there ever was."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10

    def written_bytes(self) -> int:
        """To any file."""
        counters = Path(f"/proc/{self.process.pid}/io").read_text()
        return int(re.findall(r"wchar: (\d+)", counters)[0])

    def jobinit_pid(self) -> int:
        """The one that starts jobs now."""
        return int(re.findall(r"jobinit is process (\d+)", self.log)[-1])

    def _wait_ready(self) -> int:
        deadline = time.monotonic() + READY_SECONDS
        while not (found := re.search(r"listening on \S+:(\d+)", self.log)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"the server did not get ready: {self.log}")
            time.sleep(0.005)
        return int(found[1])


def channel(address: str, certs: Path, name: str) -> grpc.Channel:
    """With a client's certificate; with none, where its files are empty."""
    credentials = grpc.ssl_channel_credentials(
        (certs / "ca-cert.pem").read_bytes(),
        (certs / f"{name}-key.pem").read_bytes() or None,
        (certs / f"{name}-cert.pem").read_bytes() or None,
    )
    options = [
        ("grpc.ssl_target_name_override", "job-worker"),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.secure_channel(address, credentials, options)


class Stream(Protocol):
    """The answer of a call that streams."""

    def __iter__(self) -> Iterator[pb.DataChunk]: ...
    def __next__(self) -> pb.DataChunk: ...
    def cancel(self) -> bool: ...


class Client:
    """Calls by name; no comfort, so that the tests see what is on the wire."""

    def __init__(self, open_channel: grpc.Channel) -> None:
        self._channel = open_channel

    def call(self, rpc: str, request: Any) -> Any:
        return self._method(rpc)(request, timeout=CALL_SECONDS)

    def call_soon(self, rpc: str, request: Any) -> Any:
        """A future of the answer."""
        return self._method(rpc).future(request, timeout=CALL_SECONDS)

    def _method(self, rpc: str) -> Any:
        return self._channel.unary_unary(
            f"/job_worker.JobService/{rpc}",
            lambda message: message.SerializeToString(),
            ANSWERS[rpc].FromString,
        )

    def create(self, command: str, *args: str, **fields: Any) -> pb.Job:
        job: pb.Job = self.call("CreateJob", pb.CreateJobReq(command=command, args=args, **fields))
        return job

    def create_soon(self, command: str, *args: str, **fields: Any) -> Any:
        """A future of `create`."""
        request = pb.CreateJobReq(command=command, args=args, **fields)
        return self.call_soon("CreateJob", request)

    def stop_soon(self, job_id: str, **fields: Any) -> Any:
        """A future of `stop`."""
        request = pb.StopJobReq(id=job_id, **({"grace_milliseconds": 60_000} | fields))
        return self.call_soon("StopJob", request)

    def shell(self, script: str, **fields: Any) -> pb.Job:
        return self.create("sh", "-c", script, **fields)

    def get(self, job_id: str) -> pb.Job:
        job: pb.Job = self.call("GetJob", pb.GetJobReq(id=job_id))
        return job

    def stop(self, job_id: str, **fields: Any) -> pb.StopJobRes:
        stopped: pb.StopJobRes = self.call("StopJob", pb.StopJobReq(id=job_id, **fields))
        return stopped

    def jobs(self) -> list[pb.Job]:
        return list(self.call("GetJobs", pb.EmptyRequest()).jobs)

    def info(self) -> pb.ServerInfo:
        info: pb.ServerInfo = self.call("GetServerInfo", pb.EmptyRequest())
        return info

    def stream(self, job_id: str, timeout: float = 60, **fields: Any) -> Stream:
        method: Callable[..., Stream] = self._channel.unary_stream(
            "/job_worker.JobService/GetJobsStream",
            lambda message: message.SerializeToString(),
            pb.DataChunk.FromString,
        )
        return method(pb.GetJobsStreamReq(id=job_id, **fields), timeout=timeout)

    def output(self, job_id: str, **fields: Any) -> bytes:
        return b"".join(chunk.payload for chunk in self.stream(job_id, **fields))

    def wait(self, job_id: str) -> pb.Job:
        """The job once it has ended: its stream ends then, with the ending in it."""
        *_, last = self.stream(job_id)
        return last.ending

    def run(self, script: str, **fields: Any) -> tuple[pb.Job, bytes]:
        """A shell script to its end, and its output."""
        job = self.shell(script, **fields)
        chunks = list(self.stream(job.id))
        return chunks[-1].ending, b"".join(chunk.payload for chunk in chunks)
