"""Which updates are let in and what they weigh: judged against what is known of others, in whatever order they come."""

import errno
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm_server.aggregation.updates import LARGEST_WEIGHT, HeldUpdates, StreamingMean, Update, UpdateRejected
from maskdm_server.federation.intake import ENOUGH, REMEMBERED, Intake, UpdateNorm

from ..conftest import parcel

LIMIT, MODEL_NORM = 10.0, 1e9
HONEST = [UpdateNorm(norm=1.0, images=64)] * ENOUGH

NewIntake = Callable[..., Intake]


@pytest.fixture
def plan(plan: RoundPlan) -> RoundPlan:
    return plan.model_copy(update={"train": "norm-bias", "encoding": "fp32"})


@pytest.fixture
def intake(plan: RoundPlan, tmp_path: Path) -> NewIntake:
    """An intake of the plan, which knows what is given."""

    def make(before: Sequence[UpdateNorm] = (), plan: RoundPlan = plan) -> Intake:
        return Intake(plan, StreamingMean(), list(before), LIMIT, MODEL_NORM, 0, tmp_path)

    return make


@pytest.fixture
def update(plan: RoundPlan) -> Callable[..., Parcel]:
    """A reply to the plan whose update has a given norm."""
    return partial(reply, plan)


def reply(plan: RoundPlan, norm: float, seed: int = 0, **changes: float) -> Parcel:
    randomness = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=randomness) for name, shape in plan.shapes().items()}
    length = math.sqrt(sum(float(tensor.square().sum()) for tensor in values.values()))
    return parcel(plan, {name: tensor * (norm / length) for name, tensor in values.items()}, **changes)


def mean_of(intake: Intake) -> dict[str, Tensor]:
    return dict(intake._aggregate.result())


def weights_of(intake: Intake) -> dict[int, float]:
    return {site: weight for site, (_, weight) in intake.reports.items()}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("known", [0, ENOUGH])
def test_what_is_not_finite_is_rejected_at_once_and_leaves_nothing(
    intake: NewIntake, plan: RoundPlan, update: Callable[..., Parcel], poison: float, known: int
) -> None:
    under_test = intake(HONEST[:known])
    values = {name: torch.zeros(shape) for name, shape in plan.shapes().items()}
    values[sorted(values)[-1]].view(-1)[-1] = poison
    with pytest.raises(UpdateRejected, match="is not finite"):
        under_test.offer(1, parcel(plan, values), None)
    under_test.offer(2, update(1.0), None)
    assert under_test.close() == {}
    assert weights_of(under_test) == {2: 64.0}
    assert all(tensor.isfinite().all() for tensor in mean_of(under_test).values())


def test_an_update_a_hundred_times_as_long_as_three_known_ones_is_rejected_at_once(
    intake: NewIntake, update: Callable[..., Parcel]
) -> None:
    under_test = intake(HONEST)
    with pytest.raises(UpdateRejected, match="its norm 100 is more than 10 times the usual 1"):
        under_test.offer(1, update(100.0), None)
    under_test.offer(2, update(9.9), None)
    assert [measured.norm for measured in under_test.known] == pytest.approx([1, 1, 1, 9.9])
    assert set(weights_of(under_test)) == {2}


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_long_update_among_the_first_of_a_federation_is_found_wherever_it_comes(
    intake: NewIntake, update: Callable[..., Parcel], place: int
) -> None:
    """The first two wait, so that a hostile one cannot become the measure of the others."""
    under_test = intake()
    rejected: dict[int, UpdateRejected] = {}
    for site in range(4):
        try:
            under_test.offer(site, update(100.0 if site == place else 1.0 + site / 10, seed=site), None)
        except UpdateRejected as reason:
            assert site >= ENOUGH - 1, "too early to judge"
            rejected[site] = reason
    rejected |= under_test.close()
    assert list(rejected) == [place]
    assert "times the usual" in str(rejected[place])
    assert set(weights_of(under_test)) == {0, 1, 2, 3} - {place}
    assert max(measured.norm for measured in under_test.known) < 2


