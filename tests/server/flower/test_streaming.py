"""What travels over Flower's Grid and Runtime API, and what the server makes of messages, hostile ones among them."""

import errno
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from httpx import ConnectError, HTTPStatusError, RemoteProtocolError, Request, Response
from numpy.typing import NDArray

from maskdm.errors import FederationError
from maskdm.federated.flower_records import PACKED, reply_to
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.run.events import Event
from maskdm.run.runfolder import append_line
from maskdm.run.tensorfile import Stored, pack, unpack
from maskdm_server.door.private_names import GRID
from maskdm_server.federation.exchange import Exchange
from maskdm_server.federation.transport import Question, Reply
from maskdm_server.flower import grid as grid_link
from maskdm_server.flower import streaming as under_test
from maskdm_server.flower.grid import GridLink, Pending, read_reply
from maskdm_server.flower.streaming import StreamingLink, _inflate

from ..conftest import Time

UPDATE = {"a": np.arange(3, dtype=np.uint16), "b": np.zeros((2, 2), np.uint16)}
NUMBERS: dict[str, int | float] = {"outcome": 0, "loss_after": 0.5}
LARGEST = 20_000_000


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower lets only the process of a run make messages."""
    for name, value in (("_task_id", 1), ("_node_id", 2), ("_run_id", 3)):
        monkeypatch.setattr(TaskIdentity, name, value)


def packed(document: bytes, name: str = "packed", kind: str = PACKED) -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(document),), kind, document)})


def content(update: ArrayRecord | None = None, **changes: Any) -> RecordDict:
    records = {"report": MetricRecord({**NUMBERS, **changes})}
    return RecordDict(records | ({"update": update} if update is not None else {}))


def good() -> RecordDict:
    return content(packed(pack(UPDATE)))


def assert_good(reply: Reply) -> None:
    assert reply.parcel is not None, reply.problem
    assert dict(reply.parcel.scalars) == NUMBERS
    assert {name: array.tolist() for name, array in reply.parcel.arrays.items()} == {
        name: array.tolist() for name, array in UPDATE.items()
    }


def test_what_is_no_reply_of_a_site_is_a_bad_reply_and_no_loss() -> None:
    reply = read_reply(Pending(4, Question(1, 1.0), 1.0), content(packed(b"no document")))
    assert (reply.site, reply.parcel, reply.problem, reply.lost) == (4, None, "its reply is none of ours", False)


def objects_of(thing: Any) -> dict[str, bytes]:
    return {name: found.deflate() for name, found in get_all_nested_objects(thing).items()}


def put_together(thing: Any, largest: int, pull: Callable[[str], bytes] | None = None) -> tuple[Any, bytes]:
    """The same from its objects, and the bytes of its array."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "array"
        found = _inflate(get_object_tree(thing), pull or objects_of(thing).__getitem__, largest, path)
        return found, path.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20 - 200, 5 * 2**20, 11_000_000])
def test_a_message_is_put_together_from_its_objects_as_flower_does_it(size: int) -> None:
    document = pack({"a": np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)})
    message = Message(content(packed(document)), 5, "train")
    flowers = inflate_object_from_contents(message.object_id, objects_of(message))
    ours, update = put_together(message, len(document))
    assert ours.metadata == flowers.metadata
    assert dict(ours.content["report"]) == dict(flowers.content["report"]) == NUMBERS
    first, second = ours.content["update"]["packed"], flowers.content["update"]["packed"]
    assert (first.dtype, first.shape, first.stype) == (second.dtype, second.shape, second.stype)
    assert update == second.data == document


def test_chunks_that_are_alike_are_put_together_as_often_as_they_were() -> None:
    """Flower sends them once; an update with many zeros has some."""
    document = pack({"a": np.zeros(16_000_000, np.uint8)})
    message = Message(content(packed(document)), 5, "train")
    assert len(get_object_tree(message).children[0].children[1].children[0].children) < 4
    assert put_together(message, len(document))[1] == document


