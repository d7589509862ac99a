"""When to hand over what has gathered: a thread that is woken once for many is woken cheaply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# What may wait waits so long at the most, since something was handed over last,
COMPANY_SECONDS = 0.005
# or until it is in the company of so many: those who wait for them may have nothing else to do.
COMPANY = 10


class Pace(Generic[T]):
    """Of one kind of thing; belongs to the running event loop."""

    def __init__(self, hand_over: Callable[[list[T]], None]) -> None:
        """hand_over: takes all that has gathered, in order; never nothing."""
        self._hand_over = hand_over
        self._loop = asyncio.get_running_loop()
        self._gathered: list[T] = []
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._acted_at = 0.0

    def add(self, thing: T, *, may_wait: bool) -> None:
        """It is handed over at the end of this turn of the loop, with all that comes in it; what
        may wait waits for company, where there has been some lately."""
        self._gathered.append(thing)
        may_wait = may_wait and len(self._gathered) < COMPANY
        seconds = self._acted_at + COMPANY_SECONDS - self._loop.time() if may_wait else 0.0
        if seconds <= 0 and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self.act)
        elif seconds > 0 and not self._timer:
            self._timer = self._loop.call_later(seconds, self.act)

    def act(self) -> None:
        """Now, if there is anything."""
        self._is_due = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._gathered:
            gathered, self._gathered = self._gathered, []
            self._acted_at = self._loop.time()
            self._hand_over(gathered)
