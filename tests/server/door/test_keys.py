"""Who signs a request: found out from its headers, before its body is read."""

import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import get_runtime_version_incompatibility_exit_message
from flwr.superlink.routers.fleet.node_auth import authenticate_node

from maskdm.federated.signing import DIGEST, SIGNATURE
from maskdm_client.flower.signatures import SignedRequests
from maskdm_server.door import keys as under_test
from maskdm_server.door.door import CHUNK
from maskdm_server.door.keys import KEYS, OLD_CLIENT, UNKNOWN, Keys, RequestRefused, Signed

from .test_door import MESSAGES, PUSH, Knocking, pushed

NODE = 2**63 + 7
ADDRESS = "https://clinic.example:8000"
Headers = list[tuple[bytes, bytes]]


class Client:
    """A SuperNode's connection, with our signatures; nothing leaves it."""

    def __init__(self) -> None:
        self.private, self.public = generate_key_pairs()
        self.pem = public_key_to_bytes(self.public)
        self.interceptor = SignedRequests(self.private, self.public)

    def headers(self, path: str, body: bytes) -> Headers:
        request = httpx.Request("POST", ADDRESS + path, content=body)
        self.interceptor.intercept(SimpleNamespace(request=request), lambda context: httpx.Response(200))
        return [(name.lower(), value) for name, value in request.headers.raw if name.lower() != b"content-length"]


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


@pytest.fixture
def door(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> Knocking:
    """Which lets in this client alone."""
    monkeypatch.setattr(under_test, "LOOK_SECONDS", -1.0)
    (tmp_path / KEYS).write_text(json.dumps({client.pem.decode(): NODE}))
    return Knocking(tmp_path, keys=Keys(tmp_path / KEYS))


def test_a_site_that_is_known_is_let_in_and_what_it_carries_is_counted_by_its_key(
    door: Knocking, client: Client, tmp_path: Path
) -> None:
    body = pushed(5, CHUNK)  # it says that it is another: Flower refuses that
    assert door.send(PUSH, [body], headers=client.headers(PUSH, body)) == 200
    assert door.app.bodies == [body]
    assert list(json.loads((tmp_path / "traffic.json").read_text())) == [str(NODE)]


def test_flowers_own_look_at_the_same_request_agrees(client: Client) -> None:
    request = PushObjectRequest(node=Node(node_id=NODE))
    headers = {name.decode(): value.decode() for name, value in client.headers(PUSH, request.SerializeToString())}
    state = SimpleNamespace(get_node_id_by_public_key={client.pem: NODE}.get)
    factory = SimpleNamespace(state=lambda: state)
    app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=factory))
    authenticate_node(SimpleNamespace(headers=headers, state=SimpleNamespace(protobuf_request=request), app=app))


def without(name: str) -> Callable[[Headers], Headers]:
    return lambda headers: [(known, value) for known, value in headers if known != name.encode()]


def with_(name: str, value: bytes) -> Callable[[Headers], Headers]:
    return lambda headers: [(name.encode(), value), *without(name)(headers)]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda headers: [], 401),
        (without("flwr-public-key"), 401),
        (without("flwr-timestamp"), 401),
        (without(DIGEST), 401),
        (without(SIGNATURE), 426),
        (with_("flwr-public-key", b"%%%"), 401),
        (with_("flwr-public-key", b64encode(Client().pem)), 401),
        (with_("flwr-timestamp", b"yesterday"), 401),
        (with_("flwr-timestamp", b"2026-01-01T00:00:00"), 401),
        (with_("flwr-timestamp", "\N{SNOWMAN}".encode()), 401),
        (with_("flwr-timestamp", datetime.now(UTC).isoformat().encode()), 401),
        (with_(SIGNATURE, b""), 401),
        (with_(SIGNATURE, b64encode(bytes(100))), 401),
        (with_(DIGEST, b"0" * 64), 401),
        (with_(DIGEST, "\N{SNOWMAN}".encode()), 401),
    ],
)
def test_who_is_not_known_to_have_signed_this_is_refused_unread(
    door: Knocking, client: Client, change: Callable[[Headers], Headers], status: int
) -> None:
    body = pushed(5, 10)
    assert door.send(PUSH, [body], headers=change(client.headers(PUSH, body))) == status
    assert (door.app.scopes, door.pulled) == ([], 0)


def test_who_is_not_on_the_list_is_told_so_as_flower_does_it(door: Knocking) -> None:
    assert door.send(PUSH, [b""], headers=Client().headers(PUSH, b"")) == 401
    assert json.loads(door.said) == UNKNOWN
    assert UNKNOWN["code"] == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


def test_a_signature_is_for_one_path_and_one_body(door: Knocking, client: Client) -> None:
    body = pushed(5, 10)
    headers = client.headers(PUSH, body)
    assert door.send("/v1/fleet/pull-object", [body], headers=headers) == 401
    assert door.pulled == 0
    assert door.send(PUSH, [body[:-1] + b"\1"], headers=headers) == 401
    assert door.send(PUSH, [body[:5], body[5:]], headers=headers) == 200
    assert len(door.app.bodies) == 1


