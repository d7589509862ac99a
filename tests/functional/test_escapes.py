"""Attacks on the server and the machine by its jobs (tests/escapes), and that each would work
where nothing defends.

Those made here do no harm where they succeed: files are opened and not written to, signals are
number 0, and what is mounted is so in a mount namespace of the server's own. The harmful ones
are for a kernel of its own, tests/kernel/inside/test_escapes.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from escapes.stage import (
    AREA_NAMES,
    SETTINGS,
    Stage,
    carry,
    got_through,
    not_shown,
    public_folder,
)
from functional.server import Server
from jobworker.engine.isolation import Profile

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only a root server confines its jobs")

APART = ["unshare", "--mount", "--uts", "--ipc", "--propagation=private"]
CONFINING = [profile for profile in Profile if profile is not Profile.NONE]


@pytest.fixture(scope="module")
def stage(certificates: Path) -> Iterator[Stage]:
    with public_folder() as folder:
        server = Server(folder, certificates, launcher=APART, **SETTINGS)
        with server.connect() as client:
            stage = Stage(server, client, folder, is_own_kernel=False)
            with stage.set_up():
                yield stage
        assert server.stop() == 0


@pytest.mark.parametrize("area", AREA_NAMES)
@pytest.mark.parametrize("profile", CONFINING)
def test_it_holds(stage: Stage, profile: str, area: str) -> None:
    found = got_through(stage, area, profile)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("area", AREA_NAMES)
def test_these_attacks_work_where_nothing_defends(stage: Stage, area: str) -> None:
    found = not_shown(stage, area)
    assert not found, "\n".join(found)


# How each burden ends: the exit code, or None where it is to be stopped.
BURDENS = {
    "daemons": 0,
    "daemons that hold its output": 0,
    "deaf to signals and stopped": None,
    "zombies": 0,
    "forks without end": 0,
    "child in vfork": None,
    "exec from a thread": 5,
    "misleading name": 0,
    "signals to itself": 0,
    "signals upwards": 0,
    "output closed": 7,
    "output that it takes back": None,
    "output that fills": None,
    "descriptors": None,
    "timers and watches": None,
    "names left behind": 0,
}


@pytest.mark.parametrize("name", BURDENS)
@pytest.mark.parametrize("profile", CONFINING)
def test_nothing_is_left_of(stage: Stage, profile: str, name: str) -> None:
    with stage.leaving_nothing() as mark:
        job = carry(stage, name, mark, profile, is_stopped=BURDENS[name] is None)
    if BURDENS[name] is None:
        assert job.status == "STOPPED"
    else:
        assert job.exitCode == BURDENS[name]
