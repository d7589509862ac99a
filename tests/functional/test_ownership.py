"""Whose a job is: who created and who stopped it, which jobs a user finds, and who is shown the
values of its environment."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from functional.server import Client, Server
from functional.test_authorization import make_client
from functional.test_list_jobs import ids, pages
from jobworker.pb import job_worker_pb2 as pb

SECRET = "s3cret-marker"


@pytest.fixture(autouse=True)
def _people(certificates: Path) -> None:
    for name, unit in (("alice", "user"), ("bob", "user")):
        if not (certificates / f"{name}-cert.pem").exists():
            make_client(certificates, name, [(x509.NameOID.COMMON_NAME, name), (OU, unit)])


OU = x509.NameOID.ORGANIZATIONAL_UNIT_NAME


def serial(certs: Path, name: str) -> str:
    certificate = x509.load_pem_x509_certificate((certs / f"{name}-cert.pem").read_bytes())
    return certificate.serial_number.to_bytes(20).lstrip(b"\0").hex().upper()


def test_who_created_and_who_stopped(server: Server) -> None:
    with server.connect("alice") as alice, server.connect() as admin:
        job_id = alice.create("sleep", "60").id
        admin.stop(job_id, grace_milliseconds=0)
        job = alice.get(job_id)
        assert job.created_by == pb.Principal(
            name="alice", role="user", serial=serial(server.certs, "alice")
        )
        assert job.stopped_by == pb.Principal(
            name="admin", role="admin", serial=serial(server.certs, "client")
        )
        ended = alice.wait(alice.create("true").id)
        assert ended.created_by.name == "alice"
        assert not ended.HasField("stopped_by")
        # The first end that is accepted counts, and so does who asked for it.
        timed_out = alice.shell("trap '' TERM; sleep 60", timeout_milliseconds=1).id
        alice.stop(timed_out, grace_milliseconds=0)
        assert alice.get(timed_out).cause in {pb.TIMED_OUT, pb.STOPPED}
        assert alice.get(timed_out).HasField("stopped_by") == (
            alice.get(timed_out).cause == pb.STOPPED
        )


def test_it_is_known_after_a_restart(start_server: Callable[..., Server]) -> None:
    first = start_server(STOP_JOBS="no")
    with first.connect("alice") as alice, first.connect("bob") as bob:
        running, ended = alice.create("sleep", "60").id, alice.run("true")[0].id
        stopped = alice.create("sleep", "60").id
        alice.stop(stopped, grace_milliseconds=0)
        others = bob.create("sleep", "60").id
    first.stop(signal.SIGKILL)
    second = start_server()
    with second.connect("alice") as alice, second.connect() as admin:
        assert ids(alice) == [stopped, ended, running]
        assert alice.get(stopped).stopped_by.name == "alice"
        with pytest.raises(grpc.RpcError) as caught:
            alice.get(others)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        for job_id in (running, others):
            admin.stop(job_id, grace_milliseconds=0)
        assert alice.get(running).stopped_by.name == "admin"


def test_a_user_lists_its_own(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with server.connect("alice") as alice, server.connect("bob") as bob:
        mine, others = [], []
        for number in range(12):
            mine.append(alice.shell(f"exit {number % 2}", name=f"n{number % 3}").id)
            others.append(bob.shell(f"exit {number % 2}", name=f"n{number % 3}").id)
        for job_id in mine:
            alice.wait(job_id)
        mine.append(alice.create("sleep", "60", name="n0").id)
        mine.reverse()
        assert ids(alice) == mine
        assert [len(page) for page in pages(alice, page_size=5)] == [5, 5, 3]
        assert ids(alice, page_size=5) == mine
        assert [job.id for job in alice.jobs()] == mine
        assert ids(alice, statuses=["RUNNING"]) == mine[:1]
        assert ids(alice, name="n0") == [mine[0], *mine[3::3]]
        assert ids(alice, name="n0", statuses=["COMPLETED"], page_size=1) == [mine[6], mine[12]]
        # Nor does it learn anything of others by their names.
        assert ids(alice, owner="alice", page_size=5) == mine
        assert ids(alice, owner="bob") == ids(alice, owner="nobody") == []
        assert alice.info().running_jobs == 1
    with server.connect() as admin, server.connect("viewer") as viewer:
        for everybody in (admin, viewer):
            assert ids(everybody, owner="alice", page_size=5) == mine
            assert set(ids(everybody, owner="bob", name="n1")) == set(others[1::3])
            assert ids(everybody, owner="carol") == []
            assert set(ids(everybody)) == {*mine, *others}


def test_the_limit_of_an_answer_is_for_its_own(start_server: Callable[..., Server]) -> None:
    """However many others there are, a user's answer to GetJobs and each page is full."""
    server = start_server()
    with server.connect("alice") as alice, server.connect("bob") as bob:
        first = alice.create("true").id
        bulk = pb.CreateJobsReq(jobs=[pb.CreateJobReq(command="true")] * 600)
        for _ in range(2):
            assert all(result.id for result in bob.call("CreateJobs", bulk).results)
        last = alice.create("true").id
        assert [job.id for job in alice.jobs()] == [last, first]
        assert pages(alice, page_size=2) == [[last, first], []]


