"""What is read in certificates, and whose subject is none."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from certs.by_hand import needs_openssl, sign_by_hand
from jobworker import certs
from jobworker.errors import CertificateError, PermissionDeniedError
from jobworker.rpc.gate import _passport_of
from jobworker.rpc.identity import identity_of


@needs_openssl
@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("/O=JobWorker/OU=admin/CN=admin-client", ("admin-client", ("admin",))),
        ("/CN=x,OU=admin", ("x,OU=admin", ())),
        ("/CN=x\\/OU=admin", ("x/OU=admin", ())),
        ("/CN=x\nOU=admin", ("x\nOU=admin", ())),
        ("/OU=viewer/CN=x/OU=admin", ("x", ("viewer", "admin"))),
        ("/OU=viewer+OU=admin/CN=x", ("x", ("admin", "viewer"))),  # a set, sorted by DER
        ("/O=JobWorker", ("", ())),
        ("/CN=x/CN=y/OU=user", ("", ("user",))),
    ],
)
def test_roles_are_units_and_never_parts_of_a_name(
    by_hand: Path, subject: str, expected: tuple[str, tuple[str, ...]]
) -> None:
    sign_by_hand(by_hand, "odd", subject)
    assert certs.subject_of((by_hand / "odd-cert.pem").read_bytes())[:2] == expected


@pytest.mark.parametrize("pem", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_certificate_has_no_subject(pem: bytes) -> None:
    with pytest.raises(CertificateError, match="is not a certificate in PEM form"):
        certs.subject_of(pem)


@needs_openssl
@pytest.mark.parametrize(
    ("tag", "content"), [(0x14, "K\u00f6ln".encode("latin-1")), (0x02, b"\1\2\3\4")]
)
def test_a_subject_that_is_no_text_is_refused(folder: Path, tag: int, content: bytes) -> None:
    """Names in Latin-1, or numbers, as some CAs have signed them."""
    certs.make_client(folder, "Mona", "user")
    path = folder / "Mona-cert.pem"
    der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    assert der.count(b"\x0c\4Mona") == 1
    odd = der.replace(b"\x0c\4Mona", bytes([tag, 4]) + content)
    pem = ssl.DER_cert_to_PEM_cert(odd).encode()
    with pytest.raises(PermissionDeniedError, match="is no text"):
        identity_of(pem)
    path.write_bytes(pem)
    with pytest.raises(CertificateError, match=r"Mona-cert\.pem has a subject that is no text"):
        certs.describe(path)
    assert certs.make_client(folder, "next", "user")


@pytest.mark.parametrize(
    ("found", "put"),
    [(b"\xa0\3\2\1\2", b"\xa0\3\2\1\1"), (b"\x0c\4Mona", b"\x13\4Mon\xff")],
    ids=["of version 2", "letters that are none"],
)
def test_what_openssl_takes_and_cannot_be_read_is_refused(
    folder: Path, found: bytes, put: bytes
) -> None:
    certs.make_client(folder, "Mona", "user")
    path = folder / "Mona-cert.pem"
    der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    assert der.count(found) == 1
    path.write_bytes(ssl.DER_cert_to_PEM_cert(der.replace(found, put)).encode())
    with pytest.raises(PermissionDeniedError, match="is not a certificate"):
        _passport_of(path.read_bytes())
    with pytest.raises(CertificateError, match=r"Mona-cert\.pem is not a certificate"):
        certs.describe(path)
