"""`jobworker serve`: where its settings come from, and `--dev`."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.program import Program


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return int(unused.getsockname()[1])


@contextmanager
def serving(program: Program, *words: str) -> Iterator[str]:
    """Its log up to the moment when it is ready."""
    # Unbuffered: what has been read ahead, no selector would tell.
    with program.start("serve", *words, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr
        try:
            log = ""
            with selectors.DefaultSelector() as selector:
                selector.register(process.stderr, selectors.EVENT_READ)
                while "ready" not in log:
                    assert selector.select(20), log
                    line = process.stderr.readline().decode()
                    assert line, log
                    log += line
            yield log
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


@pytest.fixture
def newcomer(unconnected: Program) -> Program:
    unconnected.environ["JOB_WORKER_STATE_DIR"] = str(unconnected.folder / "state")
    unconnected.environ["JOB_WORKER_STOP_JOBS"] = "yes"
    return unconnected


def test_dev_needs_nothing(newcomer: Program) -> None:
    """Two commands, and no flag that says where anything is."""
    port = unused_port()
    with serving(newcomer, "--dev", "--addr", f"127.0.0.1:{port}"):
        assert newcomer("create", "echo", "hi").stdout == "Job created: ID: 1\n"
        assert newcomer("stream", "1").stdout == "hi\n"
    folder = newcomer.folder / ".local/share/jobworker/dev"
    keys = list(folder.glob("certs/*-key.pem"))
    assert keys
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_dev_keeps_its_certificates(newcomer: Program) -> None:
    contents = []
    for _ in range(2):
        with serving(newcomer, "--dev", "--addr", f"127.0.0.1:{unused_port()}"):
            assert newcomer("list").returncode == 0
        key = newcomer.folder / ".local/share/jobworker/dev/certs/ca-key.pem"
        contents.append(key.read_bytes())
    assert contents[0] == contents[1]


def test_dev_is_on_loopback_by_itself(newcomer: Program) -> None:
    with serving(newcomer, "--dev", "--addr", f"localhost:{unused_port()}") as log:
        assert re.search(r"listening on localhost:\d+", log)


def test_dev_without_a_home_that_can_be_written(newcomer: Program) -> None:
    answer = newcomer("serve", "--dev", HOME="/dev/null")
    assert answer.returncode == 1
    assert "'/dev/null/.local/share/jobworker/dev': cannot be made" in answer.stderr
    assert "set XDG_DATA_HOME, or HOME, to a folder" in answer.stderr


def test_dev_that_does_not_start_leaves_the_record_of_one_that_runs(newcomer: Program) -> None:
    with serving(newcomer, "--dev", "--addr", f"127.0.0.1:{unused_port()}"):
        second = newcomer("serve", "--dev", "--addr", f"127.0.0.1:{unused_port()}")
        assert "in use by another server" in second.stderr
        assert newcomer("list").returncode == 0


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "192.0.2.1:50099", ":50099", "127.0.0.1:0"])
@pytest.mark.parametrize("place", ["flag", "environment"])
def test_dev_is_for_this_machine_only(newcomer: Program, address: str, place: str) -> None:
    words = ["--addr", address] if place == "flag" else []
    environ = {} if words else {"JOB_WORKER_ADDR": address}
    answer = newcomer("serve", "--dev", *words, **environ)
    assert answer.returncode == 1
    assert "--dev" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not (newcomer.folder / ".local").exists()


def test_a_setting_that_cannot_be(newcomer: Program) -> None:
    answer = newcomer("serve", "--linger", "soon")
    assert answer.returncode == 1
    assert re.fullmatch(r"jobworker: cannot start: --linger = 'soon': .*\n", answer.stderr)


def test_a_file_of_settings(newcomer: Program, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'addr = "127.0.0.1:{unused_port()}"\n')
    with serving(newcomer, "--dev", "--config", str(file)):
        assert newcomer("list").returncode == 0


def test_the_servers_own_name(newcomer: Program) -> None:
    answer = subprocess.run(
        ["job-worker", "--help"],
        env=newcomer.environ | {"PATH": os.environ["PATH"]},
        executable=Path(sys.executable).with_name("job-worker"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Runs the server" in answer.stdout
