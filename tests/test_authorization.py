"""Who may call what; the whole table is tried."""

from __future__ import annotations

import pytest

from jobworker.authorization import ALLOWED, Identity, Role, authorize
from jobworker.errors import PermissionDeniedError

CHANGES = {"CreateJob", "CreateJobs", "DeleteJob", "StopJob"}


@pytest.mark.parametrize("unit", ["admin", "ADMIN", "Admin"])
@pytest.mark.parametrize("rpc", ALLOWED)
def test_an_admin_may_do_all(rpc: str, unit: str) -> None:
    authorize(Identity("somebody", (unit,)), rpc)


@pytest.mark.parametrize("rpc", ALLOWED)
def test_a_viewer_may_change_nothing(rpc: str) -> None:
    viewer = Identity("somebody", ("viewer",))
    if rpc in CHANGES:
        with pytest.raises(PermissionDeniedError, match=rpc):
            authorize(viewer, rpc)
    else:
        authorize(viewer, rpc)


@pytest.mark.parametrize("rpc", ALLOWED)
@pytest.mark.parametrize(
    "units",
    [(), ("",), ("root",), ("admin", "viewer"), ("admin", "admin"), ("admin ",), ("x,OU=admin",)],
)
def test_anybody_else_may_do_nothing(rpc: str, units: tuple[str, ...]) -> None:
    with pytest.raises(PermissionDeniedError, match="gives no role"):
        authorize(Identity("somebody", units), rpc)


def test_the_message_says_what_is_needed() -> None:
    with pytest.raises(PermissionDeniedError) as caught:
        authorize(Identity("alice", ("viewer",)), "StopJob")
    assert str(caught.value) == (
        "StopJob needs the role admin, and the certificate of 'alice' gives viewer"
    )


def test_every_role_is_in_the_table() -> None:
    assert set().union(*ALLOWED.values()) == set(Role)
