"""Who may call what: one table, bound to each RPC when it is registered.

An RPC without an entry cannot be registered, so the server does not start.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jobworker.errors import PermissionDeniedError


class Role(enum.StrEnum):
    """What the OU of a client's certificate says, in any case."""

    ADMIN = "admin"
    VIEWER = "viewer"


EVERYBODY = frozenset(Role)
ADMINS = frozenset({Role.ADMIN})

ALLOWED: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        "CreateJob": ADMINS,
        "CreateJobs": ADMINS,
        "DeleteJob": ADMINS,
        "StopJob": ADMINS,
        "GetJob": EVERYBODY,
        "GetJobs": EVERYBODY,
        "GetJobsStream": EVERYBODY,
        "ListJobs": EVERYBODY,
        "GetServerInfo": EVERYBODY,
    }
)


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller, by the certificate that it proved to own."""

    name: str  # the subject's CN
    units: tuple[str, ...]  # the subject's OUs

    @property
    def role(self) -> Role | None:
        """Only a certificate with exactly one OU, and a known one, has a role."""
        if len(self.units) != 1:
            return None
        try:
            return Role(self.units[0].lower())
        except ValueError:
            return None


def authorize(identity: Identity, rpc: str) -> None:
    """Raises PermissionDeniedError unless this caller may make this call."""
    role = identity.role
    if role in ALLOWED[rpc]:
        return
    if role is None:
        units = ", ".join(map(repr, identity.units)) or "none"
        known = " or ".join(f"OU={known.value}" for known in Role)
        raise PermissionDeniedError(
            f"the certificate of {identity.name!r} gives no role: its OU is {units}; "
            f"use one with exactly {known}"
        )
    needed = " or ".join(sorted(ALLOWED[rpc]))
    raise PermissionDeniedError(
        f"{rpc} needs the role {needed}, and the certificate of {identity.name!r} gives {role}"
    )
