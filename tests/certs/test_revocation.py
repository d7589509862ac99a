"""Lists of revoked certificates, as openssl makes them, and by hand."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type

from certs.by_hand import needs_openssl, run_openssl
from jobworker import certs
from jobworker.errors import CertificateError


def _serial(path: Path) -> int:
    return certs.validity_of(path.read_bytes()).serial


def test_serial_numbers_in_any_usual_form(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("\ufeff1\n# whom, when\n\n0A:1B  # alice\n0xFF\n  7\nserial=2B\n-05\n")
    found = certs.read_revoked(revoked, folder / "ca-cert.pem")
    assert found.serials == {1, 0xA1B, 0xFF, 7, 0x2B, -5}
    assert found.has("any issuer", 7)
    assert not found.has("any issuer", 8)


@pytest.mark.parametrize(
    "content", [b"12 34\n", b"xyz\n", b"\x30\x82", b"-----BEGIN X509 CRL-----\nx\n"]
)
def test_what_is_no_list_of_serial_numbers(folder: Path, tmp_path: Path, content: bytes) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_bytes(content)
    with pytest.raises(CertificateError) as caught:
        certs.read_revoked(revoked, folder / "ca-cert.pem")
    assert caught.value.about == revoked


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("ca-cert.pem", "take it out of the server's ca-cert.pem"),
        ("server-cert.pem", "`jobworker certs server`"),
        ("none.pem", "give the path of a client's certificate"),
    ],
)
def test_what_is_no_clients_is_not_revoked(
    folder: Path, tmp_path: Path, file: str, remedy: str
) -> None:
    with pytest.raises(CertificateError) as caught:
        certs.revoke(tmp_path / "revoked", folder / file)
    assert remedy in caught.value.remedy
    assert not (tmp_path / "revoked").exists()


def test_a_list_that_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"JOB_WORKER_REVOKED, or make an empty one"):
        certs.read_revoked(tmp_path / "none", folder / "ca-cert.pem")


def test_revoking_appends(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("ff")  # without an end of the line
    for name in ("viewer", "client"):
        certs.revoke(revoked, folder / f"{name}-cert.pem")
    found = certs.read_revoked(revoked, folder / "ca-cert.pem")
    names = ("viewer-cert.pem", "client-cert.pem")
    assert found.serials == {0xFF, *(_serial(folder / name) for name in names)}
    assert "# viewer, 20" in revoked.read_text()


@needs_openssl
@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # the library's
@pytest.mark.parametrize("serial", ["-5", "0", "0x" + "ff" * 20, "0x" + "1f" * 21])
def test_a_serial_number_of_any_sign_and_length(by_hand: Path, serial: str) -> None:
    names = "-CA ca-cert.pem -CAkey ca-key.pem -in client.csr -out client-cert.pem"
    run_openssl(by_hand, f"x509 -req -days 365 {names} -set_serial {serial}")
    shown = run_openssl(by_hand, "x509 -noout -serial -in client-cert.pem").strip()
    assert certs.revoke(by_hand / "revoked", by_hand / "client-cert.pem") == shown[7:]
    found = certs.read_revoked(by_hand / "revoked", by_hand / "ca-cert.pem")
    assert found.serials == {int(serial, 0)} == {_serial(by_hand / "client-cert.pem")}


def test_nothing_is_appended_to_a_list_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("1F2E\nnot a serial\n")
    with pytest.raises(CertificateError, match="has in line 2 'not a serial'"):
        certs.revoke(revoked, folder / "client-cert.pem")
    assert revoked.read_text() == "1F2E\nnot a serial\n"


def test_nothing_is_appended_to_a_list_of_the_authority(folder: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_bytes(b"-----BEGIN X509 CRL-----\n")
    with pytest.raises(CertificateError):
        certs.revoke(revoked, folder / "viewer-cert.pem")
    assert revoked.read_bytes() == b"-----BEGIN X509 CRL-----\n"


def test_a_list_that_writes_the_issuer_in_another_way(folder: Path, tmp_path: Path) -> None:
    """As where a CA was renewed by another program: TLS takes both for the same name."""
    authority = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    client = certs.validity_of((folder / "client-cert.pem").read_bytes())
    now = datetime.now(UTC)
    entry = x509.RevokedCertificateBuilder(client.serial, now).build()
    issuer = x509.Name(
        x509.NameAttribute(each.oid, f"{each.value!s} ".upper(), _type=_ASN1Type.PrintableString)
        for each in authority.subject
    )
    builder = x509.CertificateRevocationListBuilder(issuer, now, now + timedelta(days=1))
    crl = builder.add_revoked_certificate(entry).sign(key, hashes.SHA256())
    (tmp_path / "crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    found = certs.read_revoked(tmp_path / "crl.pem", folder / "ca-cert.pem")
    assert found.has(client.issuer, client.serial)


def _list(
    folder: Path,
    serials: Iterable[int] = (),
    extensions: Iterable[tuple[x509.ExtensionType, bool]] = (),
) -> bytes:
    key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    authority = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder(authority.subject, now, now + timedelta(days=1))
    for serial in serials:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder(serial, now).build()
        )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, is_critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _unknown(oid: str, content: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), content)


def _part(**fields: Any) -> x509.IssuingDistributionPoint:
    none: dict[str, Any] = {
        "full_name": None,
        "relative_name": None,
        "only_contains_user_certs": False,
        "only_contains_ca_certs": False,
        "only_some_reasons": None,
        "indirect_crl": False,
        "only_contains_attribute_certs": False,
    }
    return x509.IssuingDistributionPoint(**{**none, **fields})


@pytest.mark.parametrize(
    ("extension", "warning"),
    [
        (_part(only_contains_ca_certs=True), "has a CRL of CAs only: "),
        (_part(only_contains_attribute_certs=True), "has a CRL of attribute certificates only: "),
        (
            _part(only_some_reasons=frozenset([x509.ReasonFlags.key_compromise])),
            "has a CRL of some reasons only: ",
        ),
        (_unknown("1.2.3.4", b"\5\0"), "has a CRL with the critical extension 1.2.3.4, which"),
        (_part(only_contains_user_certs=True), ""),
        (x509.CRLNumber(7), ""),
    ],
    ids=["CAs", "attributes", "reasons", "unknown", "users", "number"],
)
def test_a_list_that_may_not_have_all_counts_and_is_told(
    folder: Path, tmp_path: Path, extension: x509.ExtensionType, warning: str
) -> None:
    path = tmp_path / "crl.pem"
    client = certs.validity_of((folder / "client-cert.pem").read_bytes())
    path.write_bytes(_list(folder, [client.serial], [(extension, True)]))
    found = certs.read_revoked(path, folder / "ca-cert.pem")
    assert found.has(client.issuer, client.serial)
    assert len(found.warnings) == bool(warning)
    assert all(each.startswith(f"{path} {warning}") for each in found.warnings)


def test_an_unknown_extension_that_is_not_critical_is_not_told(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "crl.pem"
    path.write_bytes(_list(folder, extensions=[(_unknown("1.2.3.4", b"\5\0"), False)]))
    assert certs.read_revoked(path, folder / "ca-cert.pem").warnings == ()


@pytest.mark.parametrize("oid", ["2.5.29.20", "2.5.29.27", "2.5.29.28"])
@pytest.mark.parametrize("is_critical", [False, True])
def test_a_list_with_a_broken_extension(
    folder: Path, tmp_path: Path, oid: str, is_critical: bool
) -> None:
    path = tmp_path / "crl.pem"
    path.write_bytes(_list(folder, extensions=[(_unknown(oid, b"\x04\x01"), is_critical)]))
    with pytest.raises(CertificateError, match=r"crl\.pem has a broken CRL"):
        certs.read_revoked(path, folder / "ca-cert.pem")


@pytest.mark.parametrize(
    ("found", "put"),
    [(b"\x2a\3\5", b"\x2a\3\4"), (b"jobworker CA", b"jobworker \xff\xff")],
    ids=["an extension twice", "an issuer that is no text"],
)
def test_a_list_with_what_only_later_proves_broken(
    folder: Path, tmp_path: Path, found: bytes, put: bytes
) -> None:
    pair = [(_unknown(f"1.2.3.{last}", b"\5\0"), False) for last in (4, 5)]
    crl = x509.load_pem_x509_crl(_list(folder, extensions=pair))
    der = crl.public_bytes(serialization.Encoding.DER)
    assert found in der
    path = tmp_path / "crl.der"
    path.write_bytes(der.replace(found, put))
    with pytest.raises(CertificateError, match=r"crl\.der has a broken CRL"):
        certs.read_revoked(path, folder / "ca-cert.pem")


@pytest.mark.parametrize(
    ("text", "serial"),
    [
        ("0x1234  # mallory", 0x1234),
        ("serial=1F2E", 0x1F2E),
        ("\ufeff1F2E", 0x1F2E),
        ("Of our CA:\n  1f:2e", 0x1F2E),
        ("-05", -5),
    ],
)
def test_serial_numbers_around_a_list_count_too(
    folder: Path, tmp_path: Path, text: str, serial: int
) -> None:
    crl, path = _list(folder), tmp_path / "crl.pem"
    for content in (text.encode() + b"\n" + crl, crl + text.encode()):
        path.write_bytes(content)
        found = certs.read_revoked(path, folder / "ca-cert.pem")
        assert (set(found.serials), found.warnings) == ({serial}, ())


def test_what_is_nearly_a_serial_number_beside_a_list_is_told(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "crl.pem"
    nearly = ["1f2e bob", "  1f:2e; x", "serial=1F2G"]
    text = "\n".join(["Added by the CA, in 2026", "a list", *nearly, "12  # 34 5"])
    path.write_bytes(text.encode() + b"\n" + _list(folder))
    found = certs.read_revoked(path, folder / "ca-cert.pem")
    assert found.serials == {0x12}
    assert len(found.warnings) == len(nearly)
    for line, warning in zip(nearly, found.warnings, strict=True):
        assert f"{path} has {line.strip()!r} beside a CRL" in warning


@needs_openssl
def test_what_openssl_writes_beside_a_list_is_no_serial_number(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "crl.pem"
    path.write_bytes(_list(folder))
    text = run_openssl(tmp_path, "crl -in crl.pem -text")
    assert "        30:4" in text  # of its signature
    number = "            X509v3 CRL Number: \n                1\n    Signature Algorithm"
    for beside in (text, text.replace("    Signature Algorithm", number), f"{text}0a\n{text}"):
        path.write_text(beside)
        found = certs.read_revoked(path, folder / "ca-cert.pem")
        assert found.serials == ({10} if "\n0a" in beside else set())
        assert found.warnings == ()


@needs_openssl
def test_a_list_that_openssl_makes(by_hand: Path, tmp_path: Path) -> None:
    (tmp_path / "index").touch()
    config = tmp_path / "ca.cnf"
    config.write_text(
        "[ca]\ndefault_ca=ca\n[ca]\ndefault_md=sha256\ndefault_crl_days=30\n"
        f"database={tmp_path}/index\n"
    )
    key = ("-cert", by_hand / "ca-cert.pem", "-keyfile", by_hand / "ca-key.pem")
    revoke = ("openssl", "ca", "-config", config, *key)
    actions: list[list[str | Path]] = [
        ["-revoke", by_hand / "client-cert.pem"],
        ["-gencrl", "-out", tmp_path / "crl.pem"],
    ]
    for action in actions:
        subprocess.run([*revoke, *action], check=True, capture_output=True)
    found = certs.read_revoked(tmp_path / "crl.pem", by_hand / "ca-cert.pem")
    client = certs.validity_of((by_hand / "client-cert.pem").read_bytes())
    assert found.has(client.issuer, client.serial)
    assert not found.has("another issuer", client.serial)
    assert found.warnings == ()
