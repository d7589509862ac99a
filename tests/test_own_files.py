"""What of the machine's files is the server's own. That jobs neither see nor change it is in
functional/test_escapes.py and functional/test_isolation_without_root.py."""

from __future__ import annotations

import os
import site
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobworker
from descriptors import no_descriptors
from jobworker import own_files
from jobworker.config import Settings
from jobworker.engine.mounts import _other_places
from jobworker.engine.user import User, find_user, own_user
from jobworker.errors import StartupError
from jobworker.own_files import (
    ACL_GROUP,
    ACL_USER,
    _homes,
    _loaded_from,
    _matching,
    _may_change,
    _own_above,
    files_of_jobs,
)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has other users, and /")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("certs", "state"):
        (tmp_path / name).mkdir()
    return Settings(cert_path=tmp_path / "certs", state_dir=tmp_path / "state", hidden=())


def test_what_is_named_in_its_settings_is_hidden(settings: Settings, tmp_path: Path) -> None:
    assert {settings.cert_path, settings.state_dir} <= set(files_of_jobs(settings).hidden)
    for name in ("file", "clients", "revoked", "audit_log"):
        path = tmp_path / name
        named: Any = {name: path}
        assert path not in files_of_jobs(settings).hidden
        assert path in files_of_jobs(replace(settings, **named)).hidden


