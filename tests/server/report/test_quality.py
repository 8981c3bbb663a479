"""Records of evaluations as tables: numbers with their intervals, and only comparable ones side by side."""

from pathlib import Path

import pytest

from maskdm.data.pixels import PixelPolicy
from maskdm.evaluation.record import FOLDER, Evaluation, write_record
from maskdm_server.federation.events import QualityLine
from maskdm_server.report.quality import quality, quality_at_sites

from .test_page import Document


def record(rounds: int, value: float, reference: str = "a", **changes: object) -> Evaluation:
    """A Fréchet distance of a model after some rounds."""
    document = {
        "model": f"/home/jane/fed/round-{rounds}.safetensors",
        "model_sha256": 64 * "0",
        "rounds": rounds,
        "images_seen": 1000 + rounds,
        "extractor": {"name": "MobileNetV2", "sha256": 64 * "1", "resize": "bicubic", "features": 1280},
        "reference": {
            **{"path": "real", "sha256": 64 * reference, "split": "validation", "images": 500},
            "pixels": PixelPolicy(image_size=32, channels=3).model_dump(),
        },
        "sampling": {"count": 2000, "sampler": "dpmpp", "steps": 25, "guidance": 1.0, "seed": 7},
        "neighbours": 5,
        "resamples": 100,
        "headline": "FD",
        "metrics": {
            "FD": {
                **{"value": value, "better": "lower", "low": value - 1, "high": value + 1, "floor": 2.5},
                **{"images": 2000, "reference_images": 500},
            }
        },
        "maskdm": "0.1.0",
        "torch": "2.9",
        **changes,
    }
    return Evaluation.model_validate(document)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rounds, value in ((10, 30.25), (5, 40.5), (0, 50.125)):
        write_record(tmp_path / FOLDER / f"{rounds}.json", record(rounds, value))
    return tmp_path


def test_a_model_is_a_line_and_the_rounds_are_a_chart_with_the_floor(folder: Path) -> None:
    document = Document(quality(folder))
    assert [text for text in document.text if text in ("50.12", "40.50", "30.25")] == ["50.12", "40.50", "30.25"]
    assert " [29.25, 31.25] floor 2.500" in document.text
    assert "FD ↓" in document.text
    said = " ".join(document.text)
    assert "round-10.safetensors" in said
    assert "/home/jane" not in said
    (label,) = [about["aria-label"] for about in document.named("svg") if about.get("role")]
    assert label == (
        "FD: FD from 50.12 at round 0 to 30.25 at round 10.00; floor: real images from 2.500 at round 0 to 2.500 at "
        "round 10.00"
    )


def test_what_was_measured_against_another_reference_has_a_table_of_its_own(folder: Path) -> None:
    write_record(folder / FOLDER / "other.json", record(10, 3.0, reference="b"))
    document = Document(quality(folder))
    assert len(document.named("table")) == 2
    assert len([about for about in document.named("svg") if about.get("role")]) == 1  # one point is no line


def test_a_record_that_cannot_be_read_is_passed_over_and_none_is_nothing(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "torn.json").write_text("{")
    assert quality(tmp_path) == ""


def test_what_sites_measured_themselves_is_shown_together_and_one_by_one() -> None:
    lines = [
        QualityLine(
            round=number,
            sites=2,
            quality_images=90,
            quality={"fd": 12.5 - number},
            by_site={"<b>evil</b>": {"quality_images": 50, "fd": 11.0}, "ward": {"quality_images": 40}},
        )
        for number in (0, 3)
    ]
    document = Document(quality_at_sites(lines))
    assert not document.named("b")
    said = document.text
    assert [text for text in said if text in ("the prior", "after round 3", "12.50", "9.500")] == [
        *("the prior", "12.50", "after round 3", "9.500")
    ]
    assert said[said.index("<b>evil</b>") :] == ["<b>evil</b>", "50", "11.00", "ward", "40", "–"]
    assert quality_at_sites([]) == ""


def test_models_that_other_sites_measured_carry_a_warning() -> None:
    def line(number: int, *sites: str) -> QualityLine:
        by_site = {site: {"quality_images": 40} for site in sites}
        return QualityLine(round=number, sites=len(sites), quality_images=40, quality={"fd": 1.0}, by_site=by_site)

    warning = "Not all of these models were measured by the same sites: part of a difference may be theirs."
    assert warning in Document(quality_at_sites([line(0, "a", "b"), line(3, "b")])).text
    assert warning not in Document(quality_at_sites([line(0, "a", "b"), line(3, "b", "a")])).text
