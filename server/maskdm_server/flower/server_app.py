"""The Flower ServerApp: carries parcels over Flower's Grid. The rounds themselves are in `maskdm_server.federation`.

Over the network Flower's own push holds every message twice, its pull every reply of a round three times, and both wait
for the slowest link. `StreamingLink` goes through the same calls of Flower's Runtime API object by object.
"""

import ctypes
import gc
import json
import secrets
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from mmap import ACCESS_READ, MADV_DONTNEED, mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_tree,
    get_object_type_from_object_content,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflatable_class_registry,
    push_objects,
)
from httpx import HTTPStatusError

from maskdm.errors import MaskDMError
from maskdm.federated.parcel import Parcel
from maskdm.run.runfolder import append_line
from maskdm.run.tensorfile import Hashed, unpack
from maskdm.training.checkpoint import describe_checkpoint

from ..door.door import CHUNK
from ..door.traffic import Traffic
from ..federation.rounds import run_federation
from ..federation.settings import FederationConfig, largest_update
from ..federation.transport import Question, Reply
from .liveness import alive
from .roster import Named

PACKED = "maskdm.packed"  # how our arrays are serialised: one safetensors document
AT_ONCE = 2  # objects whose bytes are in memory while they are sent
LOST = "the site was lost or its work failed"
UNSENT = "its question could not be handed to the SuperLink"
NONCE = "nonce"  # of a question and its reply: two random numbers of 63 bits

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the federation whose folder the run configuration names."""
    folder = Path(str(context.run_config["federation"]))
    config = FederationConfig.model_validate(json.loads((folder / "config.json").read_text())["federation"])
    largest = largest_update(config, describe_checkpoint(folder / "prior.safetensors").model)
    link = StreamingLink(grid, folder, largest) if hasattr(grid, "_runtime_client") else GridLink(grid)
    try:
        with alive(folder):
            run_federation(link, folder, config)
    except MaskDMError as error:
        _tell(folder, "failed", str(error))
        raise
    except Exception as error:  # whoever watches starts it again
        _tell(folder, "crashed", f"unexpected {type(error).__name__}: {error}")
        with suppress(OSError), (folder / "logs" / "rounds.log").open("a") as log:
            traceback.print_exc(file=log)
        raise


def _tell(folder: Path, event: str, reason: str) -> None:
    """Say why the rounds end; where the disk is so full that this cannot be written, on standard error."""
    try:
        append_line(folder / "events.jsonl", {"time": time.time(), "event": event, "reason": reason})
    except OSError:
        print(f"{event}: {reason}", file=sys.stderr)


class Asked(NamedTuple):
    """Who was asked what, and until when an answer counts."""

    site: int
    question: Question
    until: float


class GridLink:
    """Parcels over any Grid of Flower's, e.g. that of its simulation."""

    may_lose = False

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._asked: dict[str, Asked] = {}  # by message
        self._exchange = 0  # the newest

    def sites(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def name(self, site: int) -> str:
        return str(site)

    def carried(self) -> Mapping[int, int]:
        return {}

    def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
        self._exchange = question.exchange
        if question.weights is None:
            self._send([_content(question) for _ in sites], sites, question, seconds)
            return
        with self._weights_of(question).open("rb") as file:
            document = mmap(file.fileno(), 0, access=ACCESS_READ)
        weights = Array("uint8", (len(document),), PACKED, b"")
        weights.data = memoryview(document)  # read from the file as it goes
        record = ArrayRecord()
        record["packed"] = weights  # the constructor would copy it
        self._send([_content(question, record) for _ in sites], sites, question, seconds, document)

    def receive(self) -> Iterator[Reply]:
        self._forget_expired()
        for message in self._grid.pull_messages(list(self._asked)) if self._asked else ():
            asked = self._asked.pop(message.metadata.reply_to_message_id)
            yield _lost(asked) if message.has_error() else _reply(asked, message.content)

    def _weights_of(self, question: Question) -> Path:
        assert question.weights is not None
        return question.weights  # virtual sites keep nothing, and nothing goes over a wire

    def _send(
        self,
        contents: Sequence[RecordDict],
        sites: Sequence[int],
        question: Question,
        seconds: float,
        document: mmap | None = None,
    ) -> None:
        messages = [
            Message(content, site, MessageType.TRAIN, ttl=seconds)
            for site, content in zip(sites, contents, strict=True)
        ]
        for site, message in zip(sites, self._grid.push_messages(messages), strict=True):
            self._asked[message] = Asked(site, question, time.time() + seconds)

    def _forget_expired(self) -> None:
        now = time.time()
        self._asked = {message: asked for message, asked in self._asked.items() if asked.until > now}


class StreamingLink(GridLink):
    """The same over a SuperLink, with one reply on the disk at a time, and without waiting for uploads."""

    may_lose = True  # what the SuperLink once handed out it does not hand out again, whether it arrived or not

    def __init__(self, grid: Any, folder: Path, largest: int) -> None:
        super().__init__(grid)
        self._largest = largest
        self._traffic, self._roster = Traffic(folder), Named(folder)
        self._nodes: dict[int, int] = {}  # by site
        self._arrived = folder / ".flwr" / "arrived.safetensors"  # the update of the newest reply
        self._arriving = deque[tuple[Asked, Any, Any]]()
        self._unsent = deque[Asked]()

    def sites(self) -> list[int]:
        there = self._roster.nodes(super().sites())
        self._nodes |= there
        return sorted(there)

    def name(self, site: int) -> str:
        return self._roster.name(site)

    def carried(self) -> Mapping[int, int]:
        return {self._roster.site(node): size for node, size in self._traffic.carried().items()}

    def _weights_of(self, question: Question) -> Path:
        return question.changes or super()._weights_of(question)

    def receive(self) -> Iterator[Reply]:
        self._forget_expired()
        for node in set(self._traffic.refused()) & set(self._nodes.values()):  # strangers may say any number
            yield Reply(self._roster.site(node), None, "it tried to send more than an update can be")
        while self._unsent:
            asked = self._unsent.popleft()
            yield Reply(asked.site, None, UNSENT, lost=True, question=asked.question)
        if self._asked:
            yield from self._look_for(list(self._asked))
        for _ in range(len(self._arriving)):
            asked, head, tree = arriving = self._arriving[0]
            try:
                reply = _lost(asked) if head.HasField("error") else self._pulled(asked, head.metadata.message_id, tree)
            except ObjectUnavailableError:
                reply = None
            self._arriving.popleft()
            if reply:
                yield reply
            # It is still being sent, which may take long; whoever counts what is carried gives it up in time.
            elif asked.question.exchange == self._exchange or asked.until > time.time():
                self._arriving.append(arriving)

    def _look_for(self, messages: Sequence[str]) -> Iterator[Reply]:
        """Take note of replies that were announced; of one that the SuperLink cannot hand out, that it is lost."""
        try:
            found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=messages))
        except HTTPStatusError:
            if len(messages) == 1:
                asked = self._asked.pop(messages[0])
                yield Reply(asked.site, None, "its reply cannot be handed out", lost=True, question=asked.question)
                return
            for message in messages:  # which of them it is
                yield from self._look_for([message])
            return
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            if head.metadata.reply_to_message_id in self._asked:
                self._arriving.append((self._asked.pop(head.metadata.reply_to_message_id), head, tree))

    def _send(
        self,
        contents: Sequence[RecordDict],
        sites: Sequence[int],
        question: Question,
        seconds: float,
        document: mmap | None = None,
    ) -> None:
        self._arrived.unlink(missing_ok=True)  # also that of the last round
        _give_back_memory()
        messages = [
            Message(content, self._nodes.get(site, site), MessageType.TRAIN, ttl=seconds)
            for site, content in zip(sites, contents, strict=True)
        ]
        with no_object_id_recompute():  # every id is a hash of all that it names
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
            trees = [get_object_tree(message) for message in messages]
            objects = [get_all_nested_objects(message) for message in messages]
        for site, message, tree, parts in zip(sites, messages, trees, objects, strict=True):
            asked = Asked(site, question, time.time() + seconds)
            try:  # each by itself: what the SuperLink does not take for one site ends no other's question
                self._push(message, tree, parts, document)
            except (HTTPStatusError, ObjectPushError):
                self._unsent.append(asked)
            else:
                self._asked[message.metadata.message_id] = asked

    def _push(self, message: Message, tree: Any, parts: Mapping[str, Any], document: mmap | None) -> None:
        """Hand one question to the SuperLink; what it has of another one is not sent again.

        Raises:
            HTTPStatusError, ObjectPushError: it does not take it.
        """
        run, client = self._grid.run.run_id, self._grid._runtime_client
        head = message_to_proto(remove_content_from_message(message))
        answer = client.PushMessages(PushAppMessagesRequest(messages_list=[head], message_object_trees=[tree]))
        if list(answer.message_ids) != [message.metadata.message_id]:  # e.g. for a node that has left
            raise ObjectPushError(message.metadata.message_id, run, answer.session_id)
        push = make_push_object_fn_protobuf(client.PushObject, self._grid.node, run, answer.session_id)
        for start in range(0, len(answer.objects_to_push), AT_ONCE):
            if document:  # what was read of the file is this process's memory until it says otherwise
                document.madvise(MADV_DONTNEED)
            push_objects({name: parts[name] for name in answer.objects_to_push[start : start + AT_ONCE]}, push)

    def _pulled(self, asked: Asked, message_id: str, tree: Any) -> Reply:
        """A reply that has arrived.

        Raises:
            ObjectUnavailableError: it has not, as a whole.
            OSError: e.g. a full disk; it can be pulled again, and what was written of it is gone.
        """
        self._arrived.unlink(missing_ok=True)
        run, client = self._grid.run.run_id, self._grid._runtime_client
        pull = make_pull_object_fn_protobuf(client.PullObject, self._grid.node, run)
        try:
            pull(message_id)  # mostly sent last, so the rest is there
            reply = _reply(asked, _inflate(tree, pull, self._largest, self._arrived).content, self._arrived)
        except OSError:
            self._arrived.unlink(missing_ok=True)
            raise
        except ObjectUnavailableError:
            raise
        except ObjectPullError:
            return Reply(asked.site, None, "its reply did not arrive whole", lost=True, question=asked.question)
        except Exception:  # a stranger's bytes may break anything in Flower's parsers
            return Reply(asked.site, None, "its reply cannot be read", question=asked.question)
        with suppress(HTTPStatusError):  # it stays in the SuperLink's database
            client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=message_id)
            )
        return reply


