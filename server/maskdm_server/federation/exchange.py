"""One question to several sites, and what becomes of it: who answered, who failed, who was lost."""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskdm.federated.auditlog import NOTHING, Message, message_of
from maskdm.federated.parcel import NUMBER_NAMES, Outcome, Parcel, outcome_of
from maskdm.federated.plan import RoundPlan
from maskdm.run.tensorfile import Stored

from ..aggregation.updates import UpdateRejected
from .transport import Link, Question, Reply

# Each question costs the SuperLink several ms of CPU; a round lasts many seconds.
POLL_SECONDS = 0.5
# A site that is at work says so this often.
HEARTBEAT_SECONDS = 30.0
# A site that went away gets this long to come back before it is not waited for any more. It may still answer.
LOST_SECONDS = 30.0
# A site that comes back, or forgot what it was asked, is asked anew this often in one exchange.
MOST_QUESTIONS = 5
# A site that has said nothing for so many times as long as it may work in silence is asked how far it is: what it was
# asked, or its answer, may be lost. A ClientApp that starts, a poll and a slow machine take their time too. Next time
# twice as long: each of these that comes when the site has its answer ready has it sent once more.
QUIET = 2
# How many times as long as news the weights may be under way.
DOWNLOAD = 4

Say = Callable[[dict[str, Any]], None]
Record = Callable[[str, str, int, str, Message], None]  # direction, peer, round, verdict, what was sent
Clock = Callable[[], float]


