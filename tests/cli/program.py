"""The program as people start it: in a pipe, and on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

END_SECONDS = 30

Answer = subprocess.CompletedProcess[str]


class Program:
    """`jobworker`, with an environment that holds nothing but what it is given."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder = folder
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "xterm"} | environ

    def __call__(self, *words: str, **environ: str) -> Answer:
        """To its end. Text is UTF-8, whatever is not is escaped."""
        return subprocess.run(
            self._command(words),
            env=self.environ | environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=END_SECONDS,
            check=False,
        )

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command(words), env=self.environ, cwd=self.folder, **options)

    @contextlib.contextmanager
    def on_terminal(self, *words: str, **environ: str) -> Iterator[Terminal]:
        """All three standard streams are one terminal of 80 columns."""
        process, descriptor = pty.fork()
        if not process:
            os.chdir(self.folder)
            os.execve(sys.executable, self._command(words), self.environ | environ)
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        terminal = Terminal(process, descriptor)
        try:
            yield terminal
        finally:
            terminal.close()

    def screen(self, *words: str, **environ: str) -> str:
        """All that it writes on a terminal."""
        with self.on_terminal(*words, **environ) as terminal:
            terminal.wait()
            return terminal.shown

    def json(self, *words: str) -> Any:
        answer = self(*words, "-o", "json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def create(self, *words: str) -> str:
        """A new job's id."""
        return str(self.json_of_create(*words)["id"])

    def json_of_create(self, *words: str) -> Any:
        """What comes after the job's command would be the job's."""
        answer = self("create", "-o", "json", *words)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def newest_id(self, *words: str) -> str:
        return str(self.json("list", *words)[0]["id"])

    def _command(self, words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "jobworker", *words]


class Terminal:
    """A program on a terminal, and what is to be seen there."""

    def __init__(self, process: int, descriptor: int) -> None:
        self.process = process
        self.shown = ""
        self._descriptor = descriptor
        self._exit_code: int | None = None

    def press(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_shown(self, pattern: str) -> None:
        deadline = time.monotonic() + END_SECONDS
        while not re.search(pattern, self.shown):
            assert time.monotonic() < deadline, self.shown
            assert self._read(deadline), f"no {pattern!r} in {self.shown!r}"

    def wait(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + END_SECONDS
        while self._read(deadline):
            assert time.monotonic() < deadline, self.shown
        if self._exit_code is None:
            _, status = os.waitpid(self.process, 0)
            self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code

    def close(self) -> None:
        if self._exit_code is None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self._descriptor)

    def _read(self, deadline: float) -> bool:
        """False: it has ended."""
        ready, _, _ = select.select([self._descriptor], [], [], deadline - time.monotonic())
        if not ready:
            return True
        try:
            data = os.read(self._descriptor, 1 << 16)
        except OSError:  # EIO: nobody has the terminal open any more
            return False
        self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
