"""What is let in of a reply, and the mean (or another rule) of what was let in."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskdm.config import Encoding, Trainable
from maskdm.federated.auditlog import message_of
from maskdm.federated.encoding import decode, encode
from maskdm.federated.parcel import Outcome, Parcel, outcome_of
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import changed_weights
from maskdm.run.tensorfile import Hashed, Stored, digest_of, pack
from maskdm_server.aggregation.robust import Rule
from maskdm_server.aggregation.updates import (
    LARGEST_WEIGHT,
    HeldUpdates,
    StreamingMean,
    Update,
    UpdateRejected,
    check_reply,
    overall_loss,
    weighted_median,
)

from ..conftest import numbers

TRAINS: tuple[Trainable, ...] = get_args(Trainable)
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

Arrays = dict[str, NDArray[np.generic]]
Dense = dict[str, NDArray[np.float64]]


def asking(plan: RoundPlan, train: Trainable, encoding: Encoding) -> RoundPlan:
    return plan.model_copy(update={"train": train, "encoding": encoding, "topk_share": 0.3, "adapter_rank": 2})


def drawn(plan: RoundPlan, seed: int, scale: float = 1e-3) -> Arrays:
    """An encoded update of random values."""
    randomness = torch.Generator().manual_seed(seed)
    values = {name: scale * torch.randn(shape, generator=randomness) for name, shape in plan.shapes().items()}
    return encode(values, plan.encoding, plan.topk_share)


def dense(arrays: Arrays, plan: RoundPlan) -> Dense:
    """What an update means for each weight that it changes, in double."""
    shapes = plan.shapes()
    parts = {name: decode(arrays, name, shapes[name], plan.encoding).double().numpy() for name in shapes}
    if plan.train != "adapters":
        return parts
    names = {name.rpartition(".")[0] for name in parts}
    return {name: parts[f"{name}.up"] @ parts[f"{name}.down"] for name in names}


def assert_close(found: dict[str, torch.Tensor], expected: Dense) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == expected[name].shape
        scale = np.abs(expected[name]).max() or 1.0
        assert tensor.double().numpy() == pytest.approx(expected[name], rel=1e-5, abs=1e-6 * scale), name


def test_a_good_reply_is_let_in(plan: RoundPlan) -> None:
    report = check_reply(Parcel(drawn(plan, 0), numbers(plan, examples=12)), plan)
    assert (report.examples, report.images_seen, report.exchange) == (12, 64, plan.exchange)


@pytest.mark.parametrize("action", ["measure", "finish"])
def test_a_measurement_holds_numbers_alone(plan: RoundPlan, action: str) -> None:
    wanted = plan.model_copy(update={"action": action})
    assert check_reply(Parcel({}, numbers(wanted)), wanted).images_seen == 0
    with pytest.raises(UpdateRejected, match="an array that was not asked for"):
        check_reply(Parcel(drawn(plan, 0), numbers(wanted)), wanted)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome])
def test_a_failure_code_is_rejected_by_its_name(plan: RoundPlan, outcome: Outcome) -> None:
    with pytest.raises(UpdateRejected, match=f"the site reports {outcome.name}"):
        check_reply(Parcel({}, {"outcome": int(outcome), "round": 2}), plan)


@pytest.mark.parametrize("action", ["train", "measure"])
@pytest.mark.parametrize("code", [0.0, -0.0, False, True, 1.0, 7.0])
def test_what_only_equals_a_code_is_none(plan: RoundPlan, code: float, action: str) -> None:
    """Else a reply that no site's gate lets out would pass for one that is done."""
    wanted = plan.model_copy(update={"action": action})
    update = drawn(plan, 0) if action == "train" else {}
    assert outcome_of({"outcome": code}) is None
    with pytest.raises(UpdateRejected, match="its numbers do not fit: outcome"):
        check_reply(Parcel(update, numbers(wanted, outcome=code)), wanted)


def losses_of(losses: Sequence[float | None], images: Sequence[int] | None = None, rule: Rule = "mean") -> float | None:
    return overall_loss(list(zip(losses, images or [10] * len(losses), strict=True)), rule)


