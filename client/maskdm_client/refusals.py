"""Why a site does not do, or does not give out, what it is asked for. Of each only its code leaves; the words stay."""

from typing import ClassVar

from maskdm.data.pixels import IsColour
from maskdm.errors import DataError, GateRefused, MaskDMError, TrainingDiverged
from maskdm.federated.parcel import Outcome


class Refused(MaskDMError):
    """A plan that this site does not answer as it was asked to, whatever its images show."""

    outcome: ClassVar[Outcome]


class PlanRefused(Refused):
    """The coordinator asked for something that this site will not or cannot do."""

    outcome = Outcome.PLAN_REFUSED


class PolicyRefused(Refused):
    """The site's policy does not allow it to take part."""

    outcome = Outcome.POLICY


class NotApproved(Refused):
    """A person at this site denied what would have left, or agreed to other terms."""

    outcome = Outcome.NOT_APPROVED


class TooLarge(Refused):
    """What the plan asks for would exceed what may leave this site."""

    outcome = Outcome.TOO_LARGE


class RestMissing(Refused):
    """Only what training changes came, and the rest is not here."""

    outcome = Outcome.UNKNOWN


class NotEvaluated(MaskDMError):
    """Numbers of an evaluation do not leave this site, the others do; the message, which stays here, says why."""


class Superseded(Exception):
    """The coordinator asks for something newer; what was begun is of no use any more, and is not answered."""


# How these ended says nothing of what the images show; of any other failure it may.
OF_THE_PLAN = (Refused, DataError, Superseded, OSError)
_OTHERS = {
    IsColour: Outcome.WRONG_CHANNELS,
    DataError: Outcome.DATA_UNUSABLE,
    TrainingDiverged: Outcome.DIVERGED,
    GateRefused: Outcome.GATE_REFUSED,
}


def outcome_for(error: Exception) -> Outcome:
    """The code of work that ended so."""
    if isinstance(error, Refused):
        return error.outcome
    return next((_OTHERS[kind] for kind in type(error).__mro__ if kind in _OTHERS), Outcome.FAILED)
