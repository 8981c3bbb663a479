"""The one way out of a site: what is not expected stays, and every decision is written down."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from maskdm.config import DiffusionConfig, Encoding, MaskConfig, ModelConfig
from maskdm.errors import GateRefused
from maskdm.federated.encoding import check, decode, decode_bfloat16
from maskdm.federated.parcel import REPORT_NAMES, Outcome, Parcel, Report
from maskdm.federated.plan import RoundPlan
from maskdm.federated.policy import SitePolicy
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import squared_norm
from maskdm.run.runfolder import read_lines
from maskdm_client.folder.settings import SiteSettings, load_settings
from maskdm_client.gate.gate import (
    CODE,
    check_again,
    check_numbers,
    check_update,
    code,
    problem_of,
    record,
    release,
    release_outcome,
    release_progress,
)

REPORT = Report(
    round=3, exchange=7, examples=10, images_seen=64, loss_before=1.0, loss_after=0.5, seconds=2.0, skipped_steps=0
)
RECEIVED = {"head.weight": torch.full((2, 3), 1.0), "head.bias": torch.full((3,), -1.0)}
POLICY = SitePolicy()


class TwoWeights(RoundPlan):
    """A plan for a model of two weights."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in RECEIVED.items()}

    def changed(self) -> tuple[str, ...]:
        return tuple(RECEIVED)


def plan(encoding: Encoding = "bf16") -> RoundPlan:
    model = CheckpointMetadata(
        model=ModelConfig(image_size=8, channels=1, patch_size=2, dim=16, depth=2, heads=2),
        diffusion=DiffusionConfig(),
        mask=MaskConfig(kind="none", ratio=0),
        effective_mask_ratio=0,
        images_seen=0,
        seed=0,
    )
    values = {
        **{"federation": "0" * 16, "exchange": 7, "action": "train", "round": 3, "rounds": 3, "local_images": 64},
        **{"batch_size": 8, "lr": 1e-3, "seed": 0, "encoding": encoding, "topk_share": 0.5, "model": model},
    }
    return TwoWeights.model_validate(values)


PLAN = plan()


def small_update() -> dict[str, Tensor]:
    return {name: 0.125 * torch.ones_like(tensor) for name, tensor in RECEIVED.items()}


def test_an_expected_update_leaves_as_it_is_with_its_numbers(tmp_path: Path) -> None:
    parcel = check_update(small_update(), REPORT, PLAN, RECEIVED, POLICY, tmp_path / "audit.jsonl")
    assert parcel.arrays.keys() == RECEIVED.keys()
    for array in parcel.arrays.values():
        assert str(array.dtype) == "uint16"
        assert (decode_bfloat16(array) == 0.125).all()  # type: ignore[arg-type]
    assert set(parcel.scalars) == set(REPORT_NAMES)
    assert parcel.document == ""


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    update: dict[str, Tensor | None] = {**small_update(), **tensors}
    return {name: tensor for name, tensor in update.items() if tensor is not None}


