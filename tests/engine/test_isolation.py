"""The profiles, and whom jobs run as: what is allowed, and what takes effect."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jobworker.engine.isolation import Isolation, Profile
from jobworker.errors import InvalidRequestError, SettingError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs jobs as other users")


@as_root
def test_jobs_are_confined_and_unprivileged_by_default() -> None:
    confinement = Isolation().choose("", "")
    assert confinement.profile is Profile.DEFAULT
    assert confinement.user.name == "nobody"
    assert confinement.is_confined
    assert confinement.identity and confinement.identity.uid == confinement.user.uid != 0


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
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        Isolation(**settings)  # type: ignore[arg-type]


def test_a_server_that_is_not_root_says_so_and_does_not_pretend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    isolation = Isolation(profiles_allowed=["default"], users_allowed=["root"])
    assert "not root" in isolation.problem
    assert isolation.profiles == {Profile.NONE}
    assert isolation.choose("", "").user.uid == 65534
    with pytest.raises(InvalidRequestError, match="user"):
        isolation.choose("", "root")
    with pytest.raises(SettingError, match="PROFILE"):
        Isolation(profile="default")


@as_root
def test_a_root_that_lacks_rights_says_which() -> None:
    program = "from jobworker.engine.isolation import Isolation; print(Isolation().problem)"
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    answer = subprocess.run(
        [*command, sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "CAP_SYS_ADMIN" in answer.stdout
    assert "CAP_KILL" not in answer.stdout
