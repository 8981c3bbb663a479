"""FED/audit.jsonl → which site took part in which round, and what came of it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from .files import Row, parsed

LAST_ROUND = 100_000


class Participation(IntEnum):
    """What a site did in a round."""

    NONE = 0  # it was not asked: away, resting, or not drawn
    ASKED = 1  # no answer until now
    ACCEPTED = 2
    REJECTED = 3
    SILENT = 4


class AuditEntry(Row):
    """What is used of a line of an audit log."""

    direction: Literal["in", "out"]
    peer: str
    round: int
    verdict: str
    bytes: int
    scalars: Mapping[str, int | float]


@dataclass
class SiteHistory:
    """Of one site: its part in each round, and sums over the rounds that counted."""

    parts: bytearray = field(default_factory=bytearray)  # by round
    training: bool = False  # whether it was last asked to train
    images: int = 0
    newest_images: int = 0
    bytes_up: int = 0
    loss_before: float | None = None  # of the newest update that was accepted
    loss_after: float | None = None

    def part(self, number: int) -> Participation:
        """In a round."""
        return Participation(self.parts[number]) if number < len(self.parts) else Participation.NONE

    def times(self, part: Participation) -> int:
        """In how many rounds it did so."""
        return self.parts.count(part)

    def asked(self) -> int:
        """In how many rounds it was asked to train."""
        return len(self.parts) - self.times(Participation.NONE)

    def put(self, number: int, part: Participation) -> None:
        """Note its part in a round; another attempt at the round replaces it."""
        if number >= len(self.parts):
            self.parts.extend(bytes(number + 1 - len(self.parts)))
        if self.parts[number] == Participation.ACCEPTED:
            self.images -= self.newest_images
        self.parts[number] = part


class Sites:
    """All sites by name, in the order in which they came, and how many messages had which verdict."""

    def __init__(self) -> None:
        self.by_name: dict[str, SiteHistory] = {}
        self.verdicts: Counter[tuple[str, str]] = Counter()  # direction and kind of verdict
        self.unreadable = 0

    def take(self, line: bytes) -> None:
        """Count one line of the log."""
        entry = parsed(AuditEntry, line)
        if entry is None or not 0 <= entry.round <= LAST_ROUND:
            self.unreadable += bool(line.strip())
            return
        kind, _, what = entry.verdict.partition(":")
        self.verdicts[entry.direction, entry.verdict if kind == "sent" else kind] += 1
        site = self.by_name.setdefault(entry.peer, SiteHistory())
        if entry.direction == "out":
            if kind == "sent":
                site.training = what.strip() == "train"
                if site.training:
                    site.put(entry.round, Participation.ASKED)
            return
        site.bytes_up += entry.bytes
        if not site.training:
            return
        if kind == "accepted":
            site.put(entry.round, Participation.ACCEPTED)
            site.newest_images = int(entry.scalars.get("images_seen", 0))
            site.images += site.newest_images
            site.loss_before, site.loss_after = entry.scalars.get("loss_before"), entry.scalars.get("loss_after")
        elif kind in ("rejected", "silent"):
            site.put(entry.round, Participation.REJECTED if kind == "rejected" else Participation.SILENT)
