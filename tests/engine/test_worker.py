"""The thread for what may block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from jobworker.engine.worker import Worker

DEADLINE_SECONDS = 10


Thing = Callable[[], object]


def call_each(things: list[Thing]) -> list[object]:
    return [thing() for thing in things]


def run(test: Callable[[Worker[Thing, object]], Awaitable[None]]) -> None:
    async def main() -> None:
        worker = Worker("test", call_each)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await test(worker)
        finally:
            await worker.close()

    asyncio.run(main())


def test_results_and_errors_come_back() -> None:
    async def test(worker: Worker[Thing, object]) -> None:
        assert await worker.ask(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await worker.ask(lambda: 1 // 0)
        assert await worker.ask(lambda: "it goes on") == "it goes on"

    run(test)


def test_who_asks_together_is_served_together() -> None:
    async def main() -> None:
        calls: list[list[int]] = []

        def double(numbers: list[int]) -> list[int]:
            calls.append(numbers)
            return [2 * number for number in numbers]

        worker = Worker("test", double)
        assert await asyncio.gather(*map(worker.ask, range(100))) == list(range(0, 200, 2))
        await worker.close()
        assert calls == [list(range(100))]

    asyncio.run(main())


def test_all_in_one_thread_and_in_order() -> None:
    async def test(worker: Worker[Thing, object]) -> None:
        order: list[int] = []
        threads: set[int] = set()

        def note(number: int) -> None:
            order.append(number)
            threads.add(threading.get_ident())

        await asyncio.gather(*(worker.ask(lambda n=n: note(n)) for n in range(500)))  # type: ignore[misc]
        assert order == list(range(500))
        assert len(threads) == 1
        assert threads != {threading.get_ident()}

    run(test)


def test_the_loop_goes_on_meanwhile() -> None:
    async def test(worker: Worker[Thing, object]) -> None:
        released = threading.Event()
        waiting = worker.ask(lambda: released.wait(DEADLINE_SECONDS))
        await asyncio.sleep(0)
        assert not waiting.done()
        released.set()
        assert await waiting

    run(test)


def test_who_no_longer_waits_is_no_trouble() -> None:
    async def test(worker: Worker[Thing, object]) -> None:
        released, called = threading.Event(), threading.Event()
        worker.ask(lambda: released.wait(DEADLINE_SECONDS))
        worker.ask(called.set).cancel()
        released.set()
        assert await worker.ask(called.is_set)

    run(test)


def test_close_waits_for_what_was_asked() -> None:
    async def main() -> None:
        worker = Worker("test", call_each)
        called: list[int] = []
        for number in range(100):
            worker.ask(lambda number=number: called.append(number))  # type: ignore[misc]
        await worker.close()
        assert len(called) == 100

    asyncio.run(main())
