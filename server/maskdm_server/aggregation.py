"""Checks and averages updates as they arrive, with one running sum and one update in memory at a time."""

from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from maskdm.checkpoint import first_problem
from maskdm.protocol import Arrays, Outcome, Parcel, Report, RoundPlan, decode_bfloat16


class UpdateRejected(Exception):
    """A reply that must not touch the model; the message says why."""


def check_reply(parcel: Parcel, plan: RoundPlan, shapes: Mapping[str, tuple[int, ...]]) -> Report:
    """The numbers of a reply, after everything about it was checked.

    Raises:
        UpdateRejected: a failure code, or numbers, names, shapes, types or values that do not fit the plan.
    """
    code = parcel.scalars.get("outcome")
    if code != Outcome.DONE and code in list(Outcome):
        raise UpdateRejected(f"the site reports {Outcome(int(code)).name}")
    try:
        report = Report.model_validate(dict(parcel.scalars))
    except ValidationError as error:
        raise UpdateRejected(f"its numbers do not fit: {first_problem(error)}") from error
    if report.round != plan.round:
        raise UpdateRejected(f"it answers round {report.round}, not {plan.round}")
    expected = shapes if plan.action == "train" else {}
    if {name: array.shape for name, array in parcel.arrays.items()} != expected:
        raise UpdateRejected("names or shapes of its update are not those of the model")
    if any(str(array.dtype) != "uint16" for array in parcel.arrays.values()):
        raise UpdateRejected("its update is not bfloat16 carried as uint16")
    if plan.action == "train" and report.images_seen > 2 * plan.local_images + plan.batch_size:
        raise UpdateRejected(f"it claims {report.images_seen} images, far more than the plan's {plan.local_images}")
    return report


class StreamingMean:
    """Weighted mean of updates in fp32: Σ wᵢ·Δᵢ / Σ wᵢ, constant memory in the number of updates."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sum = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._weight = 0.0
        self.count = 0

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add one checked update.

        Raises:
            UpdateRejected: a value is not finite; the sum is unchanged.
        """
        assert weight > 0
        update = {name: decode_bfloat16(array) for name, array in arrays.items()}  # type: ignore[arg-type]
        for name, tensor in update.items():
            if not torch.isfinite(tensor).all():
                raise UpdateRejected(f"{name} is not finite")
        for name, tensor in update.items():
            self._sum[name].add_(tensor, alpha=weight)
        self._weight += weight
        self.count += 1

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean; at least one update must have been added."""
        assert self.count > 0
        return {name: total / self._weight for name, total in self._sum.items()}


def federated_average(weights: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) on differences: w ← w + Δ̄."""
    return {name: weights[name] + update[name] for name in weights}
