"""FED/events.jsonl → what went wrong and when, and where the federation stands now."""

import re
from collections import Counter, deque
from dataclasses import dataclass

from pydantic import ValidationError

from maskdm.run.events import parsed

from ..federation import events
from .files import Row

KEPT = 200  # of the newest faults
MOST_REASONS = 1000  # different ones that are counted


class When(Row):
    """Of any line of the file, seconds since 1970."""

    time: float


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
            time, event = When.model_validate_json(line).time, parsed(events.KINDS, line)
            if event:
                self._take(event, time)
        except (ValidationError, OverflowError):
            self.unreadable += bool(line.strip())
            return
        self.begun, self.ended = self.begun or time, time

    def _take(self, event: events.AnyEvent, time: float) -> None:
        match event:
            case events.RoundsBegun():
                self.starts += 1
                self.failure = self.waiting = self.at_work = None
                if self.starts > 1:
                    self._count("began again", time, f"the rounds began again after round {event.round}")
            case events.SitesAwaited():
                self.waiting = event.clients, event.needed
            case events.PlanSent(action="train"):
                self.waiting, self.at_work = None, (event.round, event.clients, 0)
            case events.SiteAtWork() if self.at_work:
                self.at_work = *self.at_work[:2], event.all
            case events.RoundDone() | events.FederationFinished():
                self.waiting = self.at_work = None
            case events.RoundsFailed():
                self.failure = event.reason
                self._count(event.event, time, event.reason)
            case events.ReplyRejected():
                if len(self.reasons) < MOST_REASONS:
                    self.reasons[re.sub(r"\d[\d.,e+-]*", "…", event.reason)] += 1
                self._count(event.event, time, event.words())
            case events.Trouble():
                self._count(event.event, time, event.words())

    def _count(self, kind: str, time: float, words: str) -> None:
        self.counted[kind] += 1
        newest = self.faults[-1] if self.faults else None
        if newest and (newest.kind, newest.words) == (kind, words):
            self.faults[-1] = Fault(newest.first, time, kind, words, newest.times + 1)
        else:
            self.faults.append(Fault(time, time, kind, words))
