"""Why there is no connection: in most cases gRPC says only that there is none, so the
certificates and the port are looked at once more. Loaded only then."""

from __future__ import annotations

import re
import socket
import ssl

from jobworker import certs
from jobworker.client.connection import OTHER_NAME, Files
from jobworker.errors import CertificateError

PROBE_SECONDS = 3.0

# What gRPC's core says, and what that means. The first that fits.
MEANINGS = {
    r"Connection refused": "nobody listens there; start the server, or check address and port",
    r"errors resolving|DNS resolution failed": (
        "the host's name is not known; check the address, which is HOST:PORT"
    ),
    r"WRONG_VERSION_NUMBER": "what listens there does not speak TLS; check address and port",
    r"HANDSHAKE_FAILURE|PROTOCOL_VERSION|UNSUPPORTED_PROTOCOL": (
        "no TLS version in common; the server probably speaks only TLS 1.2 or older, and "
        "TLS 1.3 is needed"
    ),
    r"certificate has expired": (
        "the server's certificate has expired; make a new one (or check this machine's clock)"
    ),
    r"not yet valid": "the server's certificate is not valid yet; check this machine's clock",
    r"CERTIFICATE_VERIFY_FAILED": (
        "the server's certificate is not signed by the CA in {files.ca}; use that server's CA"
    ),
    r"timed out|[Tt]imeout|FD shutdown": "no answer; check the address, and firewalls on the way",
    r"[Nn]o route|[Uu]nreachable": "no way leads there; check the address and the network",
}


def explain(details: str, address: str, files: Files, names: tuple[str, ...]) -> str:
    """What is probably wrong, and what to do.

    details: what gRPC says.
    names: those for which the server's certificate might have been valid.
    """
    if OTHER_NAME in details:
        tried = " nor ".join(map(repr, names))
        return (
            f"the server's certificate is not for {tried}; give the name that is in it as "
            "the server name"
        )
    for pattern, meaning in MEANINGS.items():
        if re.search(pattern, details):
            return meaning.format(files=files)
    try:
        certs.check_client_files(files.ca, files.cert, files.key)
    except CertificateError as error:
        return f"no TLS connection, probably as {error}"
    return _explain_hang_up(details, address, files)


def _explain_hang_up(details: str, address: str, files: Files) -> str:
    """A gRPC server that does not want a certificate closes without a word."""
    try:
        _shake_hands(address, files)
    except ssl.SSLCertVerificationError as error:
        return f"the server's certificate is not accepted: {error.verify_message}"
    except OSError as error:
        return f"what listens there hangs up at once, and is probably no job server ({error})"
    except ValueError:
        return details
    return (
        f"the server hung up when it saw {files.cert}, which is probably of a CA that it does "
        "not know, or expired by its clock"
    )


def _shake_hands(address: str, files: Files) -> None:
    """With TLS 1.3 the server's word on the client's certificate comes after it."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.cert, files.key)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS) as plain,
        context.wrap_socket(plain),
    ):
        pass
