"""Who a client is, which role it has, and how much it may use: by its certificate and, where
there is one, by the file of clients.

    [cn.alice]                # by the certificate's CN
    role = "user"
    running_jobs = 10         # at the same time
    total_cpu = 400           # of all running jobs' limits, in percent of one core
    total_memory = 8192       # of all running jobs' limits, in MiB
    creates_per_second = 5
    profiles = ["default"]    # that its jobs may have, of those that the server allows
    users = ["nobody"]        # that it may ask for, of the same

    [ou.build]                # by its OU, in any case
    role = "user"

What a CN says is stronger than what its OU says, key by key. A quota holds for each CN by itself;
0, as its absence, is no limit.
"""

from __future__ import annotations

import enum
import functools
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jobworker.errors import SettingError
from jobworker.job import Principal, Quota

SETTING = "JOB_WORKER_CLIENTS"
UNLIMITED = Quota()
MOST_CALLERS = 1024  # that are remembered
MOST = (1 << 31) - 1  # of any quota


class Role(enum.StrEnum):
    """What the OU of a client's certificate says, in any case."""

    ADMIN = "admin"
    USER = "user"
    VIEWER = "viewer"


@dataclass(frozen=True, slots=True)
class Identity:
    """What the certificate says that a client has proved to own."""

    name: str  # the subject's CN
    units: tuple[str, ...]  # the subject's OUs
    serial: str = ""  # in hexadecimal, as openssl shows it

    @property
    def unit(self) -> str:
        """The one OU, in small letters; empty where there is none, or more than one: then it
        counts for nothing."""
        return self.units[0].lower() if len(self.units) == 1 else ""


@dataclass(frozen=True, slots=True)
class Caller:
    """A client, and what it was given. profiles, users: that its jobs may have, and that it may
    ask for, of those that the server allows; None: all of them."""

    identity: Identity
    role: Role | None
    quota: Quota = UNLIMITED
    profiles: frozenset[str] | None = None
    users: frozenset[str] | None = None

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def principal(self) -> Principal:
        return Principal(self.identity.name, self.role or "", self.identity.serial)


class Clients:
    """All clients of a server, known by the certificates that they show."""

    def __init__(self, path: Path | None = None, profiles: Collection[str] = ()) -> None:
        """path: of the file, which counts once it is read, and that is used; None: there is none.
        profiles: that it may name."""
        self._path = path
        self._profiles = profiles
        self.use(Entries())

    def caller(self, identity: Identity) -> Caller:
        return self._remembered(identity)

    def read(self) -> Entries:
        """What the file says now; of none nothing. May be called in any thread. Raises
        SettingError."""
        return _read(self._path, self._profiles) if self._path else Entries()

    def use(self, entries: Entries) -> None:
        """From now on these hold."""
        self._entries = entries
        self._remembered = functools.lru_cache(MOST_CALLERS)(self._caller_of)

    def _caller_of(self, identity: Identity) -> Caller:
        by_unit = self._entries.ou.get(identity.unit, {})
        given = {**by_unit, **self._entries.cn.get(identity.name, {})}
        quota = Quota(**{key: given[key] for key in QUOTAS if key in given})
        role = given.get("role") or _role_of(identity.unit)
        return Caller(identity, role, quota, given.get("profiles"), given.get("users"))


def _role_of(unit: str) -> Role | None:
    try:
        return Role(unit)
    except ValueError:
        return None


# The file


@dataclass(frozen=True, slots=True)
class Entries:
    """The sections of the file, by what they are about; each value as `Caller` has it."""

    cn: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ou: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # in small letters


QUOTAS = tuple(each.name for each in fields(Quota))


def _read(path: Path, profiles: Collection[str]) -> Entries:
    try:
        text = path.read_text("utf-8") + "\n"  # so that an error in the last line has its number
        sections = tomllib.loads(text)
    except OSError as error:
        problem, remedy = f"cannot be read: {error.strerror}", "check its name and its rights"
        raise SettingError(SETTING, path, problem, remedy) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        remedy = 'write [cn.NAME] or [ou.NAME], and below it lines such as role = "user"'
        raise SettingError(SETTING, path, f"is not TOML: {error}", remedy) from error
    found: dict[str, dict[str, dict[str, Any]]] = {"cn": {}, "ou": {}}
    place: tuple[str, ...] = ()
    try:
        for kind, clients in sections.items():
            place = (kind,)
            _require(kind in found and isinstance(clients, dict), *UNKNOWN_SECTION)
            for name, values in clients.items():
                place = (kind, name)
                _require(bool(name) and isinstance(values, dict), *UNKNOWN_SECTION)
                key = name if kind == "cn" else name.lower()
                _require(key not in found[kind], "is there twice, in other letters", "leave one")
                found[kind][key] = entry = {}
                for key, value in values.items():
                    place = (kind, name, key)
                    entry[key] = _value(key, value, profiles)
    except _WrongError as error:
        value = functools.reduce(lambda inner, key: inner[key], place, sections)
        where = f"{'.'.join(place)} in {path}, line {_line_of(text, place)}"
        raise SettingError(where, value, *error.args) from error
    return Entries(**found)


class _WrongError(Exception):
    """args: what is wrong with a value, and what to do."""


UNKNOWN_SECTION = ("is no client", "write [cn.NAME] or [ou.NAME], with its role and quotas below")


def _require(holds: bool, problem: str, remedy: str) -> None:
    if not holds:
        raise _WrongError(problem, remedy)


def _value(key: str, value: object, profiles: Collection[str]) -> Any:
    known = ("role", *QUOTAS, "profiles", "users")
    if key not in known and isinstance(value, dict):
        remedy = 'put a name with dots in quotes: [cn."build.example.org"]'
        raise _WrongError("is a section in a client's", remedy)
    _require(key in known, "is not known", f"use {', '.join(known)}")
    if key == "role":
        _require(value in list(Role), "no such role", f"use {', '.join(Role)}")
        return Role(str(value))
    if key in QUOTAS:
        # A bool is an int to Python.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = isinstance(value, int) or key == "creates_per_second"
        remedy = f"use one from 0, for no limit, to {MOST}"
        _require(is_number and is_whole and 0 <= value <= MOST, "is not a number", remedy)  # type: ignore[operator]
        return value
    is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
    _require(is_list, "is not a list of names", 'use one such as ["default"]')
    names = frozenset(value)  # type: ignore[call-overload]
    unknown = names - {*profiles} if key == "profiles" else ()
    _require(not unknown, "has a profile that is not known", f"use some of {', '.join(profiles)}")
    return names


def _line_of(text: str, place: Sequence[str]) -> int:
    """Where this key stands: the first line up to which the text, by itself, has it."""
    lines = text.splitlines()
    number = 0
    for depth, key in enumerate(place, 1):
        while number < len(lines) - 1:
            if key in lines[number] and _has("\n".join(lines[: number + 1]), place[:depth]):
                break
            number += 1
    return number + 1


def _has(text: str, place: Sequence[str]) -> bool:
    try:
        functools.reduce(lambda inner, key: inner[key], place, tomllib.loads(text))
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return False
    return True
