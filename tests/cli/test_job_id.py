"""Ids of jobs, and how a shell completes them."""

from __future__ import annotations

import time

import pytest

from cli.program import Program


def completed(program: Program, line: str, **environ: str) -> list[tuple[str, str]]:
    """What zsh is offered after `line`: words and their help."""
    answer = program(
        _JOBWORKER_COMPLETE="zsh_complete",
        COMP_WORDS=line,
        COMP_CWORD=str(len(line.split()) - (not line.endswith(" "))),
        **environ,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    _, words, helps = (answer.stdout.splitlines()[start::3] for start in range(3))
    return list(zip(words, helps, strict=True))


def test_ids_are_asked_for(jobworker: Program) -> None:
    job_id = jobworker.create("echo", "hello")
    jobworker("wait", job_id)
    assert (job_id, "COMPLETED echo hello") in completed(jobworker, "jobworker get ")
    assert job_id in dict(completed(jobworker, f"jobworker stream {job_id}"))


@pytest.mark.parametrize("job_id", ["x", "²", "١", "-1", "9" * 20, "9" * 5000])
def test_what_is_no_id(jobworker: Program, job_id: str) -> None:
    for command in ("get", "wait", "rm"):
        answer = jobworker(command, "--", job_id)
        assert answer.returncode == 2
        assert "`jobworker list` shows them" in answer.stderr


def test_only_what_runs_can_be_stopped(jobworker: Program) -> None:
    running, ended = jobworker.create("sleep", "60"), jobworker.create("true")
    jobworker("wait", ended)
    offered = dict(completed(jobworker, "jobworker stop "))
    assert running in offered
    assert ended not in offered
    jobworker("stop", running)


def test_the_server_that_the_flags_choose(jobworker: Program) -> None:
    job_id = jobworker.create("true")
    server = jobworker.environ.pop("JOB_WORKER_SERVER")
    assert completed(jobworker, "jobworker get ") == []
    assert job_id in dict(completed(jobworker, f"jobworker -s {server} get "))
    assert job_id in dict(completed(jobworker, f"jobworker get -s {server} "))


@pytest.mark.parametrize("address", ["localhost:1", "192.0.2.1:1", "no-such-name"])
def test_a_server_that_does_not_answer(jobworker: Program, address: str) -> None:
    """Silence, and soon."""
    started = time.monotonic()
    assert completed(jobworker, "jobworker get ", JOB_WORKER_SERVER=address) == []
    assert time.monotonic() - started < 8
