"""Files between Flower's ClientApp, which lives for one message, and the worker, which lives as long as the site.

The worker keeps its network and goes on training whatever happens to the connection; a ClientApp leaves a request,
waits a while, and takes the reply or news of how far it is. Every file is whole or not there. No PyTorch here: a
ClientApp should start fast.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdm.parcel import Parcel
from maskdm.runfolder import atomic_write, write_json
from maskdm.tensorfile import Arrays, chunks, layout_of, unpack

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Request:
    """A plan as it came, with its weights as they came."""

    exchange: int
    document: str
    weights: memoryview


class Mailbox:
    """One request at a time; a newer one replaces it."""

    def __init__(self, site: Path) -> None:
        folder = site / "work"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._request, self._reply, self._progress = (
            folder / name for name in ("request.bin", "reply.bin", "progress.json")
        )

    def ask(self, exchange: int, document: str, weights: bytes) -> None:
        """Leave a request for the worker, unless it is the one that lies there."""
        if self.asked() != exchange:
            _write(self._request, {"exchange": exchange, "document": document}, [weights])

    def asked(self) -> int | None:
        """The exchange of the request that lies there."""
        head = _head(self._request)
        return None if head is None else int(head["exchange"])

    def request(self) -> Request | None:
        """The request that lies there."""
        found = _read(self._request)
        return None if found is None else Request(int(found[0]["exchange"]), str(found[0]["document"]), found[1])

    def reply(self, exchange: int, key: str, parcel: Parcel) -> None:
        """Leave what may leave the site, as the gate released it."""
        head = {"exchange": exchange, "key": key, "scalars": dict(parcel.scalars)}
        arrays = parcel.arrays
        _write(self._reply, head, chunks(layout_of(arrays), arrays.__getitem__) if arrays else ())

    def replied(self) -> tuple[int, str] | None:
        """Exchange and key of the reply that lies there."""
        head = _head(self._reply)
        return None if head is None else (int(head["exchange"]), str(head["key"]))

    def take_reply(self) -> tuple[int, Parcel]:
        """The reply that lies there, and its exchange."""
        found = _read(self._reply)
        assert found is not None
        arrays: Arrays = unpack(found[1]) if len(found[1]) else {}
        return int(found[0]["exchange"]), Parcel(arrays, found[0]["scalars"])

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


def _write(path: Path, head: dict[str, Any], body: Iterable[bytes | memoryview]) -> None:
    text = json.dumps(head).encode()

    def pieces() -> Iterable[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        # What follows begins where arrays of every type may begin.
        yield b"\0" * (-(8 + len(text)) % 8)
        yield from body

    atomic_write(path, pieces())


def _head(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return dict(json.loads(file.read(length)))
    except FileNotFoundError:
        return None


def _read(path: Path) -> tuple[dict[str, Any], memoryview] | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    return json.loads(data[8:start]), memoryview(data)[start + -start % 8 :]
