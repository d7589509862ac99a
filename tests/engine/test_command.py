"""Which file a command names, and what is in a job's environment."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobworker.engine import command as module
from jobworker.engine.command import (
    LONGEST_SEARCH_SECONDS,
    MOST_FOLDERS,
    Look,
    Seen,
    base_environment,
    check_working_directory,
    home_of,
    look_in_memory,
    look_on_disk,
    resolve,
)
from jobworker.engine.files import JobFiles
from jobworker.engine.user import own_user
from jobworker.errors import InvalidRequestError
from slow_links import slow_way


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "program"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_by_path(program: Path) -> None:
    assert resolve(str(program), {}, "/") == str(program)


def test_relative_to_the_working_directory(program: Path, tmp_path: Path) -> None:
    assert resolve("bin/program", {}, str(tmp_path)) == str(program)
    assert resolve("./program", {}, str(program.parent)) == str(program)


def test_what_is_above_where_a_link_leads(program: Path, tmp_path: Path) -> None:
    """Not what is above the link: that may be another one."""
    other = tmp_path / "other"
    (other / "inner").mkdir(parents=True)
    os.link(program, other / "program")
    (tmp_path / "bin/link").symlink_to(other / "inner")
    found = resolve("link/../program", {}, str(program.parent))
    program.unlink()
    assert os.path.exists(found)


def test_in_the_jobs_own_path(program: Path) -> None:
    assert resolve("program", {"PATH": f"/no/such:{program.parent}"}, "/") == str(program)


def test_in_the_default_path() -> None:
    assert os.path.basename(resolve("sh", {}, "/")) == "sh"


def test_an_empty_part_of_path_is_the_working_directory(program: Path) -> None:
    assert resolve("program", {"PATH": ":/bin"}, str(program.parent)) == str(program)


def test_what_cannot_be_executed_is_passed_over(program: Path, tmp_path: Path) -> None:
    other = tmp_path / "first"
    other.mkdir()
    (other / "program").write_text("")
    assert resolve("program", {"PATH": f"{other}:{program.parent}"}, "/") == str(program)


@pytest.mark.parametrize(
    ("command", "problem", "number"),
    [
        ("no-such-program", "not found in the job's PATH", errno.ENOENT),
        ("/no/such/program", "does not exist", errno.ENOENT),
        ("/etc/passwd/x", "does not exist", errno.ENOENT),
        ("/etc", "is a directory", errno.EISDIR),
        ("/etc/passwd", "is not executable by its user", errno.EACCES),
        ("/dev/null", "is not a regular file", errno.EACCES),
    ],
)
def test_what_names_no_program(command: str, problem: str, number: int) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        resolve(command, {}, "/")
    assert (caught.value.field, caught.value.error_number) == ("command", number)


def test_found_in_path_and_not_executable(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(InvalidRequestError, match="is not executable") as caught:
        resolve("data", {"PATH": f"{tmp_path}:/no/such"}, "/")
    assert caught.value.error_number == errno.EACCES


def test_a_path_of_very_many_folders_is_not_searched(program: Path) -> None:
    """Others would wait meanwhile."""
    most = "/no/such:" * (MOST_FOLDERS - 1) + str(program.parent)
    assert resolve("program", {"PATH": most}, "/") == str(program)
    with pytest.raises(InvalidRequestError, match="at most 100 are searched"):
        resolve("program", {"PATH": f"/no/such:{most}"}, "/")
    assert resolve(str(program), {"PATH": f"/no/such:{most}"}, "/") == str(program)


def test_a_path_through_very_many_links_is_not_searched_to_its_end(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as jobs can make. Each look would be bounded by the kernel alone, by 40 links."""
    monkeypatch.setattr(module, "LONGEST_SEARCH_SECONDS", 0.002)  # less than on any machine
    way = slow_way(tmp_path / "links")
    slow = f"{way}:" * (MOST_FOLDERS - 1)
    before = time.thread_time()
    with pytest.raises(InvalidRequestError, match="PATH takes too long"):
        resolve("program", {"PATH": f"{slow}{program.parent}"}, "/")
    assert time.thread_time() - before < 2 * LONGEST_SEARCH_SECONDS
    monkeypatch.undo()
    assert resolve("program", {"PATH": f"{way}:{program.parent}"}, "/") == str(program)


def test_what_the_job_does_not_see_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the files of another process, by /proc."""
    looks, stat = [], os.stat

    def look(path: Any, **options: Any) -> os.stat_result:
        looks.append(str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", look)
    path = f"/proc/{os.getpid()}/root"
    for refused in (
        lambda: resolve("sh", {"PATH": f"{path}/bin"}, "/", JobFiles().find),
        lambda: check_working_directory(path, JobFiles().find),
    ):
        with pytest.raises(InvalidRequestError, match="does not show"):
            refused()
    assert not [each for each in looks if each.startswith(path)]
    # Where nothing may block, that is the first look; but such links it does not follow.
    with pytest.raises(BlockingIOError):
        look_in_memory(f"{path}/bin/sh")


def test_what_is_too_long_for_a_path_is_not_followed() -> None:
    def follow(path: str, _place: str) -> str:
        raise AssertionError(len(path))

    longest = "/a" * (64 << 10)
    with pytest.raises(InvalidRequestError, match="File name too long"):
        check_working_directory(longest, follow)
    with pytest.raises(InvalidRequestError, match="File name too long"):
        resolve(longest, {}, "/", follow)
    with pytest.raises(InvalidRequestError, match="File name too long"):
        resolve("x", {"PATH": longest}, "/", follow)


def test_what_is_too_long_for_a_path_is_not_quoted() -> None:
    """Once for each folder of a PATH: milliseconds of the event loop."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve("\x01" * 65_000, {}, "/")
    assert len(str(caught.value)) < 100
    assert caught.value.error_number == errno.ENAMETOOLONG
    with pytest.raises(InvalidRequestError) as caught:
        check_working_directory("/" + "\x01" * 65_000)
    assert len(str(caught.value)) < 100
    assert caught.value.error_number == 0


