"""Has sites measure a model, evaluate it, or take it with them; FED/quality.jsonl has a line for each evaluation."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from maskdm.federated.parcel import QUALITY_NAMES, Parcel, QualityReport, Report
from maskdm.federated.plan import QualityPlan
from maskdm.run.runfolder import append_line, read_lines
from maskdm.training.checkpoint import describe_checkpoint

from ..aggregation.robust import Rule
from ..aggregation.updates import check_reply, overall_loss
from .events import ModelEvaluated, QualityLine
from .exchange import Exchange, new_exchange
from .journal import Journal
from .selection import Standing
from .settings import FederationConfig, round_plan
from .transport import Link
from .writing import FederationWriter

QUALITY = "quality.jsonl"
# How long a site may take to measure a model, and a multiple of that for all of them together.
MEASURE_SECONDS, MEASURE_LIMIT = 900.0, 4


class Measurements:
    """Exchanges of a federation in which nobody trains."""

    def __init__(
        self,
        link: Link,
        folder: Path,
        config: FederationConfig,
        journal: Journal,
        writer: FederationWriter,
        exchange: Callable[..., Exchange],
    ) -> None:
        """
        Args:
            exchange: makes one, of a plan, weights and limits.
        """
        self._link, self._folder, self._config = link, folder, config
        self._journal, self._writer, self._exchange = journal, writer, exchange

    def is_due(self, number: int) -> bool:
        """Whether the model after a round, 0 for the prior, is to be evaluated, and was not yet."""
        return self._config.evaluate > 0 and not self.quality_of(number)

    def quality_of(self, number: int) -> dict[str, Any] | None:
        """What sites found of the model after a round, 0 for the prior, where they were asked."""
        plan = self._config.quality_plan()
        return known_line(read_lines(self._folder / QUALITY), number, plan) if plan else None

    def evaluate(self, number: int, weights: Path) -> None:
        """Have every site that is there compare images that a model draws with its own."""
        plan = self._config.quality_plan()
        assert plan is not None
        limits = {"deadline": self._config.round_deadline, "limit": self._config.round_limit}
        exchange, reports = self.hand_out("evaluate", weights, **limits)
        named = {self._link.name(site): report for site, report in reports.items()}
        line = new_line(number, plan, named, self._config.aggregation, exchange.bytes_down, exchange.bytes_up)
        document = line.model_dump(mode="json")
        if line.sites:  # else it may be asked for again
            self._writer.write(lambda: append_line(self._folder / QUALITY, document))
        self._writer.say(ModelEvaluated.model_validate(document))

    def loss_of(self, weights: Path) -> float | None:
        """The held-out loss of a model at all sites that are there and tell theirs."""
        return self.overall(self.hand_out("measure", weights)[1])

    def overall(self, reports: Mapping[int, Report]) -> float | None:
        """The held-out loss that sites measured, of those that tell theirs."""
        losses = [(report.loss_before, report.examples) for report in reports.values()]
        return overall_loss(losses, self._config.aggregation)

    def hand_out(
        self, action: Literal["measure", "evaluate", "finish"], weights: Path, **limits: float
    ) -> tuple[Exchange, dict[int, Report]]:
        """Have a model measured by every site that is there; returns what they answered too."""
        journal, config = self._journal, self._config
        about = describe_checkpoint(weights, "--out")
        about = about.model_copy(update={"prior_sha256": journal.metadata.prior_sha256})  # a prior names none
        plan = round_plan(config, action, max(1, journal.number), about, new_exchange())
        self._writer.round = plan.round
        reports: dict[int, Report] = {}

        def take(site: int, parcel: Parcel) -> None:
            reports[site] = check_reply(parcel, plan, journal.known.standings.get(site, Standing()).declared)

        # Less than for a round; but where clients wait for their turn, nobody shall be lost here either.
        deadline = max(min(MEASURE_SECONDS, config.round_deadline), config.round_deadline / 4)
        limit = min(MEASURE_LIMIT * deadline, config.round_limit)
        exchange = self._exchange(plan, weights, **({"deadline": deadline, "limit": limit} | limits))
        self._writer.write(lambda: exchange.run(self._link.sites, take))
        return exchange, reports


def new_line(
    number: int, plan: QualityPlan, reports: Mapping[str, Report], rule: Rule, bytes_down: int, bytes_up: int
) -> QualityLine:
    """Figures of all sites: as losses, their median, weighted by images held out, or with a robust rule unweighted.

    A figure is of those sites that gave it, which need not be the same for each.

    Args:
        number: of the round whose model it was; 0 for the prior.
        reports: by the site's name; those without figures count for nothing.
    """
    found = {name: report for name, report in reports.items() if isinstance(report, QualityReport) and report.quality()}
    figures: dict[str, float] = {}
    for name in QUALITY_NAMES[1:]:
        given = [(r.quality()[name], r.quality_images or 0) for r in found.values() if name in r.quality()]
        if (figure := overall_loss(given, rule)) is not None:
            figures[name] = figure
    return QualityLine(
        round=number,
        **plan.model_dump(mode="json"),
        sites=len(found),
        quality_images=sum(report.quality_images or 0 for report in found.values()),
        quality=figures,
        by_site={name: {"quality_images": report.quality_images, **report.quality()} for name, report in found.items()},
        bytes_down=bytes_down,
        bytes_up=bytes_up,
    )


def known_line(lines: Iterable[Mapping[str, Any]], number: int, plan: QualityPlan) -> dict[str, Any] | None:
    """The newest line about the model of a round that was evaluated in the same way."""
    wanted = {"round": number, **plan.model_dump(mode="json")}
    return next((dict(line) for line in reversed(list(lines)) if wanted.items() <= line.items()), None)
