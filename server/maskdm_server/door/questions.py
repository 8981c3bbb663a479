"""What the rounds asked until now, as the names of its objects: no reply may name one of them with other parts.

Flower names an object by its content, and takes whoever names it first at their word what its parts are. A site that
was sent a model could name the model's objects, once they are gone, with parts that are none; then the same model could
not be sent any more. What a site was not sent it cannot name, because each question has a number of its own in it.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from maskdm.run.runfolder import append_whole

from .trees import Children

ASKED = "asked.ids"  # a SuperLink that is started again reads what was asked before
RECORD = 32  # bytes: half of them for the name, half for its parts


class Questions:
    """Names that are taken, each with its parts; both as half of a SHA-256."""

    def __init__(self, folder: Path) -> None:
        self._path, self._parts = folder / ASKED, dict[bytes, bytes]()
        with suppress(FileNotFoundError):
            known = self._path.read_bytes()
            for place in range(0, len(known) - RECORD + 1, RECORD):
                record = known[place : place + RECORD]
                self._parts[record[: RECORD // 2]] = record[RECORD // 2 :]

    def remember(self, objects: Mapping[bytes, Children]) -> None:
        """Take in the objects of a question; where the disk is full, as long as this process lives."""
        new = {name: parts for name, parts in _shortened(objects).items() if name not in self._parts}
        self._parts |= new
        with suppress(OSError), self._path.open("ab", buffering=0) as file:
            append_whole(file, b"".join(name + parts for name, parts in new.items()))

    def are_changed_by(self, objects: Mapping[bytes, Children]) -> bool:
        """Whether a reply names an object of a question with other parts."""
        return any(self._parts.get(name, parts) != parts for name, parts in _shortened(objects).items())


def _shortened(objects: Mapping[bytes, Children]) -> dict[bytes, bytes]:
    return {_short(name): _short(b"".join(sorted(parts))) for name, parts in objects.items()}


def _short(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[: RECORD // 2]
