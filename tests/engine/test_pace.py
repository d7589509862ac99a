"""When what has gathered is handed over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from jobworker.engine import pace as module
from jobworker.engine.pace import Pace


class Gathered:
    """What was handed over together."""

    def __init__(self) -> None:
        self.handed: list[list[int]] = []
        self.pace: Pace[int] = Pace(self.handed.append)
        self.add = self.pace.add


def run(test: Callable[[Gathered], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Gathered())

    asyncio.run(main())


def test_what_comes_in_one_turn_goes_together_and_at_its_end() -> None:
    async def test(gathered: Gathered) -> None:
        for number in range(3):
            gathered.add(number, may_wait=False)
        assert gathered.handed == []
        await asyncio.sleep(0)
        assert gathered.handed == [[0, 1, 2]]

    run(test)


def test_a_single_one_waits_for_nobody() -> None:
    async def test(gathered: Gathered) -> None:
        gathered.add(1, may_wait=True)
        await asyncio.sleep(0)
        assert gathered.handed == [[1]]

    run(test)


def test_what_may_wait_goes_with_what_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPANY_SECONDS", 1000.0)

    async def test(gathered: Gathered) -> None:
        gathered.add(0, may_wait=False)
        await asyncio.sleep(0)
        gathered.add(1, may_wait=True)
        gathered.add(2, may_wait=True)
        await asyncio.sleep(0)
        assert gathered.handed[1:] == []
        gathered.add(3, may_wait=False)
        await asyncio.sleep(0)
        assert gathered.handed[1:] == [[1, 2, 3]]

    run(test)


def test_where_there_is_company_enough_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPANY_SECONDS", 1000.0)

    async def test(gathered: Gathered) -> None:
        gathered.add(0, may_wait=False)
        await asyncio.sleep(0)
        for number in range(1, module.COMPANY):
            gathered.add(number, may_wait=True)
        await asyncio.sleep(0)
        assert gathered.handed[1:] == []
        gathered.add(module.COMPANY, may_wait=True)
        await asyncio.sleep(0)
        assert gathered.handed[1:] == [list(range(1, module.COMPANY + 1))]

    run(test)


def test_it_does_not_wait_for_ever() -> None:
    async def test(gathered: Gathered) -> None:
        gathered.add(0, may_wait=False)
        await asyncio.sleep(0)
        gathered.add(1, may_wait=True)
        async with asyncio.timeout(10):
            while not gathered.handed[1:]:
                await asyncio.sleep(0.001)
        assert gathered.handed[1:] == [[1]]

    run(test)
