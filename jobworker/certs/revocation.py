"""Which certificates hold no longer: lists of serial numbers, and those of CAs (CRL)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from jobworker.certs.reading import (
    CA_CERT,
    is_authority,
    may_be_a_client,
    parse_certificates,
    plain_name,
    read_certificates,
    read_file,
    read_pem,
    serial_of,
    subject_fields,
)
from jobworker.errors import CertificateError

CrlKey = (
    ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey | rsa.RSAPublicKey
)

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


@dataclass(frozen=True, slots=True)
class Revoked:
    """The certificates that hold no longer."""

    serials: frozenset[int] = frozenset()  # whoever has issued them
    by_issuer: frozenset[tuple[str, int]] = frozenset()  # the issuer's name, as `plain_name` has it
    warnings: tuple[str, ...] = ()  # a sentence each

    def has(self, issuer: str, serial: int) -> bool:
        return serial in self.serials or (issuer, serial) in self.by_issuer

    def __or__(self, newer: Revoked) -> Revoked:
        return Revoked(
            self.serials | newer.serials, self.by_issuer | newer.by_issuer, newer.warnings
        )


NOBODY_REVOKED = Revoked()


def read_revoked(path: Path, ca_path: Path) -> Revoked:
    """The revoked certificates that a file names: serial numbers in hexadecimal, one a line,
    as `openssl x509 -serial` shows them, with comments from # on; or lists of CAs (CRL), in PEM,
    with such lines around them, or DER.

    Raises CertificateError where it is none of these, and where a list is not signed by a CA
    in `ca_path`. A list that has expired still counts, with a warning.
    """
    content = read_file(path, "name the file there is in JOB_WORKER_REVOKED, or make an empty one")
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
    certificate = parse_certificates(
        certificate_path, read_pem(certificate_path, "give the path of a client's certificate")
    )[0]
    name, _ = subject_fields(certificate_path, certificate)
    if is_authority(certificate):
        raise CertificateError(
            certificate_path,
            "is a CA's, and a list of clients' certificates does not end what it has signed",
            f"take it out of the server's {CA_CERT}, or revoke each of its clients'",
        )
    if not may_be_a_client(certificate):
        raise CertificateError(
            certificate_path,
            "is no client's",
            "clients do not look at this list; give the server another: `jobworker certs server`",
        )
    before = read_file(path) if path.exists() else b""
    if b"-----BEGIN" in before or b"\0" in before:
        raise CertificateError(
            path, "is a CA's own list", "have the CA revoke it there, or use another file"
        )
    set(_serials(path, before))  # raises where a line is none: then nothing is written
    end = b"" if not before or before.endswith(b"\n") else b"\n"
    comment = "".join(each if each.isprintable() else "?" for each in name)
    line = f"{serial_of(certificate)}  # {comment}, {datetime.now(UTC):%Y-%m-%d}\n"
    try:
        with path.open("ab") as file:
            # One write: a server that looks just now sees all of it or none.
            file.write(end + line.encode())
    except OSError as error:
        raise CertificateError(
            path, f"cannot be written: {error.strerror}", "give a file that this user can write"
        ) from error
    # As a server will read it, with what others have written there.
    if certificate.serial_number not in set(_serials(path, read_file(path))):
        raise CertificateError(
            path, f"does not have {serial_of(certificate)}", "look who else writes to it"
        )
    return serial_of(certificate)


# Serial numbers


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


# Lists of CAs


def _revoked_by_lists(
    path: Path, lists: Sequence[x509.CertificateRevocationList], ca_path: Path
) -> Revoked:
    authorities = read_certificates(ca_path)
    revoked: set[tuple[str, int]] = set()
    warnings: list[str] = []
    for each in lists:
        with _broken_where_it_does_not_parse(path):
            _check_list(path, each, authorities)
            issuer = plain_name(each.issuer)
            revoked.update((issuer, entry.serial_number) for entry in each)
            warnings.extend(f"{path} {what}" for what in _missing_in(each))
            if each.next_update_utc and each.next_update_utc < datetime.now(UTC):
                warnings.append(
                    f"{path} should have been renewed on {each.next_update_utc:%Y-%m-%d %H:%M} "
                    "UTC: certificates that were revoked since then are accepted"
                )
    return Revoked(by_issuer=frozenset(revoked), warnings=tuple(warnings))


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
    if plain_name(authority.subject) != plain_name(crl.issuer) or not isinstance(key, CrlKey):
        return False
    try:
        return crl.is_signature_valid(key)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


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
