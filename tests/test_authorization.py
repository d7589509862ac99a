"""Who may call what; the whole table is tried."""

from __future__ import annotations

import pytest

from jobworker.authorization import ENVIRONMENT_RULE, RULES, Reach, authorize
from jobworker.errors import PermissionDeniedError
from jobworker.pb import job_worker_pb2
from jobworker.roles import Caller, Clients, Identity, Role

CREATES = {"CreateJob", "CreateJobs"}
CHANGES = CREATES | {"DeleteJob", "StopJob"}
SERVICE = job_worker_pb2.DESCRIPTOR.services_by_name["JobService"]


def caller(*units: str, name: str = "alice") -> Caller:
    return Clients().caller(Identity(name, units))


def test_the_table_is_complete() -> None:
    assert set(RULES) == set(SERVICE.methods_by_name)
    for rule in (*RULES.values(), ENVIRONMENT_RULE):
        assert list(rule) == list(Role)


@pytest.mark.parametrize("unit", ["admin", "ADMIN", "Admin"])
@pytest.mark.parametrize("rpc", RULES)
def test_an_admin_may_do_all(rpc: str, unit: str) -> None:
    assert authorize(caller(unit), rpc).owner is None
    assert authorize(caller(unit, name=""), rpc).owner is None


@pytest.mark.parametrize("rpc", RULES)
def test_a_user_may_do_all_to_its_own(rpc: str) -> None:
    assert authorize(caller("user"), rpc).owner == "alice"


@pytest.mark.parametrize("rpc", RULES)
def test_a_viewer_may_change_nothing(rpc: str) -> None:
    if rpc in CHANGES:
        with pytest.raises(PermissionDeniedError, match=rpc):
            authorize(caller("viewer"), rpc)
    else:
        assert authorize(caller("viewer"), rpc).owner is None


@pytest.mark.parametrize("rpc", RULES)
def test_a_user_without_a_name_may_do_nothing(rpc: str) -> None:
    """Its own would be the jobs that are nobody's."""
    with pytest.raises(PermissionDeniedError, match="no CN"):
        authorize(caller("user", name=""), rpc)


@pytest.mark.parametrize("rpc", RULES)
@pytest.mark.parametrize(
    "units",
    [(), ("",), ("root",), ("admin", "viewer"), ("admin", "admin"), ("admin ",), ("x,OU=admin",)],
)
def test_anybody_else_may_do_nothing(rpc: str, units: tuple[str, ...]) -> None:
    with pytest.raises(PermissionDeniedError, match="gives no role"):
        authorize(caller(*units), rpc)


def test_values_of_the_environment_are_for_owner_and_admin() -> None:
    owners = ("alice", "bob", "Alice", "")
    shown = {
        role: [
            owner for owner in owners if authorize(caller(role), "GetJob").shows_environment(owner)
        ]
        for role in Role
    }
    assert shown == {"admin": list(owners), "user": ["alice"], "viewer": ["alice"]}
    nameless = authorize(caller("viewer", name=""), "GetJob")
    assert not any(map(nameless.shows_environment, owners))


def test_the_message_says_what_is_needed() -> None:
    with pytest.raises(PermissionDeniedError) as caught:
        authorize(caller("viewer"), "StopJob")
    assert str(caught.value) == (
        "StopJob needs the role admin or user, and 'alice' has the role viewer"
    )


def test_every_reach_is_in_the_table() -> None:
    assert {reach for rule in RULES.values() for reach in rule.values()} == set(Reach)
