"""The federation's round loop over any transport: plan → updates → next model → journal.

Knows nothing of Flower: a `Link` is all it needs.
"""

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from maskdm.checkpoint import CheckpointMetadata, describe_checkpoint
from maskdm.config import MaskConfig
from maskdm.errors import FederationError
from maskdm.parcel import Parcel, Report
from maskdm.protocol import RoundPlan
from maskdm.runfolder import append_line, atomic_write, read_lines, write_json
from maskdm.tensorfile import chunks
from maskdm.trainable import expected_shapes
from maskdm_server.aggregation import Aggregate, HeldUpdates, StreamingMean
from maskdm_server.exchange import POLL_SECONDS, Clock, Exchange
from maskdm_server.federation import FederationConfig, changes_size, update_size
from maskdm_server.intake import Intake
from maskdm_server.journal import Journal, Known, fp32
from maskdm_server.link import Link
from maskdm_server.optimizers import Moments, step
from maskdm_server.standings import Standing, choose

# Under-quorum rounds are tried again this often before the run gives up.
ATTEMPTS = 3
# How long sites get to take the final model.
FAREWELL_SECONDS = 120.0
# A full disk is no reason to lose a round: somebody may make room.
DISK_SECONDS = 600.0

Pause = Callable[[float], None]


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
    while rounds.journal.number < config.rounds and not rounds.has_stopped():
        rounds.next_round()
    rounds.finish()


