"""The federation's round loop over any transport: plan → updates → mean → new model → journal.

Knows nothing of Flower: `Link` is all it needs, so tests run it in one process.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from maskdm.checkpoint import (
    CheckpointMetadata,
    expected_shapes,
    load_checkpoint,
    save_checkpoint,
    sha256_of,
)
from maskdm.config import Frozen, MaskConfig
from maskdm.errors import FederationError
from maskdm.protocol import Parcel, Report, RoundPlan, to_arrays
from maskdm.runfolder import append_line, keep_lines, read_lines, write_json
from maskdm_server.aggregation import StreamingMean, UpdateRejected, check_reply, federated_average

# Each question costs the SuperLink several ms of CPU; a round lasts many seconds.
POLL_SECONDS = 0.5
# Under-quorum rounds are tried again this often before the run gives up.
ATTEMPTS = 3
# How long sites get to take the final model.
FAREWELL_SECONDS = 120.0


class FederationConfig(Frozen):
    """What `serve` was asked to do; FED/config.json holds it, so that the same command continues it."""

    prior_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    federation: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    min_clients: Annotated[int, Field(ge=1)] = 2
    min_replies: Annotated[int, Field(ge=1)] = 1
    local_images: Annotated[int, Field(ge=1)] = 2048
    batch_size: Annotated[int, Field(ge=1)] = 32
    lr: Annotated[float, Field(gt=0, le=1)] = 5e-5
    seed: Annotated[int, Field(ge=0)] = 0
    join_deadline: Annotated[float, Field(gt=0)] = 3600.0
    round_deadline: Annotated[float, Field(gt=0)] = 3600.0


@dataclass(frozen=True)
class Reply:
    """What came back from a site; `parcel` is None where the site or the transport failed."""

    site: int
    parcel: Parcel | None


class Link(Protocol):
    """A way to reach sites."""

    def sites(self) -> list[int]:
        """Sites that are there now."""

    def send(self, sites: list[int], parcel: Parcel, seconds: float) -> None:
        """Start a new exchange: the same parcel to each site; older replies are no longer waited for."""

    def receive(self) -> Iterable[Reply]:
        """Replies of the current exchange that arrived since the last call; does not wait."""


Say = Callable[[dict[str, Any]], None]


def run_federation(
    link: Link, folder: Path, config: FederationConfig, pause: Callable[[float], None] = time.sleep
) -> None:
    """Run all rounds that are still to do, then hand the final model to the sites.

    Args:
        folder: FED, with `prior.safetensors` and what earlier runs of the same federation left.

    Raises:
        FederationError: too few sites joined, or too few answered, in time. The last good model stays.
    """
    events = folder / "events.jsonl"

    def say(event: dict[str, Any]) -> None:
        append_line(events, {"time": time.time(), **event})

    weights, metadata = load_state(folder)
    lines = [line for line in read_lines(folder / "rounds.jsonl") if line["round"] <= metadata.rounds]
    keep_lines(folder / "rounds.jsonl", lines)
    shapes = expected_shapes(metadata.model)
    down = sum(4 * math.prod(shape) for shape in shapes.values())
    say({"event": "start", "round": metadata.rounds, "bytes_down": down, "bytes_up": down // 2})
    for number in range(metadata.rounds + 1, config.rounds + 1):
        plan = _plan(config, "train", number, metadata)
        update, line = _round_with_retries(link, plan, config, weights, shapes, say, pause)
        weights = federated_average(weights, update)
        metadata = finetuned(metadata, number, metadata.images_seen + line["images_seen"])
        save_round(folder, weights, metadata)
        append_line(folder / "rounds.jsonl", line)
        say({"event": "round", "rounds": config.rounds, **line})
    _farewell(link, config, metadata, weights, folder, say, pause)


def load_state(folder: Path) -> tuple[dict[str, Tensor], CheckpointMetadata]:
    """Weights and metadata after the last whole round, or the prior's."""
    done = sorted((folder / "rounds").glob("*.safetensors"))
    if done:
        return load_checkpoint(done[-1], "--out")
    weights, metadata = load_checkpoint(folder / "prior.safetensors", "--prior")
    prior = sha256_of(folder / "prior.safetensors")
    return weights, metadata.model_copy(update={"prior_sha256": prior, "rounds": 0})


def save_round(folder: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata) -> None:
    """Journal a round, keep the one before it, and publish the model: each file whole or not at all."""
    save_checkpoint(folder / "rounds" / f"{metadata.rounds:05d}.safetensors", weights, metadata)
    save_checkpoint(folder / "model.safetensors", weights, metadata)
    for old in sorted((folder / "rounds").glob("*.safetensors"))[:-2]:
        old.unlink()


def finetuned(metadata: CheckpointMetadata, rounds: int, images_seen: int) -> CheckpointMetadata:
    """Metadata after a round: whole images were seen, and more of them."""
    changes = {
        "mask": MaskConfig(kind="none", ratio=0),
        "effective_mask_ratio": 0.0,
        "rounds": rounds,
        "images_seen": images_seen,
    }
    return metadata.model_copy(update=changes)


