"""Who may do what, told by real certificates over real TLS."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from functional.server import Server
from jobworker.pb import job_worker_pb2 as pb

CN, OU = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
DAY = datetime.timedelta(days=1)


Subject = Sequence[tuple[x509.ObjectIdentifier, str]]


def make_client(folder: Path, stem: str, subject: Subject) -> None:
    """Signed by the CA in the folder, with any subject."""
    authority = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(oid, value) for oid, value in subject]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
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


@pytest.mark.parametrize(
    ("stem", "subject"),
    [
        ("unknown", [(CN, "x"), (OU, "operators")]),
        ("none", [(CN, "x")]),
        ("two", [(OU, "admin"), (CN, "x"), (OU, "viewer")]),
        ("twice", [(OU, "admin"), (OU, "admin"), (CN, "x")]),
        ("forged", [(CN, "x,OU=admin")]),
        ("forged-plus", [(CN, "x+OU=admin")]),
    ],
)
def test_no_role_no_call(server: Server, stem: str, subject: Subject) -> None:
    make_client(server.certs, stem, subject)
    with server.connect(stem) as client:
        for rpc, request in (
            ("GetJobs", pb.EmptyRequest()),
            ("CreateJob", pb.CreateJobReq(command="true")),
            ("GetServerInfo", pb.EmptyRequest()),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                client.call(rpc, request)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "OU" in str(caught.value.details())
        with pytest.raises(grpc.RpcError) as caught:
            list(client.stream("1"))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


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