@pytest.mark.parametrize(
    ("update", "policy", "reason"),
    [
        (changed(images=torch.zeros(2, 3)), POLICY, "the names of the update are not those that were asked for"),
        (changed(**{"head.bias": None}), POLICY, "the names of the update are not those that were asked for"),
        ({}, POLICY, "the names of the update are not those that were asked for"),
        (changed(**{"head.bias": torch.zeros(4)}), POLICY, "head.bias has another shape than was asked for"),
        (changed(**{"head.bias": torch.zeros(3, 1)}), POLICY, "head.bias has another shape than was asked for"),
        (changed(**{"head.bias": torch.tensor([0, float("nan"), 0])}), POLICY, "head.bias is not finite"),
        (changed(**{"head.bias": torch.tensor([0, float("inf"), 0])}), POLICY, "head.bias is not finite"),
        (changed(**{"head.bias": torch.full((3,), 2.0)}), POLICY, "its norm 3.48 exceeds 1 of the model's 3"),
        (small_update(), SitePolicy(max_relative_norm=0.1), "its norm 0.375 exceeds 0.1 of the model's 3"),
        (small_update(), SitePolicy(max_norm=0.25), "its norm 0.375 exceeds the 0.25 of the policy's max-norm"),
        (
            small_update(),
            SitePolicy(metrics=tuple(name for name in REPORT_NAMES if name != "seconds")),
            "seconds is not in the policy's list of numbers",
        ),
    ],
)
def test_anything_unexpected_is_stopped_and_the_refusal_is_written_down(
    tmp_path: Path, update: dict[str, Tensor], policy: SitePolicy, reason: str
) -> None:
    audit = tmp_path / "audit.jsonl"
    with pytest.raises(GateRefused) as refused:
        check_update(update, REPORT, PLAN, RECEIVED, policy, audit)
    assert str(refused.value) == f"the gate stopped what would have left in round 3: {reason}"
    (line,) = read_lines(audit)
    assert line["verdict"] == reason
    assert (line["direction"], line["round"]) == ("out", 3)
    assert (line["bytes"], line["arrays"], line["scalars"]) == (0, {}, {})


