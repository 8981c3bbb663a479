"""Each refusal has a code of its own, and whatever nobody foresaw has the one that says no more than that."""

import pytest

from maskdm.data.pixels import IsColour
from maskdm.errors import CheckpointError, DataError, GateRefused, TrainingDiverged
from maskdm.federated.parcel import Outcome
from maskdm_client.refusals import NotEvaluated, Refused, outcome_for


@pytest.mark.parametrize("kind", Refused.__subclasses__())
def test_every_refusal_has_a_code_that_no_other_has(kind: type[Refused]) -> None:
    same = [other for other in Refused.__subclasses__() if other.outcome == kind.outcome]
    assert same == [kind]
    assert outcome_for(kind("why")) == kind.outcome
    assert kind.outcome not in (Outcome.DONE, Outcome.FAILED)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (IsColour("colour"), Outcome.WRONG_CHANNELS),
        (DataError("none"), Outcome.DATA_UNUSABLE),
        (TrainingDiverged("nan"), Outcome.DIVERGED),
        (GateRefused("long"), Outcome.GATE_REFUSED),
        (NotEvaluated("few"), Outcome.FAILED),
        (CheckpointError("damaged"), Outcome.FAILED),
        (KeyError("a"), Outcome.FAILED),
        (OSError("full"), Outcome.FAILED),
    ],
)
def test_other_errors_have_the_code_of_their_nearest_kind(error: Exception, outcome: Outcome) -> None:
    assert outcome_for(error) == outcome
