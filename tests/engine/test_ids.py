"""Ids that are never given out twice, whatever ends the server or the machine."""

from __future__ import annotations

import asyncio
import faulthandler
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.stores import (
    DEADLINE_SECONDS,
    copy_of_a_running_store,
    every_job,
    nothing,
    run,
    set_other_boot,
    take,
)
from jobworker.engine import ids as ids_module
from jobworker.engine.ids import LastRun
from jobworker.engine.store import Store
from jobworker.errors import StateFolderError


def test_ids_count_up_from_1_without_a_gap(tmp_path: Path) -> None:
    ids = [job_id for count in (1, 2, 5000, 3) for job_id in take(tmp_path, count)]
    assert ids == list(range(1, 5007))


def test_who_waits_for_ids_when_they_have_just_come_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in each turn of the loop, so also in that between the end of the write and its news."""
    monkeypatch.setattr(ids_module, "ID_BLOCK", 20)
    faulthandler.dump_traceback_later(DEADLINE_SECONDS, exit=True)  # it would take the loop
    ids: list[int] = []

    async def take_one(store: Store) -> None:
        await store.wait_for_ids()
        ids.append(store.reserve_id())

    async def test(store: Store) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(5000):
                group.create_task(take_one(store))
                await asyncio.sleep(0)

    run(tmp_path, test)
    faulthandler.cancel_dump_traceback_later()
    assert sorted(ids) == list(range(1, 5001))


@pytest.mark.parametrize("count", [0, 1, 499, 501, 999, 1000, 1001, 2500])
def test_ids_after_a_power_loss(tmp_path: Path, count: int) -> None:
    """The records of the last second are gone, and so is what last-run said."""
    folder, copy = tmp_path / "state", tmp_path / "copy"
    folder.mkdir()
    take(folder, 3)
    old = (folder / "jobs.db").read_bytes()
    ids = copy_of_a_running_store(folder, copy, count)
    for path in copy.glob("jobs.db*"):
        path.unlink()
    (copy / "jobs.db").write_bytes(old)
    content = bytearray((copy / "last-run").read_bytes())
    content[64:72] = (1).to_bytes(8, sys.byteorder)
    (copy / "last-run").write_bytes(content)
    set_other_boot(copy)

    assert take(copy, 1) > ids[-1:]
    assert take(copy, 1)[0] <= 3 + count + 2 * ids_module.ID_BLOCK


def test_a_killed_process_costs_no_id(tmp_path: Path) -> None:
    """The machine goes on, and with it what last-run says."""
    ids = copy_of_a_running_store(tmp_path, tmp_path / "copy", 10)
    assert take(tmp_path / "copy", 1) == [ids[-1] + 1]


@pytest.mark.parametrize("removed", [{"jobs.db"}, {"last-run"}, {"jobs.db", "last-run"}])
def test_ids_after_files_were_deleted(tmp_path: Path, removed: set[str]) -> None:
    ids = take(tmp_path, 10)
    for name in removed:
        (tmp_path / name).unlink()
    assert take(tmp_path, 1) == [ids[-1] + 1]


def test_ids_where_only_the_records_are_left(tmp_path: Path) -> None:
    ids = copy_of_a_running_store(tmp_path, tmp_path / "copy", 10)
    for name in ("next-id", "last-run"):
        (tmp_path / name).unlink()
    assert take(tmp_path, 1) == [ids[-1] + 1]


def test_of_what_could_not_be_noted_at_the_start(tmp_path: Path) -> None:
    """As on a full disk: it is once an id is given out, or a power loss would bring back the clean
    end of the run before, and its ids."""
    path = tmp_path / "last-run"
    first = LastRun(path)
    first.begin(5)
    first.end()
    second = LastRun(path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        second.begin(5)
        with pytest.raises(OSError, match="too large"):
            second.set_next_id(6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes().startswith(b"clean")
    second.set_next_id(6)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    assert path.read_bytes().startswith(boot)
    second.close()


def test_next_id_that_is_no_number(tmp_path: Path) -> None:
    take(tmp_path, 1)
    (tmp_path / "last-run").unlink()
    (tmp_path / "next-id").write_text("what?\n")
    with pytest.raises(StateFolderError, match="next-id holds no number; write one"):
        run(tmp_path, nothing)


# $0: an image of btrfs, $1: a folder for it; then Python, and two programs for it.
TWICE = """
set -e
mount -o loop "$0" "$1"
"$2" -c "$3" "$1"
exec "$2" -c "$4" "$1"
"""

FILLED = """if True:
    import asyncio, ctypes, os, pathlib, sys
    from jobworker.engine.store import Store
    from jobworker.errors import StoreError
    from jobworker.job import JobSpec, created

    def fill(folder, name, size):
        file = os.open(f"{folder}/{name}{size}", os.O_CREAT | os.O_WRONLY)
        try:
            while True:
                os.write(file, bytes(size))
        except OSError:
            ctypes.CDLL(None).syncfs(file)

    async def main(folder):
        store = Store.open(pathlib.Path(folder, "jobs.db"))
        await store.put(created(store.reserve_id(), JobSpec("/bin/true"), 1))
        for name in "abc":
            for size in (1 << 20, 64 << 10, 4 << 10, 1):
                fill(folder, name, size)
        for attempt in range(3):
            try:
                print(store.reserve_id())
            except StoreError as error:
                print(error)
            try:
                await store.put(created(2, JobSpec("/bin/true"), 1))
            except StoreError:
                print("not put")
        sys.stdout.flush()
        os._exit(0)  # as by kill -9

    asyncio.run(main(sys.argv[1]))