@pytest.mark.parametrize(("seconds", "status"), [(-10, 401), (-3, 200), (0, 200), (303, 200), (306, 401)])
def test_a_signature_counts_for_a_while_as_with_flower(
    door: Knocking, client: Client, monkeypatch: pytest.MonkeyPatch, seconds: int, status: int
) -> None:
    import flwr.supernode.node_auth_http_interceptor as flowers

    monkeypatch.setattr(flowers, "now", lambda: datetime.now(UTC) - timedelta(seconds=seconds))
    body = pushed(5, 10)
    assert door.send(PUSH, [body], headers=client.headers(PUSH, body)) == status


def test_flowers_signature_alone_is_an_old_clients_which_is_told_so(door: Knocking, client: Client) -> None:
    timestamp = datetime.now(UTC).isoformat()
    signature = sign_message(client.private, timestamp.encode())
    headers = [
        (b"flwr-public-key", b64encode(client.pem)),
        (b"flwr-timestamp", timestamp.encode()),
        (b"flwr-signature", b64encode(signature)),
    ]
    assert door.send(PUSH, [b""], headers=headers) == 426
    assert json.loads(door.said) == {"code": 1001, "detail": OLD_CLIENT["detail"]}
    assert get_runtime_version_incompatibility_exit_message(door.said.decode()) == OLD_CLIENT["detail"]


@pytest.mark.parametrize("call", ["register-node", "unregister-node"])
def test_who_has_a_key_registers_nowhere(door: Knocking, client: Client, call: str) -> None:
    path = f"/v1/fleet/{call}"
    assert door.send(path, [b""], headers=client.headers(path, b"")) == 404


def test_before_there_are_keys_everybody_is_asked_to_try_again(tmp_path: Path, client: Client) -> None:
    door = Knocking(tmp_path, keys=Keys(tmp_path / KEYS))
    assert door.send(PUSH, [b""], headers=client.headers(PUSH, b"")) == 503
    assert door.send("/health", [b""], method="GET") == 200


def test_keys_are_read_anew_when_they_change_and_kept_while_they_cannot_be_read(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "LOOK_SECONDS", -1.0)
    path = tmp_path / KEYS
    keys = Keys(path)
    assert tried(keys, client) == 503
    path.write_text(json.dumps({client.pem.decode(): NODE}))
    assert tried(keys, client) == NODE
    path.write_text('{"half')
    assert tried(keys, client) == NODE
    path.unlink()
    assert tried(keys, client) == NODE
    path.write_text("{}")
    assert tried(keys, client) == 401


def tried(keys: Keys, client: Client) -> int:
    try:
        signed = keys.signer("POST", PUSH, dict(client.headers(PUSH, b"")))
    except RequestRefused as refused:
        return refused.status
    assert isinstance(signed, Signed)
    return signed.node


class Crowded:
    """Connections of which this one is too many."""

    def sign(self, peer: Sequence[Any], node: int) -> bool:
        return node != NODE


def test_a_site_with_too_many_connections_is_asked_to_try_again(door: Knocking, client: Client) -> None:
    door.door._limits = Crowded()
    assert door.send(PUSH, [b""], headers=client.headers(PUSH, b"")) == 503
    assert (door.app.scopes, door.pulled) == ([], 0)


def test_a_reply_that_says_it_is_far_too_large_is_told_of_by_its_key(
    door: Knocking, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = client.headers(MESSAGES, b"")
    assert door.send(MESSAGES, [], length=b"9" * 30, headers=headers) == 413
    assert json.loads((tmp_path / "refused.jsonl").read_text())["site"] == NODE


def test_the_supernode_of_a_site_signs_whole_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import flwr.supernode.fleet_http_connection as connection
    import flwr.supernode.start_client_internal as internal

    from maskdm_client.flower.pinned import ADMITTED, run_supernode

    monkeypatch.setattr(connection, "NodeAuthHttpInterceptor", None)
    monkeypatch.setattr(internal, "get_fused_config_from_fab", None)
    monkeypatch.setattr(import_module("flwr.supernode.cli.flower_supernode"), "flower_supernode", lambda: None)
    monkeypatch.setattr("sys.argv", ["flower-supernode", "--port", "4711"])
    (tmp_path / ADMITTED).parent.mkdir()
    run_supernode(tmp_path)
    signing: Any = connection.NodeAuthHttpInterceptor(*generate_key_pairs())
    assert isinstance(signing, SignedRequests)
    context = SimpleNamespace(request=httpx.Request("POST", ADDRESS, content=b""), message=PullMessagesRequest())
    signing.intercept(context, lambda _: httpx.Response(200))
    assert (tmp_path / ADMITTED).read_text() == "4711"
