"""What happens in a federation: the kinds of lines of FED/events.jsonl, and what each says to people.

Some of them are also lines of rounds.jsonl and quality.jsonl, and result.json. Defaults are for folders of older
versions, which did not write the key.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from maskdm.config import Frozen
from maskdm.run import events
from maskdm.run.events import Event
from maskdm.run.reporting import say


class Compared(Frozen, extra="ignore"):
    """How an update that was let in lies to the others of its round."""

    norm_ratio: float  # its length by the usual one
    cosine: float | None = None  # to the mean direction of the others; None where there are none


class RoundLine(Frozen, extra="ignore"):
    """Of rounds.jsonl: what came of a round, and what all attempts at it cost."""

    round: int
    clients: int
    examples: int
    images_seen: int
    loss_before: float | None
    loss_after: float | None
    bytes_down: int
    bytes_up: int
    seconds: float
    rejected: int
    silent: int = 0
    late: int = 0
    attempts: int = 1
    updates: Mapping[str, Compared] = {}  # by site


class QualityLine(Frozen, extra="ignore"):
    """Of quality.jsonl: what sites found of the images that a model draws, compared with their own."""

    round: int  # 0: the prior
    images: int = 0  # that each site draws
    features: str = ""
    sampler: str = ""
    steps: int | None = None
    sites: int
    quality_images: int  # of all sites
    quality: Mapping[str, float]
    by_site: Mapping[str, Mapping[str, int | float | None]] = {}
    bytes_down: int = 0
    bytes_up: int = 0


class Result(Frozen, extra="ignore"):
    """Of result.json."""

    rounds: int
    model_of_round: int
    stopped_by_patience: int = 0
    clients: int
    loss_prior: float | None
    loss_final: float | None
    quality_prior: Mapping[str, Any] | None = None  # lines of quality.jsonl
    quality_final: Mapping[str, Any] | None = None
    bytes_down: int
    bytes_up: int


class Trouble(Event):
    """What a report lists as having gone wrong."""


class RoundsBegun(Event):
    """The rounds begin, or begin again."""

    event: Literal["start"] = "start"
    round: int  # done before
    bytes_down: int  # to a site at first
    bytes_down_later: int
    bytes_up: int

    def words(self) -> str:
        first = f"{self.bytes_down / 1e6:.1f} MB to a client at first, then "
        return (
            f"each round sends {first if self.bytes_down_later < self.bytes_down else ''}"
            f"{self.bytes_down_later / 1e6:.1f} MB to a client and gets {self.bytes_up / 1e6:.1f} MB back; "
            f"{self.round} rounds done before"
        )


class SitesAwaited(Event):
    """Too few sites are there."""

    event: Literal["waiting"] = "waiting"
    clients: int
    needed: int

    def words(self) -> str:
        return f"{self.clients} of {self.needed} clients are there; waiting"


class PlanSent(Event):
    """Sites were asked, these or more of them."""

    event: Literal["sent"] = "sent"
    round: int
    rounds: int
    exchange: int = 0
    clients: int  # that were asked until now
    action: str

    def words(self) -> str:
        if self.action == "train":
            return f"round {self.round}/{self.rounds}: {self.clients} clients at work"
        return f"{self.clients} clients evaluate a model" if self.action == "evaluate" else ""


class ModelEvaluated(QualityLine, Event):
    """Sites evaluated a model."""

    event: Literal["quality"] = "quality"

    def words(self) -> str:
        """Headed by the kernel distance, which small numbers of images do not bias."""
        model = f"the model of round {self.round}" if self.round else "the prior"
        if not self.sites:
            return f"WARNING: no site evaluated {model}: each one's own log says why"
        figures = dict(self.quality)
        headline = f"kernel distance {figures.pop('kernel'):.4g}, " if "kernel" in figures else ""
        rest = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        return (
            f"{model}: {headline}{rest} between {self.images:,} drawn images and "
            f"{self.quality_images:,} held out at {self.sites} sites"
        )


class ReplyRejected(Trouble):
    """A site's reply does not count."""

    event: Literal["rejected"] = "rejected"
    round: int
    site: str
    reason: str

    def words(self) -> str:
        return f"round {self.round}: the reply of site {self.site} was rejected: {self.reason}"


