"""Certificates: making those of a server and its clients, and checking what is in a folder.

A folder of certificates holds PEM files with these names:

    ca-cert.pem, ca-key.pem            signs all others; the key is needed for nothing else
    server-cert.pem, server-key.pem    what the server shows
    client-cert.pem, client-key.pem    an admin, and what the command line uses by default
    NAME-cert.pem, NAME-key.pem        any other client

What a client may do is the OU of its subject; `jobworker.authorization` says what an OU means.
Certificates made elsewhere serve as well, with any kind of key, with or without alternative
names.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shlex
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker.errors import CertificateError

CA_CERT = "ca-cert.pem"
CA_KEY = "ca-key.pem"
SERVER_CERT = "server-cert.pem"
SERVER_KEY = "server-key.pem"
CLIENT_CERT = "client-cert.pem"
CLIENT_KEY = "client-key.pem"

# By which clients of this protocol have always called their server, wherever it runs.
SERVER_NAMES = ("job-worker", "localhost", "127.0.0.1", "::1")

CA_LIFETIME = timedelta(days=3650)
LIFETIME = timedelta(days=825)
# Clocks differ: a new certificate must not be "not valid yet" on the next machine.
BACKDATED = timedelta(hours=1)
# From this long before its end, `describe` warns.
NOTICE = timedelta(days=30)
# From this long before its end, a server warns of its own.
SERVER_NOTICE = timedelta(days=14)

SMALLEST_RSA_BITS = 2048

IF_MISSING = (
    "make certificates with `jobworker certs init`, or name the folder that has them in "
    "JOB_WORKER_CERT_PATH"
)
IF_CA_KEY_IS_MISSING = (
    "do this where it is kept, or put it there for as long as this takes; without it only a new "
    "CA can sign, made by `jobworker certs init --force`"
)
NEW_CA = (
    ", the CA as well, after which every client needs a new certificate (`jobworker certs server` "
    "renews the server's alone, `jobworker certs client` makes a client's)"
)

SigningKey = (
    ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
    | rsa.RSAPrivateKey
)
CrlKey = (
    ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey | rsa.RSAPublicKey
)
ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)


# Making certificates


def make_all(folder: Path, names: Iterable[str] = (), *, force: bool = False) -> list[Path]:
    """Makes a CA, and with it the certificates of a server, an admin and a viewer.

    names: host names and addresses by which clients reach the server, beside SERVER_NAMES
    and this host's own.
    force: replace what is there. Clients of a CA that is replaced must get new certificates.
    Returns the paths of the files made. Raises CertificateError.
    """
    authority = _make_authority()
    contents = {
        **_pair_of_files("ca", authority),
        **_pair_of_files("server", _make_server_pair(authority, names)),
        **_pair_of_files("client", _make_client_pair(authority, "admin", "admin")),
        **_pair_of_files("viewer", _make_client_pair(authority, "viewer", "viewer")),
    }
    return _write_all(folder, contents, force=force)


def make_server(folder: Path, names: Iterable[str] = ()) -> list[Path]:
    """Makes the server's certificate and key anew, with the CA in the folder; a server that runs
    takes them as they are replaced, and its clients need nothing new.

    names: as of `make_all`; none: those of the certificate that is there.
    Returns the paths of the files made. Raises CertificateError.
    """
    authority = _read_authority(folder)
    names = list(names)
    if not names and (folder / SERVER_CERT).exists():
        names.extend(_alternative_names_of(_read_certificates(folder / SERVER_CERT)[0]))
    contents = _pair_of_files("server", _make_server_pair(authority, names))
    # The key first: it is the certificate's time that a server and its clients look at.
    return _write_all(folder, dict(reversed(contents.items())), force=True)


def make_client(folder: Path, name: str, role: str, *, force: bool = False) -> list[Path]:
    """Makes NAME-cert.pem and NAME-key.pem, of a client with this role, with the CA in the
    folder.

    name: the client's CN, and the first part of the file names.
    role: the client's OU.
    force: replace what is there.
    Returns the paths of the files made. Raises CertificateError.
    """
    # `ca` and `server` would, with force, replace what all the others depend on.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name) or name in {"ca", "server"}:
        raise CertificateError(
            repr(name),
            "cannot be the name of a client",
            "use up to 64 letters, digits, and . _ @ -, and neither 'ca' nor 'server'",
        )
    authority = _read_authority(folder)
    if not force:
        _check_name_is_free(folder, name)
    client = _make_client_pair(authority, name, role)
    return _write_all(folder, _pair_of_files(name, client), force=force)


def _read_authority(folder: Path) -> _Pair:
    certificate = _read_certificates(folder / CA_CERT)[0]
    key = _read_key(folder / CA_KEY, IF_CA_KEY_IS_MISSING)
    _check_key(folder / CA_KEY, key, folder / CA_CERT, certificate)
    return _Pair(certificate, key)


def _check_name_is_free(folder: Path, name: str) -> None:
    """Of two clients with one CN each would have the other's jobs."""
    for path in sorted(folder.glob("*-cert.pem")):
        try:
            taken, _ = _subject_fields(path, _read_certificates(path)[0])
        except CertificateError:
            continue
        if taken == name and path.name != f"{name}-cert.pem":
            raise CertificateError(
                path, f"has the name {name!r} already", "give another one, or use --force"
            )


