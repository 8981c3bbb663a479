"""What sites say of a model that they evaluated, together: one line of FED/quality.jsonl for each model."""

from collections.abc import Iterable, Mapping
from typing import Any

from maskdm.federated.parcel import QUALITY_NAMES, QualityReport, Report
from maskdm.federated.plan import QualityPlan

from ..aggregation.robust import Rule
from ..aggregation.updates import overall_loss

QUALITY = "quality.jsonl"


def new_line(
    number: int, plan: QualityPlan, reports: Mapping[str, Report], rule: Rule, bytes_down: int, bytes_up: int
) -> dict[str, Any]:
    """Figures of all sites: as losses, their median, weighted by images held out, or with a robust rule unweighted.

    A figure is of those sites that gave it, which need not be the same for each.

    Args:
        number: of the round whose model it was; 0 for the prior.
        reports: by the site's name; those without figures count for nothing.
    """
    found = {name: report for name, report in reports.items() if isinstance(report, QualityReport) and report.quality()}
    figures = {}
    for name in QUALITY_NAMES[1:]:
        given = [(r.quality()[name], r.quality_images or 0) for r in found.values() if name in r.quality()]
        if given:
            figures[name] = overall_loss(given, rule)
    return {
        "round": number,
        **plan.model_dump(mode="json"),
        "sites": len(found),
        "quality_images": sum(report.quality_images or 0 for report in found.values()),
        "quality": figures,
        "by_site": {
            name: {"quality_images": report.quality_images, **report.quality()} for name, report in found.items()
        },
        "bytes_down": bytes_down,
        "bytes_up": bytes_up,
    }


def known_line(lines: Iterable[Mapping[str, Any]], number: int, plan: QualityPlan) -> dict[str, Any] | None:
    """The newest line about the model of a round that was evaluated in the same way."""
    wanted = {"round": number, **plan.model_dump(mode="json")}
    return next((dict(line) for line in reversed(list(lines)) if wanted.items() <= line.items()), None)