@pytest.mark.parametrize("path", ["/no/such", "/etc/passwd"])
def test_no_working_directory(path: str) -> None:
    with pytest.raises(InvalidRequestError, match="working_directory"):
        check_working_directory(path)


def test_nothing_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PATH", "/the/servers")
    environment = base_environment(7, own_user(), "/home")
    assert environment["JOB_ID"] == "7"
    assert "SECRET" not in environment
    assert "/the/servers" not in environment["PATH"]


def patient_look(path: str) -> Seen:
    """The kernel also says that it cannot tell where somebody renames something just then."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            return look_in_memory(path)
        os.path.exists(path)  # the kernel may have forgotten it
        time.sleep(0.001)
    raise AssertionError(path)


@pytest.mark.parametrize("look", [look_on_disk, patient_look])
def test_a_home_is_a_directory_that_is_there_for_the_job(program: Path, look: Look) -> None:
    user = replace(own_user(), home=str(program.parent))
    assert home_of(user, look=look) == user.home
    assert home_of(user, lambda _path, _place: None, look) == "/tmp"
    missing = program.with_name("no-such")
    assert not missing.exists()  # now the kernel knows
    for home in (program, missing):
        assert home_of(replace(user, home=str(home)), look=look) == "/tmp"


# Without waiting for a disk


def test_what_is_in_memory_is_seen_as_from_the_disk(program: Path) -> None:
    link = program.with_name("link")
    link.symlink_to(program)
    plain = program.with_name("plain")
    plain.touch()
    for path in (program, link, program.parent, plain):
        seen = patient_look(str(path))
        assert seen == (*look_on_disk(str(path))[:2], os.path.realpath(path))
    assert resolve("link", {"PATH": str(program.parent)}, "/", look=patient_look) == str(link)


def test_what_is_not_there_is_known_too(program: Path) -> None:
    path = str(program.with_name("no-such"))
    assert not os.path.exists(path)  # now the kernel knows
    with pytest.raises(FileNotFoundError):
        patient_look(path)
    with pytest.raises(InvalidRequestError, match="does not exist"):
        resolve(path, {}, "/", look=patient_look)


def test_what_many_parts_of_are_not_there_is_left_to_a_thread(tmp_path: Path) -> None:
    """It takes many looks, and each may be slow."""
    path = slow_way(tmp_path / "links") + "/x" * 1000
    began = time.monotonic()
    for _ in range(3):  # once the kernel knows
        with pytest.raises(BlockingIOError):
            resolve(path, {}, "/", look=look_in_memory)
        with contextlib.suppress(OSError):
            look_on_disk(path)
    assert time.monotonic() - began < 1
    with pytest.raises(InvalidRequestError, match="does not exist"):
        resolve(path, {}, "/")


@pytest.mark.parametrize("look", [look_on_disk, patient_look])
def test_it_is_not_told_which_names_are_in_what_the_job_does_not_see(look: Look) -> None:
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:  # not in /tmp
        hidden, link = Path(folder, "hidden"), Path(folder, "link")
        (hidden / "there").mkdir(parents=True)
        link.symlink_to(hidden)
        find = JobFiles(hidden=(str(hidden),)).find
        for above in (hidden, link):
            for path in (above / "there", above / "absent", above / "absent" / "x"):
                os.path.exists(path)  # now the kernel knows
                with pytest.raises(InvalidRequestError, match="does not show"):
                    check_working_directory(str(path), find, look)
        absent = "/no-such-folder/x"  # wherever this file is, not in what each job has of its own
        assert not os.path.exists(absent)
        with pytest.raises(InvalidRequestError, match="No such file"):
            check_working_directory(absent, find, look)


def test_what_must_be_asked_for_is_not_waited_for(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older kernel answers, which cannot tell; nothing else is sure not to be cached."""
    unknown = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, 1 << 40)
    monkeypatch.setattr(module, "ONLY_CACHED", unknown)
    with pytest.raises(BlockingIOError):
        look_in_memory(str(program))
    with pytest.raises(BlockingIOError):
        resolve(str(program), {}, "/", look=look_in_memory)
    with pytest.raises(BlockingIOError):
        check_working_directory(str(program.parent), look=look_in_memory)
    with pytest.raises(BlockingIOError):
        home_of(replace(own_user(), home=str(program.parent)), look=look_in_memory)