# Looking at certificates


def subject_of(pem: bytes) -> tuple[str, tuple[str, ...], str]:
    """The subject's one CN, "" where there is none or more than one, all its OUs, and the serial
    in hexadecimal as openssl shows it, of the first certificate.

    From the parsed certificate and never from a subject in one line of text, in which
    `CN=x\\,OU=admin` looks like a role. Raises CertificateError.
    """
    about = "the client's certificate"
    certificate = _parse_certificates(about, pem)[0]
    return (*_subject_fields(about, certificate), _serial_of(certificate))


@dataclass(frozen=True, slots=True)
class Validity:
    """Which certificate it is, and until when it holds."""

    serial: int
    issuer: str  # its name, as `_plain` has it
    expires: float  # seconds since the epoch


def validity_of(pem: bytes) -> Validity:
    """Of the first certificate. Raises CertificateError."""
    certificate = _parse_certificates("the client's certificate", pem)[0]
    return Validity(
        certificate.serial_number,
        _plain(certificate.issuer),
        certificate.not_valid_after_utc.timestamp(),
    )


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
    certificate = _read_certificates(path)[0]
    name, units = _subject_fields(path, certificate)
    return Description(
        name=name,
        units=units,
        alternative_names=_alternative_names_of(certificate),
        is_authority=_is_authority(certificate),
        expires=certificate.not_valid_after_utc,
        warnings=(*_warnings(path, certificate, units), *_misfits(path)),
    )


def check_server_files(folder: Path) -> None:
    """Makes sure that a server can start with the certificates in `folder`.

    Raises CertificateError where one is missing, unreadable, no PEM, expired, not valid yet,
    or not signed by the CA, and where the key is not the certificate's.
    """
    authorities = _read_certificates(folder / CA_CERT)
    chain = _read_certificates(folder / SERVER_CERT)
    key = _read_key(folder / SERVER_KEY)
    _check_key(folder / SERVER_KEY, key, folder / SERVER_CERT, chain[0])
    for authority in authorities:
        _check_validity(folder / CA_CERT, authority)
    for certificate in chain:
        _check_validity(folder / SERVER_CERT, certificate)
    _check_chain(folder, chain, authorities)


def end_of_server(folder: Path) -> datetime:
    """When the first of the certificates that a server shows ends. Raises CertificateError."""
    return min(each.not_valid_after_utc for each in _read_certificates(folder / SERVER_CERT))


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
    authorities = _read_certificates(ca_path)
    chain = _read_certificates(cert_path)
    _check_key(key_path, _read_key(key_path), cert_path, chain[0])
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


# Revocation


@dataclass(frozen=True, slots=True)
class Revoked:
    """The certificates that hold no longer."""

    serials: frozenset[int] = frozenset()  # whoever has issued them
    by_issuer: frozenset[tuple[str, int]] = frozenset()  # the issuer's name, as `_plain` has it
    warnings: tuple[str, ...] = ()  # a sentence each

    def has(self, issuer: str, serial: int) -> bool:
        return serial in self.serials or (issuer, serial) in self.by_issuer

    def __or__(self, newer: Revoked) -> Revoked:
        return Revoked(
            self.serials | newer.serials, self.by_issuer | newer.by_issuer, newer.warnings
        )


