"""Certificates: making those of a server and its clients, checking what is in a folder, and which
hold no longer.

A folder of certificates holds PEM files with these names:

    ca-cert.pem, ca-key.pem            signs all others; the key is needed for nothing else
    server-cert.pem, server-key.pem    what the server shows
    client-cert.pem, client-key.pem    an admin, and what the command line uses by default
    NAME-cert.pem, NAME-key.pem        any other client

What a client may do is the OU of its subject; `jobworker.authorization` says what an OU means.
Certificates made elsewhere serve as well, with any kind of key, with or without alternative
names.
"""

from jobworker.certs.checking import (
    SERVER_NOTICE,
    Description,
    check_client_files,
    check_server_files,
    describe,
    end_of_server,
    notice_of_end,
)
from jobworker.certs.making import make_all, make_client, make_server
from jobworker.certs.reading import (
    CA_CERT,
    CA_KEY,
    CLIENT_CERT,
    CLIENT_KEY,
    SERVER_CERT,
    SERVER_KEY,
    Validity,
    subject_of,
    validity_of,
)
from jobworker.certs.revocation import NOBODY_REVOKED, Revoked, read_revoked, revoke

__all__ = [
    "CA_CERT",
    "CA_KEY",
    "CLIENT_CERT",
    "CLIENT_KEY",
    "NOBODY_REVOKED",
    "SERVER_CERT",
    "SERVER_KEY",
    "SERVER_NOTICE",
    "Description",
    "Revoked",
    "Validity",
    "check_client_files",
    "check_server_files",
    "describe",
    "end_of_server",
    "make_all",
    "make_client",
    "make_server",
    "notice_of_end",
    "read_revoked",
    "revoke",
    "subject_of",
    "validity_of",
]
