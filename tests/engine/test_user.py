"""Whom a job runs as, and what that user may do with files."""

from __future__ import annotations

import os
import pwd
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from descriptors import no_descriptors
from jobworker.engine.user import file_rights_of, find_user, own_user

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to see files as another")


def test_by_name_and_by_number() -> None:
    entry = pwd.getpwnam("nobody")
    user = find_user("nobody")
    assert (user.uid, user.gid, user.home) == (entry.pw_uid, entry.pw_gid, entry.pw_dir)
    assert user.gid in user.groups
    assert find_user(str(entry.pw_uid)) == user


def test_a_number_need_not_be_known() -> None:
    user = find_user("123456789")
    assert (user.name, user.uid, user.gid) == ("123456789", 123456789, 123456789)
    assert user.groups == (123456789,)


@pytest.mark.parametrize("name", ["no-such-user", "", "-1", "4294967295", str(1 << 40), "٣"])
def test_no_user(name: str) -> None:
    with pytest.raises(LookupError):
        find_user(name)


@pytest.mark.parametrize("name", ["no-such-user", "123456789"])
def test_without_a_descriptor_it_is_not_known_whether_there_is_a_user(name: str) -> None:
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        find_user(name)


def test_ones_own() -> None:
    assert own_user().uid == os.geteuid()
    with file_rights_of(own_user()):
        assert os.access("/", os.X_OK, effective_ids=True)


@as_root
def test_files_are_seen_as_the_user_sees_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "file").write_text("")
    with file_rights_of(find_user("nobody")), pytest.raises(PermissionError):
        os.stat(tmp_path / "file")
    os.stat(tmp_path / "file")


@as_root
def test_groups_count(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("")
    os.chown(secret, 0, 4711)
    secret.chmod(0o640)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o001)
    nobody = find_user("nobody")
    for user, may_read in ((nobody, False), (replace(nobody, groups=(4711,)), True)):
        with file_rights_of(user):
            assert os.access(secret, os.R_OK, effective_ids=True) == may_read


@as_root
def test_other_threads_keep_their_rights() -> None:
    started, end = threading.Event(), threading.Event()

    def be_nobody() -> None:
        with file_rights_of(find_user("nobody")):
            started.set()
            end.wait(30)

    groups = os.getgroups()
    thread = threading.Thread(target=be_nobody)
    thread.start()
    try:
        assert started.wait(30)
        assert os.access("/etc/shadow", os.W_OK, effective_ids=True)
        assert os.getgroups() == groups
    finally:
        end.set()
        thread.join()


@as_root
def test_the_rights_come_back() -> None:
    before = Path("/proc/thread-self/status").read_text()
    with file_rights_of(find_user("nobody")):
        within = Path("/proc/thread-self/status").read_text()
    after = Path("/proc/thread-self/status").read_text()

    def rights(status: str) -> list[str]:
        return [
            line for line in status.splitlines() if line.startswith(("Uid", "Gid", "Gro", "Cap"))
        ]

    assert rights(after) == rights(before)
    assert rights(within) != rights(before)
