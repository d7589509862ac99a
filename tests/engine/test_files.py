"""Where a job's paths lead on this machine, and what may be asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jobworker.engine.files import LONGEST_CHECK_SECONDS, MOST_LINKS, MOST_PARTS, Allowed, JobFiles
from jobworker.errors import InvalidRequestError
from jobworker.job import Bind

ALLOWED = Allowed(
    roots=[Path("/srv/roots")], binds=["/srv/data", "/srv/shared:ro", "/srv/shared/own"]
)


@pytest.mark.parametrize("path", ["/srv/roots", "/srv/roots/a", "/srv/roots/a/b"])
def test_roots_that_are_allowed(path: str) -> None:
    assert ALLOWED.root(path) == path


@pytest.mark.parametrize("path", ["/srv", "/", "/srv/roots2", "/srv/root"])
def test_roots_that_are_not(path: str) -> None:
    with pytest.raises(InvalidRequestError, match="ROOTS_ALLOWED"):
        ALLOWED.root(path)
    with pytest.raises(InvalidRequestError, match="ROOTS_ALLOWED"):
        Allowed().root(path)


@pytest.mark.parametrize(
    ("source", "read_only", "problem"),
    [
        ("/srv/data", False, ""),
        ("/srv/data/a", True, ""),
        ("/srv/shared", True, ""),
        ("/srv/shared/own/a", False, ""),
        ("/srv/shared", False, "ask for it with :ro"),
        ("/srv/shared/other", False, "ask for it with :ro"),
        ("/srv", True, "BINDS_ALLOWED"),
        ("/srv/database", True, "BINDS_ALLOWED"),
        ("/", True, "BINDS_ALLOWED"),
    ],
)
def test_binds_that_are_allowed(source: str, *, read_only: bool, problem: str) -> None:
    bind = Bind(source, "/mnt", read_only)
    if not problem:
        assert ALLOWED.bind(bind, 0) == bind
        return
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        ALLOWED.bind(bind, 3)
    assert caught.value.field == "binds[3].source"


def test_what_the_setting_names_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    allowed = Allowed(roots=[tmp_path / "link"])
    for name in ("link", "real"):
        assert allowed.root(f"{tmp_path}/{name}/a") == f"{tmp_path}/real/a"
        assert allowed.root(f"{tmp_path}/{name}") == f"{tmp_path}/real"


def test_everything_can_be_allowed() -> None:
    assert Allowed(roots=[Path("/")]).root("/srv/a") == "/srv/a"


# Where paths lead. tmp_path is in /tmp, which no job would see: so these do not ask for `find`.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("usr/bin", "mnt", "etc"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("target", "path", "leads_to"),
    [
        ("usr/bin", "/link/sh", "/usr/bin/sh"),
        ("/usr/bin", "/link/../x", "/usr/x"),
        ("../../../usr", "/link", "/usr"),
        ("/mnt/there", "/link", "/etc/x"),
        ("/link", "/link", "/link"),
        ("none", "/link/a", "/none/a"),
    ],
)
def test_links_are_followed_in_the_jobs_root(
    root: Path, target: str, path: str, leads_to: str
) -> None:
    (root / "link").symlink_to(target)
    (root.parent / "data/there").symlink_to("/etc/x")
    files = JobFiles(root=str(root), binds=(Bind(f"{root.parent}/data", "/mnt"),))
    assert files.real_path(path) == leads_to


def test_behind_what_is_not_there_nothing_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does not; else `..` would lead to folders that another job keeps locked."""
    looked: list[str] = []

    def readlink(path: str) -> str:
        looked.append(path)
        return original(path)

    original = os.readlink
    monkeypatch.setattr(os, "readlink", readlink)
    (tmp_path / "link").symlink_to(f"{tmp_path}/none/../held/x")
    for path in (f"{tmp_path}/none/../held/x", f"{tmp_path}/link"):
        assert JobFiles().real_path(path) == f"{tmp_path}/none/../held/x"
    (tmp_path / "here").symlink_to(".")
    JobFiles().real_path(f"{tmp_path}/{'here/' * (MOST_LINKS + 1)}held/x")
    assert not [path for path in looked if "held" in path]


