"""The coordinator's side of an update: what is let in, and the mean of it."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskdm.checkpoint import CheckpointMetadata
from maskdm.protocol import Outcome, Parcel, RoundPlan, decode_bfloat16, encode_bfloat16
from maskdm_server.aggregation import StreamingMean, UpdateRejected, check_reply, federated_average

SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (3,)}
SCALARS: dict[str, float] = {
    "outcome": 0,
    "round": 2,
    "examples": 10,
    "images_seen": 64,
    "loss_before": 1.0,
    "loss_after": 0.5,
    "seconds": 2.0,
    "skipped_steps": 0,
}


def arrays() -> dict[str, NDArray[np.generic]]:
    return {name: encode_bfloat16(torch.ones(shape)) for name, shape in SHAPES.items()}


@pytest.fixture
def plan(metadata: CheckpointMetadata) -> RoundPlan:
    return RoundPlan(
        federation="0123456789abcdef",
        action="train",
        round=2,
        rounds=3,
        local_images=64,
        batch_size=8,
        lr=1e-3,
        seed=0,
        model=metadata,
    )


def test_a_good_reply_is_let_in(plan: RoundPlan) -> None:
    report = check_reply(Parcel(arrays(), SCALARS), plan, SHAPES)
    assert (report.examples, report.loss_after) == (10, 0.5)


def test_a_good_farewell_holds_numbers_alone(plan: RoundPlan) -> None:
    farewell = plan.model_copy(update={"action": "finish"})
    assert check_reply(Parcel({}, SCALARS), farewell, SHAPES).examples == 10
    with pytest.raises(UpdateRejected, match="names or shapes"):
        check_reply(Parcel(arrays(), SCALARS), farewell, SHAPES)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome])
def test_a_failure_code_is_rejected_by_its_name(plan: RoundPlan, outcome: Outcome) -> None:
    with pytest.raises(UpdateRejected, match=f"the site reports {outcome.name}"):
        check_reply(Parcel({}, {"outcome": int(outcome), "round": 2}), plan, SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": 99}, "its numbers do not fit: outcome"),
        ({"examples": 0}, "its numbers do not fit: examples"),
        ({"loss_after": float("nan")}, "its numbers do not fit: loss_after"),
        ({"secret": 1}, "its numbers do not fit: secret"),
        ({"round": 1}, "it answers round 1, not 2"),
        ({"images_seen": 137}, "it claims 137 images, far more than the plan's 64"),
    ],
)
def test_numbers_that_do_not_fit_the_plan_are_rejected(plan: RoundPlan, change: dict[str, float], message: str) -> None:
    with pytest.raises(UpdateRejected, match=message):
        check_reply(Parcel(arrays(), SCALARS | change), plan, SHAPES)


def test_missing_numbers_are_rejected(plan: RoundPlan) -> None:
    with pytest.raises(UpdateRejected, match="its numbers do not fit: round"):
        check_reply(Parcel(arrays(), {}), plan, SHAPES)


@pytest.mark.parametrize(
    "change",
    [
        {"b": None},
        {"c": np.zeros(3, np.uint16)},
        {"b": np.zeros(4, np.uint16)},
        {"b": np.zeros((3, 1), np.uint16)},
    ],
)
def test_other_names_or_shapes_are_rejected(plan: RoundPlan, change: dict[str, Any]) -> None:
    update = {name: array for name, array in (arrays() | change).items() if array is not None}
    with pytest.raises(UpdateRejected, match="names or shapes of its update"):
        check_reply(Parcel(update, SCALARS), plan, SHAPES)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.dtype(">u2"), np.object_])
def test_other_types_are_rejected(plan: RoundPlan, dtype: Any) -> None:
    with pytest.raises(UpdateRejected, match="not bfloat16 carried as uint16"):
        check_reply(Parcel(arrays() | {"b": np.zeros(3, dtype)}, SCALARS), plan, SHAPES)


@given(
    weights=st.lists(st.integers(1, 10_000), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
)
def test_the_streaming_mean_is_the_weighted_mean(weights: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    updates = [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in weights]
    encoded = [{name: encode_bfloat16(torch.from_numpy(u)) for name, u in update.items()} for update in updates]
    mean = StreamingMean(SHAPES)
    for bits, weight in zip(encoded, weights, strict=True):
        mean.add(bits, weight)
    assert mean.count == len(weights)
    for name in SHAPES:
        received = np.stack([decode_bfloat16(bits[name]).double().numpy() for bits in encoded])
        expected = np.average(received, axis=0, weights=weights)
        assert mean.mean()[name].double().numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_an_update_that_is_not_finite_leaves_the_sum_as_it_was(poison: float) -> None:
    mean = StreamingMean(SHAPES)
    mean.add(arrays(), 3)
    bad = arrays() | {"b": encode_bfloat16(torch.tensor([1.0, poison, 1.0]))}
    with pytest.raises(UpdateRejected, match="b is not finite"):
        mean.add(bad, 100)
    assert mean.count == 1
    assert all((tensor == 1).all() for tensor in mean.mean().values())


def test_the_new_model_is_the_old_one_and_the_mean_update() -> None:
    weights = {"a": torch.tensor([1.0, 2.0])}
    assert federated_average(weights, {"a": torch.tensor([0.5, -0.25])})["a"].tolist() == [1.5, 1.75]
    assert weights["a"].tolist() == [1.0, 2.0]
