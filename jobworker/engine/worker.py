"""One thread for one kind of short work that may block and may wait a little, such as rmdir of
cgroups.

What is asked for is handed over, done and told of together: under load a thing costs a fraction
of a thread switch each way, and not two whole ones as in a pool of threads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from jobworker.engine.pace import Pace

T = TypeVar("T")
R = TypeVar("R")

Asked = list[tuple[T, "asyncio.Future[R]"]]


class Worker(Generic[T, R]):
    """Belongs to the running event loop; to be closed there."""

    def __init__(self, name: str, work: Callable[[list[T]], list[R]]) -> None:
        """work: is called in the thread with all that was asked for meanwhile, in order; never
        nothing. Returns what came of each; where it raises, that came of all."""
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Asked[T, R] | None] = queue.SimpleQueue()
        self._pace: Pace[tuple[T, asyncio.Future[R]]] = Pace(self._queue.put)
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def ask(self, thing: T) -> asyncio.Future[R]:
        """It is done, after all that was asked for before, also where the future is cancelled."""
        future: asyncio.Future[R] = self._loop.create_future()
        self._pace.add((thing, future), may_wait=True)
        return future

    async def close(self) -> None:
        """Returns once all is done."""
        self._pace.act()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while asked := self._queue.get():
            results: list[R] = []
            problem: Exception | None = None
            try:
                results = self._work([thing for thing, _ in asked])
            except Exception as error:  # noqa: BLE001 raised where it is waited for
                problem = error
            futures = [future for _, future in asked]
            self._loop.call_soon_threadsafe(_resolve, futures, results, problem)


def _resolve(futures: list[asyncio.Future[R]], results: list[R], problem: Exception | None) -> None:
    for place, future in enumerate(futures):
        if future.done():  # cancelled
            continue
        if problem:
            future.set_exception(problem)
        else:
            future.set_result(results[place])
