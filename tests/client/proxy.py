"""A TCP proxy between a client and a server, that breaks connections."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

# Close sends a reset, and what is under way is lost.
RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on a free port of the loopback interface, as long as the context."""

    def __init__(self, server_port: int, budget: Callable[[], int] = lambda: 1 << 60) -> None:
        """budget: for each connection, how many bytes of the server's it lets through before
        it breaks."""
        self.broken = 0
        self._server_port = server_port
        self._budget = budget
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self.break_all()
        for thread in self._threads:
            thread.join(timeout=10)
        self._listening.close()

    def break_all(self) -> None:
        """Resets all connections; new ones can be made."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._carry, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _carry(self, client: socket.socket) -> None:
        target = ("127.0.0.1", self._server_port)
        with contextlib.suppress(OSError), client, socket.create_connection(target) as server:
            self._open.add(client)
            try:
                self._exchange(client, server)
            finally:
                self._open.discard(client)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _exchange(self, client: socket.socket, server: socket.socket) -> None:
        left = self._budget()
        other = {client: server, server: client}
        with selectors.DefaultSelector() as selector:
            for side in other:
                selector.register(side, selectors.EVENT_READ, side)
            while left > 0:
                for key, _ in selector.select():
                    source: socket.socket = key.data
                    data = source.recv(16384 if source is client else min(16384, max(1, left)))
                    if not data:
                        return
                    other[source].sendall(data)
                    left -= len(data) if source is server else 0
        self.broken += 1
