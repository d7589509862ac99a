"""One thread for short calls that may block and may wait a little, such as rmdir of cgroups.

They are handed over and told of together: under load a call costs a fraction of a thread switch
each way, and not two whole ones as in a pool of threads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from jobworker.engine.pace import Pace

T = TypeVar("T")


class _Call(NamedTuple):
    function: Callable[[], Any]
    future: asyncio.Future[Any]


class _Outcome(NamedTuple):
    future: asyncio.Future[Any]
    result: Any
    error: BaseException | None


class Worker:
    """Belongs to the running event loop; to be closed there."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[_Call] | None] = queue.SimpleQueue()
        self._pace: Pace[_Call] = Pace(self._queue.put)
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """It is called in the thread, after all that was asked for before; also where the future
        is cancelled."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._pace.add(_Call(function, future), may_wait=True)
        return future

    async def close(self) -> None:
        """Returns once all calls are over."""
        self._pace.act()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while calls := self._queue.get():
            outcomes = [_carry_out(call) for call in calls]
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _carry_out(call: _Call) -> _Outcome:
    try:
        return _Outcome(call.future, call.function(), None)
    except BaseException as error:  # noqa: BLE001 raised where it is waited for
        return _Outcome(call.future, None, error)


def _resolve(outcomes: list[_Outcome]) -> None:
    for future, result, error in outcomes:
        if future.done():  # cancelled
            continue
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)