"""

OPENED_AGAIN = """if True:
    import asyncio, pathlib, sys
    from jobworker.engine.store import Store

    async def main(path):
        store = Store.open(path)
        print("open", [job.id for job in await store.unended()])
        await store.close()

    asyncio.run(main(pathlib.Path(sys.argv[1], "jobs.db")))
"""


def test_a_full_disk_on_which_nothing_is_written_in_place(tmp_path: Path) -> None:
    """btrfs takes room for each change, of a mapped file too: without, the change is SIGBUS."""
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("NOT TESTED: a full btrfs, as there is no program mkfs.btrfs")
    image, place = tmp_path / "image", tmp_path / "place"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True)
    place.mkdir()
    mounts = ["unshare", "--mount"]
    if subprocess.run([*mounts, "mount", "-o", "loop", image, place], check=False).returncode != 0:
        pytest.skip("NOT TESTED: a full btrfs, which cannot be mounted here")
    paths = [str(image), str(place), sys.executable]
    script = ["sh", "-c", TWICE, *paths, FILLED, OPENED_AGAIN]
    done = subprocess.run([*mounts, *script], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert "no job id can be given out: No space left on device" in lines
    assert lines[-1] == "open [1]"


KILLED = """if True:
    import asyncio, pathlib, sys
    from jobworker.engine.store import Store
    from jobworker.job import JobSpec, created

    async def main():
        store = Store.open(pathlib.Path(sys.argv[1]))
        print("open", store.reserve_id(), flush=True)
        while True:
            ids = [store.reserve_id() for _ in range(20)]
            put = [store.put(created(i, JobSpec("/bin/true"), i)) for i in ids[::2]]
            await asyncio.gather(*put)
            print(*ids, flush=True)

    asyncio.run(main())
"""


def test_kill_9(tmp_path: Path) -> None:
    """No id is given out twice, put or not, and nothing that was acknowledged is missing."""
    given: list[int] = []
    put: list[int] = []
    for kill in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / "jobs.db"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        given.append(int(process.stdout.readline().split()[1]))
        # Each at another moment of the writer, in one block of ids and beyond it.
        for _ in range(1 + 17 * kill):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        *lines, _ = (process.stdout.read() + "\n").split("\n")
        process.wait()
        process.stdout.close()
        for line in lines:
            given += map(int, line.split())
            put += list(map(int, line.split()))[::2]

    async def test(store: Store) -> None:
        known = {job.id for job in await every_job(store)}
        assert set(put) <= known
        assert store.reserve_id() > max(given)

    run(tmp_path, test)
    assert len(set(given)) == len(given)
    assert given == sorted(given)
