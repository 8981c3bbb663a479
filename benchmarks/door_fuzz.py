"""A stranger, and a site that means harm, at a server's door; for benchmarks/door.py and the end-to-end tests.

    python benchmarks/door_fuzz.py HOST:PORT --kit KIT.zip --seconds 60 --seed 0

Each attack has a thread of its own, and goes on until the time is over. At the end a line of JSON says how often each
was tried, and what was answered.
"""

import argparse
import json
import os
import random
import socket
import ssl
import tempfile
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from google.protobuf.message import DecodeError

from maskdm.federated.kit import open_kit
from maskdm_client.flower.signatures import SignedRequests
from maskdm_server.door.door import CALLS, CALLS_WITHOUT_KEYS, LARGEST_REQUEST

FLOOD = 300  # connections at once
SLOW = 20  # bodies at once
PAUSE = 0.02  # seconds between two attempts, so that this program is no load itself

Headers = dict[str, str]


class Attacker:
    """What all attacks share: where the door is, a key that it knows, and what came of it."""

    def __init__(self, address: str, kit: Path, seconds: float, seed: int) -> None:
        host, _, port = address.rpartition(":")
        self.host, self.port, self.address, self.seed = host, int(port), address, seed
        self.deadline = time.monotonic() + seconds
        opened = open_kit(kit, Path(tempfile.mkdtemp(prefix="door-")))
        self.trust = ssl.create_default_context(cafile=str(opened.authority))
        key: Any = load_ssh_private_key(opened.key.read_bytes(), None)
        self.pem = public_key_to_bytes(key.public_key())
        self.signing = SignedRequests(key, key.public_key())
        self.counts, self.lock = Counter[str](), threading.Lock()

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def goes_on(self) -> bool:
        time.sleep(PAUSE)
        return time.monotonic() < self.deadline

    def connect(self) -> socket.socket:
        line = socket.create_connection((self.host, self.port), 10)
        return self.trust.wrap_socket(line, server_hostname=self.host)

    def signed(self, path: str, body: bytes) -> Headers:
        request = httpx.Request("POST", f"https://{self.address}{path}", content=body)
        self.signing.intercept(SimpleNamespace(request=request), lambda context: httpx.Response(200))
        return {**dict(request.headers), "content-type": "application/protobuf"}

    def post(self, name: str, body: bytes, headers: Headers | None = None) -> bytes:
        """Send a request; without headers it is signed."""
        path = f"/v1/fleet/{name}"
        with httpx.Client(verify=self.trust, timeout=30) as client:
            given = self.signed(path, body) if headers is None else headers
            answer = client.post(f"https://{self.address}{path}", content=body, headers=given)
        self.count(f"{name if name in CALLS else 'other'} {'signed' if headers is None else 'unsigned'}: {answer}"[:60])
        return answer.content

    def insist(self, name: str, request: Any) -> bytes:
        """Send a signed request until it is answered; the flood takes most connections of this address."""
        while self.goes_on():
            with suppress(httpx.TransportError):
                return self.post(name, bytes(request.SerializeToString()))
        return b""


def malformed(attacker: Attacker, randomness: random.Random) -> None:
    """HTTP that is none, and nearly is."""
    whole = b"POST /v1/fleet/push-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 40\r\n\r\n" + bytes(40)
    while attacker.goes_on():
        line = bytearray(whole if randomness.random() < 0.7 else randomness.randbytes(randomness.randrange(1, 5000)))
        for _ in range(randomness.randrange(8)):
            line[randomness.randrange(len(line))] = randomness.randrange(256)
        _say(attacker, "malformed", [bytes(line) * randomness.choice((1, 1, 50))])


def heads(attacker: Attacker, randomness: random.Random) -> None:
    """Heads of up to a hundred million bytes."""
    while attacker.goes_on():
        piece = randomness.choice((b"a: b\r\n" * 10_000, b"a" * 60_000, b"x: " + b"y" * 50_000 + b"\r\n"))
        _say(attacker, "large head", [b"GET /health HTTP/1.1\r\n", *[piece] * 1700])


def _say(attacker: Attacker, what: str, pieces: list[bytes]) -> None:
    with suppress(OSError), attacker.connect() as line:
        for piece in pieces:
            line.sendall(piece)
        line.settimeout(1)
        line.recv(100)
    attacker.count(what)


def flood(attacker: Attacker, randomness: random.Random) -> None:
    """Connections that say nothing, most of them not even in TLS."""
    lines: list[socket.socket] = []
    while attacker.goes_on():
        for _ in range(20):
            with suppress(OSError):
                lines.append(socket.create_connection((attacker.host, attacker.port), 1))
                attacker.count("connection")
        while len(lines) > FLOOD:
            lines.pop(randomness.randrange(len(lines))).close()
    for line in lines:
        line.close()


def slow(attacker: Attacker, randomness: random.Random) -> None:
    """Signed bodies of which a byte comes now and then."""
    body = bytes(
        PushObjectRequest(node=Node(node_id=1), object_content=bytes(LARGEST_REQUEST - 1000)).SerializeToString()
    )
    lines: list[socket.socket] = []
    while attacker.goes_on():
        if len(lines) < SLOW:
            with suppress(OSError):
                lines.append(attacker.connect())
                headers = attacker.signed("/v1/fleet/push-object", body)
                head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                lines[-1].sendall(f"POST /v1/fleet/push-object HTTP/1.1\r\n{head}\r\n".encode() + body[:500])
                attacker.count("slow body")
        for line in list(lines):
            try:
                line.sendall(b"x")
            except OSError:
                lines.remove(line)
        time.sleep(0.5)
    for line in lines:
        line.close()