NOBODY_REVOKED = Revoked()
LIST_BEGIN = b"-----BEGIN X509 CRL-----"
LIST = re.compile(LIST_BEGIN + b".*?-----END X509 CRL-----", re.DOTALL)
SERIAL = re.compile(r"-?[0-9a-f]+")  # as `_serial_text` has it
# With something behind it that is no comment.
ALMOST_SERIAL = re.compile(r"serial=.*|(0x)?-?(?=[a-f:]*[0-9])[0-9a-f:]{2,}[\s;,].*", re.IGNORECASE)
# With what the text of `openssl crl -text` and `certtool --crl-info` begins, and goes on beside
# what is indented there: numbers of other kinds.
LIST_TEXT = re.compile(
    r"(X\.509 )?Certificate Revocation List (\(CRL\)|Information):", re.IGNORECASE
)
MORE_LIST_TEXT = re.compile(r"(\s.*)?|(No )?Revoked Certificates.*", re.IGNORECASE)


def read_revoked(path: Path, ca_path: Path) -> Revoked:
    """The revoked certificates that a file names: serial numbers in hexadecimal, one a line,
    as `openssl x509 -serial` shows them, with comments from # on; or lists of CAs (CRL), in PEM,
    with such lines around them, or DER.

    Raises CertificateError where it is none of these, and where a list is not signed by a CA
    in `ca_path`. A list that has expired still counts, with a warning.
    """
    content = _read(path, "name the file there is in JOB_WORKER_REVOKED, or make an empty one")
    if LIST_BEGIN in content:
        parts = [LIST_BEGIN + part for part in content.split(LIST_BEGIN)[1:]]
        by_lists = _revoked_by_lists(path, [_parse_list(path, part) for part in parts], ca_path)
        serials, warnings = _serials_around_lists(path, content)
        return replace(by_lists, serials=serials, warnings=(*by_lists.warnings, *warnings))
    if content.startswith(b"\x30"):  # a sequence in DER, or a line that begins with the digit 0
        lists = []
        with suppress(ValueError):
            lists = [x509.load_der_x509_crl(content)]
        if lists:
            return _revoked_by_lists(path, lists, ca_path)
    return Revoked(serials=frozenset(_serials(path, content)))


def revoke(path: Path, certificate_path: Path) -> str:
    """Appends the certificate's serial number to a file of them, with a comment that says whose
    it is; returns it, in hexadecimal. Raises CertificateError, also where the file cannot be
    used, which is then left as it was."""
    certificate = _parse_certificates(
        certificate_path, _read_pem(certificate_path, "give the path of a client's certificate")
    )[0]
    name, _ = _subject_fields(certificate_path, certificate)
    if _is_authority(certificate):
        raise CertificateError(
            certificate_path,
            "is a CA's, and a list of clients' certificates does not end what it has signed",
            f"take it out of the server's {CA_CERT}, or revoke each of its clients'",
        )
    if not _may_be_a_client(certificate):
        raise CertificateError(
            certificate_path,
            "is no client's",
            "clients do not look at this list; give the server another: `jobworker certs server`",
        )
    before = _read(path) if path.exists() else b""
    if b"-----BEGIN" in before or b"\0" in before:
        raise CertificateError(
            path, "is a CA's own list", "have the CA revoke it there, or use another file"
        )
    set(_serials(path, before))  # raises where a line is none: then nothing is written
    end = b"" if not before or before.endswith(b"\n") else b"\n"
    comment = "".join(each if each.isprintable() else "?" for each in name)
    line = f"{_serial_of(certificate)}  # {comment}, {datetime.now(UTC):%Y-%m-%d}\n"
    try:
        with path.open("ab") as file:
            # One write: a server that looks just now sees all of it or none.
            file.write(end + line.encode())
    except OSError as error:
        raise CertificateError(
            path, f"cannot be written: {error.strerror}", "give a file that this user can write"
        ) from error
    # As a server will read it, with what others have written there.
    if certificate.serial_number not in set(_serials(path, _read(path))):
        raise CertificateError(
            path, f"does not have {_serial_of(certificate)}", "look who else writes to it"
        )
    return _serial_of(certificate)


