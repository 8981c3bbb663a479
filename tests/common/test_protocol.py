"""Messages between coordinator and site: exact numbers, fixed lists."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from pydantic import ValidationError

from maskdm.checkpoint import CheckpointMetadata
from maskdm.protocol import (
    REPORT_NAMES,
    Outcome,
    Parcel,
    Report,
    RoundPlan,
    decode_bfloat16,
    encode_bfloat16,
    from_arrays,
    pack,
    to_arrays,
    unpack,
)

REPORT: dict[str, Any] = {
    "round": 1,
    "examples": 10,
    "images_seen": 64,
    "loss_before": 1.0,
    "loss_after": 0.5,
    "seconds": 2.0,
    "skipped_steps": 0,
}

normal = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-30)


@given(arrays_of.arrays(np.float32, arrays_of.array_shapes(max_dims=3, max_side=4), elements=normal))
def test_updates_lose_at_most_one_part_in_256_on_their_way(values: NDArray[np.float32]) -> None:
    bits = encode_bfloat16(torch.from_numpy(values))
    assert bits.dtype == np.uint16
    assert bits.shape == values.shape
    found = decode_bfloat16(bits).numpy()
    assert found.dtype == np.float32
    assert (np.abs(found - values) <= np.abs(values) * 2.0**-8).all()


@given(arrays_of.arrays(np.uint16, 8))
def test_what_bfloat16_can_hold_survives_exactly(bits: NDArray[np.uint16]) -> None:
    values = decode_bfloat16(bits)
    again = decode_bfloat16(encode_bfloat16(values))
    assert torch.equal(again[~values.isnan()], values[~values.isnan()])
    assert torch.equal(again.isnan(), values.isnan())


def test_non_finite_values_stay_visible() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert decode_bfloat16(encode_bfloat16(values)).isfinite().tolist() == [False, False, False]


def test_weights_travel_down_without_any_loss() -> None:
    weights = {"a": torch.randn(3, 2), "b": torch.randn(())}
    found = from_arrays(to_arrays(weights))
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    found["a"].add_(1)
    assert not torch.equal(found["a"], weights["a"])  # a copy


some_arrays = st.one_of(
    arrays_of.arrays(np.float32, arrays_of.array_shapes(min_dims=0, max_dims=3, max_side=4)),
    arrays_of.arrays(np.uint16, arrays_of.array_shapes(min_dims=0, max_dims=3, max_side=4)),
)


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), some_arrays))
def test_packed_arrays_come_back_bit_for_bit(arrays: dict[str, NDArray[np.generic]]) -> None:
    found = unpack(pack(arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_a_view_is_packed_in_its_own_order() -> None:
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(unpack(pack({"a": view}))["a"], view)


@given(st.binary(max_size=64), st.integers(0, 200))
def test_bytes_that_are_no_whole_document_are_refused(garbage: bytes, cut: int) -> None:
    whole = pack({"a": np.arange(8, dtype=np.float32)})
    for packed in (np.frombuffer(garbage, np.uint8), whole[: min(cut, len(whole) - 1)]):
        if packed.tobytes() != pack({}).tobytes():
            with pytest.raises(ValueError, match="safetensors"):
                unpack(packed)
    for wrong in (whole.view(np.int8), whole[None]):
        with pytest.raises(ValueError, match="must be bytes"):
            unpack(wrong)


def test_a_report_holds_a_fixed_list_of_numbers() -> None:
    report = Report.model_validate(REPORT)
    assert report.outcome is Outcome.DONE
    assert set(REPORT_NAMES) == {*REPORT, "outcome"}
    assert all(isinstance(value, (int, float)) for value in report.model_dump(mode="json").values())
    assert Report.model_validate(report.model_dump(mode="json")) == report


@pytest.mark.parametrize(
    "change",
    [
        {"hospital": 1},
        {"loss_after": float("nan")},
        {"loss_before": float("inf")},
        {"examples": 0},
        {"examples": 2**41},
        {"images_seen": -1},
        {"round": 0},
        {"outcome": 9},
    ],
)
def test_a_report_with_anything_else_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate(REPORT | change)


@pytest.mark.parametrize(
    "change",
    [{"command": "rm"}, {"protocol": 2}, {"action": "upload"}, {"federation": "short"}, {"rounds": 0}, {"lr": 2}],
)
def test_a_plan_with_anything_else_is_refused(metadata: CheckpointMetadata, change: dict[str, Any]) -> None:
    plan = {
        "federation": "0123456789abcdef",
        "action": "train",
        "round": 1,
        "rounds": 2,
        "local_images": 64,
        "batch_size": 8,
        "lr": 1e-3,
        "seed": 0,
        "model": metadata.model_dump(),
    }
    good = RoundPlan.model_validate(plan)
    assert RoundPlan.model_validate_json(good.model_dump_json()) == good
    with pytest.raises(ValidationError):
        RoundPlan.model_validate(plan | change)


def test_the_size_of_a_parcel_is_its_payload() -> None:
    parcel = Parcel({"a": np.zeros((3, 2), np.uint16)}, {"x": 1, "y": 2.0}, "four")
    assert parcel.size() == 12 + 16 + 4
