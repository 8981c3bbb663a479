"""Lets updates in one by one: none that is not finite, none far longer than the others, none that outweighs them."""

import statistics
from pathlib import Path

from maskdm.config import Frozen
from maskdm.parcel import Parcel, Report
from maskdm.protocol import RoundPlan
from maskdm_server.aggregation import LARGEST_WEIGHT, Aggregate, Update, UpdateRejected, check_reply

# As many updates must be known before one can be called long; the first ones wait on the disk for that.
ENOUGH = 3
REMEMBERED = 64


class Measured(Frozen):
    """What later updates are compared with."""

    norm: float
    images: int


class Intake:
    """Of one round. The lower median is compared with, so that of two updates the shorter one is the measure."""

    def __init__(
        self, plan: RoundPlan, aggregate: Aggregate, before: list[Measured], max_norm_ratio: float, folder: Path
    ) -> None:
        self._plan, self._aggregate, self._limit, self._folder = plan, aggregate, max_norm_ratio, folder
        self.known = list(before)
        self.reports: dict[int, tuple[Report, float]] = {}  # accepted ones with their weights
        self.rejected: dict[int, UpdateRejected] = {}  # of those that waited
        self._reference: list[Measured] | None = None  # of those that waited
        self._waiting: list[tuple[int, Report, Measured, Path]] = []

    def offer(self, site: int, parcel: Parcel, declared: int | None) -> Report:
        """Take in one reply; the first ones of a federation are only judged when there are more, or by `close`.

        Raises:
            UpdateRejected: it must not touch the model.
            OSError: e.g. a full disk; nothing was taken in, and it may be offered again.
        """
        report = check_reply(parcel, self._plan, declared)
        update = Update(parcel.arrays, self._plan)
        measured = Measured(norm=update.norm(), images=report.images_seen)
        if len(self.known) + len(self._waiting) + 1 < ENOUGH:
            path = self._folder / f"waiting-{site}.safetensors"
            update.save(path)
            self._waiting.append((site, report, measured, path))
        else:
            reference = [*self.known, *(entry[2] for entry in self._waiting), measured]
            self._judge(site, report, update, measured, reference)
        return report

    def close(self) -> dict[int, UpdateRejected]:
        """Judge those that wait; returns the sites whose updates were rejected, and why.

        Raises:
            OSError: e.g. a full disk; it may be called again.
        """
        if self._reference is None:
            self._reference = [*self.known, *(entry[2] for entry in self._waiting)]
        while self._waiting:
            site, report, measured, path = self._waiting[0]
            try:
                self._judge(site, report, Update.held(path, self._plan), measured, self._reference)
            except UpdateRejected as reason:
                self.rejected[site] = reason
            del self._waiting[0]
            path.unlink(missing_ok=True)  # whoever holds updates has taken it
        return self.rejected

    def _judge(self, site: int, report: Report, update: Update, measured: Measured, reference: list[Measured]) -> None:
        usual = statistics.median_low([entry.norm for entry in reference])
        if measured.norm > self._limit * usual:
            raise UpdateRejected(
                f"its norm {measured.norm:.3g} is more than {self._limit:g} times the usual {usual:.3g}"
            )
        images = statistics.median_low([entry.images for entry in reference])
        weight = float(min(measured.images, LARGEST_WEIGHT * images))
        self._aggregate.add(update, weight)
        self.known = [*self.known, measured][-REMEMBERED:]
        self.reports[site] = report, weight
