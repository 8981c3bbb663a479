"""Connections at the public port: how many there may be, and how long and how large the head of a request.

Whoever shows a valid signature is counted with its key, others with their address: many sites may sit behind one.
"""

import asyncio
import resource
import socket
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .quiet import Refusals

MOST = 1024  # in all
MOST_OF_ADDRESS = 64  # that have not shown a signature
MOST_OF_ADDRESS_WITHOUT_KEYS = 256
MOST_OF_KEY = 24  # a SuperNode needs about four
HEAD_BYTES = 2**13
HEAD_SECONDS = 20.0  # in which the next head of a request is begun and whole; twice as long at most
AT_ONCE = 64  # refused before other work goes on
FILES = 8192

Peer = tuple[str, int]


class Limits:
    """Who is connected, and whether one more may be."""

    def __init__(self, has_keys: bool, refusals: Refusals) -> None:
        self._has_keys, self._refusals = has_keys, refusals
        self._open: dict[Peer, socket.socket] = {}  # the one that came first at the beginning
        self._signed: dict[Peer, int] = {}  # the node, of those that have shown a signature

    def admit(self, connection: socket.socket, peer: Peer) -> bool:
        """Whether a new connection may stay; where there is no room at all, the oldest without a signature makes it."""
        most = MOST_OF_ADDRESS if self._has_keys else MOST_OF_ADDRESS_WITHOUT_KEYS
        if len(self._open) >= min(most, MOST):
            self._forget_closed()
            unsigned = [other for other in self._open if other not in self._signed]
            if sum(other[0] == peer[0] for other in unsigned) >= most or (
                len(self._open) >= MOST and not (self._has_keys and unsigned)
            ):
                self._refusals.count("connection too many")
                return False
            if len(self._open) >= MOST:
                self._refusals.count("connection ended for a newer one")
                end(self._open.pop(unsigned[0]))
        self._open.pop(peer, None)
        self._signed.pop(peer, None)
        self._open[peer] = connection
        return True

    def sign(self, peer: Peer, node: int) -> bool:
        """Count a connection with a node from now on; returns False where the node has too many."""
        if self._signed.get(peer) == node:
            return True
        if self._of(node) >= MOST_OF_KEY:
            self._forget_closed()
            if self._of(node) >= MOST_OF_KEY:
                return False
        if peer in self._open:
            self._signed[peer] = node
        return True

    def _of(self, node: int) -> int:
        return sum(other == node for other in self._signed.values())

    def _forget_closed(self) -> None:
        self._open = {peer: connection for peer, connection in self._open.items() if connection.fileno() >= 0}
        self._signed = {peer: node for peer, node in self._signed.items() if peer in self._open}


def end(connection: socket.socket) -> None:
    """Whoever reads from it sees that it has ended."""
    with suppress(OSError):  # it has
        connection.shutdown(socket.SHUT_RDWR)


class Listener(socket.socket):
    """A listening socket whose connections are counted from their first packet on, before any TLS."""

    limits: Limits

    @classmethod
    def around(cls, listening: socket.socket, limits: Limits) -> "Listener":
        """Take a socket over."""
        listener = cls(listening.family, listening.type, listening.proto, listening.detach())
        listener.limits = limits
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that may stay."""
        for _ in range(AT_ONCE):
            connection, address = super().accept()
            if self.limits.admit(connection, (str(address[0]), int(address[1]))):
                return connection, address
            connection.close()
        raise BlockingIOError  # asyncio comes back


class Protocol(H11Protocol):
    """HTTP/1.1 as our clients speak it: one request at a time, of a length that is told."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last: Any = None
        self._held = b""
        self._clock = self.loop.call_later(HEAD_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clock.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """End a connection on which no request began since the last look, and none is being answered."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._last:
            self.transport.close()
            return
        self._last = self.cycle
        self._clock = self.loop.call_later(HEAD_SECONDS, self._look)

    def data_received(self, data: bytes) -> None:
        self._held += data
        self._feed()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._feed()

    def _feed(self) -> None:
        """Pass on what has come, of a head in pieces, so that its length is looked at before it is parsed."""
        while self._held and not self.transport.is_closing():
            if self.conn.their_state is h11.DONE:  # whose answer has its length may be a moment ahead of our end of it
                self.flow.pause_reading()
                return
            in_body = self.conn.their_state is h11.SEND_BODY
            piece = self._held if in_body else self._held[:HEAD_BYTES]
            self._held = self._held[len(piece) :]
            super().data_received(piece)
            if self._is_of_no_client_of_ours():
                self.transport.close()

    def _is_of_no_client_of_ours(self) -> bool:
        """Chunks may be so small that each byte of them costs some microseconds; a pipeline may be endless."""
        if self.conn.their_state is h11.SEND_BODY:
            return any(name == b"transfer-encoding" for name, _ in self.headers)
        return self.conn.their_state is h11.DONE and bool(self.conn.trailing_data[0])


def allow_files() -> None:
    """Let this process have as many files open as connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