def _serials(path: Path, content: bytes) -> Iterable[int]:
    for number, line in enumerate(_lines(content), 1):
        text = _serial_text(line)
        if not text:
            continue
        if not SERIAL.fullmatch(text):
            raise CertificateError(
                path,
                f"has in line {number} {line.strip()[:80]!r}, which is no serial number",
                "write one in hexadecimal a line, as `openssl x509 -serial` shows it",
            )
        yield int(text, 16)


def _serials_around_lists(path: Path, content: bytes) -> tuple[frozenset[int], list[str]]:
    """And warnings. Other text there is for people (RFC 7468)."""
    serials: set[int] = set()
    warnings = []
    for around in LIST.split(content):
        is_of_list = False
        for line in _lines(around):
            text = _serial_text(line)
            goes_on = is_of_list and MORE_LIST_TEXT.fullmatch(line)
            is_of_list = bool(goes_on or LIST_TEXT.match(line))
            if is_of_list or not text:
                continue
            if SERIAL.fullmatch(text):
                serials.add(int(text, 16))
            elif ALMOST_SERIAL.fullmatch(line.strip()):
                warnings.append(
                    f"{path} has {line.strip()[:80]!r} beside a CRL, which is not taken for a "
                    "serial number: write what belongs to it behind a #"
                )
    return frozenset(serials), warnings


def _lines(content: bytes) -> list[str]:
    """Without the mark that editors put before the first, which files put together have inside."""
    lines = content.decode(errors="replace").splitlines()
    return [line.removeprefix("\ufeff") for line in lines]


def _serial_text(line: str) -> str:
    text = line.partition("#")[0].strip().replace(":", "").lower()
    return text.removeprefix("serial=").strip().removeprefix("0x")


def _parse_list(path: Path, pem: bytes) -> x509.CertificateRevocationList:
    with _broken_where_it_does_not_parse(path):
        return x509.load_pem_x509_crl(pem)


@contextmanager
def _broken_where_it_does_not_parse(path: Path) -> Iterator[None]:
    """The library parses much of a list only once it is asked for it."""
    try:
        yield
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateError(path, "has a broken CRL", "have the CA make it again") from error


def _revoked_by_lists(
    path: Path, lists: Sequence[x509.CertificateRevocationList], ca_path: Path
) -> Revoked:
    authorities = _read_certificates(ca_path)
    revoked: set[tuple[str, int]] = set()
    warnings: list[str] = []
    for each in lists:
        with _broken_where_it_does_not_parse(path):
            _check_list(path, each, authorities)
            issuer = _plain(each.issuer)
            revoked.update((issuer, entry.serial_number) for entry in each)
            warnings.extend(f"{path} {what}" for what in _missing_in(each))
            if each.next_update_utc and each.next_update_utc < datetime.now(UTC):
                warnings.append(
                    f"{path} should have been renewed on {each.next_update_utc:%Y-%m-%d %H:%M} "
                    "UTC: certificates that were revoked since then are accepted"
                )
    return Revoked(by_issuer=frozenset(revoked), warnings=tuple(warnings))


def _missing_in(crl: x509.CertificateRevocationList) -> Iterable[str]:
    """Why it may not have all that the CA has revoked."""
    for extension in crl.extensions:
        value = extension.value
        if isinstance(value, x509.IssuingDistributionPoint):
            parts = {
                "CAs": value.only_contains_ca_certs,
                "attribute certificates": value.only_contains_attribute_certs,
                "some reasons": value.only_some_reasons,
            }
            for part in (part for part, is_only in parts.items() if is_only):
                yield f"has a CRL of {part} only: whoever else the CA has revoked is accepted"
        elif extension.critical and isinstance(value, x509.UnrecognizedExtension):
            yield (
                f"has a CRL with the critical extension {extension.oid.dotted_string}, which is "
                "not known: whoever the CA has revoked elsewhere is accepted"
            )


def _plain(name: x509.Name) -> str:
    """The same for all that TLS takes for the same name (RFC 5280, 7.1): whatever kind of string
    its parts are, in any case, with any number of spaces."""
    return repr(
        [
            sorted((each.oid.dotted_string, str(each.value).lower().split()) for each in part)
            for part in name.rdns
        ]
    )


