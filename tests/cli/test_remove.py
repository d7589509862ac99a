"""rm and prune: jobs are forgotten, and only those that were meant."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from cli.program import Program
from client.old_server import OldServer
from functional.server import Server


@pytest.fixture
def alone(jobworker: Program, start_server: Callable[..., Server]) -> Program:
    """With a server of its own, whose jobs are all that a test has made."""
    return Program(
        jobworker.folder, **jobworker.environ | {"JOB_WORKER_SERVER": start_server().address}
    )


@pytest.fixture
def old(jobworker: Program, certificates: Path) -> Iterator[Program]:
    with OldServer(certificates) as server:
        yield Program(jobworker.folder, **jobworker.environ | {"JOB_WORKER_SERVER": server.address})


def ended_job(program: Program, *words: str) -> str:
    job_id = program.create(*(words or ("true",)))
    program("wait", job_id)
    return job_id


def ids_of(program: Program) -> list[str]:
    return [str(job["id"]) for job in program.json("list")]


# rm


def test_rm(jobworker: Program) -> None:
    first, second = ended_job(jobworker), ended_job(jobworker, "echo", "x")
    answer = jobworker("rm", first, second, first)
    assert answer.stdout == f"Job removed: ID: {first}\nJob removed: ID: {second}\n"
    assert (answer.returncode, answer.stderr) == (0, "")
    assert jobworker("stream", second).returncode == 3


def test_one_that_cannot_be_removed_does_not_keep_the_others(jobworker: Program) -> None:
    running, ended = jobworker.create("sleep", "60"), ended_job(jobworker)
    answer = jobworker("rm", running, "999999", ended)
    assert (answer.returncode, answer.stdout) == (1, f"Job removed: ID: {ended}\n")
    first, second = answer.stderr.splitlines()
    told = f"job {running} is RUNNING: cannot delete it; stop it first (`jobworker stop`)"
    assert first == f"jobworker: {told}"
    assert second.startswith("jobworker: there is no job '999999'")
    assert jobworker("rm", "999999", running).returncode == 3
    jobworker("stop", running)
    assert jobworker.json("rm", running) == {"removed": [int(running)]}


def test_rm_at_an_old_server(old: Program) -> None:
    old("create", "/bin/true")
    answer = old("rm", "1")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert re.fullmatch(r"jobworker: [^\n]*too old for DeleteJob\n", answer.stderr)


# prune


def test_prune_what_is_old(alone: Program) -> None:
    old_ones = [ended_job(alone), ended_job(alone, "false")]
    last_ended = datetime.fromisoformat(alone.json("get", old_ones[1])["ended"]).timestamp()
    time.sleep(4)  # more than the program ever takes to start
    young = ended_job(alone)
    running = alone.create("sleep", "60")
    assert alone("prune", "--older-than", "1h").stdout == "Jobs removed: 0\n"
    age = f"{time.time() - last_ended - 0.1:.1f}s"
    assert alone.json("prune", "--older-than", age) == {"removed": list(map(int, old_ones))}
    assert ids_of(alone) == [running, young]
    assert alone("prune", "--older-than", "0").stdout == "Jobs removed: 1\n"
    assert ids_of(alone) == [running]


def test_prune_by_status(alone: Program) -> None:
    ended_job(alone)
    failed = ended_job(alone, "false")
    stopped = alone.create("sleep", "60")
    alone("stop", stopped)
    answer = alone("prune", "--older-than", "0", "--status", "completed", "--status", "FAILED")
    assert answer.stdout == "Jobs removed: 2\n"
    assert ids_of(alone) == [stopped]
    assert alone("get", failed).returncode == 3


def test_it_asks_on_a_terminal(alone: Program) -> None:
    for _ in range(3):
        ended_job(alone)
    with alone.on_terminal("prune", "--older-than", "0") as terminal:
        terminal.wait_shown(r"Remove 3 jobs, .*\[y/N\]")
        terminal.press("n\n")
        assert terminal.wait() == 1
        assert "nothing was removed" in terminal.shown
    assert len(ids_of(alone)) == 3
    with alone.on_terminal("prune", "--older-than", "0") as terminal:
        terminal.wait_shown("Remove 3 jobs")
        terminal.press("\x04")
        assert terminal.wait() == 130
    with alone.on_terminal("prune", "--older-than", "0") as terminal:
        terminal.wait_shown("Remove 3 jobs")
        terminal.press("y\n")
        terminal.wait_shown(r"\[\.+\] 0 of 3")
        assert terminal.wait() == 0
        assert terminal.shown.endswith("Jobs removed: 3\n")
    assert ids_of(alone) == []
    assert "Remove" not in alone.screen("prune", "--older-than", "0")
    ended_job(alone)
    assert "Remove" not in alone.screen("prune", "--older-than", "0", "--yes")
    assert ids_of(alone) == []


@pytest.mark.parametrize(
    "words",
    [[], ["--older-than", "yesterday"], ["--older-than", "0", "--status", "RUNNING"]],
)
def test_what_is_to_go_has_to_be_said(jobworker: Program, words: list[str]) -> None:
    assert jobworker("prune", *words).returncode == 2


def test_prune_at_an_old_server(old: Program) -> None:
    old("create", "/bin/true")
    old("wait", "1")
    answer = old("prune", "--older-than", "0")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "too old for DeleteJob" in answer.stderr
