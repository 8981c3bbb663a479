"""The SuperLink behind a door: who comes in is known, and what they send is bounded, before Flower sees it.

Flower's SuperLink reads and parses requests of any size from whoever reaches it, and looks at signatures afterwards.
Here a request at the public port is one of those that a SuperNode makes, to the letter; it is signed by a site that may
come in (without keys nobody can be known, and the bounds alone are left); its head, its body and the objects that it
names are no larger than a node's of ours; and what each node carries is counted.

Flower also serves those who submit runs, and its own executors, on the same port. Here they have a port of their own on
loopback, where who submits runs must show a secret.

    python -m maskdm_server.door.door FOLDER LARGEST_UPDATE PRIVATE_PORT [options of flower-superlink]
"""

import asyncio
import json
import secrets
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from maskdm.errors import UsageError
from maskdm.federated.flower_names import UNFIT, require

from .bodies import Message, Receive, read_body
from .keys import KEYS, Keys, RequestRefused
from .private_names import REPLACED, USED
from .questions import Questions
from .traffic import TrafficTally
from .trees import TREES, Malformed, TooMany, objects, parts

CHUNK = 5 * 2**20  # Flower's own for arrays
LARGEST_REQUEST = 2 * CHUNK
OTHER_OBJECTS = 16  # of a message, besides the chunks of its one array
LARGEST_SMALL = 2**14  # bytes of a request that carries no object and names none
LARGEST_NAMES, OBJECT_BYTES = 2**20, 128  # of a request that names the objects of a reply, and for each of them
BESIDE_NAMES = 2**16  # bytes of it besides them
BESIDE_CONTENT = 2**12  # bytes of a request that carries an object, besides that
MOST_HEADERS = 64
LARGE, LARGE_AT_ONCE = 2**18, 8  # bytes; so many larger requests are in memory
LEAST_CARRIED = 2**14  # smaller ones are questions, plans and news, which are no progress
FLEET, CONTROL, HEALTH = "/v1/fleet/", "/v1/control/", "/health"
ASK = "/v1/runtime/push-messages"
# What a SuperNode asks for; only one without a key registers itself.
CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab", "confirm-message-received"),
    *("pull-messages", "pull-object", "push-messages", "push-object"),
)
CALLS_WITHOUT_KEYS = ("register-node", "unregister-node")
NODE, CONTENT = 1, 4  # fields of Flower's requests
LARGEST_NODE = 32  # bytes
SECRET = "secret"  # file that only this user can read
# Of Flower's database, which lives as long as the server and holds whole models: with Flower's settings, which wait 5 s
# for a lock, and Debian's, which overwrite what is deleted, 100 million weights end in "database is locked".
FIRST = (("page_size", "65536"),)  # counts only before any other
THEN = (("busy_timeout", "120000"), ("synchronous", "OFF"), ("secure_delete", "OFF"), ("cache_size", "-2000"))

Send = Callable[[Message], Awaitable[None]]


