"""The server's connections, as the kernel knows them: counted, and shut where that is needed.

gRPC bounds how many there are, and tells neither whose they are nor how to end one. But they
are this process's sockets: one that is shut down is closed by gRPC as if the client had gone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

# From this share of the most on, who has the most connections loses those without a call.
CROWDED_SHARE = 0.75


def address_of(peer: str) -> str:
    """`10.0.0.1:4242`, `[::1]:4242`, or with the number of the link `[fe80::1%2]:4242`, of what
    gRPC calls `ipv4:…` or `ipv6:…`."""
    return unquote(peer.partition(":")[2]) or peer


class Connection(NamedTuple):
    """One of ours, as long as it is looked at."""

    age: int  # the smaller, the older
    address: str  # the client's
    socket: socket.socket


def shut(port: int, addresses: set[str]) -> int:
    """Ends the connections of these addresses with our port; returns how many there were."""
    count = 0
    for connection in _connections(port):
        if connection.address in addresses:
            count += 1
            with contextlib.suppress(OSError):  # it has ended
                connection.socket.shutdown(socket.SHUT_RDWR)
    return count


def make_room(port: int, most: int, busy: set[str], seen: set[str]) -> tuple[set[str], int]:
    """Where it is crowded, ends connections of those hosts that have most, until it is not: old
    ones first, and none with a call (busy), nor any that came since the last time (of those
    seen then), so that who comes gets to its first call.

    Returns the addresses of all, and how many of them were ended.
    """
    found = sorted((each.age, each.address) for each in _connections(port))
    surplus = len(found) - int(most * CROWDED_SHARE)
    addresses = {address for _, address in found}
    counts = Counter(_host(address) for _, address in found)
    idle: dict[str, list[str]] = {}
    for _, address in reversed(found):
        if address in seen and address not in busy:
            idle.setdefault(_host(address), []).append(address)
    ending: set[str] = set()
    while idle and len(ending) < surplus:
        host = max(idle, key=lambda each: counts[each])
        ending.add(idle[host].pop())
        counts[host] -= 1
        if not idle[host]:
            del idle[host]
    return addresses, shut(port, ending) if ending else 0


def _host(address: str) -> str:
    """Whose an address is; with IPv6 a host has a whole network of 64 bits."""
    host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]").partition("%")[0])
    if isinstance(host, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((host, 64), strict=False))
    return str(host)


def _connections(port: int) -> Iterator[Connection]:
    """Each is valid until the next: duplicates, as gRPC may close its own at any time."""
    for name in os.listdir("/proc/self/fd"):
        try:
            kind, _, inode = os.readlink(f"/proc/self/fd/{name}").partition(":")
            if kind != "socket":
                continue
            ours = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile, or no descriptor left
            continue
        with ours, contextlib.suppress(OSError):  # not connected
            if ours.family not in {socket.AF_INET, socket.AF_INET6}:
                continue
            if ours.getsockname()[1] == port:
                # The kernel counts inodes of sockets up.
                yield Connection(int(inode.strip("[]")), _format(ours.getpeername()), ours)


def _format(name: tuple[Any, ...]) -> str:
    """As address_of has it."""
    host, port, *more = name
    if "." in host:
        return f"{host.removeprefix('::ffff:')}:{port}"
    _, link = more
    return f"[{host}%{link}]:{port}" if link else f"[{host}]:{port}"
