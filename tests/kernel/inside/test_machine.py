"""The kernel is a machine on which a server can run."""

from __future__ import annotations

import errno
import platform
import socket
from multiprocessing import shared_memory
from pathlib import Path

import grpc
import pytest

from kernel.inside.conftest import ESCAPED, mounted


def test_this_is_user_mode_linux() -> None:
    assert "User Mode Linux" in Path("/proc/cpuinfo").read_text()
    assert platform.node() == "kernel"


def test_cgroup_v2_is_pure() -> None:
    assert Path("/proc/self/cgroup").read_text() == "0::/\n"


def test_what_is_written_stays_in_it() -> None:
    """The root is an overlay in memory. ../test_uml.py looks for this file outside."""
    mounts = Path("/proc/self/mountinfo").read_text()
    (root,) = (line for line in mounts.splitlines() if line.split()[4] == "/")
    assert " - overlay " in root
    ESCAPED.touch()


def test_the_machines_files_cannot_be_written_even_without_the_overlay() -> None:
    with mounted("none", Path("/mnt"), "-t", "hostfs", "-o", "rw"):
        for path in (ESCAPED, Path("/etc/x"), Path("/tmp/x"), Path("/dev/shm/x")):
            with pytest.raises(OSError) as caught:
                Path(f"/mnt{path}").open("a").close()
            assert caught.value.errno == errno.EROFS


def test_loopback_and_grpc() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5),
    ):
        pass
    assert grpc.__version__


def test_shared_memory() -> None:
    memory = shared_memory.SharedMemory(create=True, size=4096)
    memory.close()
    memory.unlink()
