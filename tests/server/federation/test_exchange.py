"""One question to several sites: who is waited for and how long, who is asked again, and what still counts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskdm.federated.auditlog import Message, message_of
from maskdm.federated.parcel import Outcome, Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.run.events import Event
from maskdm.run.tensorfile import digest_of, pack, unpack
from maskdm_server.aggregation.updates import UpdateRejected
from maskdm_server.federation import exchange as under_test
from maskdm_server.federation.events import PlanSent, ReplyLate, ReplyRejected, SiteAtWork, SiteSilent
from maskdm_server.federation.exchange import HEARTBEAT_SECONDS, Exchange, new_exchange
from maskdm_server.federation.progress import LOST_SECONDS, MOST_QUESTIONS, QUIET
from maskdm_server.federation.transport import Question, Reply

from ..conftest import Time, numbers

# What becomes of a question at a site: replies, each some seconds later.
Behaviour = Callable[[Question], Sequence[tuple[float, Parcel | Reply]]]

LONG = 10_000


def test_the_numbers_of_exchanges_rise_with_time_and_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_900_000_000_000_000_000]
    monkeypatch.setattr(under_test, "time", SimpleNamespace(time_ns=lambda: now[0]))
    assert len({new_exchange() for _ in range(50)}) > 45, "at one moment"
    later = []
    for _ in range(50):
        now[0] += 10**6
        later.append(new_exchange())
    assert sorted(set(later)) == later
    assert later[-1] < 2**63


class Scripted:
    """A link to behaviours. Times are seconds since the start."""

    def __init__(
        self,
        time: Time,
        sites: Mapping[int, Behaviour],
        there: Callable[[int, float], bool] = lambda site, seconds: True,
        carried: Callable[[float], Mapping[int, int]] = lambda seconds: {},
        may_lose: bool = False,
    ) -> None:
        self.may_lose = may_lose
        self._time, self._behaviours, self._there, self._carried = time, sites, there, carried
        self._began = time.now
        self._under_way: list[tuple[float, Reply]] = []
        self.asked: list[tuple[float, int, Question]] = []
        self.seconds: set[float] = set()

    def passed(self) -> float:
        return self._time.now - self._began

    def full(self, site: int) -> list[float]:
        """When a site was sent the whole plan."""
        return [when for when, asked, question in self.asked if asked == site and question.document]

    def sites(self) -> list[int]:
        return [site for site in self._behaviours if self._there(site, self.passed())]

    def name(self, site: int) -> str:
        return str(site)

    def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
        self.seconds.add(seconds)
        for site in sites:
            self.asked.append((self.passed(), site, question))
            for delay, what in self._behaviours[site](question):
                reply = what if isinstance(what, Reply) else Reply(site, what)
                self._under_way.append((self._time.now + delay, replace(reply, question=question)))

    def receive(self) -> Iterator[Reply]:
        arrived = [entry for entry in self._under_way if entry[0] <= self._time.now]
        for entry in arrived:
            self._under_way.remove(entry)
            yield entry[1]

    def carried(self) -> Mapping[int, int]:
        return self._carried(self.passed())


class Held:
    """An exchange under test, with what it takes and what it says."""

    def __init__(self, plan: RoundPlan, weights: Path, link: Scripted, time: Time, **options: Any) -> None:
        self.link, self.taken, self.said = link, list[tuple[float, int]](), list[Event]()
        self.recorded: list[tuple[str, str, str, Message]] = []
        values = {"deadline": 60.0, "limit": 5000.0, "record": self.record, **options}
        self.exchange = Exchange(
            link, plan, weights, **values, say=self.said.append, clock=time.clock, pause=time.pause
        )

    def run(self) -> Exchange:
        self.exchange.run(self.link.sites, self.take)
        return self.exchange

    def record(self, direction: str, peer: str, round_number: int, verdict: str, message: Message) -> None:
        self.recorded.append((direction, peer, verdict, message))

    def take(self, site: int, parcel: Parcel) -> None:
        code = parcel.scalars["outcome"]
        if code != Outcome.DONE:
            raise UpdateRejected(f"the site reports {Outcome(int(code)).name}")
        self.taken.append((self.link.passed(), site))

    def reasons(self, kind: type[ReplyRejected | SiteSilent]) -> dict[str, str]:
        return {event.site: event.reason for event in self.said if isinstance(event, kind)}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    path.write_bytes(pack({"a": np.zeros(100, np.float32)}))
    return path


@pytest.fixture
def plan(plan: RoundPlan) -> RoundPlan:
    return plan.model_copy(update={"local_images": LONG})


@pytest.fixture
def start(plan: RoundPlan, weights: Path) -> Callable[..., Held]:
    """Sites with their behaviours; other keywords go to the link or to the exchange."""

    def make(sites: Mapping[int, Behaviour], **options: Any) -> Held:
        time = Time()
        ours = {name: options.pop(name) for name in ("there", "carried", "may_lose") if name in options}
        return Held(plan, weights, Scripted(time, sites, **ours), time, **options)

    return make


def done(plan: RoundPlan) -> Parcel:
    return Parcel({}, numbers(plan))


def code(plan: RoundPlan, outcome: Outcome, **more: int) -> Parcel:
    return Parcel({}, {"outcome": int(outcome), "round": plan.round, "exchange": plan.exchange, **more})


def after(seconds: float, plan: RoundPlan) -> Behaviour:
    """Answers the plan so many seconds after it came; silent until then."""
    return lambda question: [(seconds, done(plan))] if question.document else []


def never(question: Question) -> Sequence[tuple[float, Parcel | Reply]]:
    return []


def gone(site: int) -> Reply:
    return Reply(site, None, "the site was lost", lost=True)


class Worker:
    """Works for so many seconds, whatever it is asked meanwhile, and says how far it is, as a ClientApp does."""

    def __init__(self, plan: RoundPlan, seconds: float, images: Callable[[float], int]) -> None:
        self._plan, self._seconds, self._images = plan, seconds, images
        self._passed = 0.0
        self.documents = 0

    def __call__(self, question: Question) -> Sequence[tuple[float, Parcel | Reply]]:
        self.documents += bool(question.document)
        assert (question.weights is None) == (not question.document)
        if self._seconds - self._passed <= question.wait:
            return [(self._seconds - self._passed, done(self._plan))]
        self._passed += question.wait
        return [(question.wait, code(self._plan, Outcome.WORKING, images_seen=self._images(self._passed)))]


def test_a_site_whose_images_grow_is_waited_for_beyond_the_deadline(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    worker = Worker(plan, 1000, lambda seconds: int(2 * seconds))
    held = start({1: worker, 2: after(1, plan)})
    exchange = held.run()
    assert (exchange.accepted, exchange.silent, exchange.failed) == ({1, 2}, set(), {})
    assert [site for _, site in held.taken] == [2, 1]
    assert exchange.seconds() >= 1000
    assert worker.documents == 1, "news are asked for without sending the model again"
    working = [event for event in held.said if isinstance(event, SiteAtWork)]
    assert [event.images for event in working] == sorted({event.images for event in working})
    assert working[-1].all == working[-1].images


@pytest.mark.parametrize("images", [lambda seconds: 0, lambda seconds: 8 if seconds < 100 else 4])
def test_a_site_that_says_it_works_without_progress_is_not_waited_for_beyond_the_deadline(
    start: Callable[..., Held], plan: RoundPlan, images: Callable[[float], int]
) -> None:
    held = start({1: Worker(plan, 1000, images)})
    exchange = held.run()
    assert (exchange.accepted, exchange.silent) == (set(), {1})
    assert held.reasons(SiteSilent) == {"1": "no progress for 60 s"}
    last_growth = 20 if images(0) else 0
    assert 60 < exchange.seconds() - last_growth < 63


def test_more_images_than_the_plan_asks_for_are_no_progress(start: Callable[..., Held], plan: RoundPlan) -> None:
    """Or a site could hold up a round for ever."""
    held = start({1: Worker(plan, 1e9, lambda seconds: int(seconds * 50))}, limit=1e8)
    exchange = held.run()
    assert exchange.silent == {1}
    assert LONG / 50 < exchange.seconds() < LONG / 50 + 2 * 60


@pytest.mark.parametrize("seconds", [100, 600])
def test_bytes_that_are_carried_are_progress(start: Callable[..., Held], plan: RoundPlan, seconds: float) -> None:
    """A slow upload: nothing is heard of the site, but what it sends keeps arriving."""
    held = start({1: after(seconds, plan)}, carried=lambda passed: {1: int(passed) // 30})
    assert held.run().accepted == {1}


def test_bytes_of_another_site_or_of_before_are_no_progress(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: after(100, plan), 2: after(300, plan)}, carried=lambda passed: {1: 10**9, 2: int(passed)})
    exchange = held.run()
    assert exchange.silent == set()  # its reply came while the other one was waited for
    assert held.reasons(SiteSilent).keys() == {"1"}


def test_bytes_are_progress_also_after_the_door_began_to_count_anew(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    """As it does where the SuperLink was started again."""
    carried = lambda passed: {1: 10**9 + int(passed) if passed < 30 else int(passed)}  # noqa: E731
    assert start({1: after(300, plan)}, carried=carried).run().accepted == {1}


def test_the_limit_ends_an_exchange_whatever_its_sites_say(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: Worker(plan, 1e9, lambda seconds: int(seconds)), 2: after(3, plan)}, limit=500)
    exchange = held.run()
    assert (exchange.accepted, exchange.silent) == ({2}, {1})
    assert held.reasons(SiteSilent) == {"1": "the round reached its limit of 500 s"}
    assert 500 <= exchange.seconds() < 501


def test_a_site_that_joins_in_the_middle_is_asked_too(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: after(50, plan), 2: after(30, plan)}, there=lambda site, passed: site == 1 or passed > 40)
    exchange = held.run()
    assert exchange.accepted == {1, 2}
    ((asked, _, question),) = [entry for entry in held.link.asked if entry[1] == 2]
    assert 40 < asked < 41
    assert RoundPlan.model_validate_json(question.document) == plan
    assert [event.clients for event in held.said if isinstance(event, PlanSent)] == [1, 2]


def test_a_site_that_joins_when_all_have_answered_is_too_late(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: after(50, plan), 2: after(1, plan)}, there=lambda site, passed: site == 1 or passed > 51)
    assert held.run().accepted == {1}


def test_a_reply_to_an_earlier_question_is_dropped_and_counted_and_the_right_one_still_waited_for(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    old = plan.model_copy(update={"exchange": plan.exchange - 1})
    held = start({1: lambda question: [(1, done(old)), (20, done(plan))]})
    exchange = held.run()
    assert exchange.late == 1
    assert [event.site for event in held.said if isinstance(event, ReplyLate)] == ["1"]
    assert [(round(when), site) for when, site in held.taken] == [(20, 1)]
    assert exchange.bytes_up == 2 * done(plan).size()


def test_a_reply_of_somebody_who_was_not_asked_is_dropped_and_counted(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    held = start({1: lambda question: [(1, Reply(9, done(plan))), (2, done(plan))]})
    exchange = held.run()
    assert (exchange.late, exchange.accepted) == (1, {1})


def test_a_site_whose_work_was_lost_is_asked_again_at_once(start: Callable[..., Held], plan: RoundPlan) -> None:
    answers = iter([gone(1), done(plan)])
    held = start({1: lambda question: [(5, next(answers))]})
    exchange = held.run()
    assert (exchange.accepted, exchange.failed, exchange.silent) == ({1}, {}, set())
    assert [round(when) for when in held.link.full(1)] == [0, 5]


def test_a_reply_that_broke_on_its_way_and_will_not_come_again_is_a_failure(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    held = start({1: lambda question: [(5, Reply(1, None, "its reply cannot be read"))]})
    exchange = held.run()
    assert exchange.failed == {1: "its reply cannot be read"}
    assert held.reasons(ReplyRejected) == {"1": "its reply cannot be read"}
    assert len(held.link.asked) == 1


def test_a_site_that_went_away_is_asked_again_when_it_comes_back(start: Callable[..., Held], plan: RoundPlan) -> None:
    """What it was asked is lost; what it was doing is not, so it may answer faster."""
    answers: Iterator[Sequence[tuple[float, Parcel]]] = iter([[], [(3, done(plan))]])
    held = start({1: lambda question: next(answers)}, there=lambda site, passed: not 10 < passed < 30)
    exchange = held.run()
    assert exchange.accepted == {1}
    assert [round(when) for when in held.link.full(1)] == [0, 30]


class Unreliable(Worker):
    """A worker behind a line that loses the messages that `lost` says, in the order in which they are sent."""

    def __init__(self, plan: RoundPlan, seconds: float, lost: Sequence[bool]) -> None:
        super().__init__(plan, seconds, lambda passed: int(passed))
        self._lost = iter(lost)

    def __call__(self, question: Question) -> Sequence[tuple[float, Parcel | Reply]]:
        if next(self._lost, False):
            return []
        known = question.document or self.documents
        answers = super().__call__(question) if known else [(1.0, code(self._plan, Outcome.UNKNOWN))]
        return [] if next(self._lost, False) else answers


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # they only build
@given(losses=st.sets(st.integers(0, 15), max_size=MOST_QUESTIONS - 1), seconds=st.floats(0, 500))
def test_a_message_that_is_lost_without_a_word_costs_a_minute_and_not_the_site(
    start: Callable[..., Held], plan: RoundPlan, losses: set[int], seconds: float
) -> None:
    """The SuperLink hands each out once, whether it arrives or not."""
    lost = [number in losses for number in range(16)]
    held = start({1: Unreliable(plan, seconds, lost)}, deadline=3600.0, may_lose=True)
    exchange = held.run()
    assert exchange.accepted == {1}
    in_a_row = (2 ** len(losses) - 1) * QUIET * HEARTBEAT_SECONDS
    assert exchange.seconds() < seconds + in_a_row + 5 * (len(losses) + 1)


def test_a_site_that_is_slow_to_answer_is_not_asked_more_and_more(start: Callable[..., Held], plan: RoundPlan) -> None:
    def slow(question: Question) -> Sequence[tuple[float, Parcel | Reply]]:
        working = code(plan, Outcome.WORKING, images_seen=min(LONG, int(held.link.passed()) + 1))
        return [((QUIET + 0.3) * HEARTBEAT_SECONDS, working)]

    held = start({1: slow}, deadline=3600.0, limit=3000.0, may_lose=True)
    held.run()
    assert len(held.link.asked) <= 3000 / (QUIET * HEARTBEAT_SECONDS) + 2


def test_a_site_that_never_answers_is_asked_less_and_less_and_given_up_at_the_deadline(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    held = start({1: never}, deadline=3600.0, may_lose=True)
    exchange = held.run()
    assert exchange.silent == {1}
    assert 3600 < exchange.seconds() < 3602
    assert len(held.link.asked) == 1 + 5


@pytest.mark.parametrize("stalled", [100.0, 400.0, 2000.0])
def test_a_site_that_comes_to_itself_is_sent_the_plan_that_it_lost_once_more_whatever_was_asked_meanwhile(
    start: Callable[..., Held], plan: RoundPlan, stalled: float
) -> None:
    """It answers, one after another, all that waited for it."""
    documents = 0

    def dazed(question: Question) -> Sequence[tuple[float, Parcel | Reply]]:
        nonlocal documents
        documents += bool(question.document)
        if not question.document:
            return [(max(1.0, stalled - held.link.passed()), code(plan, Outcome.UNKNOWN))]
        return [] if documents == 1 else [(10.0, done(plan))]

    held = start({1: dazed}, deadline=3600.0, may_lose=True)
    assert held.run().accepted == {1}
    assert documents == 2


def test_over_a_line_that_loses_nothing_a_silent_site_is_asked_once(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    """As in a simulation, where clients wait for their turn."""
    held = start({1: after(3000, plan)}, deadline=3600.0)
    assert held.run().accepted == {1}
    assert len(held.link.asked) == 1


def test_a_site_that_stays_away_is_not_waited_for(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: never, 2: after(3, plan)}, there=lambda site, passed: site == 2 or passed < 10, deadline=1000)
    exchange = held.run()
    assert (exchange.accepted, exchange.silent) == ({2}, {1})
    assert held.reasons(SiteSilent) == {"1": "the connection to it was lost"}
    assert 10 + LOST_SECONDS < exchange.seconds() < 12 + LOST_SECONDS


def test_work_that_was_lost_with_its_site_is_not_waited_for_either(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: lambda question: [(10, gone(1))]}, there=lambda site, passed: passed < 9, deadline=1000)
    exchange = held.run()
    assert exchange.silent == {1}
    assert LOST_SECONDS < exchange.seconds() < 12 + LOST_SECONDS


def test_a_site_that_is_not_waited_for_still_counts_if_its_reply_comes_in_time(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    sites = {1: after(80, plan), 2: after(200, plan), 3: Worker(plan, 100, lambda seconds: int(seconds))}
    held = start(sites, there=lambda site, passed: site != 1 or passed < 10)
    exchange = held.run()
    assert held.reasons(SiteSilent).keys() == {"1", "2"}
    assert exchange.accepted == {1, 3}
    assert exchange.silent == {2}


def test_a_site_that_does_not_know_its_work_is_sent_the_whole_question_again(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    """It was restarted between the plan and a question for news."""
    worker = Worker(plan, 100, lambda seconds: int(seconds))
    forgot: list[bool] = []

    def act(question: Question) -> Sequence[tuple[float, Parcel | Reply]]:
        if not question.document and not forgot:
            forgot.append(True)
            return [(1, code(plan, Outcome.UNKNOWN))]
        return worker(question)

    held = start({1: act})
    exchange = held.run()
    assert exchange.accepted == {1}
    assert worker.documents == 2
    assert all(question.weights for _, _, question in held.link.asked if question.document)


@pytest.mark.parametrize("what", ["unknown", "lost"])
def test_no_site_is_sent_the_whole_question_for_ever(start: Callable[..., Held], plan: RoundPlan, what: str) -> None:
    reply = code(plan, Outcome.UNKNOWN) if what == "unknown" else gone(1)
    held = start({1: lambda question: [(1, reply)]})
    exchange = held.run()
    assert len(held.link.full(1)) == MOST_QUESTIONS
    assert exchange.failed == {1: "the site reports UNKNOWN" if what == "unknown" else "the site was lost"}


def test_a_site_that_comes_and_goes_is_not_sent_the_whole_question_for_ever(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    held = start({1: never}, there=lambda site, passed: int(passed / 10) % 2 == 0, deadline=500)
    exchange = held.run()
    assert len(held.link.full(1)) == MOST_QUESTIONS
    assert exchange.silent == {1}


def test_an_answer_counts_once_however_often_it_comes(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: lambda question: [(1, done(plan)), (1, done(plan)), (2, done(plan))], 2: after(5, plan)})
    held.run()
    assert [site for _, site in held.taken] == [1, 2]


def test_a_failed_answer_is_not_waited_for_any_more(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: lambda question: [(1, code(plan, Outcome.DIVERGED))]})
    exchange = held.run()
    assert exchange.failed == {1: "the site reports DIVERGED"}
    assert exchange.seconds() < 2


def test_a_site_whose_second_answer_is_good_has_not_failed(start: Callable[..., Held], plan: RoundPlan) -> None:
    """Asked twice, because it was away for a moment, it answers twice."""
    held = start({1: lambda question: [(1, code(plan, Outcome.FAILED)), (2, done(plan))], 2: after(5, plan)})
    exchange = held.run()
    assert exchange.accepted == {1, 2}
    assert exchange.failed == {}


def test_a_site_that_was_given_up_and_then_failed_is_counted_once(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: lambda question: [(80, code(plan, Outcome.DIVERGED))], 2: Worker(plan, 100, int)})
    exchange = held.run()
    assert exchange.failed == {1: "the site reports DIVERGED"}
    assert exchange.silent == set()


def test_what_was_taken_in_can_be_taken_back(start: Callable[..., Held], plan: RoundPlan) -> None:
    held = start({1: after(1, plan), 2: after(1, plan)})
    exchange = held.run()
    exchange.reject(1, "too long")
    assert (exchange.accepted, exchange.failed) == ({2}, {1: "too long"})
    assert held.reasons(ReplyRejected) == {"1": "too long"}


def test_nobody_to_ask_ends_an_exchange_at_once(start: Callable[..., Held]) -> None:
    held = start({})
    assert held.run().seconds() == 0
    assert held.said == []


def test_every_whole_question_is_counted_and_no_message_is_under_way_for_ever(
    start: Callable[..., Held], plan: RoundPlan, weights: Path
) -> None:
    held = start({1: Worker(plan, 100, lambda seconds: int(seconds)), 2: after(1, plan)})
    exchange = held.run()
    assert exchange.bytes_down == 2 * (weights.stat().st_size + len(plan.model_dump_json()))
    news, whole = sorted(held.link.seconds)
    assert 60 < news < 3 * 60
    assert news < whole <= 4 * news, "weights may need longer on their way, but not for ever"
    assert {question.wait for _, _, question in held.link.asked} == {20.0}, "several signs of life in one deadline"


def test_who_has_the_rest_is_sent_only_what_changes_until_it_says_that_it_has_not(
    start: Callable[..., Held], plan: RoundPlan, weights: Path, tmp_path: Path
) -> None:
    changes = tmp_path / "changes.safetensors"
    changes.write_bytes(pack({"a": np.zeros(1, np.float32)}))

    def forgetful(question: Question) -> Sequence[tuple[float, Parcel]]:
        return [(1, code(plan, Outcome.UNKNOWN) if question.changes else done(plan))]

    sites: dict[int, Behaviour] = {1: after(1, plan), 2: forgetful, 3: after(1, plan)}
    held = start(sites, changes=changes, have_rest=[1, 2])
    exchange = held.run()
    assert exchange.accepted == {1, 2, 3}
    asked = [(site, question.changes) for _, site, question in held.link.asked]
    assert asked == [(1, changes), (2, changes), (3, None), (2, None)]
    assert all(question.weights == weights for _, _, question in held.link.asked)
    assert exchange.bytes_down == 2 * changes.stat().st_size + 2 * weights.stat().st_size + 4 * len(
        plan.model_dump_json()
    )


class Named(Scripted):
    """A link whose sites have kits with names."""

    def name(self, site: int) -> str:
        return f"hospital-{site}"


def test_every_message_is_recorded_under_the_name_of_its_site_with_what_became_of_it(
    plan: RoundPlan, weights: Path
) -> None:
    time, old = Time(), plan.model_copy(update={"exchange": plan.exchange - 1})
    of_third = iter([[(1, code(plan, Outcome.UNKNOWN))], [(1, done(old)), (2, done(plan)), (3, done(plan))]])
    sites: dict[int, Behaviour] = {
        1: Worker(plan, 30, lambda seconds: int(seconds)),
        2: lambda question: [(1, code(plan, Outcome.DIVERGED))],
        3: lambda question: next(of_third),
        4: lambda question: [(1, Reply(4, None, "its reply cannot be read"))],
        5: never,
    }
    held = Held(plan, weights, Named(time, sites, there=lambda site, passed: site != 5 or passed < 9), time)
    held.run()
    sent = ("out", "sent: train")
    expected = {
        "hospital-1": [sent, ("in", "working"), ("out", "how far"), ("in", "accepted")],
        "hospital-2": [sent, ("in", "rejected: the site reports DIVERGED")],
        "hospital-3": [sent, ("in", "unknown"), sent, ("in", "late"), ("in", "accepted"), ("in", "accepted before")],
        "hospital-4": [sent, ("in", "rejected: its reply cannot be read")],
        "hospital-5": [sent, ("in", "silent: the connection to it was lost")],
    }
    for name, told in expected.items():
        assert [line[0::2] for line in held.recorded if line[1] == name] == [
            (direction, verdict) for direction, verdict in told
        ]
    named = {site for event in held.said if (site := getattr(event, "site", None))}
    assert named == expected.keys(), "events know them by name too"


def test_a_site_that_was_lost_and_one_that_is_taken_back_are_recorded(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    answers = iter([gone(1), done(plan)])
    held = start({1: lambda question: [(5, next(answers))]})
    held.run().reject(1, "too long")
    verdicts = [verdict for _, _, verdict, _ in held.recorded]
    assert verdicts == ["sent: train", "lost: the site was lost", "sent: train", "accepted", "rejected: too long"]


def test_what_is_recorded_of_a_message_is_the_same_at_both_ends(
    start: Callable[..., Held], plan: RoundPlan, weights: Path
) -> None:
    update: dict[str, Any] = {"b": np.arange(6, dtype=np.uint16).reshape(2, 3), "a": np.ones(3, np.float32)}
    left = Parcel(update, numbers(plan))
    held = start({1: lambda question: [(1, left)]})
    held.run()
    (_, _, _, sent), (_, _, _, came) = held.recorded
    assert came == message_of(left)
    assert (came.arrays, came.sha256) == ({"a": (3,), "b": (2, 3)}, digest_of(update))
    document = plan.model_dump_json()
    assert sent == message_of(Parcel(unpack(weights.read_bytes()), {"exchange": plan.exchange}, document))


STRANGE: dict[str, Any] = {
    "outcome": 3,
    "round": math.nan,
    "exchange": 77,
    "loss_before": math.inf,
    "/data/scan.dcm": 1,
}


def test_of_what_a_stranger_sends_neither_names_nor_what_is_no_number_is_recorded(
    start: Callable[..., Held], plan: RoundPlan
) -> None:
    update = {"/data/scan.dcm": np.zeros(3, np.uint16)}
    held = start({1: lambda question: [(1, Parcel(update, STRANGE))]})
    held.run()
    _, _, verdict, message = held.recorded[-1]
    assert verdict.startswith("rejected")
    assert (message.scalars, message.arrays) == ({"outcome": 3, "exchange": 77}, {})
    assert (message.bytes, message.sha256) == (6 + 8 * len(STRANGE), digest_of(update))


def test_signs_of_life_are_wanted_often_however_long_the_deadline_is(start: Callable[..., Held]) -> None:
    held = start({1: never}, deadline=3600)
    held.run()
    assert held.link.asked[0][2].wait == 30


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[list[tuple[float, str]]], tuple[float, float]]:
    """What a site does with its first, second, … question, and when it is away."""
    kinds = st.sampled_from(["done", "working", "unknown", "lost", "bad", "old"])
    seconds = st.sampled_from([0.0, 1.0, 15.0, 35.0, 70.0, 200.0])
    answers = draw(st.lists(st.lists(st.tuples(seconds, kinds), max_size=3), max_size=8))
    away = draw(seconds)
    return answers, (away, away + draw(seconds))


@settings(max_examples=150)
@given(sites=st.lists(lives(), min_size=1, max_size=4), may_lose=st.booleans())
def test_whatever_sites_do_an_exchange_ends_in_time_with_a_word_on_each_of_them(
    small: Any, weights: Path, sites: list[tuple[list[list[tuple[float, str]]], tuple[float, float]]], may_lose: bool
) -> None:
    values = {"federation": "0" * 16, "exchange": 5, "action": "train", "round": 1, "rounds": 1, "local_images": LONG}
    plan = RoundPlan.model_validate({**values, "batch_size": 8, "lr": 1e-3, "seed": 0, "model": small})
    time, grown = Time(), iter(range(1, LONG))

    def reply(site: int, kind: str) -> Parcel | Reply:
        match kind:
            case "done":
                return done(plan)
            case "old":
                return done(plan.model_copy(update={"exchange": 4}))
            case "lost":
                return gone(site)
            case "working":
                return code(plan, Outcome.WORKING, images_seen=next(grown))
        return code(plan, Outcome.UNKNOWN if kind == "unknown" else Outcome.DIVERGED)

    def behaviour(site: int, answers: list[list[tuple[float, str]]]) -> Behaviour:
        left = iter(answers)
        return lambda question: [(seconds, reply(site, kind)) for seconds, kind in next(left, [])]

    link = Scripted(
        time,
        {site: behaviour(site, answers) for site, (answers, _) in enumerate(sites)},
        there=lambda site, passed: not sites[site][1][0] < passed < sites[site][1][1],
        may_lose=may_lose,
    )
    held = Held(plan, weights, link, time, limit=600.0)
    exchange = held.run()
    assert exchange.seconds() < 601
    asked = {site for _, site, _ in link.asked}
    assert exchange.accepted | exchange.failed.keys() | exchange.silent == asked
    assert not exchange.accepted & exchange.silent
    assert sorted(site for _, site in held.taken) == sorted(exchange.accepted)
    assert all(len(link.full(site)) <= MOST_QUESTIONS for site in asked)
    assert held.reasons(ReplyRejected).keys() | held.reasons(SiteSilent).keys() <= {str(s) for s in asked}