class ReplyLate(Trouble):
    """A reply to an earlier exchange came."""

    event: Literal["late"] = "late"
    round: int
    site: str

    def words(self) -> str:
        return f"round {self.round}: a reply of site {self.site} to an earlier question was dropped"


class SiteAtWork(Event):
    """A site says how far it is."""

    event: Literal["working"] = "working"
    round: int
    site: str
    images: int
    all: int  # of all sites in this exchange

    def words(self) -> str:
        return f"round {self.round}: site {self.site} is at {self.images:,} images, all at {self.all:,}"


class SiteSilent(Trouble):
    """A site made no progress, or is gone."""

    event: Literal["silent"] = "silent"
    round: int
    site: str
    reason: str

    def words(self) -> str:
        return f"round {self.round}: site {self.site} is not waited for any more: {self.reason}"


class SiteRests(Trouble):
    """A site failed too often to be asked in the next rounds."""

    event: Literal["rests"] = "rests"
    round: int
    site: str
    until: int  # the first round in which it is asked again

    def words(self) -> str:
        return f"site {self.site} failed again and again; it is left alone until round {self.until}"


class UpdateAgainst(Trouble):
    """An update that was let in points against the others."""

    event: Literal["against"] = "against"
    round: int
    site: str
    norm_ratio: float
    cosine: float

    def words(self) -> str:
        return (
            f"round {self.round}: the update of site {self.site} points against those of the others "
            f"(cosine {self.cosine:.2f}, {self.norm_ratio:.2g} times the usual length) and was let in"
        )


class RoundRepeated(Trouble):
    """Too few updates came in an attempt at a round."""

    event: Literal["retry"] = "retry"
    round: int
    attempt: int
    accepted: int
    needed: int

    def words(self) -> str:
        return f"round {self.round}: {self.accepted} usable updates, {self.needed} needed; trying again"


class _OfRounds(Event):
    """So that the key comes first in the line."""

    rounds: int


class RoundDone(RoundLine, _OfRounds):
    """A round counts."""

    event: Literal["round"] = "round"

    def words(self) -> str:
        return (
            f"round {self.round}/{self.rounds}: held-out loss {_loss(self.loss_before)} → {_loss(self.loss_after)} "
            f"at {self.clients} clients, {self.images_seen:,} images, {self.seconds:.0f} s, "
            f"{self.bytes_up / 1e6:.1f} MB up"
        )


class FederationFinished(Result, Event):
    """All rounds are done, and the sites have the final model."""

    event: Literal["finished"] = "finished"

    def words(self) -> str:
        if not self.clients:
            return "WARNING: no client was there at the end: the final model was not measured, and none of them has it"
        return f"held-out loss: prior {_loss(self.loss_prior)} → final {_loss(self.loss_final)}"


class DiskFull(Trouble):
    """Room is waited for."""

    event: Literal["disk full"] = "disk full"
    round: int
    seconds: float

    def words(self) -> str:
        return f"round {self.round}: the disk is full; make room within {self.seconds / 60:.0f} minutes"


class RoundsCrashed(Trouble):
    """The process that runs the rounds ended by a fault of its own, and is started again."""

    event: Literal["crashed"] = "crashed"
    reason: str

    def words(self) -> str:
        return f"the process that runs the rounds failed: {self.reason}"


class RoundsFailed(Event):
    """The federation cannot go on; whoever watches raises it as an error, so that it has no words here."""

    event: Literal["failed"] = "failed"
    reason: str


AnyEvent = Annotated[
    RoundsBegun
    | SitesAwaited
    | PlanSent
    | ModelEvaluated
    | ReplyRejected
    | ReplyLate
    | SiteAtWork
    | SiteSilent
    | SiteRests
    | UpdateAgainst
    | RoundRepeated
    | RoundDone
    | FederationFinished
    | DiskFull
    | RoundsCrashed
    | RoundsFailed,
    Field(discriminator="event"),
]
KINDS: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def known(lines: Iterable[Mapping[str, Any]]) -> Iterator[Event]:
    """Those lines of events.jsonl whose kind this version knows."""
    return (event for line in lines if (event := events.parsed(KINDS, line)))


def tell(event: Event) -> None:
    """Say what happened, if it is worth a line."""
    if line := event.words():
        say(line)


def _loss(value: float | None) -> str:
    return "untold" if value is None else f"{value:.4f}"
