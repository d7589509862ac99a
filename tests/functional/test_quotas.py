"""The file of clients at work: roles, quotas, and what a client may choose. Totals of limits are
counted where there are limits: kernel/inside/test_server_quotas.py."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from functional.server import Client, Server, Stream, slow_path
from functional.test_authorization import make_client
from jobworker.pb import job_worker_pb2 as pb
from jobworker.rpc.gate import MOST_CREATED

CN, OU = x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATIONAL_UNIT_NAME
CODE = grpc.StatusCode
WAIT_SECONDS = 20
NOTICED_SECONDS = 5
TICKS = "while :; do echo tick; sleep 0.05; done"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "clients.toml"


@pytest.fixture
def start(
    file: Path, certificates: Path, start_server: Callable[..., Server]
) -> Callable[..., Server]:
    """A server with a file of clients. alice and bob are of the OU `build`."""
    for name in ("alice", "bob"):
        make_client(certificates, f"{name}-build", [(CN, name), (OU, "Build")])

    def start(text: str, **settings: Any) -> Server:
        file.write_text(text)
        return start_server(CLIENTS=str(file), **settings)

    return start


def refused(code: grpc.StatusCode, call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code
    return str(caught.value.details())


def sleep(client: Client) -> str:
    return client.create("sleep", "60").id


def test_running_jobs_also_after_a_restart(start: Callable[..., Server]) -> None:
    text = '[ou.build]\nrole = "user"\nrunning_jobs = 3\n[cn.bob]\nrunning_jobs = 1\n'
    server = start(text, STOP_JOBS="no")
    with server.connect("alice-build") as alice, server.connect("bob-build") as bob:
        first, second = sleep(alice), sleep(alice)
        sleep(bob)
        says = refused(CODE.RESOURCE_EXHAUSTED, lambda: sleep(bob))
        assert "the quota running_jobs of 'bob' is 1: 1 of its jobs" in says
        # The others are counted for themselves; of a bulk as many are taken as fit.
        bulk = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command="sleep", args=["60"])] * 3)
        codes = [result.code for result in alice.call("CreateJobs", bulk).results]
        assert sorted(codes) == [0, 8, 8]
    server.stop(signal.SIGKILL)
    server = start(text)
    with server.connect("alice-build") as alice, server.connect("bob-build") as bob:
        assert alice.info().quota_used.running_jobs == alice.info().quota.running_jobs == 3
        assert "running_jobs" in refused(CODE.RESOURCE_EXHAUSTED, lambda: sleep(alice))
        assert "running_jobs" in refused(CODE.RESOURCE_EXHAUSTED, lambda: sleep(bob))
        for job_id in (first, second):
            alice.stop(job_id, grace_milliseconds=0)
        sleep(alice)
        assert alice.info().running_jobs == 2
    with server.connect() as admin:
        for _ in range(4):
            sleep(admin)
        assert admin.info().running_jobs == 7
        assert admin.info().quota_used.running_jobs == 4


def test_what_never_ran_is_not_counted(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start('[ou.build]\nrole = "user"\nrunning_jobs = 1\n')
    broken = tmp_path / "broken"
    broken.write_text("#!/does/not/exist\n")
    broken.chmod(0o755)
    with server.connect("alice-build") as alice:
        for _ in range(3):
            assert alice.create(str(broken)).cause == pb.START_FAILED
            refused(CODE.INVALID_ARGUMENT, lambda: alice.create("no-such-program"))
            assert alice.run("true")[0].status == "COMPLETED"
        assert alice.info().running_jobs == 0


def test_creates_a_second(start: Callable[..., Server]) -> None:
    server = start('[cn.alice]\nrole = "user"\ncreates_per_second = 0.01\n')
    with server.connect("alice-build") as alice:
        alice.create("true")
        says = refused(CODE.RESOURCE_EXHAUSTED, lambda: alice.create("true"))
        assert re.search(r"creates_per_second of 'alice' is 0.01: .*; try again in \d+", says)
        bulk = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command="true")] * 2)
        assert [result.code for result in alice.call("CreateJobs", bulk).results] == [8, 8]


def test_a_total_cannot_be_held_without_limits(start: Callable[..., Server]) -> None:
    """No defaults here: whichever controllers this machine has."""
    server = start(
        '[ou.build]\nrole = "user"\ntotal_cpu = 100\n[cn.bob]\ntotal_cpu = 0\ntotal_memory = 9\n',
        DEFAULT_CPU="0",
        DEFAULT_MEMORY="0",
    )
    for name, quota in (("alice", "total_cpu"), ("bob", "total_memory")):
        with server.connect(f"{name}-build") as client:
            says = refused(CODE.RESOURCE_EXHAUSTED, lambda: sleep(client))
            assert f"the quota {quota} of '{name}'" in says
            # Where the controller is missing, there is nothing to give.
            expected = "no limit that could count; give it one|no job to a limit that could count"
            assert re.search(expected, says)


def test_what_a_client_may_choose(start: Callable[..., Server]) -> None:
    server = start(
        '[cn.alice]\nrole = "user"\nprofiles = ["default"]\n'
        '[cn.bob]\nrole = "user"\nusers = ["nobody"]\n',
        PROFILES_ALLOWED="default,none",
    )
    with server.connect("alice-build") as alice:
        says = refused(CODE.PERMISSION_DENIED, lambda: alice.create("true"))
        assert says == "'alice' may not have the profile 'none'; ask for one of: default"
        if not alice.info().isolation_problem:
            assert alice.create("true", profile="default").profile == "default"
        assert set(alice.info().profiles) <= {"default"}
    with server.connect("bob-build") as bob:
        me = bob.create("true").user  # as the server's profile wants it
        says = refused(CODE.PERMISSION_DENIED, lambda: bob.create("true", user=me))
        assert says == f"'bob' may not have the user {me!r}; ask for one of: nobody"


def test_a_broken_file_keeps_the_server_from_starting(start: Callable[..., Server]) -> None:
    with pytest.raises(AssertionError, match=r"cn\.alice\.role in \S+, line 2 = 'boss'.*use admin"):
        start('[cn.alice]\nrole = "boss"\n')


def until(is_true: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("how", ["SIGHUP", "by itself"])
def test_reload(start: Callable[..., Server], file: Path, tmp_path: Path, how: str) -> None:
    audit_log = tmp_path / "audit.log"
    server = start('[ou.build]\nrole = "user"\nrunning_jobs = 1\n', AUDIT_LOG=str(audit_log))

    def write(text: str) -> None:
        file.write_text(text)
        if how == "SIGHUP":
            server.process.send_signal(signal.SIGHUP)

    with server.connect("alice-build") as alice:
        sleep(alice)
        refused(CODE.RESOURCE_EXHAUSTED, lambda: sleep(alice))

        write('[ou.build]\nrole = "nobody"\n')
        until(lambda: "clients' roles cannot be used, so the old stay in force" in server.log)
        refused(CODE.RESOURCE_EXHAUSTED, lambda: sleep(alice))
        assert "line 2" in server.log
        problem = reloads(audit_log)[-1]["problem"]
        assert "no such role" in problem

        write('[ou.build]\nrole = "user"\nrunning_jobs = 2\n')
        until(lambda: alice.info().quota.running_jobs == 2)
        sleep(alice)

        write('[ou.build]\nrole = "viewer"\n')
        until(lambda: alice.info().role == "viewer")
        refused(CODE.PERMISSION_DENIED, lambda: sleep(alice))

        write("")
        until(lambda: has_no_role(alice))
        until(lambda: len(reloads(audit_log)) == 4)


def test_a_bulk_that_is_under_way_goes_on_as_its_client_may_now(
    start: Callable[..., Server], file: Path
) -> None:
    server = start('[ou.build]\nrole = "user"\n')
    with server.connect("alice-build") as alice:
        os.kill(server.jobinit_pid(), signal.SIGSTOP)
        job = pb.CreateJobReq(command="true")
        bulk = alice.call_soon("CreateJobs", pb.CreateJobsReq(jobs=[job] * 500))
        until(lambda: alice.info().running_jobs == MOST_CREATED)
        file.write_text('[ou.build]\nrole = "viewer"\n')
        server.process.send_signal(signal.SIGHUP)
        until(lambda: alice.info().role == "viewer")
        os.kill(server.jobinit_pid(), signal.SIGCONT)
        codes = Counter(result.code for result in bulk.result().results)
        assert codes == {0: MOST_CREATED, 7: 500 - MOST_CREATED}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ('role = "viewer"', CODE.PERMISSION_DENIED),
        ('role = "user"\nrunning_jobs = 1', CODE.RESOURCE_EXHAUSTED),
        ('role = "user"\nprofiles = []', CODE.PERMISSION_DENIED),
    ],
)
def test_creates_that_wait_for_looks_go_on_as_their_client_may_now(
    start: Callable[..., Server], file: Path, tmp_path: Path, change: str, code: grpc.StatusCode
) -> None:
    text = '[ou.build]\nrole = "user"\n'
    server = start(text)
    environment = {"PATH": slow_path(tmp_path / "links")}
    with server.connect("alice-build") as alice:
        for _ in range(5):  # on a busy machine all may be over before it is told
            creates = [
                alice.create_soon("sleep", "60", environment=environment) for _ in range(400)
            ]
            until(lambda: alice.info().running_jobs > 0)
            file.write_text(f"[ou.build]\n{change}\n")
            server.process.send_signal(signal.SIGHUP)
            codes = Counter(create.code() for create in creates)
            assert codes.keys() <= {CODE.OK, code}, codes
            if codes[code]:
                return
            file.write_text(text)
            server.process.send_signal(signal.SIGHUP)
            until(lambda: alice.create_soon("true").code() is CODE.OK)
    pytest.fail("no create was refused")


def test_calls_that_wait_for_their_turn_go_by_what_their_client_may_now(
    start: Callable[..., Server], file: Path
) -> None:
    """Many read the record of a large job, one after the other."""
    server = start('[cn.alice]\nrole = "admin"\n[cn.bob]\nrole = "user"\n')
    with (
        server.connect("alice-build") as alice,
        server.connect("bob-build") as bob,
        server.connect() as admin,
    ):
        secret = admin.create("true", environment={"TOKEN": "secret"})
        own, large = bob.create("true"), bob.create("true", *["\1" * 127_000] * 4)
        for job in (secret, own, large):
            admin.wait(job.id)
        others = [each.stop_soon(large.id) for _ in range(200) for each in (alice, bob)]
        late = [
            alice.call_soon("GetJob", pb.GetJobReq(id=secret.id)),
            bob.call_soon("DeleteJob", pb.DeleteJobReq(id=own.id)),
        ]
        before = sum(call.done() for call in others)
        until(lambda: sum(call.done() for call in others) > before + 20)
        file.write_text('[cn.alice]\nrole = "user"\n[cn.bob]\nrole = "viewer"\n')
        server.process.send_signal(signal.SIGHUP)
        assert {call.code() for call in late} == {CODE.PERMISSION_DENIED}
        assert {call.code() for call in others} >= {CODE.FAILED_PRECONDITION}
        assert admin.get(own.id).status == "COMPLETED"


@pytest.mark.parametrize("rpc", ["GetJobs", "ListJobs"])
def test_a_list_is_made_by_one_role(start: Callable[..., Server], file: Path, rpc: str) -> None:
    """It takes a second: where its client may see less by then, it is none."""
    server = start('[cn.alice]\nrole = "admin"\n')
    variables = {f"{number:x}": "secret" for number in range(9_000)}
    with server.connect("alice-build") as alice, server.connect() as admin:
        jobs = [admin.create("true", environment=variables) for _ in range(25)]
        admin.wait(jobs[-1].id)

        def says_so() -> bool:
            switch_to("admin")
            listing = alice.call_soon(
                rpc, pb.ListJobsReq(page_size=1000) if is_paged else pb.EmptyRequest()
            )
            time.sleep(0.1)  # it is to be under way
            switch_to("viewer")
            return "roles have changed since this call began" in (listing.details() or "")

        def switch_to(role: str) -> None:
            file.write_text(f'[cn.alice]\nrole = "{role}"\n')
            server.process.send_signal(signal.SIGHUP)
            until(lambda: alice.info().role == role)

        is_paged = rpc == "ListJobs"
        until(says_so)


def has_no_role(client: Client) -> bool:
    try:
        client.info()
    except grpc.RpcError as error:
        return error.code() is CODE.PERMISSION_DENIED
    return False


def reloads(audit_log: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, audit_log.read_text().splitlines())
    return [line for line in lines if line.get("files") == "clients' roles"]


def test_a_stream_that_its_client_may_no_longer_have(
    start: Callable[..., Server], file: Path
) -> None:
    """It ends; those that may go on do so, on the same connection."""
    server = start('[cn.alice]\nrole = "admin"\n[cn.bob]\nrole = "viewer"\n')
    with (
        server.connect("alice-build") as alice,
        server.connect("bob-build") as bob,
        server.connect() as admin,
    ):
        own, foreign = alice.shell(TICKS), admin.shell(TICKS)
        silent = admin.create("sleep", "60")
        lost = [alice.stream(foreign.id), alice.stream(silent.id)]
        kept = [alice.stream(own.id), bob.stream(foreign.id), bob.stream(own.id)]
        for stream in (lost[0], *kept):
            next(stream)

        file.write_text('[cn.alice]\nrole = "user"\n[cn.bob]\nrole = "admin"\n')
        for stream in lost:
            says = ended_soon(stream)
            assert "the roles have changed since this stream began: there is no job" in says
        for stream in kept:
            assert next(stream).payload

        file.write_text("")
        for stream in kept:
            assert "gives no role" in ended_soon(stream)
        assert admin.get(own.id).status == "RUNNING"
    assert "Traceback" not in server.log


def test_the_environment_is_shown_by_the_role_at_the_end(
    start: Callable[..., Server], file: Path
) -> None:
    server = start('[cn.alice]\nrole = "admin"\n')
    with server.connect("alice-build") as alice, server.connect() as admin:
        job = admin.create("sleep", "60", environment={"TOKEN": "secret"})
        stream = alice.stream(job.id)
        file.write_text('[cn.alice]\nrole = "viewer"\n')
        until(lambda: alice.info().role == "viewer")
        admin.stop(job.id, grace_milliseconds=0)
        *_, last = stream
        assert last.ending.environment == {"TOKEN": ""}


def ended_soon(stream: Stream) -> str:
    begun = time.monotonic()
    says = refused(CODE.PERMISSION_DENIED, lambda: list(stream))
    assert time.monotonic() < begun + NOTICED_SECONDS
    return says
