"""What only AsyncClient can do; all that both clients can is in test_sync.py."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from functional.server import Server
from jobworker import AsyncClient
from jobworker.errors import CallError, DeadlineError
from jobworker.job import Status


def run(server: Server, scenario: Any) -> None:
    """With the client's own loop, closed at the end."""

    async def main() -> None:
        async with AsyncClient(server.address, certs=server.certs) as client:
            await asyncio.wait_for(scenario(client), 60)

    asyncio.run(main())


def test_many_at_once(server: Server) -> None:
    async def scenario(client: AsyncClient) -> None:
        started = time.monotonic()
        results = await asyncio.gather(
            *(client.run("sh", "-c", f"sleep 1; echo {number}") for number in range(50))
        )
        assert [int(result.stdout) for result in results] == list(range(50))
        assert time.monotonic() - started < 20

    run(server, scenario)


def test_a_cancelled_run_stops_its_job(server: Server) -> None:
    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.run("sleep", "60", name="cancelled")
        jobs = [job async for job in client.list(name="cancelled", limit=1)]
        assert jobs[0].status is Status.STOPPED

    run(server, scenario)


def test_a_run_that_is_cancelled_while_its_job_is_created_leaves_none(server: Server) -> None:
    async def scenario(client: AsyncClient) -> None:
        name = "cancelled early"
        for milliseconds in range(20):
            running = asyncio.ensure_future(client.run("sleep", "60", name=name))
            await asyncio.sleep(milliseconds / 1000)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        await asyncio.sleep(0.5)  # for what the server has begun without the client
        assert not [job.id async for job in client.list(name=name) if not job.is_ended]

    run(server, scenario)


def test_a_run_that_is_cancelled_twice_leaves_none(server: Server) -> None:
    async def scenario(client: AsyncClient) -> None:
        name = "cancelled twice"
        for milliseconds in range(0, 60, 3):
            running = asyncio.ensure_future(client.run("sleep", "60", name=name))
            await asyncio.sleep(milliseconds / 1000)
            running.cancel()
            await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        await asyncio.sleep(1)  # for what goes on without the caller
        assert not [job.id async for job in client.list(name=name) if not job.is_ended]

    run(server, scenario)


def test_close_waits_for_the_stop_of_what_was_cancelled(server: Server) -> None:
    name = "cancelled at last"

    async def scenario(client: AsyncClient) -> None:
        running = asyncio.ensure_future(client.run("sleep", "60", name=name))
        while not [job async for job in client.list(name=name)]:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    async def look(client: AsyncClient) -> None:
        assert [job.status async for job in client.list(name=name)] == [Status.STOPPED]

    run(server, scenario)
    run(server, look)


def test_close_waits_for_what_was_cancelled_just_before(server: Server) -> None:
    name = "cancelled just now"

    async def scenario(client: AsyncClient) -> None:
        for milliseconds in range(0, 60, 3):
            async with AsyncClient(server.address, certs=server.certs) as other:
                await other.info()
                running = asyncio.ensure_future(other.run("sleep", "60", name=name))
                await asyncio.sleep(milliseconds / 1000)
                running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert not [job.id async for job in client.list(name=name) if not job.is_ended]

    run(server, scenario)


def test_a_cancelled_reader_leaves_the_job_alone(server: Server) -> None:
    async def scenario(client: AsyncClient) -> None:
        job = await client.create("sleep", "60")
        waiting = asyncio.ensure_future(client.wait(job.id))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await client.get(job.id)).status is Status.RUNNING
        assert (await client.stop(job.id)).status is Status.STOPPED

    run(server, scenario)


def test_a_stream_that_is_left_early(server: Server) -> None:
    async def scenario(client: AsyncClient) -> None:
        job = await client.create("sh", "-c", "while :; do echo x; sleep 0.01; done")
        async with contextlib.aclosing(client.stream(job.id)) as chunks:
            async for chunk in chunks:
                assert chunk.payload
                break
        await client.stop(job.id, grace_seconds=0)

    run(server, scenario)


def test_close_ends_what_is_under_way(server: Server) -> None:
    """With an error: nobody has cancelled the tasks that wait for it."""

    async def scenario(client: AsyncClient) -> None:
        job = await client.create("sleep", "3")
        async with AsyncClient(server.address, certs=server.certs) as other:
            calls = [anext(other.stream(job.id)), other.stop(job.id, grace_seconds=60, signal=18)]
            waiting = [asyncio.ensure_future(call) for call in calls]
            await asyncio.wait(waiting, timeout=0.3)
        for each in waiting:
            with pytest.raises(CallError, match="this client was closed; make another one"):
                await each
        await client.stop(job.id)

    run(server, scenario)


def test_a_client_that_is_closed(server: Server) -> None:
    async def scenario(client: AsyncClient) -> None:
        await client.info()
        await client.close()
        with pytest.raises(CallError, match="this client was closed; make another one"):
            await client.info()
        with pytest.raises(CallError, match="this client was closed; make another one"):
            await anext(client.stream(1))

    run(server, scenario)


def test_the_loop_goes_on_meanwhile(server: Server) -> None:
    """Also where the client has to find out why there is no connection."""

    async def scenario(client: AsyncClient) -> None:
        longest, before = 0.0, time.monotonic()

        async def watch() -> None:
            nonlocal longest, before
            while True:
                await asyncio.sleep(0.01)
                longest, before = max(longest, time.monotonic() - before), time.monotonic()

        watching = asyncio.ensure_future(watch())
        with pytest.raises(DeadlineError):
            await client.run("sleep", "60", timeout=0.5)
        async with AsyncClient("127.0.0.1:1", certs=server.certs) as nobody:
            with pytest.raises(CallError):
                await nobody.info()
        watching.cancel()
        assert longest < 0.5

    run(server, scenario)
