"""A farm under fire: jobs with checkable output, readers that follow them, and a server that is
killed at random moments. What was acknowledged must be true in the end."""

from __future__ import annotations

import functools
import hashlib
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from functional.server import Client, Server
from jobworker.pb import job_worker_pb2 as pb

WORK = Path(__file__).with_name("work.py")
KINDS = ("loud", "trickle", "reopen", "children", "silent")
STREAMS = (pb.STDOUT, pb.STDERR)
RETRY_SECONDS = 0.02
PATIENCE_SECONDS = 60.0


@dataclass
class Worked:
    """One acknowledged job."""

    job_id: str
    kind: str
    exit_code: int
    pledge: Path


class Follower(threading.Thread):
    """Reads one job from its start to its ending, across all restarts, by offset."""

    def __init__(self, farm: Farm, job_id: str) -> None:
        super().__init__(daemon=True)
        self.job_id = job_id
        self.received = 0
        self.resumed = 0
        self.ending: pb.Job | None = None
        self.failure = ""
        self._farm = farm
        self._digests = {stream: hashlib.sha256() for stream in STREAMS}

    def run(self) -> None:
        try:
            while self.ending is None:
                self._farm.call(self._follow)
                self.resumed += 1
        except Exception as error:  # noqa: BLE001 told to whoever waits for us
            self.failure = f"{type(error).__name__}: {error}"

    def digests(self) -> list[str]:
        return [self._digests[stream].hexdigest() for stream in STREAMS]

    def _follow(self, client: Client) -> None:
        for chunk in client.stream(self.job_id, from_offset=self.received, timeout=600):
            if chunk.offset != self.received or chunk.lost_bytes:
                raise AssertionError(f"{chunk.offset} came after {self.received}")
            place = 0
            for run in chunk.runs:
                self._digests[run.stream].update(chunk.payload[place : place + run.length])
                place += run.length
            self.received = chunk.next_offset
            if chunk.HasField("ending"):
                self.ending = chunk.ending


@dataclass
class Farm:
    """start: makes a server on this port, after the one before it has ended."""

    start: Callable[[int], Server]
    folder: Path
    seed: int
    server: Server = field(init=False)
    jobs: list[Worked] = field(default_factory=list)
    followers: list[Follower] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.server = self.start(0)
        self._creator = threading.Thread(target=self._create_all, daemon=True)
        self._failure = ""

    def call(self, action: Callable[[Client], None]) -> None:
        """Until it was not the server's death that ended it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self.server.connect() as client:
                    action(client)
                    return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_SECONDS)

    def work(self) -> None:
        """Jobs come from now on, until `finish`."""
        self._creator.start()

    def restart(self, kill: Callable[[Server], None]) -> None:
        """After a random moment."""
        time.sleep(self.chance.uniform(0.02, 0.6))
        port = self.server.port
        kill(self.server)
        self.server = self.start(port)

    def finish(self) -> list[str]:
        """Waits for all that is under way. Returns what was wrong, a line each."""
        self._over.set()
        self._creator.join(PATIENCE_SECONDS)
        problems = [self._failure] if self._failure else []
        for follower in self.followers:
            follower.join(PATIENCE_SECONDS)
            if follower.is_alive():
                problems.append(f"job {follower.job_id}: its reader is not done")
        by_id = {follower.job_id: follower for follower in self.followers}
        for job in self.jobs:
            problems += self._check(job, by_id.get(job.job_id))
        return problems

    def _create_all(self) -> None:
        number = 0
        try:
            while not self._over.is_set():
                number += 1
                self.call(functools.partial(self._create, number))
                time.sleep(self.chance.uniform(0.02, 0.2))
        except Exception as error:  # noqa: BLE001 told by `finish`
            self._failure = f"creating: {type(error).__name__}: {error}"

    def _create(self, number: int, client: Client) -> None:
        kind = KINDS[number % len(KINDS)]
        # A create whose answer was lost has perhaps run: its next try pledges elsewhere.
        pledge = self.folder / f"pledge-{number}-{time.monotonic_ns()}"
        args = (str(WORK), kind, str(number), str(pledge))
        job = client.create(sys.executable, "-I", *args)
        if job.cause in {pb.START_FAILED, pb.LOST}:
            return  # jobinit died over it: nothing was promised
        self.jobs.append(Worked(job.id, kind, number % 200, pledge))
        if number % 2:
            follower = Follower(self, job.id)
            self.followers.append(follower)
            follower.start()

    def _check(self, job: Worked, follower: Follower | None) -> list[str]:
        about = f"job {job.job_id} ({job.kind})"
        late = Follower(self, job.job_id)
        late.run()
        ended = late.ending
        if ended is None:
            return [f"{about}: {late.failure}"]
        problems = []
        if (ended.cause, ended.exitCode) != (pb.EXITED, job.exit_code):
            problems.append(f"{about}: {ended.status}, code {ended.exitCode}, {ended.detail}")
        if not job.pledge.exists():
            return [*problems, f"{about}: did not come to its end: {ended}"]
        digests = job.pledge.read_text().split()
        if late.digests() != digests:
            problems.append(f"{about}: a late reader got something else")
        if follower and follower.digests() != digests:
            problems.append(
                f"{about}: its reader got something else ({follower.failure or 'no error'}, "
                f"resumed {follower.resumed} times)"
            )
        return problems
