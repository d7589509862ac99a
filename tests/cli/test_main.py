"""The program as a whole: its help, its errors, and what it does not import."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from cli.program import Answer, Program, wait_for
from client.old_server import OldServer
from functional.server import Server
from jobworker import certs
from jobworker.cli.main import COMMANDS, main
from jobworker.errors import CallError


@pytest.fixture
def old(jobworker: Program, certificates: Path) -> Iterator[Program]:
    """Connected to a server that knows only the first version of the protocol."""
    with OldServer(certificates) as server:
        yield Program(jobworker.folder, **jobworker.environ | {"JOB_WORKER_SERVER": server.address})


def assert_one_line(answer: Answer, code: int, *words: str) -> None:
    """How every error looks."""
    assert answer.returncode == code, answer
    assert re.fullmatch(r"jobworker: [^\n]+\n", answer.stderr), answer.stderr
    for word in words:
        assert word in answer.stderr


def in_this_process(*words: str) -> Answer:
    """Many times as fast, for what needs no process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        main(list(words), prog_name="jobworker")
    assert isinstance(caught.value.code, int)
    return Answer(words, caught.value.code, out.getvalue(), err.getvalue())


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(command: str) -> None:
    group = main.get_command(click.Context(main), command)
    assert group is not None
    assert group.name == command
    assert group.help
    # It is shown in one line of the program's own help.
    assert len(group.get_short_help_str(200)) <= 60


def test_the_help_names_every_command(unconnected: Program) -> None:
    shown = unconnected("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", shown, re.MULTILINE)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = in_this_process(*command.split(), "--help").stdout
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("columns", range(50, 80))
def test_help_breaks_no_name_at_its_hyphen(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (["certs", "client"], ["serve"], []):
        shown = in_this_process(*words, "--help").stdout
        assert not re.search(r"\w-$", shown, re.MULTILINE), shown
        assert shown.isascii()


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["get"],
        ["get", "1", "2"],
        ["get", "one"],
        ["get", "-1"],
        ["list", "--status", "sleeping"],
        ["create"],
        ["create", "--nonsense", "true"],
        ["create", "--max-cpu", "many", "true"],
        ["create", "--max-cpu=-1", "true"],
        ["create", "--max-memory", str(1 << 31), "true"],
        ["create", "--max-iobps", str(1 << 64), "true"],
        ["create", "--env", "NOTHING", "true"],
        ["create", "--timeout", "soon", "true"],
        ["create", "--timeout", "-1", "true"],
        ["create", "--timeout", "5w", "true"],
        ["create", "--stdin", "/dev/zero", "true"],
        ["create", "--from", "/dev/null", "true"],
        ["rm"],
        ["rm", "one"],
        ["prune"],
        ["create", "--env", "=x", "true"],
        ["stop", "1", "--signal", "NONE"],
        ["stop", "1", "--signal", "99"],
        ["stop", "1", "--grace", "-1"],
        ["stream", "1", "--from-offset", "-1"],
        ["stream", "1", "--stdout", "--stderr"],
        ["wait"],
        ["certs", "client", "--name", "x", "--role", "king"],
        ["completion", "tcsh"],
        ["--nonsense"],
        ["get", "1", "-o", "xml"],
    ],
)
def test_what_can_never_work(
    words: list[str], jobworker: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("JOB_WORKER_SERVER", "JOB_WORKER_CERT_PATH"):
        monkeypatch.setenv(variable, jobworker.environ[variable])
    assert_one_line(in_this_process(*words), 2, "--help`")


@pytest.mark.parametrize("words", [[], ["certs"]])
def test_without_a_command_the_help_is_shown(words: list[str]) -> None:
    answer = in_this_process(*words)
    assert (answer.returncode, answer.stderr) == (2, "")
    assert answer.stdout == in_this_process(*words, "--help").stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lst"], "No such command 'lst', perhaps list; see `jobworker --help`"),
        (["ps"], "'ps', perhaps list; see"),
        (["logs"], "'logs', perhaps stream; see"),
        (["kill", "1"], "'kill', perhaps stop; see"),
        (["xyzzy"], "No such command 'xyzzy'; see"),
        (["create", "--max-memry", "1", "true"], ", perhaps --max-memory"),
        (["stream", "--std", "1"], ", perhaps --stdout"),
    ],
)
def test_what_is_misspelt(words: list[str], told: str) -> None:
    answer = in_this_process(*words)
    assert_one_line(answer, 2, told)
    assert "?" not in answer.stderr