def _content(question: Question, weights: ArrayRecord | None = None) -> RecordDict:
    """What one site is asked; the nonce is for this site and this time, so that nobody else can tell any id of it."""
    plan = {
        **{"exchange": question.exchange, "wait": question.wait, "document": question.document},
        NONCE: [secrets.randbits(63), secrets.randbits(63)],
    }
    content = RecordDict({"plan": ConfigRecord(plan)})
    if weights is not None:
        content["weights"] = weights
    return content


def _inflate(tree: Any, pull: Callable[[str], bytes], largest: int, path: Path) -> Any:
    """An object of Flower's with its children, without the bytes of its one array, which go to a file as they come.

    The file must not exist.

    Raises:
        ValueError: not one array in a record, or one of more than `largest` bytes.
    """
    content = pull(tree.object_id)
    kind = inflatable_class_registry[get_object_type_from_object_content(content)]
    if kind in (Message, RecordDict, MetricRecord):
        return kind.inflate(content, {child.object_id: _inflate(child, pull, largest, path) for child in tree.children})
    if kind is not ArrayRecord:
        raise ValueError(f"{kind.__name__} has no place in a reply")
    (child,) = tree.children
    head = pull(child.object_id)
    about = json.loads(get_object_body(head, Array))
    names, written = get_object_children_ids_from_object_content(head), 0
    if len(about["arraychunk_ids"]) > -(-largest // CHUNK) + 1:  # each asks the SuperLink
        raise ValueError(f"more parts than {largest} bytes have")
    if path.exists():
        raise ValueError("more than one array")
    with path.open("wb") as file:
        for place in about["arraychunk_ids"]:
            written += _write_body(pull(names[place]), file)
            if written > largest:  # of which one chunk named often would do
                raise ValueError(f"more than {largest} bytes")
            _give_back_memory()
    empty = Array(str(about["dtype"]), tuple(about["shape"]), str(about["stype"]), b"")
    return ArrayRecord.inflate(content, {child.object_id: empty})


def _write_body(chunk: bytes, file: BinaryIO) -> int:
    return file.write(memoryview(chunk)[chunk.index(HEAD_BODY_DIVIDER) + 1 :])


def _give_back_memory() -> None:
    """Have glibc let go of what was freed: messages, and whole models after a round."""
    gc.collect(1)  # what holds the bytes of a response is a cycle
    with suppress(AttributeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)


def _lost(asked: Asked) -> Reply:
    return Reply(asked.site, None, LOST, lost=True, question=asked.question)


def _reply(asked: Asked, content: RecordDict, arrived: Path | None = None) -> Reply:
    parcel = _parcel(content, arrived)
    return Reply(asked.site, parcel, "" if parcel else "its reply is none of ours", question=asked.question)


def _parcel(content: RecordDict, arrived: Path | None = None) -> Parcel | None:
    """A reply as a parcel; None where its records are not the two that a site may send.

    Args:
        arrived: where the bytes of its update lie, if not in its record.
    """
    report, update = content.get("report"), content.get("update")
    if set(content) - {"report", "update"} or not isinstance(report, MetricRecord):
        return None
    said = {name: value for name, value in report.items() if name != NONCE}
    numbers = {name: value for name, value in said.items() if isinstance(value, int | float)}
    if len(numbers) != len(said):
        return None
    if update is None:
        return Parcel({}, numbers)
    if not isinstance(update, ArrayRecord) or set(update) != {"packed"} or update["packed"].stype != PACKED:
        return None
    try:
        return Parcel(Hashed(arrived) if arrived else unpack(update["packed"].data), numbers)
    except ValueError:
        return None
