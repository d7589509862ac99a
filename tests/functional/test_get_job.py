"""GetJob: the record of a job, running and ended."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import grpc
import pytest

from functional.server import Client


def test_a_running_job(client: Client) -> None:
    created = client.shell("echo x; echo yz >&2; sleep 60")
    next(client.stream(created.id))
    job = client.get(created.id)
    assert (job.status, job.endTime, job.cause) == ("RUNNING", "", 0)
    assert not job.HasField("accounting")
    client.stop(job.id, grace_milliseconds=0)
    ended = client.get(job.id)
    assert (ended.stdout_bytes, ended.stderr_bytes) == (2, 3)


def test_times(client: Client) -> None:
    job, _ = client.run("sleep 0.2")
    assert 0.2e9 <= job.end_time_ns - job.start_time_ns < 10e9
    assert job.created_time_ns <= job.start_time_ns
    for text, nanoseconds in ((job.startTime, job.start_time_ns), (job.endTime, job.end_time_ns)):
        assert datetime.datetime.fromisoformat(text).timestamp() == pytest.approx(
            nanoseconds / 1e9, abs=1e-3
        )


def test_accounting(client: Client) -> None:
    job, _ = client.run("i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done")
    used = job.accounting.cpu_user_us + job.accounting.cpu_system_us
    assert 10_000 < used < (job.end_time_ns - job.start_time_ns) / 1000 * 1.5
    assert job.accounting.memory_peak_bytes > 100_000


def test_what_was_asked_for_is_in_the_record(client: Client) -> None:
    job = client.create(
        "true", "a", "b", name="n", environment={"K": "v"}, working_directory="/tmp"
    )
    again = client.get(job.id)
    assert list(again.args) == ["a", "b"]
    assert (again.name, dict(again.environment), again.working_directory) == (
        "n",
        {"K": "v"},
        "/tmp",
    )


@pytest.mark.parametrize("job_id", ["999999999", "", "abc", "-1", "0", "1; drop table jobs"])
def test_an_unknown_job(client: Client, job_id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.get(job_id)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert repr(job_id) in (caught.value.details() or "")


def test_an_ending_stays_however_near_to_it_the_running_was_stored(
    client: Client,
) -> None:
    """That a job runs is stored some 200 ms after its start; these end at about that time."""

    def run_some(_: int) -> list[str]:
        return [client.create("sleep", f"{0.18 + number * 0.0005}").id for number in range(60)]

    with ThreadPoolExecutor(12) as threads:
        ids = list(chain.from_iterable(threads.map(run_some, range(12))))
    for job_id in ids:
        client.wait(job_id)
    assert [job_id for job_id in ids if client.get(job_id).status != "COMPLETED"] == []
