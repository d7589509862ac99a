"""What is done with each job of an earlier server."""

from __future__ import annotations

import pytest

from jobworker.engine.jobinit import Exited, Failed, Held, Started
from jobworker.engine.recovery import Decision, decide
from jobworker.job import Job, JobSpec, Status

STARTED = Started(7, 100, -1, 3, 4, 0)
EXITED = Exited(7, 0, 0, 0, 0, 0)
FAILED = Failed(7, "exec", 2, 0, 0, 0)


def record(status: Status) -> Job:
    return Job(7, JobSpec("/bin/true"), status, created_ns=1)


NEW, RUNNING = record(Status.INITIALIZING), record(Status.RUNNING)


@pytest.mark.parametrize(
    ("job", "held", "decision"),
    [
        (NEW, Held(7), Decision.AWAIT),
        (NEW, Held(7, STARTED), Decision.FOLLOW),
        (RUNNING, Held(7, STARTED), Decision.FOLLOW),
        (RUNNING, Held(7, STARTED, EXITED), Decision.FOLLOW),
        (NEW, Held(7, ending=FAILED), Decision.NEVER_RAN),
        (RUNNING, None, Decision.LOST),
        (record(Status.COMPLETED), Held(7, STARTED, EXITED), Decision.RECORDED),
        (record(Status.STOPPED), None, Decision.RECORDED),
        (None, Held(7, STARTED), Decision.STRANGER),
        (None, Held(7), Decision.STRANGER),
    ],
)
@pytest.mark.parametrize("is_jobinit_there", [True, False])
def test_decisions(
    job: Job | None, held: Held | None, decision: Decision, is_jobinit_there: bool
) -> None:
    assert decide(job, held, is_jobinit_there=is_jobinit_there) is decision


def test_only_a_jobinit_that_is_there_proves_that_a_job_never_ran() -> None:
    assert decide(NEW, None, is_jobinit_there=True) is Decision.NEVER_ASKED
    assert decide(NEW, None, is_jobinit_there=False) is Decision.LOST
