"""Where one site stands in an exchange: whether it works, is away, was lost, or is owed another question."""

from dataclasses import dataclass

from .transport import Question

# A site that went away gets this long to come back before it is not waited for any more. It may still answer.
LOST_SECONDS = 30.0
# A site that comes back, or forgot what it was asked, is asked anew this often in one exchange.
MOST_QUESTIONS = 5
# A site that has said nothing for so many times as long as it may work in silence is asked how far it is: what it was
# asked, or its answer, may be lost. A ClientApp that starts, a poll and a slow machine take their time too. Next time
# twice as long: each of these that comes when the site has its answer ready has it sent once more.
QUIET = 2


@dataclass
class SiteProgress:
    """Of a site that was asked. Times are seconds of the exchange's clock."""

    latest: Question  # that it was asked
    heard: float  # when it last made progress
    told: float  # when it last said or carried anything, or was asked
    unanswered: int = 0  # questions since it last said anything
    questions: int = 0  # with the plan
    images: int = 0
    carried: int = 0
    gone_since: float | None = None
    over: bool = False  # answered, failed, or given up

    def was_asked(self, question: Question, now: float) -> None:
        """To do the work of the exchange, whatever became of it before."""
        self.latest, self.heard, self.told = question, now, now
        self.unanswered, self.questions, self.over = 0, self.questions + 1, False

    def was_asked_how_far(self, question: Question, now: float) -> None:
        """It is."""
        self.latest, self.told = question, now

    def said_something(self, now: float) -> None:
        """Anything about this exchange."""
        self.told, self.unanswered = now, 0

    def has_seen(self, images: object, most: int, now: float) -> bool:
        """Take what it says to have trained on; returns whether that is progress, and can be."""
        if not isinstance(images, int) or not self.images < images <= most:
            return False
        self.images, self.heard, self.gone_since = images, now, None
        return True

    def has_carried(self, total: int, now: float) -> None:
        """Take the bytes from and to it; a SuperLink that was started again counts from 0."""
        if total != self.carried:
            self.carried, self.heard, self.told = total, now, now

    def is_gone(self, now: float) -> None:
        """Note since when."""
        self.gone_since = self.gone_since or now

    def is_lost(self, now: float) -> bool:
        """Whether it has been gone for too long."""
        return self.gone_since is not None and now - self.gone_since > LOST_SECONDS

    def is_quiet(self, seconds: float, now: float) -> bool:
        """Whether it has said nothing for much longer than the `seconds` for which it may work in silence."""
        return now - self.told > QUIET * seconds * (1 << self.unanswered)

    def may_be_asked(self) -> bool:
        """Once more."""
        return self.questions < MOST_QUESTIONS
