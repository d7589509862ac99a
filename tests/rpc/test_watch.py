"""Files that are read again: when, and what stays where they cannot be used."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.errors import StartupError
from jobworker.rpc.watch import MOST_SETTLING, Watch, WatchedFiles


class Reading:
    """What was read of two files, and what was told of it."""

    def __init__(self, folder: Path, unite: Callable[[str, str], str] | None = None) -> None:
        self.paths = [folder / "one", folder / "two"]
        self.write("1", "1")
        self.read: list[str] = []
        self.outcomes: list[str] = []
        self.only_the_first = False  # is what is read; the other is looked at alone
        self.files = WatchedFiles(
            "test's files",
            self.paths,
            self._load,
            self.read.append,
            lambda _name, problem: self.outcomes.append(problem),
            unite,
        )

    def write(self, *contents: str) -> None:
        for path, content in zip(self.paths, contents, strict=True):
            path.write_text(content)

    def look(self, *, at_once: bool = False) -> None:
        if news := self.files.look(at_once=at_once):
            news()

    def _load(self) -> str:
        if self.only_the_first:
            return self.paths[0].read_text()
        contents = [path.read_text() for path in self.paths]
        if len(set(contents)) != 1:
            raise StartupError("they do not fit together")
        return contents[0]


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(tmp_path)


def test_a_change_is_read_once_it_has_settled(reading: Reading) -> None:
    reading.look()
    reading.write("22", "22")
    reading.look()
    assert reading.read == ["1"]
    reading.write("333", "333")
    reading.look()
    assert reading.read == ["1"]
    for _ in range(3):
        reading.look()
    assert reading.read == ["1", "333"]
    assert reading.outcomes == [""]


def test_who_writes_all_the_time_is_not_waited_for(reading: Reading) -> None:
    for number in range(10, 10 + 2 * MOST_SETTLING):
        reading.write(f"{number}", f"{number}")
        os.utime(reading.paths[0], ns=(number, number))
        reading.look()
    assert len(reading.read) == 2


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_what_cannot_be_read_for_now_is_read_again(reading: Reading, *, is_wrapped: bool) -> None:
    """As where a job has taken all descriptors: a revoked client would stay in for good."""

    def fail() -> str:
        shortage = OSError(errno.ENFILE, "none left")
        if is_wrapped:
            raise StartupError("cannot be read") from shortage
        raise shortage

    load, reading.files._load = reading.files._load, fail
    reading.write("22", "22")
    for _ in range(2 * MOST_SETTLING):
        reading.look()
    assert reading.read == ["1"]
    assert len(reading.outcomes) == 1
    reading.files._load = load
    reading.look()
    assert reading.read == ["1", "22"]
    assert reading.outcomes[1:] == [""]


def test_no_error_ends_the_watch(reading: Reading) -> None:
    def fail() -> str:
        raise ValueError("not what anybody thought of")

    load, reading.files._load = reading.files._load, fail
    reading.write("22", "22")
    reading.look(at_once=True)
    reading.files._load = load
    reading.write("333", "333")
    reading.look(at_once=True)
    assert reading.read == ["1", "333"]
    assert reading.outcomes == ["ValueError('not what anybody thought of')", ""]


def test_a_pipe_is_not_waited_for(reading: Reading) -> None:
    reading.paths[1].unlink()
    os.mkfifo(reading.paths[1])
    reading.look(at_once=True)
    assert reading.read == ["1"]
    assert "is no ordinary file" in reading.outcomes[0]
    reading.paths[1].unlink()
    reading.write("22", "22")
    reading.look(at_once=True)
    assert reading.read == ["1", "22"]


def test_who_asks_does_not_wait(reading: Reading) -> None:
    reading.write("22", "22")
    reading.look(at_once=True)
    assert reading.read == ["1", "22"]
    reading.look(at_once=True)
    assert reading.read == ["1", "22"]


def test_what_cannot_be_used_is_told_once(reading: Reading) -> None:
    reading.write("1", "22")
    for _ in range(4):
        reading.look()
    assert reading.read == ["1"]
    assert reading.outcomes == ["they do not fit together"]
    reading.write("22", "22")
    for _ in range(2):
        reading.look()
    assert reading.read == ["1", "22"]


def test_what_is_written_to_meanwhile_is_left_for_the_next_look(reading: Reading) -> None:
    load = reading.files._load

    def load_and_change() -> str:
        found: str = load()
        reading.write("333", "333")
        reading.files._load = load
        return found

    reading.files._load = load_and_change
    reading.write("22", "22")
    reading.look(at_once=True)
    assert reading.read == ["1"]
    reading.look(at_once=True)
    assert reading.read == ["1", "333"]


def test_what_is_written_to_whenever_it_is_read_is_used_all_the_same(reading: Reading) -> None:
    load, number = reading.files._load, 10

    def load_and_change() -> str:
        nonlocal number
        found: str = load()
        number += 1
        reading.write(f"{number}", f"{number}")
        os.utime(reading.paths[0], ns=(number, number))
        return found

    reading.files._load = load_and_change
    reading.write("10", "10")
    for _ in range(10):
        reading.look()
    # After two looks in which it changes two in which it changes while it is read, and so on.
    assert reading.read == ["1", "11", "13"]
    reading.files._load = load
    for _ in range(3):
        reading.look()
    assert reading.read[-1] == f"{number}"


def test_what_changes_meanwhile_and_cannot_be_used_is_left_for_the_next_look(
    reading: Reading,
) -> None:
    load = reading.files._load
    number = 10

    def change_and_load() -> str:
        nonlocal number
        number += 1
        reading.write("1", f"{number}")
        return str(load())

    reading.files._load = change_and_load
    reading.write("10", "10")
    for _ in range(10):
        reading.look()
    assert (reading.read, reading.outcomes) == (["1"], [])


def test_a_change_that_leaves_size_and_time_as_they_were_is_seen(reading: Reading) -> None:
    times = [os.stat(path) for path in reading.paths]
    reading.write("2", "2")
    for path, status in zip(reading.paths, times, strict=True):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        reading.look()
    assert reading.read == ["1", "2"]


@pytest.fixture
def keeping(tmp_path: Path) -> Reading:
    return Reading(tmp_path, lambda old, new: "".join(sorted({*old, *new})))


def test_what_is_gone_counts_until_nobody_writes(
    keeping: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping.write("", "")
    for _ in range(4):
        keeping.look()
    keeping.look(at_once=True)
    keeping.write("23", "23")
    keeping.look(at_once=True)
    for _ in range(4):
        keeping.look()
    assert keeping.read == ["1", "1", "123"]
    monkeypatch.setattr("jobworker.rpc.watch.QUIET_SECONDS", 0.0)
    for _ in range(4):
        keeping.look()
    assert keeping.read == ["1", "1", "123", "23"]
    assert keeping.outcomes == [""] * 3


def test_what_only_grows_is_read_once(keeping: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping.write("12", "12")
    keeping.look(at_once=True)
    monkeypatch.setattr("jobworker.rpc.watch.QUIET_SECONDS", 0.0)
    for _ in range(4):
        keeping.look()
    assert keeping.read == ["1", "12"]


def test_a_change_beside_that_changes_nothing_is_not_told(
    keeping: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the server's certificates are renewed: the CA's signature counts for CRLs."""
    caplog.set_level(logging.INFO)
    keeping.only_the_first = True
    keeping.paths[1].write_text("renewed")
    keeping.look(at_once=True)
    keeping.look(at_once=True)
    assert caplog.messages == []
    keeping.paths[0].write_text("1")  # the same, but written
    keeping.look(at_once=True)
    assert caplog.messages[0].startswith("read the test's files again")


