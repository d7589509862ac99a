"""The profiles, and whom jobs run as: what is allowed, and what takes effect."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engine.own_mounts import answer_of
from jobworker.engine import isolation
from jobworker.engine.isolation import NOTHING_SEEN, Files, Isolation, Profile
from jobworker.engine.user import own_user
from jobworker.errors import (
    InvalidRequestError,
    ResourceExhaustedError,
    SettingError,
    StartupError,
)
from jobworker.job import JobSpec

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs jobs as other users")


@as_root
def test_jobs_are_confined_and_unprivileged_by_default() -> None:
    confinement = Isolation().choose("", "")
    assert confinement.profile is Profile.DEFAULT
    assert confinement.user.name == "nobody"
    assert confinement.is_confined
    assert confinement.identity and confinement.identity.uid == confinement.user.uid != 0


def test_what_cannot_be_looked_at_is_no_reason_for_profile_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop of links stands for want of memory."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setattr(isolation, "SECCOMP", str(loop))
    with pytest.raises(StartupError, match="start again"):
        Isolation()


@as_root
def test_all_are_confined_unless_profile_none_can_be_had() -> None:
    assert Isolation().confines_all
    assert Isolation("strict", ["default"], strict_uids=range(3000000, 3000001)).confines_all
    assert not Isolation("default", ["none"]).confines_all
    assert not Isolation("none", ["default"]).confines_all


@as_root
def test_profile_none_is_the_servers_user() -> None:
    confinement = Isolation(profile="none").choose("", "")
    assert confinement.user.uid == 0
    assert confinement.identity is None
    assert not confinement.is_confined


@as_root
def test_a_job_may_ask_for_what_is_allowed() -> None:
    isolation = Isolation(profiles_allowed=["none"], users_allowed=["daemon", "123456"])
    assert isolation.choose("none", "").profile is Profile.NONE
    assert isolation.choose("", "daemon").user.name == "daemon"
    assert isolation.choose("none", "123456").user.uid == 123456
    assert isolation.choose("default", "nobody").user.name == "nobody"


@as_root
@pytest.mark.parametrize(
    ("profile", "user", "field"),
    [
        ("none", "", "profile"),
        ("nonsense", "", "profile"),
        ("", "daemon", "user"),
        ("", "root", "user"),
        ("", "0", "user"),
        ("", "no-such-user", "user"),
    ],
)
def test_what_is_not_allowed(profile: str, user: str, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Isolation().choose(profile, user)
    assert caught.value.field == field


@as_root
def test_root_is_never_confined() -> None:
    isolation = Isolation(profiles_allowed=["none"], users_allowed=["root"])
    assert isolation.choose("none", "root").user.uid == 0
    with pytest.raises(InvalidRequestError, match="root"):
        isolation.choose("default", "root")


@as_root
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"job_user": "no-such-user"}, "JOB_USER"),
        ({"job_user": "root"}, "JOB_USER"),
        ({"job_user": "0"}, "JOB_USER"),
        ({"users_allowed": ["no-such-user"]}, "USERS_ALLOWED"),
        ({"users_allowed": ["root"]}, "USERS_ALLOWED"),
        ({"users_allowed": ["daemon", "0"]}, "USERS_ALLOWED"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        Isolation(**settings)  # type: ignore[arg-type]


# A server that is not root


@pytest.fixture
def without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)


@pytest.mark.usefixtures("without_root")
def test_without_root_jobs_are_confined_as_the_servers_user() -> None:
    isolation = Isolation(profiles_allowed=["none"], users_allowed=["root"], job_user="daemon")
    assert not Isolation().confines_all
    isolation.take_results({Profile.DEFAULT: ""})
    confinement = isolation.choose("", "")
    assert confinement.profile is Profile.DEFAULT
    assert (confinement.user.uid, confinement.identity) == (65534, None)
    assert isolation.problem == ""
    with pytest.raises(InvalidRequestError, match="user"):
        isolation.choose("", "root")


@pytest.mark.usefixtures("without_root")
def test_without_root_a_default_that_fails_its_trial_is_none() -> None:
    isolation = Isolation(profiles_allowed=["default"])
    isolation.take_results({Profile.DEFAULT: "no namespace"})
    assert isolation.profiles == {Profile.NONE}
    assert isolation.choose("", "").profile is Profile.NONE
    assert "not root" in isolation.problem and "no namespace" in isolation.problem
    with pytest.raises(InvalidRequestError, match="profile"):
        isolation.choose("default", "")


@pytest.mark.usefixtures("without_root")
def test_without_root_nobody_loses_what_jobs_have_that_live() -> None:
    """They may have taken what it needs, to be less confined from then on."""
    isolation = Isolation()
    with pytest.raises(SettingError, match=r"no namespace.*end the jobs"):
        isolation.take_results({Profile.DEFAULT: "no namespace"}, has_confined=True)
    assert isolation.profiles == {Profile.DEFAULT}


@pytest.mark.usefixtures("without_root")
def test_without_root_one_that_was_asked_for_must_not_fail() -> None:
    isolation = Isolation(profile="default")
    with pytest.raises(SettingError, match=r"no namespace.*max_user_namespaces"):
        isolation.take_results({Profile.DEFAULT: "no namespace"})


@pytest.mark.usefixtures("without_root")
def test_without_root_there_is_no_profile_strict() -> None:
    uids = range(3000000, 3000003)
    with pytest.raises(SettingError, match="no other users"):
        Isolation(profile="strict", strict_uids=uids)
    isolation = Isolation(profiles_allowed=["strict"], strict_uids=uids)
    isolation.take_results({Profile.DEFAULT: ""})
    assert isolation.profiles == {Profile.DEFAULT}
    assert "no other users" in isolation.problems[Profile.STRICT]


@as_root
def test_a_root_that_lacks_rights_says_which() -> None:
    """And has profile none only where it was told to: jobs of that are root's."""

    def isolate(arguments: str) -> subprocess.CompletedProcess[str]:
        program = (
            "from jobworker.engine.isolation import Isolation\n"
            f"isolation = Isolation({arguments})\n"
            "print(isolation.profile, isolation.problem)"
        )
        command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        command += [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = isolate("").stderr
    assert "SettingError: JOB_WORKER_PROFILE = 'default': the server is root, but lacks" in refused
    assert "CAP_SYS_ADMIN" in refused
    assert "CAP_KILL" not in refused
    assert isolate("profile='none'").stdout.startswith("none the server is root")


# Profile strict, and its users


def strict(uids: range | None = range(3000000, 3000003)) -> Isolation:
    return Isolation(profile="strict", strict_uids=uids)


def give(isolation: Isolation) -> JobSpec:
    """A job that lives."""
    confinement = isolation.assign(isolation.choose("", ""))
    assert confinement.identity
    uid = int(confinement.user.name)
    assert (confinement.identity.uid, confinement.identity.groups) == (uid, (uid,))
    spec = JobSpec("true", user=confinement.user.name, profile=confinement.profile)
    isolation.hold(spec)
    return spec


@as_root
def test_each_strict_job_gets_a_user_of_its_own() -> None:
    isolation = strict()
    specs = [give(isolation) for _ in range(3)]
    assert [spec.user for spec in specs] == ["3000000", "3000001", "3000002"]
    with pytest.raises(ResourceExhaustedError, match="STRICT_UIDS"):
        isolation.assign(isolation.choose("", ""))
    isolation.release(specs[1])
    assert give(isolation).user == "3000001"


@as_root
def test_a_user_is_not_given_again_at_once() -> None:
    isolation = strict()
    given = []
    for _ in range(4):
        spec = give(isolation)
        given.append(spec.user[-1])
        isolation.release(spec)
    assert given == ["0", "1", "2", "0"]


@as_root
def test_users_of_jobs_of_an_earlier_server_are_taken() -> None:
    isolation = strict()
    isolation.hold(JobSpec("true", user="3000000", profile="strict"))
    isolation.hold(JobSpec("true", user="nobody", profile="default"))
    assert give(isolation).user == "3000001"


@as_root
def test_also_those_that_had_another_profile_there() -> None:
    """As its JOB_WORKER_JOB_USER was; several had that one."""
    isolation = strict()
    others = [JobSpec("true", user="3000000", profile="default")] * 2
    outside = JobSpec("true", user="3000003", profile="strict")
    for spec in (*others, outside):
        isolation.hold(spec)
    assert [give(isolation).user for _ in range(2)] == ["3000001", "3000002"]
    isolation.release(others[0])
    with pytest.raises(ResourceExhaustedError):
        give(isolation)
    isolation.release(others[1])
    assert give(isolation).user == "3000000"


# Of this machine, and no user's number, too.
_USERS = {each.pw_uid for each in pwd.getpwall()}
A_GROUP = next(each.gr_gid for each in grp.getgrall() if each.gr_gid not in _USERS)


@as_root
def test_without_users_there_is_no_profile_strict() -> None:
    with pytest.raises(SettingError, match="STRICT_UIDS"):
        strict(None)


@as_root
@pytest.mark.parametrize(
    ("uids", "settings", "whose"),
    [
        (range(65530, 65541), {}, "65534 is the user nobody"),
        (range(65534, 65535), {"job_user": "daemon"}, "65534 is the user nobody"),
        (range(3000000, 3000010), {"job_user": "3000007"}, "JOB_USER"),
        (range(3000000, 3000010), {"users_allowed": ["3000009"]}, "USERS_ALLOWED"),
        (range(1, 10), {}, "1 is the user daemon"),
        (range(2), {}, "0 is the user root"),
        (range(A_GROUP, A_GROUP + 1), {}, f"{A_GROUP} is the group "),
    ],
)
def test_a_user_of_a_strict_jobs_own_is_no_other_ones(
    uids: range, settings: dict[str, Any], whose: str
) -> None:
    with pytest.raises(SettingError, match=f"STRICT_UIDS = .*{whose}.*; give numbers"):
        Isolation(profiles_allowed=["strict"], strict_uids=uids, **settings)


@as_root
def test_strict_has_no_network_and_no_choice_of_user() -> None:
    isolation = strict()
    assert isolation.choose("", "").network == "none"
    for user, network in (("nobody", ""), ("3000000", ""), ("", "host")):
        with pytest.raises(InvalidRequestError):
            isolation.choose("", user, network)


# Trials


@as_root
def test_a_profile_that_fails_its_trial_is_no_choice() -> None:
    isolation = Isolation(profiles_allowed=["strict"], strict_uids=range(3000000, 3000009))
    assert isolation.trials().keys() == {Profile.DEFAULT, Profile.STRICT}
    isolation.take_results({Profile.DEFAULT: "", Profile.STRICT: "/proc: not permitted"})
    assert isolation.profiles == {Profile.DEFAULT}
    assert isolation.problems == {Profile.STRICT: "/proc: not permitted"}


@as_root
def test_where_the_servers_own_fails_it_does_not_start() -> None:
    with pytest.raises(SettingError, match="not permitted"):
        Isolation().take_results({Profile.DEFAULT: "/proc: not permitted"})


# Files


def test_of_hidden_paths_the_outermost_count(tmp_path: Path) -> None:
    files = Files(
        hidden=(Path("/srv/a/b"), Path("/srv/a"), Path("/srv/ab"), Path("/tmp/x"), Path("/run")),
        read_only=(Path("/srv/a/code"), Path("/opt/code"), Path("/dev/x")),
    )
    view = files.view()
    assert view.hidden == ("/srv/a", "/srv/ab")
    assert view.read_only == ("/opt/code",)


def test_the_root_folder_stands_for_itself_alone() -> None:
    """jobinit leaves other file systems that are mounted on it writable."""
    assert Files(read_only=(Path("/"), Path("/opt"), Path("/opt/x"))).view().read_only == (
        "/",
        "/opt",
    )


# In a mount namespace of its own. Its argument: a folder.
ELSEWHERE = """
import json, os, subprocess, sys
from pathlib import Path
from jobworker.engine.isolation import Files
here = sys.argv[1]
def mount(*arguments):
    os.makedirs(arguments[-1], exist_ok=True)
    subprocess.run(["mount", *arguments], check=True)
mount("-t", "tmpfs", "none", "/run")
os.makedirs(f"{here}/home/state")
os.makedirs("/run/service/state")
mount("--bind", f"{here}/home/state", f"{here}/bound/state")
mount("--bind", "/run/service", f"{here}/bound/service")
hidden = Files(hidden=(*map(Path, [f"{here}/home", f"{here}/home/state", "/run/service/state"]),))
print(json.dumps([os.path.relpath(path, here) for path in hidden.view().hidden]))
"""


@as_root
def test_what_is_in_a_hidden_folder_may_be_mounted_elsewhere_by_itself(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/var") as folder:
        hidden = answer_of(ELSEWHERE, Path(folder))
    assert {"bound/service/state", "bound/state", "home"} <= set(hidden)
    assert "home/state" not in hidden


@as_root
def test_what_a_job_sees(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/srv/hidden/file")
    isolation = Isolation(profiles_allowed=["none"], files=Files(hidden=(Path("/srv/hidden"),)))
    find = isolation.choose("", "").find
    for path in ("/", "/usr/bin/env", "/tmp", "/var/tmp", "/srv", "/srv/hidden2", "/dev/null"):
        assert find(path), path
    for path in ("/tmp/x", "/var/tmp/x/y", "/run/x", "/srv/hidden", "/usr/../srv/hidden/y"):
        assert not find(path), path
    assert not find(str(tmp_path / "link"))
    assert isolation.choose("none", "").find("/srv/hidden")


def running_cat(user: int | None = None) -> subprocess.Popen[bytes]:
    """A cat that has answered: Popen returns while the exec may still have to set the name."""
    cat = subprocess.Popen(["cat"], user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert cat.stdin and cat.stdout
    os.write(cat.stdin.fileno(), b"\n")
    assert cat.stdout.read(1) == b"\n"
    return cat


def test_what_is_seen_of_a_job_whose_record_is_lost() -> None:
    with running_cat() as process:
        seen = Isolation("none").seen(process.pid)
        process.kill()
    assert seen == JobSpec("cat", user=own_user().name)
    assert Isolation("none").seen(process.pid) == NOTHING_SEEN


@as_root
def test_the_user_of_a_strict_job_whose_record_is_lost_is_no_other_ones() -> None:
    isolation = Isolation("strict", strict_uids=range(3_000_000, 3_000_002))
    with running_cat(user=3_000_000) as process:
        seen = isolation.seen(process.pid)
        process.kill()
    assert (seen.user, seen.profile) == ("3000000", Profile.STRICT)
    isolation.hold(seen)
    assert isolation.assign(isolation.choose("", "")).user.uid == 3_000_001
