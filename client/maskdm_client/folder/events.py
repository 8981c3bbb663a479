"""What happens at a site: the kinds of lines of its events.jsonl, and what each says to people."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from maskdm.run.events import Event, append_event, parsed


class WorkSuperseded(Event):
    """The coordinator asks for something newer."""

    event: Literal["superseded"] = "superseded"
    round: int

    def words(self) -> str:
        return f"round {self.round}: the server asks for something newer; this work is dropped"


class DataFound(Event):
    """The site's images were read."""

    event: Literal["data"] = "data"
    summary: str
    train: int
    held_out: int

    def words(self) -> str:
        return f"{self.summary}; training on {self.train:,}, held out {self.held_out:,}"


class DataDoubtful(Event):
    """The site's images differ from what the prior learned from."""

    event: Literal["data warning"] = "data warning"
    reason: str

    def words(self) -> str:
        return f"WARNING: {self.reason}"


class LeftoverDropped(Event):
    """A file of earlier work is damaged, and was done without."""

    event: Literal["dropped"] = "dropped"
    reason: str

    def words(self) -> str:
        return f"WARNING: {self.reason}"


class LossMeasured(Event):
    """A model that came was measured; before training, also how far that had come in an earlier start."""

    event: Literal["measured"] = "measured"
    loss: float
    round: int
    rounds: int
    images: int = 0

    def words(self) -> str:
        going_on = f"\nround {self.round}: going on at {self.images:,} images" if self.images else ""
        return f"round {self.round}/{self.rounds}: held-out loss {self.loss:.4f} with the model that came{going_on}"


class TrainingGoesOn(Event):
    """So many images were trained on."""

    event: Literal["training"] = "training"
    round: int
    images: int
    of: int

    def words(self) -> str:
        return f"round {self.round}: {self.images:,}/{self.of:,} images"


class DrawingGoesOn(Event):
    """A model that is evaluated drew so many images."""

    event: Literal["drawing"] = "drawing"
    round: int
    images: int
    of: int

    def words(self) -> str:
        return f"evaluating a model: {self.images:,}/{self.of:,} images drawn"


class QualityMeasured(Event):
    """A model was evaluated."""

    event: Literal["evaluated"] = "evaluated"
    round: int
    drawn: int
    quality: Mapping[str, int | float]

    def words(self) -> str:
        found = ", ".join(f"{name} {value:g}" for name, value in self.quality.items())
        return f"a model was evaluated with {self.drawn:,} images that it drew: {found}"


class QualityWithheld(Event):
    """No numbers of an evaluation leave."""

    event: Literal["not evaluated"] = "not evaluated"
    round: int
    reason: str

    def words(self) -> str:
        return f"the coordinator wanted a model evaluated, which gets only its held-out loss: {self.reason}"


class LossWithheld(Event):
    """No losses leave."""

    event: Literal["loss kept"] = "loss kept"
    round: int

    def words(self) -> str:
        return f"round {self.round}: one held-out image's loss is unlike all others', so no loss leaves"


class DiskRefused(Event):
    """What must be on the disk before the work goes on cannot be written."""

    event: Literal["waiting"] = "waiting"
    reason: str

    def words(self) -> str:
        return f"WARNING: {self.reason}; trying again until it can be written"


class CodeRefused(Event):
    """The server sent other code than this site lets run."""

    event: Literal["code refused"] = "code refused"
    reason: str

    def words(self) -> str:
        return f"WARNING: {self.reason}; it was not unpacked, and the server is told only CODE_REFUSED"


class JoinedLate(Event):
    """The first model of this federation that came is not its prior."""

    event: Literal["joined late"] = "joined late"
    round: int

    def words(self) -> str:
        return f"round {self.round}: this site has not seen the prior itself, only what became of it"


class TermsAgreed(Event):
    """The site takes part on these terms."""

    event: Literal["agreed"] = "agreed"
    how: str
    fingerprint: str

    def words(self) -> str:
        return f"the terms of this federation were agreed to {self.how}; their fingerprint is {self.fingerprint}"


class ApprovalWanted(Event):
    """The work begins; what it gives waits for a person."""

    event: Literal["asks"] = "asks"
    round: int
    fingerprint: str
    folder: str

    def words(self) -> str:
        return (
            f"round {self.round}: the terms of this federation wait for your approval, nothing leaves before: "
            f"maskdm-client approve --out {self.folder} (fingerprint {self.fingerprint})"
        )


class ReplyHeld(Event):
    """What would leave waits for a person."""

    event: Literal["held"] = "held"
    action: str
    round: int
    fingerprint: str
    folder: str

    def words(self) -> str:
        what = "the first update" if self.action == "train" else "a measurement"
        return (
            f"round {self.round}: {what} waits for your approval: maskdm-client approve --out {self.folder} "
            f"(or --deny); the terms have the fingerprint {self.fingerprint}"
        )


class RoundAnswered(Event):
    """An update was released, with the numbers of its report; the losses are here as they are."""

    event: Literal["round"] = "round"
    rounds: int
    bytes: int
    outcome: int
    round: int
    exchange: int
    examples: int
    images_seen: int
    loss_before: float
    loss_after: float
    seconds: float
    skipped_steps: int

    def words(self) -> str:
        return (
            f"round {self.round}/{self.rounds}: held-out loss {self.loss_before:.4f} → {self.loss_after:.4f}, "
            f"{self.images_seen:,} images in {self.seconds:.0f} s, {self.bytes / 1e6:.1f} MB sent"
        )


class WorkFailed(Event):
    """The server is told a code; the reason stays here."""

    event: Literal["failed"] = "failed"
    round: int
    outcome: str
    reason: str

    def words(self) -> str:
        return f"round {self.round}: {self.reason} (the server is told only {self.outcome})"


class SiteFinished(Event):
    """The final model is here: its loss, or why it was not measured."""

    event: Literal["finished"] = "finished"
    round: int
    rounds: int | None = None
    outcome: str | None = None
    loss: float | None = None
    reason: str | None = None

    def words(self) -> str:
        if self.loss is None:
            return f"the federation ended; the final model was not measured: {self.reason}"
        return f"the federation ended; held-out loss of the final model {self.loss:.4f}"


AnyEvent = Annotated[
    WorkSuperseded
    | DataFound
    | DataDoubtful
    | LeftoverDropped
    | LossMeasured
    | TrainingGoesOn
    | DrawingGoesOn
    | QualityMeasured
    | QualityWithheld
    | LossWithheld
    | DiskRefused
    | CodeRefused
    | JoinedLate
    | TermsAgreed
    | ApprovalWanted
    | ReplyHeld
    | RoundAnswered
    | WorkFailed
    | SiteFinished,
    Field(discriminator="event"),
]


# Made when it is first needed: a ClientApp, which only writes events, should start fast.
KINDS: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent, config=ConfigDict(defer_build=True))


def known(lines: Iterable[Mapping[str, Any]]) -> Iterator[Event]:
    """Those lines of a site's events.jsonl whose kind this version knows."""
    return (event for line in lines if (event := parsed(KINDS, line)))


def note(site: Path, event: Event) -> None:
    """Say in a site's events what happens; where the disk is full, the work goes on unsaid."""
    with suppress(OSError):
        append_event(site, event)
