"""Making a CA, and with it the certificates of a server and its clients."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker.certs.checking import check_key
from jobworker.certs.reading import (
    CA_CERT,
    CA_KEY,
    SERVER_CERT,
    SigningKey,
    alternative_names_of,
    extension_of,
    read_certificates,
    read_key,
    subject_fields,
)
from jobworker.errors import CertificateError

# By which clients of this protocol have always called their server, wherever it runs.
SERVER_NAMES = ("job-worker", "localhost", "127.0.0.1", "::1")

CA_LIFETIME = timedelta(days=3650)
LIFETIME = timedelta(days=825)
# Clocks differ: a new certificate must not be "not valid yet" on the next machine.
BACKDATED = timedelta(hours=1)

IF_CA_KEY_IS_MISSING = (
    "do this where it is kept, or put it there for as long as this takes; without it only a new "
    "CA can sign, made by `jobworker certs init --force`"
)
NEW_CA = (
    ", the CA as well, after which every client needs a new certificate (`jobworker certs server` "
    "renews the server's alone, `jobworker certs client` makes a client's)"
)


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
        names.extend(alternative_names_of(read_certificates(folder / SERVER_CERT)[0]))
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
    certificate = read_certificates(folder / CA_CERT)[0]
    key = read_key(folder / CA_KEY, IF_CA_KEY_IS_MISSING)
    check_key(folder / CA_KEY, key, folder / CA_CERT, certificate)
    return _Pair(certificate, key)


def _check_name_is_free(folder: Path, name: str) -> None:
    """Of two clients with one CN each would have the other's jobs."""
    for path in sorted(folder.glob("*-cert.pem")):
        try:
            taken, _ = subject_fields(path, read_certificates(path)[0])
        except CertificateError:
            continue
        if taken == name and path.name != f"{name}-cert.pem":
            raise CertificateError(
                path, f"has the name {name!r} already", "give another one, or use --force"
            )


# Signing


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
    identifier = extension_of(authority.certificate, x509.SubjectKeyIdentifier)
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
