"""Checks updates as they arrive and adds them up, one in memory at a time."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from maskdm.federated.encoding import as_bfloat16, check, decode
from maskdm.federated.parcel import NUMBER_NAMES, REPORT_NAMES, Outcome, Parcel, QualityReport, Report, outcome_of
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import first_problem
from maskdm.networks.trainable import delta, squared_length
from maskdm.run.runfolder import atomic_write
from maskdm.run.tensorfile import Arrays, Stored, chunks, layout_of

from .directions import Sketch
from .robust import Rule, robust_delta

# Nothing that a site sends counts more than so many times the median, whatever it says it has or saw.
LARGEST_WEIGHT = 4
GROWTH = 2  # a site's slice may have grown so many times since the site first said how large it is


class UpdateRejected(Exception):
    """A reply that must not touch the model; the message says why."""


def check_reply(parcel: Parcel, plan: RoundPlan, declared: int | None = None) -> Report:
    """The numbers of a reply, those of a QualityReport to a plan to evaluate, after everything about it was checked but
    the values of its update.

    Args:
        declared: images that the site said to have when it first answered.

    Raises:
        UpdateRejected: a failure code, or numbers, names, shapes or types that do not fit the plan. Values are looked
            at by `Update.norm`.
    """
    evaluated = plan.action == "evaluate"
    if set(parcel.scalars) - set(NUMBER_NAMES if evaluated else REPORT_NAMES):
        raise UpdateRejected("it holds a number that was not asked for")  # whose name a stranger chose
    outcome = outcome_of(parcel.scalars)
    if outcome is not None and outcome != Outcome.DONE:
        raise UpdateRejected(f"the site reports {outcome.name}: {outcome.words()}")
    try:
        report = (QualityReport if evaluated else Report).model_validate(dict(parcel.scalars))
    except ValidationError as error:
        raise UpdateRejected(f"its numbers do not fit: {first_problem(error)}") from error
    if report.round != plan.round:
        raise UpdateRejected(f"it answers round {report.round}, not {plan.round}")
    if report.images_seen > plan.largest_images() or (plan.action == "train" and not report.images_seen):
        raise UpdateRejected(f"it claims to have seen {report.images_seen} images, the plan says {plan.local_images}")
    if declared is not None and report.examples > GROWTH * declared:
        raise UpdateRejected(f"it claims {report.examples} images of its own, and said {declared} before")
    try:
        check(parcel.arrays, plan.shapes(), plan.encoding, plan.topk_share)
    except ValueError as error:
        raise UpdateRejected(f"its update is not what was asked for: {error}") from error
    return report


def overall_loss(losses: Sequence[tuple[float | None, int]], rule: Rule) -> float | None:
    """One loss for all sites: their median, weighted by images, or with a robust rule unweighted.

    Of three sites or more none can move it beyond what the others say. Of two nobody can tell which one lies: then it
    is their mean.

    Args:
        losses: each with the images that its site says to have; None of a site that keeps its loss to itself.
    """
    known = [(loss, images) for loss, images in losses if loss is not None]
    if not known:
        return None
    values = [loss for loss, _ in known]
    if rule != "mean":
        return statistics.median(values)
    most = LARGEST_WEIGHT * statistics.median_low([images for _, images in known])
    weights = [min(images, most) for _, images in known]
    if len(known) < 3:
        return sum(loss * weight for loss, weight in zip(values, weights, strict=True)) / sum(weights)
    # Whatever one says to have, it weighs less than the others together.
    return weighted_median(values, [min(weight, sum(weights) - weight - 1) for weight in weights])


def weighted_median(values: Sequence[float], weights: Sequence[int]) -> float:
    """The value with at most half of the weight on either side; the middle of two such values. Weights are > 0."""
    half, below = sum(weights), 0  # doubled, so that all stay whole numbers
    ordered = sorted(zip(values, weights, strict=True))
    for place, (value, weight) in enumerate(ordered):
        below += 2 * weight
        if below == half:
            return (value + ordered[place + 1][0]) / 2
        if below > half:
            return value
    raise ValueError("a median of nothing")


class Update:
    """An update that passed `check_reply`, decoded one weight at a time; `norm` is to be asked before it is added."""

    def __init__(self, arrays: Arrays, plan: RoundPlan) -> None:
        self._arrays, self._plan, self._shapes = arrays, plan, plan.shapes()
        self.names = plan.changed()

    def delta(self, name: str) -> Tensor:
        """The difference of one weight, only to be read; fp32, or bfloat16 as it came, which spares a copy."""
        return delta(self._decoded, name, self._plan.train)

    def norm(self, sketch: Sketch | None = None) -> float:
        """Length of the whole difference, which is added to `sketch` on the way.

        Arrays are read in the order of their names, so that one that is `Hashed` is read once for both.

        Raises:
            UpdateRejected: it cannot be decoded, a value is not finite, or all are zero.
        """
        total = 0.0
        for name in sorted(self.names):
            try:
                difference = self.delta(name)
            except ValueError as error:
                raise UpdateRejected(f"its update is not what was asked for: {error}") from error
            squared = squared_length(difference)
            if not np.isfinite(squared):
                raise UpdateRejected(f"{name} is not finite")
            total += squared
            if sketch:
                sketch.add(difference)
        if total == 0:
            raise UpdateRejected("it changes nothing")
        return float(np.sqrt(total))

    def save(self, path: Path) -> None:
        """Keep the update as it came, to be opened again by `held`."""
        if isinstance(self._arrays, Stored):
            self._arrays.move(path)
            return
        atomic_write(path, chunks(layout_of(self._arrays), self._arrays.__getitem__))

    @classmethod
    def held(cls, path: Path, plan: RoundPlan) -> "Update":
        """An update that was saved; its arrays stay on the disk."""
        return cls(Stored(path), plan)

    def _decoded(self, name: str) -> Tensor:
        if self._plan.encoding == "bf16" and self._plan.train != "adapters":
            return as_bfloat16(self._arrays[name])  # type: ignore[arg-type]
        return decode(self._arrays, name, self._shapes[name], self._plan.encoding)


class StreamingMean:
    """Weighted mean of updates in fp32: Σ wᵢ·Δᵢ / Σ wᵢ, constant memory in the number of updates."""

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._weight = 0.0
        self.count = 0

    def add(self, update: Update, weight: float) -> None:
        """Add one update whose values are finite."""
        assert weight > 0
        for name in update.names:
            difference = update.delta(name)
            if self.count:
                self._sum[name].add_(difference, alpha=weight)
            else:
                self._sum[name] = difference.to(torch.float32, copy=True).mul_(weight)
        self._weight += weight
        self.count += 1

    def result(self) -> Iterator[tuple[str, Tensor]]:
        """The mean, weight by weight; what was given is not kept."""
        assert self.count > 0
        for name in list(self._sum):
            yield name, self._sum.pop(name).div_(self._weight)


class HeldUpdates:
    """Updates of a round on the disk, for rules that must see all of them."""

    def __init__(self, rule: Rule, byzantine: int, plan: RoundPlan, folder: Path) -> None:
        self._rule, self._byzantine, self._plan, self._folder = rule, byzantine, plan, folder
        self.count = 0

    def add(self, update: Update, weight: float) -> None:
        """Hold one update whose values are finite; these rules weigh all alike."""
        update.save(self._folder / f"held-{self.count}.safetensors")
        self.count += 1

    def result(self) -> Iterator[tuple[str, Tensor]]:
        """The aggregated difference, weight by weight."""
        paths = [self._folder / f"held-{number}.safetensors" for number in range(self.count)]
        held = [Update.held(path, self._plan) for path in paths]
        yield from robust_delta(
            self._rule, len(held), held[0].names, lambda number, name: held[number].delta(name), self._byzantine
        )


Aggregate = StreamingMean | HeldUpdates