def test_the_loss_of_all_sites_is_their_median_by_images() -> None:
    assert losses_of([0.1, 0.2, 0.6]) == 0.2
    assert losses_of([0.6, 0.1, 0.2, 0.4]) == pytest.approx(0.3), "between the two in the middle"
    assert losses_of([0.1, 0.2, 0.6], [10, 10, 19]) == 0.2
    assert losses_of([0.1, 0.2, 0.3, 0.6], [10, 10, 10, 29]) == 0.3
    assert losses_of([0.1, 0.2, 0.6], [10, 10, 1000]) == 0.2, "the largest one weighs less than the others together"
    assert losses_of([0.1, 0.5], [10, 30]) == pytest.approx(0.4), "of two it is the mean"
    assert losses_of([0.1, 0.5], [10, 1000]) == pytest.approx((0.1 + LARGEST_WEIGHT * 0.5) / (1 + LARGEST_WEIGHT))
    assert losses_of([0.7]) == 0.7
    assert losses_of([0.1, 0.2, 0.6], [1, 1, 1000], rule="median") == 0.2
    assert losses_of([0.1, 0.2, 0.4, 0.9], [1, 1, 1, 1000], rule="krum") == pytest.approx(0.3)


def test_sites_that_keep_their_loss_to_themselves_count_for_nothing() -> None:
    assert losses_of([None, 0.5, None], [10**6, 10, 1]) == 0.5
    assert losses_of([None, 0.1, 0.2, 0.6]) == 0.2
    assert losses_of([None, None]) is None
    assert losses_of([]) is None


@given(
    honest=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 10_000)), min_size=2, max_size=9),
    lie=st.tuples(st.floats(0, 1e6), st.integers(1, 2**40)),
    place=st.integers(0, 9),
    rule=st.sampled_from(get_args(Rule)),
)
def test_one_liar_cannot_move_the_loss_beyond_what_the_others_say(
    honest: list[tuple[float, int]], lie: tuple[float, int], place: int, rule: Rule
) -> None:
    said = overall_loss([*honest[:place], lie, *honest[place:]], rule)
    assert said is not None
    assert min(loss for loss, _ in honest) <= said <= max(loss for loss, _ in honest)


@given(values=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=9))
def test_the_weighted_median_is_that_of_each_value_repeated(values: list[tuple[int, int]]) -> None:
    repeated = [value for value, weight in values for _ in range(weight)]
    assert weighted_median(*zip(*values, strict=True)) == statistics.median(repeated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": 99}, "its numbers do not fit: outcome"),
        ({"outcome": math.nan}, "its numbers do not fit: outcome"),
        ({"examples": 0}, "its numbers do not fit: examples"),
        ({"examples": 2**41}, "its numbers do not fit: examples"),
        ({"examples": 1.5}, "its numbers do not fit: examples"),
        ({"images_seen": -1}, "its numbers do not fit: images_seen"),
        ({"exchange": 2**63}, "its numbers do not fit: exchange"),
        ({"loss_before": math.inf}, "its numbers do not fit: loss_before"),
        ({"loss_after": math.nan}, "its numbers do not fit: loss_after"),
        ({"loss_after": -0.5}, "its numbers do not fit: loss_after"),
        ({"loss_before": 1e308}, "its numbers do not fit: loss_before"),
        ({"loss_after": 1.1e6}, "its numbers do not fit: loss_after"),
        ({"\x1b[31msecret": 1}, "^it holds a number that was not asked for$"),
        ({"round": 1}, "it answers round 1, not 2"),
        ({"images_seen": 65}, "it claims to have seen 65 images, the plan says 64"),
        ({"images_seen": 2**40}, "it claims to have seen 1099511627776 images, the plan says 64"),
        ({"images_seen": 0}, "it claims to have seen 0 images, the plan says 64"),
    ],
)
def test_numbers_that_do_not_fit_the_plan_are_rejected(plan: RoundPlan, change: dict[str, float], message: str) -> None:
    with pytest.raises(UpdateRejected, match=message):
        check_reply(Parcel(drawn(plan, 0), numbers(plan, **change)), plan)


def test_the_last_batch_is_a_whole_one(plan: RoundPlan) -> None:
    uneven = plan.model_copy(update={"local_images": 60})
    assert check_reply(Parcel(drawn(plan, 0), numbers(uneven, images_seen=64)), uneven).images_seen == 64
    with pytest.raises(UpdateRejected, match="65 images"):
        check_reply(Parcel(drawn(plan, 0), numbers(uneven, images_seen=65)), uneven)


@pytest.mark.parametrize("missing", [(), ("round",), ("exchange",)])
def test_missing_numbers_are_rejected(plan: RoundPlan, missing: tuple[str, ...]) -> None:
    report = {name: value for name, value in numbers(plan).items() if name not in missing} if missing else {}
    with pytest.raises(UpdateRejected, match="its numbers do not fit: "):
        check_reply(Parcel(drawn(plan, 0), report), plan)


