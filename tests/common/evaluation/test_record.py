"""Records: where they lie, what tells two apart, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from maskdm.errors import UsageError
from maskdm.evaluation.record import Evaluation, lines, read_record, records_of, write_record


def record(**changes: Any) -> Evaluation:
    number = {"value": 1.25, "better": "lower", "images": 50, "reference_images": 40}
    values = {
        "model": "run/prior.safetensors",
        "model_sha256": "a" * 64,
        "images_seen": 6400,
        "extractor": {"name": "cells", "sha256": "b" * 64, "resize": "none", "features": 64},
        "reference": {
            "path": "faces",
            "sha256": "c" * 64,
            "split": "test",
            "images": 40,
            "pixels": {"image_size": 16, "channels": 1},
        },
        "sampling": {"count": 50, "seed": 0, "sampler": "dpmpp", "steps": 25, "eta": 0.0, "guidance": 1.0},
        "neighbours": 5,
        "resamples": 1000,
        "headline": "KD-cells",
        "metrics": {
            "FD-cells": number | {"low": 1.0, "high": 1.5, "floor": 0.25, "floor_images": 20},
            "KD-cells": number,
        },
        "notes": ["few"],
        "maskdm": "1",
        "torch": "2",
    }
    return Evaluation.model_validate(values | changes)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", record())
    assert read_record(tmp_path / "a.json") == record(created=read_record(tmp_path / "a.json").created)


def test_the_same_evaluation_has_the_same_name_and_every_other_another() -> None:
    first = record()
    same = record(reference=first.reference.model_copy(update={"path": "elsewhere/faces"}), model_sha256="d" * 64)
    assert same.name() == first.name()
    others = [
        record(model="run/raw.safetensors"),
        record(rounds=3),
        record(images_seen=12800),
        record(sampling=first.sampling.model_copy(update={"steps": 50})),
        record(sampling=first.sampling.model_copy(update={"seed": 1})),
        record(reference=first.reference.model_copy(update={"split": "all"})),
        record(extractor=first.extractor.model_copy(update={"sha256": "e" * 64})),
        record(metrics={"FD-cells": first.metrics["FD-cells"]}),
    ]
    assert len({first.name(), *(other.name() for other in others)}) == len(others) + 1
    assert first.name().startswith("prior-6400-cells-cccccccc-")
    assert others[1].name().startswith("prior-round-000003-cells-")


def test_a_name_is_a_file_in_its_folder_whatever_the_network_is_called() -> None:
    extractor = record().extractor.model_copy(update={"name": "../a b"})
    assert "/" not in record(extractor=extractor).name()


def test_records_beside_a_model_are_found_in_its_order_and_damaged_ones_left_out(tmp_path: Path) -> None:
    for rounds in (10, 2):
        write_record(tmp_path / "evaluations" / f"{rounds}.json", record(rounds=rounds))
    (tmp_path / "evaluations" / "half.json").write_text('{"schema_version": 1,')
    assert [found.rounds for found in records_of(tmp_path)] == [2, 10]
    assert list(records_of(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}'])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=r"a\.json is no record of an evaluation"):
        read_record(tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"b\.json is no record"):
        read_record(tmp_path / "b.json")


def test_a_person_sees_the_headline_first_with_intervals_floors_and_notes() -> None:
    shown = lines(record())
    table = [line.split() for line in shown[5:7]]
    assert table == [["KD-cells", "1.25"], ["FD-cells", "1.25", "1", "…", "1.5", "0.25", "(at", "20)"]]
    assert shown[-1] == "note         few"
