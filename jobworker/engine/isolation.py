"""What separates a job from the machine: the profiles, and whom jobs run as.

jobinit carries it out; here is decided what it is to be.
"""

from __future__ import annotations

import enum
import grp
import os
import pwd
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jobworker.engine.files import REPLACED, Allowed, JobFiles, is_in_any
from jobworker.engine.jobinit import Identity, StartRequest, View
from jobworker.engine.mounts import other_places
from jobworker.engine.user import User, find_user, own_user
from jobworker.errors import (
    InvalidRequestError,
    ResourceExhaustedError,
    SettingError,
    StartupError,
)
from jobworker.job import NETWORKS, JobSpec


class Profile(enum.StrEnum):
    """How much a job is separated from the machine."""

    DEFAULT = "default"  # an unprivileged user, that can gain no other rights; namespaces
    STRICT = "strict"  # the same, with a user of its own, no network, and all else read-only
    NONE = "none"  # a cgroup only, as the server's user: for commands that are trusted


VIEW_NUMBER = 1


@dataclass(frozen=True, slots=True)
class Files:
    """What confined jobs see of this machine's files, and what they can do with them."""

    tmp_bytes: int = 256 << 20  # of their own; 0: no limit
    tmp_inodes: int = 65536  # 0: no limit
    hidden: tuple[Path, ...] = ()
    read_only: tuple[Path, ...] = ()

    def view(self) -> View:
        """What is hidden, or must not be changed, is so wherever else it is mounted, too."""
        hidden = _outermost(_everywhere(self.hidden, REPLACED))
        read_only = _outermost(_everywhere(self.read_only))
        return View(
            number=VIEW_NUMBER,
            tmp_bytes=self.tmp_bytes,
            tmp_inodes=self.tmp_inodes,
            hidden=hidden,
            read_only=tuple(path for path in read_only if not is_in_any(path, hidden)),
        )


def _everywhere(paths: Iterable[Path], more: Iterable[str] = ()) -> set[str]:
    """Where these are, without symbolic links, and wherever else; also what is in another of them,
    which may be mounted elsewhere by itself. more: where else these are, too."""
    real_paths = {os.path.realpath(path) for path in paths}
    return real_paths | other_places([*real_paths, *more])


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """Without what is not there for a confined job anyhow. `/` stands for what is in it alone:
    jobinit leaves other file systems on it as they are."""
    found: list[str] = []
    for path in sorted(paths):
        if not is_in_any(path, (*REPLACED, *(each for each in found if each != "/"))):
            found.append(path)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Confinement:
    """What holds for one job."""

    profile: Profile
    user: User
    network: str = "host"
    view: View | None = None  # None: this machine's files as they are
    files: JobFiles | None = None  # the same
    is_read_only: bool = False  # all files but its own and what is bound

    @property
    def identity(self) -> Identity | None:
        """None: the server's own user."""
        user = self.user
        return None if user.uid == os.geteuid() else Identity(user.uid, user.gid, user.groups)

    @property
    def is_confined(self) -> bool:
        return self.profile is not Profile.NONE

    def find(self, path: str, place: str = "") -> str | None:
        """As JobFiles.find."""
        return self.files.find(path, place) if self.files else path


NOTHING_ALLOWED = Allowed()
SEPARATES_NOTHING = "profile none separates a job from nothing; choose another, or leave it out"


