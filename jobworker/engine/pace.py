"""When to hand over what has gathered: a thread that is woken once for many is woken cheaply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# What may wait waits so long at the most, since something was handed over last.
COMPANY_SECONDS = 0.005


class Pace:
    """Of one kind of thing; belongs to the running event loop."""

    def __init__(self, hand_over: Callable[[], None]) -> None:
        """hand_over: takes all that has gathered."""
        self._hand_over = hand_over
        self._loop = asyncio.get_running_loop()
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._acted_at = 0.0

    def ask(self, *, may_wait: bool) -> None:
        """Something has come. It is handed over at the end of this turn of the loop, with all
        that comes in it; what may wait waits for company, where there has been some lately."""
        seconds = self._acted_at + COMPANY_SECONDS - self._loop.time() if may_wait else 0.0
        if seconds <= 0 and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self.act)
        elif seconds > 0 and not self._timer:
            self._timer = self._loop.call_later(seconds, self.act)

    def act(self) -> None:
        """Now."""
        self._is_due = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._acted_at = self._loop.time()
        self._hand_over()
