"""The SuperLink behind a door: what a node may send is bounded before it is stored, and what each carries is counted.

Flower's SuperLink takes requests and replies of any size from whoever reaches it. Here a reply of more parts than an
update can have is refused before one of them is sent, and a request larger than Flower's own chunks by its length.

Flower also serves nodes, those who submit runs, and its own executors on one port. Here only nodes are served at the
public one; the others have a port of their own on loopback, where who submits runs must show a secret.

    python -m maskdm_server.door FOLDER LARGEST_UPDATE PRIVATE_PORT [options of flower-superlink]
"""

import asyncio
import json
import math
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from maskdm.runfolder import LineReader, append_line

CHUNK = 5 * 2**20  # Flower's own for arrays
LARGEST_REQUEST = 2 * CHUNK
MOST_PARTS = 1000  # in which a request is held
OTHER_OBJECTS = 16  # of a message, besides the chunks of its one array
LEAST_CARRIED = 2**14  # smaller ones are questions, plans and news, which are no progress
WRITE_SECONDS = 1.0
FLEET, CONTROL, HEALTH = "/v1/fleet/", "/v1/control/", "/health"
SECRET = "secret"  # file that only this user can read
# What a stranger can make us remember or write: nodes that carried something, and refusals a second.
MOST_NODES = 10_000
REFUSAL_SECONDS = 1.0
# Of Flower's database, which lives as long as the server and holds whole models: with Flower's settings, which wait 5 s
# for a lock, and Debian's, which overwrite what is deleted, 100 million weights end in "database is locked".
FIRST = (("page_size", "65536"),)  # counts only before any other
THEN = (("busy_timeout", "120000"), ("synchronous", "OFF"), ("secure_delete", "OFF"), ("cache_size", "-2000"))

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLarge(Exception):
    """A request that no node of ours would send."""


