"""The federation's round loop over any transport: plan → updates → next model → journal.

Knows nothing of Flower: a `Link` is all it needs.
"""

import contextlib
import errno
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from maskdm.config import MaskConfig
from maskdm.errors import FederationError
from maskdm.federated import auditlog
from maskdm.federated.auditlog import Message
from maskdm.federated.parcel import Parcel, Report
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import expected_shapes, squared_length
from maskdm.run.runfolder import append_line, atomic_write, read_lines, write_json
from maskdm.run.tensorfile import chunks, fp32
from maskdm.training.checkpoint import describe_checkpoint

from ..aggregation.directions import AGAINST
from ..aggregation.optimizers import Moments, step
from ..aggregation.updates import Aggregate, HeldUpdates, StreamingMean, check_reply, overall_loss
from .exchange import POLL_SECONDS, Clock, Exchange, new_exchange
from .intake import Intake
from .journal import Journal, Known
from .quality import QUALITY, known_line, new_line
from .selection import Standing, choose
from .settings import FederationConfig, changes_size, update_size
from .transport import Link

# Under-quorum rounds are tried again before the run gives up, after pauses of so many seconds.
PAUSES = (0.0, 10.0, 30.0)
# After a restart of the coordinator its clients come back within so many seconds, or not at once.
RETURN_SECONDS = 180.0
# How long a site may take to measure a model, and a multiple of that for all of them together.
MEASURE_SECONDS, MEASURE_LIMIT = 900.0, 4
# A full disk is no reason to lose a round: somebody may make room.
DISK_SECONDS = 600.0
EVERYBODY = 2**63

Pause = Callable[[float], None]
T = TypeVar("T")


def run_federation(
    link: Link,
    folder: Path,
    config: FederationConfig,
    pause: Pause = time.sleep,
    clock: Clock = time.monotonic,
) -> None:
    """Run all rounds that are still to do, then hand the final model to the sites.

    Args:
        folder: FED, with `prior.safetensors` and what earlier runs of the same federation left.

    Raises:
        FederationError: too few sites joined, or too few answered, in time. The last good model stays.
    """
    rounds = Rounds(link, folder, config, pause, clock)
    rounds.announce()
    rounds.evaluate_prior()
    while rounds.journal.number < config.rounds and not rounds.has_stopped():
        rounds.next_round()
    rounds.finish()