def _check_list(
    path: Path,
    crl: x509.CertificateRevocationList,
    authorities: Iterable[x509.Certificate],
) -> None:
    for extension in crl.extensions:
        if isinstance(extension.value, x509.DeltaCRLIndicator) or (
            isinstance(extension.value, x509.IssuingDistributionPoint)
            and extension.value.indirect_crl
        ):
            raise CertificateError(
                path, "is a delta or an indirect CRL", "use a complete one of the CA itself"
            )
    if not any(_has_signed(authority, crl) for authority in authorities):
        raise CertificateError(
            path,
            f"has a CRL that no CA in {CA_CERT} has signed",
            "use one of the CA that signs the clients' certificates",
        )


def _has_signed(authority: x509.Certificate, crl: x509.CertificateRevocationList) -> bool:
    key = authority.public_key()
    if _plain(authority.subject) != _plain(crl.issuer) or not isinstance(key, CrlKey):
        return False
    try:
        return crl.is_signature_valid(key)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


# Making


class _Pair(NamedTuple):
    certificate: x509.Certificate
    key: SigningKey


def _make_authority() -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("jobworker CA", None)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        _builder(name, name, key, CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
    )
    return _Pair(builder.sign(key, hashes.SHA256()), key)


def _make_server_pair(authority: _Pair, names: Iterable[str]) -> _Pair:
    return _make_leaf(
        authority,
        _subject("job-worker", "server"),
        ExtendedKeyUsageOID.SERVER_AUTH,
        _alternative_names([*SERVER_NAMES, socket.gethostname(), *names]),
    )


def _make_client_pair(authority: _Pair, name: str, role: str) -> _Pair:
    return _make_leaf(authority, _subject(name, role), ExtendedKeyUsageOID.CLIENT_AUTH, [])


def _make_leaf(
    authority: _Pair,
    subject: x509.Name,
    purpose: x509.ObjectIdentifier,
    alternative_names: Sequence[x509.GeneralName],
) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(subject, authority.certificate.subject, key, LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_authority_identifier(authority), critical=False)
    )
    if alternative_names:
        names = x509.SubjectAlternativeName(alternative_names)
        builder = builder.add_extension(names, critical=False)
    return _Pair(builder.sign(authority.key, _signature_hash(authority.key)), key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - BACKDATED,
        not_valid_after=now + lifetime,
    )


def _subject(name: str, unit: str | None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "JobWorker")]
    if unit is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
    return x509.Name(attributes)


def _alternative_names(names: Iterable[str]) -> list[x509.GeneralName]:
    return [_alternative_name(name) for name in dict.fromkeys(names)]


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    # Labels may have an underscore, as hosts' names do; the first may be a wildcard.
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", name):
        raise CertificateError(
            repr(name), "is neither a host name nor an address", "leave out scheme and port"
        )
    return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(authority: _Pair) -> x509.AuthorityKeyIdentifier:
    identifier = _extension(authority.certificate, x509.SubjectKeyIdentifier)
    if identifier is None:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _signature_hash(key: SigningKey) -> hashes.SHA256 | None:
    """Edwards curves bring their own."""
    if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
        return None
    return hashes.SHA256()


# Writing


def _pair_of_files(stem: str, pair: _Pair) -> dict[str, bytes]:
    """The contents of STEM-cert.pem and STEM-key.pem."""
    return {
        f"{stem}-cert.pem": pair.certificate.public_bytes(serialization.Encoding.PEM),
        f"{stem}-key.pem": pair.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    }


