"""Connections: that gRPC and the kernel call a client's address the same."""

from __future__ import annotations

from typing import Any

import pytest

from jobworker.rpc import connections


@pytest.mark.parametrize(
    ("peer", "name", "host"),
    [
        ("ipv4:10.0.0.1:4242", ("10.0.0.1", 4242), "10.0.0.1"),
        ("ipv4:10.0.0.1:4242", ("::ffff:10.0.0.1", 4242, 0, 0), "10.0.0.1"),
        ("ipv6:%5B::1%5D:4242", ("::1", 4242, 0, 0), "::/64"),
        ("ipv6:%5Bfe80::77%251%5D:4242", ("fe80::77", 4242, 0, 1), "fe80::/64"),
    ],
)
def test_an_address_is_the_same_by_grpc_and_by_the_kernel(
    peer: str, name: tuple[Any, ...], host: str
) -> None:
    address = connections._format(name)
    assert connections.address_of(peer) == address
    assert connections._host(address) == host