def test_a_site_may_have_twice_the_images_that_it_said_to_have_and_no_more(plan: RoundPlan) -> None:
    update = drawn(plan, 0)
    assert check_reply(Parcel(update, numbers(plan, examples=20)), plan, declared=10).examples == 20
    with pytest.raises(UpdateRejected, match="it claims 21 images of its own, and said 10 before"):
        check_reply(Parcel(update, numbers(plan, examples=21)), plan, declared=10)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_names_shapes_or_types_are_rejected(plan: RoundPlan, encoding: Encoding) -> None:
    wanted = asking(plan, "all", encoding)
    update = drawn(wanted, 0)
    name = sorted(update)[0]
    swapped = np.dtype(update[name].dtype).newbyteorder(">") if update[name].dtype.itemsize > 1 else np.dtype("uint8")
    hostile: list[Arrays] = [
        {key: array for key, array in update.items() if key != name},
        {**update, "more": update[name]},
        {**update, name: update[name].reshape(-1)[:-1]},
        {**update, name: update[name].reshape(1, *update[name].shape)},
        {**update, name: update[name].astype(swapped)},
        {**update, name: update[name].astype(object)},
        {**update, name: update[name].astype(np.float64)},
        {},
    ]
    for arrays in hostile:
        with pytest.raises(UpdateRejected, match="its update is not what was asked for: "):
            check_reply(Parcel(arrays, numbers(wanted)), wanted)


def test_an_update_in_another_encoding_or_of_other_parts_is_rejected(plan: RoundPlan) -> None:
    kinds = [(train, encoding) for train in TRAINS for encoding in ENCODINGS]
    plans = [asking(plan, train, encoding) for train, encoding in kinds]
    updates = [drawn(wanted, 0) for wanted in plans]
    for i, wanted in enumerate(plans):
        for k, update in enumerate(updates):
            if i == k:
                check_reply(Parcel(update, numbers(wanted)), wanted)
            else:
                with pytest.raises(UpdateRejected, match="not what was asked for"):
                    check_reply(Parcel(update, numbers(wanted)), wanted)


def test_indices_out_of_a_weight_or_twice_the_same_are_rejected(plan: RoundPlan) -> None:
    wanted = asking(plan, "all", "topk")
    update = drawn(wanted, 0)
    name = next(key for key in sorted(update) if key.endswith(".index") and len(update[key]) > 1)
    for where, value in ((-1, 2**32 - 1), (1, 0)):
        index = np.array(update[name])
        index[where] = value
        if where == 1:
            index[0] = 0
        with pytest.raises(UpdateRejected, match=r"index' (leads out of|must be strictly)"):
            Update({**update, name: index}, wanted).norm()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("train", TRAINS)
def test_an_update_is_read_once_to_be_measured_and_hashed_and_once_to_be_added(
    plan: RoundPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Trainable, encoding: Encoding
) -> None:
    wanted, read = asking(plan, train, encoding), Counter[str]()
    arrays = drawn(wanted, 0)
    (tmp_path / "arrived").write_bytes(pack(arrays))
    get = Stored.__getitem__

    def counted(stored: Stored, name: str) -> NDArray[np.generic]:
        read[name] += 1
        return get(stored, name)

    monkeypatch.setattr(Stored, "__getitem__", counted)
    arrived = Hashed(tmp_path / "arrived")
    parcel, mean = Parcel(arrived, numbers(wanted)), StreamingMean()
    check_reply(parcel, wanted)
    update = Update(arrived, wanted)
    update.norm()
    assert message_of(parcel).sha256 == digest_of(arrays)
    assert read == dict.fromkeys(arrays, 1)
    mean.add(update, 1.0)
    assert read == dict.fromkeys(arrays, 2)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("train", TRAINS)
