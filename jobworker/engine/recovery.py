"""What a server does with the jobs of the one before it: decided for each, from its record and
from what jobinit holds of it. Pure; the manager carries it out.

A job without a record that has not ended is not among them: `RECORDED` and `STRANGER` are for
what jobinit holds of such. Where a database was damaged, the manager first makes new records of
those that have started, so that they go on.
"""

from __future__ import annotations

import enum

from jobworker.engine.jobinit import Failed, Held
from jobworker.job import Job, Status


class Decision(enum.Enum):
    """What to do with one job."""

    FOLLOW = "it runs, or has run: its output and its ending go on from where they are"
    AWAIT = "jobinit is starting it: ask again, which starts nothing twice"
    NEVER_RAN = "jobinit could not start it"
    NEVER_ASKED = "its server ended before it asked jobinit to start it"
    LOST = "nobody is left to tell how it ended, or whether it ran"
    RECORDED = "its ending is recorded: jobinit need not hold it any longer"
    STRANGER = "nobody knows it: it is killed"


def decide(record: Job | None, held: Held | None, *, is_jobinit_there: bool) -> Decision:
    """record: None where there is none. held: None where no jobinit holds it.
    is_jobinit_there: the jobinit of the earlier server is, so what it does not hold never ran."""
    if record is None:
        return Decision.STRANGER
    if record.is_ended:
        return Decision.RECORDED
    if held is None:
        is_new = record.status is Status.INITIALIZING
        return Decision.NEVER_ASKED if is_new and is_jobinit_there else Decision.LOST
    if held.started is not None:
        return Decision.FOLLOW
    if isinstance(held.ending, Failed):
        return Decision.NEVER_RAN
    return Decision.AWAIT
