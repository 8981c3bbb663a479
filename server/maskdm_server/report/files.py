"""Reads what runs leave, also while they write it: no line, picture or document of it is trusted to be whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import ValidationError

from maskdm.config import Frozen
from maskdm.run.runfolder import flatten

LONGEST_LINE = 2**26  # bytes


class Row(Frozen, extra="ignore"):
    """What is known of a line or a document; what a newer version added to it is passed over."""


R = TypeVar("R", bound=Frozen)


def parsed(kind: type[R], content: bytes) -> R | None:
    """JSON as a row; None where it is none."""
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        return None


def read_row(path: Path, kind: type[R]) -> R | None:
    """A JSON file as a row; None where it is missing or is none."""
    try:
        return parsed(kind, path.read_bytes())
    except OSError:
        return None


def read_rows(path: Path, kind: type[R]) -> tuple[list[R], int]:
    """All whole lines of a JSON-lines file, and how many of them cannot be read."""
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
    except OSError:
        return [], 0
    found = [parsed(kind, line) for line in whole.split(b"\n") if line]
    rows = [row for row in found if row is not None]
    return rows, len(found) - len(rows)


def read_settings(path: Path) -> dict[str, Any] | None:
    """A run's config.json under dotted names, without the folders that its images came from; None where it is none."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return (
        {name: _without_folder(v) for name, v in flatten(document).items()} if isinstance(document, Mapping) else None
    )


def _without_folder(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folder(part) for part in value]
    return f"…/{Path(value).name}" if isinstance(value, str) and value.startswith("/") else value


class LineTally(Protocol):
    """What lines add up to."""

    def take(self, line: bytes) -> None:
        """Count one more."""


T = TypeVar("T", bound=LineTally)


class Followed(Generic[T]):
    """Reads each line of a growing file once, however often it is looked at; a new file in its place starts anew."""

    def __init__(self, path: Path, tally: type[T]) -> None:
        self._path, self._new = path, tally
        self._tally, self._inode, self._position = tally(), 0, 0

    def now(self) -> T:
        """What all whole lines until now add up to."""
        try:
            file = self._path.open("rb")
        except OSError:
            return self._tally
        with file:
            about = self._path.stat()
            if about.st_ino != self._inode or about.st_size < self._position:
                self._tally, self._inode, self._position = self._new(), about.st_ino, 0
            file.seek(self._position)
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
                self._position += len(line)
                self._tally.take(line)
        return self._tally
