"""The one way out. Every message passes here, is checked against the site's own policy, and is written down.

It fails closed: what is not listed, not finite, too large or of another shape stays, and the site's log says why.
"""

import hashlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from maskdm.errors import GateRefused
from maskdm.protocol import Outcome, Parcel, Report, encode_bfloat16
from maskdm.runfolder import append_line
from maskdm_client.settings import SitePolicy


def release_update(
    update: Mapping[str, Tensor], report: Report, received: Mapping[str, Tensor], policy: SitePolicy, audit: Path
) -> Parcel:
    """Check an update and its numbers, and pack them for the way out.

    Args:
        update: the difference of each weight, fp32.
        received: the weights that came down in this round: the only names and shapes that may go up.

    Raises:
        GateRefused: something may not leave; nothing was packed.
    """
    numbers = report.model_dump(mode="json")
    problem = _problem(update, numbers, received, policy)
    arrays = {} if problem else {name: encode_bfloat16(tensor) for name, tensor in update.items()}
    parcel = Parcel(arrays, {} if problem else numbers)
    record(audit, "out", report.round, parcel, problem or "released")
    if problem:
        raise GateRefused(f"the gate stopped the update of round {report.round}: {problem}")
    return parcel


def release_numbers(report: Report, policy: SitePolicy, audit: Path) -> Parcel:
    """Let out the fixed numbers alone."""
    return release_update({}, report, {}, policy, audit)


def release_outcome(outcome: Outcome, round_number: int, audit: Path) -> Parcel:
    """Let out a code that says how the work ended; the reason stays here."""
    parcel = Parcel({}, {"outcome": int(outcome), "round": round_number})
    record(audit, "out", round_number, parcel, "released")
    return parcel


def record(audit: Path, direction: str, round_number: int, parcel: Parcel, verdict: str) -> None:
    """One line of the site's audit log for one message."""
    digest = hashlib.sha256()
    for name, array in sorted(parcel.arrays.items()):
        digest.update(name.encode())
        digest.update(array.tobytes())
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


def _problem(
    update: Mapping[str, Tensor], numbers: Mapping[str, int | float], received: Mapping[str, Tensor], policy: SitePolicy
) -> str | None:
    unlisted = sorted(numbers.keys() - set(policy.scalars))
    if unlisted:
        return f"{unlisted[0]} is not in the policy's list of numbers"
    if update.keys() != received.keys():
        return "the names of the update are not those of the model"
    for name, tensor in update.items():
        if tensor.shape != received[name].shape:
            return f"{name} has another shape than the model's"
        if not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    if update:
        norm, reference = _norm(update), _norm(received)
        if norm > policy.max_relative_norm * reference:
            return f"its norm {norm:.3g} exceeds {policy.max_relative_norm:g} of the model's {reference:.3g}"
    return None


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
