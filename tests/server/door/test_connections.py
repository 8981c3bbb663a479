"""Connections at the public port, over real sockets: how many, how long, and what their heads may be."""

import http.client
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import uvicorn

from maskdm_server.door import connections as under_test
from maskdm_server.door.connections import HEAD_BYTES, Limits, Listener, Protocol
from maskdm_server.door.quiet import Refusals

PATIENCE = 60.0  # only there so that a broken test ends


class Server:
    """Uvicorn as the door runs it, around an app that says how much it was sent."""

    def __init__(self, limits: Limits) -> None:
        self.bodies: list[int] = []
        bounds: dict[str, Any] = {"loop": "asyncio", "http": Protocol, "h11_max_incomplete_event_size": HEAD_BYTES}
        config = uvicorn.Config(
            self.app, interface="asgi3", port=0, ws="none", lifespan="off", log_config=None, **bounds
        )
        self.listener = Listener.around(config.bind_socket(), limits)
        self.port = int(self.listener.getsockname()[1])
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        self.bodies.append(size)
        text = str(size).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
        # As Flower's middleware does it: whoever counts has the whole answer before its end.
        await send({"type": "http.response.body", "body": text, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def connect(self) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        line.settimeout(PATIENCE)
        return line

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(PATIENCE)


@pytest.fixture
def limits() -> Limits:
    return Limits(True, Refusals())


@pytest.fixture
def server(limits: Limits) -> Iterator[Server]:
    server = Server(limits)
    yield server
    server.close()


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rest(line: socket.socket) -> bytes:
    """All that still comes; a connection that was cut off has said what it said."""
    said = bytearray()
    with suppress(ConnectionError):
        while piece := line.recv(65536):
            said += piece
    return bytes(said)


def poured(line: socket.socket, pieces: Any) -> int:
    """Bytes that could be sent until the other side had enough."""
    sent = 0
    with suppress(OSError):
        for piece in pieces:
            line.sendall(piece)
            sent += len(piece)
    return sent


def test_requests_follow_each_other_on_a_connection_whatever_their_size(server: Server) -> None:
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    sizes = [0, 1, 5 * 2**20, HEAD_BYTES, 10 * 2**20, *range(100)]
    for size in sizes:
        line.request("POST", "/", bytes(size))
        assert line.getresponse().read() == str(size).encode()
    assert server.bodies == sizes
    line.close()


def test_a_request_may_come_in_any_pieces(server: Server) -> None:
    whole = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n0123456789"
    with server.connect() as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in whole:
            line.sendall(bytes([byte]))
        assert b"200" in line.recv(1000)
    assert server.bodies == [10]


@pytest.mark.parametrize("line_end", [b"\r\n", b"", b"\r\nx: "])
def test_a_head_without_end_is_ended_and_takes_no_memory(server: Server, line_end: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with server.connect() as line:
        poured(line, [b"GET / HTTP/1.1\r\nx: ", *[b"a" * 65000 + line_end] * 3000])
        rest(line)
    assert server.bodies == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes, of 195 million bytes"


def test_a_head_of_countless_headers_is_ended(server: Server) -> None:
    with server.connect() as line:
        poured(line, [b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 100_000 + b"\r\n"])
        assert not rest(line).startswith(b"HTTP/1.1 200")
    assert server.bodies == []


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 100_000,
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 100_000,
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 1000,
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabcd",
        b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["chunks", "trailers", "pipeline", "more than said", "two lengths", "TLS", "nothing", "HTTP/2", "NUL"],
)
def test_what_no_client_of_ours_says_ends_the_connection(server: Server, request_: bytes) -> None:
    with server.connect() as line:
        poured(line, [request_])
        assert not rest(line).startswith(b"HTTP/1.1 200")
    assert len(server.bodies) <= 1
    with server.connect() as line:
        line.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert rest(line).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"POST / HTTP/1.1\r\nx: a"])
def test_a_connection_on_which_no_request_begins_is_ended(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(under_test, "HEAD_SECONDS", 0.05)
    server = Server(limits)
    with server.connect() as line:
        line.sendall(said)
        assert rest(line).startswith(b"HTTP/1.1 200") == said.endswith(b"\r\n\r\n")
    server.close()


def test_one_address_has_so_many_connections_and_no_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST_OF_ADDRESS", 5)
    with ExitStack() as lines:
        first = [lines.enter_context(server.connect()) for _ in range(5)]
        for _ in range(20):
            assert rest(lines.enter_context(server.connect())) == b""
        for line in first:
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert rest(line).startswith(b"HTTP/1.1 200")
    until(lambda: answers(server))


def answers(server: Server) -> bool:
    with server.connect() as line, suppress(OSError):
        line.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return rest(line).startswith(b"HTTP/1.1 200")
    return False


class Connection:
    """An open socket, as far as limits look at it."""

    def __init__(self) -> None:
        self.ended, self.number = False, 3

    def fileno(self) -> int:
        return self.number

    def shutdown(self, how: int) -> None:
        self.ended = True


def admitted(limits: Limits, host: str, port: int) -> Connection | None:
    connection = Connection()
    return connection if limits.admit(connection, (host, port)) else None  # type: ignore[arg-type]


def test_those_who_signed_are_counted_by_their_key_and_behind_one_address_there_may_be_many(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "MOST_OF_ADDRESS", 2)
    monkeypatch.setattr(under_test, "MOST_OF_KEY", 3)
    for port in range(9):
        assert admitted(limits, "hospital", port)
        assert limits.sign(("hospital", port), node=port // 3)
    assert admitted(limits, "hospital", 9)
    assert not limits.sign(("hospital", 9), node=1)
    assert not limits.sign(("hospital", 9), node=1)
    assert admitted(limits, "hospital", 10)
    assert not admitted(limits, "hospital", 11)
    assert admitted(limits, "elsewhere", 11)


def test_what_was_closed_does_not_count(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST_OF_ADDRESS", 2)
    monkeypatch.setattr(under_test, "MOST_OF_KEY", 1)
    for port in range(9):
        connection = admitted(limits, "hospital", port)
        assert connection
        assert limits.sign(("hospital", port), node=5)
        connection.number = -1


def test_where_there_is_no_room_the_oldest_that_did_not_sign_makes_it(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "MOST", 3)
    first, second, third = (admitted(limits, f"host-{number}", 1) for number in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    limits.sign(("host-0", 1), node=5)
    assert admitted(limits, "host-3", 1)
    assert [first.ended, second.ended, third.ended] == [False, True, False]
    for host in ("host-2", "host-3"):
        limits.sign((host, 1), node=6)
    assert not admitted(limits, "host-4", 1), "all of them signed"


def test_without_keys_nobody_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST", 3)
    limits = Limits(False, Refusals())
    there = [admitted(limits, f"host-{number}", 1) for number in range(4)]
    assert [bool(one) for one in there] == [True, True, True, False]
    assert not any(one.ended for one in there if one)
