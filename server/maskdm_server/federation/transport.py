"""What the rounds need of a transport, so that they run over Flower, in one process, or in a test."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maskdm.federated.parcel import Parcel


@dataclass(frozen=True)
class Question:
    """A plan with its weights; or, without a document, how far the work on it is."""

    exchange: int
    wait: float  # seconds after which a site that is still at work says so
    document: str = ""
    weights: Path | None = None  # of a safetensors file, which goes down as it is
    changes: Path | None = None  # what of `weights` training changes, enough for a site that has the rest


@dataclass(frozen=True)
class Reply:
    """What came back from a site. `parcel` is None where `problem` says what went wrong on the way."""

    site: int
    parcel: Parcel | None
    problem: str = ""
    lost: bool = False  # the site may come back
    question: Question | None = None  # that it answers, where the transport knows


class Link(Protocol):
    """A way to reach sites."""

    may_lose: bool  # whether a message can be lost without a word

    def sites(self) -> Sequence[int]:
        """Sites that are there now."""

    def name(self, site: int) -> str:
        """What a site is called where people read of it: the name in its kit, or its number."""

    def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
        """Send a question to each site; it is void after so many seconds."""

    def receive(self) -> Iterator[Reply]:
        """Replies that arrived since the last call; does not wait.

        One at a time is held, in memory or on the disk: its arrays may be gone when the next one is asked for.

        Raises:
            OSError: e.g. a full disk; what arrived is still there for the next call.
        """

    def carried(self) -> Mapping[int, int]:
        """Bytes carried from and to each site until now: a slow upload is progress too."""
