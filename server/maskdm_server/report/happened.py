"""FED/events.jsonl → what went wrong and when, and where the federation stands now."""

import json
import re
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from ..federation.events import described

FAULTS = ("rejected", "against", "silent", "late", "rests", "retry", "disk full", "crashed", "failed")
KEPT = 200  # of the newest faults
MOST_REASONS = 1000  # different ones that are counted


@dataclass(frozen=True)
class Fault:
    """Something that went wrong, `times` times in a row."""

    first: float  # seconds since 1970
    last: float
    kind: str
    words: str
    times: int = 1


class Happened:
    """What the events until now add up to."""

    def __init__(self) -> None:
        self.faults: deque[Fault] = deque(maxlen=KEPT)
        self.counted: Counter[str] = Counter()  # faults by kind
        self.reasons: Counter[str] = Counter()  # of rejections, numbers left out
        self.begun = self.ended = 0.0  # first and newest event, seconds since 1970
        self.starts = 0
        self.failure: str | None = None  # why the rounds ended, unless they began again
        self.waiting: tuple[int, int] | None = None  # sites there and needed
        self.at_work: tuple[int, int, int] | None = None  # round, sites asked, images seen in it
        self.unreadable = 0

    def take(self, line: bytes) -> None:
        """Count one line of the file."""
        try:
            event = json.loads(line)
            self._take(str(event["event"]), float(event["time"]), event)
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError, OverflowError):
            self.unreadable += bool(line.strip())

    def _take(self, kind: str, time: float, event: dict[str, Any]) -> None:
        words = event["reason"] if kind == "failed" else described(event)
        if kind in FAULTS:
            self._count(kind, time, str(words))
        if kind == "rejected" and len(self.reasons) < MOST_REASONS:
            self.reasons[re.sub(r"\d[\d.,e+-]*", "…", str(event["reason"]))] += 1
        if kind == "start":
            self.starts += 1
            self.failure = self.waiting = self.at_work = None
            if self.starts > 1:
                self._count("began again", time, f"the rounds began again after round {int(event['round'])}")
        elif kind == "failed":
            self.failure = str(words)
        elif kind == "waiting":
            self.waiting = int(event["clients"]), int(event["needed"])
        elif kind == "sent" and event["action"] == "train":
            self.waiting, self.at_work = None, (int(event["round"]), int(event["clients"]), 0)
        elif kind == "working" and self.at_work:
            self.at_work = *self.at_work[:2], int(event["all"])
        elif kind in ("round", "finished"):
            self.waiting = self.at_work = None
        self.begun, self.ended = self.begun or time, time

    def _count(self, kind: str, time: float, words: str) -> None:
        self.counted[kind] += 1
        newest = self.faults[-1] if self.faults else None
        if newest and (newest.kind, newest.words) == (kind, words):
            self.faults[-1] = Fault(newest.first, time, kind, words, newest.times + 1)
        else:
            self.faults.append(Fault(time, time, kind, words))
