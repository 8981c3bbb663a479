"""The one way out. Every message passes here, is checked against the site's own policy, and is written down.

Twice: where the work is done (`check_…`), where the plan says what an update may be, and where a message leaves
(`release…`), whoever made it. It fails closed: what is not listed, not finite, too large or of another shape stays, a
code leaves instead, and the audit log says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from maskdm.errors import GateRefused
from maskdm.federated import auditlog
from maskdm.federated.auditlog import message_of
from maskdm.federated.parcel import NUMBER_NAMES, QUALITY_NAMES, Outcome, Parcel, QualityReport, Report
from maskdm.federated.plan import RoundPlan
from maskdm.federated.policy import SitePolicy
from maskdm.run.tensorfile import Layout, layout_of, size_of

if TYPE_CHECKING:  # PyTorch takes seconds to import, and most messages are a few numbers
    from torch import Tensor

COORDINATOR = "coordinator"
CODE = ("outcome", "round", "exchange")  # all that leaves of a failure, whatever the policy lists
TYPES = ("float32", "uint32", "uint16", "int8")  # of all encodings
ARRAY_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # of a weight: no path, no spaces


def check_update(
    update: Mapping[str, Tensor],
    report: Report,
    plan: RoundPlan,
    received: Mapping[str, Tensor],
    policy: SitePolicy,
    audit: Path,
) -> Parcel:
    """Check an update and its numbers, and encode them for the way out.

    Args:
        update: what the plan asks for, fp32.
        received: the weights that came down in this round, the measure of what is long.

    Raises:
        GateRefused: something may not leave; nothing was encoded.
    """
    from maskdm.federated.encoding import encode, layout

    numbers, expected = (
        report.model_dump(mode="json", exclude_none=True),
        layout(plan.shapes(), plan.encoding, plan.topk_share),
    )
    problem = problem_of_numbers(numbers, policy) or _problem_of_update(update, plan, received, policy)
    problem = problem or problem_of_size(size_of(expected), policy)
    parcel = Parcel({} if problem else encode(update, plan.encoding, plan.topk_share), numbers)
    return _checked(parcel, report.round, problem or problem_of(parcel, policy, expected), audit)


def check_numbers(report: Report, policy: SitePolicy, audit: Path) -> Parcel:
    """Check numbers alone; raises as `check_update` does."""
    parcel = Parcel({}, report.model_dump(mode="json", exclude_none=True))
    return _checked(parcel, report.round, problem_of(parcel, policy, {}), audit)


def check_again(parcel: Parcel, exchange: int, policy: SitePolicy, audit: Path) -> Parcel:
    """Check what passed before, as the answer of another exchange; the policy may have changed.

    Raises:
        GateRefused: it may not leave any more.
    """
    again = replace(parcel, scalars={**parcel.scalars, "exchange": exchange})
    return _checked(again, int(again.scalars["round"]), problem_of(again, policy), audit)


def code(outcome: Outcome, round_number: int, exchange: int) -> Parcel:
    """Says how the work ended; the reason stays here."""
    return Parcel({}, {"outcome": int(outcome), "round": round_number, "exchange": exchange})


def release(parcel: Parcel, round_number: int, policy: SitePolicy, audit: Path) -> Parcel:
    """Let out what was checked where the work was done.

    Raises:
        GateRefused: it is nothing that may leave.
        OSError: it cannot be written down, so it must not leave.
    """
    _checked(parcel, round_number, problem_of(parcel, policy), audit)
    record(audit, "out", round_number, "released", parcel)
    return parcel


def release_progress(round_number: int, images: int, exchange: int, policy: SitePolicy, audit: Path) -> Parcel:
    """Let out a sign of life; of its numbers those that the policy lists. Raises as `release` does."""
    numbers = {"round": round_number, "exchange": exchange, "images_seen": images}
    listed = {name: number for name, number in numbers.items() if name in policy.metrics}
    return release(Parcel({}, {"outcome": int(Outcome.WORKING), **listed}), round_number, policy, audit)


def release_outcome(outcome: Outcome, round_number: int, exchange: int, audit: Path) -> Parcel:
    """Let out a code, which no policy forbids. Raises as `release` does."""
    return release(code(outcome, round_number, exchange), round_number, SitePolicy(metrics=()), audit)


def record(audit: Path, direction: str, round_number: int, verdict: str, parcel: Parcel | None = None) -> None:
    """One line of the site's audit log, for a message, or a decision on one."""
    message = message_of(parcel) if parcel else auditlog.NOTHING
    auditlog.record(audit, direction, COORDINATOR, round_number, verdict, message)


