"""The one way out of a site: what is not expected stays, and every decision is written down."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from maskdm.checkpoint import CheckpointMetadata
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm.errors import GateRefused
from maskdm.parcel import REPORT_NAMES, Outcome, Parcel, Report
from maskdm.protocol import RoundPlan
from maskdm.runfolder import read_lines
from maskdm.trainable import squared_norm
from maskdm.wire import Encoding, check, decode, decode_bfloat16
from maskdm_client.gate import record, release_again, release_numbers, release_outcome, release_update
from maskdm_client.settings import SitePolicy, SiteSettings, load_settings

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
    parcel = release_update(small_update(), REPORT, PLAN, RECEIVED, POLICY, tmp_path / "audit.jsonl")
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
        (
            small_update(),
            SitePolicy(scalars=tuple(name for name in REPORT_NAMES if name != "seconds")),
            "seconds is not in the policy's list of numbers",
        ),
    ],
)
def test_anything_unexpected_is_stopped_and_the_refusal_is_written_down(
    tmp_path: Path, update: dict[str, Tensor], policy: SitePolicy, reason: str
) -> None:
    audit = tmp_path / "audit.jsonl"
    with pytest.raises(GateRefused) as refused:
        release_update(update, REPORT, PLAN, RECEIVED, policy, audit)
    assert str(refused.value) == f"the gate stopped the update of round 3: {reason}"
    (line,) = read_lines(audit)
    assert line["verdict"] == reason
    assert (line["direction"], line["round"]) == ("out", 3)
    assert (line["bytes"], line["arrays"], line["scalars"]) == (0, [], {})


def test_the_audit_line_of_a_release_describes_exactly_what_left(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    parcel = release_update(small_update(), REPORT, PLAN, RECEIVED, POLICY, audit)
    (line,) = read_lines(audit)
    digest = hashlib.sha256()
    for name in sorted(parcel.arrays):
        digest.update(name.encode() + parcel.arrays[name].tobytes())
    assert line["sha256"] == digest.hexdigest()
    assert line["verdict"] == "released"
    assert line["arrays"] == ["head.bias", "head.weight"]
    assert line["scalars"] == dict(parcel.scalars)
    assert line["bytes"] == parcel.size() == 2 * 9 + 8 * len(REPORT_NAMES)


def test_numbers_alone_leave_without_arrays_and_obey_the_policy(tmp_path: Path) -> None:
    parcel = release_numbers(REPORT, POLICY, tmp_path / "audit.jsonl")
    assert parcel.arrays == {}
    assert set(parcel.scalars) == set(REPORT_NAMES)
    with pytest.raises(GateRefused, match="examples is not in the policy's list"):
        release_numbers(REPORT, SitePolicy(scalars=("round",)), tmp_path / "audit.jsonl")
    assert len(read_lines(tmp_path / "audit.jsonl")) == 2


def test_a_failure_leaves_as_a_code_alone(tmp_path: Path) -> None:
    parcel = release_outcome(Outcome.DIVERGED, 4, 7, tmp_path / "audit.jsonl")
    assert parcel == Parcel({}, {"outcome": 3, "round": 4, "exchange": 7}, "")
    assert [line["scalars"] for line in read_lines(tmp_path / "audit.jsonl")] == [
        {"outcome": 3, "round": 4, "exchange": 7}
    ]


def test_what_comes_in_is_written_down_too(tmp_path: Path) -> None:
    record(tmp_path / "audit.jsonl", "in", 1, Parcel({}, {}, "plan"), "train")
    (line,) = read_lines(tmp_path / "audit.jsonl")
    assert (line["direction"], line["verdict"], line["bytes"]) == ("in", "train", 4)


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
            parcel = release_update(update, REPORT, asked, RECEIVED, POLICY, audit)
        except GateRefused:
            assert read_lines(audit)[-1]["verdict"] != "released"
        else:
            assert read_lines(audit)[-1]["verdict"] == "released"
            check(parcel.arrays, asked.shapes(), encoding, asked.topk_share)
            shapes = asked.shapes()
            sent = torch.cat([decode(parcel.arrays, name, shapes[name], encoding).flatten() for name in shapes])
            assert float(sent.norm()) <= 3 * (1 + 2**-6)
        assert len(read_lines(audit)) == 1


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
            parcel = release_update(update, REPORT, asked, weights, POLICY, audit)
        except GateRefused:
            assert read_lines(audit)[-1]["verdict"] != "released"
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
    with pytest.raises(GateRefused, match="would be 18 bytes, --max-upload allows 17"):
        release_update(small_update(), REPORT, PLAN, RECEIVED, SitePolicy(max_upload=17), audit)
    assert release_update(small_update(), REPORT, PLAN, RECEIVED, SitePolicy(max_upload=18), audit).arrays


def test_what_passed_before_leaves_again_only_where_the_policy_still_allows_it(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    parcel = release_update(small_update(), REPORT, PLAN, RECEIVED, POLICY, audit)
    again = release_again(parcel, 8, SitePolicy(max_upload=18), audit)
    assert (again.arrays, again.scalars) == (parcel.arrays, {**parcel.scalars, "exchange": 8})
    for policy, reason in ((SitePolicy(max_upload=17), "--max-upload"), (SitePolicy(scalars=("round",)), "list")):
        with pytest.raises(GateRefused, match=reason):
            release_again(parcel, 8, policy, audit)
    verdicts = [line["verdict"] for line in read_lines(audit)]
    assert verdicts[:2] == ["released", "released"]
    assert "released" not in verdicts[2:]


@pytest.mark.parametrize("values", [{"scalar": ["round"]}, {"max_relative_norm": 0}])
def test_a_policy_with_a_mistake_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SitePolicy.model_validate(values)


def test_settings_are_read_back_from_the_folder_of_the_site(tmp_path: Path) -> None:
    settings = SiteSettings(data=tmp_path, fraction=0.3, policy=SitePolicy(max_relative_norm=0.5))
    document = {"kind": "client", "site": settings.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert load_settings(tmp_path) == settings