class Isolation:
    """What the configuration says about it, on this machine."""

    def __init__(
        self,
        profile: str = "",
        profiles_allowed: Iterable[str] = (),
        job_user: str = "nobody",
        users_allowed: Iterable[str] = (),
        strict_uids: range | None = None,
        files: Files = Files(),
        allowed: Allowed = NOTHING_ALLOWED,
    ) -> None:
        """profile: of a job that asks for none; empty: the default one, but none where this
        process is not root and can have no other, as its trial may show. The others: what a job
        may ask for.

        Users are looked up here, once. Raises SettingError where one does not exist, or where
        this process has not the rights that a profile takes; StartupError where it is not known.
        """
        self.problem = _problem()
        self.problems: dict[Profile, str] = {}  # of those that were to be allowed, and cannot be
        self.profile = Profile(profile) if profile else self._best()
        self._may_fall_back = not profile and not _is_root()
        self.own_user = own_user()
        if self.profile is not Profile.NONE and self.problem:
            raise SettingError("JOB_WORKER_PROFILE", self.profile, self.problem, NONE_OR_ROOT)
        if self.profile is Profile.STRICT and not _is_root():
            raise SettingError("JOB_WORKER_PROFILE", profile, NO_OTHER_USERS, NONE_OR_ROOT)
        self.profiles = {self.profile, *self._usable(map(Profile, profiles_allowed))}
        self._strict_uids = strict_uids
        if Profile.STRICT in self.profiles and strict_uids is None:
            problem = "none are set, but profile strict takes them"
            raise SettingError("JOB_WORKER_STRICT_UIDS", "", problem, "give FIRST-LAST")
        self._uids_in_use: Counter[int] = Counter()  # those of profile strict
        self._last_uid = 0
        self._view = files.view()
        self._files = JobFiles(self._view.hidden)
        self.allowed = allowed
        self.job_user = self.own_user
        if _is_root() and not self.problem:
            self.job_user = _job_user(job_user)
        self._users = {name: _find("USERS_ALLOWED", name) for name in users_allowed}
        if _is_root() and Profile.NONE not in self.profiles:
            for name, user in self._users.items():
                if user.uid == 0:
                    remedy = "leave it out, or allow profile none"
                    raise SettingError("JOB_WORKER_USERS_ALLOWED", name, IS_ROOT, remedy)
        if _is_root() and strict_uids is not None:
            self._check_strict_uids(strict_uids)

    @property
    def user_names(self) -> list[str]:
        """Those that a job may ask for."""
        return list(self._users)

    @property
    def views(self) -> list[View]:
        """Those that jobs are to be started with."""
        return [self._view] if self.profiles - {Profile.NONE} else []

    @property
    def confines_all(self) -> bool:
        """No job can be had that is not confined, whatever comes of the trials."""
        return _is_root() and Profile.NONE not in self.profiles

    def trials(self) -> dict[Profile, StartRequest]:
        """A job for each profile that confines, which shows whether this machine lets it."""
        return {
            profile: StartRequest(
                job_id=0,
                executable="/bin/true",
                argv=("true",),
                environment={},
                working_directory="/",
                cgroup=None,
                merge_output=True,
                identity=self._confinement(profile, self._trial_user(profile), "").identity,
                is_confined=True,
                view=self._view.number,
                has_network=profile is not Profile.STRICT,
                is_read_only=profile is Profile.STRICT,
            )
            for profile in sorted(self.profiles - {Profile.NONE})
        }

    def take_results(self, problems: Mapping[Profile, str], *, has_confined: bool = False) -> None:
        """Of the trials; empty: none. Raises SettingError where the server's own profile cannot
        be had: jobs that count on it must not run without. Where nobody has set one, a server
        that is not root has none, and this is its `problem`; but not where jobs of an earlier
        server are confined: then this machine can, and they may be what is in the way."""
        problem = problems.get(self.profile)
        if problem and self._may_fall_back and not has_confined:
            self.problem = f"the server is not root, and cannot confine its jobs: {problem}"
            self.profile = Profile.NONE
            self.profiles = {Profile.NONE}
            return
        if problem:
            remedy = NONE_OR_ROOT if _is_root() else USER_NAMESPACES
            if has_confined:
                remedy = f"{END_THESE}, or {remedy}"
            raise SettingError("JOB_WORKER_PROFILE", self.profile, problem, remedy)
        failed = {profile: problem for profile, problem in problems.items() if problem}
        self.problems |= failed
        self.profiles -= set(failed)

    def _trial_user(self, profile: Profile) -> User:
        if profile is Profile.STRICT and self._strict_uids:
            return find_user(str(self._strict_uids[0]))
        return self.job_user

    def choose(self, profile_name: str, user_name: str, network: str = "") -> Confinement:
        """For a job that asks for these; empty: for none. Of profile strict the user is only
        one of its kind, until `assign`. Raises InvalidRequestError where it may not have them."""
        profile = self._choose_profile(profile_name)
        self._check_network(profile, network)
        if profile is Profile.STRICT:
            if user_name:
                problem = "profile strict gives each job one of its own; leave it out"
                raise InvalidRequestError("user", problem)
            return self._confinement(profile, self._trial_user(profile), network)
        default = self.own_user if profile is Profile.NONE else self.job_user
        user = self._choose_user(user_name, default)
        if user.uid == 0 and profile is not Profile.NONE:
            problem = f"{user.name!r} is root, which no profile but {Profile.NONE} confines"
            raise InvalidRequestError("user", problem)
        if user.uid != os.geteuid() and os.geteuid() != 0:
            problem = "the server is not root, so its jobs run as its own user only; leave it out"
            raise InvalidRequestError("user", problem)
        return self._confinement(profile, user, network)

    def _confinement(self, profile: Profile, user: User, network: str) -> Confinement:
        default_network = "none" if profile is Profile.STRICT else "host"
        network = network or default_network
        if profile is Profile.NONE:
            return Confinement(profile, user, network)
        is_read_only = profile is Profile.STRICT
        return Confinement(profile, user, network, self._view, self._files, is_read_only)

    def arrange(self, confinement: Confinement, request: JobSpec) -> Confinement:
        """With the files that the job asks for. Raises InvalidRequestError where it may not have
        them."""
        asked = {"root": request.root, "read_only": request.read_only, "binds": request.binds}
        for field in (name for name, value in asked.items() if value):
            if confinement.files is None:
                raise InvalidRequestError(field, SEPARATES_NOTHING)
            # jobinit takes the rights of another user for it.
            if not _is_root():
                problem = "the server is not root, and can arrange no files for a job; leave it out"
                raise InvalidRequestError(field, problem)
        if confinement.files is None or not any(asked.values()):
            return confinement
        root = self.allowed.root(request.root) if request.root.strip("/") else ""
        binds = tuple(self.allowed.bind(bind, n) for n, bind in enumerate(request.binds))
        files = replace(confinement.files, root=root.rstrip("/"), binds=binds)
        is_read_only = confinement.is_read_only or request.read_only
        return replace(confinement, files=files, is_read_only=is_read_only)

    def _check_network(self, profile: Profile, network: str) -> None:
        if network and network not in NETWORKS:
            problem = f"{network!r} is not known; use {_alternatives(NETWORKS)}"
            raise InvalidRequestError("network", problem)
        if network == "none" and profile is Profile.NONE:
            raise InvalidRequestError("network", SEPARATES_NOTHING)
        if network == "host" and profile is Profile.STRICT:
            raise InvalidRequestError("network", "profile strict has none; leave it out")

    def measures(self, profile: Profile) -> list[str]:
        """What is in force for a job with this profile, for people."""
        view = self._view
        if profile is Profile.NONE:
            return ["its own cgroup and nothing else", f"as {self.own_user.name}"]
        is_strict = profile is Profile.STRICT
        limit = f" of {view.tmp_bytes >> 20} MiB" if view.tmp_bytes else ""
        uids = self._strict_uids
        user = self.job_user.name
        if not _is_root():
            user += ", the server's own user, in a user namespace"
        return [
            f"as a user of its own, {uids[0]} to {uids[-1]}"
            if is_strict and uids
            else f"as {user}",
            "no privileges, and no way to gain any",
            "a filter of system calls",
            "its own process ids, mounts, IPC, host name and cgroup root",
            "no network" if is_strict else "network of the host, or none",
            f"its own /tmp{limit}, /dev and /proc",
            "all else read-only" if is_strict else "the server's code read-only",
            f"{len(view.hidden)} paths hidden, the server's own files among them",
        ]

    # Users of profile strict

    def assign(self, confinement: Confinement) -> Confinement:
        """With a user of the job's own, in profile strict: one that no job has that was told to
        `hold`. Raises ResourceExhaustedError."""
        if confinement.profile is not Profile.STRICT:
            return confinement
        assert self._strict_uids is not None
        if len(self._uids_in_use) >= len(self._strict_uids):
            problem = f"all {len(self._strict_uids)} users of JOB_WORKER_STRICT_UIDS are in use"
            raise ResourceExhaustedError(f"{problem}; wait for a job to end, or give more of them")
        # Not the one that has just become free: what it owned may still be going.
        uid = max(self._last_uid + 1, self._strict_uids.start)
        while uid in self._uids_in_use or uid not in self._strict_uids:
            uid = uid + 1 if uid in self._strict_uids else self._strict_uids.start
        self._last_uid = uid
        return replace(confinement, user=find_user(str(uid)))

    def hold(self, spec: JobSpec) -> None:
        """The job lives; its user is given to no other one."""
        self._uids_in_use.update(self._strict_uids_of(spec))

    def seen(self, pid: int) -> JobSpec:
        """What can be seen of a job whose record is lost, by its main process. Not its arguments:
        they are in its own memory, so that it could keep waiting for ever who reads them."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        except OSError:  # it has just ended
            return NOTHING_SEEN
        values = {name: value.split() for name, _, value in (each.partition(":") for each in lines)}
        uid = int(values["Uid"][0])
        is_strict = self._strict_uids is not None and uid in self._strict_uids
        name = " ".join(values["Name"]) or "?"
        profile = Profile.STRICT if is_strict else ""
        return JobSpec(name, user=find_user(str(uid)).name, profile=profile)

    def release(self, spec: JobSpec) -> None:
        """All of the job is gone."""
        for uid in self._strict_uids_of(spec):
            self._uids_in_use[uid] -= 1
            if self._uids_in_use[uid] <= 0:
                del self._uids_in_use[uid]

    def _strict_uids_of(self, spec: JobSpec) -> set[int]:
        return {uid for uid in _uids_that_may_be_strict(spec) if uid in (self._strict_uids or ())}

    def _check_strict_uids(self, uids: range) -> None:
        """A job of profile strict would not be alone with a user that others have too, or would be
        in a group of others, as its group has the same number. Raises SettingError."""
        others = {
            user.uid: f"{user.name} of JOB_WORKER_USERS_ALLOWED" for user in self._users.values()
        }
        others[self.job_user.uid] = f"{self.job_user.name}, the one of JOB_WORKER_JOB_USER"
        others[_overflow_uid()] = "nobody, to whom all belongs that has no owner here"
        others |= {each.pw_uid: each.pw_name for each in pwd.getpwall()}
        others[0] = "root"
        whose = {each.gr_gid: f"the group {each.gr_name}" for each in grp.getgrall()}
        whose |= {uid: f"the user {name}" for uid, name in others.items()}
        taken = sorted(number for number in whose if number in uids)
        if not taken:
            return
        more = f", and {len(taken) - 1} more are others'" if len(taken) > 1 else ""
        raise SettingError(
            "JOB_WORKER_STRICT_UIDS",
            f"{uids.start}-{uids.stop - 1}",
            f"{taken[0]} is {whose[taken[0]]}{more}",
            "give numbers that nobody has, such as 3000000-3065535",
        )

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
        """What jobs of root would be without is too much to give up without being told to."""
        return Profile.NONE if self.problem and not _is_root() else Profile.DEFAULT

    def _usable(self, profiles: Iterable[Profile]) -> Iterable[Profile]:
        for each in profiles:
            if each is Profile.STRICT and not _is_root():
                self.problems[each] = NO_OTHER_USERS
            elif each is Profile.NONE or not self.problem:
                yield each


NOTHING_SEEN = JobSpec("?")

# What confining takes (linux/capability.h).
CAPABILITIES = {
    0: "CAP_CHOWN",
    5: "CAP_KILL",
    6: "CAP_SETGID",
    7: "CAP_SETUID",
    8: "CAP_SETPCAP",
    18: "CAP_SYS_CHROOT",
    21: "CAP_SYS_ADMIN",
}
SECCOMP = "/proc/sys/kernel/seccomp/actions_avail"
NONE_OR_ROOT = "run the server as root, with these rights, or set it to none"


USER_NAMESPACES = (
    "allow user namespaces (kernel.unprivileged_userns_clone, user.max_user_namespaces, "
    f"kernel.apparmor_restrict_unprivileged_userns), or {NONE_OR_ROOT}"
)
END_THESE = "end the jobs of an earlier server by their cgroup.kill, if they are in the way"
IS_ROOT = "is root, as which no job is confined"
NO_OTHER_USERS = "the server is not root, so it has no other users for its jobs"


def _uids_that_may_be_strict(spec: JobSpec) -> set[int]:
    """The job's user: of profile strict, or one without a name, which may have been an earlier
    server's JOB_WORKER_JOB_USER. Empty where it is there no longer."""
    if spec.user.isdigit():
        return {int(spec.user)}
    if spec.profile != Profile.STRICT:
        return set()
    try:
        return {find_user(spec.user).uid}
    except LookupError:
        return set()


