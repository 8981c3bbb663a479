"""Parcels over any Grid of Flower's, as Flower itself carries them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message, MessageType, RecordDict

from maskdm.federated.flower_records import packed_record, parcel_in, question_records

from ..federation.transport import Question, Reply

LOST = "the site was lost or its work failed"


class Pending(NamedTuple):
    """Who was asked what, and until when an answer counts."""

    site: int
    question: Question
    until: float


class GridLink:
    """Parcels over any Grid of Flower's, e.g. that of its simulation."""

    may_lose = False

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._asked: dict[str, Pending] = {}  # by message
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
            self._send([asking(question) for _ in sites], sites, question, seconds)
            return
        with self._weights_of(question).open("rb") as file:
            document = mmap(file.fileno(), 0, access=ACCESS_READ)
        weights = packed_record(memoryview(document))  # read from the file as it goes
        self._send([asking(question, weights) for _ in sites], sites, question, seconds, document)

    def receive(self) -> Iterator[Reply]:
        self._forget_expired()
        for message in self._grid.pull_messages(list(self._asked)) if self._asked else ():
            asked = self._asked.pop(message.metadata.reply_to_message_id)
            yield lost_reply(asked) if message.has_error() else read_reply(asked, message.content)

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
        messages = self._messages(contents, sites, seconds)
        for site, message in zip(sites, self._grid.push_messages(messages), strict=True):
            self._asked[message] = Pending(site, question, time.time() + seconds)

    def _messages(self, contents: Sequence[RecordDict], sites: Sequence[int], seconds: float) -> list[Message]:
        return [
            Message(content, self._node_of(site), MessageType.TRAIN, ttl=seconds)
            for site, content in zip(sites, contents, strict=True)
        ]

    def _node_of(self, site: int) -> int:
        return site

    def _forget_expired(self) -> None:
        now = time.time()
        self._asked = {message: asked for message, asked in self._asked.items() if asked.until > now}


def asking(question: Question, weights: ArrayRecord | None = None) -> RecordDict:
    """Records of a question for one site; no two have the same ids."""
    return question_records(question.exchange, question.wait, question.document, weights)


def lost_reply(asked: Pending) -> Reply:
    """The site may come back."""
    return Reply(asked.site, None, LOST, lost=True, question=asked.question)


def read_reply(asked: Pending, content: RecordDict, arrived: Path | None = None) -> Reply:
    """What came back; `arrived` holds the bytes of its update, if they are not in its record.

    Raises:
        OSError: that file cannot be read.
    """
    parcel = parcel_in(content, arrived)
    return Reply(asked.site, parcel, "" if parcel else "its reply is none of ours", question=asked.question)
