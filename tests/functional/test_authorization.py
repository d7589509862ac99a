"""Who may do what, told by real certificates over real TLS: all of the table, and all kinds of
certificates that give nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from functional.server import Client, Server
from jobworker import certs
from jobworker.authorization import RULES, Reach
from jobworker.pb import job_worker_pb2 as pb
from jobworker.roles import Role

CN, OU = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
DAY = datetime.timedelta(days=1)
CODE = grpc.StatusCode

Subject = Sequence[tuple[x509.ObjectIdentifier, str]]


def make_client(
    folder: Path, stem: str, subject: Subject, *, ca: Path | None = None, is_expired: bool = False
) -> None:
    """Signed by the CA in the folder `ca`, or else the same, with any subject. Of one that is
    its own CA: see `forge`."""
    ca = ca or folder
    authority = x509.load_pem_x509_certificate((ca / "ca-cert.pem").read_bytes())
    signer = serialization.load_pem_private_key((ca / "ca-key.pem").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    _write(folder, stem, _name(subject), authority.subject, signer, None, is_expired=is_expired)


def forge(folder: Path, stem: str, subject: Subject) -> None:
    """Signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    _write(folder, stem, _name(subject), _name(subject), key, key)


def _name(subject: Subject) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])


def _write(
    folder: Path,
    stem: str,
    subject: x509.Name,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey | None,
    *,
    is_expired: bool = False,
) -> None:
    key = key or ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now - DAY if is_expired else now + DAY)
        .sign(signer, hashes.SHA256())
    )
    (folder / f"{stem}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{stem}-key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


# The matrix: RPC x role x own or another's job


def stream(client: Client, job_id: str) -> pb.Job:
    """The ending, of a job that has ended."""
    *_, last = client.stream(job_id)
    return last.ending


def page(client: Client) -> list[str]:
    return [job.id for job in client.call("ListJobs", pb.ListJobsReq()).jobs]


# By the RPC: a call about a job, where it is about one. Each rule must have its row here.
CALLS: Mapping[str, Callable[[Client, str], Any]] = {
    "CreateJob": lambda client, _: client.create("true"),
    "CreateJobs": lambda client, _: client.call(
        "CreateJobs", pb.CreateJobsReq(jobs=[pb.CreateJobReq(command="true")])
    ),
    "DeleteJob": lambda client, job_id: client.call("DeleteJob", pb.DeleteJobReq(id=job_id)),
    "StopJob": lambda client, job_id: client.stop(job_id, grace_milliseconds=0),
    "GetJob": lambda client, job_id: client.get(job_id),
    "GetJobs": lambda client, _: [job.id for job in client.jobs()],
    "GetJobsStream": stream,
    "ListJobs": lambda client, _: page(client),
    "GetServerInfo": lambda client, _: client.info(),
}
ABOUT_ONE_JOB = {"DeleteJob", "StopJob", "GetJob", "GetJobsStream"}
LISTS = {"GetJobs", "ListJobs"}


def outcome(client: Client, rpc: str, job_id: str) -> tuple[grpc.StatusCode, str, Any]:
    try:
        return CODE.OK, "", CALLS[rpc](client, job_id)
    except grpc.RpcError as error:
        return error.code(), str(error.details()), None


@pytest.fixture(scope="session")
def people(certificates: Path) -> Path:
    """Certificates of alice in each role, and of bob, who is a user."""
    for role in Role:
        make_client(certificates, f"alice-{role}", [(CN, "alice"), (OU, role)])
    make_client(certificates, "bob", [(CN, "bob"), (OU, "user")])
    return certificates


def job_for(server: Server, owner: str, rpc: str) -> str:
    """With which the RPC can be tried: StopJob needs one that runs, the others one that has
    ended."""
    with server.connect(owner) as client:
        if rpc == "StopJob":
            return client.create("sleep", "60").id
        return client.run("echo of a job")[0].id


def test_each_rpc_has_its_row() -> None:
    assert (
        set(CALLS)
        == set(RULES)
        == set(pb.DESCRIPTOR.services_by_name["JobService"].methods_by_name)
    )


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize("owner", ["alice-user", "bob"])
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("rpc", RULES)
def test_the_matrix(server: Server, rpc: str, role: Role, owner: str) -> None:
    """The caller is alice: alice-user's jobs are its own, in whichever role it comes."""
    reach, is_own = RULES[rpc][role], owner == "alice-user"
    job_id = job_for(server, owner, rpc)
    with server.connect(f"alice-{role}") as client:
        code, details, answer = outcome(client, rpc, job_id)
    if reach is Reach.NOTHING:
        assert code is CODE.PERMISSION_DENIED
        assert rpc in details
    elif rpc in ABOUT_ONE_JOB and reach is Reach.OWN and not is_own:
        assert code is CODE.NOT_FOUND
    else:
        assert code is CODE.OK, details
        sees_it = reach is Reach.ALL or is_own
        if rpc in LISTS:
            assert (job_id in answer) == sees_it
        if rpc == "CreateJob":
            assert (answer.created_by.name, answer.created_by.role) == ("alice", role)
        if rpc == "GetServerInfo":
            assert bool(answer.state_directory) == (reach is Reach.ALL)
    with server.connect() as admin:
        if rpc == "StopJob":
            is_running = admin.get(job_id).status == "RUNNING"
            assert is_running == (code is not CODE.OK)
            if is_running:
                admin.stop(job_id, grace_milliseconds=0)
        elif rpc == "DeleteJob":
            assert (outcome(admin, "GetJob", job_id)[0] is CODE.OK) == (code is not CODE.OK)


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize("rpc", sorted(ABOUT_ONE_JOB))
def test_anothers_job_answers_as_one_that_does_not_exist(server: Server, rpc: str) -> None:
    running = job_for(server, "bob", "StopJob")
    others = [running, job_for(server, "bob", "GetJob"), job_for(server, "client", "GetJob")]
    with server.connect("alice-user") as client:
        code, details, _ = outcome(client, rpc, "999999999")
        assert code is CODE.NOT_FOUND
        unknown = details.replace("999999999", "ID")
        for job_id in others:
            for written in (job_id, f"000{job_id}"):
                code, details, _ = outcome(client, rpc, written)
                assert (code, details.replace(job_id, "ID")) == (CODE.NOT_FOUND, unknown)
        # What is wrong with the request itself comes first, whosever the job is.
        for job_id in (running, "999999999"):
            with pytest.raises(grpc.RpcError) as caught:
                client.stop(job_id, signal=1000)
            assert caught.value.code() is CODE.INVALID_ARGUMENT
    with server.connect("bob") as bob:
        bob.stop(running, grace_milliseconds=0)


# Certificates that give nothing

REFUSED_CALLS: Mapping[str, Subject] = {
    "unknown": [(CN, "x"), (OU, "operators")],
    "none": [(CN, "x")],
    "two": [(OU, "admin"), (CN, "x"), (OU, "viewer")],
    "twice": [(OU, "admin"), (OU, "admin"), (CN, "x")],
    "forged": [(CN, "x,OU=admin")],
    "forged-plus": [(CN, "x+OU=admin")],
    "nameless": [(OU, "user")],
    "two-names": [(CN, "alice"), (OU, "user"), (CN, "bob")],
}


@pytest.mark.parametrize("rpc", RULES)
@pytest.mark.parametrize("stem", REFUSED_CALLS)
def test_no_role_no_call(server: Server, stem: str, rpc: str) -> None:
    make_client(server.certs, stem, REFUSED_CALLS[stem])
    with server.connect(stem) as client:
        code, details, _ = outcome(client, rpc, "1")
    assert code is CODE.PERMISSION_DENIED
    assert ("CN" if stem in {"nameless", "two-names"} else "OU") in details


def test_a_revoked_certificate_gives_nothing(
    start_server: Callable[..., Server], people: Path, tmp_path: Path
) -> None:
    revoked = tmp_path / "revoked"
    for role in Role:
        make_client(people, f"revoked-{role}", [(CN, "alice"), (OU, role)])
        certs.revoke(revoked, people / f"revoked-{role}-cert.pem")
    server = start_server(REVOKED=str(revoked))
    for role in Role:
        with server.connect(f"revoked-{role}") as client:
            for rpc in RULES:
                code, details, _ = outcome(client, rpc, "1")
                assert (code, "is revoked" in details) == (CODE.PERMISSION_DENIED, True), rpc
        # Another certificate of the same client is another.
        with server.connect(f"alice-{role}") as client:
            assert client.info().role == role


ADMIN: Subject = [(OU, "admin"), (CN, "admin")]


def of_another_ca(folder: Path, stem: str) -> None:
    other = folder / "another-ca"
    if not other.exists():
        certs.make_all(other)
    make_client(folder, stem, ADMIN, ca=other)


def without_a_certificate(folder: Path, stem: str) -> None:
    """Empty files: see `channel`."""
    for kind in ("cert", "key"):
        (folder / f"{stem}-{kind}.pem").write_bytes(b"")


# Each makes <stem>-cert.pem and <stem>-key.pem, with which nothing connects.
REFUSED_CONNECTIONS: Mapping[str, Callable[[Path, str], None]] = {
    "expired": lambda folder, stem: make_client(folder, stem, ADMIN, is_expired=True),
    "other-ca": of_another_ca,
    "self-signed": lambda folder, stem: forge(folder, stem, ADMIN),
    "no-certificate": without_a_certificate,
}


@pytest.mark.parametrize("stem", REFUSED_CONNECTIONS)
def test_no_connection_no_call(server: Server, stem: str) -> None:
    REFUSED_CONNECTIONS[stem](server.certs, stem)
    with server.connect(stem) as client:
        outcomes = {rpc: outcome(client, rpc, "1")[0] for rpc in RULES}
    assert outcomes == dict.fromkeys(RULES, CODE.UNAVAILABLE)


@pytest.mark.parametrize("role", ["ADMIN", "Admin"])
def test_a_role_counts_in_any_case(server: Server, role: str) -> None:
    make_client(server.certs, role, [(OU, role), (CN, "x")])
    with server.connect(role) as client:
        assert client.info().role == "admin"
        assert client.create("true").id


def test_a_request_over_4_mib(server: Server) -> None:
    with server.connect() as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.create("true", *["x" * 100_000] * 50)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.create("true").id