def garbage(attacker: Attacker, randomness: random.Random) -> None:
    """Bodies of all kinds at all paths, half of them signed by a key that may come in."""
    names = [*CALLS, *CALLS_WITHOUT_KEYS, "push-messages%0A", "../control/start-run", "x" * 1000]
    node, leaf = Node(node_id=randomness.getrandbits(63)), ObjectTree(object_id="0" * 64)
    wide = ObjectTree(object_id="1" * 64, children=[leaf] * 2000)
    deep = leaf
    for _ in range(90):
        deep = ObjectTree(object_id=randomness.randbytes(32).hex(), children=[deep])
    bodies: list[Callable[[], bytes]] = [
        lambda: randomness.randbytes(randomness.randrange(10_000)),
        lambda: b"\x1a\x00" * 5_000_000,
        lambda: b"\x1a\x00" * 500_000,
        lambda: b"\x1a\x84\x80\x80\x04" + b"\x12\x00" * 5000,
        lambda: bytes(PushMessagesRequest(node=node, message_object_trees=[wide]).SerializeToString()),
        lambda: bytes(PushMessagesRequest(node=node, message_object_trees=[deep]).SerializeToString()),
        lambda: bytes(PushObjectRequest(node=node, object_content=randomness.randbytes(10**6)).SerializeToString()),
        lambda: bytes(
            ActivateNodeRequest(public_key=attacker.pem, heartbeat_interval=float("nan")).SerializeToString()
        ),
    ]
    while attacker.goes_on():
        name, body = randomness.choice(names), randomness.choice(bodies)()
        key = {"flwr-public-key": b64encode(attacker.pem).decode(), "flwr-timestamp": datetime.now(UTC).isoformat()}
        unsigned = randomness.choice(({}, key, {**key, "maskdm-signature": b64encode(bytes(103)).decode()}))
        with suppress(httpx.HTTPError):
            attacker.post(name, body, None if randomness.random() < 0.5 else unsigned)


def site(attacker: Attacker, randomness: random.Random) -> None:
    """Join; answer each question with its own objects, whose parts are others, and have them deleted first."""
    joined = attacker.insist("activate-node", ActivateNodeRequest(public_key=attacker.pem, heartbeat_interval=600))
    node = Node(node_id=ActivateNodeResponse.FromString(joined).node_id)
    while attacker.goes_on():
        answer = attacker.insist("pull-messages", PullMessagesRequest(node=node))
        for _, tree in questions(answer):
            attacker.count("question")
            answer_harm(attacker, answer, node, list(names_in(tree)))
        time.sleep(0.5)


def questions(answer: bytes) -> list[tuple[Any, Any]]:
    """Messages and their objects; none where the answer is not Flower's."""
    try:
        found = PullMessagesResponse.FromString(answer)
    except DecodeError:  # an answer of the door's, or an error in JSON
        return []
    return list(zip(found.messages_list, found.message_object_trees, strict=True))


def answer_harm(attacker: Attacker, answer: bytes, node: Any, names: list[str]) -> None:
    """Name the question's objects as parts of a reply, with other parts; and confirm what is not to be confirmed."""
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_from_proto
    from flwr.supercore.task_identity import TaskIdentity

    (head, _), *_ = questions(answer)
    asked = message_from_proto(head)
    TaskIdentity.node_id, TaskIdentity.task_id, TaskIdentity.run_id = node.node_id, 1, asked.metadata.run_id
    for name in names:
        run = asked.metadata.run_id
        attacker.insist("pull-object", PullObjectRequest(node=node, run_id=run, object_id=name))
        confirmed = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=name)
        attacker.insist("confirm-message-received", confirmed)
    asked.metadata.__dict__["_message_id"] = head.metadata.message_id
    reply = Message(RecordDict({"report": MetricRecord({"outcome": 0})}), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    other = ObjectTree(object_id="2" * 64)
    for children in (
        [ObjectTree(object_id=name, children=[other]) for name in names],
        [ObjectTree(object_id=name) for name in names],
    ):
        tree = ObjectTree(object_id=reply.object_id, children=children)
        pushed = PushMessagesRequest(
            node=node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[float("nan")],
        )
        attacker.insist("push-messages", pushed)


def names_in(tree: Any) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from names_in(child)


ATTACKS = (malformed, heads, flood, slow, garbage, garbage, site)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--kit", type=Path, required=True, help="of a site that may come in")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.nice(10)  # who attacks is on another machine
    attacker = Attacker(given.address, given.kit, given.seconds, given.seed)
    threads = [
        threading.Thread(target=attack, args=(attacker, random.Random(given.seed * 100 + number)), daemon=True)
        for number, attack in enumerate(ATTACKS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(given.seconds + 60)
    print(json.dumps(dict(sorted(attacker.counts.items()))), flush=True)


if __name__ == "__main__":
    main()