def test_errors_change_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CallError("GetJob", "INTERNAL", "of the server: \x1b[31m")

    monkeypatch.setattr("jobworker.client.Client.get", fail)
    monkeypatch.setattr("jobworker.client.Client.__init__", lambda *_, **__: None)
    monkeypatch.setattr("jobworker.client.Client.close", lambda _: None)
    answer = in_this_process("get", "7")
    assert "\\x1b[31m" in answer.stderr
    assert "\x1b" not in answer.stderr


def test_the_largest_limit_is_no_usage_error(jobworker: Program) -> None:
    answer = jobworker("create", "--max-cpu", str((1 << 31) - 1), "true")
    assert answer.returncode in {0, 1}  # 1: this machine cannot enforce one


# Errors


def test_an_unknown_job(jobworker: Program) -> None:
    for words in (["get"], ["stop"], ["stream"], ["wait"], ["rm"]):
        assert_one_line(jobworker(*words, "999999"), 3, "999999", "`jobworker list`")


def test_a_viewer(jobworker: Program, server: Server) -> None:
    flags = ["--cert", f"{server.certs}/viewer-cert.pem", "--key", f"{server.certs}/viewer-key.pem"]
    assert_one_line(jobworker(*flags, "create", "true"), 4, "admin", "viewer")
    assert jobworker(*flags, "list").returncode == 0


def test_a_job_that_has_ended(jobworker: Program) -> None:
    job = jobworker.json_of_create("true")
    jobworker("wait", str(job["id"]))
    assert_one_line(jobworker("stop", str(job["id"])), 1, "COMPLETED")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["create", ""], "is empty"),
        (["create", "no-such-command"], "was not found"),
        (["create", "/etc"], "is a directory"),
        (["create", "/etc/passwd"], "is not executable"),
        (["create", "--workdir", "/no/such", "true"], "--workdir"),
        (["create", "--workdir", "relative", "true"], "--workdir"),
        (["create", "true", *["x" * 100_000] * 6], "524288"),
        (["create", "--name", "two\nlines", "true"], "printable"),
        (["create", "--timeout", "5000d", "true"], "--timeout"),
        (["create", "--user", "nobody-there", "true"], "user"),
        (["create", "--profile", "none-such", "true"], "profile"),
        (["stream", "1", "--from-offset", str(1 << 40)], "0 to"),
    ],
)
def test_what_the_server_can_never_accept(
    jobworker: Program, words: list[str], problem: str
) -> None:
    jobworker("create", "true")
    assert_one_line(jobworker(*words), 2, problem)


def test_what_is_not_utf_8(jobworker: Program) -> None:
    assert_one_line(jobworker("create", "echo", "\udcff"), 2, "UTF-8")
    assert_one_line(jobworker("create", "--env", "A=\udcff", "true"), 2, "UTF-8")
    assert_one_line(jobworker("list", "--name", "\udcff"), 2, "UTF-8")
    assert_one_line(jobworker("-s", "\udcff:1", "list"), 2, "UTF-8")
    assert_one_line(jobworker("--server-name", "\udcff", "list"), 2, "UTF-8")


def test_what_cannot_be_shown_where_there_is_no_utf_8(jobworker: Program) -> None:
    """One job's text ends no list of all."""
    jobworker("create", "--name", "ä€😀", "echo", "ä€😀")
    shown = jobworker("list", PYTHONIOENCODING="latin-1")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert r"\xe4\u20ac\U0001f600" in shown.stdout
    shown = jobworker("list", "-o", "json", PYTHONIOENCODING="latin-1")
    assert json.loads(shown.stdout)[0]["name"] == "ä€😀"