def problem_of(parcel: Parcel, policy: SitePolicy, expected: Layout | None = None) -> str | None:
    """What keeps a message from leaving, whoever made it.

    Args:
        expected: the arrays that were asked for; None where that is not known here.
    """
    if parcel.document != "":
        return "it holds a text"
    problem = problem_of_numbers(parcel.scalars, policy) or _problem_of_arrays(parcel.arrays, expected)
    if problem or not parcel.arrays:
        return problem
    if parcel.scalars.get("outcome") != Outcome.DONE:
        return "it holds arrays, and is no answer"
    if any(name in QUALITY_NAMES for name in parcel.scalars):
        return "it holds arrays, and the numbers of an evaluation"
    return problem_of_size(size_of(layout_of(parcel.arrays)), policy)


def problem_of_numbers(numbers: Any, policy: SitePolicy) -> str | None:
    """What keeps numbers from leaving: a foreign name, no number, one out of its range, one that is not listed."""
    if not isinstance(numbers, Mapping):
        return "its numbers have no names"
    for name, value in numbers.items():
        if type(name) is not str or name not in NUMBER_NAMES:
            return "it holds a number that nobody asked for"
        if type(value) not in (int, float) or (type(value) is float and not math.isfinite(value)):
            return f"{name} is no finite number"
        try:
            _ranges()[name].validate_python(value)
        except ValidationError:
            return f"{name} is out of its range"
    if type(numbers.get("outcome")) is not int:
        return "it does not say how the work ended"
    outcome = Outcome(numbers["outcome"])
    listed = {Outcome.DONE: policy.metrics, Outcome.WORKING: ("outcome", *policy.metrics)}.get(outcome, CODE)
    unlisted = [name for name in NUMBER_NAMES if name in numbers and name not in listed]
    return f"{unlisted[0]} is not in the policy's list of numbers" if unlisted else None


def problem_of_size(needed: int, policy: SitePolicy) -> str | None:
    """What is wrong with an update of so many bytes."""
    if policy.max_bytes_per_round is None or needed <= policy.max_bytes_per_round:
        return None
    return (
        f"the update would be {needed:,} bytes, --max-upload or the policy's max-bytes-per-round allows "
        f"{policy.max_bytes_per_round:,}"
    )


def norms(update: Mapping[str, Tensor], plan: RoundPlan, received: Mapping[str, Tensor]) -> tuple[float, float]:
    """Lengths (L2) of the difference that an update makes, and of the model that it was made from."""
    from maskdm.networks.trainable import squared_norm

    changed = sum(squared_norm(update.__getitem__, name, plan.train) for name in plan.changed())
    return math.sqrt(changed), math.sqrt(sum(squared_norm(received.__getitem__, name, "all") for name in received))


def _checked(parcel: Parcel, round_number: int, problem: str | None, audit: Path) -> Parcel:
    if problem:
        record(audit, "out", round_number, problem)
        raise GateRefused(f"the gate stopped what would have left in round {round_number}: {problem}")
    return parcel


@cache
def _ranges() -> dict[str, TypeAdapter[Any]]:
    """Of all numbers that may ever leave, by name."""
    return {name: _range(field) for name, field in QualityReport.model_fields.items()}


def _range(field: FieldInfo) -> TypeAdapter[Any]:
    return TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]


def _problem_of_arrays(arrays: Any, expected: Layout | None) -> str | None:
    if not isinstance(arrays, Mapping):
        return "its arrays have no names"
    for name, array in arrays.items():
        if type(name) is not str or not ARRAY_NAME.fullmatch(name):
            return "it holds an array whose name is none of a weight"
        if type(array) not in (np.ndarray, np.memmap) or str(array.dtype) not in TYPES:
            return f"{name} is no array of a type that updates have"
    if expected is not None and layout_of(arrays) != expected:
        return "its arrays are not those that were asked for"
    return None


def _problem_of_update(
    update: Mapping[str, Tensor], plan: RoundPlan, received: Mapping[str, Tensor], policy: SitePolicy
) -> str | None:
    shapes = plan.shapes()
    if update.keys() != shapes.keys():
        return "the names of the update are not those that were asked for"
    for name, tensor in update.items():
        if tuple(tensor.shape) != shapes[name]:
            return f"{name} has another shape than was asked for"
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    norm, reference = norms(update, plan, received)
    if not norm <= policy.max_relative_norm * reference < math.inf:
        return f"its norm {norm:.3g} exceeds {policy.max_relative_norm:g} of the model's {reference:.3g}"
    if policy.max_norm is not None and not norm <= policy.max_norm:
        return f"its norm {norm:.3g} exceeds the {policy.max_norm:g} of the policy's max-norm"
    return None