@dataclass
class Asked:
    """Where a site stands in an exchange."""

    heard: float  # when it last made progress
    told: float  # when it last said or carried anything, or was asked
    latest: Question  # that it was asked
    unanswered: int = 0  # questions since it last said anything
    questions: int = 1
    images: int = 0
    carried: int = 0
    gone_since: float | None = None
    over: bool = False  # answered, failed, or given up


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
        pause: Callable[[float], None] = time.sleep,
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
        self._asked: dict[int, Asked] = {}
        self._sent: dict[Path, Message] = {}  # by the file of the weights
        self._started = clock()
        self.failed: dict[int, str] = {}
        self.accepted: set[int] = set()
        self.silent: set[int] = set()
        self.late = self.bytes_up = self.bytes_down = 0

    def run(self, choose: Callable[[], Sequence[int]], take: Callable[[int, Parcel], None]) -> None:
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
            if self._clock() - self._started >= self._limit or all(asked.over for asked in self._asked.values()):
                break
            self._pause(POLL_SECONDS)
            self._invite(choose())
        for site, asked in self._asked.items():
            if not asked.over:
                self._silence(site, asked, f"the round reached its limit of {self._limit:.0f} s")

    def seconds(self) -> float:
        """Since the exchange began."""
        return self._clock() - self._started

    def _invite(self, sites: Sequence[int]) -> None:
        new = [site for site in sites if site not in self._asked]
        if new:
            self._ask(new)
            self._say(
                {
                    "event": "sent",
                    "round": self._plan.round,
                    "rounds": self._plan.rounds,
                    "exchange": self._plan.exchange,
                    "clients": len(self._asked),
                    "action": self._plan.action,
                }
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
                    self._expect(site, question)
                    self._note("out", site, f"sent: {self._plan.action}", self._message_with(changes or self._weights))

    def _expect(self, site: int, question: Question) -> None:
        now = self._clock()
        asked = self._asked.setdefault(site, Asked(now, now, question, questions=0))
        asked.questions += 1
        asked.heard = asked.told = now
        asked.latest, asked.unanswered, asked.over = question, 0, False

    def _ask_how_far(self, site: int, asked: Asked) -> None:
        asked.latest, asked.told = Question(self._plan.exchange, self._wait), self._clock()
        self._link.ask([site], asked.latest, self._patience())
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

    def _hear(self, reply: Reply, take: Callable[[int, Parcel], None]) -> None:
        site, asked, parcel = reply.site, self._asked.get(reply.site), reply.parcel
        ours = self._plan.exchange
        answered = (reply.question and reply.question.exchange) if parcel is None else parcel.scalars.get("exchange")
        if parcel is not None:
            self.bytes_up += parcel.size()
        if asked is None or (answered is not None and answered != ours):
            self.late += 1
            self._note("in", site, "late", unchecked(parcel))
            self._say({"event": "late", "round": self._plan.round, "site": self._link.name(site)})
            return
        asked.told, asked.unanswered = self._clock(), 0
        newest = reply.question is asked.latest  # of several that are under way only one has a successor
        if site in self.accepted:
            self._note("in", site, "accepted before", unchecked(parcel))
        elif parcel is None:
            if reply.lost and asked.questions < MOST_QUESTIONS:
                self._note("in", site, f"lost: {reply.problem}")
                asked.gone_since = asked.gone_since or self._clock()
            else:
                self._fail(site, asked, reply.problem)
        elif outcome_of(parcel.scalars) == Outcome.WORKING:
            self._note("in", site, "working", unchecked(parcel))
            self._take_note(site, asked, parcel)
            if newest:
                self._ask_how_far(site, asked)
        elif outcome_of(parcel.scalars) == Outcome.UNKNOWN and not newest:
            self._note("in", site, "unknown", unchecked(parcel))
        elif outcome_of(parcel.scalars) == Outcome.UNKNOWN and asked.questions < MOST_QUESTIONS:
            self._note("in", site, "unknown", unchecked(parcel))
            self._have_rest.discard(site)
            self._ask([site])
        else:
            try:
                take(site, parcel)  # which reads an update once, and has its digest made on the way
            except UpdateRejected as reason:
                self._fail(site, asked, str(reason), unchecked(parcel))
            else:
                self._note("in", site, "accepted", described(parcel))
                asked.over = True
                self.accepted.add(site)
                self.silent.discard(site)
                self.failed.pop(site, None)

    def _take_note(self, site: int, asked: Asked, parcel: Parcel) -> None:
        images = parcel.scalars.get("images_seen", 0)
        if isinstance(images, int) and asked.images < images <= self._plan.largest_images():
            asked.images, asked.heard, asked.gone_since = images, self._clock(), None
            total = sum(other.images for other in self._asked.values())
            name = self._link.name(site)
            self._say({"event": "working", "round": self._plan.round, "site": name, "images": images, "all": total})

    def _give_up(self) -> None:
        """Stop waiting for those who made no progress for too long, and for those who went away."""
        there, now = set(self._link.sites()), self._clock()
        carried = self._link.carried()
        for site, asked in self._asked.items():
            if asked.over:
                continue
            if carried.get(site, 0) != asked.carried:  # a SuperLink that was started again counts from 0
                asked.carried, asked.heard, asked.told = carried.get(site, 0), now, now
            if site in there and asked.gone_since is not None:  # it is back: what it was asked may be lost
                asked.gone_since = None
                if asked.questions < MOST_QUESTIONS:
                    self._ask([site])
            elif site not in there:
                asked.gone_since = asked.gone_since or now
                if now - asked.gone_since > LOST_SECONDS:
                    self._silence(site, asked, "the connection to it was lost")
            if not asked.over and now - asked.heard > self._deadline:
                self._silence(site, asked, f"no progress for {self._deadline:.0f} s")
            quiet = now - asked.told > QUIET * self._wait * 2**asked.unanswered
            if quiet and self._link.may_lose and site in there and not asked.over:
                asked.unanswered += 1
                self._ask_how_far(site, asked)

    def _silence(self, site: int, asked: Asked, reason: str) -> None:
        asked.over = True
        self.silent.add(site)
        self._note("in", site, f"silent: {reason}")
        self._say({"event": "silent", "round": self._plan.round, "site": self._link.name(site), "reason": reason})

    def reject(self, site: int, reason: str) -> None:
        """Take back what was taken in."""
        self.accepted.discard(site)
        self._fail(site, self._asked[site], reason)

    def _fail(self, site: int, asked: Asked, reason: str, message: Message = NOTHING) -> None:
        asked.over = True
        self.silent.discard(site)
        self.failed[site] = reason
        self._note("in", site, f"rejected: {reason}", message)
        self._say({"event": "rejected", "round": self._plan.round, "site": self._link.name(site), "reason": reason})


def unchecked(parcel: Parcel | None) -> Message:
    """What is written down of a reply that was not taken in."""
    return replace(described(parcel), arrays={}) if parcel is not None else NOTHING  # a stranger chose their names


def described(parcel: Parcel) -> Message:
    """A stranger's reply, of whose numbers those are written down that JSON and a reader can bear."""
    known = {name: parcel.scalars[name] for name in NUMBER_NAMES if name in parcel.scalars}
    readable = {name: value for name, value in known.items() if isinstance(value, int | float) and abs(value) < 2**63}
    return replace(message_of(replace(parcel, scalars=readable)), bytes=parcel.size())