def test_the_first_updates_are_not_judged_before_there_are_enough(
    intake: NewIntake, update: Callable[..., Parcel], tmp_path: Path
) -> None:
    under_test = intake()
    for site in range(ENOUGH - 1):
        under_test.offer(site, update(100.0), None)
    assert under_test._aggregate.count == 0
    assert len(list(tmp_path.iterdir())) == ENOUGH - 1
    under_test.offer(ENOUGH, update(100.0), None)
    assert under_test._aggregate.count == 1
    assert under_test.close() == {}
    assert under_test._aggregate.count == ENOUGH
    assert list(tmp_path.iterdir()) == []
    assert under_test.close() == {}, "a second time there is nothing to do"


def test_of_two_updates_the_shorter_one_is_the_measure(intake: NewIntake, update: Callable[..., Parcel]) -> None:
    for norms, good in (((1.0, 100.0), 0), ((100.0, 1.0), 1)):
        under_test = intake()
        for site, norm in enumerate(norms):
            under_test.offer(site, update(norm), None)
        assert list(under_test.close()) == [1 - good]
        assert set(weights_of(under_test)) == {good}


def test_two_updates_of_like_length_are_both_let_in(intake: NewIntake, update: Callable[..., Parcel]) -> None:
    under_test = intake()
    under_test.offer(1, update(1.0, seed=1, images_seen=16), None)
    under_test.offer(2, update(9.0, seed=2, images_seen=48), None)
    assert under_test.close() == {}
    assert weights_of(under_test) == {1: 16.0, 2: 48.0}


@pytest.mark.parametrize("before", [(), HONEST])
def test_an_update_that_is_longer_than_the_model_is_too_long_also_where_there_is_no_other(
    plan: RoundPlan, update: Callable[..., Parcel], tmp_path: Path, before: Sequence[UpdateNorm]
) -> None:
    """At once, so that two that lie together cannot be each other's measure."""
    under_test = Intake(plan, StreamingMean(), list(before), 1e6, 5.0, 0, tmp_path)
    with pytest.raises(UpdateRejected, match="more than that of the whole model, 5"):
        under_test.offer(1, update(5.1), None)
    assert list(tmp_path.iterdir()) == []
    under_test.offer(2, update(4.9), None)
    assert under_test.close() == {}
    assert set(weights_of(under_test)) == {2}
    assert under_test.compared()[2].cosine is None, "there is no other"


def test_accepted_updates_are_compared_with_each_other_and_rejected_ones_are_not(
    intake: NewIntake, plan: RoundPlan, update: Callable[..., Parcel]
) -> None:
    """Whether they waited or not."""
    under_test = intake()
    flipped = {name: -torch.from_numpy(array) for name, array in update(2.0, seed=1).arrays.items()}
    for site, reply in enumerate(
        (update(1.0, seed=1), update(1.5, seed=1), parcel(plan, flipped), update(1.0, seed=1))
    ):
        under_test.offer(site, reply, None)
    with pytest.raises(UpdateRejected):
        under_test.offer(4, update(100.0, seed=2), None)
    under_test.close()
    compared = under_test.compared()
    assert {site: about.cosine for site, about in compared.items()} == pytest.approx({0: 1, 1: 1, 2: -1, 3: 1})
    assert {site: about.norm_ratio for site, about in compared.items()} == pytest.approx({0: 1, 1: 1.5, 2: 2, 3: 1})


def test_who_had_time_for_more_steps_may_go_further_as_their_square_root(intake: NewIntake, plan: RoundPlan) -> None:
    """Up to what it may weigh: the number of images is a claim."""
    by_time = plan.model_copy(update={"local_images": 100_000_000, "local_minutes": 5.0})
    under_test = intake(HONEST, by_time)
    under_test.offer(1, reply(by_time, 19.9, images_seen=4 * 64), None)
    with pytest.raises(UpdateRejected, match="more than 20 times the usual 1"):
        under_test.offer(2, reply(by_time, 20.1, images_seen=10_000), None)
    with pytest.raises(UpdateRejected, match="more than 10 times the usual 1"):
        under_test.offer(3, reply(by_time, 10.1, images_seen=64), None)
    with pytest.raises(UpdateRejected, match="more than 10 times the usual 1"):
        under_test.offer(4, reply(by_time, 10.1, images_seen=1), None)


