"""One question to several sites, and what becomes of it: who answered, who failed, who was lost."""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from maskdm.federated.auditlog import NOTHING, Message, message_of
from maskdm.federated.parcel import NUMBER_NAMES, Outcome, Parcel, outcome_of
from maskdm.federated.plan import RoundPlan
from maskdm.run.events import Event
from maskdm.run.tensorfile import Stored

from ..aggregation.updates import UpdateRejected
from .events import PlanSent, ReplyLate, ReplyRejected, SiteAtWork, SiteSilent
from .progress import SiteProgress
from .transport import Link, Question, Reply
from .writing import Clock, Pause

# Each question costs the SuperLink several ms of CPU; a round lasts many seconds.
POLL_SECONDS = 0.5
# A site that is at work says so this often.
HEARTBEAT_SECONDS = 30.0
# How many times as long as news the weights may be under way.
DOWNLOAD = 4

Say = Callable[[Event], None]
Record = Callable[[str, str, int, str, Message], None]  # direction, peer, round, verdict, what was sent
Take = Callable[[int, Parcel], None]


def new_exchange() -> int:
    """A number for an exchange, above all of earlier milliseconds, that nobody can tell beforehand; in [0, 2**63)."""
    return time.time_ns() // 10**6 << 20 | secrets.randbits(20)


