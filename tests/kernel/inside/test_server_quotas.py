"""Totals of limits, where limits can be enforced: what counts is what each job may use."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from functional.test_authorization import make_client
from jobworker.pb import job_worker_pb2 as pb
from kernel.inside.conftest import refusal, serving

CLIENTS = """
[cn.alice]
role = "user"
total_cpu = 250
total_memory = 300
"""


def test_totals(tmp_path: Path, certificates: Path) -> None:
    """Defaults count as what is asked for; so they do for the next server."""
    subject = [(x509.NameOID.COMMON_NAME, "alice")]
    make_client(certificates, "alice", subject)
    file = tmp_path / "clients.toml"
    file.write_text(CLIENTS)
    settings: dict[str, Any] = {"CLIENTS": str(file), "DEFAULT_CPU": "100", "DEFAULT_MEMORY": "100"}
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    with serving(tmp_path, certificates, STOP_JOBS="no", **settings) as server:
        with server.connect("alice") as alice:
            first = alice.create("sleep", "60").id
            alice.create("sleep", "60", maxCPU=50, maxMemory=150)
            code, says = refusal(alice, maxMemory=51)
            assert code is exhausted
            assert "the quota total_memory of 'alice' is 300 MiB: its running jobs take 250" in says
            code, says = refusal(alice, maxCPU=101, maxMemory=50)
            assert code is exhausted
            assert "the quota total_cpu of 'alice' is 250 %: its running jobs take 150" in says
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with serving(tmp_path, certificates, **settings) as server, server.connect("alice") as alice:
        used = alice.info().quota_used
        assert used == pb.Quota(running_jobs=2, total_cpu=150, total_memory=250)
        assert refusal(alice)[0] is exhausted
        alice.stop(first, grace_milliseconds=0)
        alice.create("sleep", "60")
        assert alice.info().quota_used == used
        assert refusal(alice, maxCPU=151)[0] is exhausted