def test_a_lonely_update_is_let_in(intake: NewIntake, update: Callable[..., Parcel]) -> None:
    under_test = intake()
    under_test.offer(1, update(123.0), None)
    assert under_test.close() == {}
    assert set(weights_of(under_test)) == {1}


def test_images_beyond_the_plan_are_rejected(intake: NewIntake, update: Callable[..., Parcel]) -> None:
    under_test = intake(HONEST)
    with pytest.raises(UpdateRejected, match="it claims to have seen 1000000 images"):
        under_test.offer(1, update(1.0, images_seen=10**6), None)
    assert under_test.reports == {}


def test_where_time_is_the_limit_no_update_weighs_more_than_so_many_times_the_median(
    intake: NewIntake, plan: RoundPlan
) -> None:
    by_time = plan.model_copy(update={"local_images": 100_000_000, "local_minutes": 5.0})
    under_test = intake(HONEST, by_time)
    under_test.offer(1, reply(by_time, 1.0, images_seen=32), None)
    under_test.offer(2, reply(by_time, 1.0, images_seen=100_000_000), None)
    assert weights_of(under_test) == {1: 32.0, 2: LARGEST_WEIGHT * 64.0}
    assert under_test.reports[2][0].images_seen == 100_000_000


def test_of_the_first_two_the_one_that_saw_fewer_images_is_the_measure(intake: NewIntake, plan: RoundPlan) -> None:
    by_time = plan.model_copy(update={"local_images": 100_000_000, "local_minutes": 5.0})
    under_test = intake((), by_time)
    under_test.offer(1, reply(by_time, 1.0, images_seen=100_000_000), None)
    under_test.offer(2, reply(by_time, 1.0, images_seen=10), None)
    under_test.close()
    assert weights_of(under_test) == {1: LARGEST_WEIGHT * 10.0, 2: 10.0}


def test_more_images_of_its_own_than_a_site_declared_are_rejected(
    intake: NewIntake, update: Callable[..., Parcel]
) -> None:
    under_test = intake(HONEST)
    with pytest.raises(UpdateRejected, match="it claims 201 images of its own, and said 100 before"):
        under_test.offer(1, update(1.0, examples=201), 100)
    assert under_test.offer(1, update(1.0, examples=200), 100).examples == 200


def test_what_is_remembered_of_updates_is_bounded_and_the_newest(
    intake: NewIntake, update: Callable[..., Parcel]
) -> None:
    under_test = intake([UpdateNorm(norm=1.0, images=64)] * REMEMBERED)
    under_test.offer(1, update(2.0), None)
    assert len(under_test.known) == REMEMBERED
    assert under_test.known[-1].norm == pytest.approx(2.0)


@pytest.mark.parametrize("known", [0, ENOUGH])
def test_an_update_that_changes_nothing_is_rejected_and_is_no_measure_of_others(
    intake: NewIntake, plan: RoundPlan, update: Callable[..., Parcel], known: int
) -> None:
    under_test = intake(HONEST[:known])
    nothing = parcel(plan, {name: torch.zeros(shape) for name, shape in plan.shapes().items()})
    with pytest.raises(UpdateRejected, match="it changes nothing"):
        under_test.offer(1, nothing, None)
    under_test.offer(2, update(1.0), None)
    assert under_test.close() == {}
    assert set(weights_of(under_test)) == {2}


class FullDisk(StreamingMean):
    """Takes in nothing until there is room."""

    room = False

    def add(self, update: Update, weight: float) -> None:
        if not self.room:
            raise OSError(errno.ENOSPC, "full")
        super().add(update, weight)