def test_links_that_make_a_path_very_long_are_not_followed_to_its_end(root: Path) -> None:
    """Some jobs may make such links where others look."""
    target = "usr/../" * (MOST_PARTS // 8)
    for number, before in enumerate(["usr", *"012345"]):
        (root / str(number)).symlink_to(target + before)
    files = JobFiles(root=str(root))
    assert files.real_path("/1/bin") == "/usr/bin"
    assert files.real_path("/6/bin") != "/usr/bin"


def test_no_link_to_another_processes_files_is_followed(tmp_path: Path) -> None:
    """What the machine has there is not what the job has."""
    root = f"/proc/{os.getpid()}/root"
    (tmp_path / "link").symlink_to(root)
    assert JobFiles().real_path(f"{root}/etc") == f"{root}/etc"
    assert JobFiles().find(f"{root}/etc") is None
    assert JobFiles().real_path(f"{tmp_path}/link/etc") == f"{root}/etc"


def test_where_the_job_would_find_it() -> None:
    files = JobFiles(
        hidden=("/srv/data/hidden",),
        root="/srv/root",
        binds=(Bind("/srv/data", "/mnt"), Bind("/srv/more", "/mnt/more"), Bind("/srv", "/tmp/a")),
    )
    for path, found in {
        "/": "/srv/root/",
        "/usr/bin/sh": "/srv/root/usr/bin/sh",
        "/run/x": "/srv/root/run/x",
        "/mnt": "/srv/data",
        "/mnt/x": "/srv/data/x",
        "/mnt2": "/srv/root/mnt2",
        "/mnt/more/x": "/srv/more/x",
        "/tmp/a/x": "/srv/x",
        "/tmp": "/tmp",
        "/dev/null": "/dev/null",
        "/tmp/b": None,
        "/proc/1": None,
        "/mnt/hidden": None,
        "/mnt/hidden/x": None,
        "/tmp/a/data/hidden": None,
    }.items():
        assert files.find(path) == found, path


# Of /tmp jobs have their own; and there the tests may be.
OUTSIDE_OF_TMP = "/srv" if os.access("/srv", os.W_OK) else Path(__file__).parent

# Exchanges two names until it is ended.
RESTLESS = """
import ctypes, sys
renameat2 = ctypes.CDLL(None).renameat2
print("goes on", flush=True)
while True:
    renameat2(-100, sys.argv[1].encode(), -100, sys.argv[2].encode(), 2)
"""


@pytest.mark.parametrize(("depth", "is_taken"), [(8, True), (480, False)])
def test_deep_binds_are_not_looked_up_for_long(depth: int, *, is_taken: bool) -> None:
    with tempfile.TemporaryDirectory(dir=OUTSIDE_OF_TMP) as top:
        folder = top + "/x" * depth
        os.makedirs(folder)
        files = JobFiles(binds=(Bind(folder, folder),) * 32)
        began = time.thread_time()
        if is_taken:
            files.check()
        else:
            with pytest.raises(InvalidRequestError, match="take too long"):
                files.check()
        assert time.thread_time() - began < 2 * LONGEST_CHECK_SECONDS


def test_a_source_that_somebody_makes_a_link_meanwhile() -> None:
    with tempfile.TemporaryDirectory(dir=OUTSIDE_OF_TMP) as folder:
        source, link = f"{folder}/source", f"{folder}/link"
        os.mkdir(source)
        os.symlink("/etc", link)
        files = JobFiles(binds=(Bind(source, "/mnt"),))
        command = [sys.executable, "-c", RESTLESS, source, link]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as restless:
            assert restless.stdout
            restless.stdout.readline()
            refused, end = 0, time.monotonic() + 1
            try:
                while time.monotonic() < end:
                    try:
                        files.check()
                    except InvalidRequestError:
                        refused += 1
            finally:
                restless.kill()
        assert refused