class Rounds:
    """A federation under way: its journal, its clients, and its clocks."""

    def __init__(self, link: Link, folder: Path, config: FederationConfig, pause: Pause, clock: Clock) -> None:
        self._link, self._folder, self._config, self._pause, self._clock = link, folder, config, pause, clock
        self._number = 0  # of the round in progress
        self.journal = self._write(lambda: Journal(folder, config.prior_sha256, config.keep_every))
        self._moments: Moments = self.journal.moments()
        self._began = False

    def say(self, event: dict[str, Any]) -> None:
        """Tell the process that started this one; a full disk must not end the federation for want of a line."""
        with contextlib.suppress(OSError):
            append_line(self._folder / "events.jsonl", {"time": time.time(), **event})

    def announce(self) -> None:
        """Say where the federation stands and what a round will carry."""
        config = self._config
        model = self.journal.metadata.model
        down, changes = self.journal.model_path().stat().st_size, changes_size(config, model)
        sizes = {"bytes_down": down, "bytes_down_later": changes or down, "bytes_up": update_size(config, model)}
        self.say({"event": "start", "round": self.journal.number, **sizes})

    def evaluate_prior(self) -> None:
        """What the federation is measured by, once.

        Raises:
            FederationError: too few clients came.
        """
        done = self.journal.number >= self._config.rounds  # then nobody need come any more
        if self._config.quality_plan() and not self._quality_of(0) and not done:
            self._wait_for_sites()
            self._evaluate(0, self._folder / "prior.safetensors")

    def has_stopped(self) -> bool:
        """Whether the held-out loss, where sites tell theirs, has not improved for `patience` rounds."""
        known, patience = self.journal.known, self._config.patience
        return bool(patience) and known.best_loss is not None and self.journal.number - known.best_round > patience

    def next_round(self) -> None:
        """Do one round and journal it; under quorum it is tried again.

        Raises:
            FederationError: too few clients came, or too few usable updates in all attempts.
        """
        number, needed = self.journal.number + 1, self._config.min_replies
        standings, exchanges, seconds = dict(self.journal.known.standings), list[Exchange](), 0.0
        for attempt, pause in enumerate(PAUSES, start=1):
            self._pause(pause)
            self._wait_for_sites()
            plan = self._plan("train", number)
            with self._scratch() as scratch:
                aggregate = self._aggregate(plan, scratch)
                intake = self._intake(plan, aggregate, scratch)
                have_rest = [site for site, standing in standings.items() if standing.replies]
                changes = self._write(lambda p=plan, s=scratch: self._changes(p, s)) if have_rest else None  # type: ignore[misc]
                exchange = self._exchange(plan, changes=changes, have_rest=have_rest)
                self._gather(exchange, intake, standings, number, attempt)
                exchanges.append(exchange)
                seconds += exchange.seconds()
                if aggregate.count >= needed:
                    self._commit(aggregate, self._line(plan, exchanges, intake, seconds), standings, intake)
                    return
            counts = {"attempt": attempt, "accepted": aggregate.count, "needed": needed}
            self.say({"event": "retry", "round": number, **counts})
        raise FederationError(
            f"round {number}: fewer than {needed} usable updates came in {len(PAUSES)} attempts: see events.jsonl for "
            f"the reasons; the last good model was kept"
        )

    def _gather(
        self, exchange: Exchange, intake: Intake, standings: dict[int, Standing], number: int, attempt: int
    ) -> None:
        """Ask the clients of a round and take in what they send; `standings` change in place."""
        config, drawn = self._config, set[int]()
        # At last also those are asked that rest: whoever rests may be well again.
        needed = config.min_replies if attempt < len(PAUSES) else EVERYBODY

        def who() -> list[int]:
            there = self._link.sites()
            room = None if config.clients_per_round is None else config.clients_per_round - len(drawn)
            if room is None or room > 0:  # who joins a full sample waits for the next round
                new = [site for site in there if site not in drawn]
                more = {"needed": needed - len(drawn), "at_most": room, "seed": config.seed, "attempt": attempt}
                drawn.update(choose(new, standings, number, **more))  # type: ignore[arg-type]
            return [site for site in there if site in drawn]

        def take(site: int, parcel: Parcel) -> None:
            self._write(lambda: intake.offer(site, parcel, standings.get(site, Standing()).declared))

        self._write(lambda: exchange.run(who, take))  # what arrives may need the disk
        for site, reason in self._write(intake.close).items():
            exchange.reject(site, str(reason))
        for site in exchange.failed.keys() | exchange.silent:
            standings[site] = standings.get(site, Standing()).failed(number)
            if standings[site].rests_until > number + 1:
                until, name = standings[site].rests_until, self._link.name(site)
                self.say({"event": "rests", "round": number, "site": name, "until": until})
        for site, (report, _) in intake.reports.items():
            standings[site] = standings.get(site, Standing()).answered(report.examples)

    def finish(self) -> None:
        """Choose the final model, give it to every site, learn its held-out loss, and let the sites go."""
        journal, lines = self.journal, read_lines(self._folder / "rounds.jsonl")
        # Those who are away for a moment, or come back after a restart of the coordinator, shall have the model too.
        wanted = self._config.min_replies if self._began else self._everybody()
        self._wait(wanted, min(RETURN_SECONDS, self._config.join_deadline))
        chosen = journal.number
        if self._config.patience:
            last = self._loss(self._hand_out("measure", journal.model_path())[1])
            best = journal.known.best_loss
            if best is not None and last is not None and best <= last:
                chosen = journal.known.best_round
                self._write(lambda: journal.adopt(chosen))
        model = self._folder / "model.safetensors"
        if self._config.quality_plan() and not self._quality_of(chosen):
            self._evaluate(chosen, model)
        exchange, reports = self._hand_out("finish", model)
        asked = [*lines, *read_lines(self._folder / QUALITY)]
        result = {
            "rounds": journal.number,
            "model_of_round": chosen,
            "stopped_by_patience": self._config.patience if self.has_stopped() else 0,
            "clients": len(exchange.accepted),
            "loss_prior": lines[0]["loss_before"] if lines else None,
            "loss_final": self._loss(reports),
            "quality_prior": self._quality_of(0),
            "quality_final": self._quality_of(chosen),
            "bytes_down": sum(line["bytes_down"] for line in asked) + exchange.bytes_down,
            "bytes_up": sum(line["bytes_up"] for line in asked) + exchange.bytes_up,
        }
        self._write(lambda: write_json(self._folder / "result.json", result))
        self.say({"event": "finished", **result})

    def _quality_of(self, number: int) -> dict[str, Any] | None:
        """What sites found of the model after a round, 0 for the prior, where they were asked."""
        plan = self._config.quality_plan()
        return known_line(read_lines(self._folder / QUALITY), number, plan) if plan else None

    def _evaluate(self, number: int, weights: Path) -> None:
        """Have every site that is there compare images that a model draws with its own."""
        plan = self._config.quality_plan()
        assert plan is not None
        limits = {"deadline": self._config.round_deadline, "limit": self._config.round_limit}
        exchange, reports = self._hand_out("evaluate", weights, **limits)
        named = {self._link.name(site): report for site, report in reports.items()}
        line = new_line(number, plan, named, self._config.aggregation, exchange.bytes_down, exchange.bytes_up)
        if line["sites"]:  # else it may be asked for again
            self._write(lambda: append_line(self._folder / QUALITY, line))
        self.say({"event": "quality", **line})

    def _hand_out(
        self, action: Literal["measure", "evaluate", "finish"], weights: Path, **limits: float
    ) -> tuple[Exchange, dict[int, Report]]:
        """Have a model measured by every site that is there; returns what they answered too."""
        about = describe_checkpoint(weights, "--out")
        about = about.model_copy(update={"prior_sha256": self.journal.metadata.prior_sha256})  # a prior names none
        plan = self._plan(action, max(1, self.journal.number)).model_copy(update={"model": about})
        reports: dict[int, Report] = {}

        def take(site: int, parcel: Parcel) -> None:
            reports[site] = check_reply(parcel, plan, self.journal.known.standings.get(site, Standing()).declared)

        # Less than for a round; but where clients wait for their turn, nobody shall be lost here either.
        allowed = self._config.round_deadline
        deadline = max(min(MEASURE_SECONDS, allowed), allowed / 4)
        limit = min(MEASURE_LIMIT * deadline, self._config.round_limit)
        exchange = self._exchange(plan, weights, **({"deadline": deadline, "limit": limit} | limits))
        self._write(lambda: exchange.run(self._link.sites, take))
        return exchange, reports

    def _loss(self, reports: dict[int, Report]) -> float | None:
        return self._overall([(report.loss_before, report) for report in reports.values()])

    def _commit(
        self, aggregate: Aggregate, line: dict[str, Any], standings: dict[int, Standing], intake: Intake
    ) -> None:
        before = self.journal.known
        best_round, best_loss = before.best_round, before.best_loss
        # What sites measured before they trained is the loss of the model that the round began with.
        if line["loss_before"] is not None and (best_loss is None or line["loss_before"] < best_loss):
            best_round, best_loss = self.journal.number, line["loss_before"]
        known = Known(line=line, standings=standings, measured=intake.known, best_round=best_round, best_loss=best_loss)
        for name, about in line["updates"].items():
            if about["cosine"] is not None and about["cosine"] < AGAINST:
                self.say({"event": "against", "round": line["round"], "site": name, **about})
        changed = next_weights(self.journal.weights(), aggregate.result(), self._moments, self._config)
        metadata = finetuned(self.journal.metadata, self.journal.number + 1, line["images_seen"])
        ema = self._config.server_ema
        self._write(lambda: self.journal.commit(metadata, changed, self._moments, known, ema))
        self._write(self.journal.settle)
        self.say({"event": "round", "rounds": self._config.rounds, **line})

    def _write(self, act: Callable[[], T]) -> T:
        """Do what writes to the disk; a full one is waited for, and `act` is done again."""
        since = last = -math.inf
        while True:
            try:
                return act()
            except OSError as error:
                now = self._clock()
                since, last = now if now - last > DISK_SECONDS else since, now
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or now - since > DISK_SECONDS:
                    raise FederationError(
                        f"{self._folder} cannot be written to ({error.strerror}): make room and run the same command "
                        f"again; the last good model was kept"
                    ) from error
                self.say({"event": "disk full", "round": self._number, "seconds": DISK_SECONDS})
                self._pause(min(5.0, DISK_SECONDS))

    def _record(self, direction: str, peer: str, round_number: int, verdict: str, message: Message) -> None:
        """One line of FED's audit log; room for it is waited for: a log that is to be believed has no gaps."""
        about = (direction, peer, round_number, verdict, message)
        self._write(lambda: auditlog.record(self._folder / auditlog.AUDIT, *about))

    def _line(self, plan: RoundPlan, exchanges: list[Exchange], intake: Intake, seconds: float) -> dict[str, Any]:
        """Of rounds.jsonl: what came of a round, and what all attempts at it cost."""
        reports = [report for report, _ in intake.reports.values()]
        return {
            "round": plan.round,
            "clients": len(reports),
            "examples": sum(report.examples for report in reports),
            "images_seen": sum(report.images_seen for report in reports),
            "loss_before": self._overall([(report.loss_before, report) for report in reports]),
            "loss_after": self._overall([(report.loss_after, report) for report in reports]),
            "bytes_down": sum(exchange.bytes_down for exchange in exchanges),
            "bytes_up": sum(exchange.bytes_up for exchange in exchanges),
            "seconds": round(seconds, 3),
            "rejected": sum(len(exchange.failed) for exchange in exchanges),
            "silent": sum(len(exchange.silent) for exchange in exchanges),
            "late": sum(exchange.late for exchange in exchanges),
            "attempts": len(exchanges),
            "updates": {
                self._link.name(site): {
                    "norm_ratio": float(f"{about.norm_ratio:.3g}"),
                    "cosine": None if about.cosine is None else round(about.cosine, 2),
                }
                for site, about in intake.compared().items()
            },
        }

    def _overall(self, losses: list[tuple[float | None, Report]]) -> float | None:
        return overall_loss([(loss, report.examples) for loss, report in losses], self._config.aggregation)

    def _intake(self, plan: RoundPlan, aggregate: Aggregate, scratch: Path) -> Intake:
        weights, shapes = self.journal.weights(), expected_shapes(plan.model.model)
        model_norm = math.sqrt(sum(squared_length(weights(name)) for name in shapes))
        before, ratio = self.journal.known.measured, self._config.max_norm_ratio
        return Intake(plan, aggregate, before, ratio, model_norm, secrets.randbits(128), scratch)

    def _aggregate(self, plan: RoundPlan, scratch: Path) -> Aggregate:
        config = self._config
        if config.aggregation == "mean":
            return StreamingMean()
        return HeldUpdates(config.aggregation, config.byzantine, plan, scratch)

    def _changes(self, plan: RoundPlan, scratch: Path) -> Path | None:
        """A file of the weights that training changes, where that is not all of them: the others are at the sites."""
        if plan.train == "all":
            return None
        path, weights = scratch / "changes.safetensors", self.journal.weights()
        shapes = expected_shapes(plan.model.model)
        layout = {name: shapes[name] for name in plan.changed()}
        atomic_write(path, chunks(fp32(layout), lambda name: weights(name).numpy()))
        return path

    def _exchange(self, plan: RoundPlan, weights: Path | None = None, **more: Any) -> Exchange:
        usual = {"deadline": self._config.round_deadline, "limit": self._config.round_limit}
        shared = {"say": self.say, "record": self._record, "clock": self._clock, "pause": self._pause}
        return Exchange(self._link, plan, weights or self.journal.model_path(), **(usual | shared | more))

    def _plan(self, action: Literal["train", "measure", "evaluate", "finish"], number: int) -> RoundPlan:
        config, self._number = self._config, number
        shared = RoundPlan.model_fields.keys() & FederationConfig.model_fields.keys()
        return RoundPlan.model_validate(
            {
                **{name: getattr(config, name) for name in shared},
                "exchange": new_exchange(),
                "action": action,
                "round": number,
                "model": self.journal.metadata,
                "quality": config.quality_plan() if action == "evaluate" else None,
            }
        )

    def _everybody(self) -> int:
        return max(self._config.min_clients, self._config.min_replies)

    def _wait_for_sites(self) -> None:
        """Until a round can begin: the first one with everybody, later ones with as many as close a round.

        Raises:
            FederationError: too few came.
        """
        config, goes_on = self._config, self.journal.number > 0
        if goes_on and not self._began:
            self._wait(self._everybody(), min(RETURN_SECONDS, config.join_deadline))
        needed = config.min_replies if goes_on or self._began else self._everybody()
        if not self._wait(needed, config.join_deadline):
            raise FederationError(
                f"only {len(self._link.sites())} of {needed} clients joined in {config.join_deadline:.0f} s "
                f"(--join-deadline)"
            )
        self._began = True

    def _wait(self, needed: int, seconds: float) -> bool:
        """Whether so many clients are there; each one more than ever before starts the time anew."""
        since, most, told = self._clock(), -1, -1
        while (there := len(self._link.sites())) < needed:
            if there > most:
                since, most = self._clock(), there
            if there != told:
                told = there
                self.say({"event": "waiting", "clients": there, "needed": needed})
            if self._clock() - since > seconds:
                return False
            self._pause(POLL_SECONDS)
        return True

    @contextlib.contextmanager
    def _scratch(self) -> Any:
        """Room on the disk for updates that wait or are held, empty before and gone after."""
        scratch = self._folder / ".updates"
        shutil.rmtree(scratch, ignore_errors=True)
        self._write(scratch.mkdir)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


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