def test_no_server(jobworker: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    assert_one_line(jobworker("-s", address, "list"), 5, address, "nobody listens")


def test_no_certificates(unconnected: Program) -> None:
    assert_one_line(
        unconnected("list"),
        1,
        "jobworker: certs/ca-cert.pem is missing; give the folder of the certificates with --certs "
        "(or JOB_WORKER_CERT_PATH); or start a server to try out: `jobworker serve --dev`",
    )
    answer = unconnected("--certs", "mine", "list")
    assert_one_line(answer, 1, "mine/ca-cert.pem is missing; give the folder")
    assert "--dev" not in answer.stderr


def test_a_pair_under_another_name(unconnected: Program) -> None:
    folder = unconnected.folder / "certs"
    certs.make_all(folder)
    (folder / "client-key.pem").unlink()
    assert_one_line(
        unconnected("list"),
        1,
        "client-key.pem is missing; viewer-cert.pem and viewer-key.pem are there: give them with "
        "--cert and --key, or rename them",
    )


@pytest.mark.parametrize("flag", ["cert", "key"])
def test_half_a_pair(unconnected: Program, flag: str) -> None:
    answer = unconnected(f"--{flag}", "alice.pem", "list")
    assert_one_line(answer, 1, "alice.pem has no ", "give both with --cert and --key")


def test_a_shell_line_as_a_command(jobworker: Program) -> None:
    for line in ("echo hi | wc", "/bin/echo it's", "true;true"):
        for command, code in (("run", 127), ("create", 2)):
            answer = jobworker(command, line)
            assert_one_line(answer, code, "; for a shell line: sh -c '…'")
    assert "shell" not in jobworker("run", "no-such-command").stderr


def test_certificates_of_another_authority(jobworker: Program) -> None:
    certs.make_all(jobworker.folder / "other")
    assert_one_line(jobworker("--certs", "other", "list"), 5, "CA")


def test_a_server_that_is_killed_meanwhile(
    jobworker: Program, start_server: Callable[..., Server]
) -> None:
    server = start_server()
    environ = {"JOB_WORKER_SERVER": server.address}
    job = Program(jobworker.folder, **jobworker.environ | environ).json_of_create("sleep", "60")
    flags = ["-s", server.address]
    started = [
        jobworker.start(*flags, command, str(job["id"]), "--retry", "0.3", stderr=subprocess.PIPE)
        for command in ("stream", "wait")
    ]
    started.append(
        jobworker.start(
            *(*flags, "run", "--retry", "0.3", "sh", "-c", "echo ready; sleep 60"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
    assert started[-1].stdout
    assert started[-1].stdout.readline() == b"ready\n"
    server.stop(signal.SIGKILL)
    for process, code in zip(started, (5, 5, 125), strict=True):
        _, errors = process.communicate(timeout=30)
        answer = Answer(process.args, process.returncode, "", errors.decode())
        assert_one_line(answer, code, server.address)
    start_server().stop()  # which ends what that one has left


@pytest.mark.parametrize("word", ["list", "--help"])
def test_standard_output_that_is_full(jobworker: Program, word: str) -> None:
    with open("/dev/full", "wb") as full:
        process = jobworker.start(word, stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"Traceback" not in errors
    assert b"No space left" in errors


@pytest.mark.parametrize("flags", [[], ["-o", "json"]])
def test_a_job_is_told_of_where_standard_output_is_full(
    jobworker: Program, flags: list[str]
) -> None:
    with open("/dev/full", "wb") as full:
        words = ["create", *flags, "true"]
        process = jobworker.start(*words, stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    told = rf"jobworker: job {jobworker.newest_id()} was created\njobworker: cannot write: [^\n]+\n"
    assert re.fullmatch(told, errors.decode())


def test_a_network_that_is_none() -> None:
    """Empty is one, as a script may give it, but not worth showing."""
    answer = in_this_process("create", "--network", "foo", "true")
    assert_one_line(answer, 2, "'foo' is not one of 'host', 'none'")
    answer = in_this_process("create", "--network", "", "--from", "/dev/null")
    assert "network" not in answer.stderr


def with_closed(program: Program, *words: str, which: str) -> Answer:
    """which: as a shell closes it."""
    command = shlex.join([sys.executable, "-m", "jobworker", *words])
    return subprocess.run(
        ["sh", "-c", f"exec {command} {which}"],
        env=program.environ,
        cwd=program.folder,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "code"), [("create true", 1), ("list", 1), ("run -- echo text", 125)]
)
def test_standard_output_that_is_closed(jobworker: Program, words: str, code: int) -> None:
    """Nothing is done of which nobody would be told."""
    newest = jobworker.create("true")
    answer = with_closed(jobworker, *words.split(), which=">&-")
    assert_one_line(answer, code, "standard output is closed")
    assert jobworker.newest_id() == newest


def test_other_standard_streams_may_be_closed(jobworker: Program) -> None:
    assert with_closed(jobworker, "create", "true", which="<&- 2>&-").returncode == 0


def test_ctrl_c_while_the_program_is_loaded(unconnected: Program) -> None:
    (unconnected.folder / "click.py").write_text("raise KeyboardInterrupt")
    answer = unconnected("list", PYTHONPATH=str(unconnected.folder))
    assert (answer.returncode, answer.stderr) == (130, "")


# A server that speaks only the fields that the protocol always had


def test_the_old_commands_at_an_old_server(old: Program) -> None:
    assert old("create", "/bin/echo", "Hello, World!").stdout == "Job created: ID: 1\n"
    assert old("stream", "1").stdout == "Hello, World!\n"
    assert old("wait", "1").stdout.startswith("Job 1: COMPLETED")
    assert re.search(r"^Status: +COMPLETED$", old("get", "1").stdout, re.MULTILINE)
    assert old("list").stdout.splitlines()[1].split()[:3] == ["1", "COMPLETED", "exit-0"]
    assert old("create", "/bin/sleep", "60").returncode == 0
    assert old("stop", "2").stdout == "Job stopped: ID: 2\n"
    assert old.json("get", "2")["status"] == "STOPPED"


def test_run_at_an_old_server(old: Program) -> None:
    answer = old("run", "/bin/sh", "-c", "echo out; exit 3")
    assert (answer.returncode, answer.stdout, answer.stderr) == (3, "out\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ["create", "--env", "A=1", "/bin/true"],
        ["create", "--workdir", "/tmp", "/bin/true"],
        ["create", "--name", "x", "/bin/true"],
        ["create", "--merge-output", "/bin/true"],
        ["create", "--stdin", "/etc/passwd", "/bin/true"],
        ["create", "--timeout", "5m", "/bin/true"],
        ["create", "--user", "nobody", "/bin/true"],
        ["create", "--profile", "none", "/bin/true"],
        ["create", "--network", "none", "/bin/true"],
        ["create", "--root", "/srv", "/bin/true"],
        ["create", "--read-only", "/bin/true"],
        ["create", "--bind", "/srv:/mnt", "/bin/true"],
        ["stop", "1", "--signal", "INT"],
        ["stop", "1", "--grace", "1"],
        ["stream", "1", "--stderr"],
        ["stream", "1", "--no-follow"],
        ["list", "--name", "x"],
        ["info"],
    ],
)
def test_nothing_that_it_would_ignore_is_silently_ignored(old: Program, words: list[str]) -> None:
    assert_one_line(old(*words), 1, "old")


# Speed


def modules_after(*words: str, environ: dict[str, str]) -> set[str]:
    program = (
        "import sys\n"
        "from jobworker.cli.main import main\n"
        "try:\n"
        f"    main({list(words)!r}, prog_name='jobworker')\n"
        "except SystemExit:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    return set(answer.stderr.split())


def test_a_command_imports_only_what_it_needs(jobworker: Program) -> None:
    asking = modules_after("list", environ=jobworker.environ)
    assert "grpc" in asking
    unneeded = {"cryptography", "uvloop", "sqlite3", "tomllib", "jobworker.daemon"}
    assert unneeded & asking == set()
    assert not {"grpc", "google.protobuf", "cryptography"} & modules_after(
        "--help", environ=jobworker.environ
    )


def test_get_answers_at_once(jobworker: Program) -> None:
    """With less than 0.3 s of a processor; other tests may make that more for a while."""
    job = jobworker.json_of_create("true")

    def children_seconds() -> float:
        return os.times().children_user + os.times().children_system

    def is_fast() -> bool:
        before = children_seconds()
        assert jobworker("get", str(job["id"])).returncode == 0
        return children_seconds() - before < 0.3

    wait_for(is_fast)
