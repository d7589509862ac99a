"""The thread for what may block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from jobworker.engine.worker import Worker

DEADLINE_SECONDS = 10


def run(test: Callable[[Worker], Awaitable[None]]) -> None:
    async def main() -> None:
        worker = Worker("test")
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await test(worker)
        finally:
            await worker.close()

    asyncio.run(main())


def test_results_and_errors_come_back() -> None:
    async def test(worker: Worker) -> None:
        assert await worker.call(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda: 1 // 0)
        assert await worker.call(lambda: "it goes on") == "it goes on"

    run(test)


def test_all_in_one_thread_and_in_order() -> None:
    async def test(worker: Worker) -> None:
        order: list[int] = []
        threads: set[int] = set()

        def note(number: int) -> None:
            order.append(number)
            threads.add(threading.get_ident())

        await asyncio.gather(*(worker.call(lambda n=n: note(n)) for n in range(500)))  # type: ignore[misc]
        assert order == list(range(500))
        assert len(threads) == 1
        assert threads != {threading.get_ident()}

    run(test)


def test_the_loop_goes_on_meanwhile() -> None:
    async def test(worker: Worker) -> None:
        released = threading.Event()
        waiting = worker.call(lambda: released.wait(DEADLINE_SECONDS))
        await asyncio.sleep(0)
        assert not waiting.done()
        released.set()
        assert await waiting

    run(test)


def test_who_no_longer_waits_is_no_trouble() -> None:
    async def test(worker: Worker) -> None:
        released, called = threading.Event(), threading.Event()
        worker.call(lambda: released.wait(DEADLINE_SECONDS))
        worker.call(called.set).cancel()
        released.set()
        assert await worker.call(called.is_set)

    run(test)


def test_close_waits_for_what_was_asked() -> None:
    async def main() -> None:
        worker = Worker("test")
        called: list[int] = []
        for number in range(100):
            worker.call(lambda number=number: called.append(number))  # type: ignore[misc]
        await worker.close()
        assert len(called) == 100

    asyncio.run(main())
