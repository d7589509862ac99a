"""Whose work comes next: the work of one client waits for its own, not that of others for it."""

from __future__ import annotations

import asyncio
import contextlib
from weakref import WeakValueDictionary

Turn = contextlib.AbstractAsyncContextManager[None]
ALWAYS_FREE: Turn = contextlib.nullcontext()


class Turns:
    """Of one kind of work; for each client, some at once. Belongs to the running event loop."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        # Each as long as one has its turn, or waits for it: which may be longer than a call lasts.
        self._by_client: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, client: str) -> asyncio.Semaphore:
        return self._by_client.setdefault(client, asyncio.Semaphore(self._at_once))