class Door:
    """ASGI middleware in front of the SuperLink's fleet interface."""

    def __init__(self, app: Any, folder: Path, largest_update: int, private_port: int) -> None:
        self._app, self._traffic = app, folder / "traffic.json"
        self._private_port = private_port
        self._secret = b"Bearer " + (folder / SECRET).read_bytes()
        self._refused = folder / "refused.jsonl"
        self._most_objects = -(-largest_update // CHUNK) + OTHER_OBJECTS
        self._carried: dict[int, int] = {}  # by node, the one that carried last at the end
        self._written = self._told = -math.inf

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, once all of it is there and nothing is wrong with it."""
        if scope["type"] == "websocket":  # nobody here speaks it
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope.get("path", ""))
        if not self._may_pass(scope, path):
            await _answer(send, 404)
            return
        parts, size = list[bytes](), 0
        try:
            while True:
                message = await receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if len(parts) > MOST_PARTS:  # a byte at a time would take many times its memory
                    parts = [b"".join(parts)]
                if message["type"] != "http.request" or size > LARGEST_REQUEST:
                    raise TooLarge
                if not message.get("more_body"):
                    break
            body = b"".join(parts)
            node = self._look_at(path.removeprefix(FLEET), body) if path.startswith(FLEET) else None
        except TooLarge:
            await _answer(send, 413)
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def again() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        let_in, carried = False, len(body)

        async def sent(message: Message) -> None:
            nonlocal let_in, carried
            await send(message)
            if message["type"] == "http.response.start":
                let_in = message["status"] == 200  # whoever the SuperLink does not know carries nothing
                return
            carried += len(message.get("body", b""))
            if node is not None and let_in and not message.get("more_body") and carried >= LEAST_CARRIED:
                self._count(node, carried)

        await self._app(scope, again, sent)

    def _may_pass(self, scope: Message, path: str) -> bool:
        """Nodes at the public port; at the private one all that Flower takes, and who submits runs with the secret."""
        if scope["server"][1] != self._private_port:
            return path.startswith(FLEET) or path == HEALTH
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not path.startswith(CONTROL) or secrets.compare_digest(given, self._secret)

    def _look_at(self, name: str, body: bytes) -> int | None:
        """The node that carries a part of a message with a request, if it does.

        Raises:
            TooLarge: it announces more than a node of ours would send.
        """
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
        from google.protobuf.message import DecodeError

        try:
            if name == "push-messages":
                request = PushMessagesRequest.FromString(body)
                if sum(_count(tree, self._most_objects) for tree in request.message_object_trees) > self._most_objects:
                    self._refuse(request.node.node_id)
                    raise TooLarge
            elif name == "push-object":
                return int(PushObjectRequest.FromString(body).node.node_id)
            elif name == "pull-object":
                return int(PullObjectRequest.FromString(body).node.node_id)
        except DecodeError:  # the SuperLink says so itself
            pass
        return None

    def _refuse(self, node: int) -> None:
        """Tell the process that runs the rounds, now and then."""
        now = time.monotonic()
        if now - self._told >= REFUSAL_SECONDS:
            self._told = now
            with suppress(OSError):  # a full disk: it is refused all the same
                append_line(self._refused, {"time": time.time(), "site": node})

    def _count(self, node: int, size: int) -> None:
        self._carried[node] = self._carried.pop(node, 0) + size
        if len(self._carried) > MOST_NODES:
            del self._carried[next(iter(self._carried))]
        if time.monotonic() - self._written > WRITE_SECONDS:
            self._written = time.monotonic()
            temporary = self._traffic.with_suffix(".tmp")
            with suppress(OSError):  # a full disk: whoever watches sees no progress for a while
                temporary.write_text(json.dumps(self._carried))
                temporary.replace(self._traffic)


class Traffic:
    """What the door wrote down, read by the process that runs the rounds."""

    def __init__(self, federation: Path) -> None:
        folder = federation / ".flwr"
        self._path, self._refused = folder / "traffic.json", LineReader(folder / "refused.jsonl")

    def carried(self) -> Mapping[int, int]:
        """Bytes carried for each node."""
        try:
            return {int(node): int(size) for node, size in json.loads(self._path.read_text()).items()}
        except (OSError, ValueError):
            return {}

    def refused(self) -> list[int]:
        """Nodes whose replies were refused since the last call."""
        return [int(line["site"]) for line in self._refused.new()]


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _count(tree: Any, most: int) -> int:
    """Objects of a tree, or more than `most` where there are."""
    count, waiting = 0, [tree]
    while waiting and count <= most:
        node = waiting.pop()
        count += 1
        waiting.extend(node.children)
    return count


def main(arguments: list[str]) -> None:
    """Run Flower's SuperLink with the door in front of it."""
    import flwr.supercore.sql_mixin as database
    import flwr.superlink.main as superlink

    command: Any = import_module("flwr.superlink.cli.flower_superlink")  # hidden behind a function of its name
    folder, largest_update, private_port = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    create = superlink.create_app
    database.SQLITE_PRAGMAS = (*FIRST, *database.SQLITE_PRAGMAS, *THEN)

    def create_with_door(*given: Any) -> Any:
        app = create(*given)
        app.add_middleware(Door, folder=folder, largest_update=largest_update, private_port=private_port)
        return app

    superlink.create_app = create_with_door
    command.uvicorn = _Uvicorn(private_port)
    sys.argv = ["flower-superlink", *arguments[3:]]
    command.flower_superlink()


class _Uvicorn:
    """What Flower's command uses of uvicorn, listening on two ports."""

    def __init__(self, private_port: int) -> None:
        self._private_port = private_port

    def run(self, app: Any, host: str, port: int, **options: Any) -> None:
        import uvicorn

        config = uvicorn.Config(app, host=host, port=port, **options)
        private = uvicorn.Config(app, host="127.0.0.1", port=self._private_port, log_config=None)
        uvicorn.Server(config).run(sockets=[config.bind_socket(), private.bind_socket()])


if __name__ == "__main__":
    with suppress(asyncio.CancelledError):
        main(sys.argv[1:])
