"""Files between Flower's ClientApp, which lives for one message, and the worker, which lives as long as the site.

The worker keeps its network and goes on training whatever happens to the connection; a ClientApp leaves a request,
waits a while, and takes the reply or news of how far it is. Every file is whole or not there. No PyTorch here: a
ClientApp should start fast.
"""

import json
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskdm.federated.parcel import Outcome, Parcel
from maskdm.run.runfolder import atomic_write, write_json
from maskdm.run.tensorfile import Arrays, Document, chunks, layout_of, unpack

POLL_SECONDS = 0.1
# Exchange, length of the text, key: all that is looked at while waiting.
HEAD = struct.Struct("<QQ64s")
ALIGNMENT = 64  # of what follows the text, whose arrays are used where they lie


@dataclass(frozen=True)
class Request:
    """A plan as it came, with its weights as they came."""

    exchange: int
    document: str
    weights: Document  # in the file that they lie in, which a newer request replaces but does not change


class Mailbox:
    """One request at a time; a newer one replaces it."""

    def __init__(self, site: Path) -> None:
        folder = site / "work"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._request, self._reply, self._progress = (
            folder / name for name in ("request.bin", "reply.bin", "progress.json")
        )

    def ask(self, exchange: int, document: str, weights: bytes) -> None:
        """Leave a request for the worker, unless it is the one that lies there and was not found wanting."""
        wanting = self._is_unknown(exchange)
        if self.asked() == exchange and not wanting:
            return
        _write(self._request, exchange, "", document, [weights])
        if wanting:  # last, so that what lay there is not worked on once more
            self._reply.unlink()

    def asked(self) -> int | None:
        """The exchange of the request that lies there."""
        found = _read(self._request)
        return found and found.exchange

    def request(self) -> Request | None:
        """The request that lies there."""
        found = _read(self._request, text=True, body=True)
        return found and Request(found.exchange, found.text, found.body)

    def reply(self, exchange: int, key: str, parcel: Parcel) -> None:
        """Leave what may leave the site, as the gate released it."""
        arrays = parcel.arrays
        body = chunks(layout_of(arrays), arrays.__getitem__) if arrays else ()
        _write(self._reply, exchange, key, json.dumps(dict(parcel.scalars)), body)

    def replied(self) -> tuple[int, str] | None:
        """Exchange and key of the reply that lies there."""
        found = _read(self._reply)
        return found and (found.exchange, found.key)

    def take_reply(self) -> tuple[int, Parcel]:
        """The reply that lies there, and its exchange."""
        found = _read(self._reply, text=True, body=True)
        assert found is not None
        arrays: Arrays = unpack(found.body) if len(found.body) else {}
        return found.exchange, Parcel(arrays, json.loads(found.text))

    def is_over(self) -> bool:
        """Whether the last request was to take the final model, and was answered well: only then it has a key."""
        request, replied = _read(self._request, text=True), self.replied()
        if not request or not replied or replied[0] != request.exchange or not replied[1]:
            return False
        return bool(json.loads(request.text)["action"] == "finish")

    def _is_unknown(self, exchange: int) -> bool:
        """Whether the reply that lies there asks for the work of an exchange once more."""
        found = _read(self._reply, text=True)
        return bool(found and found.exchange == exchange and json.loads(found.text).get("outcome") == Outcome.UNKNOWN)

    def wait(self, exchange: int, seconds: float) -> Parcel | None:
        """The reply of an exchange, or None where the worker needs longer than that."""
        deadline = time.monotonic() + seconds
        while True:
            replied = self.replied()
            if replied and replied[0] == exchange:
                answered, parcel = self.take_reply()
                if answered == exchange:  # no newer one took its place meanwhile
                    return parcel
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)

    def progressed(self, exchange: int, round_number: int, images: int) -> None:
        """Say how far the work is."""
        write_json(self._progress, {"exchange": exchange, "round": round_number, "images": images})

    def progress(self, exchange: int) -> tuple[int, int]:
        """Round and images of the work on an exchange; (1, 0) before there is any."""
        try:
            found = json.loads(self._progress.read_text())
            return (found["round"], found["images"]) if found["exchange"] == exchange else (1, 0)
        except (OSError, ValueError, KeyError):
            return 1, 0


class _Found(NamedTuple):
    exchange: int
    key: str
    text: str
    body: Document


def _write(path: Path, exchange: int, key: str, text: str, body: Iterable[bytes | memoryview]) -> None:
    encoded = text.encode()
    gap = bytes(_body_at(len(encoded)) - HEAD.size - len(encoded))
    atomic_write(path, chain([HEAD.pack(exchange, len(encoded), key.encode()), encoded, gap], body))


def _body_at(length: int) -> int:
    return -(-(HEAD.size + length) // ALIGNMENT) * ALIGNMENT


def _read(path: Path, *, text: bool = False, body: bool = False) -> _Found | None:
    """The head of a file, and what else is wanted of it."""
    try:
        with path.open("rb") as file:
            exchange, length, key = HEAD.unpack(file.read(HEAD.size))
            written = file.read(length).decode() if text else ""
            there = body and os.fstat(file.fileno()).st_size > _body_at(length)
            document = np.memmap(file, np.uint8, "r", _body_at(length)).data if there else b""
            return _Found(exchange, key.rstrip(b"\0").decode(), written, document)
    except FileNotFoundError:
        return None
