"""What leaves a site: a fixed list of numbers, no text, and codes that mean the same in every version."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from maskdm.federated.parcel import (
    LARGEST_DISTANCE,
    LARGEST_LOSS,
    NUMBER_NAMES,
    QUALITY_NAMES,
    REPORT_NAMES,
    Outcome,
    Parcel,
    QualityReport,
    Report,
)

REPORT: dict[str, Any] = {
    "outcome": 0,
    "round": 1,
    "exchange": 5,
    "examples": 10,
    "images_seen": 64,
    "loss_before": 1.0,
    "loss_after": 0.5,
    "seconds": 2.0,
    "skipped_steps": 0,
}


def test_nothing_but_these_numbers_leaves_a_site() -> None:
    assert REPORT_NAMES == (
        "outcome",
        "round",
        "exchange",
        "examples",
        "images_seen",
        "loss_before",
        "loss_after",
        "seconds",
        "skipped_steps",
    )


QUALITY: dict[str, Any] = {
    "quality_images": 20,
    "kernel": -0.001,
    "frechet": 12.5,
    "precision": 0.5,
    "recall": 0.25,
    "density": 1.5,
    "coverage": 1.0,
    "memorisation": 0.9,
}


def test_of_an_evaluation_these_numbers_may_leave_too_each_or_none() -> None:
    assert tuple(QUALITY) == QUALITY_NAMES
    assert REPORT_NAMES + QUALITY_NAMES == NUMBER_NAMES
    whole = QualityReport.model_validate(REPORT | QUALITY)
    assert {"quality_images": 20, **whole.quality()} == QUALITY
    for name in QUALITY_NAMES[1:]:
        some = QualityReport.model_validate(REPORT | {"quality_images": 20, name: QUALITY[name]})
        assert some.quality() == {name: QUALITY[name]}
        with pytest.raises(ValidationError, match="quality_images is missing"):
            QualityReport.model_validate(REPORT | {name: QUALITY[name]})
    none = QualityReport.model_validate(REPORT)
    assert none.quality() == {}
    assert none.model_dump(exclude_none=True) == Report.model_validate(REPORT).model_dump()


def test_an_update_brings_no_number_of_an_evaluation() -> None:
    with pytest.raises(ValidationError, match="kernel"):
        Report.model_validate(REPORT | {"kernel": 0.5})


@pytest.mark.parametrize("name", QUALITY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -2e9, 2 * LARGEST_DISTANCE, True, "0.5", [0.5]])
def test_what_is_no_figure_of_an_evaluation_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        QualityReport.model_validate(REPORT | QUALITY | {name: value})


@pytest.mark.parametrize(
    "change",
    [{"quality_images": 1}, {"precision": 1.5}, {"recall": -0.1}, {"coverage": 1.0001}, {"density": -1.0}],
)
def test_shares_are_shares(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        QualityReport.model_validate(REPORT | QUALITY | change)


def test_the_codes_of_outcomes_never_change() -> None:
    assert {outcome.name: outcome.value for outcome in Outcome} == {
        "DONE": 0,
        "DATA_UNUSABLE": 1,
        "WRONG_CHANNELS": 2,
        "DIVERGED": 3,
        "GATE_REFUSED": 4,
        "PLAN_REFUSED": 5,
        "FAILED": 6,
        "WORKING": 7,
        "UNKNOWN": 8,
        "TOO_LARGE": 9,
        "POLICY": 10,
        "NOT_APPROVED": 11,
        "CODE_REFUSED": 12,
    }


def test_every_code_has_words_of_its_own() -> None:
    assert len({outcome.words() for outcome in Outcome}) == len(Outcome)


counts = st.integers(0, 2**40)
losses = st.floats(0, LARGEST_LOSS)


@given(st.integers(0, 2**63 - 1), counts, counts, losses, losses)
def test_a_report_comes_back_from_its_numbers(
    exchange: int, images: int, skipped: int, before: float, after: float
) -> None:
    numbers = {"exchange": exchange, "images_seen": images, "skipped_steps": skipped}
    report = Report.model_validate(REPORT | numbers | {"loss_before": before, "loss_after": after})
    sent = report.model_dump(mode="json")
    assert tuple(sent) == REPORT_NAMES
    assert all(type(value) in (int, float) for value in sent.values())
    assert Report.model_validate(sent) == Report.model_validate_json(report.model_dump_json()) == report


def test_a_report_is_one_of_success_unless_it_says_otherwise() -> None:
    without = {name: value for name, value in REPORT.items() if name != "outcome"}
    assert Report.model_validate(without).outcome is Outcome.DONE


LOSSES = ("loss_before", "loss_after")  # which a site may keep to itself


@pytest.mark.parametrize("name", [name for name in REPORT if name not in ("outcome", *LOSSES)])
def test_a_report_in_which_a_number_is_missing_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Report.model_validate({key: value for key, value in REPORT.items() if key != name})


@pytest.mark.parametrize("name", REPORT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5, "many", [1], {"a": 1}])
def test_what_is_no_count_and_no_measure_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Report.model_validate(REPORT | {name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"hospital": 1},
        {"loss": 0.5},
        {"round": 0},
        {"round": 1.5},
        {"exchange": 2**63},
        {"examples": 0},
        {"examples": 2**40 + 1},
        {"images_seen": 2**40 + 1},
        {"outcome": 13},
        {"round": 100_001},
        {"skipped_steps": 2**40 + 1},
        {"seconds": 1e10},
        {"skipped_steps": 0.5},
        {"seconds": 10**400},
    ],
)
def test_a_report_with_anything_else_is_refused(change: dict[str, float]) -> None:
    assert Report.model_validate(REPORT)
    with pytest.raises(ValidationError, match=next(iter(change))):
        Report.model_validate(REPORT | change)


@pytest.mark.parametrize("name", [name for name in REPORT if name != "outcome"])
@pytest.mark.parametrize("value", [True, "1", b"1"])
def test_truth_and_text_are_no_numbers(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Report.model_validate(REPORT | {name: value})


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Report.model_validate(REPORT).examples = 11


def test_the_size_of_a_parcel_is_its_payload() -> None:
    parcel = Parcel({"a": np.zeros((3, 2), np.uint16), "b": np.zeros((), np.float32)}, {"x": 1, "y": 2.0}, "four")
    assert parcel.size() == 12 + 4 + 16 + 4
    assert Parcel({}, {}).size() == 0


def test_a_document_counts_by_its_bytes() -> None:
    assert Parcel({}, {}, "Zürich").size() == 7


def test_whoever_only_passes_parcels_on_does_not_wait_for_pytorch() -> None:
    code = "import sys, maskdm.federated.parcel, maskdm.run.tensorfile; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
