"""The turns of clients: whose work waits for whose."""

import asyncio
import gc

from jobworker.turns import Turns


def test_so_many_of_a_client_at_once_and_others_do_not_wait() -> None:
    async def scenario() -> None:
        turns = Turns(2)
        async with turns.of("ada"):
            assert not turns.of("ada").locked()
            async with turns.of("ada"):
                assert turns.of("ada").locked()
                assert not turns.of("bob").locked()
            assert not turns.of("ada").locked()

    asyncio.run(scenario())


def test_a_turn_stays_taken_though_nobody_holds_its_client() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        done = asyncio.Event()

        async def work() -> None:
            async with turns.of("ada"):
                await done.wait()

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        gc.collect()
        assert turns.of("ada").locked()
        done.set()
        await task
        del task
        gc.collect()
        assert not list(turns._by_client)

    asyncio.run(scenario())
