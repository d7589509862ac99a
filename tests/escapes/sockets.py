"""The server's port, jobinit's socket, the sockets of other daemons, and the network."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path

from escapes.attack import Missing, Scene, attack, foreign_processes

SECONDS = 5


def _connect(address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    with socket.socket(socket.AF_UNIX, kind) as ours:
        ours.settimeout(SECONDS)
        ours.connect(address)
    return f"connected to {address!r}"


@attack()
def connect_to_jobinit(scene: Scene) -> str:
    return _connect(scene["jobinit_socket"], socket.SOCK_SEQPACKET)


@attack(shown_as="user")
def connect_to_a_daemon_in_run(scene: Scene) -> str:
    """One that lets all in, as careless ones do; docker's is no different."""
    return _connect(scene["socket_in_run"])


@attack(shown_as="user")
def connect_to_a_daemon_in_tmp(scene: Scene) -> str:
    return _connect(scene["socket_in_tmp"])


@attack(shown_as="user")
def see_control_sockets(scene: Scene) -> str:
    names = [
        *("/run/docker.sock", "/run/containerd/containerd.sock", "/run/systemd/private"),
        *("/run/dbus/system_bus_socket", "/run/podman/podman.sock", "/run/crio/crio.sock"),
        *("/run/systemd/notify", "/run/systemd/journal/socket", "/run/snapd.socket"),
        scene["socket_in_run"],
    ]
    found = [name for name in names if Path(name).exists()]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "none of them")
    return f"sees {found}"


# With the machine's network go its abstract sockets: `default` shares both.


@attack(held_by=("strict",), shown_as="user")
def connect_to_an_abstract_socket(scene: Scene) -> str:
    return _connect(f"\0{scene['abstract_socket']}")


@attack(held_by=("strict",), shown_as="user")
def see_abstract_sockets(scene: Scene) -> str:
    if scene["abstract_socket"] not in Path("/proc/net/unix").read_text():
        raise FileNotFoundError(errno.ENOENT, "not in /proc/net/unix")
    return "sees its name"


@attack(shown_as="user")
def see_the_network_of_others(scene: Scene) -> str:
    """/proc/PID/net tells of the network that PID is in: who sees a process may read it all."""
    for pid in foreign_processes():
        if scene["abstract_socket"] in Path(f"/proc/{pid}/net/unix").read_text():
            return f"sees the machine's sockets through process {pid}"
    raise FileNotFoundError(errno.ENOENT, "no other process with a network is seen")


@attack(held_by=("strict",), shown_as="user")
def connect_to_the_loopback_interface(scene: Scene) -> str:
    socket.create_connection(("127.0.0.1", scene["tcp_port"]), SECONDS).close()
    return "connected"


@attack(held_by=("strict",), shown_as="user")
def see_interfaces(scene: Scene) -> str:
    """All but its own loopback, which an empty network has too."""
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if not others:
        if Path("/sys/class/net/lo/operstate").exists():
            raise Missing("the machine has no others")
        raise FileNotFoundError(errno.ENOENT, "no others")
    return f"sees {others}"


@attack(held_by=("none", "default", "strict"))
def call_the_server_without_a_certificate(scene: Scene) -> str:
    """Its answer to a client's first words would be its settings of HTTP/2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", scene["port"]), SECONDS) as connection,
        context.wrap_socket(connection) as secured,
    ):
        secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        answer = secured.recv(64)
    if not answer:
        raise ConnectionResetError(errno.ECONNRESET, "ended by the server")
    return f"was answered {answer!r}"


@attack(held_by=("none", "default", "strict"))
def call_the_server_in_the_clear(scene: Scene) -> str:
    with socket.create_connection(("127.0.0.1", scene["port"]), SECONDS) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        answer = connection.recv(64)
    if answer[3:4] != b"\x04":
        raise ConnectionResetError(errno.ECONNRESET, f"no settings of HTTP/2: {answer!r}")
    return f"was answered {answer!r}"


@attack(shown_as="user")
def share_memory_by_name(scene: Scene) -> str:
    """System V's, that another job has made for all."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    found = [line for line in lines if int(line.split()[0]) == scene["shm_key"]]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "not that of the other job")
    return "sees that of the other job"