class Rounds:
    """A federation under way: its journal, its clients, and its clocks."""

    def __init__(self, link: Link, folder: Path, config: FederationConfig, pause: Pause, clock: Clock) -> None:
        self.journal = Journal(folder, config.keep_every)
        self._link, self._folder, self._config, self._pause, self._clock = link, folder, config, pause, clock
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

    def has_stopped(self) -> bool:
        """Whether the held-out loss has not improved for `patience` rounds."""
        return bool(self._config.patience) and self.journal.number - self._best_round() > self._config.patience

    def next_round(self) -> None:
        """Do one round and journal it; under quorum it is tried again.

        Raises:
            FederationError: too few clients came, or too few usable updates in all attempts.
        """
        number, needed = self.journal.number + 1, self._config.min_replies
        standings, rejected, seconds = dict(self.journal.known.standings), 0, 0.0
        for attempt in range(1, ATTEMPTS + 1):
            self._wait_for_sites(needed if self._began else self._config.min_clients)
            self._began = True
            plan = self._plan("train", number)
            with self._scratch() as scratch:
                aggregate = self._aggregate(plan, scratch)
                intake = Intake(plan, aggregate, self.journal.known.measured, self._config.max_norm_ratio, scratch)
                have_rest = [site for site, standing in standings.items() if standing.replies]
                changes = self._changes(plan, scratch) if have_rest else None
                exchange = self._exchange(plan, self._config.round_deadline, changes=changes, have_rest=have_rest)
                self._gather(exchange, intake, standings, number)
                rejected, seconds = rejected + len(exchange.failed), seconds + exchange.seconds()
                if aggregate.count >= needed:
                    line = self._line(plan, exchange, intake, rejected, seconds, attempt)
                    self._commit(aggregate, line, standings, intake)
                    return
            counts = {"attempt": attempt, "accepted": aggregate.count, "needed": needed}
            self.say({"event": "retry", "round": number, **counts})
        raise FederationError(
            f"round {number}: fewer than {needed} usable updates came in {ATTEMPTS} attempts: see events.jsonl for the "
            f"reasons; the last good model was kept"
        )

    def _gather(self, exchange: Exchange, intake: Intake, standings: dict[int, Standing], number: int) -> None:
        """Ask the clients of a round and take in what they send; `standings` change in place."""
        config, drawn = self._config, set[int]()

        def who() -> list[int]:
            there = self._link.sites()
            if config.clients_per_round and len(drawn) >= config.clients_per_round:
                return [site for site in there if site in drawn]  # who joins later waits for the next round
            drawn.update(draw(there))
            return [site for site in there if site in drawn]

        def draw(there: Sequence[int]) -> list[int]:
            return choose(
                [site for site in there if site not in drawn],
                standings,
                number,
                needed=config.min_replies - len(drawn),
                at_most=config.clients_per_round and config.clients_per_round - len(drawn),
                seed=config.seed,
            )

        def take(site: int, parcel: Parcel) -> None:
            intake.offer(site, parcel, standings.get(site, Standing()).declared)

        exchange.run(who, take)
        for site, reason in intake.close().items():
            exchange.reject(site, str(reason))
        for site in exchange.failed.keys() | exchange.silent:
            standings[site] = standings.get(site, Standing()).failed(number)
            if standings[site].rests_until > number + 1:
                self.say({"event": "rests", "round": number, "site": str(site), "until": standings[site].rests_until})
        for site, (report, _) in intake.reports.items():
            standings[site] = standings.get(site, Standing()).answered(report.examples)

    def finish(self) -> None:
        """Choose the final model, give it to every site, learn its held-out loss, and let the sites go."""
        journal, lines = self.journal, read_lines(self._folder / "rounds.jsonl")
        chosen = journal.number
        if self._config.patience and journal.number:
            last = self._measure("measure", journal.model_path())
            best = journal.known.best_loss
            if best is not None and (last is None or best <= last):
                chosen = journal.known.best_round
                journal.adopt(chosen)
        final = self._folder / "model.safetensors" if chosen else journal.model_path(0)
        if not chosen:
            journal.adopt(0)
        exchange, loss = self._hand_out("finish", final)
        result = {
            "rounds": journal.number,
            "model_of_round": chosen,
            "stopped_by_patience": self._config.patience if self.has_stopped() else 0,
            "clients": len(exchange.accepted),
            "loss_prior": lines[0]["loss_before"] if lines else None,
            "loss_final": loss,
            "bytes_down": sum(line["bytes_down"] for line in lines) + exchange.bytes_down,
            "bytes_up": sum(line["bytes_up"] for line in lines) + exchange.bytes_up,
        }
        write_json(self._folder / "result.json", result)
        self.say({"event": "finished", **result})

    def _measure(self, action: Literal["measure", "finish"], weights: Path) -> float | None:
        return self._hand_out(action, weights)[1]

    def _hand_out(self, action: Literal["measure", "finish"], weights: Path) -> tuple[Exchange, float | None]:
        plan = self._plan(action, max(1, self.journal.number))
        if self.journal.number:
            plan = plan.model_copy(update={"model": describe_checkpoint(weights, "--out")})
        with self._scratch() as scratch:
            intake = Intake(plan, StreamingMean(), [], self._config.max_norm_ratio, scratch)
            exchange = self._exchange(plan, min(FAREWELL_SECONDS, self._config.round_deadline), weights)

            def take(site: int, parcel: Parcel) -> None:
                intake.offer(site, parcel, None)

            exchange.run(self._link.sites, take)
        return exchange, _mean([(report.loss_before, weight) for report, weight in intake.reports.values()])

    def _commit(
        self, aggregate: Aggregate, line: dict[str, Any], standings: dict[int, Standing], intake: Intake
    ) -> None:
        before = self.journal.known
        best_round, best_loss = before.best_round, before.best_loss
        # What sites measured before they trained is the loss of the model that the round began with.
        if line["loss_before"] is not None and (best_loss is None or line["loss_before"] < best_loss):
            best_round, best_loss = self.journal.number, line["loss_before"]
        known = Known(line=line, standings=standings, measured=intake.known, best_round=best_round, best_loss=best_loss)
        changed = next_weights(self.journal.weights(), aggregate.result(), self._moments, self._config)
        metadata = finetuned(self.journal.metadata, self.journal.number + 1, line["images_seen"])
        ema = self._config.server_ema
        self._write(lambda: self.journal.commit(metadata, changed, self._moments, known, ema))
        self._write(self.journal.settle)
        self.say({"event": "round", "rounds": self._config.rounds, **line})

    def _write(self, act: Callable[[], None]) -> None:
        """Write to the journal; a full disk is waited for."""
        deadline = self._clock() + DISK_SECONDS
        while True:
            try:
                return act()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or self._clock() > deadline:
                    raise FederationError(
                        f"the round could not be journalled ({error.strerror}): make room in {self._folder} and run "
                        f"the same command again; the last good model was kept"
                    ) from error
                self.say({"event": "disk full", "round": self.journal.number + 1, "seconds": DISK_SECONDS})
                self._pause(min(5.0, DISK_SECONDS))

    def _line(
        self, plan: RoundPlan, exchange: Exchange, intake: Intake, rejected: int, seconds: float, attempt: int
    ) -> dict[str, Any]:
        reports: list[tuple[Report, float]] = list(intake.reports.values())
        return {
            "round": plan.round,
            "clients": len(reports),
            "examples": sum(report.examples for report, _ in reports),
            "images_seen": sum(report.images_seen for report, _ in reports),
            "loss_before": _mean([(report.loss_before, weight) for report, weight in reports]),
            "loss_after": _mean([(report.loss_after, weight) for report, weight in reports]),
            "bytes_down": exchange.bytes_down,
            "bytes_up": exchange.bytes_up,
            "seconds": round(seconds, 3),
            "rejected": rejected,
            "silent": len(exchange.silent),
            "late": exchange.late,
            "attempts": attempt,
        }

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
        layout = {name: shape for name, shape in expected_shapes(plan.model.model).items() if name in plan.changed()}
        atomic_write(path, chunks(fp32(layout), lambda name: weights(name).numpy()))
        return path

    def _exchange(self, plan: RoundPlan, deadline: float, weights: Path | None = None, **more: Any) -> Exchange:
        return Exchange(
            self._link,
            plan,
            weights or self.journal.model_path(),
            deadline=deadline,
            limit=self._config.round_limit,
            say=self.say,
            clock=self._clock,
            pause=self._pause,
            **more,
        )

    def _plan(self, action: Literal["train", "measure", "finish"], number: int) -> RoundPlan:
        config = self._config
        shared = RoundPlan.model_fields.keys() & FederationConfig.model_fields.keys()
        return RoundPlan.model_validate(
            {
                **{name: getattr(config, name) for name in shared},
                "exchange": time.time_ns(),
                "action": action,
                "round": number,
                "model": self.journal.metadata,
            }
        )

    def _wait_for_sites(self, needed: int) -> None:
        """Each client that joins starts the deadline anew."""
        since, told = self._clock(), -1
        while (there := len(self._link.sites())) < needed:
            if there != told:
                since = since if there < told else self._clock()
                told = there
                self.say({"event": "waiting", "clients": there, "needed": needed})
            if self._clock() - since > self._config.join_deadline:
                raise FederationError(
                    f"only {there} of {needed} clients joined in {self._config.join_deadline:.0f} s (--join-deadline)"
                )
            self._pause(POLL_SECONDS)

    @contextlib.contextmanager
    def _scratch(self) -> Any:
        """Room on the disk for updates that wait or are held, empty before and gone after."""
        scratch = self._folder / ".updates"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _best_round(self) -> int:
        return self.journal.known.best_round


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


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
