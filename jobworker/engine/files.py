"""Which of the machine's files a job finds, and where: its root, and what is bound.

jobinit mounts it. Here is decided what may be asked for, and looked where a job's paths lead, so
that mistakes are told before the job is made.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from jobworker.errors import InvalidRequestError
from jobworker.job import Bind

# What each confined job has of its own, or anew: nothing in these is the machine's.
REPLACED = ("/proc", "/dev", "/run", "/tmp", "/var/tmp")  # noqa: S108
OWN_TMP = "/tmp"  # noqa: S108
MOST_LINKS = 40  # that one path leads through, as in the kernel
# Of this thread's CPU, for all binds of a job: some 5 ms for 32 of ordinary depth.
LONGEST_CHECK_SECONDS = 0.1
MOST_PARTS = 512  # that are looked at for one path, with those of links, which jobs can make

NOT_SEEN = "this job's profile does not show it"


def is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def is_in_any(path: str, folders: Iterable[str]) -> bool:
    return any(is_in(path, folder) for folder in folders)


class Allowed:
    """What a job may have as its root, and what may be bound."""

    def __init__(self, roots: Iterable[Path] = (), binds: Iterable[str] = ()) -> None:
        """roots: these folders, and those below. binds: files or folders, and what is below;
        those that end with `:ro` read-only."""
        self.roots = tuple(map(str, roots))
        self.binds = tuple(binds)
        self._roots = [_Tree(root) for root in self.roots]
        writable = [bind for bind in self.binds if not bind.endswith(":ro")]
        self._writable = [_Tree(bind) for bind in writable]
        self._all = [_Tree(bind.removesuffix(":ro")) for bind in self.binds]

    def root(self, path: str) -> str:
        """Where it really is. Raises InvalidRequestError where it is not allowed."""
        return _find("root", path, self._roots, "JOB_WORKER_ROOTS_ALLOWED")

    def bind(self, bind: Bind, number: int) -> Bind:
        """The same, with its source."""
        field = f"binds[{number}].source"
        source = _find(field, bind.source, self._all, "JOB_WORKER_BINDS_ALLOWED")
        if not bind.read_only:
            try:
                source = _find(field, bind.source, self._writable, "")
            except InvalidRequestError:
                problem = f"{bind.source!r} is allowed read-only; ask for it with :ro"
                raise InvalidRequestError(field, problem) from None
        return Bind(source, bind.destination.rstrip("/"), bind.read_only)


class _Tree:
    """A path that the configuration names, which may lead through symbolic links; what is below
    it may not."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._real_path = os.path.realpath(path)

    def find(self, path: str) -> str | None:
        for top in (self._path, self._real_path):
            if is_in(path, top):
                rest = path[len(top.rstrip("/")) :].strip("/")
                return os.path.join(self._real_path, rest).rstrip("/") or "/"
        return None


