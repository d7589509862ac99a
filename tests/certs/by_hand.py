"""Certificates as people make them with openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None,
    reason="NOT TESTED: certificates made by hand; install openssl",
)


def run_openssl(folder: Path, words: str, *arguments: str) -> str:
    """Runs openssl in the folder, with the words of one string and further arguments."""
    finished = subprocess.run(
        ["openssl", *words.split(), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def make_ca_by_hand(folder: Path, algorithm: str) -> None:
    run_openssl(
        folder,
        f"req -x509 -newkey {algorithm} -nodes -days 365 -subj /O=JobWorker/CN=CA "
        "-keyout ca-key.pem -out ca-cert.pem",
    )


def sign_by_hand(folder: Path, name: str, subject: str, bits: int = 2048) -> None:
    run_openssl(
        folder,
        f"req -new -newkey rsa:{bits} -nodes -keyout {name}-key.pem -out {name}.csr",
        *("-multivalue-rdn", "-subj", subject),
    )
    run_openssl(
        folder,
        "x509 -req -days 365 -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial "
        f"-in {name}.csr -out {name}-cert.pem",
    )
