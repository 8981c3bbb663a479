"""The one way out of a site: what is not expected stays, and every decision is written down."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from maskdm.errors import GateRefused
from maskdm.protocol import REPORT_NAMES, Outcome, Parcel, Report, decode_bfloat16
from maskdm.runfolder import read_lines
from maskdm_client.gate import record, release_numbers, release_outcome, release_update
from maskdm_client.settings import SitePolicy, SiteSettings, load_settings

REPORT = Report(round=3, examples=10, images_seen=64, loss_before=1.0, loss_after=0.5, seconds=2.0, skipped_steps=0)
RECEIVED = {"head.weight": torch.full((2, 3), 1.0), "head.bias": torch.full((3,), -1.0)}
POLICY = SitePolicy()


def small_update() -> dict[str, Tensor]:
    return {name: 0.125 * torch.ones_like(tensor) for name, tensor in RECEIVED.items()}


def test_an_expected_update_leaves_as_it_is_with_its_numbers(tmp_path: Path) -> None:
    parcel = release_update(small_update(), REPORT, RECEIVED, POLICY, tmp_path / "audit.jsonl")
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
        (changed(images=torch.zeros(2, 3)), POLICY, "the names of the update are not those of the model"),
        (changed(**{"head.bias": None}), POLICY, "the names of the update are not those of the model"),
        ({}, POLICY, "the names of the update are not those of the model"),
        (changed(**{"head.bias": torch.zeros(4)}), POLICY, "head.bias has another shape than the model's"),
        (changed(**{"head.bias": torch.zeros(3, 1)}), POLICY, "head.bias has another shape than the model's"),
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
        release_update(update, REPORT, RECEIVED, policy, audit)
    assert str(refused.value) == f"the gate stopped the update of round 3: {reason}"
    (line,) = read_lines(audit)
    assert line["verdict"] == reason
    assert (line["direction"], line["round"]) == ("out", 3)
    assert (line["bytes"], line["arrays"], line["scalars"]) == (0, [], {})


def test_the_audit_line_of_a_release_describes_exactly_what_left(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    parcel = release_update(small_update(), REPORT, RECEIVED, POLICY, audit)
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
    parcel = release_outcome(Outcome.DIVERGED, 4, tmp_path / "audit.jsonl")
    assert parcel == Parcel({}, {"outcome": 3, "round": 4}, "")
    assert [line["scalars"] for line in read_lines(tmp_path / "audit.jsonl")] == [{"outcome": 3, "round": 4}]


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


@given(update=UPDATES)
def test_whatever_an_update_holds_it_is_stopped_or_leaves_with_the_received_names_shapes_and_size(
    update: dict[str, Tensor],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        audit = Path(folder) / "audit.jsonl"
        try:
            parcel = release_update(update, REPORT, RECEIVED, POLICY, audit)
        except GateRefused:
            assert read_lines(audit)[-1]["verdict"] != "released"
        else:
            assert read_lines(audit)[-1]["verdict"] == "released"
            shapes = {name: array.shape for name, array in parcel.arrays.items()}
            assert shapes == {name: tensor.shape for name, tensor in RECEIVED.items()}
            sent = torch.cat([decode_bfloat16(a).flatten() for a in parcel.arrays.values()])  # type: ignore[arg-type]
            assert float(sent.norm()) <= 3 * (1 + 2**-8)
        assert len(read_lines(audit)) == 1


@pytest.mark.parametrize("values", [{"scalar": ["round"]}, {"max_relative_norm": 0}])
def test_a_policy_with_a_mistake_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SitePolicy.model_validate(values)


def test_settings_are_read_back_from_the_folder_of_the_site(tmp_path: Path) -> None:
    settings = SiteSettings(data=tmp_path, fraction=0.3, policy=SitePolicy(max_relative_norm=0.5))
    document = {"kind": "client", "site": settings.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert load_settings(tmp_path) == settings