def _write_all(folder: Path, contents: Mapping[str, bytes], *, force: bool) -> list[Path]:
    """Writes each file whole or not at all, and without force replaces none."""
    existing = [name for name in contents if os.path.lexists(folder / name)]
    if existing and not force:
        raise CertificateError(
            folder,
            f"already has {', '.join(existing)}",
            "nothing was changed; use --force to replace them"
            + (NEW_CA if CA_CERT in existing else ""),
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_and_publish(folder, contents, force=force)
    except OSError as error:
        raise CertificateError(
            error.filename2 or error.filename or folder,
            f"cannot be written: {error.strerror}",
            "give a folder that this user can write",
        ) from error
    return [folder / name for name in contents]


def _write_and_publish(folder: Path, contents: Mapping[str, bytes], *, force: bool) -> None:
    with ExitStack() as cleanup:
        written = {}
        for name, content in contents.items():
            temporary = folder / f".{name}.{secrets.token_hex(4)}"
            cleanup.callback(temporary.unlink, missing_ok=True)
            _write_new(temporary, content, 0o600 if name.endswith("-key.pem") else 0o644)
            written[folder / name] = temporary
        # All are complete on disk: what fails from here on leaves no half of a file.
        for path, temporary in written.items():
            if force:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # unlike a rename, fails if there is one by now


def _write_new(path: Path, content: bytes, mode: int) -> None:
    # A key is 0600 from its first moment on.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# Reading


def _read_certificates(path: Path) -> list[x509.Certificate]:
    """At least one, in the order of the file."""
    return _parse_certificates(path, _read_pem(path))


def _parse_certificates(about: Path | str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError(
            about, "is not a certificate in PEM form", "convert it: openssl x509 -outform pem"
        ) from error


def _read_key(path: Path, if_missing: str = IF_MISSING) -> SigningKey:
    try:
        key = serialization.load_pem_private_key(_read_pem(path, if_missing), password=None)
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


def _read_pem(path: Path, if_missing: str = IF_MISSING) -> bytes:
    """As far as gRPC reads."""
    return _read(path, if_missing).partition(b"\0")[0]


def _read(path: Path, if_missing: str = IF_MISSING) -> bytes:
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


# Checking


def _check_key(
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
    if _is_authority(certificate):
        return "`jobworker certs init --force`, with a new CA and all that it signs"
    if path.name == SERVER_CERT:
        return "`jobworker certs server`"
    name, units = _subject_fields(path, certificate)
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


def _subject_fields(about: object, certificate: x509.Certificate) -> tuple[str, tuple[str, ...]]:
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


def _serial_of(certificate: x509.Certificate) -> str:
    """By whole bytes; a CA may have chosen a negative one."""
    digits = f"{abs(certificate.serial_number):X}"
    sign = "-" if certificate.serial_number < 0 else ""
    return sign + digits.zfill(len(digits) + len(digits) % 2)


def _alternative_names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        return ()
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def _is_authority(certificate: x509.Certificate) -> bool:
    constraints = _extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def _may_be_a_client(certificate: x509.Certificate) -> bool:
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    return not _is_authority(certificate) and (
        purposes is None or ExtendedKeyUsageOID.CLIENT_AUTH in purposes
    )


def _extension(certificate: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):  # not there, or not well-formed
        return None


def _in_days(days: int) -> str:
    if not days:
        return "within a day"
    return "in 1 day" if days == 1 else f"in {days} days"


def _warnings(path: Path, certificate: x509.Certificate, units: Sequence[str]) -> Iterable[str]:
    problem = _validity_problem(certificate)
    if problem:
        yield f"It {problem}."
    elif (left := certificate.not_valid_after_utc - datetime.now(UTC)) < NOTICE:
        yield f"It expires {_in_days(left.days)}."
    if _may_be_a_client(certificate) and len(units) != 1:
        yield f"It has {len(units) or 'no'} OU: a client needs exactly one, its role."
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < SMALLEST_RSA_BITS:
        yield f"Its RSA key has {key.key_size} bits only, use {SMALLEST_RSA_BITS} or more."
    key_path = path.with_name(path.name.replace("-cert.pem", "-key.pem"))
    if key_path != path and key_path.exists() and key_path.stat().st_mode & 0o077:
        yield f"Its key may be read by others: chmod 600 {key_path}"


def _misfits(path: Path) -> Iterable[str]:
    """What beside it does not belong to it, so far as that can be read."""
    chain = _read_certificates(path)
    with suppress(CertificateError):
        authorities = _read_certificates(path.with_name(CA_CERT))
        if not _is_authority(chain[0]) and not _is_issued_by(chain[-1], authorities):
            yield f"It is not signed by the {CA_CERT} beside it."
    key_path = path.with_name(path.name.replace("-cert.pem", "-key.pem"))
    if key_path == path:
        return
    with suppress(CertificateError):
        if _read_key(key_path).public_key() != chain[0].public_key():
            yield f"{key_path.name} is not its key."