@pytest.mark.parametrize("known", [0, ENOUGH])
def test_what_could_not_be_taken_in_for_want_of_room_can_be_offered_again(
    plan: RoundPlan, update: Callable[..., Parcel], tmp_path: Path, known: int
) -> None:
    mean = FullDisk()
    under_test = Intake(plan, mean, HONEST[:known], LIMIT, MODEL_NORM, 0, tmp_path)
    sent = {1: update(1.0, seed=1), 2: update(2.0, seed=2)}

    def bring() -> None:
        for site in sent.keys() - under_test.reports.keys() - under_test._waiting.keys():
            under_test.offer(site, sent[site], None)
        under_test.close()

    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            bring()
    mean.room = True
    bring()
    assert set(weights_of(under_test)) == {1, 2}
    assert (mean.count, len(under_test.known)) == (2, known + 2)
    assert list(tmp_path.iterdir()) == []


def test_updates_that_waited_are_held_for_rules_that_must_see_all_of_them(
    plan: RoundPlan, update: Callable[..., Parcel], tmp_path: Path
) -> None:
    held = HeldUpdates("median", 0, plan, tmp_path)
    under_test = Intake(plan, held, [], LIMIT, MODEL_NORM, 0, tmp_path)
    sent = [update(1.0, seed=seed) for seed in range(ENOUGH)]  # all but the last wait
    for site, each in enumerate(sent):
        under_test.offer(site, each, None)
    assert under_test.close() == {}
    assert held.count == len(sent)
    for name, value in held.result():
        values = [torch.from_numpy(each.arrays[name].copy()) for each in sent]
        assert torch.allclose(value, torch.stack(values).median(dim=0).values)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_of_arrival_does_not_matter_once_three_are_known(
    intake: NewIntake, plan: RoundPlan, data: st.DataObject
) -> None:
    """Honest norms and images differ by less than the limits allow, hostile norms by more (ten times three, twice that
    for more images), however many of them.
    """
    honest = data.draw(st.lists(st.tuples(st.floats(1, 3), st.integers(16, 64)), min_size=1, max_size=5))
    hostile = data.draw(st.lists(st.tuples(st.floats(61, 1e6), st.integers(1, 64)), max_size=5))
    sent = dict(enumerate([*honest, *hostile]))
    outcomes = []
    for order in (list(sent), data.draw(st.permutations(list(sent)))):
        under_test = intake([UpdateNorm(norm=norm, images=images) for norm, images in ((1, 64), (2, 30), (3, 16))])
        rejected = set()
        for site in order:
            norm, images = sent[site]
            try:
                under_test.offer(site, reply(plan, norm, seed=site, images_seen=images), None)
            except UpdateRejected:
                rejected.add(site)
        assert under_test.close() == {}
        outcomes.append((rejected, weights_of(under_test), mean_of(under_test)))
    (rejected, weights, first), (again, same_weights, second) = outcomes
    assert rejected == again == set(range(len(honest), len(sent)))
    assert weights == same_weights
    assert_equal_up_to_rounding(first, second)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_of_arrival_does_not_matter_in_a_first_round_with_an_honest_majority(
    intake: NewIntake, plan: RoundPlan, data: st.DataObject
) -> None:
    """Of the three that the first judgement looks at two are honest, so one hostile update is found in any place."""
    honest = data.draw(st.lists(st.tuples(st.floats(1, 3), st.integers(16, 64)), min_size=2, max_size=5))
    sent = dict(enumerate([*honest, (data.draw(st.floats(61, 1e6)), 64)]))
    outcomes: list[Any] = []
    for order in (list(sent), data.draw(st.permutations(list(sent)))):
        under_test = intake()
        rejected = set()
        for site in order:
            norm, images = sent[site]
            try:
                under_test.offer(site, reply(plan, norm, seed=site, images_seen=images), None)
            except UpdateRejected:
                rejected.add(site)
        rejected |= under_test.close().keys()
        outcomes.append((rejected, weights_of(under_test), mean_of(under_test)))
    (rejected, weights, first), (again, same_weights, second) = outcomes
    assert rejected == again == {len(honest)}
    assert weights == same_weights
    assert_equal_up_to_rounding(first, second)


def assert_equal_up_to_rounding(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)