def _is_root() -> bool:
    return os.geteuid() == 0


def _problem() -> str:
    """Why this process can confine no job; empty where it can, or where a trial is to show it."""
    if _is_root():
        missing = [name for number, name in CAPABILITIES.items() if not _has_capability(number)]
        if missing:
            return f"the server is root, but lacks {', '.join(missing)}"
    elif not _is_there("/proc/self/ns/user"):
        return "the server is not root, and this kernel has no user namespaces"
    if not _is_there(SECCOMP):
        return "this kernel has no seccomp filters"
    return ""


def _is_there(path: str) -> bool:
    """Raises StartupError where that is not known, as for want of memory: what passes is no reason
    for profile none."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError as error:
        raise StartupError(f"cannot look at {path}: {error.strerror}; start again") from error
    return True


def _overflow_uid() -> int:
    """Whose the kernel shows what belongs to users that a namespace does not have."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split(maxsplit=1)[0], 16)
    return bool(effective >> number & 1)


def _job_user(name: str) -> User:
    user = _find("JOB_USER", name)
    if user.uid == 0:
        raise SettingError("JOB_WORKER_JOB_USER", name, IS_ROOT, "name another user")
    return user


def _find(setting: str, name: str) -> User:
    try:
        return find_user(name)
    except LookupError as error:
        remedy = "name one of this machine's users, or give a number"
        raise SettingError(f"JOB_WORKER_{setting}", name, "no such user", remedy) from error


def _alternatives(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