def test_an_update_of_the_largest_size_passes_and_a_byte_more_does_not() -> None:
    message = Message(content(packed(bytes(1000))), 5, "train")
    assert put_together(message, 1000)
    with pytest.raises(ValueError, match="more than 999 bytes"):
        put_together(message, 999)


def named_often(chunk: bytes, times: int) -> Array:
    """An array that is `times` as large as what is sent of it."""
    array = Array("uint8", (len(chunk) * times,), PACKED, chunk)
    array.__dict__["_chunks"] = [(piece.object_id, piece) for piece in [ArrayChunk(memoryview(chunk))]] * times
    return array


def test_one_part_that_is_named_often_makes_no_large_array() -> None:
    record = ArrayRecord()
    record["packed"] = named_often(bytes(1000), 1000)
    message = Message(content(record), 5, "train")
    with pytest.raises(ValueError, match="10000 bytes"):
        put_together(message, 10_000)


def test_a_second_array_is_not_fetched() -> None:
    """Of one chunk, each of many arrays could name it until it is as large as an update can be."""
    records = {name: packed(bytes(1000), name) for name in ("a", "b")}
    with pytest.raises(ValueError, match="more than one array"):
        put_together(Message(RecordDict(records), 5, "train"), 10_000)


def test_neither_does_it_outside_of_a_record() -> None:
    array = named_often(bytes(1000), 1000)
    with pytest.raises(ValueError, match="Array has no place"):
        put_together(array, 10_000)


@pytest.mark.parametrize("chunk", [b"", b"x"])
def test_a_small_part_that_is_named_often_is_not_fetched_often(chunk: bytes) -> None:
    """A head of 10 MB can name one five million times, each of which asks the SuperLink."""
    record = ArrayRecord()
    record["packed"] = named_often(chunk, 50_000)
    message = Message(content(record), 5, "train")
    objects, pulled = objects_of(message), list[str]()

    def pull(name: str) -> bytes:
        pulled.append(name)
        return objects[name]

    with pytest.raises(ValueError, match=r"."):
        put_together(message, 100_000, pull)
    assert len(pulled) < 100