def test_the_audit_line_of_a_release_describes_exactly_what_left(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    parcel = check_update(small_update(), REPORT, PLAN, RECEIVED, POLICY, audit)
    assert not audit.exists(), "it has not left"
    assert release(parcel, 3, POLICY, audit) == parcel
    (line,) = read_lines(audit)
    digest = hashlib.sha256()
    for name in sorted(parcel.arrays):
        digest.update(name.encode() + parcel.arrays[name].tobytes())
    assert line["sha256"] == digest.hexdigest()
    assert line["verdict"] == "released"
    assert line["arrays"] == {"head.bias": [3], "head.weight": [2, 3]}
    assert line["scalars"] == dict(parcel.scalars)
    assert line["bytes"] == parcel.size() == 2 * 9 + 8 * len(REPORT_NAMES)


def test_numbers_alone_leave_without_arrays_and_obey_the_policy(tmp_path: Path) -> None:
    parcel = check_numbers(REPORT, POLICY, tmp_path / "audit.jsonl")
    assert parcel.arrays == {}
    assert set(parcel.scalars) == set(REPORT_NAMES)
    with pytest.raises(GateRefused, match="examples is not in the policy's list"):
        check_numbers(REPORT, SitePolicy(metrics=("outcome", "round", "exchange")), tmp_path / "audit.jsonl")
    (line,) = read_lines(tmp_path / "audit.jsonl")
    assert line["verdict"] == "examples is not in the policy's list of numbers"


def test_a_failure_leaves_as_a_code_alone(tmp_path: Path) -> None:
    parcel = release_outcome(Outcome.DIVERGED, 4, 7, tmp_path / "audit.jsonl")
    assert parcel == Parcel({}, {"outcome": 3, "round": 4, "exchange": 7}, "")
    assert [line["scalars"] for line in read_lines(tmp_path / "audit.jsonl")] == [
        {"outcome": 3, "round": 4, "exchange": 7}
    ]


def test_what_comes_in_is_written_down_too(tmp_path: Path) -> None:
    record(tmp_path / "audit.jsonl", "in", 1, "train", Parcel({}, {}, "plan"))
    (line,) = read_lines(tmp_path / "audit.jsonl")
    assert (line["direction"], line["verdict"], line["bytes"]) == ("in", "train", 4)


NUMBERS = REPORT.model_dump(mode="json")
# Whatever a program at a site might hand to the gate.
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(
            [10**400, 2**63, -1, np.float64(0.5), np.int64(1), np.zeros(3), b"bytes", Path("/data/scan.dcm")]
        ),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(
    [*REPORT_NAMES, "patient", "/data/Jane Doe/scan.dcm", "Traceback (most recent call last):", 7, None]
)
SCALARS = st.one_of(
    st.dictionaries(KEYS, ANYTHING, max_size=5),
    st.dictionaries(KEYS, ANYTHING, max_size=1).map(lambda one: REPORT.model_dump(mode="json") | one),
    st.sets(st.sampled_from(REPORT_NAMES)).map(lambda few: {n: v for n, v in NUMBERS.items() if n in few}),
    ANYTHING,
)
ARRAY_NAMES = st.sampled_from(
    ["head.weight", "head.bias", "scan 7.dcm", "/data/scan.dcm", "label:positive", "é", "", 3]
)
DTYPES = st.sampled_from(["uint16", "float32", "float64", "uint8", "int8", "U9", "object", "bool", "complex64"])
ARRAYS = st.one_of(
    st.just({}),
    st.just({"head.weight": np.zeros((2, 3), np.uint16), "head.bias": np.zeros(3, np.uint16)}),
    st.dictionaries(
        ARRAY_NAMES,
        st.builds(np.zeros, st.sampled_from([(2, 3), (3,), (), (0,), (1000,)]), DTYPES) | ANYTHING,
        max_size=3,
    ),
    ANYTHING,
)
EXPECTED = {"head.weight": ("uint16", (2, 3)), "head.bias": ("uint16", (3,))}


@given(
    scalars=SCALARS,
    arrays=ARRAYS,
    document=st.sampled_from(["", "Traceback (most recent call last):"]),
    listed=st.sets(st.sampled_from(REPORT_NAMES)) | st.just(set(REPORT_NAMES)),
)
@example(
    NUMBERS, {"head.weight": np.zeros((2, 3), np.uint16), "head.bias": np.zeros(3, np.uint16)}, "", set(REPORT_NAMES)
)
@example(
    NUMBERS, {"head.weight": np.zeros((3, 2), np.uint16), "head.bias": np.zeros(3, np.uint16)}, "", set(REPORT_NAMES)
)
@example(NUMBERS, {}, "", set(REPORT_NAMES))
@example(NUMBERS, {}, "DIAGNOSIS", set(REPORT_NAMES))
def test_whatever_is_handed_to_the_gate_what_leaves_is_exactly_what_the_policy_lists_or_a_code(
    scalars: Any, arrays: Any, document: str, listed: set[str]
) -> None:
    policy = SitePolicy(metrics=tuple(listed), max_bytes_per_round=1000)
    with tempfile.TemporaryDirectory() as folder:
        audit = Path(folder) / "audit.jsonl"
        try:
            left = release(Parcel(arrays, scalars, document), 3, policy, audit)
        except GateRefused:
            (line,) = read_lines(audit)
            assert (line["bytes"], line["scalars"], line["arrays"]) == (0, {}, {})
            release_outcome(Outcome.GATE_REFUSED, 3, 7, audit)
            assert read_lines(audit)[-1]["scalars"] == {"outcome": 4, "round": 3, "exchange": 7}
            return
        assert left.document == ""
        assert all(type(value) in (int, float) and math.isfinite(value) for value in left.scalars.values())
        if left.scalars["outcome"] in (Outcome.DONE, Outcome.WORKING):
            assert set(left.scalars) - {"outcome"} <= listed
        else:
            assert set(left.scalars) <= set(CODE)
        # A number is out of its range where the others make a report and it does not.
        Report.model_validate(NUMBERS | {n: v for n, v in left.scalars.items() if n != "outcome"})
        for name, array in left.arrays.items():
            assert left.scalars["outcome"] == Outcome.DONE
            assert name in ("head.weight", "head.bias")
            assert str(array.dtype) in ("uint16", "float32", "int8")
        assert sum(array.nbytes for array in left.arrays.values()) <= 1000
        if problem_of(left, policy, EXPECTED) is None:
            assert {name: (str(a.dtype), a.shape) for name, a in left.arrays.items()} == EXPECTED
        (line,) = read_lines(audit)
        assert (line["verdict"], line["scalars"], set(line["arrays"])) == ("released", left.scalars, set(left.arrays))


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome not in (Outcome.DONE, Outcome.WORKING)])
def test_a_code_leaves_whatever_the_policy_lists_and_nothing_rides_on_it(tmp_path: Path, outcome: Outcome) -> None:
    audit, nothing = tmp_path / "audit.jsonl", SitePolicy(metrics=())
    assert release(code(outcome, 3, 7), 3, nothing, audit).scalars["outcome"] == outcome
    for more in ({"examples": 10}, {"loss_before": 0.5}):
        with pytest.raises(GateRefused, match="list of numbers"):
            release(Parcel({}, {**code(outcome, 3, 7).scalars, **more}), 3, POLICY, audit)
    with pytest.raises(GateRefused, match="no answer"):
        release(Parcel({"a": np.zeros(3, np.uint16)}, code(outcome, 3, 7).scalars), 3, POLICY, audit)


