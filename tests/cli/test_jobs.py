"""create, get, list and stop, in a pipe and on a terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.program import Program
from functional.server import Server
from jobworker import certs
from jobworker.cli import display, jobs
from jobworker.job import Job, JobSpec, Status

# create


def test_what_people_have_in_their_fingers(jobworker: Program) -> None:
    """The output of the first version, word for word; the other name of the program."""
    program = Path(sys.executable).with_name("job-worker-cli")
    answer = subprocess.run(
        [program, "create", "echo", "Hello, World!"],
        env=jobworker.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.fullmatch(r"Job created: ID: (\d+)\n", answer.stdout)
    assert found
    assert jobworker("stream", found[1]).stdout == "Hello, World!\n"


def test_all_after_the_command_is_the_jobs(jobworker: Program) -> None:
    words = ["echo", "-n", "--max-cpu=50", "-o", "json", "--", "--help", ""]
    for separator in ([], ["--"]):
        job = jobworker.json_of_create(*separator, *words)
        assert job["args"] == words[1:]


def test_what_a_new_job_is_told(jobworker: Program) -> None:
    script = 'echo "$A|$B|$PWD"; echo err >&2'
    answer = jobworker(
        *("create", "-o", "json", "--env", "A=1", "--env", "B=x=y", "--workdir", "/tmp"),
        *("--name", "told", "--merge-output", "sh", "-c", script),
    )
    assert answer.returncode == 0, answer.stderr
    job_id = jobworker.newest_id("--name", "told")
    assert jobworker("stream", "--stdout", job_id).stdout == "1|x=y|/tmp\nerr\n"
    job = jobworker.json("get", job_id)
    assert job["environment"] == {"A": "1", "B": "x=y"}
    assert (job["working_directory"], job["name"], job["merge_output"]) == ("/tmp", "told", True)


def test_what_a_job_reads(jobworker: Program, tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"from a file")
    job = jobworker.json_of_create("--stdin", str(tmp_path / "input"), "cat")
    assert jobworker("stream", str(job["id"])).stdout == "from a file"


def test_a_time_limit(jobworker: Program) -> None:
    job = jobworker.json_of_create("--timeout", "200ms", "sleep", "60")
    assert job["timeout_seconds"] == 0.2
    jobworker("wait", str(job["id"]))
    assert jobworker.json("get", str(job["id"]))["cause"] == "TIMED_OUT"
    assert "such as" in jobworker("create", "--timeout", "soon", "true").stderr


def test_whom_a_job_runs_as(jobworker: Program) -> None:
    job = jobworker.json_of_create("true")
    assert job["user"] and job["profile"]
    assert "user" in jobworker("create", "--user", "no-such-user", "true").stderr
    assert "profile" in jobworker("create", "--profile", "nonsense", "true").stderr


# get


def test_get_in_a_pipe(jobworker: Program) -> None:
    job_id = jobworker.create("sh", "-c", "echo out; exit 3")
    jobworker("wait", job_id)
    shown = dict(re.findall(r"^([\w ]+): +(.*)$", jobworker("get", job_id).stdout, re.MULTILINE))
    assert (shown["ID"], shown["Status"], shown["Ending"]) == (job_id, "FAILED", "exit code 3")
    assert shown["Command"].endswith("sh -c 'echo out; exit 3'")
    assert shown["Output"] == "4 B"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", shown["Started"])
    assert re.fullmatch(r"\d+ms user, \d+ms system", shown["CPU"])


def test_get_shows_how_it_may_run(jobworker: Program) -> None:
    job_id = jobworker.create("--timeout", "1.5h", "true")
    job = jobworker.json("get", job_id)
    shown = dict(re.findall(r"^([\w ]+): +(.*)$", jobworker("get", job_id).stdout, re.MULTILINE))
    assert shown["Time limit"] == "1h30m"
    assert (shown["User"], shown["Profile"]) == (job["user"], job["profile"])
    assert not {"Lost", "Output waits"} & shown.keys()


def test_get_says_why_output_waits(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(7, JobSpec("/bin/x"), Status.RUNNING, 1, output_problem="No space left on device")
    display.write_fields(jobs._fields(job))
    assert re.search(r"Output waits: +No space left on device\n", capsys.readouterr().out)


def test_get_on_a_terminal(jobworker: Program) -> None:
    job_id = jobworker.create("true")
    jobworker("wait", job_id)
    shown = jobworker.screen("get", job_id)
    assert "\x1b[32mCOMPLETED\x1b[0m" in shown
    assert re.search(r"Started:.*Z \((now|\d+(\.\d)?s ago)\)", shown)


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(jobworker: Program, environ: dict[str, str]) -> None:
    job_id = jobworker.create("true")
    for words in (["get", job_id], ["list"], ["info"]):
        assert "\x1b" not in jobworker.screen(*words, **environ)


# list


def test_list_in_a_pipe(jobworker: Program) -> None:
    first, second = (jobworker.create("--name", "piped", "sh", "-c", "exit 4") for _ in range(2))
    jobworker("wait", first, second)
    header, *rows = jobworker("list", "--name", "piped").stdout.splitlines()
    assert header.split() == ["ID", "STATUS", "ENDING", "STARTED", "TOOK", "OUTPUT", "COMMAND"]
    assert [row.split()[:3] for row in rows] == [
        [second, "FAILED", "exit-4"],
        [first, "FAILED", "exit-4"],
    ]
    assert rows[0].endswith("piped: /usr/bin/sh -c 'exit 4'") or "/bin/sh" in rows[0]


def test_list_on_a_terminal(jobworker: Program) -> None:
    job_id = jobworker.create("echo", "x" * 200)
    jobworker("wait", job_id)
    shown = re.sub(r"\x1b\[\d*m", "", jobworker.screen("list"))
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(rf"^ *{job_id}  COMPLETED  exit-0 .* echo x+…$", shown, re.MULTILINE)


def test_what_others_have_named_does_not_reach_the_terminal(jobworker: Program) -> None:
    job_id = jobworker.create("true", "\x1b[2J\nnext")
    for words in (["list"], ["get", job_id]):
        assert "\x1b[2J" not in jobworker(*words).stdout
        assert r"\x1b[2J\nnext" in jobworker(*words).stdout


def test_which_jobs_are_listed(jobworker: Program) -> None:
    ids = [jobworker.create("--name", "chosen", command) for command in ("true", "false", "true")]
    jobworker("wait", *ids)
    chosen = jobworker.json("list", "--name", "chosen", "--status", "completed")
    assert [str(job["id"]) for job in chosen] == [ids[2], ids[0]]
    both = jobworker.json(
        *("list", "--name", "chosen", "--status", "COMPLETED", "--status", "FAILED")
    )
    assert len(both) == 3


def as_client(jobworker: Program, server: Server, name: str, role: str) -> Program:
    """The same program with another certificate."""
    if not (server.certs / f"{name}-cert.pem").exists():
        certs.make_client(server.certs, name, role)
    files = {kind: str(server.certs / f"{name}-{kind}.pem") for kind in ("cert", "key")}
    return Program(
        jobworker.folder,
        **jobworker.environ | {"JOB_WORKER_CERT": files["cert"], "JOB_WORKER_KEY": files["key"]},
    )


def test_whose_jobs_are_listed(jobworker: Program, server: Server) -> None:
    user = as_client(jobworker, server, "cli-user", "user")
    mine = user.create("--name", "owned", "true")
    others = jobworker.create("--name", "owned", "true")

    def listed(program: Program, *words: str) -> list[str]:
        return [str(job["id"]) for job in program.json("list", "--name", "owned", *words)]

    assert listed(jobworker) == [others, mine]
    assert listed(jobworker, "--owner", "cli-user") == listed(user) == [mine]
    assert listed(jobworker, "--mine") == [others]
    assert listed(user, "--mine") == [mine]
    assert listed(user, "--owner", "admin") == []
    assert "not both" in jobworker("list", "--mine", "--owner", "x").stderr
    for words in (["get", others], ["stop", others], ["stream", others], ["rm", others]):
        assert f"there is no job '{others}'" in user(*words).stderr
    shown = user("info").stdout
    assert re.search(r"^You are: +cli-user, with the role user$", shown, re.MULTILINE)
    assert re.search(r"^Jobs: +\d+ of yours running", shown, re.MULTILINE)
    assert "State:" not in shown
    assert "Ended:" not in shown


def test_get_shows_whose_it_is_and_withholds_values(jobworker: Program, server: Server) -> None:
    user = as_client(jobworker, server, "cli-user", "user")
    viewer = as_client(jobworker, server, "cli-viewer", "viewer")
    job_id = user.create("--env", "TOKEN=secret", "sleep", "60")
    jobworker("stop", "--grace", "0", job_id)
    shown = user("get", job_id).stdout
    assert re.search(r"^Environment: +TOKEN=secret$", shown, re.MULTILINE)
    assert re.search(
        r"^Created by: +cli-user \(user, certificate [0-9A-F]+\)$", shown, re.MULTILINE
    )
    assert re.search(r"^Stopped by: +admin \(admin, certificate [0-9A-F]+\)$", shown, re.MULTILINE)
    shown = viewer("get", job_id).stdout
    assert re.search(r"^Environment: +TOKEN \(its values are for", shown, re.MULTILINE)
    job = viewer.json("get", job_id)
    assert (job["environment"], job["environment_withheld"]) == ({"TOKEN": ""}, True)
    job = jobworker.json("get", job_id)
    assert (job["environment"], job["environment_withheld"]) == ({"TOKEN": "secret"}, False)
    assert (job["created_by"]["name"], job["stopped_by"]["role"]) == ("cli-user", "admin")


def test_the_newest_only(jobworker: Program) -> None:
    ids = [jobworker.create("--name", "many", "true") for _ in range(3)]
    few = jobworker("list", "--name", "many", "-n", "2")
    assert [row.split()[0] for row in few.stdout.splitlines()[1:]] == ids[:0:-1]
    assert few.stderr == ""
    assert len(jobworker.json("list", "--name", "many", "--limit", "0")) == 3
    assert len(jobworker.json("list", "--name", "many", "-n", "2")) == 2


def test_a_terminal_is_told_that_it_gets_the_newest_only(jobworker: Program) -> None:
    line = '{"command": "true", "name": "crowd"}\n'
    (jobworker.folder / "crowd").write_text(line * 101)
    jobworker("create", "--from", "crowd")
    words = ("list", "--name", "crowd")
    hint = "The newest 100 only: --limit 0 lists all."
    assert jobworker.screen(*words).splitlines()[101:] == [hint]
    assert hint not in jobworker.screen(*words, "-n", "5")
    assert len(jobworker.screen(*words, "-n", "0").splitlines()) == 102
    piped = jobworker(*words)
    assert (len(piped.stdout.splitlines()), piped.stderr) == (102, "")
    assert hint not in piped.stdout


def test_an_empty_list(jobworker: Program) -> None:
    assert jobworker.json("list", "--name", "nobody") == []
    assert len(jobworker("list", "--name", "nobody").stdout.splitlines()) == 1


# stop


def test_stop(jobworker: Program) -> None:
    job_id = jobworker.create("sleep", "60")
    assert jobworker("stop", job_id).stdout == f"Job stopped: ID: {job_id}\n"
    assert jobworker.json("get", job_id)["signal_name"] == "SIGTERM"


@pytest.mark.parametrize("name", ["2", "INT", "sigint"])
def test_stop_with_a_signal(jobworker: Program, name: str) -> None:
    job_id = jobworker.create("sleep", "60")
    assert jobworker.json("stop", job_id, "--signal", name)["signal_name"] == "SIGINT"


@pytest.mark.parametrize("name", ["0", "65", "²", "9" * 5000, "NONE"])
def test_stop_with_what_is_no_signal(jobworker: Program, name: str) -> None:
    answer = jobworker("stop", "1", "--signal", name)
    assert answer.returncode == 2
    assert "is no signal" in answer.stderr


def test_stop_without_grace(jobworker: Program) -> None:
    job_id = jobworker.create("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
    with jobworker.start("stream", job_id, stdout=subprocess.PIPE) as stream:
        assert stream.stdout
        assert stream.stdout.readline() == b"ready\n"
        assert jobworker.json("stop", job_id, "--grace", "0")["signal_name"] == "SIGKILL"
