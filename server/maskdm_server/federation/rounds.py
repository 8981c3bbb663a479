"""The federation's round loop over any transport: plan → updates → next model → journal.

Knows nothing of Flower: a `Link` is all it needs.
"""

import time
from pathlib import Path
from typing import Any

from maskdm.errors import FederationError
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.networks.trainable import expected_shapes
from maskdm.run.runfolder import atomic_write, read_lines, write_json
from maskdm.run.tensorfile import chunks, fp32

from ..aggregation.optimizers import Moments
from ..aggregation.updates import Aggregate
from . import events
from .closing import against, finetuned, known_after, new_aggregate, new_intake, next_weights, round_line
from .exchange import POLL_SECONDS, Exchange, new_exchange
from .intake import Intake
from .journal import Journal, Known
from .quality import QUALITY, Measurements
from .selection import Standing, choose
from .settings import FederationConfig, changes_size, round_plan, update_size
from .transport import Link
from .writing import Clock, FederationWriter, Pause

# Under-quorum rounds are tried again before the run gives up, after pauses of so many seconds.
PAUSES = (0.0, 10.0, 30.0)
# After a restart of the coordinator its clients come back within so many seconds, or not at once.
RETURN_SECONDS = 180.0
EVERYBODY = 2**63


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
        self._writer = FederationWriter(folder, pause, clock)
        self.journal = self._writer.write(lambda: Journal(folder, config.prior_sha256, config.keep_every))
        self._measurements = Measurements(link, folder, config, self.journal, self._writer, self._exchange)
        self._moments: Moments = self.journal.moments()
        self._began = False

    def announce(self) -> None:
        """Say where the federation stands and what a round will carry."""
        config, model = self._config, self.journal.metadata.model
        down = self.journal.model_path().stat().st_size
        later, up = changes_size(config, model) or down, update_size(config, model)
        self._writer.say(
            events.RoundsBegun(round=self.journal.number, bytes_down=down, bytes_down_later=later, bytes_up=up)
        )

    def evaluate_prior(self) -> None:
        """What the federation is measured by, once.

        Raises:
            FederationError: too few clients came.
        """
        done = self.journal.number >= self._config.rounds  # then nobody need come any more
        if self._measurements.is_due(0) and not done:
            self._wait_for_sites()
            self._measurements.evaluate(0, self._folder / "prior.safetensors")

    def has_stopped(self) -> bool:
        """Whether the held-out loss, where sites tell theirs, has not improved for `patience` rounds."""
        known, patience = self.journal.known, self._config.patience
        return bool(patience) and known.best_loss is not None and self.journal.number - known.best_round > patience

    def next_round(self) -> None:
        """Do one round and journal it; under quorum it is tried again.

        Raises:
            FederationError: too few clients came, or too few usable updates in all attempts.
        """
        number, config, write = self.journal.number + 1, self._config, self._writer.write
        standings, exchanges, seconds = dict(self.journal.known.standings), list[Exchange](), 0.0
        for attempt, pause in enumerate(PAUSES, start=1):
            self._pause(pause)
            self._wait_for_sites()
            plan = round_plan(config, "train", number, self.journal.metadata, new_exchange())
            self._writer.round = number
            with self._writer.scratch() as scratch:
                aggregate = new_aggregate(config, plan, scratch)
                intake = new_intake(config, plan, self.journal, aggregate, scratch)
                have_rest = [site for site, standing in standings.items() if standing.replies]
                changes = write(lambda p=plan, s=scratch: self._changes(p, s)) if have_rest else None  # type: ignore[misc]
                exchange = self._exchange(plan, changes=changes, have_rest=have_rest)
                self._gather(exchange, intake, standings, number, attempt)
                exchanges.append(exchange)
                seconds += exchange.seconds()
                if aggregate.count >= config.min_replies:
                    line = round_line(number, exchanges, seconds, intake, config.aggregation, self._link.name)
                    self._commit(aggregate, line, known_after(self.journal.known, line, standings, intake))
                    return
            accepted, needed = aggregate.count, config.min_replies
            self._writer.say(events.RoundRepeated(round=number, attempt=attempt, accepted=accepted, needed=needed))
        raise FederationError(
            f"round {number}: fewer than {config.min_replies} usable updates came in {len(PAUSES)} attempts: see "
            f"events.jsonl for the reasons; the last good model was kept"
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
            self._writer.write(lambda: intake.offer(site, parcel, standings.get(site, Standing()).declared))

        self._writer.write(lambda: exchange.run(who, take))  # what arrives may need the disk
        for site, reason in self._writer.write(intake.close).items():
            exchange.reject(site, str(reason))
        for site in exchange.failed.keys() | exchange.silent:
            standings[site] = standings.get(site, Standing()).failed(number)
            if standings[site].rests_until > number + 1:
                name, until = self._link.name(site), standings[site].rests_until
                self._writer.say(events.SiteRests(round=number, site=name, until=until))
        for site, (report, _) in intake.reports.items():
            standings[site] = standings.get(site, Standing()).answered(report.examples)

    def _commit(self, aggregate: Aggregate, line: events.RoundLine, known: Known) -> None:
        """Make the round count."""
        journal, write = self.journal, self._writer.write
        for event in against(line):
            self._writer.say(event)
        changed = next_weights(journal.weights(), aggregate.result(), self._moments, self._config)
        metadata = finetuned(journal.metadata, line.round, line.images_seen)
        write(lambda: journal.commit(metadata, changed, self._moments, known, self._config.server_ema))
        write(journal.settle)
        self._writer.say(events.RoundDone.model_validate({"rounds": self._config.rounds, **line.model_dump()}))

    def finish(self) -> None:
        """Choose the final model, give it to every site, learn its held-out loss, and let the sites go."""
        journal, lines, measurements = self.journal, read_lines(self._folder / "rounds.jsonl"), self._measurements
        # Those who are away for a moment, or come back after a restart of the coordinator, shall have the model too.
        wanted = self._config.min_replies if self._began else self._everybody()
        self._wait(wanted, min(RETURN_SECONDS, self._config.join_deadline))
        chosen = journal.number
        if self._config.patience:
            last, best = measurements.loss_of(journal.model_path()), journal.known.best_loss
            if best is not None and last is not None and best <= last:
                chosen = journal.known.best_round
                self._writer.write(lambda: journal.adopt(chosen))
        model = self._folder / "model.safetensors"
        if measurements.is_due(chosen):
            measurements.evaluate(chosen, model)
        exchange, reports = measurements.hand_out("finish", model)
        asked = [*lines, *read_lines(self._folder / QUALITY)]
        result = events.Result(
            rounds=journal.number,
            model_of_round=chosen,
            stopped_by_patience=self._config.patience if self.has_stopped() else 0,
            clients=len(exchange.accepted),
            loss_prior=lines[0]["loss_before"] if lines else None,
            loss_final=measurements.overall(reports),
            quality_prior=measurements.quality_of(0),
            quality_final=measurements.quality_of(chosen),
            bytes_down=sum(line["bytes_down"] for line in asked) + exchange.bytes_down,
            bytes_up=sum(line["bytes_up"] for line in asked) + exchange.bytes_up,
        )
        document = result.model_dump(mode="json")
        self._writer.write(lambda: write_json(self._folder / "result.json", document))
        self._writer.say(events.FederationFinished.model_validate(document))

    def _exchange(self, plan: RoundPlan, weights: Path | None = None, **more: Any) -> Exchange:
        usual = {"deadline": self._config.round_deadline, "limit": self._config.round_limit}
        around = {"clock": self._clock, "pause": self._pause}
        shared = {"say": self._writer.say, "record": self._writer.record, **around}
        return Exchange(self._link, plan, weights or self.journal.model_path(), **(usual | shared | more))

    def _changes(self, plan: RoundPlan, scratch: Path) -> Path | None:
        """A file of the weights that training changes, where that is not all of them: the others are at the sites."""
        if plan.train == "all":
            return None
        path, weights = scratch / "changes.safetensors", self.journal.weights()
        shapes = expected_shapes(plan.model.model)
        layout = {name: shapes[name] for name in plan.changed()}
        atomic_write(path, chunks(fp32(layout), lambda name: weights(name).numpy()))
        return path

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
                self._writer.say(events.SitesAwaited(clients=there, needed=needed))
            if self._clock() - since > seconds:
                return False
            self._pause(POLL_SECONDS)
        return True