class Exchange:
    """Sends a plan, listens until every site has answered or made no progress for too long."""

    def __init__(
        self,
        link: Link,
        plan: RoundPlan,
        weights: Path,
        *,
        deadline: float,
        limit: float,
        say: Say,
        record: Record,
        clock: Clock = time.monotonic,
        pause: Pause = time.sleep,
        changes: Path | None = None,
        have_rest: Iterable[int] = (),
    ) -> None:
        """Prepare it; nothing is sent yet.

        Args:
            record: writes a message, or what became of it, into the audit log; it may wait for room.
            changes: what of the weights training changes; sites of `have_rest` are sent no more than that.
        """
        self._link, self._plan, self._weights = link, plan, weights
        self._changes, self._have_rest = changes, set(have_rest) if changes else set[int]()
        self._deadline, self._limit, self._say, self._clock, self._pause = deadline, limit, say, clock, pause
        self._record = record
        self._wait = min(HEARTBEAT_SECONDS, deadline / 3)
        self._document = plan.model_dump_json()
        self._asked: dict[int, SiteProgress] = {}
        self._sent: dict[Path, Message] = {}  # by the file of the weights
        self._started = clock()
        self.failed: dict[int, str] = {}
        self.accepted: set[int] = set()
        self.silent: set[int] = set()
        self.late = self.bytes_up = self.bytes_down = 0

    def run(self, choose: Callable[[], Sequence[int]], take: Take) -> None:
        """Ask whoever `choose` names, also those who come later, until nobody is waited for.

        Args:
            take: keeps a whole reply, or raises UpdateRejected.

        Raises:
            OSError: the link's, e.g. a full disk; it may be run on.
        """
        self._invite(choose())
        while True:
            for reply in self._link.receive():
                self._hear(reply, take)
            self._give_up()
            if self._clock() - self._started >= self._limit or all(site.over for site in self._asked.values()):
                break
            self._pause(POLL_SECONDS)
            self._invite(choose())
        for site, progress in self._asked.items():
            if not progress.over:
                self._silence(site, f"the round reached its limit of {self._limit:.0f} s")

    def seconds(self) -> float:
        """Since the exchange began."""
        return self._clock() - self._started

    def _invite(self, sites: Sequence[int]) -> None:
        new = [site for site in sites if site not in self._asked]
        if new:
            self._ask(new)
            plan = self._plan
            self._say(
                PlanSent(
                    round=plan.round,
                    rounds=plan.rounds,
                    exchange=plan.exchange,
                    clients=len(self._asked),
                    action=plan.action,
                )
            )

    def _ask(self, sites: Sequence[int]) -> None:
        part = [site for site in sites if site in self._have_rest]
        whole = [site for site in sites if site not in self._have_rest]
        for those, changes in ((part, self._changes), (whole, None)):
            if those:
                question = Question(self._plan.exchange, self._wait, self._document, self._weights, changes)
                # A download may take long, and while bytes are carried the site is waited for.
                self._link.ask(those, question, DOWNLOAD * self._patience())
                self.bytes_down += len(those) * ((changes or self._weights).stat().st_size + len(self._document))
                for site in those:
                    now = self._clock()
                    self._asked.setdefault(site, SiteProgress(question, now, now)).was_asked(question, now)
                    self._note("out", site, f"sent: {self._plan.action}", self._message_with(changes or self._weights))

    def _ask_how_far(self, site: int) -> None:
        question = Question(self._plan.exchange, self._wait)
        self._asked[site].was_asked_how_far(question, self._clock())
        self._link.ask([site], question, self._patience())
        self._note("out", site, "how far", message_of(Parcel({}, {"exchange": self._plan.exchange})))

    def _patience(self) -> float:
        """How long a message may be under way: a site that is silent for longer is not waited for."""
        return self._deadline + 2 * self._wait

    def _message_with(self, weights: Path) -> Message:
        """What goes down with the plan; the weights are hashed once, one array in memory at a time."""
        if weights not in self._sent:
            parcel = Parcel(Stored(weights), {"exchange": self._plan.exchange}, self._document)
            self._sent[weights] = message_of(parcel)
        return self._sent[weights]

    def _note(self, direction: str, site: int, verdict: str, message: Message = NOTHING) -> None:
        self._record(direction, self._link.name(site), self._plan.round, verdict, message)

    def _hear(self, reply: Reply, take: Take) -> None:
        site, parcel, progress = reply.site, reply.parcel, self._asked.get(reply.site)
        if parcel is not None:
            self.bytes_up += parcel.size()
        if progress is None or self._is_of_another(reply):
            self.late += 1
            self._note("in", site, "late", unchecked(parcel))
            self._say(ReplyLate(round=self._plan.round, site=self._link.name(site)))
            return
        progress.said_something(self._clock())
        newest = reply.question is progress.latest  # of several that are under way only one has a successor
        if site in self.accepted:
            self._note("in", site, "accepted before", unchecked(parcel))
        elif parcel is None:
            if reply.lost and progress.may_be_asked():
                self._note("in", site, f"lost: {reply.problem}")
                progress.is_gone(self._clock())
            else:
                self._fail(site, reply.problem)
        elif outcome_of(parcel.scalars) == Outcome.WORKING:
            self._note("in", site, "working", unchecked(parcel))
            self._take_note(site, progress, parcel)
            if newest:
                self._ask_how_far(site)
        elif outcome_of(parcel.scalars) == Outcome.UNKNOWN and (not newest or progress.may_be_asked()):
            self._note("in", site, "unknown", unchecked(parcel))
            if newest:
                self._have_rest.discard(site)
                self._ask([site])
        else:
            try:
                take(site, parcel)  # which reads an update once, and has its digest made on the way
            except UpdateRejected as reason:
                self._fail(site, str(reason), unchecked(parcel))
            else:
                progress.over = True
                self.accepted.add(site)
                self.silent.discard(site)
                self.failed.pop(site, None)
                self._note("in", site, "accepted", message_about(parcel))

    def _is_of_another(self, reply: Reply) -> bool:
        """Whether a reply says that it belongs to another exchange."""
        if reply.parcel is None:
            return reply.question is not None and reply.question.exchange != self._plan.exchange
        return reply.parcel.scalars.get("exchange", self._plan.exchange) != self._plan.exchange

    def _take_note(self, site: int, progress: SiteProgress, parcel: Parcel) -> None:
        images = parcel.scalars.get("images_seen", 0)
        if progress.has_seen(images, self._plan.largest_images(), self._clock()):
            total = sum(other.images for other in self._asked.values())
            name = self._link.name(site)
            self._say(SiteAtWork(round=self._plan.round, site=name, images=progress.images, all=total))

    def _give_up(self) -> None:
        """Stop waiting for those who made no progress for too long, and for those who went away."""
        there, now = set(self._link.sites()), self._clock()
        carried = self._link.carried()
        for site, progress in self._asked.items():
            if progress.over:
                continue
            progress.has_carried(carried.get(site, 0), now)
            if site not in there:
                progress.is_gone(now)
                if progress.is_lost(now):
                    self._silence(site, "the connection to it was lost")
            elif progress.gone_since is not None:  # it is back: what it was asked may be lost
                progress.gone_since = None
                if progress.may_be_asked():
                    self._ask([site])
            if not progress.over and now - progress.heard > self._deadline:
                self._silence(site, f"no progress for {self._deadline:.0f} s")
            if self._link.may_lose and site in there and not progress.over and progress.is_quiet(self._wait, now):
                progress.unanswered += 1
                self._ask_how_far(site)

    def _silence(self, site: int, reason: str) -> None:
        self._asked[site].over = True
        self.silent.add(site)
        self._note("in", site, f"silent: {reason}")
        self._say(SiteSilent(round=self._plan.round, site=self._link.name(site), reason=reason))

    def reject(self, site: int, reason: str) -> None:
        """Take back what was taken in."""
        self.accepted.discard(site)
        self._fail(site, reason)

    def _fail(self, site: int, reason: str, message: Message = NOTHING) -> None:
        self._asked[site].over = True
        self.silent.discard(site)
        self.failed[site] = reason
        self._note("in", site, f"rejected: {reason}", message)
        self._say(ReplyRejected(round=self._plan.round, site=self._link.name(site), reason=reason))


def unchecked(parcel: Parcel | None) -> Message:
    """What is written down of a reply that was not taken in."""
    return replace(message_about(parcel), arrays={}) if parcel is not None else NOTHING  # a stranger chose their names


def message_about(parcel: Parcel) -> Message:
    """A stranger's reply, of whose numbers those are written down that JSON and a reader can bear."""
    known = {name: parcel.scalars[name] for name in NUMBER_NAMES if name in parcel.scalars}
    readable = {name: value for name, value in known.items() if isinstance(value, int | float) and abs(value) < 2**63}
    return replace(message_of(replace(parcel, scalars=readable)), bytes=parcel.size())
