"""Stores in a folder, and records to put into them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from jobworker import job as transition
from jobworker.engine.store import Store
from jobworker.job import Job, JobSpec, OomKills, Principal

DEADLINE_SECONDS = 60


def run(folder: Path, test: Callable[[Store], Awaitable[object]]) -> None:
    async def main() -> None:
        store = Store.open(folder / "jobs.db")
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await test(store)
        finally:
            await store.close()

    asyncio.run(main())


async def nothing(store: Store) -> None:
    pass


def new_job(job_id: int, name: str = "", owner: str = "") -> Job:
    client = Principal(owner, "user", "01") if owner else None
    return transition.created(job_id, JobSpec("/bin/true", name=name), 1_000 + job_id, client)


def running_job(job_id: int, name: str = "", owner: str = "") -> Job:
    return transition.started(new_job(job_id, name, owner), 2_000 + job_id)


def ended_job(job_id: int, name: str = "", exit_code: int = 0, owner: str = "") -> Job:
    job = running_job(job_id, name, owner)
    return transition.ended(job, exit_code << 8, OomKills(), 3_000 + job_id)


async def put_all(store: Store, jobs: list[Job]) -> None:
    await asyncio.gather(*map(store.put, jobs))


async def every_job(store: Store) -> list[Job]:
    page = await store.page(count=1000)
    jobs = page.jobs
    while page.before_id is not None:
        page = await store.page(page.before_id, 1000)
        jobs += page.jobs
    return jobs


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.005)


def take(folder: Path, count: int) -> list[int]:
    ids: list[int] = []

    async def test(store: Store) -> None:
        ids.extend(store.reserve_id() for _ in range(count))

    run(folder, test)
    return ids


def copy_of_a_running_store(folder: Path, copy: Path, count: int) -> list[int]:
    """What a server that stops at once leaves on the disk, and the ids that it gave out."""
    ids: list[int] = []

    async def test(store: Store) -> None:
        ids.extend(store.reserve_id() for _ in range(count))
        await put_all(store, [new_job(i) for i in ids])
        store._ids._finish_ahead()
        shutil.copytree(folder, copy)

    run(folder, test)
    return ids


def set_other_boot(folder: Path) -> None:
    content = bytearray((folder / "last-run").read_bytes())
    content[0:36] = b"0" * 36
    (folder / "last-run").write_bytes(content)
