"""What the files of a folder have: certificates, keys, and what a certificate says of itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker.errors import CertificateError

CA_CERT = "ca-cert.pem"
CA_KEY = "ca-key.pem"
SERVER_CERT = "server-cert.pem"
SERVER_KEY = "server-key.pem"
CLIENT_CERT = "client-cert.pem"
CLIENT_KEY = "client-key.pem"

IF_MISSING = (
    "make certificates with `jobworker certs init`, or name the folder that has them in "
    "JOB_WORKER_CERT_PATH"
)

SigningKey = (
    ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
    | rsa.RSAPrivateKey
)
ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)


# Files


def read_certificates(path: Path) -> list[x509.Certificate]:
    """At least one, in the order of the file."""
    return parse_certificates(path, read_pem(path))


def parse_certificates(about: Path | str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError(
            about, "is not a certificate in PEM form", "convert it: openssl x509 -outform pem"
        ) from error


def read_key(path: Path, if_missing: str = IF_MISSING) -> SigningKey:
    try:
        key = serialization.load_pem_private_key(read_pem(path, if_missing), password=None)
    except TypeError as error:
        raise CertificateError(
            path, "is encrypted", "store it without a passphrase: openssl pkey"
        ) from error
    except ValueError as error:
        raise CertificateError(
            path, "is not a private key in PEM form", "convert it: openssl pkey -outform pem"
        ) from error
    if not isinstance(key, SigningKey):
        raise CertificateError(
            path, "is of a kind that cannot sign", "use an RSA, EC or Ed25519 key"
        )
    return key


def read_pem(path: Path, if_missing: str = IF_MISSING) -> bytes:
    """As far as gRPC reads."""
    return read_file(path, if_missing).partition(b"\0")[0]


def read_file(path: Path, if_missing: str = IF_MISSING) -> bytes:
    try:
        # What a shell hands on, as <(...), ends; another pipe may never.
        if path.is_fifo() and not os.path.realpath(path).startswith("/proc/"):
            raise CertificateError(path, "is no ordinary file", "put one there")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CertificateError(path, "is missing", if_missing) from error
    except OSError as error:
        raise CertificateError(
            path, f"cannot be read: {error.strerror}", "give this user the right to read it"
        ) from error


# What a certificate says


def subject_of(pem: bytes) -> tuple[str, tuple[str, ...], str]:
    """The subject's one CN, "" where there is none or more than one, all its OUs, and the serial
    in hexadecimal as openssl shows it, of the first certificate.

    From the parsed certificate and never from a subject in one line of text, in which
    `CN=x\\,OU=admin` looks like a role. Raises CertificateError.
    """
    about = "the client's certificate"
    certificate = parse_certificates(about, pem)[0]
    return (*subject_fields(about, certificate), serial_of(certificate))


@dataclass(frozen=True, slots=True)
class Validity:
    """Which certificate it is, and until when it holds."""

    serial: int
    issuer: str  # its name, as `plain_name` has it
    expires: float  # seconds since the epoch


def validity_of(pem: bytes) -> Validity:
    """Of the first certificate. Raises CertificateError."""
    certificate = parse_certificates("the client's certificate", pem)[0]
    return Validity(
        certificate.serial_number,
        plain_name(certificate.issuer),
        certificate.not_valid_after_utc.timestamp(),
    )


def subject_fields(about: object, certificate: x509.Certificate) -> tuple[str, tuple[str, ...]]:
    try:
        subject = certificate.subject
    except ValueError as error:  # a CA signs what it likes
        remedy = "have it made anew, with CN and OU as UTF8String"
        raise CertificateError(about, "has a subject that is no text", remedy) from error

    def values(oid: x509.ObjectIdentifier) -> tuple[str, ...]:
        return tuple(str(a.value) for a in subject.get_attributes_for_oid(oid))

    names = values(NameOID.COMMON_NAME)
    # Two are as good as none: it could be taken for either client.
    return names[0] if len(names) == 1 else "", values(NameOID.ORGANIZATIONAL_UNIT_NAME)


def serial_of(certificate: x509.Certificate) -> str:
    """By whole bytes; a CA may have chosen a negative one."""
    digits = f"{abs(certificate.serial_number):X}"
    sign = "-" if certificate.serial_number < 0 else ""
    return sign + digits.zfill(len(digits) + len(digits) % 2)


def plain_name(name: x509.Name) -> str:
    """The same for all that TLS takes for the same name (RFC 5280, 7.1): whatever kind of string
    its parts are, in any case, with any number of spaces."""
    return repr(
        [
            sorted((each.oid.dotted_string, str(each.value).lower().split()) for each in part)
            for part in name.rdns
        ]
    )


def alternative_names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    names = extension_of(certificate, x509.SubjectAlternativeName)
    if names is None:
        return ()
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def is_authority(certificate: x509.Certificate) -> bool:
    constraints = extension_of(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def may_be_a_client(certificate: x509.Certificate) -> bool:
    purposes = extension_of(certificate, x509.ExtendedKeyUsage)
    return not is_authority(certificate) and (
        purposes is None or ExtendedKeyUsageOID.CLIENT_AUTH in purposes
    )


def extension_of(certificate: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):  # not there, or not well-formed
        return None