def test_the_mean_is_the_weighted_mean_of_what_the_updates_say(
    plan: RoundPlan, train: Trainable, encoding: Encoding
) -> None:
    """Of adapters it is the mean of their products."""
    wanted = asking(plan, train, encoding)
    updates = [drawn(wanted, seed, scale) for seed, scale in enumerate((1e-3, 1e-3, 5e-2, 1e-6))]
    weights = [1, 64, 24, 2048]
    mean = StreamingMean()
    for arrays, weight in zip(updates, weights, strict=True):
        check_reply(Parcel(arrays, numbers(wanted)), wanted)
        mean.add(Update(arrays, wanted), weight)
    assert mean.count == 4
    received = [dense(arrays, wanted) for arrays in updates]
    expected: Dense = {
        name: np.average([update[name] for update in received], axis=0, weights=weights) for name in received[0]
    }
    assert set(expected) == set(changed_weights(wanted.model.model, train))
    assert_close(dict(mean.result()), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("rule", ["median", "multi-krum"])
def test_updates_that_are_held_on_the_disk_are_aggregated_as_they_came(
    plan: RoundPlan, tmp_path: Path, train: Trainable, encoding: Encoding, rule: Rule
) -> None:
    wanted = asking(plan, train, encoding)
    updates = [drawn(wanted, seed) for seed in range(5)]
    held = HeldUpdates(rule, 0, wanted, tmp_path)
    for number, arrays in enumerate(updates):
        (tmp_path / "arrived").write_bytes(pack(arrays))  # where those lie that come over a network
        held.add(Update(Stored(tmp_path / "arrived") if number % 2 else arrays, wanted), 1)
    assert len(list(tmp_path.glob("held-*"))) == 5
    received = [dense(arrays, wanted) for arrays in updates]
    of_all: Callable[..., Any] = np.median if rule == "median" else np.mean  # multi-Krum drops none of five with f = 0
    expected: Dense = {name: of_all([update[name] for update in received], axis=0) for name in received[0]}
    assert_close(dict(held.result()), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("train", TRAINS)
def test_the_norm_is_that_of_the_whole_difference_also_after_it_lay_on_the_disk(
    plan: RoundPlan, tmp_path: Path, train: Trainable, encoding: Encoding
) -> None:
    wanted = asking(plan, train, encoding)
    arrays = drawn(wanted, 3)
    update = Update(arrays, wanted)
    expected = math.sqrt(sum(float((part**2).sum()) for part in dense(arrays, wanted).values()))
    assert update.norm() == pytest.approx(expected, rel=1e-5)
    update.save(tmp_path / "update.safetensors")
    again = Update.held(tmp_path / "update.safetensors", wanted)
    assert again.norm() == update.norm()
    assert all(torch.equal(again.delta(name), update.delta(name)) for name in update.names)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("train", TRAINS)
def test_one_value_that_is_not_finite_is_found(
    plan: RoundPlan, train: Trainable, encoding: Encoding, poison: float
) -> None:
    wanted = asking(plan, train, encoding)
    values = {name: torch.full(shape, 0.5) for name, shape in wanted.shapes().items()}
    values[sorted(values)[1]].view(-1)[2] = poison
    with pytest.raises(UpdateRejected, match="is not finite"):
        Update(encode(values, encoding, wanted.topk_share), wanted).norm()


def test_factors_that_are_finite_with_a_product_that_is_not_are_found(plan: RoundPlan) -> None:
    wanted = asking(plan, "adapters", "fp32")
    values = {name: torch.full(shape, 1e30) for name, shape in wanted.shapes().items()}
    with pytest.raises(UpdateRejected, match="is not finite"):
        Update(encode(values, "fp32", 1), wanted).norm()


def test_the_update_that_came_is_not_changed(plan: RoundPlan, tmp_path: Path) -> None:
    for train, encoding in ((train, encoding) for train in TRAINS for encoding in ENCODINGS):
        wanted = asking(plan, train, encoding)
        arrays = drawn(wanted, 0)
        before = {name: array.copy() for name, array in arrays.items()}
        update = Update(arrays, wanted)
        for aggregate in (StreamingMean(), HeldUpdates("median", 1, wanted, tmp_path)):
            for _ in range(3):
                aggregate.add(update, 7)
            list(aggregate.result())
        assert all(np.array_equal(arrays[name], before[name]) for name in before)


@settings(max_examples=15)
@given(weights=st.lists(st.integers(1, 10_000), min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_the_mean_is_right_for_any_weights(small: CheckpointMetadata, weights: list[int], seed: int) -> None:
    plan = RoundPlan(
        federation="0" * 16,
        exchange=1,
        action="train",
        round=1,
        rounds=1,
        local_images=64,
        batch_size=8,
        lr=1e-3,
        train="norm-bias",
        seed=0,
        model=small,
    )
    updates = [drawn(plan, seed + i) for i in range(len(weights))]
    mean = StreamingMean()
    for arrays, weight in zip(updates, weights, strict=True):
        mean.add(Update(arrays, plan), weight)
    received = [dense(arrays, plan) for arrays in updates]
    expected: Dense = {
        name: np.average([update[name] for update in received], axis=0, weights=weights) for name in received[0]
    }
    for name, tensor in mean.result():
        assert tensor.double().numpy() == pytest.approx(expected[name], rel=1e-4, abs=1e-8)
