"""Who calls: the identity in the client's certificate, as TLS proved it."""

from __future__ import annotations

from typing import Any

import grpc

from jobworker.certs import subject_of
from jobworker.errors import CertificateError, PermissionDeniedError
from jobworker.roles import Identity


def certificate_of(context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """As PEM. Raises PermissionDeniedError where the connection has none."""
    pem: bytes | None = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    if pem is None:
        raise PermissionDeniedError("the connection has no client certificate")
    return pem


def identity_of(pem: bytes) -> Identity:
    """From the parsed certificate: in the subject as text, a CN of `x,OU=admin` would pass
    for a role (RFC 2253 escapes it, and a split on commas does not know). Raises
    PermissionDeniedError where it cannot be read."""
    try:
        return Identity(*subject_of(pem))
    except CertificateError as error:
        raise PermissionDeniedError(str(error)) from error