# Values of the environment


def shown(client: Client, job_id: str) -> list[pb.Job]:
    """Everywhere where a job is shown that has ended."""
    *_, last = client.stream(job_id)
    listed = client.call("ListJobs", pb.ListJobsReq()).jobs
    jobs = [client.get(job_id), last.ending, *client.jobs(), *listed]
    return [job for job in jobs if job.id == job_id]


def test_values_are_for_owner_and_admin(server: Server) -> None:
    environment = {"TOKEN": SECRET, "EMPTY": ""}
    with server.connect("alice") as alice:
        created = alice.shell("true", environment=environment)
        jobs = [created, *shown(alice, created.id)]
    with server.connect() as admin:
        jobs += shown(admin, created.id)
    assert len(jobs) == 9
    for job in jobs:
        assert dict(job.environment) == environment
        assert not job.environment_withheld
    with server.connect("viewer") as viewer:
        jobs = shown(viewer, created.id)
        assert len(jobs) == 4
        for job in jobs:
            assert dict(job.environment) == {"TOKEN": "", "EMPTY": ""}
            assert job.environment_withheld
            assert SECRET.encode() not in job.SerializeToString()
        with server.connect("alice") as alice:
            plain = alice.run("true")[0].id
        assert not any(job.environment_withheld for job in shown(viewer, plain))


def test_values_are_in_no_log_and_in_no_error(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    audit_log = tmp_path / "audit.log"
    server = start_server(LOG_LEVEL="debug", STOP_JOBS="no", AUDIT_LOG=str(audit_log))
    broken = server.state.parent / "broken"
    broken.write_text("#!/does/not/exist\n")
    broken.chmod(0o755)
    secret = {"TOKEN": SECRET}
    refused = [
        pb.CreateJobReq(command="true", environment={f"A={SECRET}": ""}),
        pb.CreateJobReq(command="true", environment={"": SECRET}),
        pb.CreateJobReq(command="true", environment={"TOKEN": f"{SECRET}\0"}),
        pb.CreateJobReq(command="true", environment={"TOKEN": SECRET * 20_000}),
        pb.CreateJobReq(command="true", environment={f"T{i}": SECRET * 5000 for i in range(20)}),
        pb.CreateJobReq(command="true", environment={"PATH": f"/{SECRET}"}),
        pb.CreateJobReq(
            command="server.log", environment={"PATH": f"{server.state.parent}:/{SECRET}"}
        ),
        pb.CreateJobReq(command="sub", environment={"PATH": f"{server.state.parent}/{SECRET}"}),
        pb.CreateJobReq(command="no such command", environment=secret),
        pb.CreateJobReq(command="true", environment=secret, working_directory="/none"),
        pb.CreateJobReq(command="true", environment=secret, maxCPU=-1),
        pb.CreateJobReq(command="true", environment=secret, user="no such user"),
    ]
    (server.state.parent / SECRET / "sub").mkdir(parents=True)
    texts = []
    with server.connect() as client:
        for request in refused:
            with pytest.raises(grpc.RpcError) as caught:
                client.call("CreateJob", request)
            texts.append(str(caught.value))
        results = client.call("CreateJobs", pb.CreateJobsReq(jobs=refused)).results
        texts += [result.error for result in results]
        assert all(texts)
        failed = client.create(str(broken), environment=secret)
        assert failed.cause == pb.START_FAILED
        texts.append(failed.detail)
        client.run("exit 3", environment=secret)
        running = client.create("sleep", "60", environment=secret).id
    server.stop(signal.SIGKILL)
    second = start_server(LOG_LEVEL="debug", AUDIT_LOG=str(audit_log))
    with second.connect() as client:
        assert client.get(running).environment["TOKEN"] == SECRET
        client.stop(running, grace_milliseconds=0)
    second.stop()
    log = (second.state.parent / "server.log").read_text()
    assert "DEBUG" in log
    assert str(failed.id) in log
    audited = audit_log.read_text()
    assert audited.count("TOKEN") > 10
    for text in (*texts, log, audited):
        assert SECRET not in text
