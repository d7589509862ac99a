"""Many jobs in few requests: how they are put together, and what became of each.

Nothing here does I/O: `Bulk` says what to ask for and takes what came, and both clients carry
one through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Unpack

import grpc

from jobworker.client import calls
from jobworker.client.calls import Call, CreateOptions
from jobworker.client.failures import ERRORS, printable
from jobworker.errors import (
    CallError,
    DeadlineError,
    ForbiddenError,
    RejectedError,
    UnreachableError,
    UnsupportedError,
)
from jobworker.job import Job, Status
from jobworker.pb import job_worker_pb2 as pb

RPC = "CreateJobs"

# A server takes 4 MiB a request, and has to answer all of one in the time of one call.
LARGEST_REQUEST_BYTES = (4 << 20) - 1024
MOST_JOBS = 500
MOST_FIELDS = 60_000  # of all jobs in one request; servers take 70,000

CODES = {code.value[0]: code for code in grpc.StatusCode}

# Errors that the next job would meet as well.
LASTING = (UnreachableError, DeadlineError, ForbiddenError)


@dataclass(slots=True, init=False)
class Spec:
    """One job to be: what `create` takes, for `create_many`."""

    command: str
    args: tuple[str, ...]
    options: CreateOptions

    def __init__(self, command: str, *args: str, **options: Unpack[CreateOptions]) -> None:
        self.command = command
        self.args = args
        self.options = options


@dataclass(frozen=True, slots=True)
class Created:
    """What became of one Spec: a job, or an error and no job.

    Where an error that `may_have_happened` ended the request of many, there may be a job all the
    same, whose id nobody knows.
    """

    job_id: int | None = None
    status: Status | None = None  # RUNNING, or FAILED where a step of its start failed
    error: CallError | None = None


class Bulk:
    """A way through many creates, until it `is_over`: a client performs `request`, and hands
    on what came, to `take` or to `failed`."""

    def __init__(self, specs: Iterable[Spec]) -> None:
        self._results: list[Created] = []
        self._creates: list[tuple[int, Call[Job]]] = []  # with the place of each result
        for place, spec in enumerate(specs):
            try:
                create = calls.create(spec.command, spec.args, spec.options)
                self._creates.append((place, create))
                self._results.append(Created())
            except RejectedError as error:
                self._results.append(Created(error=error))
        self._done = 0  # of _creates
        self._asked = 0  # how many of them the request under way is about
        self._is_one_by_one = False

    @property
    def is_over(self) -> bool:
        return self._done == len(self._creates)

    @property
    def results(self) -> list[Created]:
        """In the order of the specs."""
        return self._results

    def request(self) -> Call[list[Created]]:
        if self._is_one_by_one:
            return self._single_request()
        requests = list(self._fitting())
        self._asked = len(requests)
        return Call(RPC, pb.CreateJobsReq(jobs=requests), self._read)

    def take(self, results: list[Created]) -> None:
        for result in results:
            place, _ = self._creates[self._done]
            self._results[place] = result
            self._done += 1

    def failed(self, error: CallError) -> None:
        """Raises the error where it hit the first request. Later it is the result of all that are
        left, so that what was made before stays known. Of which there may be jobs all the same,
        `Created` says."""
        if isinstance(error, UnsupportedError) and error.rpc == RPC:
            self._is_one_by_one = True
        elif self._is_one_by_one and not isinstance(error, LASTING):
            self.take([Created(error=error)])
        elif self._done:
            self.take([Created(error=error)] * (len(self._creates) - self._done))
        else:
            raise error

    def _single_request(self) -> Call[list[Created]]:
        """For a server without CreateJobs."""
        _, create = self._creates[self._done]
        return Call(create.rpc, create.request, _read_single, create.needs)

    def _fitting(self) -> Iterator[pb.CreateJobReq]:
        """The next that one request may hold; never none, as each is far below the limit."""
        left_bytes, left_fields = LARGEST_REQUEST_BYTES, MOST_FIELDS
        for number, (_, create) in enumerate(self._creates[self._done : self._done + MOST_JOBS]):
            request = create.request
            assert isinstance(request, pb.CreateJobReq)
            left_bytes -= request.ByteSize() + 8  # with its tag and length
            left_fields -= 32 + len(request.args) + len(request.environment)
            left_fields -= 8 * len(request.binds)
            if number and min(left_bytes, left_fields) < 0:
                return
            yield request

    def _read(self, answer: bytes) -> list[Created]:
        results = pb.CreateJobsRes.FromString(answer).results
        if len(results) != self._asked:
            raise ValueError(f"{len(results)} results for {self._asked} jobs")
        return [_created(result) for result in results]


def _read_single(answer: bytes) -> list[Created]:
    job = calls.job_from(pb.Job.FromString(answer))
    return [Created(job.id, job.status)]


def _created(result: pb.CreateJobsRes.Result) -> Created:
    if result.id:
        return Created(calls.id_from(result.id), Status(result.status))
    code = CODES.get(result.code, grpc.StatusCode.UNKNOWN)
    return Created(
        error=ERRORS.get(code, CallError)("CreateJob", code.name, printable(result.error))
    )
