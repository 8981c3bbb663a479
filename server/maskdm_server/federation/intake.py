"""Lets updates in one by one: none that is not finite, none far too long, none that outweighs the others."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from maskdm.config import Frozen
from maskdm.federated.parcel import Parcel, Report
from maskdm.federated.plan import RoundPlan

from ..aggregation.directions import Sketch, cosines
from ..aggregation.updates import LARGEST_WEIGHT, Aggregate, Update, UpdateRejected, check_reply
from .events import Compared

# As many updates must be known before one can be called long; the first ones wait on the disk for that.
ENOUGH = 3
REMEMBERED = 64


class UpdateNorm(Frozen):
    """What later updates are compared with."""

    norm: float
    images: int


@dataclass(frozen=True)
class Waiting:
    """An update on the disk that is not judged yet."""

    report: Report
    measured: UpdateNorm
    path: Path


class Intake:
    """Of one round. The lower median is compared with, so that of two updates the shorter one is the measure."""

    def __init__(
        self,
        plan: RoundPlan,
        aggregate: Aggregate,
        before: list[UpdateNorm],
        max_norm_ratio: float,
        model_norm: float,
        seed: int,
        folder: Path,
    ) -> None:
        """
        Args:
            before: of updates that were let in lately.
            model_norm: length of the model that the round began with.
            seed: of the signs by which directions are compared; no site may know it.
        """
        self._plan, self._aggregate, self._folder, self._seed = plan, aggregate, folder, seed
        self._limit, self._longest = max_norm_ratio, model_norm
        self.known = list(before)
        self.reports: dict[int, tuple[Report, float]] = {}  # accepted ones with their weights
        self.rejected: dict[int, UpdateRejected] = {}  # of those that waited
        self._reference: list[UpdateNorm] | None = None  # of those that waited
        self._waiting: dict[int, Waiting] = {}
        self._sketches: dict[int, Tensor] = {}
        self._norms: dict[int, float] = {}  # of accepted ones

    def offer(self, site: int, parcel: Parcel, declared: int | None) -> Report:
        """Take in one reply; the first ones of a federation are only judged when there are more, or by `close`.

        Raises:
            UpdateRejected: it must not touch the model.
            OSError: e.g. a full disk; nothing was taken in, and it may be offered again.
        """
        report = check_reply(parcel, self._plan, declared)
        update, sketch = Update(parcel.arrays, self._plan), Sketch(self._seed)
        measured = UpdateNorm(norm=update.norm(sketch), images=report.images_seen)
        # What a lone reply is held against. Honest ones had 0.03 to 0.06 of the model's length at usual rates, and 0.29
        # after 64 steps at 2e-3; what is longer than the model replaces it.
        if measured.norm > self._longest:
            raise UpdateRejected(
                f"its norm {measured.norm:.3g} is more than that of the whole model, {self._longest:.3g}"
            )
        self._sketches[site] = sketch.values
        if len(self.known) + len(self._waiting) + 1 < ENOUGH:
            path = self._folder / f"waiting-{site}.safetensors"
            update.save(path)
            self._waiting[site] = Waiting(report=report, measured=measured, path=path)
        else:
            reference = [*self.known, *(entry.measured for entry in self._waiting.values()), measured]
            self._judge(site, report, update, measured, reference)
        return report

    def close(self) -> dict[int, UpdateRejected]:
        """Judge those that wait; returns the sites whose updates were rejected, and why.

        Raises:
            OSError: e.g. a full disk; it may be called again.
        """
        if self._reference is None:
            self._reference = [*self.known, *(entry.measured for entry in self._waiting.values())]
        for site, entry in list(self._waiting.items()):
            update = Update.held(entry.path, self._plan)
            try:
                self._judge(site, entry.report, update, entry.measured, self._reference)
            except UpdateRejected as reason:
                self.rejected[site] = reason
            del self._waiting[site]
            entry.path.unlink(missing_ok=True)  # whoever holds updates has taken it
        return self.rejected

    def compared(self) -> Mapping[int, Compared]:
        """How the accepted updates lie to each other, by site."""
        found = cosines({site: self._sketches[site] for site in self.reports})
        usual = statistics.median_low([entry.norm for entry in self.known])
        return {site: Compared(norm_ratio=norm / usual, cosine=found[site]) for site, norm in self._norms.items()}

    def _judge(
        self, site: int, report: Report, update: Update, measured: UpdateNorm, reference: list[UpdateNorm]
    ) -> None:
        usual = statistics.median_low([entry.norm for entry in reference])
        images = statistics.median_low([entry.images for entry in reference])
        weight = min(measured.images, LARGEST_WEIGHT * images)
        # Who has time for more steps goes further, as their square root: seen from 2 to 64 steps.
        limit = self._limit * math.sqrt(max(1.0, weight / images))
        if measured.norm > limit * usual:
            raise UpdateRejected(f"its norm {measured.norm:.3g} is more than {limit:.3g} times the usual {usual:.3g}")
        self._aggregate.add(update, float(weight))
        self.known = [*self.known, measured][-REMEMBERED:]
        self.reports[site], self._norms[site] = (report, float(weight)), measured.norm