def test_what_is_gone_counts_where_the_rest_is_broken(
    keeping: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping.write("2", "2")
    keeping.look(at_once=True)
    keeping.write("2", "3")
    monkeypatch.setattr("jobworker.rpc.watch.QUIET_SECONDS", 0.0)
    for _ in range(4):
        keeping.look()
    assert keeping.read == ["1", "12"]
    assert keeping.outcomes == ["", "they do not fit together"]
    keeping.write("3", "3")
    for _ in range(4):
        keeping.look()
    assert keeping.read == ["1", "12", "3"]


def test_what_is_written_to_while_it_is_read_takes_nothing_back(
    keeping: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobworker.rpc.watch.QUIET_SECONDS", 0.0)
    load = keeping.files._load

    def load_and_change() -> str:
        found: str = load()
        keeping.write(found, found)
        return found

    keeping.files._load = load_and_change
    keeping.write("2", "2")
    for _ in range(4 + MOST_SETTLING):
        keeping.look()
    assert keeping.read[1:]
    assert {*keeping.read[1:]} == {"12"}
    keeping.files._load = load
    for _ in range(4):
        keeping.look()
    assert keeping.read[-1] == "2"


def test_a_file_that_is_missing_at_first(tmp_path: Path) -> None:
    with pytest.raises(StartupError):
        WatchedFiles("test's files", [tmp_path / "x"], _fail, print)


def test_what_fails_at_a_look_does_not_end_the_watch() -> None:
    async def main() -> None:
        looked = asyncio.Queue[None]()

        def look() -> None:
            looked.put_nowait(None)
            raise RuntimeError

        watch = Watch()
        watch.at_each_look(look)
        watch.start()
        for _ in range(2):
            watch.look_now()
            await asyncio.wait_for(looked.get(), 10)
        await watch.close()

    asyncio.run(main())


def test_a_file_system_that_does_not_answer_keeps_nobody_from_ending(reading: Reading) -> None:
    answer = threading.Event()

    def wait() -> str:
        assert answer.wait(60)
        return "late"

    async def main() -> None:
        watch = Watch()
        watch.add(reading.files)
        watch.start()
        reading.files._load = wait
        reading.write("22", "22")
        watch.look_now()
        await asyncio.wait_for(watch.close(), 10)

    asyncio.run(main())
    answer.set()
    assert reading.read == ["1"]


def _fail() -> None:
    raise StartupError("missing")
