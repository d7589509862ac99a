"""The line that says how far long work has come."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import pytest

from jobworker.cli.progress import Progress, bar


class TerminalLike(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def on_terminal() -> Iterator[TerminalLike]:
    """Of 20 columns."""
    terminal = TerminalLike()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(terminal):
        patch.setenv("COLUMNS", "20")
        yield terminal


def test_a_pipe_sees_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        assert not progress.is_due
        progress.show("half")
    assert capsys.readouterr().err == ""


def test_a_shorter_line_covers_a_longer_one() -> None:
    with on_terminal() as terminal, Progress() as progress:
        progress.show("12345")
        progress.show("12")
    assert terminal.getvalue() == "\r12345\r12   \r  \r"


def test_a_line_is_never_longer_than_the_terminal() -> None:
    """It would wrap, and the next one could not cover it."""
    with on_terminal() as terminal, Progress() as progress:
        progress.show("x" * 50)
    assert terminal.getvalue().startswith("\r" + "x" * 19 + "\r")


def test_not_more_often_than_anybody_could_read() -> None:
    with on_terminal(), Progress() as progress:
        assert progress.is_due
        progress.show("1")
        assert not progress.is_due


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [
        (0, 3, "[........................] 0 of 3"),
        (999, 1000, "[#######################.] 999 of 1000"),
        (3, 3, "[########################] 3 of 3"),
    ],
)
def test_a_bar(done: int, total: int, shown: str) -> None:
    assert bar(done, total) == shown
