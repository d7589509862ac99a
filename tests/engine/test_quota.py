"""What a client's running jobs take, and when it may have no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker import job as transition
from jobworker.engine.quota import Ledger
from jobworker.errors import QuotaError
from jobworker.job import Job, JobSpec, Limits, Quota

THERE = {"cpu": "", "memory": ""}


def job(job_id: int, cpu: int = 0, memory: int = 0) -> Job:
    return transition.created(job_id, JobSpec("/bin/true", limits=Limits(cpu, memory)), 1)


def test_without_quotas_all_is_allowed() -> None:
    ledger = Ledger("alice")
    for job_id in range(100):
        ledger.check(Quota(), Limits(), THERE)
        ledger.take_create(0, 0)
        ledger.open(job(job_id, 1000, 1000))


def test_each_quota_names_itself_its_value_and_what_is_used() -> None:
    ledger = Ledger("alice")
    ledger.open(job(1, 100, 64))
    ledger.open(job(2, 50, 0))
    for quota, says in (
        (Quota(running_jobs=2), "the quota running_jobs of 'alice' is 2: 2 of its jobs"),
        (
            Quota(total_cpu=200),
            "total_cpu of 'alice' is 200 %: its running jobs take 150 %, .* would take 51 more",
        ),
        (
            Quota(total_memory=64),
            "the quota total_memory of 'alice' is 64 MiB.*take 64 MiB.*1 more",
        ),
    ):
        with pytest.raises(QuotaError, match=says):
            ledger.check(quota, Limits(51, 1), THERE)
    ledger.check(Quota(3, 201, 65), Limits(51, 1), THERE)


def test_a_job_without_a_limit_cannot_count() -> None:
    with pytest.raises(QuotaError, match=r"total_cpu.*no limit that could count; give it one"):
        Ledger("alice").check(Quota(total_cpu=100), Limits(0, 10), THERE)
    with pytest.raises(QuotaError, match="total_memory"):
        Ledger("alice").check(Quota(total_memory=100), Limits(10, 0), THERE)


def test_a_machine_that_can_hold_no_limit() -> None:
    """To ask for a limit would be of no use."""
    lacks = THERE | {"memory": "bound to cgroup v1"}
    says = "this machine can hold no job to a limit that could count: bound to cgroup v1; use"
    for limits in (Limits(10, 0), Limits(10, 10)):
        with pytest.raises(QuotaError, match=says):
            Ledger("alice").check(Quota(total_memory=100), limits, lacks)
    Ledger("alice").check(Quota(total_cpu=100), Limits(10, 0), lacks)


def test_what_has_ended_no_longer_counts() -> None:
    ledger = Ledger("alice")
    jobs = [job(job_id, job_id, 2 * job_id) for job_id in range(1, 5)]
    for each in jobs:
        ledger.open(each)
    assert (list(ledger.job_ids), ledger.cpu_percent, ledger.memory_mib) == ([1, 2, 3, 4], 10, 20)
    assert not ledger.is_idle(0)
    for each in jobs[::2]:
        ledger.close(each)
    assert (list(ledger.job_ids), ledger.cpu_percent, ledger.memory_mib) == ([2, 4], 6, 12)
    for each in jobs[1::2]:
        ledger.close(each)
    assert (ledger.cpu_percent, ledger.memory_mib) == (0, 0)
    assert ledger.is_idle(0)


def test_creates_a_second() -> None:
    ledger = Ledger("alice")
    for _ in range(5):
        ledger.take_create(5, 100.0)
    with pytest.raises(QuotaError, match=r"creates_per_second of 'alice' is 5.*again in 0\.200 s"):
        ledger.take_create(5, 100.0)
    ledger.take_create(5, 100.21)
    with pytest.raises(QuotaError):
        ledger.take_create(5, 100.21)
    assert not ledger.is_idle(100.21)
    assert ledger.is_idle(102)


def test_less_than_one_create_a_second() -> None:
    ledger = Ledger("alice")
    ledger.take_create(0.1, 100.0)
    with pytest.raises(QuotaError, match=r"is 0\.1.*again in 5"):
        ledger.take_create(0.1, 105.0)
    ledger.take_create(0.1, 110.1)


def test_creates_that_are_raised_hold_at_once() -> None:
    ledger = Ledger("alice")
    ledger.take_create(0.01, 1000.0)
    with pytest.raises(QuotaError, match=r"is 100.*again in 0\.010 s"):
        ledger.take_create(100, 1000.0)
    for _ in range(50):
        ledger.take_create(100, 1000.5)
    ledger.take_create(0.01, 1100.5)


@given(
    per_second=st.floats(0.1, 1000),
    pauses=st.lists(st.floats(0, 3), min_size=1, max_size=200),
)
def test_never_more_than_the_bucket_holds(per_second: float, pauses: list[float]) -> None:
    ledger, now, taken = Ledger("alice"), 1000.0, 0
    for pause in pauses:
        now += pause
        try:
            ledger.take_create(per_second, now)
        except QuotaError:
            continue
        taken += 1
    assert taken <= max(1.0, per_second) + (now - 1000.0) * per_second + 1e-3