@pytest.mark.parametrize("listed", [(), ("round", "images_seen"), REPORT_NAMES])
def test_of_a_sign_of_life_only_what_is_listed_leaves_and_no_more_than_it_may_hold(
    tmp_path: Path, listed: tuple[str, ...]
) -> None:
    audit, policy = tmp_path / "audit.jsonl", SitePolicy(metrics=listed)
    numbers = {"round": 3, "exchange": 7, "images_seen": 64}
    expected = {"outcome": 7} | {name: value for name, value in numbers.items() if name in listed}
    assert release_progress(3, 64, 7, policy, audit).scalars == expected
    if "images_seen" in listed:
        with pytest.raises(GateRefused, match="images_seen is out of its range"):
            release_progress(3, -1, 7, policy, audit)


def test_nothing_in_a_plan_loosens_the_policy(tmp_path: Path) -> None:
    """Whatever a coordinator wants, of the plan's fields none is one of the policy's."""
    assert not RoundPlan.model_fields.keys() & SitePolicy.model_fields.keys()
    document = json.loads(PLAN.model_dump_json())
    for key in (*SitePolicy.model_fields, "policy", "max-relative-norm"):
        with pytest.raises(ValidationError, match="Extra inputs"):
            RoundPlan.model_validate(document | {key: 10.0})


NAMES = st.sampled_from([*RECEIVED, "head.weigth", "images", "labels", ""])
TENSORS = st.one_of(
    st.sampled_from([torch.zeros(2, 3), torch.zeros(3), torch.zeros(3, 2), torch.zeros(0), torch.zeros(())]),
    st.floats(width=32).map(lambda value: torch.full((2, 3), value)),
    st.floats(width=32).map(lambda value: torch.full((3,), value)),
    st.just(torch.full((3,), 1e308, dtype=torch.float64)),
)
UPDATES = st.one_of(
    st.dictionaries(NAMES, TENSORS, max_size=4),
    st.fixed_dictionaries({"head.weight": TENSORS, "head.bias": TENSORS}),
)


@given(update=UPDATES, encoding=st.sampled_from(["bf16", "fp32", "int8", "topk"]))
def test_whatever_an_update_holds_it_is_stopped_or_leaves_as_it_was_asked_for_and_no_longer_than_allowed(
    update: dict[str, Tensor], encoding: Encoding
) -> None:
    asked = plan(encoding)
    with tempfile.TemporaryDirectory() as folder:
        audit = Path(folder) / "audit.jsonl"
        try:
            parcel = check_update(update, REPORT, asked, RECEIVED, POLICY, audit)
        except GateRefused:
            assert len(read_lines(audit)) == 1
        else:
            release(parcel, 3, POLICY, audit)
            check(parcel.arrays, asked.shapes(), encoding, asked.topk_share)
            shapes = asked.shapes()
            sent = torch.cat([decode(parcel.arrays, name, shapes[name], encoding).flatten() for name in shapes])
            assert float(sent.norm()) <= 3 * (1 + 2**-6)
            (line,) = read_lines(audit)
            assert line["verdict"] == "released"


