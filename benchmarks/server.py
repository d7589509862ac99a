"""The server under test, in a process of its own, and the folder that all of it lives in."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jobworker import certs

HERE = Path(__file__).parent
READY_SECONDS = 60
END_SECONDS = 120
PROCESS_CLOCK = 2  # CPUCLOCK_SCHED of include/linux/posix-timers_types.h


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder with certificates, removed at the end. On a disk, as the logs of jobs are:
    /tmp may be memory; and where a confined job has none of its own, as in /var/tmp. BENCH_DIR
    names another place."""
    base = os.environ.get("BENCH_DIR", "/var/lib" if os.geteuid() == 0 else "/var/tmp")
    folder = Path(tempfile.mkdtemp(prefix="jobworker-bench-", dir=base))
    try:
        certs.make_all(folder / "certs")
        # For what jobs use: they run as an unprivileged user.
        folder.chmod(0o711)
        (folder / "jobs").mkdir(mode=0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_fifo(folder: Path, name: str) -> Path:
    """Jobs may open it. folder: of `workplace`."""
    path = folder / "jobs" / name
    os.mkfifo(path)
    path.chmod(0o666)
    return path


def compile_program(folder: Path, name: str) -> Path:
    """NAME.c of this folder, as a program that jobs may run. folder: of `workplace`."""
    program = folder / "jobs" / name
    subprocess.run(["gcc", "-O2", "-o", program, HERE / f"{name}.c"], check=True)
    return program


class Process:
    """What a running process uses."""

    def __init__(self, pid: int | str) -> None:
        """pid: may be `self`."""
        self.pid = pid

    def rss_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1])

    def cpu_seconds(self) -> float:
        """Of all its threads, as the scheduler counts: /proc/PID/stat has ticks of 10 ms."""
        pid = os.getpid() if self.pid == "self" else int(self.pid)
        # What clock_getcpuclockid(3) makes of the pid, and Python has no name for.
        return time.clock_gettime(~pid << 3 | PROCESS_CLOCK)


class Server(Process):
    """`jobworker serve` on a free port, and its jobinit."""

    def __init__(self, folder: Path, **settings: str) -> None:
        """folder: of `workplace`; a second server in it takes over from the first.
        settings: JOB_WORKER_<NAME>, by name."""
        self.certs = folder / "certs"
        self.state = folder / "state"
        environ = {
            **os.environ,
            "JOB_WORKER_ADDR": "127.0.0.1:0",
            "JOB_WORKER_CERT_PATH": str(self.certs),
            "JOB_WORKER_STATE_DIR": str(self.state),
            "JOB_WORKER_STOP_JOBS": "yes",
            "JOB_WORKER_STOP_GRACE": "1s",
            "JOB_WORKER_LOG_LEVEL": "info",
        }
        environ |= {f"JOB_WORKER_{name}": value for name, value in settings.items()}
        command = [sys.executable, "-P", "-m", "jobworker", "serve"]
        self._log_path = folder / "server.log"
        started = time.monotonic()
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stderr=log
            )
        super().__init__(self.process.pid)
        self.address = f"127.0.0.1:{self._wait_ready()}"
        self.ready_seconds = time.monotonic() - started
        pids = re.findall(r"jobinit is process (\d+)", self._log_path.read_text())
        self.jobinit = Process(int(pids[-1]))

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(END_SECONDS)

    def _wait_ready(self) -> int:
        deadline = time.monotonic() + READY_SECONDS
        while not (
            found := re.search(r"ready: listening on \S+:(\d+)", self._log_path.read_text())
        ):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGKILL)
                raise RuntimeError(f"no server: {self._log_path.read_text()}")
            time.sleep(0.002)
        return int(found[1])


@contextlib.contextmanager
def running_server(folder: Path, **settings: str) -> Iterator[Server]:
    server = Server(folder, **settings)
    try:
        yield server
    finally:
        server.stop()