def _plan(
    config: FederationConfig, action: Literal["train", "finish"], number: int, metadata: CheckpointMetadata
) -> RoundPlan:
    return RoundPlan(
        federation=config.federation,
        action=action,
        round=number,
        rounds=config.rounds,
        local_images=config.local_images,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=config.seed,
        model=metadata,
    )


def _round_with_retries(
    link: Link,
    plan: RoundPlan,
    config: FederationConfig,
    weights: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    say: Say,
    pause: Callable[[float], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    for attempt in range(1, ATTEMPTS + 1):
        needed = config.min_clients if plan.round == 1 else config.min_replies
        sites = _wait_for_sites(link, needed, config.join_deadline, say, pause)
        mean = StreamingMean(shapes)
        line = _one_round(link, plan, sites, config.round_deadline, weights, shapes, mean, say, pause)
        if mean.count >= config.min_replies:
            return mean.mean(), line
        say(
            {
                "event": "retry",
                "round": plan.round,
                "attempt": attempt,
                "accepted": mean.count,
                "needed": config.min_replies,
            }
        )
    raise FederationError(
        f"round {plan.round}: fewer than {config.min_replies} usable updates came in {ATTEMPTS} attempts of "
        f"{config.round_deadline:.0f} s: see events.jsonl for the reasons; the last good model was kept"
    )


def _one_round(
    link: Link,
    plan: RoundPlan,
    sites: list[int],
    deadline: float,
    weights: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    mean: StreamingMean,
    say: Say,
    pause: Callable[[float], None],
) -> dict[str, Any]:
    """Send the plan, add each good update to `mean` as it arrives, and return the round's line."""
    started = time.monotonic()
    parcel = Parcel(to_arrays(weights), {}, plan.model_dump_json())
    reports: list[Report] = []
    bytes_up = rejected = answered = 0
    link.send(sites, parcel, deadline)
    say({"event": "sent", "round": plan.round, "rounds": plan.rounds, "clients": len(sites), "action": plan.action})
    while answered < len(sites) and time.monotonic() - started < deadline:
        for reply in link.receive():
            answered += 1
            try:
                if reply.parcel is None:
                    raise UpdateRejected("the site was lost or its work failed")
                bytes_up += reply.parcel.size()
                report = check_reply(reply.parcel, plan, shapes)
                if plan.action == "train":
                    mean.add(reply.parcel.arrays, weight=report.examples)
                reports.append(report)
            except UpdateRejected as reason:
                rejected += 1
                say({"event": "rejected", "round": plan.round, "site": str(reply.site), "reason": str(reason)})
        pause(POLL_SECONDS)
    examples = sum(report.examples for report in reports)
    return {
        "round": plan.round,
        "clients": len(reports),
        "examples": examples,
        "images_seen": sum(report.images_seen for report in reports),
        "loss_before": _mean([(r.loss_before, r.examples) for r in reports]),
        "loss_after": _mean([(r.loss_after, r.examples) for r in reports]),
        "bytes_down": parcel.size() * len(sites),
        "bytes_up": bytes_up,
        "seconds": round(time.monotonic() - started, 3),
        "rejected": rejected,
        "silent": len(sites) - answered,
    }


def _farewell(
    link: Link,
    config: FederationConfig,
    metadata: CheckpointMetadata,
    weights: dict[str, Tensor],
    folder: Path,
    say: Say,
    pause: Callable[[float], None],
) -> None:
    """Give every site the final model, learn its held-out loss, and let the sites go."""
    plan = _plan(config, "finish", max(1, metadata.rounds), metadata)
    shapes = expected_shapes(metadata.model)
    deadline = min(FAREWELL_SECONDS, config.round_deadline)
    line = _one_round(link, plan, link.sites(), deadline, weights, shapes, StreamingMean(shapes), say, pause)
    lines = read_lines(folder / "rounds.jsonl")
    result = {
        "rounds": metadata.rounds,
        "clients": line["clients"],
        "loss_prior": lines[0]["loss_before"] if lines else None,
        "loss_final": line["loss_before"] if line["clients"] else None,
        "bytes_down": sum(entry["bytes_down"] for entry in lines) + line["bytes_down"],
        "bytes_up": sum(entry["bytes_up"] for entry in lines) + line["bytes_up"],
    }
    write_json(folder / "result.json", result)
    say({"event": "finished", **result})


def _wait_for_sites(link: Link, needed: int, deadline: float, say: Say, pause: Callable[[float], None]) -> list[int]:
    started = time.monotonic()
    told = -1
    while len(sites := link.sites()) < needed:
        if len(sites) != told:
            told = len(sites)
            say({"event": "waiting", "clients": told, "needed": needed})
        if time.monotonic() - started > deadline:
            raise FederationError(f"only {len(sites)} of {needed} clients joined in {deadline:.0f} s (--join-deadline)")
        pause(POLL_SECONDS)
    return sites


def _mean(pairs: list[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
