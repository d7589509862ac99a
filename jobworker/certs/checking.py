"""What is wrong with certificates that are there, and what people want to know of one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa

from jobworker.certs.reading import (
    CA_CERT,
    SERVER_CERT,
    SERVER_KEY,
    SigningKey,
    alternative_names_of,
    is_authority,
    may_be_a_client,
    read_certificates,
    read_key,
    subject_fields,
)
from jobworker.errors import CertificateError

# From this long before its end, `describe` warns.
NOTICE = timedelta(days=30)
# From this long before its end, a server warns of its own.
SERVER_NOTICE = timedelta(days=14)

SMALLEST_RSA_BITS = 2048


def check_server_files(folder: Path) -> None:
    """Makes sure that a server can start with the certificates in `folder`.

    Raises CertificateError where one is missing, unreadable, no PEM, expired, not valid yet,
    or not signed by the CA, and where the key is not the certificate's.
    """
    authorities = read_certificates(folder / CA_CERT)
    chain = read_certificates(folder / SERVER_CERT)
    key = read_key(folder / SERVER_KEY)
    check_key(folder / SERVER_KEY, key, folder / SERVER_CERT, chain[0])
    for authority in authorities:
        _check_validity(folder / CA_CERT, authority)
    for certificate in chain:
        _check_validity(folder / SERVER_CERT, certificate)
    _check_chain(folder, chain, authorities)


def end_of_server(folder: Path) -> datetime:
    """When the first of the certificates that a server shows ends. Raises CertificateError."""
    return min(each.not_valid_after_utc for each in read_certificates(folder / SERVER_CERT))


def notice_of_end(folder: Path, end: datetime) -> str:
    """That the server's certificate ends soon, and what to do; empty where it does not. end: of
    `end_of_server`."""
    if end - datetime.now(UTC) >= SERVER_NOTICE:
        return ""
    return (
        f"{folder / SERVER_CERT} expires on {end:%Y-%m-%d %H:%M} UTC, and then no client can "
        "connect; renew it: `jobworker certs server` where the CA's key is kept"
    )


def check_client_files(ca_path: Path, cert_path: Path, key_path: Path) -> None:
    """Looks for a reason why a server of this CA would refuse such a client.

    Raises CertificateError where a file is missing, unreadable, no PEM, expired, not valid
    yet, or not signed by the CA, and where the key is not the certificate's.
    """
    authorities = read_certificates(ca_path)
    chain = read_certificates(cert_path)
    check_key(key_path, read_key(key_path), cert_path, chain[0])
    for authority in authorities:
        _check_validity(ca_path, authority)
    for certificate in chain:
        _check_validity(cert_path, certificate)
    if not _is_issued_by(chain[-1], authorities):
        raise CertificateError(
            cert_path,
            f"is not signed by {ca_path}",
            "use a certificate and a CA that belong together",
        )


def check_key(
    key_path: Path,
    key: SigningKey,
    certificate_path: Path,
    certificate: x509.Certificate,
) -> None:
    if key.public_key() != certificate.public_key():
        raise CertificateError(
            key_path,
            f"is not the key of {certificate_path.name}",
            "use the two that were made together",
        )


def _check_validity(path: Path, certificate: x509.Certificate) -> None:
    problem = _validity_problem(certificate)
    if problem:
        raise CertificateError(
            path,
            problem,
            "check this machine's clock, or, where the CA's key is kept, make a new one: "
            + _renewal(path, certificate),
        )


def _renewal(path: Path, certificate: x509.Certificate) -> str:
    """What makes it anew, if it was made here."""
    if is_authority(certificate):
        return "`jobworker certs init --force`, with a new CA and all that it signs"
    if path.name == SERVER_CERT:
        return "`jobworker certs server`"
    name, units = subject_fields(path, certificate)
    who = shlex.quote("".join(each if each.isprintable() else "?" for each in name))
    role = shlex.quote(units[0]) if len(units) == 1 and units[0].isalnum() else "ROLE"
    return f"`jobworker certs client --name {who} --role {role} --force`"


def _validity_problem(certificate: x509.Certificate) -> str:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if now < certificate.not_valid_before_utc:
        return f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    return ""


def _check_chain(
    folder: Path, chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> None:
    """Each certificate is signed by the next, and the last by the CA, as TLS wants them."""
    for certificate, issuer in pairwise(chain):
        if not _is_issued_by(certificate, [issuer]):
            raise CertificateError(
                folder / SERVER_CERT,
                "has certificates that do not sign each other",
                "put the server's first, and each of the others after what it has signed",
            )
    if not _is_issued_by(chain[-1], authorities):
        raise CertificateError(
            folder / SERVER_CERT,
            f"is not signed by {CA_CERT}",
            "put the CA there that has signed it, or have it signed by this one",
        )


def _is_issued_by(certificate: x509.Certificate, issuers: Iterable[x509.Certificate]) -> bool:
    for issuer in issuers:
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, TypeError, ValueError):
            continue
        return True
    return False


# Describing


@dataclass(frozen=True, slots=True)
class Description:
    """What people want to know of a certificate."""

    name: str  # the subject's CN
    units: tuple[str, ...]  # the subject's OUs: one, a client's role
    alternative_names: tuple[str, ...]  # host names and addresses, a server's
    is_authority: bool
    expires: datetime
    warnings: tuple[str, ...]  # a sentence each


def describe(path: Path) -> Description:
    """What the first certificate of a PEM file says. Raises CertificateError."""
    certificate = read_certificates(path)[0]
    name, units = subject_fields(path, certificate)
    return Description(
        name=name,
        units=units,
        alternative_names=alternative_names_of(certificate),
        is_authority=is_authority(certificate),
        expires=certificate.not_valid_after_utc,
        warnings=(*_warnings(path, certificate, units), *_misfits(path)),
    )


def _warnings(path: Path, certificate: x509.Certificate, units: Sequence[str]) -> Iterable[str]:
    problem = _validity_problem(certificate)
    if problem:
        yield f"It {problem}."
    elif (left := certificate.not_valid_after_utc - datetime.now(UTC)) < NOTICE:
        yield f"It expires {_in_days(left.days)}."
    if may_be_a_client(certificate) and len(units) != 1:
        yield f"It has {len(units) or 'no'} OU: a client needs exactly one, its role."
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < SMALLEST_RSA_BITS:
        yield f"Its RSA key has {key.key_size} bits only, use {SMALLEST_RSA_BITS} or more."
    key_path = path.with_name(path.name.replace("-cert.pem", "-key.pem"))
    if key_path != path and key_path.exists() and key_path.stat().st_mode & 0o077:
        yield f"Its key may be read by others: chmod 600 {key_path}"


def _in_days(days: int) -> str:
    if not days:
        return "within a day"
    return "in 1 day" if days == 1 else f"in {days} days"


def _misfits(path: Path) -> Iterable[str]:
    """What beside it does not belong to it, so far as that can be read."""
    chain = read_certificates(path)
    with suppress(CertificateError):
        authorities = read_certificates(path.with_name(CA_CERT))
        if not is_authority(chain[0]) and not _is_issued_by(chain[-1], authorities):
            yield f"It is not signed by the {CA_CERT} beside it."
    key_path = path.with_name(path.name.replace("-cert.pem", "-key.pem"))
    if key_path == path:
        return
    with suppress(CertificateError):
        if read_key(key_path).public_key() != chain[0].public_key():
            yield f"{key_path.name} is not its key."
