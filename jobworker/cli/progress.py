"""One line on standard error that says how far long work has come; on a terminal only."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Self

from jobworker.cli.display import is_terminal

INTERVAL_SECONDS = 0.1
BAR_COLUMNS = 24


class Progress:
    """A line that is written over again and again, and gone at the end."""

    def __init__(self) -> None:
        self._is_shown = is_terminal(sys.stderr)
        self._next = 0.0
        self._columns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear()

    @property
    def is_due(self) -> bool:
        """So that a caller need not make a text that nobody would see."""
        return self._is_shown and time.monotonic() >= self._next

    def show(self, text: str) -> None:
        if not self._is_shown:
            return
        self._next = time.monotonic() + INTERVAL_SECONDS
        text = text[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + text.ljust(self._columns))
        sys.stderr.flush()
        self._columns = len(text)

    def clear(self) -> None:
        if self._columns:
            sys.stderr.write("\r" + " " * self._columns + "\r")
            sys.stderr.flush()
            self._columns = 0


def bar(done: int, total: int) -> str:
    """`[######..................] 250 of 1000`."""
    filled = BAR_COLUMNS * done // total
    return f"[{'#' * filled}{'.' * (BAR_COLUMNS - filled)}] {done} of {total}"