def test_a_log_is_hidden_with_what_rotations_leave(settings: Settings, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("audit.log", "audit.log.1", "audit.log-20261129.gz"):
        (logs / name).touch()
    settings = replace(settings, audit_log=logs / "audit.log")
    assert logs in files_of_jobs(settings).hidden
    (logs / "audit.logs").touch()  # of which nobody knows what it is
    hidden = {path for path in files_of_jobs(settings).hidden if path.is_relative_to(logs)}
    assert hidden == {path for path in logs.iterdir() if path.name != "audit.logs"}


def test_without_a_descriptor_no_folder_is_taken_for_empty(tmp_path: Path) -> None:
    (tmp_path / ".netrc").touch()
    assert _matching(tmp_path, ".*") == [tmp_path / ".netrc"]
    assert _matching(tmp_path / ".netrc", "*") == _matching(tmp_path / "none", "*") == []
    with no_descriptors():
        with pytest.raises(StartupError, match="cannot be looked at: Too many open files"):
            _matching(tmp_path, ".*")
        with pytest.raises(StartupError, match="cannot be looked at: Too many open files"):
            list(_other_places(str(tmp_path), {}))


def test_what_links_among_its_files_lead_to_is_hidden(settings: Settings, tmp_path: Path) -> None:
    for number, folder in enumerate([settings.cert_path, settings.state_dir]):
        elsewhere = tmp_path / f"elsewhere{number}"
        elsewhere.touch()
        (folder / "some.pem").symlink_to(elsewhere)
        (folder / "broken.pem").symlink_to(tmp_path / "none")
        assert elsewhere in files_of_jobs(settings).hidden
    assert tmp_path / "none" not in files_of_jobs(settings).hidden


def test_where_the_root_is_a_home_names_with_a_dot_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of users of containers, also where it is theirs."""
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(own_files, "_matching", lambda folder, _: [folder / ".netrc"])
    assert Path("/.netrc") in _homes([])
    assert Path("/") not in _homes([])


def test_a_folder_that_jobs_cannot_do_without_is_not(settings: Settings) -> None:
    files = files_of_jobs(replace(settings, cert_path=Path("/etc")))
    assert Path("/etc") not in files.hidden
    assert set(Path("/etc").glob("*.pem")) <= set(files.hidden)


def test_what_is_no_folder_of_modules_protects_none(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the name that an editable install has there: the working directory may be anything."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", ["__editable__.some.finder.__path_hook__", *sys.path])
    assert not any(path.is_relative_to(work) for path in files_of_jobs(settings).read_only)


def test_what_it_imports_from_is_read_only(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("modules", "bytecode"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "none"), ""])
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "bytecode"))
    read_only = files_of_jobs(settings).read_only
    code = {Path(sys.prefix), Path(jobworker.__file__).parent}
    assert code | {tmp_path / name for name in ("modules", "bytecode", "none")} <= set(read_only)


def test_where_modules_of_the_user_would_be_is_read_only(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not be there yet."""
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(site, "USER_SITE", str(tmp_path / "packages"))
    assert tmp_path / "packages" in files_of_jobs(settings).read_only
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    assert tmp_path / "packages" not in files_of_jobs(settings).read_only


def test_what_it_has_loaded_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("modules", "libraries", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "modules" / "later").symlink_to(tmp_path / "cache")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/none:{tmp_path}/libraries")
    named = {Path("/none"), tmp_path / "libraries", tmp_path / "modules" / "later"}
    code = Path(jobworker.__file__).parent
    loaded = set(_loaded_from([Path(sys.prefix), Path(sys.base_prefix), code]))
    assert named <= loaded
    assert any(path.name.startswith("libc.") for path in loaded)
    assert not any(path.is_relative_to(code) for path in loaded)


@as_root
def test_what_it_has_loaded_is_read_only_where_a_job_could_change_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, own = tmp_path / "jobs", tmp_path / "own"
    for folder in (jobs, own):
        folder.mkdir()
    os.chown(jobs, find_user(settings.job_user).uid, 0)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{jobs}:{own}")
    assert {jobs, own} & set(files_of_jobs(settings).read_only) == {jobs}


@as_root
@pytest.mark.parametrize(
    ("mode", "owner", "may_change"),
    [
        (0o555, 4711, True),
        (0o755, 0, False),
        (0o775, 0, True),
        (0o757, 0, False),  # its group has less than others
        (0o1777, 0, False),
    ],
)
def test_what_a_jobs_user_may_change(
    tmp_path: Path, mode: int, owner: int, may_change: bool
) -> None:
    os.chown(tmp_path, owner, 4712)
    tmp_path.chmod(mode)
    user = User("some", 4711, 4712, (4712,), "/")
    assert _may_change(tmp_path, user) is may_change


@as_root
@pytest.mark.parametrize(
    ("tag", "number", "mask", "may_change"),
    [
        (ACL_USER, 4711, 7, True),
        (ACL_GROUP, 4712, 7, True),
        (ACL_USER, 4711, 5, False),
        (ACL_USER, 4712, 7, False),
        (ACL_GROUP, 4711, 7, False),
    ],
)
def test_what_an_acl_lets_a_jobs_user_change(
    tmp_path: Path, tag: int, number: int, mask: int, *, may_change: bool
) -> None:
    unnamed = (1 << 32) - 1
    entries = [(0x1, 7, unnamed), (tag, 7, number), (0x4, 5, unnamed)]
    entries += [(0x10, mask, unnamed), (0x20, 5, unnamed)]
    entries.sort()
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_access", struct.pack("<I", 2) + packed)
    except OSError as error:
        pytest.skip(f"no ACLs here: {error}")
    assert _may_change(tmp_path, User("some", 4711, 4712, (4712,), "/")) is may_change


def test_what_is_not_there_nobody_may_change(tmp_path: Path) -> None:
    assert not _may_change(tmp_path / "none", own_user())


@as_root
@pytest.mark.parametrize(("profile", "is_told"), [("default", True), ("none", False)])
def test_what_is_read_only_is_told_where_it_is_so(
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    profile: str,
    *,
    is_told: bool,
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    os.chown(own, 4711, 4711)
    settings = replace(settings, profile=profile, profiles_allowed=("none",))
    settings = replace(settings, cert_path=own / "certs", job_user="4711")
    assert (own in files_of_jobs(settings).read_only) is is_told
    assert (f"{own} is read-only for jobs" in caplog.text) is is_told


@as_root
def test_all_folders_above_count(tmp_path: Path) -> None:
    """Another file system may be mounted in one, and another mount of it be elsewhere."""
    code = tmp_path / "folder" / "code"
    code.mkdir(parents=True)
    assert _own_above([code], own_user()) == set(code.parents)
