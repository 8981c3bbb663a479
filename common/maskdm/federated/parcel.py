"""What travels between coordinator and site, free of any transport and of PyTorch, which takes seconds to import.

Down goes a document with the weights (fp32). Up comes an encoded update and the numbers of `Report`, those of
`QualityReport`, or an `Outcome` alone. No names, no paths, no text come from a site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from ..config import Frozen
from ..run.tensorfile import Arrays, layout_of, size_of

Scalars = Mapping[str, int | float]


DIGITS = 3  # of numbers that leave: what a curve needs; more would tell more of single images


def rounded(value: float) -> float:
    """To the digits that leave a site."""
    return float(f"{value:.{DIGITS}g}")


class Outcome(IntEnum):
    """How a site's work ended. The code is all that leaves; the words stay in the site's own log."""

    DONE = 0
    DATA_UNUSABLE = 1
    WRONG_CHANNELS = 2
    DIVERGED = 3
    GATE_REFUSED = 4
    PLAN_REFUSED = 5
    FAILED = 6
    WORKING = 7  # not the end: a sign of life
    UNKNOWN = 8  # the site was asked about work that it does not know: send it again
    TOO_LARGE = 9  # the update would exceed what the site's link may carry
    POLICY = 10  # the site's policy does not allow it to take part
    NOT_APPROVED = 11  # a person at the site denied it
    CODE_REFUSED = 12  # the coordinator sent other code than the site lets run

    def words(self) -> str:
        """What the code says, for the coordinator's user."""
        return _WORDS[self]


_WORDS = {
    Outcome.DONE: "it is done",
    Outcome.DATA_UNUSABLE: "its images cannot be used",
    Outcome.WRONG_CHANNELS: "its images are in colour, the model is not",
    Outcome.DIVERGED: "its training diverged",
    Outcome.GATE_REFUSED: "its gate stopped what would have left, e.g. too long an update",
    Outcome.PLAN_REFUSED: "it did not understand the plan, or does not do such a thing",
    Outcome.FAILED: "something failed there, its own log says what",
    Outcome.WORKING: "it is at work",
    Outcome.UNKNOWN: "it does not know the work that it was asked about",
    Outcome.TOO_LARGE: "the update would be larger than it lets out: another --encoding or --train makes it smaller",
    Outcome.POLICY: "its policy keeps it from taking part, e.g. too few images or steps, or asked too often",
    Outcome.NOT_APPROVED: "somebody there denied it, or has not agreed to what is asked now",
    Outcome.CODE_REFUSED: "the server sent it other code than its kit names: provision renew makes new kits",
}


def outcome_of(scalars: Scalars) -> Outcome | None:
    """The code among the numbers of a reply; None where there is none, or one that only equals a code, e.g. 0.0."""
    code = scalars.get("outcome")
    return Outcome(code) if type(code) is int and code in list(Outcome) else None


def _whole(code: Any) -> Any:
    if isinstance(code, int) and not isinstance(code, bool):
        return code
    raise ValueError("it should be a whole number")


# Of a model that is worth anything it is near 1. Sums of what hostile sites say must stay finite, and a model must not
# make one image outshout the others.
LARGEST_LOSS = 4.0
Loss = Annotated[float, Field(ge=0, le=LARGEST_LOSS, strict=True)]


class Report(Frozen):
    """The fixed list of numbers that a site returns beside its update."""

    outcome: Annotated[Outcome, BeforeValidator(_whole)] = Outcome.DONE
    round: Annotated[int, Field(ge=1, le=100_000, strict=True)]
    exchange: Annotated[int, Field(ge=0, lt=2**63, strict=True)]
    examples: Annotated[int, Field(ge=1, le=2**40, strict=True)]
    images_seen: Annotated[int, Field(ge=0, le=2**40, strict=True)]
    loss_before: Loss | None = None  # None where the site keeps it to itself
    loss_after: Loss | None = None
    seconds: Annotated[float, Field(ge=0, le=1e9, strict=True)]
    skipped_steps: Annotated[int, Field(ge=0, le=2**40, strict=True)]


# Distances between features know no bound; sums of what hostile sites say must stay finite.
LARGEST_DISTANCE = 1e9
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Distance = Annotated[float, Field(ge=0, le=LARGEST_DISTANCE, strict=True)]


class QualityReport(Report):
    """The same of a model that was evaluated, and how near images that it draws are to those that the site holds out.

    Each further number is there only where the site's policy lists it, and it could be computed.
    """

    quality_images: Annotated[int, Field(ge=2, le=2**40, strict=True)] | None = None  # held out, and compared with
    kernel: Annotated[float, Field(ge=-LARGEST_DISTANCE, le=LARGEST_DISTANCE, strict=True)] | None = None
    frechet: Distance | None = None
    precision: Share | None = None
    recall: Share | None = None
    density: Distance | None = None
    coverage: Share | None = None
    memorisation: Distance | None = None

    @model_validator(mode="after")
    def _says_of_how_many(self) -> Self:
        if self.quality_images is None and self.quality():
            raise ValueError("quality_images is missing: figures mean nothing without it")
        return self

    def quality(self) -> dict[str, float]:
        """Those of the further numbers that are there, without the count of images."""
        found = {name: getattr(self, name) for name in QUALITY_NAMES if name != "quality_images"}
        return {name: value for name, value in found.items() if value is not None}


REPORT_NAMES = tuple(Report.model_fields)
QUALITY_NAMES = tuple(name for name in QualityReport.model_fields if name not in REPORT_NAMES)
NUMBER_NAMES = REPORT_NAMES + QUALITY_NAMES


@dataclass(frozen=True)
class Parcel:
    """One message: arrays, numbers, and (only downwards) a document."""

    arrays: Arrays
    scalars: Scalars
    document: str = ""

    def size(self) -> int:
        """Payload in bytes."""
        return size_of(layout_of(self.arrays)) + 8 * len(self.scalars) + len(self.document.encode())
