"""What a round becomes once its replies are in: its line, the next model and its metadata, what is known of sites."""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from maskdm.config import MaskConfig
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import expected_shapes, squared_length

from ..aggregation.directions import AGAINST
from ..aggregation.optimizers import Moments, step
from ..aggregation.robust import Rule
from ..aggregation.updates import Aggregate, HeldUpdates, StreamingMean, overall_loss
from .events import Compared, RoundLine, UpdateAgainst
from .exchange import Exchange
from .intake import Intake
from .journal import Journal, Known
from .selection import Standing
from .settings import FederationConfig


def new_aggregate(config: FederationConfig, plan: RoundPlan, scratch: Path) -> Aggregate:
    """What takes in the updates of a round, and gives their aggregated difference."""
    if config.aggregation == "mean":
        return StreamingMean()
    return HeldUpdates(config.aggregation, config.byzantine, plan, scratch)


def new_intake(
    config: FederationConfig, plan: RoundPlan, journal: Journal, aggregate: Aggregate, scratch: Path
) -> Intake:
    """What judges the updates of a round before they are aggregated."""
    weights, shapes = journal.weights(), expected_shapes(plan.model.model)
    model_norm = math.sqrt(sum(squared_length(weights(name)) for name in shapes))
    before, ratio = journal.known.measured, config.max_norm_ratio
    return Intake(plan, aggregate, before, ratio, model_norm, secrets.randbits(128), scratch)


def round_line(
    number: int,
    exchanges: Sequence[Exchange],
    seconds: float,
    intake: Intake,
    rule: Rule,
    name: Callable[[int], str],
) -> RoundLine:
    """What came of a round, and what all attempts at it cost.

    Args:
        exchanges: one an attempt.
        seconds: of all attempts.
        intake: of the last attempt.
        name: of a site.
    """
    reports = [report for report, _ in intake.reports.values()]
    return RoundLine(
        round=number,
        clients=len(reports),
        examples=sum(report.examples for report in reports),
        images_seen=sum(report.images_seen for report in reports),
        loss_before=overall_loss([(report.loss_before, report.examples) for report in reports], rule),
        loss_after=overall_loss([(report.loss_after, report.examples) for report in reports], rule),
        bytes_down=sum(exchange.bytes_down for exchange in exchanges),
        bytes_up=sum(exchange.bytes_up for exchange in exchanges),
        seconds=round(seconds, 3),
        rejected=sum(len(exchange.failed) for exchange in exchanges),
        silent=sum(len(exchange.silent) for exchange in exchanges),
        late=sum(exchange.late for exchange in exchanges),
        attempts=len(exchanges),
        updates={name(site): _rounded(about) for site, about in intake.compared().items()},
    )


def _rounded(about: Compared) -> Compared:
    cosine = None if about.cosine is None else round(about.cosine, 2)
    return Compared(norm_ratio=float(f"{about.norm_ratio:.3g}"), cosine=cosine)


def against(line: RoundLine) -> list[UpdateAgainst]:
    """Those updates of a round that point against the others."""
    return [
        UpdateAgainst(round=line.round, site=site, norm_ratio=about.norm_ratio, cosine=about.cosine)
        for site, about in line.updates.items()
        if about.cosine is not None and about.cosine < AGAINST
    ]


def known_after(before: Known, line: RoundLine, standings: Mapping[int, Standing], intake: Intake) -> Known:
    """What is known after a round.

    Sites measure before they train: theirs is the loss of the model that the round began with.
    """
    best_round, best_loss = before.best_round, before.best_loss
    if line.loss_before is not None and (best_loss is None or line.loss_before < best_loss):
        best_round, best_loss = line.round - 1, line.loss_before
    return Known(
        line=line.model_dump(mode="json"),
        standings=dict(standings),
        measured=intake.known,
        best_round=best_round,
        best_loss=best_loss,
    )


def next_weights(
    weights: Callable[[str], Tensor],
    deltas: Iterable[tuple[str, Tensor]],
    moments: Moments,
    config: FederationConfig,
) -> dict[str, Tensor]:
    """Those weights that an aggregated difference changes, after the server's step; `moments` change in place."""
    changed = {}
    for name, difference in deltas:
        changed[name] = weights(name)
        step({name: changed[name]}, [(name, difference)], moments, config.server_step())
    return changed


def finetuned(metadata: CheckpointMetadata, rounds: int, images: int) -> CheckpointMetadata:
    """Metadata after a round: whole images were seen, and more of them."""
    changes = {
        "mask": MaskConfig(kind="none", ratio=0),
        "effective_mask_ratio": 0.0,
        "rounds": rounds,
        "images_seen": metadata.images_seen + images,
    }
    return metadata.model_copy(update=changes)
