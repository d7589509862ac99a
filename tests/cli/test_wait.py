"""Waiting for jobs."""

from __future__ import annotations

import subprocess

from cli.program import Program


def test_jobs_are_told_as_they_end(jobworker: Program) -> None:
    slow, fast = jobworker.create("sleep", "60"), jobworker.create("sh", "-c", "exit 3")
    with jobworker.start("wait", slow, fast, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(f"Job {fast}: FAILED (exit-3) after".encode())
        jobworker("stop", slow)
        assert process.stdout.read().startswith(f"Job {slow}: STOPPED (SIGTERM) after".encode())
        assert process.wait(30) == 6


def test_all_went_well(jobworker: Program) -> None:
    ids = [jobworker.create("true") for _ in range(3)]
    answer = jobworker("wait", *ids, ids[0])
    assert (answer.returncode, answer.stdout.count("COMPLETED"), answer.stderr) == (0, 3, "")


def test_as_json_in_the_order_given(jobworker: Program) -> None:
    ids = [jobworker.create("true") for _ in range(3)][::-1]
    assert [str(job["id"]) for job in jobworker.json("wait", *ids)] == ids


def test_the_time_is_over(jobworker: Program) -> None:
    slow, fast = jobworker.create("sleep", "60"), jobworker.create("true")
    answer = jobworker("wait", slow, fast, "--timeout", "0.3")
    assert answer.returncode == 124
    assert f"Job {fast}: COMPLETED" in answer.stdout
    assert "1 of 2 still runs" in answer.stderr
    jobworker("stop", slow)


def test_an_unknown_job_among_them(jobworker: Program) -> None:
    """Known at once, not when the others have ended."""
    slow = jobworker.create("sleep", "60")
    assert jobworker("wait", slow, "999999").returncode == 3
    jobworker("stop", slow)


def test_progress_on_a_terminal(jobworker: Program) -> None:
    slow, fast = jobworker.create("sleep", "60"), jobworker.create("true")
    with jobworker.on_terminal("wait", slow, fast) as terminal:
        terminal.wait_shown(f"1 of 2 ended; waiting for {slow}")
        jobworker("stop", slow)
        terminal.wait()
        assert terminal.shown.splitlines()[-1].startswith(f"Job {slow}: \x1b[33mSTOPPED")


def test_ctrl_c_ends_it_and_not_the_jobs(jobworker: Program) -> None:
    job_id = jobworker.create("sleep", "60")
    with jobworker.on_terminal("wait", job_id) as terminal:
        terminal.wait_shown("waiting for")
        terminal.press("\x03")
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.shown
    assert jobworker.json("stop", job_id)["status"] == "STOPPED"
