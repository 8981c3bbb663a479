"""Parcels over a SuperLink, object by object.

Flower's own push holds every message twice, its pull every reply of a round three times, and both wait for the slowest
link. `StreamingLink` goes through the same calls of Flower's Runtime API with one reply on the disk at a time.
"""

import ctypes
import gc
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from mmap import MADV_DONTNEED, mmap
from pathlib import Path
from typing import Any, BinaryIO

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
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

from maskdm.errors import FederationError
from maskdm.federated.flower_names import without

from ..door.door import CHUNK
from ..door.private_names import GRID
from ..door.traffic import Traffic
from ..federation.transport import Question, Reply
from .grid import GridLink, Pending, lost_reply, read_reply
from .roster import Named

AT_ONCE = 2  # objects whose bytes are in memory while they are sent
UNSENT = "its question could not be handed to the SuperLink"


class StreamingLink(GridLink):
    """The same over a SuperLink, with one reply on the disk at a time, and without waiting for uploads."""

    may_lose = True  # what the SuperLink once handed out it does not hand out again, whether it arrived or not

    def __init__(self, grid: Any, folder: Path, largest: int) -> None:
        """Carry the questions of a federation.

        Args:
            grid: of a run over a SuperLink.
            folder: of the federation.
            largest: bytes of an update.

        Raises:
            FederationError: the installed Flower hands out another Grid than is known here.
        """
        super().__init__(grid)
        absent = [f"{type(grid).__name__}.{name}" for name in GRID if not hasattr(grid, name)]
        if absent:
            raise FederationError(without(*absent))
        self._largest = largest
        self._traffic, self._roster = Traffic(folder), Named(folder)
        self._nodes: dict[int, int] = {}  # by site
        self._arrived = folder / ".flwr" / "arrived.safetensors"  # the update of the newest reply
        self._arriving = deque[tuple[Pending, Any, Any]]()
        self._unsent = deque[Pending]()

    def sites(self) -> list[int]:
        there = self._roster.nodes(super().sites())
        self._nodes |= there
        return sorted(there)

    def name(self, site: int) -> str:
        return self._roster.name(site)

    def carried(self) -> Mapping[int, int]:
        return {self._roster.site(node): size for node, size in self._traffic.carried().items()}

    def _node_of(self, site: int) -> int:
        return self._nodes.get(site, site)

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
                reply = (
                    lost_reply(asked) if head.HasField("error") else self._pulled(asked, head.metadata.message_id, tree)
                )
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
        messages = self._messages(contents, sites, seconds)
        with no_object_id_recompute():  # every id is a hash of all that it names
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
            trees = [get_object_tree(message) for message in messages]
            objects = [get_all_nested_objects(message) for message in messages]
        for site, message, tree, parts in zip(sites, messages, trees, objects, strict=True):
            asked = Pending(site, question, time.time() + seconds)
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

    def _pulled(self, asked: Pending, message_id: str, tree: Any) -> Reply:
        """A reply that has arrived.

        Raises:
            ObjectUnavailableError: it has not, as a whole.
            OSError: e.g. a full disk; it can be pulled again, and what was written of it is gone.
        """
        self._arrived.unlink(missing_ok=True)
        run, client = self._grid.run.run_id, self._grid._runtime_client
        pull = _carried(make_pull_object_fn_protobuf(client.PullObject, self._grid.node, run))
        try:
            pull(message_id)  # mostly sent last, so the rest is there
            reply = read_reply(asked, _inflate(tree, pull, self._largest, self._arrived).content, self._arrived)
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


def _carried(pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """The same, where what breaks on the way, e.g. as the SuperLink is started again, is nothing that a site did."""

    def carried(object_id: str) -> bytes:
        try:
            return pull(object_id)
        except (ObjectUnavailableError, ObjectPullError):
            raise
        except Exception as error:
            raise ObjectPullError(object_id, f"{type(error).__name__}: {error}") from error

    return carried


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