class Grid:
    """Flower's Grid, with nodes that answer when the test says so."""

    def __init__(self) -> None:
        self.nodes = [7, 5]
        self.sent: dict[str, Message] = {}
        self.replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            names.append(f"m{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = names[-1]
            self.sent[names[-1]] = message
        return names

    def pull_messages(self, names: Sequence[str]) -> list[Message]:
        return [self.replies.pop(name) for name in names if name in self.replies]

    def answer(self, name: str, what: RecordDict | Error) -> None:
        self.replies[name] = Message(what, reply_to=self.sent[name])


def refusal() -> HTTPStatusError:
    """What Flower's client raises where the SuperLink fails."""
    return HTTPStatusError("500", request=Request("POST", "http://x"), response=Response(500))


class Runtime(Grid):
    """The same as the calls of the Runtime API; objects of replies arrive when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.node = SimpleNamespace(run_id=3), Node(node_id=2)
        self.objects: dict[str, bytes] = {}
        self.known: set[str] = set()
        self.arrivals: dict[str, tuple[Any, Any]] = {}
        self.confirmed: list[str] = []
        self.polled: list[list[str]] = []
        self.pulls = 0
        self.trees: dict[str, Any] = {}
        self.refuses: dict[str, int] = {}  # the node whose question is not taken, by where
        self.cannot_hand_out = ""
        self._runtime_client = self

    def PushMessages(self, request: Any) -> Any:
        (head,) = request.messages_list
        if head.metadata.dst_node_id == self.refuses.get("announced"):
            raise refusal()
        if head.metadata.dst_node_id == self.refuses.get("known"):
            return PushAppMessagesResponse(message_ids=[""], session_id="s")
        self.receiver = head.metadata.dst_node_id
        names = [message.metadata.message_id for message in request.messages_list]
        wanted = {name for tree in request.message_object_trees for name in names_in(tree)} - self.objects.keys()
        self.known |= wanted
        for head, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            assert not head.content.ByteSize(), "its parts are sent one by one"
            self.sent[head.metadata.message_id] = message_from_proto(head)
            assert tree.object_id == head.metadata.message_id
            self.trees[tree.object_id] = tree
        return PushAppMessagesResponse(message_ids=names, objects_to_push=sorted(wanted), session_id="s")

    def PushObject(self, request: Any) -> Any:
        if self.receiver == self.refuses.get("sent"):
            return PushObjectResponse(stored=False)
        assert get_object_id(request.object_content) == request.object_id
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def PullMessages(self, request: Any) -> Any:
        if self.cannot_hand_out in request.message_ids:
            raise refusal()
        self.polled.append(list(request.message_ids))
        found = [self.arrivals.pop(name) for name in request.message_ids if name in self.arrivals]
        heads, trees = [head for head, _ in found], [tree for _, tree in found]
        return PullAppMessagesResponse(messages_list=heads, message_object_trees=trees)

    def PullObject(self, request: Any) -> Any:
        self.pulls += 1
        content = self.objects.get(request.object_id)
        known = request.object_id in self.known
        return PullObjectResponse(
            object_found=known, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)

    def answer(self, name: str, what: RecordDict | Error) -> None:
        for object_id, found in self.offer(name, what).items():
            self.objects[object_id] = found

    def offer(self, name: str, what: RecordDict | Error) -> dict[str, bytes]:
        """Announce a reply; its objects are still to come."""
        asked = self.sent[name]
        asked.metadata.__dict__["_message_id"] = name
        reply = Message(what, reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree = get_object_tree(reply)
        self.known |= set(names_in(tree))
        self.arrivals[name] = message_to_proto(remove_content_from_message(reply)), tree
        return objects_of(reply)

    def content_of(self, name: str) -> RecordDict:
        """What a node would get, put together by Flower itself."""
        return inflate_object_from_contents(name, dict(self.objects), keep_object_contents=True).content


def set_clock(monkeypatch: pytest.MonkeyPatch, now: Sequence[float]) -> None:
    """Have it be the time in the list, which the test moves on."""
    for module in (grid_link, under_test):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now[0]))


def names_in(tree: Any) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in names_in(child))]


@pytest.fixture(params=["grid", "streaming"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, GridLink]:
    """A Grid and the link over it."""
    if request.param == "grid":
        grid = Grid()
        return grid, GridLink(grid)
    return streaming(tmp_path)


def streaming(folder: Path, largest: int = LARGEST) -> tuple[Runtime, StreamingLink]:
    (folder / ".flwr").mkdir()
    runtime = Runtime()
    return runtime, StreamingLink(runtime, folder, largest)


@pytest.fixture
def question(tmp_path: Path) -> Question:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pack({"w": np.arange(10, dtype=np.float32)}))
    return Question(77, 30.0, "a plan", path)


def nonce_of(records: RecordDict) -> dict[str, Any]:
    plan = records["plan"]
    assert isinstance(plan, ConfigRecord)
    return {"nonce": plan["nonce"]}


def content_of(grid: Any, name: str) -> RecordDict:
    return grid.content_of(name) if isinstance(grid, Runtime) else grid.sent[name].content


def test_a_question_carries_the_plan_and_the_very_file_of_the_weights_and_is_void_after_a_while(
    pair: tuple[Any, GridLink], question: Question
) -> None:
    grid, link = pair
    assert link.sites() == [5, 7]
    link.ask([5, 7], question, 123.0)
    assert {message.metadata.dst_node_id for message in grid.sent.values()} == {5, 7}
    for name, message in grid.sent.items():
        assert message.metadata.ttl == 123.0
        assert message.metadata.message_type == "train"
        records = content_of(grid, name)
        assert dict(records["plan"]) == {"exchange": 77, "wait": 30.0, "document": "a plan", **nonce_of(records)}
        weights = records["weights"]["packed"]
        assert weights.stype == PACKED
        assert question.weights is not None
        assert bytes(weights.data) == question.weights.read_bytes()


def test_over_a_wire_goes_only_what_changed_and_to_virtual_sites_the_whole(
    pair: tuple[Any, GridLink], question: Question, tmp_path: Path
) -> None:
    grid, link = pair
    changes = tmp_path / "changes.safetensors"
    changes.write_bytes(pack({"w": np.zeros(3, np.float32)}))
    link.ask([5], replace(question, changes=changes), 60.0)
    (name,) = grid.sent
    weights = content_of(grid, name)["weights"]
    assert isinstance(weights, ArrayRecord)
    assert question.weights is not None
    sent = changes if isinstance(link, StreamingLink) else question.weights
    assert bytes(weights["packed"].data) == sent.read_bytes()


def test_a_question_for_news_carries_no_weights(pair: tuple[Any, GridLink]) -> None:
    grid, link = pair
    link.ask([5], Question(77, 30.0), 123.0)
    (name,) = grid.sent
    records = content_of(grid, name)
    assert set(records) == {"plan"}
    assert dict(records["plan"]) == {"exchange": 77, "wait": 30.0, "document": "", **nonce_of(records)}


def test_no_id_of_a_question_can_be_told_beforehand_not_even_by_who_was_asked_the_same(
    tmp_path: Path, question: Question
) -> None:
    """Not of what says who is asked what; the weights are who knows them's to name, which the door sees to."""
    runtime, link = streaming(tmp_path)
    link.ask([5, 7], question, 123.0)
    link.ask([5], question, 123.0)
    link.ask([5], Question(question.exchange, question.wait), 123.0)
    nonces = {tuple(runtime.content_of(name)["plan"]["nonce"]) for name in runtime.sent}
    assert len(nonces) == 4
    assert all(0 <= part < 2**63 for nonce in nonces for part in nonce)
    weights = set(names_in(get_object_tree(runtime.content_of(next(iter(runtime.sent)))["weights"])))
    named = [set(names_in(runtime.trees[name])) - weights for name in runtime.sent]
    assert [len(names) for names in named] == [3, 3, 3, 3], "message, its records, and the plan"
    assert len(set.union(*named)) == 12


def test_a_reply_that_carries_the_number_of_its_question_has_an_id_that_nobody_else_can_tell(
    tmp_path: Path, question: Question
) -> None:
    runtime, link = streaming(tmp_path)
    link.ask([5, 7], question, 123.0)
    ids = set()
    for name in list(runtime.sent):
        reply = reply_to(Message(runtime.content_of(name), 5, "train"), Parcel({}, NUMBERS))
        ids |= set(names_in(get_object_tree(reply)))
        runtime.answer(name, reply.content)
    assert len(ids) == 6, "message, records and report, of each site its own"
    assert [dict(reply.parcel.scalars) for reply in link.receive() if reply.parcel] == [NUMBERS, NUMBERS]


@pytest.mark.parametrize("what", ["announced", "sent"])
def test_what_the_superlink_does_not_take_ends_that_question_and_no_other(
    tmp_path: Path, question: Question, what: str
) -> None:
    runtime, link = streaming(tmp_path)
    runtime.refuses[what] = 5
    link.ask([5, 7, 9], question, 123.0)
    (reply,) = link.receive()
    assert (reply.site, reply.parcel, reply.lost, reply.question) == (5, None, True, question)
    assert list(link.receive()) == []
    runtime.refuses.clear()
    for name, message in list(runtime.sent.items()):
        if message.metadata.dst_node_id != 5:
            assert bytes(runtime.content_of(name)["weights"]["packed"].data) == question.weights.read_bytes()  # type: ignore[union-attr]
            runtime.answer(name, good())
    assert sorted(reply.site for reply in link.receive()) == [7, 9]
    link.ask([5], question, 123.0)
    assert list(link.receive()) == []


def test_a_node_that_has_left_between_is_a_lost_site(tmp_path: Path, question: Question) -> None:
    runtime, link = streaming(tmp_path)
    runtime.refuses["known"] = 5
    link.ask([5, 7], question, 123.0)
    (reply,) = link.receive()
    assert (reply.site, reply.lost) == (5, True)


def test_a_reply_that_the_superlink_cannot_hand_out_is_lost_and_the_others_are_not(
    tmp_path: Path, question: Question
) -> None:
    runtime, link = streaming(tmp_path)
    link.ask([5, 7, 9], question, 123.0)
    names = {message.metadata.dst_node_id: name for name, message in runtime.sent.items()}
    for name in names.values():
        runtime.answer(name, good())
    runtime.cannot_hand_out = names[7]
    replies = {reply.site: reply for reply in link.receive()}
    assert sorted(replies) == [5, 7, 9]
    assert [replies[7].parcel, replies[7].lost] == [None, True]
    assert_good(replies[5])
    assert list(link.receive()) == []


def test_replies_come_back_under_the_site_that_was_asked_and_only_once(
    pair: tuple[Any, GridLink], question: Question
) -> None:
    grid, link = pair
    assert list(link.receive()) == []
    link.ask([5, 7], question, 123.0)
    assert list(link.receive()) == []
    names = {message.metadata.dst_node_id: name for name, message in grid.sent.items()}
    link.ask([7], Question(question.exchange, question.wait), 123.0)
    grid.answer(names[7], good())
    (reply,) = link.receive()
    assert reply.site == 7
    assert reply.question is question, "not the newer one"
    assert_good(reply)
    grid.answer(names[5], content())
    (reply,) = link.receive()
    assert (reply.site, reply.parcel is not None and dict(reply.parcel.scalars)) == (5, NUMBERS)
    assert list(link.receive()) == []


def test_an_error_of_flowers_means_that_the_site_was_lost(pair: tuple[Any, GridLink], question: Question) -> None:
    """Its words, which a site may have chosen, are not repeated."""
    grid, link = pair
    link.ask([5], question, 123.0)
    (name,) = grid.sent
    grid.answer(name, Error(code=3, reason="/home/somebody/secret"))
    (reply,) = link.receive()
    assert (reply.site, reply.parcel, reply.lost, reply.question) == (5, None, True, question)
    assert "secret" not in reply.problem


def test_a_message_that_is_void_is_not_asked_for_any_more(
    pair: tuple[Any, GridLink], question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, link = pair
    now = [1000.0]
    set_clock(monkeypatch, now)
    link.ask([5], question, 100.0)
    (name,) = grid.sent
    now[0] += 101
    grid.answer(name, good())
    assert list(link.receive()) == []


def test_an_error_that_answers_an_earlier_exchange_is_none_of_this_one(
    pair: tuple[Any, GridLink], plan: RoundPlan, question: Question
) -> None:
    """A site that hung in the last round is lost in this one's beginning, and came back before it was asked anew."""
    grid, link = pair
    grid.nodes = [5]
    for number in (1, 2):
        time = Time()
        current = plan.model_copy(update={"exchange": number})
        assert question.weights is not None
        said: list[Event] = []
        exchange = Exchange(
            link,
            current,
            question.weights,
            deadline=60,
            limit=35,  # before it is asked how far it is
            say=said.append,
            record=lambda *line: None,
            clock=time.clock,
            pause=time.pause,
        )
        if number == 1:
            exchange.run(link.sites, lambda site, parcel: None)
            grid.answer(next(iter(grid.sent)), Error(code=3, reason=""))
        else:
            before = len(grid.sent)
            exchange.run(link.sites, lambda site, parcel: None)
            assert len(grid.sent) == before + 1


def test_a_reply_that_is_still_being_sent_is_waited_for_and_others_are_not(tmp_path: Path, question: Question) -> None:
    runtime, link = streaming(tmp_path)
    link.ask([5, 7], question, 123.0)
    names = {message.metadata.dst_node_id: name for name, message in runtime.sent.items()}
    objects = runtime.offer(names[5], good())
    head = list(objects)[-1]
    runtime.answer(names[7], good())
    assert [reply.site for reply in link.receive()] == [7]
    for object_id, found in objects.items():
        assert object_id == head or list(link.receive()) == []
        runtime.objects[object_id] = found
    (reply,) = link.receive()
    assert reply.site == 5
    assert_good(reply)
    assert runtime.confirmed[-1] == head
    assert list(link.receive()) == []


def test_an_update_lies_on_the_disk_until_the_next_one_comes_or_somebody_keeps_it(
    tmp_path: Path, question: Question
) -> None:
    runtime, link = streaming(tmp_path)
    link.ask([5, 7], question, 123.0)
    for number, name in enumerate(runtime.sent):
        runtime.answer(name, content(packed(pack({"a": np.full(3, number, np.uint16)}))))
    kept = []
    for reply in link.receive():
        assert reply.parcel is not None
        update = reply.parcel.arrays
        assert isinstance(update, Stored)
        assert list((tmp_path / ".flwr").glob("*.safetensors")) == [tmp_path / ".flwr" / "arrived.safetensors"]
        update.move(tmp_path / f"kept-{reply.site}")
        kept.append(update)
    assert [update["a"].tolist() for update in kept] == [[0, 0, 0], [1, 1, 1]]


def test_a_reply_that_the_disk_has_no_room_for_is_taken_in_once_it_has(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, link = streaming(tmp_path)
    link.ask([5], question, 123.0)
    runtime.answer(next(iter(runtime.sent)), good())

    def write(chunk: bytes, file: BinaryIO) -> int:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(under_test, "_write_body", write)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                list(link.receive())
            assert runtime.confirmed == []
            assert not (tmp_path / ".flwr" / "arrived.safetensors").exists()
    (reply,) = link.receive()
    assert_good(reply)


def test_a_reply_of_which_a_part_is_gone_for_good_may_be_sent_again(tmp_path: Path, question: Question) -> None:
    runtime, link = streaming(tmp_path)
    link.ask([5], question, 123.0)
    (name,) = runtime.sent
    objects = runtime.offer(name, good())
    runtime.objects |= objects
    gone = next(object_id for object_id, found in objects.items() if found.startswith(b"ArrayChunk"))
    runtime.known.discard(gone)
    (reply,) = link.receive()
    assert (reply.site, reply.parcel, reply.lost) == (5, None, True)


@pytest.mark.parametrize(
    "broken",
    [
        refusal(),
        RemoteProtocolError("Server disconnected without sending a response."),
        ConnectError("[Errno 111] Connection refused"),
        ConnectionResetError("Connection reset by peer"),
        ValueError("Invalid protobuf response payload"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("part", [b"Message", b"ArrayChunk"])
def test_what_breaks_on_the_way_from_the_superlink_loses_a_reply_and_is_not_its_sites_fault(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch, broken: Exception, part: bytes
) -> None:
    """E.g. while it is started again; the site is asked once more."""
    runtime, link = streaming(tmp_path)
    link.ask([5], question, 123.0)
    (name,) = runtime.sent
    runtime.answer(name, good())
    pull = runtime.PullObject

    def breaks(request: Any) -> Any:
        if runtime.objects[request.object_id].startswith(part):
            raise broken
        return pull(request)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "PullObject", breaks)
        (reply,) = link.receive()
    assert (reply.site, reply.parcel, reply.lost, reply.question) == (5, None, True, question)
    assert runtime.confirmed == []
    link.ask([5], question, 123.0)
    runtime.answer(list(runtime.sent)[-1], good())
    (reply,) = link.receive()
    assert_good(reply)


def test_a_reply_that_is_announced_and_never_sent_is_not_asked_for_for_ever(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, link = streaming(tmp_path)
    now = [1000.0]
    set_clock(monkeypatch, now)
    link.ask([5], question, 100.0)
    runtime.offer(next(iter(runtime.sent)), good())
    assert list(link.receive()) == []
    now[0] += 101
    link.ask([5], replace(question, exchange=78), 100.0)
    list(link.receive())
    pulls = runtime.pulls
    list(link.receive())
    assert runtime.pulls == pulls


def test_a_slow_upload_may_take_longer_than_its_question_counts(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange waits for it as long as bytes are carried, see test_exchange.py."""
    runtime, link = streaming(tmp_path)
    now = [1000.0]
    set_clock(monkeypatch, now)
    link.ask([5], question, 100.0)
    objects = runtime.offer(next(iter(runtime.sent)), good())
    for object_id, found in objects.items():
        assert list(link.receive()) == []
        now[0] += 60
        runtime.objects[object_id] = found
    (reply,) = link.receive()
    assert_good(reply)


def test_what_the_door_refused_is_a_bad_reply(tmp_path: Path) -> None:
    _, link = streaming(tmp_path)
    link._nodes = {5: 5}
    for node in (5, 6):  # a stranger may say any number
        append_line(tmp_path / ".flwr" / "refused.jsonl", {"time": 0, "site": node})
    (reply,) = link.receive()
    assert (reply.site, reply.parcel, reply.lost) == (5, None, False)
    assert "more than an update can be" in reply.problem
    assert list(link.receive()) == []
    (tmp_path / ".flwr" / "traffic.json").write_text('{"5": 12}')
    assert link.carried() == {5: 12}


Forge = Callable[[dict[str, bytes], Any], tuple[dict[str, bytes], Any]]


def forged(kind: str, children: Sequence[str], body: bytes) -> bytes:
    """An object as Flower would write it, of any kind and content."""
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def replaced(prefix: bytes, make: Callable[[bytes], bytes]) -> Forge:
    """Another content for each object that begins so, under the name that the tree knows."""
    return lambda objects, tree: (
        {name: make(found) if found.startswith(prefix) else found for name, found in objects.items()},
        tree,
    )


def deep(objects: dict[str, bytes], tree: Any) -> tuple[dict[str, bytes], Any]:
    for i in range(90):
        name = f"{i:064x}"
        objects = {**objects, name: forged("RecordDict", [tree.object_id], json.dumps({"a": tree.object_id}).encode())}
        tree = ObjectTree(object_id=name, children=[tree])
    return objects, tree


def array_body(**changes: Any) -> Callable[[bytes], bytes]:
    about = {"dtype": "uint8", "shape": [8], "stype": PACKED, "arraychunk_ids": [0], **changes}

    def make(found: bytes) -> bytes:
        children = found.split(b"\0")[0].decode().split(" ")[1]
        return forged("Array", [children], json.dumps(about).encode())

    return make


FORGERIES: dict[str, Forge] = {
    "empty": replaced(b"", lambda found: b""),
    "no head": replaced(b"", lambda found: b"Message"),
    "no kind": replaced(b"", lambda found: b"\0"),
    "foreign kind": replaced(b"", lambda found: forged("Popen", [], b"")),
    "chunk for a message": replaced(b"Message", lambda found: forged("ArrayChunk", [], b"")),
    "record for a message": replaced(b"Message", lambda found: forged("MetricRecord", [], b"{}")),
    "message that is no protobuf": replaced(b"Message", lambda found: found[:-3] + b"\xff\xff\xff"),
    "message without content": replaced(b"Message", lambda found: forged("Message", [], found.split(b"\0", 1)[1])),
    "records that are no json": replaced(b"RecordDict", lambda found: found[:-1] + b"\xff"),
    "records that are a list": replaced(
        b"RecordDict", lambda found: forged("RecordDict", found.split(b" ")[1].decode().split(","), b"[]")
    ),
    "numbers that are none": replaced(b"MetricRecord", lambda found: forged("MetricRecord", [], b"\xff\xff")),
    "record without array": replaced(b"ArrayRecord", lambda found: forged("ArrayRecord", [], b"{}")),
    "array that is no json": replaced(b"Array ", lambda found: found[:-1] + b"\xff"),
    "array deep as a well": replaced(b"Array ", lambda found: forged("Array", [], b"[" * 100_000)),
    "array that is a number": replaced(b"Array ", lambda found: forged("Array", [], b"3")),
    "array without places": replaced(b"Array ", lambda found: forged("Array", [], b'{"dtype": "uint8"}')),
    "place that is not there": replaced(b"Array ", array_body(arraychunk_ids=[5])),
    "place that is text": replaced(b"Array ", array_body(arraychunk_ids=["0"])),
    "places that are a number": replaced(b"Array ", array_body(arraychunk_ids=3)),
    "shape that is a number": replaced(b"Array ", array_body(shape=3)),
    "shape of text": replaced(b"Array ", array_body(shape=["a"])),
    "chunk without a head": replaced(b"ArrayChunk", lambda found: b"ArrayChunk"),
    "a bomb": replaced(b"Array ", array_body(arraychunk_ids=[0] * 200_000)),
    "pickle": replaced(b"ArrayChunk", lambda found: forged("ArrayChunk", [], b"\x80\x04K\x01.")),
    "deep as a well": deep,
    "two arrays": lambda objects, tree: (
        objects,
        ObjectTree(
            object_id=tree.object_id,
            children=[
                ObjectTree(
                    object_id=records.object_id,
                    children=[
                        ObjectTree(object_id=record.object_id, children=[*record.children, *record.children])
                        for record in records.children
                    ],
                )
                for records in tree.children
            ],
        ),
    ),
    "no children": lambda objects, tree: (objects, ObjectTree(object_id=tree.object_id)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_hostile_objects_make_a_bad_reply_and_nothing_else(tmp_path: Path, question: Question, forgery: str) -> None:
    runtime, link = streaming(tmp_path, largest=10_000)
    link.ask([5, 7], question, 123.0)
    names = {message.metadata.dst_node_id: name for name, message in runtime.sent.items()}
    objects = runtime.offer(names[5], good())
    head, tree = runtime.arrivals[names[5]]
    objects, tree = FORGERIES[forgery](objects, tree)
    head.metadata.message_id = tree.object_id
    runtime.arrivals[names[5]] = head, tree
    runtime.objects |= objects
    runtime.known |= objects.keys()
    runtime.answer(names[7], content(loss_after=0.75))
    first, second = sorted(link.receive(), key=lambda reply: reply.site)
    assert (first.site, first.parcel) == (5, None)
    assert first.problem in ("its reply cannot be read", "its reply is none of ours")
    assert second.parcel is not None
    assert second.parcel.scalars["loss_after"] == 0.75
    assert list(link.receive()) == []


def test_what_goes_down_is_read_from_its_file_and_not_held(question: Question) -> None:
    grid = Grid()
    GridLink(grid).ask([5], question, 1.0)
    weights = grid.sent["m0"].content["weights"]["packed"]
    assert isinstance(weights.data, memoryview)
    found: dict[str, NDArray[np.generic]] = unpack(weights.data)
    assert found["w"].tolist() == list(range(10))


@pytest.mark.parametrize("name", GRID)
def test_a_grid_of_another_flower_is_refused_and_not_carried_over_in_another_way(tmp_path: Path, name: str) -> None:
    runtime = Runtime()
    delattr(runtime, name)
    with pytest.raises(FederationError, match=rf"^Flower \d+\.\d+\.\d+ lacks Runtime\.{name}, .* pip install 'flwr"):
        StreamingLink(runtime, tmp_path, LARGEST)
