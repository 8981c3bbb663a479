"""The audit log: one line for each message, each chained to the one before it by a hash, so that changes show.

Every line carries its `number`, counted from 1, and `previous`, the sha256 of the line before it without its newline;
where a loss of power tore lines, of everything from the last whole line up to here. Whoever may write the file can
write all of it anew, or cut off its end: only a hash that was noted elsewhere tells.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from ..run.runfolder import append_whole
from ..run.tensorfile import digest_of, layout_of
from .parcel import Parcel

AUDIT = "audit.jsonl"
FIRST = 64 * "0"
BLOCK = 2**16  # bytes read at a time


@dataclass(frozen=True)
class Message:
    """What is written down of a message, whichever way it goes."""

    bytes: int
    scalars: Mapping[str, int | float]
    arrays: Mapping[str, tuple[int, ...]]  # shapes by name
    sha256: str  # of the arrays' names and values


NOTHING = Message(0, {}, {}, hashlib.sha256().hexdigest())


def message_of(parcel: Parcel) -> Message:
    """The description of a parcel; one array is in memory at a time."""
    shapes = {name: shape for name, (_, shape) in sorted(layout_of(parcel.arrays).items())}
    scalars = {name: parcel.scalars[name] for name in sorted(parcel.scalars)}
    return Message(parcel.size(), scalars, shapes, digest_of(parcel.arrays))


def record(path: Path, direction: str, peer: str, round_number: int, verdict: str, message: Message = NOTHING) -> None:
    """Write down a message, or a decision on one, and do not return before it is on the disk.

    Args:
        direction: "in" or "out".

    Raises:
        OSError: e.g. a full disk; nothing was written.
    """
    about = {"direction": direction, "peer": peer, "round": round_number, "verdict": verdict}
    append(path, {"time": datetime.now(UTC).isoformat(timespec="seconds"), **about, **vars(message)})


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one chained line, whole or not at all; other processes may do so too. Raises as `record` does."""
    with path.open("a+b", buffering=0) as file, _locked(file, fcntl.LOCK_EX):
        number, previous, torn = _end(file, os.fstat(file.fileno()).st_size)
        text = json.dumps({"number": number, "previous": previous, **entry}, ensure_ascii=False, allow_nan=False)
        append_whole(file, b"\n" * torn + text.encode() + b"\n", synced=True)


@dataclass(frozen=True)
class Line:
    """A line as it lies in the file; `entry` is None where it cannot be read."""

    place: int  # counted from 1
    content: bytes  # without the newline
    has_end: bool
    entry: dict[str, Any] | None


def lines(path: Path) -> Iterator[Line]:
    """All lines that are there now, also one that was torn."""
    with path.open("rb") as file:
        with _locked(file, fcntl.LOCK_SH):  # no line is half written now
            left = os.fstat(file.fileno()).st_size
        for place, content in enumerate(file, start=1):
            if left <= 0:
                return
            left -= len(content)
            bare = content.removesuffix(b"\n")
            yield Line(place, bare, bare != content, _entry(bare))


@dataclass(frozen=True)
class Verdict:
    """What the chain says."""

    lines: int
    head: str  # what the next line would carry as `previous`
    unreadable: tuple[int, ...]  # lines that a loss of power tore, or that are older than the chain
    problem: str = ""  # names the first line that is not as it was written


@dataclass(frozen=True)
class _Link:
    """A whole line: where it is, where it was written, what it was written after, and what is before it now."""

    place: int
    number: int
    previous: str
    before: str
    since: int  # first of the lines that `before` covers


def verify(path: Path, noted: str | None = None) -> Verdict:
    """Whether all lines are as they were written and in their order. What was cut off at the end leaves no trace here.

    Args:
        noted: the head of an earlier look: where it is in the chain, nothing up to there was changed or cut off.
    """
    links, unreadable, heads, line = list[_Link](), list[int](), {FIRST}, None
    digest, since = hashlib.sha256(), 1
    for line in lines(path):
        if line.entry:
            before = digest.hexdigest() if line.place > 1 else FIRST
            links.append(_Link(line.place, line.entry["number"], line.entry["previous"], before, since))
            digest, since = hashlib.sha256(line.content), line.place
        else:
            unreadable.append(line.place)
            digest.update(line.content if line.place == 1 else b"\n" + line.content)
        heads.add(digest.hexdigest())
    problem = _first_problem(links, unreadable)
    if not problem and line and line.has_end and not line.entry:
        problem = f"line {line.place} was changed: it cannot be read, and it is not torn"
    if not problem and noted and noted not in heads:
        problem = f"no line has the hash {noted} that was noted: the end was cut off, or all of it was written anew"
    return Verdict(line.place if line else 0, digest.hexdigest() if line else FIRST, tuple(unreadable), problem)


def _first_problem(links: Sequence[_Link], unreadable: Sequence[int]) -> str:
    for index, link in enumerate(links):
        place, number = link.place, link.number
        if number > place and any(later.number == place for later in links[index:]):
            return f"line {place} is not in its order: it was written as line {number}"
        if number > place:
            return f"lines were removed before line {place}: it was written as line {number}"
        if number < place:
            return f"line {place} was inserted, or a line before it was: it was written as line {number}"
        if link.previous != link.before:
            following = links[index + 1 : index + 2]
            if place == 1 or (following and following[0].previous != following[0].before):
                return f"line {place} was changed: it does not fit the lines before and after it"
            changed = next((torn for torn in unreadable if link.since <= torn < place), place - 1)
            others = [str(other) for other in range(link.since, place + (not following)) if other != changed]
            either = f" (or line {', '.join(others)})" if others else ""
            return f"line {changed}{either} was changed after line {place} was chained to it"
    return ""


def _end(file: BinaryIO, size: int) -> tuple[int, str, bool]:
    """Number and `previous` of the next line, and whether the last one has no end."""
    for tail, whole in _tails(file, size):
        parts = tail.removesuffix(b"\n").split(b"\n")
        torn = not tail.endswith(b"\n")
        for back, part in enumerate(reversed(parts), start=1):
            entry = _entry(part) if whole or back < len(parts) else None  # the first part may be half of a line
            if entry:
                since = b"\n".join(parts[-back:])
                return entry["number"] + back, hashlib.sha256(since).hexdigest(), torn
        if whole:  # nothing in it was written here
            return len(parts) + 1, hashlib.sha256(b"\n".join(parts)).hexdigest(), torn
    return 1, FIRST, False


def _tails(file: BinaryIO, size: int) -> Iterator[tuple[bytes, bool]]:
    """The end of a file, longer each time, and whether it is all of it."""
    length = BLOCK
    while size:
        start = max(0, size - length)
        file.seek(start)
        tail = b""
        while len(tail) < size - start and (part := file.read(size - start - len(tail))):
            tail += part
        yield tail, start == 0
        length *= 4


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of the chain; None where it is none."""
    try:
        entry = json.loads(line)
        return entry if type(entry["number"]) is int and type(entry["previous"]) is str else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


@contextmanager
def _locked(file: BinaryIO, how: int) -> Iterator[None]:
    fcntl.flock(file, how)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