@given(
    train=st.sampled_from(["norm-bias", "adapters"]),
    encoding=st.sampled_from(["bf16", "fp32", "int8", "topk"]),
    seed=st.integers(0, 2**32),
    exponents=st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
    instead=st.dictionaries(st.integers(0, 8), st.none() | st.sampled_from([math.nan, math.inf, 0.0]), max_size=1),
)
def test_of_parts_of_the_network_too_only_what_is_asked_for_and_as_long_as_is_allowed_leaves(
    make_plan: Callable[..., RoundPlan],
    weights: dict[str, Tensor],
    train: str,
    encoding: Encoding,
    seed: int,
    exponents: tuple[int, int],
    instead: dict[int, float | None],
) -> None:
    """What counts of adapters is the length of their products, however long the factors are."""
    asked = make_plan(train=train, adapter_rank=2, encoding=encoding, topk_share=0.5)
    shapes, random = asked.shapes(), torch.Generator().manual_seed(seed)
    update = {
        name: 10.0 ** exponents[name.endswith(".up")] * torch.randn(shape, generator=random)
        for name, shape in shapes.items()
    }
    for place, value in instead.items():
        name = list(shapes)[place]
        if value is None:
            del update[name]
        else:
            update[name].view(-1)[-1] = value
    reference = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in weights.values()))
    spoilt = any(value is None or not math.isfinite(value) for value in instead.values())
    with tempfile.TemporaryDirectory() as folder:
        audit = Path(folder) / "audit.jsonl"
        try:
            parcel = check_update(update, REPORT, asked, weights, POLICY, audit)
        except GateRefused:
            assert len(read_lines(audit)) == 1
            assert spoilt or exponents[0] >= -1 or exponents[1] >= -1
        else:
            assert not spoilt
            check(parcel.arrays, shapes, encoding, asked.topk_share)
            sent = {name: decode(parcel.arrays, name, shapes[name], encoding) for name in shapes}
            squares = (squared_norm(sent.__getitem__, name, asked.train) for name in asked.changed())
            # What topk leaves out may have cancelled something of what it keeps.
            assert math.sqrt(sum(squares)) <= (1.5 if encoding == "topk" else 1.05) * reference


def test_an_update_larger_than_the_policy_allows_is_stopped(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with pytest.raises(GateRefused, match=r"would be 18 bytes, .*max-bytes-per-round allows 17"):
        check_update(small_update(), REPORT, PLAN, RECEIVED, SitePolicy(max_bytes_per_round=17), audit)
    assert check_update(small_update(), REPORT, PLAN, RECEIVED, SitePolicy(max_bytes_per_round=18), audit).arrays


def test_what_passed_before_leaves_again_only_where_the_policy_still_allows_it(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    parcel = check_update(small_update(), REPORT, PLAN, RECEIVED, POLICY, audit)
    again = check_again(parcel, 8, SitePolicy(max_bytes_per_round=18), audit)
    assert (again.arrays, again.scalars) == (parcel.arrays, {**parcel.scalars, "exchange": 8})
    for policy, reason in (
        (SitePolicy(max_bytes_per_round=17), "--max-upload"),
        (SitePolicy(metrics=("round",)), "list"),
    ):
        with pytest.raises(GateRefused, match=reason):
            check_again(parcel, 8, policy, audit)
    assert [line["bytes"] for line in read_lines(audit)] == [0, 0]


@pytest.mark.parametrize("values", [{"metric": ["round"]}, {"metrics": ["patient"]}, {"max_relative_norm": 0}])
def test_a_policy_with_a_mistake_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SitePolicy.model_validate(values)


def test_settings_are_read_back_from_the_folder_of_the_site(tmp_path: Path) -> None:
    settings = SiteSettings(data=tmp_path, fraction=0.3, policy=SitePolicy(max_relative_norm=0.5))
    document = {"kind": "client", "site": settings.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert load_settings(tmp_path) == settings