class Door:
    """ASGI middleware in front of the SuperLink."""

    def __init__(
        self,
        app: Any,
        folder: Path,
        largest_update: int,
        private_port: int,
        keys: Keys | None = None,
        limits: Any = None,
        refusals: Any = None,
    ) -> None:
        """Stand before an app.

        Args:
            keys: of those who may come in; None lets everybody in.
            limits: of connections, which are told who signed on them.
            refusals: counts them.
        """
        self._app, self._folder, self._tally = app, folder, TrafficTally(folder)
        self._private_port, self._keys, self._limits, self._refusals = private_port, keys, limits, refusals
        self._secret = b"Bearer " + (folder / SECRET).read_bytes()
        self._most_objects = -(-largest_update // CHUNK) + OTHER_OBJECTS
        self._largest = dict.fromkeys(CALLS if keys else (*CALLS, *CALLS_WITHOUT_KEYS), LARGEST_SMALL) | {
            "push-messages": LARGEST_NAMES + OBJECT_BYTES * self._most_objects,
            "push-object": LARGEST_REQUEST,
        }
        self._questions = Questions(folder)
        self._room = asyncio.Semaphore(LARGE_AT_ONCE)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, once all of it is there and nothing is wrong with it."""
        if scope["type"] == "websocket":  # nobody here speaks it
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await (self._private if scope["server"][1] == self._private_port else self._public)(scope, receive, send)
        except RequestRefused as refused:
            await _answer(send, refused)
            if self._refusals:
                self._refusals.count(str(refused.status))
        if self._refusals:
            self._refusals.tell()

    async def _public(self, scope: Message, receive: Receive, send: Send) -> None:
        """A SuperNode's request.

        Raises:
            RequestRefused: it is none.
        """
        # As it was sent: encoded in another way it would be measured as one path here and taken for another there.
        path, method = bytes(scope["raw_path"]).decode("ascii", "replace"), scope["method"]
        if len(scope["headers"]) > MOST_HEADERS:
            raise RequestRefused(431)
        if (method, path) == ("GET", HEALTH) and not scope["query_string"]:
            await self._app(scope, receive, send)
            return
        name = path.removeprefix(FLEET)
        if method != "POST" or name not in self._largest or FLEET + name != path or scope["query_string"]:
            raise RequestRefused(404)
        headers = dict(reversed(scope["headers"]))  # of several the first counts, as for Flower
        node, digest = None, None
        if self._keys:
            node, digest = self._keys.signer(method, path, headers)
            if self._limits and scope["client"] and not self._limits.sign(tuple(scope["client"]), node):
                raise RequestRefused(503)
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            raise RequestRefused(411)
        if int(length[:20]) > self._largest[name]:
            self._check_size(name, node)
        size, file = await read_body(receive, self._largest[name], self._folder, digest)
        async with self._room if size > LARGE else nullcontext():
            with file:
                body = file.read()
            node = self._look_at(name, body, node)
            await self._pass(scope, receive, send, body, node if name in ("push-object", "pull-object") else None)

    async def _private(self, scope: Message, receive: Receive, send: Send) -> None:
        """Flower's own processes, and with the secret who submits runs.

        Raises:
            RequestRefused: it is neither.
        """
        path, given = str(scope["path"]), dict(scope["headers"]).get(b"authorization", b"")
        if path.startswith(FLEET) or (path.startswith(CONTROL) and not secrets.compare_digest(given, self._secret)):
            raise RequestRefused(404)
        with (await read_body(receive, LARGEST_REQUEST, self._folder)).file as file:
            body = file.read()
        if await self._pass(scope, receive, send, body, None) and path == ASK:  # and not from anybody on this machine
            self._questions.remember(objects(body, LARGEST_REQUEST))

    async def _pass(self, scope: Message, receive: Receive, send: Send, body: bytes, node: int | None) -> bool:
        """Have the SuperLink answer a request that is whole, and count what a node carried with it.

        Returns:
            Whether the SuperLink did what it was asked.
        """
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
                self._tally.count(node, carried)

        await self._app(scope, again, sent)
        return let_in

    def _check_size(self, name: str, node: int | None) -> None:
        """Refuse what says that it is too large."""
        if name == "push-messages" and node is not None:
            self._tally.refuse(node)
        raise RequestRefused(413)

    def _look_at(self, name: str, body: bytes, node: int | None) -> int | None:
        """The node that sends a request, as far as that can be told.

        Raises:
            RequestRefused: 400 no client of ours would send it; 403 it names objects of a question, with other parts;
                413 it names more than an update can have.
        """
        try:
            found = parts(body)
            if node is None:
                node = _node_in(found)
            if name == "push-object" and _size_without(CONTENT, found) > BESIDE_CONTENT:
                raise RequestRefused(413)
            if name == "push-messages":
                if _size_without(TREES, found) > BESIDE_NAMES:
                    raise TooMany
                if self._questions.are_changed_by(objects(body, self._most_objects)):
                    raise RequestRefused(403)
        except Malformed:
            raise RequestRefused(400) from None
        except TooMany:
            if node is not None:
                self._tally.refuse(node)
            raise RequestRefused(413) from None
        return node


async def _answer(send: Send, refused: RequestRefused) -> None:
    """Refuse, and end the connection: of what else comes on it nothing is read."""
    body = json.dumps(refused.said).encode() if refused.said else b""
    headers = [(b"connection", b"close"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _node_in(found: list[tuple[int, memoryview]]) -> int | None:
    """The node that a request says it comes from."""
    from flwr.proto.node_pb2 import Node
    from google.protobuf.message import DecodeError

    for number, part in found:
        if number == NODE and len(part) <= LARGEST_NODE:
            with suppress(DecodeError):
                return int(Node.FromString(bytes(part)).node_id)
    return None


def _size_without(field: int, found: list[tuple[int, memoryview]]) -> int:
    return sum(len(part) for number, part in found if number != field)


def main(arguments: list[str]) -> None:
    """Run Flower's SuperLink with the door in front of it.

    Raises:
        UsageError: the installed Flower lacks a name.
    """
    require(USED, REPLACED)
    import flwr.supercore.sql_mixin as database
    import flwr.superlink.main as superlink

    from .connections import Limits, allow_files
    from .quiet import Refusals

    command: Any = import_module("flwr.superlink.cli.flower_superlink")  # hidden behind a function of its name
    folder, largest_update, private_port = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    keys = Keys(folder / KEYS) if "--enable-supernode-auth" in arguments else None
    refusals = Refusals()
    limits = Limits(keys is not None, refusals)
    create = superlink.create_app
    database.SQLITE_PRAGMAS = (*FIRST, *database.SQLITE_PRAGMAS, *THEN)

    def create_with_door(*given: Any) -> Any:
        app = create(*given)
        about = {"folder": folder, "largest_update": largest_update, "private_port": private_port}
        app.add_middleware(Door, **about, keys=keys, limits=limits, refusals=refusals)
        return app

    superlink.create_app = create_with_door
    command.uvicorn = _Uvicorn(private_port, limits)
    sys.argv = ["flower-superlink", *arguments[3:]]
    allow_files()
    command.flower_superlink()


class _Uvicorn:
    """What Flower's command uses of uvicorn, listening on two ports."""

    def __init__(self, private_port: int, limits: Any) -> None:
        self._private_port, self._limits = private_port, limits

    def run(self, app: Any, host: str, port: int, **options: Any) -> None:
        import uvicorn

        from .connections import HEAD_BYTES, Listener, Protocol
        from .quiet import quieten

        # asyncio's own loop, because it asks the listening socket for each connection. A line for each request is one
        # that strangers write.
        bounds: dict[str, Any] = {"loop": "asyncio", "http": Protocol, "h11_max_incomplete_event_size": HEAD_BYTES}
        shared = {**options, **bounds, "ws": "none", "access_log": False, "proxy_headers": False}
        config = uvicorn.Config(app, host=host, port=port, **shared)
        private = uvicorn.Config(app, host="127.0.0.1", port=self._private_port, log_config=None)
        public = Listener.around(config.bind_socket(), self._limits)
        quieten()
        uvicorn.Server(config).run(sockets=[public, private.bind_socket()])


if __name__ == "__main__":
    try:
        with suppress(asyncio.CancelledError):
            main(sys.argv[1:])
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(UNFIT)
