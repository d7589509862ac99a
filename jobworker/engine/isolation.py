"""What separates a job from the machine: the profiles, and whom jobs run as.

jobinit carries it out; here is decided what it is to be.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jobworker.engine.jobinit import Identity
from jobworker.engine.user import User, find_user, own_user
from jobworker.errors import InvalidRequestError, SettingError


class Profile(enum.StrEnum):
    """How much a job is separated from the machine."""

    DEFAULT = "default"  # an unprivileged user, that can gain no other rights
    NONE = "none"  # a cgroup only, as the server's user: for commands that are trusted


@dataclass(frozen=True, slots=True)
class Confinement:
    """What holds for one job."""

    profile: Profile
    user: User

    @property
    def identity(self) -> Identity | None:
        """None: the server's own user."""
        user = self.user
        return None if user.uid == os.geteuid() else Identity(user.uid, user.gid, user.groups)

    @property
    def is_confined(self) -> bool:
        return self.profile is not Profile.NONE


class Isolation:
    """What the configuration says about it, on this machine."""

    def __init__(
        self,
        profile: str = "",
        profiles_allowed: Iterable[str] = (),
        job_user: str = "nobody",
        users_allowed: Iterable[str] = (),
    ) -> None:
        """profile: of a job that asks for none; empty: the default one, where this process has
        the rights that it takes. The others: what a job may ask for.

        Users are looked up here, once. Raises SettingError where one does not exist, or where
        this process has not the rights that a profile takes.
        """
        self.problem = _problem()
        self.profile = Profile(profile) if profile else self._best()
        self.own_user = own_user()
        if self.profile is not Profile.NONE and self.problem:
            raise SettingError("JOB_WORKER_PROFILE", profile, self.problem, NONE_OR_ROOT)
        self.profiles = {self.profile, *self._usable(map(Profile, profiles_allowed))}
        self.job_user = self.own_user
        if not self.problem:
            self.job_user = _job_user(job_user)
        self._users = {name: _find("USERS_ALLOWED", name) for name in users_allowed}

    @property
    def user_names(self) -> list[str]:
        """Those that a job may ask for."""
        return list(self._users)

    def choose(self, profile_name: str, user_name: str) -> Confinement:
        """For a job that asks for these; empty: for none. Raises InvalidRequestError where it
        may not have them."""
        profile = self._choose_profile(profile_name)
        default = self.own_user if profile is Profile.NONE else self.job_user
        user = self._choose_user(user_name, default)
        if user.uid == 0 and profile is not Profile.NONE:
            problem = f"{user.name!r} is root, which no profile but {Profile.NONE} confines"
            raise InvalidRequestError("user", problem)
        if user.uid != os.geteuid() and os.geteuid() != 0:
            problem = "the server is not root, so its jobs run as its own user only; leave it out"
            raise InvalidRequestError("user", problem)
        return Confinement(profile, user)

    def _choose_profile(self, name: str) -> Profile:
        if not name:
            return self.profile
        if name not in self.profiles:
            problem = f"{name!r} is not allowed here; use {_alternatives(self.profiles)}"
            raise InvalidRequestError("profile", problem)
        return Profile(name)

    def _choose_user(self, name: str, default: User) -> User:
        if not name or name in {default.name, str(default.uid)}:
            return default
        if name not in self._users:
            problem = f"{name!r} is not allowed; use {_alternatives({default.name, *self._users})}"
            raise InvalidRequestError("user", problem)
        return self._users[name]

    def _best(self) -> Profile:
        return Profile.NONE if self.problem else Profile.DEFAULT

    def _usable(self, profiles: Iterable[Profile]) -> Iterable[Profile]:
        return (each for each in profiles if each is Profile.NONE or not self.problem)


# What confining takes (linux/capability.h).
CAPABILITIES = {
    0: "CAP_CHOWN",
    5: "CAP_KILL",
    6: "CAP_SETGID",
    7: "CAP_SETUID",
    8: "CAP_SETPCAP",
    21: "CAP_SYS_ADMIN",
}
SECCOMP = "/proc/sys/kernel/seccomp/actions_avail"
NONE_OR_ROOT = "run the server as root, with these rights, or set it to none"


def _problem() -> str:
    """Why this process can confine no job; empty where it can."""
    if os.geteuid() != 0:
        return "the server is not root, so that its jobs run as its own user"
    missing = [name for number, name in CAPABILITIES.items() if not _has_capability(number)]
    if missing:
        return f"the server is root, but lacks {', '.join(missing)}"
    if not os.path.exists(SECCOMP):
        return "this kernel has no seccomp filters"
    return ""


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split(maxsplit=1)[0], 16)
    return bool(effective >> number & 1)


def _job_user(name: str) -> User:
    user = _find("JOB_USER", name)
    if user.uid == 0:
        problem = "is root, as which no job is confined"
        raise SettingError("JOB_WORKER_JOB_USER", name, problem, "name another user")
    return user


def _find(setting: str, name: str) -> User:
    try:
        return find_user(name)
    except LookupError as error:
        remedy = "name one of this machine's users, or give a number"
        raise SettingError(f"JOB_WORKER_{setting}", name, "no such user", remedy) from error


def _alternatives(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