def _find(field: str, path: str, trees: Iterable[_Tree], setting: str) -> str:
    for tree in trees:
        if found := tree.find(path):
            return found
    problem = f"{path!r} is not allowed: the server's setting {setting} does not name it"
    raise InvalidRequestError(field, problem)


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The files of a job that has a view of this machine's."""

    hidden: tuple[str, ...] = ()  # paths of this machine
    root: str = ""  # the same; empty: its own
    binds: tuple[Bind, ...] = ()  # in this order, each over those before

    @property
    def is_arranged(self) -> bool:
        return bool(self.root or self.binds)

    def find(self, path: str, place: str = "") -> str | None:
        """Where this process finds what the job would find at an absolute path; of a folder that
        is the job's own, another one of the same kind. None: the job does not see it. place: its
        real path, where that is known."""
        place = place or self.real_path(path)
        if not self.is_arranged:
            is_own = place in REPLACED or place.startswith("/dev/")
            return path if is_own or not self._is_hidden(place) else None
        is_bound = any(is_in(place, bind.destination) for bind in self.binds)
        if not is_bound and (place in self._own or place.startswith("/dev/")):
            return place
        if not is_bound and is_in_any(place, self._own):
            return None
        found = self._on_machine(place)
        return None if self._is_hidden(found) else found

    def check(self) -> None:
        """Whether root and binds are there, with the file rights of this thread's user. Raises
        InvalidRequestError. jobinit looks again, when it mounts."""
        if self.root:
            self._check_source("root", self.root)
            if not os.path.isdir(self.root):
                raise InvalidRequestError("root", f"{self.root!r} is not a directory; give one")
        latest = time.thread_time() + LONGEST_CHECK_SECONDS
        for number, bind in enumerate(self.binds):
            if time.thread_time() > latest:
                problem = "take too long to look up; give fewer, or shorter paths"
                raise InvalidRequestError("binds", problem)
            self._check_source(f"binds[{number}].source", bind.source)
            _check_destination(replace(self, binds=self.binds[:number]), number, bind)

    def _check_source(self, field: str, path: str) -> None:
        if self._is_hidden(path):
            raise InvalidRequestError(field, f"{path!r} is not there: {NOT_SEEN}")
        try:
            # First, as of where a link leads nothing is told. Raises, too, where one vanishes.
            is_link = os.path.realpath(path) != path
            if not is_link:
                os.stat(path)
        except OSError as error:
            problem = f"{path!r}: {error.strerror}; give a path that the job's user can reach"
            raise InvalidRequestError(field, problem) from error
        if is_link:
            problem = f"{path!r} leads through a symbolic link, which is not followed"
            raise InvalidRequestError(field, f"{problem}; give what it leads to")

    @property
    def _own(self) -> tuple[str, ...]:
        return tuple(path for path in REPLACED if path != "/run") if self.root else REPLACED

    def _is_hidden(self, path: str) -> bool:
        return is_in_any(path, (*REPLACED, *self.hidden))

    def _on_machine(self, place: str) -> str:
        for bind in reversed(self.binds):
            if is_in(place, bind.destination):
                return bind.source.rstrip("/") + place[len(bind.destination) :] or "/"
        return self.root + place

    def real_path(self, path: str) -> str:
        """In the job's root, without the symbolic links that lead there. Where more would have to
        be looked at than a path is worth, as far as that went.

        Where it is the machine's view, nothing is looked at that the kernel would not come to:
        a job can make a look at what is not in memory last for ever."""
        left, place, links, parts = path.split("/")[::-1], "/", 0, 0
        while left and parts < MOST_PARTS:
            part = left.pop()
            parts += 1
            if part == "..":
                place = os.path.dirname(place)
            elif part not in {"", "."}:
                following = os.path.join(place, part)
                try:
                    target = _target(self._on_machine(following), links)
                except OSError:  # nothing there, or not within reach; so is all below
                    if not self.is_arranged:
                        return "/".join([following, *reversed(left)])
                    target = None
                links += target is not None
                if target is None:
                    place = following
                    continue
                place = "/" if target.startswith("/") else place
                left += target.split("/")[::-1]
        return place


def _target(path: str, links: int) -> str | None:
    """None: it is no symbolic link, or leads to another process's files. links: followed before.
    Raises OSError."""
    if path.startswith("/proc/"):
        return None
    try:
        target = os.readlink(path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    if links == MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return target


def _check_destination(files: JobFiles, number: int, bind: Bind) -> None:
    """files: with the binds before this one."""
    field, path = f"binds[{number}].destination", bind.destination
    if path.startswith(OWN_TMP + "/") and os.path.isdir(files.root + OWN_TMP):
        return  # jobinit makes it
    if files.real_path(path) != path:
        problem = f"{path!r} leads through a symbolic link, which is not followed"
        raise InvalidRequestError(field, f"{problem}; give what it leads to")
    found = files.find(path, path)
    remedy = "give one that is there, or one below /tmp"
    if found is None:
        raise InvalidRequestError(field, f"{path!r} is not there: {NOT_SEEN}; {remedy}")
    try:
        mode = os.stat(found).st_mode
    except OSError as error:
        problem = f"{path!r}: {error.strerror}; {remedy}"
        raise InvalidRequestError(field, problem) from error
    if stat.S_ISDIR(mode) != os.path.isdir(bind.source):
        problem = f"{path!r} and its source are not both folders, or both files"
        raise InvalidRequestError(field, f"{problem}; {remedy}")
