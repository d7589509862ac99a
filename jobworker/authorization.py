"""Who may call what, and about whose jobs: one table, bound to each RPC when it is registered.

An RPC without an entry cannot be registered, so the server does not start.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jobworker.errors import PermissionDeniedError
from jobworker.roles import Caller, Role


class Reach(enum.Enum):
    """Which jobs a call may be about."""

    NOTHING = "nothing"  # it is refused
    OWN = "own"  # those that a client with the same CN created; no other exists for it
    ALL = "all"


NOTHING, OWN, ALL = Reach

# What each role may do: admin, user, viewer. A job that is created is its creator's.
# fmt: off
TABLE = {
    "CreateJob":     (ALL, OWN, NOTHING),
    "CreateJobs":    (ALL, OWN, NOTHING),
    "DeleteJob":     (ALL, OWN, NOTHING),
    "StopJob":       (ALL, OWN, NOTHING),
    "GetJob":        (ALL, OWN, ALL),
    "GetJobs":       (ALL, OWN, ALL),
    "GetJobsStream": (ALL, OWN, ALL),
    "ListJobs":      (ALL, OWN, ALL),
    "GetServerInfo": (ALL, OWN, ALL),
}
# Of whose jobs the values of the environment are shown.
ENVIRONMENT =        (ALL, OWN, OWN)
# fmt: on

RULES: Mapping[str, Mapping[Role, Reach]] = MappingProxyType(
    {rpc: MappingProxyType(dict(zip(Role, row, strict=True))) for rpc, row in TABLE.items()}
)
ENVIRONMENT_RULE: Mapping[Role, Reach] = MappingProxyType(dict(zip(Role, ENVIRONMENT, strict=True)))


@dataclass(frozen=True, slots=True)
class Access:
    """What the table grants to one caller of one RPC."""

    caller: Caller
    role: Role
    reach: Reach

    @property
    def owner(self) -> str | None:
        """Whose jobs the call may be about; None: all."""
        return None if self.reach is Reach.ALL else self.caller.name

    def shows_environment(self, owner: str) -> bool:
        """Whether the values of the environment of this owner's jobs may be shown."""
        reach = ENVIRONMENT_RULE[self.role]
        return reach is Reach.ALL or (reach is Reach.OWN and self._is_own(owner))

    def _is_own(self, owner: str) -> bool:
        return bool(owner) and owner == self.caller.name


def authorize(caller: Caller, rpc: str) -> Access:
    """Raises PermissionDeniedError unless this caller may make this call."""
    if caller.role is None:
        units = ", ".join(map(repr, caller.identity.units)) or "none"
        known = " or ".join(f"OU={known.value}" for known in Role)
        raise PermissionDeniedError(
            f"the certificate of {caller.name!r} gives no role: its OU is {units}; "
            f"use one with exactly {known}"
        )
    reach = RULES[rpc][caller.role]
    if reach is Reach.NOTHING:
        needed = " or ".join(role for role in Role if RULES[rpc][role] is not Reach.NOTHING)
        raise PermissionDeniedError(
            f"{rpc} needs the role {needed}, and {caller.name!r} has the role {caller.role}"
        )
    if reach is Reach.OWN and not caller.name:
        raise PermissionDeniedError(
            "the certificate has no CN, or more than one, so that no job can be its own; "
            "use one with exactly one CN"
        )
    return Access(caller, caller.role, reach)
