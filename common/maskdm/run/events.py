"""What happens in a run, each event a line of its events.jsonl: what an event is, and how one is written and read."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..config import Frozen
from .runfolder import append_line

EVENTS = "events.jsonl"


class Event(Frozen, extra="ignore", defer_build=True):
    """A class for each kind, made ready when one first happens; what a newer version adds to it is passed over."""

    event: str  # its kind

    def words(self) -> str:
        """What it says to a person; empty where it is of no interest to one."""
        return ""


def append_event(folder: Path, event: Event) -> None:
    """Write an event into a run's folder, with the keys that it was given.

    Raises:
        OSError: e.g. a full disk.
    """
    given = event.model_dump(mode="json", include=event.model_fields_set | {"event"})
    append_line(folder / EVENTS, {"time": time.time(), **given})


E = TypeVar("E")


def parsed(kinds: TypeAdapter[E], line: bytes | Mapping[str, Any]) -> E | None:
    """A line as an event, one of `kinds` by its key `event`; None for a kind of a newer version.

    Raises:
        ValidationError: it is damaged.
    """
    try:
        return kinds.validate_json(line) if isinstance(line, bytes) else kinds.validate_python(line)
    except ValidationError as error:
        if error.errors(include_input=False, include_url=False)[0]["type"] == "union_tag_invalid":
            return None
        raise
