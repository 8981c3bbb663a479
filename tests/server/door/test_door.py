"""The door before the SuperLink: what is too large is refused before it is stored, the rest passes bit for bit."""

import asyncio
import json
import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskdm.run.runfolder import read_lines
from maskdm_server.door import bodies
from maskdm_server.door import door as under_test
from maskdm_server.door import traffic as traffic_module
from maskdm_server.door.bodies import Message
from maskdm_server.door.door import (
    ASK,
    CALLS,
    CALLS_WITHOUT_KEYS,
    CHUNK,
    LARGEST_REQUEST,
    LARGEST_SMALL,
    MOST_HEADERS,
    OTHER_OBJECTS,
    SECRET,
    Door,
)
from maskdm_server.door.keys import Keys
from maskdm_server.door.questions import ASKED
from maskdm_server.door.traffic import Traffic

PUBLIC_PORT, PRIVATE_PORT = 8000, 40000
PUSH, PULL, MESSAGES = "/v1/fleet/push-object", "/v1/fleet/pull-object", "/v1/fleet/push-messages"


class App:
    """What stands behind the door; keeps what reaches it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[Message] = []
        self.status, self.answer = 200, b"done"
        self.after: list[Message] = []

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        body = bytearray()
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        self.bodies.append(bytes(body))
        self.after.append(await receive())
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        half = len(self.answer) // 2
        await send({"type": "http.response.body", "body": self.answer[:half], "more_body": True})
        await send({"type": "http.response.body", "body": self.answer[half:]})


class Knocking:
    """A client of the door."""

    def __init__(self, folder: Path, largest_update: int = 20 * CHUNK, keys: Keys | None = None) -> None:
        self.app = App()
        (folder / SECRET).write_text("s3cret")
        self.door = Door(self.app, folder, largest_update, PRIVATE_PORT, keys)
        self.pulled = 0  # pieces of a body that were read
        self.said = b""  # with the last answer

    def send(
        self,
        path: str,
        pieces: Sequence[bytes],
        end: str = "whole",
        kind: str = "http",
        port: int = PUBLIC_PORT,
        headers: Sequence[tuple[bytes, bytes]] = (),
        method: str = "POST",
        query: bytes = b"",
        length: bytes | None = None,
    ) -> int:
        """The status of the answer; after `pieces` the client goes away, unless the body is whole with them."""
        messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        if messages and end == "whole":
            messages[-1]["more_body"] = False
        waiting, answers = iter(messages), list[Message]()
        self.pulled = 0

        async def receive() -> Message:
            self.pulled += 1
            return next(waiting, {"type": "http.disconnect"})

        async def send(message: Message) -> None:
            answers.append(message)

        told = str(sum(map(len, pieces))).encode() if length is None else length
        scope = {
            **{"type": kind, "path": unquote(path), "raw_path": path.encode(), "method": method, "query_string": query},
            **{"server": ("127.0.0.1", port), "client": ("127.0.0.1", 5), "root_path": ""},
            "headers": [*headers, *([(b"content-length", told)] if told else [])],
        }
        asyncio.run(self.door(scope, receive, send))
        self.said = b"".join(answer.get("body", b"") for answer in answers)
        return int(answers[0].get("status", 0)) if answers else 0


@pytest.fixture
def knocking(tmp_path: Path) -> Knocking:
    return Knocking(tmp_path)


@pytest.fixture(autouse=True)
def _write_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_module, "WRITE_SECONDS", -1.0)
    monkeypatch.setattr(traffic_module, "REFUSAL_SECONDS", -1.0)


def tree(objects: int, wide: bool = True) -> Any:
    """A tree of so many objects."""
    if wide:
        return ObjectTree(object_id=name(0), children=[ObjectTree(object_id=name(i)) for i in range(1, objects)])
    top = ObjectTree(object_id=name(0))
    for i in range(1, objects):
        top = ObjectTree(object_id=name(i), children=[top])
    return top


def name(number: int) -> str:
    return f"{number:064x}"


def offered(*trees: Any, node: int = 5) -> bytes:
    return bytes(PushMessagesRequest(node=Node(node_id=node), message_object_trees=trees).SerializeToString())


def pushed(node: int, size: int) -> bytes:
    request = PushObjectRequest(node=Node(node_id=node), object_id="x", object_content=bytes(size))
    return bytes(request.SerializeToString())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(max_size=50), min_size=1, max_size=6))
def test_a_body_arrives_whole_in_however_many_pieces_it_came(knocking: Knocking, pieces: list[bytes]) -> None:
    assert knocking.send("/v1/runtime/pull-task", pieces, port=PRIVATE_PORT) == 200
    assert knocking.app.bodies[-1] == b"".join(pieces)
    assert knocking.app.after[-1] == {"type": "http.disconnect"}, "what comes after it reaches the SuperLink too"


@pytest.mark.parametrize("told", [None, b"5"])
@pytest.mark.parametrize("path", [PUSH, MESSAGES, "/v1/fleet/get-run", "/v1/runtime/push-object"])
def test_a_body_over_the_limit_is_refused_before_all_of_it_is_read(
    knocking: Knocking, path: str, told: bytes | None
) -> None:
    port = PUBLIC_PORT if path.startswith("/v1/fleet") else PRIVATE_PORT
    assert knocking.send(path, [bytes(2**20)] * 1000, port=port, length=told) == 413
    assert knocking.app.bodies == []
    assert knocking.pulled <= LARGEST_REQUEST // 2**20 + 1
    assert knocking.pulled == 0 or told or port == PRIVATE_PORT, "what says its length is not read at all"
    assert knocking.send(path, [bytes(LARGEST_REQUEST + 1)], port=port) == 413


@pytest.mark.parametrize("call", sorted({*CALLS, *CALLS_WITHOUT_KEYS} - {"push-object", "push-messages"}))
def test_a_request_that_carries_nothing_is_small(knocking: Knocking, call: str) -> None:
    assert knocking.send(f"/v1/fleet/{call}", [bytes(LARGEST_SMALL + 1)]) == 413
    assert knocking.send(f"/v1/fleet/{call}", [b"\x0a\x00"]) == 200


@pytest.mark.parametrize("length", [b"", b"-1", b"1e3", b"0x10", b" "])
def test_a_body_of_no_known_length_is_refused_unread(knocking: Knocking, length: bytes) -> None:
    headers = [] if length else [(b"transfer-encoding", b"chunked")]
    assert knocking.send(PUSH, [pushed(5, 10)], length=length, headers=headers) == 411
    assert knocking.pulled == 0


def test_a_head_of_many_headers_is_refused_unread(knocking: Knocking) -> None:
    assert knocking.send(PUSH, [pushed(5, 10)], headers=[(b"a", b"b")] * MOST_HEADERS) == 431
    assert knocking.send("/health", [], headers=[(b"a", b"b")] * MOST_HEADERS, method="GET") == 431
    assert knocking.send(PUSH, [pushed(5, 10)], headers=[(b"a", b"b")] * (MOST_HEADERS - 1)) == 200
    assert len(knocking.app.scopes) == 1


def test_who_sends_too_slowly_is_told_to_try_again(knocking: Knocking, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(bodies, "LONGEST_PAUSE", 0.01)
    assert asyncio.run(answered(knocking.door, PUSH, never)) == 503
    assert knocking.app.bodies == []


def test_a_steady_trickle_below_the_least_rate_is_ended(knocking: Knocking, monkeypatch: pytest.MonkeyPatch) -> None:
    async def trickle(*_: object) -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x", "more_body": True}

    monkeypatch.setattr(bodies, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(bodies, "LEAST_RATE", math.inf)
    assert asyncio.run(answered(knocking.door, PUSH, trickle)) == 503
    monkeypatch.undo()
    assert asyncio.run(answered(knocking.door, "/v1/fleet/get-run", trickle)) == 413, "fast enough, and then too much"


async def answered(door: Door, path: str, receive: Any) -> int:
    answers = list[Message]()

    async def send(message: Message) -> None:
        answers.append(message)

    scope = {
        **{"type": "http", "path": path, "raw_path": path.encode(), "method": "POST", "query_string": b""},
        **{"server": ("127.0.0.1", PUBLIC_PORT), "headers": [(b"content-length", b"5")]},
    }
    await door(scope, receive, send)
    return int(answers[0]["status"])


def test_a_chunk_of_flowers_own_passes(knocking: Knocking) -> None:
    assert knocking.send(PUSH, [pushed(5, CHUNK)]) == 200
    assert knocking.send(PUSH, [pushed(5, LARGEST_REQUEST - 200)]) == 200
    assert knocking.send(PUSH, [pushed(5, LARGEST_REQUEST)]) == 413


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(knocking: Knocking) -> None:
    knocking.send(PUSH, [b"some", b"thing"], end="gone")
    assert knocking.app.bodies == []


@pytest.mark.parametrize("wide", [True, False])
def test_a_reply_of_more_objects_than_an_update_can_have_is_refused_and_its_site_named(
    knocking: Knocking, tmp_path: Path, wide: bool
) -> None:
    most = 20 + OTHER_OBJECTS
    assert knocking.send(MESSAGES, [offered(tree(most, wide))]) == 200
    assert not (tmp_path / "refused.jsonl").exists()
    assert knocking.send(MESSAGES, [offered(tree(most + 1, wide), node=2**63 + 7)]) == 413
    assert knocking.send(MESSAGES, [offered(*[tree(most // 2 + 1, wide)] * 2, node=6)]) == 413, "all trees together"
    assert [line["site"] for line in read_lines(tmp_path / "refused.jsonl")] == [2**63 + 7, 6]
    assert len(knocking.app.bodies) == 1


def test_the_most_objects_follow_from_the_largest_update(tmp_path: Path) -> None:
    for largest, chunks in ((1, 1), (CHUNK, 1), (CHUNK + 1, 2)):
        knocking = Knocking(tmp_path, largest)
        assert knocking.send(MESSAGES, [offered(tree(chunks + OTHER_OBJECTS))]) == 200
        assert knocking.send(MESSAGES, [offered(tree(chunks + OTHER_OBJECTS + 1))]) == 413


@pytest.mark.parametrize("path", [PUSH, PULL, MESSAGES, "/v1/fleet/get-run"])
def test_what_is_no_protobuf_does_not_reach_the_superlink(knocking: Knocking, tmp_path: Path, path: str) -> None:
    for body in (b"\xff\xff\xff\xff", b"{}", b"\x0a\x7f", b"\x0a", b"\x18\x01" * 20):
        assert knocking.send(path, [body]) == 400
    assert knocking.app.bodies == []
    assert knocking.send(path, [b""]) == 200, "an empty one is"
    assert not (tmp_path / "refused.jsonl").exists()


def test_an_object_may_be_large_and_nothing_beside_it(knocking: Knocking) -> None:
    request = PushObjectRequest(node=Node(node_id=5), object_id="x" * 10_000, object_content=b"y")
    assert knocking.send(PUSH, [request.SerializeToString()]) == 413


def test_the_superlinks_own_start_and_end_are_none_of_its_business(knocking: Knocking, tmp_path: Path) -> None:
    knocking.send("", [], kind="lifespan")
    assert len(knocking.app.scopes) == 1
    assert [path.name for path in tmp_path.iterdir()] == [SECRET]


@pytest.mark.parametrize("port", [PUBLIC_PORT, PRIVATE_PORT])
def test_a_websocket_is_closed(knocking: Knocking, port: int) -> None:
    knocking.send("/v1/control/start-run", [], kind="websocket", port=port)
    assert knocking.app.scopes == []


def test_of_other_paths_only_the_size_is_looked_at(knocking: Knocking, tmp_path: Path) -> None:
    body = pushed(5, 1000)
    assert knocking.send("/v1/runtime/push-object", [body], port=PRIVATE_PORT) == 200
    assert knocking.app.bodies == [body]
    assert [path.name for path in tmp_path.iterdir()] == [SECRET]


@pytest.mark.parametrize("headers", [(), ((b"authorization", b"Bearer s3cret"),)])
@pytest.mark.parametrize(
    "path",
    [
        *("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/pull-task", "/docs", "/openapi.json", "/"),
        *("/v1/fleet", "//v1/fleet/push-object", "/V1/fleet/push-object", "/v1/control/../fleet/push-object"),
        *("/v1/fleet/", "/v1/fleet/anything", "/v1/fleet/push-object/", "/v1/fleet/push-object;a"),
        *("/v1/fleet/push-messages%0A", "/v1/fleet/push%2Dmessages", "/v1/fleet%2Fpush-messages", "%2Fhealth"),
        *("/v1/fleet/push-messages%00", "/v1/fleet/push-messages%20", "http://x/v1/fleet/push-messages", "/health%0a"),
    ],
)
def test_at_the_public_port_only_nodes_are_served_whatever_secret_is_shown(
    knocking: Knocking, path: str, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    assert knocking.send(path, [b"x"], headers=headers) == 404
    assert knocking.app.scopes == []
    assert knocking.pulled == 0, "it was not even read"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "post", "POST "])
def test_a_call_has_its_method_and_no_query(knocking: Knocking, method: str) -> None:
    assert knocking.send(PUSH, [b"x"], method=method) == 404
    assert knocking.send(PUSH, [b"x"], query=b"a=b") == 404
    assert knocking.app.scopes == []


@pytest.mark.parametrize("port", [PUBLIC_PORT, PRIVATE_PORT])
def test_whether_the_server_is_well_may_be_asked_by_everybody(knocking: Knocking, port: int) -> None:
    assert knocking.send("/health", [b""], method="GET", port=port) == 200


def test_nodes_are_not_served_at_the_private_port(knocking: Knocking) -> None:
    assert knocking.send(PUSH, [pushed(5, 10)], port=PRIVATE_PORT) == 404


def asked(tree: Any) -> bytes:
    return bytes(PushAppMessagesRequest(message_object_trees=[tree]).SerializeToString())


def test_a_reply_may_not_name_an_object_of_a_question_with_other_parts(knocking: Knocking, tmp_path: Path) -> None:
    question = ObjectTree(object_id=name(1), children=[ObjectTree(object_id=name(2)), ObjectTree(object_id=name(3))])
    knocking.app.status = 401
    knocking.send(
        ASK, [asked(ObjectTree(object_id=name(9), children=[ObjectTree(object_id=name(8))]))], port=PRIVATE_PORT
    )
    knocking.app.status = 200  # that was somebody else on this machine
    assert knocking.send(ASK, [asked(question)], port=PRIVATE_PORT) == 200
    assert knocking.app.bodies[-1] == asked(question)
    leaf, alone = ObjectTree(object_id=name(2)), ObjectTree(object_id=name(1))
    for other in (
        alone,
        ObjectTree(object_id=name(1), children=[leaf]),
        ObjectTree(object_id=name(3), children=[leaf]),
    ):
        for hidden in (other, ObjectTree(object_id=name(9), children=[other])):
            assert knocking.send(MESSAGES, [offered(hidden)]) == 403
    # Of two alike it is the same: a part of zeros, which a model and an update may have in common.
    assert knocking.send(MESSAGES, [offered(ObjectTree(object_id=name(9), children=[leaf]))]) == 200
    # A SuperLink that was started again knows them still.
    again = Knocking(tmp_path)
    assert again.send(MESSAGES, [offered(alone)]) == 403
    assert again.send(ASK, [asked(question)], port=PRIVATE_PORT) == 200
    assert (tmp_path / ASKED).stat().st_size == 3 * 32, "each is written down once"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((), 404),
        (((b"authorization", b"Bearer wrong"),), 404),
        (((b"authorization", b"s3cret"),), 404),
        (((b"authorization", b"Bearer s3cret"),), 200),
    ],
)
def test_who_submits_runs_shows_the_secret_at_the_private_port(
    knocking: Knocking, headers: Sequence[tuple[bytes, bytes]], status: int
) -> None:
    assert knocking.send("/v1/control/start-run", [b"x"], port=PRIVATE_PORT, headers=headers) == status


def test_who_is_not_let_in_carries_nothing(knocking: Knocking, tmp_path: Path) -> None:
    knocking.app.status = 401
    assert knocking.send(PUSH, [pushed(5, CHUNK)]) == 401
    assert not (tmp_path / "traffic.json").exists()


def test_strangers_cannot_make_it_remember_or_write_without_end(
    knocking: Knocking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_module, "MOST_NODES", 3)
    monkeypatch.setattr(traffic_module, "REFUSAL_SECONDS", 1e9)
    for node in (1, 2, 3, 1, 4, 5):
        knocking.send(PUSH, [pushed(node, CHUNK)])
        assert knocking.send(MESSAGES, [offered(tree(1000), node=node)]) == 413
    assert list(json.loads((tmp_path / "traffic.json").read_text())) == ["1", "4", "5"], "who carried last"
    assert [line["site"] for line in read_lines(tmp_path / "refused.jsonl")] == [1]


def test_what_each_node_carries_is_counted_both_ways(knocking: Knocking, tmp_path: Path) -> None:
    (tmp_path / "fed" / ".flwr").mkdir(parents=True)
    (tmp_path / "fed" / ".flwr" / SECRET).write_text("s3cret")
    knocking.door = Door(knocking.app, tmp_path / "fed" / ".flwr", CHUNK, PRIVATE_PORT)
    traffic = Traffic(tmp_path / "fed")
    assert traffic.carried() == {}
    answer = len(knocking.app.answer)
    bodies = [pushed(5, CHUNK), pushed(5, 300_000), pushed(2**63 + 1, CHUNK)]
    for body in bodies:
        knocking.send(PUSH, [body])
    assert traffic.carried() == {5: len(bodies[0]) + len(bodies[1]) + 2 * answer, 2**63 + 1: len(bodies[2]) + answer}
    before = traffic.carried()[5]
    knocking.app.answer = bytes(CHUNK)
    wanted = PullObjectRequest(node=Node(node_id=5), object_id="x").SerializeToString()
    knocking.send(PULL, [wanted])
    assert traffic.carried()[5] == before + len(wanted) + CHUNK


def test_questions_and_news_are_no_progress(knocking: Knocking, tmp_path: Path) -> None:
    """A site that is asked how far it is, and that never says, would be waited for as long as it is asked."""
    knocking.app.answer = bytes(3000)
    knocking.send(PULL, [PullObjectRequest(node=Node(node_id=5), object_id="x").SerializeToString()])
    knocking.send(PUSH, [pushed(5, 3000)])
    knocking.app.answer = bytes(CHUNK)
    knocking.send(MESSAGES, [offered(tree(3))])
    assert not (tmp_path / "traffic.json").exists()


def test_traffic_is_not_written_down_for_every_request(
    knocking: Knocking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_module, "WRITE_SECONDS", 1e9)
    knocking.door._tally._written = 0.0
    knocking.send(PUSH, [pushed(5, CHUNK)])
    assert not (tmp_path / "traffic.json").exists()


def test_a_disk_that_is_full_does_not_stop_requests(knocking: Knocking, tmp_path: Path) -> None:
    (tmp_path / "traffic.tmp").mkdir()  # cannot be written to
    assert knocking.send(PUSH, [pushed(5, CHUNK)]) == 200


def test_a_disk_that_is_full_does_not_let_large_replies_in_either(knocking: Knocking, tmp_path: Path) -> None:
    (tmp_path / "refused.jsonl").mkdir()
    assert knocking.send(MESSAGES, [offered(tree(1000))]) == 413


def test_the_reader_of_traffic_puts_up_with_what_is_not_there_or_half_written(tmp_path: Path) -> None:
    folder = tmp_path / ".flwr"
    folder.mkdir()
    traffic = Traffic(tmp_path)
    assert (traffic.carried(), traffic.refused()) == ({}, [])
    (folder / "traffic.json").write_text('{"5": 12')
    assert traffic.carried() == {}
    (folder / "traffic.json").write_text(json.dumps({"5": 12}))
    assert traffic.carried() == {5: 12}


def test_each_refusal_is_told_once_and_those_of_earlier_runs_never(tmp_path: Path) -> None:
    folder = tmp_path / ".flwr"
    folder.mkdir()
    knocking = Knocking(folder)
    knocking.send(MESSAGES, [offered(tree(1000), node=1)])
    traffic = Traffic(tmp_path)
    assert traffic.refused() == []
    knocking.send(MESSAGES, [offered(tree(1000), node=2)])
    knocking.send(MESSAGES, [offered(tree(1000), node=3)])
    assert traffic.refused() == [2, 3]
    assert traffic.refused() == []


def test_flowers_database_waits_for_a_lock_as_long_as_writing_a_large_model_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Flower's own five seconds 100 million weights ended in "database is locked"."""
    database = import_module("flwr.supercore.sql_mixin")
    monkeypatch.setattr(database, "SQLITE_PRAGMAS", database.SQLITE_PRAGMAS)
    superlink = import_module("flwr.superlink.main")
    monkeypatch.setattr(superlink, "create_app", superlink.create_app)
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr(import_module("flwr.superlink.cli.flower_superlink"), "uvicorn", None)
    found: dict[str, Any] = {}

    def look() -> None:
        with closing(sqlite3.connect(tmp_path / "superlink.db")) as connection:
            database._set_sqlite_pragmas(connection, None)
            for name in ("page_size", "busy_timeout", "synchronous", "secure_delete", "journal_mode"):
                (found[name],) = connection.execute(f"PRAGMA {name}").fetchone()

    monkeypatch.setattr(import_module("flwr.superlink.cli.flower_superlink"), "flower_superlink", look)
    under_test.main([str(tmp_path), "1000", "40000"])
    assert found == {
        **{"page_size": 65536, "busy_timeout": 120_000, "synchronous": 0, "secure_delete": 0},
        "journal_mode": "wal",
    }
