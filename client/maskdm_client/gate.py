"""The one way out. Every message passes here, is checked against the site's own policy, and is written down.

It fails closed: what is not listed, not finite, too large or of another shape stays, and the site's log says why.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from maskdm.errors import GateRefused
from maskdm.parcel import Outcome, Parcel, Report
from maskdm.runfolder import append_line
from maskdm.tensorfile import bytes_of
from maskdm_client.settings import SitePolicy

if TYPE_CHECKING:  # PyTorch takes seconds to import, and most messages are a few numbers
    from torch import Tensor

    from maskdm.protocol import RoundPlan


def release_update(
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
    from maskdm.wire import encode, size

    numbers = report.model_dump(mode="json")
    problem = _problem_of_numbers(numbers, policy) or _problem(update, plan, received, policy)
    problem = problem or problem_of_size(size(plan.shapes(), plan.encoding, plan.topk_share), policy)
    arrays = {} if problem else encode(update, plan.encoding, plan.topk_share)
    return _let_out(Parcel(arrays, numbers), report.round, problem, audit)


def release_numbers(report: Report, policy: SitePolicy, audit: Path) -> Parcel:
    """Let out the fixed numbers alone."""
    numbers = report.model_dump(mode="json")
    return _let_out(Parcel({}, numbers), report.round, _problem_of_numbers(numbers, policy), audit)


def release_progress(round_number: int, images: int, exchange: int, policy: SitePolicy, audit: Path) -> Parcel:
    """Let out a sign of life; of its numbers those that the policy lists."""
    numbers = {"round": round_number, "exchange": exchange, "images_seen": images}
    listed = {name: number for name, number in numbers.items() if name in policy.scalars}
    return _let_out(Parcel({}, {"outcome": int(Outcome.WORKING), **listed}), round_number, None, audit)


def release_outcome(outcome: Outcome, round_number: int, exchange: int, audit: Path) -> Parcel:
    """Let out a code that says how the work ended; the reason stays here."""
    numbers = {"outcome": int(outcome), "round": round_number, "exchange": exchange}
    return _let_out(Parcel({}, numbers), round_number, None, audit)


def release_again(parcel: Parcel, exchange: int, policy: SitePolicy, audit: Path) -> Parcel:
    """Let out once more what passed before, as the answer of another exchange, where the policy still allows it.

    Raises:
        GateRefused: it does not.
    """
    again = replace(parcel, scalars={**parcel.scalars, "exchange": exchange})
    needed = sum(array.nbytes for array in again.arrays.values())
    problem = _problem_of_numbers(again.scalars, policy) or problem_of_size(needed, policy)
    return _let_out(again, int(again.scalars["round"]), problem, audit)


def problem_of_size(needed: int, policy: SitePolicy) -> str | None:
    """What is wrong with an update of so many bytes."""
    if policy.max_upload is None or needed <= policy.max_upload:
        return None
    return f"the update would be {needed:,} bytes, --max-upload allows {policy.max_upload:,}"


def record(audit: Path, direction: str, round_number: int, parcel: Parcel, verdict: str) -> None:
    """One line of the site's audit log for one message."""
    digest = hashlib.sha256()
    for name, array in sorted(parcel.arrays.items()):
        digest.update(name.encode())
        digest.update(bytes_of(array))
    append_line(
        audit,
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "direction": direction,
            "round": round_number,
            "verdict": verdict,
            "bytes": parcel.size(),
            "scalars": {name: parcel.scalars[name] for name in sorted(parcel.scalars)},
            "arrays": sorted(parcel.arrays),
            "sha256": digest.hexdigest(),
        },
    )


def _let_out(parcel: Parcel, round_number: int, problem: str | None, audit: Path) -> Parcel:
    record(audit, "out", round_number, Parcel({}, {}) if problem else parcel, problem or "released")
    if problem:
        raise GateRefused(f"the gate stopped the update of round {round_number}: {problem}")
    return parcel


def _problem_of_numbers(numbers: Mapping[str, int | float], policy: SitePolicy) -> str | None:
    unlisted = sorted(numbers.keys() - set(policy.scalars))
    return f"{unlisted[0]} is not in the policy's list of numbers" if unlisted else None


def _problem(
    update: Mapping[str, Tensor], plan: RoundPlan, received: Mapping[str, Tensor], policy: SitePolicy
) -> str | None:
    from maskdm.trainable import squared_norm

    shapes = plan.shapes()
    if update.keys() != shapes.keys():
        return "the names of the update are not those that were asked for"
    for name, tensor in update.items():
        if tuple(tensor.shape) != shapes[name]:
            return f"{name} has another shape than was asked for"
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    norm = math.sqrt(sum(squared_norm(update.__getitem__, name, plan.train) for name in plan.changed()))
    reference = math.sqrt(sum(squared_norm(received.__getitem__, name, "all") for name in received))
    if not norm <= policy.max_relative_norm * reference < math.inf:
        return f"its norm {norm:.3g} exceeds {policy.max_relative_norm:g} of the model's {reference:.3g}"
    return None
